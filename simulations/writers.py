"""Clients that copy files to the file server (``swarmcache cp``), a piece at a time.

What ``write_slot.py`` does in a client: it tells its daemon what it wants, writes for as long as it
was last told that it may, by its own clock, and answers whatever it is told. Without a daemon it
asks again for a while, and then goes on without a slot, as it does when there is no tracker.

Invariants: a client is told little before it has answered, and what it was promised is never taken
back; one that has a slot is among those who use the file server while a piece of its is on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simulations.engine import SimulationFailed
from simulations.network import Flow
from simulations.nodes import Node
from simulations.racks import between
from simulations.settings import FILE_SERVER, USER
from swarmcache.peer_events import (
    AnswerNoSlot,
    AnswerSlot,
    RequestGone,
    WriterAnswered,
    WriteWanted,
)
from swarmcache.peer_writes import PIECE_S
from swarmcache.write_slot import PATIENCE_S, RETRY_S

if TYPE_CHECKING:
    from simulations.cluster import Cluster

PIECE_BYTES = 128 << 10
# What a word takes between a client and its daemon, on one machine.
LOCAL_S = 0.0001
# What a client is told before it has answered: that it must wait, and that it need not any more.
UNANSWERED_MAX = 2
# Numbers of their requests, above those of all clients that read.
REQUESTS_FROM = 1 << 41


class Writer:
    """One client that copies ``size_bytes``. ``until_s``: the last promise, by the node's clock.

    ``unlimited``: it was told, or has found, that there is no slot to be had. ``since_s`` and
    ``done_s``: when it began, and when all was written.
    """

    def __init__(self, node: Node, size_bytes: int, user: str = USER) -> None:
        self.node = node
        self.user = user
        self.size_bytes = size_bytes
        self.rest_bytes = size_bytes
        self.request: int | None = None
        self.until_s = -math.inf
        self.told_until_s = -math.inf  # as its daemon sees it, before it has heard
        self.unanswered = 0
        self.unlimited = False
        self.over = False
        self.stopped = False
        self.inbox: list[tuple[Callable[[Any], None], object]] = []
        self.without_daemon_s = 0.0
        self.since_s = 0.0
        self.done_s: float | None = None
        self.flow: ServerWrite | None = None
        self.piece_since_s = 0.0

    def lease_is_over(self, now_s: float) -> bool:
        """By its own clock it may write no more, but for the piece that is on its way."""
        return self.node.clock.read(now_s) >= self.until_s


class ServerWrite(Flow):
    """A piece on its way to the file server."""

    __slots__ = ("writer", "writers")

    def __init__(self, writers: Writers, writer: Writer, length_bytes: int) -> None:
        self.writers = writers
        self.writer = writer
        node = writer.node
        super().__init__(
            node.up, writers.server.down, length_bytes, math.inf, between(node.rack, None)
        )

    def ended(self, complete: bool) -> None:
        assert complete, "a write without a deadline ended early"
        self.writers.piece_ended(self.writer, self.length_bytes)


class Writers:
    """All of them. ``pending``: those that are not through; ``without_slot``: how many wrote so."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._network = cluster.network
        self.server = cluster.file_server
        self.pending: dict[Writer, None] = {}
        self.copied: list[Writer] = []
        self.without_slot = 0
        self.on_done: Callable[[Writer], None] | None = None
        self._requests = REQUESTS_FROM
        self._by_request: dict[int, Writer] = {}

    def write(self, writer: Writer) -> None:
        """A client begins."""
        now_s = self._engine.now_s
        if writer.node.lost or not writer.node.powered:
            return
        self.pending[writer] = None
        writer.since_s = writer.without_daemon_s = now_s
        self._ask(writer)

    def write_at(self, at_s: float, writer: Writer) -> None:
        """A client begins at this time."""
        self._engine.at(at_s, self.write, writer)

    # --- the daemon ------------------------------------------------------------------------------

    def _ask(self, writer: Writer) -> None:
        if writer.over or writer.request is not None or writer.unlimited:
            return
        if writer.stopped:
            writer.inbox.append((self._ask, writer))
            return
        now_s = self._engine.now_s
        if writer.node.alive:
            self._requests += 1
            writer.unanswered = 0
            writer.told_until_s = -math.inf
            writer.request = self._requests
            self._by_request[writer.request] = writer
            self._cluster.hand(writer.node, WriteWanted(writer.request, FILE_SERVER, writer.user))
        elif now_s < writer.without_daemon_s + PATIENCE_S:
            self._engine.at(now_s + RETRY_S, self._ask, writer)
        else:
            self._do_without(writer)

    def told(self, node: Node, effect: AnswerSlot | AnswerNoSlot) -> None:
        """Carry out what the daemon tells a client."""
        writer = self._by_request.get(effect.request)
        if writer is not None:
            assert writer.node is node, "the client of another node was told"
            self._check_promise(writer, effect)
            writer.unanswered += isinstance(effect, AnswerSlot)
            if writer.unanswered > UNANSWERED_MAX:
                raise SimulationFailed(f"a client on {node.name} does not answer and is told more")
            self._engine.at(self._engine.now_s + LOCAL_S, self._hears, (writer, effect))

    def _check_promise(self, writer: Writer, effect: AnswerSlot | AnswerNoSlot) -> None:
        """Once a promise has run out the lease is given back, and nothing is promised before all
        is quiet. Raises SimulationFailed."""
        if isinstance(effect, AnswerNoSlot) or effect.until_s is None:
            return
        ran_out_s = writer.node.clock.read(self._engine.now_s) - writer.told_until_s
        if 0.0 <= ran_out_s < PIECE_S:
            raise SimulationFailed(f"a promise that had run out was renewed on {writer.node.name}")
        writer.told_until_s = effect.until_s

    def _hears(self, heard: tuple[Writer, AnswerSlot | AnswerNoSlot]) -> None:
        writer, effect = heard
        if writer.over or writer.request != effect.request:
            return
        if writer.stopped:
            writer.inbox.append((self._hears, heard))
            return
        if isinstance(effect, AnswerNoSlot):
            self._forget_request(writer)
            self._do_without(writer)
            return
        if effect.until_s is not None:
            if effect.until_s < writer.until_s:
                raise SimulationFailed(f"a promise was taken back on {writer.node.name}")
            writer.until_s = effect.until_s
        self._say(writer, WriterAnswered(effect.request))
        self._go_on(writer)

    def _say(self, writer: Writer, event: WriterAnswered | RequestGone) -> None:
        said = (writer.node, writer.node.life, event)
        self._engine.at(self._engine.now_s + LOCAL_S, self._said, said)

    def _said(self, said: tuple[Node, int, WriterAnswered | RequestGone]) -> None:
        node, life, event = said
        if node.life != life:
            return
        if isinstance(event, WriterAnswered) and event.request in self._by_request:
            self._by_request[event.request].unanswered -= 1
        self._cluster.hand(node, event)

    def daemon_ended(self, node: Node) -> None:
        """The clients of a daemon that has ended look for the next one, if they are alive."""
        for writer in [each for each in self.pending if each.node is node]:
            if not node.powered:
                self._forget_request(writer)
                self._end(writer)
            elif writer.request is not None:
                self._forget_request(writer)
                writer.without_daemon_s = self._engine.now_s
                self._ask(writer)

    def _forget_request(self, writer: Writer) -> None:
        if writer.request is not None:
            del self._by_request[writer.request]
            writer.request = None

    # --- pieces ----------------------------------------------------------------------------------

    def _do_without(self, writer: Writer) -> None:
        writer.unlimited = True
        self.without_slot += 1
        self._go_on(writer)

    def _go_on(self, writer: Writer) -> None:
        """The next piece, unless the last promise has run out: then the next one is awaited."""
        now_s = self._engine.now_s
        if writer.flow is not None or writer.over:
            return
        if not writer.rest_bytes:
            writer.done_s = now_s
            self.copied.append(writer)
            self._close(writer)
            return
        if writer.stopped or not (writer.unlimited or not writer.lease_is_over(now_s)):
            self.server.leave(writer)
            return
        writer.piece_since_s = now_s
        if writer.unlimited:
            self.server.leave(writer)
        else:
            self.server.enter(writer, now_s)
        writer.flow = ServerWrite(self, writer, min(writer.rest_bytes, PIECE_BYTES))
        fault = writer.node.trap("copy slow") if writer.node.traps else None
        if fault is None:
            self._network.start(writer.flow)
        else:
            self._engine.at(now_s + fault.duration_s, self._starts, (writer, writer.flow))

    def _starts(self, late: tuple[Writer, ServerWrite]) -> None:
        writer, flow = late
        if writer.flow is flow:
            self._network.start(flow)

    def piece_ended(self, writer: Writer, length_bytes: int) -> None:
        """A piece has come to the file server."""
        writer.flow = None
        writer.rest_bytes -= length_bytes
        self._go_on(writer)

    # --- ends ------------------------------------------------------------------------------------

    def _close(self, writer: Writer) -> None:
        """The client ends, whatever it was doing; the kernel tells its daemon."""
        if writer.request is not None:
            self._say(writer, RequestGone(writer.request))
            self._forget_request(writer)
        self._end(writer)

    def _end(self, writer: Writer) -> None:
        writer.over = True
        if writer.flow is not None:
            self._network.stop(writer.flow)
            writer.flow = None
        self.server.leave(writer)
        del self.pending[writer]
        if self.on_done is not None:
            self.on_done(writer)

    def kill(self, writer: Writer) -> None:
        """SIGKILL."""
        self._close(writer)

    def stop(self, writer: Writer) -> None:
        """SIGSTOP. The piece that is on its way gets there."""
        writer.stopped = True

    def go_on(self, writer: Writer) -> None:
        """SIGCONT."""
        if writer.over or not writer.stopped:
            return
        writer.stopped = False
        self._go_on(writer)
        inbox, writer.inbox = writer.inbox, []
        for action, argument in inbox:
            action(argument)
