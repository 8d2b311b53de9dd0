"""What locate, hosts and path do once their options are known."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from swarmcache.bundles import NoBundle, read_if_bundle
from swarmcache.client import Client
from swarmcache.errors import DaemonRefused, DirectoryUnusable, SourceUnreadable
from swarmcache.get import say
from swarmcache.listing import JsonArray, path_fields, printing, shown_path
from swarmcache.locate import FileLocations, local_path, locate, rank_hosts

EXIT_NOT_ALL = 1


def show_locations(
    client: Client, paths: Sequence[bytes], *, limit: int | None, bundle: bool | None, as_json: bool
) -> int:
    """Print all replicas and return the exit code."""
    complaints = _Complaints()
    with printing(), ExitStack() as stack:
        array = stack.enter_context(JsonArray()) if as_json else None
        for file in complaints.files(locate(client, paths, limit, say, bundle)):
            if array is not None:
                array.add(_fields(file))
                continue
            for replica in file.replicas:
                print(f"{replica.node}:{shown_path(replica.path)}:{replica.size_bytes}")
    return complaints.exit_code


def show_hosts(
    client: Client, paths: Sequence[bytes], *, limit: int | None, bundle: bool | None, as_json: bool
) -> int:
    """Print the nodes by what they hold of all files together, and return the exit code."""
    complaints = _Complaints()
    nodes = rank_hosts(complaints.files(locate(client, paths, None, say, bundle)))
    with printing(), ExitStack() as stack:
        array = stack.enter_context(JsonArray()) if as_json else None
        for each in nodes[:limit]:
            if array is not None:
                array.add({"node": each.node, "size_bytes": each.size_bytes})
            else:
                print(each.node, each.size_bytes)
    return complaints.exit_code


def show_paths(
    client: Client,
    paths: Iterable[bytes],
    *,
    bundle: bool | None,
    end: bytes,
    config_file: Path | None,
) -> int:
    """Print where the copies are or would be, and return the exit code."""
    complaints = _Complaints()
    with printing():
        for path in paths:
            try:
                members = _members(path, bundle)
            except NoBundle as error:
                complaints.complain(path, str(error))
                continue
            for each in members:
                try:
                    copy = local_path(client, each, config_file)
                except (SourceUnreadable, DaemonRefused, DirectoryUnusable) as error:
                    complaints.complain(each, str(error))
                else:
                    sys.stdout.buffer.write(copy + end)
        sys.stdout.buffer.flush()
    return complaints.exit_code


class _Complaints:
    """Tells on stderr what is not known of single files, and keeps the exit code."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._reasons: set[str] = set()

    def complain(self, path: bytes, reason: str) -> None:
        self.exit_code = EXIT_NOT_ALL
        say(f"{os.fsdecode(path)!r}: {reason}")

    def files(self, files: Iterable[FileLocations]) -> Iterator[FileLocations]:
        """Those that can be read; of all others, and of what nobody knows, is told."""
        for file in files:
            if not file.readable:
                self.complain(file.path, file.reason)
                continue
            if file.reason and file.reason not in self._reasons:  # one line, not one per file
                self._reasons.add(file.reason)
                self.exit_code = EXIT_NOT_ALL
                say(f"other nodes may hold replicas, too: {file.reason}")
            if file.more:
                nodes = "1 more node is" if file.more == 1 else f"{file.more} more nodes are"
                say(f"{os.fsdecode(file.path)!r}: {nodes} said to hold it")
            yield file


def _members(path: bytes, bundle: bool | None) -> list[bytes]:
    """What a bundle lists; of anything else, and of what cannot be read, the path itself.

    Raises NoBundle.
    """
    try:
        lines = read_if_bundle(path, bundle)
    except SourceUnreadable:
        return [path]
    return [path] if lines is None else [line for line in lines if line]


def _fields(file: FileLocations) -> dict[str, Any]:
    """One file, for programs."""
    return {
        **path_fields("path", file.path),
        "size_bytes": file.size_bytes,
        "more": file.more,
        "reason": file.reason,
        "replicas": [
            {"node": each.node, **path_fields("path", each.path), "linked": each.linked}
            for each in file.replicas
        ],
    }
