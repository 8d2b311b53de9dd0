"""What a node tells others of itself: room, load, health of its disks, and what it holds."""

from __future__ import annotations

import time
from collections.abc import Callable

from swarmcache.disk import Cache
from swarmcache.errors import LocalError
from swarmcache.gossip_records import DIGEST_BYTES, DiskHealth, NodeStatus

# What takes a look at every replica is looked at so often at most: 1 s for a million of them.
SLOW_S = 60.0
# A disk on which less could be had, with all evicted that may go, is of no use for another replica.
FULL_PART = 0.01


class StatusMeter:
    """Looks at one cache. ``uploads`` and ``downloads`` say how many there are just now, and
    ``standing_in`` whether this node stands in for the tracker."""

    def __init__(
        self,
        cache: Cache,
        uploads: Callable[[], int],
        downloads: Callable[[], int],
        standing_in: Callable[[], bool],
    ) -> None:
        self._cache = cache
        self._uploads = uploads
        self._downloads = downloads
        self._standing_in = standing_in
        self._looked_s = -SLOW_S
        self._looked_at = (-1, -1)
        self._pinned_bytes = 0
        self._attainable_bytes = 0
        self._held_digest = bytes(DIGEST_BYTES)

    def measure(self) -> NodeStatus:
        """To be called in a thread, by one at a time."""
        try:
            directories = self._cache.directories()
            if all(each.lost for each in directories):
                return self._sick()
            disk = self._cache.status()
            self._look_at_replicas((disk.file_count, disk.used_bytes))
        except LocalError:  # said in the log by those who use the disk
            return self._sick()
        full = self._attainable_bytes < FULL_PART * disk.capacity_bytes
        return NodeStatus(
            free_bytes=disk.free_bytes,
            used_bytes=disk.used_bytes,
            pinned_bytes=self._pinned_bytes,
            uploads=self._uploads(),
            downloads=self._downloads(),
            disk=DiskHealth.FULL if full else DiskHealth.OK,
            held_digest=self._held_digest,
            standing_in=self._standing_in(),
        )

    def _sick(self) -> NodeStatus:
        return NodeStatus(disk=DiskHealth.SICK, standing_in=self._standing_in())

    def _look_at_replicas(self, seen: tuple[int, int]) -> None:
        """Now and then, if there are others than before. Raises LocalError."""
        now_s = time.monotonic()
        if now_s < self._looked_s + SLOW_S and self._looked_at[0] >= 0:
            return
        self._looked_s = now_s
        self._pinned_bytes = self._cache.pinned_bytes()
        self._attainable_bytes = self._cache.room([])[1]
        if seen == self._looked_at:
            return
        self._looked_at = seen
        held = 0
        for version_id in self._cache.replicas():
            held ^= int.from_bytes(version_id[:DIGEST_BYTES], "big")
        self._held_digest = held.to_bytes(DIGEST_BYTES, "big")
