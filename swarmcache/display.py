"""What people see on a terminal: the progress of ``get`` and the tables of ``status``.

Imports rich, so it is imported only when there is something to show.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.filesize import pick_unit_and_suffix
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from swarmcache.client import Progress

if TYPE_CHECKING:
    from swarmcache.cp import CopyProgress

NAME_COLUMNS_MAX = 28
BINARY_UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
ID_DIGITS = 12  # of the 64 of a version id: enough to tell files apart by eye


def size_text(size_bytes: int) -> str:
    """A size for people, rounded: "1.5 GiB"."""
    unit, suffix = pick_unit_and_suffix(size_bytes, BINARY_UNITS, 1024)
    return f"{size_bytes} B" if unit == 1 else f"{size_bytes / unit:.1f} {suffix}"


# --- progress ------------------------------------------------------------------------------------


class ProgressDisplay:
    """One bar for all files of a ``get``, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._files: dict[int, Progress] = {}
        self._bar: _SwarmProgress | None = None
        self._task = TaskID(0)

    def show(self, progress: Progress) -> None:
        self._files[progress.index] = progress
        files = self._files.values()
        if self._bar is None:
            self._bar = _SwarmProgress(self._console)
            self._task = self._bar.add_task("", total=None, sources="")
        self._bar.update(
            self._task,
            description=_name_text(progress.asked, len(self._files)),
            total=sum(file.size_bytes for file in files),
            completed=sum(
                file.recovered_bytes + file.from_peers_bytes + file.from_file_server_bytes
                for file in files
            ),
            sources=_sources_text(files, progress),
        )
        self._bar.start()

    def clear(self) -> None:
        """Take the bar from the terminal until ``show`` is called again."""
        if self._bar is not None:
            self._bar.stop()


class CopyDisplay:
    """One bar for all files of a ``cp``, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = _SwarmProgress(console or Console(stderr=True))
        self._task = self._bar.add_task("", total=None, sources="")
        self._files: dict[int, tuple[int, int]] = {}  # size and what is done, by index

    def show(self, progress: CopyProgress) -> None:
        self._files[progress.index] = (progress.size_bytes, progress.done_bytes)
        waiting = f"waiting for a slot of {progress.waiting_for}" if progress.waiting_for else ""
        self._bar.update(
            self._task,
            description=_name_text(os.fsdecode(progress.source), len(self._files)),
            total=sum(size_bytes for size_bytes, _ in self._files.values()),
            completed=sum(done_bytes for _, done_bytes in self._files.values()),
            sources=waiting or "to the file server",
        )
        self._bar.start()

    def clear(self) -> None:
        """Take the bar from the terminal until ``show`` is called again."""
        self._bar.stop()


class TransferDisplay:
    """One bar for all that is brought somewhere, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = _SwarmProgress(console or Console(stderr=True))
        self._task = self._bar.add_task("", total=None, sources="")

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self._bar.update(self._task, description=what, total=total_bytes, completed=done_bytes)
        self._bar.start()

    def clear(self) -> None:
        """Take the bar from the terminal until ``show`` is called again."""
        self._bar.stop()


class _SwarmProgress(RichProgress):
    """A bar with bytes, rate and remaining time, and below it a line that says where from."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
            redirect_stdout=False,  # stdout carries paths, whatever it is
            redirect_stderr=False,
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        tasks = list(tasks)
        table = Table.grid(expand=True)
        table.add_row(super().make_tasks_table(tasks))
        for task in tasks:
            table.add_row(Text(task.fields["sources"], style="dim"))
        return table


def _name_text(asked: str, file_count: int) -> str:
    if file_count > 1:
        return f"{file_count} files"
    name = os.path.basename(asked.rstrip("/")).encode(errors="replace").decode()
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= NAME_COLUMNS_MAX else name[: NAME_COLUMNS_MAX - 1] + "…"


def _sources_text(files: Iterable[Progress], latest: Progress) -> str:
    peers_bytes = sum(file.from_peers_bytes for file in files)
    file_server_bytes = sum(file.from_file_server_bytes for file in files)
    recovered_bytes = sum(file.recovered_bytes for file in files)
    parts = [
        f"{size_text(peers_bytes)} from {latest.peers} peers",
        f"{size_text(file_server_bytes)} from the file server",
    ]
    if recovered_bytes:
        parts.append(f"{size_text(recovered_bytes)} from an earlier attempt")
    if latest.waiting_for:
        parts.append(f"waiting for {latest.waiting_for}")
    return ", ".join(parts)


# --- status --------------------------------------------------------------------------------------


def status_renderables(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The answer to ``status`` as tables."""
    yield from _node_renderables(status["node"])
    cluster = status.get("cluster")
    if cluster is None:
        yield Text(f"The cluster cannot be shown: {status.get('reason') or 'no tracker'}")
        return
    yield _nodes_table(cluster.get("nodes", []))
    yield _file_servers_table(cluster.get("file_servers", []))
    if cluster.get("swarms"):
        yield _swarms_table(cluster["swarms"])
    if cluster.get("corrupt"):
        table = _table("Peers that delivered wrong bytes", "node", "reports:right")
        for each in cluster["corrupt"]:
            table.add_row(*_cells(each, "node", "reports"))
        yield table


