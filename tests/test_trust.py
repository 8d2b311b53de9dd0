"""Lost indexes, tampering and rot, on real daemons: nothing wrong is handed out or served, nothing
that is right is fetched again, and what is wrong comes back from peers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.box import Box, Host, wait_until
from tests.swarm_helpers import CHUNK_BYTES, MIB, PATIENCE_S, Swarm, digest_of

pytestmark = [pytest.mark.box, pytest.mark.slow]

IMAGE_MIB = 128
SIZE_BYTES = 16 * CHUNK_BYTES
# A chunk on the wire, and nothing like two.
ONE_CHUNK_BYTES = 1.5 * CHUNK_BYTES

MakeSwarm = Callable[[int], Swarm]


@pytest.fixture
def make_swarm(tmp_path: Path) -> Iterator[MakeSwarm]:
    with ExitStack() as stack:

        def make(hosts: int) -> Swarm:
            box = stack.enter_context(Box(hosts=hosts, directory=tmp_path))
            return Swarm(box, {"cache.scrub_rate": "1GiB"})

        yield make


def index_of(node: Host) -> Path:
    return node.disk / "cache" / ".swarmcache" / "index.sqlite"


def end(swarm: Swarm, node: Host) -> None:
    """Stop a daemon in an orderly way."""
    process = swarm.cluster.daemons[node.name]
    process.signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


def restart(swarm: Swarm, node: Host) -> None:
    swarm.cluster.start_daemons([node])
    swarm.wait_for_tracker([node])


def get(swarm: Swarm, node: Host, file: Path) -> Path:
    """The path of a cached copy of what the file is now."""
    [path] = swarm.paths([swarm.cluster.get(node, file)])
    assert path != file
    assert digest_of(path) == swarm.digests[file][-1]
    return path


def received_bytes(swarm: Swarm, node: Host) -> int:
    node_status: dict[str, Any] = swarm.status(node)["node"]
    return sum(node_status["received_bytes"].values())


# --- the index ------------------------------------------------------------------------------------


def change_index(node: Host, statement: str) -> None:
    """On the node, for SQLite would resolve the path that leads there from outside."""
    script = "import sqlite3, sys\nwith sqlite3.connect(sys.argv[1]) as c: c.execute(sys.argv[2])"
    node.run([sys.executable, "-c", script, index_of(node), statement])


def delete(node: Host) -> None:
    index_of(node).unlink()


def delete_all(node: Host) -> None:
    for path in index_of(node).parent.glob("index.sqlite*"):
        path.unlink()


def cut(node: Host) -> None:
    os.truncate(index_of(node), index_of(node).stat().st_size // 2)


def cut_log(node: Host) -> None:
    """While the index itself is still empty."""
    os.truncate(index_of(node).with_name("index.sqlite-wal"), 10_000)


def fill_with_garbage(node: Host) -> None:
    index_of(node).write_bytes(os.urandom(50_000))


def make_old(node: Host) -> None:
    change_index(node, "PRAGMA user_version = 1")


@pytest.mark.parametrize(
    ("ruin", "killed"),
    [
        pytest.param(delete, False, id="deleted"),
        pytest.param(delete_all, True, id="deleted with its log"),
        pytest.param(cut, False, id="truncated"),
        pytest.param(cut_log, True, id="last changes lost"),
        pytest.param(fill_with_garbage, False, id="garbage"),
        pytest.param(make_old, False, id="old"),
    ],
)
def test_a_ruined_index_is_said_once_and_costs_no_byte_from_peers_or_file_server(
    make_swarm: MakeSwarm, ruin: Callable[[Host], None], killed: bool
) -> None:
    swarm = make_swarm(2)
    swarm.start()
    node, _ = swarm.box.nodes
    files = [swarm.put(f"corpus{number}", (1 + number) * MIB) for number in range(6)]
    for file in files:
        swarm.assert_all_cached(swarm.get_everywhere(file), file)
    copies = {file: get(swarm, node, file) for file in files}
    inodes = {file: copy.stat().st_ino for file, copy in copies.items()}
    if killed:
        node.kill(swarm.cluster.daemons[node.name])
    else:
        end(swarm, node)
    ruin(node)
    read_before = swarm.box.file_server.bytes_read()

    restart(swarm, node)
    assert {file: get(swarm, node, file) for file in files} == copies

    assert {file: copy.stat().st_ino for file, copy in copies.items()} == inodes
    assert swarm.box.file_server.bytes_read() == read_before
    assert received_bytes(swarm, node) == 0
    assert swarm.cluster.daemons[node.name].stderr.count("made again from the files") == 1
    swarm.wait_for(
        node, lambda status: status["node"]["disk"]["file_count"] == len(files), "all in the index"
    )


# --- tampering and rot ----------------------------------------------------------------------------


def test_a_bit_flipped_by_hand_is_noticed_and_one_chunk_comes_from_a_peer(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    swarm.start()
    node, _ = swarm.box.nodes
    file = swarm.put("corpus", SIZE_BYTES)
    swarm.assert_all_cached(swarm.get_everywhere(file), file)
    copy = get(swarm, node, file)
    read_before = swarm.box.file_server.bytes_read()
    received_before = received_bytes(swarm, node)
    before = copy.stat()
    with copy.open("r+b") as opened:
        opened.seek(3 * CHUNK_BYTES)
        opened.write(b"tampered")
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert get(swarm, node, file) == copy

    assert swarm.box.file_server.bytes_read() == read_before
    assert 0 < received_bytes(swarm, node) - received_before <= ONE_CHUNK_BYTES
    assert "was touched" in swarm.cluster.daemons[node.name].stderr


class RottingDisk:
    """A disk of a node whose medium can be changed below its file system."""

    def __init__(self, swarm: Swarm, node: Host) -> None:
        self._node = node
        self._image = swarm.box.directory / f"{node.name}.image"
        with self._image.open("wb") as file:
            file.truncate(IMAGE_MIB << 20)
        node.run(["mkfs.ext4", "-q", "-F", self._image])
        self.mount()

    def mount(self) -> None:
        """In the place of the node's own disk."""
        self._node.run(["mount", "-o", "loop", self._image, self._node.disk])

    def flip(self, some_bytes: bytes) -> None:
        """Flip a bit of the only place that has these bytes. Nobody may use the disk."""
        self._node.run(["umount", self._node.disk])
        data = self._image.read_bytes()
        at = data.index(some_bytes)
        assert data.find(some_bytes, at + 1) < 0
        with self._image.open("r+b") as file:
            file.seek(at)
            file.write(bytes([some_bytes[0] ^ 1]))
        self.mount()


