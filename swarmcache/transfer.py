"""The data plane: bytes of chunks out to peers and in from peers.

A small framed protocol on plain TCP. After the handshake of ``auth`` (purpose ``data``) the peer
that connected sends requests of fixed size, and each is answered by a header of fixed size and, if
the status is OK, by the bytes of the chunk. Requests and headers carry MACs; the bytes are checked
against the chunk's digest. There are no names and no paths in it::

    request   MAC 16 B, kind u8, version id 32 B, chunk u32, chunks held u32
    response  MAC 16 B, status u8, length u32, then ``length`` bytes

Small files are asked for together. Kind 2 has the BLAKE3 of the ids that follow, and their number,
in place of version id and chunk. The answer has a digest for each before the bytes of all, which
lie one after the other; 32 zero bytes stand for a file that is not there::

    request   as above, then the version ids, 32 B each
    response  as above, but with MAC 16 B and the digests, 32 B each, before the ``length`` bytes

Bytes move in threads only, in bounded numbers: ``sendfile`` on the way out; ``recv_into`` and
digest on the way in. All of these let go of the GIL. An event loop looks after connections that are
idle or have not proven who they are, so a stranger cannot hold a thread.

Not decided here: which chunk to ask from whom, who is served first (``upload_slots.py``), what
becomes of a peer that failed, where bytes go.

Invariant: ``ChunkFetcher`` gives bytes to ``write`` only if they have the digest asked for.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from swarmcache.auth import (
    CHALLENGE_BYTES,
    IDENTITY_MAX_BYTES,
    MAC_BYTES,
    NONCE_BYTES,
    Acceptor,
    ClusterKey,
    Initiator,
    Keyring,
    SessionKeys,
)
from swarmcache.chunks import (
    CHUNK_SIZE_MAX_BYTES,
    CHUNK_SIZE_MIN_BYTES,
    DIGEST_BYTES,
    ChunkLayout,
    SmallFile,
)
from swarmcache.errors import (
    AuthenticationFailed,
    ChunkAbsent,
    ChunkCorrupt,
    PeerBusy,
    PeerUnavailable,
    RemoteError,
    SwarmcacheError,
)
from swarmcache.quantities import HostPort
from swarmcache.serving import bind
from swarmcache.upload_slots import Upload, UploadSlots

HANDSHAKE_S = 5.0  # two round trips, on a bad day
STRANGERS_MAX = 256  # connections without proof; the oldest makes room for a newer one
IDLE_SERVER_S = 60.0
IDLE_CLIENT_S = 30.0  # less than the server's, so that it is the client who closes
IDLE_SERVER_MAX = 512  # connections; half of the usual limit of 1,024 descriptors per process
IDLE_CLIENT_MAX = 128
IDLE_PER_PEER_MAX = 16  # as many requests as are in flight: of small files, often to one peer
assert IDLE_CLIENT_S < IDLE_SERVER_S, "else requests meet closing connections"

SEND_STALL_S = 10.0  # a receiver that takes nothing for so long is dropped
# A peer in full swing asks again when the rest of its chunk has left our buffers and it has written
# it. To wait for that in a thread is one wake-up; a trip through the loop to another thread takes a
# dozen. Measured with eight nodes at 200 Mbit/s on two busy cores: 98 % of requests come in time,
# half of them after 10 ms, and all daemons take a fifth less processor time than with 2 ms.
NEXT_REQUEST_MS = 100
ACCEPTS_AT_ONCE = 64
OUT_OF_DESCRIPTORS_S = 1.0

# Still in a core's cache when it is digested, and few enough pieces that threads seldom wait for
# one another at the interpreter's lock.
RECEIVE_PIECE_BYTES = 1024 * 1024
# What one upload may have on its way, in segments (the kernel doubles it for its own use). More
# would only queue in the switches, and every announcement and request behind it: measured with
# eight nodes at 200 Mbit/s, where a port queues 50 ms, efficiency 0.89 without, 0.90 with this.
SEND_SEGMENTS_MAX = 22
# A waiting thread is woken when so much has come, not for every packet.
WAKE_BYTES = 64 * 1024
RATE_PIECES_PER_S = 10  # with a rate limit, bytes move in about so many pieces a second
RATE_PIECE_MIN_BYTES = 4096

FILES_MAX = 1024  # small files in one request
FILES_BYTES_MAX = CHUNK_SIZE_MAX_BYTES  # of all of them: both ends have them in memory at once

_KIND_CHUNK, _KIND_FILES = 1, 2
_OK, _ABSENT, _BUSY, _ERROR = 0, 1, 2, 3
_ABSENT_FILE = bytes(DIGEST_BYTES)
_REQUEST = struct.Struct("!B32sII")
_RESPONSE = struct.Struct("!BI")
REQUEST_BYTES = MAC_BYTES + _REQUEST.size
RESPONSE_BYTES = MAC_BYTES + _RESPONSE.size

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


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Which chunk is asked for, and how many chunks of the file the one who asks holds already."""

    version_id: bytes
    chunk: int
    held_chunks: int

    def encode(self) -> bytes:
        return _REQUEST.pack(_KIND_CHUNK, self.version_id, self.chunk, self.held_chunks)


