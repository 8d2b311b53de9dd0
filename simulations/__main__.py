"""``python -m simulations flash_crowd --nodes 1000 --size 1GiB --seed 1``: see README.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from simulations import campaign
from simulations.engine import SimulationFailed
from simulations.scenarios import Result, flash_crowd
from simulations.settings import ClusterSettings
from swarmcache.quantities import format_size, parse_count, parse_duration, parse_rate, parse_size


def main(arguments: list[str] | None = None) -> int:
    """Run one scenario. Exit status: 0 done, 1 a promise was broken, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["campaign"]:
        return campaign.main(arguments[1:])
    asked = _parser().parse_args(arguments)
    settings = ClusterSettings(
        nodes=asked.nodes,
        seed=asked.seed,
        node_rate=asked.rate,
        file_server_rate=asked.file_server_rate or asked.rate,
        slots_max=asked.slots,
        latency_s=asked.latency,
        check_every=asked.check_every,
    )
    began_s = time.perf_counter()
    try:
        result = flash_crowd(settings, asked.size)
    except SimulationFailed as failure:
        print(f"simulations: {failure}\nrepeat it with: {_command(asked)}", file=sys.stderr)
        return 1
    wall_s = time.perf_counter() - began_s
    if asked.json:
        print(json.dumps(result.as_json(), sort_keys=True))
    else:
        print(_describe(result))
        print(f"{wall_s:.1f} s of real time", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations",
        description="Runs the machines of swarmcache in virtual time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("scenario", choices=["flash_crowd"], help="what happens")
    option = parser.add_argument
    option("--nodes", type=_read(parse_count), default=100, help="how many want the file")
    option("--size", type=_read(parse_size), default="256MiB", help="size of the file")
    option("--seed", type=int, default=1, help="the source of all chance")
    option("--rate", type=_read(parse_rate), default="125MB/s", help="of every link, each way")
    option("--file-server-rate", type=_read(parse_rate), help="of its uplink, if not --rate")
    option("--slots", type=_read(parse_count), default=8, help="readers of the file server")
    option("--latency", type=_read(parse_duration), default="0.2ms", help="of a message, one way")
    option(
        "--check-every",
        type=_read(parse_count),
        default=10_000,
        help="events between two times that a machine checks its invariants",
    )
    option("--json", action="store_true", help="one line of JSON, equal for equal seeds")
    return parser


def _read(parse: Callable[[object], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {error}") from error

    return convert


def _command(asked: argparse.Namespace) -> str:
    options = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(asked).items()
        if name not in ("scenario", "json") and value is not None
    ]
    return f"python -m simulations {asked.scenario} {' '.join(options)}"


def _describe(result: Result) -> str:
    file_size = format_size(result.size_bytes)
    rows = [
        ("file", f"{file_size} to {result.nodes} nodes, seed {result.seed}"),
        ("efficiency", f"{result.efficiency:.3f} (last node, of the fluid bound)"),
        ("amplification", f"{result.amplification:.4f}"),
        ("readers, peak", f"{result.readers_peak} of {result.slots_max} slots"),
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


if __name__ == "__main__":
    sys.exit(main())
