"""Which replicas are given up: enough, no more than needed, and by any policy."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.eviction import (
    AGE_MIN_S,
    WANTED_S,
    Candidate,
    Policy,
    Worth,
    choose_victims,
    least_recently_used,
    replicas_elsewhere_first,
)

NOW_S = 100_000.0

candidates = st.lists(
    st.builds(
        Candidate,
        st.binary(min_size=2, max_size=2),
        st.integers(1, 100),
        st.integers(0, 20).map(float),
        st.none() | st.integers(0, 2),
    ),
    max_size=12,
    unique_by=lambda candidate: candidate.version_id,
)


def biggest_first(candidate: Candidate, now_s: float) -> Worth:
    return (-candidate.freed_bytes,)


policies = st.sampled_from([least_recently_used, replicas_elsewhere_first, biggest_first])
ages_s = st.floats(0, 90_000)


def freed(victims: list[Candidate]) -> int:
    return sum(victim.freed_bytes for victim in victims)


@given(candidates, st.integers(1, 400), policies)
def test_what_is_chosen_is_enough_and_none_of_it_could_be_spared(
    candidates: list[Candidate], wanted_bytes: int, policy: Policy
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
    candidates: list[Candidate], wanted_bytes: int, policy: Policy
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


# --- replicas_elsewhere_first ---------------------------------------------------------------------


def aged(age_s: float, replicas_elsewhere: int, name: bytes = b"") -> Candidate:
    return Candidate(name, 1, NOW_S - age_s, replicas_elsewhere)


def goes_before(first: Candidate, second: Candidate) -> bool:
    return replicas_elsewhere_first(first, NOW_S) < replicas_elsewhere_first(second, NOW_S)


@given(candidates, st.integers(1, 400))
def test_where_nothing_is_known_of_other_nodes_the_least_recently_used_go(
    candidates: list[Candidate], wanted_bytes: int
) -> None:
    unknown = [replace(each, replicas_elsewhere=0) for each in candidates]
    expected = choose_victims(unknown, wanted_bytes, NOW_S, least_recently_used)

    assert choose_victims(unknown, wanted_bytes, NOW_S, replicas_elsewhere_first) == expected


@given(ages_s, ages_s, st.integers(1, 9))
def test_of_equally_old_ones_those_that_other_nodes_have_go_first(
    exponent_s: float, other_s: float, count: int
) -> None:
    lower_s = 2.0 ** (int(exponent_s) % 17)
    equally_old = [lower_s * (1 + each / 90_001) for each in (exponent_s, other_s)]

    assert goes_before(aged(equally_old[0], count), aged(equally_old[1], 0))


@given(ages_s, ages_s, st.integers(1, 9), st.integers(1, 9))
def test_what_is_twice_as_old_goes_first_whoever_has_it(
    age_s: float, more_s: float, older_count: int, younger_count: int
) -> None:
    younger_s = max(age_s, AGE_MIN_S)

    assert goes_before(aged(2 * younger_s + more_s, older_count), aged(younger_s, younger_count))


@given(st.floats(0, WANTED_S - 1), ages_s, st.integers(1, 9))
def test_the_last_replica_of_a_file_wanted_within_the_hour_goes_last(
    age_s: float, other_s: float, other_count: int
) -> None:
    assert goes_before(aged(other_s, other_count), aged(age_s, 0))


def test_the_last_replica_of_a_file_that_nobody_wanted_for_long_is_nothing_special() -> None:
    assert goes_before(aged(70_000, 0), aged(20_000, 3))
    assert goes_before(aged(70_000, 0), aged(20_000, 0))
