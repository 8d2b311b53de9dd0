"""All requests of one call, from the open sources to the answers for the caller.

Nothing here waits but for files to be opened and looked at: ``Exchanges.advance`` does what can be
done, and ``fileno`` becomes readable when there is more to do. ``client.py`` waits in the calling
thread, ``aio.py`` in an event loop.

Files are looked up some at a time, with one message for them all, and the daemon fetches meanwhile
what it can get together; what is not cached then is asked for one by one. Small files come many
times as fast from a peer as from the file server. So where some are nowhere yet, each caller turns
to the rest in an order of its own: of nodes that begin together each reads a part of them, and gets
the others from those that have read them meanwhile.

Standard library only, and little of it: see ``local_socket.py``.

Invariant: a path with ``cached`` set was named by a daemon of this user or of root, exists, may be
read, has the size of the source, and the source was the same file version after the transfer.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from itertools import chain

from swarmcache.errors import (
    BadMessage,
    DaemonUnavailable,
    NoDescriptor,
    NotCached,
    SourceUnreadable,
)
from swarmcache.local_socket import (
    FOUND_BYTES_MAX,
    SILENCE_S_MAX,
    Connection,
    Connections,
    get_line,
    is_progress,
    look_up_line,
    parse_answer,
    parse_found,
    path_of,
    reason_of,
)

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

REQUESTS_MAX = 16  # in flight at once: enough to hide the round trips of small files
ATTEMPTS_MAX = 3  # the first one, and two more for a source that changes meanwhile
GRACE_S = 2.0  # how much later than ``timeout_s`` the daemon's own answer may come
LOOK_UP_FILES = 192  # as many as the daemon takes in one request
# Before the first answer, and where most are nowhere yet: what is looked up is what this node then
# reads, while others may come to have it. Those that begin together all read the first ones.
FEW_FILES = 32
SMALL_BYTES_MAX = 256 << 10  # what comes together with others; see ``look_ups.py``
# In flight at once: we open files for the next one while the daemon is busy with another. With more
# its threads would only wait for one another.
LOOK_UPS_MAX = 2


class Answer(str):
    """The path to use for one file or directory, and how it was come by.

    It is that path, absolute: the verified copy where ``cached``, else the real path of the source.
    ``usable``: False where the source does not exist or cannot be read: there is nothing to use.
    ``hit``: the copy was there before. ``reason``: why it is not cached, for people.
    ``asked``: the path that it answers. Bytes that came for it: ``from_peers_bytes`` from other
    nodes, ``from_file_server_bytes``; ``size_bytes`` of the file. Pickled, it is a plain path.
    """

    __slots__ = (
        "asked",
        "cached",
        "from_file_server_bytes",
        "from_peers_bytes",
        "hit",
        "reason",
        "size_bytes",
        "usable",
    )

    asked: str
    cached: bool
    hit: bool
    usable: bool
    reason: str
    size_bytes: int
    from_peers_bytes: int
    from_file_server_bytes: int

    def __new__(
        cls,
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
    ) -> Answer:
        self = super().__new__(cls, os.fsdecode(path))
        self.asked = os.fsdecode(asked)
        self.cached = cached
        self.hit = hit
        self.usable = usable
        self.reason = reason
        self.size_bytes = size_bytes
        self.from_peers_bytes = from_peers_bytes
        self.from_file_server_bytes = from_file_server_bytes
        return self

    @property
    def path(self) -> str:
        """The path as a plain string."""
        return str(self)

    def __str__(self) -> str:
        return self[:]  # a slice of a subclass is a plain string

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self[:],)

    def complaints(self) -> list[str]:
        """What people should know of it, a line each."""
        if self.usable and self.cached:
            return []
        rest = "; using the original path" if self.usable else ""
        return [f"{self.asked!r}: {self.reason}{rest}"]

    def __repr__(self) -> str:
        state = "hit" if self.hit else "cached" if self.cached else self.reason
        return f"<Answer {self[:]!r}: {state}>"

    def check(self) -> Answer:
        """This answer, if it is a copy. Raises SourceUnreadable, NotCached."""
        if not self.usable:
            raise SourceUnreadable(f"{self.asked!r}: {self.reason}")
        if not self.cached:
            raise NotCached(f"{self.asked!r} is not cached: {self.reason}")
        return self


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


def open_source(asked: bytes, *, real: bool = False) -> Source:
    """Open a file as the calling user. Raises SourceUnreadable. ``real``: that is a real path, so
    the kernel need not be asked for it.

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
        return Source(fd, asked if real else _real_path_of_open(fd, asked), found)
    except OSError as error:
        os.close(fd)
        raise SourceUnreadable(reason_of(error)) from error
    except SourceUnreadable:
        os.close(fd)
        raise


