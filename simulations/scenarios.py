"""What is simulated, and the figures that come out.

A scenario builds a cluster, lets it run and measures. Its result depends on its settings alone, and
holds nothing that two runs of the same seed could disagree about.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from simulations.cluster import Cluster
from simulations.settings import USER, ClusterSettings
from swarmcache.chunks import FileVersion

# Before the crowd comes every daemon has been up long enough to be known to the tracker.
CROWD_AT_S = 1.0
# A run that takes this many times the bound, and a minute, is taken for one that hangs.
PATIENCE_FACTOR = 100


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to. ``efficiency`` is ``bound_s / last_node_s``, for the last node.

    ``amplification``: bytes read from the file server / size of the file. ``repeats``: chunks that
    came to a node that had them. Times count from the instant at which the file was asked for.
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

    def as_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return asdict(self)


def bound_s(size_bytes: int, settings: ClusterSettings) -> float:
    """The time below which no protocol can bring the file to all nodes: the fluid bound.

    The largest of: the file server sends it once; a node receives it once; all uplinks together
    send it as often as there are nodes. Mundinger, Weber, Weiss, J. Scheduling 2008.
    """
    uplinks_rate = settings.file_server_rate + settings.nodes * settings.node_rate
    return max(
        size_bytes / settings.file_server_rate,
        size_bytes / settings.node_rate,
        settings.nodes * size_bytes / uplinks_rate,
    )


def flash_crowd(settings: ClusterSettings, size_bytes: int) -> Result:
    """Every node wants the same file at the same instant, and nobody has it.

    Raises SimulationFailed when a promise is broken; the machines' ``check()`` raises
    AssertionError.
    """
    cluster = Cluster(settings)
    version = FileVersion(f"/export/{USER}/corpus.hdf".encode(), size_bytes, 0)
    cluster.connect_all()
    cluster.engine.at(CROWD_AT_S, _come, (cluster, version))
    least_s = bound_s(size_bytes, settings)
    cluster.run(CROWD_AT_S + 60 + PATIENCE_FACTOR * least_s)
    cluster.check()
    for node in cluster.nodes.values():
        cluster.check_replica(node, version)
    return _measure("flash_crowd", cluster, version, least_s)


def _come(crowd: tuple[Cluster, FileVersion]) -> None:
    cluster, version = crowd
    for index in range(cluster.settings.nodes):
        cluster.want_file(index, version, request=1)


def _measure(scenario: str, cluster: Cluster, version: FileVersion, least_s: float) -> Result:
    settings = cluster.settings
    size_bytes = version.size_bytes
    times_s = sorted(
        answered_s - CROWD_AT_S
        for node in cluster.nodes.values()
        for answered_s in node.answered_s.values()
    )
    last_node_s = times_s[-1]
    return Result(
        scenario=scenario,
        seed=settings.seed,
        nodes=settings.nodes,
        size_bytes=size_bytes,
        node_rate=settings.node_rate,
        file_server_rate=settings.file_server_rate,
        slots_max=settings.slots_max,
        efficiency=least_s / last_node_s,
        amplification=cluster.file_server.up.carried_bytes / size_bytes,
        readers_peak=cluster.file_server.readers_peak,
        first_node_s=times_s[0],
        median_node_s=times_s[len(times_s) // 2],
        last_node_s=last_node_s,
        bound_s=least_s,
        messages=cluster.trace.messages,
        message_bytes=cluster.trace.message_bytes,
        repeats=cluster.transfers.repeats,
        deadlines_missed=cluster.transfers.deadlines_missed,
        uploads_refused=cluster.transfers.uploads_refused,
        machine_events=cluster.machine_events,
        engine_events=cluster.engine.events,
        trace_digest=cluster.trace.digest,
    )
