"""Files of a shared file server, from a verified copy on this node's own disk.

    import swarmcache

    path = swarmcache.get("/nfs/corpus/train.hdf")  # the copy, or the original path
    paths = swarmcache.get_many(["/nfs/corpus/a", "/nfs/corpus/b"])

    with swarmcache.Client() as client:
        with client.hold("/nfs/corpus/dev.hdf", strict=True) as local:
            ...  # the copy is there, and not evicted as long as the block runs

    async with swarmcache.aio.Client() as client:
        path = await client.get("/nfs/corpus/train.hdf")

Paths are ``str``, ``bytes`` or ``os.PathLike``. Nothing is imported before it is used, for every
``swarmcache get`` in a shell waits for this file as well.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from swarmcache import aio
    from swarmcache.api import Client, cp, get, get_many, hold, locate
    from swarmcache.errors import (
        CopyFailed,
        DaemonRefused,
        DaemonUnavailable,
        NotCached,
        SourceUnreadable,
        SwarmcacheError,
    )
    from swarmcache.exchanges import Answer, Progress
    from swarmcache.held import Hold
    from swarmcache.locate import FileLocations, Replica

__all__ = [
    "Answer",
    "Client",
    "CopyFailed",
    "DaemonRefused",
    "DaemonUnavailable",
    "FileLocations",
    "Hold",
    "NotCached",
    "Progress",
    "Replica",
    "SourceUnreadable",
    "SwarmcacheError",
    "aio",
    "cp",
    "get",
    "get_many",
    "hold",
    "locate",
]

_MODULES = {
    "api": ("Client", "cp", "get", "get_many", "hold", "locate"),
    "exchanges": ("Answer", "Progress"),
    "held": ("Hold",),
    "locate": ("FileLocations", "Replica"),
}


def __getattr__(name: str) -> object:
    """What ``__all__`` lists, when it is used for the first time (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "aio":
        return import_module("swarmcache.aio")
    module = next((module for module, names in _MODULES.items() if name in names), "errors")
    value = getattr(import_module(f"swarmcache.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(type(sys)):  # type: ignore[misc]  # the type of modules
    """Some modules are called like the functions. Importing one must not hide the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES["api"] and isinstance(value, type(sys))):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
