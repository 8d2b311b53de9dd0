"""What both servers do alike: feed a machine, carry out its effects, keep one timer."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from swarmcache.clock import now_s

log = logging.getLogger(__name__)

# To wake the loop costs more than to handle most events, so those of threads are taken in together,
# at most this often. Several chunks are in flight at any time, so none of them is missed meanwhile.
THREADS_INTERVAL_S = 0.001
# After a failure of the machine itself, so that one that fails again and again leaves time for all
# else.
FAILED_PAUSE_S = 1.0

Event = TypeVar("Event")
Effect = TypeVar("Effect")
Event_contra = TypeVar("Event_contra", contravariant=True)


class Machine(Protocol[Event_contra, Effect]):
    """The contract of every machine."""

    def handle(self, event: Event_contra, now_s: float) -> list[Effect]:
        """Apply one event; return what must now be done."""

    def wake_at_s(self) -> float | None:
        """When the next ``TimePassed`` is due."""


class MachineShell(Generic[Event, Effect]):
    """Runs one machine in the event loop.

    ``carry_out`` must not block; it may call ``handle`` again (the event is queued), so events are
    applied one at a time and effects carried out in their order.

    An effect that cannot be carried out is in the log; the machine knows no more of it than of one
    whose answer is lost, and all others are carried out. When the machine itself fails, that is for
    whoever gave it the event: a connection ends that way. The events behind are handled, and the
    timer is kept.
    """

    def __init__(
        self,
        machine: Machine[Event, Effect],
        carry_out: Callable[[Effect], None],
        time_passed: Event,
    ) -> None:
        self._machine = machine
        self._carry_out = carry_out
        self._time_passed = time_passed
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._inbox: deque[Event] = deque()
        self._told = False
        self._emptied_s = -math.inf
        self._handling = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s: float | None = None

    def handle(self, event: Event) -> None:
        """Give the machine an event. To be called in the event loop."""
        self._events.append(event)
        self._handle_all()

    def handle_from_thread(self, event: Event) -> None:
        """The same from any other thread. At once, or together with what comes within
        ``THREADS_INTERVAL_S`` of the events before."""
        self._inbox.append(event)
        if not self._told:
            self._told = True
            self._loop.call_soon_threadsafe(self._look_into_inbox)

    def _look_into_inbox(self) -> None:
        wait_s = self._emptied_s + THREADS_INTERVAL_S - self._loop.time()
        if wait_s > 0:
            self._loop.call_later(wait_s, self._empty_inbox)
        else:
            self._empty_inbox()

    def _empty_inbox(self) -> None:
        self._emptied_s = self._loop.time()
        self._told = False  # before looking: who comes later wakes the loop once more
        while self._inbox:
            self._events.append(self._inbox.popleft())
        self._handle_all()

    def _handle_all(self) -> None:
        if self._handling:
            return
        self._handling = True
        pause_s = FAILED_PAUSE_S
        try:
            while self._events:
                for effect in self._machine.handle(self._events.popleft(), now_s()):
                    self._try(effect)
            pause_s = 0.0
        finally:
            self._handling = False
            if self._events:
                self._loop.call_soon(self._handle_all)
            self._rearm(pause_s)

    def _try(self, effect: Effect) -> None:
        try:
            self._carry_out(effect)
        except Exception:
            log.exception("%s was not carried out", type(effect).__name__)

    def stop(self) -> None:
        """No more timer events, whatever comes."""
        self._stopped = True
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rearm(self, pause_s: float) -> None:
        at_s = self._machine.wake_at_s()
        if at_s == self._timer_at_s and self._timer is not None:
            return
        self._disarm()
        self._timer_at_s = at_s
        if at_s is not None and not self._stopped:
            self._timer = self._loop.call_later(max(at_s - now_s(), pause_s), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.handle(self._time_passed)
