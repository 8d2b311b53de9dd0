"""The data plane over real sockets on loopback, against honest and lying peers."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from swarmcache import chunk_server
from swarmcache.auth import (
    CHALLENGE_BYTES,
    Acceptor,
    ClusterKey,
    Initiator,
    Keyring,
    Purpose,
    SessionKeys,
)
from swarmcache.chunk_fetcher import BufferPool, ChunkFetcher, FileCorrupt
from swarmcache.chunk_protocol import REQUEST_BYTES, RESPONSE_BYTES, ChunkRequest
from swarmcache.chunk_server import ChunkServer
from swarmcache.chunks import CHUNK_SIZE_MAX_BYTES, ChunkLayout, SmallFile
from swarmcache.download import DEADLINE_RATE_BYTES_PER_S
from swarmcache.errors import (
    ChunkAbsent,
    ChunkCorrupt,
    NoSpace,
    PeerBusy,
    PeerUnavailable,
    SwarmcacheError,
)
from swarmcache.rate_limit import RATE_PIECE_MIN_BYTES, RateLimit
from tests.box import wait_until

KEY = Keyring([ClusterKey.from_secret(b"a secret")])
VERSION = b"v" * 32
CHUNK_BYTES = 256 * 1024
SIZE_BYTES = 5 * CHUNK_BYTES + 1234
DATA = random.Random(1).randbytes(SIZE_BYTES)
LAYOUT = ChunkLayout(SIZE_BYTES, CHUNK_BYTES)
OK, ABSENT, BUSY, ERROR = 0, 1, 2, 3


def chunk_bytes(chunk: int) -> bytes:
    return DATA[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]


class Source:
    """A file that is served; ``before_answer`` is called when it is asked for a chunk."""

    def __init__(
        self, path: Path, layout: ChunkLayout, before_answer: Callable[[], object] = lambda: None
    ) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.layout = layout
        self._before_answer = before_answer

    def has(self, chunk: int) -> bool:
        self._before_answer()
        return chunk < self.layout.chunk_count

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@asynccontextmanager
async def serving(
    open_source: Callable[[bytes], Source | None],
    *,
    keyring: Keyring = KEY,
    uploads_max: int = 4,
    rate: float | None = None,
    read_files: Callable[[Sequence[bytes]], Sequence[SmallFile]] = lambda version_ids: [],
    uploaded: list[tuple[bytes, int, bytes]] | None = None,
    unreadable: list[bytes] | None = None,
) -> AsyncIterator[tuple[str, int]]:
    server = ChunkServer(
        keyring,
        open_source,
        read_files=read_files,
        uploads_max=uploads_max,
        upload_rate_max_bytes_per_s=rate,
        on_uploaded=lambda *what: None if uploaded is None else uploaded.append(what),
        on_unreadable=lambda what: None if unreadable is None else unreadable.append(what),
    )
    port = await server.start("127.0.0.1", 0)
    try:
        yield "127.0.0.1", port
    finally:
        await server.stop()
        assert server.connection_count == 0


@contextmanager
def fetching(
    key: Keyring = KEY, *, threads: int = 4, rate: float | None = None
) -> Iterator[ChunkFetcher]:
    fetcher = ChunkFetcher(
        key,
        b"node-1",
        threads=threads,
        buffers_bytes_max=CHUNK_SIZE_MAX_BYTES,
        download_rate_max_bytes_per_s=rate,
    )
    try:
        yield fetcher
    finally:
        fetcher.close()


def fetch(
    fetcher: ChunkFetcher,
    peer: tuple[str, int],
    chunk: int = 0,
    *,
    into: list[bytes] | None = None,
    held_chunks: int = 0,
    deadline_s: float = 10,
    stall_s: float = 5,
) -> Future[int]:
    """Ask for one chunk of the test's file; what is written goes to ``into``."""
    written = [] if into is None else into
    return fetcher.fetch(
        peer,
        ChunkRequest(VERSION, chunk, held_chunks),
        len(chunk_bytes(chunk)),
        blake3(chunk_bytes(chunk)).digest(),
        lambda data: written.append(bytes(data)),
        deadline_s,
        stall_s,
    )


# --- good transfers ------------------------------------------------------------------------------


