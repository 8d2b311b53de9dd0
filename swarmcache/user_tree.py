"""The part of the cache directory that users see: ``<cache.dir>/<user>/<real path>``.

Every directory in it belongs to the daemon, is sticky, and is closed to everybody but one user,
who is let in by a POSIX ACL (where the user is the daemon's own, by the plain mode). So a user may
put files of their own beside the cached ones, but can neither replace a cached one nor look into
the directory of somebody else.

All walking is by descriptor, one component at a time, and no symbolic link is followed: a user
who plants one only loses the cache for that path. Nothing that the daemon did not make is ever
changed or removed.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from swarmcache.disk_calls import (
    Stamp,
    disk_errors,
    local_error,
    open_within,
    status_within,
    unlink_if_there,
)
from swarmcache.errors import CacheDirUnusable, DiskFailed, LocalError
from swarmcache.own_directory import check_ours, checked_path

PATH_MAX_BYTES = 4096  # linux/limits.h, with the closing NUL
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What users may have put in the place of a directory, or below it deeper than our links lie; or it
# has gone. Ours are never closed to us.
_NOT_OURS = (
    errno.EACCES,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EXDEV,
)
ACL_NAME = "system.posix_acl_access"
_ACL_VERSION = 2  # linux/posix_acl_xattr.h; tags and permissions are those of linux/posix_acl.h
_ACL_ANY_ID = 0xFFFFFFFF
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_RWX = 7
_ACL_USER_AT = 4 + 8 + 4  # after the version, the entry of the owner, and tag and permissions


@dataclass(frozen=True)
class User:
    """Somebody on this machine who has shown that they may read a source."""

    uid: int
    name: str


def acl_for(uid: int) -> bytes:
    """The ACL, as the kernel stores it, that lets in the owner and one more user, nobody else."""
    entries = (
        (_USER_OBJ, _RWX, _ACL_ANY_ID),
        (_USER, _RWX, uid),
        (_GROUP_OBJ, 0, _ACL_ANY_ID),
        (_MASK, _RWX, _ACL_ANY_ID),
        (_OTHER, 0, _ACL_ANY_ID),
    )
    return struct.pack("<I", _ACL_VERSION) + b"".join(struct.pack("<HHI", *e) for e in entries)


def _uid_in(acl: bytes) -> int | None:
    """The inverse of ``acl_for``; None when it is another ACL."""
    if len(acl) != len(acl_for(0)):
        return None
    uid: int = struct.unpack_from("<I", acl, _ACL_USER_AT)[0]
    return uid if acl == acl_for(uid) else None


class UserTree:
    """The directories of all users below one cache directory. Thread-safe."""

    def __init__(self, root: bytes, root_fd: int) -> None:
        """``root``: the cache directory, ``root_fd``: a descriptor of it, which stays ours."""
        self._root = root
        self._root_fd = root_fd
        self._device = os.fstat(root_fd).st_dev
        self._daemon_uid = os.geteuid()
        # While a link is made, nobody may find the directories on its way empty and remove them.
        self._lock = threading.Lock()

    def path(self, user: User, real_path: bytes) -> bytes:
        """Where the user's copy of a source is or would be.

        Raises CacheDirUnusable where no such place can exist.
        """
        return _path_below(self.directory(user), real_path)

    def directory(self, user: User) -> bytes:
        """What all copies of a user lie below. Raises CacheDirUnusable where there can be none."""
        name = os.fsencode(user.name)
        # A leading dot is kept for the daemon's own directory.
        if not name or name.startswith(b".") or b"/" in name or b"\0" in name:
            raise CacheDirUnusable(f"{user.name!r} cannot be the name of a directory in the cache")
        return self._root + b"/" + name

    def make_directories(self, user: User, real_path: bytes) -> None:
        """Make the directories on the way to the user's copy, for a file of the user's own.

        Raises CacheDirUnusable when something else is in the way, LocalError when the disk fails.
        """
        shown = os.fsdecode(self.path(user, real_path))
        with self._lock, ExitStack() as stack, disk_errors(f"make the directory of {shown}"):
            self._walk(stack, user, real_path, make=True)

    def link(
        self,
        user: User,
        real_path: bytes,
        object_at: tuple[str, int],
        scratch_at: tuple[str, int],
        replaceable: Collection[int],
    ) -> None:
        """Make the user's hard link to an object, and the directories on the way.

        ``object_at`` and ``scratch_at`` are a name and the descriptor of its directory: the object,
        and an unused name on the same file system that only the daemon can see. A link to one of
        the inodes in ``replaceable`` (older versions of the same source) gives way in one step.
        Raises CacheDirUnusable when something else is in the place, LocalError when the disk fails.
        """
        shown = os.fsdecode(self.path(user, real_path))
        with self._lock, ExitStack() as stack, disk_errors(f"link {shown}"):
            parent_fd, name = self._walk(stack, user, real_path, make=True)[-1]
            try:
                _hard_link(object_at, (name, parent_fd))
                return
            except FileExistsError:
                there = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            wanted = os.stat(object_at[0], dir_fd=object_at[1], follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (wanted.st_dev, wanted.st_ino):
                return
            if Stamp.of(there).inode not in replaceable or not stat.S_ISREG(there.st_mode):
                raise CacheDirUnusable(f"{shown} is not a file of swarmcache: move it away")
            _hard_link(object_at, scratch_at)
            os.rename(scratch_at[0], name, src_dir_fd=scratch_at[1], dst_dir_fd=parent_fd)

    def link_all(
        self, user: User, objects: Mapping[bytes, str], objects_fd: int
    ) -> dict[bytes, LocalError]:
        """Make the user's hard links to objects, given by name and the real path of the source.

        As ``link`` for each, but nothing gives way to one. Returns why those could not be made that
        could not. Raises LocalError when the disk fails.
        """
        failed: dict[bytes, LocalError] = {}
        by_directory: dict[bytes, list[bytes]] = {}
        try:
            users_directory = self.directory(user)
        except CacheDirUnusable as error:
            return dict.fromkeys(objects, error)
        for path in objects:
            try:
                _path_below(users_directory, path)
            except CacheDirUnusable as error:
                failed[path] = error
            else:
                by_directory.setdefault(os.path.dirname(path), []).append(path)
        for directory, paths in by_directory.items():
            shown = os.fsdecode(directory)
            try:
                with self._lock, ExitStack() as stack, disk_errors(f"make links in {shown}"):
                    parent_fd, _ = self._walk(stack, user, paths[0], make=True)[-1]
                    for path in paths:
                        try:
                            target = (os.path.basename(path), parent_fd)
                            _hard_link((objects[path], objects_fd), target)
                        except FileExistsError as error:
                            failed[path] = CacheDirUnusable(f"something is in the way: {error}")
            except CacheDirUnusable as error:
                failed |= dict.fromkeys(paths, error)
        return failed

    def unlink(self, user: User, real_path: bytes, inode: int) -> None:
        """Remove the user's link if it is one to ``inode``, and directories left empty by that.

        Raises LocalError when the disk fails.
        """
        shown = os.fsdecode(self.path(user, real_path))
        with self._lock, ExitStack() as stack, disk_errors(f"unlink {shown}"):
            try:
                steps = self._walk(stack, user, real_path, make=False)
                parent_fd, name = steps[-1]
                there = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            except (FileNotFoundError, CacheDirUnusable):
                return  # whatever is there now, our link is not
            if Stamp.of(there).inode != inode or there.st_uid != self._daemon_uid:
                return
            os.unlink(name, dir_fd=parent_fd)
            for above_fd, directory in reversed(steps[1:-1]):  # the user's top directory stays
                try:
                    os.rmdir(directory, dir_fd=above_fd)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                        return
                    raise

    def users(self) -> list[User]:
        """All users who have a directory here. Raises LocalError."""
        with disk_errors("list the users' directories"):
            names = os.listdir(self._root_fd)
            found = [self._user_of(name) for name in names if not name.startswith(".")]
        return [user for user in found if user is not None]

    def linked_users(self, users: Collection[User], real_path: bytes, inode: int) -> list[User]:
        """Those of ``users`` whose copy of this source is a link to ``inode`` on our disk."""
        found = []
        for user in users:
            try:
                below = self.path(user, real_path).removeprefix(self._root + b"/")
                status = status_within(below, self._root_fd)
            except (OSError, CacheDirUnusable):
                continue  # whatever is there, our link is not
            if status.st_dev == self._device and Stamp.of(status).inode == inode:
                found.append(user)
        return found

    def unlink_all(self, real_path: bytes, inode: int) -> list[User]:
        """Remove the links of all users to ``inode``; returns whose. Raises LocalError."""
        users = self.linked_users(self.users(), real_path, inode)
        for user in users:
            self.unlink(user, real_path, inode)
        return users

    def unlink_everywhere(self, inodes: Collection[int]) -> Iterator[None]:
        """Remove all links to ``inodes``, of whatever source. Very slow: looks at every file.

        Works between one ``next`` and the other. Raises LocalError.
        """
        with disk_errors("look through the users' directories"):
            # By their paths, each opened anew: users may make more directories below one another
            # than there are descriptors. A copy never lies deeper than a path can be long.
            directories = [os.fsencode(user.name) for user in self.users()]
            while directories:
                directories += self._unlink_in(directories.pop(), inodes)
                yield

    def _unlink_in(self, directory: bytes, inodes: Collection[int]) -> list[bytes]:
        """Remove the links to ``inodes`` in one directory; returns the directories in it."""
        found: list[bytes] = []
        try:
            fd = open_within(directory, _DIRECTORY, self._root_fd)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            return found
        try:
            for name in map(os.fsencode, os.listdir(fd)):
                if self._unlink_if_among(name, fd, inodes):
                    found.append(directory + b"/" + name)
        finally:
            os.close(fd)
        return found

    def _unlink_if_among(self, name: bytes, dir_fd: int, inodes: Collection[int]) -> bool:
        """Whether it is a directory, and nothing is mounted on it."""
        with self._lock:
            try:
                there = status_within(name, dir_fd)
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise
                return False
            if there.st_dev != self._device:
                return False
            if there.st_uid == self._daemon_uid and Stamp.of(there).inode in inodes:
                unlink_if_there(os.fsdecode(name), dir_fd)
        return stat.S_ISDIR(there.st_mode)

    def _user_of(self, name: str) -> User | None:
        """Whose directory that is, as its ACL says; None when it is not one of ours."""
        try:
            fd = open_within(os.fsencode(name), _DIRECTORY, self._root_fd)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENOENT, errno.EXDEV):
                return None
            raise
        try:
            acl = _read_acl(fd)
            ours = os.fstat(fd).st_uid == self._daemon_uid
        finally:
            os.close(fd)
        uid = self._daemon_uid if acl is None else _uid_in(acl)
        return User(uid, name) if ours and uid is not None else None

    def _walk(
        self, stack: ExitStack, user: User, real_path: bytes, *, make: bool
    ) -> list[tuple[int, bytes]]:
        """Open all directories on the way to the user's copy; ``stack`` closes them.

        Returns one (descriptor of the directory above, name) per component, the last one being
        the copy itself.
        """
        self._check_reachable(user)
        components = [os.fsencode(user.name), *real_path.split(b"/")[1:]]
        steps = [(self._root_fd, components[0])]
        for depth, component in enumerate(components[:-1]):
            shown = os.fsdecode(b"/".join([self._root, *components[: depth + 1]]))
            fd = self._enter(steps[-1][0], component, user, shown, make=make)
            stack.callback(os.close, fd)
            steps.append((fd, components[depth + 1]))
        return steps

    def _check_reachable(self, user: User) -> None:
        if user.uid == self._daemon_uid:
            return
        if not os.fstat(self._root_fd).st_mode & stat.S_IXOTH:
            raise CacheDirUnusable(
                f"{os.fsdecode(self._root)} is closed to its users: run chmod o+x on it"
            )

    def _enter(self, above_fd: int, name: bytes, user: User, shown: str, *, make: bool) -> int:
        made = False
        if make:
            try:
                os.mkdir(name, 0o700, dir_fd=above_fd)
                made = True
            except FileExistsError:
                pass  # the usual case; what it is shows below
        try:
            fd = open_within(name, _DIRECTORY, above_fd)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise CacheDirUnusable(f"something is mounted on {shown}: unmount it") from error
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise CacheDirUnusable(
                    f"{shown} is not a directory of swarmcache: move it away"
                ) from error
            raise
        try:
            self._open_to(fd, user, shown, made=made)
        except BaseException:
            os.close(fd)
            if made:
                os.rmdir(name, dir_fd=above_fd)
            raise
        return fd

    def _open_to(self, fd: int, user: User, shown: str, *, made: bool) -> None:
        """See to it that this one user can use the directory, and nobody else but the daemon."""
        status = os.fstat(fd)
        if status.st_uid != self._daemon_uid:
            raise CacheDirUnusable(f"{shown} was not made by swarmcache: move it away")
        wanted = None if user.uid == self._daemon_uid else acl_for(user.uid)
        mode = 0o1700 if wanted is None else 0o1770  # with an ACL, these group bits are its mask
        present = _read_acl(fd)
        if present == wanted and stat.S_IMODE(status.st_mode) == mode:
            return
        # An empty directory without an ACL is one whose maker was killed before it was done.
        # Anything else may hold what only another user has shown to be allowed to read.
        unfinished = made or (present is None and (wanted is None or not os.listdir(fd)))
        if present != wanted and not unfinished:
            raise CacheDirUnusable(
                f"{shown} is opened to another user than {user.name} (uid {user.uid}): remove it"
            )
        if wanted is None:
            if present is not None:
                os.removexattr(fd, ACL_NAME)
            os.fchmod(fd, mode)
            return
        try:
            # The sticky bit comes first: the user must not get in while it is missing.
            os.fchmod(fd, 0o1700)
            os.setxattr(fd, ACL_NAME, wanted)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise CacheDirUnusable(
                f"the file system of {shown} has no POSIX ACLs, so the daemon can serve nobody but"
                f" uid {self._daemon_uid} from it: mount it with ACLs, choose another cache.dir,"
                " or run a daemon per user"
            ) from error


def _path_below(directory: bytes, real_path: bytes) -> bytes:
    """Where the copy of a source is in a user's directory. Raises CacheDirUnusable."""
    if not real_path.startswith(b"/") or _has_odd_component(real_path):
        raise CacheDirUnusable(f"{os.fsdecode(real_path)!r} is not a real path")
    path = directory + real_path
    if len(path) >= PATH_MAX_BYTES:
        raise CacheDirUnusable(
            f"the path of the copy would have {len(path)} bytes, {PATH_MAX_BYTES - 1} are"
            " allowed: choose a shorter cache.dir"
        )
    return path


