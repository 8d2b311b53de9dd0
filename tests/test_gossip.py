"""What nodes know of each other: production machines on a simulated network, in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulations.gossip_cluster import GossipCluster, GossipNode, GossipSettings
from swarmcache.gossip_events import Leaving, MembersChanged, StatusMeasured
from swarmcache.gossip_records import DiskHealth, MemberState, NodeStatus


class Story:
    """A cluster, and what its nodes have thought of each other."""

    def __init__(self, nodes: int, *, loss: float = 0.0) -> None:
        self.cluster = GossipCluster(GossipSettings(nodes, 1, loss, check_every=7))
        self.nodes = self.cluster.nodes
        self.deaths: list[tuple[float, str, str]] = []
        self.cluster.on_change = self._changed
        for node in self.nodes:
            self.start(node)

    def start(self, node: GossipNode) -> None:
        self.cluster.start(node)
        self.cluster.meet(node, self.nodes[:2])

    def run(self, seconds: float) -> None:
        self.cluster.run(self.cluster.now_s + seconds)
        for node in self.nodes:
            node.machine.check()

    def _changed(self, node: GossipNode, change: MembersChanged) -> None:
        self.deaths += [(self.cluster.now_s, node.name, dead) for dead in change.dead]

    def states(self, name: str) -> set[MemberState | None]:
        """What the others think of a node."""
        found = [each.machine.member(name) for each in self.nodes if each.alive]
        return {None if member is None else member.state for member in found}


def test_all_nodes_come_to_know_all_others() -> None:
    story = Story(8)

    story.run(10)

    for node in story.nodes:
        names = {each.profile.address.node for each in node.machine.live() if each.profile}
        assert names == {each.name for each in story.nodes if each is not node}


def test_a_change_of_health_is_known_to_all_within_a_second_and_says_how_old_it_is() -> None:
    story = Story(8)
    story.run(20)
    status = NodeStatus(free_bytes=3 << 30, disk=DiskHealth.SICK, standing_in=True)

    story.cluster.tell(story.nodes[3], StatusMeasured(status))
    made_s = story.cluster.now_s
    story.run(1.5)

    for node in story.nodes:
        member = node.machine.member(story.nodes[3].name)
        assert member is not None and member.status == status
        assert made_s - 0.2 <= member.heard_at_s <= made_s + 1.0


@pytest.mark.slow
def test_a_killed_node_is_known_to_be_dead_within_ten_seconds() -> None:
    story = Story(8, loss=0.1)
    story.run(20)

    story.cluster.kill(story.nodes[5])
    story.run(10)

    assert story.states(story.nodes[5].name) == {MemberState.DEAD}
    assert {dead for _, _, dead in story.deaths} == {story.nodes[5].name}


@pytest.mark.slow
def test_a_node_that_comes_back_in_a_new_life_is_alive_at_once() -> None:
    story = Story(8)
    story.run(20)
    story.cluster.kill(story.nodes[5])
    story.run(15)

    story.start(story.nodes[5])
    story.run(5)

    assert story.states(story.nodes[5].name) == {MemberState.ALIVE}


@pytest.mark.slow
def test_a_node_that_leaves_is_gone_at_once_and_does_not_come_back() -> None:
    story = Story(4)
    story.run(20)
    leaver = story.nodes[3]

    story.cluster.tell(leaver, Leaving())
    story.cluster.kill(leaver)
    story.run(1)

    assert story.states(leaver.name) == {MemberState.LEFT}
    story.run(890)
    assert story.states(leaver.name) == {MemberState.LEFT}
    story.run(20)
    assert story.states(leaver.name) == {None}


@pytest.mark.slow
def test_a_node_that_stalls_for_five_seconds_is_not_declared_dead() -> None:
    story = Story(8)
    story.run(20)

    story.cluster.stall(story.nodes[5], 5.0)
    story.run(30)

    assert story.deaths == []
    assert story.states(story.nodes[5].name) == {MemberState.ALIVE}


@pytest.mark.slow
def test_a_cut_off_node_accuses_nobody_and_comes_back_by_itself() -> None:
    story = Story(8)
    story.run(20)
    lonely = story.nodes[5]

    lonely.side = 1
    story.run(30)
    assert {(name, dead) for _, name, dead in story.deaths} == {
        (node.name, lonely.name) for node in story.nodes if node is not lonely
    }
    lonely.side = 0
    story.run(60)

    assert story.states(lonely.name) == {MemberState.ALIVE}


@pytest.mark.slow
def test_two_halves_find_each_other_again_without_a_tracker() -> None:
    story = Story(8)
    story.run(20)
    for node in story.nodes[4:]:
        node.side = 1
    story.run(200)
    assert len(story.deaths) == 32

    for node in story.nodes:
        node.side = 0
    story.run(60)

    assert {len(node.machine.live()) for node in story.nodes} == {7}
    assert len(story.deaths) == 32


@pytest.mark.slow
def test_no_datagram_is_longer_than_1232_bytes_and_ip_and_udp_headers() -> None:
    story = Story(40)

    story.run(12)

    assert 1000 < story.cluster.datagram_bytes_max <= 1232 + 28


def test_equal_seeds_gossip_equally_and_others_do_not() -> None:
    def digest(seed: int) -> str:
        cluster = GossipCluster(replace(GossipSettings(6, seed, 0.2)))
        for node in cluster.nodes:
            cluster.start(node)
            cluster.meet(node, cluster.nodes[:2])
        cluster.run(10)
        return cluster.trace_digest

    assert digest(1) == digest(1) != digest(2)
