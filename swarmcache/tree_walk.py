"""Walking through a directory tree that anybody may have made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

# Each level takes a descriptor, of which a process has 1,024, and a frame of Python's stack, which
# has 1,000. Who nests directories deeper does so to break programs like this one.
DEPTH_MAX = 256


def walk(
    top: str, onerror: Callable[[OSError], None], dir_fd: int | None = None
) -> Iterator[tuple[str, list[str], list[str], int]]:
    """As ``os.fwalk``, without following links, and no deeper than ``DEPTH_MAX``.

    ``onerror`` hears of directories that cannot be listed, and, with ENAMETOOLONG, of those that
    are too deep. Raises OSError for ``top``.
    """
    depth = top.count("/")
    for path, directories, names, fd in os.fwalk(
        top, onerror=onerror, follow_symlinks=False, dir_fd=dir_fd
    ):
        if directories and path.count("/") - depth >= DEPTH_MAX:
            told = f"directories are nested more than {DEPTH_MAX} deep"
            onerror(OSError(errno.ENAMETOOLONG, told, path))
            directories.clear()
        yield path, directories, names, fd
