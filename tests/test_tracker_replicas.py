"""Which nodes have complete copies of which file versions."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.messages import DiskStatus, Locate, NodeAddress
from swarmcache.tracker_nodes import Node, TrackerNodes
from swarmcache.tracker_replicas import TrackerReplicas
from swarmcache.tracker_statistics import TrackerStatistics

FILES = [bytes([number]) * 32 for number in range(4)]


def replicas_of(*names: str) -> TrackerReplicas:
    """Nobody holds anything yet, on nodes of these names."""
    nodes = TrackerNodes()
    for session, name in enumerate(names):
        nodes.connect(session, 0.0)
        nodes.add(Node(session, NodeAddress(name, 7382), 0.0, 0.0, 0.0, DiskStatus()))
    return TrackerReplicas(Random(1), nodes, TrackerStatistics(None, 0.0))


def test_what_is_not_told_of_anew_is_gone_only_when_all_has_been_told() -> None:
    replicas = replicas_of("a")
    for file in FILES[:3]:
        replicas.add("a", file)

    replicas.tells_anew("a")
    replicas.add("a", FILES[1])
    assert all("a" in replicas.holders(file) for file in FILES[:3])
    replicas.drop("a", FILES[2])
    assert replicas.has_told("a") == [FILES[0]]
    assert replicas.has_told("a") == [], "it was told of as gone twice"


def test_holders_are_named_in_the_order_in_which_they_told_and_never_to_themselves() -> None:
    replicas = replicas_of("c", "a", "b")
    for name in ("c", "a", "b"):
        replicas.add(name, FILES[0])

    (found,) = replicas.located("a", Locate(1, [FILES[0]], 8)).holders
    assert (found.count, [address.node for address in found.nodes]) == (2, ["c", "b"])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "drop", "anew", "told", "lose"]),
            st.sampled_from("ab"),
            st.sampled_from(FILES),
        )
    )
)
def test_holders_are_those_that_hold(steps: list[tuple[str, str, bytes]]) -> None:
    replicas = replicas_of("a", "b")
    held: set[tuple[str, bytes]] = set()
    for step, name, file in steps:
        match step:
            case "add":
                replicas.add(name, file)
                held.add((name, file))
            case "drop":
                replicas.drop(name, file)
                held.discard((name, file))
            case "anew":
                replicas.tells_anew(name)
            case "told":
                for gone in replicas.has_told(name):
                    replicas.drop(name, gone)
                    held.remove((name, gone))
            case "lose":
                replicas.lose_node(name)
                held = {each for each in held if each[0] != name}
        replicas.check()
        for each in FILES:
            assert set(replicas.holders(each)) == {node for node, of in held if of == each}
