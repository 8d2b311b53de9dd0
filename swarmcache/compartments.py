"""Which calls may run in threads now, so that those that hang hold up as few others as possible.

A file server that does not answer keeps a thread for as long as it likes, and so does a file system
of a user's own (FUSE). So every call has an *owner*, and waits for no other owner's calls; and a
*place* that it depends on, which leaves room for calls of the same owner elsewhere.

Pure logic, no threads: ``compartment_threads.py`` runs the calls.

Invariant: of each owner at most ``owner_max`` calls run, of those at most ``place_max`` at one
place, and no call waits that could run.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Call = TypeVar("Call")


@dataclass(slots=True)
class _Owner(Generic[Call]):
    """By place: how many calls run, and those that wait, the place first whose turn is next."""

    running: Counter[Hashable] = field(default_factory=Counter)
    waiting: dict[Hashable, deque[Call]] = field(default_factory=dict)


class Compartments(Generic[Call]):
    """All calls that run or wait."""

    def __init__(self, owner_max: int, place_max: int) -> None:
        self._owner_max = owner_max
        self._place_max = place_max
        self._owners: dict[Hashable, _Owner[Call]] = {}

    @property
    def running(self) -> bool:
        """Some call runs."""
        return bool(self._owners)

    def add(self, owner: Hashable, place: Hashable, call: Call) -> bool:
        """Whether the call may run at once; otherwise it waits."""
        calls = self._owners.setdefault(owner, _Owner())
        if not self._has_room(calls, place):
            calls.waiting.setdefault(place, deque()).append(call)
            return False
        calls.running[place] += 1
        return True

    def ended(self, owner: Hashable, place: Hashable) -> Call | None:
        """A call has ended: the one that may run now, if any.

        Places take turns, and calls at one place run in the order in which they came.
        """
        calls = self._owners[owner]
        calls.running[place] -= 1
        if not calls.running[place]:
            del calls.running[place]
        for following, queue in calls.waiting.items():
            if self._has_room(calls, following):
                call = queue.popleft()
                del calls.waiting[following]
                if queue:
                    calls.waiting[following] = queue  # behind the others
                calls.running[following] += 1
                return call
        if not calls.running:
            del self._owners[owner]
        return None

    def pending(self, owner: Hashable) -> int:
        """How many calls of this owner run or wait."""
        calls = self._owners.get(owner)
        return calls.running.total() + sum(map(len, calls.waiting.values())) if calls else 0

    def drop_waiting(self) -> list[Call]:
        """Nothing that waits will run. Returns it."""
        dropped = [
            call
            for calls in self._owners.values()
            for queue in calls.waiting.values()
            for call in queue
        ]
        for calls in self._owners.values():
            calls.waiting.clear()
        return dropped

    def check(self) -> None:
        """Assert the invariant."""
        for owner, calls in self._owners.items():
            assert calls.running, f"{owner} is kept for nothing"
            assert calls.running.total() <= self._owner_max, f"{owner} runs too many calls"
            for place, count in calls.running.items():
                assert 0 < count <= self._place_max, f"{count} calls run at {place}"
            for place, queue in calls.waiting.items():
                assert queue, f"an empty queue for {place}"
                assert not self._has_room(calls, place), f"a call at {place} waits for nothing"

    def _has_room(self, calls: _Owner[Call], place: Hashable) -> bool:
        room = calls.running.total() < self._owner_max
        return room and calls.running[place] < self._place_max
