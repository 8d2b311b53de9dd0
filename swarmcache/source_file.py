"""What file a client's descriptor leads to, as the kernel says, not as the client says.

The daemon trusts nothing in a request but the descriptor. The real path is the kernel's name for
it; that name must lead to the same file in the daemon's own view of the file system, or else a user
could mount something of their own over a path of everybody's and have it cached under that name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import select
import socket
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmcache.chunks import FileVersion
from swarmcache.config import Config
from swarmcache.errors import SourceFailed, SourceUnreadable

log = logging.getLogger(__name__)

# File systems that only one machine sees. Everything else is taken for shared.
LOCAL_FILE_SYSTEMS = frozenset(
    {"bcachefs", "btrfs", "cramfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs"}
    | {"hfsplus", "iso9660", "jfs", "nilfs2", "ntfs", "ntfs3", "overlay", "ramfs", "reiserfs"}
    | {"rootfs", "squashfs", "tmpfs", "udf", "vfat", "xfs", "zfs"}
)
_FUSE_USER = re.compile(rb"(?:^|,)user_id=(\d+)")
_NAME_FAULT = "its name does not lead to it (deleted, or mounted for you alone)"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source: its file version and the name of its file server."""

    version: FileVersion
    file_server: str


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table. ``uid``: of the user who has mounted it (FUSE), or 0.

    ``mount_id``: the kernel's number, which no two mounts of this machine share.
    """

    point: bytes
    fs_type: str
    source: str
    uid: int = 0
    mount_id: int = 0


class MountTable:
    """The mounts of this process, read anew only when the kernel says that they have changed."""

    def __init__(self) -> None:
        self._file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115 (closed with the table)
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLPRI)
        self._lock = threading.Lock()
        self._mounts = self._read()

    def close(self) -> None:
        """Close the kernel's file."""
        self._file.close()

    def current(self) -> dict[bytes, Mount]:
        """The mounts as they are now, by mount point. Safe to call from many threads."""
        with self._lock:
            if self._poll.poll(0):
                self._mounts = self._read()
            return self._mounts

    def _read(self) -> dict[bytes, Mount]:
        """By mount point; of several on one point the last, which hides the others."""
        self._file.seek(0)
        mounts = {}
        for line in self._file.read().splitlines():
            before, _, after = line.partition(b" - ")
            mount_id, *_, point = before.split(b" ")[:5]
            point = _unescape(point)
            fs_type, source, options = after.split(b" ")[:3]
            uid = _FUSE_USER.search(options) if fs_type.startswith(b"fuse") else None
            mounts[point] = Mount(
                point,
                os.fsdecode(fs_type),
                os.fsdecode(_unescape(source)),
                int(uid[1]) if uid is not None else 0,
                int(mount_id),
            )
        return mounts


def find_mount(mounts: dict[bytes, Mount], path: bytes) -> Mount:
    """The mount that a real path is on. Whole components count. Raises SourceUnreadable where there
    is none."""
    point = path
    while (mount := mounts.get(point)) is None:
        if point in (b"/", b""):
            raise SourceUnreadable("it is on no file system that the daemon sees")
        point = point.rpartition(b"/")[0] or b"/"
    return mount


