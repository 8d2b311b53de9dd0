"""What goes wrong in a simulated cluster, as data: a list that can be drawn, printed and shortened.

There are two sorts of faults. *Events* happen at their time. *Traps* are set at their time, and
spring when their node next does what they are about; one that never springs does not count.
Whatever lasts ends with ``end_all``, as does everything else that is not for ever: from then on the
cluster must come to rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulations.disks import corrupted
from simulations.nodes import Node
from simulations.wires import TRACKER, Cut
from simulations.writers import Writer

if TYPE_CHECKING:
    from simulations.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. ``node`` and ``other`` are numbers of nodes; ``amount`` is between
    0 and 1, and says how much where there is something to say."""

    at_s: float
    kind: str
    node: int = 0
    other: int = 0
    duration_s: float = 0.0
    amount: float = 0.5


# Traps, and how long what they cost may last, in seconds.
TRAPS = {
    "chunk absent": (0.0, 0.0),
    "chunk busy": (0.0, 0.0),
    "chunk corrupted": (0.0, 0.0),
    "chunk refused": (0.0, 0.0),
    "chunk reset": (0.0, 0.05),
    "chunk stalled": (0.0, 0.0),
    "copy slow": (0.01, 1.5),
    "dial refused": (0.0, 0.0),
    "dial unanswered": (0.0, 0.0),
    "disk slow": (0.001, 1.0),
    "manifest unreadable": (0.0, 0.0),
    "message from tracker late": (0.001, 3.0),
    "message to tracker late": (0.001, 3.0),
    "peer connection reset in a message": (0.0, 0.0),
    "peer message late": (0.001, 2.0),
    "publication failed": (0.0, 0.0),
    "read failed": (0.0, 0.0),
    "read slow": (0.01, 0.3),
    "reservation refused": (0.0, 0.0),
    "tracker connection reset in a message from it": (0.0, 0.0),
    "tracker connection reset in a message to it": (0.0, 0.0),
    "write of a chunk failed": (0.0, 0.0),
    "write of a range failed": (0.0, 0.0),
}


