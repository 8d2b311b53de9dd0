"""A cluster in virtual time: carries out the effects of the production machines.

One tracker, one file server, and nodes on equal terms. It does for the machines what the shells
``peer.py`` and ``tracker.py`` do on real sockets, disks and threads.

What takes time: bytes of chunks (``network.py``), ``latency_s`` one way for every message, two of
these for every request of a chunk and every new connection, and ``publish_s``. What takes none:
thinking, digests, disks. Messages are counted in their encoded size but take no bandwidth: beside
chunks of 256 KiB and more they are a few parts in a thousand (``Result`` shows how many).

Nothing fails here. An effect that only a fault can cause ends the simulation with
``SimulationFailed``.

Invariant, checked whenever it could change: no file server has more than ``slots_max`` readers.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from blake3 import blake3

from simulations.engine import Engine, SimulationFailed
from simulations.network import Flow, Link, Network
from swarmcache.chunks import ChunkLayout, FileVersion, choose_chunk_size
from swarmcache.config import TransferSettings
from swarmcache.messages import NodeAddress, Replicas, encode
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
    ChunkRead,
    ChunksRecovered,
    DialPeer,
    DistrustPeer,
    DropPartial,
    FetchChunk,
    FilePublished,
    FileWanted,
    HangUp,
    LoadManifest,
    ManifestLoaded,
    PeerBusy,
    PeerConnected,
    PeerEffect,
    PeerEvent,
    PeerLost,
    PeerSaid,
    PeerUnreachable,
    PublishFile,
    RangeReadDone,
    RangeReadFailed,
    ReadRange,
    ReserveSpace,
    SpaceReserved,
    TellPeer,
    TellTracker,
    TrackerConnected,
    TrackerSaid,
)
from swarmcache.peer_events import TimePassed as PeerTimePassed
from swarmcache.peer_state import PeerState
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    NodeConnected,
    NodeSaid,
    Tell,
    TrackerEvent,
)
from swarmcache.tracker_events import TimePassed as TrackerTimePassed
from swarmcache.tracker_state import TrackerState
from swarmcache.upload_slots import Upload, UploadSlots

FILE_SERVER = "nfs01:/export"
USER = "user"
EVENTS_MAX = 100_000_000


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What a simulated cluster is like. Rates in bytes/s, each way.

    ``check_every``: the machine at hand is asked to ``check()`` itself every so many events.
    """

    nodes: int
    seed: int
    node_rate: float = 125e6
    file_server_rate: float = 125e6
    slots_max: int = 8
    uploads_max: int = TransferSettings().uploads_max
    latency_s: float = 0.0002
    publish_s: float = 0.001
    check_every: int = 10_000


@dataclass(slots=True)
class Replica:
    """What a node has on its disk of one file version: symbolic digests by chunk."""

    layout: ChunkLayout
    digests: dict[int, bytes]
    published: bool = False


class Node:
    """One simulated node: its machine, its links, its disk and its connections."""

    __slots__ = ("answered_s", "armed_s", "connected", "down", "index", "machine", "name",
                 "replicas", "up", "upload_slots", "uploads_waiting")  # fmt: skip

    def __init__(self, index: int, settings: ClusterSettings) -> None:
        self.index = index
        self.name = f"node{index:05d}:7381"
        address = NodeAddress(self.name, 7382, f"node{index:05d}")
        rng = Random(f"{settings.seed} {self.name}")
        self.machine = PeerState(address, rng, window=settings.uploads_max)
        self.up = Link(f"{self.name} up", settings.node_rate)
        self.down = Link(f"{self.name} down", settings.node_rate)
        # When the engine will wake the machine; never later than it wants.
        self.armed_s = math.inf
        self.connected: set[str] = set()
        self.upload_slots = UploadSlots(settings.uploads_max)
        self.uploads_waiting: deque[Fetch] = deque()
        self.replicas: dict[bytes, Replica] = {}
        self.answered_s: dict[int, float] = {}


class Fetch(Flow):
    """A chunk on its way from one node to another."""

    __slots__ = ("cluster", "effect", "node", "source", "upload")

    def __init__(self, cluster: Cluster, node: Node, effect: FetchChunk) -> None:
        self.cluster = cluster
        self.node = node
        self.effect = effect
        self.source = cluster.nodes[effect.address.node]
        self.upload = Upload(effect.version_id, effect.held_chunks)
        deadline_s = cluster.engine.now_s + effect.deadline_s
        super().__init__(self.source.up, node.down, effect.length_bytes, deadline_s)

    def ended(self, complete: bool) -> None:
        self.cluster.fetch_ended(self, complete)


