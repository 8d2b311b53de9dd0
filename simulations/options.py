"""Options that several commands of the simulations have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from simulations.settings import ClusterSettings
from swarmcache.config import parse_chunk_size
from swarmcache.quantities import parse_count, parse_duration, parse_rate, parse_size


def quantity(parse: Callable[[object], float]) -> Callable[[str], float]:
    """What argparse needs to read one: the error says what was expected."""

    def convert(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {error}") from error

    return convert


def reader_cost(text: str) -> float:
    """A number that is not negative."""
    try:
        cost = float(text)
    except ValueError:
        cost = -1.0
    if not 0.0 <= cost < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 on, like 0.01")
    return cost


def chunk_size(text: str) -> int | None:
    """Bytes; None for what daemons choose."""
    return None if text == "auto" else int(quantity(parse_chunk_size)(text))


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """What the cluster is like, and the file."""
    option = parser.add_argument
    option("--size", type=quantity(parse_size), default="256MiB", help="size of the file")
    option("--chunk-size", type=chunk_size, default="auto", help="as transfer.chunk_size")
    option("--seed", type=int, default=1, help="the source of all chance")
    option("--rate", type=quantity(parse_rate), default="125MB/s", help="of every link, each way")
    option("--file-server-rate", type=quantity(parse_rate), help="of its uplink, if not --rate")
    option("--slots", type=quantity(parse_count), default=8, help="readers of the file server")
    option("--latency", type=quantity(parse_duration), default="0.2ms", help="one way")
    option(
        "--reader-cost",
        type=reader_cost,
        default=0.0,
        help="C: n readers together get 1 / (1 + C * (n - 1)) of the file server's rate",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How closely it is watched, and what is shown of it."""
    option = parser.add_argument
    option(
        "--check-every",
        type=quantity(parse_count),
        default=10_000,
        help="events between two times that a machine checks its invariants",
    )
    option("--plot", metavar="FILE.png", help="draw how it went (needs matplotlib)")
    option("--json", action="store_true", help="one line of JSON, equal for equal seeds")


def cluster_settings(
    asked: argparse.Namespace, nodes: int, *, check_every: int = 10_000, policy: str = "cluster"
) -> ClusterSettings:
    """The settings that these options stand for."""
    return ClusterSettings(
        nodes=nodes,
        seed=asked.seed,
        node_rate=asked.rate,
        file_server_rate=asked.file_server_rate or asked.rate,
        slots_max=asked.slots,
        latency_s=asked.latency,
        chunk_size_bytes=asked.chunk_size,
        reader_cost=asked.reader_cost,
        policy=policy,
        check_every=check_every,
    )
