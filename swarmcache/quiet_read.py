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
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blake3 import blake3

# BLAKE3 is at full speed from 128 KiB on, and what is dropped from the page cache along with what
# was not there before is at most so much.
PIECE_BYTES = 256 * 1024
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
# linux/ioprio.h: the class is in the topmost 3 of 16 bits. No class: that of the nice value.
_CLASS_NONE, _CLASS_IDLE = 0 << 13, 3 << 13
_WHO_THREAD = 1  # IOPRIO_WHO_PROCESS, which with id 0 is the calling thread
# The C library has no name for this call. Numbers from the kernel's asm/unistd.h.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_ioprio_set = _IOPRIO_SET.get(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)


def open_quietly(name: str, dir_fd: int) -> int:
    """Open a file for reading that does not count as use. Raises OSError."""
    try:
        return os.open(name, _READ | os.O_NOATIME, dir_fd=dir_fd)
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
    """Fill the piece as far as the page cache goes, or else from the disk. Returns the bytes."""
    try:
        return os.preadv(fd, [piece], offset_bytes, os.RWF_NOWAIT)
    except BlockingIOError:
        pass  # not in the page cache
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return os.preadv(fd, [piece], offset_bytes)  # a file system in memory: nothing to give up
    with _idle_priority():
        count = os.preadv(fd, [piece], offset_bytes)
    os.posix_fadvise(fd, offset_bytes, count, os.POSIX_FADV_DONTNEED)
    return count


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
