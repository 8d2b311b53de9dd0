"""The slots of one file server: who holds one until when, and who is next.

Pure logic: grants nothing by itself and sends nothing; ``tracker_state.py`` asks who is next,
decides whether that claim can be served now, and tells the node.

A *claim* is a standing wish for slots (a swarm that has chunks left to read, or one file to be
written): it stays in the queue until it is withdrawn. Waiting is fair: round robin over users,
first come first served within one. A *lease* is a slot granted to one node until a deadline.

Invariant: at no time are more than ``slots_max`` leases out, and a slot is free again only when its
holder gave it back or its deadline has passed. Leases that a restarted tracker hears of may exceed
``slots_max`` only if its setting was lowered; then nothing is granted until enough have ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class SlotLease:
    """One slot in use. ``until_s`` is on the tracker's clock, later than on the holder's."""

    lease_id: int
    claim: bytes
    node: str
    user: str
    until_s: float


class LedgerWatch:
    """Who is told of all that happens in a ledger. This one takes no notice."""

    def queued(self, claim: bytes) -> None:
        """A claim is new in the queue."""

    def withdrawn(self, claim: bytes) -> None:
        """A claim has left the queue."""

    def held(self, claim: bytes) -> None:
        """A lease is out for this claim."""

    def released(self, claim: bytes) -> None:
        """One of its leases has ended."""


class SlotLedger:
    """Claims and leases of one file server."""

    def __init__(self, slots_max: int, watch: LedgerWatch | None = None) -> None:
        assert slots_max >= 1, "a file server without slots"
        self.slots_max = slots_max
        self._watch = watch or LedgerWatch()
        self.leases: dict[int, SlotLease] = {}
        self._claims: dict[str, dict[bytes, None]] = {}
        self._users: dict[str, None] = {}

    @property
    def free(self) -> int:
        """Slots that may be granted now."""
        return max(self.slots_max - len(self.leases), 0)

    def claim(self, claim: bytes, user: str) -> None:
        """Wish for slots on behalf of ``user``; a claim that stands already keeps its place."""
        claims = self._claims.setdefault(user, {})
        if claim not in claims:
            claims[claim] = None
            self._watch.queued(claim)
        self._users.setdefault(user)

    def withdraw(self, claim: bytes, user: str) -> None:
        """The claim needs no further slots. Its leases stay."""
        claims = self._claims.get(user, {})
        if claim in claims:
            del claims[claim]
            self._watch.withdrawn(claim)
        if not claims:
            self._claims.pop(user, None)
            self._users.pop(user, None)

    def waiting(self) -> Iterator[tuple[bytes, str]]:
        """(claim, user) in the order in which they are to be served.

        First the oldest claim of every user, users in turn, then the second oldest of each, ...
        Take one and ask anew: the order changes with every grant.
        """
        queues = [(user, iter(self._claims[user])) for user in self._users]
        while queues:
            for turn in list(queues):
                user, queue = turn
                claim = next(queue, None)
                if claim is None:
                    queues.remove(turn)
                else:
                    yield claim, user

    def grant(self, lease_id: int, claim: bytes, node: str, user: str, until_s: float) -> SlotLease:
        """Give a free slot to ``node``; it is now the turn of the other users."""
        assert self.free, "no slot is free"
        self.adopt(lease_id, claim, node, user, until_s)
        if user in self._users:
            del self._users[user]
            self._users[user] = None
        return self.leases[lease_id]

    def adopt(self, lease_id: int, claim: bytes, node: str, user: str, until_s: float) -> None:
        """Enter a lease that an earlier life of the tracker granted."""
        assert lease_id not in self.leases, "a lease id was used twice"
        self.leases[lease_id] = SlotLease(lease_id, claim, node, user, until_s)
        self._watch.held(claim)

    def release(self, lease_id: int) -> SlotLease | None:
        """The holder gave the slot back, or it is void. None: it was not out any more."""
        lease = self.leases.pop(lease_id, None)
        if lease is not None:
            self._watch.released(lease.claim)
        return lease

    def renew(self, lease_id: int, until_s: float) -> None:
        """Its holder is alive: the lease lasts longer. Not by node: a node that began anew must not
        keep alive what its former life held."""
        lease = self.leases[lease_id]
        lease.until_s = max(lease.until_s, until_s)

    def expired(self, now_s: float) -> list[SlotLease]:
        """Leases whose deadline has passed; the caller releases them."""
        return [lease for lease in self.leases.values() if lease.until_s <= now_s]

    def next_expiry_s(self) -> float | None:
        """When the next lease runs out, or None."""
        return min((lease.until_s for lease in self.leases.values()), default=None)

    def check(self) -> None:
        """Assert the invariant."""
        assert list(self._users.keys() - self._claims.keys()) == [], "a user without claims waits"
        assert self._claims.keys() == self._users.keys(), "a user's claims are not in turn"
        for lease_id, lease in self.leases.items():
            assert lease_id == lease.lease_id, "a lease under another's id"
