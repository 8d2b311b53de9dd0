"""The rules of the code that a linter does not know.

Every module of the package has a place in the table below. Imports go downwards only: shells use
machines, machines use values. Machines perform no I/O and have no clock, thread or chance of their
own, which is checked by listing all that they may import.
"""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES_MAX = 70
LINE_COLUMNS_MAX = 100

LAYERS = {
    "shells": {
        "__init__",
        "__main__",
        "aio",
        "api",
        "background",
        "batch_worker",
        "bundle_get",
        "bundles",
        "cache_dir",
        "cache_actions",
        "answer_stream",
        "cache_client",
        "cache_commands",
        "cache_index",
        "cache_listing",
        "chunk_fetcher",
        "chunk_protocol",
        "chunk_server",
        "chunk_sources",
        "cache_requests",
        "cf",
        "cf_actions",
        "cf_arguments",
        "cf_commands",
        "cf_config",
        "cf_install",
        "cf_package",
        "cf_talk",
        "cli",
        "client",
        "clock",
        "cluster_actions",
        "cluster_caches",
        "cluster_commands",
        "commands",
        "compartment_threads",
        "cp",
        "cp_command",
        "datagrams",
        "demo",
        "directories",
        "disk",
        "disk_calls",
        "disk_worker",
        "display",
        "doctor",
        "evictor",
        "exchanges",
        "file_batch",
        "get",
        "gossip_server",
        "grid_engine",
        "held",
        "holder_questions",
        "http_server",
        "holds",
        "in_use",
        "index_rebuild",
        "job_files",
        "job_script",
        "lease_journal",
        "left_over",
        "link",
        "listing",
        "local_requests",
        "local_server",
        "local_socket",
        "locate",
        "locator",
        "look_ups",
        "machine_shell",
        "metrics",
        "object_files",
        "options",
        "own_directory",
        "partial",
        "partial_store",
        "peer",
        "peers_file",
        "place_actions",
        "placed_replicas",
        "prefetch",
        "prefetch_command",
        "prefetch_requests",
        "place_commands",
        "quiet_read",
        "rate_limit",
        "replica_copy",
        "replica_questions",
        "resolver",
        "replicas_elsewhere",
        "retention",
        "scheduler",
        "scrub",
        "serving",
        "slurm",
        "slurm_prolog",
        "socket_filter",
        "source_file",
        "source_reader",
        "status_meter",
        "status_tables",
        "strangers",
        "submit",
        "submit_command",
        "thread_pool",
        "tracker",
        "tracker_client",
        "tracker_server",
        "tree_walk",
        "user_names",
        "user_tree",
        "uses",
        "write_beside",
        "write_requests",
        "write_slot",
    },
    "machines": {
        "auth",
        "chunk_picker",
        "compartments",
        "datagram_auth",
        "download",
        "eviction",
        "fetching",
        "gossip",
        "gossip_claims",
        "gossip_probes",
        "gossip_spread",
        "gossip_view",
        "handover",
        "holder_survey",
        "members",
        "neighbourhood",
        "peer_batches",
        "peer_leases",
        "peer_neighbours",
        "peer_questions",
        "peer_seeds",
        "peer_state",
        "peer_writes",
        "placement",
        "rack_view",
        "slot_ledger",
        "stand_in",
        "steady_clock",
        "timers",
        "tracker_nodes",
        "tracker_replicas",
        "tracker_state",
        "tracker_statistics",
        "tracker_swarms",
        "tracker_writes",
        "upload_slots",
    },
    "values": {
        "chunks",
        "config",
        "errors",
        "gossip_events",
        "gossip_records",
        "local_protocol",
        "locations",
        "manifest_files",
        "messages",
        "path_digests",
        "peer_events",
        "quantities",
        "tracker_events",
    },
}
MAY_USE = {
    "shells": LAYERS["shells"] | LAYERS["machines"] | LAYERS["values"],
    "machines": LAYERS["machines"] | LAYERS["values"],
    "values": LAYERS["values"],
}
# All that a machine may import besides machines and values. Of random only the class: machines
# are handed a generator.
MACHINE_IMPORTS = {
    "__future__",
    "abc",
    "array",
    "bisect",
    "blake3",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "hmac",
    "itertools",
    "math",
    "msgspec",
    "operator",
    "random.Random",
    "sortedcontainers",
    "struct",
    "typing",
}
MACHINE_CALLS_BANNED = {"__import__", "eval", "exec", "input", "open", "print"}
VALUE_IMPORTS_BANNED = {"aiohttp", "asyncio", "random", "socket", "subprocess", "threading", "time"}
# The way of a cache hit, which must not wait for imports. What it needs in other cases only, these
# modules import inside functions.
HIT_MODULES = {
    "cli",
    "client",
    "errors",
    "exchanges",
    "get",
    "local_socket",
    "locations",
    "cf",
    "cf_arguments",
    "cf_config",
    "cf_talk",
}
HIT_IMPORTS = {f"swarmcache.{module}" for module in HIT_MODULES} | sys.stdlib_module_names