async def test_every_chunk_arrives_with_the_last_short_one(path: Path) -> None:
    uploaded: list[tuple[bytes, int, bytes]] = []
    chunks = range(LAYOUT.chunk_count)
    written: list[list[bytes]] = [[] for _ in chunks]
    async with serving(lambda _: Source(path, LAYOUT), uploaded=uploaded) as peer:
        with fetching() as fetcher:
            futures = [fetch(fetcher, peer, chunk, into=written[chunk]) for chunk in chunks]
            sizes = await asyncio.gather(*map(asyncio.wrap_future, futures))

    assert b"".join(data for [data] in written) == DATA
    assert sizes == [LAYOUT.length_bytes(chunk) for chunk in chunks]
    assert sorted(uploaded) == sorted((VERSION, size, b"node-1") for size in sizes)


async def test_one_connection_serves_many_chunks_and_rests_between(path: Path) -> None:
    async with serving(lambda _: Source(path, LAYOUT), uploads_max=1) as peer:
        with fetching(threads=1) as fetcher:
            await asyncio.wrap_future(fetch(fetcher, peer, 0))
            before = open_descriptors()
            for chunk in (1, 2, 3):
                await asyncio.wrap_future(fetch(fetcher, peer, chunk))

            # The thread that has sent the last chunk may be about to close its source.
            wait_until(lambda: len(open_descriptors()) <= len(before), 5.0, "no more descriptors")


async def test_no_descriptor_is_left_behind(path: Path) -> None:
    before = open_descriptors()
    for _ in range(2):
        async with serving(lambda _: Source(path, LAYOUT)) as peer:
            with fetching() as fetcher, pytest.raises(PeerUnavailable):
                await asyncio.gather(
                    *(asyncio.wrap_future(fetch(fetcher, peer, chunk)) for chunk in range(6))
                )
                await asyncio.wrap_future(fetch(fetcher, ("127.0.0.1", 1)))

    assert open_descriptors() == before


def open_descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


async def test_what_write_raises_is_what_the_future_fails_with(path: Path) -> None:
    def write(data: memoryview) -> None:
        raise NoSpace("the disk is full")

    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        with fetching() as fetcher:
            digest = blake3(chunk_bytes(0)).digest()
            future = fetcher.fetch(
                peer, ChunkRequest(VERSION, 0, 0), CHUNK_BYTES, digest, write, 10, 5
            )
            with pytest.raises(NoSpace):
                await asyncio.wrap_future(future)

            assert await asyncio.wrap_future(fetch(fetcher, peer)) == CHUNK_BYTES


async def test_a_chunk_that_nobody_has_is_absent(path: Path) -> None:
    async with serving(lambda _: None) as peer:
        with fetching() as fetcher, pytest.raises(ChunkAbsent):
            await asyncio.wrap_future(fetch(fetcher, peer))


async def test_a_source_that_cannot_be_opened_makes_the_peer_unavailable(tmp_path: Path) -> None:
    async with serving(lambda _: Source(tmp_path / "gone", LAYOUT)) as peer:
        with fetching() as fetcher, pytest.raises(PeerUnavailable, match="cannot read"):
            await asyncio.wrap_future(fetch(fetcher, peer))


async def test_a_cached_copy_that_became_shorter_ends_the_connection(path: Path) -> None:
    os.truncate(path, CHUNK_BYTES + 1)
    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        with fetching() as fetcher, pytest.raises(PeerUnavailable, match="closed"):
            await asyncio.wrap_future(fetch(fetcher, peer, 1))


async def test_chunks_for_which_there_is_no_thread_wait_for_another_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    chunks = range(LAYOUT.chunk_count)
    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        with fetching() as fetcher:
            await asyncio.wrap_future(fetch(fetcher, peer))  # now each side has one thread
            with monkeypatch.context() as scarce:
                scarce.setattr(threading.Thread, "start", refuse)
                futures = [fetch(fetcher, peer, chunk) for chunk in chunks]
                sizes = await asyncio.gather(*map(asyncio.wrap_future, futures))

    assert sum(sizes) == SIZE_BYTES


async def test_a_server_without_a_thread_loses_neither_upload_slots_nor_connections(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread, start: Any = threading.Thread.start) -> None:
        if thread.name.startswith("upload"):
            raise RuntimeError("can't start new thread")
        start(thread)

    async with serving(lambda _: Source(path, LAYOUT), uploads_max=1) as peer:
        with fetching() as fetcher:
            with monkeypatch.context() as scarce:
                scarce.setattr(threading.Thread, "start", refuse)
                for _ in range(3):
                    with pytest.raises(PeerBusy):
                        await asyncio.wrap_future(fetch(fetcher, peer))
            assert await asyncio.wrap_future(fetch(fetcher, peer)) == CHUNK_BYTES


