"""A small cluster in virtual time: the machines of some nodes and a tracker, joined by queues.

A seed decides everything: how long every message, request and disk call takes, and what breaks.
Connections keep the order of their messages, nothing else does. Every event that a machine is given
is followed by its ``check``; the cluster itself checks what no machine can see alone: how many
nodes read from the file server at once, that a request is answered once, that a file is put in
place only with the right digests, and that nothing is dropped while something is under way for it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from blake3 import blake3

from swarmcache import messages
from swarmcache.chunks import ChunkLayout, FileVersion, mask_to_bytes
from swarmcache.messages import BetweenNodes, FromTracker, NodeAddress, Replicas, ToTracker
from swarmcache.peer_events import (
    AnnounceReplicas,
    AnswerCached,
    AnswerHolders,
    AnswerNoSlot,
    AnswerOriginal,
    AnswerSlot,
    AnswerStatus,
    CheckCopy,
    ChunkAbsent,
    ChunkArrived,
    ChunkCorrupt,
    ChunksRead,
    ChunksRecovered,
    DialPeer,
    DistrustPeer,
    DropPartial,
    FetchChunk,
    FilePublished,
    FileWanted,
    HangUp,
    HoldersWanted,
    LoadManifest,
    ManifestLoaded,
    PeerBusy,
    PeerConnected,
    PeerEffect,
    PeerEvent,
    PeerLost,
    PeerSaid,
    PeerUnreachable,
    PublishFailed,
    PublishFile,
    RangeReadDone,
    RangeReadFailed,
    ReadRange,
    ReplicasLost,
    RequestGone,
    ReserveSpace,
    SpaceRefused,
    SpaceReserved,
    TellPeer,
    TellTracker,
    TimePassed,
    TrackerConnected,
    TrackerLost,
    TrackerSaid,
    WriteFailed,
    WriterAnswered,
    WriteWanted,
)
from swarmcache.peer_state import PeerState
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    JournalPresent,
    NodeConnected,
    NodeLost,
    NodeSaid,
    Tell,
    TrackerEffect,
    TrackerEvent,
)
from swarmcache.tracker_events import TimePassed as TrackerTimePassed
from swarmcache.tracker_state import TrackerState

MIB = 1 << 20
SERVER = "nfs01:/export"
# One piece read from the file server never takes longer, as in the margin of a lease.
PIECE_MAX_S = 0.4
SPINS_MAX = 20
EVENTS_MAX = 200_000


def version_of(name: str, size_bytes: int) -> FileVersion:
    """A file version that nobody else has."""
    return FileVersion(b"/nfs/" + name.encode(), size_bytes, 1_700_000_000_000_000_000)


def digest_of(version: FileVersion, layout: ChunkLayout, chunk: int) -> bytes:
    """What the digest of a chunk of this file is: another one for every way of cutting the file."""
    return blake3(b"%s %d %d" % (version.version_id, layout.chunk_size_bytes, chunk)).digest()


def address_of(index: int) -> NodeAddress:
    """The address of the node with this number; ids are in the order of the numbers."""
    return NodeAddress(f"node{index:03}:7381", 7382, f"node{index:03}")


@dataclass
class Faults:
    """How likely it is that one thing goes wrong, each time that it is done."""

    busy: float = 0.0
    absent: float = 0.0
    unreachable: float = 0.0
    corrupt: float = 0.0
    write: float = 0.0
    publish: float = 0.0
    space: float = 0.0
    read: float = 0.0


@dataclass
class Stored:
    """What a node's disk has of one file version."""

    version: FileVersion
    layout: ChunkLayout
    chunks: dict[int, bytes] = field(default_factory=dict)
    complete: bool = False

    def is_right(self) -> bool:
        """Every chunk is there with the digest that it should have."""
        wanted = range(self.layout.chunk_count)
        return all(
            self.chunks.get(chunk) == digest_of(self.version, self.layout, chunk)
            for chunk in wanted
        )


@dataclass
class Writer:
    """A client that writes a file in pieces, as long as it has been told that it may.

    ``request``: None while its daemon is away. ``unlimited``: it was told to do without a slot.
    """

    node: Node
    user: str
    server: str
    pieces: int
    request: int | None = None
    until_s: float = 0.0
    unlimited: bool = False
    writing: bool = False
    alive: bool = True
    paused_until_s: float = 0.0

    @property
    def done(self) -> bool:
        return not self.alive or (not self.pieces and not self.writing)


