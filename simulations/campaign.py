"""``python -m simulations campaign --seeds 10000 --processes 2``: thousands of small clusters.

Each seed stands for another cluster with other faults (``plans.py``, ``seed_run.py``). The first
one that fails ends the campaign; it is shown with the smallest list of faults that still fails, and
with the command that repeats it. The figures depend on the seeds alone, not on the processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from blake3 import blake3

from simulations.faults import KINDS
from simulations.plans import draw
from simulations.seed_run import Outcome, run_seed
from simulations.shrink import shrink
from swarmcache.quantities import parse_count

SEEDS_AT_ONCE = 8


@dataclass(slots=True)
class Tally:
    """What all seeds together came to."""

    seeds: int = 0
    node_s: float = 0.0
    injected: Counter[str] = field(default_factory=Counter)
    evaluated: Counter[str] = field(default_factory=Counter)
    digests: blake3 = field(default_factory=blake3)
    failed: Outcome | None = None

    def add(self, outcome: Outcome) -> None:
        """One more seed."""
        self.seeds += 1
        self.node_s += outcome.node_s
        self.injected += outcome.injected
        self.evaluated += outcome.evaluated
        self.digests.update(outcome.trace_digest.encode())
        if outcome.failure is not None:
            self.failed = outcome

    def as_json(self, first_seed: int) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {
            "scenario": "campaign",
            "first_seed": first_seed,
            "seeds": self.seeds,
            "node_hours": round(self.node_s / 3600, 3),
            "faults": dict(sorted(self.injected.items())),
            "faults_total": sum(self.injected.values()),
            "fault_kinds": len(self.injected),
            "invariants": dict(sorted(self.evaluated.items())),
            "invariants_total": sum(self.evaluated.values()),
            "failed_seed": self.failed.seed if self.failed else None,
            "failure": self.failed.failure if self.failed else None,
            "trace_digest": self.digests.hexdigest(),
        }


def main(arguments: list[str]) -> int:
    """Run a campaign. Exit status: 0 all went well, 1 a seed failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations campaign",
        description="Runs small clusters with all sorts of faults, one for each seed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=_count, default=1000, help="how many")
    parser.add_argument("--first-seed", type=int, default=1, help="where they begin")
    parser.add_argument("--processes", type=_count, default=1, help="how many run at once")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    asked = parser.parse_args(arguments)
    tally = Tally()
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    for outcome in outcomes(seeds, asked.processes):
        tally.add(outcome)
        if tally.failed is not None:
            break
        if sys.stderr.isatty():
            print(f"\r{tally.seeds} of {asked.seeds} seeds", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    if asked.json:
        print(json.dumps(tally.as_json(asked.first_seed), sort_keys=True))
    else:
        print(describe(tally))
    if tally.failed is None:
        return 0
    print(explain(tally.failed), file=sys.stderr)
    return 1


def outcomes(seeds: range, processes: int) -> Iterator[Outcome]:
    """What the seeds come to, in their order, whoever is done first."""
    if processes == 1:
        yield from map(run_seed, seeds)
        return
    numbers = iter(seeds)
    pool = ProcessPoolExecutor(processes)
    try:
        while some := list(islice(numbers, SEEDS_AT_ONCE * processes * 8)):
            yield from pool.map(run_seed, some, chunksize=SEEDS_AT_ONCE)
    finally:
        pool.shutdown(cancel_futures=True)


def describe(tally: Tally) -> str:
    """The figures, for people."""
    rows = [
        ("seeds", f"{tally.seeds}"),
        ("simulated", f"{tally.node_s / 3600:.1f} node-hours"),
        ("faults", f"{sum(tally.injected.values())} of {len(tally.injected)} kinds"),
        *((f"  {kind}", f"{tally.injected[kind]}") for kind in KINDS if kind in tally.injected),
        ("invariants", f"evaluated {sum(tally.evaluated.values())} times"),
        *((f"  {name}", f"{count}") for name, count in sorted(tally.evaluated.items())),
        ("trace digest", tally.digests.hexdigest()),
    ]
    return "\n".join(f"{name:48} {value}" for name, value in rows)


def explain(failed: Outcome) -> str:
    """What broke, after which faults, and how to see it again."""
    plan = draw(failed.seed)
    faults = shrink(plan)
    lines = [
        f"seed {failed.seed} ({failed.theme}): {failed.failure}",
        f"fails with {len(faults)} of its {len(plan.faults)} faults:",
        *(f"  {fault}" for fault in faults),
        f"repeat it with: python -m simulations campaign --first-seed {failed.seed} --seeds 1",
    ]
    return "\n".join(lines)


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {error}") from error
