"""The files that nodes want to write to file servers, and the leases under which they do.

Pure logic, and a part of ``TrackerState``: it shares the ledgers of the file servers with the
swarms, so that reads and writes take turns at the same slots. Whoever calls grants what is free.

A file takes one slot for as long as it is written, which may be hours. So there are *turns*: a
lease that is as old as ``TURN_S`` while others wait is to be given back, and wanted anew.

The lease of a node that is gone stays, under its number, until it must have run out: the node's
client may go on that long. What the node wants meanwhile, in its next life, is another claim.

Invariants: every file here has either a claim in the ledger of its file server, or one lease; a
lease is out as long as its slot is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarmcache.messages import WAITING_MAX, HeldWrite, WantWrite
from swarmcache.slot_ledger import SlotLedger

# Twenty times as long as a range of chunks takes: to stop and to go on costs a round trip, and
# somebody who writes for hours shall not start more files of others than need be.
TURN_S = 10.0


@dataclass(slots=True)
class Write:
    """One file that a node wants to write, or (with a lease) writes, since ``since_s``."""

    write_id: bytes
    node: str
    file_server: str
    user: str
    lease_id: int | None = None
    since_s: float = 0.0


class TrackerWrites:
    """All such files. ``ledger``: that of a file server, by its name."""

    def __init__(self, ledger: Callable[[str], SlotLedger]) -> None:
        self._ledger = ledger
        # Of connected nodes, all and by node; and under leases, also of nodes that are gone.
        self._writes: dict[bytes, Write] = {}
        self._by_node: dict[str, dict[bytes, Write]] = {}
        self._leases: dict[int, Write] = {}

    def want(self, node: str, message: WantWrite) -> str | None:
        """A file is to be written; returns the file server that must be looked at."""
        if message.write_id in self._writes:
            return None
        write = Write(message.write_id, node, message.file_server, message.user)
        self._add(write)
        self._ledger(write.file_server).claim(write.write_id, write.user)
        return write.file_server

    def end(self, node: str, write_id: bytes) -> Write | None:
        """The node is through, or wants it no longer. None: there is nothing to end.

        The caller looks after the end of its lease, if there is one.
        """
        write = self._writes.get(write_id)
        if write is None or write.node != node:
            return None
        self._drop(write)
        return write

    def claimed(self, claim: bytes) -> Write | None:
        """The file whose claim that is; None for the claim of a swarm."""
        return self._writes.get(claim)

    def leased(self, lease_id: int) -> Write | None:
        """The file that is written under this lease; None for the lease of a range."""
        return self._leases.get(lease_id)

    def grant(self, write: Write, lease_id: int, now_s: float, until_s: float) -> None:
        """Give a free slot to a file that has a claim."""
        ledger = self._ledger(write.file_server)
        ledger.grant(lease_id, write.write_id, write.node, write.user, until_s)
        ledger.withdraw(write.write_id, write.user)
        self._enter(write, lease_id, now_s)

    def adopt(
        self, node: str, held: HeldWrite, now_s: float, until_s: float, earlier: bool
    ) -> bool:
        """Whether a lease that a node says it holds is (still, or again) out.

        ``earlier``: a former life of the tracker has granted this lease to this node.
        """
        write = self._leases.get(held.lease_id)
        if write is None and earlier and held.write_id not in self._writes:
            write = Write(held.write_id, node, held.file_server, held.user)
            ledger = self._ledger(write.file_server)
            ledger.adopt(held.lease_id, write.write_id, node, write.user, until_s)
            self._enter(write, held.lease_id, now_s)
        elif write is None or (write.node, write.write_id) != (node, held.write_id):
            return False
        if held.write_id not in self._writes:
            self._add(write)
        self._ledger(write.file_server).renew(held.lease_id, until_s)
        return True

    def renew(self, node: str, until_s: float) -> None:
        """The node is alive, and with it its leases."""
        for write in self._of(node):
            if write.lease_id is not None:
                self._ledger(write.file_server).renew(write.lease_id, until_s)

    def turns_over(self, node: str, now_s: float) -> list[bytes]:
        """The files of a node whose leases are old enough to be given back to those who wait."""
        over = [
            write.write_id
            for write in self._of(node)
            if write.lease_id is not None
            and now_s >= write.since_s + TURN_S
            and self._others_wait(write)
        ]
        return over[:WAITING_MAX]

    def lose_node(self, node: str) -> None:
        """The node is gone: it wants nothing any more. Its leases stay until they run out."""
        for write in self._of(node):
            self._remove(write)

    def expire(self, write: Write) -> None:
        """The lease of this file has run out: by its own clock, the holder has stopped."""
        assert write.lease_id is not None, "what is not leased cannot run out"
        if self._writes.get(write.write_id) is write:
            self._drop(write)
        else:
            self._release(write)

    def count(self, file_server: str) -> int:
        """How many files are being written to it."""
        return sum(write.file_server == file_server for write in self._leases.values())

    def check(self) -> None:
        """Assert the invariants."""
        for write_id, write in self._writes.items():
            assert write_id == write.write_id, "a file under another's id"
            if write.lease_id is not None:
                assert self._leases[write.lease_id] is write, "a lease that nobody knows"
                continue
            claims = self._ledger(write.file_server).waiting()
            assert (write_id, write.user) in claims, "a file would wait for ever"
        known = [write for writes in self._by_node.values() for write in writes.values()]
        assert len(known) == len(self._writes), "a file of an unknown node"
        for lease_id, write in self._leases.items():
            assert write.lease_id == lease_id, "a lease under another's number"
            assert lease_id in self._ledger(write.file_server).leases, "a lease without a slot"

    def _of(self, node: str) -> list[Write]:
        return list(self._by_node.get(node, {}).values())

    def _others_wait(self, write: Write) -> bool:
        """Somebody waits for the file server besides other files of this user: they need not be
        begun before this one is done."""
        return any(
            user != write.user or claim not in self._writes
            for claim, user in self._ledger(write.file_server).waiting()
        )

    def _enter(self, write: Write, lease_id: int, now_s: float) -> None:
        write.lease_id = lease_id
        write.since_s = now_s
        self._leases[lease_id] = write

    def _add(self, write: Write) -> None:
        self._writes[write.write_id] = write
        self._by_node.setdefault(write.node, {})[write.write_id] = write

    def _remove(self, write: Write) -> None:
        """Its node wants it no longer; its lease stays."""
        del self._writes[write.write_id]
        of_node = self._by_node[write.node]
        del of_node[write.write_id]
        if not of_node:
            del self._by_node[write.node]
        self._ledger(write.file_server).withdraw(write.write_id, write.user)

    def _drop(self, write: Write) -> None:
        self._remove(write)
        if write.lease_id is not None:
            self._release(write)

    def _release(self, write: Write) -> None:
        assert write.lease_id is not None, "released without a lease"
        del self._leases[write.lease_id]
        self._ledger(write.file_server).release(write.lease_id)
