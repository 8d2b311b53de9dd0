"""Jobs that want files: each asks its daemon for a path until it gets a cached copy.

A job that got the original path would be content; these ask again a little later, so that what a
fault has held up is seen to come right in the end. A job whose daemon is dead waits for the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulations.nodes import Node
from simulations.settings import USER
from swarmcache.chunks import FileVersion

if TYPE_CHECKING:
    from simulations.cluster import Cluster

RETRY_S = 0.5


@dataclass(slots=True)
class Client:
    """One job on one node. ``keeps_asking`` until it has a cached copy."""

    node: Node
    path: bytes
    user: str = USER
    can_read: bool = True
    chunk_size_bytes: int | None = None
    keeps_asking: bool = True
    since_s: float = 0.0
    asked_s: float = 0.0
    content_s: float | None = None
    originals: int = 0


class Clients:
    """All jobs of a cluster. ``reasons``: why they got the original."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._requests = 0
        self._asked: dict[int, int] = {}  # request -> number of the job
        self.pending: dict[int, Client] = {}  # not content yet, by number of the job
        self.jobs = 0
        self.answers = 0
        self.longest_s = 0.0
        self.reasons: dict[str, int] = {}
        self.on_content: Callable[[Client], None] | None = None
        # Jobs whose files are being fetched together: since when, and what they want.
        self.together: dict[int, tuple[float, Node, Sequence[bytes]]] = {}
        cluster.on_answer = self._answered
        cluster.on_files = self._answered_together

    @property
    def waiting(self) -> bool:
        """Some job is not content yet."""
        return bool(self.pending or self.together)

    def want(self, client: Client) -> None:
        """A job begins."""
        self.jobs += 1
        client.since_s = self._cluster.engine.now_s
        self.pending[self.jobs] = client
        self._ask(self.jobs)

    def want_at(self, at_s: float, client: Client) -> None:
        """A job begins at this time."""
        self._cluster.engine.at(at_s, self.want, client)

    def want_together_at(self, at_s: float, node: Node, paths: Sequence[bytes]) -> None:
        """A job begins at this time that wants small files, all at once."""
        self._cluster.engine.at(at_s, self._want_together, (node, paths))

    def _want_together(self, wanted: tuple[Node, Sequence[bytes]]) -> None:
        """As the client does: what does not come together is asked for singly."""
        node, paths = wanted
        if node.lost:
            return
        self._requests += 1
        self.together[self._requests] = (self._cluster.engine.now_s, node, paths)
        current = self._cluster.file_server.current
        missing = [
            version
            for version in map(current.__getitem__, paths)
            if version.version_id not in node.disk.replicas
        ]
        if node.alive and missing:
            self._cluster.want_files(node, missing, self._requests)
        else:
            self._answered_together(node, self._requests)

    def _answered_together(self, node: Node, request: int) -> None:
        """Not within the call of the machine that has answered."""
        self._cluster.engine.at(self._cluster.engine.now_s, self._ask_singly, request)

    def _ask_singly(self, request: int) -> None:
        _, node, paths = self.together.pop(request)
        for path in paths:
            self.want(Client(node, path))

    def _ask(self, number: int) -> None:
        client = self.pending[number]
        if client.node.lost:
            del self.pending[number]
            return
        if not client.node.alive:
            self._ask_again(number)
            return
        client.asked_s = self._cluster.engine.now_s
        self._requests += 1
        self._asked[self._requests] = number
        self._cluster.want_file(
            client.node.index,
            self._cluster.file_server.current[client.path],
            self._requests,
            user=client.user,
            can_read=client.can_read,
            chunk_size_bytes=client.chunk_size_bytes,
        )

    def _ask_again(self, number: int) -> None:
        self._cluster.engine.at(self._cluster.engine.now_s + RETRY_S, self._ask, number)

    def _answered(
        self, node: Node, request: int, version: FileVersion, cached: bool, reason: str
    ) -> None:
        number = self._asked.pop(request)
        client = self.pending[number]
        now_s = self._cluster.engine.now_s
        self.answers += 1
        self.longest_s = max(self.longest_s, now_s - client.asked_s)
        if not cached:
            client.originals += 1
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            if client.keeps_asking:
                self._ask_again(number)
                return
        del self.pending[number]
        client.content_s = now_s
        if self.on_content is not None:
            self.on_content(client)

    def asked_s(self, node: Node, version: FileVersion) -> float:
        """When the first of those asked who wait for this file on this node; else for ever ago."""
        return min(
            (
                client.asked_s
                for client in (self.pending[number] for number in self._asked.values())
                if client.node is node and client.path == version.path
            ),
            default=-math.inf,
        )

    def waiting_since_s(self) -> list[float]:
        """When those asked who have no answer yet."""
        singly_s = [self.pending[number].asked_s for number in self._asked.values()]
        return singly_s + [since_s for since_s, _, _ in self.together.values()]
