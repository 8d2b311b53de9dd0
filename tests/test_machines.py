"""Whole clusters of machines in virtual time: whatever breaks, survivors get every byte right.

Every seed is another cluster with other faults; a failure names its seed, ``run(seed)`` repeats it.
What a cluster must never do is asserted while it runs (see ``machines.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from tests.machines import MIB, Cluster, Faults, address_of, version_of

SEEDS_PER_TEST = 50
ROUGH = Faults(
    busy=0.05,
    absent=0.01,
    unreachable=0.02,
    write=0.002,
    publish=0.02,
    space=0.02,
    read=0.01,
)


class Trouble:
    """Breaks things in a cluster, at times and places that its seed decides."""

    def __init__(self, cluster: Cluster, rng: Random, want: Callable[[int], None]) -> None:
        self._cluster = cluster
        self._rng = rng
        self._want = want
        self._nodes = len(cluster.nodes)
        self._lost: set[int] = set()
        self._kinds: list[Callable[[int], None]] = [
            self._kill,
            self._lose,
            self._tracker,
            self._link,
            self._session,
            self._pause,
            self._disk,
        ]

    def plan(self, count: int) -> None:
        """So many faults within the first six seconds."""
        for _ in range(count):
            what = self._rng.choice(self._kinds)
            index = self._rng.randrange(self._nodes)
            self._cluster.after(self._rng.random() * 6, partial(what, index))

    def _alive(self, index: int) -> bool:
        return self._cluster.nodes[address_of(index).node].alive

    def _kill(self, index: int) -> None:
        if not self._alive(index):
            return
        self._cluster.kill(index)

        def back() -> None:
            if not self._alive(index) and index not in self._lost:
                self._cluster.restart(index)
                self._want(index)

        self._cluster.after(self._rng.random() * 4, back)

    def _lose(self, index: int) -> None:
        if len(self._lost) < self._nodes - 2:
            self._lost.add(index)
            self._cluster.kill(index)

    def _tracker(self, _: int) -> None:
        if self._cluster.tracker_up:
            self._cluster.kill_tracker()
            self._cluster.after(self._rng.random() * 6, self._cluster.restart_tracker)

    def _link(self, index: int) -> None:
        other = self._rng.randrange(self._nodes)
        if other != index:
            self._cluster.break_link(index, other)

    def _session(self, index: int) -> None:
        self._cluster.break_session(index)

    def _disk(self, index: int) -> None:
        self._cluster.lose_disk(index)
        if self._alive(index):
            self._want(index)

    def _pause(self, index: int) -> None:
        self._cluster.pause(index, self._rng.random() * 6)


def run(seed: int) -> Cluster:
    """One cluster from its first get until everybody who survives has the file."""
    rng = Random(seed)
    count = rng.randint(3, 8)
    cluster = Cluster(
        seed,
        nodes=count,
        slots_max=rng.randint(1, 3),
        peers_max=rng.choice((4, 40)),
        faults=ROUGH if rng.random() < 0.6 else None,
        corrupting=(rng.randrange(count),) if rng.random() < 0.15 else (),
        piece_max_s=rng.choice((0.05, 0.4)),
    )
    big = version_of(f"big{seed}", rng.randint(1, 24) * MIB - rng.randrange(MIB))
    small = version_of(f"small{seed}", rng.randint(0, 3) * MIB)

    def want(index: int) -> None:
        if not cluster.has(index, big):
            cluster.want(index, big)

    def want_small(index: int) -> None:
        cluster.want(index, small, user="bob")

    for index in range(count):
        cluster.after(rng.random() * 3, partial(want, index))
        if rng.random() < 0.7:
            cluster.after(rng.random() * 3, partial(want_small, index))
    Trouble(cluster, rng, want).plan(rng.randint(0, 4))
    for _ in range(4):
        ask = partial(cluster.ask_holders, rng.randrange(count), big)
        cluster.after(rng.random() * 8, ask)
    cluster.run_for(13)
    cluster.run(lambda: cluster.everybody_has(big), 200)
    cluster.run(cluster.nobody_waits_for_holders, 30)
    return cluster


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, 5 * SEEDS_PER_TEST, SEEDS_PER_TEST))
def test_everybody_who_survives_gets_every_chunk_whatever_breaks(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_a_swarm_whose_last_range_is_adopted_does_not_wait_for_a_slot() -> None:
    run(3197)


@pytest.mark.parametrize("seed", range(3))
def test_without_faults_each_byte_is_read_once_by_several_readers(seed: int) -> None:
    cluster = Cluster(seed, nodes=6, slots_max=3)
    version = version_of("corpus", 12 * MIB - 5)
    for index in range(6):
        cluster.want(index, version)

    cluster.run(lambda: cluster.everybody_has(version), 30)

    assert cluster.read_bytes == version.size_bytes
    assert cluster.originals == 0
    assert cluster.readers_peak > 1


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = run(3), run(3)

    assert first.now_s == second.now_s
    assert first.answers == second.answers
    assert first.read_bytes == second.read_bytes


def test_a_latecomer_needs_no_lease() -> None:
    cluster = Cluster(1, nodes=3)
    version = version_of("corpus", 5 * MIB)
    cluster.want(0, version)
    cluster.run(lambda: cluster.has(0, version), 30)
    cluster.run_for(2)

    cluster.want(1, version)
    cluster.want(2, version, can_read=False)
    cluster.run(lambda: cluster.everybody_has(version), 30)

    assert cluster.read_bytes == version.size_bytes


def test_a_replica_survives_the_restart_of_its_node_and_of_the_tracker() -> None:
    cluster = Cluster(2, nodes=2)
    version = version_of("corpus", 5 * MIB)
    cluster.want(0, version)
    cluster.run(lambda: cluster.has(0, version), 30)
    cluster.kill(0)
    cluster.kill_tracker()
    cluster.restart_tracker()
    cluster.restart(0)
    cluster.run_for(2)

    cluster.want(1, version, can_read=False)
    cluster.run(lambda: cluster.everybody_has(version), 30)

    assert cluster.read_bytes == version.size_bytes


def test_who_reads_a_changed_source_answers_with_the_original_and_so_does_everybody() -> None:
    cluster = Cluster(4, nodes=4, slots_max=1)
    version = version_of("corpus", 24 * MIB)
    requests = [cluster.want(index, version) for index in range(4)]
    cluster.run(lambda: cluster.read_bytes > 3 * MIB, 30)

    cluster.changed.add(version.version_id)
    cluster.run(lambda: not any(node.waiting for node in cluster.nodes.values()), 30)

    assert cluster.originals == 4
    assert [cluster.answers[request] for request in requests] == [1] * 4


def test_a_node_that_was_stopped_reads_no_more_when_it_wakes() -> None:
    cluster = Cluster(5, nodes=3, slots_max=1, piece_max_s=0.4)
    version = version_of("corpus", 12 * MIB)
    for index in range(3):
        cluster.want(index, version)
    cluster.run(lambda: bool(cluster.reading), 30)
    holder = next(iter(cluster.reading))

    cluster.pause(list(cluster.nodes).index(holder), 20.0)

    # The cluster itself asserts that there is one reader at most; here, that others go on.
    others = [index for index in range(3) if address_of(index).node != holder]
    cluster.run(lambda: all(cluster.has(index, version) for index in others), 18)
    cluster.run(lambda: cluster.everybody_has(version), 60)


def test_the_first_to_join_decides_how_the_file_is_cut() -> None:
    cluster = Cluster(6, nodes=4)
    version = version_of("corpus", 7 * MIB)
    for index in range(4):
        cluster.want(index, version, chunk_size_bytes=MIB << index)

    cluster.run(lambda: cluster.everybody_has(version), 30)

    layouts = {node.disk[version.version_id].layout for node in cluster.nodes.values()}
    assert len(layouts) == 1
    assert cluster.originals == 0
    assert cluster.read_bytes == version.size_bytes
