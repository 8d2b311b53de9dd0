"""Which leases may still be out, and when the tracker was last there: what a restarted tracker must
know and cannot ask.

A file of lines, appended to before a node is told of its lease. Nothing is synced: the file
protects against the end of the process, not of the machine; a file from before the last boot, like
one that cannot be read, counts as "some lease may be out".

So does an empty one, and that is what is left where nothing can be written: on a full disk leases
are granted as ever, but before the node is told of one that is missing in the file, the file is
emptied, which needs no room. So a tracker that is started anew waits until all have run out. Where
the disk does not even take that, the file still names the time when the tracker was last there, and
who is started more than ``handover.AWAY_MAX_S`` later waits for that reason. Who is started sooner
must be able to write the file, or is no tracker: only a disk that fails and works again within
these two seconds, with a restart between, could make a tracker forget a lease.

Two trackers with one directory would put their files in each other's place, and the leases that one
of them goes on to grant would be in a file without a name. So the first one has a lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from swarmcache.clock import now_s
from swarmcache.disk_calls import disk_errors, unlink_if_there
from swarmcache.errors import DirectoryUnusable
from swarmcache.own_directory import open_own_directory

log = logging.getLogger(__name__)

COMPACT_BYTES = 1 << 20
_NAME = "leases"
_NEW = "leases.new"  # becomes the file when it is complete
_LOCK = "lock"
# A lease of nobody, that nobody can announce again: makes the tracker wait until all have run out.
UNKNOWN_LEASE_ID = 0
UNKNOWN_NODE = "?"


class LeaseJournal:
    """The journal in the tracker's state directory, which is made if need be.

    ``earlier``: lease id -> node of the leases that may still be out. ``first_lease_id``: larger
    than every id that was ever used. ``away_s``: since when there was no tracker; None if there
    never was one, infinite if nobody knows. Raises LocalError when the directory cannot be used,
    another tracker uses it, or somebody else could have prepared it; later a failure to write is
    logged, and raises nothing.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _NAME
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._present_s = -math.inf
        self.away_s: float | None = None
        self._fd = -1
        self._size_bytes = 0
        self._failed = False  # the file is emptied, and to be written as a whole
        with ExitStack() as stack:
            self._directory_fd = open_own_directory(state_dir, "tracker.state_dir")
            stack.callback(os.close, self._directory_fd)
            with disk_errors(f"use {self._path}"):
                self._lock_fd = self._lock(state_dir)
                stack.callback(os.close, self._lock_fd)
                self.earlier = self._read()
                self._out = dict(self.earlier)
                self._compact()
            stack.pop_all()
        # The wall clock in microseconds grows faster than leases are granted.
        self.first_lease_id = max([time.time_ns() // 1000, *(item + 1 for item in self.earlier)])

    def grant(self, lease_id: int, node: str) -> None:
        """Note a lease before its node is told."""
        self._out[lease_id] = node
        self._append(_grant_line(lease_id, node))

    def end(self, lease_id: int) -> None:
        """The lease has ended."""
        self._out.pop(lease_id, None)
        self._append(f"end {lease_id}\n")

    def present(self) -> None:
        """The tracker is there."""
        self._present_s = now_s()
        self._append(f"present {self._present_s:.3f}\n")

    def close(self) -> None:
        """Close the file, short."""
        with self._emptied_on_failure():
            self._compact()
        os.close(self._fd)
        os.close(self._directory_fd)
        os.close(self._lock_fd)

    def _lock(self, state_dir: Path) -> int:
        """A descriptor that has the lock, for as long as it is open. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_LOCK, flags, 0o600, dir_fd=self._directory_fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise DirectoryUnusable(
                f"another tracker uses {state_dir}: stop it, or name another directory in"
                " tracker.state_dir"
            ) from error
        except OSError:
            os.close(fd)
            raise
        return fd

    def _append(self, line: str) -> None:
        """Write down what is known already, so that a new file may take the place of the line."""
        data = os.fsencode(line)
        with self._emptied_on_failure():
            if self._failed or self._size_bytes + len(data) > COMPACT_BYTES:
                self._compact()
            else:
                _write(self._fd, data)
                self._size_bytes += len(data)

    @contextmanager
    def _emptied_on_failure(self) -> Iterator[None]:
        """Where writing fails, leave nothing that the next tracker would rely on."""
        try:
            yield
        except OSError as error:
            with suppress(OSError):  # tried again with the next line
                os.ftruncate(self._fd, 0)
            if not self._failed:
                log.error(
                    "cannot write %s: %s; leases are granted as ever, but a tracker that is started"
                    " anew meanwhile waits until all have run out",
                    self._path,
                    error,
                )
            self._failed = True
        else:
            if self._failed:
                log.warning("%s is written again", self._path)
            self._failed = False

    def _compact(self) -> None:
        """Write the leases that are out to a new file, and put it in the place of the old one."""
        lines = [f"boot {self._boot_id}\n"]
        if self._present_s > -math.inf:
            lines.append(f"present {self._present_s:.3f}\n")
        lines += [_grant_line(*lease) for lease in self._out.items()]
        data = os.fsencode("".join(lines))
        unlink_if_there(_NEW, self._directory_fd)  # of one that was killed, or found no room
        # Whatever else is in its place, a link even, is not written to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(_NEW, flags, 0o600, dir_fd=self._directory_fd)
        try:
            _write(fd, data)
            os.replace(_NEW, _NAME, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        except OSError:
            os.close(fd)
            raise
        old_fd, self._fd = self._fd, fd  # a close that fails has closed as well
        self._size_bytes = len(data)
        if old_fd >= 0:
            os.close(old_fd)

    def _read(self) -> dict[int, str]:
        try:
            fd = os.open(
                _NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd
            )
        except FileNotFoundError:
            self._present_s = now_s()
            return {}
        with open(fd, "rb") as file:
            text = os.fsdecode(file.read())
        lines = text.splitlines()
        out: dict[int, str] = {}
        # A line without an end is the beginning of one: "end 1" may have been "end 17".
        known = text.endswith("\n") and lines[0] == f"boot {self._boot_id}"
        if lines and not text.endswith("\n"):
            lines.pop()
        for line in lines[1:]:
            match line.split(" "):
                case ["grant", number, node] if number.isdecimal():
                    out[int(number)] = unquote(node)
                case ["end", number] if number.isdecimal():
                    out.pop(int(number), None)
                case ["present", at_s] if at_s.replace(".", "", 1).isdecimal():
                    self._present_s = float(at_s)
                case _:
                    known = False
        self.away_s = now_s() - self._present_s if known else math.inf
        if not known:
            self._present_s = -math.inf
            log.warning("%s is damaged or from before the last boot; waiting", self._path)
            out[UNKNOWN_LEASE_ID] = UNKNOWN_NODE
        return out


def _grant_line(lease_id: int, node: str) -> str:
    """Nodes call themselves what they like: no name may be several words, or lines."""
    return f"grant {lease_id} {quote(node, safe=':[]')}\n"


def _write(fd: int, data: bytes) -> None:
    """Write all of it. Raises OSError, also where only the beginning finds room."""
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
