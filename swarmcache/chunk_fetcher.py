"""The fetching end of the data plane: bytes of chunks and small files in from peers.

``recv_into`` and digest in threads, in bounded numbers and buffers (see ``chunk_protocol.py``).
Names of peers are looked up in threads of their own: a name service may hang for longer than
anybody may wait.

Not decided here: which chunk to ask from whom, what becomes of a peer that failed, where bytes go.

Invariant: ``ChunkFetcher`` gives bytes to ``write`` only if they have the digest asked for.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from ipaddress import ip_address

from blake3 import blake3

from swarmcache.auth import (
    CHALLENGE_BYTES,
    IDENTITY_MAX_BYTES,
    MAC_BYTES,
    NONCE_BYTES,
    ClusterKey,
    Initiator,
    Keyring,
    SessionKeys,
)
from swarmcache.chunk_protocol import (
    ABSENT,
    ABSENT_FILE,
    BUSY,
    FILES_MAX,
    IDLE_CLIENT_S,
    OK,
    RESPONSE,
    RESPONSE_BYTES,
    ChunkRequest,
    FilesRequest,
    set_timeout,
    shut_down,
)
from swarmcache.chunks import (
    CHUNK_SIZE_MAX_BYTES,
    CHUNK_SIZE_MIN_BYTES,
    DIGEST_BYTES,
    SmallFile,
)
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.errors import (
    ChunkAbsent,
    ChunkCorrupt,
    NoThread,
    PeerBusy,
    PeerUnavailable,
    RemoteError,
)
from swarmcache.rate_limit import RateLimit
from swarmcache.thread_pool import ThreadPool

IDLE_MAX = 128
LOOK_UPS_MAX = 16  # names that are looked up at once, each of them by one thread
IDLE_PER_PEER_MAX = 16  # as many requests as are in flight: of small files, often to one peer

# Still in a core's cache when it is digested, and few enough pieces that threads seldom wait for
# one another at the interpreter's lock.
RECEIVE_PIECE_BYTES = 1024 * 1024
# A waiting thread is woken when so much has come, not for every packet.
WAKE_BYTES = 64 * 1024


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
        """A buffer of exactly ``size_bytes``; waits until others return theirs if it must.

        Raises OSError where the system has no memory for it.
        """
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
                    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                    buffer = mmap.mmap(-1, capacity, flags=flags)
                    self._mapped_bytes += capacity  # not where the system refuses it
                    return buffer
                self._changed.wait()


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

    def excuse(self, waited_s: float) -> None:
        """We have waited for ourselves. With a low limit of our own no peer could be in time."""
        self._moved_at_s = time.monotonic()
        self._deadline_at_s += waited_s


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
            set_timeout(self.sock, socket.SO_RCVTIMEO, self._tick_s)
            set_timeout(self.sock, socket.SO_SNDTIMEO, self._tick_s)

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
        status, length = RESPONSE.unpack(self._keys.open(bytes(header)))
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
            began_s = time.monotonic()
            rate.wait_for(piece_bytes)
            patience.excuse(time.monotonic() - began_s)
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
                shut_down(connection.sock)

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
            if len(self._idle) <= IDLE_MAX and oldest.idle_since_s >= too_old_s:
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
        self._threads = ThreadPool(threads, thread_name_prefix="fetch")
        self._look_ups = CompartmentThreads("resolve", LOOK_UPS_MAX, 1, idle_max=1)

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
        Both times count from when a thread turns to the request, not while it waits for one, nor
        for ``download_rate_max_bytes_per_s``.

        The future fails with PeerUnavailable (unreachable, wrong secret, stalled, late, closed, or
        not our protocol), PeerBusy, ChunkAbsent, ChunkCorrupt (bytes or length are not those that
        were announced), or with whatever ``write`` raises. Raises NoThread: nothing is fetched.
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
        self._look_ups.close()
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
        except (OSError, RemoteError, UnicodeError) as error:  # the last for no name of a host
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
        with self._asked(peer, request, patience) as (connection, length):
            found: list[SmallFile] = []
            filled = 0
            digests = connection.receive_digests(len(files), patience)
            for (version_id, size_bytes), digest in zip(files, digests, strict=True):
                if digest != ABSENT_FILE:
                    view = into[filled : filled + size_bytes]
                    found.append(SmallFile(version_id, digest, view))
                    filled += size_bytes
            if length != filled:
                raise FileCorrupt(files[0][0])
            for _ in connection.receive_pieces(into[:filled], patience, self._rate):
                pass
        return found

    def _receive(
        self,
        peer: tuple[str, int],
        request: ChunkRequest,
        into: memoryview,
        patience: _Patience,
    ) -> bytes:
        """Receive the chunk and return its digest. The connection is free again afterwards."""
        with self._asked(peer, request, patience) as (connection, length):
            if length != len(into):
                raise ChunkCorrupt(f"{length} bytes for a chunk of {len(into)}")
            return connection.receive_chunk(into, patience, self._rate)

    @contextmanager
    def _asked(
        self, peer: tuple[str, int], request: ChunkRequest | FilesRequest, patience: _Patience
    ) -> Iterator[tuple[_Outbound, int]]:
        """Ask; the block is to receive from the connection so many bytes as it says. The connection
        is kept only if the block has done so. Raises what the peer answers instead of bytes."""
        connection, status, length = self._ask(peer, request, patience)
        if status == OK:
            try:
                yield connection, length
            except BaseException:
                self._connections.drop(connection)
                raise
        self._connections.give_back(connection)
        if status == BUSY:
            raise PeerBusy("all upload slots of the peer are taken")
        if status == ABSENT and isinstance(request, ChunkRequest):
            raise ChunkAbsent(f"the peer does not have chunk {request.chunk}")
        if status != OK:
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
        connection = self._connections.add(peer, self._dial(peer, patience))
        try:
            connection.be_patient(patience)
            connection.shake_hands(self._keyring, self._identity, patience)
        except BaseException:
            self._connections.drop(connection)
            raise
        return connection

    def _dial(self, peer: tuple[str, int], patience: _Patience) -> socket.socket:
        """Connect to the first of a peer's addresses that takes it. Raises what the last one does,
        and PeerUnavailable."""
        *others, last = self._addresses(peer, patience)
        for address in others:
            with suppress(OSError):
                return socket.create_connection(address, timeout=patience.left_s())
        return socket.create_connection(last, timeout=patience.left_s())

    def _addresses(self, peer: tuple[str, int], patience: _Patience) -> list[tuple[str, int]]:
        """The numeric ones of a peer, in time. Raises OSError, PeerUnavailable."""
        host, port = peer
        with suppress(ValueError):
            return [(str(ip_address(host)), port)]
        try:
            found = self._look_ups.submit(
                None, host, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM
            )
        except NoThread as error:
            raise PeerUnavailable(str(error)) from error
        try:
            return [(str(each[4][0]), port) for each in found.result(patience.left_s())]
        except TimeoutError as error:
            found.cancel()
            raise PeerUnavailable("its name was not found in time") from error
        except CancelledError as error:
            raise PeerUnavailable("this node is shutting down") from error
