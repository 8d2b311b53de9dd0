"""What tests of a whole swarm share: files of known bytes, gets on many nodes, and what is seen.

    with Box(hosts=4, directory=tmp_path) as box:
        swarm = Swarm(box, {"file_servers.default.slots_max": 2})
        swarm.start()
        file = swarm.put("corpus", 16 * MIB)
        gets = swarm.get_everywhere(file)
        holder = swarm.wait_for_reader()

Nothing here decides what is right; the tests do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmcache.client import Client
from swarmcache.errors import DaemonUnavailable
from tests.box import Box, Cluster, Host, Process, wait_until

MIB = 1024 * 1024
# Size of the chunks of all files up to 128 MiB.
CHUNK_BYTES = 256 * 1024
# For what is expected within seconds: long enough for a machine that is busy with other things.
PATIENCE_S = 30.0
# For a whole transfer, which takes some seconds in all tests.
TRANSFER_S = 90.0

# A daemon that has the right bytes on its disk and sends wrong ones: one bit of each piece.
FLIPPING_DAEMON = (
    "-c",
    """
import os, sys

def send_flipped(socket_fd, file_fd, offset, count):
    data = bytearray(os.pread(file_fd, count, offset))
    data[len(data) // 2] ^= 1
    return os.write(socket_fd, data)

os.sendfile = send_flipped
from swarmcache.cli import main
sys.exit(main())
""",
)


@dataclass(frozen=True)
class Reader:
    """A node in the middle of a leased range, and the id of its lease."""

    node: Host
    lease_id: int


def digest_of(path: Path) -> str:
    """SHA-256 of a file, which may be on a node's disk: those can be seen from outside."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Swarm:
    """swarmcache on all nodes of a box, and what can be seen of it from outside.

    ``digests``: SHA-256 of every file version that was put on the file server, by path; the last
    one is what is there now.
    """

    def __init__(self, box: Box, settings: Mapping[str, object] | None = None) -> None:
        self.box = box
        self.cluster = Cluster(box, settings)
        self.digests: dict[Path, list[str]] = {}

    def start(self, nodes: Iterable[Host] | None = None) -> None:
        """The tracker, and daemons on ``nodes`` (default: all) that are connected to it."""
        nodes = self.box.nodes if nodes is None else list(nodes)
        self.cluster.start(nodes)
        self.wait_for_tracker(nodes)

    def wait_for_tracker(self, nodes: Iterable[Host]) -> None:
        for node in nodes:
            self.wait_for(
                node, lambda status: status["node"]["tracker_connected"], "a connected tracker"
            )

    def put(self, name: str, size_bytes: int) -> Path:
        """A file of random bytes on the file server, new or in the place of another."""
        data = os.urandom(size_bytes)
        path = self.box.put(name, data)
        self.digests.setdefault(path, []).append(hashlib.sha256(data).hexdigest())
        return path

    def append(self, path: Path, size_bytes: int) -> None:
        """Write more to the end of a file that is there."""
        with open(path, "ab") as file:
            file.write(os.urandom(size_bytes))
        self.digests[path].append(digest_of(path))

    # Getting

    def get_everywhere(self, path: Path, nodes: Iterable[Host] | None = None) -> list[Process]:
        """Start a ``get`` on each of ``nodes`` (default: all)."""
        nodes = self.box.nodes if nodes is None else nodes
        return [self.cluster.get(node, path) for node in nodes]

    def paths(self, gets: Iterable[Process]) -> list[Path]:
        """What each of these ``get``s of one file printed. They must end with exit code 0."""
        return [path for get in gets for path in self.cluster.paths(get, TRANSFER_S)]

    def assert_all_cached(self, gets: Iterable[Process], path: Path) -> None:
        """Every ``get`` printed a path of its own node, with the bytes that the source has now."""
        gets = list(gets)
        found = self.paths(gets)
        reasons = [get.stderr for get in gets]
        assert path not in found, f"the original path was printed: {reasons}"
        assert len(set(found)) == len(found), "two nodes printed the same path"
        assert {digest_of(copy) for copy in found} == {self.digests[path][-1]}

    def assert_right(self, gets: Iterable[Process], path: Path) -> None:
        """Every ``get`` printed the original path, or that of a copy of what the source is now."""
        for found in self.paths(gets):
            assert digest_of(found) == self.digests[path][-1], f"wrong bytes in {found}"

    # Seeing

    def status(self, node: Host) -> dict[str, Any]:
        """What ``swarmcache status --json`` prints on this node, without starting a process."""
        socket = f"/proc/{node.keeper.pid}/root{Cluster.SOCKET}"
        with Client(socket) as client:
            return client.status()

    def wait_for(
        self,
        node: Host,
        condition: Callable[[dict[str, Any]], object],
        what: str,
        timeout_s: float = PATIENCE_S,
    ) -> None:
        """Until the node's status fulfils the condition; until then it need not be reachable."""

        def fulfilled() -> bool:
            try:
                status = self.status(node)
            except DaemonUnavailable:
                return False
            return bool(condition(status))

        wait_until(fulfilled, timeout_s, f"{what}, seen from {node.name}")

    def node_id(self, node: Host) -> str:
        """The node's name in messages and in the status."""
        return f"{node.address}:{Cluster.DAEMON_PORT}"

    def wait_for_reader(self) -> Reader:
        """A node that holds a lease and has read a part of its range, in a swarm of all.

        The file server must be slow, so that the node is still reading when this returns.
        """
        seen_from = self.box.nodes[0]
        self.wait_for(
            seen_from,
            lambda status: (
                [len(self.box.nodes)]
                == [swarm["members"] for swarm in (status["cluster"] or {}).get("swarms", [])]
            ),
            "one swarm with all nodes in it",
        )
        hosts = {self.node_id(node): node for node in self.box.nodes}

        def reading() -> Reader | None:
            for server in (self.status(seen_from)["cluster"] or {}).get("file_servers", []):
                for lease in server["leases"]:
                    node = hosts.get(lease["node"])
                    if node is not None and self._has_read_from(node, lease["first"] * CHUNK_BYTES):
                        return Reader(node, lease["lease_id"])
            return None

        found = wait_until(reading, PATIENCE_S, "a node in the middle of a leased range")
        assert found is not None
        return found

    def _has_read_from(self, node: Host, offset: int) -> bool:
        return any(
            access.host == node.name and offset <= access.offset < offset + CHUNK_BYTES
            for access in self.box.file_server.reads()
        )

    def wait_for_done(self, node: Host, done_bytes: int) -> int:
        """Until the node's only download has so many bytes on disk; returns how many it has."""
        found = 0

        def enough(status: dict[str, Any]) -> bool:
            nonlocal found
            found = sum(each["done_bytes"] for each in status["node"]["downloads"])
            return found >= done_bytes

        self.wait_for(node, enough, f"{done_bytes} bytes")
        return found


def leases_in(status: Mapping[str, Any]) -> dict[str, int]:
    """node -> lease id, from a status; empty where the tracker could not be asked."""
    servers = (status["cluster"] or {}).get("file_servers", [])
    return {lease["node"]: lease["lease_id"] for server in servers for lease in server["leases"]}
