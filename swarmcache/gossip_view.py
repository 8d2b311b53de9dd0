"""What one node knows of all others: a table in the order of the ring.

Pure logic: believes what it is told, and answers questions about it.

Arrays side by side, not an object for each member: 60 bytes a member, so that 10,000 nodes that
know one another fit into one simulator. A member is found by bisection.

Invariants: all columns have the same length; the ids are sorted and distinct, and this node's own
is not among them; ``sums`` are those of all members and of this node itself.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator

from swarmcache.gossip_records import (
    AGE,
    AGE_AT,
    BODY_AT,
    BUCKETS,
    EPOCH_BYTES,
    ID_BYTES,
    RING,
    SEQ_BYTES,
    STATUS_BYTES,
    NodeProfile,
    StatusRecord,
    age_units,
    pack_status,
)

# A table of this many members takes 4 MB. There is no larger cluster; a node that invents members
# gets no further.
MEMBERS_MAX = 1 << 16
_MASK = 0xFFFFFFFF


def _sum_of(subject: int, epoch: int) -> int:
    """What a member adds to the sum of its bucket: equal sums, equal members and lives."""
    mixed = (subject * 0x9E3779B97F4A7C15 ^ epoch * 0xC2B2AE3D27D4EB4F) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 29
    return (mixed * 0xBF58476D1CE4E5B9 >> 32) & _MASK


class View:
    """The members besides this node, alive or suspected. Indexes hold until one comes or goes.

    ``version`` grows whenever the ring is another one: a member comes, goes, gets its address, is
    suspected or no more.
    ``reachable``: how many have one. ``reaches``: see ``reach``. ``records``: the latest ones, as
    they have come, one behind the other; their age is what ``made_s`` says.
    """

    def __init__(self, own_id: int, own_epoch: int) -> None:
        self.own_id = own_id
        self.ids = array("Q")
        self.made_s = array("d")
        self.records = bytearray()
        self.suspected = bytearray()
        self.reaches = bytearray()
        self.profiles: list[NodeProfile | None] = []
        self.sums = array("Q", bytes(8 * BUCKETS))
        self.version = 0
        self.reachable = 0
        self._own_epoch = own_epoch
        self._add_to_sum(own_id, own_epoch, 1)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, subject: int) -> int:
        """The index of this member, or -1."""
        ids = self.ids
        index = bisect_left(ids, subject)
        return index if index < len(ids) and ids[index] == subject else -1

    def insert(self, record: StatusRecord, made_s: float, profile: NodeProfile | None) -> int:
        """A member that was not here; returns its index."""
        index = bisect_left(self.ids, record.subject)
        self.ids.insert(index, record.subject)
        self.made_s.insert(index, made_s)
        self.records[index * STATUS_BYTES : index * STATUS_BYTES] = pack_status(record)
        self.suspected.insert(index, 0)
        self.reaches.insert(index, 0)
        self.profiles.insert(index, profile)
        self.reachable += profile is not None
        self._add_to_sum(record.subject, record.epoch, 1)
        self.version += 1
        return index

    def remove(self, index: int) -> None:
        """This member is gone."""
        self.reachable -= self.profiles[index] is not None
        self._add_to_sum(self.ids[index], self.epoch(index), -1)
        del self.ids[index]
        del self.made_s[index]
        del self.records[index * STATUS_BYTES : (index + 1) * STATUS_BYTES]
        del self.suspected[index]
        del self.reaches[index]
        del self.profiles[index]
        self.version += 1

    def replace(self, index: int, record: StatusRecord, made_s: float) -> None:
        """A later record of this member."""
        epoch = self.epoch(index)
        if epoch != record.epoch:
            self._add_to_sum(record.subject, epoch, -1)
            self._add_to_sum(record.subject, record.epoch, 1)
        self.made_s[index] = made_s
        self.records[index * STATUS_BYTES : (index + 1) * STATUS_BYTES] = pack_status(record)

    def set_profile(self, index: int, profile: NodeProfile) -> None:
        """The address of this member is known now, or what else there is to know."""
        self.reachable += self.profiles[index] is None
        self.profiles[index] = profile
        self.version += 1

    def set_suspected(self, index: int, *, suspected: bool) -> None:
        """This member has come under suspicion, or is free of it."""
        self.suspected[index] = suspected
        self.version += 1

    def set_own_epoch(self, epoch: int) -> None:
        """This node has begun another life."""
        self._add_to_sum(self.own_id, self._own_epoch, -1)
        self._add_to_sum(self.own_id, epoch, 1)
        self._own_epoch = epoch

    def epoch(self, index: int) -> int:
        """The life of this member that its record is of."""
        at = index * STATUS_BYTES + ID_BYTES
        return int.from_bytes(self.records[at : at + EPOCH_BYTES], "big")

    def seq(self, index: int) -> int:
        """Which one of that life's records it is."""
        at = index * STATUS_BYTES + ID_BYTES + EPOCH_BYTES
        return int.from_bytes(self.records[at : at + SEQ_BYTES], "big")

    def body(self, index: int) -> bytes:
        """The body of this member's record."""
        at = index * STATUS_BYTES
        return bytes(self.records[at + BODY_AT : at + STATUS_BYTES])

    def packed(self, index: int, now_s: float) -> bytearray:
        """This member's record, as old as it is now."""
        at = index * STATUS_BYTES
        record = self.records[at : at + STATUS_BYTES]
        AGE.pack_into(record, AGE_AT, age_units(now_s - self.made_s[index]))
        return record

    def in_bucket(self, bucket: int) -> list[int]:
        """The indexes of the members of one bucket."""
        return [index for index, each in enumerate(self.ids) if each % BUCKETS == bucket]

    def distance(self, subject: int) -> int:
        """How far it is from this node to that place on the ring, once around for its own."""
        return (subject - self.own_id) % RING or RING

    def reach(self, limit: int) -> int:
        """How far it is up to there, in powers of two: 0 for nowhere. Something that is known
        already is passed on nevertheless, if it comes with a longer reach than before."""
        return (self.distance(limit) - 1).bit_length()

    def onwards(self, start: int) -> Iterator[int]:
        """All indexes in the order of the ring, from the first one at or after ``start``."""
        first = bisect_left(self.ids, start)
        yield from range(first, len(self.ids))
        yield from range(first)

    def fingers(self, usable: Callable[[int], bool]) -> list[int]:
        """Members at 1, 2, 4, 8, ... places from this node, by ids, nearest first: those who pass
        on what this node has to say. Where one is not ``usable`` (by index) the next one is
        taken."""
        count = len(self.ids)
        own = bisect_left(self.ids, self.own_id)
        found: list[int] = []
        step = 1
        while step <= count:
            while step <= count and not usable((own + step - 1) % count):
                step += 1
            if step > count:
                break
            found.append(self.ids[(own + step - 1) % count])
            step = 1 << step.bit_length()
        return found

    def _add_to_sum(self, subject: int, epoch: int, sign: int) -> None:
        bucket = subject % BUCKETS
        self.sums[bucket] = (self.sums[bucket] + sign * _sum_of(subject, epoch)) & _MASK

    def check(self) -> None:
        """Assert the invariants."""
        count = len(self.ids)
        assert all(a < b for a, b in zip(self.ids, self.ids[1:], strict=False)), "ids out of order"
        assert self.find(self.own_id) < 0, "a node would gossip with itself"
        for column in (self.made_s, self.suspected, self.profiles, self.reaches):
            assert len(column) == count, "columns of different length"
        reachable = sum(profile is not None for profile in self.profiles)
        assert self.reachable == reachable, "reachable members miscounted"
        assert len(self.records) == count * STATUS_BYTES, "records of different length"
        sums = [0] * BUCKETS
        lives = [(subject, self.epoch(index)) for index, subject in enumerate(self.ids)]
        for subject, epoch in [*lives, (self.own_id, self._own_epoch)]:
            sums[subject % BUCKETS] = (sums[subject % BUCKETS] + _sum_of(subject, epoch)) & _MASK
        assert sums == list(self.sums), "sums that are not those of the members"
