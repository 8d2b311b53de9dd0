"""Who holds what, and who may read which chunks from a file server, or write a file to it.

Pure logic: no socket, disk, clock or chance of its own. The shell (``tracker.py``) and the
simulator feed it events and carry out the effects that it returns.

All state is soft: nodes announce themselves, their downloads, their replicas and the leases they
hold whenever they connect. Only one thing cannot be learnt by waiting for announcements: whether a
lease is still out whose holder has not come back yet. So grants are journalled, and a restarted
tracker grants nothing until every lease of the journal was announced again or must have run out.
What another has granted in its place is not in its journal; see ``handover.py``.

Its parts keep what does not concern leases: ``tracker_nodes.py`` who is connected,
``tracker_replicas.py`` who has complete copies, ``tracker_swarms.py`` who fetches, and has which
chunks, ``tracker_writes.py`` what is written.

Invariants: a lease that is out has a slot in its file server's ledger; every slot that is taken is
that of one range, or of one file that is written; a node's leases end on its own clock
``LEASE_MARGIN_S`` before they end here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random

from swarmcache.chunks import (
    ChunkLayout,
    mask_from_bytes,
    range_mask,
)
from swarmcache.handover import LEASE_S, Handover
from swarmcache.messages import (
    PROTOCOL_VERSION,
    SEEDS_MAX,
    WAITING_MAX,
    EndWrite,
    Heartbeat,
    HeldLease,
    Holding,
    Join,
    Lease,
    Leave,
    Locate,
    Missing,
    RangeFailed,
    RangeRead,
    Refused,
    Register,
    Registered,
    Renewed,
    Replicas,
    ReportCorrupt,
    Status,
    StatusRequest,
    ToTracker,
    WantWrite,
    WhoHas,
    WriteLease,
)
from swarmcache.slot_ledger import SlotLedger
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
from swarmcache.tracker_nodes import Node, TrackerNodes
from swarmcache.tracker_replicas import TrackerReplicas
from swarmcache.tracker_statistics import ServerStatistics, TrackerStatistics
from swarmcache.tracker_swarms import Swarm, TrackerSwarms
from swarmcache.tracker_writes import TrackerWrites, Write

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
# Who has failed to read so often in a row is left alone for a while: it may be the node, but it may
# also have been the file server.
READ_FAILURES_MAX = 3
READ_AGAIN_S = 10.0
CHUNK_COUNT_MAX = 1 << 21
# Of so many that may read one is chosen for its rack: thirty times the usual number of slots, and
# looked through in a few hundred microseconds.
CANDIDATES_MAX = 256


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
        self._handover = Handover(now_s, away_s, grants_from_s)
        self._slots_told = dict(slots_told or {})
        self._slots_max = slots_max
        self._wall_offset_s = wall_offset_s
        self._earlier = dict(earlier_leases or {})
        self._quarantine_until_s = now_s + LEASE_S if self._earlier else now_s
        self._next_lease_id = first_lease_id
        self._statistics = TrackerStatistics(statistics_interval_s, now_s)
        self._nodes = TrackerNodes()
        self._replicas = TrackerReplicas(rng, self._nodes, self._statistics)
        self._swarms = TrackerSwarms(
            rng, self._nodes, self._ledger, self._replicas.holders, peers_max=peers_max
        )
        self._servers: dict[str, FileServer] = {}
        self._ranges: dict[int, LeasedRange] = {}
        self._writes = TrackerWrites(self._ledger)
        self._corrupt: dict[str, int] = {}

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
                self._nodes.connect(event.session, now_s)
            case NodeLost():
                node = self._nodes.disconnect(event.session)
                if node is not None:
                    self._lose_node(node, now_s, effects)
            case TimePassed():
                self._handle_time(now_s, effects)
        return effects

    def wake_at_s(self) -> float | None:
        """When ``TimePassed`` is next due. Ask again after every ``handle``."""
        times_s = [server.ledger.next_expiry_s() for server in self._servers.values()]
        times_s += (self._nodes.wake_at_s(), self._swarms.wake_at_s())
        times_s += (self._statistics.wake_at_s(), self._handover.present_at_s)
        if self._earlier:
            times_s.append(self._quarantine_until_s)
        if self._handover.holding:
            times_s.append(self._handover.until_s)
        return min((at_s for at_s in times_s if at_s is not None), default=None)

    def check(self) -> None:
        """Assert the invariants."""
        self._handover.check()
        self._nodes.check()
        self._replicas.check()
        self._writes.check()
        for server in self._servers.values():
            server.ledger.check()
            for lease_id in server.ledger.leases:
                known = lease_id in self._ranges, self._writes.leased(lease_id) is not None
                assert any(known), "a slot is taken by nobody's lease"
                assert not all(known), "a slot is taken twice"
            for claim, _ in server.ledger.waiting():
                known = self._writes.claimed(claim) is not None, self._swarms.get(claim) is not None
                assert any(known), "nobody waits for a slot that is claimed"
        leased: dict[bytes, int] = {}
        for lease_id, item in self._ranges.items():
            ledger = self._servers[item.file_server].ledger
            assert lease_id in ledger.leases, "a lease is out without a slot"
            if not item.void:
                leased[item.version_id] = leased.get(item.version_id, 0) | item.mask
        self._swarms.check(leased)

    # --- messages -------------------------------------------------------------------------------

    def _handle_said(
        self, session: int, message: ToTracker, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        if not self._nodes.heard(session, now_s):
            return
        node = self._nodes.of_session(session)
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
                swarm = self._swarms.holding(node.address.node, message, now_s, effects)
                self._grant_swarm(swarm, now_s, effects)
            case Missing():
                swarm = self._swarms.missing(node.address.node, message, now_s, effects)
                # Perhaps nobody was able to read them, and somebody is now.
                self._grant_swarm(swarm, now_s, effects)
            case ReportCorrupt():
                self._report_corrupt(message, now_s, effects)
            case StatusRequest():
                effects.append(Tell(session, Status(message.request_id, self.status(now_s))))
            case Locate():
                located = self._replicas.located(node.address.node, message)
                effects.append(Tell(session, located))
            case WhoHas():
                held_by = self._replicas.held_by(node.address.node, message)
                effects.append(Tell(session, held_by))

    # --- nodes ----------------------------------------------------------------------------------

    def _register(
        self, session: int, message: Register, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        if message.protocol != PROTOCOL_VERSION:
            reason = f"protocol {message.protocol}, expected {PROTOCOL_VERSION}"
            effects.append(CloseSession(session, reason))
            return
        name = message.address.node
        known = self._nodes.of_session(session)
        if known is not None and known.address.node != name:
            effects.append(CloseSession(session, "one connection, two nodes"))
            return
        former = self._nodes.get(name)
        if former is not None:
            self._nodes.replace(former)
            self._lose_node(former, now_s, effects)
            if former.session != session:
                effects.append(CloseSession(former.session, "the node registered anew"))
        self._handover.registered(name, message.stood_in, now_s)
        node = Node(session, message.address, now_s, message.clock_s, now_s, message.disk)
        node.key_tags = message.key_tags
        self._nodes.add(node)
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
            LEASE_S,
            self._until_s(node, now_s),
            adopted,
            self._nodes.seeds(node, SEEDS_MAX, now_s),
            self._wall_offset_s + now_s,
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
            self._swarms.reclaim(swarm)
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
        name = node.address.node
        waiting = [version_id for version_id in self._swarms.of(name) if self._waits(version_id)]
        turns_over = self._writes.turns_over(name, now_s)
        until_s = self._until_s(node, now_s)
        seeds = self._nodes.seeds_if_due(node, SEEDS_AT_ONCE, now_s)
        renewed = Renewed(
            until_s,
            sorted(waiting)[:WAITING_MAX],
            turns_over,
            seeds,
            self._wall_offset_s + now_s,
        )
        effects.append(Tell(node.session, renewed))

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
        self._handover.lost(name, now_s, len(self._nodes))
        self._writes.lose_node(name)
        self._replicas.lose_node(name)
        reading: dict[bytes, int] = {}
        for lease_id in node.leases:
            leased = self._ranges[lease_id]
            if not leased.void and leased.version_id in self._swarms.of(name):
                leased.void = True
                reading[leased.version_id] = reading.get(leased.version_id, 0) | leased.mask
        self._swarms.lose_node(name, reading, now_s, effects)
        self._grant_all(now_s, effects)

    # --- swarms ---------------------------------------------------------------------------------

    def _join(self, node: Node, message: Join, now_s: float, effects: list[TrackerEffect]) -> None:
        version_id = message.version_id
        layout = ChunkLayout(message.size_bytes, message.chunk_size_bytes)
        if layout.chunk_count > CHUNK_COUNT_MAX:
            reason = f"{layout.chunk_count} chunks; at most {CHUNK_COUNT_MAX} are possible"
            effects.append(Tell(node.session, Refused(reason, version_id)))
            return
        name = node.address.node
        self._replicas.drop(name, version_id)  # it would not want what it has
        swarm = self._swarms.get(version_id)
        if swarm is None:
            swarm = self._swarms.create(message, layout)
            for leased in self._ranges.values():
                if leased.version_id == version_id:
                    self._enter_range(swarm, leased)
        self._swarms.join(swarm, name, message, now_s, effects)
        self._grant(swarm.file_server, now_s, effects)

    def _leave(
        self, node: Node, version_id: bytes, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        name = node.address.node
        self._replicas.drop(name, version_id)
        swarm = self._swarms.leave(version_id, name, now_s, effects)
        self._grant_swarm(swarm, now_s, effects)

    def _add_replicas(
        self, node: Node, message: Replicas, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        name = node.address.node
        if message.more is not None:
            self._replicas.tells_anew(name)
        for version_id in message.version_ids:
            self._replicas.add(name, version_id)
            swarm = self._swarms.get(version_id)
            if swarm is not None:
                self._swarms.completed(swarm, name, effects)
                self._grant(swarm.file_server, now_s, effects)
        if message.more is False:
            for version_id in self._replicas.has_told(name):
                self._leave(node, version_id, now_s, effects)

    def _report_corrupt(
        self, message: ReportCorrupt, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        if message.node in self._nodes:
            self._corrupt[message.node] = self._corrupt.get(message.node, 0) + 1
        swarm = self._swarms.distrust(message, now_s, effects)
        self._grant_swarm(swarm, now_s, effects)

    # --- slots ----------------------------------------------------------------------------------

    def _server(self, name: str) -> FileServer:
        server = self._servers.get(name)
        if server is None:
            statistics = self._statistics.of_server(name)
            ledger = SlotLedger(self._slots_max(name), statistics)
            server = self._servers[name] = FileServer(ledger, statistics)
        return server

    def _ledger(self, name: str) -> SlotLedger:
        return self._server(name).ledger

    def _grant_all(self, now_s: float, effects: list[TrackerEffect]) -> None:
        for name in list(self._servers):
            self._grant(name, now_s, effects)

    def _grant_swarm(self, swarm: Swarm | None, now_s: float, effects: list[TrackerEffect]) -> None:
        """Something has changed in this swarm: there may be somebody to read for it."""
        if swarm is not None:
            self._grant(swarm.file_server, now_s, effects)

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

        So swift readers read on, then come those that have waited longest. Of racks that are known
        the one that has the fewest readers comes first, so that each reads its share.
        """
        able = (name for name in swarm.order if self._may_read(swarm, name, now_s))
        if swarm.neighbourhood.racks:
            reading = Counter(self._racks_of_readers(swarm))
            first = islice(able, CANDIDATES_MAX)
            name = min(first, key=lambda it: reading[swarm.neighbourhood.rack_of(it)], default=None)
        else:
            name = next(able, None)
        if name is not None:
            swarm.order.remove(name)
            swarm.order.append(name)
        return name

    def _may_read(self, swarm: Swarm, name: str, now_s: float) -> bool:
        member = swarm.members[name]
        able = member.can_read and not member.complete and not member.reading
        able = able and not self._nodes[name].silent
        patient = member.failures < READ_FAILURES_MAX
        patient = patient or member.failed_s + READ_AGAIN_S <= now_s
        return able and member.trusted and patient

    def _racks_of_readers(self, swarm: Swarm) -> Iterator[str]:
        """Where those stand that read for this swarm now."""
        for lease in self._ledger(swarm.file_server).leases.values():
            if lease.claim == swarm.version_id and lease.node in swarm.members:
                yield swarm.neighbourhood.rack_of(lease.node)

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
        self._swarms.reading_begins(swarm, name, leased.mask)
        effects.append(JournalGrant(lease_id, name))
        until_s = self._until_s(node, now_s)
        self._nodes.tell(name, Lease(lease_id, swarm.version_id, first, count, until_s), effects)

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
        self._nodes.tell(write.node, WriteLease(lease_id, write.write_id, until_s), effects)

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
        if swarm is not None and not leased.void:
            mask = leased.mask
            self._swarms.reading_ends(swarm, leased.node, mask, mask if held is None else held)
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
                member.read_failed(now_s)
            if message.source_changed:
                self._swarms.revoke(swarm, message.reason, effects)
        self._grant(leased.file_server, now_s, effects)

    # --- time -----------------------------------------------------------------------------------

    def _handle_time(self, now_s: float, effects: list[TrackerEffect]) -> None:
        if self._handover.present(now_s):
            effects.append(JournalPresent())
        if self._earlier and now_s >= self._quarantine_until_s:
            effects.extend(JournalEnd(lease_id) for lease_id in self._earlier)
            self._earlier.clear()
        self._nodes.close_silent(now_s, effects)
        self._swarms.end_searches(now_s, effects)
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
        if swarm is not None and not leased.void:
            self._swarms.reading_ran_out(swarm, leased.node, leased.mask, now_s, effects)

    # --- for people -----------------------------------------------------------------------------

    def status(self, now_s: float) -> dict[str, object]:
        """The state of the cluster as plain data: nodes, file_servers, swarms, corrupt, and the
        statistics of this life of the tracker."""
        return {
            "statistics": self._statistics.since_start(len(self._nodes)),
            "nodes": [self._node_status(node, now_s) for node in self._nodes.sorted()],
            "file_servers": [
                self._server_status(name, server, now_s)
                for name, server in sorted(self._servers.items())
            ],
            "swarms": [self._swarm_status(swarm) for swarm in self._swarms.sorted()],
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
            "replicas": self._replicas.count(node.address.node),
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
