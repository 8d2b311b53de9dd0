"""Simulations that are compiled do the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simulations import compiled
from simulations.catalogue import SCENARIOS
from simulations.settings import ClusterSettings

# Those of the machines that count: to compile all that the command compiles takes a minute.
SOME_MODULES = (
    "swarmcache/chunk_picker.py",
    "swarmcache/chunks.py",
    "swarmcache/download.py",
    "swarmcache/timers.py",
    "swarmcache/upload_slots.py",
    "swarmcache/rack_view.py",
)


@pytest.mark.slow
def test_a_compiled_simulation_has_the_same_trace(tmp_path: Path) -> None:
    if problem := compiled.missing():
        pytest.skip(problem)
    copy = compiled.compiled_copy(tmp_path, SOME_MODULES, optimization="0")
    size_bytes = 16 << 20
    command = [sys.executable, "-P", "-m", "simulations", "racks"]
    command += ["--nodes", "20", "--size", str(size_bytes), "--seed", "3", "--json"]
    environment = compiled.environment(copy)
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)

    assert {each.name.partition(".")[0] for each in copy.rglob("*.so")} >= {"download", "timers"}
    expected = SCENARIOS["racks"](ClusterSettings(20, seed=3), size_bytes, None)
    assert json.loads(run.stdout)["trace_digest"] == expected.trace_digest
    assert compiled.compiled_copy(tmp_path, SOME_MODULES, optimization="0") == copy
