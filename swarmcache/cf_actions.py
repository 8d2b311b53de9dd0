"""What ``swarmcache cf`` does besides getting one file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from swarmcache.cf_config import CfConfig
from swarmcache.cf_talk import say, show
from swarmcache.client import real_path_of
from swarmcache.local_socket import reason_of
from swarmcache.locations import default_output_dir

EXIT_FAILED = 1


# --- -d ------------------------------------------------------------------------------------------


def show_destination(asked: bytes, config: CfConfig) -> int:
    """Print a path on this node's disk for a file that a job writes and ``-cp`` brings back.

    The file lies in a directory of the user's own, not among the cached copies, which nobody may
    write; its path in there is the real path that it will have. Raises OSError for stdout only.
    """
    real_path = real_path_of(asked)
    base = config.cache_dir or default_output_dir(os.geteuid())
    path = os.fsencode(base).rstrip(b"/") + real_path
    try:
        _make_base(base)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    except (OSError, ValueError) as error:
        say(f"ERROR: cannot make a directory in {base}: {reason_of(error)}")
        say("LOG: no local cache available")
        path = real_path
    show(path)
    return 0


def _make_base(base: str) -> None:
    """Make the directory, or see that nobody else has, in a place like /var/tmp.

    Raises OSError, and ValueError for a directory in which others could put links in our way.
    """
    path = Path(base)
    for directory in reversed([path, *path.parents]):
        if not directory.is_dir():
            directory.mkdir(mode=0o700, exist_ok=True)
    path = path.resolve(strict=True)
    for directory in (path, *path.parents):
        found = directory.stat()
        if found.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"{directory} belongs to user {found.st_uid}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            raise ValueError(f"{directory} may be written by others")
