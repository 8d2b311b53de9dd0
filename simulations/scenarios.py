"""What is simulated, and the figures that come out.

A scenario builds a cluster, lets it run and measures. Its result depends on its settings alone, and
holds nothing that two runs of the same seed could disagree about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import TypeAlias

from simulations.clients import Client, Clients
from simulations.cluster import Cluster
from simulations.nodes import Node
from simulations.settings import USER, ClusterSettings
from simulations.writers import Writer
from swarmcache.chunks import FileVersion

# Before the crowd comes every daemon has been up long enough to be known to the tracker.
CROWD_AT_S = 1.0
# A run that takes this many times the bound, and a minute, is taken for one that hangs.
PATIENCE_FACTOR = 100
# gray_nodes: one node in so many has links of this part of the rate.
GRAY_EVERY = 20
GRAY_RATE = 0.1
# churn: this part of the nodes is killed while the first nodes are between these parts of the way.
KILLED = 0.1
KILLED_BETWEEN = (0.25, 0.75)

# Told of the cluster now and then while it runs; see ``Engine.watch``.
Watch: TypeAlias = Callable[[Cluster], None]


@dataclass(frozen=True, slots=True)
class Observed:
    """How a run went, for plots. Times count from the instant at which the file was asked for.

    ``answered_s``: of the nodes that count, earliest first. ``readers``: how many nodes read from
    the file server from when on. ``sent_bytes``: of each node, and ``server_bytes``.
    """

    answered_s: tuple[float, ...]
    readers: tuple[tuple[float, int], ...]
    sent_bytes: tuple[int, ...]
    server_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to. ``efficiency`` is ``bound_s / last_node_s``, for the last node that
    counts: all but those that were slowed down or killed on purpose.

    ``amplification``: bytes read from the file server / size of the file. ``repeats``: chunks that
    came to a node that had them. ``originals``: answers that were not a cached copy. ``hits``:
    requests that met a copy on their own node. ``copies``: files that were copied to the file
    server, the last one by ``last_copy_s``. ``into_racks``: bytes that came into racks / what each
    of them needs once (0 without racks). Times count from the instant at which the file was
    asked for.
    """

    scenario: str
    seed: int
    nodes: int
    size_bytes: int
    node_rate: float
    file_server_rate: float
    slots_max: int
    efficiency: float
    amplification: float
    readers_peak: int
    first_node_s: float
    median_node_s: float
    last_node_s: float
    bound_s: float
    messages: int
    message_bytes: int
    repeats: int
    deadlines_missed: int
    uploads_refused: int
    machine_events: int
    engine_events: int
    trace_digest: str
    originals: int
    requests: int
    hits: int
    copies: int
    last_copy_s: float
    into_racks: float
    observed: Observed

    def as_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        figures = asdict(replace(self, observed=Observed((), (), (), 0)))
        del figures["observed"]
        return figures


def bound_s(size_bytes: int, settings: ClusterSettings) -> float:
    """The time below which no protocol can bring the file to all nodes: the fluid bound.

    The largest of: the file server sends it once; a node and a rack receive it once; all uplinks
    together send it as often as there are nodes. Mundinger, Weber, Weiss, J. Scheduling 2008.
    """
    uplinks_rate = settings.file_server_rate + settings.nodes * settings.node_rate
    return max(
        size_bytes / settings.rack_rate,
        size_bytes / settings.file_server_rate,
        size_bytes / settings.node_rate,
        settings.nodes * size_bytes / uplinks_rate,
    )


