"""Deadlines of many things, one wake-up call.

Pure logic: holds times, reads no clock. A machine with thousands of downloads asks for the next
deadline after every event, and moves some; neither takes a scan.

A deadline that was moved or taken away stays in the heap until it comes to its top, or until most
entries there are such.

Invariant: the top of the heap is the earliest deadline, and every deadline is in the heap once.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
# Fewer entries that do not count any more are not worth clearing away.
CLEAR_MIN = 16


class Timers(Generic[Key]):
    """At most one deadline per key. Of equal ones that which was set first comes first."""

    def __init__(self) -> None:
        self._numbers = count()
        self._entries: dict[Key, tuple[float, int, Key]] = {}
        self._heap: list[tuple[float, int, Key]] = []

    def set(self, key: Key, at_s: float | None) -> None:
        """Give ``key`` this deadline instead of its former one; None for no deadline."""
        former = self._entries.get(key)
        if at_s is not None:
            if former is not None and former[0] == at_s:
                return
            entry = self._entries[key] = (at_s, next(self._numbers), key)
            heappush(self._heap, entry)
        elif former is not None:
            del self._entries[key]
        if former is not None:
            self._clear_top()

    def set_by(self, key: Key, at_s: float) -> None:
        """Give ``key`` this deadline unless it has an earlier one. For deadlines that keep moving
        away: whoever is woken early asks again, which is cheaper than moving each time."""
        former_s = self.at_s(key)
        if former_s is None or at_s < former_s:
            self.set(key, at_s)

    def at_s(self, key: Key) -> float | None:
        """The deadline of ``key``, or None."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def next_at_s(self) -> float | None:
        """The earliest deadline of all, or None."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_s: float) -> list[Key]:
        """The keys whose deadlines have come, earliest first; they have none afterwards."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            _, _, key = heappop(self._heap)
            del self._entries[key]
            due.append(key)
            self._clear_top()
        return due

    def _clear_top(self) -> None:
        """See to it that the top of the heap counts, and most other entries do."""
        if len(self._heap) > 2 * len(self._entries) + CLEAR_MIN:
            self._heap = list(self._entries.values())
            heapify(self._heap)
        while self._heap and self._entries.get(self._heap[0][2]) != self._heap[0]:
            heappop(self._heap)

    def check(self) -> None:
        """Assert the invariant."""
        entries = self._entries
        counting = [entry for entry in self._heap if entries.get(entry[2]) == entry]
        assert sorted(counting) == sorted(entries.values()), "a deadline would be missed"
        assert self.next_at_s() == min(entries.values(), default=(None,))[0], "woken in vain"
        assert len(self._heap) <= 2 * len(entries) + CLEAR_MIN, "the heap only grows"