class SourceExaminer:
    """Turns descriptors into ``SourceFile`` values. May block on a slow file server."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._mounts = MountTable()
        self._host = socket.gethostname()
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def close(self) -> None:
        """Close what is open."""
        self._mounts.close()

    def examine(self, fd: int) -> SourceFile:
        """What the descriptor leads to. Raises SourceUnreadable, SourceFailed."""
        mounts = self._mounts.current()
        path, status = _look_at(fd, mounts)
        file_server, local = self._place(path, mounts)
        return SourceFile(self._version(path, status, local=local), file_server)

    def place(self, fd: int) -> bytes | None:
        """Where what is open is mounted: what calls about it depend on. Asks no file server.

        None for what is no file.
        """
        try:
            return find_mount(self._mounts.current(), os.readlink(b"/proc/self/fd/%d" % fd)).point
        except (OSError, SourceUnreadable) as error:
            log.debug("no place: %s", error)  # which ``examine`` will refuse
            return None

    def versions(self, fds: Sequence[int]) -> list[FileVersion | None]:
        """The file versions of many descriptors; None for what ``examine`` would refuse.

        Quicker than one after the other: the mounts are looked at once, and files of one directory
        are on one file system, unless something is mounted over one of them.
        """
        mounts = self._mounts.current()
        places: dict[bytes, bool] = {}
        return [self._version_or_none(fd, mounts, places) for fd in fds]

    def _version_or_none(
        self, fd: int, mounts: dict[bytes, Mount], places: dict[bytes, bool]
    ) -> FileVersion | None:
        try:
            path, status = _look_at(fd, mounts)
            directory = path if path in mounts else path.rpartition(b"/")[0]
            local = places.get(directory)
            if local is None:
                local = places[directory] = self._place(path, mounts)[1]
        except (SourceUnreadable, SourceFailed) as error:
            log.debug("cannot look at a source: %s", error)  # a ``get`` tells its client
            return None
        return self._version(path, status, local=local)

    def _version(self, path: bytes, status: os.stat_result, *, local: bool) -> FileVersion:
        origin = self._boot_id if local else ""
        return FileVersion(path, status.st_size, status.st_mtime_ns, origin)

    def file_server_of_directory(self, fd: int) -> str:
        """The file server of a directory. Raises SourceUnreadable, SourceFailed.

        A directory that may be entered but not listed can be opened with O_PATH only.
        """
        path, status = _named(fd, "the directory")
        if not stat.S_ISDIR(status.st_mode):
            raise SourceUnreadable("not a directory")
        mounts = self._mounts.current()
        _check_name(fd, path, status, mounts)
        return self._place(path, mounts)[0]

    def file_server(self, version: FileVersion) -> str | None:
        """The file server of a source that was examined earlier; None when it is not mounted now.

        Does not look at the source.
        """
        try:
            file_server, local = self._place(version.path, self._mounts.current())
        except SourceUnreadable:
            return None
        return file_server if version.origin == (self._boot_id if local else "") else None

    def _place(self, path: bytes, mounts: dict[bytes, Mount]) -> tuple[str, bool]:
        """The file server of a real path, and whether only this machine sees it."""
        mount = find_mount(mounts, path)
        if mount.uid:  # who calls it what they like, wherever they like: they get no other's slots
            return f"{mount.source} of uid {mount.uid}", False
        file_server = self._config.file_server_for_path(path)
        if file_server is not None:
            return file_server, False
        local = mount.fs_type in LOCAL_FILE_SYSTEMS
        return (f"{self._host}:{mount.source}" if local else mount.source), local


def _look_at(fd: int, mounts: dict[bytes, Mount]) -> tuple[bytes, os.stat_result]:
    """The real path of a regular file that is open for reading, and what stat says of it.

    Raises SourceUnreadable, SourceFailed.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise SourceUnreadable("the descriptor is not open for reading")
    path, status = _named(fd, "the source")
    if not stat.S_ISREG(status.st_mode):
        raise SourceUnreadable("not a regular file")
    _check_name(fd, path, status, mounts)
    return path, status


def _named(fd: int, what: str) -> tuple[bytes, os.stat_result]:
    """The kernel's name of what is open, and what stat says of it. Raises SourceFailed."""
    try:
        status = os.fstat(fd)
        return os.readlink(b"/proc/self/fd/%d" % fd), status
    except OSError as error:
        raise SourceFailed(f"cannot look at {what}: {error}") from error


def same_version(fd: int, version: FileVersion) -> bool:
    """Whether the descriptor's file still is this file version. Raises SourceFailed."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise SourceFailed(f"cannot look at the source: {error}") from error
    return (status.st_size, status.st_mtime_ns) == (version.size_bytes, version.mtime_ns)


def _check_name(fd: int, path: bytes, status: os.stat_result, mounts: dict[bytes, Mount]) -> None:
    """The kernel's name must lead to the file in our own view.

    Where we may not look, as on a file server that does not trust root, it must have been opened on
    the very mount that we see there. In a mount namespace of their own, which all users may make,
    they could mount a directory of theirs over that of somebody else.
    """
    if not path.startswith(b"/"):
        raise SourceUnreadable(_NAME_FAULT)
    try:
        seen = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceUnreadable(_NAME_FAULT) from error
    except PermissionError:
        ours = _mount_id(fd) == find_mount(mounts, path).mount_id
        if not ours or path.endswith(b" (deleted)"):
            raise SourceUnreadable(_NAME_FAULT) from None
        return
    except OSError as error:
        raise SourceFailed(f"cannot look at the source: {error}") from error
    if (seen.st_dev, seen.st_ino) != (status.st_dev, status.st_ino):
        raise SourceUnreadable(_NAME_FAULT)


def _mount_id(fd: int) -> int:
    """On which mount this was opened. Raises SourceFailed."""
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError as error:
        raise SourceFailed(f"cannot look at the source: {error}") from error
    (number,) = (line.split()[1] for line in lines if line.startswith("mnt_id:"))
    return int(number)


def _unescape(field: bytes) -> bytes:
    """The mount table writes space, tab, newline and backslash as three octal digits."""
    parts = field.split(b"\\")
    return parts[0] + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts[1:])
