"""Chunks and small files on their way from node to node, and what may hold them up.

What ``chunk_server.py`` and ``chunk_fetcher.py`` do on real sockets. Simplified: what a stopped
receiver was being sent still comes (its kernel takes it); what a stopped source was sending does
not.

Invariant: a request ends in exactly one event, unless the daemon that asked has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulations.disks import NoRoom, content_digest, corrupted
from simulations.engine import SimulationFailed
from simulations.network import Flow
from simulations.nodes import Node
from simulations.racks import between
from swarmcache.peer_events import (
    ChunkAbsent,
    ChunkArrived,
    ChunkCorrupt,
    FetchChunk,
    FetchFiles,
    FilesArrived,
    FilesCorrupt,
    FilesNotKept,
    HolderBusy,
    HolderFailed,
    PeerBusy,
    PeerEvent,
    PeerUnreachable,
    ReplicaDropped,
    WriteFailed,
)
from swarmcache.upload_slots import Upload

if TYPE_CHECKING:
    from simulations.cluster import Cluster


class Transfer(Flow):
    """What a node is sent by another one. ``held_up_s``: since when nothing moves, because of a cut
    or since its source was stopped."""

    __slots__ = ("admitted", "held_up_s", "life", "node", "over", "source",
                 "source_life", "stall_s", "transfers", "upload")  # fmt: skip

    def __init__(
        self,
        cluster: Cluster,
        node: Node,
        effect: FetchChunk | FetchFiles,
        upload: Upload,
        length_bytes: int,
    ) -> None:
        self.transfers = cluster.transfers
        self.node = node
        self.life = node.life
        self.stall_s = effect.stall_s
        self.source = cluster.nodes[effect.address.node]
        self.source_life = self.source.life
        self.upload = upload
        self.admitted = False
        self.over = False
        self.held_up_s: float | None = None
        deadline_s = cluster.engine.now_s + effect.deadline_s
        via = between(self.source.rack, node.rack)
        super().__init__(self.source.up, node.down, length_bytes, deadline_s, via)

    def version_ids(self) -> list[bytes]:
        """What of the receiver's is under way with it."""
        raise NotImplementedError

    def begins(self) -> PeerEvent | None:
        """The source looks for what is asked for; how it ends if there is nothing to send."""
        raise NotImplementedError

    def busy(self) -> PeerEvent:
        """How it ends where no upload slot is free."""
        raise NotImplementedError

    def absent(self) -> PeerEvent:
        """How it ends where the source has nothing of it."""
        raise NotImplementedError

    def failed(self, reason: str) -> PeerEvent:
        """How it ends where nothing comes."""
        raise NotImplementedError

    def arrived(self) -> list[PeerEvent]:
        """All of it has come: check it and write it; how it ends."""
        raise NotImplementedError

    def ended(self, complete: bool) -> None:
        self.transfers.ended(self, complete)


class Fetch(Transfer):
    """A chunk on its way. ``digest``: of what is being sent."""

    __slots__ = ("digest", "effect")

    def __init__(self, cluster: Cluster, node: Node, effect: FetchChunk) -> None:
        self.effect = effect
        self.digest = b""
        upload = Upload(effect.version_id, effect.held_chunks)
        super().__init__(cluster, node, effect, upload, effect.length_bytes)

    @property
    def _what(self) -> tuple[bytes, int, str]:
        return self.effect.version_id, self.effect.chunk, self.source.name

    def version_ids(self) -> list[bytes]:
        return [self.effect.version_id]

    def begins(self) -> PeerEvent | None:
        replica = self.source.disk.replicas.get(self.effect.version_id)
        chunk = self.effect.chunk
        if replica is None or chunk not in replica.digests:
            return self.absent()
        self.digest = replica.digests[chunk]
        if replica.layout.length_bytes(chunk) != self.effect.length_bytes:
            self.digest = corrupted(self.digest)  # a length that was not expected is as bad
        return None

    def busy(self) -> PeerEvent:
        return PeerBusy(*self._what)

    def absent(self) -> PeerEvent:
        return ChunkAbsent(*self._what)

    def failed(self, reason: str) -> PeerEvent:
        return PeerUnreachable(*self._what, reason)

    def arrived(self) -> list[PeerEvent]:
        version_id, chunk, _ = self._what
        source, node = self.source, self.node
        if source.corrupts or (source.traps and source.trap("chunk corrupted")):
            self.digest = corrupted(self.digest)
        if self.digest != self.effect.digest:
            return [ChunkCorrupt(*self._what)]
        if node.traps and node.trap("write of a chunk failed"):
            reason = "no space left on device"
            return [WriteFailed(version_id, reason), self.failed(reason)]
        replica = node.disk.replicas.get(version_id)
        if replica is not None:  # put in place meanwhile, and lost since
            self.transfers.repeats += chunk in replica.digests
            replica.digests.setdefault(chunk, self.digest)
        return [ChunkArrived(*self._what)]


