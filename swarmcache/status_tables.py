"""What people see of ``status``: this node, the nodes of the cluster, swarms, slots and queues.

Imports rich, so it is imported only when there is something to show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from swarmcache.display import size_text
from swarmcache.listing import duration_text, shown_path

ID_DIGITS = 12  # of the 64 of a version id: enough to tell files apart by eye


def status_renderables(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The answer to ``status`` as tables."""
    yield from _node_renderables(status["node"])
    cluster = status.get("cluster")
    members = status.get("members") or []
    if members or cluster is not None:
        yield _nodes_table(members, (cluster or {}).get("nodes", []))
    if cluster is None:
        what = "Swarms and slots" if members else "The cluster"
        yield Text(f"{what} cannot be shown: {status.get('reason') or 'no tracker'}")
        return
    if cluster.get("file_servers"):
        yield _file_servers_table(cluster["file_servers"])
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
    if node.get("stand_in"):
        tracker = f"away ({node['stand_in']} stands in for it)"
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
            "file",
            "size:right",
            "done:right",
            "from peers:right",
            "from file server:right",
            "waiting for",
        )
        for each in node["downloads"]:
            table.add_row(
                _shown(each.get("path") or str(each.get("version_id", ""))[:ID_DIGITS]),
                *_sizes(each, "size_bytes", "done_bytes"),
                *_sizes(each, "from_peers_bytes", "from_file_server_bytes"),
                *_cells(each, "waiting_for"),
            )
        yield table


def _disk_text(disk: Mapping[str, Any]) -> str:
    used, free, capacity = _sizes(disk, "used_bytes", "free_bytes", "capacity_bytes")
    return f"{disk.get('file_count', 0)} files, {used}; disk: {free} free of {capacity}"


# Columns of the table of nodes; those of the second kind are left out where they say nothing.
NODE_COLUMNS = ("node", "name", "state", "told:right", "disk", "free:right", "of:right")
MORE_NODE_COLUMNS = (
    "cached:right",
    "pinned:right",
    "up:right",
    "down:right",
    "rack",
    "version",
    "files:right",
    "replicas:right",
    "leases:right",
    "connected:right",
)
STATE_STYLES = {"suspect": "yellow", "dead": "bold red", "left": "dim"}
DISK_STYLES = {"full": "yellow", "sick": "bold red"}


def _nodes_table(
    members: Iterable[Mapping[str, Any]], connected: Iterable[Mapping[str, Any]]
) -> Table:
    """All nodes, as they tell of themselves and as the tracker knows them."""
    nodes: dict[str, dict[str, Any]] = {str(each.get("node")): dict(each) for each in members}
    for each in connected:
        node = nodes.setdefault(str(each.get("node")), {})
        for key, value in each.items():
            node.setdefault(key, value)
    rows = [_node_row(each) for each in sorted(nodes.values(), key=_node_order)]
    columns = range(len(NODE_COLUMNS) + len(MORE_NODE_COLUMNS))
    shown = [
        column
        for column in columns
        if column < len(NODE_COLUMNS) or any(str(row[column]) not in ("", "0") for row in rows)
    ]
    headings = NODE_COLUMNS + MORE_NODE_COLUMNS
    table = _table("Nodes", *(headings[column] for column in shown))
    for row in rows:
        table.add_row(*(row[column] for column in shown))
    return table


def _node_order(node: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """By name, where numbers count as such: node9 comes before node10."""
    text = f"{node.get('name')} {node.get('node')}"
    parts = re.split("([0-9]+)", text)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _node_row(node: Mapping[str, Any]) -> list[Text | str]:
    state, disk = str(node.get("state", "")), str(node.get("disk") or "")
    age_s, connected_s = node.get("age_s"), node.get("connected_s")
    pinned_bytes = node.get("pinned_bytes")
    return [
        *_cells(node, "node", "name"),
        Text(state, STATE_STYLES.get(state, "")),
        "" if age_s is None else duration_text(age_s),
        Text(disk, DISK_STYLES.get(disk, "")),
        *_sizes(node, "free_bytes", "capacity_bytes", "used_bytes"),
        size_text(pinned_bytes) if pinned_bytes else "",
        *_cells(node, "uploads", "downloads", "rack", "version"),
        *_cells(node, "file_count", "replicas", "leases"),
        "" if connected_s is None else _duration_text(connected_s),
    ]


def _file_servers_table(file_servers: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "File servers",
        "name",
        "slots:right",
        "of them for cp:right",
        "waiting:right",
        "read:right",
        "leases held by",
    )
    for each in file_servers:
        holders = ", ".join(str(lease.get("node")) for lease in each.get("leases", []))
        table.add_row(
            *_cells(each, "name"),
            f"{each.get('slots_used', 0)}/{each.get('slots_max', 0)}",
            *_cells(each, "writes", "waiting"),
            *_sizes(each, "read_bytes"),
            _shown(holders),
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
        "name",
        "reads:right",
        "read:right",
        "writes:right",
        "ran out:right",
        "failed:right",
        "waits:right",
        "mean:right",
        "max:right",
        "now:right",
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
        "file version",
        "size:right",
        "chunks:right",
        "nodes:right",
        "complete:right",
        "unread:right",
        "leased:right",
        "waiting:right",
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
    return (_shown(value) if (value := row.get(key)) is not None else "" for key in keys)


def _shown(value: object) -> str:
    """A cell. Names may be any user's, and are shown to everybody."""
    return escape(shown_path(str(value).encode(errors="replace")))


def _sizes(row: Mapping[str, Any], *keys: str) -> Iterator[str]:
    return (size_text(int(row.get(key) or 0)) for key in keys)


def _duration_text(duration_s: float) -> str:
    minutes, seconds = divmod(int(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
