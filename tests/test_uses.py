"""What the daemon knows of the use of its replicas: what is leaving is not handed out."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from swarmcache.errors import NoSpace
from swarmcache.uses import Uses

ONE, OTHER = b"one", b"other"


def test_what_is_leaving_is_not_handed_out_until_it_has_left() -> None:
    uses = Uses()
    assert uses.leave(ONE, newest_s=100.0)

    assert not uses.note_used(ONE, 101.0)
    assert uses.note_used(OTHER, 101.0)
    uses.left(ONE)
    assert uses.note_used(ONE, 102.0)
    assert uses.used_s(ONE) == 102.0


def test_what_was_handed_out_or_is_held_does_not_begin_to_leave() -> None:
    uses = Uses()
    uses.note_used(ONE, 101.0)
    assert not uses.leave(ONE, newest_s=100.0)
    assert uses.leave(ONE, newest_s=101.0)
    uses.left(ONE)

    uses.hold(OTHER)
    uses.hold(OTHER)
    uses.release(OTHER)
    assert uses.held(OTHER)
    assert not uses.leave(OTHER, newest_s=100.0)
    uses.release(OTHER)
    assert uses.leave(OTHER, newest_s=100.0)


def test_a_time_of_use_is_known_here_or_in_the_index_at_every_moment() -> None:
    uses = Uses()
    index: dict[bytes, float] = {}

    def fail(noted: Mapping[bytes, float]) -> None:
        raise NoSpace("the index cannot grow")

    def write(noted: Mapping[bytes, float]) -> None:
        assert uses.used_s(ONE) == 101.0  # still here while it is written
        index.update(noted)
        uses.note_used(OTHER, 103.0)  # meanwhile

    uses.note_used(ONE, 101.0)
    uses.note_used(OTHER, 102.0)
    with pytest.raises(NoSpace):
        uses.flush(fail)
    assert uses.used_s(ONE) == 101.0

    uses.flush(write)
    assert index == {ONE: 101.0, OTHER: 102.0}
    assert (uses.used_s(ONE), uses.used_s(OTHER)) == (0.0, 103.0)