async def test_a_copy_that_the_disk_cannot_read_is_named_in_the_log_and_to_the_daemon(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    unreadable: list[bytes] = []
    async with serving(lambda _: Source(path, LAYOUT), unreadable=unreadable) as peer:
        with fetching() as fetcher, monkeypatch.context() as rotten:
            rotten.setattr(os, "sendfile", fail)
            with pytest.raises(PeerUnavailable):
                await asyncio.wrap_future(fetch(fetcher, peer))

    assert [f"{VERSION.hex()}: " in record.message for record in caplog.records] == [True]
    assert "Input/output error" in caplog.text
    assert unreadable == [VERSION]


@pytest.mark.slow
@pytest.mark.parametrize("limited", ["upload", "download"])
async def test_a_rate_limit_holds_for_all_transfers_together(path: Path, limited: str) -> None:
    rate = 4e6
    upload = rate if limited == "upload" else None
    async with serving(lambda _: Source(path, LAYOUT), rate=upload) as peer:
        with fetching(rate=rate if limited == "download" else None) as fetcher:
            before_s = time.monotonic()
            await asyncio.gather(
                *(asyncio.wrap_future(fetch(fetcher, peer, chunk)) for chunk in range(6))
            )
            elapsed_s = time.monotonic() - before_s

    # The first tenth of a second's worth of each transfer may go at once.
    assert 0.5 * SIZE_BYTES / rate < elapsed_s < 3 * SIZE_BYTES / rate


@pytest.mark.slow
async def test_to_wait_for_our_own_rate_limit_takes_nothing_of_a_peers_time(path: Path) -> None:
    async with serving(lambda _: Source(path, LAYOUT), uploads_max=6) as peer:
        with fetching(threads=6, rate=SIZE_BYTES / 3) as fetcher:
            futures = [fetch(fetcher, peer, chunk, deadline_s=1.5) for chunk in range(6)]
            sizes = await asyncio.gather(*map(asyncio.wrap_future, futures))

    assert sum(sizes) == SIZE_BYTES


# --- who may talk to the server ------------------------------------------------------------------


def talk(
    peer: tuple[str, int], key: Keyring = KEY, purpose: Purpose = "data"
) -> tuple[socket.socket, SessionKeys]:
    """Connect and shake hands as a client of our own."""
    sock = socket.create_connection(peer, timeout=5)
    initiator = Initiator(key, purpose, os.urandom(32), b"test")
    try:
        sock.sendall(initiator.first())
        proof = initiator.handle(read_exactly(sock, CHALLENGE_BYTES))
        assert proof is not None
        sock.sendall(proof)
    except BaseException:
        sock.close()
        raise
    return sock, initiator.session_keys()


def read_exactly(sock: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        piece = sock.recv(size_bytes - len(data))
        if not piece:
            raise ConnectionResetError(f"closed after {len(data)} bytes")
        data += piece
    return data


def request(keys: SessionKeys, chunk: int = 0, held_chunks: int = 9) -> bytes:
    return keys.seal(b"\x01" + VERSION + chunk.to_bytes(4, "big") + held_chunks.to_bytes(4, "big"))


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side closes the connection without another byte."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


async def test_peers_with_different_secrets_get_nothing_from_one_another(path: Path) -> None:
    uploaded: list[tuple[bytes, int, bytes]] = []
    async with serving(lambda _: Source(path, LAYOUT), uploaded=uploaded) as peer:
        another = Keyring([ClusterKey.from_secret(b"another")])
        with fetching(another) as fetcher, pytest.raises(PeerUnavailable, match="secret"):
            await asyncio.wrap_future(fetch(fetcher, peer))

    assert uploaded == []


async def test_a_changed_secret_costs_no_chunk_and_a_withdrawn_one_gets_none(path: Path) -> None:
    old, new = ClusterKey.from_secret(b"old"), ClusterKey.from_secret(b"new")
    serves, fetches = Keyring([old]), Keyring([old])
    async with serving(lambda _: Source(path, LAYOUT), keyring=serves) as peer:
        with fetching(fetches) as fetcher, fetching(Keyring([old])) as thief:
            for keyring, keys in (
                (serves, [old]),
                (serves, [old, new]),
                (fetches, [old, new]),
                (serves, [new, old]),
                (fetches, [new, old]),
                (serves, [new]),
                (fetches, [new]),
            ):
                await asyncio.wrap_future(fetch(thief, peer))
                keyring.replace(keys)
                await asyncio.wrap_future(fetch(fetcher, peer))
                if keyring.accepted == (new,):
                    break
            with pytest.raises(PeerUnavailable, match="secret"):
                await asyncio.wrap_future(fetch(thief, peer))
            await asyncio.wrap_future(fetch(fetcher, peer))
            fetches.replace([new])
            await asyncio.wrap_future(fetch(fetcher, peer))


async def test_the_server_refuses_a_client_that_cannot_prove_itself(path: Path) -> None:
    def impostor(peer: tuple[str, int]) -> bool:
        with socket.create_connection(peer, timeout=5) as sock:
            hello = Initiator(KEY, "data", os.urandom(32)).first()
            sock.sendall(hello)
            read_exactly(sock, CHALLENGE_BYTES)
            sock.sendall(b"swarmc02\x03" + bytes(32))
            return is_closed(sock)

    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        assert await asyncio.to_thread(impostor, peer)


async def test_the_server_refuses_a_connection_for_another_purpose(path: Path) -> None:
    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        with pytest.raises(ConnectionResetError, match="after 0 bytes"):
            await asyncio.to_thread(talk, peer, KEY, "peer")


@pytest.mark.parametrize("attack", ["changed", "replayed"])
async def test_a_request_that_is_not_genuine_ends_the_connection(path: Path, attack: str) -> None:
    def attacked(peer: tuple[str, int]) -> bool:
        sock, keys = talk(peer)
        with sock:
            genuine = request(keys)
            sock.sendall(genuine)
            read_exactly(sock, RESPONSE_BYTES + CHUNK_BYTES)
            sock.sendall(genuine if attack == "replayed" else request(keys)[:-1] + b"\x01")
            return is_closed(sock)

    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        assert await asyncio.to_thread(attacked, peer)


async def test_requests_may_come_in_pieces_and_several_at_once(path: Path) -> None:
    def in_pieces(peer: tuple[str, int]) -> list[bytes]:
        sock, keys = talk(peer)
        with sock:
            stream = b"".join(request(keys, chunk) for chunk in range(3))
            sock.sendall(stream[:10])
            sock.sendall(stream[10:])
            answers = []
            for _ in range(3):
                assert keys.open(read_exactly(sock, RESPONSE_BYTES))[0] == OK
                answers.append(read_exactly(sock, CHUNK_BYTES))
            return answers

    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        assert await asyncio.to_thread(in_pieces, peer) == [chunk_bytes(i) for i in range(3)]


async def test_silent_strangers_do_not_block_uploads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "STRANGERS_MAX", 8)
    monkeypatch.setattr(chunk_server, "HANDSHAKE_S", 3600)
    async with serving(lambda _: Source(path, LAYOUT), uploads_max=1) as peer:
        strangers = [socket.create_connection(peer, timeout=5) for _ in range(12)]
        for stranger in strangers[-4:]:
            stranger.sendall(b"swarm")
        with fetching() as fetcher:
            await asyncio.wrap_future(fetch(fetcher, peer))

        assert await asyncio.to_thread(is_closed, strangers[0])  # it made room
        for stranger in strangers:
            stranger.close()


async def test_a_handshake_that_takes_too_long_is_cut(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "HANDSHAKE_S", 0.05)
    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        with socket.create_connection(peer, timeout=5) as stranger:
            assert await asyncio.to_thread(is_closed, stranger)


async def test_idle_connections_are_closed_in_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "IDLE_SERVER_S", 0.05)
    async with serving(lambda _: Source(path, LAYOUT)) as peer:
        sock, _ = await asyncio.to_thread(talk, peer)
        with sock:
            assert await asyncio.to_thread(is_closed, sock)