class Faults:
    """Injects a list of faults into one cluster. ``injected``: how many of each kind hit."""

    def __init__(self, cluster: Cluster, faults: Sequence[Fault]) -> None:
        self._cluster = cluster
        self._processes = cluster.processes
        self.injected: Counter[str] = Counter()
        self._lasting: dict[Fault, Callable[[], None]] = {}
        self._over = False
        for node in cluster.node_list:
            node.on_trap = self._sprung
        for fault in faults:
            cluster.engine.at(fault.at_s, self._inject, fault)

    def end_all(self) -> None:
        """Whatever lasts ends now, and what has not happened yet never will."""
        self._over = True
        for node in self._cluster.node_list:
            node.traps.clear()
        for end in list(self._lasting.values()):
            end()
        self._lasting.clear()
        self._cluster.control.mend_all()
        for node in self._cluster.node_list:
            self._processes.start(node)
            self._cluster.disks.scrub(node)

    def _sprung(self, fault: Fault) -> None:
        self.injected[fault.kind] += 1

    def _inject(self, fault: Fault) -> None:
        if self._over:
            return
        node = self._cluster.node_list[fault.node]
        if fault.kind in TRAPS:
            node.traps.setdefault(fault.kind, []).append(fault)
        elif EVENTS[fault.kind](self, node, fault) is not False:
            self.injected[fault.kind] += 1

    def _until(self, fault: Fault, end: Callable[[], None]) -> None:
        """It lasts; in the end this is done."""
        self._lasting[fault] = end
        at_s = self._cluster.engine.now_s + fault.duration_s
        self._cluster.engine.at(at_s, self._end, fault)

    def _end(self, fault: Fault) -> None:
        end = self._lasting.pop(fault, None)
        if end is not None:
            end()

    # --- processes and machines ------------------------------------------------------------------

    def _daemon_killed(self, node: Node, fault: Fault) -> bool:
        if not node.alive:
            return False
        self._processes.kill(node, keeps=1.0)
        self._until(fault, lambda: self._processes.start(node))
        return True

    def _daemon_killed_partials_torn(self, node: Node, fault: Fault) -> bool:
        if not node.alive:
            return False
        self._processes.kill(node, keeps=fault.amount)
        self._until(fault, lambda: self._processes.start(node))
        return True

    def _power_cut(self, node: Node, fault: Fault) -> bool:
        if not node.powered:
            return False
        self._processes.cut_power(node, keeps=fault.amount)
        self._until(fault, lambda: self._processes.start(node))
        return True

    def _node_lost(self, node: Node, fault: Fault) -> bool:
        left = sum(not each.lost for each in self._cluster.node_list)
        if left <= 2 or node.lost:
            return False
        node.lost = True
        self._processes.cut_power(node)
        return True

    def _daemon_stopped(self, node: Node, fault: Fault) -> bool:
        if not node.alive or node.stopped:
            return False
        self._processes.stop(node)
        self._until(fault, lambda: self._processes.go_on(node))
        return True

    def _tracker_killed(self, node: Node, fault: Fault) -> bool:
        if not self._cluster.tracker.alive:
            return False
        self._processes.kill_tracker()
        self._until(fault, self._processes.start_tracker)
        return True

    def _journal_lost(self, node: Node, fault: Fault) -> bool:
        if not self._tracker_killed(node, fault):
            return False
        self._cluster.tracker.lose_journal()
        return True

    def _tracker_stopped(self, node: Node, fault: Fault) -> bool:
        if not self._cluster.tracker.alive or self._cluster.tracker.stopped:
            return False
        self._processes.stop_tracker()
        self._until(fault, self._processes.tracker_goes_on)
        return True

    def _some_stand_in(self, fault: Fault) -> Node | None:
        offices = [node for node in self._cluster.node_list if node.office is not None]
        return offices[fault.other % len(offices)] if offices else None

    def _stand_in_killed(self, node: Node, fault: Fault) -> bool:
        stand_in = self._some_stand_in(fault)
        return stand_in is not None and self._daemon_killed(stand_in, fault)

    def _stand_in_stopped(self, node: Node, fault: Fault) -> bool:
        stand_in = self._some_stand_in(fault)
        return stand_in is not None and self._daemon_stopped(stand_in, fault)

    # --- connections -----------------------------------------------------------------------------

    def _session_reset(self, node: Node, fault: Fault) -> bool:
        if node.session is None:
            return False
        self._cluster.control.lose_session(node.session, "reset")
        return True

    def _link_reset(self, node: Node, fault: Fault) -> bool:
        others = list(node.connected)
        if not others:
            return False
        other = self._cluster.nodes[others[fault.other % len(others)]]
        self._cluster.control.break_link(node, other)
        return True

    def _cut(self, senders: set[str], receivers: set[str], fault: Fault) -> None:
        cut = Cut(frozenset(senders), frozenset(receivers))
        self._cluster.control.cut_for(cut, fault.duration_s)

    def _cut_to_tracker(self, node: Node, fault: Fault) -> None:
        self._cut({node.name}, {TRACKER}, fault)

    def _cut_from_tracker(self, node: Node, fault: Fault) -> None:
        self._cut({TRACKER}, {node.name}, fault)

    def _cut_from_peer(self, node: Node, fault: Fault) -> bool:
        other = self._cluster.node_list[fault.other]
        if other is node:
            return False
        self._cut({other.name}, {node.name}, fault)
        return True

    def _unplugged(self, node: Node, fault: Fault) -> None:
        others = {TRACKER, *self._cluster.nodes} - {node.name}
        self._cut({node.name}, others, fault)
        self._cut(others, {node.name}, fault)

    def _partition(self, node: Node, fault: Fault) -> None:
        """Two halves; the tracker is in one of them."""
        names = list(self._cluster.nodes)
        place = 1 + int(fault.amount * (len(names) - 1))
        here, there = set(names[:place]), set(names[place:])
        here.add(TRACKER)
        self._cut(here, there, fault)
        self._cut(there, here, fault)

    # --- slow things -----------------------------------------------------------------------------

    def _slow_node(self, node: Node, fault: Fault) -> None:
        cluster = self._cluster
        usual = cluster.settings.node_rate

        def set_rate(rate: float) -> None:
            cluster.network.set_rate(node.up, rate)
            cluster.network.set_rate(node.down, rate)

        set_rate(usual * (0.1 + 0.4 * fault.amount))
        self._until(fault, lambda: set_rate(usual))

    def _peer_lies(self, node: Node, fault: Fault) -> None:
        node.corrupts = True
        self._until(fault, lambda: setattr(node, "corrupts", False))

    def _slow_file_server(self, node: Node, fault: Fault) -> None:
        self._cluster.file_server.slow_down(1 + 20 * fault.amount)
        self._until(fault, lambda: self._cluster.file_server.slow_down(1))

    # --- files and disks -------------------------------------------------------------------------

    def _source_changed(self, node: Node, fault: Fault) -> bool:
        current = self._cluster.file_server.current
        if not current:
            return False
        path = sorted(current)[int(fault.amount * len(current)) % len(current)]
        self._cluster.change_source(path)
        return True

    def _some_replica(self, node: Node, fault: Fault) -> bytes | None:
        held = [
            version_id
            for version_id, replica in node.disk.replicas.items()
            if replica.settled and replica.layout.chunk_count
        ]
        return held[int(fault.amount * len(held)) % len(held)] if held else None

    def _replica_rotten(self, node: Node, fault: Fault) -> bool:
        version_id = self._some_replica(node, fault)
        if version_id is None:
            return False
        replica = node.disk.replicas[version_id]
        chunk = fault.other % replica.layout.chunk_count
        replica.digests[chunk] = corrupted(replica.digests[chunk])
        replica.rotten |= 1 << chunk
        self._until(fault, lambda: self._cluster.disks.scrub(node))
        return True

    def _replica_removed(self, node: Node, fault: Fault) -> bool:
        version_id = self._some_replica(node, fault)
        if version_id is None or not node.alive:
            return False
        self._cluster.disks.lose(node, version_id)
        return True

    def _disk_lost(self, node: Node, fault: Fault) -> bool:
        if not node.alive:
            return False
        self._cluster.disks.lose_all(node)
        return True

    # --- clients ---------------------------------------------------------------------------------

    def _client_gone(self, node: Node, fault: Fault) -> bool:
        if not node.waiting or not node.alive:
            return False
        requests = list(node.waiting)
        self._cluster.client_goes(node, requests[fault.other % len(requests)])
        return True

    def _some_writer(self, node: Node, fault: Fault) -> Writer | None:
        writers = [each for each in self._cluster.writers.pending if each.node is node]
        return writers[fault.other % len(writers)] if writers else None

    def _writer_killed(self, node: Node, fault: Fault) -> bool:
        writer = self._some_writer(node, fault)
        if writer is None:
            return False
        self._cluster.writers.kill(writer)
        return True

    def _writer_stopped(self, node: Node, fault: Fault) -> bool:
        writer = self._some_writer(node, fault)
        if writer is None or writer.stopped:
            return False
        self._cluster.writers.stop(writer)
        self._until(fault, lambda: self._cluster.writers.go_on(writer))
        return True


