"""The files that clients of this node want to write, and until when each of them may.

Pure logic, and a part of ``PeerState``. A client writes by itself and is told until when; what it
has been told last, ``told_until_s``, is a promise that nobody takes back. It lies within the node's
lease, which ends before the tracker may give the slot to another.

The client answers whatever it is told, and is not told anything further before it has. So the slot
of a client that is stopped, or hangs, is soon another's: when the promise has run out, whatever the
reason, the lease is given back, and wanted anew for a client that answers.

Without a tracker for ``stall_s``, a client is told that there is no slot to be had, and goes on
without one. To wait for a slot that others use is no reason to do so.

Invariant: a client that writes has a promise, and the node a lease that lasts as long as that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from swarmcache.messages import (
    LOADS_MAX,
    WRITE_ID_BYTES,
    EndWrite,
    HeldWrite,
    Registered,
    Renewed,
    WantWrite,
    WriteLease,
)
from swarmcache.peer_events import (
    AnswerNoSlot,
    AnswerSlot,
    PeerEffect,
    TellTracker,
    WriterAnswered,
    WriteWanted,
)

# What a client has begun to write when its promise runs out is on its way so much longer, at most.
# As long as ``LEASE_MARGIN_S`` of the tracker, which allows for the same.
PIECE_S = 0.5


@dataclass(slots=True)
class Write:
    """A file that a client wants to write. ``claimed``: the tracker has been asked for a slot.

    ``unanswered``: how often the client was told something that it has not answered yet.
    ``turn_over``: others have waited for long, so the promise is not renewed.
    """

    write_id: bytes
    wanted: WriteWanted
    since_s: float
    claimed: bool = False
    lease_id: int | None = None
    told_until_s: float = -math.inf
    unanswered: int = 0
    turn_over: bool = False

    @property
    def quiet_at_s(self) -> float:
        """When nothing is on its way any more, unless the promise is renewed before."""
        return self.told_until_s + PIECE_S


class PeerWrites:
    """All such files of one node."""

    def __init__(self, rng: Random, stall_s: float) -> None:
        self._rng = rng
        self._stall_s = stall_s
        self._writes: dict[int, Write] = {}  # by request
        self._by_id: dict[bytes, Write] = {}
        self._connected = False
        # When the tracker was last known to answer; None until this node has first asked for it.
        self._tracker_at_s: float | None = None
        self._reason = ""

    def __bool__(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._writes)

    # --- clients --------------------------------------------------------------------------------

    def want(self, event: WriteWanted, now_s: float, effects: list[PeerEffect]) -> None:
        """A client wants to write a file."""
        if self._tracker_at_s is None:
            self._tracker_at_s = now_s
        write = Write(self._rng.randbytes(WRITE_ID_BYTES), event, now_s)
        self._writes[event.request] = write
        self._by_id[write.write_id] = write
        self._claim(write, now_s, effects)
        self._give_up_if_stalled(write, now_s, effects)

    def answered(self, event: WriterAnswered, now_s: float, effects: list[PeerEffect]) -> None:
        """A client has got what it was told."""
        write = self._writes.get(event.request)
        if write is None or write.unanswered == 0:
            return
        write.unanswered -= 1
        self._claim(write, now_s, effects)

    def gone(self, request: int, effects: list[PeerEffect]) -> None:
        """A client is through, or has died; either way it writes no more."""
        write = self._writes.pop(request, None)
        if write is not None:
            del self._by_id[write.write_id]
            self._unclaim(write, effects)

    # --- the tracker ----------------------------------------------------------------------------

    def held(self) -> list[HeldWrite]:
        """The leases of this node, for a tracker that may have forgotten them."""
        held = [
            HeldWrite(write.lease_id, write.write_id, write.wanted.file_server, write.wanted.user)
            for write in self._writes.values()
            if write.lease_id is not None
        ]
        # One message has room for no more; the tracker does not adopt the others, so they end.
        return held[:LOADS_MAX]

    def tracker_connected(self, now_s: float, effects: list[PeerEffect]) -> None:
        """``Register`` is on its way, with ``held()`` in it."""
        self._connected = True
        self._tracker_at_s = now_s
        for write in self._writes.values():
            self._claim(write, now_s, effects)

    def tracker_lost(self, reason: str, now_s: float) -> None:
        """Nothing has reached the tracker, or does any more."""
        self._reason = reason
        if self._connected or self._tracker_at_s is None:
            self._tracker_at_s = now_s
        self._connected = False
        for write in self._writes.values():
            write.claimed = False

    def registered(self, message: Registered, now_s: float, effects: list[PeerEffect]) -> None:
        """The tracker says which leases are out still."""
        self._tracker_at_s = now_s
        for write in self._writes.values():
            if write.lease_id is not None and write.lease_id not in message.adopted:
                write.lease_id = None
        self._go_on(message.until_s, now_s, effects)

    def renewed(self, message: Renewed, now_s: float, effects: list[PeerEffect]) -> None:
        """All leases last longer."""
        self._tracker_at_s = now_s
        for write_id in message.turns_over:
            if write_id in self._by_id:
                self._by_id[write_id].turn_over = True
        self._go_on(message.until_s, now_s, effects)

    def leased(self, message: WriteLease, now_s: float, effects: list[PeerEffect]) -> None:
        """A slot for one file. For one that is gone, ``EndWrite`` is on its way already."""
        self._tracker_at_s = now_s
        write = self._by_id.get(message.write_id)
        if write is None or not write.claimed or write.lease_id is not None:
            return
        write.lease_id = message.lease_id
        write.turn_over = False
        self._tell_slot(write, message.until_s, effects)

    # --- time -----------------------------------------------------------------------------------

    def wake_at_s(self) -> float | None:
        """When ``look_after`` is next due."""
        if not self._writes:
            return None
        return min(self._due_s(write) for write in self._writes.values())

    def look_after(self, now_s: float, effects: list[PeerEffect]) -> None:
        """Give back the leases whose promise has run out; tell those who have waited in vain."""
        for write in list(self._writes.values()):
            if write.lease_id is not None and now_s >= write.quiet_at_s:
                self._unclaim(write, effects)
            self._claim(write, now_s, effects)
            self._give_up_if_stalled(write, now_s, effects)

    def check(self) -> None:
        """Assert the invariant."""
        assert len(self._writes) == len(self._by_id), "a file is known by one of its names only"
        for request, write in self._writes.items():
            assert request == write.wanted.request, "a file under another's request"
            assert self._by_id[write.write_id] is write, "a file under another's id"
            promised = write.told_until_s > -math.inf
            assert write.lease_id is None or promised, "a lease of which the client knows nothing"
            assert self._connected or not write.claimed, "claimed from nobody"

    def _due_s(self, write: Write) -> float:
        if write.lease_id is not None:
            return write.quiet_at_s
        stalled_at_s = self._stalled_at_s(write)
        return min(write.quiet_at_s, stalled_at_s) if self._may_claim(write) else stalled_at_s

    def _stalled_at_s(self, write: Write) -> float:
        assert self._tracker_at_s is not None, "a file that nobody wanted"
        # Somebody who is stopped is not told anything; a tracker that is there has some time.
        known_at_s = max(self._tracker_at_s, write.since_s if self._connected else -math.inf)
        return max(known_at_s + self._stall_s, write.told_until_s)

    def _give_up_if_stalled(self, write: Write, now_s: float, effects: list[PeerEffect]) -> None:
        if write.lease_id is None and now_s >= self._stalled_at_s(write):
            silent = f"the tracker has said nothing for {self._stall_s:g} s"
            reason = silent if self._connected else self._reason
            effects.append(AnswerNoSlot(write.wanted.request, reason))
            self.gone(write.wanted.request, effects)

    def _go_on(self, until_s: float, now_s: float, effects: list[PeerEffect]) -> None:
        """The tracker answers: let everybody know who is not stopped."""
        self.look_after(now_s, effects)
        for write in self._writes.values():
            if write.unanswered or write.turn_over:
                continue
            if write.lease_id is None:
                self._tell_slot(write, None, effects)
            elif now_s < write.told_until_s:  # or else the tracker may have taken it for lost
                self._tell_slot(write, until_s, effects)

    # --- one file -------------------------------------------------------------------------------

    def _may_claim(self, write: Write) -> bool:
        """A client that is stopped needs no slot."""
        idle = not write.claimed and write.lease_id is None
        return self._connected and idle and write.unanswered == 0

    def _claim(self, write: Write, now_s: float, effects: list[PeerEffect]) -> None:
        """Ask for a slot, if the file needs one and the former promise has run out."""
        if self._may_claim(write) and now_s >= write.quiet_at_s:
            write.claimed = True
            wanted = write.wanted
            message = WantWrite(write.write_id, wanted.file_server, wanted.user)
            effects.append(TellTracker(message))

    def _unclaim(self, write: Write, effects: list[PeerEffect]) -> None:
        if self._connected and (write.claimed or write.lease_id is not None):
            effects.append(TellTracker(EndWrite(write.write_id)))
        write.claimed = False
        write.lease_id = None
        write.turn_over = False

    def _tell_slot(self, write: Write, until_s: float | None, effects: list[PeerEffect]) -> None:
        if until_s is not None:
            # Never earlier: what a heartbeat took to arrive looks to the tracker like a slow clock.
            until_s = write.told_until_s = max(write.told_until_s, until_s)
        write.unanswered += 1
        effects.append(AnswerSlot(write.wanted.request, until_s))
