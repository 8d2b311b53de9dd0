"""The tracker's figures: nothing counted twice or backwards, and waits as long as they were."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarmcache.messages import NodeTotals
from swarmcache.slot_ledger import SlotLedger
from swarmcache.tracker_statistics import TrackerStatistics, statistics_line
from tests.local_daemons import LocalDaemons

SLOTS = 2
claims = st.sampled_from([b"a", b"b", b"c", b"d"])


class Waiting(RuleBasedStateMachine):
    """However claims come, get slots and go, the waits are those that somebody with a stop watch
    for each claim would have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = TrackerStatistics(None, 0.0)
        self.server = self.statistics.of_server("nfs")
        self.ledger = SlotLedger(SLOTS, self.server)
        self.now_s = 0.0
        self.next_id = 1
        self.watches_s: dict[bytes, float] = {}
        self.waits_s: list[float] = []

    def look(self) -> None:
        """Start and stop the watches by what the ledger is now."""
        served = {lease.claim for lease in self.ledger.leases.values()}
        standing = {claim for claim, _ in self.ledger.waiting()}
        for claim in list(self.watches_s):
            if claim not in standing or claim in served:
                waited_s = self.now_s - self.watches_s.pop(claim)
                if claim in served and waited_s:
                    self.waits_s.append(waited_s)
        for claim in standing - served:
            self.watches_s.setdefault(claim, self.now_s)

    @rule(seconds=st.integers(1, 5))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds
        self.statistics.at(self.now_s)

    @rule(claim=claims)
    def claim(self, claim: bytes) -> None:
        self.ledger.claim(claim, "ada")
        self.look()

    @rule(claim=claims)
    def withdraw(self, claim: bytes) -> None:
        self.ledger.withdraw(claim, "ada")
        self.look()

    @precondition(lambda self: self.ledger.free and any(self.ledger.waiting()))
    @rule(last=st.booleans())
    def grant(self, last: bool) -> None:
        claim, user = next(self.ledger.waiting())
        self.ledger.grant(self.next_id, claim, "node", user, self.now_s + 3)
        self.next_id += 1
        self.look()
        if last:
            self.ledger.withdraw(claim, user)
            self.look()

    @precondition(lambda self: self.ledger.leases)
    @rule()
    def release(self) -> None:
        self.ledger.release(next(iter(self.ledger.leases)))
        self.look()

    @invariant()
    def the_figures_are_right(self) -> None:
        self.server.check()
        figures = self.server.figures
        assert figures.waits == len(self.waits_s)
        assert figures.wait_s == sum(self.waits_s)
        assert figures.wait_max_s == max(self.waits_s, default=0)
        report: Any = self.statistics.since_start(0)
        (server,) = report["file_servers"]
        assert server["waiting"] == len(self.watches_s)
        longest_s = max((self.now_s - since_s for since_s in self.watches_s.values()), default=0)
        assert server["waiting_longest_s"] == longest_s


Waiting.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestWaiting = Waiting.TestCase


@dataclass
class Life:
    """A daemon. ``heard``: what the tracker has been told of this life; None: nothing yet."""

    number: int
    bytes: int = 0
    heard: int | None = None


@dataclass
class Told:
    """Two nodes, and a tracker that adds up what they tell, over any restarts of any of them."""

    statistics: TrackerStatistics = field(default_factory=lambda: TrackerStatistics(None, 0.0))
    nodes: list[Life] = field(default_factory=lambda: [Life(1), Life(2)])
    lives: int = 2
    expected: int = 0

    def do(self, what: str, node: int, size_bytes: int) -> None:
        life = self.nodes[node]
        match what:
            case "receive":
                life.bytes += size_bytes
            case "restart node":
                self.lives += 1
                self.nodes[node] = Life(self.lives)
            case "restart tracker":
                self.statistics = TrackerStatistics(None, 0.0)
                self.expected = 0
                for each in self.nodes:
                    each.heard = None
            case _:
                totals = NodeTotals(life.number, from_peers_bytes=life.bytes)
                self.statistics.node_told(f"node {node}", totals)
                if life.heard is not None:
                    self.expected += life.bytes - life.heard
                life.heard = life.bytes

    def bytes_counted(self) -> object:
        self.statistics.check({})
        return self.statistics.since_start(0)["from_peers_bytes"]


steps = st.tuples(
    st.sampled_from(["receive", "tell", "tell", "restart node", "restart tracker"]),
    st.integers(0, 1),
    st.integers(0, 1000),
)


@given(st.lists(steps, max_size=40))
def test_bytes_from_peers_are_counted_once_whoever_restarts(history: list[Any]) -> None:
    told = Told()
    for what, node, size_bytes in history:
        told.do(what, node, size_bytes)
        assert told.bytes_counted() == told.expected


