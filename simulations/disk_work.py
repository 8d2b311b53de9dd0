"""What simulated daemons have their disks do: set room aside, put files in place, drop, check.

What ``disk_worker.py`` does in threads. Takes no time but ``publish_s`` and what faults cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simulations.disks import NoRoom, Replica, content_digest, content_digests
from simulations.engine import SimulationFailed
from simulations.nodes import Node
from simulations.settings import FILE_SERVER, POLICIES, USER, ClusterSettings
from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, ChunkLayout, FileVersion
from swarmcache.eviction import replicas_elsewhere_first
from swarmcache.messages import LOCATE_MAX, Replicas
from swarmcache.peer_events import (
    AnswerHolders,
    CheckCopy,
    ChunksRecovered,
    CopyWanted,
    DropPartial,
    FilePublished,
    HoldersWanted,
    LoadManifest,
    ManifestLoaded,
    PublishFailed,
    ReplicaDropped,
    ReplicasLost,
    RequestGone,
    ReserveSpace,
    SpaceRefused,
    SpaceReserved,
    WriteFailed,
)

if TYPE_CHECKING:
    from simulations.cluster import Cluster

# A copy is durable so long after it was put in place.
FSYNC_S = 0.3
# An eviction waits so long for the tracker, as in ``replicas_elsewhere.py``.
ANSWER_S_MAX = 0.25
# Numbers of its questions, above those of all requests of clients.
QUESTIONS_FROM = 1 << 40


class DiskWork:
    """The disk work of all daemons."""

    def __init__(self, cluster: Cluster, settings: ClusterSettings) -> None:
        self._cluster = cluster
        self._engine = cluster.engine
        self._settings = settings
        self._looks_elsewhere = POLICIES[settings.policy] is replicas_elsewhere_first
        self._questions = 0
        # What waits for an answer, with the file versions that it is about.
        self._asked: dict[int, tuple[tuple[Node, int, ReserveSpace], list[bytes]]] = {}

    def reserve(self, node: Node, effect: ReserveSpace) -> None:
        """Carry out ``ReserveSpace``."""
        version_id = effect.version.version_id
        if self._cluster.strict and node.under_way[version_id]:
            raise SimulationFailed(f"{node.name} began anew before the former attempt had ended")
        node.under_way[version_id] += 1
        disk = node.disk
        if disk.used_bytes + effect.version.size_bytes > disk.room_bytes or node.traps:
            # Evicting takes the machine's word to the tracker, which is busy with this call.
            reserving = (node, node.life, effect)
            self._engine.at(self._engine.now_s, self._reserve_with_pains, reserving)
        else:
            self._reserved(node, effect, 0.0)

    def _reserved(self, node: Node, effect: ReserveSpace, delay_s: float) -> None:
        version_id = effect.version.version_id
        layout = ChunkLayout(effect.version.size_bytes, effect.chunk_size_bytes)
        recovered = ChunksRecovered(version_id, node.disk.begin(version_id, layout))
        reserved = SpaceReserved(version_id, effect.chunk_size_bytes)
        self._cluster.after(delay_s, node, reserved, recovered, version_id=version_id)

    def _reserve_with_pains(self, reserving: tuple[Node, int, ReserveSpace]) -> None:
        node, life, effect = reserving
        version_id = effect.version.version_id
        if node.life != life:
            return
        if node.trap("reservation refused"):
            refused = SpaceRefused(version_id, "the disk fails")
            self._cluster.soon(node, refused, version_id=version_id)
        elif self._looks_elsewhere and node.disk.lacks(self._needed_bytes(node, effect)):
            self._ask_elsewhere(reserving)
        else:
            self._make_room(reserving, {})

    @staticmethod
    def _needed_bytes(node: Node, effect: ReserveSpace) -> int:
        """What is to be set aside, beyond what an earlier attempt has."""
        former = node.disk.replicas.get(effect.version.version_id)
        taken = former.layout.size_bytes if former is not None else 0
        return max(effect.version.size_bytes - taken, 0)

    def _ask_elsewhere(self, reserving: tuple[Node, int, ReserveSpace]) -> None:
        """Ask how many other nodes have what could be evicted; go on without that if it takes too
        long. What ``replicas_elsewhere.py`` does, except that nothing is remembered."""
        node = reserving[0]
        self._questions += 1
        number = QUESTIONS_FROM + self._questions
        version_ids = node.disk.published()[:LOCATE_MAX]
        self._asked[number] = (reserving, version_ids)
        self._engine.at(self._engine.now_s + ANSWER_S_MAX, self._no_answer, number)
        self._cluster.hand(node, HoldersWanted(number, version_ids))

    def told_holders(self, effect: AnswerHolders) -> bool:
        """Carry out ``AnswerHolders``, if it is an answer to a question of an eviction."""
        if effect.request < QUESTIONS_FROM:
            return False
        if effect.request not in self._asked:
            return True  # too late
        reserving, version_ids = self._asked.pop(effect.request)
        counts = [each.count for each in effect.holders or []]
        known = dict(zip(version_ids, counts, strict=False))
        self._engine.at(self._engine.now_s, self._go_on, (reserving, known))
        return True

    def _no_answer(self, number: int) -> None:
        if number in self._asked:
            reserving, _ = self._asked.pop(number)
            self._cluster.hand(reserving[0], RequestGone(number))
            self._go_on((reserving, {}))

    def _go_on(self, told: tuple[tuple[Node, int, ReserveSpace], dict[bytes, int]]) -> None:
        (node, life, _), _ = told
        if node.life == life and node.stopped:
            node.inbox.append((self._go_on, told))
        elif node.life == life:
            self._make_room(*told)

    def _make_room(
        self, reserving: tuple[Node, int, ReserveSpace], elsewhere: dict[bytes, int]
    ) -> None:
        node, _, effect = reserving
        version_id = effect.version.version_id
        needed_bytes = self._needed_bytes(node, effect)
        victims: list[bytes] = []
        try:
            if needed_bytes:
                victims = node.disk.victims(needed_bytes, self._engine.now_s, elsewhere)
        except NoRoom as error:
            refused = SpaceRefused(version_id, str(error))
            self._cluster.soon(node, refused, version_id=version_id)
            return
        for victim in victims:
            self._cluster.hand(node, ReplicaDropped(victim))
            node.disk.evict(victim)
        fault = node.trap("disk slow")
        self._reserved(node, effect, fault.duration_s if fault is not None else 0.0)

    def publish(self, node: Node, version_id: bytes) -> None:
        """Carry out ``PublishFile``."""
        node.under_way[version_id] += 1
        delay_s = self._settings.publish_s
        if node.traps and node.trap("publication failed"):
            failed = PublishFailed(version_id, "input/output error")
            self._cluster.after(delay_s, node, failed, version_id=version_id)
            return
        if node.traps and (fault := node.trap("disk slow")):
            delay_s += fault.duration_s
        publishing = (node, node.life, version_id)
        self._engine.at(self._engine.now_s + delay_s, self._publish, publishing)

    def _publish(self, publishing: tuple[Node, int, bytes]) -> None:
        node, life, version_id = publishing
        if node.life != life:
            return
        if node.stopped:
            node.inbox.append((self._publish, publishing))
            return
        replica = node.disk.replicas[version_id]
        if not replica.complete:
            raise SimulationFailed(f"{node.name} published a file that is not complete")
        replica.published = True
        replica.active = False
        replica.last_used_s = self._engine.now_s
        node.under_way[version_id] -= 1
        self._cluster.tell(node, FilePublished(version_id))
        if node.disk.replicas.get(version_id) is replica:
            replica.settled = True
            if self._settings.originals:
                durable_s = self._engine.now_s + FSYNC_S
                self._engine.at(durable_s, self._durable, (node, life, replica))

    def put_in_place(self, node: Node, versions: Sequence[FileVersion]) -> None:
        """Small files have come, and there is room for them."""
        for version in versions:
            version_id = version.version_id
            layout = ChunkLayout(version.size_bytes, CHUNK_SIZE_MIN_BYTES)
            node.disk.begin(version_id, layout)
            replica = node.disk.replicas[version_id]
            replica.digests[0] = content_digest(version_id, layout, 0)
            replica.published = True
            replica.active = False
            replica.last_used_s = self._engine.now_s

    def files_announced(self, node: Node, version_ids: Sequence[bytes]) -> None:
        """The machine knows of small files that are in place."""
        for version_id in version_ids:
            replica = node.disk.replicas.get(version_id)
            if replica is not None:
                replica.settled = True
                durable_s = self._engine.now_s + FSYNC_S
                self._engine.at(durable_s, self._durable, (node, node.life, replica))

    def _durable(self, written: tuple[Node, int, Replica]) -> None:
        node, life, replica = written
        if node.life == life:
            replica.durable = True

    def drop(self, node: Node, effect: DropPartial) -> None:
        """Carry out ``DropPartial``."""
        replica = node.disk.replicas.get(effect.version_id)
        if node.under_way[effect.version_id]:
            raise SimulationFailed(f"{node.name} dropped what something is under way for")
        if replica is not None and replica.settled:
            raise SimulationFailed(f"{node.name} dropped a replica that it had announced")
        if replica is not None and (replica.published or not effect.keep):
            node.disk.remove(effect.version_id)
        elif replica is not None:
            replica.active = False

    def _lost(self, lost: tuple[Node, bytes]) -> None:
        self.lose(*lost)

    def lose(self, node: Node, version_id: bytes) -> None:
        """A replica is no longer there: removed, or tampered with; the machine is told."""
        node.disk.remove(version_id)
        self._cluster.hand(node, ReplicaDropped(version_id))

    def lose_all(self, node: Node) -> None:
        """The disk is lost, and another one is empty: what was being fetched must begin anew."""
        for version_id, replica in list(node.disk.replicas.items()):
            if replica.published:
                node.disk.remove(version_id)
            else:
                self._cluster.hand(node, WriteFailed(version_id, "the disk is lost"))
        self._cluster.hand(node, ReplicasLost())

    def _check(self, checking: tuple[Node, int, bytes]) -> None:
        """Digest a replica; what is wrong is fetched anew."""
        node, life, version_id = checking
        replica = node.disk.replicas.get(version_id)
        if node.life != life or replica is None or not replica.settled or not replica.rotten:
            return
        version = self._cluster.versions[version_id]
        node.disk.doubt(version_id, range(replica.layout.chunk_count))
        wanted = CopyWanted(version, FILE_SERVER, USER, replica.layout.chunk_size_bytes)
        self._cluster.soon(node, ReplicaDropped(version_id), wanted)

    def scrub(self, node: Node) -> None:
        """Digest all replicas of a node."""
        for version_id in node.disk.published():
            self._check((node, node.life, version_id))

    def check_copy(self, node: Node, effect: CheckCopy) -> None:
        """Carry out ``CheckCopy``."""
        self._engine.at(self._engine.now_s, self._check, (node, node.life, effect.version_id))

    def load_manifest(self, node: Node, effect: LoadManifest) -> None:
        """Carry out ``LoadManifest``."""
        version_id = effect.version_id
        replica = node.disk.replicas.get(version_id)
        loaded = ManifestLoaded(version_id, (), 0)
        if replica is not None and replica.published:
            layout = replica.layout
            # What the chunks should be; those that have rotted since are not.
            right = content_digests(version_id, layout)
            loaded = ManifestLoaded(version_id, right, layout.chunk_size_bytes)
            if node.traps and node.trap("manifest unreadable"):  # the whole copy counts for nothing
                self._engine.at(self._engine.now_s, self._lost, (node, version_id))
                loaded = ManifestLoaded(version_id, (), 0)
        self._cluster.soon(node, loaded)

    def announce(self, node: Node) -> None:
        """Carry out ``AnnounceReplicas``."""
        held = node.disk.published()
        self._cluster.control.say_to_tracker(node, Replicas(held, more=False))
