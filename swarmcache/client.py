"""Asking this machine's daemon for files; the Python API, and what ``swarmcache get`` runs.

    from swarmcache.client import Client
    path = Client().get("/nfs/corpus/train.hdf").path

``Client.get`` never raises because of a fault: no daemon, a full disk or a daemon that dies in
mid-request all give the real path of the source, and ``Answer.reason`` says why.

Standard library only, and little of it: see ``local_socket.py``.

Invariant: a path with ``cached`` set was named by a daemon of this user or of root, exists, may be
read, has the size of the source, and the source was the same file version after the transfer.
"""

from __future__ import annotations

import os
import select
import stat
import time
from binascii import Error as Base64Error
from binascii import a2b_base64

from swarmcache.errors import BadMessage, DaemonRefused, DaemonUnavailable, SourceUnreadable
from swarmcache.local_socket import (
    SILENCE_S_MAX,
    STATUS_BYTES_MAX,
    Connection,
    connect,
    get_line,
    parse_answer,
    reason_of,
)

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

REQUESTS_MAX = 16  # in flight at once: enough to hide the round trips of small files
ATTEMPTS_MAX = 3  # the first one, and two more for a source that changes meanwhile
GRACE_S = 2.0  # how much later than ``timeout_s`` the daemon's own answer may come


class Answer:
    """What became of one file or directory.

    ``path``: absolute; the verified copy where ``cached``, else the real path of the source.
    ``usable``: False where the source does not exist or cannot be read: there is nothing to use.
    ``hit``: the copy was there before. ``reason``: why it is not cached, for people.
    """

    __slots__ = (
        "asked",
        "cached",
        "from_file_server_bytes",
        "from_peers_bytes",
        "hit",
        "path",
        "reason",
        "size_bytes",
        "usable",
    )

    def __init__(
        self,
        asked: bytes,
        path: bytes,
        *,
        cached: bool = False,
        hit: bool = False,
        usable: bool = True,
        reason: str = "",
        size_bytes: int = 0,
        from_peers_bytes: int = 0,
        from_file_server_bytes: int = 0,
    ) -> None:
        self.asked = os.fsdecode(asked)
        self.path = os.fsdecode(path)
        self.cached = cached
        self.hit = hit
        self.usable = usable
        self.reason = reason
        self.size_bytes = size_bytes
        self.from_peers_bytes = from_peers_bytes
        self.from_file_server_bytes = from_file_server_bytes

    def complaints(self) -> list[str]:
        """What people should know of it, a line each."""
        if self.usable and self.cached:
            return []
        rest = "; using the original path" if self.usable else ""
        return [f"{self.asked!r}: {self.reason}{rest}"]

    def __repr__(self) -> str:
        state = "hit" if self.hit else "cached" if self.cached else self.reason
        return f"<Answer {self.path!r}: {state}>"