def imports_of(source: str) -> list[str]:
    """What a module imports, wherever in the file: "package.module", or with the name for from."""
    return [name for node in ast.walk(ast.parse(source)) for name in imported_by(node)]


def imports_on_load(source: str) -> list[str]:
    """What is imported along with a module: not inside functions, not for types only."""
    return [name for node in ast.parse(source).body for name in imported_by(node)]


def imported_by(node: ast.AST) -> list[str]:
    """What one import statement imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            return [f"{node.module}.{alias.name}" for alias in node.names]
        case _:
            return []


def siblings_of(source: str) -> set[str]:
    """The modules of swarmcache that a module imports."""
    paths = [name.split(".") for name in imports_of(source)]
    return {path[1] if len(path) > 1 else "__init__" for path in paths if path[0] == "swarmcache"}


def is_among(name: str, allowed: set[str] | frozenset[str]) -> bool:
    """Whether ``name`` or a package that it is in is in ``allowed``."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in allowed for count in range(1, len(parts) + 1))


def broken_layer_rules(module: str, source: str) -> list[str]:
    """What a module imports or calls although its layer forbids it."""
    layer = next((layer for layer, modules in LAYERS.items() if module in modules), None)
    if layer is None:
        return ["not in the table of layers"]
    broken = sorted(siblings_of(source) - MAY_USE[layer])
    others = [name for name in imports_of(source) if not is_among(name, {"swarmcache"})]
    if layer == "machines":
        broken += [name for name in others if not is_among(name, MACHINE_IMPORTS)]
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        broken += [
            f"{called.id}()"
            for called in calls
            if isinstance(called, ast.Name) and called.id in MACHINE_CALLS_BANNED
        ]
    if layer == "values":
        broken += [name for name in others if is_among(name, VALUE_IMPORTS_BANNED)]
    if module in HIT_MODULES:
        broken += [name for name in imports_on_load(source) if not is_among(name, HIT_IMPORTS)]
    return broken


def long_functions(source: str) -> list[str]:
    """Functions of more lines than allowed, docstring included and decorators not."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]


def wide_lines(source: str) -> list[str]:
    """Lines of more columns than allowed."""
    lines = enumerate(source.splitlines(), 1)
    return [f"line {number}" for number, line in lines if len(line) > LINE_COLUMNS_MAX]


def package_modules() -> dict[str, str]:
    """The source of every module of swarmcache, by name."""
    return {path.stem: path.read_text() for path in (ROOT / "swarmcache").glob("**/*.py")}


def test_imports_go_downwards_only_and_every_module_is_in_the_table() -> None:
    broken = {
        module: broken_layer_rules(module, text) for module, text in package_modules().items()
    }

    assert {module: rules for module, rules in broken.items() if rules} == {}


def test_modules_do_not_import_one_another_in_circles() -> None:
    graph = {module: siblings_of(text) for module, text in package_modules().items()}

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_functions_and_lines_are_short_enough_to_be_seen_at_once() -> None:
    folders = ("swarmcache", "simulations", "tests", "benchmarks")
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("**/*.py"))]

    too_long = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := long_functions(file.read_text()) + wide_lines(file.read_text()))
    }

    assert too_long == {}


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("download", "import time", ["time"]),
        ("download", "import os.path", ["os.path"]),
        ("download", "def now():\n    from asyncio import sleep", ["asyncio.sleep"]),
        ("download", "import random", ["random"]),
        ("download", "from random import choice", ["random.choice"]),
        ("download", "from random import Random", []),
        ("download", "from collections.abc import Iterable", []),
        ("download", "from swarmcache.peer import Peer", ["peer"]),
        ("download", "from swarmcache import disk", ["disk"]),
        ("download", "print(open('/etc/passwd'))", ["print()", "open()"]),
        ("chunks", "from swarmcache.download import Download", ["download"]),
        ("chunks", "import socket", ["socket"]),
        ("peer", "import asyncio\nfrom swarmcache.download import Download", []),
        ("client", "import socket\nfrom swarmcache.errors import DaemonUnavailable", []),
        ("client", "import msgspec", ["msgspec"]),
        ("client", "from swarmcache.config import load", ["swarmcache.config.load"]),
        ("client", "def f():\n    from swarmcache.config import load", []),
        ("get", "if TYPE_CHECKING:\n    from swarmcache.display import Bar", []),
        ("helpers", "", ["not in the table of layers"]),
    ],
)
def test_a_broken_layer_rule_is_noticed(module: str, source: str, broken: list[str]) -> None:
    assert broken_layer_rules(module, source) == broken


def test_a_function_of_71_lines_and_a_line_of_101_columns_are_noticed() -> None:
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES_MAX

    assert long_functions(function) == ["f: 71 lines"]
    assert long_functions(function.removesuffix("    pass\n")) == []
    assert wide_lines("x" * 101 + "\n" + "x" * 100) == ["line 1"]
