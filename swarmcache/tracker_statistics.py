"""What the tracker has seen happen, in figures: since it started, and since it last told.

Pure logic, and a part of ``TrackerState``, which tells it of everything and passes the report on.
``at`` says what time it is, before anything else of the same event.

A *wait* is the time for which a swarm, or a file to be written, stands in the queue of its file
server and has none of its slots. It counts when it ends with a slot; one that ends at the instant
at which it began is none.

What only nodes know (hits, bytes from peers) they tell as totals of their own lives. Counted is by
how much these have grown since the node was heard of last. A node that is new here, or in another
life, or whose totals have shrunk, adds nothing at first: so nothing is counted twice, or backwards,
whoever restarts.

Invariants: no figure ever shrinks; a claim waits only while it stands in the queue without a slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from swarmcache.messages import NodeTotals
from swarmcache.slot_ledger import LedgerWatch

# Nodes whose totals are remembered, gone ones included: 100 bytes each.
NODES_MAX = 1 << 16


@dataclass(slots=True)
class ServerFigures:
    """One file server. ``reads``, ``writes``: leases granted, for a range of chunks or to write a
    file; ``ran_out``, ``failed``: those that did not end well."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    ran_out: int = 0
    failed: int = 0
    waits: int = 0
    wait_s: float = 0.0
    wait_max_s: float = 0.0


@dataclass(slots=True)
class NodeFigures:
    """All nodes together, as they have told; see ``NodeTotals``."""

    requests: int = 0
    hits: int = 0
    from_peers_chunks: int = 0
    from_peers_bytes: int = 0


@dataclass(slots=True)
class ServerStatistics(LedgerWatch):
    """The figures of one file server, told by its ledger and by the tracker.

    ``reported``: what the figures were when they were last told.
    """

    owner: TrackerStatistics
    figures: ServerFigures = field(default_factory=ServerFigures)
    reported: ServerFigures = field(default_factory=ServerFigures)
    _queued: set[bytes] = field(default_factory=set)
    _slots: Counter[bytes] = field(default_factory=Counter)
    _waiting_since_s: dict[bytes, float] = field(default_factory=dict)
    _wait_max_s: float = 0.0  # since they were last told

    # --- told by the ledger ---------------------------------------------------------------------

    def queued(self, claim: bytes) -> None:
        """A claim is new in the queue."""
        self._queued.add(claim)
        self._maybe_waits(claim)

    def withdrawn(self, claim: bytes) -> None:
        """A claim has left the queue."""
        self._queued.discard(claim)
        self._waiting_since_s.pop(claim, None)

    def held(self, claim: bytes) -> None:
        """A lease is out for this claim, which may stand in the queue or not."""
        self._slots[claim] += 1
        since_s = self._waiting_since_s.pop(claim, None)
        if since_s is not None and self.owner.now_s > since_s:
            wait_s = self.owner.now_s - since_s
            self.figures.waits += 1
            self.figures.wait_s += wait_s
            self.figures.wait_max_s = max(self.figures.wait_max_s, wait_s)
            self._wait_max_s = max(self._wait_max_s, wait_s)

    def released(self, claim: bytes) -> None:
        """One of its leases has ended."""
        self._slots[claim] -= 1
        if not self._slots[claim]:
            del self._slots[claim]
            self._maybe_waits(claim)

    def _maybe_waits(self, claim: bytes) -> None:
        if claim in self._queued and claim not in self._slots:
            self._waiting_since_s.setdefault(claim, self.owner.now_s)

    # --- told by the tracker --------------------------------------------------------------------

    def waits_for_reader(self, claim: bytes) -> None:
        """There is a slot for this claim, and no node that can use it: that is no wait."""
        self._waiting_since_s.pop(claim, None)

    def read_begins(self) -> None:
        self.figures.reads += 1
        self.owner.something_happened()

    def write_begins(self) -> None:
        self.figures.writes += 1
        self.owner.something_happened()

    def read(self, size_bytes: int) -> None:
        """So many bytes of a leased range were read."""
        self.figures.read_bytes += size_bytes
        self.owner.something_happened()

    def ran_out(self) -> None:
        """A lease has run out: its holder is gone, or hangs."""
        self.figures.ran_out += 1
        self.owner.something_happened()

    def failed(self) -> None:
        """A holder gave up before the end of its range."""
        self.figures.failed += 1
        self.owner.something_happened()

    # --- the figures ----------------------------------------------------------------------------

    def take_news(self) -> ServerFigures:
        """What has come since they were last told."""
        news = _grown(self.reported, self.figures)
        news.wait_max_s, self._wait_max_s = self._wait_max_s, 0.0
        self.reported = ServerFigures(**asdict(self.figures))
        return news

    def described(self, name: str, figures: ServerFigures) -> dict[str, object]:
        """For people, with who waits just now."""
        longest_s = self.owner.now_s - min(self._waiting_since_s.values(), default=self.owner.now_s)
        return {
            "name": name,
            **asdict(figures),
            "wait_s": round(figures.wait_s, 3),
            "wait_max_s": round(figures.wait_max_s, 3),
            "wait_mean_s": round(figures.wait_s / figures.waits, 3) if figures.waits else 0.0,
            "waiting": len(self._waiting_since_s),
            "waiting_longest_s": round(longest_s, 3),
        }

    def check(self) -> None:
        """Assert the invariants."""
        _check_grown(self.reported, self.figures)
        for claim, since_s in self._waiting_since_s.items():
            assert since_s <= self.owner.now_s, "waiting since some time to come"
            assert claim in self._queued, "what is not in the queue waits"
            assert claim not in self._slots, "what has a slot waits"
        assert all(count > 0 for count in self._slots.values()), "slots miscounted"