def test_totals_that_shrink_within_a_life_count_nothing_and_go_on_from_there() -> None:
    statistics = TrackerStatistics(None, 0.0)
    for from_peers_bytes in (100, 700, 50, 60):
        statistics.node_told("n", NodeTotals(1, from_peers_bytes=from_peers_bytes))
        statistics.check({})

    assert statistics.since_start(1)["from_peers_bytes"] == 600 + 10


def test_nothing_is_reported_when_nothing_has_happened() -> None:
    statistics = TrackerStatistics(600.0, 0.0)
    statistics.node_told("n", NodeTotals(1, hits=3, requests=3))
    statistics.at(500.0)
    statistics.node_told("n", NodeTotals(1, hits=3, requests=3))

    assert statistics.wake_at_s() is None


def test_a_report_comes_an_interval_after_the_first_news_and_tells_these_alone() -> None:
    statistics = TrackerStatistics(600.0, 0.0)
    nfs = statistics.of_server("nfs")
    statistics.at(100.0)
    nfs.read_begins()
    nfs.read(1000)
    assert statistics.wake_at_s() == 700.0
    statistics.at(699.0)
    assert statistics.take_report(3) is None
    statistics.at(700.0)
    first: Any = statistics.take_report(3)
    assert (first["period_s"], first["file_servers"][0]["read_bytes"]) == (700.0, 1000)
    assert statistics.wake_at_s() is None

    statistics.at(1000.0)
    nfs.read(1)
    nfs.failed()
    statistics.at(1600.0)
    second: Any = statistics.take_report(3)
    (server,) = second["file_servers"]
    assert (second["period_s"], server["reads"], server["read_bytes"]) == (900.0, 0, 1)
    whole: Any = statistics.since_start(3)
    assert whole["file_servers"][0]["read_bytes"] == 1001


def test_the_longest_wait_of_an_interval_is_not_that_of_an_earlier_one() -> None:
    statistics = TrackerStatistics(10.0, 0.0)
    nfs = statistics.of_server("nfs")
    found: list[Any] = []
    for number, wait_s in enumerate((7.0, 2.0)):
        nfs.queued(b"claim")
        statistics.at(statistics.now_s + wait_s)
        nfs.held(b"claim")
        nfs.write_begins()
        nfs.withdrawn(b"claim")
        nfs.released(b"claim")
        statistics.at(100.0 * (number + 1))
        found.append(statistics.take_report(1))

    assert [report["file_servers"][0]["wait_max_s"] for report in found] == [7.0, 2.0]
    whole: Any = statistics.since_start(1)
    assert whole["file_servers"][0]["wait_max_s"] == 7.0


def test_the_line_for_the_log_names_every_figure() -> None:
    statistics = TrackerStatistics(1.0, 0.0)
    statistics.node_told("n", NodeTotals(1))
    statistics.node_told("n", NodeTotals(1, 11, 7, 5, 2048))
    statistics.holders_changed(0, 1)
    statistics.holders_changed(1, 2)
    statistics.holders_changed(0, 1)
    nfs = statistics.of_server("nfs01:/export")
    statistics.of_server("idle:/export")
    nfs.queued(b"claim")
    statistics.at(3.0)
    nfs.held(b"claim")
    nfs.read_begins()
    nfs.read(4096)
    nfs.ran_out()
    report = statistics.take_report(9)
    assert report is not None

    line = statistics_line(report)

    assert re.match(r"in 3 s: 11 requests, 7 of them hits; 5 chunks with 2048 bytes", line)
    assert "9 nodes; 2 files with 1.5 replicas (at most 2); nfs01:/export: 1 ranges with" in line
    assert "4096 bytes read, 0 leases to write, 1 ran out, 0 failed, 1 waits" in line
    assert "(mean 3 s, longest 3 s), 0 waiting" in line
    assert "idle" not in line


@pytest.mark.slow
def test_a_daemon_counts_requests_and_hits_however_they_are_asked_for(tmp_path: Path) -> None:
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        files = [tmp_path / "sources" / str(number) for number in range(3)]
        files[0].parent.mkdir()
        for file in files:
            file.write_bytes(b"data of " + bytes(file))
        node = local.start_daemon("a", f'[file_servers.fs]\npaths = ["{files[0].parent}"]\n')
        node.get(files[0])
        node.get(files[0])
        node.get(*files)  # the first one is a hit
        node.get(*files)

        totals = node.status()["node"]["totals"]
        assert (totals["requests"], totals["hits"]) == (8, 5)
