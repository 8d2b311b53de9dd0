"""Gossip of real daemons: they find one another, notice who leaves, and remember one another."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from swarmcache import peers_file
from swarmcache.datagram_auth import ENVELOPE_BYTES
from swarmcache.gossip_records import EPOCH_MAX
from swarmcache.peers_file import PEERS_MAX, PeersFile
from tests.box import wait_until
from tests.local_daemons import COMMAND, PACKAGE_PARENT, LocalDaemons, LocalNode

PATIENCE_S = 30.0
TWO_HOURS_AHEAD = [
    *COMMAND[:2],
    f"import time; now = time.time; time.time = lambda: now() + 7200\n{COMMAND[2]}",
]

FAILS_AT_FIRST = [
    *COMMAND[:2],
    f"""
import sys
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.gossip import Gossip
from swarmcache.status_meter import StatusMeter

def failing_once(function, calls_before):
    calls = []
    def call(*args):
        calls.append(args)
        assert len(calls) != 1 + calls_before, "a bug"
        return function(*args)
    return call

Gossip._receive = failing_once(Gossip._receive, 0)
StatusMeter.measure = failing_once(StatusMeter.measure, 1)
{COMMAND[2]}""",
]


def gossip(node: LocalNode) -> dict[str, Any]:
    found: dict[str, Any] = node.status()["node"]["gossip"]
    return found


def wait_for_others(nodes: list[LocalNode], count: int) -> None:
    wait_until(
        lambda: all(gossip(node)["others"] == count for node in nodes),
        PATIENCE_S,
        f"{count} others known to each of {len(nodes)}",
    )


@pytest.mark.slow
def test_nodes_find_one_another_through_the_tracker_and_a_leaver_says_so(tmp_path: Path) -> None:
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        nodes = [local.start_daemon(name) for name in "abc"]
        wait_for_others(nodes, 2)

        nodes.pop().end()

        # Far sooner than it would be suspected, and then believed to be dead.
        wait_until(lambda: all(gossip(node)["others"] == 1 for node in nodes), 3.0, "the leave")


@pytest.mark.slow
def test_a_failure_that_nobody_expected_makes_no_node_deaf_or_blind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(4 << 20))
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node, other = local.start_daemon("a", command=FAILS_AT_FIRST), local.start_daemon("b")
        wait_for_others([node, other], 1)
        wait_until(lambda: node.said().count("AssertionError: a bug") == 2, PATIENCE_S, "failures")

        node.get(source)

        def used_bytes() -> int:
            members = other.status()["members"]
            return sum(each["used_bytes"] for each in members if each["node"] == node.address)

        wait_until(lambda: used_bytes() >= source.stat().st_size, PATIENCE_S, "what it tells now")


@pytest.mark.slow
def test_nodes_find_one_another_again_without_a_tracker(tmp_path: Path) -> None:
    """Though the clocks of both are two hours slow."""
    with LocalDaemons(tmp_path) as local:
        tracker = local.start_tracker(command=TWO_HOURS_AHEAD)
        first, second = local.start_daemon("a"), local.start_daemon("b")
        wait_for_others([first, second], 1)
        tracker.end()
        first.end()

        [peer] = (first.cache_dir / ".swarmcache" / "peers").read_text().splitlines()[2:]
        assert peer == second.address
        local.tracker = None
        wait_for_others([local.start_daemon("a"), second], 1)


@pytest.mark.slow
def test_nothing_is_sent_in_answer_to_what_is_not_authentic(tmp_path: Path) -> None:
    with LocalDaemons(tmp_path) as local, socket.socket(type=socket.SOCK_DGRAM) as stranger:
        node = local.start_daemon()
        host, _, port = node.address.rpartition(":")
        stranger.bind(("127.0.0.1", 0))
        stranger.settimeout(0.5)
        for length in (0, 1, ENVELOPE_BYTES, 1200, 2000):
            stranger.sendto(b"\x01" * length, (host, int(port)))

        # By the kernel (too short, too long) or by the daemon.
        wait_until(lambda: sum(gossip(node)["refused"].values()) == 5, 10, "it to arrive")
        assert gossip(node)["refused"]["foreign"] >= 2
        with pytest.raises(TimeoutError):
            stranger.recv(1)


@pytest.mark.slow
def test_gossip_can_be_turned_off(tmp_path: Path) -> None:
    with LocalDaemons(tmp_path) as local, socket.socket(type=socket.SOCK_DGRAM) as other:
        node = local.start_daemon(settings="[gossip]\nrate_max = 'off'")
        host, _, port = node.address.rpartition(":")

        assert node.status()["node"]["gossip"] is None
        other.bind((host, int(port)))


# --- the nodes of former times --------------------------------------------------------------------


def test_each_life_has_a_higher_epoch_whatever_the_clock_says(tmp_path: Path) -> None:
    epochs = []
    for time_ms in (5000, 6000, 0, 7000):
        file = PeersFile(str(tmp_path))
        epochs.append(file.begin(time_ms))
        file.close()

    assert epochs == [5000, 6000, 6001, 7000]


def test_some_peers_are_remembered(tmp_path: Path) -> None:
    file = PeersFile(str(tmp_path))
    assert file.peers == []
    file.begin(1)
    file.write([f"node-{number}:7381" for number in range(PEERS_MAX + 1)])
    file.close()

    file = PeersFile(str(tmp_path))
    assert file.epoch == 1
    assert file.peers == [f"node-{number}:7381" for number in range(PEERS_MAX)]
    file.close()


def test_the_clusters_time_is_remembered_until_the_next_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PeersFile(str(tmp_path))
    assert file.offset_s is None
    file.offset_s = 1.7e9
    file.write(["node:7381"])
    file.close()

    file = PeersFile(str(tmp_path))
    assert (file.offset_s, file.peers) == (1.7e9, ["node:7381"])
    file.close()
    monkeypatch.setattr(peers_file, "boot_id", lambda: bytes(16))
    file = PeersFile(str(tmp_path))
    assert (file.offset_s, file.peers) == (None, ["node:7381"])
    file.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"epoch", b"epoch x", b"epoch \xb2\n", bytes(99), b"\xff", b"epoch " + b"9" * 5000],
)
def test_a_damaged_file_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "peers").write_bytes(content)
    file = PeersFile(str(tmp_path))

    assert (file.epoch, file.offset_s, file.peers) == (0, None, [])
    file.close()


@pytest.mark.parametrize("line", ["time", "time ", "time x", "time x 5", "time x 1e3", "time  -1"])
def test_a_time_that_is_none_is_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / "peers").write_text(f"epoch 7\n{line}\nnode:7381\n")
    file = PeersFile(str(tmp_path))

    assert (file.epoch, file.offset_s) == (7, None)
    assert "node:7381" in file.peers
    file.close()


def test_an_epoch_from_the_end_of_time_leaves_room_for_another(tmp_path: Path) -> None:
    (tmp_path / "peers").write_text(f"epoch {'9' * 30}\n")
    file = PeersFile(str(tmp_path))

    assert file.begin(1) == EPOCH_MAX
    file.close()