async def test_a_connection_that_is_served_for_long_is_not_taken_for_an_idle_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "IDLE_SERVER_S", 0.05)
    loop = asyncio.get_running_loop()
    go_on = threading.Event()

    def held_back() -> None:
        loop.call_soon_threadsafe(loop.call_later, 0.1, go_on.set)
        go_on.wait(60)

    async with serving(lambda _: Source(path, LAYOUT, held_back)) as peer:
        with fetching() as fetcher:
            assert await asyncio.wrap_future(fetch(fetcher, peer)) == CHUNK_BYTES


# --- a server that has its hands full ------------------------------------------------------------


async def test_a_server_with_a_full_queue_says_busy(path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held_back() -> None:
        begun.set()
        go_on.wait(60)

    async with serving(lambda _: Source(path, LAYOUT, held_back), uploads_max=1) as peer:
        with fetching(threads=5) as crowd, fetching(threads=1) as fetcher:
            # The slot is the crowd's before we ask: else a request of ours could have it.
            waiting = [asyncio.wrap_future(fetch(crowd, peer, deadline_s=60, stall_s=60))]
            assert await asyncio.to_thread(begun.wait, 60)
            for _ in range(4):
                another = fetch(crowd, peer, deadline_s=60, stall_s=60)
                waiting.append(asyncio.wrap_future(another))
            refused = None
            # The requests of the crowd arrive in their own time; ours is refused after them.
            while refused is None:
                probe = asyncio.wrap_future(fetch(fetcher, peer, deadline_s=0.1, stall_s=0.1))
                error = (await asyncio.gather(probe, return_exceptions=True))[0]
                refused = error if isinstance(error, PeerBusy) else None
            go_on.set()
            results = await asyncio.gather(*waiting, return_exceptions=True)

            assert CHUNK_BYTES in results
            # The place is kept for its receiver a moment longer.
            ours: object = None
            while ours != CHUNK_BYTES:
                again = asyncio.wrap_future(fetch(fetcher, peer))
                [ours] = await asyncio.gather(again, return_exceptions=True)
                assert ours == CHUNK_BYTES or isinstance(ours, PeerBusy)


async def test_with_a_low_rate_limit_so_few_are_served_at_once_that_they_are_in_time(
    path: Path,
) -> None:
    go_on = threading.Event()

    def held_back() -> None:
        go_on.wait(60)

    rate = 2.5 * DEADLINE_RATE_BYTES_PER_S
    async with serving(lambda _: Source(path, LAYOUT, held_back), rate=rate) as peer:
        with fetching(threads=4) as crowd:
            asked = [asyncio.wrap_future(fetch(crowd, peer, held_chunks=1)) for _ in range(4)]
            done, served = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 2:
                more, served = await asyncio.wait(served, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            go_on.set()

            assert [type(each.exception()) for each in done] == [PeerBusy, PeerBusy]
            assert await asyncio.gather(*served) == [CHUNK_BYTES, CHUNK_BYTES]


async def test_who_asks_again_at_once_keeps_its_place_and_no_source_stays_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "NEXT_REQUEST_MS", 60_000)
    places: list[object] = []
    serve = ChunkServer._serve

    def counted_serve(self: ChunkServer, *arguments: Any) -> bool:
        places.append(arguments)
        return serve(self, *arguments)

    monkeypatch.setattr(ChunkServer, "_serve", counted_serve)
    still_open: set[Source] = set()

    class CountedSource(Source):
        def close(self) -> None:
            still_open.remove(self)
            super().close()

    def open_source(version_id: bytes) -> Source:
        assert not still_open
        source = CountedSource(path, LAYOUT)
        still_open.add(source)
        return source

    async with serving(open_source) as peer:
        with fetching(threads=1) as fetcher:
            for chunk in range(LAYOUT.chunk_count):
                await asyncio.wrap_future(fetch(fetcher, peer, chunk))

    assert len(places) == 1
    assert not still_open


async def test_the_place_of_a_peer_that_pauses_goes_to_whoever_finds_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "NEXT_REQUEST_MS", 60_000)
    async with serving(lambda _: Source(path, LAYOUT), uploads_max=1) as peer:
        with fetching(threads=1) as one, fetching(threads=1) as other:
            await asyncio.wrap_future(fetch(one, peer))
            for fetcher in (other, one, other):
                # Its own chunk may not have been counted as sent when the other one asks.
                result: object = None
                while result != CHUNK_BYTES:
                    future = asyncio.wrap_future(fetch(fetcher, peer, held_chunks=1))
                    [result] = await asyncio.gather(future, return_exceptions=True)
                    assert result == CHUNK_BYTES or isinstance(result, PeerBusy)


