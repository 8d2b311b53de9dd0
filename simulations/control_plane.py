"""Messages and connections between simulated daemons and the tracker.

What ``link.py`` and the two servers do on real sockets: connections are made, carry messages in
order, and end; each side notices the end for itself. See ``wires.py`` for what may hold them up.

Invariant: a message arrives on the connection on which it was sent, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from simulations.engine import SimulationFailed
from simulations.nodes import Node
from simulations.settings import ClusterSettings
from simulations.tracker_host import Host
from simulations.wires import TRACKER, Cut, Wires
from swarmcache.messages import (
    MESSAGE_MAX_BYTES,
    BetweenNodes,
    FromTracker,
    Register,
    ToTracker,
    decode_between_nodes,
    decode_from_tracker,
    decode_to_tracker,
    encode,
)
from swarmcache.peer_events import (
    DialPeer,
    PeerConnected,
    PeerEvent,
    PeerLost,
    PeerSaid,
    TrackerConnected,
    TrackerLost,
    TrackerSaid,
)
from swarmcache.stand_in import StandInGone, TrackerGone
from swarmcache.tracker_events import NodeConnected, NodeLost, NodeSaid

if TYPE_CHECKING:
    from simulations.cluster import Cluster

# link.py: when a dialled machine that does not answer is given up; when a silent connection ends
# (a ping every 5 s, and half of that for its answer).
HANDSHAKE_S = 5.0
SILENCE_S = 7.5
SILENCE_APART_S = 2.0

# Messages that arrive at the same time: an event and the nodes that it goes to; and the session, if
# it is from the tracker.
Delivery: TypeAlias = list[tuple[PeerEvent, list[Node], int | None]]


class ControlPlane:
    """All connections of a cluster."""

    def __init__(self, cluster: Cluster, settings: ClusterSettings) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._settings = settings
        self._trace = cluster.trace
        self._links = 0
        self._hosts: dict[int, Host] = {}  # of each session
        self._next_session = 0
        self.wires = Wires(cluster.engine, settings.latency_s)

    def checked(self, message: BetweenNodes) -> BetweenNodes:
        return decode_between_nodes(_bounded(encode(message))) if self._cluster.strict else message

    def deliver(self, delivery: Delivery) -> None:
        hand, tell = self._cluster.hand, self._cluster.tell
        for event, receivers, session in delivery:
            if type(event) is PeerSaid:
                sender = event.node
                for node in receivers:
                    # What was under way when a connection was closed does not arrive.
                    if sender in node.connected:
                        if node.stopped or not node.alive:
                            hand(node, event)
                        else:
                            tell(node, event)
            else:
                for node in receivers:
                    if node.session == session:
                        hand(node, event)

    def say_to_peer(self, node: Node, other: Node, message: BetweenNodes) -> None:
        """One message to a peer, which a fault may concern."""
        self._trace.message(node.name, encode(message), 1)
        link = node.connected.get(other.name)
        if link is None:
            return
        if fault := node.trap("peer message late"):
            self.cut_for(Cut(frozenset([node.name]), frozenset([other.name])), fault.duration_s)
        if node.trap("peer connection reset in a message"):
            self.break_link(node, other)
            return
        said = (other, link, PeerSaid(node.name, self.checked(message)))
        self.wires.send(node.name, other.name, self._peer_message_arrives, said)

    def _peer_message_arrives(self, arrived: tuple[Node, int, PeerSaid]) -> None:
        node, link, said = arrived
        if node.connected.get(said.node) == link:
            self._cluster.hand(node, said)

    def say_to_tracker(self, node: Node, message: ToTracker) -> None:
        session = node.session
        data = encode(message)
        self._trace.message(node.name, data, 1)
        if session is None:
            return
        if self._cluster.strict:
            message = decode_to_tracker(_bounded(data))
            if isinstance(message, Register):
                self._check_register(node, message)
        host = self._hosts[session]
        said = (host, NodeSaid(session, message))
        if fault := node.trap("message to tracker late"):
            self.cut_for(Cut(frozenset([node.name]), frozenset([host.name])), fault.duration_s)
        if node.trap("tracker connection reset in a message to it"):
            self.lose_session(session, "reset")
            return
        self.wires.send(node.name, host.name, self._tracker_message_arrives, said)

    def _check_register(self, node: Node, message: Register) -> None:
        """A node tells a new tracker, or one that may have taken it for lost, what it reads."""
        told = {lease.lease_id for lease in message.leases}
        now_s = self._engine.now_s
        for reading in node.reading:
            if reading.effect.lease_id not in told and not reading.lease_is_over(now_s):
                raise SimulationFailed(f"{node.name} reads, and does not tell the tracker so")

    def _tracker_message_arrives(self, arrived: tuple[Host, NodeSaid]) -> None:
        host, said = arrived
        if said.session in host.sessions:
            self._cluster.tell_tracker(host, said)

    def tell_from_tracker(
        self, host: Host, session: int, message: FromTracker, batch: Delivery
    ) -> None:
        data = encode(message)
        self._trace.message(host.name, data, 1)
        node = host.sessions.get(session)
        if node is None:
            return
        if self._cluster.strict:
            message = decode_from_tracker(_bounded(data))
        if not node.traps and not self.wires.cut:
            batch.append((TrackerSaid(message), [node], session))
            return
        if fault := node.trap("message from tracker late"):
            self.cut_for(Cut(frozenset([host.name]), frozenset([node.name])), fault.duration_s)
        if node.trap("tracker connection reset in a message from it"):
            self.lose_session(session, "reset")
            return
        arriving = (node, session, TrackerSaid(message))
        self.wires.send(host.name, node.name, self._word_of_tracker_arrives, arriving)

    def _word_of_tracker_arrives(self, arrived: tuple[Node, int, TrackerSaid]) -> None:
        node, session, said = arrived
        if node.session == session:
            self._cluster.hand(node, said)

    # --- connections -----------------------------------------------------------------------------

    def cut_for(self, cut: Cut, duration_s: float) -> None:
        """Hold up messages and chunks for so long; connections that are silent for longer end."""
        self.wires.begin(cut)
        now_s = self._engine.now_s
        for name in sorted(cut.senders - {TRACKER}):
            for fetch in list(self._cluster.nodes[name].serving):
                if fetch.node.name in cut.receivers:
                    self._cluster.transfers.hold_up(fetch)
        if duration_s > SILENCE_S:
            self._engine.at(now_s + SILENCE_S, self._silence, cut)
        self._engine.at(now_s + duration_s, self._mend, cut)

    def _mend(self, cut: Cut) -> None:
        self.wires.end(cut)
        for name in sorted(cut.senders - {TRACKER}):
            for fetch in list(self._cluster.nodes[name].serving):
                self._cluster.transfers.let_go_on(fetch)

    def mend_all(self) -> None:
        """End all cuts."""
        for cut in self.wires.cuts():
            self._mend(cut)

    def _silence(self, cut: Cut) -> None:
        """Nothing was heard over these connections for too long: both sides close them."""
        if cut not in self.wires.cuts():
            return
        for name in sorted(cut.senders | cut.receivers):
            if name == TRACKER:
                continue
            node = self._cluster.nodes[name]
            if node.session is not None:
                host = self._hosts[node.session].name
                if cut.holds_up(name, host) or cut.holds_up(host, name):
                    self.lose_session(node.session, "silent", apart_s=SILENCE_APART_S)
            for other in list(node.connected):
                if cut.holds_up(name, other) or cut.holds_up(other, name):
                    self.break_link(node, self._cluster.nodes[other])

    def break_link(self, node: Node, other: Node) -> None:
        """The connection of two nodes ends; each side notices when it next looks."""
        for here, there in ((node, other), (other, node)):
            link = here.connected.get(there.name)
            if link is not None:
                self._in_a_moment(self.link_lost, (here, there.name, link))

    def _in_a_moment(self, action: Callable[[Any], None], argument: object) -> None:
        self._engine.at(self._engine.now_s + self._settings.latency_s, action, argument)

    def link_lost(self, lost: tuple[Node, str, int]) -> None:
        """A node notices that its connection with a peer has ended."""
        node, name, link = lost
        if node.connected.get(name) == link:
            del node.connected[name]
            self._cluster.hand(node, PeerLost(name, "the connection broke"))

    def lose_session(self, session: int, reason: str, *, apart_s: float = 0.0) -> None:
        """The connection of a node with the tracker ends; both notice. ``apart_s``: the one so much
        later than the other, now this one, now that one."""
        host = self._hosts[session]
        node = host.sessions.get(session)
        if node is None:
            return
        tracker_s, node_s = (apart_s, 0.0) if session % 2 else (0.0, apart_s)
        notice_s = self._engine.now_s + self._settings.latency_s
        self._engine.at(notice_s + tracker_s, self.session_lost, session)
        self._engine.at(notice_s + node_s, self.tracker_lost, (node, session, reason))

    def session_lost(self, session: int) -> None:
        """The tracker, or who stands in for it, notices that a connection has ended."""
        host = self._hosts[session]
        if host.sessions.pop(session, None) is not None:
            self._cluster.tell_tracker(host, NodeLost(session))

    def tracker_lost(self, lost: tuple[Node, int, str]) -> None:
        """A node notices it, and looks for the tracker again."""
        node, session, reason = lost
        if node.session == session:
            host = self._hosts[session]
            node.session = None
            self._cluster.hand(node, TrackerLost(f"lost the tracker: {reason}"))
            with_tracker = host is self._cluster.tracker
            gone = TrackerGone() if with_tracker else StandInGone(host.name)
            self._cluster.stand_ins.tell(node, gone)

    def begin_session(self, node: Node, host: Host) -> None:
        """A connection is this node's session now."""
        session = self._next_session
        self._next_session += 1
        node.session = session
        self._hosts[session] = host
        host.sessions[session] = node
        self._cluster.tell_tracker(host, NodeConnected(session))
        stand_in = host is not self._cluster.tracker
        self._cluster.hand(node, TrackerConnected(stand_in))

    def leave_session(self, node: Node, reason: str) -> None:
        """The node closes its connection with a stand-in."""
        session, node.session = node.session, None
        if session is not None:
            self._in_a_moment(self.session_lost, session)
            self._cluster.hand(node, TrackerLost(reason))

    def dial(self, node: Node, effect: DialPeer) -> None:
        dialled = (node, node.life, self._cluster.nodes[effect.address.node])
        delay_s = 2 * self._settings.latency_s
        if node.traps and node.trap("dial refused"):
            self._cluster.soon(node, PeerLost(effect.address.node, "refused"))
        elif node.traps and node.trap("dial unanswered"):
            self._cluster.after(HANDSHAKE_S, node, PeerLost(effect.address.node, "does not answer"))
        else:
            self._engine.at(self._engine.now_s + delay_s, self._connect, dialled)

    def _connect(self, dialled: tuple[Node, int, Node]) -> None:
        dialler, life, target = dialled
        if dialler.life != life:
            return
        blocked = self.wires.cut and (
            self.wires.blocked(dialler.name, target.name)
            or self.wires.blocked(target.name, dialler.name)
        )
        if not target.powered or target.stopped or dialler.stopped or blocked:
            self._cluster.after(HANDSHAKE_S, dialler, PeerLost(target.name, "does not answer"))
            return
        if not target.alive:
            self._cluster.hand(dialler, PeerLost(target.name, "refused"))
            return
        # The target may have an older connection, of which it has not noticed yet that it broke.
        self._links += 1
        dialler.connected[target.name] = self._links
        target.connected[dialler.name] = self._links
        self._cluster.hand(target, PeerConnected(dialler.machine.address))
        self._cluster.hand(dialler, PeerConnected(target.machine.address))

    def hang_up(self, node: Node, other: Node) -> None:
        node.connected.pop(other.name, None)
        link = other.connected.get(node.name)
        if link is not None:
            lost = (other, node.name, link)
            self.wires.send(node.name, other.name, self.link_lost, lost)


def _bounded(data: bytes) -> bytes:
    assert len(data) <= MESSAGE_MAX_BYTES, f"a message of {len(data)} bytes"
    return data
