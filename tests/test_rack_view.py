"""What a download knows of its own rack."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.rack_view import COMING_S, RackView


def test_only_nodes_with_the_same_label_are_near_and_without_a_label_nobody_is() -> None:
    rack = RackView("r1")
    assert rack.meet("a", "r1") and not rack.meet("b", "r2") and not rack.meet("c", "")
    assert rack and "a" in rack and "b" not in rack

    nowhere = RackView("")
    assert not nowhere.meet("a", "") and not nowhere.meet("b", "r1") and not nowhere


def test_what_a_neighbour_fetches_is_left_to_it_until_it_takes_it_back_or_too_long() -> None:
    rack = RackView("r1")
    rack.meet("a", "r1")
    rack.brings("a", [0, 2], 10.0)
    rack.brings("far", [1], 10.0)
    assert rack.coming(10.0) == 0b101

    rack.brings("a", [2], 11.0)
    assert rack.coming(11.0) == 0b100
    assert rack.wake_at_s() == 11.0 + COMING_S
    assert rack.coming(11.0 + COMING_S) == 0 and rack.wake_at_s() is None


def test_what_a_neighbour_that_is_gone_was_fetching_is_anybodys() -> None:
    rack = RackView("r1")
    for node in ("a", "b"):
        rack.meet(node, "r1")
    rack.brings("a", [0], 0.0)
    rack.brings("b", [0, 1], 0.0)
    rack.part("a")

    assert rack.coming(0.0) == 0b10 and "a" not in rack


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["meet", "part", "brings", "came", "wait"]),
        st.sampled_from("abc"),
        st.lists(st.integers(0, 5), unique=True),
    )
)


@given(STEPS)
def test_nothing_is_left_to_anybody_for_longer_than_it_may_take(
    steps: list[tuple[str, str, list[int]]],
) -> None:
    rack = RackView("r1")
    now_s, told_s = 0.0, dict[int, float]()
    for step, node, chunks in steps:
        match step:
            case "meet":
                rack.meet(node, "r1")
            case "part":
                rack.part(node)
            case "brings":
                rack.brings(node, chunks, now_s)
                told_s |= {chunk: now_s for chunk in chunks if node in rack}
            case "came":
                rack.came(sum(1 << chunk for chunk in chunks))
                assert not any(rack.coming(now_s) >> chunk & 1 for chunk in chunks)
            case "wait":
                now_s += COMING_S / 2
        coming = rack.coming(now_s)
        rack.check()
        for chunk in range(6):
            if coming >> chunk & 1:
                assert told_s[chunk] + COMING_S > now_s