async def test_a_receiver_that_takes_nothing_loses_its_upload_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_server, "SEND_STALL_S", 0.05)
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, CHUNK_SIZE_MAX_BYTES)
    layout = ChunkLayout(CHUNK_SIZE_MAX_BYTES, CHUNK_SIZE_MAX_BYTES)
    digest = blake3(bytes(CHUNK_SIZE_MAX_BYTES)).digest()
    async with serving(lambda _: Source(big, layout), uploads_max=1) as peer:
        sock, keys = await asyncio.to_thread(talk, peer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        with sock, fetching() as fetcher:
            sock.sendall(request(keys))
            await asyncio.to_thread(read_exactly, sock, RESPONSE_BYTES)
            # It waits for the slot, since its node lags behind.
            ours = ChunkRequest(VERSION, 0, held_chunks=0)
            future = fetcher.fetch(peer, ours, CHUNK_SIZE_MAX_BYTES, digest, lambda _: None, 10, 5)

            assert await asyncio.wrap_future(future) == CHUNK_SIZE_MAX_BYTES


async def test_stopping_the_server_cuts_uploads(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, CHUNK_SIZE_MAX_BYTES)
    layout = ChunkLayout(CHUNK_SIZE_MAX_BYTES, CHUNK_SIZE_MAX_BYTES)
    async with serving(lambda _: Source(big, layout), uploads_max=1) as peer:
        sock, keys = await asyncio.to_thread(talk, peer)
        sock.sendall(request(keys))
        await asyncio.to_thread(read_exactly, sock, RESPONSE_BYTES)
        before_s = time.monotonic()
    sock.close()

    assert time.monotonic() - before_s < chunk_server.SEND_STALL_S / 2


# --- a fetcher among liars -----------------------------------------------------------------------

Answer = Callable[[socket.socket, SessionKeys, int], None]


@contextmanager
def lying_server(*answers: Answer, key: Keyring = KEY) -> Iterator[tuple[str, int]]:
    """A server that speaks the protocol; each connection gets its answers, then is closed."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(5)
            acceptor = Acceptor(key, "data", os.urandom(32), b"liar")
            while not acceptor.done:
                reply = acceptor.handle(read_exactly(sock, acceptor.wanted_bytes))
                sock.sendall(reply or b"")
            keys = acceptor.session_keys()
            for answer in answers:
                payload = keys.open(read_exactly(sock, REQUEST_BYTES))
                answer(sock, keys, int.from_bytes(payload[-8:-4], "big"))
                if answer is stall:
                    done.wait(10)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=quiet, args=(sock,)))
            threads[-1].start()

    def quiet(sock: socket.socket) -> None:
        try:
            serve(sock)
        except (OSError, SwarmcacheError):
            return

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield listener.getsockname()[:2]
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join()


def header(keys: SessionKeys, status: int, length: int) -> bytes:
    return keys.seal(bytes([status]) + length.to_bytes(4, "big"))


def honest(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    data = chunk_bytes(chunk)
    sock.sendall(header(keys, OK, len(data)) + data)


def flip_a_bit(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    data = bytearray(chunk_bytes(chunk))
    data[len(data) // 2] ^= 1
    sock.sendall(header(keys, OK, len(data)) + data)


def send_another_chunk(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    honest(sock, keys, chunk + 1)


def say_shorter(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, OK, CHUNK_BYTES - 1) + chunk_bytes(chunk)[:-1])


def say_huge(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, OK, 0xFFFFFFFF) + chunk_bytes(chunk))


def stall(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, OK, CHUNK_BYTES) + chunk_bytes(chunk)[:1000])


def close_in_the_middle(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, OK, CHUNK_BYTES) + chunk_bytes(chunk)[:1000])
    sock.shutdown(socket.SHUT_RDWR)


def say_nothing(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.shutdown(socket.SHUT_RDWR)


def forge_the_header(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(bytes(RESPONSE_BYTES) + chunk_bytes(chunk))


def say_busy(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, BUSY, 0))


def say_absent(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, ABSENT, 0))


def say_error(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
    sock.sendall(header(keys, ERROR, 0))


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        (flip_a_bit, ChunkCorrupt),
        (send_another_chunk, ChunkCorrupt),
        (say_shorter, ChunkCorrupt),
        (say_huge, ChunkCorrupt),
        (stall, PeerUnavailable),
        (close_in_the_middle, PeerUnavailable),
        (say_nothing, PeerUnavailable),
        (forge_the_header, PeerUnavailable),
        (say_busy, PeerBusy),
        (say_absent, ChunkAbsent),
        (say_error, PeerUnavailable),
    ],
)
def test_a_lie_is_named_and_nothing_is_written(
    lie: Answer, expected: type[SwarmcacheError]
) -> None:
    written: list[bytes] = []
    with lying_server(lie) as peer, fetching() as fetcher:
        error = fetch(fetcher, peer, into=written, stall_s=0.1).exception(10)

    assert type(error) is expected
    assert written == []


@pytest.mark.parametrize("answer", [say_busy, say_absent, say_error])
def test_a_refusal_leaves_the_connection_usable(answer: Answer) -> None:
    with lying_server(answer, honest) as peer, fetching() as fetcher:
        assert fetch(fetcher, peer).exception(10) is not None
        before = open_descriptors()

        assert fetch(fetcher, peer).result(10) == CHUNK_BYTES
        assert len(open_descriptors()) <= len(before)


def test_a_peer_that_closed_an_idle_connection_is_asked_on_a_new_one() -> None:
    with lying_server(honest) as peer, fetching(threads=1) as fetcher:
        for chunk in range(3):
            assert fetch(fetcher, peer, chunk).result(10) == CHUNK_BYTES


def test_a_peer_that_drips_is_left_at_the_deadline() -> None:
    def drip(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
        sock.sendall(header(keys, OK, CHUNK_BYTES))
        for _ in range(200):
            sock.sendall(b"x")
            pace.wait(0.01)

    pace = threading.Event()
    with lying_server(drip) as peer, fetching() as fetcher:
        error = fetch(fetcher, peer, deadline_s=0.1, stall_s=5).exception(1)

    assert isinstance(error, PeerUnavailable)
    assert "not finished within 0.1 s" in str(error)


def test_a_peer_that_never_shakes_hands_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, fetching() as fetcher:
        error = fetch(fetcher, silent.getsockname(), stall_s=0.1).exception(2)

    assert isinstance(error, PeerUnavailable)
    assert "no byte for 0.1 s" in str(error)


def test_a_peer_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        peer = closed.getsockname()
    with fetching() as fetcher:
        assert isinstance(fetch(fetcher, peer).exception(5), PeerUnavailable)


def test_a_peer_whose_name_cannot_be_one_is_unavailable() -> None:
    with fetching() as fetcher, pytest.raises(PeerUnavailable, match=r"a\.\.b:1: "):
        fetch(fetcher, ("a..b", 1)).result(10)


def test_a_peer_is_found_by_its_name() -> None:
    with lying_server(honest) as (_, port), fetching() as fetcher:
        assert fetch(fetcher, ("localhost", port)).result(10) == CHUNK_BYTES


def test_a_name_service_that_hangs_keeps_no_thread_for_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hanging = threading.Event()

    def getaddrinfo(host: str, *args: Any, _found: Any = socket.getaddrinfo) -> Any:
        if host == "node1":
            assert hanging.wait(30)
        return _found(host, *args)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with lying_server(honest) as peer, fetching(threads=1) as fetcher:
        late = [fetch(fetcher, ("node1", 1), stall_s=0.1) for _ in range(2)]
        answered = fetch(fetcher, peer).result(10)
        hanging.set()

    assert answered == CHUNK_BYTES
    for each in late:
        with pytest.raises(PeerUnavailable, match=r"node1:1: its name was not found in time"):
            each.result(0)


def test_forgetting_a_peer_closes_its_idle_connections() -> None:
    with fetching() as fetcher, lying_server(honest, honest) as peer:
        fetch(fetcher, peer).result(10)
        before = open_descriptors()

        fetcher.forget(peer)

        assert len(open_descriptors()) < len(before)


def test_closing_the_fetcher_cuts_what_is_in_progress() -> None:
    started = threading.Event()

    def start_and_stall(sock: socket.socket, keys: SessionKeys, chunk: int) -> None:
        stall(sock, keys, chunk)
        started.set()
        is_closed(sock)

    with lying_server(start_and_stall) as peer:
        fetcher = ChunkFetcher(KEY, b"", threads=1, buffers_bytes_max=CHUNK_SIZE_MAX_BYTES)
        running = fetch(fetcher, peer, stall_s=5)
        waiting = fetch(fetcher, peer)
        assert started.wait(5)
        before_s = time.monotonic()

        fetcher.close()

        assert time.monotonic() - before_s < 2
        assert isinstance(running.exception(1), PeerUnavailable)
        assert waiting.cancelled()


# --- buffers -------------------------------------------------------------------------------------


def test_buffers_stay_within_their_budget() -> None:
    pool = BufferPool(CHUNK_SIZE_MAX_BYTES)
    peaks: list[int] = []

    def borrow(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            size_bytes = rng.randrange(1, CHUNK_SIZE_MAX_BYTES)
            with pool.lend(size_bytes) as view:
                assert len(view) == size_bytes
                view[-1] = 1
                peaks.append(pool.mapped_bytes)

    threads = [threading.Thread(target=borrow, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(peaks) == 200
    assert max(peaks) <= CHUNK_SIZE_MAX_BYTES


def test_buffers_that_the_system_refuses_take_nothing_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    pool = BufferPool(CHUNK_SIZE_MAX_BYTES)
    with monkeypatch.context() as scarce:
        scarce.setattr(mmap, "mmap", refuse)
        with pytest.raises(OSError, match="Cannot allocate memory"), pool.lend(1):
            pass

    assert pool.mapped_bytes == 0


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool(CHUNK_SIZE_MAX_BYTES)

    for _ in range(100):
        with pool.lend(1 << 20):
            pass

    assert pool.mapped_bytes == 1 << 20


def test_a_rate_limit_lets_small_pieces_pass_at_an_even_pace() -> None:
    assert RateLimit(None).piece_bytes(1 << 24) == 1 << 24
    assert RateLimit(1e6).piece_bytes(1 << 24) == 100_000
    assert RateLimit(10.0).piece_bytes(1 << 24) == RATE_PIECE_MIN_BYTES


# --- small files together ------------------------------------------------------------------------

SMALL = [
    SmallFile(b"%032d" % number, blake3(data).digest(), data)
    for number, data in enumerate([b"one", b"two" * 5000, b"three" * 50_000])
]


def sizes_of(files: Sequence[SmallFile]) -> list[tuple[bytes, int]]:
    return [(file.version_id, len(file.data)) for file in files]


async def fetch_together(
    fetcher: ChunkFetcher, peer: tuple[str, int], files: Sequence[tuple[bytes, int]]
) -> list[SmallFile]:
    """What came; the bytes are copied."""
    came: list[SmallFile] = []

    def take(files: list[SmallFile]) -> None:
        came.extend(SmallFile(file.version_id, file.digest, bytes(file.data)) for file in files)

    await asyncio.to_thread(fetcher.fetch_files, peer, files, take, 10.0, 5.0)
    return came


async def test_small_files_come_together_and_what_is_not_there_is_left_out(path: Path) -> None:
    uploaded: list[tuple[bytes, int, bytes]] = []
    asked: list[list[bytes]] = []

    def read_files(version_ids: Sequence[bytes]) -> list[SmallFile]:
        asked.append(list(version_ids))
        return [SMALL[2], SMALL[0]]

    async with serving(
        lambda _: Source(path, LAYOUT), read_files=read_files, uploaded=uploaded
    ) as peer:
        with fetching() as fetcher:
            assert await fetch_together(fetcher, peer, sizes_of(SMALL)) == [SMALL[0], SMALL[2]]
            # The connection is good for whatever comes next.
            await asyncio.wrap_future(fetch(fetcher, peer, 0))
            assert await fetch_together(fetcher, peer, sizes_of(SMALL)) == [SMALL[0], SMALL[2]]
    assert asked == [[file.version_id for file in SMALL]] * 2
    sizes = [size_bytes for _, size_bytes, _ in uploaded]
    assert sizes == [250_003, len(chunk_bytes(0)), 250_003]


@pytest.mark.parametrize("wrong", [b"ONE", b"one more byte", b""])
async def test_of_small_files_with_wrong_bytes_among_them_none_is_taken(wrong: bytes) -> None:
    sent = [SmallFile(SMALL[0].version_id, SMALL[0].digest, wrong), SMALL[1]]
    came: list[SmallFile] = []
    async with serving(lambda _: None, read_files=lambda _: sent) as peer:
        with fetching() as fetcher, pytest.raises(FileCorrupt) as raised:
            came = await fetch_together(fetcher, peer, sizes_of(SMALL[:2]))
    assert raised.value.version_id == SMALL[0].version_id
    assert came == []


async def test_a_holder_that_cannot_read_or_is_gone_is_unavailable() -> None:
    def read_files(_: Sequence[bytes]) -> list[SmallFile]:
        raise OSError(5, "Input/output error")

    with fetching() as fetcher:
        async with serving(lambda _: None, read_files=read_files) as peer:
            with pytest.raises(PeerUnavailable):
                await fetch_together(fetcher, peer, sizes_of(SMALL))
        with pytest.raises(PeerUnavailable):
            await fetch_together(fetcher, peer, sizes_of(SMALL))
