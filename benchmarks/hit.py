"""What a job waits for when the file is there already: a whole ``swarmcache get`` process.

Beside it, in turns, the least that any program in Python takes: ``python3 -c pass`` of the same
interpreter.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.local_cluster import LocalCluster, run_timed
from benchmarks.report import Figure, Options, Spread, in_turns

PAIRS = 40
RATIO_MAX = 2.5


def measure(options: Options) -> list[Figure]:
    """One figure."""
    with tempfile.TemporaryDirectory(prefix="swarmcache-bench-") as directory:
        file = Path(directory, "file")
        file.write_bytes(b"cached")
        with LocalCluster(Path(directory)) as cluster:
            node = cluster.nodes[0]

            def hit() -> float:
                return node.get(file)[1] * 1e3

            hit()  # the miss before the hits
            hits_ms, passes_ms = in_turns(hit, _start_python, options.choose_runs(PAIRS))
    ours, theirs = Spread.of(hits_ms), Spread.of(passes_ms)
    met = ours.median <= RATIO_MAX * theirs.median
    target = f"ratio <= {RATIO_MAX}"
    return [Figure("hit from the shell", ours, "ms", "python3 -c pass", theirs, target, met)]


def _start_python() -> float:
    return run_timed([sys.executable, "-c", "pass"])[1] * 1e3
