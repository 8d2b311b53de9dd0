"""The commands about where files are: locate, path, hosts, and their options.

The work is in ``place_actions.py``, imported by these commands only.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from swarmcache.options import BundleOption, ConfigOption, SocketOption, make_client

FILES_HELP = "A file; a directory stands for all files below it, a bundle for those that it lists."

place_app = typer.Typer()

SomeFiles = Annotated[
    list[str], typer.Argument(metavar="FILE", show_default=False, help=FILES_HELP)
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="No more nodes than so many.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON array, an element per line, for programs.")
]


@place_app.command()
def locate(
    files: SomeFiles,
    limit: LimitOption = None,
    bundle: BundleOption = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Print NODE:PATH:SIZE for every replica of FILE in the cluster.

    Each was verified a moment ago: a copy that is gone, was touched, or is of an older state of
    FILE is not listed. NODE is the host name, SIZE in bytes. PATH is where your own copy is on that
    node; if you have not asked for FILE there yet, "get" puts it there at once. --limit counts the
    nodes of each FILE.

    Exit code 1: a FILE, or something below it, does not exist or may not be read, or the tracker
    cannot be asked; what can be said is printed all the same.
    """
    from swarmcache.place_actions import show_locations

    client = make_client(socket, config_file)
    raise typer.Exit(
        show_locations(
            client, list(map(os.fsencode, files)), limit=limit, bundle=bundle, as_json=as_json
        )
    )


@place_app.command()
def hosts(
    files: SomeFiles,
    limit: LimitOption = None,
    bundle: BundleOption = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Print NODE BYTES: how much each node holds of all FILEs together, the most first.

    For a scheduler, to put a job where its files are. The replicas are verified as for "locate".

    Exit code 1: a FILE, or something below it, does not exist or may not be read, or the tracker
    cannot be asked; what can be said is printed all the same.
    """
    from swarmcache.place_actions import show_hosts

    client = make_client(socket, config_file)
    raise typer.Exit(
        show_hosts(
            client, list(map(os.fsencode, files)), limit=limit, bundle=bundle, as_json=as_json
        )
    )


@place_app.command()
def path(
    files: SomeFiles,
    bundle: BundleOption = None,
    nul: Annotated[
        bool, typer.Option("-0", "--null", help="End each path with a NUL, not with a newline.")
    ] = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Print where the copy of FILE is on this node, or would be. Copies nothing.

    A directory has one copy, a bundle one for each file that it lists. Without a daemon the path is
    what the settings say.

    Exit code 1: a FILE does not exist or may not be read; the others are printed all the same.
    """
    from swarmcache.place_actions import show_paths

    raise typer.Exit(
        show_paths(
            make_client(socket, config_file),
            list(map(os.fsencode, files)),
            bundle=bundle,
            end=b"\0" if nul else b"\n",
            config_file=config_file,
        )
    )
