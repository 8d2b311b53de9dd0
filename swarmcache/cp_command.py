"""``swarmcache cp``: its options, and what it says. The work is in ``cp.py``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from swarmcache.get import say
from swarmcache.options import BundleOption, ConfigOption, SocketOption, make_client

if TYPE_CHECKING:
    from swarmcache.client import Client
    from swarmcache.cp import CopyOutcome, CopyProgress
    from swarmcache.display import CopyDisplay

EXIT_NOT_COPIED = 4

cp_app = typer.Typer()


@cp_app.command()
def cp(
    paths: Annotated[list[str], typer.Argument(metavar="SRC... DST", show_default=False)],
    bundle: BundleOption = None,
    register: Annotated[
        bool,
        typer.Option(
            "--register/--no-register", help="Whether the copied file is cached on this node."
        ),
    ] = True,
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress", help="Show a bar on stderr where that is a terminal."
        ),
    ] = True,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Copy SRC to a file server, when it is its turn, as a whole or not at all.

    DST is a file, or a directory that gets each SRC under its own name; of a bundle, which lists
    files, it gets these. A copy is written beside its place, brought to the server's disk, looked
    at again, and renamed over what was there; mode and modification time are those of SRC. It is
    cached on this node, without being sent a second time. Without daemon or tracker it is copied
    all the same, with a notice.

    Exit code 0: everything was copied. 2: wrong usage. 4: something was not copied, is named on
    stderr, and its DST is what it was before; the others were copied all the same.
    """
    if len(paths) < 2:
        raise typer.BadParameter("expected SRC and DST", param_hint="SRC... DST")
    from swarmcache.errors import UsageError

    *sources, destination = map(os.fsencode, paths)
    client = make_client(socket, config_file)
    try:
        code = run_cp(
            client, sources, destination, bundle=bundle, register=register, progress=progress
        )
    except UsageError as error:
        raise typer.BadParameter(str(error), param_hint="SRC... DST") from error
    raise typer.Exit(code)


def run_cp(
    client: Client,
    sources: list[bytes],
    destination: bytes,
    *,
    bundle: bool | None,
    register: bool,
    progress: bool,
) -> int:
    """Copy, tell on stderr what went wrong, and return the exit code. Raises UsageError."""
    from swarmcache.cp import copy_files, signals_end_it

    bar = _Bar(progress and sys.stderr is not None and sys.stderr.isatty())
    failed = False
    try:
        with signals_end_it():
            for outcome in copy_files(
                client,
                sources,
                destination,
                bundle=bundle,
                register=register,
                on_progress=bar.show,
            ):
                bar.clear()
                failed |= bool(outcome.error)
                _tell(outcome)
    except KeyboardInterrupt:
        return 130  # as a shell does: 128 + SIGINT
    finally:
        bar.clear()
    return EXIT_NOT_COPIED if failed else 0


def _tell(outcome: CopyOutcome) -> None:
    source, destination = os.fsdecode(outcome.source), os.fsdecode(outcome.destination)
    for note in outcome.notes:
        say(f"{destination!r}: {note}")
    if outcome.error:
        say(f"{source!r}: not copied to {destination!r}: {outcome.error}")
    if outcome.unsupervised:
        say(f"{source!r}: copied without a slot: {outcome.unsupervised}")
    if outcome.not_registered:
        say(f"{source!r}: copied, but not cached: {outcome.not_registered}")


class _Bar:
    """The progress bar, which is not even imported before there is something to show."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._display: CopyDisplay | None = None

    def show(self, progress: CopyProgress) -> None:
        if not self._wanted:
            return
        if self._display is None:
            from swarmcache.display import CopyDisplay

            self._display = CopyDisplay()
        self._display.show(progress)

    def clear(self) -> None:
        if self._display is not None:
            self._display.clear()
