"""A cluster in virtual time: carries out the effects of the production machines.

One tracker, one file server, and nodes on equal terms. It does for the machines what the shells
``peer.py`` and ``tracker.py`` do on real sockets, disks and threads.

What takes time: bytes of chunks (``network.py``), ``latency_s`` one way for every message, two of
these for every request of a chunk and every new connection, and ``publish_s``. What takes none:
thinking, digests, disks. Messages are counted in their encoded size but take no bandwidth: beside
chunks of 256 KiB and more they are a few parts in a thousand (``Result`` shows how many).

What can go wrong is done to it from outside, by ``faults.py``. Without ``settings.originals`` an
effect that only a fault can cause ends the simulation with ``SimulationFailed``.

Invariants, checked whenever they could change: no file server has more than ``slots_max`` readers;
a request is answered once, and as cached only with a file that is complete, in place and right;
nothing is dropped for which something is under way, nor a replica that was announced.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from blake3 import blake3

from simulations.control_plane import ControlPlane, Delivery
from simulations.disk_work import DiskWork
from simulations.disks import content_digests
from simulations.engine import Engine, SimulationFailed
from simulations.file_server import FileServer, FileServerSettings
from simulations.network import Network
from simulations.nodes import Node
from simulations.processes import Processes
from simulations.racks import racks_of
from simulations.readings import Readings
from simulations.settings import FILE_SERVER, USER, ClusterSettings
from simulations.stand_ins import StandIns
from simulations.tracker_host import Host, TrackerHost
from simulations.transfers import Transfers
from simulations.writers import Writers
from swarmcache.chunks import FileVersion
from swarmcache.messages import encode
from swarmcache.peer_events import (
    AddReplica,
    AnnounceReplicas,
    AnswerCached,
    AnswerFiles,
    AnswerHolders,
    AnswerNoSlot,
    AnswerOriginal,
    AnswerSlot,
    AnswerStatus,
    CheckCopy,
    DialPeer,
    DistrustPeer,
    DropPartial,
    FetchChunk,
    FetchFiles,
    FilesWanted,
    FileWanted,
    HangUp,
    LoadManifest,
    PeerEffect,
    PeerEvent,
    PeerSaid,
    PublishFile,
    ReadRange,
    RefuseReplica,
    RequestGone,
    ReserveSpace,
    TellPeer,
    TellTracker,
)
from swarmcache.peer_events import TimePassed as PeerTimePassed
from swarmcache.stand_in import TrackerReached
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    JournalPresent,
    Tell,
    TrackerEvent,
)
from swarmcache.tracker_events import TimePassed as TrackerTimePassed

EVENTS_MAX = 100_000_000
# A machine that is woken so often in a row without time going on would spin for ever.
SPINS_MAX = 100

# What something that a life of a node began has come to.
Outcome: TypeAlias = tuple[Node, int, bytes | None, tuple[PeerEvent, ...]]


class Cluster:
    """The nodes, the tracker and the file server, joined by one network.

    ``run`` ends when every request was answered. ``on_answer`` is told of each answer: node,
    request, file version, whether it is cached, and why not.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.strict = settings.check_every == 1
        self.engine = Engine(EVENTS_MAX)
        self.network = Network(self.engine)
        self.trace = Trace(self.engine)
        server = FileServerSettings(
            settings.file_server_rate, settings.slots_max, settings.reader_cost
        )
        self.file_server = FileServer(FILE_SERVER, self.network, server)
        self.machine_events = 0
        self.unanswered = 0
        self.requests = 0
        self.hits = 0
        self.originals = 0
        self.wanted_bytes = 0
        self.on_answer: Callable[[Node, int, FileVersion, bool, str], None] | None = None
        self.on_files: Callable[[Node, int], None] | None = None
        self.on_holders: Callable[[Node, AnswerHolders], None] | None = None
        self.node_list = [
            Node(index, settings, rack) for index, rack in enumerate(racks_of(settings))
        ]
        self.nodes = {node.name: node for node in self.node_list}
        self.tracker = TrackerHost(settings)
        self.versions: dict[bytes, FileVersion] = {}
        self.control = ControlPlane(self, settings)
        self.transfers = Transfers(self)
        self.readings = Readings(self)
        self.writers = Writers(self)
        self.disks = DiskWork(self, settings)
        self.processes = Processes(self)
        self.stand_ins = StandIns(self)
        for node in self.node_list:
            self.stand_ins.begin_daemon(node)
        self._until_check = settings.check_every
        # The tracker's check goes through all nodes.
        self._tracker_check_every = max(settings.nodes // 100, 1)
        self._until_tracker_check = self._tracker_check_every

    # --- what a scenario asks for ----------------------------------------------------------------

    def connect_all(self) -> None:
        """Every node connects to the tracker now."""
        for node in self.node_list:
            self.stand_ins.tell(node, TrackerReached())

    def want_file(
        self,
        node_index: int,
        version: FileVersion,
        request: int,
        *,
        user: str = USER,
        can_read: bool = True,
        chunk_size_bytes: int | None = None,
    ) -> None:
        """A local client of this node wants the file now. ``request``: a number of its own."""
        node = self.node_list[node_index]
        self.versions[version.version_id] = version
        self.file_server.current.setdefault(version.path, version)
        self.unanswered += 1
        self.requests += 1
        self.wanted_bytes += version.size_bytes
        node.waiting[request] = version
        replica = node.disk.replicas.get(version.version_id)
        if replica is not None and replica.published and replica.settled:
            self.hits += 1
            self._hand_out(node, request, version)
            return
        cut_bytes = chunk_size_bytes or self.settings.cut_bytes(version.size_bytes)
        event = FileWanted(request, version, FILE_SERVER, user, cut_bytes, can_read)
        self.hand(node, event)

    def want_files(self, node: Node, versions: Sequence[FileVersion], request: int) -> None:
        """A local client wants small files together, as far as peers have them; none is cached."""
        for version in versions:
            self.versions[version.version_id] = version
        node.batches.add(request)
        self.hand(node, FilesWanted(request, list(versions)))

    def batch_ended(self, node: Node, request: int) -> None:
        """The daemon has answered, or has ended."""
        if request not in node.batches:
            raise SimulationFailed(f"{node.name} answered batch {request} twice, or nobody")
        node.batches.discard(request)
        if self.on_files is not None:
            self.on_files(node, request)

    def change_source(self, path: bytes) -> FileVersion:
        """Somebody writes this file anew: its size stays, its time does not."""
        former = self.file_server.current[path]
        version = FileVersion(path, former.size_bytes, former.mtime_ns + 1)
        self.file_server.current[path] = version
        return version

    def client_goes(self, node: Node, request: int) -> None:
        """The client of this request waits no longer, and takes the original."""
        node.gone.add(request)
        self.answer_without_daemon(node, request)
        self.hand(node, RequestGone(request))

    def run(self, until_s: float) -> None:
        """Run until every request is answered. Raises SimulationFailed."""
        self.engine.run(until_s)
        if self.unanswered:
            raise SimulationFailed(
                f"nothing left to do at {self.engine.now_s:.3f} s, but {self.unanswered} "
                f"requests are not answered"
            )

    @property
    def done(self) -> float:
        """The part of all that is wanted that has come to where it is wanted; 0 to 1."""
        come_bytes = sum(node.down.carried_bytes for node in self.node_list)
        return come_bytes / max(self.wanted_bytes, 1)

    def check(self) -> None:
        """Every machine checks itself."""
        self.tracker.machine.check()
        for node in self.node_list:
            node.machine.check()
            node.upload_slots.check()
            node.disk.check()

    def check_replica(self, node: Node, version: FileVersion) -> None:
        """The node has the whole file in place, with the right content."""
        replica = node.disk.replicas.get(version.version_id)
        if replica is None or not replica.published:
            raise SimulationFailed(f"{node.name} has no replica")
        for chunk, right in enumerate(content_digests(version.version_id, replica.layout)):
            if replica.digests.get(chunk) != right and not replica.rotten >> chunk & 1:
                raise SimulationFailed(f"{node.name} has a wrong chunk {chunk}")

    # --- machines --------------------------------------------------------------------------------

    def hand(self, node: Node, event: PeerEvent) -> None:
        """Give a daemon an event: at once, when it goes on, or not at all if it is not there."""
        if node.stopped:
            node.inbox.append((self._handed, (node, event)))
        elif node.alive:
            self.tell(node, event)

    def _handed(self, late: tuple[Node, PeerEvent]) -> None:
        self.hand(*late)

    def tell(self, node: Node, event: PeerEvent) -> None:
        """Hand an event to a node's machine, carry out what it wants, see when to wake it."""
        now_s = self.engine.now_s
        machine = node.machine
        effects = machine.handle(event, node.clock.read(now_s))
        if effects:
            self.carry_out(node, effects)
            if node.machine is not machine:  # a fault has ended its life meanwhile
                return
        wake_at_s = machine.wake_at_s()
        if wake_at_s is not None:
            at_s = node.clock.when(wake_at_s)
            if at_s < node.armed_s:
                node.armed_s = at_s
                self.engine.at(max(at_s, now_s), self._wake, node)
        self.machine_events += 1
        self._until_check -= 1
        if self._until_check == 0:
            self._until_check = self.settings.check_every
            machine.check()
            self._until_tracker_check -= 1
            if self._until_tracker_check == 0:
                self._until_tracker_check = self._tracker_check_every
                if not self.strict:  # or else it was checked after its own last event
                    self.tracker.machine.check()

    def _wake(self, node: Node) -> None:
        """The time has come that a machine named, unless it has named another one since."""
        now_s = self.engine.now_s
        if node.armed_s > now_s or not node.alive:
            return
        if node.stopped:
            node.inbox.append((self._wake, node))
            return
        node.armed_s = math.inf
        wake_at_s = node.machine.wake_at_s()
        if wake_at_s is None:
            return
        if wake_at_s <= node.clock.read(now_s):
            node.wakes = node.wakes + 1 if now_s == node.woken_s else 0
            node.woken_s = now_s
            if node.wakes > SPINS_MAX:
                raise SimulationFailed(f"{node.name} is woken again and again at {now_s:.6f} s")
            self.tell(node, PeerTimePassed())
        else:
            # Not at once, where the clocks differ by no more than rounding.
            node.armed_s = max(node.clock.when(wake_at_s), math.nextafter(now_s, math.inf))
            self.engine.at(node.armed_s, self._wake, node)

    def _told_tracker(self, late: tuple[Host, TrackerEvent]) -> None:
        self.tell_tracker(*late)

    def tell_tracker(self, host: Host, event: TrackerEvent) -> None:
        """Give the tracker, or who stands in, an event; do what it wants, see when to wake it."""
        if host.stopped:
            host.inbox.append((self._told_tracker, (host, event)))
        if host.stopped or not host.alive:
            return
        now_s = self.engine.now_s
        effects = host.machine.handle(event, host.clock.read(now_s))
        delivery: Delivery = []
        for effect in effects:
            match effect:
                case Tell():
                    self.control.tell_from_tracker(host, effect.session, effect.message, delivery)
                case CloseSession():
                    if not self.settings.originals:
                        raise SimulationFailed(f"the tracker closed a session: {effect.reason}")
                    self.control.lose_session(effect.session, effect.reason)
                case JournalGrant():
                    self._check_grant()
                    host.note_grant(effect.lease_id, effect.node)
                case JournalEnd():
                    host.note_end(effect.lease_id)
                case JournalPresent():
                    host.note_present(now_s)
        if delivery:
            self.engine.at(now_s + self.settings.latency_s, self.control.deliver, delivery)
        self.machine_events += 1
        if self.strict:
            host.machine.check()
        self.arm_tracker(host)

    def _check_grant(self) -> None:
        """A slot is granted: by their own clocks, fewer than all are in use, whoever is stopped or
        cut off. Raises SimulationFailed."""
        if not self.strict:
            return
        now_s = self.engine.now_s
        used = sum(not writer.lease_is_over(now_s) for writer in self.writers.pending)
        for node in self.node_list:
            used += sum(not reading.lease_is_over(now_s) for reading in node.reading)
        if used >= self.settings.slots_max:
            raise SimulationFailed(f"granted at {now_s:.3f} s, when all slots were in use")

    def arm_tracker(self, host: Host) -> None:
        """See to it that it is woken when it wants."""
        wake_at_s = host.machine.wake_at_s()
        if wake_at_s is not None:
            at_s = host.clock.when(wake_at_s)
            if at_s < host.armed_s:
                host.armed_s = at_s
                self.engine.at(max(at_s, self.engine.now_s), self._wake_tracker, host)

    def _wake_tracker(self, host: Host) -> None:
        now_s = self.engine.now_s
        if host.armed_s > now_s or not host.alive:
            return
        if host.stopped:
            host.inbox.append((self._wake_tracker, host))
            return
        host.armed_s = math.inf
        wake_at_s = host.machine.wake_at_s()
        if wake_at_s is None:
            return
        if wake_at_s <= host.clock.read(now_s):
            host.wakes = host.wakes + 1 if now_s == host.woken_s else 0
            host.woken_s = now_s
            if host.wakes > SPINS_MAX:
                raise SimulationFailed(f"the tracker is woken again and again at {now_s:.6f} s")
            self.tell_tracker(host, TrackerTimePassed())
        else:
            host.armed_s = max(host.clock.when(wake_at_s), math.nextafter(now_s, math.inf))
            self.engine.at(host.armed_s, self._wake_tracker, host)

    # --- effects ---------------------------------------------------------------------------------

    def carry_out(self, node: Node, effects: list[PeerEffect]) -> None:
        """Carry out the effects of one call. Messages to peers, by far the most, go as a batch."""
        delivery: Delivery = []
        message = None
        receivers: list[Node] = []
        nodes = self.nodes
        control = self.control
        one_by_one = control.wires.cut or bool(node.traps)
        for effect in effects:
            if type(effect) is not TellPeer:
                self._carry_out_one(node, effect)
            elif one_by_one:
                control.say_to_peer(node, nodes[effect.node], effect.message)
            else:
                if effect.message is not message:
                    message = effect.message
                    receivers = []
                    delivery.append(
                        (PeerSaid(node.name, control.checked(message)), receivers, None)
                    )
                receivers.append(nodes[effect.node])
        if delivery:
            for event, receivers, _ in delivery:
                assert type(event) is PeerSaid
                self.trace.message(node.name, encode(event.message), len(receivers))
            self.engine.at(self.engine.now_s + self.settings.latency_s, control.deliver, delivery)

    def _carry_out_one(self, node: Node, effect: PeerEffect) -> None:
        match effect:
            case FetchChunk():
                self.transfers.fetch(node, effect)
            case FetchFiles():
                self.transfers.fetch_files(node, effect)
            case AnswerFiles():
                self.batch_ended(node, effect.request)
            case TellTracker():
                self.control.say_to_tracker(node, effect.message)
            case DialPeer():
                self.control.dial(node, effect)
            case HangUp():
                self.control.hang_up(node, self.nodes[effect.node])
            case ReserveSpace():
                self.disks.reserve(node, effect)
            case ReadRange():
                self.readings.begin(node, effect)
            case PublishFile():
                self.disks.publish(node, effect.version_id)
            case DropPartial():
                self.disks.drop(node, effect)
            case LoadManifest():
                self.disks.load_manifest(node, effect)
            case AnnounceReplicas():
                self.disks.announce(node)
            case AnswerCached():
                self._answer(node, effect)
            case AnswerOriginal():
                self._answer_original(node, effect)
            case CheckCopy():
                self.disks.check_copy(node, effect)
            case AnswerHolders():
                if not self.disks.told_holders(effect):
                    assert self.on_holders is not None, "nobody has asked for holders"
                    self.on_holders(node, effect)
            case DistrustPeer():
                node.distrusted.add(effect.node)
            case TellPeer() | AnswerStatus():
                raise SimulationFailed(f"{node.name} has no reason for {effect}")
            case AnswerSlot() | AnswerNoSlot():
                self.writers.told(node, effect)
            case AddReplica() | RefuseReplica():
                raise SimulationFailed(f"{node.name} has no reason for {effect}")

    def soon(self, node: Node, *events: PeerEvent, version_id: bytes | None = None) -> None:
        """Events that follow at once, but not before the running call has ended."""
        self.after(0.0, node, *events, version_id=version_id)

    def after(
        self, delay_s: float, node: Node, *events: PeerEvent, version_id: bytes | None = None
    ) -> None:
        """What this life of a node has begun comes to these events. ``version_id``: with the first
        of them nothing is under way any more that was counted for it."""
        outcome = (node, node.life, version_id, events)
        self.engine.at(self.engine.now_s + delay_s, self.come_to, outcome)

    def come_to(self, outcome: Outcome) -> None:
        node, life, version_id, events = outcome
        if node.life != life:
            return
        if node.stopped:
            node.inbox.append((self.come_to, outcome))
            return
        for event in events[:-1]:
            self.hand(node, event)
        if version_id is not None:
            node.under_way[version_id] -= 1
        if node.life == life:
            self.hand(node, events[-1])

    # --- answers ---------------------------------------------------------------------------------

    def _answer(self, node: Node, effect: AnswerCached) -> None:
        if effect.request in node.gone:
            return
        version = self._waited_for(node, effect.request, effect.version_id)
        self._hand_out(node, effect.request, version)

    def _waited_for(self, node: Node, request: int, version_id: bytes) -> FileVersion:
        version = node.waiting.get(request)
        if version is None or version.version_id != version_id:
            raise SimulationFailed(f"{node.name} answered request {request} twice, or nobody")
        return version

    def _hand_out(self, node: Node, request: int, version: FileVersion) -> None:
        """The client gets the cached copy, if the source is still what was asked for."""
        if not self.file_server.is_current(version):
            self._answered(node, request, False, "the source changed meanwhile")
            return
        self.check_replica(node, version)
        replica = node.disk.replicas[version.version_id]
        replica.uses += 1
        replica.last_used_s = self.engine.now_s
        self._answered(node, request, True, "")

    def _answer_original(self, node: Node, effect: AnswerOriginal) -> None:
        if not self.settings.originals:
            raise SimulationFailed(f"{node.name} answered original: {effect.reason}")
        if effect.request in node.gone:
            return
        self._waited_for(node, effect.request, effect.version_id)
        self._answered(node, effect.request, False, effect.reason)

    def answer_without_daemon(self, node: Node, request: int) -> None:
        """The client has lost its daemon, or has waited long enough: it takes the original."""
        self._answered(node, request, False, "no daemon")

    def _answered(self, node: Node, request: int, cached: bool, reason: str) -> None:
        version = node.waiting.pop(request)
        self.originals += not cached
        node.answered_s[request] = self.engine.now_s
        self.trace.answer(node.index, request)
        self.unanswered -= 1
        if self.on_answer is not None:
            self.on_answer(node, request, version, cached, reason)
        elif self.unanswered == 0:
            self.engine.stop()


class Trace:
    """A running digest over everything that was sent, arrived or was answered, with its time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hasher = blake3()
        self._chunk = struct.Struct("<dqqq")
        self._head = struct.Struct("<dq")
        self.messages = 0
        self.message_bytes = 0

    def message(self, sender: str, data: bytes, receivers: int) -> None:
        """A message was sent, to so many receivers."""
        self.messages += receivers
        self.message_bytes += len(data) * receivers
        self._hasher.update(self._head.pack(self._engine.now_s, receivers) + sender.encode() + data)

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
