"""The daemon's end of the local UNIX socket: requests and open descriptors in, answers out.

Who a client is says the kernel (SO_PEERCRED). Every descriptor that arrives is either handed over
with its request or closed here, whatever the client does.

Limits: ``CLIENTS_MAX`` connections, ``CLIENTS_PER_USER_MAX`` of one user, ``LINE_MAX_BYTES`` per
request, ``DESCRIPTORS_MAX`` descriptors per connection that wait for their request, ``REQUEST_S``
long, and as many of one user that wait to be closed; of all that may be open, ``USER_SHARE`` from
one user. A client that sends requests without pause has one of them handled in each turn of the
event loop, and none while it does not read the answers.

All of it runs in the event loop, but for ``send_from_thread``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import struct
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk_calls import SharedFile
from swarmcache.errors import BadMessage, LocalError, NoThread
from swarmcache.local_protocol import (
    LINE_MAX_BYTES,
    LOCATIONS_FILES_MAX,
    LOOK_UP_MAX,
    Answer,
    AnyRequest,
    Failed,
    decode_request,
    encode_answer,
)
from swarmcache.user_names import UserNames
from swarmcache.user_tree import User

log = logging.getLogger(__name__)

CLIENTS_MAX = 4096
CLIENTS_PER_USER_MAX = 1024
DESCRIPTORS_MAX = max(LOOK_UP_MAX, LOCATIONS_FILES_MAX)  # of one request; no other has as many
CLOSE_AGAIN_S = 1.0
BACKLOG_BYTES = 256 << 20  # the state of a cluster of 10,000 nodes is some MiB
# Of the descriptors that a daemon of root's may have, each user may have given it this part. So to
# leave nothing to others it takes several who mean harm. An honest process gives it 400 at once
# (LOOK_UPS_MAX in exchanges.py), and a service of systemd may have half a million.
USER_SHARE = 1 / 4
# So long a client tries to hand a request over (SEND_S_MAX in local_socket.py).
REQUEST_S = 10.0
# Who leaves more than this unread is not listened to until it has read: as much as a request may
# be long, and more than most answers are.
UNREAD_BYTES_MAX = LINE_MAX_BYTES
_CREDENTIALS = struct.Struct("3i")

Handler = Callable[["LocalConnection", AnyRequest, list[int]], None]


class LocalConnection:
    """One client. What is ``on_closed`` is called once when it has gone."""

    def __init__(self, server: LocalServer, sock: socket.socket, uid: int) -> None:
        self.user = User(uid, str(uid))  # with the user's name from the first request on
        self.on_closed: dict[object, Callable[[], object]] = {}
        self._server = server
        self._sock = sock
        self._received = b""  # of a line that is not whole yet
        self._lines: deque[bytes] = deque()
        self._descriptors: deque[int] = deque()
        self._late: asyncio.TimerHandle | None = None  # runs while some wait for their request
        self._unsent = bytearray()  # of which the front is dropped without copying the rest
        self._sending = threading.Lock()  # for what is unsent, and for the socket's number
        self._drained: asyncio.Event | None = None
        self.is_open = True
        self.client_left = False  # it has closed its end; or else we have closed ours
        self._listening = False
        self._has_turn = False  # a request of it is about to be handled

    def begin(self, user_name: str) -> None:
        """Listen to the client from now on."""
        self.user = User(self.user.uid, user_name)
        self._go_on()

    def send(self, *answers: Answer) -> None:
        """Send answers, in one piece. Nothing happens when the client has gone."""
        if self.is_open:
            self.send_encoded(b"".join(map(encode_answer, answers)))

    def send_encoded(self, answers: bytes) -> None:
        """The same with what has been encoded already, for several clients."""
        if not self.is_open:
            return
        with self._sending:
            self._unsent += answers
        self._flush()

    def send_from_thread(self, answer: Answer) -> None:
        """The same from any other thread, without a detour through the event loop if possible."""
        data = encode_answer(answer)
        with self._sending:
            if not self.is_open:
                return
            if not self._unsent:
                with suppress(OSError):  # full, or gone: the event loop finds out which
                    data = data[self._sock.send(data) :]
            self._unsent += data
        if data:
            self._server.loop.call_soon_threadsafe(self._flush)

    def close_files(self, fds: Iterable[int]) -> None:
        """Close descriptors that have come from this client, in a thread of its user; later, if
        there is no thread for it: nobody else may be made to wait for that."""
        loop = self._server.loop
        for fd in fds:
            try:
                self._server.closer.submit(self.user.uid, None, self.close_files_here, (fd,))
            except NoThread:
                loop.call_soon_threadsafe(loop.call_later, CLOSE_AGAIN_S, self.close_files, (fd,))

    def close_files_here(self, fds: Iterable[int]) -> None:
        """The same in this thread. It may take as long as the client's user likes: the process
        behind a FUSE file is asked first, and a socket may linger."""
        for fd in fds:
            try:
                os.close(fd)
            except OSError as error:  # what was written could not be: that is the client's to know
                log.info("closing a file of uid %d: %s", self.user.uid, error)
            self._server.count_descriptors(self.user.uid, -1)

    def share(self, fd: int) -> SharedFile:
        """A descriptor from this client for several users, which is closed in the same way."""
        return SharedFile(fd, lambda fd: self.close_files([fd]))

    async def drained(self) -> None:
        """Wait until the client has taken what was sent, or has gone. For one task at a time."""
        if self.is_open and self._unsent:
            self._drained = asyncio.Event()
            await self._drained.wait()

    def close(self) -> None:
        """End the connection and everything that hangs on it."""
        if not self.is_open:
            return
        self.is_open = False
        self._server.loop.remove_reader(self._sock.fileno())
        self._server.loop.remove_writer(self._sock.fileno())
        with self._sending:
            self._sock.close()
        self.close_files(self._descriptors)
        self._descriptors = deque()
        if self._late is not None:
            self._late.cancel()
        self._server.forget(self)
        self._wake()
        for callback in list(self.on_closed.values()):
            callback()

    def _flush(self) -> None:
        if not self.is_open:
            return
        try:
            with self._sending:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            log.debug("a client has gone: %s", error)
            self.client_left = True
            self.close()
            return
        if len(self._unsent) > BACKLOG_BYTES:
            self.close()
            return
        if self._unsent:
            self._server.loop.add_writer(self._sock.fileno(), self._flush)
        else:
            self._server.loop.remove_writer(self._sock.fileno())
            self._wake()
        self._go_on()

    def _wake(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    def _readable(self) -> None:
        try:
            data, descriptors = _receive(self._sock)
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("a client has gone: %s", error)
            self.client_left = True
            self.close()
            return
        self._descriptors.extend(descriptors)
        too_many = not self._server.count_descriptors(self.user.uid, len(descriptors))
        if not data:
            self.client_left = True
            self.close()
            return
        *lines, self._received = (self._received + data).split(b"\n")
        self._lines.extend(lines)
        if len(self._descriptors) > DESCRIPTORS_MAX:
            self._refuse(f"more than {DESCRIPTORS_MAX} descriptors without a request")
            return
        if descriptors and too_many:
            self._refuse("the daemon has too many open files of yours")
            return
        if len(self._received) > LINE_MAX_BYTES:
            self._refuse(f"a request is at most {LINE_MAX_BYTES} bytes long")
            return
        self._take_next()

    def _take_next(self) -> None:
        """Handle one request; what came with it waits until others have had their turn."""
        self._has_turn = False
        if self.is_open and self._lines and not self._reads_too_little:
            self._take(self._lines.popleft())
        self._go_on()

    @property
    def _reads_too_little(self) -> bool:
        return len(self._unsent) > UNREAD_BYTES_MAX

    def _go_on(self) -> None:
        """See to it that what the client has sent is handled, or else that it is listened to."""
        if not self.is_open:
            return
        self._watch_descriptors()
        if self._lines and not self._reads_too_little and not self._has_turn:
            self._has_turn = True
            self._server.loop.call_soon(self._take_next)
        listening = not self._lines and not self._reads_too_little
        if listening == self._listening:
            return
        self._listening = listening
        if listening:
            self._server.loop.add_reader(self._sock.fileno(), self._readable)
        else:
            self._server.loop.remove_reader(self._sock.fileno())

    def _watch_descriptors(self) -> None:
        """Those that have come are not kept for long without their request."""
        if self._descriptors and self._late is None:
            reason = f"no whole request within {REQUEST_S:g} s after its descriptors"
            self._late = self._server.loop.call_later(REQUEST_S, self._refuse, reason)
        elif not self._descriptors and self._late is not None:
            self._late.cancel()
            self._late = None

    def _take(self, line: bytes) -> None:
        try:
            request = decode_request(line)
        except BadMessage as error:
            self._refuse(str(error))
            return
        count = request.descriptor_count
        if len(self._descriptors) < count:
            self._refuse(f"this request comes with {count} open descriptor{'s' * (count > 1)}")
            return
        fds = [self._descriptors.popleft() for _ in range(count)]
        self._server.handler(self, request, fds)

    def _refuse(self, reason: str) -> None:
        self.send(Failed(reason))
        self.close()


class LocalServer:
    """The listening socket. ``handler`` owns the descriptors it is given."""

    def __init__(
        self, path: Path, handler: Handler, pending: Callable[[int], int] = lambda uid: 0
    ) -> None:
        """``pending(uid)``: how many files of a user are looked at or wait for that, those of
        clients who have gone meanwhile as well."""
        self.handler = handler
        # One thread of each user. To start one for every small file took an eighth of its time.
        self.closer = CompartmentThreads("close", 1, 1, idle_max=4)
        self._names = UserNames()
        self._pending = pending
        self._descriptors: Counter[int] = Counter()  # that are open, by the uid they came from
        self._descriptors_per_user_max = descriptors_per_user_max()
        self._counting = threading.Lock()
        self.loop = asyncio.get_running_loop()
        self._path = path
        self._connections: dict[LocalConnection, None] = {}
        self._listener = _listen(path)
        self.loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Close everything and remove the socket."""
        self.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._names.close()
        for connection in list(self._connections):
            connection.close()

    def forget(self, connection: LocalConnection) -> None:
        """A connection has closed."""
        self._connections.pop(connection, None)

    def count_descriptors(self, uid: int, change: int) -> bool:
        """So many more of a user's are open, or fewer; whether that user may have as many. May be
        called in any thread."""
        with self._counting:
            count = self._descriptors[uid] + change
            self._descriptors[uid] = count
            if not count:
                del self._descriptors[uid]
        return count <= self._descriptors_per_user_max

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors: the client stays in the queue and is taken when one is free.
            log.warning("cannot accept a local client: %s", error)
            self.loop.remove_reader(self._listener.fileno())
            self.loop.call_later(0.1, self._accept_again)
            return
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        connection = LocalConnection(self, sock, uid)
        self._connections[connection] = None
        refusal = self._refusal(uid)
        if refusal:
            connection.send(Failed(refusal))
            connection.close()
            return
        try:
            self._names.tell(uid, connection.begin)
        except NoThread as error:
            connection.send(Failed(str(error)))
            connection.close()

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.add_reader(self._listener.fileno(), self._accept)

    def _refusal(self, uid: int) -> str:
        own = os.getuid()
        if own != 0 and uid not in (0, own):
            return f"this daemon serves the user with uid {own} only"
        same = sum(connection.user.uid == uid for connection in self._connections)
        if same > CLIENTS_PER_USER_MAX or len(self._connections) > CLIENTS_MAX:
            return "too many requests at once"
        if self.closer.pending(uid) > DESCRIPTORS_MAX + 1:  # one of them is being closed
            return "files that you have opened hang when they are closed"
        if self._pending(uid) > CLIENTS_PER_USER_MAX:
            return "files that you have opened hang when they are looked at"
        return ""


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Bytes and descriptors. Raises OSError.

    As Python opens everything, so that no program which is started later inherits a descriptor;
    ``socket.recv_fds`` ignores its flags, and one call more for each costs more than the rest.
    """
    space = socket.CMSG_LEN(DESCRIPTORS_MAX * array("i").itemsize)
    data, messages, _, _ = sock.recvmsg(LINE_MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array("i")
    for level, kind, content in messages:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, descriptors.tolist()


def descriptors_per_user_max() -> int:
    """How many descriptors of one user may be open here. Where this is no daemon of root's, there
    is nobody to share them with."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return int(most * USER_SHARE) if os.getuid() == 0 else most


def _listen(path: Path) -> socket.socket:
    """Bind the socket: for everybody when run by root, for its own user otherwise."""
    shared = os.getuid() == 0
    path.parent.mkdir(mode=0o755 if shared else 0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        listener.bind(os.fspath(path))
        os.chmod(path, 0o666 if shared else 0o600)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise LocalError(f"cannot listen on {path}: {error}") from error
    except LocalError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that has died. Raises LocalError when one is alive there, or
    when what is there is no socket at all."""
    if path.exists() and not path.is_socket():
        raise LocalError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            path.unlink()
            return
    raise LocalError(f"another daemon listens on {path}")
