"""The serving end of the data plane: bytes of chunks and small files out to peers.

``sendfile`` in threads, in bounded numbers (see ``chunk_protocol.py``). An event loop looks after
connections that are idle or have not proven who they are, so a stranger cannot hold a thread.

Not decided here: who is served, who waits and who is refused (``upload_slots.py``).

Invariant: a connection has one owner at a time, the loop or one thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from swarmcache.auth import NONCE_BYTES, Acceptor, Keyring, SessionKeys
from swarmcache.chunk_protocol import (
    ABSENT,
    ABSENT_FILE,
    BUSY,
    ERROR,
    FILES_BYTES_MAX,
    FILES_MAX,
    IDLE_SERVER_S,
    KIND_CHUNK,
    KIND_FILES,
    OK,
    REQUEST,
    REQUEST_BYTES,
    RESPONSE,
    ChunkRequest,
    FilesRequest,
    set_timeout,
    shut_down,
)
from swarmcache.chunks import DIGEST_BYTES, ChunkLayout, SmallFile
from swarmcache.download import DEADLINE_RATE_BYTES_PER_S
from swarmcache.errors import AuthenticationFailed, NoThread, RemoteError, SwarmcacheError
from swarmcache.quantities import HostPort
from swarmcache.rate_limit import RateLimit
from swarmcache.serving import bind
from swarmcache.strangers import Strangers
from swarmcache.thread_pool import ThreadPool
from swarmcache.upload_slots import Upload, UploadSlots

HANDSHAKE_S = 5.0  # two round trips, on a bad day
STRANGERS_MAX = 256  # connections without proof; the oldest makes room for a newer one
IDLE_MAX = 512  # connections; half of the usual limit of 1,024 descriptors per process

SEND_STALL_S = 10.0  # a receiver that takes nothing for so long is dropped
# A peer in full swing asks again when the rest of its chunk has left our buffers and it has written
# it. To wait for that in a thread spares a trip through the loop to another one: four context
# switches and two timers. Measured with eight nodes at 200 Mbit/s on two cores
# that were busy with other work too: nine of ten requests come in time, most within 15 ms.
NEXT_REQUEST_MS = 100
ACCEPTS_AT_ONCE = 64
OUT_OF_DESCRIPTORS_S = 1.0
# What one upload may have on its way, in segments (the kernel doubles it for its own use). More
# would only queue in the switches, and every announcement and request behind it: measured with
# eight nodes at 200 Mbit/s, where a port queues 50 ms, efficiency 0.89 without, 0.90 with this.
SEND_SEGMENTS_MAX = 22

_log = logging.getLogger(__name__)


class ChunkSource(Protocol):
    """An open file, complete or partial, whose chunks can be served."""

    @property
    def fd(self) -> int:
        """Descriptor to read from."""

    @property
    def layout(self) -> ChunkLayout:
        """Where its chunks are."""

    def has(self, chunk: int) -> bool:
        """Whether the chunk is there and verified. False for a chunk that the file has not."""

    def close(self) -> None:
        """Let go of it; called once."""


class _Inbound:
    """A connection that somebody opened to us. One owner at a time: the loop or one thread."""

    def __init__(self, sock: socket.socket, keyring: Keyring, acceptor: Acceptor) -> None:
        # Only a thread that serves lets the socket block, because a blocking sendfile is the
        # fastest; the loop and the reads use MSG_DONTWAIT.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mss_bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_SEGMENTS_MAX * mss_bytes)
        set_timeout(sock, socket.SO_SNDTIMEO, SEND_STALL_S)
        self.sock = sock
        self.acceptor = acceptor
        self._keyring = keyring
        self.keys: SessionKeys | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._received = b""
        self._announced: tuple[bytes, int] | None = None  # the ids of small files come next

    @property
    def identity(self) -> bytes:
        return self.acceptor.peer_identity

    def receive(self, size_bytes: int) -> bytes | None:
        """The next ``size_bytes`` if all of them are there, else None. Never waits."""
        while len(self._received) < size_bytes:
            try:
                data = self.sock.recv(size_bytes - len(self._received), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not data:
                raise ConnectionResetError("the peer closed the connection")
            self._received += data
        frame, self._received = self._received, b""
        return frame

    def next_request(self) -> ChunkRequest | FilesRequest | None:
        """The next request if all of it is there, else None. Never waits."""
        if self._announced is None:
            frame = self.receive(REQUEST_BYTES)
            if frame is None:
                return None
            assert self.keys is not None, "requests come after the handshake"
            if self.acceptor.key not in self._keyring.accepted:
                raise AuthenticationFailed("the secret of this connection was withdrawn")
            kind, version_id, number, held_chunks = REQUEST.unpack(self.keys.open(frame))
            if kind == KIND_CHUNK:
                return ChunkRequest(version_id, number, held_chunks)
            if kind != KIND_FILES or not 0 < number <= FILES_MAX:
                raise RemoteError(f"unknown request of kind {kind}")
            self._announced = (version_id, number)
        digest, count = self._announced
        ids = self.receive(count * DIGEST_BYTES)
        if ids is None:
            return None
        self._announced = None
        request = FilesRequest(ids)
        if request.digest != digest:
            raise RemoteError("the ids of small files were changed on their way")
        return request

    def send_header(self, status: int, length: int, flags: int) -> None:
        assert self.keys is not None, "answers come after the handshake"
        self.send_small(self.keys.seal(RESPONSE.pack(status, length)), flags)

    def send_small(self, frame: bytes, flags: int) -> None:
        """Send a frame that fits any socket buffer that is not full."""
        if self.sock.send(frame, flags) != len(frame):
            raise BlockingIOError("the peer takes no answers")


class _Expected:
    """Uploads whose peers have what they asked for and are expected to ask again. Thread-safe.

    A thread waits for each; who finds no place is given one of theirs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[Upload, int] = {}  # an eventfd that wakes the thread; longest wait first

    def wait(self, upload: Upload, poll: select.poll, wake_fd: int) -> bool:
        """Until the peer asks or pauses; False when the place was given to another peer.

        ``poll`` watches its connection and ``wake_fd``.
        """
        with self._lock:
            self._waits[upload] = wake_fd
        poll.poll(NEXT_REQUEST_MS)
        with self._lock:
            return self._waits.pop(upload, None) is not None

    def take_place(self) -> Upload | None:
        """Whose place has become free, if any has."""
        with self._lock:
            for upload, wake_fd in self._waits.items():
                del self._waits[upload]
                os.eventfd_write(wake_fd, 1)
                return upload
        return None


