"""The commands of ``swarmcache`` and their options.

Each does little more than to find its settings: the work is in ``get.py``, ``peer.py``,
``tracker.py`` and ``demo.py``, each imported by its command only, since all of them together take
a third of a second. Exit code 2 stands for wrong usage, wrong settings included.
"""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarmcache.cache_commands import cache_app
from swarmcache.cf_commands import cf_app
from swarmcache.cluster_commands import cluster_app
from swarmcache.cp_command import cp_app
from swarmcache.errors import ConfigError, LocalError, PeerUnavailable, SwarmcacheError
from swarmcache.get import run_get, say
from swarmcache.options import BundleOption, ConfigOption, SocketOption, make_client
from swarmcache.place_commands import place_app
from swarmcache.prefetch_command import prefetch_app
from swarmcache.submit_command import submit_app

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from swarmcache.config import Config

PLAIN_COLUMNS = 200
EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="swarmcache",
    help="Peer-to-peer file cache: gives a job the path of a copy on the node's own disk.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cp_app)
app.add_typer(cache_app)
app.add_typer(cf_app)
app.add_typer(place_app)
app.add_typer(submit_app)
app.add_typer(cluster_app)
app.add_typer(prefetch_app)


class LogLevel(StrEnum):
    """How much a server tells on stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


TrackerOption = Annotated[
    str | None, typer.Option("--tracker", metavar="HOST:PORT", help="Where the tracker listens.")
]
ListenOption = Annotated[
    str | None,
    typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 picks a free one."),
]
SecretOption = Annotated[
    Path | None, typer.Option("--secret-file", help="The file with the cluster's secret.")
]
LogLevelOption = Annotated[LogLevel, typer.Option(help="How much to tell on stderr.")]


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        app(arguments, prog_name="swarmcache")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ConfigError as error:
        say(str(error))
        return EXIT_USAGE
    except SwarmcacheError as error:
        say(str(error))
        return EXIT_FAILED
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        from swarmcache.listing import printing

        with printing():
            try:
                print(f"swarmcache {version('swarmcache')}")
            except PackageNotFoundError:  # run from a directory of sources
                print("swarmcache (not installed)")
        raise typer.Exit


@app.callback()
def swarmcache(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")
    ] = False,
) -> None:
    """Peer-to-peer file cache: gives a job the path of a copy on the node's own disk."""


@app.command()
def get(
    files: Annotated[list[str], typer.Argument(metavar="FILE", show_default=False)],
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a path is not a cached one.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Print the original path of what is not there in time, counted for all FILEs"
            " together. The download goes on.",
        ),
    ] = None,
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress", help="Show a bar on stderr where that is a terminal."
        ),
    ] = True,
    nul: Annotated[
        bool, typer.Option("-0", "--null", help="End each path with a NUL, not with a newline.")
    ] = False,
    bundle: BundleOption = None,
    all_or_nothing: Annotated[
        bool,
        typer.Option(
            "--all-or-nothing",
            help="Cache all files of a bundle, or leave nothing of it behind and print the bundle.",
        ),
    ] = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Print one usable path per FILE, in order.

    That is the path of a verified copy on this node's disk or, where caching was impossible, the
    original: the real path of FILE, symbolic links resolved. The reason goes to stderr. A directory
    stands for all files below it, and its copy is a directory. A bundle lists files, one path a
    line; its result lists the paths to use, in the same order.

    Exit code 0: every printed path is usable. 1: a FILE does not exist or may not be read; the
    others are printed all the same. 2: wrong usage. 3: with --strict, a path is not a cached one.
    """
    if all_or_nothing and timeout is not None:
        raise typer.BadParameter(
            "what is not there in time goes on being copied, which is neither all nor nothing",
            param_hint="--timeout with --all-or-nothing",
        )
    client = make_client(socket, config_file)
    raise typer.Exit(
        run_get(
            files,
            client=client,
            strict=strict,
            timeout_s=timeout,
            progress=progress,
            end=b"\0" if nul else b"\n",
            bundle=bundle,
            all_or_nothing=all_or_nothing,
        )
    )


@app.command()
def status(
    tracker: Annotated[
        bool,
        typer.Option("--tracker", help="What has happened since the tracker was started, instead."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Show this node and the cluster: nodes, disks, swarms, slots, queues, distrusted peers.

    What is shown of other nodes they have told themselves, so long ago as "told" says; swarms,
    slots and queues are what the tracker tells. Files that this node fetches for other users have
    names for root only.

    With --tracker: requests and hits, what came from file servers and from peers, waits for slots,
    leases that did not end well, and how many replicas there are. A node tells the tracker with its
    heartbeat, every ten seconds at least. Exit code 1: the tracker cannot be asked.
    """
    answer = make_client(socket, config_file).status()
    if tracker and answer.get("cluster") is None:
        raise PeerUnavailable(f"the tracker cannot be asked: {answer.get('reason')}")
    from swarmcache.listing import printing

    if as_json:
        import json

        shown = {key: answer.get(key) for key in ("node", "cluster", "reason", "members")}
        with printing():
            print(json.dumps(answer["cluster"]["statistics"] if tracker else shown, sort_keys=True))
        return
    from rich.console import Console

    from swarmcache.status_tables import statistics_renderables, status_renderables

    # What goes to a file or another program has no terminal's width.
    shown_at_terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(highlight=False, width=None if shown_at_terminal else PLAIN_COLUMNS)
    renderables = (
        statistics_renderables(answer["cluster"]["statistics"])
        if tracker
        else status_renderables(answer)
    )
    with printing():
        for renderable in renderables:
            console.print(renderable)