@dataclass(frozen=True, slots=True)
class FilesRequest:
    """Which small files are asked for together. ``ids``: their version ids, one after the other."""

    ids: bytes

    @property
    def version_ids(self) -> list[bytes]:
        return [self.ids[at : at + DIGEST_BYTES] for at in range(0, len(self.ids), DIGEST_BYTES)]

    @property
    def digest(self) -> bytes:
        """What stands for all of them."""
        return blake3(self.ids).digest()

    def encode(self) -> bytes:
        return _REQUEST.pack(_KIND_FILES, self.digest, len(self.ids) // DIGEST_BYTES, 0)


class RateLimit:
    """Paces threads so that together they move ``bytes_per_s``; None is no limit."""

    def __init__(self, bytes_per_s: float | None) -> None:
        assert bytes_per_s is None or bytes_per_s > 0, "a rate is positive, or None for no limit"
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def piece_bytes(self, size_bytes: int) -> int:
        """How many of these bytes to move at a time, so that the pace is even."""
        if self._bytes_per_s is None:
            return size_bytes
        return min(
            size_bytes, max(int(self._bytes_per_s / RATE_PIECES_PER_S), RATE_PIECE_MIN_BYTES)
        )

    def wait_for(self, size_bytes: int) -> None:
        """Sleep until so many bytes may move (in the order of calls), or until ``stop``."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = time.monotonic()
            start_s = max(self._free_at_s, now_s)
            self._free_at_s = start_s + size_bytes / self._bytes_per_s
        if start_s > now_s:
            self._stopped.wait(start_s - now_s)

    def stop(self) -> None:
        """Wake all sleepers; from now on nobody sleeps."""
        self._stopped.set()


class BufferPool:
    """Page-aligned buffers for threads, of never more than ``bytes_max`` together.

    Sizes are powers of two from 256 KiB on. The buffer used last is given out first: it is the one
    in the cache.
    """

    def __init__(self, bytes_max: int) -> None:
        assert bytes_max >= CHUNK_SIZE_MAX_BYTES, "the largest chunk must find a buffer"
        self._bytes_max = bytes_max
        self._mapped_bytes = 0
        self._free: list[mmap.mmap] = []
        self._turn = threading.Lock()  # first come, first served: small ones starve no large one
        self._changed = threading.Condition()

    @property
    def mapped_bytes(self) -> int:
        """Size of all buffers, lent and free."""
        return self._mapped_bytes

    @contextmanager
    def lend(self, size_bytes: int) -> Iterator[memoryview]:
        """A buffer of exactly ``size_bytes``; waits until others return theirs if it must."""
        buffer = self._take(size_bytes)
        try:
            yield memoryview(buffer)[:size_bytes]
        finally:
            with self._changed:
                self._free.append(buffer)
                self._changed.notify()

    def _take(self, size_bytes: int) -> mmap.mmap:
        assert 0 < size_bytes <= CHUNK_SIZE_MAX_BYTES, "no chunk is larger"
        capacity = max(CHUNK_SIZE_MIN_BYTES, 1 << (size_bytes - 1).bit_length())
        with self._turn, self._changed:
            while True:
                for buffer in reversed(self._free):
                    if len(buffer) == capacity:
                        self._free.remove(buffer)
                        return buffer
                while self._free and self._mapped_bytes + capacity > self._bytes_max:
                    self._mapped_bytes -= len(self._free.pop(0))
                if self._mapped_bytes + capacity <= self._bytes_max:
                    self._mapped_bytes += capacity
                    return mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._changed.wait()


# --- out: serving peers -------------------------------------------------------------------------


class _Inbound:
    """A connection that somebody opened to us. One owner at a time: the loop or one thread."""

    def __init__(self, sock: socket.socket, keyring: Keyring, acceptor: Acceptor) -> None:
        # Only a thread that serves lets the socket block, because a blocking sendfile is the
        # fastest; the loop and the reads use MSG_DONTWAIT.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mss_bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_SEGMENTS_MAX * mss_bytes)
        _set_timeout(sock, socket.SO_SNDTIMEO, SEND_STALL_S)
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
            kind, version_id, number, held_chunks = _REQUEST.unpack(self.keys.open(frame))
            if kind == _KIND_CHUNK:
                return ChunkRequest(version_id, number, held_chunks)
            if kind != _KIND_FILES or not 0 < number <= FILES_MAX:
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
        self.send_small(self.keys.seal(_RESPONSE.pack(status, length)), flags)

    def send_small(self, frame: bytes, flags: int) -> None:
        """Send a frame that fits any socket buffer that is not full."""
        if self.sock.send(frame, flags) != len(frame):
            raise BlockingIOError("the peer takes no answers")


class _LastSource:
    """The source that a thread served from last, kept open while requests for it keep coming."""

    def __init__(self, open_source: Callable[[bytes], ChunkSource | None]) -> None:
        self._open_source = open_source
        self._version_id = b""
        self._source: ChunkSource | None = None

    def get(self, version_id: bytes) -> ChunkSource | None:
        if self._source is None or self._version_id != version_id:
            self.close()
            self._source = self._open_source(version_id)
            self._version_id = version_id
        return self._source

    def close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()


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
    """Serves chunks and small files to peers, in ``uploads_max`` threads.

    ``open_source(version_id)`` is called in these threads and returns what can be served of a file
    version, or None; the source is closed when the peer pauses. ``read_files(version_ids)``
    likewise reads those that are here and have one chunk. ``on_uploaded(version_id, size_bytes,
    peer_identity)`` is called in these threads after each chunk, or all files of a request.
    ``identity`` says who we are to those who connect. Everything else must be called in the event
    loop.
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
        identity: bytes = b"",
    ) -> None:
        assert uploads_max > 0, "a server needs a thread"
        self._keyring = keyring
        self._identity = identity
        self._open_source = open_source
        self._read_files = read_files
        self._on_uploaded = on_uploaded
        self._slots = UploadSlots(uploads_max)
        self._expected = _Expected()
        self._rate = RateLimit(upload_rate_max_bytes_per_s)
        self._threads = ThreadPoolExecutor(uploads_max, thread_name_prefix="upload")
        self._listener: socket.socket | None = None
        # A connection is in exactly one of these three; dicts, because they keep the order.
        self._strangers: dict[_Inbound, None] = {}
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
            _shut_down(connection.sock)
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
        if len(self._strangers) >= STRANGERS_MAX:
            self._close(next(iter(self._strangers)))
        acceptor = Acceptor(self._keyring, "data", os.urandom(NONCE_BYTES), self._identity)
        connection = _Inbound(sock, self._keyring, acceptor)
        self._strangers[connection] = None
        connection.timer = self._loop.call_later(HANDSHAKE_S, self._close, connection)
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
        del self._strangers[connection]
        self._watch(connection)

    def _watch(self, connection: _Inbound) -> None:
        """Wait in the loop for the next request."""
        if connection.timer is not None:
            connection.timer.cancel()
        if len(self._idle) >= IDLE_SERVER_MAX:
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
            if not self._admit(upload):
                connection.send_header(_BUSY, 0, socket.MSG_DONTWAIT)
                return
        except (OSError, RemoteError) as error:
            _log.debug("a peer's connection ended: %s", error)
            self._close(connection)
            return
        self._loop.remove_reader(connection.sock.fileno())
        del self._idle[connection]
        future = self._loop.run_in_executor(self._threads, self._serve, connection, upload, request)
        self._busy[connection] = future
        future.add_done_callback(lambda future: self._served(connection, upload, future))

    def _admit(self, upload: Upload) -> bool:
        """Whether there is a place for it, or one may be waited for."""
        if self._slots.full:
            left = self._expected.take_place()
            if left is not None:
                self._slots.leave(left)
        return self._slots.admit(upload)

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
        self._strangers.pop(connection, None)
        self._idle.pop(connection, None)
        connection.sock.close()

    # In the threads of the pool:

    def _serve(
        self, connection: _Inbound, upload: Upload, request: ChunkRequest | FilesRequest | None
    ) -> bool:
        """Answer requests as long as they come without a pause; whether to keep the connection."""
        connection.sock.setblocking(True)  # uvloop makes it non-blocking whenever it watches it
        try:
            with closing(_LastSource(self._open_source)) as sources, _eventfd() as wake_fd:
                poll = select.poll()
                poll.register(connection.sock, select.POLLIN)
                poll.register(wake_fd, select.POLLIN)
                while request is not None:
                    if isinstance(request, ChunkRequest):
                        self._answer(connection, sources, request.version_id, request.chunk)
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

    def _answer(
        self, connection: _Inbound, sources: _LastSource, version_id: bytes, chunk: int
    ) -> None:
        try:
            source = sources.get(version_id)
            present = source is not None and source.has(chunk)
        except (OSError, SwarmcacheError) as error:
            _log.warning("cannot serve %s: %s", version_id.hex(), error)
            connection.send_header(_ERROR, 0, 0)
            return
        if source is None or not present:
            connection.send_header(_ABSENT, 0, 0)
            return
        length = source.layout.length_bytes(chunk)
        connection.send_header(_OK, length, socket.MSG_MORE)
        offset = source.layout.offset_bytes(chunk)
        end = offset + length
        while offset < end:
            piece_bytes = self._rate.piece_bytes(end - offset)
            self._rate.wait_for(piece_bytes)
            sent = os.sendfile(connection.sock.fileno(), source.fd, offset, piece_bytes)
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
            connection.send_header(_ERROR, 0, 0)
            return
        here: dict[bytes, SmallFile] = {}
        length = 0
        for file in files:
            if length + len(file.data) <= FILES_BYTES_MAX:
                here[file.version_id] = file
                length += len(file.data)
        sent = [here[version_id] for version_id in version_ids if version_id in here]
        digests = [here[each].digest if each in here else _ABSENT_FILE for each in version_ids]
        assert connection.keys is not None, "answers come after the handshake"
        connection.send_header(_OK, length, socket.MSG_MORE)
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


