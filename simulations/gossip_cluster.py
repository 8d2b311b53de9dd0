"""Nodes that gossip, in virtual time: carries out the effects of the production machine.

Datagrams arrive ``latency_s`` after they were sent, and up to as much later; or they are lost, each
for itself. A connection takes one packet each way, and both must arrive. A daemon that is *stalled*
takes part in nothing, not even through its kernel; what arrives meanwhile waits for it.

Counted are bytes with envelope, UDP and IP headers. Thinking takes no time.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from blake3 import blake3

from simulations.engine import Engine
from swarmcache.gossip import STATUS_BYTES_PER_S, STATUS_COST_BYTES, Gossip
from swarmcache.gossip_events import (
    CONNECT_S,
    ConnectTried,
    DatagramReceived,
    GossipEffect,
    GossipEvent,
    MembersChanged,
    SeedsKnown,
    SendDatagram,
    TimePassed,
    TryConnect,
)
from swarmcache.gossip_records import (
    STATUS_BYTES,
    NodeProfile,
    NodeStatus,
    StatusRecord,
    node_id,
    pack_status,
    profile_tag,
    ring_id,
    status_body,
)
from swarmcache.gossip_spread import OVERHEAD_BYTES
from swarmcache.gossip_view import View
from swarmcache.messages import NodeAddress

EVENTS_MAX = 10**10
CAPACITY_BYTES = 1 << 40
# The socket of a daemon that does not read holds about so many datagrams.
INBOX_MAX = 400
FIRST_EPOCH = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class GossipSettings:
    """``loss``: the part of all packets that get lost. ``period_s``: see ``Gossip``. ``tries``: how
    many nodes it happens to, where something happens to some."""

    nodes: int
    seed: int
    loss: float = 0.0
    latency_s: float = 0.0002
    period_s: float = 10.0
    check_every: int = 0
    tries: int = 5


class GossipNode:
    """A machine with a daemon that gossips. ``sent``: bytes in each second."""

    def __init__(self, index: int, settings: GossipSettings) -> None:
        self.index = index
        self.name = f"node{index:05d}:7381"
        self.sender_id = node_id(self.name)
        self.subject = ring_id(self.name)
        self.settings = settings
        self.alive = False
        self.stalled = False
        self.life = 0
        self.side = 0
        # The part of what it sends that gets lost beyond that of all others.
        self.mute = 0.0
        self.sent = array("I")
        self.inbox: list[DatagramReceived] = []
        self.armed_s = math.inf
        self.machine = self.new_machine(0.0)

    def new_machine(self, now_s: float) -> Gossip:
        """The machine of another life."""
        profile = NodeProfile(
            NodeAddress(self.name, 7382, self.name.partition(":")[0]),
            f"rack{self.index // 40:03d}",
            "0.1.0",
            CAPACITY_BYTES,
        )
        rng = Random(f"{self.settings.seed} {self.name} {self.life}")
        self.epoch = FIRST_EPOCH + round(now_s * 1000)
        return Gossip(profile, self.epoch, rng, period_s=self.settings.period_s)


class GossipCluster:
    """``on_change``: told whenever a node changes its mind about others."""

    def __init__(self, settings: GossipSettings) -> None:
        self.settings = settings
        self.engine = Engine(EVENTS_MAX)
        self.nodes = [GossipNode(index, settings) for index in range(settings.nodes)]
        self.by_name = {node.name: node for node in self.nodes}
        self.on_change: Callable[[GossipNode, MembersChanged], None] | None = None
        self.datagrams = 0
        self.datagram_bytes_max = 0
        self._rng = Random(f"{settings.seed} network")
        self._handled = 0
        self._hasher = blake3()

    @property
    def now_s(self) -> float:
        return self.engine.now_s

    @property
    def trace_digest(self) -> str:
        """Over every datagram, with its time: equal traces, equal digests."""
        return self._hasher.hexdigest()

    # --- what happens to nodes --------------------------------------------------------------------

    def start(self, node: GossipNode) -> None:
        """The daemon starts, and knows nobody."""
        assert not node.alive
        node.life += 1
        node.alive = True
        node.stalled = False
        node.inbox.clear()
        node.armed_s = math.inf
        node.machine = node.new_machine(self.now_s)
        self.tell(node, TimePassed())

    def start_acquainted(self) -> None:
        """All daemons start, and know one another already, as after a join, which costs the square
        of the number of nodes. So this alone reaches into the machines."""
        nodes = sorted(self.nodes, key=lambda node: node.subject)
        for node in nodes:
            self.start(node)
        count = len(nodes)
        period_s = max(self.settings.period_s, count * STATUS_COST_BYTES / STATUS_BYTES_PER_S)
        ids = array("Q", [node.subject for node in nodes])
        epochs = array("Q", [node.epoch for node in nodes])
        made_s = array("d", [-self._rng.random() * period_s for _ in nodes])
        tags = [profile_tag(node.machine.profile) for node in nodes]
        bodies = [status_body(NodeStatus(), tag) for tag in tags]
        lives = zip(ids, epochs, bodies, strict=True)
        records = b"".join([pack_status(StatusRecord(a, b, 0, 0, body)) for a, b, body in lives])
        profiles: list[NodeProfile | None] = [node.machine.profile for node in nodes]
        sums = View(ids[0], epochs[0]).sums
        for subject, epoch in zip(ids[1:], epochs[1:], strict=True):
            sums = array("Q", map(_add, sums, View(subject, epoch).sums))
        for index, node in enumerate(nodes):
            view = node.machine._view
            view.ids = ids[:index] + ids[index + 1 :]
            view.made_s = made_s[:index] + made_s[index + 1 :]
            view.records = bytearray(records)
            del view.records[index * STATUS_BYTES : (index + 1) * STATUS_BYTES]
            view.suspected = bytearray(count - 1)
            view.reaches = bytearray(count - 1)
            view.profiles = profiles[:index] + profiles[index + 1 :]
            view.sums = array("Q", sums)
            view.reachable = node.machine._introduced = count - 1
            view.version += 1
            node.machine._timers.set(("publish", 0), self._rng.random() * period_s)

    def kill(self, node: GossipNode) -> None:
        """The daemon ends, and says nothing."""
        node.alive = False
        node.life += 1

    def stall(self, node: GossipNode, duration_s: float) -> None:
        """The daemon does nothing for so long."""
        node.stalled = True
        self.engine.at(self.now_s + duration_s, self._go_on, (node, node.life))

    def _go_on(self, argument: tuple[GossipNode, int]) -> None:
        node, life = argument
        if node.life != life:
            return
        node.stalled = False
        waiting, node.inbox = node.inbox, []
        for event in waiting:
            self.tell(node, event)
        self.tell(node, TimePassed())

    def meet(self, node: GossipNode, others: Iterable[GossipNode]) -> None:
        """The tracker, or the file of last known peers, names these nodes."""
        self.tell(node, SeedsKnown([other.name for other in others]))

    # --- events and effects -----------------------------------------------------------------------

    def tell(self, node: GossipNode, event: GossipEvent) -> None:
        """Hand an event to a machine and carry out what it says."""
        now_s = self.now_s
        machine = node.machine
        effects = machine.handle(event, now_s)
        if self.settings.check_every:
            self._handled += 1
            if not self._handled % self.settings.check_every:
                machine.check()
        if effects:
            self._carry_out(node, effects, now_s)
        wake_at_s = machine.wake_at_s()
        if wake_at_s is not None and wake_at_s < node.armed_s:
            node.armed_s = max(wake_at_s, now_s)
            self.engine.at(node.armed_s, self._wake, node)

    def _wake(self, node: GossipNode) -> None:
        now_s = self.now_s
        if node.armed_s != now_s or node.stalled or not node.alive:
            return  # overtaken by an earlier one, or in vain
        node.armed_s = math.inf
        wake_at_s = node.machine.wake_at_s()
        if wake_at_s is None:
            return
        if wake_at_s <= now_s:
            self.tell(node, TimePassed())
        else:
            node.armed_s = wake_at_s
            self.engine.at(wake_at_s, self._wake, node)

    def _carry_out(self, node: GossipNode, effects: list[GossipEffect], now_s: float) -> None:
        for effect in effects:
            if type(effect) is SendDatagram:
                self._send(node, effect, now_s)
            elif type(effect) is TryConnect:
                self._connect(node, effect, now_s)
            elif type(effect) is MembersChanged and self.on_change is not None:
                self.on_change(node, effect)

    def _send(self, node: GossipNode, effect: SendDatagram, now_s: float) -> None:
        payload = effect.payload
        size_bytes = len(payload) + OVERHEAD_BYTES
        second = int(now_s)
        sent = node.sent
        while len(sent) <= second:
            sent.append(0)
        sent[second] += size_bytes
        self.datagrams += 1
        self.datagram_bytes_max = max(self.datagram_bytes_max, size_bytes)
        target = self.by_name[effect.address]
        self._hasher.update(payload)
        if self._arrives(node, target):
            latency_s = self.settings.latency_s * (1 + self._rng.random())
            event = DatagramReceived(node.sender_id, payload)
            self.engine.at(now_s + latency_s, self._deliver, (target, target.life, event))

    def _arrives(self, node: GossipNode, target: GossipNode) -> bool:
        loss = self.settings.loss
        if node.side != target.side or (loss and self._rng.random() < loss):
            return False
        return not node.mute or self._rng.random() >= node.mute

    def _deliver(self, argument: tuple[GossipNode, int, DatagramReceived]) -> None:
        target, life, event = argument
        if target.life != life or not target.alive:
            return
        if target.stalled:
            if len(target.inbox) < INBOX_MAX:
                target.inbox.append(event)
            return
        self.tell(target, event)

    def _connect(self, node: GossipNode, effect: TryConnect, now_s: float) -> None:
        target = self.by_name[effect.node]
        there = self._arrives(node, target) and target.alive and not target.stalled
        ok = there and self._arrives(target, node)
        refused = self._arrives(node, target) and not target.alive
        at_s = now_s + (2 * self.settings.latency_s if ok or refused else CONNECT_S)
        self.engine.at(at_s, self._connected, (node, node.life, ConnectTried(effect.node, ok)))

    def _connected(self, argument: tuple[GossipNode, int, ConnectTried]) -> None:
        node, life, event = argument
        if node.life == life and node.alive:
            if node.stalled:
                self.engine.at(self.now_s + 0.1, self._connected, argument)
            else:
                self.tell(node, event)

    def run(self, until_s: float) -> None:
        """Let time pass."""
        self.engine.at(until_s, lambda _: self.engine.stop(), None)
        self.engine.run(until_s)

    def live(self) -> list[GossipNode]:
        """Whose daemons run."""
        return [node for node in self.nodes if node.alive]


def _add(first: int, second: int) -> int:
    return (first + second) & 0xFFFFFFFF
