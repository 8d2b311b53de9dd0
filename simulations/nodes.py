"""One simulated node: its daemon's machine, its links, its disk, its clock and its connections.

A daemon is *alive* or not, and a live one may be *stopped* (SIGSTOP, or a stall of the machine):
then its clock goes on, and what happens to it waits in its inbox until it goes on itself. Readers
of the file server go on before the inbox, as threads do that were in the middle of their work.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from simulations.clocks import Clock
from simulations.disks import Disk
from simulations.network import Link
from simulations.racks import Rack
from simulations.settings import POLICIES, ClusterSettings
from swarmcache.chunks import FileVersion
from swarmcache.messages import NodeAddress
from swarmcache.peer_state import PeerState
from swarmcache.stand_in import StandIn
from swarmcache.upload_slots import UploadSlots

if TYPE_CHECKING:
    from simulations.faults import Fault
    from simulations.readings import RangeReading
    from simulations.tracker_host import StandInHost
    from simulations.transfers import Transfer


class Node:
    """A machine with a daemon. ``life`` grows with every end of the daemon: what a former life
    began is void. ``powered``: the machine runs, and its kernel answers for a dead daemon."""

    def __init__(self, index: int, settings: ClusterSettings, rack: Rack | None = None) -> None:
        self.index = index
        self.name = f"node{index:05d}:7381"
        self.settings = settings
        self.up = Link(f"{self.name} up", settings.node_rate)
        self.down = Link(f"{self.name} down", settings.node_rate)
        self.rack = rack
        self.clock = Clock()
        if settings.clock_spread_s or settings.clock_drift:
            rng = Random(f"{settings.seed} {self.name} clock")
            spread_s, drift = settings.clock_spread_s, settings.clock_drift
            self.clock = Clock(rng.uniform(0, 2 * spread_s), 1 + rng.uniform(-drift, drift))
        self.disk = Disk(settings.disk_bytes, settings.min_age_s, POLICIES[settings.policy])
        self.waiting: dict[int, FileVersion] = {}
        self.batches: set[int] = set()  # requests for small files together
        self.gone: set[int] = set()  # requests of clients who did not wait for the answer
        self.answered_s: dict[int, float] = {}
        self.alive = True
        self.powered = True
        self.lost = False
        self.corrupts = False  # all that it sends to others is wrong
        self.stopped = False
        self.stops = 0
        self.life = 0
        # Faults that wait for the next time that something is done here, by kind.
        self.traps: dict[str, list[Fault]] = {}
        self.stand_in: StandIn  # set by ``StandIns``, for each life anew
        self.on_trap: Callable[[Fault], None] | None = None
        self._begin_life()

    def _begin_life(self) -> None:
        address = NodeAddress(
            self.name, 7382, f"node{self.index:05d}", self.rack.label if self.rack else ""
        )
        seed = f"{self.settings.seed} {self.name}" + (f" {self.life}" if self.life else "")
        self.machine = PeerState(
            address,
            Random(seed),
            window=self.settings.uploads_max,
            peers_max=self.settings.peers_max,
        )
        # When the engine will wake the machine; never later than it wants.
        self.armed_s = math.inf
        self.wakes = 0
        self.woken_s = -1.0
        self.session: int | None = None
        self.office: StandInHost | None = None  # what it is for others while it stands in
        self.stand_in_armed_s = math.inf
        self.connected: dict[str, int] = {}  # the connection with each peer, as this side sees it
        self.upload_slots = UploadSlots(self.settings.uploads_max)
        self.uploads_waiting: deque[Transfer] = deque()
        self.fetches: dict[Transfer, None] = {}
        self.serving: dict[Transfer, None] = {}
        self.reading: dict[RangeReading, None] = {}
        self.distrusted: set[str] = set()
        self.under_way: Counter[bytes] = Counter()
        self.inbox: list[tuple[Callable[[Any], None], object]] = []

    def end_life(self) -> None:
        """The daemon has ended."""
        self.life += 1
        self.alive = False
        self.stopped = False
        self._begin_life()

    def trap(self, kind: str) -> Fault | None:
        """The fault that waited for this, if there is one."""
        armed = self.traps.get(kind)
        if not armed:
            return None
        fault = armed.pop(0)
        if not armed:
            del self.traps[kind]
        if self.on_trap is not None:
            self.on_trap(fault)
        return fault
