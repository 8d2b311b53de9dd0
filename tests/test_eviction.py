"""Which replicas are given up: enough, no more than needed, and by any policy."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.eviction import Candidate, choose_victims, least_recently_used

candidates = st.lists(
    st.builds(
        Candidate,
        st.binary(min_size=2, max_size=2),
        st.integers(1, 100),
        st.integers(0, 20).map(float),
    ),
    max_size=12,
    unique_by=lambda candidate: candidate.version_id,
)


def biggest_first(candidate: Candidate, now_s: float) -> float:
    return -candidate.freed_bytes


policies = st.sampled_from([least_recently_used, biggest_first])


def freed(victims: list[Candidate]) -> int:
    return sum(victim.freed_bytes for victim in victims)


@given(candidates, st.integers(1, 400), policies)
def test_what_is_chosen_is_enough_and_none_of_it_could_be_spared(
    candidates: list[Candidate], wanted_bytes: int, policy: Callable[[Candidate, float], float]
) -> None:
    victims = choose_victims(candidates, wanted_bytes, 100.0, policy)

    assert len(set(victims)) == len(victims)
    assert set(victims) <= set(candidates)
    if freed(candidates) < wanted_bytes:
        assert victims == []
    else:
        assert freed(victims) >= wanted_bytes
        assert all(freed(victims) - v.freed_bytes < wanted_bytes for v in victims)


@given(candidates, st.integers(1, 400), policies)
def test_who_is_spared_is_worth_more_or_not_needed(
    candidates: list[Candidate], wanted_bytes: int, policy: Callable[[Candidate, float], float]
) -> None:
    victims = choose_victims(candidates, wanted_bytes, 100.0, policy)
    worth = {each: (policy(each, 100.0), each.version_id) for each in candidates}

    assert [worth[victim] for victim in victims] == sorted(worth[victim] for victim in victims)
    if victims:  # the last victim was needed with all that are worth less than it
        less = [each for each in candidates if worth[each] < worth[victims[-1]]]
        assert freed(less) < wanted_bytes


@given(candidates, st.integers(1, 400))
def test_the_choice_does_not_depend_on_the_order_of_the_candidates(
    candidates: list[Candidate], wanted_bytes: int
) -> None:
    expected = choose_victims(candidates, wanted_bytes, 100.0)

    assert choose_victims(candidates[::-1], wanted_bytes, 100.0) == expected


def test_the_least_recently_used_go_first_and_a_policy_can_say_otherwise() -> None:
    old, middle, new = (Candidate(bytes([i]), 10 * i, float(i)) for i in (1, 2, 3))

    assert choose_victims([new, old, middle], 25, 9.0) == [old, middle]
    assert choose_victims([new, old, middle], 25, 9.0, biggest_first) == [new]


def test_small_ones_are_spared_where_a_bigger_one_has_to_go_anyway() -> None:
    sizes = enumerate((1, 5, 8))
    old, middle, new = (Candidate(bytes([i]), size, float(i)) for i, size in sizes)

    assert choose_victims([old, middle, new], 9, 9.0) == [old, new]
