"""Who is whose neighbour, and who is introduced to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcache.neighbourhood import FAR_PART, Neighbourhood

PEERS_MAX = 40
# Of so many members all are one another's neighbours.
SMALL = PEERS_MAX // 2 + 1

LAYOUTS: dict[str, Callable[[int], str]] = {
    "none has a label": lambda number: "",
    "racks of sixteen": lambda number: f"rack {number // 16}",
    "racks of sixty": lambda number: f"rack {number // 60}",
    "by turns": lambda number: f"rack {number % 5}",
    "each in its own": lambda number: f"rack {number}",
    "all in one": lambda number: "rack",
    "one alone": lambda number: f"rack {min(number, 1)}",
    "every other has a label": lambda number: f"rack {number // 16}" if number % 2 else "",
}


class Bench:
    """Members who are introduced when they come, and again when they know too few."""

    def __init__(self, seed: int = 1, peers_max: int = PEERS_MAX) -> None:
        self.neighbourhood = Neighbourhood(Random(seed), peers_max)
        self.members: list[str] = []

    def introduce(self, name: str) -> None:
        for other in self.neighbourhood.choose(name, self.members):
            self.neighbourhood.link(name, other)

    def come(self, name: str, rack: str) -> None:
        self.members.append(name)
        self.neighbourhood.add(name, rack)
        self.introduce(name)

    def go(self, name: str) -> None:
        self.members.remove(name)
        for other in self.neighbourhood.remove(name):
            if self.neighbourhood.lacks(other):
                self.introduce(other)

    def near(self, name: str) -> int:
        rack = self.neighbourhood.rack_of(name)
        others = self.neighbourhood.of(name)
        return sum(bool(rack) and self.neighbourhood.rack_of(other) == rack for other in others)

    def reached(self, within: Iterable[str] | None = None) -> int:
        """How many are reached from the first one, by way of those in ``within`` only."""
        left = set(self.members if within is None else within)
        waiting = [min(left)]
        left.remove(waiting[0])
        count = 0
        while waiting:
            count += 1
            found = left.intersection(self.neighbourhood.of(waiting.pop()))
            left -= found
            waiting += found
        return count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, SMALL, 200])
def test_everybody_is_reached_wherever_it_stands(layout: str, count: int) -> None:
    bench = Bench()
    for number in range(count):
        bench.come(f"n{number:03}", LAYOUTS[layout](number))
    bench.neighbourhood.check()

    assert bench.reached() == count
    known = [len(bench.neighbourhood.of(name)) for name in bench.members]
    assert max(known) <= PEERS_MAX and min(known) >= min(count - 1, PEERS_MAX // 4)


@pytest.mark.parametrize("layout", ["racks of sixteen", "racks of sixty", "by turns"])
def test_most_neighbours_are_in_the_same_rack_and_a_few_are_not(layout: str) -> None:
    bench = Bench()
    for number in range(240):
        bench.come(f"n{number:03}", LAYOUTS[layout](number))

    near = sum(bench.near(name) for name in bench.members)
    known = sum(len(bench.neighbourhood.of(name)) for name in bench.members)
    assert near > known / 2
    for name in bench.members[60:]:  # before these came there was nobody in other racks
        assert len(bench.neighbourhood.of(name)) - bench.near(name) >= PEERS_MAX // FAR_PART
    for rack in bench.neighbourhood.racks.values():
        assert bench.reached(rack) == len(rack), "a rack that falls apart fetches chunks twice"


def test_in_a_rack_of_twenty_everybody_knows_everybody() -> None:
    bench = Bench()
    for number in range(100):
        bench.come(f"n{number:03}", f"rack {number % 5}")

    assert {bench.near(name) for name in bench.members} == {19}


def test_whoever_loses_its_last_neighbour_in_other_racks_gets_new_ones() -> None:
    bench = Bench()
    for number in range(64):
        bench.come(f"n{number:03}", LAYOUTS["racks of sixteen"](number))
    for number in range(16, 48):
        bench.go(f"n{number:03}")

    for name in bench.members:
        assert len(bench.neighbourhood.of(name)) - bench.near(name) >= PEERS_MAX // FAR_PART
    assert bench.reached() == 32


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 39), st.integers(0, 3)), max_size=120),
    st.sampled_from([2, 8, 40]),
)
def test_comings_and_goings_leave_neighbours_on_both_sides_and_nobody_alone(
    steps: list[tuple[bool, int, int]], peers_max: int
) -> None:
    bench = Bench(peers_max=peers_max)
    for comes, number, rack in steps:
        name = f"n{number:02}"
        if comes and name not in bench.members:
            bench.come(name, f"rack {rack}" if rack else "")
        elif not comes and name in bench.members:
            bench.go(name)
        bench.neighbourhood.check()
    if peers_max >= 8:
        for name in bench.members:
            assert bench.neighbourhood.of(name) or len(bench.members) == 1
