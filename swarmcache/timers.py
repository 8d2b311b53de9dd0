"""Deadlines of many things, one wake-up call.

Pure logic: holds times, reads no clock. A machine with thousands of downloads asks for the next
deadline after every event; a heap with stale entries answers that without a scan.

Invariant: for every key with a deadline the heap has an entry with exactly that deadline.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

STALE_FACTOR = 16  # the heap may be this many times as long as there are deadlines


class Timers(Generic[Key]):
    """At most one deadline per key."""

    def __init__(self) -> None:
        self._deadline_s: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._counter = 0

    def set(self, key: Key, at_s: float | None) -> None:
        """Give ``key`` this deadline instead of its former one; None for no deadline."""
        if at_s is None:
            self._deadline_s.pop(key, None)
        elif self._deadline_s.get(key) != at_s:
            self._deadline_s[key] = at_s
            self._counter += 1
            heapq.heappush(self._heap, (at_s, self._counter, key))
            if len(self._heap) > STALE_FACTOR * len(self._deadline_s) + STALE_FACTOR:
                self._compact()

    def set_by(self, key: Key, at_s: float) -> None:
        """Give ``key`` this deadline unless it has an earlier one. For deadlines that keep moving
        away: whoever is woken early asks again, which is cheaper than moving each time."""
        former_s = self._deadline_s.get(key)
        if former_s is None or at_s < former_s:
            self.set(key, at_s)

    def at_s(self, key: Key) -> float | None:
        """The deadline of ``key``, or None."""
        return self._deadline_s.get(key)

    def next_at_s(self) -> float | None:
        """The earliest deadline of all, or None."""
        while self._heap:
            at_s, _, key = self._heap[0]
            if self._deadline_s.get(key) == at_s:
                return at_s
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now_s: float) -> list[Key]:
        """The keys whose deadlines have come, earliest first; they have none afterwards."""
        due = []
        while (at_s := self.next_at_s()) is not None and at_s <= now_s:
            _, _, key = heapq.heappop(self._heap)
            del self._deadline_s[key]
            due.append(key)
        return due

    def _compact(self) -> None:
        self._heap = [
            (at_s, order, key) for order, (key, at_s) in enumerate(self._deadline_s.items())
        ]
        self._counter = len(self._heap)
        heapq.heapify(self._heap)

    def check(self) -> None:
        """Assert the invariant."""
        entries = {(at_s, key) for at_s, _, key in self._heap}
        for key, at_s in self._deadline_s.items():
            assert (at_s, key) in entries, f"the deadline of {key!r} would be missed"
