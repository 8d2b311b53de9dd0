"""``python -m simulations flash_crowd --nodes 1000 --size 1GiB --seed 1``: see README.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from simulations import campaign, compare, gossip_command, planted_bugs, plots
from simulations.catalogue import SCENARIOS
from simulations.cluster import Cluster
from simulations.engine import SimulationFailed
from simulations.options import add_cluster_options, add_run_options, cluster_settings, quantity
from simulations.scenarios import Result, Watch
from simulations.settings import POLICIES
from swarmcache.get import abandon_stdout
from swarmcache.quantities import format_size, parse_count

COMMANDS = {
    "campaign": campaign.main,
    "compare": compare.main,
    "gossip": gossip_command.main,
    "planted_bugs": planted_bugs.main,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one scenario. Exit status: 0 done, 1 a promise was broken, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.list:
        print(_list())
        return 0
    if asked.scenario is None:
        parser.error(f"which scenario? {', '.join(SCENARIOS)}; --list says what they are")
    if asked.plot is not None and (problem := plots.problem_with(asked.plot)):
        parser.error(f"--plot {asked.plot}: {problem}")
    settings = cluster_settings(
        asked, asked.nodes, check_every=asked.check_every, policy=asked.policy
    )
    began_s = time.perf_counter()
    try:
        with _progress(f"{asked.scenario}, {asked.nodes} nodes") as watch:
            result = SCENARIOS[asked.scenario](settings, asked.size, watch)
    except SimulationFailed as failure:
        print(f"simulations: {failure}\nrepeat it with: {_command(asked)}", file=sys.stderr)
        return 1
    wall_s = time.perf_counter() - began_s
    if asked.json:
        print(json.dumps(result.as_json(), sort_keys=True))
    else:
        print(_describe(result))
        print(f"{wall_s:.1f} s of real time", file=sys.stderr)
    if asked.plot is not None:
        plots.draw(result, asked.plot)
    return 0


def _list() -> str:
    """All scenarios, each with the first line of what it says of itself."""
    return "\n".join(
        f"{name:16} {(scenario.__doc__ or '').splitlines()[0]}"
        for name, scenario in SCENARIOS.items()
    )


@contextmanager
def _progress(what: str) -> Iterator[Watch | None]:
    """A bar on stderr for those who wait at a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)

        def watch(cluster: Cluster) -> None:
            bar.update(task, completed=cluster.done)

        yield watch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations",
        description="Runs the machines of swarmcache in virtual time.",
        epilog=f"Commands with options of their own: {', '.join(COMMANDS)}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("scenario", nargs="?", choices=list(SCENARIOS), help="what happens")
    option = parser.add_argument
    option("--list", action="store_true", help="say what scenarios there are")
    option("--nodes", type=quantity(parse_count), default=100, help="how many want the file")
    add_cluster_options(parser)
    option("--policy", choices=list(POLICIES), default="cluster", help="what is evicted first")
    add_run_options(parser)
    return parser


def _command(asked: argparse.Namespace) -> str:
    options = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(asked).items()
        if name not in ("scenario", "json", "list", "plot") and value is not None
    ]
    return f"python -m simulations {asked.scenario} {' '.join(options)}"


def _describe(result: Result) -> str:
    file_size = format_size(result.size_bytes)
    rows = [
        ("scenario", result.scenario),
        ("file", f"{file_size} to {result.nodes} nodes, seed {result.seed}"),
        ("efficiency", f"{result.efficiency:.3f} (last node, of the fluid bound)"),
        ("amplification", f"{result.amplification:.4f}"),
        ("readers, peak", f"{result.readers_peak} of {result.slots_max} slots"),
        ("hits", f"{result.hits} of {result.requests} requests, {result.originals} originals"),
        ("bound", f"{result.bound_s:.3f} s"),
        ("first node", f"{result.first_node_s:.3f} s"),
        ("median node", f"{result.median_node_s:.3f} s"),
        ("last node", f"{result.last_node_s:.3f} s"),
        ("repeated chunks", f"{result.repeats}"),
        ("messages", f"{result.messages}, {result.message_bytes} bytes"),
        ("events", f"{result.machine_events} in machines, {result.engine_events} in the engine"),
        ("trace digest", result.trace_digest),
    ]
    return "\n".join(f"{name:16} {value}" for name, value in rows)


def run() -> int:
    """``main``, whose output somebody may have seen enough of, as in ``| head``."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        return 128 + signal.SIGPIPE  # as a shell says of others; 1 is a broken promise


if __name__ == "__main__":
    sys.exit(run())
