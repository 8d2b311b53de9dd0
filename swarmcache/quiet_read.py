"""Reading files in the background so that nobody who needs the disk notices.

Such reading does not count as use (no atime), lets the reads of others go first where the disk's
scheduler knows priorities (bfq, mq-deadline), and leaves the page cache as it was: what is there
already is used and stays, what had to come from the disk is given up again.

So it sees what a reader of the file would see just now. Rot on the medium below a page that is
still cached shows only once that page is gone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from blake3 import blake3

# BLAKE3 is at full speed from 128 KiB on.
PIECE_BYTES = 256 * 1024
# O_NONBLOCK: who opens a file that is being evicted would otherwise wait for that.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
# linux/ioprio.h: the class is in the topmost 3 of 16 bits. No class: that of the nice value.
_CLASS_NONE, _CLASS_IDLE = 0 << 13, 3 << 13
_WHO_THREAD = 1  # IOPRIO_WHO_PROCESS, which with id 0 is the calling thread
# The C library has no name for this call. Numbers from the kernel's asm/unistd.h.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_ioprio_set = _IOPRIO_SET.get(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)
# Not the module mmap: it does not tell where a mapping is that must not be written.
_mmap = getattr(_libc, "mmap64", None) or _libc.mmap
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_mmap.restype = ctypes.c_void_p
_MAP_FAILED = ctypes.c_void_p(-1).value
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def open_quietly(name: str, dir_fd: int) -> int:
    """Open a file for reading that does not count as use. Raises OSError.

    A file that is just being evicted is as good as gone: FileNotFoundError.
    """
    try:
        return os.open(name, _READ | os.O_NOATIME, dir_fd=dir_fd)
    except BlockingIOError as error:
        raise FileNotFoundError(errno.ENOENT, "it is just being evicted") from error
    except PermissionError:  # somebody has made it theirs; whether we may read it shows here
        return os.open(name, _READ, dir_fd=dir_fd)


def digest_quietly(
    fd: int, offset_bytes: int, length_bytes: int, after_piece: Callable[[int], None]
) -> bytes:
    """BLAKE3 of a range of a file; of what there is of it where the file ends.

    ``after_piece`` is called with the number of bytes after each piece, and may wait, or raise to
    give up. Raises OSError.
    """
    hasher = blake3()
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(length_bytes, 1))))
    end = offset_bytes + length_bytes
    # Reading ahead would bring in pages that then look like somebody else's.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    while offset_bytes < end:
        piece = buffer[: min(len(buffer), end - offset_bytes)]
        count = _read_quietly(fd, piece, offset_bytes)
        if count == 0:
            break
        hasher.update(piece[:count])
        offset_bytes += count
        after_piece(count)
    return hasher.digest()


def _read_quietly(fd: int, piece: memoryview, offset_bytes: int) -> int:
    """Fill the piece; returns the bytes, fewer than wanted only where the file ends."""
    absent = _absent_pages(fd, offset_bytes, len(piece))
    with _idle_priority() if absent else nullcontext():
        count = os.preadv(fd, [piece], offset_bytes)
    for begin, length in absent:
        os.posix_fadvise(fd, begin, length, os.POSIX_FADV_DONTNEED)
    return count


def _absent_pages(fd: int, offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
    """The parts (offset, length in bytes) of a range that are not in the page cache.

    Not asked by a read with RWF_NOWAIT, for that makes the kernel begin to read what is not there.
    """
    begin = offset_bytes - offset_bytes % mmap.PAGESIZE
    span = offset_bytes + length_bytes - begin
    address = _mmap(None, span, mmap.PROT_READ, mmap.MAP_SHARED, fd, begin)
    if address == _MAP_FAILED:
        _raise_errno()
    try:
        pages = ctypes.create_string_buffer(-(-span // mmap.PAGESIZE))
        if _mincore(address, span, pages) != 0:
            _raise_errno()
    finally:
        _munmap(address, span)
    runs: list[tuple[int, int]] = []
    for page, state in enumerate(pages.raw):
        at = begin + page * mmap.PAGESIZE
        if state & 1:
            continue
        if runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + mmap.PAGESIZE)
        else:
            runs.append((at, mmap.PAGESIZE))
    return runs


def _raise_errno() -> NoReturn:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


@contextmanager
def _idle_priority() -> Iterator[None]:
    """The reads of this thread come after those of everybody else.

    For the block only: a thread that holds a lock must not wait behind others. It is a favour to
    others, so nothing happens where the kernel does not want it (a container may forbid it).
    """
    _set_priority(_CLASS_IDLE)
    try:
        yield
    finally:
        _set_priority(_CLASS_NONE)


def _set_priority(priority: int) -> None:
    if _ioprio_set is not None:
        _libc.syscall(_ioprio_set, _WHO_THREAD, 0, priority)