class Progress:
    """How far one file is. ``index``: its place among the files of the call.

    ``joined``: the daemon was fetching it already, for somebody else.
    """

    __slots__ = (
        "asked",
        "from_file_server_bytes",
        "from_peers_bytes",
        "index",
        "joined",
        "peers",
        "recovered_bytes",
        "size_bytes",
        "waiting_for",
    )

    def __init__(self, index: int, asked: bytes, message: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError for a message that is none of progress."""
        self.index = index
        self.asked = os.fsdecode(asked)
        self.size_bytes = int(message["size_bytes"])
        self.from_peers_bytes = int(message["from_peers_bytes"])
        self.from_file_server_bytes = int(message["from_file_server_bytes"])
        self.recovered_bytes = int(message["recovered_bytes"])
        self.peers = int(message["peers"])
        self.waiting_for = str(message.get("waiting_for", ""))
        self.joined = message.get("joined") is True

    def complete(self, answer: Answer) -> None:
        """The file has come; the last figures are those of its answer."""
        self.size_bytes = answer.size_bytes
        self.from_peers_bytes = answer.from_peers_bytes
        self.from_file_server_bytes = answer.from_file_server_bytes
        fetched_bytes = answer.from_peers_bytes + answer.from_file_server_bytes
        self.recovered_bytes = max(0, answer.size_bytes - fetched_bytes)
        self.waiting_for = ""


# --- the source ----------------------------------------------------------------------------------


class Source:
    """A file that is open for reading, and which version of it that is."""

    __slots__ = ("fd", "real_path", "size_bytes", "version")

    def __init__(self, fd: int, real_path: bytes, found: os.stat_result) -> None:
        self.fd = fd
        self.real_path = real_path
        self.size_bytes = found.st_size
        self.version = (real_path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def close(self) -> None:
        os.close(self.fd)


def open_source(asked: bytes) -> Source:
    """Open a file as the calling user. Raises SourceUnreadable.

    Looked at before it is opened, since opening a device or a FIFO can have effects of its own;
    opened without waiting, since it may have become a FIFO in between.
    """
    try:
        _check_regular(os.stat(asked))
        fd = os.open(asked, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise SourceUnreadable(reason_of(error)) from error
    try:
        found = os.fstat(fd)
        _check_regular(found)
        os.set_blocking(fd, True)  # the daemon reads through it, and shall not have to ask twice
        return Source(fd, _real_path_of_open(fd, asked), found)
    except OSError as error:
        os.close(fd)
        raise SourceUnreadable(reason_of(error)) from error
    except SourceUnreadable:
        os.close(fd)
        raise


def _real_path_of_open(fd: int, asked: bytes) -> bytes:
    """The real path of the very file that is open, as the kernel knows it. Raises OSError."""
    try:
        path = os.readlink(b"/proc/self/fd/%d" % fd)
    except FileNotFoundError:  # no /proc
        return os.path.realpath(asked)
    if path.startswith(b"/") and not path.endswith(b" (deleted)"):
        return path
    return os.path.realpath(asked)  # a name that ends like this, or a file that has just gone


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "neither a file nor a directory"
        raise SourceUnreadable(f"is {kind}")


def real_path_of(asked: bytes) -> bytes:
    """The absolute path for a file that is not cached, whether it exists or not."""
    try:
        return os.path.realpath(asked)
    except (OSError, ValueError):  # no current directory; a NUL in the name
        return asked


def _fault_of_copy(path: bytes, source: Source) -> str:
    """Why this copy of ``source`` cannot be used, or nothing."""
    try:
        found = os.stat(path)
    except OSError as error:
        return f"the copy cannot be reached: {reason_of(error)}"
    if not stat.S_ISREG(found.st_mode) or found.st_size != source.size_bytes:
        return "the copy does not have the size of the source"
    if not os.access(path, os.R_OK):
        return "the copy may not be read"
    return ""


# --- the client ----------------------------------------------------------------------------------


class Client:
    """Talks to this machine's daemon. Keeps its connections for later calls.

    ``socket_path``: where the daemon listens; without it ``SWARMCACHE_SOCKET``, the settings, this
    user's daemon, root's daemon, in this order. ``config_file``: where the settings are, if not in
    one of the usual places. Threads may share a client, and a forked child may go on with it.
    """

    def __init__(
        self, socket_path: str | bytes | None = None, config_file: str | bytes | None = None
    ) -> None:
        self._socket_path = os.fsencode(socket_path) if socket_path else None
        self._config_file = os.fsencode(config_file) if config_file else None
        self._idle: list[Connection] = []
        self._pid = os.getpid()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(
        self,
        path: str | bytes | os.PathLike[str],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Answer:
        """Cache one file and tell where the copy is. Raises nothing for a fault of the daemon's.

        ``timeout_s``: answer with the original path when the copy is not there in time.
        """
        (answer,) = self.get_all([os.fsencode(path)], timeout_s, on_progress)
        return answer

    def get_all(
        self,
        paths: Iterable[bytes],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        trees: Mapping[bytes, bytes] | None = None,
    ) -> Iterator[Answer]:
        """Cache many files, some at a time; the answers come in the order of ``paths``.

        ``timeout_s`` is for all of them together. ``trees``: the directories, by path, of those
        that are to lie on one disk with the other files of such a directory.
        """
        return _Exchanges(self, paths, timeout_s, on_progress, trees or {}).answers()

    def status(self) -> dict[str, Any]:
        """``node``, ``cluster`` (None where the tracker cannot be asked) and ``reason``.

        Raises DaemonUnavailable, DaemonRefused, BadMessage.
        """
        connection, _ = self.send(b'{"op":"status"}\n')
        try:
            message = parse_answer(connection.receive_line(STATUS_BYTES_MAX))
        finally:
            connection.close()
        if message.get("answer") != "status" or not isinstance(message.get("node"), dict):
            raise DaemonRefused(f"the daemon refused: {message.get('reason', 'no reason given')}")
        return message

    def send(self, line: bytes, *fds: int) -> tuple[Connection, bool]:
        """Send on an idle connection or a new one; the second value says that it was idle.

        Raises DaemonUnavailable.
        """
        if self._pid != os.getpid():  # forked: the connections are the parent's
            self._pid = os.getpid()
            self.close()
        while True:
            try:
                connection = self._idle.pop()  # atomic, as append() is: threads share the list
            except IndexError:
                break
            try:
                connection.send(line, *fds)
                return connection, True
            except OSError:  # its daemon has ended since; there may be a new one
                connection.close()
        connection = connect(self._socket_path, self._config_file)
        try:
            connection.send(line, *fds)
        except OSError as error:
            connection.close()
            raise DaemonUnavailable(f"the daemon went away: {reason_of(error)}") from error
        return connection, False

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose request has been answered."""
        if len(self._idle) < REQUESTS_MAX:
            self._idle.append(connection)
        else:
            connection.close()


class _Exchange:
    """One file of a call, from its open source to the final answer.

    ``reused``: the connection was idle before, and its daemon has not said anything since.
    """

    __slots__ = (
        "asked",
        "attempts",
        "connection",
        "index",
        "progress",
        "reused",
        "silent_at_s",
        "source",
    )

    def __init__(self, index: int, asked: bytes, source: Source) -> None:
        self.index = index
        self.asked = asked
        self.source = source
        self.attempts = 0
        self.connection: Connection | None = None
        self.progress: Progress | None = None
        self.reused = False
        self.silent_at_s = 0.0


class _Exchanges:
    """All requests of one call: at most ``REQUESTS_MAX`` in flight, answers in order.

    A daemon that cannot be reached or hangs is not tried again within the call, so that a
    thousand files do not wait a thousand times.
    """

    def __init__(
        self,
        client: Client,
        paths: Iterable[bytes],
        timeout_s: float | None,
        on_progress: Callable[[Progress], None] | None,
        trees: Mapping[bytes, bytes],
    ) -> None:
        self._client = client
        self._trees = trees
        self._waiting = enumerate(paths)
        self._on_progress = on_progress
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._in_flight: dict[int, _Exchange] = {}  # by the descriptor of the connection
        self._answers: dict[int, Answer] = {}
        self._poll = select.poll()
        self._fault = ""

    def answers(self) -> Iterator[Answer]:
        """The answer for each path, as soon as it and all before it are there."""
        index = 0
        try:
            while True:
                while index in self._answers:
                    yield self._answers.pop(index)
                    index += 1
                if self._start_one():
                    continue
                if not self._in_flight:
                    return
                self._wait()
        finally:
            for exchange in list(self._in_flight.values()):
                self._drop_connection(exchange)
                exchange.source.close()

    def _start_one(self) -> bool:
        """Turn to the next path. False: there is none, or enough is in flight."""
        if len(self._in_flight) >= REQUESTS_MAX:
            return False
        for index, asked in self._waiting:
            try:
                source = open_source(asked)
            except SourceUnreadable as error:
                real_path = real_path_of(asked)
                self._answers[index] = Answer(asked, real_path, usable=False, reason=str(error))
            else:
                self._ask(_Exchange(index, asked, source))
            return True
        return False

    def _ask(self, exchange: _Exchange) -> None:
        if self._fault:
            self._settle_original(exchange, self._fault)
            return
        exchange.attempts += 1
        now_s = time.monotonic()
        wait_s = None if self._deadline_s is None else max(0.0, self._deadline_s - now_s)
        tree = self._trees.get(exchange.asked)
        line = get_line(exchange.source.real_path, wait_s, tree)
        try:
            exchange.connection, exchange.reused = self._client.send(line, exchange.source.fd)
        except DaemonUnavailable as error:
            self._fault = str(error)
            self._settle_original(exchange, self._fault)
            return
        exchange.silent_at_s = now_s + SILENCE_S_MAX
        self._in_flight[exchange.connection.fileno()] = exchange
        self._poll.register(exchange.connection.fileno(), select.POLLIN)

    def _wait(self) -> None:
        """Wait until the daemon says something or time is up, and act on it."""
        late_at_s = None if self._deadline_s is None else self._deadline_s + GRACE_S
        wake_at_s = min(exchange.silent_at_s for exchange in self._in_flight.values())
        if late_at_s is not None:
            wake_at_s = min(wake_at_s, late_at_s)
        wait_ms = max(0.0, wake_at_s - time.monotonic()) * 1000 + 1
        for fd, _ in self._poll.poll(wait_ms):
            self._receive(self._in_flight[fd])
        now_s = time.monotonic()
        for exchange in list(self._in_flight.values()):
            if late_at_s is not None and now_s >= late_at_s:
                self._give_up(exchange, "the daemon did not answer in time")
            elif now_s >= exchange.silent_at_s:
                self._give_up(exchange, f"the daemon said nothing for {SILENCE_S_MAX:.0f} s")

    def _give_up(self, exchange: _Exchange, fault: str) -> None:
        self._fault = fault
        self._drop_connection(exchange)
        self._settle_original(exchange, fault)

    def _receive(self, exchange: _Exchange) -> None:
        try:
            progress, answer, retry = _read_lines(exchange)
        except DaemonUnavailable as error:
            self._drop_connection(exchange)
            if exchange.reused:  # that daemon had ended before it saw the request
                exchange.attempts -= 1
                self._ask(exchange)
            else:
                self._settle_original(exchange, str(error))
        except (BadMessage, KeyError, TypeError, ValueError) as error:
            self._drop_connection(exchange)
            self._settle_original(exchange, f"the daemon's answer makes no sense: {error}")
        else:
            exchange.reused = False
            exchange.silent_at_s = time.monotonic() + SILENCE_S_MAX
            if progress is not None:
                exchange.progress = progress
                self._tell(progress)
            if answer is not None:
                self._client.give_back(self._forget_connection(exchange))
                self._finish(exchange, answer, retry)

    def _finish(self, exchange: _Exchange, answer: Answer, retry: bool) -> None:
        """Accept the daemon's final answer, or ask again for a source that has changed."""
        if answer.cached:
            fault = _fault_of_copy(os.fsencode(answer.path), exchange.source)
            if fault:
                self._settle_original(exchange, fault)
                return
            # A hit was compared with the source a moment ago; a transfer may have taken hours.
            if answer.hit:
                self._settle(exchange, answer)
                return
        elif not retry:
            self._settle(exchange, answer)
            return
        self._look_again(exchange, answer)

    def _look_again(self, exchange: _Exchange, answer: Answer) -> None:
        """Compare with the source as it is now; settle where it is the same."""
        try:
            source = open_source(exchange.asked)
        except SourceUnreadable as error:
            self._settle(
                exchange,
                Answer(
                    exchange.asked, real_path_of(exchange.asked), usable=False, reason=str(error)
                ),
            )
            return
        changed = source.version != exchange.source.version
        exchange.source.close()
        exchange.source = source
        if answer.cached and not changed:
            self._settle(exchange, answer)
        elif exchange.attempts < ATTEMPTS_MAX:
            self._ask(exchange)
        else:
            self._settle_original(exchange, answer.reason or "the source changes all the time")

    def _settle_original(self, exchange: _Exchange, reason: str) -> None:
        source = exchange.source
        answer = Answer(
            exchange.asked, source.real_path, reason=reason, size_bytes=source.size_bytes
        )
        self._settle(exchange, answer)

    def _tell(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)

    def _settle(self, exchange: _Exchange, answer: Answer) -> None:
        if answer.cached and exchange.progress is not None:
            exchange.progress.complete(answer)
            self._tell(exchange.progress)
        exchange.source.close()
        self._answers[exchange.index] = answer

    def _drop_connection(self, exchange: _Exchange) -> None:
        self._forget_connection(exchange).close()

    def _forget_connection(self, exchange: _Exchange) -> Connection:
        connection = exchange.connection
        assert connection is not None
        self._poll.unregister(connection.fileno())
        del self._in_flight[connection.fileno()]
        exchange.connection = None
        return connection


def _read_lines(exchange: _Exchange) -> tuple[Progress | None, Answer | None, bool]:
    """The latest progress, the final answer, and whether to ask again, as far as they came in.

    Raises DaemonUnavailable; BadMessage, KeyError, TypeError, ValueError for nonsense.
    """
    assert exchange.connection is not None
    progress = None
    for line in exchange.connection.receive():
        message = parse_answer(line)
        if message["answer"] != "progress":
            return progress, _read_answer(exchange, message), message.get("retry") is True
        progress = Progress(exchange.index, exchange.asked, message)
    return progress, None, False


def _read_answer(exchange: _Exchange, message: dict[str, Any]) -> Answer:
    """The daemon's final answer. Raises KeyError, TypeError, ValueError for nonsense."""
    source = exchange.source
    if message["answer"] != "cached":
        reason = message["reason"]
        if message["answer"] not in ("original", "failed") or not isinstance(reason, str):
            raise ValueError(f"answer {message['answer']!r}")
        return Answer(exchange.asked, source.real_path, reason=reason, size_bytes=source.size_bytes)
    try:
        path = a2b_base64(message["path"])
    except Base64Error as error:
        raise ValueError(f"a path that is not base64: {error}") from error
    if not path.startswith(b"/") or b"\0" in path:
        raise ValueError("a path that is not absolute")
    return Answer(
        exchange.asked,
        path,
        cached=True,
        hit=message["hit"] is True,
        size_bytes=source.size_bytes,
        from_peers_bytes=int(message.get("from_peers_bytes", 0)),
        from_file_server_bytes=int(message.get("from_file_server_bytes", 0)),
    )
