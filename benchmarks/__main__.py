"""``python -m benchmarks [NAME...]``: one line per figure, each beside what it is compared with."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks import api, hit, many_files, memory, pair, single, small_files, swarm
from benchmarks.local_cluster import clean_environment
from benchmarks.report import Figure, Options, Skipped, machine, table

BENCHMARKS: dict[str, Callable[[Options], list[Figure]]] = {
    "swarm": swarm.measure,
    "pair": pair.measure,
    "single": single.measure,
    "hit": hit.measure,
    "api": api.measure,
    "small_files": small_files.measure,
    "memory": memory.measure,
    "many_files": many_files.measure,
}


def main() -> int:
    """Run what was asked for. 1 where a benchmark itself failed; a missed target is no failure."""
    arguments = _parse()
    clean_environment()
    options = Options(arguments.runs, arguments.quick, arguments.files)
    figures: list[Figure] = []
    skipped: dict[str, str] = {}
    failed: list[str] = []
    before = machine()
    for name in arguments.names or BENCHMARKS:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        try:
            figures += BENCHMARKS[name](options)
        except Skipped as reason:
            skipped[name] = str(reason)
        except Exception:  # the others shall have their turn; the exit code tells
            traceback.print_exc()
            failed.append(name)
    if arguments.json:
        result: dict[str, Any] = {"machine": before, "skipped": skipped, "failed": failed}
        print(json.dumps({**result, "figures": [figure.as_dict() for figure in figures]}))
    else:
        _show(figures, skipped, failed, before)
    return 1 if failed else 0


def _show(
    figures: list[Figure], skipped: dict[str, str], failed: list[str], before: dict[str, Any]
) -> None:
    print(table(figures))
    for name, reason in skipped.items():
        print(f"{name}: skipped: {reason}")
    for name in failed:
        print(f"{name}: failed, see stderr")
    print("; ".join(f"{key} {value}" for key, value in before.items()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--runs", type=int, help="how often to measure; default: as each needs")
    parser.add_argument("--files", type=int, help="files of many_files, small_files")
    parser.add_argument("--quick", action="store_true", help="the smallest variants, as a check")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"{name}: expected one of {', '.join(BENCHMARKS)}")
    if arguments.runs is not None and arguments.runs < 1:
        parser.error("--runs: expected a number from 1 on")
    if arguments.files is not None and arguments.files < many_files.FILES_MIN:
        parser.error(f"--files: expected a number from {many_files.FILES_MIN} on")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
