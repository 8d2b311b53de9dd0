"""The simulator itself: its clock, its network, and what a small simulated cluster shows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simulations.__main__ import main
from simulations.cluster import Cluster
from simulations.disks import Replica, content_digest
from simulations.disturbed_scenarios import tracker_lost
from simulations.engine import Engine, SimulationFailed
from simulations.network import WORTH_HANDING_OUT, Flow, Link, Network
from simulations.readings import RangeReading
from simulations.scenarios import bound_s, flash_crowd
from simulations.settings import ClusterSettings
from simulations.workload_scenarios import racks
from swarmcache.chunks import ChunkLayout, FileVersion
from swarmcache.handover import STAND_IN_GRANTS_S
from swarmcache.peer_events import ReadRange

MiB = 1 << 20
REPOSITORY = Path(__file__).parent.parent


# --- engine ---------------------------------------------------------------------------------------


def test_actions_put_at_one_time_run_in_the_order_in_which_they_were_put() -> None:
    engine = Engine(events_max=100)
    ran: list[object] = []
    engine.at(2.0, ran.append, "last")
    engine.at(1.0, lambda _: engine.at(1.0, ran.append, "put while running"), None)
    for name in ("zeta", "alpha", "mu"):
        engine.at(1.0, ran.append, name)

    engine.run(until_s=math.inf)

    assert ran == ["zeta", "alpha", "mu", "put while running", "last"]
    assert engine.now_s == 2.0


def test_a_simulation_that_never_ends_is_stopped_by_its_number_of_events() -> None:
    engine = Engine(events_max=50)

    def again(_: object) -> None:
        engine.at(engine.now_s, again, None)

    engine.at(0.0, again, None)

    with pytest.raises(SimulationFailed, match="50 events"):
        engine.run(until_s=1.0)


def test_a_simulation_that_waits_too_long_fails_with_the_time() -> None:
    engine = Engine(events_max=50)
    engine.at(7.0, print, None)

    with pytest.raises(SimulationFailed, match=r"5\.000 s"):
        engine.run(until_s=5.0)


# --- network --------------------------------------------------------------------------------------


class Observed(Flow):
    """A flow that notes when it ended."""

    __slots__ = ("complete", "ended_s", "engine")

    def __init__(
        self,
        engine: Engine,
        up: Link,
        down: Link,
        length_bytes: int,
        deadline_s: float = math.inf,
        via: tuple[Link, ...] = (),
    ) -> None:
        super().__init__(up, down, length_bytes, deadline_s, via)
        self.engine = engine
        self.ended_s = math.nan
        self.complete = False

    def ended(self, complete: bool) -> None:
        assert math.isnan(self.ended_s), "ended twice"
        self.ended_s = self.engine.now_s
        self.complete = complete


def links(count: int, rate: float) -> list[Link]:
    return [Link(f"link {index}", rate) for index in range(count)]


def test_one_flow_takes_its_length_over_the_rate_of_the_slower_link() -> None:
    engine = Engine(100)
    flow = Observed(engine, Link("up", 100.0), Link("down", 40.0), 200)

    Network(engine).start(flow)
    engine.run(math.inf)

    assert flow.complete
    assert flow.ended_s == pytest.approx(5.0)


def test_two_flows_share_an_uplink_and_the_one_left_over_gets_all_of_it() -> None:
    """300 bytes at 50 B/s each until 100 are done (2 s), then the other 200 at 100 B/s."""
    engine = Engine(100)
    network = Network(engine)
    up = Link("up", 100.0)
    short, long = (
        Observed(engine, up, down, length)
        for down, length in zip(links(2, 100.0), (100, 300), strict=True)
    )

    network.start(short)
    network.start(long)
    engine.run(math.inf)

    assert short.ended_s == pytest.approx(2.0)
    assert long.ended_s == pytest.approx(4.0)


def test_what_a_flow_with_a_slow_downlink_leaves_goes_to_the_others() -> None:
    """Max-min: the slow one gets its 10 B/s, the fast one the other 90."""
    engine = Engine(100)
    network = Network(engine)
    up = Link("up", 100.0)
    slow = Observed(engine, up, Link("slow", 10.0), 10)
    fast = Observed(engine, up, Link("fast", 1000.0), 900)

    network.start(slow)
    network.start(fast)

    assert slow.rate == pytest.approx(10.0)
    assert fast.rate == pytest.approx(90.0)


def test_a_flow_that_is_not_done_at_its_deadline_ends_there() -> None:
    engine = Engine(100)
    flow = Observed(engine, Link("up", 10.0), Link("down", 10.0), 100, deadline_s=4.0)

    Network(engine).start(flow)
    engine.run(math.inf)

    assert flow.ended_s == 4.0
    assert not flow.complete
    assert flow.up.free == flow.up.rate
    assert flow.down.carried_bytes == 0


def test_a_flow_that_was_stopped_goes_on_with_what_is_left_and_meanwhile_takes_no_rate() -> None:
    engine = Engine(100)
    network = Network(engine)
    up = Link("up", 100.0)
    first, second = (Observed(engine, up, down, 200) for down in links(2, 100.0))
    network.start(first)
    network.start(second)
    engine.at(1.0, network.stop, first)
    engine.at(1.5, lambda _: network.stop(first), None)  # a second time: nothing happens
    engine.at(3.0, network.start, first)

    engine.run(math.inf)

    assert second.ended_s == pytest.approx(2.5)  # 50 bytes until 1 s, then 100 each second
    assert first.ended_s == pytest.approx(4.5)
    assert up.carried_bytes == 400


@given(st.lists(st.tuples(st.floats(0.1, 8.0), st.floats(10, 500)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_link_whose_rate_changes_is_never_overloaded_and_all_its_flows_end(
    changes: list[tuple[float, float]],
) -> None:
    engine = Engine(10_000)
    network = Network(engine)
    up = Link("up", 100.0)
    downs = links(3, 80.0)
    flows = [Observed(engine, up, down, 300) for down in downs]
    for flow in flows:
        network.start(flow)
    for at_s, rate in changes:
        engine.at(at_s, lambda rate: network.set_rate(up, rate), rate)

    while not all(flow.complete for flow in flows):
        engine.step(math.inf)
        _assert_no_link_is_overloaded([up, *downs])

    assert up.carried_bytes == 900


flow_plans = st.lists(
    st.tuples(
        st.floats(0, 10),  # starts, seconds
        st.integers(0, 3),  # uplink
        st.integers(0, 3),  # downlink
        st.integers(1, 1000),  # bytes
        st.sets(st.integers(0, 3), max_size=2),  # links of racks
    ),
    min_size=1,
    max_size=25,
)
link_rates = st.lists(st.floats(1, 1000), min_size=12, max_size=12)


def _assert_no_link_is_overloaded(every_link: list[Link]) -> None:
    for link in every_link:
        used = sum(flow.rate for flow in link.flows)
        assert used <= link.rate * (1 + 1e-9)
        assert link.free == pytest.approx(link.rate - used, abs=link.rate * 1e-9)


@given(flow_plans, link_rates)
@settings(max_examples=60, deadline=None)
def test_no_link_ever_carries_more_than_its_rate_and_bytes_are_conserved(
    plans: list[tuple[float, int, int, int, set[int]]], rates: list[float]
) -> None:
    """What every flow carried, integrated over its rates, is its length when it ends."""
    engine = Engine(100_000)
    network = Network(engine)
    every_link = [Link(f"link {index}", rate) for index, rate in enumerate(rates)]
    flows = []
    for start_s, up, down, length, over in plans:
        via = tuple(every_link[8 + rack] for rack in sorted(over))
        flow = Observed(engine, every_link[up], every_link[4 + down], length, via=via)
        flows.append(flow)
        engine.at(start_s, network.start, flow)
    carried: dict[Flow, float] = dict.fromkeys(flows, 0.0)
    while not all(flow.complete for flow in flows):
        before_s = engine.now_s
        rates_before = [(flow, flow.rate) for link in every_link[:4] for flow in link.flows]
        engine.step(math.inf)
        for moving, rate in rates_before:
            carried[moving] += rate * (engine.now_s - before_s)
        _assert_no_link_is_overloaded(every_link)

    for flow in flows:
        assert carried[flow] == pytest.approx(flow.length_bytes, rel=1e-6)
    for link in every_link:
        ended = [flow for flow in flows if link in flow.links]
        assert link.carried_bytes == sum(flow.length_bytes for flow in ended)


@example([(2.0, 1), (3.0, 2), (2.0, 1)], 5.0)
@given(
    st.lists(st.tuples(st.floats(1, 1000), st.integers(1, 1000)), min_size=1, max_size=12),
    st.floats(1, 1000),
)
@settings(max_examples=60, deadline=None)
def test_no_rate_lies_idle_that_a_flow_could_use(
    sources: list[tuple[float, int]], down_rate: float
) -> None:
    """One flow from each source: when one ends, what it leaves goes to those that have room."""
    engine = Engine(100_000)
    network = Network(engine)
    down = Link("down", down_rate)
    flows = [Observed(engine, Link("up", rate), down, length) for rate, length in sources]
    for flow in flows:
        network.start(flow)
    while not all(flow.complete for flow in flows):
        engine.step(math.inf)
        if down.free > down.rate * WORTH_HANDING_OUT:
            for moving in down.flows:
                assert moving.up.free <= moving.up.rate * WORTH_HANDING_OUT


def test_what_goes_from_rack_to_rack_shares_the_links_of_the_racks_and_nothing_else_does() -> None:
    """Two flows leave a rack whose link has 100 B/s; the third stays inside, at its own 100 B/s."""
    engine = Engine(100)
    network = Network(engine)
    rack_up = Link("rack up", 100.0)
    ups, downs = links(3, 100.0), links(3, 100.0)
    out = [Observed(engine, ups[each], downs[each], 100, via=(rack_up,)) for each in (0, 1)]
    inside = Observed(engine, ups[2], downs[2], 100)
    for flow in (*out, inside):
        network.start(flow)

    engine.run(math.inf)

    assert [flow.ended_s for flow in out] == [pytest.approx(2.0)] * 2
    assert inside.ended_s == pytest.approx(1.0)
    assert rack_up.carried_bytes == 200


@pytest.mark.slow
def test_each_chunk_comes_into_a_rack_about_once_if_nodes_know_where_they_stand() -> None:
    settings = small(nodes=32, check_every=1000)
    result = racks(settings, 4 * MiB)
    untold = racks(replace(settings, rack_labels=False), 4 * MiB)

    assert 1.0 <= result.into_racks < 1.5
    assert untold.into_racks > 4 * result.into_racks
    assert result.amplification == untold.amplification == 1.0
    assert 0 < result.efficiency < 1


# --- clusters -------------------------------------------------------------------------------------


def small(**changes: float) -> ClusterSettings:
    plain = {"nodes": 8, "seed": 1, "node_rate": 25e6, "file_server_rate": 25e6, "check_every": 1}
    return ClusterSettings(**(plain | changes))  # type: ignore[arg-type]


def test_the_bound_is_that_of_the_slower_of_file_server_and_node() -> None:
    slow_server = small(file_server_rate=10e6)
    slow_nodes = small(node_rate=10e6, file_server_rate=100e6)

    assert bound_s(100_000_000, slow_server) == pytest.approx(10.0)
    assert bound_s(100_000_000, slow_nodes) == pytest.approx(10.0)


@pytest.mark.slow
def test_every_node_of_a_flash_crowd_gets_the_file_and_each_byte_leaves_the_server_once() -> None:
    """Every machine checks itself at every event; digests and answers are checked at the end."""
    result = flash_crowd(small(), 16 * MiB)

    assert result.amplification == 1.0
    assert 1 <= result.readers_peak <= 8
    assert 0 < result.efficiency <= 1
    assert result.first_node_s <= result.median_node_s <= result.last_node_s


def test_a_file_of_one_byte_comes_to_two_nodes() -> None:
    result = flash_crowd(small(nodes=2), 1)

    assert result.amplification == 1.0
    assert result.last_node_s > 0


@pytest.mark.parametrize("slots_max", [1, 3])
def test_no_more_nodes_read_than_there_are_slots(slots_max: int) -> None:
    result = flash_crowd(small(slots_max=slots_max, nodes=6, check_every=100), 8 * MiB)

    assert result.readers_peak == slots_max


@pytest.mark.slow
def test_a_crowd_that_loses_its_tracker_for_good_is_served_by_a_stand_in() -> None:
    result = tracker_lost(ClusterSettings(nodes=6, seed=1, slots_max=3), 64 * MiB)

    assert (result.originals, result.amplification, result.requests) == (0, 1.0, 6)
    assert result.readers_peak <= 3
    # A stand-in grants after five seconds, and the other half takes no longer than without faults.
    assert result.last_node_s <= STAND_IN_GRANTS_S + 3 * result.bound_s


def test_one_reader_above_the_slots_ends_the_simulation() -> None:
    """The checker must be able to fail: reads are begun that nobody granted."""
    cluster = Cluster(small(nodes=3, slots_max=2))
    read = ReadRange(b"v" * 32, lease_id=1, first=0, count=1)
    layout = ChunkLayout(MiB, MiB)
    first, second, third = (RangeReading(node, read, layout, 0.0) for node in cluster.node_list)
    cluster.file_server.enter(first, 0.0)
    cluster.file_server.enter(second, 0.0)

    with pytest.raises(SimulationFailed, match="3 readers"):
        cluster.file_server.enter(third, 0.0)


def test_a_wrong_chunk_on_a_disk_is_found() -> None:
    cluster = Cluster(small(nodes=1))
    version = FileVersion(b"/export/file", MiB, 0)
    replica = Replica(ChunkLayout(MiB, MiB), {0: b"x" * 32}, published=True)
    node = next(iter(cluster.nodes.values()))
    node.disk.replicas[version.version_id] = replica

    with pytest.raises(SimulationFailed, match="wrong chunk 0"):
        cluster.check_replica(node, version)
    replica.digests[0] = content_digest(version.version_id, replica.layout, 0)
    cluster.check_replica(node, version)


def _run(arguments: list[str], hash_seed: str) -> str:
    command = [sys.executable, "-m", "simulations", "flash_crowd", *arguments, "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_a_seed_gives_the_same_json_in_two_processes_and_another_seed_another_trace() -> None:
    arguments = ["--nodes", "12", "--size", "8MiB", "--rate", "25MB/s"]
    first = _run([*arguments, "--seed", "7"], hash_seed="1")
    again = _run([*arguments, "--seed", "7"], hash_seed="2")
    other = _run([*arguments, "--seed", "8"], hash_seed="1")

    assert first == again
    assert first.count("\n") == 1
    result = json.loads(first)
    assert result["nodes"] == 12
    assert result["size_bytes"] == 8 * MiB
    assert result["seed"] == 7
    assert result["trace_digest"] != json.loads(other)["trace_digest"]
    for figure in ("efficiency", "amplification", "readers_peak", "last_node_s", "bound_s"):
        assert result[figure] > 0


def test_a_size_that_is_none_is_refused_with_what_was_expected(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["flash_crowd", "--size", "big"])

    assert ended.value.code == 2
    assert "expected a size such as" in capsys.readouterr().err