class FilesFetch(Transfer):
    """Small files on their way together. ``sent``: the digests that they should have, and those of
    what is sent."""

    __slots__ = ("effect", "sent")

    def __init__(self, cluster: Cluster, node: Node, effect: FetchFiles) -> None:
        self.effect = effect
        self.sent: dict[bytes, tuple[bytes, bytes]] = {}
        length_bytes = sum(version.size_bytes for version in effect.versions)
        super().__init__(cluster, node, effect, Upload(b"%d" % effect.fetch, 0), length_bytes)

    @property
    def _what(self) -> tuple[int, str]:
        return self.effect.fetch, self.source.name

    def version_ids(self) -> list[bytes]:
        return [version.version_id for version in self.effect.versions]

    def begins(self) -> PeerEvent | None:
        for version_id in self.version_ids():
            replica = self.source.disk.replicas.get(version_id)
            if replica is not None and replica.published and replica.layout.chunk_count == 1:
                right = content_digest(version_id, replica.layout, 0)
                held = corrupted(right) if replica.rotten else replica.digests[0]
                self.sent[version_id] = (right, held)
        return None

    def busy(self) -> PeerEvent:
        return HolderBusy(*self._what)

    def absent(self) -> PeerEvent:
        return FilesArrived(*self._what, [], 0)

    def failed(self, reason: str) -> PeerEvent:
        return HolderFailed(*self._what, reason)

    def arrived(self) -> list[PeerEvent]:
        source, node = self.source, self.node
        lies = source.corrupts or bool(source.traps and source.trap("chunk corrupted"))
        for version_id, (named, digest) in self.sent.items():
            if lies or named != digest:
                return [FilesCorrupt(*self._what, version_id)]
        if node.traps and node.trap("write of a chunk failed"):
            return [FilesNotKept(*self._what, "no space left on device")]
        return [self.transfers.keep_files(self)]


