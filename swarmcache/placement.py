"""Which nodes are asked to take replicas of the same files, and which ones instead of those that
cannot.

Pure logic: nodes in, choice out. Who asks them, and what there is to be known of them, is the
caller's.

A node that has some of the files already comes first, so that asking twice places nothing twice;
then those with most free space. Whose disk is full or fails, or who is taken for dead, is not asked
at all.

Invariant: no node is asked twice; as long as there are others, as many nodes are being asked or
have succeeded as there shall be copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownNode:
    """What is known of a node. ``node``: its control address, ``name``: of its host.

    ``cached_bytes``: what its cache has of its disk, some of which could make room; ``trouble``:
    why it is not to be asked.
    """

    node: str
    name: str
    free_bytes: int | None = None
    cached_bytes: int = 0
    trouble: str = ""

    def lacking_room(self, needed_bytes: int) -> KnownNode:
        """The same, with that as its trouble if even an empty cache had no room for so much."""
        free_bytes = self.free_bytes
        if self.trouble or free_bytes is None or free_bytes + self.cached_bytes >= needed_bytes:
            return self
        room_bytes = free_bytes + self.cached_bytes
        return replace(self, trouble=f"it has room for {room_bytes} bytes at most")


def nodes_of_status(cluster: Mapping[str, Any]) -> list[KnownNode]:
    """The nodes in the tracker's answer to ``status``. A disk that was not measured yet is one of
    which nothing is known."""
    return [
        KnownNode(
            each["node"],
            each["name"] or each["node"],
            each["free_bytes"] if each["capacity_bytes"] else None,
            each["used_bytes"],
        )
        for each in cluster.get("nodes", [])
    ]


def rank(
    nodes: Iterable[KnownNode], preferred: Sequence[str], held: Mapping[str, int]
) -> list[KnownNode]:
    """The nodes in the order in which they are to be asked, without those that are in trouble.

    ``preferred``: nodes that were chosen for other files of the same job. ``held``: how many of
    the files each has.
    """
    places = {node: place for place, node in enumerate(preferred)}
    return sorted(
        (each for each in nodes if not each.trouble),
        key=lambda each: (
            places.get(each.node, len(places)),
            -held.get(each.node, 0),
            -(each.free_bytes or 0),
            each.node,
        ),
    )


class Placement:
    """Asks nodes in their order. ``copies``: how many of them; None for all."""

    def __init__(self, nodes: Sequence[str], copies: int | None) -> None:
        self._waiting = deque(nodes)
        self._copies = len(nodes) if copies is None else copies
        self._asked: set[str] = set()
        self._succeeded: set[str] = set()

    def more(self) -> list[str]:
        """The nodes that are to be asked now."""
        found: list[str] = []
        while self._waiting and len(self._asked) + len(self._succeeded) < self._copies:
            found.append(self._waiting.popleft())
            self._asked.add(found[-1])
        return found

    def ended(self, node: str, *, succeeded: bool) -> list[str]:
        """A node has all the files, or never will; the nodes that are to be asked now."""
        self._asked.remove(node)
        if succeeded:
            self._succeeded.add(node)
        return self.more()

    def check(self) -> None:
        """Assert the invariant."""
        count = len(self._asked) + len(self._succeeded)
        assert not self._asked & self._succeeded, "a node is asked for what it has"
        assert not self._waiting or count >= self._copies, "nobody is asked in place of another"
        assert count <= self._copies or not self._asked, "more nodes are asked than wanted"