def is_same(asked: bytes, source: Source) -> bool:
    """Whether the path leads to the very file version that was opened."""
    try:
        found = os.stat(asked)
    except OSError:
        return False  # to open it again will tell why
    return source.version[1:] == (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


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


def fault_of_copy(path: bytes, source: Source) -> str:
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


# --- requests ------------------------------------------------------------------------------------


class Exchange:
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


class LookUp:
    """Some files whose copies are looked up together."""

    __slots__ = ("connection", "files", "silent_at_s")

    def __init__(self, files: list[Exchange]) -> None:
        self.files = files
        self.connection: Connection | None = None
        self.silent_at_s = 0.0


class Exchanges:
    """All requests of one call: at most ``REQUESTS_MAX`` in flight, answers in order.

    A daemon that cannot be reached or hangs is not tried again within the call, so that a
    thousand files do not wait a thousand times.
    """

    def __init__(
        self,
        connections: Connections,
        paths: Iterable[bytes],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        trees: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self._connections = connections
        self._trees = trees or {}
        self._waiting: Iterator[tuple[int, bytes]] = enumerate(paths)
        self._scattered = False
        self._look_up_files = FEW_FILES
        self._put_off: list[tuple[int, bytes]] = []
        self._on_progress = on_progress
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._missed: list[Exchange] = []  # open, not cached, not asked for yet
        self._in_flight: dict[int, Exchange] = {}  # by the descriptor of the connection
        self._look_ups: dict[int, LookUp] = {}  # likewise
        self._answers: dict[int, Answer] = {}
        self._next_index = 0
        self._arrivals: select.epoll | None = None  # made when something is in flight
        self._fault = ""
        self._short = False  # of descriptors: what is in flight must end before more is begun

    def close(self) -> None:
        """End the requests that are still in flight."""
        for look_up in list(self._look_ups.values()):
            self._forget(look_up).close()
            self._missed += look_up.files
        for exchange in list(self._in_flight.values()):
            self._forget(exchange).close()
            exchange.source.close()
        while self._missed:
            self._missed.pop().source.close()
        if self._arrivals is not None:
            self._arrivals.close()

    def fileno(self) -> int:
        """Readable when the daemon has said something. There must be something in flight."""
        assert self._arrivals is not None
        return self._arrivals.fileno()

    @property
    def done(self) -> bool:
        """Whether the answer for every path has been taken."""
        return not (self._look_ups or self._in_flight or self._missed or self._answers)

    def take(self) -> list[Answer]:
        """The answers that are there, in the order of the paths, as long as none is missing."""
        taken = []
        while self._next_index in self._answers:
            taken.append(self._answers.pop(self._next_index))
            self._next_index += 1
        return taken

    def start(self) -> bool:
        """Turn to the next paths. False: there are none, or enough is in flight."""
        if self._short:
            return False
        if self._missed and len(self._in_flight) < REQUESTS_MAX:
            self._ask(self._missed.pop(0))  # a few dozen at most
            return True
        if self._missed or len(self._look_ups) >= LOOK_UPS_MAX:
            return False
        opened, settled = self._open_some()
        if len(opened) > 1 and not self._fault:
            self._look_up(LookUp(opened))
        else:
            self._missed += opened  # a single one is asked for at once
        return settled or bool(opened)

    def patience_s(self) -> float:
        """How long to wait for something to arrive, at most."""
        wake_at_s = min(each.silent_at_s for each in self._unanswered())
        if self._deadline_s is not None:
            wake_at_s = min(wake_at_s, self._deadline_s + GRACE_S)
        return max(0.0, wake_at_s - time.monotonic()) + 0.001

    def receive(self, wait_s: float = 0.0) -> None:
        """Act on what arrives, or on the time that is up."""
        self._take_in(wait_s)
        if self._late():
            # This process may have been stopped (SIGSTOP, a suspended job) while it waited. What
            # has come meanwhile has come in time, and poll() has not looked again.
            self._take_in(0.0)
            for each, fault in self._late():
                self._give_up(each, fault)

    def _take_in(self, wait_s: float) -> None:
        for fd, _ in self._arrivals.poll(wait_s) if self._arrivals is not None else ():
            if fd in self._in_flight:
                self._receive(self._in_flight[fd])
            else:
                self._receive_found(self._look_ups[fd])

    def _late(self) -> list[tuple[Exchange | LookUp, str]]:
        """Whose time is up, and what to say of it."""
        now_s = time.monotonic()
        if self._deadline_s is not None and now_s >= self._deadline_s + GRACE_S:
            fault = "the daemon did not answer in time"
            return [(each, fault) for each in self._unanswered()]
        fault = f"the daemon said nothing for {SILENCE_S_MAX:.0f} s"
        return [(each, fault) for each in self._unanswered() if now_s >= each.silent_at_s]

    def _unanswered(self) -> list[Exchange | LookUp]:
        return [*self._in_flight.values(), *self._look_ups.values()]

    # --- opening --------------------------------------------------------------------------------

    def _open_some(self) -> tuple[list[Exchange], bool]:
        """Open the next sources; and whether there was one that cannot be opened."""
        opened: list[Exchange] = []
        settled = False
        while len(opened) < self._look_up_files and (item := self._next_path()) is not None:
            index, asked = item
            if opened and self._trees.get(asked) != self._trees.get(opened[0].asked):
                self._put_off.append(item)  # a request is about files of one tree
                break
            try:
                source = open_source(asked, real=asked in self._trees)
                opened.append(Exchange(index, asked, source))
            except SourceUnreadable as error:
                short = getattr(error.__cause__, "errno", 0) in (errno.EMFILE, errno.ENFILE)
                if short and (opened or self._in_flight or self._look_ups):
                    self._put_off.append(item)  # until others are closed
                    break
                self._answers[index] = _not_opened(asked, error, usable=short)
                settled = True
        return opened, settled

    def _put_back(self, opened: list[Exchange]) -> None:
        """Close sources, which are in nobody's hands, to open them again later."""
        while opened:
            exchange = opened.pop()
            exchange.source.close()
            self._put_off.append((exchange.index, exchange.asked))

    def _next_path(self) -> tuple[int, bytes] | None:
        if self._put_off:
            return self._put_off.pop()
        return next(self._waiting, None)

    def _send(self, line: bytes, *fds: int) -> tuple[Connection, bool]:
        """Send a request, and expect the answer. Raises DaemonUnavailable, NoDescriptor."""
        connection, reused = self._connections.send(line, *fds)
        try:
            if self._arrivals is None:
                self._arrivals = select.epoll()
            self._arrivals.register(connection.fileno(), select.EPOLLIN)
        except OSError as error:
            connection.close()
            raise NoDescriptor(reason_of(error)) from error
        return connection, reused

    def _wait_s(self) -> float | None:
        """How long the daemon may take."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    # --- looking up -----------------------------------------------------------------------------

    def _look_up(self, look_up: LookUp) -> None:
        wait_s = self._wait_s()
        line = look_up_line(len(look_up.files), wait_s, self._trees.get(look_up.files[0].asked))
        fds = [exchange.source.fd for exchange in look_up.files]
        try:
            look_up.connection, _ = self._send(line, *fds)
        except NoDescriptor:  # the sources have taken all: one of them makes a connection first
            first, *others = look_up.files
            self._put_back(others)
            self._missed.append(first)
            return
        except DaemonUnavailable as error:
            self._fault = str(error)
            for exchange in look_up.files:
                self._settle_original(exchange, self._fault)
            return
        look_up.silent_at_s = time.monotonic() + SILENCE_S_MAX
        self._look_ups[look_up.connection.fileno()] = look_up

    def _receive_found(self, look_up: LookUp) -> None:
        """Settle what is cached. All else is asked for singly, which also tells what is wrong."""
        assert look_up.connection is not None
        try:
            lines = look_up.connection.receive(FOUND_BYTES_MAX)
            if not lines:
                return
            copies, fetched = parse_found(lines[0], len(look_up.files))
        except (DaemonUnavailable, BadMessage):
            self._forget(look_up).close()
            self._missed += look_up.files
            return
        self._connections.give_back(self._forget(look_up))
        missing = [each for each, copy in zip(look_up.files, copies, strict=True) if copy is None]
        small = [each for each in missing if each.source.size_bytes <= SMALL_BYTES_MAX]
        scarce = 2 * len(small) >= len(copies)
        self._look_up_files = FEW_FILES if scarce else LOOK_UP_FILES
        if scarce and not self._scattered:
            self._scatter()
        for place, (exchange, copy) in enumerate(zip(look_up.files, copies, strict=True)):
            if copy is None or fault_of_copy(copy, exchange.source):
                self._missed.append(exchange)
            elif place not in fetched:
                size_bytes = exchange.source.size_bytes
                answer = Answer(exchange.asked, copy, cached=True, hit=True, size_bytes=size_bytes)
                self._settle(exchange, answer)
            elif is_same(exchange.asked, exchange.source):  # as it is now, some seconds later
                self._settle_fetched(exchange, copy)
            else:
                self._missed.append(exchange)

    def _scatter(self) -> None:
        """Turn to the rest in an order that nobody else has."""
        self._scattered = True
        rest = list(self._waiting)
        parts = [rest[start : start + FEW_FILES] for start in range(0, len(rest), FEW_FILES)]
        # The import of ``random`` takes longer than all of this.
        self._waiting = chain.from_iterable(sorted(parts, key=lambda _: os.urandom(8)))

    def _settle_fetched(self, exchange: Exchange, copy: bytes) -> None:
        size_bytes = exchange.source.size_bytes
        come = {"size_bytes": size_bytes, "from_peers_bytes": size_bytes}
        come |= {"from_file_server_bytes": 0, "recovered_bytes": 0, "peers": 1}
        exchange.progress = Progress(exchange.index, exchange.asked, come)
        answer = Answer(
            exchange.asked,
            copy,
            cached=True,
            size_bytes=size_bytes,
            from_peers_bytes=size_bytes,
        )
        self._settle(exchange, answer)

    # --- asking ---------------------------------------------------------------------------------

    def _ask(self, exchange: Exchange) -> None:
        if self._fault:
            self._settle_original(exchange, self._fault)
            return
        tree = self._trees.get(exchange.asked)
        line = get_line(exchange.source.real_path, self._wait_s(), tree)
        try:
            exchange.connection, exchange.reused = self._send(line, exchange.source.fd)
        except NoDescriptor as error:
            self._ask_later(exchange, error)
            return
        except DaemonUnavailable as error:
            self._fault = str(error)
            self._settle_original(exchange, self._fault)
            return
        exchange.attempts += 1
        exchange.silent_at_s = time.monotonic() + SILENCE_S_MAX
        self._in_flight[exchange.connection.fileno()] = exchange

    def _ask_later(self, exchange: Exchange, error: NoDescriptor) -> None:
        """When there is a descriptor for its connection, if we can do something for that."""
        if self._missed:
            self._put_back(self._missed)
            self._missed.append(exchange)
        elif self._in_flight or self._look_ups:
            self._missed.append(exchange)
            self._short = True
        else:
            self._settle_original(exchange, str(error))

    def _give_up(self, late: Exchange | LookUp, fault: str) -> None:
        self._fault = fault
        self._forget(late).close()
        for exchange in late.files if isinstance(late, LookUp) else [late]:
            self._settle_original(exchange, fault)

    def _receive(self, exchange: Exchange) -> None:
        try:
            progress, answer, retry = _read_lines(exchange, self._on_progress is not None)
        except DaemonUnavailable as error:
            self._forget(exchange).close()
            if exchange.reused:  # that daemon had ended before it saw the request
                exchange.attempts -= 1
                self._ask(exchange)
            else:
                self._settle_original(exchange, str(error))
        except (BadMessage, KeyError, TypeError, ValueError) as error:
            self._forget(exchange).close()
            self._settle_original(exchange, f"the daemon's answer makes no sense: {error}")
        else:
            exchange.reused = False
            exchange.silent_at_s = time.monotonic() + SILENCE_S_MAX
            if progress is not None:
                exchange.progress = progress
                self._tell(progress)
            if answer is not None:
                self._connections.give_back(self._forget(exchange))
                self._finish(exchange, answer, retry)

    def _finish(self, exchange: Exchange, answer: Answer, retry: bool) -> None:
        """Accept the daemon's final answer, or ask again for a source that has changed."""
        if answer.cached:
            fault = fault_of_copy(os.fsencode(answer.path), exchange.source)
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

    def _look_again(self, exchange: Exchange, answer: Answer) -> None:
        """Compare with the source as it is now; settle where it is the same."""
        try:
            source = open_source(exchange.asked, real=exchange.asked in self._trees)
        except SourceUnreadable as error:
            self._settle(exchange, _not_opened(exchange.asked, error))
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

    def _settle_original(self, exchange: Exchange, reason: str) -> None:
        source = exchange.source
        answer = Answer(
            exchange.asked, source.real_path, reason=reason, size_bytes=source.size_bytes
        )
        self._settle(exchange, answer)

    def _tell(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)

    def _settle(self, exchange: Exchange, answer: Answer) -> None:
        if answer.cached and exchange.progress is not None:
            exchange.progress.complete(answer)
            self._tell(exchange.progress)
        exchange.source.close()
        self._answers[exchange.index] = answer

    def _forget(self, each: Exchange | LookUp) -> Connection:
        """Take the connection, which nothing is expected from any more."""
        connection = each.connection
        assert connection is not None
        assert self._arrivals is not None
        self._arrivals.unregister(connection.fileno())
        in_flight = self._in_flight if isinstance(each, Exchange) else self._look_ups
        del in_flight[connection.fileno()]
        self._short = False
        each.connection = None
        return connection


def _not_opened(asked: bytes, error: SourceUnreadable, *, usable: bool = False) -> Answer:
    return Answer(asked, real_path_of(asked), usable=usable, reason=str(error))


def _read_lines(
    exchange: Exchange, progress_wanted: bool
) -> tuple[Progress | None, Answer | None, bool]:
    """The latest progress, the final answer, and whether to ask again, as far as they came in.

    Raises DaemonUnavailable; BadMessage, KeyError, TypeError, ValueError for nonsense.
    """
    assert exchange.connection is not None
    progress = None
    for line in exchange.connection.receive():
        if not progress_wanted and is_progress(line):
            continue
        message = parse_answer(line)
        if message["answer"] != "progress":
            return progress, _read_answer(exchange, message), message.get("retry") is True
        progress = Progress(exchange.index, exchange.asked, message)
    return progress, None, False


def _read_answer(exchange: Exchange, message: dict[str, Any]) -> Answer:
    """The daemon's final answer. Raises as ``_read_lines`` does for nonsense."""
    source = exchange.source
    if message["answer"] != "cached":
        reason = message["reason"]
        if message["answer"] not in ("original", "failed") or not isinstance(reason, str):
            raise ValueError(f"answer {message['answer']!r}")
        return Answer(exchange.asked, source.real_path, reason=reason, size_bytes=source.size_bytes)
    return Answer(
        exchange.asked,
        path_of(message["path"]),
        cached=True,
        hit=message["hit"] is True,
        size_bytes=source.size_bytes,
        from_peers_bytes=int(message.get("from_peers_bytes", 0)),
        from_file_server_bytes=int(message.get("from_file_server_bytes", 0)),
    )
