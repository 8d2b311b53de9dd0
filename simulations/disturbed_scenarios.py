"""Crowds in whose middle something goes wrong: one thing, at a known time.

Jobs that get the original path meanwhile ask again, so that the last one shows when all is well
again. What goes wrong are faults as the campaign has them, see ``faults.py``.
"""

from __future__ import annotations

from dataclasses import replace

from simulations.cluster import Cluster
from simulations.engine import SimulationFailed
from simulations.faults import Fault, Faults
from simulations.nodes import Node
from simulations.scenarios import CROWD_AT_S, Crowd, Result, Watch
from simulations.settings import ClusterSettings

# How long the tracker is away, and the two halves apart from one another.
RESTART_S = 2.0
APART_S = 10.0
# How long a leaseholder is stopped: until long after its lease has run out.
STOPPED_S = 10.0
# rolling_upgrade: between two daemons, and how long each takes to start.
UPGRADE_STEP_S = 0.2
UPGRADE_S = 0.5


def tracker_restart(
    settings: ClusterSettings, size_bytes: int, watch: Watch | None = None
) -> Result:
    """A flash crowd in whose middle the tracker is killed, and started anew two seconds later."""
    crowd = _crowd("tracker_restart", settings, size_bytes)
    killed_s = CROWD_AT_S + crowd.bound_s / 2
    Faults(crowd.cluster, [Fault(killed_s, "tracker killed", duration_s=RESTART_S)])
    return crowd.run(crowd.cluster.node_list, watch)


def tracker_lost(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """A flash crowd in whose middle the tracker is killed for good: a node stands in for it."""
    crowd = Crowd("tracker_lost", replace(settings, originals=True), size_bytes, jobs=True)
    for node in crowd.cluster.node_list:
        crowd.want_at(0.0, node, crowd.version.path, keeps_asking=False)
    killed_s = CROWD_AT_S + crowd.bound_s / 2
    Faults(crowd.cluster, [Fault(killed_s, "tracker killed", duration_s=1e9)])
    return crowd.run([], watch)


def holder_stopped(
    settings: ClusterSettings, size_bytes: int, watch: Watch | None = None
) -> Result:
    """A flash crowd with a leaseholder that is stopped for ten seconds, and wakes in the middle of
    its range."""
    crowd = _crowd("holder_stopped", settings, size_bytes)
    crowd.cluster.engine.at(CROWD_AT_S + crowd.bound_s / 4, _stop_a_reader, crowd.cluster)
    return crowd.run(crowd.cluster.node_list, watch)


def partition(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """A flash crowd that falls into two halves for ten seconds, one of them with the tracker."""
    crowd = _crowd("partition", settings, size_bytes)
    apart_s = CROWD_AT_S + crowd.bound_s / 2
    Faults(crowd.cluster, [Fault(apart_s, "partition", duration_s=APART_S, amount=0.5)])
    return crowd.run(crowd.cluster.node_list, watch)


def corrupting_peer(
    settings: ClusterSettings, size_bytes: int, watch: Watch | None = None
) -> Result:
    """A flash crowd of which one node sends nothing but wrong bytes."""
    crowd = _crowd("corrupting_peer", settings, size_bytes)
    crowd.cluster.node_list[0].corrupts = True
    return crowd.run(crowd.cluster.node_list, watch)


def source_changed(
    settings: ClusterSettings, size_bytes: int, watch: Watch | None = None
) -> Result:
    """A flash crowd in whose middle the file is written anew: all get the new one."""
    crowd = _crowd("source_changed", settings, size_bytes)
    changed_s = CROWD_AT_S + crowd.bound_s / 2
    Faults(crowd.cluster, [Fault(changed_s, "source changed", amount=0.0)])
    return crowd.run(crowd.cluster.node_list, watch)


def rolling_upgrade(
    settings: ClusterSettings, size_bytes: int, watch: Watch | None = None
) -> Result:
    """A flash crowd during which the tracker, then one daemon after the other, is replaced."""
    crowd = _crowd("rolling_upgrade", settings, size_bytes)
    faults = [Fault(CROWD_AT_S, "tracker killed", duration_s=UPGRADE_S)]
    for node in crowd.cluster.node_list:
        at_s = CROWD_AT_S + (node.index + 1) * UPGRADE_STEP_S
        faults.append(Fault(at_s, "daemon killed", node.index, duration_s=UPGRADE_S))
    Faults(crowd.cluster, faults)
    return crowd.run(crowd.cluster.node_list, watch)


def _crowd(scenario: str, settings: ClusterSettings, size_bytes: int) -> Crowd:
    """Every node wants the file, and asks again when it gets the original."""
    crowd = Crowd(scenario, replace(settings, originals=True), size_bytes, jobs=True)
    for node in crowd.cluster.node_list:
        crowd.want_at(0.0, node, crowd.version.path)
    return crowd


def _stop_a_reader(cluster: Cluster) -> None:
    reading: list[Node] = [node for node in cluster.node_list if node.reading]
    if not reading:
        raise SimulationFailed("nobody reads from the file server: the file is too small for this")
    cluster.processes.stop(reading[0])
    cluster.engine.at(cluster.engine.now_s + STOPPED_S, cluster.processes.go_on, reading[0])
