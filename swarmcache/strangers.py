"""Connections whose other ends have not proven who they are: bounded in number and time.

Anybody on the network can open them, say nothing on them, and would have all descriptors of a
server in the end. So the one that has waited longest makes room for a newer one: whoever knows the
secret needs a few round trips, and is through before its turn to make room comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Connection = TypeVar("Connection")


class Strangers(Generic[Connection]):
    """Those of one port: at most ``count_max``, for at most ``within_s`` each.

    ``close`` is called with one whose time is over, or that makes room.
    """

    def __init__(
        self, count_max: int, within_s: float, close: Callable[[Connection], None]
    ) -> None:
        self._count_max = count_max
        self._within_s = within_s
        self._close = close
        self._timers: dict[Connection, asyncio.TimerHandle] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._timers)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._timers)

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._timers

    def add(self, connection: Connection) -> None:
        """Somebody has connected."""
        if len(self._timers) >= self._count_max:
            self._turn_away(next(iter(self._timers)))
        loop = asyncio.get_running_loop()
        self._timers[connection] = loop.call_later(self._within_s, self._turn_away, connection)

    def discard(self, connection: Connection) -> None:
        """It has proven who it is, or has ended. No matter if it is none of the strangers."""
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _turn_away(self, connection: Connection) -> None:
        self.discard(connection)
        self._close(connection)
