"""What people see of ``status``: nodes in order, what is wrong with them, and no empty columns."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from swarmcache.status_tables import status_renderables

GIB = 1 << 30


def member(name: str, **fields: Any) -> dict[str, Any]:
    known = {
        "node": f"{name}.cluster:7381",
        "name": name,
        "state": "alive",
        "age_s": 3.4,
        "rack": "",
        "version": "1.0",
        "capacity_bytes": 100 * GIB,
        "disk": "ok",
        "free_bytes": 50 * GIB,
        "used_bytes": 5 * GIB,
        "pinned_bytes": 0,
        "uploads": 0,
        "downloads": 0,
        "standing_in": False,
    }
    return known | fields


def shown(status: dict[str, Any]) -> list[str]:
    """The lines on a wide terminal, without the borders of tables."""
    file = io.StringIO()
    console = Console(file=file, width=200, highlight=False)
    for renderable in status_renderables({"node": {}, "reason": "", "cluster": None} | status):
        console.print(renderable)
    return file.getvalue().splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    """What the row of this node says, but for its address."""
    (line,) = (line for line in lines if f" {name} " in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_nodes_are_in_the_order_of_their_numbers() -> None:
    lines = shown({"members": [member(name) for name in ("n10", "m1", "n9", "n1")]})

    places = [index for name in ("m1", "n1", "n9", "n10")
              for index, line in enumerate(lines) if f" {name} " in line]  # fmt: skip
    assert places == sorted(places)


def test_columns_in_which_nobody_has_anything_are_left_out() -> None:
    plain = shown({"members": [member("n1")]})
    rich = shown({"members": [member("n1", rack="r7", pinned_bytes=GIB, uploads=3)]})

    beginning = ["n1", "alive", "3s", "ok", "50.0 GiB", "100.0 GiB", "5.0 GiB"]
    assert cells(plain, "n1") == [*beginning, "1.0"]
    assert cells(rich, "n1") == [*beginning, "1.0 GiB", "3", "r7", "1.0"]


def test_what_the_tracker_knows_of_a_node_stands_beside_what_the_node_tells() -> None:
    known = {"name": "n1", "connected_s": 61, "file_count": 4, "replicas": 3, "leases": 2}
    connected = [{"node": "n1.cluster:7381", **known}, {"node": "n2.cluster:7381", "name": "n2"}]

    lines = shown({"members": [member("n1")], "cluster": {"nodes": connected}})

    assert cells(lines, "n1")[-5:] == ["1.0", "4", "3", "2", "0:01:01"]
    assert cells(lines, "n2")[:4] == ["n2", "", "", ""]


def test_nodes_are_shown_without_a_tracker_and_the_reason_for_what_is_not() -> None:
    lines = shown({"members": [member("n1", state="dead", disk="sick")], "reason": "gone"})

    assert cells(lines, "n1")[:4] == ["n1", "dead", "3s", "sick"]
    assert "Swarms and slots cannot be shown: gone" in lines


def test_a_table_of_file_servers_is_there_when_somebody_has_used_one() -> None:
    server = {"name": "nfs01:/export", "slots_max": 4}

    assert not any("File servers" in line for line in shown({"cluster": {"file_servers": []}}))
    lines = shown({"cluster": {"file_servers": [server]}})
    assert any("File servers" in line for line in lines)
    assert cells(lines, "nfs01:/export")[0] == "0/4"


def test_without_gossip_and_tracker_there_is_no_table() -> None:
    assert shown({"members": None, "reason": "gone"})[-1] == "The cluster cannot be shown: gone"


def test_a_node_that_has_said_nothing_of_itself_has_its_row() -> None:
    unknown = dict.fromkeys(("disk", "free_bytes", "used_bytes", "pinned_bytes", "uploads"))

    assert cells(shown({"members": [member("n1", **unknown)]}), "n1")[:4] == [
        "n1",
        "alive",
        "3s",
        "",
    ]


def test_no_name_that_a_user_has_given_plays_tricks_on_a_terminal() -> None:
    """Files are named by users, and so are the file servers that they mount themselves (FUSE)."""
    name = "\x1b]0;title\x07\x1b[2J[bold]é"
    download = {"path": f"/nfs/{name}", "size_bytes": 1, "done_bytes": 0, "waiting_for": name}
    server = {"name": name, "leases": [{"node": name}]}

    lines = shown({"node": {"downloads": [download]}, "cluster": {"file_servers": [server]}})

    text = "".join(lines)
    assert "\x1b" not in text and "\x07" not in text
    assert text.count("\\x1b]0;title\\x07\\x1b[2J[bold]é") == 4
