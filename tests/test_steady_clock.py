"""How long something was not used, by a wall clock that anybody may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.steady_clock import STEP_MAX_S, ClockReading, read_clock, unused_since_s

DAY_S = 86400.0
MAX_AGE_S = 14 * DAY_S
YEAR_S = 365 * DAY_S


@dataclass
class Machine:
    """A machine with a wall clock. ``now_s``: what time it is really."""

    now_s: float = 1.7e9
    ahead_s: float = 0.0  # of the wall clock
    booted_s: float = 1.7e9
    boots: int = 0
    reading: ClockReading | None = None
    used_s: list[tuple[float, float]] = field(default_factory=list)  # really, and as noted

    def do(self, what: str, amount: float) -> None:
        match what:
            case "run":
                self.now_s += amount * 5 * DAY_S
            case "set":
                size_s = 2 * STEP_MAX_S + amount * YEAR_S
                self.look()  # every few seconds in truth
                self.ahead_s += size_s
                self.look()
            case "set back":
                self.look()
                self.ahead_s -= 2 * STEP_MAX_S + amount * YEAR_S
                self.look()
            case "off":
                self.now_s += amount * 30 * DAY_S
                self.booted_s = self.now_s
                self.boots += 1
            case "use":
                self.look()
                self.used_s.append((self.now_s, self.now_s + self.ahead_s))
        self.look()

    def look(self) -> None:
        wall_s, up_s = self.now_s + self.ahead_s, self.now_s - self.booted_s
        boot_id = b"%016d" % self.boots
        self.reading = read_clock(self.reading, wall_s, up_s, boot_id, MAX_AGE_S)

    def gone(self) -> list[float]:
        """For how long really what would go now has not been used."""
        assert self.reading is not None
        since_s = unused_since_s(self.reading, MAX_AGE_S)
        if since_s is None:
            return []
        return [self.now_s - really_s for really_s, noted_s in self.used_s if noted_s <= since_s]


steps = st.tuples(
    st.sampled_from(["run", "run", "run", "set", "set back", "off", "use", "use"]),
    st.floats(0.0, 1.0),
)


@given(st.lists(steps, max_size=30))
def test_nothing_goes_that_was_used_within_the_time_however_the_clock_is_set(
    history: list[Any],
) -> None:
    machine = Machine()
    machine.do("use", 0.0)
    for what, amount in history:
        machine.do(what, amount)
        assert all(unused_s >= MAX_AGE_S - 1.0 for unused_s in machine.gone())


def test_what_was_not_used_for_long_goes_in_spite_of_short_reboots_and_weekends_off() -> None:
    machine = Machine()
    machine.do("use", 0.0)
    for _ in range(4):
        machine.do("run", 0.5)
        machine.do("off", 0.1)

    assert machine.gone() == [machine.now_s - 1.7e9]


def test_a_clock_that_was_set_while_the_machine_was_off_costs_at_most_half_of_the_time() -> None:
    machine = Machine()
    machine.do("run", 1.0)
    machine.do("run", 1.0)
    machine.do("run", 1.0)
    for ahead_s, goes in ((MAX_AGE_S / 2 - 2.0, False), (MAX_AGE_S / 2 + 1.0, False)):
        machine.do("use", 0.0)
        machine.boots += 1
        machine.booted_s = machine.now_s
        machine.ahead_s += ahead_s
        machine.look()
        assert bool(machine.gone()) is goes


def test_a_file_goes_again_when_the_clock_has_been_right_for_the_whole_time() -> None:
    machine = Machine()
    machine.do("use", 0.0)
    machine.do("set", 1.0)
    for _ in range(2):
        machine.do("run", 1.0)
        assert machine.gone() == []
    machine.do("run", 1.0)

    assert machine.gone() == [machine.now_s - 1.7e9]


def test_small_corrections_of_the_clock_change_nothing() -> None:
    machine = Machine()
    machine.look()
    for _ in range(100):
        machine.ahead_s -= 1.0
        machine.do("run", 0.01)

    assert machine.reading is not None
    assert machine.reading.steady_since_s == 1.7e9