class TrackerStatistics:
    """All figures of one life of the tracker."""

    def __init__(self, interval_s: float | None, now_s: float) -> None:
        """``interval_s``: how long after something has happened it is told; None for never."""
        self.now_s = now_s
        self._interval_s = interval_s
        self._started_s = now_s
        self._told_s = now_s
        self._due_s: float | None = None
        self._servers: dict[str, ServerStatistics] = {}
        self._lives: dict[str, NodeTotals] = {}
        self._nodes = NodeFigures()
        self._nodes_reported = NodeFigures()
        self._files_by_holders: Counter[int] = Counter()
        self._replicas = 0

    def at(self, now_s: float) -> None:
        """It is that late now."""
        self.now_s = now_s

    def something_happened(self) -> None:
        """There is something to tell when the interval is over that begins now."""
        if self._interval_s is not None and self._due_s is None:
            self._due_s = self.now_s + self._interval_s

    def of_server(self, name: str) -> ServerStatistics:
        """The figures of a file server."""
        server = self._servers.get(name)
        if server is None:
            server = self._servers[name] = ServerStatistics(self)
        return server

    def node_told(self, node: str, totals: NodeTotals) -> None:
        """What a node has done in its life."""
        former = self._lives.pop(node, totals)
        if len(self._lives) >= NODES_MAX:
            del self._lives[next(iter(self._lives))]
        self._lives[node] = totals
        names = [each.name for each in fields(NodeFigures)]
        growth = {name: getattr(totals, name) - getattr(former, name) for name in names}
        if totals.life != former.life or min(growth.values()) < 0 or not any(growth.values()):
            return
        for name in names:
            setattr(self._nodes, name, getattr(self._nodes, name) + growth[name])
        self.something_happened()

    def holders_changed(self, before: int, after: int) -> None:
        """A file version has so many holders now."""
        for count, step in ((before, -1), (after, 1)):
            if count:
                self._files_by_holders[count] += step
                if not self._files_by_holders[count]:
                    del self._files_by_holders[count]
        self._replicas += after - before

    # --- the figures ----------------------------------------------------------------------------

    def wake_at_s(self) -> float | None:
        """When there is something to tell."""
        return self._due_s

    def take_report(self, node_count: int) -> dict[str, object] | None:
        """What has happened since the last report; None if it is not due."""
        if self._due_s is None or self.now_s < self._due_s:
            return None
        self._due_s = None
        news = _grown(self._nodes_reported, self._nodes)
        self._nodes_reported = NodeFigures(**asdict(self._nodes))
        servers = {name: server.take_news() for name, server in self._servers.items()}
        report = self._described(self.now_s - self._told_s, node_count, news, servers)
        self._told_s = self.now_s
        return report

    def since_start(self, node_count: int) -> dict[str, object]:
        """All that has happened in this life of the tracker."""
        servers = {name: server.figures for name, server in self._servers.items()}
        return self._described(self.now_s - self._started_s, node_count, self._nodes, servers)

    def _described(
        self,
        period_s: float,
        node_count: int,
        nodes: NodeFigures,
        servers: Mapping[str, ServerFigures],
    ) -> dict[str, object]:
        files = self._files_by_holders.total()
        return {
            "period_s": round(period_s, 3),
            **asdict(nodes),
            "nodes": node_count,
            "files": files,
            "replicas": self._replicas,
            "replicas_per_file_mean": round(self._replicas / files, 3) if files else 0.0,
            "replicas_per_file_max": max(self._files_by_holders, default=0),
            "file_servers": [
                self._servers[name].described(name, figures)
                for name, figures in sorted(servers.items())
            ],
        }

    def check(self, holders: Mapping[bytes, Mapping[str, None]]) -> None:
        """Assert the invariants; ``holders`` of all file versions as the tracker knows them."""
        expected = Counter(len(nodes) for nodes in holders.values())
        assert self._files_by_holders == expected, "files miscounted"
        assert self._replicas == sum(map(len, holders.values())), "replicas miscounted"
        _check_grown(self._nodes_reported, self._nodes)
        for server in self._servers.values():
            server.check()


