"""The ranges of chunks that this node may read from file servers, and until when.

Pure logic, and a part of ``PeerState``. All leases of a node last until the same time, by its own
clock, which every answer to a heartbeat moves on. A lease ends when its reader has stopped, not
before: until then a piece may still be on its way from the file server.

Invariant: nothing is read under a lease that has run out, was cancelled, or is not known; what has
run out before it was renewed stays over, since it may be another node's by now.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from swarmcache.messages import HeldLease, Lease


@dataclass(slots=True)
class NodeLease:
    """A range of chunks that this node may read, until ``PeerLeases.until_s``.

    ``ran_out``: its time was over before it was renewed. ``cancelled``: why it must end early.
    """

    version_id: bytes
    first: int
    count: int
    file_server: str
    user: str
    cancelled: str | None = None
    ran_out: bool = False


class PeerLeases:
    """All such leases of one node. ``until_s``: those to write end then as well."""

    def __init__(self) -> None:
        self.until_s = 0.0
        self._leases: dict[int, NodeLease] = {}

    def __bool__(self) -> bool:
        """Whether anything is being read."""
        return bool(self._leases)

    def may_read(self, lease_id: int, now_s: float) -> bool:
        """Whether this lease still holds, by this node's clock. Safe to call from any thread."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.cancelled is not None or lease.ran_out:
            return False
        return now_s < self.until_s

    def held(self) -> list[HeldLease]:
        """All of them, for a tracker that may have forgotten them."""
        return [
            HeldLease(
                lease_id, lease.version_id, lease.file_server, lease.user, lease.first, lease.count
            )
            for lease_id, lease in self._leases.items()
        ]

    # --- what the tracker says ------------------------------------------------------------------

    def begin(self, message: Lease, file_server: str, user: str) -> None:
        """A range is read from now on, for this user."""
        self._leases[message.lease_id] = NodeLease(
            message.version_id, message.first, message.count, file_server, user
        )

    def extend(self, until_s: float, now_s: float) -> None:
        """A new lease, to read or to write, lasts until then, and so do all others."""
        self.renew(max(self.until_s, until_s), now_s)

    def renew(self, until_s: float, now_s: float) -> None:
        """All leases last until then.

        But not those that have run out, whatever the tracker says of all of them: a reader may not
        have noticed, being in the middle of a piece.
        """
        if now_s >= self.until_s:
            for lease in self._leases.values():
                lease.ran_out = True
        self.until_s = until_s

    def adopted(self, lease_ids: Container[int], until_s: float) -> list[NodeLease]:
        """A new tracker has taken over these, until then. Returns the others, which end."""
        self.until_s = until_s
        unknown = [lease_id for lease_id in self._leases if lease_id not in lease_ids]
        return [self._leases.pop(lease_id) for lease_id in unknown]

    # --- how they end ---------------------------------------------------------------------------

    def cancel(self, version_id: bytes, reason: str) -> None:
        """Nothing more is to be read of this file version."""
        for lease in self._leases.values():
            if lease.version_id == version_id and lease.cancelled is None:
                lease.cancelled = reason

    def end(self, lease_id: int) -> NodeLease | None:
        """Its reader has stopped. None: it was void already."""
        return self._leases.pop(lease_id, None)

    def check(self, under_way: Container[bytes]) -> None:
        """Assert that somebody reads under each lease: ``under_way`` are the file versions of which
        something is."""
        for lease in self._leases.values():
            assert lease.version_id in under_way, "a lease under which nobody reads"
