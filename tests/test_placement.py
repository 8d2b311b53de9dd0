"""Which nodes are asked to take replicas: in which order, how many, and whom instead of others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.placement import KnownNode, Placement, nodes_of_status, rank


def node(name: str, free_bytes: int | None = 100, cached_bytes: int = 0) -> KnownNode:
    return KnownNode(f"{name}:7381", name, free_bytes, cached_bytes)


def names(nodes: list[KnownNode]) -> str:
    return "".join(each.name for each in nodes)


def test_who_has_the_files_comes_first_and_then_who_has_most_free_space() -> None:
    nodes = [node("a", 10), node("b", 30), node("c", 20), node("d", None), node("e", 20)]

    assert names(rank(nodes, [], {})) == "bcead"
    assert names(rank(nodes, [], {"a:7381": 1, "e:7381": 2})) == "eabcd"


def test_the_nodes_of_the_files_before_come_before_all_others() -> None:
    nodes = [node("a", 10), node("b", 30), node("c", 20)]

    assert names(rank(nodes, ["c:7381", "a:7381"], {"a:7381": 1})) == "cab"


def test_who_could_not_have_the_files_with_an_empty_cache_is_not_asked() -> None:
    full, fits, unknown = node("a", 10, 39), node("b", 10, 40), node("c", None)
    nodes = [each.lacking_room(50) for each in (full, fits, unknown)]

    assert names(rank(nodes, [], {})) == "bc"
    assert nodes[0].trouble == "it has room for 49 bytes at most"


def test_of_a_disk_that_was_not_measured_yet_nothing_is_known() -> None:
    fields = {"name": "", "free_bytes": 0, "used_bytes": 0}
    measured = {"node": "b:1", "name": "b", "capacity_bytes": 9, "free_bytes": 1, "used_bytes": 2}
    status = {"nodes": [{"node": "a:1", "capacity_bytes": 0, **fields}, measured]}

    assert nodes_of_status(status) == [KnownNode("a:1", "a:1"), KnownNode("b:1", "b", 1, 2)]
    assert nodes_of_status({}) == []


@given(
    st.integers(0, 8), st.none() | st.integers(1, 9), st.lists(st.booleans(), min_size=8), st.data()
)
def test_as_many_nodes_as_wanted_have_the_files_or_all_have_been_asked(
    count: int, copies: int | None, ends: list[bool], data: st.DataObject
) -> None:
    nodes = [str(number) for number in range(count)]
    placement = Placement(nodes, copies)
    asked = placement.more()
    under_way = list(asked)
    succeeded = 0
    while under_way:
        placement.check()
        one = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        succeeded += ends[int(one)]
        more = placement.ended(one, succeeded=ends[int(one)])
        asked += more
        under_way += more

    placement.check()
    assert asked == nodes[: len(asked)]  # in their order, and none of them twice
    wanted = count if copies is None else copies
    assert succeeded == wanted or (len(asked) == count and succeeded < wanted)
