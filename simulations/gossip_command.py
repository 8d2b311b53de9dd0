"""``python -m simulations gossip steady --nodes 1000 --loss 0.1 --seed 1``: see README.md."""

from __future__ import annotations

import argparse
import json
import sys
import time

from simulations import gossip_plots, plots
from simulations.engine import SimulationFailed
from simulations.gossip_cluster import GossipSettings
from simulations.gossip_scenarios import (
    GOSSIP_SCENARIOS,
    RESTART,
    GossipResult,
    run_scenarios,
)
from simulations.options import add_run_options, quantity
from swarmcache.quantities import parse_count, parse_duration


def main(arguments: list[str]) -> int:
    """Run one scenario. Exit status: 0 done, 1 a promise was broken, 2 wrong usage."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.plot is not None and (problem := plots.problem_with(asked.plot)):
        parser.error(f"--plot {asked.plot}: {problem}")
    if RESTART in asked.scenario[1:]:
        parser.error(f"{RESTART} can only come first: it begins with nobody")
    settings = GossipSettings(
        asked.nodes,
        asked.seed,
        asked.loss,
        asked.latency,
        asked.period,
        asked.check_every,
        tries=asked.tries,
    )
    began_s = time.perf_counter()
    try:
        result = run_scenarios(asked.scenario, settings, asked.duration)
    except SimulationFailed as failure:
        command = " ".join(arguments)
        print(f"simulations: {failure}\nrepeat it with: gossip {command}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps(result.as_json(), sort_keys=True))
    else:
        print(_describe(result))
        print(f"{time.perf_counter() - began_s:.1f} s of real time", file=sys.stderr)
    if asked.plot is not None:
        gossip_plots.draw(result, asked.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations gossip",
        description="Nodes that gossip, in virtual time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    names, count = list(GOSSIP_SCENARIOS), quantity(parse_count)
    option("scenario", choices=names, nargs="+", help="what happens, one after the other")
    option("--nodes", type=count, default=100, help="how many there are")
    option("--seed", type=int, default=1, help="the source of all chance")
    option("--loss", type=_part, default=0.0, help="the part of all packets that gets lost")
    option("--latency", type=quantity(parse_duration), default="0.2ms", help="one way, at least")
    option(
        "--period",
        type=quantity(parse_duration),
        default="10s",
        help="a status at least so often; long ones make long runs of the failure detector cheap",
    )
    option("--tries", type=count, default=5, help="disks that turn sick, daemons that end")
    option("--duration", type=quantity(parse_duration), help="if not what is usual")
    add_run_options(parser)
    return parser


def _part(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        part = float(text)
    except ValueError:
        part = -1.0
    if not 0.0 <= part < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a part from 0 to 1, like 0.1")
    return part


def _describe(result: GossipResult) -> str:
    return "\n".join(f"{name:26} {value}" for name, value in result.as_json().items())
