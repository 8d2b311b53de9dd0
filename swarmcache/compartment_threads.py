"""Threads for calls that may hang, in compartments of which one does not hold up another.

Who runs when is decided by ``compartments.py``. Threads are made when there is need, and some may
be kept for the next call. They do not keep the process from ending: whatever hangs then may hang
for ever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from swarmcache.compartments import Compartments
from swarmcache.errors import NoThread

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# How long the end waits for calls that may be at work rather than hang.
CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class _Call:
    owner: Hashable
    place: Hashable
    function: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function()
        except BaseException as error:  # for whoever waits for the result
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class CompartmentThreads:
    """Runs calls of many owners, each of whom waits for their own only. Thread-safe.

    At most ``owner_max`` calls of one owner run at once, ``place_max`` of them at one place.
    ``idle_max``: how many threads are kept for calls to come.
    """

    def __init__(self, name: str, owner_max: int, place_max: int, idle_max: int = 16) -> None:
        self._name = name
        self._idle_max = idle_max
        self._compartments: Compartments[_Call] = Compartments(owner_max, place_max)
        self._changed = threading.Condition()
        self._idle = 0
        self._next: SimpleQueue[_Call | None] = SimpleQueue()
        self._closed = False

    def submit(
        self, owner: Hashable, place: Hashable, function: Callable[..., Result], *args: object
    ) -> Future[Result]:
        """Call ``function(*args)`` in a thread, when it is its turn; cancelled after ``close``.

        Raises NoThread when there is none for it; then it is not called.
        """
        call = _Call(owner, place, lambda: function(*args), Future())
        with self._changed:
            if self._closed:
                call.future.cancel()
            elif self._compartments.add(owner, place, call):
                self._begin(call)
        return call.future

    async def run(
        self, owner: Hashable, place: Hashable, function: Callable[..., Result], *args: object
    ) -> Result:
        """The result of ``function(*args)``, called in a thread. Raises NoThread as well."""
        return await asyncio.wrap_future(self.submit(owner, place, function, *args))

    def pending(self, owner: Hashable) -> int:
        """How many calls of this owner run or wait."""
        with self._changed:
            return self._compartments.pending(owner)

    def close(self) -> None:
        """Cancel what waits, and wait a little for what runs."""
        with self._changed:
            self._closed = True
            dropped = self._compartments.drop_waiting()
            for _ in range(self._idle):
                self._next.put(None)
            self._idle = 0
        for call in dropped:
            call.future.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._compartments.running, CLOSE_S)

    def _begin(self, call: _Call) -> None:
        if self._idle:
            self._idle -= 1
            self._next.put(call)
            return
        thread = threading.Thread(target=self._work, args=(call,), daemon=True, name=self._name)
        try:
            thread.start()
        except RuntimeError as error:
            log.error("a call in a thread (%s) is given up: %s", self._name, error)
            following = self._compartments.ended(call.owner, call.place)
            assert following is None, "it waited though there was room for two"
            raise NoThread(f"the daemon has too few threads: {error}") from error

    def _work(self, call: _Call | None) -> None:
        while call is not None:
            call.run()
            following = self._after(call)
            del call  # with its result, until the next one comes
            call = following if following is not None else self._rest()

    def _after(self, call: _Call) -> _Call | None:
        with self._changed:
            following = self._compartments.ended(call.owner, call.place)
            if following is None:
                self._changed.notify_all()
            return following

    def _rest(self) -> _Call | None:
        """The next call for an idle thread; None if it is to end."""
        with self._changed:
            if self._closed or self._idle >= self._idle_max:
                return None
            self._idle += 1
        return self._next.get()
