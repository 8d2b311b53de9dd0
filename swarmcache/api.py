"""The Python API: ``swarmcache.Client``, and functions for programs that need none of their own.

    import swarmcache

    path = swarmcache.get("/nfs/corpus/train.hdf")

The functions share one client, which finds the daemon as ``swarmcache get`` does. They are safe to
call from many threads and in forked children.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable

from swarmcache import client
from swarmcache.errors import CopyFailed
from swarmcache.held import Hold

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from swarmcache.locate import FileLocations

AnyPath = str | bytes | os.PathLike[str]


class Client(client.Client):
    """Talks to this machine's daemon; see ``client.Client``. With what few jobs need besides."""

    def cp(self, source: AnyPath, destination: AnyPath, *, register: bool = True) -> str:
        """Copy a file to a file server, under its slots, all or nothing; where it is now.

        ``destination`` is a file, or a directory that gets the file under its own name.
        ``register``: whether this node has a replica of it afterwards. Raises CopyFailed; then the
        destination is as it was.
        """
        from swarmcache.cp import copy_files

        sources = [os.fsencode(source)]
        (outcome,) = copy_files(
            self, sources, os.fsencode(destination), bundle=False, register=register
        )
        if outcome.error:
            raise CopyFailed(f"{os.fsdecode(source)!r} was not copied: {outcome.error}")
        return os.fsdecode(outcome.destination)

    def locate(
        self, paths: AnyPath | Iterable[AnyPath], limit: int | None = None
    ) -> list[FileLocations]:
        """On which nodes files are, and where there; a directory stands for the files in it.

        ``limit``: of each file no more replicas. Raises DaemonUnavailable, DaemonRefused.
        """
        from swarmcache.locate import locate

        some = [paths] if isinstance(paths, str | bytes | os.PathLike) else paths
        return list(locate(self, [os.fsencode(path) for path in some], limit))


_client = Client()
atexit.register(_client.close)


def get(path: AnyPath, timeout_s: float | None = None, *, strict: bool = False) -> str:
    """Cache a file or directory, and return the path to use: that of the verified copy.

    Where there can be no copy, or none within ``timeout_s``, it is the real path of the source,
    whether that exists or not; with ``strict``, SourceUnreadable or NotCached is raised instead,
    whose text says why.
    """
    return _client.get(path, timeout_s, strict=strict)


def get_many(
    paths: Iterable[AnyPath], timeout_s: float | None = None, *, strict: bool = False
) -> list[str]:
    """``get`` for many, in their order; several times as fast as one after the other.

    ``timeout_s`` is for all of them together.
    """
    return [*_client.get_many(paths, timeout_s, strict=strict)]


def hold(path: AnyPath, timeout_s: float | None = None, *, strict: bool = False) -> Hold:
    """``with hold(path) as local:`` caches a file and keeps the copy until the block ends.

    See ``Client.hold``.
    """
    return _client.hold(path, timeout_s, strict=strict)


def cp(source: AnyPath, destination: AnyPath, *, register: bool = True) -> str:
    """Copy a file to a file server; see ``Client.cp``. Raises CopyFailed."""
    return _client.cp(source, destination, register=register)


def locate(paths: AnyPath | Iterable[AnyPath], limit: int | None = None) -> list[FileLocations]:
    """On which nodes files are; see ``Client.locate``."""
    return _client.locate(paths, limit)
