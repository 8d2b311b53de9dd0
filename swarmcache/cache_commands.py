"""The commands about this node's cache: ls, rm, pin, unpin, verify, and their options.

The work is in ``cache_actions.py``, imported by these commands only.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarmcache.client import real_path_of
from swarmcache.options import ConfigOption, SocketOption, make_client

if TYPE_CHECKING:
    from swarmcache.local_protocol import AboutCache

PATH_HELP = (
    "A file or a directory, by the path of the source or of the local copy. A directory stands for"
    " all cached files below it, whether it is still there or not."
)

cache_app = typer.Typer()


class SortBy(StrEnum):
    """What the files of a listing are sorted by."""

    used = "used"
    age = "age"
    size = "size"
    path = "path"
    none = "none"


SomePaths = Annotated[list[str], typer.Argument(metavar="PATH", show_default=False, help=PATH_HELP)]
AnyPaths = Annotated[
    list[str] | None, typer.Argument(metavar="PATH", show_default=False, help=PATH_HELP)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON array, an element per line, for programs.")
]


@cache_app.command()
def ls(
    paths: AnyPaths = None,
    sort: Annotated[
        SortBy,
        typer.Option(
            help="used: last used first; age: last cached first; size: largest first; path; none:"
            " as they come, without waiting for all of them."
        ),
    ] = SortBy.used,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="The other way round.")] = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """List the files in this node's cache: all, or those at PATH or below.

    "age" is the time since a file was cached, "used" since it was last used, "replicas" the number
    of other nodes that hold it ("-": the tracker cannot be asked), "state" whether a process has it
    open just now. A copy "in doubt" is digested before it is handed out again. Root sees all files,
    everybody else those that were cached for them.

    Exit code 1: nothing is cached at a PATH.
    """
    from swarmcache.cache_actions import show_files

    client = make_client(socket, config_file)
    raise typer.Exit(
        show_files(client, _real_paths(paths), sort=sort.value, reverse=reverse, as_json=as_json)
    )


@cache_app.command()
def rm(
    paths: SomePaths,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Also what is pinned; the pin goes with it.")
    ] = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Take files out of this node's cache. The sources are left alone.

    A user's own copy goes; the file itself goes with the last user's. Root removes a file for
    everybody, or, by the path of a user's copy, for that user. Whoever has a file open can go on
    reading it. What is pinned stays, without --force, and what is being fetched stays in any case.

    Exit code 0: none of it is cached any more. 1: something was not cached, or stays; it is named
    on stderr, and the rest was removed.
    """
    from swarmcache.local_protocol import Rm

    _do(Rm(_real_paths(paths), force), socket, config_file, as_json=as_json)


@cache_app.command()
def pin(
    paths: SomePaths,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Keep cached files until they are unpinned: they are not evicted.

    A pin is a user's own, and holds for the file as it is: when the source changes, what is cached
    then is another file. Files that are cached later below a pinned directory are not pinned.

    Exit code 1: something was not cached; it is named on stderr, and the rest was pinned.
    """
    from swarmcache.local_protocol import Pin

    _do(Pin(_real_paths(paths)), socket, config_file, as_json=as_json)


@cache_app.command()
def unpin(
    paths: SomePaths,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="Also the pins of others; for root.")
    ] = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Take away your own pins. It is no error if there were none.

    Exit code 1: something was not cached; it is named on stderr, and the rest was unpinned.
    """
    from swarmcache.local_protocol import Unpin

    _do(Unpin(_real_paths(paths), all_users), socket, config_file, as_json=as_json)


@cache_app.command()
def verify(
    paths: AnyPaths = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
) -> None:
    """Digest cached files anew: all, or those at PATH or below.

    Prints a line per file. A copy with rotten chunks is taken out of the cache, and what is wrong
    of it is fetched again from other nodes; a job that has it open keeps what it has. Files are
    digested one at a time, and the disk's other users go first.

    Exit code 1: chunks were rotten, or nothing is cached at a PATH.
    """
    from swarmcache.local_protocol import Verify

    _do(Verify(_real_paths(paths)), socket, config_file, as_json=as_json)


def _do(
    request: AboutCache, socket: Path | None, config_file: Path | None, *, as_json: bool
) -> None:
    from swarmcache.cache_actions import act

    raise typer.Exit(act(make_client(socket, config_file), request, as_json=as_json))


def _real_paths(names: list[str] | None) -> list[bytes]:
    """The absolute paths of what was named on the command line, as the daemon knows them."""
    from swarmcache.local_protocol import PATH_MAX_BYTES

    paths = []
    for name in names or []:
        path = real_path_of(os.fsencode(name))
        if not name:
            raise typer.BadParameter("is empty", param_hint="PATH")
        if len(path) > PATH_MAX_BYTES:
            raise typer.BadParameter(f"has more than {PATH_MAX_BYTES} bytes", param_hint="PATH")
        paths.append(path)
    return paths
