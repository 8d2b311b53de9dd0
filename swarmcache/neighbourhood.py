"""Who is whose neighbour in one swarm, and who is to be introduced to whom next.

Pure logic, and a part of ``TrackerSwarms``, which tells both sides.

In a small swarm everybody is everybody's neighbour. In a large one a newcomer gets some at random.
If it is known in which rack it stands, these are mostly members of that rack, and a few of others:
biased neighbour selection, with which swarms are as fast and most traffic stays near (Bindal et
al., ICDCS 2006). Members without a label are in no rack together.

Invariants: neighbours are neighbours on both sides; nobody is its own; everybody stands in the rack
of its label, if it has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from random import Random

# A newcomer gets so many neighbours in other racks, as a part of its limit. Four simulated racks of
# 16 nodes came to nearly the same with 2, 4 and 8 of 40: efficiency 0.81, 0.81 and 0.80, and 1.03
# copies into each rack. More of them outlive more failures.
FAR_PART = 10


@dataclass(slots=True)
class Position:
    """One member: its rack, and whom it knows. ``far``: how many of them are in other racks."""

    rack: str
    neighbours: set[str] = field(default_factory=set)
    far: int = 0


class Neighbourhood:
    """All pairs of neighbours. ``peers_max``: how many a member may have."""

    def __init__(self, rng: Random, peers_max: int) -> None:
        self._rng = rng
        self._peers_max = peers_max
        self._some = -(-peers_max // 4)
        self._few = -(-peers_max // FAR_PART)
        self._positions: dict[str, Position] = {}
        self._racks: dict[str, list[str]] = {}

    @property
    def racks(self) -> Mapping[str, Sequence[str]]:
        """The members of each rack that has a label."""
        return self._racks

    def rack_of(self, name: str) -> str:
        """The label of a member's rack; empty where it has none."""
        return self._positions[name].rack

    def of(self, name: str) -> AbstractSet[str]:
        """The neighbours of a member."""
        return self._positions[name].neighbours

    def add(self, name: str, rack: str) -> None:
        """A member has come, and knows nobody yet."""
        self._positions[name] = Position(rack)
        if rack:
            self._racks.setdefault(rack, []).append(name)

    def remove(self, name: str) -> list[str]:
        """A member is gone; returns whose neighbour it was."""
        gone = self._positions.pop(name)
        for other in gone.neighbours:
            position = self._positions[other]
            position.neighbours.discard(name)
            position.far -= self._are_far(gone, position)
        if gone.rack:
            self._racks[gone.rack].remove(name)
            if not self._racks[gone.rack]:
                del self._racks[gone.rack]
        return sorted(gone.neighbours)

    def link(self, name: str, other: str) -> None:
        """Make two members neighbours."""
        one, two = self._positions[name], self._positions[other]
        if other not in one.neighbours:
            one.neighbours.add(other)
            two.neighbours.add(name)
            far = self._are_far(one, two)
            one.far += far
            two.far += far

    def lacks(self, name: str) -> bool:
        """A member of a large swarm knows too few others, in all or in other racks."""
        position = self._positions[name]
        some = self._peers_max // 4
        if len(self._positions) <= some:
            return False
        few_far = position.far < min(self._few, len(self._positions) - self._rack_size(position))
        return len(position.neighbours) < some or few_far

    def choose(self, name: str, members: Sequence[str]) -> list[str]:
        """New neighbours for one of ``members``, which are all.

        Those who come later choose among those who are here, so whoever is here must have room
        left, or the swarm would fall apart into groups that never meet. With a quarter of the
        limit per newcomer a member fills up only when the swarm is twenty times (e to the third) as
        large as when it came itself.
        """
        position = self._positions[name]
        if len(members) - 1 <= self._peers_max // 2:
            return self._pick(name, members, self._peers_max - len(position.neighbours))
        near = self._choose_near(name, position)
        far = self._some - len(position.neighbours) - len(near)
        if position.rack in self._racks and len(self._racks[position.rack]) > 1:
            far = max(far, self._few - position.far)
        drawn = self._drawn(members, 8 * self._peers_max)
        others = (other for other in drawn if self._are_far(position, self._positions[other]))
        return near + self._pick(name, others, max(far, 0))

    def choose_one(self, name: str, members: Sequence[str]) -> list[str]:
        """One more neighbour for one of ``members``, by chance; none where there is no room."""
        if len(self._positions[name].neighbours) >= self._peers_max:
            return []
        return self._pick(name, self._drawn(members, 8 * self._peers_max), 1)

    def _choose_near(self, name: str, position: Position) -> list[str]:
        rack = self._racks.get(position.rack, [])
        if len(rack) - 1 <= self._peers_max // 2:
            return self._pick(name, rack, self._peers_max)
        room = self._some - (len(position.neighbours) - position.far)
        return self._pick(name, self._drawn(rack, 8 * self._peers_max), max(room, 0))

    def _pick(self, name: str, candidates: Iterable[str], room: int) -> list[str]:
        """The first of them that have room, and are not neighbours already."""
        position = self._positions[name]
        chosen: dict[str, None] = {}
        for other in candidates:
            if len(chosen) >= room:
                break
            taken = other == name or other in position.neighbours
            if not taken and self._has_room(self._positions[other], position):
                chosen[other] = None
        return list(chosen)

    def _has_room(self, position: Position, other: Position) -> bool:
        """Whoever is in a rack keeps room for those who come there, and some for others."""
        known = len(position.neighbours)
        if not position.rack or known >= self._peers_max:
            return known < self._peers_max
        if not self._are_far(position, other):
            return known - position.far < self._peers_max - self._few
        alone = self._rack_size(position) == 1
        return position.far < self._peers_max - (self._some if alone else self._peers_max // 2)

    def _rack_size(self, position: Position) -> int:
        return len(self._racks[position.rack]) if position.rack else 1

    @staticmethod
    def _are_far(one: Position, two: Position) -> bool:
        return not one.rack or one.rack != two.rack

    def _drawn(self, names: Sequence[str], tries: int) -> Iterator[str]:
        for _ in range(tries):
            yield names[int(self._rng.random() * len(names))]

    def check(self) -> None:
        """Assert the invariants."""
        for name, position in self._positions.items():
            assert name not in position.neighbours, "a node is its own neighbour"
            far = 0
            for other in position.neighbours:
                assert name in self._positions[other].neighbours, "neighbours on one side only"
                far += self._are_far(position, self._positions[other])
            assert far == position.far, "neighbours in other racks miscounted"
        standing = {rack: set(names) for rack, names in self._racks.items()}
        expected: dict[str, set[str]] = {}
        for name, position in self._positions.items():
            if position.rack:
                expected.setdefault(position.rack, set()).add(name)
        assert standing == expected, "somebody stands in another rack"
