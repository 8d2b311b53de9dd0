"""The caller's end of the daemon's local socket: finding it, trusting it, lines and descriptors.

Standard library only, and little of it: a job that asks for a cached file pays for every import.
``socket`` (4 ms), ``json`` (9 ms), ``typing`` and ``pathlib`` are therefore not imported here, and
the answer for a file that is cached is read without a JSON parser. ``local_protocol.py``
describes what the lines say.

Invariant: a ``Connection`` leads to a daemon of this user or of root, through a directory that one
of the two owns and nobody else may write.
"""

from __future__ import annotations

import errno
import os
import pwd
import select
import stat
import struct
import time

# The module that ``socket`` wraps: its own import takes 0.3 ms, that of ``socket`` 4 ms.
from _socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SHUT_RDWR,
    SO_PEERCRED,
    SO_SNDTIMEO,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

from swarmcache.errors import BadMessage, ConfigError, DaemonUnavailable, NoDescriptor
from swarmcache.locations import SYSTEM_CONFIG, default_socket_candidates

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from typing import Any

SILENCE_S_MAX = 30.0  # the daemon sends a line every second; one that does not hangs or is stopped
SEND_S_MAX = 10  # to be accepted by the daemon, and to take our line
DESCRIPTORS_PAUSE_S = 0.01
IDLE_MAX = 16  # connections kept; see REQUESTS_MAX in exchanges.py
ANSWER_BYTES_MAX = 64 * 1024
FOUND_BYTES_MAX = 2 << 20  # 192 paths of 4 kB at most, in base64
STATUS_BYTES_MAX = 256 * 1024 * 1024  # some kB for each of 10,000 nodes
RECEIVE_BYTES = 64 * 1024
CONFIG_FILE_BYTES_MAX = 1 << 20

_CACHED_STARTS = b'{"answer":"cached","path":"'
_PROGRESS_STARTS = b'{"answer":"progress"'
_FOUND_STARTS = b'{"answer":"found","paths":['
_FETCHED_STARTS = b',"fetched":['
_TRUTHS = {b"true": True, b"false": False}
_DIGITS_MAX = 19  # of a size in bytes


def reason_of(error: OSError | ValueError) -> str:
    """What went wrong, without Python's numbers and quoted paths."""
    return getattr(error, "strerror", None) or str(error)


class _Socket(socket):
    """Closes itself, without a warning: a signal may interrupt whoever has just been given one,
    before they could close it."""

    def __del__(self) -> None:
        self.close()