Figures = TypeVar("Figures", ServerFigures, NodeFigures)


# ``fields`` and ``asdict`` take as long as all that is checked with them.
_NAMES = {kind: tuple(each.name for each in fields(kind)) for kind in (ServerFigures, NodeFigures)}


def _check_grown(before: Figures, after: Figures) -> None:
    for name in _NAMES[type(after)]:
        assert getattr(after, name) >= getattr(before, name) >= 0, f"{name} has shrunk"


def _grown(before: Figures, after: Figures) -> Figures:
    """By how much each figure has grown."""
    grown = {name: getattr(after, name) - getattr(before, name) for name in _NAMES[type(after)]}
    return type(after)(**grown)


def statistics_line(report: Mapping[str, Any]) -> str:
    """A report in one line, for the log."""
    parts = [
        f"{report['requests']} requests, {report['hits']} of them hits",
        f"{report['from_peers_chunks']} chunks with {report['from_peers_bytes']} bytes from peers",
        f"{report['nodes']} nodes",
        f"{report['files']} files with {report['replicas_per_file_mean']:g} replicas"
        f" (at most {report['replicas_per_file_max']})",
    ]
    parts += [_server_text(server) for server in report["file_servers"] if _active(server)]
    return f"in {report['period_s']:.0f} s: {'; '.join(parts)}"


def _active(server: Mapping[str, Any]) -> bool:
    return any(server[each.name] for each in fields(ServerFigures)) or server["waiting"] > 0


def _server_text(server: Mapping[str, Any]) -> str:
    return (
        f"{server['name']}: {server['reads']} ranges with {server['read_bytes']} bytes read,"
        f" {server['writes']} leases to write, {server['ran_out']} ran out,"
        f" {server['failed']} failed, {server['waits']} waits"
        f" (mean {server['wait_mean_s']:g} s, longest {server['wait_max_s']:g} s),"
        f" {server['waiting']} waiting (longest {server['waiting_longest_s']:g} s)"
    )
