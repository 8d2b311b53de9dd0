"""Directories that nobody but their owner and root may prepare or change.

``/var/tmp`` is everybody's, and so is the disk that a setting may name: somebody else may have made
the directory before us, or may be able to put another one in its place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from swarmcache.errors import DirectoryUnusable

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_own_directory(directory: Path, setting: str) -> int:
    """Open a directory that ``setting`` names, and make it if need be; a descriptor.

    What is in it then, we or root have put there. Raises DirectoryUnusable.
    """
    absolute = os.path.abspath(directory)
    try:
        os.makedirs(os.path.dirname(absolute), exist_ok=True)
        path = checked_path(absolute, setting, os.geteuid())
        with suppress(FileExistsError):  # from an earlier start, or else refused below
            os.mkdir(path, 0o700)
        fd = os.open(path, _DIRECTORY)
    except OSError as error:
        raise DirectoryUnusable(
            f"cannot use {absolute} as a directory: {error.strerror or error}: mend that, or name"
            f" another directory in {setting}"
        ) from error
    try:
        check_ours(fd, path, setting, forbidden=0o022)
    except DirectoryUnusable:
        os.close(fd)
        raise
    return fd


def checked_path(absolute: str, setting: str, uid: int) -> str:
    """The path with no symlink above its last component.

    Raises DirectoryUnusable when others than ``uid`` and root could turn it elsewhere, OSError.
    """
    # Who owns / owns everything; in a user namespace that may be an unmapped uid.
    trusted = {0, uid, os.stat("/").st_uid}
    _check_ancestors(absolute, setting, trusted)
    above, name = os.path.split(absolute)
    path = os.path.join(os.path.realpath(above), name)
    _check_ancestors(path, setting, trusted)
    return path


def check_ours(fd: int, path: str, setting: str, *, forbidden: int, uid: int | None = None) -> None:
    """Raise DirectoryUnusable unless the directory is ours and has no ``forbidden`` mode.

    ``uid``: whose it must be, by default this process' user. Raises OSError when the disk fails.
    """
    status = os.fstat(fd)
    uid = os.geteuid() if uid is None else uid
    if status.st_uid != uid:
        raise DirectoryUnusable(
            f"{path} belongs to uid {status.st_uid}, not to uid {uid}, as whom swarmcache serves:"
            f" remove it, or name another directory in {setting}"
        )
    if status.st_mode & forbidden:
        raise DirectoryUnusable(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, so others could have put"
            f" something into it: look through it, then run chmod"
            f" {stat.S_IMODE(status.st_mode) & ~forbidden:04o} on it"
        )


def _check_ancestors(path: str, setting: str, trusted: Collection[int]) -> None:
    """Refuse a path that somebody else could turn elsewhere."""
    ancestor = path
    while ancestor != "/":
        ancestor = os.path.dirname(ancestor)
        status = os.lstat(ancestor)
        if status.st_uid not in trusted:
            raise DirectoryUnusable(
                f"{ancestor} belongs to uid {status.st_uid}, who could exchange {path}:"
                f" name another directory in {setting}"
            )
        if stat.S_ISLNK(status.st_mode):
            continue  # its own mode means nothing, and what it points to is checked as well
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise DirectoryUnusable(
                f"anybody may write into {ancestor} and so exchange {path}: run chmod o-w on it,"
                f" or name another directory in {setting}"
            )
