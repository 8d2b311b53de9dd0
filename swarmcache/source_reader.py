"""Reading leased ranges of chunks from a file server, through the descriptor that a user opened.

Bytes are digested while they are read, and no byte outside the range leaves the file server: the
kernel's own read-ahead is switched off and the next bytes of the range are asked for explicitly.
After every chunk the source is looked at once more; when its size, modification or change time is
another, nothing that was read since the last look counts.

A long range is read by two threads, one half each. Ranges are cut to equal times, so a long one
means a fast source, and then one core alone (copying, digesting and writing) is what limits.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from blake3 import blake3

from swarmcache.chunks import ChunkLayout, FileVersion
from swarmcache.errors import LeaseExpired, SourceChanged, SourceFailed

# What is asked of the file server before it is needed, the piece being read included: what comes in
# this time at the rate so far. Whatever is on its way when a lease runs out still comes.
AHEAD_S = 0.25
AHEAD_MAX_BYTES = 1536 * 1024
# Small enough to be in a core's cache when it is digested and written; large enough that threads
# seldom wait for the interpreter's lock.
PIECE_MAX_BYTES = 512 * 1024
# The kernel cuts one WILLNEED to the device's read-ahead size, whose default is 128 KiB.
AHEAD_STEP_BYTES = 128 * 1024
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SPLIT_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RangeSink:
    """What becomes of a range that is read. All three are called in the reading threads.

    ``may_go_on()`` is asked before every piece. ``write_piece(offset_bytes, piece)`` gets the bytes
    as they come and must not keep them. ``on_chunk(chunk, digest)`` follows when a chunk is whole
    and the source was found unchanged after it was read.
    """

    may_go_on: Callable[[], bool]
    write_piece: Callable[[int, memoryview], None]
    on_chunk: Callable[[int, bytes], None]


def read_range(
    fd: int,
    version: FileVersion,
    layout: ChunkLayout,
    first: int,
    count: int,
    sink: RangeSink,
    *,
    split_bytes: int = SPLIT_BYTES,
) -> int:
    """Read ``count`` chunks from ``first`` on; returns the number of bytes read.

    Blocks until the range is read. Raises SourceChanged, SourceFailed, LeaseExpired, or what the
    sink raises; then no thread reads any more.
    """
    reading = _RangeReading(fd, version, layout, sink)
    size_bytes = layout.offset_bytes(first + count - 1) + layout.length_bytes(first + count - 1)
    size_bytes -= layout.offset_bytes(first)
    if count == 1 or size_bytes < split_bytes:
        reading.read_part(first, count)
        return size_bytes
    half = count // 2
    with ThreadPoolExecutor(1, thread_name_prefix="read half") as other_thread:
        other = other_thread.submit(reading.read_part, first + half, count - half)
        reading.read_part(first, half)
        other.result()
    return size_bytes


class _RangeReading:
    """One range while it is read."""

    def __init__(self, fd: int, version: FileVersion, layout: ChunkLayout, sink: RangeSink) -> None:
        self._fd = fd
        self._version = version
        self._layout = layout
        self._sink = sink
        self._failed = threading.Event()
        with _source_errors():
            self._ctime_ns = os.fstat(fd).st_ctime_ns
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._check_unchanged()

    def read_part(self, first: int, count: int) -> None:
        """Read consecutive chunks; ends soon after another part has failed."""
        buffer = memoryview(mmap.mmap(-1, PIECE_MAX_BYTES, flags=_PRIVATE))
        last = first + count - 1
        end = self._layout.offset_bytes(last) + self._layout.length_bytes(last)
        asked = self._layout.offset_bytes(first)
        ahead_bytes = AHEAD_STEP_BYTES
        try:
            for chunk in range(first, first + count):
                hasher = blake3()
                offset = self._layout.offset_bytes(chunk)
                chunk_end = offset + self._layout.length_bytes(chunk)
                while offset < chunk_end:
                    self._check_lease()  # asking ahead makes the kernel read
                    began_s = time.monotonic()
                    asked = self._ask_ahead(max(asked, offset), min(offset + ahead_bytes, end))
                    piece_bytes = min(ahead_bytes, PIECE_MAX_BYTES, chunk_end - offset)
                    size_bytes = self._read_piece(buffer[:piece_bytes], offset, hasher)
                    ahead_bytes = _ahead_bytes(size_bytes, time.monotonic() - began_s)
                    offset += size_bytes
                self._check_unchanged()
                self._sink.on_chunk(chunk, hasher.digest())
        except BaseException:
            self._failed.set()
            raise

    def _read_piece(self, buffer: memoryview, offset: int, hasher: blake3) -> int:
        """Read, digest and pass on up to a buffer full; returns how much."""
        with _source_errors():
            size_bytes = os.preadv(self._fd, [buffer], offset)
        if size_bytes == 0:
            raise SourceChanged("the source became shorter while it was read")
        piece = buffer[:size_bytes]
        hasher.update(piece)
        self._sink.write_piece(offset, piece)
        return size_bytes

    def _check_lease(self) -> None:
        if self._failed.is_set() or not self._sink.may_go_on():
            raise LeaseExpired("the lease ran out before the range was read")

    def _ask_ahead(self, asked: int, until: int) -> int:
        """Have the kernel fetch what comes next; returns up to where it was asked by now."""
        with _source_errors():
            while asked < until:
                step_bytes = min(AHEAD_STEP_BYTES, until - asked)
                os.posix_fadvise(self._fd, asked, step_bytes, os.POSIX_FADV_WILLNEED)
                asked += step_bytes
        return asked

    def _check_unchanged(self) -> None:
        with _source_errors():
            status = os.fstat(self._fd)
        found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if found != (self._version.size_bytes, self._version.mtime_ns, self._ctime_ns):
            raise SourceChanged("size, modification or change time of the source is another now")


def _ahead_bytes(size_bytes: int, elapsed_s: float) -> int:
    """How much to ask for at once after ``size_bytes`` took ``elapsed_s``."""
    if elapsed_s <= 0:
        return AHEAD_MAX_BYTES
    return int(min(max(size_bytes / elapsed_s * AHEAD_S, AHEAD_STEP_BYTES), AHEAD_MAX_BYTES))


@contextmanager
def _source_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceFailed(f"cannot read the source: {error.strerror}") from error
