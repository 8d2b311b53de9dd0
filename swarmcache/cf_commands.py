"""The commands ``cf`` and ``install-cf`` among those of ``swarmcache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarmcache.cf import run_cf

cf_app = typer.Typer()


@cf_app.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def cf(
    words: Annotated[list[str] | None, typer.Argument(metavar="...", show_default=False)] = None,
) -> None:
    """What CacheManager's client does, with its options and texts; see cf --help."""
    raise typer.Exit(run_cf(words or []))


@cf_app.command("install-cf")
def install_cf(
    prefix: Annotated[
        Path, typer.Option("--prefix", help="Such as /usr/local, where most callers look.")
    ],
) -> None:
    """Put cf where CacheManager's callers look: PREFIX/bin/cf and PREFIX/cache-manager.

    The latter is also the Python package cache-manager. Files that are not from swarmcache are not
    replaced. Run it again after swarmcache has moved to another Python.
    """
    from swarmcache.cf_install import install
    from swarmcache.listing import printing

    installed = install(prefix)
    with printing():
        for path in installed:
            print(path)
