"""The simulated head node: the tracker's machine, its sessions and its journal.

What ``tracker.py`` and ``lease_journal.py`` do on a real machine. The journal survives the end of
the process; one from before a reboot counts as "some lease may be out".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

from simulations.clocks import Clock
from simulations.nodes import Node
from simulations.settings import ClusterSettings
from swarmcache.lease_journal import UNKNOWN_LEASE_ID, UNKNOWN_NODE
from swarmcache.tracker_state import TrackerState


class TrackerHost:
    """One life of the tracker after the other, on one machine."""

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
        self._next_session = 0
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

    def new_session(self, node: Node) -> int:
        """A connection of this node; its number is never used again."""
        session = self._next_session
        self._next_session += 1
        self.sessions[session] = node
        return session

    def note_grant(self, lease_id: int, node: str) -> None:
        """Before the node is told."""
        self.journal[lease_id] = node
        # One lease is granted per microsecond at the very most.
        self.wall_ids = max(self.wall_ids, lease_id + 1)

    def note_end(self, lease_id: int) -> None:
        """The lease has ended."""
        self.journal.pop(lease_id, None)

    def lose_journal(self) -> None:
        """It is damaged, or from before the last boot."""
        self.journal[UNKNOWN_LEASE_ID] = UNKNOWN_NODE
        self.present_s = -math.inf
