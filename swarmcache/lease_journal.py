"""Which leases may still be out, and when the tracker was last there: what a restarted tracker must
know and cannot ask.

A file of lines, appended to before a node is told of its lease. Nothing is synced: the file
protects against the end of the process, not of the machine; a file from before the last boot, like
one that cannot be read, counts as "some lease may be out".
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path

from swarmcache.clock import now_s

log = logging.getLogger(__name__)

COMPACT_BYTES = 1 << 20
# A lease of nobody, that nobody can announce again: makes the tracker wait until all have run out.
UNKNOWN_LEASE_ID = 0
UNKNOWN_NODE = "?"


class LeaseJournal:
    """The journal in the tracker's state directory, which is made if need be.

    ``earlier``: lease id -> node of the leases that may still be out. ``first_lease_id``: larger
    than every id that was ever used. ``away_s``: since when there was no tracker; None if there
    never was one, infinite if nobody knows. Raises OSError when the directory cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self._path = state_dir / "leases"
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._present_s = -math.inf
        self.away_s: float | None = None
        self.earlier = self._read()
        # The wall clock in microseconds grows faster than leases are granted.
        self.first_lease_id = max([time.time_ns() // 1000, *(item + 1 for item in self.earlier)])
        self._out = dict(self.earlier)
        self._fd = -1
        self._size_bytes = 0
        self._compact()

    def grant(self, lease_id: int, node: str) -> None:
        """Note a lease before its node is told."""
        self._out[lease_id] = node
        self._append(f"grant {lease_id} {node}\n")

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
        self._compact()
        os.close(self._fd)

    def _append(self, line: str) -> None:
        data = os.fsencode(line)
        os.write(self._fd, data)
        self._size_bytes += len(data)
        if self._size_bytes > COMPACT_BYTES:
            self._compact()

    def _compact(self) -> None:
        """Write the leases that are out to a new file, and put it in the place of the old one."""
        lines = [f"boot {self._boot_id}\n"]
        if self._present_s > -math.inf:
            lines.append(f"present {self._present_s:.3f}\n")
        lines += [f"grant {lease_id} {node}\n" for lease_id, node in self._out.items()]
        data = os.fsencode("".join(lines))
        beside = self._path.with_suffix(".new")
        fd = os.open(
            beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        os.write(fd, data)
        os.replace(beside, self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size_bytes = len(data)

    def _read(self) -> dict[int, str]:
        try:
            text = os.fsdecode(self._path.read_bytes())
        except FileNotFoundError:
            self._present_s = now_s()
            return {}
        lines = text.splitlines()
        out: dict[int, str] = {}
        # A line without an end is the beginning of one: "end 1" may have been "end 17".
        known = text.endswith("\n") and lines[0] == f"boot {self._boot_id}"
        if lines and not text.endswith("\n"):
            lines.pop()
        for line in lines[1:]:
            match line.split(" "):
                case ["grant", number, node] if number.isdecimal():
                    out[int(number)] = node
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