EVENTS: dict[str, Callable[[Faults, Node, Fault], bool | None]] = {
    "client gone": Faults._client_gone,
    "cut from a peer": Faults._cut_from_peer,
    "cut from tracker": Faults._cut_from_tracker,
    "cut to tracker": Faults._cut_to_tracker,
    "daemon killed": Faults._daemon_killed,
    "daemon killed, partial files torn": Faults._daemon_killed_partials_torn,
    "daemon stopped": Faults._daemon_stopped,
    "disk lost": Faults._disk_lost,
    "file server slow": Faults._slow_file_server,
    "journal lost": Faults._journal_lost,
    "node lost": Faults._node_lost,
    "node slow": Faults._slow_node,
    "partition": Faults._partition,
    "peer connection reset": Faults._link_reset,
    "peer lies": Faults._peer_lies,
    "power cut": Faults._power_cut,
    "replica removed": Faults._replica_removed,
    "replica rotten": Faults._replica_rotten,
    "source changed": Faults._source_changed,
    "stand-in killed": Faults._stand_in_killed,
    "stand-in stopped": Faults._stand_in_stopped,
    "tracker connection reset": Faults._session_reset,
    "tracker killed": Faults._tracker_killed,
    "tracker stopped": Faults._tracker_stopped,
    "unplugged": Faults._unplugged,
    "writer killed": Faults._writer_killed,
    "writer stopped": Faults._writer_stopped,
}
KINDS = sorted([*TRAPS, *EVENTS])
