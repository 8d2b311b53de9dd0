"""The gossip scenarios, small: what is promised of a thousand nodes holds of thirty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.__main__ import main
from simulations.gossip_cluster import GossipSettings
from simulations.gossip_scenarios import GossipResult, run_scenarios

pytestmark = pytest.mark.slow


def run(
    scenarios: str, duration_s: float, *, nodes: int = 30, loss: float = 0.1, seed: int = 1
) -> GossipResult:
    settings = GossipSettings(nodes, seed, loss, check_every=50)
    return run_scenarios(scenarios.split(), settings, duration_s)


def figure(result: GossipResult, name: str) -> float:
    value = result.figures[name]
    assert value is not None, f"{name}: not in time"
    return value


def test_a_status_is_hardly_older_than_a_period_and_costs_little() -> None:
    result = run("steady", 25.0)

    assert figure(result, "age_mean_s") <= 9.0
    assert figure(result, "age_p99_s") <= 20.0
    assert figure(result, "sent_mean_bytes_per_s") <= 1_500


@pytest.mark.parametrize(("scenario", "seed"), [("change", 1), ("leave", 4)])
def test_what_everybody_should_know_at_once_is_known_in_less_than_13_rounds(
    scenario: str, seed: int
) -> None:
    result = run(scenario, 5.0, loss=0.25, seed=seed)  # with 4, three copies of one get lost

    assert figure(result, f"{scenario}_99_max_rounds") <= 13


def test_crashes_are_known_to_all_within_20_seconds_and_are_for_good() -> None:
    result = run("leave crash", 10.0, nodes=17)

    assert figure(result, "crash_all_max_s") <= 20.0
    assert figure(result, "leave_came_back") == figure(result, "crash_came_back") == 0
    assert figure(result, "false_convictions") == 0


@pytest.mark.parametrize("scenario", ["stalls", "sick_node"])
def test_nobody_is_declared_dead_because_of_trouble_elsewhere(scenario: str) -> None:
    result = run(scenario, 100.0, nodes=20)

    assert figure(result, "false_convictions") == 0


def test_two_halves_know_each_other_again_within_30_seconds() -> None:
    result = run("partition", 90.0, nodes=20)

    assert figure(result, "known_apart_mean") == 9
    assert figure(result, "known_all_s") <= 30.0


def test_all_know_all_within_a_minute_when_all_were_restarted() -> None:
    result = run("restart", 60.0)

    assert figure(result, "known_all_s") <= 50.0
    assert figure(result, "sent_p99_bytes_per_s") <= 16_000


def test_the_command_prints_json_that_repeats_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gossip.png"
    asked = ["gossip", "steady", "change", "--nodes", "6", "--duration", "12s", "--json"]

    assert main([*asked, "--plot", str(path)]) == 0
    assert main(asked) == 0

    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    expected = {"age_mean_s", "change_99_max_s", "sent_p99_bytes_per_s", "trace_digest"}
    assert expected <= json.loads(first).keys()
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_restart_in_the_middle_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gossip", "steady", "restart"])

    assert "can only come first" in capsys.readouterr().err


def test_a_loss_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gossip", "quiet", "--loss", "1.5"])

    assert "expected a part from 0 to 1" in capsys.readouterr().err
