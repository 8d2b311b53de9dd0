"""Temporary files beside those that they are to replace, and what is left of them after a kill.

    .swarmcache-cp-TAG-RANDOM       TAG: 12 hex digits that tell this machine, since it was started

Whoever writes one holds a lock on it (flock). So a file that bears this machine's tag and is not
locked has lost its writer. Of another machine's, the lock tells as well where the file system takes
locks across machines; since not all do, it must also be old. That is by its ctime, too: its mtime
becomes that of its source while its writer still has work to do.

Invariant: nobody removes a file that somebody may still be writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from blake3 import blake3

from swarmcache.disk_calls import unlink_if_there

PREFIX = ".swarmcache-cp-"
# After so much time without a write, a writer on another machine is taken for dead.
SILENT_S_MAX = 24 * 3600.0
# How many names of a directory are looked at before a copy: a million would take seconds. Those
# that are not seen are left for ``swarmcache doctor --clean``.
LISTED_MAX = 20_000
_NAME = re.compile(re.escape(PREFIX) + "([0-9a-f]{12})-[0-9a-f]{16}")
_MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class LeftOver:
    """A temporary file that was removed."""

    name: str
    size_bytes: int


@cache
def machine_tag() -> str:
    """12 hex digits that are this machine's until it is started anew."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return blake3(f"{socket.gethostname()} {boot_id}".encode()).hexdigest()[:12]


def make_beside(directory_fd: int) -> tuple[int, str]:
    """Make and lock an empty file that only its owner can read; its descriptor and name.

    Raises OSError.
    """
    while True:
        name = f"{PREFIX}{machine_tag()}-{secrets.token_hex(8)}"
        try:
            fd = os.open(name, _MAKE, 0o600, dir_fd=directory_fd)
        except OSError:
            raise
        except BaseException:  # a signal, which has waited for the file to be made
            unlink_if_there(name, directory_fd)
            raise
        try:
            _lock(fd)
            if _leads_to(name, directory_fd, fd):
                return fd, name
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=directory_fd)
            raise
        os.close(fd)  # somebody took it for left over, before it was locked


def remove_left_over(
    directory_fd: int,
    owner_uid: int | None,
    now_s: float,
    onerror: Callable[[OSError], None],
    listed_max: int | None = None,
) -> Iterator[LeftOver]:
    """Remove what killed writers have left in a directory, and tell of each.

    ``owner_uid``: whose; None for everybody's. ``now_s``: by the clock of the file server, since
    the epoch. ``onerror`` hears of files that cannot be looked at or removed; ``filename`` is their
    name. ``listed_max``: after how many names to stop. Raises OSError.
    """
    with os.scandir(directory_fd) as entries:
        names = []
        for number, entry in enumerate(entries):
            if listed_max is not None and number >= listed_max:
                break
            if _NAME.fullmatch(entry.name):
                names.append(entry.name)
    for name in names:
        try:
            removed = _remove_if_left(name, directory_fd, owner_uid, now_s)
        except FileNotFoundError:
            continue  # gone meanwhile
        except OSError as error:
            error.filename = name
            onerror(error)
            continue
        if removed is not None:
            yield removed


def _remove_if_left(
    name: str, directory_fd: int, owner_uid: int | None, now_s: float
) -> LeftOver | None:
    status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or owner_uid not in (None, status.st_uid):
        return None  # somebody's joke, or another user's
    fd = os.open(name, _LOOK, dir_fd=directory_fd)
    try:
        status = os.fstat(fd)
        locked = _is_locked(fd)
        ours = name.startswith(PREFIX + machine_tag())
        changed_s = max(status.st_mtime, status.st_ctime)
        if locked or ((locked is None or not ours) and now_s < changed_s + SILENT_S_MAX):
            return None
        if not _leads_to(name, directory_fd, fd):
            return None
        os.unlink(name, dir_fd=directory_fd)
        return LeftOver(name, status.st_size)
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_locked(fd: int) -> bool | None:
    """None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return False


def _leads_to(name: str, directory_fd: int, fd: int) -> bool:
    try:
        there = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))
