"""Reading leased ranges of chunks from a file server, through the descriptor that a user opened.

Bytes are digested while they are read, and no byte outside the range leaves the file server: the
kernel's own read-ahead is switched off and the next bytes of the range are asked for explicitly.
After a chunk, or several where they come fast, the source is looked at once more; when its size,
modification or change time is another, nothing that was read since the last look counts.

A long range is read by two threads. Ranges are cut to equal times, so a long one means a fast
source, and then one core alone (copying, digesting and writing) is what limits. Each thread takes
runs of consecutive chunks: long ones at first, as file servers like them; short ones in the end, so
that neither waits for the other.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass

from blake3 import blake3

from swarmcache.chunks import ChunkLayout, FileVersion
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.errors import LeaseExpired, NoThread, SourceChanged, SourceFailed

# What is asked of the file server before it is needed, see ``Ahead``: what comes in so much time.
AHEAD_MIN_S = 0.05
AHEAD_MAX_S = 0.25
AHEAD_MAX_BYTES = 1536 * 1024
# Small enough to be in a core's cache when it is digested and written; large enough that threads
# seldom wait for the interpreter's lock.
PIECE_MAX_BYTES = 512 * 1024
# The kernel cuts one WILLNEED to the device's read-ahead size, whose default is 128 KiB.
AHEAD_STEP_BYTES = 128 * 1024
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SPLIT_BYTES = 32 * 1024 * 1024
RUN_SHARE = 4  # a run is a quarter of what is left, half of what one of two threads has to do
# More than is asked for ahead, since that ends with the run; 2 ms of one core's work.
RUN_MIN_BYTES = 2 * 1024 * 1024
# Chunks that are read within this time count together. One by one, what is done besides reading,
# digesting and writing them took a quarter of the time, with chunks of 512 KiB in memory.
COUNT_S = 0.004


@dataclass(frozen=True, slots=True)
class RangeSink:
    """What becomes of a range that is read. All three are called in the reading threads.

    ``may_go_on()`` is asked before every piece. ``write_piece(offset_bytes, piece)`` gets the bytes
    as they come and must not keep them. ``on_chunks`` gets chunks and their digests when they are
    whole and the source was found unchanged after they were read.
    """

    may_go_on: Callable[[], bool]
    write_piece: Callable[[int, memoryview], None]
    on_chunks: Callable[[Mapping[int, bytes]], None]


def read_range(
    fd: int,
    version: FileVersion,
    layout: ChunkLayout,
    first: int,
    count: int,
    sink: RangeSink,
    *,
    split_bytes: int = SPLIT_BYTES,
    run_min_bytes: int = RUN_MIN_BYTES,
) -> int:
    """Read ``count`` chunks from ``first`` on; returns the number of bytes read.

    Blocks until the range is read. Raises SourceChanged, SourceFailed, LeaseExpired, or what the
    sink raises; then no thread reads any more.
    """
    size_bytes = layout.offset_bytes(first + count - 1) + layout.length_bytes(first + count - 1)
    size_bytes -= layout.offset_bytes(first)
    if count == 1 or size_bytes < split_bytes:
        _RangeReading(fd, version, layout, sink, Runs(first, count, count)).read_runs()
        return size_bytes
    runs = Runs(first, count, max(1, run_min_bytes // layout.chunk_size_bytes))
    reading = _RangeReading(fd, version, layout, sink, runs)
    # Not a pool's thread, for which the process would wait in the end, however long it hangs.
    threads = CompartmentThreads("read along", 1, 1, idle_max=0)
    try:
        others = [threads.submit(None, None, reading.read_runs)]
    except NoThread:
        others = []  # this one reads it all
    try:
        reading.read_runs()
    finally:
        wait(others)
    for other in others:
        other.result()
    return size_bytes


class Runs:
    """Hands the chunks of a range out, in order, to the threads that read it."""

    def __init__(self, first: int, count: int, run_min: int) -> None:
        """``run_min``: the fewest chunks in a run, but for the last one."""
        self._next = first
        self._end = first + count
        self._run_min = run_min
        self._lock = threading.Lock()

    def take(self) -> range:
        """Chunks that nobody else has taken; none when all are taken. Safe in any thread."""
        with self._lock:
            first = self._next
            left = self._end - first
            self._next += min(left, max(left // RUN_SHARE, self._run_min))
            return range(first, self._next)


class Ahead:
    """How much to ask for before it is needed, the piece that is being read included.

    What comes, at the rate of the last piece, in twice the time that the first one took: for that
    nothing had been asked ahead. More only makes a queue in front of everybody else. With 0.25 s of
    it always, eight readers that began one after the other on a link of 200 Mbit/s were through
    0.1 s later. Whatever is on its way when a lease runs out still comes.
    """

    def __init__(self) -> None:
        self.size_bytes = AHEAD_STEP_BYTES
        self._time_s: float | None = None

    def note(self, size_bytes: int, elapsed_s: float) -> None:
        """A piece has come, after this time."""
        if self._time_s is None:
            self._time_s = min(max(2 * elapsed_s, AHEAD_MIN_S), AHEAD_MAX_S)
        wanted_bytes = size_bytes / elapsed_s * self._time_s if elapsed_s > 0 else math.inf
        self.size_bytes = int(min(max(wanted_bytes, AHEAD_STEP_BYTES), AHEAD_MAX_BYTES))


class _RangeReading:
    """One range while it is read."""

    def __init__(
        self, fd: int, version: FileVersion, layout: ChunkLayout, sink: RangeSink, runs: Runs
    ) -> None:
        self._fd = fd
        self._version = version
        self._layout = layout
        self._sink = sink
        self._runs = runs
        self._failed = threading.Event()
        with _SOURCE_ERRORS:
            self._ctime_ns = os.fstat(fd).st_ctime_ns
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._check_unchanged()

    def read_runs(self) -> None:
        """Read chunks until all are taken; returns soon after another thread has failed."""
        buffer = memoryview(mmap.mmap(-1, PIECE_MAX_BYTES, flags=_PRIVATE))
        ahead = Ahead()
        try:
            while not self._failed.is_set() and (run := self._runs.take()):
                self._read_run(run, buffer, ahead)
        except BaseException:
            self._failed.set()
            raise

    def _read_run(self, run: range, buffer: memoryview, ahead: Ahead) -> None:
        """Read consecutive chunks."""
        end = self._layout.offset_bytes(run[-1]) + self._layout.length_bytes(run[-1])
        asked = self._layout.offset_bytes(run[0])
        digests: dict[int, bytes] = {}  # of chunks that do not count yet
        counted_s = time.monotonic()
        for chunk in run:
            hasher = blake3()
            offset = self._layout.offset_bytes(chunk)
            chunk_end = offset + self._layout.length_bytes(chunk)
            while offset < chunk_end:
                if self._failed.is_set():
                    self._count(digests)
                    return  # the other thread says why
                if not self._sink.may_go_on():  # asking ahead makes the kernel read
                    self._count(digests)
                    raise LeaseExpired("the lease ran out before the range was read")
                began_s = time.monotonic()
                asked = self._ask_ahead(max(asked, offset), min(offset + ahead.size_bytes, end))
                piece_bytes = min(ahead.size_bytes, PIECE_MAX_BYTES, chunk_end - offset)
                size_bytes = self._read_piece(buffer[:piece_bytes], offset, hasher)
                ahead.note(size_bytes, time.monotonic() - began_s)
                offset += size_bytes
            digests[chunk] = hasher.digest()
            if chunk == run[-1] or time.monotonic() - counted_s >= COUNT_S:
                self._count(digests)
                digests, counted_s = {}, time.monotonic()

    def _count(self, digests: dict[int, bytes]) -> None:
        if digests:
            self._check_unchanged()
            self._sink.on_chunks(digests)

    def _read_piece(self, buffer: memoryview, offset: int, hasher: blake3) -> int:
        """Read, digest and pass on up to a buffer full; returns how much."""
        with _SOURCE_ERRORS:
            size_bytes = os.preadv(self._fd, [buffer], offset)
        if size_bytes == 0:
            raise SourceChanged("the source became shorter while it was read")
        piece = buffer[:size_bytes]
        hasher.update(piece)
        self._sink.write_piece(offset, piece)
        return size_bytes

    def _ask_ahead(self, asked: int, until: int) -> int:
        """Have the kernel fetch what comes next; returns up to where it was asked by now."""
        with _SOURCE_ERRORS:
            while asked < until:
                step_bytes = min(AHEAD_STEP_BYTES, until - asked)
                os.posix_fadvise(self._fd, asked, step_bytes, os.POSIX_FADV_WILLNEED)
                asked += step_bytes
        return asked

    def _check_unchanged(self) -> None:
        with _SOURCE_ERRORS:
            status = os.fstat(self._fd)
        found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if found != (self._version.size_bytes, self._version.mtime_ns, self._ctime_ns):
            raise SourceChanged("size, modification or change time of the source is another now")


class _SourceErrors:
    """Turns each ``OSError`` of a block into ``SourceFailed``. No generator: see ``DiskErrors``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, OSError):
            raise SourceFailed(f"cannot read the source: {error.strerror}") from error


_SOURCE_ERRORS = _SourceErrors()
