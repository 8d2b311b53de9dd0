"""The nodes that are connected to the tracker: who speaks on which connection, and who is silent.

Pure logic, and a part of ``TrackerState``: it knows connections by their numbers, closes none of
them, and keeps no deadline of a lease.

A connection is there before its node has said who it is; a node that registers on a new connection
is no longer the one of its old connection, which may take its time to end.

Invariants: every node here has exactly one connection; it is in turn to be named to others exactly
once; a connection is closed ``NODE_SILENT_S`` after the last that was heard on it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from swarmcache.messages import DiskStatus, FromTracker, NodeAddress
from swarmcache.timers import Timers
from swarmcache.tracker_events import CloseSession, Tell, TrackerEffect

NODE_SILENT_S = 30.0
# How often a node is told of some others, so that those who lost sight of one another meet again.
SEEDS_EVERY_S = 10.0


@dataclass(slots=True)
class Node:
    """A connected node. ``clock_s`` is what its clock showed at ``clock_at_s`` of ours, or less.

    ``silent``: it has not answered a query in time, and not said anything since.
    """

    session: int
    address: NodeAddress
    connected_s: float
    clock_s: float
    clock_at_s: float
    disk: DiskStatus
    leases: set[int] = field(default_factory=set)
    read_bytes_per_s: float = 0.0
    silent: bool = False
    seeds_at_s: float = -math.inf
    key_tags: list[str] = field(default_factory=list)


class TrackerNodes:
    """All of them, by name."""

    def __init__(self) -> None:
        self._sessions: dict[int, Node | None] = {}
        self._nodes: dict[str, Node] = {}
        self._in_turn: OrderedDict[str, None] = OrderedDict()  # nodes, the next one to name first
        self._timers: Timers[int] = Timers()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def get(self, name: str) -> Node | None:
        """The node of this name, if it is connected."""
        return self._nodes.get(name)

    def sorted(self) -> Iterator[Node]:
        """All nodes, by name."""
        return (node for _, node in sorted(self._nodes.items()))

    # --- connections ----------------------------------------------------------------------------

    def connect(self, session: int, now_s: float) -> None:
        """A connection is there, whose node is yet to say who it is."""
        self._sessions[session] = None
        self._timers.set(session, now_s + NODE_SILENT_S)

    def disconnect(self, session: int) -> Node | None:
        """A connection is gone; returns the node that is gone with it."""
        node = self._sessions.get(session)
        if node is not None:
            self.replace(node)
        self._sessions.pop(session, None)
        self._timers.set(session, None)
        return node

    def heard(self, session: int, now_s: float) -> bool:
        """Something was said on this connection. False: it is gone already."""
        if session not in self._sessions:
            return False
        self._timers.set(session, now_s + NODE_SILENT_S)
        node = self._sessions[session]
        if node is not None:
            node.silent = False
        return True

    def of_session(self, session: int) -> Node | None:
        """Whose connection that is; None while it has not said so."""
        return self._sessions[session]

    def add(self, node: Node) -> None:
        """The node of ``node.session`` has said who it is."""
        name = node.address.node
        assert name not in self._nodes, "the former life of a node is to be replaced first"
        self._sessions[node.session] = node
        self._nodes[name] = node
        self._in_turn[name] = None

    def replace(self, node: Node) -> None:
        """This life of a node is over, also where its connection is not."""
        name = node.address.node
        self._sessions[node.session] = None
        del self._nodes[name]
        del self._in_turn[name]

    def tell(self, name: str, message: FromTracker, effects: list[TrackerEffect]) -> None:
        """Send a message to a node."""
        effects.append(Tell(self._nodes[name].session, message))

    # --- others, by turns -----------------------------------------------------------------------

    def seeds(self, node: Node, count: int, now_s: float) -> list[str]:
        """The next nodes in turn, so that each is named equally often."""
        node.seeds_at_s = now_s
        names = [name for name in islice(self._in_turn, count + 1) if name != node.address.node]
        for name in names[:count]:
            self._in_turn.move_to_end(name)
        return names[:count]

    def seeds_if_due(self, node: Node, count: int, now_s: float) -> list[str]:
        """The same for a node that has been told of none for a while; else none."""
        due = now_s >= node.seeds_at_s + SEEDS_EVERY_S
        return self.seeds(node, count, now_s) if due else []

    # --- time -----------------------------------------------------------------------------------

    def wake_at_s(self) -> float | None:
        """When ``close_silent`` may have something to do."""
        return self._timers.next_at_s()

    def close_silent(self, now_s: float, effects: list[TrackerEffect]) -> None:
        """Connections on which nothing was heard for too long."""
        for session in self._timers.pop_due(now_s):
            effects.append(CloseSession(session, f"nothing heard for {NODE_SILENT_S:g} s"))

    def check(self) -> None:
        """Assert the invariants."""
        self._timers.check()
        for name, node in self._nodes.items():
            assert name == node.address.node, "a node under another's name"
            assert self._sessions[node.session] is node, "a node without a connection"
        speaking = [node for node in self._sessions.values() if node is not None]
        assert len(speaking) == len(self._nodes), "a connection of nobody, or a node with two"
        assert set(self._in_turn) == set(self._nodes), "a node that is not named, or is gone"