class Transfers:
    """All chunks between nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._network = cluster.network
        self._wires = cluster.control.wires
        self._trace = cluster.trace
        self._latency_s = cluster.settings.latency_s
        self.repeats = 0
        self.deadlines_missed = 0
        self.uploads_refused = 0

    def fetch(self, node: Node, effect: FetchChunk) -> None:
        """Carry out ``FetchChunk``."""
        self._begin(Fetch(self._cluster, node, effect))

    def fetch_files(self, node: Node, effect: FetchFiles) -> None:
        """Carry out ``FetchFiles``."""
        if self._cluster.strict and any(
            node.under_way[each.version_id] for each in effect.versions
        ):
            raise SimulationFailed(f"{node.name} fetches a file twice at once")
        self._begin(FilesFetch(self._cluster, node, effect))

    def _begin(self, fetch: Transfer) -> None:
        node = fetch.node
        for version_id in fetch.version_ids():
            node.under_way[version_id] += 1
        if fetch.source.name in node.distrusted:
            raise SimulationFailed(f"{node.name} asked a peer that has lied to it")
        node.fetches[fetch] = None
        self._engine.at(self._engine.now_s + 2 * self._latency_s, self.begins, fetch)

    def begins(self, fetch: Transfer) -> None:
        """A request has reached its source, and the first byte would be back now."""
        source, node = fetch.source, fetch.node
        if fetch.over or node.life != fetch.life:
            return
        if (not source.alive or source.stopped or node.traps or self._wires.cut) and (
            self._request_fails(fetch)
        ):
            return
        fetch.source_life = source.life
        nothing = fetch.begins()
        if nothing is not None:
            self._end_fetch(fetch, nothing)
        elif not source.upload_slots.admit(fetch.upload):
            self.uploads_refused += 1
            self._end_fetch(fetch, fetch.busy())
        else:
            fetch.admitted = True
            source.serving[fetch] = None
            if source.upload_slots.waiting:
                source.uploads_waiting.append(fetch)
            else:
                self._network.start(fetch)

    def _request_fails(self, fetch: Transfer) -> bool:
        """Whether a fault ends (or will end) this request before its first byte."""
        source, node = fetch.source, fetch.node
        wires = self._wires
        silent = not source.powered or wires.blocked(node.name, source.name)
        if silent or wires.blocked(source.name, node.name) or node.trap("chunk stalled"):
            self.fails_if_it_stalls(fetch)
        elif not source.alive or node.trap("chunk refused"):
            self._end_fetch(fetch, fetch.failed("refused"))
        elif source.stopped:
            source.inbox.append((self.begins, fetch))
            self.fails_if_it_stalls(fetch)
        elif node.trap("chunk busy"):
            self._end_fetch(fetch, fetch.busy())
        elif node.trap("chunk absent"):
            self._end_fetch(fetch, fetch.absent())
        else:
            if fault := node.trap("chunk reset"):
                at_s = self._engine.now_s + fault.duration_s
                self._engine.at(at_s, self.reset, fetch)
            return False
        return True

    def fails_if_it_stalls(self, fetch: Transfer) -> None:
        at_s = self._engine.now_s + fetch.stall_s
        self._engine.at(at_s, self._fetch_stalled, (fetch, fetch.held_up_s))

    def _fetch_stalled(self, stalled: tuple[Transfer, float | None]) -> None:
        """Nothing has come for ``stall_s``, unless it has gone on since."""
        fetch, held_up_s = stalled
        if not fetch.over and fetch.held_up_s == held_up_s and fetch.due_s < 0.0:
            self.abort(fetch, "no byte came")

    def reset(self, fetch: Transfer) -> None:
        if not fetch.over:
            self.abort(fetch, "reset")

    def abort(self, fetch: Transfer, reason: str) -> None:
        self._network.stop(fetch)
        self.leave_source(fetch)
        self._end_fetch(fetch, fetch.failed(reason))

    def hold_up(self, fetch: Transfer) -> None:
        """Nothing moves for a while."""
        if fetch.due_s >= 0.0:
            self._network.stop(fetch)
            fetch.held_up_s = self._engine.now_s
            self.fails_if_it_stalls(fetch)

    def let_go_on(self, fetch: Transfer) -> None:
        source, node = fetch.source, fetch.node
        if fetch.held_up_s is None or fetch.over or source.stopped or not source.alive:
            return
        if not self._wires.blocked(source.name, node.name):
            fetch.held_up_s = None
            self._network.start(fetch)

    def leave_source(self, fetch: Transfer) -> None:
        """The place that it had is free for the next one."""
        source = fetch.source
        if not fetch.admitted or fetch.source_life != source.life:
            return
        fetch.admitted = False
        source.serving.pop(fetch, None)
        source.upload_slots.leave(fetch.upload)
        if fetch in source.uploads_waiting:
            source.uploads_waiting.remove(fetch)
        elif source.uploads_waiting:
            following = source.uploads_waiting.popleft()
            if source.stopped or self._wires.blocked(source.name, following.node.name):
                following.held_up_s = self._engine.now_s
                self.fails_if_it_stalls(following)
            else:
                self._network.start(following)

    def ended(self, fetch: Transfer, complete: bool) -> None:
        """What was sent by a peer has come, or its deadline has."""
        source, node = fetch.source, fetch.node
        self.leave_source(fetch)
        if node.life != fetch.life:
            return
        number = fetch.effect.chunk if isinstance(fetch, Fetch) else -1
        self._trace.chunk(source.index, node.index, number)
        if complete:
            self._end_fetch(fetch, *fetch.arrived())
        else:
            self.deadlines_missed += 1
            self._end_fetch(fetch, fetch.failed("past its deadline"))

    def keep_files(self, fetch: FilesFetch) -> PeerEvent:
        """Put small files in place that have come; make room for all of them first."""
        node = fetch.node
        disk = node.disk
        versions = [
            version
            for version in fetch.effect.versions
            if version.version_id in fetch.sent and version.version_id not in disk.replicas
        ]
        size_bytes = sum(version.size_bytes for version in versions)
        what = (fetch.effect.fetch, fetch.source.name)
        try:
            victims = disk.victims(size_bytes, self._engine.now_s, {})
        except NoRoom as error:
            return FilesNotKept(*what, str(error))
        for victim in victims:
            self._cluster.hand(node, ReplicaDropped(victim))
            disk.evict(victim)
        self._cluster.disks.put_in_place(node, versions)
        return FilesArrived(*what, [version.version_id for version in versions], size_bytes)

    def _end_fetch(self, fetch: Transfer, *events: PeerEvent) -> None:
        fetch.over = True
        node = fetch.node
        if node.life != fetch.life:
            return
        node.fetches.pop(fetch, None)
        delay_s = 0.0
        if node.traps and (fault := node.trap("disk slow")):
            delay_s = fault.duration_s
        version_ids = fetch.version_ids()
        if isinstance(fetch, Fetch) and delay_s:
            self._cluster.after(delay_s, node, *events, version_id=version_ids[0])
        elif isinstance(fetch, Fetch):
            self._cluster.come_to((node, fetch.life, version_ids[0], events))
        else:
            ended = (node, fetch.life, version_ids, events[0])
            self._engine.at(self._engine.now_s + delay_s, self._files_ended, ended)

    def _files_ended(self, ended: tuple[Node, int, list[bytes], PeerEvent]) -> None:
        node, life, version_ids, event = ended
        if node.life != life:
            return
        if node.stopped:
            node.inbox.append((self._files_ended, ended))
            return
        node.under_way.subtract(version_ids)
        if isinstance(event, FilesArrived):  # a disk that was slow may be lost by now
            event.version_ids = [each for each in event.version_ids if each in node.disk.replicas]
        self._cluster.tell(node, event)
        if isinstance(event, FilesArrived) and node.life == life:
            self._cluster.disks.files_announced(node, event.version_ids)
