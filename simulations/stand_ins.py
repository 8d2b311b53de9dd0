"""Simulated nodes that have lost the tracker: what ``tracker_client.py`` does on real sockets.

Each node's ``StandIn`` decides when to try the tracker, whom to ask, and whether to be the tracker
for others meanwhile. What the nodes know of one another is what gossip would have told them: how
things stood ``GOSSIP_S`` ago, which is the same for all.
"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

from simulations.nodes import Node
from simulations.tracker_host import StandInHost
from simulations.wires import TRACKER
from swarmcache.messages import StandsIn
from swarmcache.peer_events import TimePassed, TrackerLost
from swarmcache.stand_in import (
    CONNECT_S,
    AskNode,
    BeginStandingIn,
    Candidate,
    EndStandingIn,
    LeaveStandIn,
    LetGo,
    NodeSilent,
    NodeTold,
    StandIn,
    StandInEffect,
    StandInEvent,
    StandInGone,
    TrackerHangs,
    TrackerReached,
    TrackerUnreachable,
    TryTracker,
    UseStandIn,
    UseTracker,
)

if TYPE_CHECKING:
    from simulations.cluster import Cluster

# A change is known to nearly all of 1,000 nodes after so long.
GOSSIP_S = 5.0
# link.py: when somebody who takes a connection and says nothing is given up.
HANDSHAKE_S = 5.0
LOOK_S = 0.1


class StandIns:
    """Of all nodes of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._known = {node.name: Candidate(node.name) for node in cluster.node_list}
        self._told: dict[str, tuple[bool, bool]] = {}

    def begin_daemon(self, node: Node) -> None:
        """A daemon has begun: it knows the others at once, as from its file of peers."""
        settings = self._cluster.settings
        seed = f"{settings.seed} {node.name} {node.life} stand-in"
        now_s = node.clock.read(self._engine.now_s)
        node.stand_in = StandIn(node.name, "", self._known.values, Random(seed), now_s)
        node.stand_in_armed_s = math.inf
        self.changed(node)
        self._arm(node)

    def end_daemon(self, node: Node) -> None:
        """It has ended, and with it what it was for others."""
        self._close_office(node)
        self.changed(node)

    def changed(self, node: Node) -> None:
        """Gossip will tell that this node is there, is not, or stands in."""
        state = (node.alive, node.alive and node.stand_in.standing_in)
        if self._told.get(node.name) != state:
            self._told[node.name] = state
            self._engine.at(self._engine.now_s + GOSSIP_S, self._heard, (node.name, *state))

    def _heard(self, told: tuple[str, bool, bool]) -> None:
        name, alive, standing_in = told
        if alive:
            self._known[name] = Candidate(name, standing_in)
        else:
            self._known.pop(name, None)

    # --- the machine ----------------------------------------------------------------------------

    def tell(self, node: Node, event: StandInEvent) -> None:
        """Hand an event to the machine of a daemon: at once, or when it goes on."""
        self._tell((node, node.life, event))

    def _tell(self, told: tuple[Node, int, StandInEvent]) -> None:
        node, life, event = told
        if node.life != life or not node.alive:
            return
        if node.stopped:
            node.inbox.append((self._tell, told))
            return
        effects = node.stand_in.handle(event, node.clock.read(self._engine.now_s))
        if self._cluster.strict:
            node.stand_in.check()
        for effect in effects:
            self._carry_out(node, effect)
        self.changed(node)
        self._arm(node)

    def _arm(self, node: Node) -> None:
        wake_at_s = node.stand_in.wake_at_s()
        if wake_at_s is None:
            return
        at_s = max(node.clock.when(wake_at_s), math.nextafter(self._engine.now_s, math.inf))
        if at_s < node.stand_in_armed_s:
            node.stand_in_armed_s = at_s
            self._engine.at(at_s, self._wake, (node, node.life))

    def _wake(self, woken: tuple[Node, int]) -> None:
        node, life = woken
        if node.life != life or not node.alive or node.stand_in_armed_s > self._engine.now_s:
            return
        if node.stopped:
            node.inbox.append((self._wake, woken))
            return
        node.stand_in_armed_s = math.inf
        wake_at_s = node.stand_in.wake_at_s()
        if wake_at_s is not None and wake_at_s <= node.clock.read(self._engine.now_s):
            self.tell(node, TimePassed())
        else:
            self._arm(node)

    def _carry_out(self, node: Node, effect: StandInEffect) -> None:
        control = self._cluster.control
        match effect:
            case TryTracker():
                self._later(0.0, self._try_tracker, node, self._engine.now_s)
            case AskNode():
                self._later(0.0, self._ask, node, (effect.node, self._engine.now_s))
            case UseTracker():
                control.begin_session(node, self._cluster.tracker)
            case UseStandIn():
                office = self._cluster.nodes[effect.node].office
                if office is not None and office.alive:
                    control.begin_session(node, office)
                else:  # it has just ended
                    self._later(0.0, self._lost, node, effect.node)
            case LeaveStandIn():
                control.leave_session(node, effect.reason)
            case BeginStandingIn():
                host = StandInHost(self._cluster.settings, node)
                host.begin(self._engine.now_s, effect.grants_from_s)
                node.office = host
                self._cluster.arm_tracker(host)
            case EndStandingIn():
                self._close_office(node)
            case LetGo():
                pass

    def _lost(self, node: Node, name: str) -> None:
        self.tell(node, StandInGone(name))

    def _close_office(self, node: Node) -> None:
        office, node.office = node.office, None
        if office is not None:
            office.closed = True
            for session in list(office.sessions):
                self._cluster.control.lose_session(session, "stands in no longer")

    # --- questions ------------------------------------------------------------------------------

    def _later(self, delay_s: float, action: object, node: Node, what: object) -> None:
        delay_s += self._cluster.settings.latency_s
        self._engine.at(self._engine.now_s + delay_s, self._act, (action, node, node.life, what))

    def _act(self, late: tuple[object, Node, int, object]) -> None:
        action, node, life, what = late
        if node.life != life or not node.alive:
            return
        if node.stopped:
            node.inbox.append((self._act, late))
        else:
            action(node, what)  # type: ignore[operator]

    def _cut(self, name: str, other: str) -> bool:
        wires = self._cluster.control.wires
        return wires.cut and (wires.blocked(name, other) or wires.blocked(other, name))

    def _try_tracker(self, node: Node, began_s: float) -> None:
        tracker = self._cluster.tracker
        waited_s = self._engine.now_s - began_s
        if self._cut(node.name, TRACKER):
            if waited_s < CONNECT_S:
                self._later(LOOK_S, self._try_tracker, node, began_s)
            else:
                self._unreachable(node, TrackerUnreachable())
        elif not tracker.alive:
            self._unreachable(node, TrackerUnreachable())
        elif not tracker.stopped:
            self.tell(node, TrackerReached())
        elif waited_s < HANDSHAKE_S:
            self._later(LOOK_S, self._try_tracker, node, began_s)
        else:
            self._unreachable(node, TrackerHangs())

    def _unreachable(self, node: Node, event: TrackerUnreachable | TrackerHangs) -> None:
        if node.session is None:
            self._cluster.hand(node, TrackerLost("no connection to the tracker"))
        self.tell(node, event)

    def _ask(self, node: Node, asked: tuple[str, float]) -> None:
        name, began_s = asked
        other = self._cluster.nodes[name]
        if not other.alive and other.powered and not self._cut(node.name, name):
            self.tell(node, NodeSilent(name))
        elif other.alive and not other.stopped and not self._cut(node.name, name):
            answer = other.stand_in.answer(node.name, other.clock.read(self._engine.now_s))
            # Its office may be closed by the time that it is used.
            self._later(0.0, self._answered, node, (name, answer))
        elif self._engine.now_s - began_s >= CONNECT_S:
            self.tell(node, NodeSilent(name))
        else:
            self._later(LOOK_S, self._ask, node, asked)

    def _answered(self, node: Node, told: tuple[str, StandsIn]) -> None:
        self.tell(node, NodeTold(*told))