class RangeReading:
    """One leased range being read: chunk by chunk, as the production reader does."""

    __slots__ = ("chunk", "effect", "node", "read_bytes", "since_s")

    def __init__(self, node: Node, effect: ReadRange, now_s: float) -> None:
        self.node = node
        self.effect = effect
        self.chunk = effect.first
        self.read_bytes = 0
        self.since_s = now_s


class ServerRead(Flow):
    """A chunk on its way from the file server to a leaseholder."""

    __slots__ = ("cluster", "reading")

    def __init__(self, cluster: Cluster, reading: RangeReading, length_bytes: int) -> None:
        self.cluster = cluster
        self.reading = reading
        super().__init__(cluster.file_server_up, reading.node.down, length_bytes, math.inf)

    def ended(self, complete: bool) -> None:
        assert complete, "a read without a deadline ended early"
        self.cluster.server_read_ended(self)


# Messages that arrive at the same time: an event and the nodes that it goes to.
Delivery: TypeAlias = list[tuple[PeerEvent, list[Node]]]


class Cluster:
    """The nodes, the tracker and the file server, joined by one network.

    ``run`` ends when every request was answered.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.engine = Engine(EVENTS_MAX)
        self.network = Network(self.engine)
        self.trace = Trace(self.engine)
        self.file_server_up = Link("file server", settings.file_server_rate)
        self.readers = 0
        self.readers_peak = 0
        self.machine_events = 0
        self.repeats = 0
        self.deadlines_missed = 0
        self.uploads_refused = 0
        self.unanswered = 0
        node_list = [Node(index, settings) for index in range(settings.nodes)]
        self.nodes = {node.name: node for node in node_list}
        self._sessions = node_list
        self._tracker = TrackerState(
            Random(f"{settings.seed} tracker"), slots_max=lambda _: settings.slots_max
        )
        self._tracker_armed_s = math.inf
        self._versions: dict[bytes, FileVersion] = {}
        self._until_check = settings.check_every

    # --- what a scenario asks for ----------------------------------------------------------------

    def connect_all(self) -> None:
        """Every node connects to the tracker now."""
        for node in self._sessions:
            self._tell_tracker(NodeConnected(node.index))
            self._tell(node, TrackerConnected())

    def want_file(self, node_index: int, version: FileVersion, request: int) -> None:
        """A local client of this node wants the file now. ``request``: a number of its own."""
        self._versions[version.version_id] = version
        self.unanswered += 1
        chunk_size_bytes = choose_chunk_size(version.size_bytes)
        event = FileWanted(request, version, FILE_SERVER, USER, chunk_size_bytes)
        self._tell(self._sessions[node_index], event)

    def run(self, until_s: float) -> None:
        """Run until every request is answered. Raises SimulationFailed."""
        self.engine.run(until_s)
        if self.unanswered:
            raise SimulationFailed(
                f"nothing left to do at {self.engine.now_s:.3f} s, but {self.unanswered} "
                f"requests are not answered"
            )

    def check(self) -> None:
        """Every machine checks itself."""
        self._tracker.check()
        for node in self._sessions:
            node.machine.check()

    def check_replica(self, node: Node, version: FileVersion) -> None:
        """The node has the whole file in place, with the right content."""
        replica = node.replicas.get(version.version_id)
        if replica is None or not replica.published:
            raise SimulationFailed(f"{node.name} has no replica")
        for chunk in range(replica.layout.chunk_count):
            if replica.digests.get(chunk) != content_digest(version.version_id, chunk):
                raise SimulationFailed(f"{node.name} has a wrong chunk {chunk}")

    # --- machines --------------------------------------------------------------------------------

    def _tell(self, node: Node, event: PeerEvent) -> None:
        """Hand an event to a node's machine, carry out what it wants, see when to wake it."""
        now_s = self.engine.now_s
        machine = node.machine
        effects = machine.handle(event, now_s)
        if effects:
            self.carry_out(node, effects)
        wake_at_s = machine.wake_at_s()
        if wake_at_s is not None and wake_at_s < node.armed_s:
            node.armed_s = wake_at_s
            self.engine.at(max(wake_at_s, now_s), self._wake, node)
        self.machine_events += 1
        self._until_check -= 1
        if self._until_check == 0:
            self._until_check = self.settings.check_every
            machine.check()
            self._tracker.check()

    def _wake(self, node: Node) -> None:
        """The time has come that a machine named, unless it has named another one since."""
        now_s = self.engine.now_s
        if node.armed_s > now_s:
            return
        node.armed_s = math.inf
        wake_at_s = node.machine.wake_at_s()
        if wake_at_s is None:
            return
        if wake_at_s <= now_s:
            self._tell(node, PeerTimePassed())
        else:
            node.armed_s = wake_at_s
            self.engine.at(wake_at_s, self._wake, node)

    def _tell_tracker(self, event: TrackerEvent) -> None:
        now_s = self.engine.now_s
        effects = self._tracker.handle(event, now_s)
        delivery: Delivery = []
        for effect in effects:
            match effect:
                case Tell():
                    node = self._sessions[effect.session]
                    self.trace.message("tracker", encode(effect.message), 1)
                    delivery.append((TrackerSaid(effect.message), [node]))
                case CloseSession():
                    raise SimulationFailed(f"the tracker closed a session: {effect.reason}")
                case JournalGrant() | JournalEnd():
                    pass  # this tracker does not restart
        if delivery:
            self.engine.at(now_s + self.settings.latency_s, self._deliver, delivery)
        self.machine_events += 1
        wake_at_s = self._tracker.wake_at_s()
        if wake_at_s is not None and wake_at_s < self._tracker_armed_s:
            self._tracker_armed_s = wake_at_s
            self.engine.at(max(wake_at_s, now_s), self._wake_tracker, None)

    def _wake_tracker(self, _: object) -> None:
        now_s = self.engine.now_s
        if self._tracker_armed_s > now_s:
            return
        self._tracker_armed_s = math.inf
        wake_at_s = self._tracker.wake_at_s()
        if wake_at_s is None:
            return
        if wake_at_s <= now_s:
            self._tell_tracker(TrackerTimePassed())
        else:
            self._tracker_armed_s = wake_at_s
            self.engine.at(wake_at_s, self._wake_tracker, None)

    # --- messages --------------------------------------------------------------------------------

    def carry_out(self, node: Node, effects: list[PeerEffect]) -> None:
        """Carry out the effects of one call. Messages to peers, by far the most, go as a batch."""
        delivery: Delivery = []
        message = None
        receivers: list[Node] = []
        nodes = self.nodes
        for effect in effects:
            if type(effect) is TellPeer:
                if effect.message is not message:
                    message = effect.message
                    receivers = []
                    delivery.append((PeerSaid(node.name, message), receivers))
                receivers.append(nodes[effect.node])
            else:
                self._carry_out_one(node, effect)
        if delivery:
            for said, receivers in delivery:
                assert type(said) is PeerSaid
                self.trace.message(node.name, encode(said.message), len(receivers))
            self.engine.at(self.engine.now_s + self.settings.latency_s, self._deliver, delivery)

    def _deliver(self, delivery: Delivery) -> None:
        for event, receivers in delivery:
            if type(event) is PeerSaid:
                sender = event.node
                for node in receivers:
                    # What was under way when a connection was closed does not arrive.
                    if sender in node.connected:
                        self._tell(node, event)
            else:
                for node in receivers:
                    self._tell(node, event)

    # --- effects ---------------------------------------------------------------------------------

    def _carry_out_one(self, node: Node, effect: PeerEffect) -> None:
        now_s = self.engine.now_s
        latency_s = self.settings.latency_s
        match effect:
            case FetchChunk():
                fetch = Fetch(self, node, effect)
                self.engine.at(now_s + 2 * latency_s, self._fetch_begins, fetch)
            case TellTracker():
                self.trace.message(node.name, encode(effect.message), 1)
                said = NodeSaid(node.index, effect.message)
                self.engine.at(now_s + latency_s, self._tell_tracker, said)
            case DialPeer():
                dialled = (node, self.nodes[effect.address.node])
                self.engine.at(now_s + 2 * latency_s, self._connect, dialled)
            case HangUp():
                self._hang_up(node, self.nodes[effect.node])
            case ReserveSpace():
                self._reserve(node, effect)
            case ReadRange():
                self._read_begins(node, effect)
            case PublishFile():
                publishing = (node, effect.version_id)
                self.engine.at(now_s + self.settings.publish_s, self._publish, publishing)
            case DropPartial():
                node.replicas.pop(effect.version_id, None)
            case LoadManifest():
                self._soon(node, ManifestLoaded(effect.version_id, self._manifest(node, effect)))
            case AnnounceReplicas():
                self._announce(node)
            case AnswerCached():
                self._answer(node, effect)
            case AnswerOriginal():
                raise SimulationFailed(f"{node.name} answered original: {effect.reason}")
            case TellPeer() | AnswerStatus() | AnswerHolders() | DistrustPeer() | CheckCopy():
                raise SimulationFailed(f"{node.name} has no reason for {effect}")
            case AnswerSlot() | AnswerNoSlot():
                raise SimulationFailed(f"{node.name} has no reason for {effect}")

    def _soon(self, node: Node, *events: PeerEvent) -> None:
        """Events that follow at once, but not before the running call has ended."""
        self.engine.at(self.engine.now_s, self._deliver, [(event, [node]) for event in events])

    def _connect(self, dialled: tuple[Node, Node]) -> None:
        dialler, target = dialled
        if dialler.name in target.connected:  # the other one dialled as well
            return
        dialler.connected.add(target.name)
        target.connected.add(dialler.name)
        self._tell(target, PeerConnected(dialler.machine.address))
        self._tell(dialler, PeerConnected(target.machine.address))

    def _hang_up(self, node: Node, other: Node) -> None:
        if other.name not in node.connected:
            return
        node.connected.discard(other.name)
        arrival_s = self.engine.now_s + self.settings.latency_s
        self.engine.at(arrival_s, self._hung_up, (other, node.name))

    def _hung_up(self, lost: tuple[Node, str]) -> None:
        node, name = lost
        if name in node.connected:
            node.connected.discard(name)
            self._tell(node, PeerLost(name, "closed by the other side"))

    def _fetch_begins(self, fetch: Fetch) -> None:
        """A request has reached its source, and the first byte would be back now."""
        effect, source = fetch.effect, fetch.source
        replica = source.replicas.get(effect.version_id)
        chunk = effect.chunk
        if replica is None or chunk not in replica.digests:
            self._tell(fetch.node, ChunkAbsent(effect.version_id, chunk, source.name))
        elif not source.upload_slots.admit(fetch.upload):
            self.uploads_refused += 1
            self._tell(fetch.node, PeerBusy(effect.version_id, chunk, source.name))
        elif source.upload_slots.waiting:
            source.uploads_waiting.append(fetch)
        else:
            self.network.start(fetch)

    def fetch_ended(self, fetch: Fetch, complete: bool) -> None:
        """A chunk has come from a peer, or its deadline has."""
        effect, source, node = fetch.effect, fetch.source, fetch.node
        version_id, chunk = effect.version_id, effect.chunk
        source.upload_slots.leave(fetch.upload)
        if source.uploads_waiting:
            self.network.start(source.uploads_waiting.popleft())
        self.trace.chunk(source.index, node.index, chunk)
        event: PeerEvent
        if not complete:
            self.deadlines_missed += 1
            event = PeerUnreachable(version_id, chunk, source.name, "past its deadline")
        elif (digest := source.replicas[version_id].digests[chunk]) != effect.digest:
            event = ChunkCorrupt(version_id, chunk, source.name)
        else:
            replica = node.replicas[version_id]
            self.repeats += chunk in replica.digests
            replica.digests[chunk] = digest
            event = ChunkArrived(version_id, chunk, source.name)
        self._tell(node, event)

    def _reserve(self, node: Node, effect: ReserveSpace) -> None:
        version_id = effect.version.version_id
        layout = ChunkLayout(effect.version.size_bytes, effect.chunk_size_bytes)
        node.replicas[version_id] = Replica(layout, {})
        self._soon(
            node,
            SpaceReserved(version_id, effect.chunk_size_bytes),
            ChunksRecovered(version_id, {}),
        )

    def _read_begins(self, node: Node, effect: ReadRange) -> None:
        self.readers += 1
        self.readers_peak = max(self.readers_peak, self.readers)
        if self.readers > self.settings.slots_max:
            raise SimulationFailed(
                f"{self.readers} readers of {FILE_SERVER} at {self.engine.now_s:.6f} s, "
                f"but {self.settings.slots_max} slots"
            )
        # The reader's first request goes to the file server; the others are read ahead.
        reading = RangeReading(node, effect, self.engine.now_s)
        first_byte_s = self.engine.now_s + 2 * self.settings.latency_s
        self.engine.at(first_byte_s, self._read_piece, reading)

    def _read_piece(self, reading: RangeReading) -> None:
        node, effect = reading.node, reading.effect
        if not node.machine.may_read(effect.lease_id, self.engine.now_s):
            self.readers -= 1
            self._tell(
                node, RangeReadFailed(effect.version_id, effect.lease_id, "the lease ran out")
            )
            return
        layout = node.replicas[effect.version_id].layout
        length_bytes = layout.length_bytes(reading.chunk)
        self.network.start(ServerRead(self, reading, length_bytes))

    def server_read_ended(self, flow: ServerRead) -> None:
        """A chunk of a leased range was read."""
        reading = flow.reading
        node, effect, chunk = reading.node, reading.effect, reading.chunk
        version_id = effect.version_id
        digest = content_digest(version_id, chunk)
        node.replicas[version_id].digests[chunk] = digest
        self.trace.chunk(-1, node.index, chunk)
        reading.read_bytes += flow.length_bytes
        reading.chunk += 1
        done = reading.chunk == effect.first + effect.count
        if done:
            self.readers -= 1
        else:
            self._read_piece(reading)
        self._tell(node, ChunkRead(version_id, effect.lease_id, chunk, digest))
        if done:
            elapsed_s = self.engine.now_s - reading.since_s
            read = RangeReadDone(version_id, effect.lease_id, reading.read_bytes, elapsed_s)
            self._tell(node, read)

    def _publish(self, publishing: tuple[Node, bytes]) -> None:
        node, version_id = publishing
        replica = node.replicas[version_id]
        if len(replica.digests) != replica.layout.chunk_count:
            raise SimulationFailed(f"{node.name} published a file that is not complete")
        replica.published = True
        self._tell(node, FilePublished(version_id))

    def _manifest(self, node: Node, effect: LoadManifest) -> tuple[bytes, ...]:
        replica = node.replicas.get(effect.version_id)
        if replica is None or not replica.published:
            return ()
        return tuple(replica.digests[chunk] for chunk in range(replica.layout.chunk_count))

    def _announce(self, node: Node) -> None:
        held = [version_id for version_id, replica in node.replicas.items() if replica.published]
        if held:
            self._carry_out_one(node, TellTracker(Replicas(held, more=False)))

    def _answer(self, node: Node, effect: AnswerCached) -> None:
        if effect.request in node.answered_s:
            raise SimulationFailed(f"{node.name} answered request {effect.request} twice")
        self.check_replica(node, self._versions[effect.version_id])
        node.answered_s[effect.request] = self.engine.now_s
        self.trace.answer(node.index, effect.request)
        self.unanswered -= 1
        if self.unanswered == 0:
            self.engine.stop()


class Trace:
    """A running digest over everything that was sent, arrived or was answered, with its time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hasher = blake3()
        self._chunk = struct.Struct("<dqqq")
        self.messages = 0
        self.message_bytes = 0

    def message(self, sender: str, data: bytes, receivers: int) -> None:
        """A message was sent, to so many receivers."""
        self.messages += receivers
        self.message_bytes += len(data) * receivers
        self._hasher.update(b"%s %r %d " % (sender.encode(), self._engine.now_s, receivers))
        self._hasher.update(data)

    def chunk(self, source: int, node: int, chunk: int) -> None:
        """A chunk came to an end of its way; the file server is source -1."""
        self._hasher.update(self._chunk.pack(self._engine.now_s, source, node, chunk))

    def answer(self, node: int, request: int) -> None:
        """A request was answered."""
        self._hasher.update(b"answer %r %d %d" % (self._engine.now_s, node, request))

    @property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return self._hasher.hexdigest()


def content_digest(version_id: bytes, chunk: int) -> bytes:
    """The symbolic digest of a chunk's right content; 32 bytes."""
    return version_id[:24] + chunk.to_bytes(8, "little")
