"""A slot of a file server, as the client sees it that writes a file there.

The daemon tells until when the client may write, again and again, and is told that it was heard.
The client asks its own clock before every piece. So one that was stopped and wakes up finds that
its time is over, whatever waits to be read on its socket.

Where no daemon answers, or the daemon has no tracker to ask, there is no slot to be had; the file
is written all the same, and ``reason`` says why without one.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import Any

from swarmcache.client import Client
from swarmcache.clock import now_s
from swarmcache.errors import BadMessage, DaemonUnavailable
from swarmcache.local_socket import SILENCE_S_MAX, Connection, parse_answer

# A daemon that is restarted is back within this time. As long as ``get.stall``, which it would wait
# for a tracker.
PATIENCE_S = 5.0
RETRY_S = 0.2
# A daemon promises seconds; more shows that its clock is not ours (as in some containers). So does
# a promise that was over as long ago when it came, unless this process was stopped meanwhile. The
# daemon says nothing more to one that is, so the third in a row came just now.
PROMISE_S_MAX = 60.0
OVER_MAX = 3

_ASK = b'{"op":"write_slot"}\n'
_HEARD = b'{"op":"slot_heard"}\n'


class WriteSlot:
    """One slot of the file server of a directory, from here until ``close``.

    ``file_server``: its name, once the daemon has told. ``silent``: the daemon takes requests, and
    says nothing.
    """

    def __init__(self, client: Client, directory_fd: int, fault: str = "") -> None:
        """``directory_fd`` must stay open until ``close``. ``fault``: why the daemon is not even
        asked, if it is not."""
        self.file_server = ""
        self.silent = False
        self.reason = fault
        self._client = client
        self._directory_fd = directory_fd
        self._until_s = 0.0
        self._over = 0  # promises in a row that were over when they came
        self._queued = False  # told so since somebody last waited
        self._heard_at_s = now_s()
        self._changed = threading.Condition()
        self._closed = False
        self._connection: Connection | None = None
        self._listener: threading.Thread | None = None
        if fault:
            return
        try:
            self._connection = self._ask()
        except DaemonUnavailable as error:
            self.reason = str(error)
            return
        # Alive as long as the process is, however long a piece takes to be written.
        listener = threading.Thread(target=self._run, name="write slot", daemon=True)
        try:
            listener.start()
        except RuntimeError as error:  # a job may have a limit of processes
            self._connection.close()
            self.reason = f"nobody can listen to the daemon: {error}"
            return
        self._listener = listener

    def wait(self, on_wait: Callable[[], None]) -> None:
        """Return when the next piece may be written.

        ``on_wait`` is called whenever the daemon says that others have all slots. What is begun
        after this returns has the lease's margin, half a second, to come to its end.
        """
        while not self._may_write():
            with self._changed:
                self._changed.wait_for(lambda: self._may_write() or self._queued)
                told, self._queued = self._queued, False
            if told:
                on_wait()

    def _may_write(self) -> bool:
        return bool(self.reason) or now_s() < self._until_s

    def close(self) -> None:
        """Give the slot back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._connection is not None:
                self._connection.hang_up()
        if self._listener is not None:
            self._listener.join()

    def _ask(self) -> Connection:
        return self._client.send(_ASK, self._directory_fd)[0]

    def _run(self) -> None:
        try:
            self._listen()
        finally:
            if not self._closed:  # after a bug of ours; who waits must not wait for ever
                self._go_without("nobody listens to the daemon any more")

    def _listen(self) -> None:
        """Hear what the daemon says, and ask again if another one is there after its end."""
        while True:
            connection = self._connection
            try:
                if connection is None:
                    connection = self._ask_again()
                self._hear(connection)
                return
            except DaemonUnavailable as error:
                if now_s() >= self._heard_at_s + PATIENCE_S:
                    self._go_without(str(error))
            except (BadMessage, KeyError, TypeError, ValueError) as error:
                self._go_without(f"the daemon's answer makes no sense: {error}")
            finally:
                if connection is not None:
                    connection.close()
            with self._changed:
                self._connection = None
                if self._changed.wait_for(lambda: self._closed or self.reason, RETRY_S):
                    return

    def _ask_again(self) -> Connection:
        connection = self._ask()
        with self._changed:
            self._connection = connection
            if self._closed:
                connection.hang_up()
        return connection

    def _hear(self, connection: Connection) -> None:
        """Until there is nothing more to hear. Raises DaemonUnavailable, BadMessage, ..."""
        arrival = select.poll()
        arrival.register(connection.fileno(), select.POLLIN)
        while True:
            if not arrival.poll(SILENCE_S_MAX * 1000):
                self.silent = True
                self._go_without(f"the daemon said nothing for {SILENCE_S_MAX:.0f} s")
                return
            for line in connection.receive():
                message = parse_answer(line)
                if message["answer"] != "slot":
                    self._go_without(str(message["reason"]))
                    return
                self._take(message)
                try:
                    connection.send(_HEARD)
                except OSError as error:
                    raise DaemonUnavailable(f"the daemon went away: {error}") from error

    def _take(self, message: dict[str, Any]) -> None:
        until_s = message["until_s"]
        self._heard_at_s = now_s()
        with self._changed:
            self.file_server = str(message["file_server"])
            self._queued = until_s is None
            if until_s is not None:
                over = float(until_s) < now_s() - PROMISE_S_MAX
                self._over = self._over + 1 if over else 0
                if self._over >= OVER_MAX or float(until_s) > now_s() + PROMISE_S_MAX:
                    raise BadMessage("its clock is not ours")
                self._until_s = float(until_s)
            self._changed.notify_all()

    def _go_without(self, reason: str) -> None:
        with self._changed:
            self.reason = self.reason or reason
            self._changed.notify_all()
