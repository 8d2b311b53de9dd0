"""Under which leases a node may read: whatever comes in whatever order, none that was over."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.messages import Lease
from swarmcache.peer_leases import PeerLeases

FILES = [b"a" * 32, b"b" * 32]


def granted(leases: PeerLeases, lease_id: int, until_s: float, now_s: float) -> None:
    """The tracker grants a lease, and its range is read."""
    leases.extend(until_s, now_s)
    leases.begin(Lease(lease_id, FILES[lease_id % 2], 0, 4, until_s), "nfs01:/export", "ada")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("grant", "renew", "adopt", "cancel", "end")),
        st.integers(0, 3),
        st.floats(0.1, 4.0),
    ),
    max_size=30,
)


@given(STEPS)
def test_a_lease_that_was_over_once_is_never_read_under_again(
    steps: list[tuple[str, int, float]],
) -> None:
    leases = PeerLeases()
    over: set[int] = set()
    now_s = 100.0
    for number, (action, some, pause_s) in enumerate(steps):
        now_s += pause_s
        over |= {each for each in range(number) if not leases.may_read(each, now_s)}
        held = [lease.lease_id for lease in leases.held()]
        match action:
            case "grant":
                granted(leases, number, now_s + 2.5, now_s)
            case "renew":
                leases.renew(now_s + 2.5, now_s)
            case "adopt":  # by a tracker that knows some of those which have not run out
                alive = [each for each in held if each not in over]
                ended = leases.adopted(alive[:some], now_s + 2.5)
                assert len(ended) == len(held) - len(alive[:some])
            case "cancel":
                leases.cancel(FILES[some % 2], "changed")
            case "end":
                for each in held[:1]:
                    assert leases.end(each) is not None
        assert not any(leases.may_read(each, now_s) for each in over)
        leases.check(FILES)

    assert not any(leases.may_read(lease.lease_id, math.inf) for lease in leases.held())


def test_a_lease_that_is_granted_late_does_not_shorten_the_others() -> None:
    leases = PeerLeases()
    granted(leases, 1, 103.0, 100.0)
    granted(leases, 2, 102.0, 100.5)

    assert leases.may_read(1, 102.9)
    assert leases.may_read(2, 102.9)


def test_the_first_reason_to_cancel_a_lease_is_the_one_that_is_told() -> None:
    leases = PeerLeases()
    granted(leases, 1, 103.0, 100.0)
    leases.cancel(FILES[1], "changed")
    leases.cancel(FILES[1], "the disk is full")

    assert not leases.may_read(1, 100.0)
    lease = leases.end(1)
    assert lease is not None
    assert lease.cancelled == "changed"
    assert leases.end(1) is None
    assert not leases


def test_a_lease_of_which_nothing_is_under_way_is_a_bug() -> None:
    leases = PeerLeases()
    granted(leases, 1, 103.0, 100.0)

    with pytest.raises(AssertionError, match="nobody reads"):
        leases.check([FILES[0]])
