"""How long whoever waits for a file does so, in every order of what may happen meanwhile."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.chunks import FileVersion
from swarmcache.fetching import ABANDON_S, COMPLAIN_S, DISK_PATIENCE, Fetching

STALL_S = 5.0
ACTIONS = ("want", "gone", "progress", "on disk", "publishing", "join", "wait")


def fetching(now_s: float = 100.0) -> Fetching:
    """A file that was just wanted, by nobody yet."""
    version = FileVersion(b"/nfs/file", 3000, 1)
    return Fetching(version, "nfs01:/export", "ada", 1000, True, STALL_S, progress_at_s=now_s)


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.floats(0.001, 20.0)), max_size=30))
def test_whoever_waits_is_answered_in_bounded_time_and_not_before(
    steps: list[tuple[str, float]],
) -> None:
    wanted = fetching()
    now_s = 100.0
    since_s: dict[int, float] = {}
    for number, (action, wait_s) in enumerate(steps):
        match action:
            case "want":
                wanted.requests[number] = since_s[number] = now_s
            case "gone" if wanted.requests:
                del wanted.requests[next(iter(wanted.requests))]
            case "progress":
                wanted.progress_at_s = now_s
            case "on disk":
                wanted.on_disk = True
            case "publishing":
                wanted.publishing = True
            case "join":
                wanted.joined = True
            case "wait":
                until_s = now_s + wait_s
                while (due_s := wanted.due_s(now_s)) <= until_s:
                    now_s = max(now_s, due_s)
                    if wanted.is_abandoned(now_s):
                        assert not wanted.requests
                        assert now_s >= wanted.progress_at_s + ABANDON_S
                        return
                    for request in wanted.take_impatient(now_s):
                        waited_s = now_s - max(wanted.progress_at_s, since_s[request])
                        assert waited_s >= wanted.patience_s - 1e-6
                    wanted.take_complaint(now_s)
                    assert wanted.due_s(now_s) > now_s, "woken for ever"
                now_s = until_s
        wanted.check()
        for request in wanted.requests:
            waited_s = now_s - max(wanted.progress_at_s, since_s[request])
            assert action != "wait" or waited_s < wanted.patience_s


def test_the_disk_is_given_more_time_than_peers() -> None:
    wanted = fetching()

    assert wanted.patience_s == STALL_S * DISK_PATIENCE
    wanted.on_disk = True
    assert wanted.patience_s == STALL_S
    wanted.publishing = True
    assert wanted.patience_s == STALL_S * DISK_PATIENCE


def test_who_waited_for_an_attempt_under_which_the_disk_failed_waits_for_the_next_one() -> None:
    wanted = fetching()
    wanted.requests[1] = 100.0
    wanted.on_disk = True

    again = wanted.again(103.0)

    assert again.requests == {1: 100.0}
    assert not wanted.requests
    assert (again.failures, again.on_disk, again.progress_at_s) == (1, False, 103.0)
    assert again.due_s(103.0) == 103.0 + STALL_S * DISK_PATIENCE


def test_the_tracker_is_asked_for_help_only_when_nothing_has_come_for_a_while() -> None:
    wanted = fetching()
    wanted.requests[1] = 100.0
    wanted.on_disk = True
    assert wanted.due_s(100.0) == 100.0 + STALL_S

    wanted.joined = True
    assert wanted.due_s(100.0) == 100.0 + COMPLAIN_S
    wanted.take_complaint(100.0 + COMPLAIN_S)
    assert wanted.due_s(101.0) == 101.0 + COMPLAIN_S
