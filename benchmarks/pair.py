"""How fast do two daemons' data planes move a file, beside the barest loop that does the same?

A file moves from one process to another over loopback, tmpfs to tmpfs, digested on arrival, in two
ways that take turns in one run:

* bare: one thread on each side, blocking ``sendfile`` -> ``recv_into`` -> BLAKE3 -> ``pwrite``,
  without requests, chunks, proofs or checks;
* ours: ``ChunkServer`` and ``ChunkFetcher``, chunk by chunk, several requests in flight.

Both write over the same pages, so that what is measured is the moving and not the kernel handing
out fresh memory. The figure is the ratio of the medians; the target is 0.80.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from blake3 import blake3

from benchmarks.report import Figure, Options, Spread
from swarmcache.auth import ClusterKey, Keyring
from swarmcache.chunk_fetcher import ChunkFetcher
from swarmcache.chunk_protocol import ChunkRequest
from swarmcache.chunk_server import ChunkServer
from swarmcache.chunks import ChunkLayout

TMPFS = Path("/dev/shm")
CHUNK_SIZE_BYTES = 2 * 1024 * 1024  # what a file of 1 GiB is cut into
BARE_PIECE_BYTES = 1024 * 1024
VERSION_ID = bytes(32)
PAIRS = 5
RATIO_MIN = 0.80
THREADS = 2
BARE = "the bare loop"
KEY = Keyring([ClusterKey.from_secret(None)])
GIB = 1 << 30


class WholeFile:
    """A complete file, as ``ChunkServer`` wants it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.layout = ChunkLayout(os.fstat(self.fd).st_size, CHUNK_SIZE_BYTES)

    def has(self, chunk: int) -> bool:
        return chunk < self.layout.chunk_count

    def close(self) -> None:
        os.close(self.fd)


def measure(options: Options) -> list[Figure]:
    """Throughput, and CPU seconds per GiB of each end, both ways."""
    size_bytes = 16 << 20 if options.quick else GIB
    rounds = _rounds(size_bytes, options.choose_runs(PAIRS))
    spreads = {
        way: {
            figure: Spread.of([figures[figure] for figures in figures_of_rounds])
            for figure in figures_of_rounds[0]
        }
        for way, figures_of_rounds in rounds.items()
    }
    ours, bare = spreads["ours"], spreads["bare"]
    rate = "gb_per_s"
    met = ours[rate].median >= RATIO_MIN * bare[rate].median
    target = f"ratio >= {RATIO_MIN:.2f}"
    with_target = Figure("pair: throughput", ours[rate], "GB/s", BARE, bare[rate], target, met)
    others = [
        Figure(f"pair: CPU of the {end}", ours[figure], "s per GiB", BARE, bare[figure])
        for end, figure in (("server", "serve_cpu_s_per_gib"), ("fetcher", "fetch_cpu_s_per_gib"))
    ]
    return [with_target, *others]


def _rounds(size_bytes: int, pairs: int) -> dict[str, list[dict[str, float]]]:
    """The figures of each round, bare and ours, which take turns."""
    rounds: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory(dir=TMPFS, prefix="swarmcache-pair-") as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        digests = _make_source(source, size_bytes)
        target.write_bytes(bytes(size_bytes))
        for _ in range(pairs):
            for name, server, fetch in (
                ("bare", _serve_bare, _fetch_bare),
                ("ours", _serve_ours, _fetch_ours),
            ):
                rounds[name].append(_one_round(server, fetch, source, target, digests))
    return rounds


def _make_source(path: Path, size_bytes: int) -> list[bytes]:
    """Write random bytes; returns the digests of the chunks."""
    digests = []
    with path.open("wb") as file:
        for offset in range(0, size_bytes, CHUNK_SIZE_BYTES):
            chunk = os.urandom(min(CHUNK_SIZE_BYTES, size_bytes - offset))
            file.write(chunk)
            digests.append(blake3(chunk).digest())
    return digests


Fetch = Callable[[int, Path, list[bytes]], None]


def _one_round(
    server: Callable[[Path, Connection], None],
    fetch: Fetch,
    source: Path,
    target: Path,
    digests: list[bytes],
) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=server, args=(source, theirs))
    process.start()
    port = ours.recv()
    cpu_before_s, before_s = time.process_time(), time.perf_counter()
    fetch(port, target, digests)
    elapsed_s = time.perf_counter() - before_s
    cpu_fetch_s = time.process_time() - cpu_before_s
    ours.send("stop")
    cpu_serve_s = ours.recv()
    process.join()
    size_bytes = source.stat().st_size
    return {
        "gb_per_s": size_bytes / 1e9 / elapsed_s,
        "serve_cpu_s_per_gib": cpu_serve_s * GIB / size_bytes,
        "fetch_cpu_s_per_gib": cpu_fetch_s * GIB / size_bytes,
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- bare ----------------------------------------------------------------------------------------


def _serve_bare(source: Path, pipe: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, source.open("rb") as file:
        pipe.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        before_s = _cpu_s()
        size_bytes = os.fstat(file.fileno()).st_size
        offset = 0
        with connection:
            while offset < size_bytes:
                offset += os.sendfile(
                    connection.fileno(), file.fileno(), offset, size_bytes - offset
                )
    pipe.recv()
    pipe.send(_cpu_s() - before_s)


def _fetch_bare(port: int, target: Path, digests: list[bytes]) -> None:
    buffer = memoryview(bytearray(BARE_PIECE_BYTES))
    hasher = blake3()
    offset = 0
    with socket.create_connection(("127.0.0.1", port)) as sock, target.open("r+b") as file:
        while size_bytes := sock.recv_into(buffer):
            hasher.update(buffer[:size_bytes])
            os.pwrite(file.fileno(), buffer[:size_bytes], offset)
            offset += size_bytes
    hasher.digest()


# --- ours ----------------------------------------------------------------------------------------


def _serve_ours(source: Path, pipe: Connection) -> None:
    asyncio.run(_serve_until_told(source, pipe))


async def _serve_until_told(source: Path, pipe: Connection) -> None:
    server = ChunkServer(
        KEY,
        lambda _: WholeFile(source),
        read_files=lambda version_ids: [],
        uploads_max=16,
        upload_rate_max_bytes_per_s=None,
        on_uploaded=lambda version_id, size_bytes, peer: None,
        on_unreadable=lambda _: None,
    )
    pipe.send(await server.start("127.0.0.1", 0))
    before_s = _cpu_s()
    await asyncio.to_thread(pipe.recv)
    pipe.send(_cpu_s() - before_s)
    await server.stop()


def _fetch_ours(port: int, target: Path, digests: list[bytes]) -> None:
    fetcher = ChunkFetcher(KEY, b"bench", threads=THREADS, buffers_bytes_max=64 * 1024 * 1024)
    with target.open("r+b") as file:
        layout = ChunkLayout(os.fstat(file.fileno()).st_size, CHUNK_SIZE_BYTES)

        def writer(chunk: int) -> Callable[[memoryview], None]:
            def write(data: memoryview) -> None:
                os.pwrite(file.fileno(), data, layout.offset_bytes(chunk))

            return write

        futures = [
            fetcher.fetch(
                ("127.0.0.1", port),
                ChunkRequest(VERSION_ID, chunk, held_chunks=0),
                layout.length_bytes(chunk),
                digest,
                writer(chunk),
                deadline_s=30,
                stall_s=10,
            )
            for chunk, digest in enumerate(digests)
        ]
        for future in futures:
            future.result()
    fetcher.close()
