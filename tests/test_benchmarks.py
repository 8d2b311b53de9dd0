"""The benchmarks still run, and say what they should. What they measure here means nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import Figure, Spread, in_turns, table

ROOT = Path(__file__).resolve().parent.parent


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("pair", 3),
        ("single", 2),
        ("hit", 1),
        ("api", 2),
        ("small_files", 3),
        ("memory", 3),
        ("many_files", 18),
        pytest.param("swarm", 7, marks=pytest.mark.box),
    ],
)
def test_every_benchmark_runs_in_its_smallest_variant(name: str, count: int) -> None:
    done = run_benchmarks(name, "--quick", "--json")

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["skipped"], result["failed"]) == ({}, [])
    assert len(result["figures"]) == count
    assert all(figure["value"]["median"] > 0 for figure in result["figures"])


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    done = run_benchmarks("pairs")

    assert done.returncode == 2
    assert "pairs: expected one of swarm, pair, single, hit, api" in done.stderr


def test_a_missed_target_is_said_in_words() -> None:
    slow = Figure(
        "a hit",
        Spread.of([30.0, 40.0, 20.0]),
        "ms",
        "nothing",
        Spread.of([10.0]),
        "ratio <= 2",
        False,
    )

    cells = re.split(r" {2,}", table([slow]).splitlines()[2])
    assert cells == [
        "a hit",
        "30.0 (20.0..40.0) ms",
        "nothing: 10.0 ms",
        "3.00",
        "ratio <= 2",
        "NOT MET",
    ]


def test_measurements_take_turns_at_going_first() -> None:
    order: list[str] = []

    def note(name: str) -> float:
        order.append(name)
        return float(len(order))

    first, second = in_turns(lambda: note("a"), lambda: note("b"), 2)

    assert order == ["a", "b", "b", "a"]
    assert (first, second) == ([1.0, 4.0], [2.0, 3.0])
