"""Walking through a directory tree that anybody may have made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

# Each level takes a descriptor, of which a process has 1,024, and a frame of Python's stack, which
# has 1,000. Who nests directories deeper does so to break programs like this one.
DEPTH_MAX = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def walk(
    top: str, onerror: Callable[[OSError], None], dir_fd: int | None = None
) -> Iterator[tuple[str, list[str], list[str], int]]:
    """As ``os.fwalk``, without following links, and no deeper than ``DEPTH_MAX``.

    ``onerror`` hears of directories that cannot be listed, and, with ENAMETOOLONG, of those that
    are too deep; ``filename`` is their path, as it begins with ``top``. What is gone when its turn
    comes is left out. Links are among the files. Raises OSError for ``top``.
    """
    fd = os.open(top, _DIRECTORY, dir_fd=dir_fd)
    try:
        yield from _walk(fd, top, onerror, 0, *_list(fd))
    finally:
        os.close(fd)


def _walk(
    fd: int,
    path: str,
    onerror: Callable[[OSError], None],
    depth: int,
    directories: list[str],
    names: list[str],
) -> Iterator[tuple[str, list[str], list[str], int]]:
    if directories and depth >= DEPTH_MAX:
        told = f"directories are nested more than {DEPTH_MAX} deep"
        onerror(OSError(errno.ENAMETOOLONG, told, path))
        directories.clear()
    yield path, directories, names, fd
    for name in directories:
        below = os.path.join(path, name)
        below_fd = -1
        try:
            try:
                below_fd = os.open(name, _DIRECTORY, dir_fd=fd)
                listed = _list(below_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                error.filename = below
                onerror(error)
                continue
            yield from _walk(below_fd, below, onerror, depth + 1, *listed)
        finally:
            if below_fd >= 0:
                os.close(below_fd)


def _list(fd: int) -> tuple[list[str], list[str]]:
    """The names of directories and of files. Raises OSError."""
    directories: list[str] = []
    names: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            (directories if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
    return directories, names
