"""System calls on files of the cache, with their failures told in our own words.

Every ``OSError`` below the cache directory becomes a ``LocalError``: ``NoSpace`` where the disk or
a quota is full, ``DiskFailed`` where the disk itself may be lost, so that callers can go on with
another disk or answer with the original path instead of failing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from swarmcache.errors import DiskFailed, LocalError, NoSpace

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What a disk says that is broken, was shut down or made read-only by its file system, or is gone.
# EUCLEAN and EBADMSG are how ext4 and XFS report what they find damaged, ENOTCONN is FUSE's, ESTALE
# that of a network file system.
_DISK_FAILED = (
    errno.EIO,
    errno.EROFS,
    errno.ENXIO,
    errno.ENODEV,
    errno.EREMOTEIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS)
# What file systems say that cannot share blocks, or not between these two files.
_CANNOT_CLONE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)
_FICLONE = 0x40049409  # linux/fs.h
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h
# SQLite integers are signed 64 bit; some stacked file systems use the topmost bit of an inode.
_INODE_MASK = (1 << 63) - 1

_libc = ctypes.CDLL(None, use_errno=True)
# Not os.posix_fallocate: where the file system cannot reserve, the C library would write zeros
# over the whole length instead of saying so.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_fstatfs.restype = ctypes.c_int
_syncfs = _libc.syncfs
_syncfs.argtypes = (ctypes.c_int,)
_syncfs.restype = ctypes.c_int
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_OPENAT2 = 437  # on all architectures, as all system calls since Linux 5.1
_HOW = struct.Struct("=QQQ")  # struct open_how of linux/openat2.h: flags, mode, resolve
_NO_XDEV, _NO_SYMLINKS = 0x01, 0x04
# A kernel before 5.6; a container whose rules are older than the call.
_NO_OPENAT2 = (errno.ENOSYS, errno.EPERM)
_STATFS_BYTES = 256  # struct statfs has 120 on 64-bit Linux; its first member is the type, a long
CLOSED_LATER_MAX = 64  # descriptors that one thread keeps open under a ``LastUsesLock``
_TMPFS_MAGIC = 0x01021994  # linux/magic.h


def is_full(error: OSError) -> bool:
    """Whether the disk or a quota is full."""
    return error.errno in _NO_SPACE


def local_error(error: OSError, doing: str) -> LocalError:
    """The ``LocalError`` for a failed system call; ``doing`` completes "could not ..."."""
    text = f"could not {doing}: {error.strerror or error}"
    if is_full(error):
        return NoSpace(text)
    return DiskFailed(text) if error.errno in _DISK_FAILED else LocalError(text)


class DiskErrors:
    """What ``disk_errors`` returns. No generator, which costs some times as much: a file is written
    in many pieces."""

    __slots__ = ("_doing",)

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, OSError):
            raise local_error(error, self._doing) from error


def disk_errors(doing: str) -> DiskErrors:
    """Turn every ``OSError`` of the block into a ``LocalError``."""
    return DiskErrors(doing)


def reserve(fd: int, size_bytes: int, *, keep_size: bool = False) -> bool:
    """Set ``size_bytes`` of disk space aside for the file; False where the file system cannot.

    The file has ``size_bytes`` afterwards in either case, unless ``keep_size``. Raises OSError.
    A tmpfs could, but would clear every page for it (measured: 75 ms for 256 MiB), only to have it
    overwritten.
    """
    reserved = not _is_tmpfs(fd)
    while (
        reserved
        and size_bytes > 0
        and _fallocate(fd, _KEEP_SIZE if keep_size else 0, 0, size_bytes) != 0
    ):
        code = ctypes.get_errno()
        if code in _CANNOT_RESERVE:
            reserved = False
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    if not keep_size:
        os.ftruncate(fd, size_bytes)
    return reserved


def open_within(name: bytes, flags: int, dir_fd: int) -> int:
    """``os.open`` that follows no link and crosses no mount point, where users may make either.

    A file system of theirs need never answer. Raises OSError; EXDEV where something is mounted on
    the way. A kernel before 5.6 does not tell, and opens what is mounted there.
    """
    how = _HOW.pack(flags, 0, _NO_XDEV | _NO_SYMLINKS)
    while True:
        fd = _syscall(_OPENAT2, dir_fd, name, how, _HOW.size)
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code in _NO_OPENAT2:
            return os.open(name, flags, dir_fd=dir_fd)
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), name)


def status_within(name: bytes, dir_fd: int) -> os.stat_result:
    """What stat says of a file, or of a link itself, that ``open_within`` can reach. Raises
    OSError."""
    fd = open_within(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def clone(fd: int, from_fd: int) -> bool:
    """Give a file all bytes of another one, sharing its blocks until one of the two is written to.

    False where the file system cannot. Raises OSError.
    """
    try:
        fcntl.ioctl(fd, _FICLONE, from_fd)
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def _is_tmpfs(fd: int) -> bool:
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if _fstatfs(fd, status) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) == _TMPFS_MAGIC


def sync_file_system(fd: int) -> None:
    """Bring everything onto the disk that was written to the file system of ``fd``.

    Raises OSError, since Linux 5.8 also where the kernel could not write earlier.
    """
    if _syncfs(fd) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_all(fd: int, data: bytes | memoryview, offset_bytes: int) -> None:
    """Write all of ``data`` at the offset, however many calls it takes. Raises OSError."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.pwrite(fd, rest, offset_bytes)
        offset_bytes += written
        rest = rest[written:]


def unlink_if_there(name: str, dir_fd: int) -> None:
    """Unlink ``name``; no matter when it is not there. Raises OSError for anything else."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What ``stat`` says of a copy; as long as it says the same, nobody has touched the copy."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def same_but_for_ctime(self, other: Stamp) -> bool:
        """Whether nothing but links was changed in between."""
        return (self.size_bytes, self.mtime_ns, self.inode) == (
            other.size_bytes,
            other.mtime_ns,
            other.inode,
        )

    @staticmethod
    def of(status: os.stat_result) -> Stamp:
        return Stamp(
            status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & _INODE_MASK
        )


class SharedFile:
    """One descriptor with several users. It is closed when the last of them has let go.

    So a descriptor is never closed, and its number never given to another file, while a thread
    reads or writes through it.
    """

    def __init__(self, fd: int, close: Callable[[int], object] = os.close) -> None:
        """Takes over ``fd``; the maker is its first user. ``close`` closes it, or has that done."""
        self.fd = fd
        self._close = close
        self._users = 1
        self._lock = threading.Lock()

    def retain(self) -> bool:
        """One more user, who must call ``release``. False when the file is closed already."""
        with self._lock:
            if self._users == 0:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._lock:
            assert self._users > 0, "released more often than retained"
            self._users -= 1
            if self._users == 0:
                self._close(self.fd)


class LastUsesLock:
    """A lock that a thread may take again, and that closes descriptors when it has been released.

    A file system frees what a file takes with its last use, after its last name has gone: 0.3 s for
    3 GiB in memory (ext4). That is no longer under the lock where the file is kept open till then.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._fds: list[int] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        fds: list[int] = []
        if self._depth == 0:
            fds, self._fds = self._fds, fds
        self._lock.release()
        for fd in fds:
            os.close(fd)

    def close_later(self, fd: int) -> None:
        """Close a descriptor, if it is one and not -1, when the lock is released; at once where
        there are many already."""
        assert self._depth > 0, "nobody holds the lock"
        if fd >= 0 and len(self._fds) < CLOSED_LATER_MAX:
            self._fds.append(fd)
        elif fd >= 0:
            os.close(fd)
