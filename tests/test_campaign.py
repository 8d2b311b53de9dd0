"""Clusters of the machines in virtual time, with faults: seeds of the campaign, and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from simulations import campaign
from simulations.cluster import Cluster
from simulations.engine import SimulationFailed
from simulations.faults import Fault
from simulations.plans import THEMES, WITHOUT_TRACKER, draw
from simulations.planted_bugs import BUGS, find, planted
from simulations.seed_run import run_plan
from simulations.settings import ClusterSettings
from simulations.shrink import smallest
from simulations.workload_scenarios import copy_storm
from simulations.writers import Writer
from swarmcache.download import Download
from swarmcache.peer_events import AnswerSlot
from tests.found_plans import FOUND

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("what", FOUND)
def test_a_plan_that_once_found_something_finds_it_no_more(what: str) -> None:
    assert run_plan(FOUND[what]).failure is None


@pytest.mark.slow
def test_a_few_seeds_of_the_campaign_keep_every_promise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert campaign.main(["--seeds", "12", "--first-seed", "40", "--json"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["seeds"] == 12
    assert result["failed_seed"] is None
    assert result["faults_total"] > 0
    assert result["invariants_total"] > 10_000


def _campaign(hash_seed: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "simulations", "campaign", "--json", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_seeds_give_the_same_traces_in_one_process_and_in_several() -> None:
    seeds = ("--first-seed", "7", "--seeds", "6")

    alone = _campaign("1", *seeds)

    assert _campaign("2", *seeds, "--processes", "2") == alone
    assert (
        json.loads(alone)["trace_digest"]
        != json.loads(_campaign("1", "--first-seed", "8", "--seeds", "6"))["trace_digest"]
    )


def test_a_seed_is_always_the_same_plan_and_all_themes_are_drawn() -> None:
    assert draw(5) == draw(5)
    assert {draw(seed).theme for seed in range(200)} == {*THEMES, WITHOUT_TRACKER}


def test_the_smallest_list_of_faults_has_those_that_are_needed_and_no_other() -> None:
    faults = [Fault(float(number), "chunk reset") for number in range(40)]
    needed = {faults[3], faults[17], faults[39]}
    tried = 0

    def fails(some: Sequence[Fault]) -> bool:
        nonlocal tried
        tried += 1
        return needed <= set(some)

    assert set(smallest(faults, fails)) == needed
    assert tried < 100
    assert smallest(faults, lambda _: True) == []


def test_every_planted_bug_applies_and_is_taken_out_again() -> None:
    """One that does not is no bug that could be found: its function has changed."""
    former = Download.chunk_corrupt.__code__

    for bug in BUGS:
        with planted(bug):
            pass

    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20
    assert Download.chunk_corrupt.__code__ is former


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "a chunk whose request failed is forgotten",
        "a request that has ended still counts",
        "an old replica is not offered",
        "heartbeats renew nothing",
        "the last chunk is not waited for",
    ],
)
def test_a_planted_bug_is_found_within_a_few_seeds(name: str) -> None:
    """All of them, with up to 1,000 seeds each, takes ``python -m simulations planted_bugs``."""
    (bug,) = [bug for bug in BUGS if bug.name == name]

    assert find(bug, range(20)) is not None


def test_copies_and_crowds_share_the_slots_and_every_copy_gets_through() -> None:
    """The file server itself counts who reads and writes, and ends the run with one too many."""
    settings = ClusterSettings(nodes=8, seed=1, node_rate=25e6, file_server_rate=25e6, slots_max=2)

    result = copy_storm(settings, 4 << 20)

    assert result.copies == 2
    assert result.last_copy_s > 0
    assert result.readers_peak == 2
    assert result.amplification == 1.0


def test_a_client_that_is_told_more_and_more_without_an_answer_ends_the_simulation() -> None:
    """The checker must be able to fail."""
    cluster = Cluster(ClusterSettings(nodes=1, seed=1, originals=True))
    cluster.connect_all()
    writer = Writer(cluster.node_list[0], 1 << 20)
    cluster.writers.write(writer)
    cluster.writers.stop(writer)
    assert writer.request is not None
    for until_s in (None, 1.0):
        cluster.writers.told(writer.node, AnswerSlot(writer.request, until_s))

    with pytest.raises(SimulationFailed, match="does not answer"):
        cluster.writers.told(writer.node, AnswerSlot(writer.request, 2.0))