def flash_crowd(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """Every node wants the same file at the same instant, and nobody has it.

    Raises SimulationFailed when a promise is broken; the machines' ``check()`` raises
    AssertionError. So do all scenarios.
    """
    crowd = Crowd("flash_crowd", settings, size_bytes)
    return crowd.run(crowd.cluster.node_list, watch)


def gray_nodes(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """A flash crowd in which one node in 20 has a tenth of the rate. The others count."""
    crowd = Crowd("gray_nodes", settings, size_bytes)
    rng = Random(f"{settings.seed} gray nodes")
    nodes = crowd.cluster.node_list
    gray = set(rng.sample(range(len(nodes)), max(len(nodes) // GRAY_EVERY, 1)))
    for index in sorted(gray):
        for link in (nodes[index].up, nodes[index].down):
            link.rate = link.free = settings.node_rate * GRAY_RATE
    return crowd.run([node for node in nodes if node.index not in gray], watch)


def churn(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """A flash crowd of which a tenth is killed in mid-swarm. The others count."""
    crowd = Crowd("churn", replace(settings, originals=True), size_bytes)
    rng = Random(f"{settings.seed} churn")
    cluster = crowd.cluster
    nodes = cluster.node_list
    killed = rng.sample(range(len(nodes)), max(round(len(nodes) * KILLED), 1))
    for index in killed:
        at_s = CROWD_AT_S + rng.uniform(*KILLED_BETWEEN) * crowd.bound_s
        cluster.engine.at(at_s, cluster.processes.kill, nodes[index])
    return crowd.run([node for node in nodes if node.index not in killed], watch)


class Crowd:
    """A cluster of which every node will want the same file at the same instant.

    With ``jobs`` other things are wanted at other times; a job that gets the original asks again.
    """

    def __init__(
        self, scenario: str, settings: ClusterSettings, size_bytes: int, *, jobs: bool = False
    ) -> None:
        self.scenario = scenario
        self.cluster = Cluster(settings)
        self.version = FileVersion(f"/export/{USER}/corpus.hdf".encode(), size_bytes, 0)
        self.bound_s = bound_s(size_bytes, settings)
        self.clients = Clients(self.cluster) if jobs else None
        self._waits_s: list[float] = []
        self._to_come = 0
        # What comes after a job that has its file.
        self.then: Callable[[Client], None] | None = None
        if self.clients is not None:
            self.cluster.file_server.current[self.version.path] = self.version
            self.clients.on_content = self._content

    def want_at(self, at_s: float, node: Node, path: bytes, *, keeps_asking: bool = True) -> None:
        """A job begins on a node, so long after the crowd comes."""
        assert self.clients is not None, "a crowd without jobs of its own"
        client = Client(node, path, keeps_asking=keeps_asking)
        self.clients.want_at(CROWD_AT_S + at_s, client)
        self._to_come += 1

    def copy(self, node: Node, size_bytes: int, user: str) -> None:
        """A job on a node copies a file of its own to the file server when the crowd comes."""
        self.cluster.writers.on_done = self._copied
        self.cluster.writers.write_at(CROWD_AT_S, Writer(node, size_bytes, user))
        self._to_come += 1

    def _copied(self, _: Writer) -> None:
        self._one_less_to_come()

    def _content(self, client: Client) -> None:
        assert self.clients is not None and client.content_s is not None
        self._waits_s.append(client.content_s - client.since_s)
        if self.then is not None:
            self.then(client)
        self._one_less_to_come()

    def _one_less_to_come(self) -> None:
        self._to_come -= 1
        if not self._to_come:
            self.cluster.engine.stop()

    def run(self, counted: Sequence[Node], watch: Watch | None) -> Result:
        """Let them come, check everything, measure those nodes that count."""
        cluster = self.cluster
        cluster.connect_all()
        if self.clients is None:
            cluster.engine.at(CROWD_AT_S, self._come, None)
        if watch is not None:
            cluster.engine.watch = lambda: watch(cluster)
        cluster.run(CROWD_AT_S + 60 + PATIENCE_FACTOR * self.bound_s)
        cluster.check()
        if self.clients is None:
            for node in counted:
                cluster.check_replica(node, self.version)
        return self._measure(counted)

    def _come(self, _: object) -> None:
        for index in range(self.cluster.settings.nodes):
            self.cluster.want_file(index, self.version, request=1)

    def _observe(self, counted: Sequence[Node]) -> Observed:
        answered_s = self._waits_s or [
            each - CROWD_AT_S for node in counted for each in node.answered_s.values()
        ]
        server = self.cluster.file_server
        return Observed(
            tuple(sorted(answered_s)),
            tuple((max(at_s - CROWD_AT_S, 0.0), readers) for at_s, readers in server.history),
            tuple(node.up.carried_bytes for node in self.cluster.node_list),
            server.up.carried_bytes,
        )

    def _into_racks(self) -> float:
        racks = dict.fromkeys(node.rack.down for node in self.cluster.node_list if node.rack)
        needed_bytes = max(len(racks) * self.version.size_bytes, 1)
        return sum(link.carried_bytes for link in racks) / needed_bytes

    def _measure(self, counted: Sequence[Node]) -> Result:
        cluster, settings = self.cluster, self.cluster.settings
        observed = self._observe(counted)
        times_s = observed.answered_s
        copied_s = [each.done_s for each in cluster.writers.copied if each.done_s is not None]
        return Result(
            scenario=self.scenario,
            seed=settings.seed,
            nodes=settings.nodes,
            size_bytes=self.version.size_bytes,
            node_rate=settings.node_rate,
            file_server_rate=settings.file_server_rate,
            slots_max=settings.slots_max,
            efficiency=self.bound_s / times_s[-1],
            amplification=observed.server_bytes / self.version.size_bytes,
            readers_peak=cluster.file_server.readers_peak,
            first_node_s=times_s[0],
            median_node_s=times_s[len(times_s) // 2],
            last_node_s=times_s[-1],
            bound_s=self.bound_s,
            messages=cluster.trace.messages,
            message_bytes=cluster.trace.message_bytes,
            repeats=cluster.transfers.repeats,
            deadlines_missed=cluster.transfers.deadlines_missed,
            uploads_refused=cluster.transfers.uploads_refused,
            machine_events=cluster.machine_events,
            engine_events=cluster.engine.events,
            trace_digest=cluster.trace.digest,
            originals=cluster.originals,
            requests=cluster.requests,
            hits=cluster.hits,
            copies=len(cluster.writers.copied),
            into_racks=self._into_racks(),
            last_copy_s=max((each - CROWD_AT_S for each in copied_s), default=0.0),
            observed=observed,
        )
