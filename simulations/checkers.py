"""What must hold of a whole cluster, beyond what each machine and each model checks itself.

Checked all the time by the models: the limit of readers (``file_server.py``), right bytes in every
answer and every answer once (``cluster.py``), nothing dropped that is under way or was announced
(``disk_work.py``), the room on disks (``disks.py``), the limits of messages (``control_plane.py``).
Here is the rest: what must be so while it runs (``Watch``), and when everything has come to rest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulations.clients import Clients
from simulations.disks import Replica
from simulations.engine import SimulationFailed
from simulations.nodes import Node
from swarmcache.download import HEDGES_MIN, Download
from swarmcache.peer_state import FLIGHTS_MAX
from swarmcache.upload_slots import WAITING_MAX

if TYPE_CHECKING:
    from simulations.cluster import Cluster

WATCH_S = 0.5
CALM_WATCH_S = 5.0
CALM_AFTER_S = 10.0
# Longest time between asking and an answer, whatever breaks: the patience with a disk that works
# (peer_state: 12 times 5 s), and as long again while chunks trickle in.
ANSWER_MAX_S = 120.0


# Longest time without a new chunk before whoever waits gets the original: the patience of a node
# (5 s), that of the tracker with silent nodes, and our own looking every now and then.
STUCK_MAX_S = 12.0


@dataclass(frozen=True, slots=True)
class Told:
    """What a node had of a file version at the last look, and over which connection it was to tell
    a neighbour. ``hearing``: the neighbour's own download; one that it has begun since hears of
    everything anew."""

    link: int
    download: Download
    hearing: Download | None
    held: int

    def is_same_pair(self, other: Told) -> bool:
        """Nothing was begun anew in between, on neither side."""
        same = self.download is other.download and self.hearing is other.hearing
        return same and self.link == other.link


@dataclass(frozen=True, slots=True)
class Held:
    """What a node had of a file version at the last look, and in which life and session it was."""

    life: int
    session: int | None
    chunks: frozenset[int]


@dataclass(frozen=True, slots=True)
class Wait:
    """How far a node had come with a file that jobs wait for, at the last look.

    ``begun``: what it fills, another one if the disk was lost in between, however quickly it has
    begun anew: then its patience has, too. ``since_s``: since when nothing has changed.
    """

    begun: Replica | None
    chunks: int
    stops: int
    since_s: float

    def is_as(self, begun: Replica | None, chunks: int, stops: int) -> bool:
        """Nothing has come since, and nothing was begun anew."""
        return self.begun is begun and (self.chunks, self.stops) == (chunks, stops)


class Watch:
    """Looks at the cluster every ``WATCH_S`` while jobs wait, and less often when none do.

    ``evaluated``: how often each invariant was.
    """

    def __init__(self, cluster: Cluster, clients: Clients) -> None:
        self._cluster = cluster
        self._clients = clients
        self._held: dict[tuple[str, bytes], Held] = {}
        self._held_before: dict[tuple[str, bytes], Held] = {}
        self._told: dict[tuple[str, str, bytes], Told] = {}
        self.all_is_told = False
        self._waits: dict[tuple[str, bytes], Wait] = {}
        self.evaluated: Counter[str] = Counter()
        cluster.engine.at(cluster.engine.now_s, self._look, None)

    def _look(self, _: object) -> None:
        cluster = self._cluster
        now_s = cluster.engine.now_s
        self._held_before, self._held = self._held, {}
        for node in cluster.node_list:
            self._look_at(node)
            self._look_at_waiting(node, now_s)
        self._look_at_announcements()
        oldest_s = min(self._clients.waiting_since_s(), default=now_s)
        self.require("answered in time", now_s - oldest_s <= ANSWER_MAX_S, "a request waits")
        busy = self._clients.pending or now_s < CALM_AFTER_S
        pause_s = WATCH_S if busy else CALM_WATCH_S
        cluster.engine.at(now_s + pause_s, self._look, None)

    def _look_at(self, node: Node) -> None:
        node.disk.check()
        node.upload_slots.check()
        self.evaluated["accounts of disk and upload slots"] += 2
        room = node.disk.used_bytes <= node.disk.room_bytes
        self.require("disk floor", room, f"{node.name} uses more of its disk than it may")
        few = len(node.fetches) <= FLIGHTS_MAX
        self.require("requests in flight", few, f"{node.name} has too many requests in flight")
        places = node.settings.uploads_max + WAITING_MAX
        self.require("uploads", len(node.serving) <= places, f"{node.name} serves too many")
        for fetching in node.machine.downloads():
            if fetching.download is not None:
                hedges_max = HEDGES_MIN + fetching.download.chunk_count // 100
                few = fetching.download.hedges <= hedges_max
                self.require("hedges", few, f"{node.name} asks twice for too many chunks")

    def _look_at_announcements(self) -> None:
        """What a node held at the last look its neighbours know by now, or have it themselves.

        Only where nobody denies what it has, and all cut files alike (``all_is_told``).
        """
        former, self._told = self._told, {}
        wires = self._cluster.control.wires
        if not self.all_is_told or wires.cut:
            return
        for node in self._cluster.node_list:
            for fetching in [] if node.stopped else node.machine.downloads():
                download = fetching.download
                for name in download.peers if download is not None and fetching.on_disk else ():
                    other = self._cluster.nodes[name]
                    link = node.connected.get(name)
                    if link is None or other.connected.get(node.name) != link or other.stopped:
                        continue
                    assert download is not None
                    version_id = fetching.version.version_id
                    key = (node.name, name, version_id)
                    hears = other.machine.fetching(version_id)
                    hearing = hears.download if hears is not None else None
                    self._told[key] = now = Told(link, download, hearing, download.held)
                    before = former.get(key)
                    if before is not None and before.is_same_pair(now):
                        self._look_at_told(now, before, node.name, other)

    def _look_at_told(self, now: Told, before: Told, name: str, other: Node) -> None:
        fetching = other.machine.fetching(now.download.version.version_id)
        view = fetching.download.peers.get(name) if fetching and fetching.download else None
        if view is None or not view.source or fetching is None or fetching.download is None:
            return
        known = view.mask | fetching.download.held
        untold = before.held & ~known if not fetching.download.conflicts else 0
        self.require("told", not untold, f"{name} does not tell {other.name} what it has")

    def _look_at_waiting(self, node: Node, now_s: float) -> None:
        """Nobody waits for long while nothing comes, but for a slot that others have."""
        for version_id, replica in node.disk.replicas.items():
            of_use = replica.active or replica.published  # or else left of an earlier attempt
            chunks = frozenset(replica.digests) if of_use else frozenset()
            self._held[node.name, version_id] = Held(node.life, node.session, chunks)
        for version in set(node.waiting.values()):
            key = (node.name, version.version_id)
            fetching = node.machine.fetching(version.version_id)
            held = self._held.get(key)
            count = len(held.chunks) if held is not None else 0
            begun = node.disk.replicas.get(version.version_id)
            former = self._waits.get(key)
            excused = (
                node.stopped
                or fetching is None
                or not fetching.on_disk  # the disk works
                or fetching.publishing
                or fetching.waiting_for_slot
            )
            since_s = now_s
            if former is not None and not excused and former.is_as(begun, count, node.stops):
                since_s = former.since_s
            self._waits[key] = Wait(begun, count, node.stops, since_s)
            asked_s = max(self._clients.asked_s(node, version), since_s)
            in_time = now_s - asked_s <= STUCK_MAX_S
            self.require("not held up", in_time, f"a job on {node.name} is held up by a fault")

    def no_needless_reading(self) -> None:
        """From now on no chunk may be read that a node has had for a while that can be reached. Not
        for times in which messages or answers are late: the tracker can only know what it is told.
        """
        self._cluster.readings.on_range = self._look_at_range

    def _look_at_range(self, reader: Node, version_id: bytes, chunks: range) -> None:
        for node in self._cluster.node_list:
            # One look may come just before what it sees is told.
            held = self._held_before.get((node.name, version_id))
            replica = node.disk.replicas.get(version_id)
            if held is None or replica is None or node is reader or not node.alive:
                continue
            if (held.life, held.session) != (node.life, node.session) or node.session is None:
                continue
            again = held.chunks.intersection(chunks, replica.digests)
            needed = not again or node.name in self._distrusted()
            self.require("nothing read in vain", needed, f"{reader.name} reads what others have")

    def _distrusted(self) -> set[str]:
        return set().union(*(node.distrusted for node in self._cluster.node_list))

    def require(self, invariant: str, holds: bool, complaint: str) -> None:
        """Count one look at an invariant. Raises SimulationFailed when it does not hold."""
        self.evaluated[invariant] += 1
        if not holds:
            raise SimulationFailed(f"{complaint} at {self._cluster.engine.now_s:.3f} s")

    # --- at rest ---------------------------------------------------------------------------------

    def at_rest(self, *, all_replicas_known: bool = True) -> None:
        """Nothing is under way: nothing may be left over, and nothing may be lost.

        ``all_replicas_known``: none is of no use to the others, and therefore not listed.
        """
        cluster = self._cluster
        cluster.check()
        for node in cluster.node_list:
            if node.alive:
                self._node_at_rest(node)
        self._tracker_at_rest(all_replicas_known)
        readers = len(cluster.file_server.readers)
        self.require("no reader left", not readers, f"{readers} readers are left over")

    def _node_at_rest(self, node: Node) -> None:
        name = node.name
        self.require("connected", node.session is not None, f"{name} is not with the tracker")
        downloads = list(node.machine.downloads())
        self.require("no download left", not downloads, f"{name} still fetches something")
        waiting = node.waiting or node.batches
        self.require("nobody waits", not waiting, f"{name} has forgotten a request")
        left = {key: count for key, count in node.under_way.items() if count}
        self.require("nothing under way", not left, f"{name} has something under way for ever")
        self.require("no transfer left", not node.fetches, f"{name} still fetches chunks")
        self.require("no upload left", not node.serving, f"{name} still serves chunks")
        self.require("no connection left", not node.connected, f"{name} keeps useless connections")
        for version_id in node.disk.published():
            self._cluster.check_replica(node, self._cluster.versions[version_id])
            rotten = node.disk.replicas[version_id].rotten
            self.require("no rot left", not rotten, f"{name} has a rotten replica")

    def _tracker_at_rest(self, all_replicas_known: bool) -> None:
        cluster = self._cluster
        host = cluster.tracker
        status: dict[str, Any] = host.machine.status(host.clock.read(cluster.engine.now_s))
        known = {entry["node"]: entry for entry in status["nodes"]}
        alive = {node.name for node in cluster.node_list if node.alive}
        self.require("known nodes", known.keys() == alive, "the tracker knows other nodes")
        for node in cluster.node_list:
            if node.alive:
                entry = known[node.name]
                # Empty files need no announcement, but have some after a new connection.
                held = [
                    each.layout.size_bytes for each in node.disk.replicas.values() if each.published
                ]
                least = sum(map(bool, held)) if all_replicas_known else 0
                told = least <= entry["replicas"] <= len(held)
                self.require("known replicas", told, f"{node.name} is thought to hold others")
                self.require("no lease left", not entry["leases"], f"{node.name} has a lease")
        for server in status["file_servers"]:
            used, waiting = server["slots_used"], server["waiting"]
            self.require("no slot left", not used, f"{used} slots are taken for ever")
            self.require("nobody waits for a slot", not waiting, "a swarm waits for a slot")
        swarms = status["swarms"]
        self.require("no swarm left", not swarms, f"{len(swarms)} swarms are left over")
        left = len(host.journal)
        self.require("journal", not left, f"{left} leases are in the journal for ever")
