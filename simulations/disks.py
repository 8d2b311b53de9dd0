"""What a simulated node has on its disk: file versions and their chunks, and what room is left.

Content is symbolic. A chunk is a digest, right or wrong; ``content_digest`` is the right one.

Room for a whole file is set aside before its first chunk, and replicas are evicted for it: chosen
by the production code (``swarmcache.eviction``) among those that are published, not held, not
pinned and not young. Simplified: files in use are those that are held; a disk has one directory;
file systems need no room of their own.

What a crash leaves. The end of the process loses nothing that was written. A power cut loses what
was not yet durable, in part: a replica in doubt is a partial file again, with some of its chunks.

Invariant: what all file versions take is at most ``room_bytes`` (but for what others have taken of
the disk since), and nobody evicts a replica that must stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from swarmcache.chunks import ChunkLayout
from swarmcache.eviction import Candidate, Policy, choose_victims, replicas_elsewhere_first


class NoRoom(Exception):
    """Not enough can be evicted for a file. Says what it takes and what there is."""


@dataclass(slots=True)
class Replica:
    """What a node has on its disk of one file version: symbolic digests by chunk.

    ``active``: it is being filled. ``settled``: the machine knows that it is published. ``rotten``:
    chunks that changed on the disk after they were written. ``holds``: clients that keep it.
    ``uses``: how often it was answered.
    """

    layout: ChunkLayout
    digests: dict[int, bytes]
    published: bool = False
    active: bool = False
    settled: bool = False
    durable: bool = False
    pinned: bool = False
    holds: int = 0
    uses: int = 0
    last_used_s: float = 0.0
    rotten: int = 0

    @property
    def complete(self) -> bool:
        """Every chunk is there, right or wrong."""
        return len(self.digests) == self.layout.chunk_count


class Disk:
    """One node's disk. ``room_bytes``: the most that the cache may take of it."""

    __slots__ = ("evicted", "min_age_s", "policy", "replicas", "room_bytes", "used_bytes")

    def __init__(
        self,
        room_bytes: float = math.inf,
        min_age_s: float = 0.0,
        policy: Policy = replicas_elsewhere_first,
    ) -> None:
        self.room_bytes = room_bytes
        self.min_age_s = min_age_s
        self.policy = policy
        self.replicas: dict[bytes, Replica] = {}
        self.used_bytes = 0
        self.evicted = 0

    def victims(self, size_bytes: int, now_s: float, elsewhere: Mapping[bytes, int]) -> list[bytes]:
        """The replicas that must go so that a file of this size fits. Raises NoRoom.

        ``elsewhere``: how many other nodes have some of them.
        """
        for version_id, replica in list(self.replicas.items()):
            if self.used_bytes + size_bytes <= self.room_bytes:
                return []
            if not replica.published and not replica.active:
                self.remove(version_id)  # left by an earlier attempt
        missing_bytes = self.used_bytes + size_bytes - self.room_bytes
        if missing_bytes <= 0:
            return []
        candidates = [
            Candidate(
                version_id,
                replica.layout.size_bytes,
                replica.last_used_s,
                elsewhere.get(version_id, 0),
            )
            for version_id, replica in self.replicas.items()
            if self.may_go(replica, now_s)
        ]
        victims = choose_victims(candidates, math.ceil(missing_bytes), now_s, self.policy)
        freed_bytes = sum(victim.freed_bytes for victim in victims)
        if freed_bytes < missing_bytes and victims:
            raise AssertionError("a choice of victims that do not free enough")
        if not victims:
            raise NoRoom(f"{size_bytes} bytes are wanted, {missing_bytes:.0f} of them missing")
        for victim in victims:
            spare = freed_bytes - victim.freed_bytes >= missing_bytes
            assert not spare, "a victim that could have been spared"
        return [victim.version_id for victim in victims]

    def lacks(self, size_bytes: int) -> bool:
        """Whether something must go so that a file of this size fits."""
        return self.used_bytes + size_bytes > self.room_bytes

    def may_go(self, replica: Replica, now_s: float) -> bool:
        """Whether this replica may be evicted."""
        old = replica.last_used_s + self.min_age_s <= now_s
        return replica.published and replica.settled and old and self.may_leave(replica)

    @staticmethod
    def may_leave(replica: Replica) -> bool:
        """Nobody holds it and nobody has pinned it."""
        return not replica.holds and not replica.pinned

    def evict(self, version_id: bytes) -> None:
        """Remove a victim."""
        assert self.may_leave(self.replicas[version_id]), "evicted a file that is held or pinned"
        self.remove(version_id)
        self.evicted += 1

    def begin(self, version_id: bytes, layout: ChunkLayout) -> dict[int, bytes]:
        """Set room aside; returns what an earlier attempt has left, each chunk digested anew."""
        former = self.replicas.get(version_id)
        if former is not None and former.layout == layout and not former.published:
            former.active = True
            return dict(former.digests)
        self.remove(version_id)
        self.replicas[version_id] = Replica(layout, {}, active=True)
        self.used_bytes += layout.size_bytes
        return {}

    def remove(self, version_id: bytes) -> None:
        """Remove what there is of a file version."""
        replica = self.replicas.pop(version_id, None)
        if replica is not None:
            self.used_bytes -= replica.layout.size_bytes

    def published(self) -> list[bytes]:
        """The file versions that are in place."""
        return [version_id for version_id, each in self.replicas.items() if each.published]

    def doubt(self, version_id: bytes, kept: Iterable[int]) -> None:
        """A replica is a partial file again, with those of these chunks that are right."""
        replica = self.replicas[version_id]
        right = {
            chunk: content_digest(version_id, replica.layout, chunk)
            for chunk in kept
            if replica.digests.get(chunk) == content_digest(version_id, replica.layout, chunk)
        }
        self.replicas[version_id] = Replica(replica.layout, right, pinned=replica.pinned)

    def check(self) -> None:
        """Assert the account."""
        total = sum(replica.layout.size_bytes for replica in self.replicas.values())
        assert total == self.used_bytes, "the account of a disk is wrong"


@lru_cache(maxsize=16)
def content_digests(version_id: bytes, layout: ChunkLayout) -> tuple[bytes, ...]:
    """The right digests of all chunks of a file, in order."""
    return tuple(content_digest(version_id, layout, each) for each in range(layout.chunk_count))


def content_digest(version_id: bytes, layout: ChunkLayout, chunk: int) -> bytes:
    """The symbolic digest of a chunk's right content, which is where it lies in which file; 32
    bytes."""
    offset = layout.offset_bytes(chunk).to_bytes(8, "little")
    return version_id[:16] + offset + layout.length_bytes(chunk).to_bytes(8, "little")


def corrupted(digest: bytes) -> bytes:
    """The symbolic digest of content in which a bit has flipped."""
    return bytes([digest[0] ^ 1]) + digest[1:]