# --- in: fetching from peers --------------------------------------------------------------------


class _Patience:
    """How long one fetch may take: in all, and without a byte."""

    def __init__(self, deadline_s: float, stall_s: float) -> None:
        self._moved_at_s = time.monotonic()
        self._deadline_at_s = self._moved_at_s + deadline_s
        self._deadline_s = deadline_s
        self._stall_s = stall_s
        self.tick_s = min(deadline_s, stall_s) / 4

    def left_s(self) -> float:
        """Time until one of the two runs out; raises PeerUnavailable if none is left."""
        now_s = time.monotonic()
        if now_s >= self._deadline_at_s:
            raise PeerUnavailable(f"not finished within {self._deadline_s:g} s")
        if now_s >= self._moved_at_s + self._stall_s:
            raise PeerUnavailable(f"no byte for {self._stall_s:g} s")
        return min(self._deadline_at_s, self._moved_at_s + self._stall_s) - now_s

    def moved(self) -> None:
        """A byte came; raises PeerUnavailable if it came after the deadline."""
        self._moved_at_s = time.monotonic()
        if self._moved_at_s >= self._deadline_at_s:
            raise PeerUnavailable(f"not finished within {self._deadline_s:g} s")


class _Outbound:
    """A connection that we opened to a peer's ``ChunkServer``, used by one thread at a time."""

    def __init__(self, sock: socket.socket, bucket: _Bucket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.bucket = bucket
        self.idle_since_s = 0.0
        self.key: ClusterKey | None = None
        self._keys: SessionKeys | None = None
        self._tick_s = 0.0

    def be_patient(self, patience: _Patience) -> None:
        """Wake waiting calls often enough to look at the clock."""
        if patience.tick_s != self._tick_s:
            self._tick_s = patience.tick_s
            _set_timeout(self.sock, socket.SO_RCVTIMEO, self._tick_s)
            _set_timeout(self.sock, socket.SO_SNDTIMEO, self._tick_s)

    def shake_hands(self, keyring: Keyring, identity: bytes, patience: _Patience) -> None:
        initiator = Initiator(keyring, "data", os.urandom(NONCE_BYTES), identity)
        self._send(initiator.first())
        challenge = bytearray(CHALLENGE_BYTES)
        self._fill(memoryview(challenge), patience)
        proof = initiator.handle(bytes(challenge))
        assert proof is not None, "an initiator answers a challenge"
        self._send(proof)
        self.key = initiator.key
        self._keys = initiator.session_keys()

    def ask(self, request: ChunkRequest | FilesRequest, patience: _Patience) -> tuple[int, int]:
        """Send a request and wait for the header of its answer: status and length."""
        assert self._keys is not None, "requests come after the handshake"
        frame = self._keys.seal(request.encode())
        self._send(frame + request.ids if isinstance(request, FilesRequest) else frame)
        header = bytearray(RESPONSE_BYTES)
        self._fill(memoryview(header), patience)
        status, length = _RESPONSE.unpack(self._keys.open(bytes(header)))
        return status, length

    def receive_digests(self, count: int, patience: _Patience) -> list[bytes]:
        """What precedes the bytes of small files. Raises AuthenticationFailed."""
        assert self._keys is not None, "answers come after the handshake"
        frame = bytearray(MAC_BYTES + count * DIGEST_BYTES)
        self._fill(memoryview(frame), patience)
        digests = self._keys.open(bytes(frame))
        return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]

    def receive_pieces(
        self, into: memoryview, patience: _Patience, rate: RateLimit
    ) -> Iterator[memoryview]:
        """Fill the buffer from the connection; gives each part as soon as it is there."""
        size_bytes = len(into)
        filled = 0
        while filled < size_bytes:
            piece_bytes = rate.piece_bytes(min(RECEIVE_PIECE_BYTES, size_bytes - filled))
            rate.wait_for(piece_bytes)
            patience.moved()  # that wait was ours
            piece = into[filled : filled + piece_bytes]
            self._fill(piece, patience)
            yield piece
            filled += piece_bytes

    def receive_chunk(self, into: memoryview, patience: _Patience, rate: RateLimit) -> bytes:
        """Fill the buffer from the connection; returns the digest of what came."""
        hasher = blake3()
        for piece in self.receive_pieces(into, patience, rate):
            hasher.update(piece)
        return hasher.digest()

    def _send(self, frame: bytes) -> None:
        if self.sock.send(frame) != len(frame):
            raise PeerUnavailable("takes no requests")

    def _fill(self, into: memoryview, patience: _Patience) -> None:
        """Receive until the buffer is full, woken as seldom as may be.

        Near the end every byte must wake us, since none may follow.
        """
        most_bytes = len(into) - 2 * WAKE_BYTES
        if most_bytes > 0:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WAKE_BYTES)
            self._fill_part(into[:most_bytes], patience)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            into = into[most_bytes:]
        self._fill_part(into, patience)

    def _fill_part(self, into: memoryview, patience: _Patience) -> None:
        size_bytes = len(into)
        filled = 0
        while filled < size_bytes:
            try:
                count = self.sock.recv_into(
                    into[filled:] if filled else into, 0, socket.MSG_WAITALL
                )
            except BlockingIOError:
                patience.left_s()
                continue
            if count == 0:
                raise ConnectionResetError("the peer closed the connection")
            patience.moved()
            filled += count