def _node_renderables(node: Mapping[str, Any]) -> Iterator[RenderableType]:
    peers = node.get("peers", [])
    connected = sum(1 for peer in peers if peer.get("connected"))
    distrusted = [str(peer.get("node")) for peer in peers if peer.get("distrusted")]
    tracker = "connected" if node.get("tracker_connected") else "not connected"
    lines = [
        Text(f"This node: {node.get('address', '?')}, tracker {tracker}, {connected} peers"),
        Text(f"Cache: {_disk_text(node.get('disk') or {})}"),
    ]
    directories = node.get("directories", [])
    for each in directories:
        if each.get("lost"):
            text = f"  lost: {each.get('path')}: {each['lost']}"
            lines.append(Text(text, style="bold red"))
        elif len(directories) > 1:
            lines.append(Text(f"  {each.get('path')}: {_disk_text(each.get('disk') or {})}"))
    if distrusted:
        names = ", ".join(distrusted)
        lines.append(Text(f"Not asked again, having sent wrong bytes: {names}", style="bold red"))
    yield Group(*lines)
    if node.get("downloads"):
        table = _table(
            "Downloads of this node",
            *("file", "size:right", "done:right", "from peers:right", "from file server:right"),
            "waiting for",
        )
        for each in node["downloads"]:
            table.add_row(
                escape(str(each.get("path") or str(each.get("version_id", ""))[:ID_DIGITS])),
                *_sizes(each, "size_bytes", "done_bytes"),
                *_sizes(each, "from_peers_bytes", "from_file_server_bytes"),
                *_cells(each, "waiting_for"),
            )
        yield table


def _disk_text(disk: Mapping[str, Any]) -> str:
    used, free, capacity = _sizes(disk, "used_bytes", "free_bytes", "capacity_bytes")
    return f"{disk.get('file_count', 0)} files, {used}; disk: {free} free of {capacity}"


def _nodes_table(nodes: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "Nodes",
        *("node", "name", "connected:right", "disk:right", "free:right", "cached:right"),
        *("files:right", "replicas:right", "leases:right"),
    )
    for each in nodes:
        table.add_row(
            *_cells(each, "node", "name"),
            _duration_text(each.get("connected_s", 0)),
            *_sizes(each, "capacity_bytes", "free_bytes", "used_bytes"),
            *_cells(each, "file_count", "replicas", "leases"),
        )
    return table


def _file_servers_table(file_servers: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "File servers",
        *("name", "slots:right", "of them for cp:right", "waiting:right", "read:right"),
        "leases held by",
    )
    for each in file_servers:
        holders = ", ".join(str(lease.get("node")) for lease in each.get("leases", []))
        table.add_row(
            *_cells(each, "name"),
            f"{each.get('slots_used', 0)}/{each.get('slots_max', 0)}",
            *_cells(each, "writes", "waiting"),
            *_sizes(each, "read_bytes"),
            escape(holders),
        )
    return table


def statistics_renderables(statistics: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a tracker has seen since it was started, as tables."""
    yield Text(
        f"Since the tracker was started {_duration_text(statistics['period_s'])} ago, by"
        f" {statistics['nodes']} nodes that are connected now, and others:"
    )
    table = _table("", "what", "count:right", "bytes:right")
    table.add_row("requests for files", str(statistics["requests"]), "")
    table.add_row("of them for cached ones", str(statistics["hits"]), "")
    table.add_row(
        "chunks from peers",
        str(statistics["from_peers_chunks"]),
        *_sizes(statistics, "from_peers_bytes"),
    )
    table.add_row("files with replicas now", str(statistics["files"]), "")
    table.add_row("replicas now", str(statistics["replicas"]), "")
    table.add_row("replicas per file, mean", f"{statistics['replicas_per_file_mean']:g}", "")
    table.add_row("replicas per file, most", str(statistics["replicas_per_file_max"]), "")
    yield table
    yield _slots_table(statistics["file_servers"])


def _slots_table(file_servers: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "Leases of file servers",
        *("name", "reads:right", "read:right", "writes:right", "ran out:right"),
        *("failed:right", "waits:right", "mean:right", "max:right", "now:right"),
    )
    for each in file_servers:
        table.add_row(
            *_cells(each, "name", "reads"),
            *_sizes(each, "read_bytes"),
            *_cells(each, "writes", "ran_out", "failed", "waits", "wait_mean_s", "wait_max_s"),
            *_cells(each, "waiting"),
        )
    return table


def _swarms_table(swarms: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "Swarms",
        *("file version", "size:right", "chunks:right", "nodes:right", "complete:right"),
        *("unread:right", "leased:right", "waiting:right"),
    )
    for each in swarms:
        table.add_row(
            escape(str(each.get("version_id", ""))[:ID_DIGITS]),
            *_sizes(each, "size_bytes"),
            *_cells(each, "chunk_count", "members", "complete"),
            *_cells(each, "unread_chunks", "leased_chunks", "waiting"),
        )
    return table


def _table(title: str, *headings: str) -> Table:
    """``headings``: texts, with ":right" for columns of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in headings:
        text, _, side = heading.partition(":")
        table.add_column(text, justify="right" if side else "left", overflow="fold")
    return table


def _cells(row: Mapping[str, Any], *keys: str) -> Iterator[str]:
    return (escape(str(row.get(key, ""))) for key in keys)


def _sizes(row: Mapping[str, Any], *keys: str) -> Iterator[str]:
    return (size_text(int(row.get(key) or 0)) for key in keys)


def _duration_text(duration_s: float) -> str:
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