def rot(swarm: Swarm, disk: RottingDisk, node: Host, file: Path, verified_s: float = 1.0) -> None:
    """A bit of chunk 5 of the node's copy flips, and ``stat`` says nothing of it.

    ``verified_s``: when it was last digested; as it is, it will be scrubbed at once.
    """
    end(swarm, node)
    change_index(node, f"UPDATE replica SET verified_s = {verified_s}")
    with file.open("rb") as opened:
        opened.seek(5 * CHUNK_BYTES + 1000)
        disk.flip(opened.read(64))
    restart(swarm, node)


@pytest.mark.parametrize("found_by", ["verify", "a peer"])
def test_a_rotten_chunk_is_found_on_demand_and_by_the_first_peer_that_gets_it(
    make_swarm: MakeSwarm, found_by: str
) -> None:
    swarm = make_swarm(3)
    node, holder, latecomer = swarm.box.nodes
    disk = RottingDisk(swarm, node)
    swarm.start([node, latecomer] if found_by == "a peer" else None)
    file = swarm.put("corpus", SIZE_BYTES)
    copy = get(swarm, node, file)
    if found_by == "verify":
        get(swarm, holder, file)
    read_before = swarm.box.file_server.bytes_read()

    rot(swarm, disk, node, file, verified_s=time.time())
    assert swarm.paths([swarm.cluster.get(node, file)]) == [copy], "it leaves a trace"
    assert digest_of(copy) != swarm.digests[file][-1]
    if found_by == "verify":
        verify = swarm.cluster.command(node, "verify", file)
        assert verify.wait(PATIENCE_S) == 1
        assert "1 of 16 chunks were rotten" in verify.stdout + verify.stderr
    else:
        get(swarm, latecomer, file)

    wait_until(lambda: received_bytes(swarm, node), PATIENCE_S, "a chunk from a peer")
    wait_until(copy.exists, PATIENCE_S, "the copy at its place again")
    assert digest_of(copy) == swarm.digests[file][-1]
    read_bytes = swarm.box.file_server.bytes_read() - read_before
    assert read_bytes == 0 if found_by == "verify" else read_bytes > 0


def test_a_rotten_chunk_is_found_in_the_background_and_replaced_by_a_peer(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    node, _ = swarm.box.nodes
    disk = RottingDisk(swarm, node)
    swarm.start()
    file = swarm.put("corpus", SIZE_BYTES)
    swarm.assert_all_cached(swarm.get_everywhere(file), file)
    copy = get(swarm, node, file)
    read_before = swarm.box.file_server.bytes_read()

    rot(swarm, disk, node, file)
    wait_until(lambda: received_bytes(swarm, node), PATIENCE_S, "a chunk from the peer")
    wait_until(copy.exists, PATIENCE_S, "the copy at its place, with no client asking")

    assert digest_of(copy) == swarm.digests[file][-1]
    assert get(swarm, node, file) == copy
    assert received_bytes(swarm, node) <= ONE_CHUNK_BYTES
    assert swarm.box.file_server.bytes_read() == read_before
    assert "1 chunks of the copy of" in swarm.cluster.daemons[node.name].stderr


def test_a_rotten_chunk_that_was_found_is_not_served_and_all_others_are(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    node, latecomer = swarm.box.nodes
    disk = RottingDisk(swarm, node)
    swarm.start()
    file = swarm.put("corpus", SIZE_BYTES)
    copy = get(swarm, node, file)
    read_before = swarm.box.file_server.bytes_read()

    rot(swarm, disk, node, file)
    wait_until(lambda: not copy.exists(), PATIENCE_S, "the copy taken out")
    get(swarm, latecomer, file)

    peers = swarm.status(latecomer)["node"]["peers"]
    assert [peer["distrusted"] for peer in peers] == [False]
    assert swarm.box.file_server.bytes_read() - read_before <= ONE_CHUNK_BYTES
    wait_until(copy.exists, PATIENCE_S, "the copy complete again, by the latecomer")
    assert digest_of(copy) == swarm.digests[file][-1]
