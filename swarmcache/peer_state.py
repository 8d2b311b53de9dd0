"""What a node does next.

Pure logic: no socket, disk, clock or chance of its own. The shell (``peer.py``) and the simulator
feed it events and carry out the effects that it returns.

It holds one ``Fetching`` per file version that is wanted and not yet complete, and one ``Seed`` per
complete one that neighbours are interested in. Parts of it are the leases of this node, its
neighbours, its seeds, what its clients write and ask, and small files that come together
(``peer_leases.py``, ``peer_neighbours.py``, ``peer_seeds.py``, ``peer_writes.py``,
``peer_questions.py``, ``peer_batches.py``).

Invariants: a request is answered exactly once; every download that somebody waits for either makes
progress, or waits for a slot that the tracker says is taken, or is answered with the original path
within ``stall_s``; this node reads from a file server only under a lease, and by its own clock
stops before the tracker may give that lease away; what was fetched of a file version is dropped
only when nothing that was asked for it (a chunk, a range, room, putting it in place) is under way;
a file version is fetched on its own or in a batch, not both at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from random import Random

from swarmcache.chunks import (
    CHUNK_SIZE_MAX_BYTES,
    ChunkLayout,
    mask_from_bytes,
    mask_to_bytes,
    range_mask,
)
from swarmcache.download import Download
from swarmcache.fetching import Fetching
from swarmcache.messages import (
    LOADS_MAX,
    BetweenNodes,
    DiskStatus,
    FromTracker,
    Gone,
    Have,
    Heartbeat,
    HeldBy,
    Holding,
    Join,
    Joined,
    Lease,
    Leave,
    Located,
    Message,
    Missing,
    NodeAddress,
    NodeTotals,
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
    Suspected,
    WriteLease,
)
from swarmcache.peer_batches import BatchEvent, PeerBatches
from swarmcache.peer_events import (
    AddReplica,
    AnnounceReplicas,
    AnswerCached,
    AnswerFiles,
    AnswerOriginal,
    CheckCopy,
    ChunkAbsent,
    ChunkArrived,
    ChunkCorrupt,
    ChunksRead,
    ChunksRecovered,
    CopyWanted,
    DiskMeasured,
    DistrustPeer,
    DropPartial,
    FilePublished,
    FilesArrived,
    FilesCorrupt,
    FilesNotKept,
    FilesWanted,
    FileWanted,
    HolderBusy,
    HolderFailed,
    HoldersWanted,
    KeysChanged,
    ManifestLoaded,
    NodesChanged,
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
    RefuseReplica,
    ReplicaAdded,
    ReplicaDropped,
    ReplicaNotAdded,
    ReplicaOffered,
    ReplicasLost,
    ReplicasRecovered,
    RequestGone,
    ReserveSpace,
    SpaceRefused,
    SpaceReserved,
    StatusWanted,
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
from swarmcache.peer_leases import NodeLease, PeerLeases
from swarmcache.peer_neighbours import Neighbour, PeerNeighbours
from swarmcache.peer_questions import PeerQuestions
from swarmcache.peer_seeds import PeerSeeds
from swarmcache.peer_writes import PeerWrites
from swarmcache.timers import Timers

FLIGHTS_MAX = 16
# What is in flight has its place in memory. As many of the largest chunks as a node sends at once,
# or else places stay empty: with 48 MiB, the last of 8 simulated nodes got 8 GiB 11 % later.
BUFFERS_BYTES_MAX = 4 * CHUNK_SIZE_MAX_BYTES
DOWNLOADS_MAX = 4096
HEARTBEAT_BUSY_S = 1.0
HEARTBEAT_IDLE_S = 10.0
# A download under which the disk fails is begun again so often: a lost disk, or one that was full
# against all accounts, may be followed by one that works. Who waits must not wait for ever.
FAILURES_MAX = 1
# A replica of which peers say that it is wrong is digested at most so often, and so many such
# replicas are remembered.
CHECK_AGAIN_S = 3600.0
CHECKED_MAX = 1024


def _not_known(node: str) -> int:
    return 0


class PeerState:
    """The node's machine: ``handle`` an event, carry out what it returns, ask ``wake_at_s``.

    ``window``: chunks of one file in flight; as many as every node has places for uploads.
    ``life``: a number that no other life of this node's daemon has. ``uploads_of``: how many
    uploads a node has told that it had; 0 where that is not known.
    """

    def __init__(
        self,
        address: NodeAddress,
        rng: Random,
        *,
        peers_max: int = 40,
        window: int = 4,
        stall_s: float = 5.0,
        buffers_bytes_max: int = BUFFERS_BYTES_MAX,
        life: int = 0,
        uploads_of: Callable[[str], int] = _not_known,
    ) -> None:
        self.address = address
        self.tracker_connected = False
        self._rng = rng
        self._peers_max = peers_max
        self._window = min(window, FLIGHTS_MAX)
        self._uploads_of = uploads_of
        self._stall_s = stall_s
        self._buffers_bytes_max = buffers_bytes_max
        self._fetching: dict[bytes, Fetching] = {}
        self._seeds = PeerSeeds()
        self._leases = PeerLeases()
        self._writes = PeerWrites(rng, stall_s)
        self._batches = PeerBatches()
        self._neighbours = PeerNeighbours(address.node)
        self._distrusted: set[str] = set()
        self._requests: dict[int, bytes] = {}
        self._flights: dict[tuple[bytes, int, str], int] = {}
        self._flight_bytes = 0
        self._starved: dict[bytes, None] = {}
        self._busy: dict[bytes, int] = {}
        self._ending: dict[bytes, bool] = {}
        self._checked_s: dict[bytes, float] = {}  # when a peer's word made us digest a copy
        self._timers: Timers[bytes] = Timers()
        self._heartbeat_at_s: float | None = None
        self._heartbeat_sent_s = 0.0
        self._disk = DiskStatus()
        self._life = life
        self._misses = 0
        self._hits = 0
        self._from_peers_chunks = 0
        self._from_peers_bytes = 0
        self._stood_in = False  # the last one was not the tracker itself
        self._tracker_reason = "no connection to the tracker yet"
        self._questions = PeerQuestions(self._tracker_reason)

    # --- the three calls of every machine -------------------------------------------------------

    def handle(self, event: PeerEvent, now_s: float) -> list[PeerEffect]:
        """Apply one event; return what must now be done, in order."""
        effects: list[PeerEffect] = []
        match event:
            case PeerSaid():  # most events by far
                self._handle_peer_said(event.node, event.message, now_s, effects)
            case ChunkArrived() | ChunkCorrupt() | ChunkAbsent() | PeerBusy() | PeerUnreachable():
                self._handle_fetch_end(event, now_s, effects)
            case TrackerSaid():
                self._handle_tracker_said(event.message, now_s, effects)
            case ChunksRead() | RangeReadDone() | RangeReadFailed():
                self._handle_reading(event, now_s, effects)
            case TimePassed():
                self._handle_time(now_s, effects)
            case KeysChanged():
                if self._heartbeat_at_s is not None:
                    self._heartbeat_at_s = now_s
                self._handle_time(now_s, effects)
            case PeerConnected() | PeerLost() | NodesChanged():
                self._handle_connection(event, now_s, effects)
            case TrackerConnected() | TrackerLost():
                self._handle_tracker_connection(event, now_s, effects)
            case FileWanted() | RequestGone() | StatusWanted() | HoldersWanted():
                self._handle_client(event, now_s, effects)
            case FilesWanted():
                self._want_files(event, now_s, effects)
            case FilesArrived() | FilesCorrupt() | HolderBusy() | HolderFailed() | FilesNotKept():
                self._handle_batch(event, now_s, effects)
            case WriteWanted() | WriterAnswered():
                self._handle_writer(event, now_s, effects)
            case _:
                self._handle_disk(event, now_s, effects)
        return effects

    def wake_at_s(self) -> float | None:
        """When ``TimePassed`` is next due. Ask again after every ``handle``."""
        at_s = self._timers.next_at_s()
        others_s = (
            self._heartbeat_at_s,
            self._neighbours.wake_at_s(),
            self._writes.wake_at_s(),
            self._batches.wake_at_s(),
        )
        for other_s in others_s:
            if other_s is not None and (at_s is None or other_s < at_s):
                at_s = other_s
        return at_s

    def check(self) -> None:
        """Assert the invariants."""
        self._timers.check()
        for version_id in self._seeds.version_ids():
            assert version_id not in self._fetching, "a complete file is fetched"
            for node in self._seeds.nodes(version_id):
                neighbour = self._neighbours.get(node)
                assert neighbour is not None and neighbour.up, "a seed for one who is not there"
        self._seeds.check()
        self._leases.check(self._busy)
        self._neighbours.check()
        self._writes.check()
        self._questions.check()
        self._batches.check()
        for request, version_id in self._requests.items():
            assert request in self._fetching[version_id].requests, "a request would be forgotten"
        for version_id, fetching in self._fetching.items():
            for request in fetching.requests:
                assert self._requests[request] == version_id, "a request would be answered twice"
            fetching.check()
        assert len(self._flights) <= FLIGHTS_MAX, "more requests in flight than allowed"
        assert self._flight_bytes == sum(self._flights.values()), "flying bytes miscounted"
        for version_id in self._ending:
            assert self._busy[version_id] > 0, "an ended download would never be dropped"

    # --- asked by the shell ---------------------------------------------------------------------

    def may_read(self, lease_id: int, now_s: float) -> bool:
        """Whether this lease still holds, by this node's clock. Safe to call from any thread."""
        return self._leases.may_read(lease_id, now_s)

    def stop_reading(self) -> None:
        """The daemon ends: whoever reads under a lease stops."""
        self._leases.until_s = 0.0

    def count_hits(self, count: int) -> None:
        """Clients got files that were cached already. No event, since a hit takes microseconds; and
        from any thread, but from one at a time."""
        self._hits += count

    def totals(self) -> NodeTotals:
        """What this node has done in this life."""
        return NodeTotals(
            self._life,
            self._hits + self._misses,
            self._hits,
            self._from_peers_chunks,
            self._from_peers_bytes,
        )

    def fetching(self, version_id: bytes) -> Fetching | None:
        """The state of one wanted file version, for progress displays."""
        return self._fetching.get(version_id)

    def downloads(self) -> Collection[Fetching]:
        """All file versions that are wanted and not complete."""
        return self._fetching.values()

    def neighbours(self) -> Iterable[tuple[str, bool, bool]]:
        """Every neighbour: node, whether connected, whether distrusted."""
        known = {each.address.node: each.up for each in self._neighbours.all()}
        for node in sorted(known.keys() | self._distrusted):
            yield node, known.get(node, False), node in self._distrusted

    # --- local clients --------------------------------------------------------------------------

    def _handle_client(
        self,
        event: FileWanted | RequestGone | StatusWanted | HoldersWanted,
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        match event:
            case FileWanted():
                self._want(event, now_s, effects)
            case RequestGone():
                version_id = self._requests.pop(event.request, None)
                if version_id is not None:
                    del self._fetching[version_id].requests[event.request]
                    self._arm(version_id, now_s)
                self._questions.gone(event.request)
                self._writes.gone(event.request, effects)
            case StatusWanted():
                self._questions.want_status(event, effects)
            case HoldersWanted():
                self._questions.want_holders(event, effects)

    def _handle_writer(
        self, event: WriteWanted | WriterAnswered, now_s: float, effects: list[PeerEffect]
    ) -> None:
        if isinstance(event, WriterAnswered):
            self._writes.answered(event, now_s, effects)
        else:
            self._writes.want(event, now_s, effects)
            self._beat(now_s)

    def _want(self, event: FileWanted, now_s: float, effects: list[PeerEffect]) -> None:
        self._misses += 1
        version_id = event.version.version_id
        fetching = self._fetching.get(version_id)
        if fetching is None:
            if len(self._fetching) >= DOWNLOADS_MAX:
                reason = f"this node fetches {DOWNLOADS_MAX} files already"
                effects.append(AnswerOriginal(event.request, version_id, reason))
                return
            fetching = self._begin_fetching(event, event.can_read, now_s, effects)
        elif event.can_read and not fetching.can_read:
            fetching.can_read = True
            if fetching.joined:
                self._join(fetching, effects)
        fetching.requests[event.request] = now_s
        self._requests[event.request] = version_id
        self._beat(now_s)
        self._arm(version_id, now_s)

    def _want_copy(self, event: CopyWanted, now_s: float, effects: list[PeerEffect]) -> None:
        """Where there is no room for one more download, the next client will want it."""
        version_id = event.version.version_id
        if version_id not in self._fetching and len(self._fetching) < DOWNLOADS_MAX:
            self._begin_fetching(event, False, now_s, effects)
            self._beat(now_s)
            self._arm(version_id, now_s)

    def _begin_fetching(
        self,
        event: FileWanted | CopyWanted,
        can_read: bool,
        now_s: float,
        effects: list[PeerEffect],
    ) -> Fetching:
        version_id = event.version.version_id
        fetching = Fetching(
            event.version,
            event.file_server,
            event.user,
            event.chunk_size_bytes,
            can_read,
            self._stall_s,
            progress_at_s=now_s,
        )
        self._fetching[version_id] = fetching
        self._drop_seed(version_id, now_s)
        self._reserve(fetching, effects)
        return fetching

    # --- small files that are fetched together ---------------------------------------------------

    def _want_files(self, event: FilesWanted, now_s: float, effects: list[PeerEffect]) -> None:
        """What is being fetched already its client will join, file by file."""
        fresh = {
            version.version_id: version  # a client may name a file twice
            for version in event.versions
            if version.version_id not in self._fetching and version.version_id not in self._busy
        }
        wanted = list(fresh.values())[: self._batches.room]
        if not wanted or not self.tracker_connected:
            effects.append(AnswerFiles(event.request))
            return
        for version in wanted:
            self._begin(version.version_id)
        self._batches.want(event.request, wanted, now_s, effects)

    def _handle_batch(self, event: BatchEvent, now_s: float, effects: list[PeerEffect]) -> None:
        if isinstance(event, FilesArrived):
            self._misses += len(event.version_ids)
            self._from_peers_chunks += len(event.version_ids)
            self._from_peers_bytes += event.size_bytes
            self._tell(Replicas(event.version_ids), effects)
        elif isinstance(event, FilesCorrupt):
            self._distrust(event.node, event.version_id, effects)
            self._tell(ReportCorrupt(event.version_id, event.node), effects)
        self._batches.fetch_ended(event, now_s, effects)
        self._leave_batches(now_s, effects)

    def _leave_batches(self, now_s: float, effects: list[PeerEffect]) -> None:
        """Whoever has come to want one of these files meanwhile has it, or begins to fetch it."""
        for version_id, arrived in self._batches.take_ended().items():
            if arrived:
                self._answer_blocked(version_id, now_s, effects)
            self._end(version_id, effects)

    # --- what is under way ----------------------------------------------------------------------

    def _reserve(self, fetching: Fetching, effects: list[PeerEffect]) -> None:
        version_id = fetching.version.version_id
        fetching.blocked = version_id in self._busy
        if not fetching.blocked:
            self._begin(version_id)
            effects.append(ReserveSpace(fetching.version, fetching.chunk_size_bytes))

    def _begin(self, version_id: bytes) -> None:
        """Something is asked of the shell that will end in an event."""
        self._busy[version_id] = self._busy.get(version_id, 0) + 1

    def _end(self, version_id: bytes, effects: list[PeerEffect]) -> None:
        """That event has come."""
        self._busy[version_id] -= 1
        if self._busy[version_id]:
            return
        del self._busy[version_id]
        if version_id in self._ending:
            effects.append(DropPartial(version_id, self._ending.pop(version_id)))
        fetching = self._fetching.get(version_id)
        if fetching is not None and fetching.blocked:
            self._reserve(fetching, effects)

    def _drop(self, version_id: bytes, effects: list[PeerEffect], *, keep: bool) -> None:
        if version_id in self._busy:
            self._ending[version_id] = keep
        else:
            effects.append(DropPartial(version_id, keep))

    def _answer_original(
        self,
        fetching: Fetching,
        reason: str,
        effects: list[PeerEffect],
        *,
        source_changed: bool = False,
    ) -> None:
        version_id = fetching.version.version_id
        for request in fetching.requests:
            del self._requests[request]
            effects.append(AnswerOriginal(request, version_id, reason, source_changed))
        fetching.requests.clear()

    # --- the cache ------------------------------------------------------------------------------

    def _handle_disk(
        self,
        event: SpaceReserved
        | SpaceRefused
        | ChunksRecovered
        | FilePublished
        | PublishFailed
        | WriteFailed
        | ReplicaDropped
        | ReplicasLost
        | CopyWanted
        | ReplicasRecovered
        | ReplicaOffered
        | ReplicaAdded
        | ReplicaNotAdded
        | ManifestLoaded
        | DiskMeasured,
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        match event:
            case SpaceReserved() | ChunksRecovered():
                self._handle_space(event, now_s, effects)
            case FilePublished():
                self._handle_published(event.version_id, now_s, effects)
            case SpaceRefused() | PublishFailed() | WriteFailed():
                self._handle_disk_failed(event, now_s, effects)
            case ReplicaDropped():
                self._handle_dropped(event.version_id, now_s, effects)
            case ReplicasLost():
                # Those on other disks as well: they come back when a neighbour asks for them.
                for version_id in self._seeds.version_ids():
                    self._drop_seed(version_id, now_s)
                if self.tracker_connected:
                    effects.append(AnnounceReplicas())
            case CopyWanted():
                self._want_copy(event, now_s, effects)
            case ReplicasRecovered():
                self._tell(Replicas(event.version_ids), effects)
            case ReplicaOffered():
                self._handle_offered(event, effects)
            case ReplicaAdded():
                self._handle_added(event.version_id, now_s, effects)
            case ReplicaNotAdded():
                self._end(event.version_id, effects)
            case ManifestLoaded():
                self._handle_manifest(event, now_s, effects)
            case DiskMeasured():
                self._disk = event.disk

    def _handle_dropped(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        self._seeds.say_gone(version_id, effects)
        self._end_seed(version_id, now_s, effects)
        fetching = self._fetching.get(version_id)
        if fetching is not None and fetching.joined:
            self._join(fetching, effects)  # it is wanted again already, and not to be left for that

    def _handle_offered(self, event: ReplicaOffered, effects: list[PeerEffect]) -> None:
        """Whoever wants the file meanwhile waits for that."""
        version_id = event.version_id
        if version_id in self._fetching or version_id in self._busy:
            effects.append(RefuseReplica(event.request, "it is being fetched already"))
        else:
            self._begin(version_id)
            effects.append(AddReplica(event.request, version_id))

    def _handle_added(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        self._tell(Replicas([version_id]), effects)
        self._answer_blocked(version_id, now_s, effects)
        self._end(version_id, effects)

    def _answer_blocked(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        """The file is in place, and those have it who wanted to fetch it on its own.

        Who was introduced meanwhile has been told nothing yet.
        """
        fetching = self._fetching.get(version_id)
        if fetching is not None:
            assert fetching.blocked, "fetched while a replica was added"
            del self._fetching[version_id]
            self._forget_timer(version_id)
            for request in fetching.requests:
                del self._requests[request]
                effects.append(AnswerCached(request, version_id))
            self._greet_all(version_id, now_s, effects)

    def _handle_disk_failed(
        self,
        event: SpaceRefused | PublishFailed | WriteFailed,
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        fetching = self._fetching.get(event.version_id)
        # A blocked attempt has not asked the disk for anything: an earlier one has failed.
        if fetching is not None and not fetching.blocked:
            if isinstance(event, SpaceRefused) or fetching.failures == FAILURES_MAX:
                self._give_up(event.version_id, event.reason, now_s, effects)
            else:
                self._begin_again(fetching, event.reason, now_s, effects)
        if not isinstance(event, WriteFailed):
            self._end(event.version_id, effects)

    def _begin_again(
        self, former: Fetching, reason: str, now_s: float, effects: list[PeerEffect]
    ) -> None:
        """The disk has failed under a download: start it anew, perhaps on another disk."""
        version_id = former.version.version_id
        fetching = former.again(now_s)
        self._give_up(version_id, reason, now_s, effects)
        self._fetching[version_id] = fetching
        self._reserve(fetching, effects)
        self._arm(version_id, now_s)

    def _handle_space(
        self, event: SpaceReserved | ChunksRecovered, now_s: float, effects: list[PeerEffect]
    ) -> None:
        fetching = self._fetching.get(event.version_id)
        stale = fetching is None or fetching.blocked
        if isinstance(event, ChunksRecovered):
            self._end(event.version_id, effects)
        if fetching is None or stale:
            return
        fetching.progress_at_s = now_s
        if isinstance(event, SpaceReserved):
            fetching.chunk_size_bytes = event.chunk_size_bytes
            layout = ChunkLayout(fetching.version.size_bytes, event.chunk_size_bytes)
            fetching.download = Download(
                fetching.version, layout, self._rng, self._window, rack=self.address.rack
            )
            return
        assert fetching.download is not None, "recovered chunks before there is room"
        fetching.download.recovered(event.digests)
        fetching.on_disk = True
        if self.tracker_connected and not fetching.download.complete:
            self._join(fetching, effects)
        self._greet_all(event.version_id, now_s, effects)
        self._go_on(event.version_id, now_s, effects)

    def _handle_published(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        fetching = self._fetching.get(version_id)
        if fetching is None or not fetching.publishing:
            self._end(version_id, effects)
            return
        assert fetching.download is not None, "published without a download"
        effects.extend(fetching.download.announcements(math.inf))
        del self._fetching[version_id]
        self._end(version_id, effects)
        for request in fetching.requests:
            del self._requests[request]
            effects.append(AnswerCached(request, version_id))
        if fetching.version.size_bytes:
            self._tell(Replicas([version_id]), effects)
        self._forget_timer(version_id)
        digests, cut = fetching.download.digests, fetching.chunk_size_bytes
        for node in list(fetching.download.peers):
            if fetching.download.peer_is_complete(node):
                effects.append(TellPeer(node, Gone(version_id)))
                self._part(node, version_id, now_s)
            else:
                self._seeds.serve(version_id, node, digests, cut, effects)

    def _give_up(
        self,
        version_id: bytes,
        reason: str,
        now_s: float,
        effects: list[PeerEffect],
        *,
        source_changed: bool = False,
        keep: bool = False,
    ) -> None:
        """End a download without a result."""
        fetching = self._fetching.pop(version_id, None)
        if fetching is None:
            return
        self._answer_original(fetching, reason, effects, source_changed=source_changed)
        self._forget_timer(version_id)
        self._leases.cancel(version_id, reason)
        if fetching.joined:
            self._tell(Leave(version_id), effects)
        for neighbour in self._neighbours.of(version_id):
            node = neighbour.address.node
            if neighbour.up:
                effects.append(TellPeer(node, Gone(version_id)))
            self._part(node, version_id, now_s)
        if not fetching.blocked:
            self._drop(version_id, effects, keep=keep)

    # --- seeds ----------------------------------------------------------------------------------

    def _handle_manifest(
        self, event: ManifestLoaded, now_s: float, effects: list[PeerEffect]
    ) -> None:
        version_id, cut = event.version_id, event.chunk_size_bytes
        if not self._seeds.loaded(version_id, event.digests or (), cut, effects):
            self._end_seed(version_id, now_s, effects)

    def _end_seed(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        """There is no replica that this swarm could use, and the tracker counts on it no more."""
        self._drop_seed(version_id, now_s)
        self._tell(Leave(version_id), effects)

    def _drop_seed(self, version_id: bytes, now_s: float) -> None:
        for node in self._seeds.nodes(version_id):
            self._part(node, version_id, now_s)

    # --- the tracker ----------------------------------------------------------------------------

    def _tell(self, message: Message, effects: list[PeerEffect]) -> None:
        if self.tracker_connected:
            effects.append(TellTracker(message))  # type: ignore[arg-type]

    def _handle_tracker_connection(
        self, event: TrackerConnected | TrackerLost, now_s: float, effects: list[PeerEffect]
    ) -> None:
        if isinstance(event, TrackerLost):
            self.tracker_connected = False
            self._tracker_reason = event.reason
            self._writes.tracker_lost(event.reason, now_s)
            self._heartbeat_at_s = None
            for fetching in self._fetching.values():
                fetching.joined = False
                fetching.waiting_for_slot = False
            self._questions.tracker_lost(event.reason, effects)
            self._batches.tracker_lost(now_s, effects)
            self._leave_batches(now_s, effects)
            return
        self.tracker_connected = True
        self._questions.tracker_connected()
        # One message has room for no more; the tracker does not adopt the others, so they end.
        writes = self._writes.held()
        register = Register(
            self.address,
            now_s,
            self._leases.held()[:LOADS_MAX],
            self._disk,
            writes=writes,
            totals=self.totals(),
            stood_in=self._stood_in and not event.stand_in,
        )
        self._stood_in = event.stand_in
        self._tell(register, effects)
        self._writes.tracker_connected(now_s, effects)
        self._heartbeat_sent_s = now_s
        for fetching in self._fetching.values():
            if fetching.on_disk and fetching.version.size_bytes:
                self._join(fetching, effects)
        effects.append(AnnounceReplicas())
        self._beat(now_s)

    def _join(self, fetching: Fetching, effects: list[PeerEffect]) -> None:
        assert fetching.download is not None, "joining before there is room on the disk"
        fetching.joined = True
        self._tell(
            Join(
                fetching.version.version_id,
                fetching.file_server,
                fetching.user,
                fetching.version.size_bytes,
                fetching.chunk_size_bytes,
                mask_to_bytes(fetching.download.held),
                fetching.can_read,
            ),
            effects,
        )

    def _beat(self, now_s: float) -> None:
        """(Re)schedule the heartbeat: often while leases or downloads hang on it."""
        if self.tracker_connected:
            busy = self._leases or self._fetching or self._writes
            period_s = HEARTBEAT_BUSY_S if busy else HEARTBEAT_IDLE_S
            self._heartbeat_at_s = max(now_s, self._heartbeat_sent_s + period_s)

    def _handle_tracker_said(
        self, message: FromTracker, now_s: float, effects: list[PeerEffect]
    ) -> None:
        match message:
            case Peers():
                for address in message.peers[: self._peers_max]:
                    cut = message.chunk_size_bytes
                    self._meet(address, message.version_id, now_s, effects, cut)
                self._go_on(message.version_id, now_s, effects)
            case Lease():
                self._handle_lease(message, now_s, effects)
            case WriteLease():
                self._leases.extend(message.until_s, now_s)
                self._writes.leased(message, now_s, effects)
            case Renewed():
                self._leases.renew(message.until_s, now_s)
                self._writes.renewed(message, now_s, effects)
                waiting = set(message.waiting)
                for version_id, fetching in self._fetching.items():
                    fetching.waiting_for_slot = version_id in waiting
                    if fetching.waiting_for_slot:
                        fetching.progress_at_s = now_s
                        self._arm(version_id, now_s)
            case Registered():
                for lease in self._leases.adopted(message.adopted, message.until_s):
                    self._range_ends(lease)
                self._writes.registered(message, now_s, effects)
            case Joined():
                self._handle_joined(message, now_s, effects)
            case Query():
                held = self._held_mask(message.version_id) & mask_from_bytes(message.wanted)
                answer = Holding(message.version_id, message.query_id, mask_to_bytes(held))
                self._tell(answer, effects)
            case Revoked():
                self._give_up(
                    message.version_id, message.reason, now_s, effects, source_changed=True
                )
            case Suspected():
                self._handle_suspected(message.version_id, now_s, effects)
            case Refused():
                if message.version_id:
                    self._give_up(message.version_id, message.reason, now_s, effects)
            case Status():
                self._questions.told_status(message, effects)
            case Located():
                self._questions.told_holders(message, effects)
            case HeldBy():
                self._batches.told_holders(message, self._distrusted, now_s, effects)
                self._leave_batches(now_s, effects)

    def _handle_suspected(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        """Peers that distrust this node for other reasons may say so again and again."""
        if version_id in self._fetching:
            return  # its chunks have just been digested
        if now_s < self._checked_s.get(version_id, -math.inf) + CHECK_AGAIN_S:
            return
        if len(self._checked_s) >= CHECKED_MAX:
            del self._checked_s[next(iter(self._checked_s))]
        self._checked_s[version_id] = now_s
        effects.append(CheckCopy(version_id))

    def _handle_joined(self, message: Joined, now_s: float, effects: list[PeerEffect]) -> None:
        fetching = self._fetching.get(message.version_id)
        if fetching is None or message.chunk_size_bytes == fetching.chunk_size_bytes:
            return
        # Others cut this file differently (their setting differs): begin again, their way.
        fetching.chunk_size_bytes = message.chunk_size_bytes
        fetching.download = None
        fetching.on_disk = False
        fetching.publishing = False
        self._leases.cancel(message.version_id, "the swarm cuts the file differently")
        self._drop(message.version_id, effects, keep=False)
        self._reserve(fetching, effects)
        self._arm(message.version_id, now_s)

    def _held_mask(self, version_id: bytes) -> int:
        fetching = self._fetching.get(version_id)
        if fetching is not None:
            return fetching.download.held if fetching.download is not None else 0
        return self._seeds.held(version_id)

    # --- leases ---------------------------------------------------------------------------------

    def _handle_lease(self, message: Lease, now_s: float, effects: list[PeerEffect]) -> None:
        fetching = self._fetching.get(message.version_id)
        self._leases.extend(message.until_s, now_s)
        download = fetching.download if fetching is not None and fetching.on_disk else None
        fits = download is not None and message.first + message.count <= download.chunk_count
        if fetching is None or download is None or not fits or not fetching.can_read:
            failed = RangeFailed(message.lease_id, message.version_id, b"", "cannot read it here")
            self._tell(failed, effects)
            return
        self._leases.begin(message, fetching.file_server, fetching.user)
        download.read_begins(message.first, message.count)
        fetching.waiting_for_slot = False
        self._begin(message.version_id)
        effects.append(
            ReadRange(message.version_id, message.lease_id, message.first, message.count)
        )
        self._beat(now_s)

    def _range_ends(self, lease: NodeLease) -> None:
        """What was not read of it is missing again, if it is still wanted."""
        fetching = self._fetching.get(lease.version_id)
        if lease.cancelled is None and fetching is not None and fetching.download is not None:
            fetching.download.read_ends(lease.first, lease.count)

    def _held_of(self, lease: NodeLease) -> bytes:
        held = self._held_mask(lease.version_id)
        return mask_to_bytes(held & range_mask(lease.first, lease.count))

    def _handle_reading(
        self,
        event: ChunksRead | RangeReadDone | RangeReadFailed,
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        if isinstance(event, ChunksRead):
            fetching = self._fetching.get(event.version_id)
            if fetching is not None and fetching.download is not None:
                held = fetching.download.held
                for chunk, digest in event.digests.items():
                    fetching.download.chunk_read(chunk, digest)
                if fetching.download.held != held:  # or else nobody waits for it
                    fetching.progress_at_s = now_s
        else:
            self._handle_reader_end(event, now_s, effects)
        self._go_on(event.version_id, now_s, effects)

    def _handle_reader_end(
        self, event: RangeReadDone | RangeReadFailed, now_s: float, effects: list[PeerEffect]
    ) -> None:
        """The tracker is told of the end of the lease, unless the lease was void already."""
        version_id, lease_id = event.version_id, event.lease_id
        lease = self._leases.end(lease_id)
        if lease is not None:
            self._range_ends(lease)
        if lease is not None and lease.cancelled is not None:
            self._tell(RangeFailed(lease_id, version_id, b"", lease.cancelled), effects)
        elif lease is not None and isinstance(event, RangeReadDone):
            done = RangeRead(lease_id, version_id, event.read_bytes, event.elapsed_s)
            self._tell(done, effects)
        elif lease is not None and isinstance(event, RangeReadFailed):
            held = b"" if event.source_changed else self._held_of(lease)
            failed = RangeFailed(lease_id, version_id, held, event.reason, event.source_changed)
            self._tell(failed, effects)
            if event.source_changed:
                self._give_up(version_id, event.reason, now_s, effects, source_changed=True)
        self._end(version_id, effects)

    # --- neighbours -----------------------------------------------------------------------------

    def _meet(
        self,
        address: NodeAddress,
        version_id: bytes,
        now_s: float,
        effects: list[PeerEffect],
        chunk_size_bytes: int = 0,
    ) -> None:
        """Share a swarm with this node from now on."""
        if address.node == self.address.node:
            return
        if address.node in self._distrusted and version_id in self._fetching:
            self._tell(ReportCorrupt(version_id, address.node), effects)
        neighbour = self._neighbours.meet(address, version_id, chunk_size_bytes, effects)
        if neighbour.up:
            self._greet(neighbour, version_id, now_s, effects)

    def _greet(
        self, neighbour: Neighbour, version_id: bytes, now_s: float, effects: list[PeerEffect]
    ) -> None:
        """Tell a neighbour all that this node holds of a file version that both are in."""
        node = neighbour.address.node
        fetching = self._fetching.get(version_id)
        if fetching is not None:
            if fetching.download is not None:
                source = node not in self._distrusted
                busy = self._uploads_of(node) >= self._window
                again = version_id in neighbour.unheard
                neighbour.unheard.pop(version_id, None)
                told = fetching.download.add_peer(
                    neighbour.address, source=source, busy=busy, again=again
                )
                effects.extend(told)
            return
        if not self._seeds.greet(version_id, node, neighbour.versions[version_id], effects):
            self._end_seed(version_id, now_s, effects)

    def _greet_all(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        """Tell every neighbour of its swarm."""
        for neighbour in self._neighbours.of(version_id):
            if neighbour.up:
                self._greet(neighbour, version_id, now_s, effects)

    def _part(self, node: str, version_id: bytes, now_s: float) -> None:
        """There is nothing left to exchange with this neighbour in this swarm."""
        self._neighbours.part(node, version_id, now_s)
        fetching = self._fetching.get(version_id)
        if fetching is not None and fetching.download is not None:
            fetching.download.remove_peer(node)
        self._seeds.part(version_id, node)

    def _handle_connection(
        self,
        event: PeerConnected | PeerLost | NodesChanged,
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        match event:
            case PeerConnected():
                self._handle_connected(event.address, now_s, effects)
            case PeerLost():
                self._lose(event.node, now_s, effects)
            case NodesChanged():
                for node in event.dead:
                    if self._neighbours.died(node, effects):
                        self._lose(node, now_s, effects)
                for node in event.alive:
                    self._neighbours.came_back(node, effects)

    def _handle_connected(
        self, address: NodeAddress, now_s: float, effects: list[PeerEffect]
    ) -> None:
        former = self._neighbours.get(address.node)
        anew = former is not None and former.up
        neighbour = self._neighbours.connected(address, now_s)
        for version_id in sorted(neighbour.versions):
            fetching = self._fetching.get(version_id)
            if anew and fetching is not None and fetching.download is not None:
                # It may have lost since, with its machine, what it told before the connection
                # broke, which we have not noticed. What it still has it tells now.
                fetching.download.remove_peer(address.node)
            self._greet(neighbour, version_id, now_s, effects)
            self._go_on(version_id, now_s, effects)

    def _lose(self, node: str, now_s: float, effects: list[PeerEffect]) -> None:
        """There is no connection with this neighbour any more."""
        for version_id in self._neighbours.lost(node, self._fetching, now_s):
            fetching = self._fetching.get(version_id)
            if fetching is None:
                self._seeds.part(version_id, node)
            elif fetching.download is not None:
                fetching.download.remove_peer(node)
                self._go_on(version_id, now_s, effects)

    def _handle_peer_said(
        self, node: str, message: BetweenNodes, now_s: float, effects: list[PeerEffect]
    ) -> None:
        neighbour = self._neighbours.get(node)
        if neighbour is None:
            return
        version_id = message.version_id
        match message:
            case Have():
                if message.again and version_id in neighbour.versions:
                    self._greet(neighbour, version_id, now_s, effects)
                fetching = self._fetching.get(version_id)
                if fetching is None and message.complete:
                    # It waits for us to say the same. If we have, that may have come before it
                    # began, or been of chunks that were cut otherwise.
                    effects.append(TellPeer(node, Gone(version_id)))
                    self._part(node, version_id, now_s)
                    return
                if (
                    fetching is None
                    or fetching.download is None
                    # One of us has not been told yet how this swarm cuts the file.
                    or message.chunk_size_bytes not in (0, fetching.chunk_size_bytes)
                ):
                    neighbour.not_heard(version_id)
                    return
                if node not in fetching.download.peers:
                    # It was introduced to us before we were introduced to it.
                    self._meet(neighbour.address, version_id, now_s, effects)
                if fetching.download.peer_has(node, message.chunks, message.digests):
                    self._go_on(version_id, now_s, effects)
                if message.complete:
                    fetching.download.peer_completed(node)
                if message.coming is not None:
                    fetching.download.peer_brings(node, message.coming, now_s)
                    self._go_on(version_id, now_s, effects)
            case Gone():
                self._part(node, version_id, now_s)

    # --- chunks ---------------------------------------------------------------------------------

    def _handle_fetch_end(
        self,
        event: ChunkArrived | ChunkCorrupt | ChunkAbsent | PeerBusy | PeerUnreachable,
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        length_bytes = self._flights.pop((event.version_id, event.chunk, event.node))
        self._flight_bytes -= length_bytes
        if isinstance(event, ChunkArrived):
            self._from_peers_chunks += 1
            self._from_peers_bytes += length_bytes
        self._end(event.version_id, effects)
        if isinstance(event, ChunkCorrupt):
            self._distrust(event.node, event.version_id, effects)
        fetching = self._fetching.get(event.version_id)
        if fetching is not None and fetching.download is not None:
            download = fetching.download
            match event:
                case ChunkArrived():
                    held = download.held
                    download.chunk_arrived(event.chunk, event.node, now_s)
                    if download.held != held:
                        fetching.progress_at_s = now_s
                case ChunkCorrupt():
                    download.chunk_corrupt(event.chunk, event.node, now_s)
                case ChunkAbsent():
                    download.chunk_absent(event.chunk, event.node, now_s)
                case PeerBusy():
                    download.peer_busy(event.chunk, event.node, now_s)
                case PeerUnreachable():
                    download.peer_failed(event.chunk, event.node, now_s)
            self._go_on(event.version_id, now_s, effects)
        if self._starved:
            self._feed_starved(now_s, effects)

    def _distrust(self, node: str, version_id: bytes, effects: list[PeerEffect]) -> None:
        """Wrong bytes came from this peer: it is not asked again, in any swarm.

        The tracker is told for each swarm that both are in, since this node needs others for what
        that peer has.
        """
        if node in self._distrusted:
            return
        self._distrusted.add(node)
        neighbour = self._neighbours.get(node)
        shared = neighbour.versions if neighbour is not None else {}
        for other_id, fetching in self._fetching.items():
            if fetching.download is not None:
                fetching.download.distrust(node)
            if other_id == version_id or other_id in shared:
                self._tell(ReportCorrupt(other_id, node), effects)
        effects.append(DistrustPeer(node))

    def _feed_starved(self, now_s: float, effects: list[PeerEffect]) -> None:
        """Room in flight has become free: let the downloads ask that found none."""
        for version_id in list(self._starved):
            if self._room(1) <= 0:
                return
            del self._starved[version_id]
            self._go_on(version_id, now_s, effects)

    def _room(self, chunk_size_bytes: int) -> int:
        """How many more chunks of this size may be in flight."""
        left_bytes = self._buffers_bytes_max - self._flight_bytes
        return min(FLIGHTS_MAX - len(self._flights), left_bytes // chunk_size_bytes)

    def _go_on(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        """Ask for what can be asked for, tell what came, put in place what is complete."""
        fetching = self._fetching.get(version_id)
        if fetching is None:
            return
        download = fetching.download
        if download is not None and fetching.on_disk:
            if not download.complete:
                self._request(fetching, download, now_s, effects)
            elif not fetching.publishing:
                fetching.publishing = True
                self._begin(version_id)
                effects.append(PublishFile(version_id))
            effects.extend(download.announcements(now_s))
        self._arm(version_id, now_s)

    def _request(
        self, fetching: Fetching, download: Download, now_s: float, effects: list[PeerEffect]
    ) -> None:
        version_id = fetching.version.version_id
        room = self._room(download.layout.chunk_size_bytes)
        requests = download.requests(now_s, room)
        if len(requests) >= room:
            self._starved[version_id] = None
        for request in requests:
            self._begin(version_id)
            flight = (version_id, request.chunk, request.address.node)
            self._flights[flight] = request.length_bytes
            self._flight_bytes += request.length_bytes
        effects.extend(requests)

    # --- time -----------------------------------------------------------------------------------

    def _arm(self, version_id: bytes, now_s: float) -> None:
        """(Re)schedule the next look at one download."""
        self._timers.set_by(version_id, self._fetching[version_id].due_s(now_s))

    def _forget_timer(self, version_id: bytes) -> None:
        self._timers.set(version_id, None)
        self._starved.pop(version_id, None)

    def _handle_time(self, now_s: float, effects: list[PeerEffect]) -> None:
        if self._heartbeat_at_s is not None and self._heartbeat_at_s <= now_s:
            self._tell(Heartbeat(now_s, self._disk, self.totals()), effects)
            self._heartbeat_sent_s = now_s
            self._beat(now_s)
        self._writes.look_after(now_s, effects)
        self._batches.look_after(now_s, effects)
        self._leave_batches(now_s, effects)
        self._neighbours.look_after(now_s, effects)
        for version_id in self._timers.pop_due(now_s):
            self._look_after(version_id, now_s, effects)

    def _look_after(self, version_id: bytes, now_s: float, effects: list[PeerEffect]) -> None:
        fetching = self._fetching[version_id]
        if fetching.is_abandoned(now_s):
            self._give_up(version_id, "nobody waits for it", now_s, effects, keep=True)
            return
        for request in fetching.take_impatient(now_s):
            del self._requests[request]
            reason = f"no progress for {fetching.patience_s:g} s: {self._why_stalled(fetching)}"
            effects.append(AnswerOriginal(request, version_id, reason))
        if missing := fetching.take_complaint(now_s):
            self._tell(Missing(version_id, mask_to_bytes(missing)), effects)
        self._go_on(version_id, now_s, effects)

    def _why_stalled(self, fetching: Fetching) -> str:
        if fetching.disk_works:
            return "the disk of the cache does not answer"
        if not self.tracker_connected:
            return self._tracker_reason
        if fetching.download is not None and not fetching.download.unreachable(math.inf):
            return "the peers that have the missing chunks do not answer"
        return "no peer has the missing chunks, and none could be read from the file server"