class Node:
    """A node with its disk. ``life`` grows with every restart; what a former life began is void."""

    def __init__(self, cluster: Cluster, index: int, offset_s: float) -> None:
        self.cluster = cluster
        self.address = address_of(index)
        self.name = self.address.node
        self.offset_s = offset_s
        self.alive = True
        self.life = 0
        self.paused_until_s = 0.0
        self.disk: dict[bytes, Stored] = {}
        self.state = self._fresh_state()
        self.session: int | None = None
        self.links: dict[str, int] = {}
        self.waiting: dict[int, FileVersion] = {}
        self.distrusted: set[str] = set()
        self.under_way: Counter[bytes] = Counter()
        self.wake_at_s: float | None = None
        self.spins = 0

    def _fresh_state(self) -> PeerState:
        seed = self.cluster.rng.random()
        return PeerState(self.address, Random(seed), peers_max=self.cluster.peers_max)

    def clock_s(self) -> float:
        """What this node's own clock shows."""
        return self.cluster.now_s + self.offset_s

    def restart(self) -> None:
        """A new daemon on the same disk."""
        self.alive = True
        self.life += 1
        self.state = self._fresh_state()
        self.under_way.clear()
        self.distrusted.clear()
        self.wake_at_s = None


class Cluster:
    """Nodes, tracker and network, driven by one queue of things to come."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int,
        slots_max: int = 2,
        peers_max: int = 40,
        faults: Faults | None = None,
        corrupting: tuple[int, ...] = (),
        piece_max_s: float = 0.05,
    ) -> None:
        self.rng = Random(seed)
        self.now_s = 1000.0
        self.peers_max = peers_max
        self.slots_max = slots_max
        self.faults = faults or Faults()
        self.piece_max_s = min(piece_max_s, PIECE_MAX_S)
        self.answers: Counter[int] = Counter()
        self.originals = 0
        self.read_bytes = 0
        self.readers_peak = 0
        self.reading: Counter[str] = Counter()
        self.writers: list[Writer] = []
        self.unlimited = 0
        self.corrupting = {address_of(index).node for index in corrupting}
        self.changed: set[bytes] = set()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ids = itertools.count(1)
        self._last_s: dict[object, float] = {}
        self._requests = itertools.count(1)
        self._wants: dict[int, tuple[str, FileVersion, int, bool, str]] = {}
        self._questions: dict[int, tuple[str, int]] = {}  # node and its life
        self.journal: dict[int, str] = {}
        self.present_s: float | None = None
        self.lease_ids = 1
        self.tracker_up = True
        self.tracker_life = 0
        self.sessions: dict[int, tuple[str, int]] = {}
        self.tracker_wake_s: float | None = None
        self.tracker_spins = 0
        self.tracker = self._fresh_tracker()
        self.nodes = {
            address_of(index).node: Node(self, index, self.rng.uniform(-500.0, 500.0))
            for index in range(nodes)
        }
        for node in self.nodes.values():
            self._connect(node)

    # --- time and order --------------------------------------------------------------------------

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._order), act))

    def _in_order(self, channel: object, act: Callable[[], None]) -> None:
        """Do something after a random delay, but not before what this channel carried earlier."""
        at_s = max(self.now_s + self.delay_s(), self._last_s.get(channel, 0.0))
        self._last_s[channel] = at_s
        heapq.heappush(self._queue, (at_s, next(self._order), act))

    def delay_s(self) -> float:
        """How long a message or a disk call takes: mostly a little, now and then much."""
        return self.rng.expovariate(1 / 0.3) if self.rng.random() < 0.02 else self.rng.random() / 50

    def _hit(self, chance: float) -> bool:
        return chance > 0 and self.rng.random() < chance

    def run(self, until: Callable[[], bool], limit_s: float) -> None:
        """Let things happen until the condition holds; it must, within so much virtual time."""
        end_s = self.now_s + limit_s
        for _ in range(EVENTS_MAX):
            if until():
                return
            assert self._queue, "nothing is going to happen any more"
            at_s, _, act = heapq.heappop(self._queue)
            assert at_s <= end_s, f"not done after {limit_s:g} s"
            self.now_s = max(self.now_s, at_s)
            act()
        raise AssertionError(f"not done after {EVENTS_MAX} events")

    def run_for(self, duration_s: float) -> None:
        """Let things happen for so long."""
        end_s = self.now_s + duration_s
        self.after(duration_s, lambda: None)
        self.run(lambda: self.now_s >= end_s, duration_s)

    # --- what tests do ---------------------------------------------------------------------------

    def want(
        self,
        index: int,
        version: FileVersion,
        *,
        chunk_size_bytes: int = MIB,
        can_read: bool = True,
        user: str = "ada",
        server: str = SERVER,
    ) -> int:
        """A client of this node asks for a file; it asks again whenever it gets the original."""
        request = next(self._requests)
        node = self.nodes[address_of(index).node]
        if not node.alive:
            return request
        self._wants[request] = (node.name, version, chunk_size_bytes, can_read, user)
        node.waiting[request] = version
        wanted = FileWanted(request, version, server, user, chunk_size_bytes, can_read)
        self.tell_node(node, wanted)
        return request

    def write(self, index: int, pieces: int, *, user: str = "ada", server: str = SERVER) -> Writer:
        """A client of this node writes a file of so many pieces."""
        writer = Writer(self.nodes[address_of(index).node], user, server, pieces)
        self.writers.append(writer)
        self._want_slot(writer)
        return writer

    def kill_writer(self, writer: Writer) -> None:
        """The client ends without a word; only the kernel tells the daemon."""
        writer.alive = False
        writer.writing = False
        if writer.request is not None:
            self._say_to_daemon(writer, RequestGone(writer.request))

    def pause_writer(self, writer: Writer, duration_s: float) -> None:
        """The client is stopped, but for the piece that is under way."""
        writer.paused_until_s = self.now_s + duration_s

    def ask_holders(self, index: int, version: FileVersion) -> None:
        """A client of this node asks who else has a file."""
        request = next(self._requests)
        node = self.nodes[address_of(index).node]
        if node.alive:
            self._questions[request] = (node.name, node.life)
            self.tell_node(node, HoldersWanted(request, [version.version_id], nodes_max=1))

    def nobody_waits_for_holders(self) -> bool:
        """Every question about holders is answered, unless the daemon that was asked has ended."""
        return not any(
            self.nodes[name].alive and self.nodes[name].life == life
            for name, life in self._questions.values()
        )

    def has(self, index: int, version: FileVersion) -> bool:
        """The node has this file in place."""
        stored = self.nodes[address_of(index).node].disk.get(version.version_id)
        return stored is not None and stored.complete

    def everybody_has(self, version: FileVersion) -> bool:
        """Every node that is alive has the file in place, and nobody waits for it."""
        return all(
            self.has(index, version) and version not in node.waiting.values()
            for index, node in enumerate(self.nodes.values())
            if node.alive
        )

    def kill(self, index: int) -> None:
        """The daemon ends without a word; its clients go elsewhere."""
        node = self.nodes[address_of(index).node]
        if not node.alive:
            return
        node.alive = False
        node.waiting.clear()
        self.reading.pop(node.name, None)
        if node.session is not None:
            session, node.session = node.session, None
            self._lose_session(session)
        for other in list(node.links):
            self._cut(node.name, other, tell=(other,))

    def restart(self, index: int) -> None:
        """A new daemon begins where the killed one was, and its clients ask again."""
        node = self.nodes[address_of(index).node]
        assert not node.alive
        node.restart()
        self._connect(node)

    def break_link(self, index: int, other: int) -> None:
        """The connection of two nodes ends; both notice."""
        first, second = address_of(index).node, address_of(other).node
        if second in self.nodes[first].links:
            self._cut(first, second, tell=(first, second))

    def break_session(self, index: int) -> None:
        """The connection of a node to the tracker ends; both notice, and it connects again."""
        node = self.nodes[address_of(index).node]
        if node.session is None:
            return
        session, node.session = node.session, None
        self._lose_session(session)
        self.tell_node(node, TrackerLost("the connection broke"))
        self.after(self.rng.random(), lambda: self._connect(node))

    def pause(self, index: int, duration_s: float) -> None:
        """The node's process is stopped: nothing reaches it, it reads nothing, until it wakes."""
        node = self.nodes[address_of(index).node]
        node.paused_until_s = self.now_s + duration_s

    def lose_disk(self, index: int) -> None:
        """One of the node's disks is lost: half of its replicas, half of what it was fetching."""
        node = self.nodes[address_of(index).node]
        if not node.alive:
            return
        lost = [key for key in sorted(node.disk) if self.rng.random() < 0.5]
        for version_id in lost:
            if node.disk[version_id].complete:
                del node.disk[version_id]
            else:
                self.tell_node(node, WriteFailed(version_id, "the disk is lost"))
        self.tell_node(node, ReplicasLost())

    def kill_tracker(self) -> None:
        """The tracker ends without a word. Only its journal stays."""
        self.tracker_up = False
        self.tracker_life += 1
        for session, (name, _) in list(self.sessions.items()):
            del self.sessions[session]
            node = self.nodes[name]
            if node.session == session:
                node.session = None
                self._in_order(("session", session), self._node_act(node, self._tracker_gone))

    def restart_tracker(self) -> None:
        """A new tracker with the journal of the killed one; the nodes find it by and by."""
        assert not self.tracker_up
        self.tracker_up = True
        self.tracker_wake_s = None
        self.tracker = self._fresh_tracker()
        self._wake_tracker()

    # --- the tracker -----------------------------------------------------------------------------

    def _fresh_tracker(self) -> TrackerState:
        present_s, self.present_s = self.present_s, self.present_s or self.now_s
        return TrackerState(
            Random(self.rng.random()),
            slots_max=lambda _: self.slots_max,
            peers_max=self.peers_max,
            earlier_leases=dict(self.journal),
            first_lease_id=self.lease_ids,
            away_s=None if present_s is None else self.now_s - present_s,
            now_s=self.now_s,
        )

    def tell_tracker(self, event: TrackerEvent) -> None:
        """Give the tracker an event and do what it wants."""
        if not self.tracker_up:
            return
        effects = self.tracker.handle(event, self.now_s)
        self.tracker.check()
        for effect in effects:
            self._tracker_effect(effect)
        self._wake_tracker()

    def _wake_tracker(self) -> None:
        at_s = self.tracker.wake_at_s()
        if at_s is None or (self.tracker_wake_s is not None and self.tracker_wake_s <= at_s):
            return
        self.tracker_wake_s = at_s
        life = self.tracker_life
        self.tracker_spins = self.tracker_spins + 1 if at_s <= self.now_s else 0
        assert self.tracker_spins < SPINS_MAX, "the tracker wakes again and again"

        def wake() -> None:
            if self.tracker_life == life and self.tracker_wake_s == at_s:
                self.tracker_wake_s = None
                self.tell_tracker(TrackerTimePassed())

        self.after(max(at_s - self.now_s, 0.0), wake)

    def _tracker_effect(self, effect: TrackerEffect) -> None:
        match effect:
            case Tell():
                self._tell_from_tracker(effect.session, effect.message)
            case CloseSession():
                if effect.session in self.sessions:
                    name, _ = self.sessions[effect.session]
                    node = self.nodes[name]
                    if node.session == effect.session:
                        node.session = None
                        self.after(0.0, self._node_act(node, self._tracker_gone))
                    self._lose_session(effect.session)
            case JournalGrant():
                self.journal[effect.lease_id] = effect.node
                self.lease_ids = max(self.lease_ids, effect.lease_id + 1)
            case JournalEnd():
                self.journal.pop(effect.lease_id, None)
            case JournalPresent():
                self.present_s = self.now_s

    def _tell_from_tracker(self, session: int, message: FromTracker) -> None:
        if session not in self.sessions:
            return
        name, life = self.sessions[session]
        node = self.nodes[name]
        again = messages.decode_from_tracker(messages.encode(message))

        def deliver() -> None:
            if node.alive and node.life == life and node.session == session:
                self.tell_node(node, TrackerSaid(again))

        self._in_order(("to node", session), deliver)

    def _connect(self, node: Node) -> None:
        """Dial the tracker until it answers."""
        life = node.life

        def arrive() -> None:
            if not node.alive or node.life != life or node.session is not None:
                return
            if not self.tracker_up:
                self.after(0.3, arrive)
                return
            session = next(self._ids)
            node.session = session
            self.sessions[session] = (node.name, node.life)
            self.tell_tracker(NodeConnected(session))
            self.tell_node(node, TrackerConnected())

        self.after(self.delay_s(), arrive)

    def _tracker_gone(self, node: Node) -> None:
        if node.session is None:
            self.tell_node(node, TrackerLost("the tracker is gone"))
            self._connect(node)

    def _lose_session(self, session: int) -> None:
        life = self.tracker_life

        def lose() -> None:
            if self.sessions.pop(session, None) is not None and self.tracker_life == life:
                self.tell_tracker(NodeLost(session))

        self._in_order(("to tracker", session), lose)

    def _say_to_tracker(self, node: Node, message: ToTracker) -> None:
        session = node.session
        if session is None:
            return
        again = messages.decode_to_tracker(messages.encode(message))

        def deliver() -> None:
            if session in self.sessions:
                self.tell_tracker(NodeSaid(session, again))

        self._in_order(("to tracker", session), deliver)

    # --- nodes -----------------------------------------------------------------------------------

    def tell_node(self, node: Node, event: PeerEvent) -> None:
        """Give a node an event and do what it wants."""
        if not node.alive:
            return
        if node.paused_until_s > self.now_s:
            self._in_order(("pause", node.name, node.life), self._resume(node, event))
            return
        effects = node.state.handle(event, node.clock_s())
        node.state.check()
        for effect in effects:
            self._node_effect(node, effect)
        self._wake_node(node)

    def _resume(self, node: Node, event: PeerEvent) -> Callable[[], None]:
        life = node.life

        def resume() -> None:
            if node.life == life:
                self.tell_node(node, event)

        self._last_s[("pause", node.name, life)] = max(
            self._last_s.get(("pause", node.name, life), 0.0), node.paused_until_s
        )
        return resume

    def _wake_node(self, node: Node) -> None:
        at_s = node.state.wake_at_s()
        if at_s is None or (node.wake_at_s is not None and node.wake_at_s <= at_s):
            return
        node.wake_at_s = at_s
        life = node.life
        node.spins = node.spins + 1 if at_s <= node.clock_s() else 0
        assert node.spins < SPINS_MAX, "a node wakes again and again"

        def wake() -> None:
            if node.life == life and node.wake_at_s == at_s:
                node.wake_at_s = None
                self.tell_node(node, TimePassed())

        # A timer is never early, whatever the rounding of the two clocks.
        self.after(max(at_s - node.clock_s(), 0.0) + 1e-9, wake)

    def _node_act(self, node: Node, act: Callable[[Node], None]) -> Callable[[], None]:
        """To be done unless the daemon has ended by then."""
        life = node.life

        def guarded() -> None:
            if node.alive and node.life == life:
                act(node)

        return guarded

    def _later(self, node: Node, event: PeerEvent, delay_s: float | None = None) -> None:
        """The event of something that this node's shell began."""

        def tell(at: Node) -> None:
            self.tell_node(at, event)

        self.after(self.delay_s() if delay_s is None else delay_s, self._node_act(node, tell))

    def _node_effect(self, node: Node, effect: PeerEffect) -> None:
        match effect:
            case TellTracker():
                self._say_to_tracker(node, effect.message)
            case TellPeer():
                self._say_to_peer(node, effect.node, effect.message)
            case DialPeer():
                self._dial(node, effect.address)
            case HangUp():
                if effect.node in node.links:
                    self._cut(node.name, effect.node, tell=(effect.node,))
            case ReserveSpace():
                self._reserve(node, effect)
            case FetchChunk():
                self._fetch(node, effect)
            case ReadRange():
                self._read(node, effect)
            case PublishFile():
                self._publish(node, effect.version_id)
            case DropPartial():
                assert not node.under_way[effect.version_id], "dropped while something is under way"
                stored = node.disk.get(effect.version_id)
                if stored is not None and (not effect.keep or stored.complete):
                    del node.disk[effect.version_id]
            case CheckCopy():
                pass  # what lies on these disks is right; liars lie on the wire
            case LoadManifest():
                self._later(node, self._manifest(node, effect))
            case AnnounceReplicas():
                held = [key for key, stored in sorted(node.disk.items()) if stored.complete]
                self._say_to_tracker(node, Replicas(held, more=False))
            case AnswerCached() | AnswerOriginal():
                self._answer(node, effect)
            case AnswerSlot() | AnswerNoSlot():
                self._answer_writer(node, effect)
            case AnswerStatus():
                self.answers[effect.request] += 1
            case AnswerHolders():
                self.answers[effect.request] += 1
                assert self._questions.pop(effect.request, None), "a question was answered twice"
            case DistrustPeer():
                node.distrusted.add(effect.node)

    def _manifest(self, node: Node, effect: LoadManifest) -> ManifestLoaded:
        stored = node.disk.get(effect.version_id)
        if stored is None or not stored.complete:
            return ManifestLoaded(effect.version_id, (), 0)
        digests = tuple(stored.chunks[chunk] for chunk in range(stored.layout.chunk_count))
        return ManifestLoaded(effect.version_id, digests, stored.layout.chunk_size_bytes)

    def _answer(self, node: Node, effect: AnswerCached | AnswerOriginal) -> None:
        self.answers[effect.request] += 1
        assert self.answers[effect.request] == 1, "a request was answered twice"
        assert effect.request in node.waiting, "somebody was answered who did not ask"
        version = node.waiting.pop(effect.request)
        assert version.version_id == effect.version_id
        if isinstance(effect, AnswerCached):
            stored = node.disk[effect.version_id]
            assert stored.complete, "answered before the file was in place"
            assert stored.is_right(), "answered with a wrong file"
            return
        self.originals += 1
        name, version, chunk_size_bytes, can_read, user = self._wants[effect.request]
        index = list(self.nodes).index(name)

        def again(at: Node) -> None:
            if version.version_id not in self.changed and not self.has(index, version):
                self.want(
                    index, version, chunk_size_bytes=chunk_size_bytes, can_read=can_read, user=user
                )

        self.after(0.5, self._node_act(node, again))

    # --- connections of nodes --------------------------------------------------------------------

    def _dial(self, node: Node, address: NodeAddress) -> None:
        assert node.name < address.node, "only the lower node id dials"

        def arrive(dialling: Node) -> None:
            other = self.nodes[address.node]
            if not other.alive or self._hit(self.faults.unreachable):
                self.tell_node(dialling, PeerLost(other.name, "connection refused"))
                return
            if other.name in dialling.links:
                self._cut(dialling.name, other.name, tell=(other.name,))
            link = next(self._ids)
            dialling.links[other.name] = other.links[dialling.name] = link
            self._in_order(
                ("link", link, other.name),
                self._node_act(other, lambda at: self._linked(at, dialling, link)),
            )
            self.tell_node(dialling, PeerConnected(other.address))

        self.after(self.delay_s(), self._node_act(node, arrive))

    def _linked(self, node: Node, other: Node, link: int) -> None:
        if node.links.get(other.name) == link:
            self.tell_node(node, PeerConnected(other.address))

    def _say_to_peer(self, node: Node, name: str, message: BetweenNodes) -> None:
        link = node.links.get(name)
        if link is None:
            return
        other = self.nodes[name]
        again = messages.decode_between_nodes(messages.encode(message))

        def deliver(at: Node) -> None:
            if at.links.get(node.name) == link:
                self.tell_node(at, PeerSaid(node.name, again))

        self._in_order(("link", link, name), self._node_act(other, deliver))

    def _cut(self, first: str, second: str, tell: tuple[str, ...]) -> None:
        link = self.nodes[first].links.pop(second)
        self.nodes[second].links.pop(first)
        for name, other in ((first, second), (second, first)):
            if name in tell:
                lost = PeerLost(other, "the connection broke")
                node = self.nodes[name]

                def deliver(at: Node, other: str = other, lost: PeerLost = lost) -> None:
                    if other not in at.links:
                        self.tell_node(at, lost)

                self._in_order(("link", link, name), self._node_act(node, deliver))

    # --- disks -----------------------------------------------------------------------------------

    def _reserve(self, node: Node, effect: ReserveSpace) -> None:
        version_id = effect.version.version_id
        assert not node.under_way[version_id], "an attempt began before the former one had ended"
        layout = ChunkLayout(effect.version.size_bytes, effect.chunk_size_bytes)
        if self._hit(self.faults.space):
            self._ends(node, version_id, SpaceRefused(version_id, "the disk is full"))
            return
        stored = node.disk.get(version_id)
        if stored is None or stored.layout != layout or stored.complete:
            stored = node.disk[version_id] = Stored(effect.version, layout)
        digests = dict(stored.chunks)
        reserved_s = self.delay_s()
        reserved = SpaceReserved(version_id, effect.chunk_size_bytes)
        self._ends(node, version_id, reserved, reserved_s)
        node.under_way[version_id] += 1

        def recovered(at: Node) -> None:
            if at.paused_until_s > self.now_s:
                self.after(at.paused_until_s - self.now_s, self._node_act(at, recovered))
                return
            at.under_way[version_id] -= 1
            self.tell_node(at, ChunksRecovered(version_id, digests))

        self.after(reserved_s + self.delay_s(), self._node_act(node, recovered))

    def _ends(
        self, node: Node, version_id: bytes, event: PeerEvent, delay_s: float | None = None
    ) -> None:
        """Something that ends with this event is under way for a file version."""
        node.under_way[version_id] += 1

        def end(at: Node) -> None:
            if at.paused_until_s > self.now_s:
                self.after(at.paused_until_s - self.now_s, self._node_act(at, end))
                return
            at.under_way[version_id] -= 1
            self.tell_node(at, event)

        self.after(self.delay_s() if delay_s is None else delay_s, self._node_act(node, end))

    def _publish(self, node: Node, version_id: bytes) -> None:
        stored = node.disk[version_id]
        assert stored.is_right(), "a wrong file would be put in place"
        if self._hit(self.faults.publish):
            self._ends(node, version_id, PublishFailed(version_id, "the disk failed"))
            return
        node.under_way[version_id] += 1

        def done(at: Node) -> None:
            if at.paused_until_s > self.now_s:
                self.after(at.paused_until_s - self.now_s, self._node_act(at, done))
                return
            at.under_way[version_id] -= 1
            stored.complete = True
            self.tell_node(at, FilePublished(version_id))

        self.after(self.delay_s(), self._node_act(node, done))

    def _fetch(self, node: Node, request: FetchChunk) -> None:
        other = self.nodes[request.address.node]
        key = (request.version_id, request.chunk, other.name)
        assert other.name not in node.distrusted, "a distrusted peer was asked"
        node.under_way[request.version_id] += 1

        def end(at: Node) -> None:
            if at.paused_until_s > self.now_s:
                self.after(at.paused_until_s - self.now_s, self._node_act(at, end))
                return
            outcome = self._outcome(at, other, request)
            if isinstance(outcome, WriteFailed):
                self.tell_node(at, outcome)
                outcome = PeerUnreachable(*key, reason="the disk refused the chunk")
            at.under_way[request.version_id] -= 1
            self.tell_node(at, outcome)

        self.after(self.delay_s() + 0.01, self._node_act(node, end))

    def _outcome(self, node: Node, other: Node, request: FetchChunk) -> PeerEvent:
        key = (request.version_id, request.chunk, other.name)
        if not other.alive or self._hit(self.faults.unreachable):
            return PeerUnreachable(*key, reason="connection reset")
        if self._hit(self.faults.busy):
            return PeerBusy(*key)
        stored = other.disk.get(request.version_id)
        if stored is None or request.chunk not in stored.chunks or self._hit(self.faults.absent):
            return ChunkAbsent(*key)
        digest = stored.chunks[request.chunk]
        wrong = other.name in self.corrupting or self._hit(self.faults.corrupt)
        if wrong or digest != request.digest:
            return ChunkCorrupt(*key)
        if self._hit(self.faults.write):
            return WriteFailed(request.version_id, "the disk is full")
        here = node.disk.get(request.version_id)
        if here is not None:  # put in place meanwhile, and lost with its disk
            here.chunks[request.chunk] = digest
        return ChunkArrived(*key)

    # --- the file server -------------------------------------------------------------------------

    def _read(self, node: Node, effect: ReadRange) -> None:
        node.under_way[effect.version_id] += 1
        began_s = self.now_s
        chunks = list(range(effect.first, effect.first + effect.count))

        def fail(at: Node, reason: str, *, changed: bool = False) -> None:
            at.under_way[effect.version_id] -= 1
            failed = RangeReadFailed(effect.version_id, effect.lease_id, reason, changed)
            self.tell_node(at, failed)

        def next_piece(at: Node) -> None:
            if at.paused_until_s > self.now_s:
                self.after(at.paused_until_s - self.now_s, self._node_act(at, next_piece))
            elif not chunks:
                at.under_way[effect.version_id] -= 1
                size_bytes = effect.count * MIB
                done = RangeReadDone(
                    effect.version_id, effect.lease_id, size_bytes, self.now_s - began_s
                )
                self.tell_node(at, done)
            elif not at.state.may_read(effect.lease_id, at.clock_s()):
                fail(at, "the lease ran out")
            elif effect.version_id in self.changed:
                fail(at, "the source changed", changed=True)
            elif self._hit(self.faults.read):
                fail(at, "stale file handle")
            else:
                self._piece(at, effect, chunks, next_piece)

        next_piece(node)

    def _piece(
        self,
        node: Node,
        effect: ReadRange,
        chunks: list[int],
        next_piece: Callable[[Node], None],
    ) -> None:
        self.reading[node.name] += 1
        self._count_transfers()

        def end(at: Node) -> None:
            self.reading[at.name] -= 1
            if not self.reading[at.name]:
                del self.reading[at.name]
            stored = at.disk[effect.version_id]
            chunk = chunks.pop(0)
            digest = digest_of(stored.version, stored.layout, chunk)
            stored.chunks[chunk] = digest
            self.read_bytes += stored.layout.length_bytes(chunk)
            self.tell_node(at, ChunksRead(effect.version_id, effect.lease_id, {chunk: digest}))
            next_piece(at)

        self.after(self.rng.random() * self.piece_max_s, self._node_act(node, end))

    def _count_transfers(self) -> None:
        transfers = sum(self.reading.values())
        transfers += sum(writer.writing and not writer.unlimited for writer in self.writers)
        self.readers_peak = max(self.readers_peak, transfers)
        assert transfers <= self.slots_max, f"{transfers} transfers, {self.slots_max} slots"

    # --- clients that write ----------------------------------------------------------------------

    def _want_slot(self, writer: Writer) -> None:
        """Ask the daemon, or whichever daemon comes in its place."""
        if not writer.alive or not writer.pieces:
            return
        if not writer.node.alive:
            self.after(0.2, lambda: self._want_slot(writer))
            return
        writer.request = next(self._requests)
        life = writer.node.life
        wanted = WriteWanted(writer.request, writer.server, writer.user)
        self._say_to_daemon(writer, wanted)

        def hear_of_its_end() -> None:
            if writer.node.life == life and writer.node.alive:
                self.after(0.3, hear_of_its_end)
            elif not writer.unlimited:
                writer.request = None
                self._want_slot(writer)

        self.after(0.3, hear_of_its_end)

    def _say_to_daemon(self, writer: Writer, event: PeerEvent) -> None:
        node = writer.node
        said = self._node_act(node, lambda at: self.tell_node(at, event))
        self._in_order(("writer says", id(writer), node.life), said)

    def _answer_writer(self, node: Node, effect: AnswerSlot | AnswerNoSlot) -> None:
        for writer in self.writers:
            if writer.node is node and writer.request == effect.request:
                hear = partial(self._writer_hears, writer, effect)
                self._in_order(("writer hears", id(writer), node.life), hear)

    def _writer_hears(self, writer: Writer, effect: AnswerSlot | AnswerNoSlot) -> None:
        if not writer.alive or writer.request != effect.request:
            return
        if writer.paused_until_s > self.now_s:
            again = partial(self._writer_hears, writer, effect)
            self.after(writer.paused_until_s - self.now_s, again)
            return
        if isinstance(effect, AnswerNoSlot):
            writer.unlimited = True
            self.unlimited += 1
        else:
            if effect.until_s is not None:
                assert effect.until_s >= writer.until_s, "a promise was taken back"
                writer.until_s = effect.until_s
            self._say_to_daemon(writer, WriterAnswered(effect.request))
        self._write_piece(writer)

    def _write_piece(self, writer: Writer) -> None:
        """The next piece, unless the last promise has run out: then the next one is awaited."""
        if not writer.alive or writer.writing:
            return
        if not writer.pieces:
            if writer.request is not None:
                self._say_to_daemon(writer, RequestGone(writer.request))
                writer.request = None
            return
        if writer.paused_until_s > self.now_s:
            delay_s = writer.paused_until_s - self.now_s
            self.after(delay_s, lambda: self._write_piece(writer))
            return
        if not writer.unlimited and writer.node.clock_s() >= writer.until_s:
            return
        writer.writing = True
        self._count_transfers()

        def written() -> None:
            if writer.alive:
                writer.writing = False
                writer.pieces -= 1
                self._write_piece(writer)

        self.after(self.rng.random() * self.piece_max_s, written)


def bits(*chunks: int) -> bytes:
    """The chunks as a mask on the wire."""
    mask = 0
    for chunk in chunks:
        mask |= 1 << chunk
    return mask_to_bytes(mask)
