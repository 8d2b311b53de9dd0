"""A disk that fails: at the n-th call to the kernel, once or from then on.

A reference run counts the calls; then the same is run again for every call and every way in which
it can fail. See ``watched_disk`` for how a call gets here.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tests.watched_disk import Arguments, Do, Keywords

# Result codes of sqlite3.h.
SQLITE_FULL = 13
SQLITE_CANTOPEN = 14
SQLITE_IOERR = 10
_SQLITE_IOERR_KINDS = {
    "access": 13,
    "delete": 10,
    "file_size": 7,
    "read": 1,
    "shm_map": 21,
    "sync": 4,
    "truncate": 6,
    "write": 3,
}

# What needs room on the disk, or may need it.
_ALLOCATING = {
    "fallocate",
    "fsync",
    "ftruncate",
    "link",
    "makedirs",
    "mkdir",
    "pwrite",
    "rename",
    "setxattr",
    "sqlite_shm_map",
    "sqlite_sync",
    "sqlite_write",
    "syncfs",
    "write",
}
_CHANGING = _ALLOCATING | {
    "chmod",
    "fchmod",
    "removexattr",
    "rmdir",
    "unlink",
    "utime",
    "sqlite_delete",
    "sqlite_truncate",
}
_OPENING = {"listdir", "open", "scandir", "sqlite_open"}
_SHORT = {"pwrite", "write"}


@dataclass(frozen=True)
class Call:
    """One call of the reference run. ``stack``: the lines of swarmcache that led to it."""

    name: str
    makes_file: bool
    stack: tuple[tuple[str, int], ...]

    @staticmethod
    def of(name: str, arguments: Arguments) -> Call:
        flags = arguments[1] if name == "open" and len(arguments) > 1 else 0
        return Call(name, bool(flags & os.O_CREAT) or name == "sqlite_open", _stack())


def _stack() -> tuple[tuple[str, int], ...]:
    lines = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("swarmcache."):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


@dataclass(frozen=True)
class Fault:
    """A way in which calls fail: an errno, or a write that takes only half of the bytes.

    ``lasting``: so do all later calls that can fail in this way.
    """

    code: int
    lasting: bool = False

    def __str__(self) -> str:
        name = errno.errorcode[self.code] if self.code else "short write"
        return name + (" from then on" if self.lasting else "")

    def can_hit(self, call: Call) -> bool:
        match self.code:
            case 0:
                return call.name in _SHORT
            case errno.ENOSPC:
                return call.name in _ALLOCATING or call.makes_file
            case errno.EROFS:
                return call.name in _CHANGING or call.makes_file
            case errno.EMFILE:
                return call.name in _OPENING
            case _:
                return True


FAULTS = (
    *(Fault(code) for code in (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, 0)),
    *(Fault(code, lasting=True) for code in (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE)),
)


class CallCounter:
    """A watcher that only notes the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(self, name: str, arguments: Arguments, keywords: Keywords, do: Do) -> Any:
        self.calls.append(Call.of(name, arguments))
        return do(*arguments, **keywords)


class FaultyDisk:
    """A watcher that lets the n-th call fail (counted from 0)."""

    def __init__(self, number: int, fault: Fault) -> None:
        self._number = number
        self._fault = fault
        self._count = 0
        self.hit: Call | None = None

    def call(self, name: str, arguments: Arguments, keywords: Keywords, do: Do) -> Any:
        number, self._count = self._count, self._count + 1
        call = Call.of(name, arguments)
        due = number == self._number or (self._fault.lasting and number > self._number)
        if not (due and self._fault.can_hit(call)):
            return do(*arguments, **keywords)
        self.hit = self.hit or call
        if self._fault.code == 0:
            fd, data, *rest = arguments
            return do(fd, data[: (len(data) + 1) // 2], *rest, **keywords)
        if name.startswith("sqlite_"):
            return _sqlite_code(name.removeprefix("sqlite_"), self._fault.code)
        raise OSError(self._fault.code, os.strerror(self._fault.code))


class KilledAt:
    """A watcher that lets the process be killed just before the n-th call (counted from 0)."""

    def __init__(self, number: int) -> None:
        self._left = number

    def call(self, name: str, arguments: Arguments, keywords: Keywords, do: Do) -> Any:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1
        return do(*arguments, **keywords)


def _sqlite_code(what: str, code: int) -> int:
    """What the standard layer makes of an errno."""
    if what == "open":
        return SQLITE_CANTOPEN
    if code == errno.ENOSPC and what == "write":
        return SQLITE_FULL
    return SQLITE_IOERR | _SQLITE_IOERR_KINDS[what] << 8
