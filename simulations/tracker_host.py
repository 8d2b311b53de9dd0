"""The simulated head node: the tracker's machine, its sessions and its journal.

What ``tracker.py`` and ``lease_journal.py`` do on a real machine. The journal survives the end of
the process; one from before a reboot counts as "some lease may be out".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

from simulations.clocks import Clock
from simulations.nodes import Node
from simulations.settings import ClusterSettings
from simulations.wires import TRACKER
from swarmcache.lease_journal import UNKNOWN_LEASE_ID, UNKNOWN_NODE
from swarmcache.tracker_state import TrackerState


class TrackerHost:
    """One life of the tracker after the other, on one machine."""

    name = TRACKER

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self.clock = Clock()
        self.alive = True
        self.stopped = False
        self.stops = 0
        self.life = 0
        self.journal: dict[int, str] = {}
        # What the wall clock shows, in lease ids: it begins the numbers of a new life.
        self.wall_ids = 0
        self.present_s: float | None = None  # when it was last there, on its clock
        self.begin_life(0.0)

    def begin_life(self, now_s: float) -> None:
        """A new tracker with the journal of the former one."""
        settings = self._settings
        seed = f"{settings.seed} tracker" + (f" {self.life}" if self.life else "")
        away_s = None if self.present_s is None else self.clock.read(now_s) - self.present_s
        self.present_s = self.clock.read(now_s) if self.present_s is None else self.present_s
        first_lease_id = max([1, self.wall_ids, *(lease_id + 1 for lease_id in self.journal)])
        self.machine = TrackerState(
            Random(seed),
            slots_max=lambda _: settings.slots_max,
            peers_max=settings.peers_max,
            earlier_leases=dict(self.journal),
            first_lease_id=first_lease_id,
            away_s=away_s,
            now_s=self.clock.read(now_s),
        )
        self.alive = True
        self.armed_s = math.inf
        self.wakes = 0
        self.woken_s = -1.0
        self.sessions: dict[int, Node] = {}
        self.inbox: list[tuple[Callable[[Any], None], object]] = []

    def end_life(self) -> None:
        """The process has ended."""
        self.life += 1
        self.alive = False
        self.stopped = False
        self.sessions.clear()
        self.inbox.clear()

    def note_grant(self, lease_id: int, node: str) -> None:
        """Before the node is told."""
        self.journal[lease_id] = node
        # One lease is granted per microsecond at the very most.
        self.wall_ids = max(self.wall_ids, lease_id + 1)

    def note_present(self, now_s: float) -> None:
        """It is there."""
        self.present_s = self.clock.read(now_s)

    def note_end(self, lease_id: int) -> None:
        """The lease has ended."""
        self.journal.pop(lease_id, None)

    def lose_journal(self) -> None:
        """It is damaged, or from before the last boot."""
        self.journal[UNKNOWN_LEASE_ID] = UNKNOWN_NODE
        self.present_s = -math.inf


class StandInHost:
    """A daemon while it stands in for the tracker. It has no journal."""

    def __init__(self, settings: ClusterSettings, node: Node) -> None:
        self._settings = settings
        self._node = node
        self._life = node.life
        self.name = node.name
        self.clock = node.clock
        self.closed = False
        self.armed_s = math.inf
        self.wakes = 0
        self.woken_s = -1.0
        self.sessions: dict[int, Node] = {}

    def begin(self, now_s: float, grants_from_s: float) -> None:
        """From now on nodes may come."""
        settings = self._settings
        rng = Random(f"{settings.seed} {self.name} {now_s} stands in")
        self.machine = TrackerState(
            rng,
            slots_max=lambda _: settings.slots_max,
            peers_max=settings.peers_max,
            first_lease_id=(1 << 60) + rng.getrandbits(56),
            grants_from_s=grants_from_s,
            now_s=self.clock.read(now_s),
        )

    @property
    def alive(self) -> bool:
        """The daemon lives, and stands in still."""
        return not self.closed and self._node.alive and self._node.life == self._life

    @property
    def stopped(self) -> bool:
        """It is stopped."""
        return self._node.stopped

    @property
    def inbox(self) -> list[tuple[Callable[[Any], None], object]]:
        """What waits until it goes on."""
        return self._node.inbox

    def note_grant(self, lease_id: int, node: str) -> None:
        """Nobody needs to know."""

    def note_end(self, lease_id: int) -> None:
        """Nobody needs to know."""

    def note_present(self, now_s: float) -> None:
        """Nobody needs to know."""


Host: TypeAlias = TrackerHost | StandInHost
