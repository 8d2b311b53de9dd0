"""Leased ranges on their way from the file server to their holders.

What ``source_reader.py`` does in threads: the lease is asked for before every piece, and a chunk
counts if the source is still the same after its last one.

Invariant: a range that is read ends in exactly one event, unless the daemon that reads has ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from simulations.disks import content_digest
from simulations.network import Flow
from simulations.nodes import Node
from simulations.racks import between
from swarmcache.chunks import ChunkLayout
from swarmcache.peer_events import (
    ChunksRead,
    RangeReadDone,
    RangeReadFailed,
    ReadRange,
    WriteFailed,
)

if TYPE_CHECKING:
    from simulations.cluster import Cluster


class RangeReading:
    """One leased range being read, a piece at a time, as the production reader does."""

    __slots__ = ("chunk", "effect", "flow", "layout", "life", "node", "piece_since_s", "read_bytes",
                 "rest_bytes", "since_s")  # fmt: skip

    def __init__(self, node: Node, effect: ReadRange, layout: ChunkLayout, now_s: float) -> None:
        self.node = node
        self.life = node.life
        self.effect = effect
        self.layout = layout
        self.chunk = effect.first
        # What is left of this chunk; 0 before it was begun.
        self.rest_bytes = 0
        self.read_bytes = 0
        self.since_s = now_s
        self.piece_since_s = now_s
        self.flow: ServerRead | None = None

    def lease_is_over(self, now_s: float) -> bool:
        """By the holder's own clock."""
        return not self.node.machine.may_read(self.effect.lease_id, self.node.clock.read(now_s))


class ServerRead(Flow):
    """A piece on its way from the file server to a leaseholder."""

    __slots__ = ("reading", "readings")

    def __init__(self, readings: Readings, reading: RangeReading, length_bytes: int) -> None:
        self.readings = readings
        self.reading = reading
        up, down = readings.server.up, reading.node.down
        super().__init__(up, down, length_bytes, math.inf, between(None, reading.node.rack))

    def ended(self, complete: bool) -> None:
        assert complete, "a read without a deadline ended early"
        self.readings.piece_ended(self)


class Readings:
    """All ranges that are being read."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._network = cluster.network
        self._trace = cluster.trace
        self._settings = cluster.settings
        self.server = cluster.file_server
        self.on_range: Callable[[Node, bytes, range], None] | None = None

    def begin(self, node: Node, effect: ReadRange) -> None:
        """Carry out ``ReadRange``."""
        # The reader's first request goes to the file server; the others are read ahead.
        now_s = self._engine.now_s
        layout = node.disk.replicas[effect.version_id].layout
        reading = RangeReading(node, effect, layout, now_s)
        node.under_way[effect.version_id] += 1
        node.reading[reading] = None
        if not node.machine.may_read(effect.lease_id, node.clock.read(now_s)):
            self.fail(reading, "the lease ran out")
            return
        if self.on_range is not None:
            self.on_range(node, effect.version_id, range(effect.first, effect.first + effect.count))
        self.server.enter(reading, now_s)
        first_byte_s = now_s + 2 * self._settings.latency_s
        self._engine.at(first_byte_s, self._next_piece, reading)

    def _next_piece(self, reading: RangeReading) -> None:
        """Ask for the next piece, if the lease still holds."""
        node, effect = reading.node, reading.effect
        now_s = self._engine.now_s
        if node.life != reading.life:
            return
        if node.stopped:  # between two pieces: it asks for nothing until it goes on
            self.server.leave(reading)
            node.inbox.insert(0, (self._next_piece, reading))
            return
        if not node.machine.may_read(effect.lease_id, node.clock.read(now_s)):
            self.fail(reading, "the lease ran out")
            return
        if node.traps:
            if node.trap("read failed"):
                self.fail(reading, "stale file handle")
                return
            if fault := node.trap("read slow"):
                reading.piece_since_s = now_s
                self.server.enter(reading, now_s)
                self._engine.at(now_s + fault.duration_s, self._next_piece, reading)
                return
        if not reading.rest_bytes:
            reading.rest_bytes = reading.layout.length_bytes(reading.chunk)
        reading.piece_since_s = now_s
        if reading not in self.server.readers:
            self.server.enter(reading, now_s)
        length_bytes = min(reading.rest_bytes, self._settings.piece_bytes or reading.rest_bytes)
        reading.flow = ServerRead(self, reading, length_bytes)
        self._network.start(reading.flow)

    def piece_ended(self, flow: ServerRead) -> None:
        """A piece of a leased range was read."""
        reading = flow.reading
        node = reading.node
        reading.flow = None
        if node.life != reading.life:
            return
        reading.read_bytes += flow.length_bytes
        reading.rest_bytes -= flow.length_bytes
        if reading.rest_bytes:
            self._next_piece(reading)
            return
        if node.stopped:
            self.server.leave(reading)
            node.inbox.insert(0, (self._chunk_was_read, reading))
            return
        self._chunk_was_read(reading)

    def _chunk_was_read(self, reading: RangeReading) -> None:
        """The last piece of a chunk is here: if the source is still the same, the chunk counts."""
        node, effect, chunk = reading.node, reading.effect, reading.chunk
        version_id = effect.version_id
        if node.life != reading.life:
            return
        if not self.server.is_current(self._cluster.versions[version_id]):
            self.fail(reading, "the source has changed", source_changed=True)
            return
        if node.traps and node.trap("write of a range failed"):
            self._cluster.tell(node, WriteFailed(version_id, "no space left on device"))
            if node.life == reading.life:
                self.fail(reading, "no space left on device")
            return
        digest = content_digest(version_id, reading.layout, chunk)
        replica = node.disk.replicas.get(version_id)
        if replica is not None:  # put in place meanwhile, with chunks of peers, and evicted since
            replica.digests[chunk] = digest
        self._trace.chunk(-1, node.index, chunk)
        reading.chunk += 1
        done = reading.chunk == effect.first + effect.count
        if done:
            self.server.leave(reading)
        else:
            self._next_piece(reading)
        self._cluster.tell(node, ChunksRead(version_id, effect.lease_id, {chunk: digest}))
        if done and node.life == reading.life:
            node.reading.pop(reading)
            elapsed_s = self._engine.now_s - reading.since_s
            read = RangeReadDone(version_id, effect.lease_id, reading.read_bytes, elapsed_s)
            node.under_way[version_id] -= 1
            self._cluster.tell(node, read)

    def fail(self, reading: RangeReading, reason: str, *, source_changed: bool = False) -> None:
        node, effect = reading.node, reading.effect
        self.server.leave(reading)
        node.reading.pop(reading)
        failed = RangeReadFailed(effect.version_id, effect.lease_id, reason, source_changed)
        self._cluster.soon(node, failed, version_id=effect.version_id)
