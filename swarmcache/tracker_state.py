"""Who holds what, and who may read which chunks from a file server, or write a file to it.

Pure logic: no socket, disk, clock or chance of its own. The shell (``tracker.py``) and the
simulator feed it events and carry out the effects that it returns.

All state is soft: nodes announce themselves, their downloads, their replicas and the leases they
hold whenever they connect. Only one thing cannot be learnt by waiting for announcements: whether a
lease is still out whose holder has not come back yet. So grants are journalled, and a restarted
tracker grants nothing until every lease of the journal was announced again or must have run out.
What another has granted in its place is not in its journal; see ``handover.py``.

For every chunk of a swarm the tracker knows one *guardian*, a connected node that has it. A chunk
whose guardian is gone is asked for among the neighbours of that guardian (only they can have it
from there), and read from the file server again only if none of them has it.

Invariants: every chunk of a swarm is unread, leased, asked for, or guarded by a connected member; a
lease that is out has a slot in its file server's ledger; a node's leases end on its own clock
``LEASE_MARGIN_S`` before they end here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from swarmcache.chunks import (
    ChunkLayout,
    full_mask,
    mask_from_bytes,
    mask_of,
    mask_to_bytes,
    range_mask,
)
from swarmcache.handover import LEASE_S, Handover
from swarmcache.messages import (
    BATCH_HOLDERS_MAX,
    LOADS_MAX,
    LOCATED_NODES_MAX,
    PROTOCOL_VERSION,
    SEEDS_MAX,
    WAITING_MAX,
    BatchHolder,
    DiskStatus,
    EndWrite,
    FromTracker,
    Heartbeat,
    HeldBy,
    HeldLease,
    Holders,
    Holding,
    Join,
    Joined,
    Lease,
    Leave,
    Locate,
    Located,
    Missing,
    NodeAddress,
    Peers,
    Query,
    RangeFailed,
    RangeRead,
    Refused,
    Register,
    Registered,
    Renewed,
    Replicas,
    ReportCorrupt,
    Revoked,
    Status,
    StatusRequest,
    Suspected,
    ToTracker,
    WantWrite,
    WhoHas,
    WriteLease,
)
from swarmcache.slot_ledger import SlotLedger
from swarmcache.timers import Timers
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    JournalPresent,
    NodeConnected,
    NodeLost,
    NodeSaid,
    ReportStatistics,
    Tell,
    TimePassed,
    TrackerEffect,
    TrackerEvent,
)
from swarmcache.tracker_statistics import ServerStatistics, TrackerStatistics
from swarmcache.tracker_writes import TrackerWrites, Write

# How often a node is told of some others, so that those who lost sight of one another meet again.
SEEDS_EVERY_S = 10.0
SEEDS_AT_ONCE = 3
# How much earlier the holder stops: one piece of a chunk from a slow server, and clocks that run at
# slightly different rates (500 ppm, the worst that NTP corrects, is 1.5 ms here).
LEASE_MARGIN_S = 0.5
# How long reading one range should take. Longer ones lose more when a holder dies, shorter ones ask
# the tracker more often.
RANGE_S = 0.5
RANGE_FIRST_BYTES = 4 << 20
# Who needed up to this many times as long for its range as the one before it is asked to read on.
# The others of a crowd need what it has read at once: with one node in twenty at a tenth of the
# rate, 40 simulated nodes took 4.07 s for 256 MiB when everybody read in turn, 2.33 s with this
# (and 2.32 s without slow nodes).
SWIFT_FACTOR = 1.5
QUERY_S = 1.0
NODE_SILENT_S = 30.0
# Who has failed to read so often in a row is left alone for a while: it may be the node, but it may
# also have been the file server.
READ_FAILURES_MAX = 3
READ_AGAIN_S = 10.0
CHUNK_COUNT_MAX = 1 << 21
# Of so many holders of a small file that one is named which has most of the others as well.
BATCH_DRAWN = 3


@dataclass(slots=True)
class Node:
    """A connected node. ``clock_s`` is what its clock showed at ``clock_at_s`` of ours, or less.

    ``silent``: it has not answered a query in time, and not said anything since. ``unconfirmed``:
    while it tells anew of all its replicas, those that it has not told of yet.
    """

    session: int
    address: NodeAddress
    connected_s: float
    clock_s: float
    clock_at_s: float
    disk: DiskStatus
    replicas: set[bytes] = field(default_factory=set)
    unconfirmed: set[bytes] | None = None
    swarms: set[bytes] = field(default_factory=set)
    leases: set[int] = field(default_factory=set)
    read_bytes_per_s: float = 0.0
    silent: bool = False
    seeds_at_s: float = -math.inf
    key_tags: list[str] = field(default_factory=list)


@dataclass(slots=True)
class LeasedRange:
    """Chunks that a node is reading. ``void``: it is gone, its chunks are others' business."""

    lease_id: int
    version_id: bytes
    file_server: str
    node: str
    first: int
    count: int
    void: bool = False

    @property
    def mask(self) -> int:
        """The chunks as a bit mask."""
        return range_mask(self.first, self.count)


@dataclass(slots=True)
class Member:
    """One node in one swarm. ``trusted``: nobody has had wrong bytes of this file from it."""

    can_read: bool
    complete: bool
    trusted: bool = True
    neighbours: set[str] = field(default_factory=set)
    guarded: int = 0
    failures: int = 0
    failed_s: float = 0.0
    reading: bool = False


@dataclass(slots=True)
class Search:
    """Chunks without a guardian, and the nodes that have not yet said whether they have them.

    ``doubted``: the guardian itself is asked, since somebody cannot get the chunks. Its neighbours
    are next.
    """

    version_id: bytes
    wanted: int
    waiting: set[str]
    doubted: str | None = None


@dataclass(slots=True)
class Swarm:
    """The nodes that hold or fetch chunks of one file version, while somebody fetches."""

    version_id: bytes
    file_server: str
    user: str
    layout: ChunkLayout
    unread: int
    members: dict[str, Member] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    searches: set[int] = field(default_factory=set)

    @property
    def wanted(self) -> bool:
        """Somebody fetches it still."""
        return any(not member.complete for member in self.members.values())