class Connection:
    """A connected daemon socket and what came in over it so far. Requests go one after another.

    ``daemon_uid``: as whom the daemon runs.
    """

    daemon_uid: int

    def __init__(self, path: bytes) -> None:
        """Connect. Raises DaemonUnavailable, also for a daemon that is not to be trusted."""
        self._received = b""
        try:
            self._socket = _Socket(AF_UNIX, SOCK_STREAM)
        except OSError as error:
            raise NoDescriptor(f"{os.fsdecode(path)}: {reason_of(error)}") from error
        try:
            self._connect(path)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, path: bytes) -> None:
        name = os.fsdecode(path)
        try:
            directory = os.stat(os.path.dirname(path) or b".")
            _check_owner(f"the directory of {name}", directory.st_uid)
            if directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise DaemonUnavailable(f"the directory of {name} may be written by others")
            # SO_SNDTIMEO also bounds connect(). A socket that never blocks would fail where the
            # daemon's backlog is full, instead of waiting.
            self._socket.setsockopt(SOL_SOCKET, SO_SNDTIMEO, struct.pack("@ll", SEND_S_MAX, 0))
            self._socket.connect(path)
            credentials = self._socket.getsockopt(SOL_SOCKET, SO_PEERCRED, struct.calcsize("3i"))
        except OSError as error:
            raise DaemonUnavailable(f"{name}: {reason_of(error)}") from error
        self.daemon_uid = struct.unpack("3i", credentials)[1]
        _check_owner(f"the daemon at {name}", self.daemon_uid)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def hang_up(self) -> None:
        """End it for the daemon, and for a thread of ours that waits for an answer."""
        from contextlib import suppress

        with suppress(OSError):  # the daemon was faster
            self._socket.shutdown(SHUT_RDWR)

    def alive(self) -> bool:
        """Whether the daemon has neither closed the connection nor said anything unasked."""
        try:
            self._socket.recv(1, MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def send(self, line: bytes, *fds: int) -> None:
        """Send a request and the descriptors that go with it. Raises OSError."""
        if not fds:
            self._socket.sendall(line)
            return
        rights = (SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
        sent = self._send_with(line, rights)
        if sent < len(line):
            self._socket.sendall(line[sent:])

    def _send_with(self, line: bytes, rights: tuple[int, int, bytes]) -> int:
        late_at_s = time.monotonic() + SEND_S_MAX
        while True:
            try:
                return self._socket.sendmsg([line], [rights])
            except OSError as error:
                # All processes of this user together have too many on their way (unix(7)), which
                # the kernel tells nobody when it is over. The daemon takes them within moments.
                if error.errno != errno.ETOOMANYREFS or time.monotonic() >= late_at_s:
                    raise
                time.sleep(DESCRIPTORS_PAUSE_S)

    def send_what_fits(self, data: bytes) -> int:
        """Send as much as can be sent without waiting; how much that was. Raises OSError."""
        try:
            return self._socket.send(data, MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive(self, bytes_max: int = ANSWER_BYTES_MAX) -> list[bytes]:
        """The lines that are complete, after waiting for some bytes.

        Raises DaemonUnavailable where the daemon hung up, BadMessage where a line has no end.
        """
        try:
            arrived = self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            raise DaemonUnavailable(f"the daemon went away: {reason_of(error)}") from error
        if not arrived:
            raise DaemonUnavailable("the daemon went away in mid-request")
        *lines, self._received = (self._received + arrived).split(b"\n")
        if len(self._received) > bytes_max:
            raise BadMessage("the daemon's answer has no end")
        return lines

    def receive_line(self, bytes_max: int) -> bytes:
        """Wait for one line. Raises DaemonUnavailable, BadMessage."""
        arrival = select.poll()
        arrival.register(self.fileno(), select.POLLIN)
        lines: list[bytes] = []
        while not lines:
            if not arrival.poll(SILENCE_S_MAX * 1000):
                raise DaemonUnavailable(f"the daemon said nothing for {SILENCE_S_MAX:.0f} s")
            lines = self.receive(bytes_max)
        return lines[0]


def _check_owner(what: str, uid: int) -> None:
    if uid not in (0, os.geteuid()):
        raise DaemonUnavailable(f"{what} belongs to user {uid}, who is neither you nor root")


class Connections:
    """Connections to one daemon, kept for later requests.

    ``socket_path``, ``config_file``: see ``connect``. Threads may share them; a forked child has
    none to begin with, since those that it inherits are its parent's.
    """

    def __init__(self, socket_path: bytes | None = None, config_file: bytes | None = None) -> None:
        self._socket_path = socket_path
        self._config_file = config_file
        self._idle: list[Connection] = []
        self._pid = os.getpid()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def send(self, line: bytes, *fds: int) -> tuple[Connection, bool]:
        """Send on an idle connection or a new one; the second value says that it was idle.

        Raises DaemonUnavailable.
        """
        if self._pid != os.getpid():
            self.close()  # before another thread takes one of them for ours
            self._pid = os.getpid()
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
        connection = self.connect()
        try:
            connection.send(line, *fds)
        except OSError as error:
            connection.close()
            raise DaemonUnavailable(f"the daemon went away: {reason_of(error)}") from error
        return connection, False

    def connect(self) -> Connection:
        """A new connection. Raises DaemonUnavailable."""
        return connect(self._socket_path, self._config_file)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose request has been answered."""
        if len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()


# --- lines ---------------------------------------------------------------------------------------


def get_line(
    real_path: bytes,
    wait_s: float | None,
    tree: bytes | None = None,
    hold: int | None = None,
    progress: bool = True,
) -> bytes:
    """The request for one file, whose descriptor goes with it."""
    more = _wait(wait_s)
    if tree is not None:
        more += b',"tree":"%s"' % b2a_base64(tree, newline=False)
    if hold is not None:
        more += b',"hold":%d' % hold
    if progress:
        more += b',"progress":true'
    path = b2a_base64(real_path, newline=False)
    return b'{"op":"get","path":"%s"%s}\n' % (path, more)


def release_line(hold: int) -> bytes:
    """The end of a hold, to which there is no answer."""
    return b'{"op":"release","hold":%d}\n' % hold


def look_up_line(count: int, wait_s: float | None, tree: bytes | None) -> bytes:
    """The request for the copies of so many files, whose descriptors go with it. What is small and
    missing is fetched first, if it can be had of peers."""
    more = _wait(wait_s)
    if tree is not None:
        more += b',"tree":"%s"' % b2a_base64(tree, newline=False)
    return b'{"op":"look_up","count":%d,"fetch":true%s}\n' % (count, more)


def _wait(wait_s: float | None) -> bytes:
    """How long the daemon may take; nothing where that does not matter, nor for infinity, which
    JSON does not know."""
    return b"" if wait_s is None or wait_s == float("inf") else b',"wait_s":%.3f' % wait_s


def parse_found(line: bytes, count: int) -> tuple[list[bytes | None], set[int]]:
    """The copies in the answer to a look-up of so many files, and the places of those that have
    just come. Raises BadMessage."""
    paths, found, rest = line.removeprefix(_FOUND_STARTS).partition(b"]")
    numbers = rest[len(_FETCHED_STARTS) : -2]
    if not found or rest not in (b"}", _FETCHED_STARTS + numbers + b"]}"):
        raise BadMessage("no answer to a look-up")
    items = paths.split(b",")
    if len(items) != count:
        raise BadMessage(f"{len(items)} copies of {count} files")
    try:
        fetched = {int(number) for number in numbers.split(b",") if number}
    except ValueError as error:
        raise BadMessage("a place that is no number") from error
    return [None if item == b"null" else path_of(item[1:-1]) for item in items], fetched


def path_of(text: bytes | str) -> bytes:
    """A path of the daemon's. Raises BadMessage."""
    try:
        path = a2b_base64(text)
    except Base64Error as error:
        raise BadMessage(f"a path that is not base64: {error}") from error
    if not path.startswith(b"/") or b"\0" in path:
        raise BadMessage("a path that is not absolute")
    return path


def parse_answer(line: bytes) -> dict[str, Any]:
    """One line of the daemon. Raises BadMessage."""
    cached = _parse_cached(line)
    if cached is not None:
        return cached
    import json  # 9 ms: who gets a copy does without

    try:
        message = json.loads(line)
    except ValueError as error:
        raise BadMessage(f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise BadMessage("not a JSON object")
    return message


def _parse_cached(line: bytes) -> dict[str, Any] | None:
    """The answer that names a copy; None for any other, and for one that is written otherwise."""
    if not line.startswith(_CACHED_STARTS):
        return None
    path, _, rest = line[len(_CACHED_STARTS) :].partition(b'",')
    message: dict[str, Any] = {"answer": "cached", "path": path}
    for field in rest.removesuffix(b"}").split(b","):
        name, _, value = field.partition(b":")
        if value.isdigit() and len(value) <= _DIGITS_MAX:
            found: int | None = int(value)
        else:
            found = _TRUTHS.get(value)
        if found is None:
            return None
        message[name.strip(b'"').decode(errors="replace")] = found
    return message


def is_progress(line: bytes) -> bool:
    """Whether a line of the daemon only says how far it is, for who does not want to know."""
    return line.startswith(_PROGRESS_STARTS)


# --- finding the daemon --------------------------------------------------------------------------


def connect(socket_path: bytes | None, config_file: bytes | None) -> Connection:
    """Connect to the daemon that was named, else to this user's, else to root's.

    Raises DaemonUnavailable, whose text says what was tried; NoDescriptor.
    """
    problems = []
    for path in _candidates(socket_path, config_file):
        try:
            return Connection(path)
        except NoDescriptor:
            raise
        except DaemonUnavailable as error:
            problems.append(str(error))
    raise DaemonUnavailable(f"no daemon answers ({'; '.join(problems)})")


def _candidates(socket_path: bytes | None, config_file: bytes | None) -> list[bytes]:
    named = socket_path or os.environb.get(b"SWARMCACHE_SOCKET") or configured_socket(config_file)
    if named:
        return [named]
    return [os.fsencode(path) for path in default_socket_candidates(os.geteuid())]


def configured_socket(config_file: bytes | None) -> bytes | None:
    """The socket that the settings name. Raises DaemonUnavailable where they are wrong.

    Most name none, and to read them takes longer than a cache hit; so they are read only where
    the word occurs at all.
    """
    file = config_file or os.environb.get(b"SWARMCACHE_CONFIG") or _default_config_file()
    if b"SWARMCACHE_DAEMON__SOCKET" not in os.environb and not (file and _mentions_socket(file)):
        return None
    from pathlib import Path

    from swarmcache.config import load

    try:
        settings = load({}, os.environ, Path(os.fsdecode(file)) if file else None)
    except ConfigError as error:
        raise DaemonUnavailable(str(error)) from error
    return os.fsencode(settings.daemon.socket)


def _default_config_file() -> bytes | None:
    home = os.environb.get(b"HOME", b"")
    if not home.startswith(b"/"):
        try:
            home = os.fsencode(pwd.getpwuid(os.getuid()).pw_dir)
        except KeyError:  # a user that this machine does not know, as in some containers
            home = b""
    candidates = [home + b"/.config/swarmcache/config.toml"] if home else []
    return next(filter(os.path.exists, [*candidates, os.fsencode(SYSTEM_CONFIG)]), None)


def _mentions_socket(file: bytes) -> bool:
    try:
        with open(file, "rb") as opened:
            return b"socket" in opened.read(CONFIG_FILE_BYTES_MAX)
    except OSError as error:
        raise DaemonUnavailable(f"{os.fsdecode(file)}: {reason_of(error)}") from error
