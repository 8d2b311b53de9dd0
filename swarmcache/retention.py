"""Takes replicas away that nobody has used for ``cache.max_age``, in one cache directory.

Used is what the daemon handed out, or what a process has open or has read, as eviction sees it;
what is pinned, held or being served stays, and the tracker is told before a copy goes.

How long that is says the wall clock, as long as nobody sets it (``steady_clock``). Every few
seconds it is looked at, so that no use is noted by a wrong time without our knowing. When it was
set, everything that is here counts as used then.
"""

from __future__ import annotations

import logging
import threading

from swarmcache.cache_index import CacheIndex
from swarmcache.errors import NoSpace
from swarmcache.evictor import Evictor
from swarmcache.steady_clock import ClockReading, read_clock, unused_since_s
from swarmcache.uses import Uses

log = logging.getLogger(__name__)

# A pass takes away at most so many files: a tenth of a second on a fast disk, and the other work
# of a disk thread waits for no longer than a few of these.
FILES_MAX = 256
# Passes begin so often; also how old the last look at the clock may be after a kill.
PASS_S = 3600.0


class Retention:
    """``look_at_clock`` every few seconds, ``drop_unused`` every now and then. Thread-safe."""

    def __init__(
        self, index: CacheIndex, uses: Uses, evictor: Evictor, boot_id: bytes, max_age_s: float
    ) -> None:
        self._index = index
        self._uses = uses
        self._evictor = evictor
        self._boot_id = boot_id
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._reading: ClockReading | None = None
        self._noted: ClockReading | None = None  # in the index

    def look_at_clock(self, wall_s: float, up_s: float) -> ClockReading:
        """``wall_s``: since the epoch; ``up_s``: since the boot. Raises LocalError."""
        with self._lock:
            former = self._reading or self._index.clock()
            reading = read_clock(former, wall_s, up_s, self._boot_id, self._max_age_s)
            was_set = former is not None and reading.steady_since_s != former.steady_since_s
            if was_set:
                log.warning(
                    "the clock was set, or the machine was off for long: for cache.max_age all that"
                    " is cached counts as used now"
                )
                self._uses.flush(self._index.touch)
                self._index.limit_uses(wall_s)
            if was_set or self._noted is None or wall_s >= self._noted.wall_s + PASS_S:
                self._note(reading)
            self._reading = reading
            return reading

    def _note(self, reading: ClockReading) -> None:
        try:
            self._index.note_clock(reading)
        except NoSpace as error:  # the next look tries again
            log.info("%s", error)
        else:
            self._noted = reading

    def drop_unused(self, wall_s: float, up_s: float) -> bool:
        """Take away what was not used for too long; whether there is more. Slow.

        Raises LocalError.
        """
        since_s = unused_since_s(self.look_at_clock(wall_s, up_s), self._max_age_s)
        if since_s is None:
            return False
        dropped, looked_at = self._evictor.drop_unused(since_s, wall_s, FILES_MAX)
        if dropped:
            log.info("dropped %d copies that were not used for %g s", dropped, self._max_age_s)
        return looked_at == FILES_MAX
