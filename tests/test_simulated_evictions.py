"""Evictions of the simulated daemons: what they ask of other nodes, and what that spares."""

from __future__ import annotations

import math

import pytest

from simulations.clients import Client, Clients
from simulations.cluster import Cluster
from simulations.disk_work import ANSWER_S_MAX
from simulations.settings import ClusterSettings
from simulations.workload_scenarios import working_set
from swarmcache import replicas_elsewhere
from swarmcache.chunks import FileVersion

MIB = 1 << 20


class Shelf:
    """Nodes that have room for two files and get three, a second apart.

    ``others``: which of the files another node gets before.
    """

    def __init__(self, others: list[int], policy: str = "cluster") -> None:
        settings = ClusterSettings(2, 1, originals=True, disk_bytes=2.5 * MIB, policy=policy)
        self.cluster = Cluster(settings)
        self.versions = [FileVersion(b"/export/%d" % number, MIB, 0) for number in range(3)]
        for version in self.versions:
            self.cluster.file_server.current[version.path] = version
        self.node, other = self.cluster.node_list
        clients = Clients(self.cluster)
        for number in range(3):
            clients.want_at(4.0 + number, Client(self.node, self.versions[number].path))
        for number in others:
            clients.want_at(1.0 + number, Client(other, self.versions[number].path))
        self.cluster.connect_all()

    def held_at(self, at_s: float) -> list[int]:
        """The files that the node has or sets room aside for at this time."""
        engine = self.cluster.engine
        engine.at(at_s, lambda _: engine.stop(), None)
        engine.run(math.inf)
        replicas = self.node.disk.replicas
        return [number for number in range(3) if self.versions[number].version_id in replicas]


def test_a_simulated_node_gives_up_what_another_one_has() -> None:
    assert Shelf([1]).held_at(6.5) == [0, 2]
    assert Shelf([0, 1]).held_at(6.5) == [1, 2]
    assert Shelf([1], "lru").held_at(6.5) == [1, 2]


def test_it_waits_for_a_tracker_that_hangs_as_long_as_a_daemon_does() -> None:
    assert ANSWER_S_MAX == replicas_elsewhere.ANSWER_S_MAX
    shelf = Shelf([1])
    shelf.cluster.engine.at(5.9, lambda _: shelf.cluster.processes.stop_tracker(), None)

    assert shelf.held_at(6.0 + 0.99 * ANSWER_S_MAX) == [0, 1]
    assert shelf.held_at(6.0 + 1.01 * ANSWER_S_MAX) == [1, 2]


def test_it_does_not_wait_for_a_tracker_that_is_away() -> None:
    shelf = Shelf([1])
    shelf.cluster.engine.at(5.0, lambda _: shelf.cluster.processes.kill_tracker(), None)

    assert shelf.held_at(6.01) == [1, 2]


@pytest.mark.slow
def test_with_an_eye_to_other_nodes_much_less_is_read_again_than_by_age_alone() -> None:
    """Of 40 files, some more popular than others, four disks have room for each once."""
    lru, cluster = (
        working_set(ClusterSettings(nodes=4, seed=2, policy=policy), 64 * MIB)
        for policy in ("lru", "cluster")
    )

    assert lru.amplification > 1.5
    assert cluster.amplification < 1.2
    assert cluster.requests == lru.requests
