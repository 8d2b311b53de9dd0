"""Real daemons without their tracker: one of them stands in for it, until it is back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.box import Box, Host, wait_until
from tests.swarm_helpers import MIB, PATIENCE_S, Swarm

pytestmark = [pytest.mark.box, pytest.mark.slow]

# A file server as slow as this reads 16 MiB in 7 s: time to break something meanwhile.
SLOW_MBIT = 20.0
STALL_S = 5.0
# A daemon's and a client's start, and the last answer, on a busy machine.
STALL_GRACE_S = 3.0

MakeSwarm = Callable[..., Swarm]


@pytest.fixture
def make_swarm(tmp_path: Path) -> Iterator[MakeSwarm]:
    """Makes a running swarm whose nodes know one another."""
    with ExitStack() as stack:

        def make(hosts: int, *, slots_max: int = 2, file_server_mbit: float | None = None) -> Swarm:
            box = stack.enter_context(Box(hosts=hosts, rate_mbit=200.0, directory=tmp_path))
            if file_server_mbit is not None:
                box.fs.shape(up_mbit=file_server_mbit, down_mbit=file_server_mbit)
            swarm = Swarm(box, {"file_servers.default.slots_max": slots_max})
            swarm.start()
            for node in box.nodes:
                swarm.wait_for(
                    node,
                    lambda status: status["node"]["gossip"]["others"] == hosts - 1,
                    "the others in the gossip",
                )
            return swarm

        yield make


def kill_tracker(swarm: Swarm) -> None:
    assert swarm.cluster.tracker is not None
    swarm.box.head.kill(swarm.cluster.tracker)


def stand_in_of(swarm: Swarm, nodes: list[Host]) -> Host:
    """The node that all of these come to use as their tracker."""
    names = {swarm.node_id(node): node for node in swarm.box.nodes}

    def agreed() -> Host | None:
        used = {swarm.status(node)["node"]["stand_in"] for node in nodes}
        return names.get(used.pop()) if len(used) == 1 and None not in used else None

    found = wait_until(agreed, PATIENCE_S, "one stand-in for all")
    assert found is not None
    return found


def test_a_file_that_one_node_holds_is_found_without_the_tracker(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(4)
    file = swarm.put("corpus", 16 * MIB)
    holder, *others = swarm.box.nodes
    swarm.assert_all_cached(swarm.get_everywhere(file, [holder]), file)
    read_before = swarm.box.file_server.bytes_read()

    kill_tracker(swarm)
    swarm.assert_all_cached(swarm.get_everywhere(file, others), file)

    assert swarm.box.file_server.bytes_read() == read_before


def test_a_cold_file_is_read_once_by_few_without_the_tracker(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(5, slots_max=2)
    file = swarm.put("corpus", 32 * MIB)

    kill_tracker(swarm)
    swarm.assert_all_cached(swarm.get_everywhere(file), file)

    assert swarm.box.file_server.readers_peak(file) <= 2
    assert swarm.box.file_server.bytes_read(file) <= 1.01 * 32 * MIB
    stand_in = stand_in_of(swarm, swarm.box.nodes)
    status = swarm.status(stand_in)
    assert not status["node"]["tracker_connected"]
    assert len(status["cluster"]["nodes"]) == 5


def test_a_stand_in_that_is_killed_is_stood_in_for_as_well(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(4, slots_max=1, file_server_mbit=SLOW_MBIT)
    kill_tracker(swarm)
    first = stand_in_of(swarm, swarm.box.nodes)
    others = [node for node in swarm.box.nodes if node is not first]
    file = swarm.put("corpus", 16 * MIB)
    gets = swarm.get_everywhere(file, others)
    swarm.wait_for_done(others[0], MIB)

    first.kill(swarm.cluster.daemons[first.name])

    swarm.assert_all_cached(gets, file)
    assert swarm.box.file_server.readers_peak(file) == 1
    assert stand_in_of(swarm, others) in others


@pytest.mark.parametrize("fault", ["killed", "stopped", "cut off"])
def test_when_the_tracker_is_back_it_goes_on_within_the_limit(
    make_swarm: MakeSwarm, fault: str
) -> None:
    swarm = make_swarm(4, slots_max=1, file_server_mbit=SLOW_MBIT)
    tracker = swarm.cluster.tracker
    assert tracker is not None
    head = swarm.box.head
    begin: dict[str, Callable[[], object]] = {
        "killed": lambda: head.kill(tracker),
        "stopped": lambda: head.stop(tracker),
        "cut off": head.cut_off,
    }
    begin[fault]()
    stand_in_of(swarm, swarm.box.nodes)
    file = swarm.put("corpus", 24 * MIB)
    gets = swarm.get_everywhere(file)
    swarm.wait_for_done(swarm.box.nodes[0], 4 * MIB)

    end: dict[str, Callable[[], object]] = {
        "killed": swarm.cluster.start_tracker,
        "stopped": lambda: head.cont(tracker),
        "cut off": head.heal,
    }
    end[fault]()
    swarm.wait_for_tracker(swarm.box.nodes)
    assert any(get.returncode is None for get in gets), "the tracker was back too late"

    swarm.assert_all_cached(gets, file)
    assert swarm.box.file_server.readers_peak(file) == 1
    assert all(swarm.status(node)["node"]["stand_in"] is None for node in swarm.box.nodes)


def test_a_node_that_reaches_nobody_prints_the_original_path_in_time(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    node, other = swarm.box.nodes
    file = swarm.put("corpus", MIB)
    other.cut_off()
    kill_tracker(swarm)

    begin_s = time.monotonic()
    get = swarm.cluster.get(node, file)
    assert swarm.paths([get]) == [file]
    assert time.monotonic() - begin_s <= STALL_S + STALL_GRACE_S
    assert "no progress for 5 s" in get.stderr
    assert swarm.box.file_server.bytes_read() == 0
