"""The options of ``swarmcache submit``. The work is in ``submit.py``, imported by it only."""

from __future__ import annotations

from typing import Annotated

import typer

from swarmcache.options import ConfigOption, SocketOption, make_client

submit_app = typer.Typer()


# Options of sbatch and qsub are not for us, with or without "--" before them.
@submit_app.command(context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", show_default=False)],
    wait_for_best: Annotated[
        bool,
        typer.Option("--wait-for-best", help="Wait for the node that holds most, even if busy."),
    ] = False,
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch", help="Name the files in the job's comment, for the Slurm prolog."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command that would be run; submit nothing.")
    ] = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Run COMMAND, an sbatch or qsub, so that the job goes where its files are.

    The job script is looked through for calls of `swarmcache get` and `cf`. Its commands are not
    run: docs/jobs.md says what is. The node that holds most bytes of these files, and could start
    the job now, is preferred. Where none is, the job is submitted as it is, and the reason goes
    to stderr. stdout and exit code are those of COMMAND.
    """
    from swarmcache.submit import run_submit

    client = make_client(socket, config_file)
    raise typer.Exit(
        run_submit(command, client=client, wait=wait_for_best, prefetch=prefetch, dry_run=dry_run)
    )
