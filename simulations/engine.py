"""The virtual clock and its queue of things to do.

Whatever happens in a simulation is an action that was put ``at`` a time.

Invariant: time never goes back, and actions put at the same time run in the order in which they
were put. So a run depends on its seed alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

# Events between two calls of ``Engine.watch``: a tenth of a second of real time or so.
WATCH_EVERY = 1 << 13


class SimulationFailed(Exception):
    """The simulated cluster broke a promise, or did not come to an end. Says which and when."""


class Engine:
    """Runs actions in the order of their times. ``events_max`` bounds one simulation.

    ``watch`` is called now and then, for those who wait; it must change nothing.
    """

    __slots__ = ("_heap", "_order", "_stopped", "events", "events_max", "now_s", "watch")

    def __init__(self, events_max: int) -> None:
        self.now_s = 0.0
        self.events = 0
        self.events_max = events_max
        self.watch: Callable[[], None] | None = None
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = 0
        self._stopped = False

    def at(self, time_s: float, action: Callable[[Any], None], argument: object) -> None:
        """Run ``action(argument)`` at this time, after all that was put there before."""
        assert time_s >= self.now_s, f"{action} put at {time_s} s, which is over"
        self._order += 1
        heappush(self._heap, (time_s, self._order, action, argument))

    def stop(self) -> None:
        """Let ``run`` return after the action that is running."""
        self._stopped = True

    def run(self, until_s: float) -> None:
        """Run until ``stop``, or until nothing is left to do.

        Raises SimulationFailed when ``until_s`` or ``events_max`` is passed first.
        """
        self._stopped = False
        # Millions of events come and go in no cycles: looking for some takes a quarter of the time.
        gc.disable()
        heap, step = self._heap, self.step
        try:
            while heap and not self._stopped:
                step(until_s)
                if self.watch is not None and not self.events % WATCH_EVERY:
                    self.watch()
        finally:
            gc.enable()

    def step(self, until_s: float) -> None:
        """Run the next action. Raises SimulationFailed as ``run``."""
        time_s, _, action, argument = heappop(self._heap)
        if time_s > until_s:
            raise SimulationFailed(f"not done at {until_s:.3f} s of virtual time")
        if self.events >= self.events_max:
            raise SimulationFailed(f"not done after {self.events} events, at {time_s:.3f} s")
        self.events += 1
        self.now_s = time_s
        action(argument)
