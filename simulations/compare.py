"""``python -m simulations compare --nodes 8 100 1000``: swarmcache beside other ways."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from simulations.comparisons import METHODS, Comparison, run_method
from simulations.engine import SimulationFailed
from simulations.options import add_cluster_options, cluster_settings, quantity
from simulations.scenarios import bound_s, flash_crowd
from simulations.settings import ClusterSettings
from swarmcache.quantities import format_size, parse_count

SWARMCACHE = "swarmcache"


def main(arguments: Sequence[str]) -> int:
    """Print a table. Exit status: 0 done, 1 a simulation failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations compare",
        description="How long each way takes until the last node has a file that all want at once.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = quantity(parse_count)
    parser.add_argument("--nodes", type=count, nargs="+", default=[8, 100], help="one table each")
    add_cluster_options(parser)
    parser.add_argument("--method", choices=[*METHODS, SWARMCACHE], action="append",
                        help="only this one; may be given several times")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    asked = parser.parse_args(arguments)
    methods = asked.method or [*METHODS, SWARMCACHE]
    rows = []
    try:
        for nodes in asked.nodes:
            settings = cluster_settings(asked, nodes)
            if not asked.json:
                size = format_size(asked.size)
                print(f"{size} to {nodes} nodes; no way takes less than "
                      f"{bound_s(asked.size, settings):.2f} s\n{_HEAD}")  # fmt: skip
            for row in _compare(methods, settings, asked.size):
                rows.append(row)
                if not asked.json:
                    print(_line(row, asked.size), flush=True)
    except SimulationFailed as failure:
        print(f"simulations: {failure}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], sort_keys=True))
    return 0


def _compare(
    methods: Sequence[str], settings: ClusterSettings, size_bytes: int
) -> Iterator[Comparison]:
    for method in methods:
        if method != SWARMCACHE:
            yield run_method(method, settings, size_bytes, bound_s(size_bytes, settings))
            continue
        result = flash_crowd(settings, size_bytes)
        yield Comparison(
            SWARMCACHE,
            settings.nodes,
            result.last_node_s,
            result.efficiency,
            round(result.amplification * size_bytes),
            result.readers_peak,
        )


_HEAD = f"{'':14}{'last node, s':>14}{'efficiency':>12}{'copies read':>13}{'readers, peak':>15}"


def _line(row: Comparison, size_bytes: int) -> str:
    copies = row.server_bytes / size_bytes
    return (
        f"{row.method:14}{row.last_node_s:14.2f}{row.efficiency:12.3f}"
        f"{copies:13.2f}{row.readers_peak:15}"
    )
