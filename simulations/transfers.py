"""Chunks on their way from node to node, and what may hold them up.

What ``transfer.py`` does on real sockets. Simplified: what a stopped receiver was being sent still
comes (its kernel takes it); what a stopped source was sending does not.

Invariant: a request ends in exactly one event, unless the daemon that asked has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulations.disks import corrupted
from simulations.engine import SimulationFailed
from simulations.network import Flow
from simulations.nodes import Node
from simulations.racks import between
from swarmcache.peer_events import (
    ChunkAbsent,
    ChunkArrived,
    ChunkCorrupt,
    FetchChunk,
    PeerBusy,
    PeerEvent,
    PeerUnreachable,
    WriteFailed,
)
from swarmcache.upload_slots import Upload

if TYPE_CHECKING:
    from simulations.cluster import Cluster


class Fetch(Flow):
    """A chunk on its way from one node to another. ``digest``: of what is being sent.

    ``held_up_s``: since when nothing moves, because of a cut or since its source was stopped.
    """

    __slots__ = ("admitted", "digest", "effect", "held_up_s", "life", "node", "over",
                 "source", "source_life", "transfers", "upload")  # fmt: skip

    def __init__(self, cluster: Cluster, node: Node, effect: FetchChunk) -> None:
        self.transfers = cluster.transfers
        self.node = node
        self.life = node.life
        self.effect = effect
        self.source = cluster.nodes[effect.address.node]
        self.source_life = self.source.life
        self.upload = Upload(effect.version_id, effect.held_chunks)
        self.admitted = False
        self.over = False
        self.held_up_s: float | None = None
        self.digest = b""
        deadline_s = cluster.engine.now_s + effect.deadline_s
        via = between(self.source.rack, node.rack)
        super().__init__(self.source.up, node.down, effect.length_bytes, deadline_s, via)

    def ended(self, complete: bool) -> None:
        self.transfers.ended(self, complete)


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
        node.under_way[effect.version_id] += 1
        if effect.address.node in node.distrusted:
            raise SimulationFailed(f"{node.name} asked a peer that has lied to it")
        fetch = Fetch(self._cluster, node, effect)
        node.fetches[fetch] = None
        self._engine.at(self._engine.now_s + 2 * self._latency_s, self.begins, fetch)

    def begins(self, fetch: Fetch) -> None:
        """A request has reached its source, and the first byte would be back now."""
        effect, source, node = fetch.effect, fetch.source, fetch.node
        if fetch.over or node.life != fetch.life:
            return
        if (not source.alive or source.stopped or node.traps or self._wires.cut) and (
            self._request_fails(fetch)
        ):
            return
        fetch.source_life = source.life
        replica = source.disk.replicas.get(effect.version_id)
        chunk = effect.chunk
        if replica is None or chunk not in replica.digests:
            self._end_fetch(fetch, ChunkAbsent(effect.version_id, chunk, source.name))
        elif not source.upload_slots.admit(fetch.upload):
            self.uploads_refused += 1
            self._end_fetch(fetch, PeerBusy(effect.version_id, chunk, source.name))
        else:
            fetch.digest = replica.digests[chunk]
            if replica.layout.length_bytes(chunk) != effect.length_bytes:
                fetch.digest = corrupted(fetch.digest)  # a length that was not expected is as bad
            fetch.admitted = True
            source.serving[fetch] = None
            if source.upload_slots.waiting:
                source.uploads_waiting.append(fetch)
            else:
                self._network.start(fetch)

    def _request_fails(self, fetch: Fetch) -> bool:
        """Whether a fault ends (or will end) this request before its first byte."""
        effect, source, node = fetch.effect, fetch.source, fetch.node
        what = (effect.version_id, effect.chunk, source.name)
        wires = self._wires
        silent = not source.powered or wires.blocked(node.name, source.name)
        if silent or wires.blocked(source.name, node.name) or node.trap("chunk stalled"):
            self.fails_if_it_stalls(fetch)
        elif not source.alive or node.trap("chunk refused"):
            self._end_fetch(fetch, PeerUnreachable(*what, "refused"))
        elif source.stopped:
            source.inbox.append((self.begins, fetch))
            self.fails_if_it_stalls(fetch)
        elif node.trap("chunk busy"):
            self._end_fetch(fetch, PeerBusy(*what))
        elif node.trap("chunk absent"):
            self._end_fetch(fetch, ChunkAbsent(*what))
        else:
            if fault := node.trap("chunk reset"):
                at_s = self._engine.now_s + fault.duration_s
                self._engine.at(at_s, self.reset, fetch)
            return False
        return True

    def fails_if_it_stalls(self, fetch: Fetch) -> None:
        at_s = self._engine.now_s + fetch.effect.stall_s
        self._engine.at(at_s, self._fetch_stalled, (fetch, fetch.held_up_s))

    def _fetch_stalled(self, stalled: tuple[Fetch, float | None]) -> None:
        """Nothing has come for ``stall_s``, unless it has gone on since."""
        fetch, held_up_s = stalled
        if not fetch.over and fetch.held_up_s == held_up_s and fetch.due_s < 0.0:
            self.abort(fetch, "no byte came")

    def reset(self, fetch: Fetch) -> None:
        if not fetch.over:
            self.abort(fetch, "reset")

    def abort(self, fetch: Fetch, reason: str) -> None:
        effect = fetch.effect
        self._network.stop(fetch)
        self.leave_source(fetch)
        lost = PeerUnreachable(effect.version_id, effect.chunk, fetch.source.name, reason)
        self._end_fetch(fetch, lost)

    def hold_up(self, fetch: Fetch) -> None:
        """Nothing moves for a while."""
        if fetch.due_s >= 0.0:
            self._network.stop(fetch)
            fetch.held_up_s = self._engine.now_s
            self.fails_if_it_stalls(fetch)

    def let_go_on(self, fetch: Fetch) -> None:
        source, node = fetch.source, fetch.node
        if fetch.held_up_s is None or fetch.over or source.stopped or not source.alive:
            return
        if not self._wires.blocked(source.name, node.name):
            fetch.held_up_s = None
            self._network.start(fetch)

    def leave_source(self, fetch: Fetch) -> None:
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

    def ended(self, fetch: Fetch, complete: bool) -> None:
        """A chunk has come from a peer, or its deadline has."""
        effect, source, node = fetch.effect, fetch.source, fetch.node
        version_id, chunk = effect.version_id, effect.chunk
        self.leave_source(fetch)
        if node.life != fetch.life:
            return
        self._trace.chunk(source.index, node.index, chunk)
        if not complete:
            self.deadlines_missed += 1
            late = PeerUnreachable(version_id, chunk, source.name, "past its deadline")
            self._end_fetch(fetch, late)
            return
        digest = fetch.digest
        if source.corrupts or (source.traps and source.trap("chunk corrupted")):
            digest = corrupted(digest)
        if digest != effect.digest:
            self._end_fetch(fetch, ChunkCorrupt(version_id, chunk, source.name))
        elif node.traps and node.trap("write of a chunk failed"):
            lost = PeerUnreachable(version_id, chunk, source.name, "no space left on device")
            self._end_fetch(fetch, WriteFailed(version_id, "no space left on device"), lost)
        else:
            replica = node.disk.replicas.get(version_id)
            if replica is not None:  # put in place meanwhile, and lost since
                self.repeats += chunk in replica.digests
                replica.digests.setdefault(chunk, digest)
            self._end_fetch(fetch, ChunkArrived(version_id, chunk, source.name))

    def _end_fetch(self, fetch: Fetch, *events: PeerEvent) -> None:
        fetch.over = True
        node = fetch.node
        if node.life != fetch.life:
            return
        node.fetches.pop(fetch, None)
        version_id = fetch.effect.version_id
        if node.traps and (fault := node.trap("disk slow")):
            self._cluster.after(fault.duration_s, node, *events, version_id=version_id)
        else:
            self._cluster.come_to((node, fetch.life, version_id, events))