@app.command()
def doctor(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", show_default=False, help="With --clean: where to look."),
    ] = None,
    clean: Annotated[
        bool,
        typer.Option(
            "--clean",
            help="Only remove what killed copies (cp) have left in DIR (default: here) or below.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Say what is wrong with this installation, and the mend. Works without a daemon, too.

    Looks at the settings, the secret, daemon and tracker, and, as root or the daemon's user, into
    the cache directories. Exit code 0: nothing is wrong. 1: something is.
    """
    if clean:
        from swarmcache.left_over import clean as clean_up

        raise typer.Exit(EXIT_FAILED if clean_up(directories or [Path()]) else 0)
    if directories:
        raise typer.BadParameter("goes with --clean only", param_hint="DIR")
    from swarmcache.doctor import examine
    from swarmcache.listing import printing

    report = examine(socket, config_file)
    with printing():
        if as_json:
            import json

            print(json.dumps(report.as_dict(), sort_keys=True))
        else:
            print("\n".join(report.lines()))
    raise typer.Exit(EXIT_FAILED if report.findings else 0)


@app.command()
def daemon(
    listen: ListenOption = None,
    advertise: Annotated[
        str | None,
        typer.Option("--advertise", metavar="HOST:PORT", help="The address told to others."),
    ] = None,
    tracker: TrackerOption = None,
    cache_dir: Annotated[
        list[Path] | None, typer.Option("--cache-dir", help="May be given several times.")
    ] = None,
    socket: SocketOption = None,
    secret_file: SecretOption = None,
    config_file: ConfigOption = None,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Run the node daemon in the foreground, until SIGTERM."""
    settings = _settings(
        config_file,
        {
            "daemon.listen": listen,
            "daemon.advertise": advertise,
            "daemon.socket": socket,
            "cluster.tracker": tracker,
            "cluster.secret_file": secret_file,
            "cache.dir": cache_dir or None,
        },
    )
    _start_log(log_level)
    from swarmcache.peer import run_daemon

    _serve(run_daemon(settings))


@app.command()
def tracker(
    listen: ListenOption = None,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="What is kept across restarts.")
    ] = None,
    secret_file: SecretOption = None,
    config_file: ConfigOption = None,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Run the tracker in the foreground, until SIGTERM."""
    settings = _settings(
        config_file,
        {
            "tracker.listen": listen,
            "tracker.state_dir": state_dir,
            "cluster.secret_file": secret_file,
        },
    )
    _start_log(log_level)
    from swarmcache.tracker import run_tracker

    _serve(run_tracker(settings))


@app.command()
def demo(
    size: Annotated[str, typer.Option(help="Size of the file, such as 64MiB.")] = "256MiB",
) -> None:
    """Run a tracker and four daemons on this machine, bring a file to all four, and clean up."""
    from swarmcache.demo import run_demo
    from swarmcache.listing import printing
    from swarmcache.quantities import parse_size

    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(f"expected {error}", param_hint="--size") from error
    with printing():
        code = run_demo(size_bytes)
    raise typer.Exit(code)


def _settings(config_file: Path | None, options: dict[str, Any]) -> Config:
    from swarmcache.config import load

    return load(options, os.environ, config_file)


def _serve(server: Coroutine[Any, Any, None]) -> None:
    """Run a server until it ends. Raises LocalError where this machine does not let it serve."""
    import asyncio

    import uvloop

    try:
        # A tenth less processor time than asyncio's own loop, measured in a swarm of eight.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server)
    except OSError as error:  # an address that is in use, or not this machine's
        raise LocalError(f"cannot serve: {error.strerror or error}") from error


def _start_log(level: LogLevel) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
