"""A thread that looks after the files at rest, from the start of the daemon to its end.

First it lists what the index does not know of, then it digests what is in doubt, both as fast as
may be. From then on it scrubs: it digests the copies one after the other, those first that were not
for the longest time, at so many bytes per second. How far it is needs no note of its own: it is the
order of ``verified_s`` in the index.

It finds rot that is there for whoever reads the file: bits that flip on the medium, a write that
went to the wrong place, a change by somebody who took care to leave no trace. It cannot see what
the page cache still hides (``quiet_read``), nor what the disk mends by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from swarmcache.disk import Cache
from swarmcache.errors import LocalError
from swarmcache.peer_events import PeerEvent, ReplicasRecovered

log = logging.getLogger(__name__)

# A copy is not digested more often than once a week. ZFS and btrfs are scrubbed once a month; what
# lies in a cache is seldom as old, and should be looked at once before it is given up.
SCRUB_AGE_S = 7 * 86400.0
# When there is nothing to do, or the disk fails: look again after this long.
PAUSE_S = 60.0
# Between two slices of listing, for those who wait for the lock or the interpreter.
BREATH_S = 0.002


class Stopped(Exception):
    """The daemon ends: leave off in the middle of a file."""


class Scrubber:
    """The thread. ``start`` it, and ``stop`` it before the cache is closed."""

    def __init__(
        self,
        cache: Cache,
        rate_bytes_per_s: int | None,
        tell: Callable[[PeerEvent], None],
        look_at_damaged: Callable[[], object],
    ) -> None:
        """``rate_bytes_per_s``: None is no scrubbing.

        Both functions are called in the thread: ``tell`` tells the machine, ``look_at_damaged``
        that there may be something in ``Cache.take_damaged``.
        """
        self._cache = cache
        self._rate_bytes_per_s = rate_bytes_per_s
        self._tell = tell
        self._look_at_damaged = look_at_damaged
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub")
        self._due_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended, which takes no longer than digesting one piece."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def go_on(self, size_bytes: int) -> None:
        """After a piece was digested: raises Stopped when the daemon ends. For any thread."""
        if self._stopping.is_set():
            raise Stopped

    def _run(self) -> None:
        try:
            while not self._settle_doubts():
                self._wait(PAUSE_S)
            while self._rate_bytes_per_s is not None:
                if not self._scrub_one():
                    self._wait(PAUSE_S)
        except Stopped:
            pass  # as asked
        except Exception:
            log.exception("files at rest are no longer looked after")  # a bug of ours

    def _settle_doubts(self) -> bool:
        """False when it has to be done again: until then there is little room to give out."""
        try:
            for _ in self._cache.list_objects():
                self._wait(BREATH_S)
            for version_ids in self._cache.recover_undurable(self.go_on):
                self._look_at_damaged()
                if version_ids:
                    self._tell(ReplicasRecovered(version_ids))
        except LocalError as error:
            log.error("cannot look after copies in doubt, and will try again: %s", error)
            return False
        return True

    def _scrub_one(self) -> bool:
        """False when there is nothing to do just now."""
        try:
            version_id = self._cache.stalest(time.time() - SCRUB_AGE_S)
            if version_id is None:
                return False
            self._due_s = time.monotonic()
            self._cache.verify(version_id, self._pace)
        except LocalError as error:
            log.error("cannot check the files at rest: %s", error)
            return False
        self._look_at_damaged()
        return True

    def _pace(self, size_bytes: int) -> None:
        assert self._rate_bytes_per_s is not None, "scrubbing without a rate"
        self._due_s += size_bytes / self._rate_bytes_per_s
        self._wait(self._due_s - time.monotonic())

    def _wait(self, wait_s: float) -> None:
        if self._stopping.wait(max(wait_s, 0.0)):
            raise Stopped
