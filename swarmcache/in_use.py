"""Whether any process has a file open or mapped, asked so that the answer stays true.

A write lease (``F_SETLEASE``) is granted on a file that nobody else has open, however they got at
it: by another hard link, by a descriptor that was passed on, by a mapping whose descriptor is
closed. Who opens the file while the lease is held waits until it is given back, and then finds
either the file or what he has opened of it, whole. So a file can be unlinked under a lease without
a race.

Some file systems offer no leases, and kernels before 5.3 refuse them on files with several names
in use, as all files of the cache are. There we look through /proc instead: for what this process
may see (all of it as root), and only as it was a moment ago. To look at a file there may mean to
ask a file server, for ever when that hangs. So only what is open on the cache's own file systems,
as the tables of mounts have it, is looked at.

A lease keeps whoever opens the file waiting, and one who does not want to wait gets an error. That
is nothing for files that a job may open any moment only because somebody looks at a listing; for
those who are only curious there is ``OpenFiles``, which looks through /proc as well.

The kernel tells the holder of a lease by a signal that somebody waits. By default that is SIGIO,
which would end this process; we have it send SIGURG, which is ignored unless somebody asks for it.
It is not needed: leases are held for a few milliseconds.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import secrets
import signal
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from swarmcache.disk_calls import is_full, unlink_if_there

log = logging.getLogger(__name__)

SEEN_MAX_S = 1.0
FILES_MAX = 64  # asked about at once: so many descriptors are open meanwhile
# O_NONBLOCK: not even a lease of somebody else's keeps us waiting. O_NOATIME: asking is no use.
_ASK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME
_NOT_OFFERED = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# EINVAL: the mounts of a process that has ended, but was not waited for yet.
_GONE = (errno.ENOENT, errno.ESRCH, errno.EINVAL, errno.EACCES, errno.EPERM)

FileId = tuple[int, int]  # device and inode
FileSystem = bytes  # major:minor, as in tables of mounts; of btrfs not that of its files


class UseCheck:
    """Finds out which files of one file system are in use."""

    def __init__(self, scratch_fd: int) -> None:
        """``scratch_fd``: of a directory in which files can be made, to try out leases.

        Raises OSError.
        """
        self._scratch_fd = scratch_fd
        self.file_system = file_system_of(scratch_fd)
        self._leases: bool | None = None  # not tried yet

    def offers_leases(self) -> bool:
        """Whether the answer of ``unused`` is free of races. Raises OSError."""
        if self._leases is None:
            try:
                self._leases = _try_lease(self._scratch_fd)
            except OSError as error:
                if not is_full(error):
                    raise
                return False  # not even a scratch file fits: this time without
            if not self._leases:
                log.info("no leases here: which files are in use is looked up in /proc")
        return self._leases

    @contextmanager
    def unused(self, names: Sequence[str], directory_fd: int) -> Iterator[set[str]]:
        """Those of the files that no process has open or mapped, at most ``FILES_MAX`` names.

        With leases nobody can open one of them until the block is left, this process included: it
        must hold no descriptor of them either. A file that is not there is not in use. Raises
        OSError.
        """
        assert len(names) <= FILES_MAX, "too many files at once"
        with ExitStack() as stack:
            if self.offers_leases():
                yield {name for name in names if _leased(stack, name, directory_fd)}
            else:
                yield self._unseen(names, directory_fd)

    def _unseen(self, names: Sequence[str], directory_fd: int) -> set[str]:
        files: dict[str, FileId] = {}
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
                files[name] = (status.st_dev, status.st_ino)
        opened, mapped = _files_in_use({self.file_system})
        # Mappings are compared by inode alone, since some file systems (btrfs) name another device
        # there than in ``stat``: better a file too many is spared.
        in_use = {name for name, file in files.items() if file in opened or file[1] in mapped}
        return set(names) - in_use


class OpenFiles:
    """Which files processes have open or mapped, for people to see. Thread-safe.

    What is told is up to ``SEEN_MAX_S`` old, so that a listing of a million files looks through
    /proc once in a while only. This process itself does not count.
    """

    def __init__(self, file_systems: Iterable[FileSystem]) -> None:
        """``file_systems``: those whose files are asked about."""
        self._file_systems = frozenset(file_systems)
        self._lock = threading.Lock()
        self._seen: tuple[set[FileId], set[int]] = (set(), set())
        self._seen_s = -math.inf

    def among(self, files: Iterable[FileId]) -> set[FileId]:
        """Those of the files that are in use, as far as this process may see. Raises OSError."""
        with self._lock:
            if time.monotonic() > self._seen_s + SEEN_MAX_S:
                self._seen = _files_in_use(self._file_systems, but=os.getpid())
                self._seen_s = time.monotonic()
            opened, mapped = self._seen
        return {file for file in files if file in opened or file[1] in mapped}


def _leased(stack: ExitStack, name: str, directory_fd: int) -> bool:
    """Whether nobody else has the file open; ``stack`` keeps it so."""
    try:
        fd = os.open(name, _ASK, dir_fd=directory_fd)
    except FileNotFoundError:
        return True
    except (BlockingIOError, PermissionError):  # the latter: somebody has made it theirs
        return False
    stack.callback(os.close, fd)  # which gives the lease back
    return _take_lease(fd)


def _take_lease(fd: int) -> bool:
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _try_lease(directory_fd: int) -> bool:
    """Whether a lease is granted on a file that has two names in use."""
    name = f"lease-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        fd = os.open(name, _ASK | os.O_CREAT | os.O_EXCL, 0o400, dir_fd=directory_fd)
        stack.callback(os.close, fd)
        stack.callback(unlink_if_there, name, directory_fd)
        try:
            os.link(name, name + ".link", src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
            stack.callback(unlink_if_there, name + ".link", directory_fd)
            os.stat(name + ".link", dir_fd=directory_fd)
            return _take_lease(fd)
        except OSError as error:
            if error.errno in _NOT_OFFERED:
                return False
            raise


def file_system_of(fd: int) -> FileSystem:
    """The file system on which a file is that this process has open. Raises OSError."""
    mounts = dict(_mounts_in(Path("/proc/self/mountinfo")))
    try:
        return mounts[_mount_of(f"/proc/self/fdinfo/{fd}")]
    except KeyError:  # unmounted, though it is in use; for most file systems this is the same
        device = os.fstat(fd).st_dev
        return b"%d:%d" % (os.major(device), os.minor(device))


def _files_in_use(
    file_systems: Set[FileSystem], but: int | None = None
) -> tuple[set[FileId], set[int]]:
    """What processes (``but`` one) have open on the file systems, and the inodes that they map."""
    processes = [each for each in os.listdir("/proc") if each.isdigit() and each != str(but)]
    mounts = _mounts_of(file_systems, processes)
    opened: set[FileId] = set()
    mapped: set[int] = set()
    for process in processes:
        with _gone_or_hidden():
            opened.update(_open_in(f"/proc/{process}", mounts))
        with _gone_or_hidden():
            mapped.update(_mapped_in(Path(f"/proc/{process}/maps")))
    return opened, mapped


def _mounts_of(file_systems: Set[FileSystem], processes: Iterable[str]) -> set[bytes]:
    """Where the file systems are mounted, in whatever namespace or root directory."""
    mounts: set[bytes] = set()
    looked_at: set[tuple[str, str]] = set()
    for process in processes:
        with _gone_or_hidden():
            view = os.readlink(f"/proc/{process}/ns/mnt"), os.readlink(f"/proc/{process}/root")
            if view not in looked_at:
                table = _mounts_in(Path(f"/proc/{process}/mountinfo"))
                mounts.update(mount for mount, each in table if each in file_systems)
                looked_at.add(view)
    return mounts


def _mounts_in(mountinfo: Path) -> Iterator[tuple[bytes, FileSystem]]:
    for line in mountinfo.read_bytes().splitlines():
        mount, _, file_system, _ = line.split(maxsplit=3)
        yield mount, file_system


def _mount_of(fdinfo: str) -> bytes:
    with open(fdinfo, "rb") as file:
        fields = dict(line.split(maxsplit=1) for line in file if line.startswith(b"mnt_id:"))
    return fields[b"mnt_id:"].strip()


def _open_in(process: str, mounts: Set[bytes]) -> Iterator[FileId]:
    for name in os.listdir(f"{process}/fd"):
        try:
            if _mount_of(f"{process}/fdinfo/{name}") not in mounts:
                continue
            status = os.stat(f"{process}/fd/{name}")
        except OSError as error:
            # Gone, hidden, or on a disk that fails. That is not ours: the caller has just looked at
            # the files that it asks about.
            log.debug("cannot see what %s/fd/%s is: %s", process, name, error)
            continue
        if stat.S_ISREG(status.st_mode):
            yield status.st_dev, status.st_ino


def _mapped_in(maps: Path) -> Iterator[int]:
    for line in maps.read_bytes().splitlines():
        inode = int(line.split(maxsplit=5)[4])  # address, rights, offset, device, inode, path
        if inode:
            yield inode


@contextmanager
def _gone_or_hidden() -> Iterator[None]:
    """What has ended meanwhile uses nothing; what we may not look at, we cannot know."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