def _has_odd_component(real_path: bytes) -> bool:
    path = real_path + b"/"
    return b"\0" in path or b"//" in path or b"/./" in path or b"/../" in path


def _hard_link(source: tuple[str, int], target: tuple[str | bytes, int]) -> None:
    os.link(source[0], target[0], src_dir_fd=source[1], dst_dir_fd=target[1], follow_symlinks=False)


def _read_acl(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, ACL_NAME)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def open_cache_root(
    root: str, *, make: bool = True, daemon_uid: int | None = None
) -> tuple[bytes, int]:
    """Open the cache directory: its path without symlinks, a descriptor.

    With ``make`` it is made if need be; otherwise one that is not there is taken for one whose
    disk is not mounted. ``daemon_uid``: whose it must be, by default this process' user. Raises
    DirectoryUnusable when somebody else could have prepared or could change it, DiskFailed when its
    disk cannot be used; the message says what to do.
    """
    absolute = os.path.abspath(root)
    above, name = os.path.split(absolute)
    if not name:
        raise CacheDirUnusable("/ cannot be the cache directory: name another one in cache.dir")
    daemon_uid = os.geteuid() if daemon_uid is None else daemon_uid
    try:
        if make:
            os.makedirs(above, exist_ok=True)
        path = checked_path(absolute, "cache.dir", daemon_uid)
        if make:
            _make_root(path)
        fd = os.open(path, _DIRECTORY)
    except OSError as error:
        if error.errno == errno.ENOENT and not make:
            raise DiskFailed(
                f"the cache directory {absolute} is not there: is its disk mounted? If it is new,"
                f" run: mkdir -m 711 {shlex.quote(absolute)}"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EEXIST):
            raise CacheDirUnusable(
                f"{absolute} is a symbolic link or no directory: remove it, or name a directory"
                " in cache.dir"
            ) from error
        failure = local_error(error, f"open the cache {absolute}")
        if isinstance(failure, DiskFailed):
            raise failure from error
        raise CacheDirUnusable(str(failure)) from error
    try:
        with disk_errors(f"look at {path}"):
            check_ours(fd, path, "cache.dir", forbidden=0o022, uid=daemon_uid)
    except LocalError:
        os.close(fd)
        raise
    return os.fsencode(path), fd


def _make_root(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        # Ours from an earlier start, or else refused by who opens it.
        if stat.S_IMODE(os.lstat(path).st_mode) != 0o700 or os.listdir(path):
            return
        # Its maker was killed before it was done.
    os.chmod(path, 0o711)  # noqa: S103 (users pass through to their own directory)
    try:
        fd = os.open(os.path.dirname(path), _DIRECTORY)
    except PermissionError:
        return  # one that we may write but not read cannot be synced
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
