"""What the gossip machine is told (events) and what it wants done (effects)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from swarmcache.gossip_records import NodeStatus

# How long a ``TryConnect`` may take. A second is a thousand round trips of a cluster's network.
CONNECT_S = 1.0

# --- events -------------------------------------------------------------------------------------


@dataclass(slots=True)
class DatagramReceived:
    """Another node sent this: authentic, its envelope taken off. ``sender_id``: the ``node_id`` in
    the envelope."""

    sender_id: bytes
    payload: bytes


@dataclass(slots=True)
class StatusMeasured:
    """What this node has to say of itself now. It is told to others when it matters to them."""

    status: NodeStatus


@dataclass(slots=True)
class SeedsKnown:
    """Nodes that are probably alive, by advertised address: from the tracker, or from a former
    life of this daemon. The more often, the sooner a partition heals."""

    addresses: list[str]


@dataclass(slots=True)
class ConnectTried:
    """What became of ``TryConnect``: whether the connection was accepted."""

    node: str
    ok: bool


@dataclass(slots=True)
class Leaving:
    """This daemon is about to end. Send what this returns, and go."""


@dataclass(slots=True)
class TimePassed:
    """``wake_at_s`` has come."""


GossipEvent: TypeAlias = (
    DatagramReceived | StatusMeasured | SeedsKnown | ConnectTried | Leaving | TimePassed
)

# --- effects ------------------------------------------------------------------------------------


@dataclass(slots=True)
class SendDatagram:
    """Send this to the UDP port of ``address``, an advertised ``host:port``."""

    address: str
    payload: bytes


@dataclass(slots=True)
class TryConnect:
    """Try to connect to the control port of a node, for ``CONNECT_S`` at most; hang up at once."""

    node: str


@dataclass(slots=True)
class MembersChanged:
    """Nodes that are known to be alive from now on, and such as are dead or have left."""

    alive: list[str]
    dead: list[str]


GossipEffect: TypeAlias = SendDatagram | TryConnect | MembersChanged
