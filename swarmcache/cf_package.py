"""The Python package ``cache-manager`` for programs that import CacheManager's.

    import importlib, sys
    sys.path += ["/usr/local/", "/usr/local/cache-manager/"]
    cm = importlib.import_module("cache-manager")
    path = cm.cacheFile("/nfs/corpus/train.hdf")

``swarmcache install-cf`` copies this file to ``PREFIX/cache-manager/__init__.py``. Its callers run
in Python environments of their own, often older ones, without swarmcache; so it uses the standard
library only, is written for Python 3.8, and asks the ``cf`` that lies beside it. Names are those
that its callers know.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypeVar

    Name = TypeVar("Name", str, bytes)

__all__ = [
    "ClientConfiguration",
    "CmClient",
    "LogLevel",
    "cacheFile",
    "copyFile",
]

_DIRECTORY = os.path.dirname(os.path.abspath(__file__))
_CF = os.path.join(_DIRECTORY, "cf")
# Host, path and size in bytes; a path may have ends of lines in it.
_LOCATION = re.compile(rb"([^:]*):(.*?):([0-9]+)\n", re.DOTALL)


class LogLevel:
    """How much ``cf`` tells on stderr. Quiet: nothing; normal: what it does; debug: more."""

    QUIET, NORMAL, DEBUG = 0, 1, 2
    _level: int = NORMAL

    @classmethod
    def set(cls, level: int) -> None:
        cls._level = level

    @classmethod
    def get(cls) -> int:
        return cls._level

    @classmethod
    def enableDebug(cls) -> None:
        cls._level = cls.DEBUG


def _run(
    options: list[str],
    names: Iterable[str | bytes],
    verbose: bool = True,
    strict: bool = False,
) -> tuple[int, bytes]:
    """Run ``cf`` and return its exit code and what it printed. Raises OSError."""
    if LogLevel.get() >= LogLevel.DEBUG:
        options = ["--debug", *options]
    environment = dict(os.environ)
    if strict:
        environment["SWARMCACHE_CF__STRICT"] = "true"
    quiet = not verbose or LogLevel.get() <= LogLevel.QUIET
    process = subprocess.Popen(
        [_CF, *options, "--", *(os.fsencode(name) for name in names)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        env=environment,
    )
    printed, _ = process.communicate()
    return process.returncode, printed


def _path(printed: bytes, otherwise: Name) -> Name:
    """The path that ``cf`` has printed, of the type that the caller's has."""
    path = printed[:-1] if printed.endswith(b"\n") else printed
    if not path:
        return otherwise
    if isinstance(otherwise, bytes):
        return path
    return os.fsdecode(path)


def cacheFile(filename: Name, verbose: bool = True) -> Name:
    """The path of a local copy, or the original one where there is none. Raises nothing."""
    try:
        return _path(_run([], [filename], verbose)[1], filename)
    except (OSError, ValueError) as error:  # no cf here; a NUL in the name
        _complain(error)
        return filename


def copyFile(src: str | bytes, dst: str | bytes, verbose: bool = True) -> bool:
    """Copy a file to a file server. True where that is done. Raises nothing."""
    try:
        return _run(["-cp"], [src, dst], verbose)[0] == 0
    except (OSError, ValueError) as error:
        _complain(error)
        return False


def _complain(error: Exception) -> None:
    sys.stderr.write(f"ERROR: {error}\n")


class ClientConfiguration:
    """Where the old client's settings are: in a file, or in ``~/.cmclient``."""

    def __init__(self, filename: str | None = None) -> None:
        self.filename = filename

    def loadDefault(self) -> bool:
        self.filename = None
        return True

    def options(self) -> list[str]:
        """What tells ``cf`` of it."""
        return [] if self.filename is None else ["--config", os.fspath(self.filename)]


class CmClient:
    """Gets and copies files. ``single`` is accepted: there is no connection to be kept."""

    def __init__(self, config: ClientConfiguration | None = None, single: bool = True) -> None:
        self._config = config if config is not None else ClientConfiguration()
        self.single = single

    def isConnected(self) -> bool:
        """Whether a daemon answers on this machine."""
        return self._ask(["--ping"], [])[0] == 0

    def fetch(
        self,
        filename: Name,
        forceBundle: bool = False,
        conjunct: bool = False,
        locateLimit: int = -1,
    ) -> tuple[Name, bool]:
        """The path to use, and whether it is a cached one. ``locateLimit`` has no meaning."""
        options = ["--bundle"] if forceBundle else []
        options += ["--conjunct"] if conjunct else []
        code, printed = self._ask(options, [filename], strict=True)
        return _path(printed, filename), code == 0

    def getLocations(
        self,
        files: Iterable[str | bytes],
        locations: list[tuple[str, str, int]],
        forceBundle: bool = False,
        limit: int = -1,
    ) -> bool:
        """Append (host, path, size in bytes) of each copy to a list. False where a file is missing.

        ``limit``: the most copies of each file; 0 or less stands for all of them.
        """
        options = ["--bundle"] if forceBundle else []
        code, printed = self._ask([*options, "-ll", str(max(0, limit))], files)
        for host, path, size_bytes in _LOCATION.findall(printed):
            locations.append((os.fsdecode(host), os.fsdecode(path), int(size_bytes)))
        return code == 0

    def copy(
        self,
        src: str | bytes,
        dst: str | bytes,
        register: bool = True,
        forceBundle: bool = False,
    ) -> bool:
        """Copy a file to a file server. True where that is done."""
        options = ["-cp"]
        options += [] if register else ["-n"]
        options += ["--bundle"] if forceBundle else []
        return self._ask(options, [src, dst])[0] == 0

    def getDestination(self, fs: str, filename: Name) -> Name:
        """Where a local file may be written. ``fs``, the file server, makes no difference."""
        return _path(self._ask(["-d"], [filename])[1], filename)

    def _ask(
        self, options: Sequence[str], names: Iterable[str | bytes], strict: bool = False
    ) -> tuple[int, bytes]:
        try:
            return _run([*self._config.options(), *options], names, strict=strict)
        except (OSError, ValueError) as error:
            _complain(error)
            return 127, b""
