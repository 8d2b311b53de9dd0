"""What the tracker's machine is told (events) and what it wants done (effects)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from swarmcache.messages import FromTracker, ToTracker


@dataclass(slots=True)
class NodeConnected:
    """An authenticated connection is up. ``session`` is its number, never used twice."""

    session: int


@dataclass(slots=True)
class NodeSaid:
    """A message from the node of this session."""

    session: int
    message: ToTracker


@dataclass(slots=True)
class NodeLost:
    """The connection of this session is gone."""

    session: int


@dataclass(slots=True)
class TimePassed:
    """``wake_at_s`` has come."""


TrackerEvent: TypeAlias = NodeConnected | NodeSaid | NodeLost | TimePassed


@dataclass(slots=True)
class Tell:
    """Send a message to the node of this session. Dropped where the connection is gone."""

    session: int
    message: FromTracker


@dataclass(slots=True)
class CloseSession:
    """Close this connection: the node registered anew, or broke the rules. ``NodeLost`` follows."""

    session: int
    reason: str


@dataclass(slots=True)
class JournalGrant:
    """Note that this node holds this lease, before the node is told: a restarted tracker must know
    which leases may still be out."""

    lease_id: int
    node: str


@dataclass(slots=True)
class JournalEnd:
    """Note that this lease has ended."""

    lease_id: int


@dataclass(slots=True)
class JournalPresent:
    """Note that the tracker is there: a restarted one must know for how long there was none."""


@dataclass(slots=True)
class ReportStatistics:
    """Tell people what has happened in the last interval, see ``TrackerStatistics``."""

    report: dict[str, object]


TrackerEffect: TypeAlias = (
    Tell | CloseSession | JournalGrant | JournalEnd | JournalPresent | ReportStatistics
)
