"""The commands about the caches of all nodes: replicas, forget, and their options.

The work is in ``cluster_actions.py``, imported by these commands only.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from swarmcache.client import real_path_of
from swarmcache.options import ConfigOption, SocketOption, make_client
from swarmcache.quantities import parse_duration

PATH_HELP = (
    "The path of a source, or of a directory of sources, whether it is still there or not; / for"
    " everything."
)

cluster_app = typer.Typer()

AnyPaths = Annotated[
    list[str] | None, typer.Argument(metavar="PATH", show_default=False, help=PATH_HELP)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON array, an element per line, for programs.")
]


@cluster_app.command()
def replicas(
    paths: AnyPaths = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """List the files in the caches of all nodes: all, or those at PATH or below.

    A line per file: its size, how many nodes hold it, how long ago it was last used on any of them,
    and its path; of a file that is not cached on this node only its version id is known. With
    --json also which nodes these are. For root and the daemon's own user.

    Exit code 1: a node could not be asked; it is named on stderr.
    """
    from swarmcache.cluster_actions import show_replicas

    with make_client(socket, config_file) as client:
        code = show_replicas(client, _real_paths(paths), as_json=as_json)
    raise typer.Exit(code)


@cluster_app.command()
def forget(
    paths: AnyPaths = None,
    unused_for: Annotated[
        str | None,
        typer.Option(
            "--unused-for",
            metavar="TIME",
            show_default=False,
            help="Only what was not used for so long, such as 30d; 0: also what was used just now."
            " Without it, what was used within cache.min_age stays.",
        ),
    ] = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Take files out of the caches of all nodes: those at PATH or below, or what is not used.

    The sources are left alone. What is pinned or in use stays, is named on stderr, and can be taken
    away on its node with "rm". For root and the daemon's own user. What is being fetched is no
    copy yet, and stays.

    Exit code 0: none of it is cached any more. 1: something stays, or a node could not be asked.
    """
    from swarmcache.cluster_actions import forget_replicas

    unused_s = None
    if unused_for is not None:
        try:
            unused_s = parse_duration(unused_for)
        except ValueError as error:
            raise typer.BadParameter(f"expected {error}", param_hint="--unused-for") from error
    elif not paths:
        raise typer.BadParameter("name what is to go, or how long it was not used (--unused-for)")
    with make_client(socket, config_file) as client:
        code = forget_replicas(client, _real_paths(paths), unused_s, as_json=as_json)
    raise typer.Exit(code)


def _real_paths(names: list[str] | None) -> list[bytes]:
    from swarmcache.local_protocol import PATH_MAX_BYTES, PATHS_MAX

    paths = [real_path_of(os.fsencode(name)) for name in names or []]
    if not all(names or []) or max(map(len, paths), default=0) > PATH_MAX_BYTES:
        raise typer.BadParameter(f"expected 1 to {PATH_MAX_BYTES} bytes", param_hint="PATH")
    if len(paths) > PATHS_MAX:
        raise typer.BadParameter(f"expected at most {PATHS_MAX}", param_hint="PATH")
    return paths
