"""How fast do two daemons' data planes move a file, beside the barest loop that does the same?

``python -m benchmarks.pair`` moves a file from one process to another over loopback, tmpfs to
tmpfs, digested on arrival, in two ways that take turns in one run:

* bare: one thread on each side, blocking ``sendfile`` -> ``recv_into`` -> BLAKE3 -> ``pwrite``,
  without requests, chunks, proofs or checks;
* ours: ``ChunkServer`` and ``ChunkFetcher``, chunk by chunk, several requests in flight.

Both write over the same pages, so that what is measured is the moving and not the kernel handing
out fresh memory. The figure is the ratio of the medians; the target is 0.80.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from blake3 import blake3

from swarmcache.auth import ClusterKey
from swarmcache.chunks import ChunkLayout
from swarmcache.transfer import ChunkFetcher, ChunkServer

TMPFS = Path("/dev/shm")
CHUNK_SIZE_BYTES = 2 * 1024 * 1024  # what a file of 1 GiB is cut into
BARE_PIECE_BYTES = 1024 * 1024
VERSION_ID = bytes(32)
KEY = ClusterKey.from_secret(None)
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


def measure(size_bytes: int = GIB, pairs: int = 5, threads: int = 2) -> dict[str, Any]:
    """Move a file both ways in turns; GB/s, CPU seconds per GiB of each end, and the ratio."""
    with tempfile.TemporaryDirectory(dir=TMPFS, prefix="swarmcache-pair-") as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        digests = _make_source(source, size_bytes)
        target.write_bytes(bytes(size_bytes))
        rounds: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
        for _ in range(pairs):
            for name, server, fetch in (
                ("bare", _serve_bare, _fetch_bare),
                ("ours", _serve_ours, _fetch_ours),
            ):
                figures = _one_round(server, fetch, source, target, digests, threads)
                rounds[name].append(figures)
    result: dict[str, Any] = {"size_bytes": size_bytes, "pairs": pairs, "threads": threads}
    for name, figures_of_rounds in rounds.items():
        result[name] = {
            figure: _spread([figures[figure] for figures in figures_of_rounds])
            for figure in figures_of_rounds[0]
        }
    result["ratio"] = result["ours"]["gb_per_s"]["median"] / result["bare"]["gb_per_s"]["median"]
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _make_source(path: Path, size_bytes: int) -> list[bytes]:
    """Write random bytes; returns the digests of the chunks."""
    digests = []
    with path.open("wb") as file:
        for offset in range(0, size_bytes, CHUNK_SIZE_BYTES):
            chunk = os.urandom(min(CHUNK_SIZE_BYTES, size_bytes - offset))
            file.write(chunk)
            digests.append(blake3(chunk).digest())
    return digests


Fetch = Callable[[int, Path, list[bytes], int], None]


def _one_round(
    server: Callable[[Path, Connection], None],
    fetch: Fetch,
    source: Path,
    target: Path,
    digests: list[bytes],
    threads: int,
) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=server, args=(source, theirs))
    process.start()
    port = ours.recv()
    cpu_before_s, before_s = time.process_time(), time.perf_counter()
    fetch(port, target, digests, threads)
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


def _fetch_bare(port: int, target: Path, digests: list[bytes], threads: int) -> None:
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
        uploads_max=16,
        upload_rate_max_bytes_per_s=None,
        on_uploaded=lambda version_id, size_bytes, peer: None,
    )
    pipe.send(await server.start("127.0.0.1", 0))
    before_s = _cpu_s()
    await asyncio.to_thread(pipe.recv)
    pipe.send(_cpu_s() - before_s)
    await server.stop()


def _fetch_ours(port: int, target: Path, digests: list[bytes], threads: int) -> None:
    fetcher = ChunkFetcher(KEY, b"bench", threads=threads, buffers_bytes_max=64 * 1024 * 1024)
    with target.open("r+b") as file:
        layout = ChunkLayout(os.fstat(file.fileno()).st_size, CHUNK_SIZE_BYTES)

        def writer(chunk: int) -> Callable[[memoryview], None]:
            def write(data: memoryview) -> None:
                os.pwrite(file.fileno(), data, layout.offset_bytes(chunk))

            return write

        futures = [
            fetcher.fetch(
                ("127.0.0.1", port),
                VERSION_ID,
                chunk,
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


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair", description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.size_mib << 20, arguments.pairs, arguments.threads)
    if arguments.json:
        print(json.dumps(result))
        return
    for name in ("bare", "ours"):
        for figure, spread in result[name].items():
            print(
                f"{name} {figure:20} {spread['median']:6.2f}"
                f"  ({spread['min']:.2f} .. {spread['max']:.2f})"
            )
    print(f"ratio {result['ratio']:.2f} (target >= 0.80)")


if __name__ == "__main__":
    main()
