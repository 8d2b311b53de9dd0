"""Deadlines of many things, one wake-up call.

Pure logic: holds times, reads no clock. A machine with thousands of downloads asks for the next
deadline after every event, and moves some; neither takes a scan.

Invariant: every key with a deadline has exactly one entry in the order of all deadlines.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

from sortedcontainers import SortedList

Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    """At most one deadline per key. Of equal ones that which was set first comes first."""

    def __init__(self) -> None:
        self._numbers = count()
        self._entries: dict[Key, tuple[float, int, Key]] = {}
        self._order: SortedList[tuple[float, int, Key]] = SortedList()
        self._next_at_s: float | None = None  # asked for far more often than it changes

    def set(self, key: Key, at_s: float | None) -> None:
        """Give ``key`` this deadline instead of its former one; None for no deadline."""
        former = self._entries.get(key)
        if former is not None:
            if former[0] == at_s:
                return
            self._order.remove(former)
            del self._entries[key]
        if at_s is not None:
            entry = self._entries[key] = (at_s, next(self._numbers), key)
            self._order.add(entry)
        self._next_at_s = self._order[0][0] if self._order else None

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
        return self._next_at_s

    def pop_due(self, now_s: float) -> list[Key]:
        """The keys whose deadlines have come, earliest first; they have none afterwards."""
        due = []
        while self._order and self._order[0][0] <= now_s:
            _, _, key = self._order.pop(0)
            del self._entries[key]
            due.append(key)
        if due:
            self._next_at_s = self._order[0][0] if self._order else None
        return due

    def check(self) -> None:
        """Assert the invariant."""
        assert list(self._order) == sorted(self._entries.values()), "a deadline would be missed"
        first = self._order[0][0] if self._order else None
        assert self._next_at_s == first, "the first deadline would be missed"
