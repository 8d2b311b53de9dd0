"""What ``swarmcache cf`` does besides getting one file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from swarmcache.bundles import NoBundle
from swarmcache.cf_config import CfConfig
from swarmcache.cf_talk import say, say_not_connected, show
from swarmcache.client import Client, real_path_of
from swarmcache.errors import BadMessage, DaemonRefused, DaemonUnavailable, SwarmcacheError
from swarmcache.local_socket import reason_of
from swarmcache.locate import FileLocations, locate, own_path
from swarmcache.locations import OUTPUTS_DIRECTORY, default_output_dir

EXIT_FAILED = 1


# --- -l ------------------------------------------------------------------------------------------


def show_locations(
    client: Client, asked: Sequence[bytes], limit: int | None, bundle: bool | None
) -> int:
    """Print ``HOST:PATH:SIZE`` of every verified copy. 1 where one FILE cannot be told about.

    Raises OSError for stdout.
    """
    found = 0
    complete = True
    for name in asked:
        real_path = real_path_of(name)
        say(f"LOG: request: {os.fsdecode(real_path)}")
        if not os.path.isfile(real_path):
            say(f"ERROR: file not found '{os.fsdecode(real_path)}'")
            complete = False
            continue
        try:
            for file in locate(
                client, [real_path], limit, lambda text: say(f"WARN: {text}"), bundle
            ):
                complete &= _show_replicas(file)
                found += len(file.replicas)
        except DaemonUnavailable as error:
            say_not_connected(str(error))
            complete = False
            break
        except (BadMessage, DaemonRefused, NoBundle) as error:
            say(f"ERROR: {error}")
            complete = False
    say(f"LOG: {found} locations found")
    return 0 if complete else EXIT_FAILED


def _show_replicas(file: FileLocations) -> bool:
    """Print the copies of one file. Whether that is all there is to know."""
    for replica in file.replicas:
        show(b"%s:%s:%d" % (os.fsencode(replica.node), replica.path, replica.size_bytes))
    if not file.readable:
        say(f"ERROR: cannot read '{os.fsdecode(file.path)}': {file.reason}")
    elif file.reason:
        say(f"ERROR: {file.reason}")
    return not file.reason


# --- -d ------------------------------------------------------------------------------------------


def show_destination(client: Client, asked: bytes, config: CfConfig) -> int:
    """Print a path on this node's disk for a file that a job writes and ``-cp`` brings back.

    It is the real path that the file will have, below a directory for such files. Among the copies
    it would be in the way of the copy that it becomes, and could not be written a second time.
    Raises OSError for stdout.
    """
    real_path = real_path_of(asked)
    try:
        path = _output_path(client, real_path, config)
    except (OSError, ValueError, SwarmcacheError) as error:
        reason = str(error) if isinstance(error, SwarmcacheError) else reason_of(error)
        say(f"ERROR: no directory for it on this node: {reason}")
        say("LOG: no local cache available")
        path = real_path
    show(path)
    return 0


def _output_path(client: Client, real_path: bytes, config: CfConfig) -> bytes:
    """Make the directories for an output. Raises OSError, ValueError, SwarmcacheError."""
    base = config.cache_dir
    if base is None:
        try:
            return own_path(client, b"/" + os.fsencode(OUTPUTS_DIRECTORY) + real_path)
        except (DaemonUnavailable, DaemonRefused):
            base = default_output_dir(os.geteuid())
    _make_base(base)
    path = os.fsencode(base).rstrip(b"/") + real_path
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    return path


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
