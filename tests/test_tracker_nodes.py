"""Who is connected to the tracker, on which connection, and who is named to whom."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.messages import DiskStatus, NodeAddress, Revoked
from swarmcache.tracker_events import CloseSession, Tell, TrackerEffect
from swarmcache.tracker_nodes import NODE_SILENT_S, SEEDS_EVERY_S, Node, TrackerNodes


def node(name: str, session: int) -> Node:
    return Node(session, NodeAddress(name, 7382), 0.0, 0.0, 0.0, DiskStatus())


def test_a_node_that_registers_on_a_new_connection_outlives_its_old_one() -> None:
    nodes = TrackerNodes()
    nodes.connect(1, 0.0)
    nodes.add(node("a", 1))
    nodes.connect(2, 1.0)
    nodes.replace(nodes["a"])
    nodes.add(node("a", 2))
    nodes.check()

    assert nodes.disconnect(1) is None
    nodes.check()
    effects: list[TrackerEffect] = []
    nodes.tell("a", Revoked(b"f" * 32, "changed"), effects)
    assert effects == [Tell(2, Revoked(b"f" * 32, "changed"))]
    lost = nodes.disconnect(2)
    assert lost is not None and lost.address.node == "a" and "a" not in nodes


def test_whoever_says_something_is_not_silent_and_whoever_says_nothing_is_closed() -> None:
    nodes = TrackerNodes()
    for session in (1, 2):
        nodes.connect(session, 0.0)
    nodes.add(node("a", 1))
    nodes["a"].silent = True
    assert nodes.heard(1, 10.0) and not nodes.heard(3, 10.0)
    assert not nodes["a"].silent

    effects: list[TrackerEffect] = []
    nodes.close_silent(NODE_SILENT_S, effects)
    assert [effect.session for effect in effects if isinstance(effect, CloseSession)] == [2]
    assert nodes.wake_at_s() == 10.0 + NODE_SILENT_S


def test_nobody_is_named_to_itself_and_nobody_is_told_of_others_all_the_time() -> None:
    nodes = TrackerNodes()
    for session, name in enumerate("abcde"):
        nodes.connect(session, 0.0)
        nodes.add(node(name, session))
    named: Counter[str] = Counter()
    for turn in range(10):
        seeds = nodes.seeds_if_due(nodes["a"], 3, turn * SEEDS_EVERY_S)
        assert len(set(seeds)) == 3 and "a" not in seeds
        assert nodes.seeds_if_due(nodes["a"], 3, turn * SEEDS_EVERY_S + 1.0) == []
        named.update(seeds)
        nodes.check()

    assert max(named.values()) - min(named.values()) <= 1


@given(st.lists(st.tuples(st.sampled_from(["connect", "add", "lose"]), st.integers(0, 5))))
def test_no_order_of_comings_and_goings_leaves_half_a_node(steps: list[tuple[str, int]]) -> None:
    nodes = TrackerNodes()
    there: dict[int, str | None] = {}
    for step, session in steps:
        name = "ab"[session % 2]
        if step == "connect" and session not in there:
            nodes.connect(session, 0.0)
            there[session] = None
        elif step == "add" and there.get(session, "") is None:
            former = nodes.get(name)
            if former is not None:
                there[former.session] = None
                nodes.replace(former)
            nodes.add(node(name, session))
            there[session] = name
        elif step == "lose" and session in there:
            lost = nodes.disconnect(session)
            assert (lost.address.node if lost else None) == there.pop(session)
        nodes.check()
        assert sorted(filter(None, there.values())) == [it.address.node for it in nodes.sorted()]