class ChunkServer:
    """Serves chunks and small files to peers, in ``uploads_max`` threads, or fewer where these
    could not be in time together with ``upload_rate_max_bytes_per_s``.

    ``open_source(version_id)`` is called in these threads and returns what can be served of a file
    version, or None; the source is closed when the chunk has been sent, since what is open is not
    evicted. ``read_files(version_ids)`` likewise reads those that are here and have one chunk.
    ``on_uploaded(version_id, size_bytes, peer_identity)`` is called in these threads after each
    chunk, or all files of a request, and ``on_unreadable(version_id)`` where the disk cannot read
    a chunk. ``identity`` says who we are to those who connect. Everything else must be called in
    the event loop.
    """

    def __init__(
        self,
        keyring: Keyring,
        open_source: Callable[[bytes], ChunkSource | None],
        *,
        read_files: Callable[[Sequence[bytes]], Sequence[SmallFile]],
        uploads_max: int,
        upload_rate_max_bytes_per_s: float | None,
        on_uploaded: Callable[[bytes, int, bytes], None],
        on_unreadable: Callable[[bytes], None],
        identity: bytes = b"",
    ) -> None:
        assert uploads_max > 0, "a server needs a thread"
        if upload_rate_max_bytes_per_s is not None:
            # Each at such a rate that it is in time, or else all end after their peers' deadlines.
            in_time = int(upload_rate_max_bytes_per_s / DEADLINE_RATE_BYTES_PER_S)
            uploads_max = max(1, min(uploads_max, in_time))
        self._keyring = keyring
        self._identity = identity
        self._open_source = open_source
        self._read_files = read_files
        self._on_uploaded = on_uploaded
        self._on_unreadable = on_unreadable
        self._slots = UploadSlots(uploads_max)
        self._expected = _Expected()
        self._rate = RateLimit(upload_rate_max_bytes_per_s)
        self._threads = ThreadPool(uploads_max, thread_name_prefix="upload")
        self._listener: socket.socket | None = None
        # A connection is in exactly one of these three, which keep the order.
        self._strangers = Strangers(STRANGERS_MAX, HANDSHAKE_S, self._close)
        self._idle: dict[_Inbound, None] = {}
        self._busy: dict[_Inbound, asyncio.Future[bool]] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen. Returns the port, which matters if ``port`` is 0. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._listener = bind(HostPort(host, port))
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)
        return int(self._listener.getsockname()[1])

    async def stop(self) -> None:
        """Close everything; uploads in progress are cut. Returns when no thread is left."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for connection in [*self._strangers, *self._idle]:
            self._close(connection)
        self._rate.stop()
        for connection in self._busy:
            shut_down(connection.sock)
        await asyncio.to_thread(self._threads.shutdown)
        if self._busy:  # their threads are done, but the loop does not know yet
            await asyncio.wait(self._busy.values())

    @property
    def uploads(self) -> int:
        """Peers that are being served just now."""
        return len(self._busy)

    @property
    def connection_count(self) -> int:
        """All connections, with those that have not proven who they are."""
        return len(self._strangers) + len(self._idle) + len(self._busy)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            if self._listener is None:
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # it went away before we looked
            except OSError as error:
                _log.warning("cannot take connections for a moment: %s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(OUT_OF_DESCRIPTORS_S, self._accept_again)
                return
            self._welcome(sock)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _welcome(self, sock: socket.socket) -> None:
        acceptor = Acceptor(self._keyring, "data", os.urandom(NONCE_BYTES), self._identity)
        connection = _Inbound(sock, self._keyring, acceptor)
        self._strangers.add(connection)
        self._loop.add_reader(sock.fileno(), self._shake_hands, connection)

    def _shake_hands(self, connection: _Inbound) -> None:
        acceptor = connection.acceptor
        try:
            while not acceptor.done:
                frame = connection.receive(acceptor.wanted_bytes)
                if frame is None:
                    return
                reply = acceptor.handle(frame)
                if reply is not None:
                    connection.send_small(reply, socket.MSG_DONTWAIT)
        except (OSError, RemoteError) as error:
            _log.info("a connection to the data port was refused: %s", error)
            self._close(connection)
            return
        connection.keys = acceptor.session_keys()
        self._loop.remove_reader(connection.sock.fileno())
        self._strangers.discard(connection)
        self._watch(connection)

    def _watch(self, connection: _Inbound) -> None:
        """Wait in the loop for the next request."""
        if connection.timer is not None:
            connection.timer.cancel()
        if len(self._idle) >= IDLE_MAX:
            self._close(next(iter(self._idle)))
        self._idle[connection] = None
        connection.timer = self._loop.call_later(IDLE_SERVER_S, self._close, connection)
        self._loop.add_reader(connection.sock.fileno(), self._take_request, connection)

    def _take_request(self, connection: _Inbound) -> None:
        try:
            request = connection.next_request()
            if request is None:
                return
            upload = _upload(request)
            if not (self._admit(upload) and self._begin(connection, upload, request)):
                connection.send_header(BUSY, 0, socket.MSG_DONTWAIT)
        except (OSError, RemoteError) as error:
            _log.debug("a peer's connection ended: %s", error)
            self._close(connection)

    def _admit(self, upload: Upload) -> bool:
        """Whether there is a place for it, or one may be waited for."""
        if self._slots.full:
            left = self._expected.take_place()
            if left is not None:
                self._slots.leave(left)
        return self._slots.admit(upload)

    def _begin(
        self, connection: _Inbound, upload: Upload, request: ChunkRequest | FilesRequest
    ) -> bool:
        """Give the connection to a thread. False when there is none, and it is as it was."""
        self._loop.remove_reader(connection.sock.fileno())
        try:
            future = self._loop.run_in_executor(
                self._threads, self._serve, connection, upload, request
            )
        except NoThread as error:
            _log.warning("a peer is not served: %s", error)
            self._slots.leave(upload)
            self._loop.add_reader(connection.sock.fileno(), self._take_request, connection)
            return False
        del self._idle[connection]
        if connection.timer is not None:
            connection.timer.cancel()  # it is the thread's now, for as long as its peer asks
        self._busy[connection] = future
        future.add_done_callback(lambda future: self._served(connection, upload, future))
        return True

    def _served(self, connection: _Inbound, upload: Upload, future: asyncio.Future[bool]) -> None:
        del self._busy[connection]
        self._slots.leave(upload)
        keep = not future.cancelled() and future.exception() is None and future.result()
        if keep and self._listener is not None:
            self._watch(connection)
        else:
            self._close(connection)
        if not future.cancelled():
            future.result()  # a bug goes to the loop's exception handler

    def _close(self, connection: _Inbound) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
        self._loop.remove_reader(connection.sock.fileno())
        self._strangers.discard(connection)
        self._idle.pop(connection, None)
        connection.sock.close()

    # In the threads of the pool:

    def _serve(
        self, connection: _Inbound, upload: Upload, request: ChunkRequest | FilesRequest | None
    ) -> bool:
        """Answer requests as long as they come without a pause; whether to keep the connection."""
        connection.sock.setblocking(True)  # uvloop makes it non-blocking whenever it watches it
        try:
            with _eventfd() as wake_fd:
                poll = select.poll()
                poll.register(connection.sock, select.POLLIN)
                poll.register(wake_fd, select.POLLIN)
                while request is not None:
                    if isinstance(request, ChunkRequest):
                        self._answer(connection, request.version_id, request.chunk)
                    else:
                        self._answer_files(connection, request)
                    if self._slots.waiting:
                        return True  # somebody is to have this place
                    if not self._expected.wait(upload, poll, wake_fd):
                        return True
                    request = connection.next_request()
                    if request is not None:
                        following = _upload(request)
                        upload.version_id = following.version_id
                        upload.held_chunks = following.held_chunks
        except (OSError, RemoteError) as error:
            _log.debug("an upload ended: %s", error)
            return False
        return True

    def _answer(self, connection: _Inbound, version_id: bytes, chunk: int) -> None:
        with ExitStack() as stack:
            try:
                source = self._open_source(version_id)
                if source is not None:
                    stack.callback(source.close)
                present = source is not None and source.has(chunk)
            except (OSError, SwarmcacheError) as error:
                _log.warning("cannot serve %s: %s", version_id.hex(), error)
                connection.send_header(ERROR, 0, 0)
                return
            if source is None or not present:
                connection.send_header(ABSENT, 0, 0)
                return
            self._send_chunk(connection, source, version_id, chunk)

    def _send_chunk(
        self, connection: _Inbound, source: ChunkSource, version_id: bytes, chunk: int
    ) -> None:
        length = source.layout.length_bytes(chunk)
        connection.send_header(OK, length, socket.MSG_MORE)
        offset = source.layout.offset_bytes(chunk)
        end = offset + length
        while offset < end:
            piece_bytes = self._rate.piece_bytes(end - offset)
            self._rate.wait_for(piece_bytes)
            try:
                sent = os.sendfile(connection.sock.fileno(), source.fd, offset, piece_bytes)
            except OSError as error:
                if error.errno == errno.EIO:  # which no socket says: the disk is failing
                    _log.error("cannot read the copy of %s: %s", version_id.hex(), error)
                    self._on_unreadable(version_id)
                raise
            if sent == 0:
                _log.error("cached copy of %s is shorter than it should be", version_id.hex())
                raise ConnectionAbortedError("nothing left to send")
            offset += sent
        self._on_uploaded(version_id, length, connection.identity)

    def _answer_files(self, connection: _Inbound, request: FilesRequest) -> None:
        """Send what is here of many small files, as much as fits into one answer."""
        version_ids = request.version_ids
        try:
            files = self._read_files(version_ids)
        except (OSError, SwarmcacheError) as error:
            _log.warning("cannot serve small files: %s", error)
            connection.send_header(ERROR, 0, 0)
            return
        here: dict[bytes, SmallFile] = {}
        length = 0
        for file in files:
            if length + len(file.data) <= FILES_BYTES_MAX:
                here[file.version_id] = file
                length += len(file.data)
        sent = [here[version_id] for version_id in version_ids if version_id in here]
        digests = [here[each].digest if each in here else ABSENT_FILE for each in version_ids]
        assert connection.keys is not None, "answers come after the handshake"
        connection.send_header(OK, length, socket.MSG_MORE)
        connection.sock.sendall(connection.keys.seal(b"".join(digests)), socket.MSG_MORE)
        data = memoryview(b"".join([file.data for file in sent]))
        while data:
            piece_bytes = self._rate.piece_bytes(len(data))
            self._rate.wait_for(piece_bytes)
            connection.sock.sendall(data[:piece_bytes])
            data = data[piece_bytes:]
        self._on_uploaded(request.digest, length, connection.identity)


@contextmanager
def _eventfd() -> Iterator[int]:
    fd = os.eventfd(0)
    try:
        yield fd
    finally:
        os.close(fd)


def _upload(request: ChunkRequest | FilesRequest) -> Upload:
    if isinstance(request, ChunkRequest):
        return Upload(request.version_id, request.held_chunks)
    return Upload(request.digest, 0)
