"""Options that several commands have, and what they stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from swarmcache.client import Client

ConfigOption = Annotated[Path | None, typer.Option("--config", help="The file with the settings.")]
SocketOption = Annotated[Path | None, typer.Option("--socket", help="The daemon's local socket.")]

BundleOption = Annotated[
    bool | None,
    typer.Option(
        "--bundle/--no-bundle",
        show_default=False,
        help="Whether FILE is a bundle, a list of files; without this option *.bundle is one.",
    ),
]


def make_client(socket: Path | None, config_file: Path | None) -> Client:
    """A client of the daemon that these options name."""
    return Client(
        os.fsencode(socket) if socket else None, os.fsencode(config_file) if config_file else None
    )
