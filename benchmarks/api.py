"""Hits per second through one ``Client``: one call each, and many files in one call.

A call is a round trip to the daemon. Beside it, in turns, the least that such a round trip takes
between two processes in Python: a descriptor there, a line back, nothing looked at. Beside many in
one call: opening and looking at the same files and copies, which each program that uses them does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.local_cluster import LocalCluster
from benchmarks.report import Figure, Options, Spread, in_turns
from swarmcache import Client

FILES = 1000
QUICK_FILES = 50
TURNS = 10
SIZE_BYTES = 10 * 1024
HITS_PER_S_MIN = 10_000.0

ECHO = """
import array, os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
while True:
    data, fds, _, _ = socket.recv_fds(connection, 65536, 1)
    if not data:
        break
    for fd in fds:
        os.close(fd)
    connection.send(data)
"""


def measure(options: Options) -> list[Figure]:
    """One figure for calls, one for files of one call."""
    with tempfile.TemporaryDirectory(prefix="swarmcache-bench-") as directory:
        files = make_files(Path(directory, "sources"), QUICK_FILES if options.quick else FILES)
        turns = options.choose_runs(TURNS)
        with (
            LocalCluster(Path(directory)) as cluster,
            Client(bytes(cluster.nodes[0].socket)) as client,
            _echo(Path(directory, "echo")) as echo,
        ):
            copies = client.get_many(files, strict=True)

            def call_each() -> None:
                assert all(client.get(file).hit for file in files)

            def call_once() -> None:
                assert all(answer.hit for answer in client.get_many(files))

            def echo_each() -> None:
                for file in files:
                    with open(file, "rb") as opened:
                        socket.send_fds(echo, [b"get\n"], [opened.fileno()])
                        assert echo.recv(65536) == b"get\n"

            def look_at_all() -> None:
                for file, copy in zip(files, copies, strict=True):
                    fd = os.open(file, os.O_RDONLY)
                    os.fstat(fd)
                    os.close(fd)
                    os.stat(copy)

            calls, echoes = in_turns(_per_s(call_each, files), _per_s(echo_each, files), turns)
            many, looks = in_turns(_per_s(call_once, files), _per_s(look_at_all, files), turns)
    found = Spread.of(many)
    met = found.median >= HITS_PER_S_MIN
    return [
        Figure("hits, a call each", Spread.of(calls), "/s", "bare round trip", Spread.of(echoes)),
        Figure(
            f"hits, {len(files)} in one call",
            found,
            "/s",
            "open, fstat, stat",
            Spread.of(looks),
            f">= {HITS_PER_S_MIN:.0f}/s",
            met,
        ),
    ]


def make_files(directory: Path, count: int) -> list[Path]:
    """So many files of 10 KiB, no two the same."""
    directory.mkdir()
    files = [directory / f"{number:06d}" for number in range(count)]
    for file in files:
        file.write_bytes(os.urandom(SIZE_BYTES))
    return files


def _per_s(run: Callable[[], None], files: list[Path]) -> Callable[[], float]:
    def measure_once() -> float:
        began_s = time.perf_counter()
        run()
        return len(files) / (time.perf_counter() - began_s)

    return measure_once


@contextmanager
def _echo(path: Path) -> Iterator[socket.socket]:
    """A connection to a process that closes what it gets and sends the line back."""
    with (
        subprocess.Popen([sys.executable, "-c", ECHO, path], stdout=subprocess.PIPE) as process,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        connection.connect(str(path))
        yield connection
        connection.shutdown(socket.SHUT_RDWR)