class _Bucket:
    """The idle connections to one peer. ``forgotten`` ones are closed when they come back."""

    def __init__(self, peer: tuple[str, int]) -> None:
        self.peer = peer
        self.idle: list[_Outbound] = []
        self.in_use_count = 0
        self.forgotten = False


class _Connections:
    """Persistent connections to peers, a few for each, shared by the threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, int], _Bucket] = {}
        self._idle: dict[_Outbound, None] = {}  # of all buckets, the one idle longest first
        self._in_use: set[_Outbound] = set()
        self._closed = False

    def take_idle(self, peer: tuple[str, int]) -> _Outbound | None:
        """The connection to the peer that was used last, or None if none is idle."""
        with self._lock:
            self._close_old()
            bucket = self._buckets.get(peer)
            if bucket is None or not bucket.idle:
                return None
            connection = bucket.idle.pop()
            del self._idle[connection]
            self._use(connection)
            return connection

    def add(self, peer: tuple[str, int], sock: socket.socket) -> _Outbound:
        """Take charge of a new connection, as one in use."""
        with self._lock:
            if self._closed:
                sock.close()
                raise PeerUnavailable("this node is shutting down")
            connection = _Outbound(sock, self._buckets.setdefault(peer, _Bucket(peer)))
            self._use(connection)
            return connection

    def give_back(self, connection: _Outbound) -> None:
        """Keep a connection on which no answer is outstanding."""
        with self._lock:
            bucket = connection.bucket
            if self._closed or bucket.forgotten or len(bucket.idle) >= IDLE_PER_PEER_MAX:
                self._drop(connection)
                return
            self._unuse(connection)
            connection.idle_since_s = time.monotonic()
            bucket.idle.append(connection)
            self._idle[connection] = None
            self._close_old()

    def drop(self, connection: _Outbound) -> None:
        """Close a connection that cannot be used again."""
        with self._lock:
            self._drop(connection)

    def forget(self, peer: tuple[str, int]) -> None:
        """Close the idle connections to a peer, and those in use when they come back."""
        with self._lock:
            bucket = self._buckets.pop(peer, None)
            if bucket is not None:
                bucket.forgotten = True
                for connection in [*bucket.idle]:
                    self._close_idle(connection)

    def close(self) -> None:
        """Close what is idle and cut what is in use."""
        with self._lock:
            self._closed = True
            for connection in [*self._idle]:
                self._close_idle(connection)
            for connection in self._in_use:
                _shut_down(connection.sock)

    def _use(self, connection: _Outbound) -> None:
        self._in_use.add(connection)
        connection.bucket.in_use_count += 1

    def _unuse(self, connection: _Outbound) -> None:
        self._in_use.remove(connection)
        connection.bucket.in_use_count -= 1

    def _drop(self, connection: _Outbound) -> None:
        self._unuse(connection)
        connection.sock.close()
        self._forget_empty(connection.bucket)

    def _close_idle(self, connection: _Outbound) -> None:
        del self._idle[connection]
        connection.bucket.idle.remove(connection)
        connection.sock.close()
        self._forget_empty(connection.bucket)

    def _close_old(self) -> None:
        too_old_s = time.monotonic() - IDLE_CLIENT_S
        while self._idle:
            oldest = next(iter(self._idle))
            if len(self._idle) <= IDLE_CLIENT_MAX and oldest.idle_since_s >= too_old_s:
                return
            self._close_idle(oldest)

    def _forget_empty(self, bucket: _Bucket) -> None:
        """Peers come and go: keep nothing of those to whom there is no connection."""
        if not bucket.idle and not bucket.in_use_count and not bucket.forgotten:
            bucket.forgotten = True
            del self._buckets[bucket.peer]


class FileCorrupt(ChunkCorrupt):
    """A small file does not have the digest that its holder named; ``version_id`` says which."""

    def __init__(self, version_id: bytes) -> None:
        super().__init__(f"wrong bytes of {version_id.hex()}")
        self.version_id = version_id


class _CopyUnreadable(PeerUnavailable):
    """The peer answered, but cannot serve: its connections are good."""


class ChunkFetcher:
    """Fetches chunks from peers, ``threads`` at a time, in buffers of ``buffers_bytes_max``.

    ``identity`` says who we are to the peers. May be called from any thread.
    """

    def __init__(
        self,
        keyring: Keyring,
        identity: bytes,
        *,
        threads: int,
        buffers_bytes_max: int,
        download_rate_max_bytes_per_s: float | None = None,
    ) -> None:
        assert len(identity) <= IDENTITY_MAX_BYTES, "an identity has at most 255 bytes"
        self._keyring = keyring
        self._identity = identity
        self._buffers = BufferPool(buffers_bytes_max)
        self._rate = RateLimit(download_rate_max_bytes_per_s)
        self._connections = _Connections()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fetch")

    @property
    def buffers_bytes(self) -> int:
        """Memory that the buffers take just now."""
        return self._buffers.mapped_bytes

    def fetch(
        self,
        peer: tuple[str, int],
        request: ChunkRequest,
        length: int,
        digest: bytes,
        write: Callable[[memoryview], None],
        deadline_s: float,
        stall_s: float,
    ) -> Future[int]:
        """Fetch one chunk from the data port of a peer; the result is its size in bytes.

        ``write`` is called once, in a thread, with the whole verified chunk, and must not keep it.
        Both times count from when a thread turns to the request, not while it waits for one.

        The future fails with PeerUnavailable (unreachable, wrong secret, stalled, late, closed, or
        not our protocol), PeerBusy, ChunkAbsent, ChunkCorrupt (bytes or length are not those that
        were announced), or with whatever ``write`` raises.
        """
        return self._threads.submit(
            self._fetch, peer, request, length, digest, write, deadline_s, stall_s
        )

    def fetch_files(
        self,
        peer: tuple[str, int],
        files: Sequence[tuple[bytes, int]],
        take: Callable[[list[SmallFile]], None],
        deadline_s: float,
        stall_s: float,
    ) -> None:
        """Fetch small files, each given by version id and size, from the data port of a peer.

        Waits for them, so it belongs into a worker thread. ``take`` is called once with those that
        the peer has, every one of them verified, and must not keep their bytes.

        Raises PeerUnavailable, PeerBusy, ChunkCorrupt as ``fetch`` does, or what ``take`` raises.
        """
        assert 0 < len(files) <= FILES_MAX, "too many files for one request"
        most_bytes = sum(size_bytes for _, size_bytes in files)
        with self._buffers.lend(most_bytes) as view:
            with self._told_apart(peer):
                found = self._receive_files(peer, files, view, _Patience(deadline_s, stall_s))
            wrong = [file for file in found if blake3(file.data).digest() != file.digest]
            if wrong:
                raise FileCorrupt(wrong[0].version_id)
            take(found)

    def forget(self, peer: tuple[str, int]) -> None:
        """Close the idle connections to a peer, and those in use when their chunk is done."""
        self._connections.forget(peer)

    def close(self) -> None:
        """Cancel what has not begun, cut what has, and wait for the threads."""
        self._rate.stop()
        self._connections.close()
        self._threads.shutdown(cancel_futures=True)

    def _fetch(
        self,
        peer: tuple[str, int],
        request: ChunkRequest,
        length: int,
        digest: bytes,
        write: Callable[[memoryview], None],
        deadline_s: float,
        stall_s: float,
    ) -> int:
        with self._buffers.lend(length) as view:
            with self._told_apart(peer):
                got = self._receive(peer, request, view, _Patience(deadline_s, stall_s))
            if got != digest:
                raise ChunkCorrupt(
                    f"chunk {request.chunk} from {peer[0]}:{peer[1]} has another digest"
                )
            write(view)
        return length

    @contextmanager
    def _told_apart(self, peer: tuple[str, int]) -> Iterator[None]:
        """Whatever ends a connection is PeerUnavailable; an answer of the peer is what it is."""
        try:
            yield
        except (OSError, RemoteError) as error:
            if isinstance(error, PeerBusy | ChunkAbsent | ChunkCorrupt):
                raise
            if not isinstance(error, _CopyUnreadable):
                # Its other idle connections went the same way (it was cut off, say), and each
                # would cost the next request as long.
                self._connections.forget(peer)
            raise PeerUnavailable(f"{peer[0]}:{peer[1]}: {error}") from error

    def _receive_files(
        self,
        peer: tuple[str, int],
        files: Sequence[tuple[bytes, int]],
        into: memoryview,
        patience: _Patience,
    ) -> list[SmallFile]:
        """Receive what the peer has of these files. The connection is free again afterwards."""
        request = FilesRequest(b"".join([version_id for version_id, _ in files]))
        connection, status, length = self._ask(peer, request, patience)
        if status != _OK:
            self._connections.give_back(connection)
            if status == _BUSY:
                raise PeerBusy("all upload slots of the peer are taken")
            raise _CopyUnreadable("the peer cannot read its copies")
        try:
            found: list[SmallFile] = []
            filled = 0
            digests = connection.receive_digests(len(files), patience)
            for (version_id, size_bytes), digest in zip(files, digests, strict=True):
                if digest != _ABSENT_FILE:
                    view = into[filled : filled + size_bytes]
                    found.append(SmallFile(version_id, digest, view))
                    filled += size_bytes
            if length != filled:
                raise FileCorrupt(files[0][0])
            for _ in connection.receive_pieces(into[:filled], patience, self._rate):
                pass
        except BaseException:
            self._connections.drop(connection)
            raise
        self._connections.give_back(connection)
        return found

    def _receive(
        self,
        peer: tuple[str, int],
        request: ChunkRequest,
        into: memoryview,
        patience: _Patience,
    ) -> bytes:
        """Receive the chunk and return its digest. The connection is free again afterwards."""
        connection, status, length = self._ask(peer, request, patience)
        if status == _OK:
            try:
                if length != len(into):
                    raise ChunkCorrupt(f"{length} bytes for a chunk of {len(into)}")
                digest = connection.receive_chunk(into, patience, self._rate)
            except BaseException:
                self._connections.drop(connection)
                raise
            self._connections.give_back(connection)
            return digest
        self._connections.give_back(connection)
        if status == _BUSY:
            raise PeerBusy("all upload slots of the peer are taken")
        if status == _ABSENT:
            raise ChunkAbsent(f"the peer does not have chunk {request.chunk}")
        raise _CopyUnreadable("the peer cannot read its copy")

    def _ask(
        self, peer: tuple[str, int], request: ChunkRequest | FilesRequest, patience: _Patience
    ) -> tuple[_Outbound, int, int]:
        """Ask on an idle connection, or on a new one if the peer has closed those."""
        while True:
            connection = self._connections.take_idle(peer)
            if connection is not None and connection.key not in self._keyring.accepted:
                self._connections.drop(connection)
                continue
            fresh = connection is None
            if connection is None:
                connection = self._connect(peer, patience)
            try:
                connection.be_patient(patience)
                status, length = connection.ask(request, patience)
            except ConnectionError:
                self._connections.drop(connection)
                if fresh:
                    raise
            except BaseException:
                self._connections.drop(connection)
                raise
            else:
                return connection, status, length

    def _connect(self, peer: tuple[str, int], patience: _Patience) -> _Outbound:
        sock = socket.create_connection(peer, timeout=patience.left_s())
        connection = self._connections.add(peer, sock)
        try:
            connection.be_patient(patience)
            connection.shake_hands(self._keyring, self._identity, patience)
        except BaseException:
            self._connections.drop(connection)
            raise
        return connection


def _set_timeout(sock: socket.socket, option: int, timeout_s: float) -> None:
    """Let blocking calls on the socket fail with EAGAIN after some time. (Zero means never.)"""
    timeout_us = max(int(timeout_s * 1e6), 1)
    timeval = struct.pack("@ll", timeout_us // 1_000_000, timeout_us % 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, option, timeval)


def _shut_down(sock: socket.socket) -> None:
    """Wake whoever is blocked on the socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("the connection was closed already: %s", error)
