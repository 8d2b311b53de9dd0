"""How fast threads may move bytes."""

from __future__ import annotations

import threading
import time

RATE_PIECES_PER_S = 10  # with a rate limit, bytes move in about so many pieces a second
RATE_PIECE_MIN_BYTES = 4096


class RateLimit:
    """Paces threads so that together they move ``bytes_per_s``; None is no limit."""

    def __init__(self, bytes_per_s: float | None) -> None:
        assert bytes_per_s is None or bytes_per_s > 0, "a rate is positive, or None for no limit"
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def piece_bytes(self, size_bytes: int) -> int:
        """How many of these bytes to move at a time, so that the pace is even."""
        if self._bytes_per_s is None:
            return size_bytes
        return min(
            size_bytes, max(int(self._bytes_per_s / RATE_PIECES_PER_S), RATE_PIECE_MIN_BYTES)
        )

    def wait_for(self, size_bytes: int) -> None:
        """Sleep until so many bytes may move (in the order of calls), or until ``stop``."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = time.monotonic()
            start_s = max(self._free_at_s, now_s)
            self._free_at_s = start_s + size_bytes / self._bytes_per_s
        if start_s > now_s:
            self._stopped.wait(start_s - now_s)

    def stop(self) -> None:
        """Wake all sleepers; from now on nobody sleeps."""
        self._stopped.set()
