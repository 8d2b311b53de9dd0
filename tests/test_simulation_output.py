"""What ``python -m simulations`` prints and draws, and the models that it compares with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.__main__ import main
from simulations.catalogue import SCENARIOS
from simulations.comparisons import METHODS, PREDECESSOR_SERVER_SLOTS, Comparison, run_method
from simulations.scenarios import bound_s, churn, flash_crowd, gray_nodes
from simulations.settings import ClusterSettings

MIB = 1 << 20
SMALL = ["--nodes", "6", "--size", "4MiB"]


def run(method: str, nodes: int = 12, size_bytes: int = 16 * MIB, **more: float) -> Comparison:
    settings = ClusterSettings(nodes, seed=1, **more)  # type: ignore[arg-type]
    return run_method(method, settings, size_bytes, bound_s(size_bytes, settings))


def test_the_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SCENARIOS)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--list"], ["compare", "--nodes", "4", "--size", "1MiB"]])
def test_who_has_seen_enough_is_told_nothing_more(words: list[str]) -> None:
    """As ``| head`` has."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody_reads:
        done = subprocess.run(
            [sys.executable, "-m", "simulations", *words],
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            check=False,
        )

    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_the_json_of_every_scenario_has_the_promised_figures(
    scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([scenario, *SMALL, "--json"]) == 0

    (line,) = capsys.readouterr().out.splitlines()
    promised = {"efficiency", "amplification", "readers_peak", "last_node_s", "bound_s"}
    assert promised | {"trace_digest"} <= json.loads(line).keys()


def test_smaller_chunks_are_more_messages_and_less_is_lost_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = {}
    for size in ("auto", "256KiB", "1MiB"):
        assert main(["flash_crowd", *SMALL, "--chunk-size", size, "--json"]) == 0
        results[size] = json.loads(capsys.readouterr().out)

    assert results["auto"] == results["256KiB"]  # the smallest there are
    assert results["256KiB"]["messages"] > results["1MiB"]["messages"]
    assert results["256KiB"]["efficiency"] > results["1MiB"]["efficiency"]


def test_a_chunk_size_that_no_daemon_takes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["flash_crowd", "--chunk-size", "3MiB"])

    assert 'expected "auto" or a power of two from 256KiB to 16MiB' in capsys.readouterr().err


def test_a_plot_is_drawn_and_the_figures_are_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "crowd.png"

    assert main(["flash_crowd", *SMALL, "--plot", str(path)]) == 0

    assert path.read_bytes().startswith(b"\x89PNG")
    assert "efficiency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    [("crowd.txt", "ends in .png"), ("missing/crowd.png", "no such directory")],
)
def test_what_cannot_be_drawn_is_refused_before_the_run(
    name: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["flash_crowd", *SMALL, "--plot", str(tmp_path / name)])

    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_who_watches_changes_nothing() -> None:
    settings = ClusterSettings(nodes=20, seed=3)
    seen: list[float] = []

    watched = flash_crowd(settings, 64 * MIB, lambda cluster: seen.append(cluster.done))

    assert seen, "a run so short that nobody looks"
    assert sorted(seen) == seen
    assert 0.0 <= seen[0] <= seen[-1] <= 1.0
    assert flash_crowd(settings, 64 * MIB).as_json() == watched.as_json()


def test_killed_nodes_do_not_count_and_the_others_get_the_file() -> None:
    result = churn(ClusterSettings(nodes=20, seed=1), 32 * MIB)

    assert len(result.observed.answered_s) == 18
    assert result.amplification <= 1.1


def test_gray_nodes_do_not_count_and_send_less() -> None:
    result = gray_nodes(ClusterSettings(nodes=20, seed=1), 32 * MIB)

    assert len(result.observed.answered_s) == 19
    sent = sorted(result.observed.sent_bytes)
    assert sent[0] < sent[1] / 2


def test_every_method_brings_the_file_to_all_nodes_not_faster_than_the_bound() -> None:
    for method in METHODS:
        result = run(method)

        assert 0.0 < result.efficiency <= 1.0, method
        assert result.server_bytes >= 16 * MIB, method


def test_cp_shares_the_rate_of_the_file_server_which_thrashes() -> None:
    kind, unkind = run("cp"), run("cp", reader_cost=0.1)

    assert kind.last_node_s == pytest.approx(12 * 16 * MIB / 125e6)
    assert unkind.last_node_s == pytest.approx(kind.last_node_s * (1 + 0.1 * 11))
    assert (kind.server_bytes, kind.readers_peak) == (12 * 16 * MIB, 12)


def test_whole_files_are_read_under_slots_and_polled_for_in_vain() -> None:
    result = run("whole files", nodes=50)

    assert result.readers_peak == PREDECESSOR_SERVER_SLOTS
    assert result.server_bytes < 50 * 16 * MIB
    assert result.last_node_s > 10.0


def test_a_tree_has_two_children_everywhere_and_a_chain_one() -> None:
    trees, chains = run("tree"), run("chain")

    chunk_s = 256 * 1024 / 125e6
    assert trees.server_bytes == 2 * 16 * MIB
    # The last leaf: everybody above sends at half the rate, and each hop takes one such chunk more.
    assert trees.last_node_s == pytest.approx(2 * chunk_s * (64 + 2), rel=0.05)
    assert chains.server_bytes == 16 * MIB
    assert chains.last_node_s == pytest.approx(chunk_s * (64 + 11))


def test_a_random_swarm_reads_some_chunks_twice_and_never_with_more_than_the_slots() -> None:
    result = run("random swarm", slots_max=3)

    assert 16 * MIB < result.server_bytes < 3 * 16 * MIB
    assert result.readers_peak == 3


def test_the_table_compares_swarmcache_with_the_methods_that_were_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ["--method", "cp", "--method", "swarmcache"]
    assert main(["compare", "--nodes", "4", "8", "--size", "8MiB", *chosen]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0].isalpha()] == ["cp", "swarmcache"] * 2


def test_a_comparison_in_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--nodes", "4", "--size", "4MiB", "--json"]) == 0

    (line,) = capsys.readouterr().out.splitlines()
    assert [row["method"] for row in json.loads(line)] == [*METHODS, "swarmcache"]
