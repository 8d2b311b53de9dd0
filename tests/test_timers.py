"""Deadlines against a plain dictionary."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarmcache.timers import Timers

keys = st.sampled_from("abcd")
times = st.integers(0, 20).map(float)


class TimersAgainstADictionary(RuleBasedStateMachine):
    """Every operation on both; they must agree all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.timers: Timers[str] = Timers()
        self.model: dict[str, float] = {}

    @rule(key=keys, at_s=times | st.none())
    def set(self, key: str, at_s: float | None) -> None:
        self.timers.set(key, at_s)
        if at_s is None:
            self.model.pop(key, None)
        else:
            self.model[key] = at_s

    @rule(key=keys, at_s=times)
    def set_by(self, key: str, at_s: float) -> None:
        self.timers.set_by(key, at_s)
        self.model[key] = min(self.model.get(key, at_s), at_s)

    @rule(now_s=times)
    def pop_due(self, now_s: float) -> None:
        due = self.timers.pop_due(now_s)

        expected = {key for key, at_s in self.model.items() if at_s <= now_s}
        assert set(due) == expected
        assert len(due) == len(expected)
        assert [self.model[key] for key in due] == sorted(self.model[key] for key in due)
        for key in due:
            del self.model[key]

    @invariant()
    def the_next_deadline_is_the_earliest(self) -> None:
        assert self.timers.next_at_s() == min(self.model.values(), default=None)
        self.timers.check()


TestTimersAgainstADictionary = pytest.mark.slow(TimersAgainstADictionary.TestCase)
TestTimersAgainstADictionary.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)


def test_a_deadline_that_moves_all_the_time_stays_one() -> None:
    timers: Timers[str] = Timers()
    for step in range(1000):
        timers.set("moving", float(step))
        timers.set("fixed", 1e9)

    timers.check()
    assert timers.pop_due(999.0) == ["moving"]
    assert timers.next_at_s() == 1e9


def test_of_equal_deadlines_the_one_that_was_set_first_comes_first() -> None:
    timers: Timers[object] = Timers()
    for key in ("b", 3, ("a",)):  # keys need not be comparable
        timers.set(key, 1.0)
    timers.set("b", 2.0)
    timers.set("b", 1.0)

    assert timers.pop_due(1.0) == [3, ("a",), "b"]


def test_a_key_set_to_the_same_time_again_is_due_once() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 5.0)
    timers.set("a", None)
    timers.set("a", 5.0)

    assert timers.pop_due(5.0) == ["a"]
    assert timers.pop_due(5.0) == []
