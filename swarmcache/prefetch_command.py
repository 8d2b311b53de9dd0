"""``swarmcache prefetch``: its options. The work is in ``prefetch.py``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from swarmcache.options import BundleOption, ConfigOption, SocketOption, make_client

# Of one request, which has quotes and commas as well.
NAMES_BYTES_MAX = 48 * 1024

prefetch_app = typer.Typer()


@prefetch_app.command()
def prefetch(
    files: Annotated[list[str], typer.Argument(metavar="FILE", show_default=False)],
    copies: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            metavar="N",
            show_default=False,
            help="So many nodes shall have the files: those that have them already, then those with"
            " most free space.",
        ),
    ] = None,
    everywhere: Annotated[bool, typer.Option("--all", help="All nodes.")] = False,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--node",
            metavar="NAME",
            show_default=False,
            help="This node: its host name, or HOST:PORT. May be given several times.",
        ),
    ] = None,
    bundle: BundleOption = None,
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress", help="Show a bar on stderr where that is a terminal."
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON array, an element per line, for programs.")
    ] = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Bring FILEs to nodes before a job starts there, and print what each node has then.

    A directory stands for all files below it, a bundle for those that it lists. Where no node has
    a FILE yet, this one reads it for the others, and has a copy then as well. Whose disk is full or
    fails is not asked. On the other nodes a copy is opened to nobody: a "get" of whoever may read
    the FILE has it at once.

    Exit code 0: the nodes have all FILEs. 1: a FILE, or something below it, does not exist or may
    not be read. 2: wrong usage. 3: a node does not have all of them; which, and why, is said on
    stderr. In the last cases the others are brought all the same. What was begun goes on when this
    is interrupted.
    """
    if (copies is not None) + everywhere + bool(names) != 1:
        raise typer.BadParameter("expected one of --nodes N, --all and --node NAME...")
    from swarmcache.local_protocol import PREFETCH_NODES_MAX
    from swarmcache.prefetch import run_prefetch

    if len(names or []) > PREFETCH_NODES_MAX or sum(map(len, names or [])) > NAMES_BYTES_MAX:
        raise typer.BadParameter("these are too many names", param_hint="--node")
    with make_client(socket, config_file) as client:
        code = run_prefetch(
            client,
            list(map(os.fsencode, files)),
            nodes=names or [],
            copies=copies,
            bundle=bundle,
            progress=progress,
            as_json=as_json,
        )
    raise typer.Exit(code)