@dataclass(slots=True)
class FileServer:
    """One file server: its slots, and how fast a slot reads."""

    ledger: SlotLedger
    statistics: ServerStatistics
    read_bytes_per_s: float = 0.0


class TrackerState:
    """The tracker's machine: ``handle`` an event, carry out what it returns, ask ``wake_at_s``.

    ``earlier_leases`` (lease id -> node) is what the journal says may still be out; lease ids begin
    at ``first_lease_id``, above all that were ever used. ``away_s``: for how long there was no
    tracker; None if there never was one. ``grants_from_s``: for a stand-in, when it may begin to
    grant. ``statistics_interval_s``: how often ``ReportStatistics`` is returned, if something has
    happened; None for never. ``slots_told``: see ``Registered``. ``wall_offset_s``: by how much
    the wall clock that the cluster goes by is ahead of the tracker's own.
    """

    def __init__(
        self,
        rng: Random,
        *,
        slots_max: Callable[[str], int],
        peers_max: int = 40,
        earlier_leases: Mapping[int, str] | None = None,
        first_lease_id: int = 1,
        away_s: float | None = None,
        grants_from_s: float = 0.0,
        slots_told: Mapping[str, int] | None = None,
        statistics_interval_s: float | None = None,
        wall_offset_s: float = 0.0,
        now_s: float = 0.0,
    ) -> None:
        self._rng = rng
        self._handover = Handover(now_s, away_s, grants_from_s)
        self._slots_told = dict(slots_told or {})
        self._slots_max = slots_max
        self._wall_offset_s = wall_offset_s
        self._peers_max = peers_max
        self._earlier = dict(earlier_leases or {})
        self._quarantine_until_s = now_s + LEASE_S if self._earlier else now_s
        self._next_lease_id = first_lease_id
        self._next_query_id = 1
        self._sessions: dict[int, Node | None] = {}
        self._nodes: dict[str, Node] = {}
        self._in_turn: OrderedDict[str, None] = OrderedDict()  # nodes, the next one to name first
        self._swarms: dict[bytes, Swarm] = {}
        # Holders in the order in which they told, so that naming some needs no sorting of all.
        self._replicas: dict[bytes, dict[str, None]] = {}
        self._servers: dict[str, FileServer] = {}
        self._ranges: dict[int, LeasedRange] = {}
        self._writes = TrackerWrites(lambda name: self._server(name).ledger)
        self._searches: dict[int, Search] = {}
        self._corrupt: dict[str, int] = {}
        self._timers: Timers[str | int] = Timers()
        self._statistics = TrackerStatistics(statistics_interval_s, now_s)

    # --- the three calls of every machine -------------------------------------------------------

    def handle(self, event: TrackerEvent, now_s: float) -> list[TrackerEffect]:
        """Apply one event; return what must now be done, in order."""
        effects: list[TrackerEffect] = []
        self._statistics.at(now_s)
        self._handover.at(now_s)
        match event:
            case NodeSaid():
                self._handle_said(event.session, event.message, now_s, effects)
            case NodeConnected():
                self._sessions[event.session] = None
                self._timers.set(event.session, now_s + NODE_SILENT_S)
            case NodeLost():
                node = self._sessions.pop(event.session, None)
                self._timers.set(event.session, None)
                if node is not None:
                    self._lose_node(node, now_s, effects)
            case TimePassed():
                self._handle_time(now_s, effects)
        return effects

    def wake_at_s(self) -> float | None:
        """When ``TimePassed`` is next due. Ask again after every ``handle``."""
        times_s = [server.ledger.next_expiry_s() for server in self._servers.values()]
        times_s += (self._timers.next_at_s(), self._statistics.wake_at_s())
        times_s.append(self._handover.present_at_s)
        if self._earlier:
            times_s.append(self._quarantine_until_s)
        if self._handover.holding:
            times_s.append(self._handover.until_s)
        return min((at_s for at_s in times_s if at_s is not None), default=None)

    def check(self) -> None:
        """Assert the invariants."""
        self._timers.check()
        self._handover.check()
        self._statistics.check(self._replicas)
        for server in self._servers.values():
            server.ledger.check()
            for lease_id in server.ledger.leases:
                known = lease_id in self._ranges, self._writes.leased(lease_id) is not None
                assert any(known), "a slot is taken by nobody's lease"
                assert not all(known), "a slot is taken twice"
            for claim, _ in server.ledger.waiting():
                assert self._writes.claimed(claim) is not None or self._swarms[claim].unread, (
                    "a swarm waits for slots with nothing to read"
                )
        self._writes.check()
        for lease_id, leased in self._ranges.items():
            ledger = self._servers[leased.file_server].ledger
            assert lease_id in ledger.leases, "a lease is out without a slot"
        for version_id, holders in self._replicas.items():
            assert holders, "a file version with a list of no holders"
            for name in holders:
                assert version_id in self._nodes[name].replicas, "a holder that has no replica"
        for swarm in self._swarms.values():
            self._check_swarm(swarm)

    def _check_swarm(self, swarm: Swarm) -> None:
        known = swarm.unread
        for leased in self._ranges.values():
            if leased.version_id == swarm.version_id and not leased.void:
                known |= leased.mask
        for query_id in swarm.searches:
            known |= self._searches[query_id].wanted
            ends = self._timers.at_s(f"query {query_id}") is not None
            assert ends, "a search that ends only if everybody answers"
        for node, member in swarm.members.items():
            assert node in self._nodes, "a member is not connected"
            assert swarm.version_id in self._nodes[node].swarms, "a node forgot its swarm"
            known |= member.guarded
            for other in member.neighbours:
                assert node in swarm.members[other].neighbours, "neighbours on one side only"
        assert known == full_mask(swarm.layout.chunk_count), "a chunk is lost"
        assert sorted(swarm.order) == sorted(swarm.members), "members and their order differ"

    # --- messages -------------------------------------------------------------------------------

    def _handle_said(
        self, session: int, message: ToTracker, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        if session not in self._sessions:
            return
        self._timers.set(session, now_s + NODE_SILENT_S)
        node = self._sessions[session]
        if node is not None:
            node.silent = False
        if isinstance(message, Register):
            self._register(session, message, now_s, effects)
            return
        if node is None:
            effects.append(CloseSession(session, "the first message must be a register"))
            return
        match message:
            case Heartbeat():
                self._heartbeat(node, message, now_s, effects)
            case Join():
                self._join(node, message, now_s, effects)
            case Leave():
                self._leave(node, message.version_id, now_s, effects)
            case Replicas():
                self._add_replicas(node, message, now_s, effects)
            case RangeRead():
                self._range_read(node, message, now_s, effects)
            case RangeFailed():
                self._range_failed(node, message, now_s, effects)
            case WantWrite():
                file_server = self._writes.want(node.address.node, message)
                if file_server is not None:
                    self._grant(file_server, now_s, effects)
            case EndWrite():
                self._end_write(node, message, now_s, effects)
            case Holding():
                self._holding(node, message, now_s, effects)
            case Missing():
                self._missing(node, message, now_s, effects)
            case ReportCorrupt():
                self._report_corrupt(message, now_s, effects)
            case StatusRequest():
                effects.append(Tell(session, Status(message.request_id, self.status(now_s))))
            case Locate():
                effects.append(Tell(session, self._located(node, message)))
            case WhoHas():
                effects.append(Tell(session, self._held_by(node, message)))

    def _tell(self, node: str, message: FromTracker, effects: list[TrackerEffect]) -> None:
        effects.append(Tell(self._nodes[node].session, message))

    # --- nodes ----------------------------------------------------------------------------------

    def _register(
        self, session: int, message: Register, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        if message.protocol != PROTOCOL_VERSION:
            reason = f"protocol {message.protocol}, expected {PROTOCOL_VERSION}"
            effects.append(CloseSession(session, reason))
            return
        name = message.address.node
        known = self._sessions[session]
        if known is not None and known.address.node != name:
            effects.append(CloseSession(session, "one connection, two nodes"))
            return
        former = self._nodes.get(name)
        if former is not None:
            self._sessions[former.session] = None
            self._lose_node(former, now_s, effects)
            if former.session != session:
                effects.append(CloseSession(former.session, "the node registered anew"))
        self._handover.registered(name, message.stood_in, now_s)
        node = Node(session, message.address, now_s, message.clock_s, now_s, message.disk)
        self._sessions[session] = node
        self._nodes[name] = node
        self._in_turn[name] = None
        node.key_tags = message.key_tags
        self._statistics.node_told(name, message.totals)
        adopted = [lease.lease_id for lease in message.leases if self._adopt(node, lease, now_s)]
        for held in message.writes:
            earlier = self._earlier.get(held.lease_id) == name and held.lease_id not in self._ranges
            if self._writes.adopt(name, held, now_s, now_s + LEASE_S, earlier=earlier):
                adopted.append(held.lease_id)
        for lease_id, holder in list(self._earlier.items()):
            if holder == name:
                del self._earlier[lease_id]
                if lease_id not in adopted:
                    effects.append(JournalEnd(lease_id))
        registered = Registered(
            *(LEASE_S, self._until_s(node, now_s), adopted),
            *(self._seeds(node, SEEDS_MAX, now_s), self._wall_offset_s + now_s),
            slots_max=self._slots_told,
        )
        effects.append(Tell(session, registered))
        self._grant_all(now_s, effects)

    def _adopt(self, node: Node, lease: HeldLease, now_s: float) -> bool:
        """Whether a lease that the node says it holds is (still, or again) out."""
        until_s = now_s + LEASE_S
        leased = self._ranges.get(lease.lease_id)
        name = node.address.node
        fits = lease.first + lease.count <= CHUNK_COUNT_MAX
        if leased is None and self._earlier.get(lease.lease_id) == name and fits:
            ledger = self._server(lease.file_server).ledger
            ledger.adopt(lease.lease_id, lease.version_id, name, lease.user, until_s)
            leased = self._ranges[lease.lease_id] = LeasedRange(
                lease.lease_id, lease.version_id, lease.file_server, name, lease.first, lease.count
            )
        elif leased is None or leased.node != name:
            return False
        leased.void = False
        node.leases.add(lease.lease_id)
        self._servers[leased.file_server].ledger.renew(leased.lease_id, until_s)
        swarm = self._swarms.get(leased.version_id)
        if swarm is not None:
            self._enter_range(swarm, leased)
            self._reclaim(swarm)
        return True

    def _enter_range(self, swarm: Swarm, leased: LeasedRange) -> None:
        """A range that is out already is not unread. One that does not fit (the swarm cuts the file
        differently) keeps its slot and is no business of the swarm."""
        if leased.first + leased.count > swarm.layout.chunk_count:
            leased.void = True
        elif not leased.void:
            swarm.unread &= ~leased.mask

    def _renew(self, node: Node, now_s: float) -> None:
        """All leases of the node last longer, as the node is about to be told."""
        for lease_id in node.leases:
            ledger = self._servers[self._ranges[lease_id].file_server].ledger
            ledger.renew(lease_id, now_s + LEASE_S)
        self._writes.renew(node.address.node, now_s + LEASE_S)

    def _until_s(self, node: Node, now_s: float) -> float:
        """When a lease renewed now ends on the node's own clock."""
        return node.clock_s + (now_s - node.clock_at_s) + LEASE_S - LEASE_MARGIN_S

    def _heartbeat(
        self, node: Node, message: Heartbeat, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        node.clock_s = message.clock_s
        node.clock_at_s = now_s
        node.disk = message.disk
        node.key_tags = message.key_tags
        self._statistics.node_told(node.address.node, message.totals)
        self._renew(node, now_s)
        waiting = [version_id for version_id in node.swarms if self._waits(version_id)]
        turns_over = self._writes.turns_over(node.address.node, now_s)
        until_s = self._until_s(node, now_s)
        seeds: list[str] = []
        if now_s >= node.seeds_at_s + SEEDS_EVERY_S:
            seeds = self._seeds(node, SEEDS_AT_ONCE, now_s)
        renewed = Renewed(
            *(until_s, sorted(waiting)[:WAITING_MAX], turns_over),
            *(seeds, self._wall_offset_s + now_s),
        )
        effects.append(Tell(node.session, renewed))

    def _seeds(self, node: Node, count: int, now_s: float) -> list[str]:
        """The next nodes in turn, so that each is named equally often."""
        node.seeds_at_s = now_s
        names = [name for name in islice(self._in_turn, count + 1) if name != node.address.node]
        for name in names[:count]:
            self._in_turn.move_to_end(name)
        return names[:count]

    def _waits(self, version_id: bytes) -> bool:
        """This swarm has chunks to read and gets no slot, since others have them all, or may."""
        swarm = self._swarms.get(version_id)
        if swarm is None or not swarm.unread:
            return False
        if self._handover.holding:
            return True
        ledger = self._server(swarm.file_server).ledger
        others = [lease for lease in ledger.leases.values() if lease.claim != version_id]
        return not ledger.free and bool(others)

    def _lose_node(self, node: Node, now_s: float, effects: list[TrackerEffect]) -> None:
        """The node is gone. Its slots stay taken until its leases must have run out."""
        name = node.address.node
        if self._nodes.get(name) is node:
            del self._nodes[name]
            del self._in_turn[name]
            self._handover.lost(name, now_s, len(self._nodes))
        self._writes.lose_node(name)
        for version_id in node.replicas:
            self._drop_holder(version_id, name)
        for version_id in sorted(node.swarms):
            orphaned = 0
            for lease_id in node.leases:
                leased = self._ranges[lease_id]
                if leased.version_id == version_id and not leased.void:
                    leased.void = True
                    orphaned |= leased.mask
            self._remove_member(self._swarms[version_id], name, orphaned, now_s, effects)
        for query_id, search in list(self._searches.items()):
            if name in search.waiting:
                self._search_answered(query_id, name, 0, now_s, effects)
        self._grant_all(now_s, effects)

    # --- swarms ---------------------------------------------------------------------------------

    def _join(self, node: Node, message: Join, now_s: float, effects: list[TrackerEffect]) -> None:
        version_id = message.version_id
        layout = ChunkLayout(message.size_bytes, message.chunk_size_bytes)
        if layout.chunk_count > CHUNK_COUNT_MAX:
            reason = f"{layout.chunk_count} chunks; at most {CHUNK_COUNT_MAX} are possible"
            effects.append(Tell(node.session, Refused(reason, version_id)))
            return
        self._drop_replica(node, version_id)  # it would not want what it has
        swarm = self._swarms.get(version_id)
        if swarm is None:
            swarm = self._create_swarm(message, layout)
        name = node.address.node
        member = swarm.members.get(name)
        if member is None:
            member = self._add_member(swarm, node, complete=False)
        member.can_read = message.can_read
        member.complete = False
        held = mask_from_bytes(message.held) if layout == swarm.layout and member.trusted else 0
        lost = member.guarded & ~held
        found = held & swarm.unread
        swarm.unread ^= found
        for query_id in sorted(swarm.searches):  # those that were asked may be gone
            search = self._searches[query_id]
            found |= held & search.wanted
            search.wanted &= ~held
            if not search.wanted:
                self._end_search(query_id, now_s, effects)
        member.guarded = (member.guarded | found) & held
        if lost:
            self._take_over(swarm, lost, sorted(member.neighbours), now_s, effects)
        effects.append(Tell(node.session, Joined(version_id, swarm.layout.chunk_size_bytes)))
        self._introduce(swarm, name, effects)
        self._reclaim(swarm)
        self._grant(swarm.file_server, now_s, effects)

    def _create_swarm(self, message: Join, layout: ChunkLayout) -> Swarm:
        version_id = message.version_id
        unread = full_mask(layout.chunk_count)
        swarm = Swarm(version_id, message.file_server, message.user, layout, unread)
        self._swarms[version_id] = swarm
        holders = sorted(self._replicas.get(version_id, ()))
        if len(holders) > self._peers_max // 2:
            holders = self._rng.sample(holders, self._peers_max // 2)
        for holder in holders:
            self._add_member(swarm, self._nodes[holder], complete=True)
        for leased in self._ranges.values():
            if leased.version_id == version_id:
                self._enter_range(swarm, leased)
        return swarm

    def _add_member(self, swarm: Swarm, node: Node, *, complete: bool) -> Member:
        name = node.address.node
        member = Member(can_read=False, complete=complete)
        swarm.members[name] = member
        swarm.order.append(name)
        node.swarms.add(swarm.version_id)
        if complete:
            member.guarded |= swarm.unread
            swarm.unread = 0
        return member

    def _introduce(self, swarm: Swarm, name: str, effects: list[TrackerEffect]) -> None:
        """Give a member neighbours (those it has count anew) and tell both sides."""
        member = swarm.members[name]
        chosen = sorted(member.neighbours) + self._choose_peers(swarm, name)
        for other in chosen:
            self._link(swarm, name, other, effects)
        addresses = [self._nodes[other].address for other in chosen]
        for start in range(0, len(addresses), LOADS_MAX):
            part = addresses[start : start + LOADS_MAX]
            peers = Peers(swarm.version_id, part, swarm.layout.chunk_size_bytes)
            self._tell(name, peers, effects)

    def _link(self, swarm: Swarm, name: str, other: str, effects: list[TrackerEffect]) -> None:
        """Make two members neighbours, and tell ``other``."""
        swarm.members[name].neighbours.add(other)
        swarm.members[other].neighbours.add(name)
        address = self._nodes[name].address
        peers = Peers(swarm.version_id, [address], swarm.layout.chunk_size_bytes)
        self._tell(other, peers, effects)

    def _choose_peers(self, swarm: Swarm, name: str) -> list[str]:
        """New neighbours for a member: everybody in a small swarm, some at random in a large one.

        Those who come later choose among those who are here, so whoever is here must have room
        left, or the swarm would fall apart into groups that never meet. With a quarter of the
        limit per newcomer a member fills up only when the swarm is twenty times (e to the third) as
        large as when it came itself.
        """
        member = swarm.members[name]
        room = self._peers_max - len(member.neighbours)
        candidates: Iterable[str] = swarm.order
        if len(swarm.members) - 1 > self._peers_max // 2:
            room = max(-(-self._peers_max // 4) - len(member.neighbours), 0)
            candidates = self._drawn(swarm.order, 8 * self._peers_max)
        chosen: dict[str, None] = {}
        for other in candidates:
            if len(chosen) >= room:
                break
            taken = other == name or other in member.neighbours
            if not taken and len(swarm.members[other].neighbours) < self._peers_max:
                chosen[other] = None
        return list(chosen)

    def _drawn(self, names: list[str], tries: int) -> Iterator[str]:
        for _ in range(tries):
            yield names[int(self._rng.random() * len(names))]

    def _leave(
        self, node: Node, version_id: bytes, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        name = node.address.node
        self._drop_replica(node, version_id)
        swarm = self._swarms.get(version_id)
        if swarm is not None and name in swarm.members:
            self._remove_member(swarm, name, 0, now_s, effects)
            self._grant(swarm.file_server, now_s, effects)

    def _drop_replica(self, node: Node, version_id: bytes) -> None:
        if version_id in node.replicas:
            node.replicas.discard(version_id)
            self._drop_holder(version_id, node.address.node)

    def _drop_holder(self, version_id: bytes, name: str) -> None:
        holders = self._replicas[version_id]
        del holders[name]
        self._statistics.holders_changed(len(holders) + 1, len(holders))
        if not holders:
            del self._replicas[version_id]

    def _remove_member(
        self, swarm: Swarm, name: str, orphaned: int, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A node is no longer in the swarm; somebody must take over what it guarded.

        Grants nothing: a node that is lost is still a member of its other swarms.
        """
        member = swarm.members.pop(name)
        swarm.order.remove(name)
        node = self._nodes.get(name)
        if node is not None:
            node.swarms.discard(swarm.version_id)
        for other in member.neighbours:
            swarm.members[other].neighbours.discard(name)
        if not swarm.wanted:
            self._dissolve(swarm)
            return
        neighbours = sorted(member.neighbours)
        self._take_over(swarm, member.guarded | orphaned, neighbours, now_s, effects)
        for other in neighbours:
            few = len(swarm.members[other].neighbours) < self._peers_max // 4
            if few and len(swarm.members) > self._peers_max // 4:
                self._introduce(swarm, other, effects)
        self._reclaim(swarm)

    def _take_over(
        self,
        swarm: Swarm,
        chunks: int,
        neighbours: list[str],
        now_s: float,
        effects: list[TrackerEffect],
    ) -> None:
        """Find a new guardian for chunks, among complete members or by asking the neighbours."""
        if self._complete_member(swarm) or not neighbours or not chunks:
            self._orphan(swarm, chunks)
            return
        self._search(swarm, chunks, neighbours, now_s, effects)

    def _complete_member(self, swarm: Swarm) -> Member | None:
        """A member that can be relied on to have every chunk."""
        for name, member in swarm.members.items():
            if member.complete and member.trusted and not self._nodes[name].silent:
                return member
        return None

    def _orphan(self, swarm: Swarm, chunks: int) -> None:
        """Chunks that nobody guards: a complete member does from now on, or they are unread."""
        member = self._complete_member(swarm)
        if member is not None:
            member.guarded |= chunks
        else:
            swarm.unread |= chunks

    def _search(
        self,
        swarm: Swarm,
        chunks: int,
        nodes: list[str],
        now_s: float,
        effects: list[TrackerEffect],
        doubted: str | None = None,
    ) -> None:
        """Ask nodes which of these chunks they have."""
        query_id = self._next_query_id
        self._next_query_id += 1
        self._searches[query_id] = Search(swarm.version_id, chunks, set(nodes), doubted)
        swarm.searches.add(query_id)
        self._timers.set(f"query {query_id}", now_s + QUERY_S)
        for node in nodes:
            self._tell(node, Query(swarm.version_id, query_id, mask_to_bytes(chunks)), effects)

    def _missing(
        self, node: Node, message: Missing, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A member cannot get chunks: ask those who are said to have them, and introduce them."""
        name = node.address.node
        swarm = self._swarms.get(message.version_id)
        if swarm is None or name not in swarm.members:
            return
        wanted = mask_from_bytes(message.wanted)
        for other in list(swarm.order):
            member = swarm.members[other]
            chunks = member.guarded & wanted
            if not chunks or other == name:
                continue
            member.guarded ^= chunks
            wanted ^= chunks
            self._search(swarm, chunks, [other], now_s, effects, doubted=other)
            # Also those who are neighbours: one of them may have parted when it could not reach the
            # other, who waits to be dialled.
            self._link(swarm, name, other, effects)
            self._link(swarm, other, name, effects)
        # Perhaps nobody was able to read them, and somebody is now.
        self._grant(swarm.file_server, now_s, effects)

    def _holding(
        self, node: Node, message: Holding, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        search = self._searches.get(message.query_id)
        if search is not None and node.address.node in search.waiting:
            held = mask_from_bytes(message.held)
            self._search_answered(message.query_id, node.address.node, held, now_s, effects)
            swarm = self._swarms.get(search.version_id)
            if swarm is not None:
                self._grant(swarm.file_server, now_s, effects)

    def _search_answered(
        self,
        query_id: int,
        name: str,
        held: int,
        now_s: float,
        effects: list[TrackerEffect],
    ) -> None:
        search = self._searches[query_id]
        search.waiting.discard(name)
        swarm = self._swarms[search.version_id]
        member = swarm.members.get(name)
        if member is not None and member.trusted:
            member.guarded |= held & search.wanted
            search.wanted &= ~held
        if not search.wanted or not search.waiting:
            self._end_search(query_id, now_s, effects)

    def _end_search(self, query_id: int, now_s: float, effects: list[TrackerEffect]) -> None:
        """What nobody has must be read again."""
        search = self._searches.pop(query_id)
        self._timers.set(f"query {query_id}", None)
        swarm = self._swarms[search.version_id]
        swarm.searches.discard(query_id)
        doubted = swarm.members.get(search.doubted) if search.doubted is not None else None
        if doubted is not None:
            self._take_over(swarm, search.wanted, sorted(doubted.neighbours), now_s, effects)
        else:
            self._orphan(swarm, search.wanted)
        self._reclaim(swarm)

    def _report_corrupt(
        self, message: ReportCorrupt, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A node delivered wrong bytes: in this swarm it guards nothing and reads nothing more.

        One report is enough, since whoever sent it will not ask that node again and needs its
        chunks from somebody else. It counts for this swarm only: a reporter whose own memory is bad
        would otherwise take the whole cluster's nodes away.
        """
        if message.node in self._nodes:
            self._corrupt[message.node] = self._corrupt.get(message.node, 0) + 1
            self._tell(message.node, Suspected(message.version_id), effects)
        swarm = self._swarms.get(message.version_id)
        member = swarm.members.get(message.node) if swarm is not None else None
        if swarm is None or member is None:
            return
        member.trusted = False
        chunks, member.guarded = member.guarded, 0
        self._take_over(swarm, chunks, sorted(member.neighbours), now_s, effects)
        self._reclaim(swarm)
        self._grant(swarm.file_server, now_s, effects)

    def _dissolve(self, swarm: Swarm) -> None:
        """Nobody fetches it any more: what remains are replicas."""
        del self._swarms[swarm.version_id]
        self._server(swarm.file_server).ledger.withdraw(swarm.version_id, swarm.user)
        for query_id in swarm.searches:
            del self._searches[query_id]
            self._timers.set(f"query {query_id}", None)
        for name in swarm.members:
            self._nodes[name].swarms.discard(swarm.version_id)

    def _add_replicas(
        self, node: Node, message: Replicas, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        if message.more is not None and node.unconfirmed is None:
            node.unconfirmed = set(node.replicas)
        for version_id in message.version_ids:
            self._add_replica(node, version_id, now_s, effects)
        if message.more is False:
            gone, node.unconfirmed = node.unconfirmed or set(), None
            for version_id in sorted(gone & node.replicas):
                self._leave(node, version_id, now_s, effects)

    def _add_replica(
        self, node: Node, version_id: bytes, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        name = node.address.node
        node.replicas.add(version_id)
        if node.unconfirmed is not None:
            node.unconfirmed.discard(version_id)
        holders = self._replicas.setdefault(version_id, {})
        if name not in holders:
            holders[name] = None
            self._statistics.holders_changed(len(holders) - 1, len(holders))
        swarm = self._swarms.get(version_id)
        if swarm is None:
            return
        member = swarm.members.get(name)
        if member is None:
            self._add_member(swarm, node, complete=True)
            self._introduce(swarm, name, effects)
        else:
            member.complete = True
            if member.trusted:
                member.guarded |= swarm.unread
                swarm.unread = 0
        if swarm.wanted:
            self._reclaim(swarm)
        else:
            self._dissolve(swarm)
        self._grant(swarm.file_server, now_s, effects)

    def _located(self, node: Node, message: Locate) -> Located:
        """Who besides the node that asks has replicas of these file versions."""
        share = LOCATED_NODES_MAX // max(len(message.version_ids), 1)
        nodes_max = min(message.nodes_max, share)
        own = node.address.node
        found = []
        for version_id in message.version_ids:
            holders = self._replicas.get(version_id, {})
            others = (name for name in holders if name != own)
            nodes = [self._nodes[name].address for name in islice(others, nodes_max)]
            found.append(Holders(len(holders) - (own in holders), nodes))
        return Located(message.request_id, found)

    def _held_by(self, node: Node, message: WhoHas) -> HeldBy:
        """A few nodes that have most of these file versions. Drawn, so that a crowd that asks for
        the same ones is spread over all who have them, of which there soon are many."""
        left = {version_id: place for place, version_id in enumerate(message.version_ids)}
        holders: list[BatchHolder] = []
        for version_id in message.version_ids:
            known = self._replicas.get(version_id)
            if not known or version_id not in left:
                continue
            first = int(self._rng.random() * max(len(known) - BATCH_DRAWN + 1, 1))
            drawn = (self._nodes[name] for name in islice(known, first, first + BATCH_DRAWN))
            candidates = [each for each in drawn if each is not node and not each.silent]
            held = [[each for each in left if each in it.replicas] for it in candidates]
            if not held:
                continue
            most = max(held, key=len)
            mask = mask_of(left.pop(each) for each in most)
            address = candidates[held.index(most)].address
            holders.append(BatchHolder(address, mask_to_bytes(mask)))
            if len(holders) == BATCH_HOLDERS_MAX:
                break
        return HeldBy(message.request_id, holders)

    def _revoke(self, version_id: bytes, reason: str, effects: list[TrackerEffect]) -> None:
        """The source is no longer this file version: who fetches it drops all that it has of it.

        Replicas stay: every chunk of them was read while the source was what it should be.
        """
        swarm = self._swarms.get(version_id)
        if swarm is None:
            return
        for name, member in sorted(swarm.members.items()):
            if not member.complete:
                self._tell(name, Revoked(version_id, reason), effects)
        self._dissolve(swarm)

    # --- slots ----------------------------------------------------------------------------------

    def _server(self, name: str) -> FileServer:
        server = self._servers.get(name)
        if server is None:
            statistics = self._statistics.of_server(name)
            ledger = SlotLedger(self._slots_max(name), statistics)
            server = self._servers[name] = FileServer(ledger, statistics)
        return server

    def _reclaim(self, swarm: Swarm) -> None:
        """Let the queue know whether this swarm has chunks that must be read."""
        ledger = self._server(swarm.file_server).ledger
        if swarm.unread:
            ledger.claim(swarm.version_id, swarm.user)
        else:
            ledger.withdraw(swarm.version_id, swarm.user)

    def _grant_all(self, now_s: float, effects: list[TrackerEffect]) -> None:
        for name in list(self._servers):
            self._grant(name, now_s, effects)

    def _grant(self, file_server: str, now_s: float, effects: list[TrackerEffect]) -> None:
        """Hand out free slots, as fairly as the queue says."""
        if self._earlier or self._handover.holding:
            return
        server = self._server(file_server)
        while server.ledger.free:
            for claim, user in server.ledger.waiting():
                write = self._writes.claimed(claim)
                if write is not None:
                    self._lease_write(write, now_s, effects)
                    break
                swarm = self._swarms[claim]
                name = self._choose_reader(swarm, now_s)
                if name is not None:
                    self._lease(server, swarm, name, user, now_s, effects)
                    break
                server.statistics.waits_for_reader(claim)
            else:
                return

    def _choose_reader(self, swarm: Swarm, now_s: float) -> str | None:
        """The first in line that may read; it goes to the end, until it has shown that it is swift.

        So swift readers read on, then come those that have waited longest.
        """
        for position, name in enumerate(swarm.order):
            member = swarm.members[name]
            able = member.can_read and not member.complete and not member.reading
            able = able and not self._nodes[name].silent
            patient = member.failures < READ_FAILURES_MAX
            patient = patient or member.failed_s + READ_AGAIN_S <= now_s
            if able and member.trusted and patient:
                swarm.order.append(swarm.order.pop(position))
                return name
        return None

    def _lease(
        self,
        server: FileServer,
        swarm: Swarm,
        name: str,
        user: str,
        now_s: float,
        effects: list[TrackerEffect],
    ) -> None:
        node = self._nodes[name]
        first, count = self._choose_range(server, swarm, node)
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        leased = LeasedRange(lease_id, swarm.version_id, swarm.file_server, name, first, count)
        self._ranges[lease_id] = leased
        server.statistics.read_begins()
        self._handover.granted()
        server.ledger.grant(lease_id, swarm.version_id, name, user, now_s + LEASE_S)
        node.leases.add(lease_id)
        # A holder has one deadline for all its leases, which this one moves.
        self._renew(node, now_s)
        swarm.members[name].reading = True
        swarm.unread &= ~leased.mask
        self._reclaim(swarm)
        effects.append(JournalGrant(lease_id, name))
        until_s = self._until_s(node, now_s)
        self._tell(name, Lease(lease_id, swarm.version_id, first, count, until_s), effects)

    def _lease_write(self, write: Write, now_s: float, effects: list[TrackerEffect]) -> None:
        node = self._nodes[write.node]
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        self._server(write.file_server).statistics.write_begins()
        self._handover.granted()
        self._writes.grant(write, lease_id, now_s, now_s + LEASE_S)
        self._renew(node, now_s)  # see _lease
        effects.append(JournalGrant(lease_id, write.node))
        until_s = self._until_s(node, now_s)
        self._tell(write.node, WriteLease(lease_id, write.write_id, until_s), effects)

    def _end_write(
        self, node: Node, message: EndWrite, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        write = self._writes.end(node.address.node, message.write_id)
        if write is not None and write.lease_id is not None:
            effects.append(JournalEnd(write.lease_id))
            self._grant(write.file_server, now_s, effects)

    def _choose_range(self, server: FileServer, swarm: Swarm, node: Node) -> tuple[int, int]:
        """The first unread chunks, as many as take ``RANGE_S`` to read.

        Near the end fewer, so that all readers end together: never more than half of an equal share
        of what is left.
        """
        rate = node.read_bytes_per_s or server.read_bytes_per_s
        wanted_bytes = min(rate * RANGE_S or RANGE_FIRST_BYTES, swarm.layout.size_bytes)
        wanted = max(int(wanted_bytes / swarm.layout.chunk_size_bytes), 1)
        readers = min(server.ledger.slots_max, len(swarm.members))
        share = -(-swarm.unread.bit_count() // (2 * readers)) if readers > 1 else wanted
        first = (swarm.unread & -swarm.unread).bit_length() - 1
        rest = ~(swarm.unread >> first)
        run = (rest & -rest).bit_length() - 1
        return first, min(wanted, share, run)

    def _end_range(
        self, node: Node, lease_id: int, held: int | None, effects: list[TrackerEffect]
    ) -> LeasedRange | None:
        """The holder gives its lease back, having read the chunks ``held`` (None: all of them)."""
        leased = self._ranges.get(lease_id)
        if leased is None or leased.node != node.address.node:
            return None
        self._drop_lease(leased, effects)
        node.leases.discard(lease_id)
        swarm = self._swarms.get(leased.version_id)
        member = swarm.members.get(leased.node) if swarm is not None else None
        if swarm is not None and not leased.void:
            read = leased.mask if held is None else leased.mask & held
            if member is None or not member.trusted:
                read = 0
            else:
                member.guarded |= read
            if member is not None:
                member.reading = False
            swarm.unread &= ~read
            self._orphan(swarm, leased.mask & ~read)
            self._reclaim(swarm)
        return leased

    def _drop_lease(self, leased: LeasedRange, effects: list[TrackerEffect]) -> None:
        del self._ranges[leased.lease_id]
        self._servers[leased.file_server].ledger.release(leased.lease_id)
        effects.append(JournalEnd(leased.lease_id))

    def _range_read(
        self, node: Node, message: RangeRead, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        leased = self._end_range(node, message.lease_id, None, effects)
        if leased is None:
            return
        server = self._servers[leased.file_server]
        server.statistics.read(message.read_bytes)
        rate = message.read_bytes / message.elapsed_s if message.elapsed_s > 0 else 0.0
        swift = rate * SWIFT_FACTOR >= server.read_bytes_per_s
        if rate:
            node.read_bytes_per_s = server.read_bytes_per_s = rate
        swarm = self._swarms.get(leased.version_id)
        name = node.address.node
        if swarm is not None and name in swarm.members:
            swarm.members[name].failures = 0
            if swift:
                swarm.order.remove(name)
                swarm.order.insert(0, name)
        self._grant(leased.file_server, now_s, effects)

    def _range_failed(
        self, node: Node, message: RangeFailed, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        held = mask_from_bytes(message.held)
        leased = self._end_range(node, message.lease_id, held, effects)
        if leased is None:
            return
        statistics = self._servers[leased.file_server].statistics
        statistics.failed()
        swarm = self._swarms.get(leased.version_id)
        if swarm is not None:
            statistics.read(swarm.layout.mask_bytes(held & leased.mask))
            member = swarm.members.get(node.address.node)
            if member is not None and not held & leased.mask:
                member.failures += 1
                member.failed_s = now_s
        if message.source_changed:
            self._revoke(leased.version_id, message.reason, effects)
        self._grant(leased.file_server, now_s, effects)

    # --- time -----------------------------------------------------------------------------------

    def _handle_time(self, now_s: float, effects: list[TrackerEffect]) -> None:
        if self._handover.present(now_s):
            effects.append(JournalPresent())
        if self._earlier and now_s >= self._quarantine_until_s:
            effects.extend(JournalEnd(lease_id) for lease_id in self._earlier)
            self._earlier.clear()
        for key in self._timers.pop_due(now_s):
            if isinstance(key, int):
                effects.append(CloseSession(key, f"nothing heard for {NODE_SILENT_S:g} s"))
            else:
                query_id = int(key.removeprefix("query "))
                for name in self._searches[query_id].waiting:
                    self._nodes[name].silent = True
                self._end_search(query_id, now_s, effects)
        for server in self._servers.values():
            for lease in server.ledger.expired(now_s):
                server.statistics.ran_out()
                write = self._writes.leased(lease.lease_id)
                if write is None:
                    self._expire(self._ranges[lease.lease_id], now_s, effects)
                else:
                    self._writes.expire(write)
                    effects.append(JournalEnd(lease.lease_id))
        self._grant_all(now_s, effects)
        report = self._statistics.take_report(len(self._nodes))
        if report is not None:
            effects.append(ReportStatistics(report))

    def _expire(self, leased: LeasedRange, now_s: float, effects: list[TrackerEffect]) -> None:
        """A holder was silent for too long: by its own clock it has stopped."""
        self._drop_lease(leased, effects)
        node = self._nodes.get(leased.node)
        if node is not None:
            node.leases.discard(leased.lease_id)
        swarm = self._swarms.get(leased.version_id)
        if swarm is None or leased.void:
            return
        member = swarm.members.get(leased.node)
        neighbours: list[str] = []
        if member is not None:
            member.reading = False
            member.failures += 1
            member.failed_s = now_s
            neighbours = sorted(member.neighbours)
        self._take_over(swarm, leased.mask, neighbours, now_s, effects)
        self._reclaim(swarm)

    # --- for people -----------------------------------------------------------------------------

    def status(self, now_s: float) -> dict[str, object]:
        """The state of the cluster as plain data: nodes, file_servers, swarms, corrupt, and the
        statistics of this life of the tracker."""
        return {
            "statistics": self._statistics.since_start(len(self._nodes)),
            "nodes": [self._node_status(node, now_s) for _, node in sorted(self._nodes.items())],
            "file_servers": [
                self._server_status(name, server, now_s)
                for name, server in sorted(self._servers.items())
            ],
            "swarms": [self._swarm_status(swarm) for _, swarm in sorted(self._swarms.items())],
            "corrupt": [
                {"node": node, "reports": reports}
                for node, reports in sorted(self._corrupt.items())
            ],
        }

    def _node_status(self, node: Node, now_s: float) -> dict[str, object]:
        return {
            "node": node.address.node,
            "name": node.address.name,
            "connected_s": round(now_s - node.connected_s, 3),
            "capacity_bytes": node.disk.capacity_bytes,
            "free_bytes": node.disk.free_bytes,
            "used_bytes": node.disk.used_bytes,
            "file_count": node.disk.file_count,
            "replicas": len(node.replicas),
            "leases": len(node.leases),
            "key_tags": node.key_tags,
        }

    def _server_status(self, name: str, server: FileServer, now_s: float) -> dict[str, object]:
        return {
            "name": name,
            "slots_max": server.ledger.slots_max,
            "slots_used": len(server.ledger.leases),
            "waiting": sum(1 for _ in server.ledger.waiting()),
            "read_bytes": server.statistics.figures.read_bytes,
            "writes": self._writes.count(name),
            "leases": [
                {
                    "lease_id": lease.lease_id,
                    "node": lease.node,
                    "remaining_s": round(lease.until_s - now_s, 3),
                    **self._leased_status(lease.lease_id),
                }
                for lease in server.ledger.leases.values()
            ],
        }

    def _leased_status(self, lease_id: int) -> dict[str, object]:
        """What is read under a lease; of a file that is written, nobody here knows its name."""
        leased = self._ranges.get(lease_id)
        if leased is None:
            return {"kind": "write"}
        version_id = leased.version_id.hex()
        return {
            "kind": "read", "version_id": version_id, "first": leased.first, "count": leased.count
        }  # fmt: skip

    def _swarm_status(self, swarm: Swarm) -> dict[str, object]:
        leased = 0
        for item in self._ranges.values():
            if item.version_id == swarm.version_id:
                leased |= item.mask
        return {
            "version_id": swarm.version_id.hex(),
            "size_bytes": swarm.layout.size_bytes,
            "chunk_count": swarm.layout.chunk_count,
            "members": len(swarm.members),
            "complete": sum(member.complete for member in swarm.members.values()),
            "unread_chunks": swarm.unread.bit_count(),
            "leased_chunks": leased.bit_count(),
            "waiting": self._waits(swarm.version_id),
        }
