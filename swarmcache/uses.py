"""Which replicas the daemon itself has handed out lately, or keeps for somebody.

Invariant: a replica that is leaving is not handed out, and one that was handed out or is held
does not begin to leave. ``note_used`` and ``leave`` exclude one another, whatever threads they run
in; neither ever waits for the disk.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping


class Uses:
    """Times of last use that are not in the index yet, holds, and what is just leaving."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used_s: dict[bytes, float] = {}
        self._held: Counter[bytes] = Counter()
        self._leaving: set[bytes] = set()

    def note_used(self, version_id: bytes, now_s: float) -> bool:
        """The replica, if there is one, is handed out now. False when it must not be any more."""
        with self._lock:
            if version_id in self._leaving:
                return False
            self._used_s[version_id] = now_s
            return True

    def used_s(self, version_id: bytes) -> float:
        """When it was last handed out, as far as the index does not know yet; 0 if it knows."""
        with self._lock:
            return self._used_s.get(version_id, 0.0)

    def hold(self, version_id: bytes) -> None:
        """Keep the file version, whether it is here already or not, until ``release``."""
        with self._lock:
            self._held[version_id] += 1

    def release(self, version_id: bytes) -> None:
        """Ends one ``hold``."""
        with self._lock:
            assert self._held[version_id] > 0, "released more often than held"
            self._held[version_id] -= 1
            if not self._held[version_id]:
                del self._held[version_id]

    def held(self, version_id: bytes) -> bool:
        with self._lock:
            return version_id in self._held

    def leave(self, version_id: bytes, newest_s: float) -> bool:
        """Stop handing out a replica, until ``left``. False when it is held, or in newer use."""
        with self._lock:
            if version_id in self._held or self._used_s.get(version_id, 0.0) > newest_s:
                return False
            self._leaving.add(version_id)
            return True

    def leaving(self, version_id: bytes) -> bool:
        """Whether the replica is on its way out."""
        with self._lock:
            return version_id in self._leaving

    def left(self, version_id: bytes) -> None:
        """The replica is gone, or stays after all."""
        with self._lock:
            self._leaving.discard(version_id)

    def flush(self, write: Callable[[Mapping[bytes, float]], None]) -> None:
        """Let ``write`` put the times into the index. What it raises is raised; they are kept then.

        Each time can be found either here or in the index, at every moment.
        """
        with self._lock:
            noted = dict(self._used_s)
        if not noted:
            return
        write(noted)
        with self._lock:
            for version_id, used_s in noted.items():
                if self._used_s.get(version_id) == used_s:
                    del self._used_s[version_id]
