"""Copies that this process keeps from being evicted: the caller's end of a hold.

A hold ends with the connection over which it was asked for, however its process ends. So holds have
connections of their own, which carry nothing that could make them break; and a forked child leaves
alone what it inherits, which keeps these connections open as long as either of the two lives.

Standard library only: see ``local_socket.py``.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from itertools import count

from swarmcache.errors import BadMessage, DaemonUnavailable, NotCached, SourceUnreadable
from swarmcache.exchanges import Answer, fault_of_copy, open_source
from swarmcache.local_socket import (
    ANSWER_BYTES_MAX,
    Connection,
    Connections,
    get_line,
    parse_answer,
    path_of,
    release_line,
)

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ATTEMPTS_MAX = 3  # a copy may be evicted between having been fetched and being held


class Hold:
    """A context manager, which gives the ``answer``: the path to use.

    ``held``: whether the copy is kept. It is not where there is none, nor after ``release``.
    """

    def __init__(self, answer: Answer, release: Callable[[], None] | None = None) -> None:
        self.answer = answer
        self._release = release

    def __enter__(self) -> Answer:
        return self.answer

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        return self._release is not None

    def release(self) -> None:
        """Let the copy go; never waits. Nothing happens the second time, or in a forked child."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def check(self) -> Hold:
        """This hold, if it keeps a copy. Raises SourceUnreadable, NotCached."""
        self.answer.check()
        if not self.held:
            raise NotCached(f"{self.answer.asked!r}: the daemon cannot hold the copy")
        return self


class Holder:
    """The holds of one client, in the process that took them.

    Invariant: ``_lock`` is never waited for in order to release something.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._pid = os.getpid()
        self._lock = threading.Lock()  # for what the connections send and receive
        self._numbers = count(1)
        self._open: list[_HoldingConnection] = []  # holds are taken over the last one
        self._aside: list[_HoldingConnection] = []  # over which no more holds are taken
        self._releases: deque[tuple[_HoldingConnection, int]] = deque()
        self._inherited: list[Holder] = []  # of which this process keeps the connections open

    def close(self) -> None:
        """End all holds; in a forked child, nothing but what it holds itself."""
        for holder in [self, *self._inherited]:
            for connections in (holder._open, holder._aside):
                while connections:
                    connections.pop().connection.close()

    def here(self) -> Holder:
        """The holder of this process: this one, or in a forked child another."""
        if self._pid == os.getpid():
            return self
        holder = Holder(self._connections)
        holder._inherited = [*self._inherited, self]
        return holder

    def take(self, name: bytes) -> Hold | None:
        """Hold the copy of a file. None where there is no copy yet, or something is wrong."""
        try:
            source = open_source(name)
        except SourceUnreadable:
            return None
        try:
            number = next(self._numbers)
            line = get_line(source.real_path, 0.0, hold=number, progress=False)
            with self._lock:
                taken = self._ask(line, source.fd)
            if taken is None:
                return None
            connection, message = taken
            hold = Hold(
                Answer(name, path_of(message["path"]), cached=True, hit=True),
                lambda: self._release(connection, number),
            )
            fault = fault_of_copy(os.fsencode(hold.answer), source)
            hold.answer.size_bytes = source.size_bytes
        except (DaemonUnavailable, BadMessage):
            return None  # asked without a hold, the daemon or its absence has an answer
        finally:
            source.close()
            self._send_releases()  # those that came while we had the lock
        if fault:
            hold.release()
            return None
        return hold

    def _ask(self, line: bytes, fd: int) -> tuple[_HoldingConnection, dict[str, Any]] | None:
        """The daemon's answer, if it holds the copy. Raises DaemonUnavailable, BadMessage."""
        while self._open and not self._open[-1].connection.alive():
            self._open.pop().connection.close()  # its daemon has ended, and with it what it held
        for fresh in (True,) if not self._open else (False, True):
            if fresh:
                self._open.append(_HoldingConnection(self._connections.connect()))
            connection = self._open[-1]
            try:
                message = connection.ask(line, fd)
            except BaseException:  # ^C as well: a late answer would be taken for the next one
                self._aside.append(self._open.pop())
                self._close_unused()
                raise
            if message.get("answer") != "cached":
                return None
            if message.get("held") is True:
                connection.holds += 1
                return connection, message
            if fresh:  # or else a new connection may hold more
                self._open.pop().connection.close()
        return None

    def _release(self, connection: _HoldingConnection, number: int) -> None:
        if self._pid == os.getpid():
            self._releases.append((connection, number))
            self._send_releases()

    def _send_releases(self) -> None:
        """Whoever has the lock at this moment does the same afterwards."""
        while self._releases and self._lock.acquire(blocking=False):
            try:
                while self._releases:
                    connection, number = self._releases.popleft()
                    connection.release(number)
                self._close_unused()
            finally:
                self._lock.release()

    def _close_unused(self) -> None:
        """Close what is aside and holds nothing any more."""
        unused = [each for each in self._aside if not each.holds]
        self._aside = [each for each in self._aside if each.holds]
        for each in unused:
            each.connection.close()


class _HoldingConnection:
    """A connection, what it ``holds``, and what the daemon has not taken yet of our releases."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.holds = 0
        self._unsent = b""

    def ask(self, line: bytes, fd: int) -> dict[str, Any]:
        """The answer to a request. Raises DaemonUnavailable, BadMessage."""
        try:
            if self._unsent:
                self.connection.send(self._unsent)
                self._unsent = b""
            self.connection.send(line, fd)
        except OSError as error:
            raise DaemonUnavailable(f"the daemon went away: {error}") from error
        return parse_answer(self.connection.receive_line(ANSWER_BYTES_MAX))

    def release(self, number: int) -> None:
        """Tell the daemon now or, while it is stopped, with the next request."""
        self.holds -= 1
        self._unsent += release_line(number)
        try:
            self._unsent = self._unsent[self.connection.send_what_fits(self._unsent) :]
        except OSError:  # the connection is closed, and with it the hold has ended
            self._unsent = b""
