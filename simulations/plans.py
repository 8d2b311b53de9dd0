"""What one seed of the campaign is: a small cluster, its jobs and its faults, all drawn up front.

Everything is drawn before anything happens, so that taking a fault away changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from simulations.faults import EVENTS, TRAPS, Fault
from simulations.settings import ClusterSettings

KIB = 1 << 10
CHUNK_BYTES = 256 * KIB
FAULTS_UNTIL_S = 8.0
TRAPS_MAX = 1200
EVENTS_MAX = 8

# Events that leave every message and every chunk of the others alone.
_ENDS = ["daemon killed", "daemon killed, partial files torn", "node lost"]
_STOPS = ["daemon stopped", "writer stopped"]
# What may happen under each theme: kinds of events, and words with which kinds of traps begin.
_LATE = ("message", "peer message")
THEMES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "calm": ((), ()),
    "ends of nodes": (_ENDS, ()),
    "chunks": (("node slow",), ("chunk", *_LATE)),
    "messages": (
        ("peer connection reset", "tracker connection reset"),
        ("message", "peer", "tracker", "dial"),
    ),
    "cuts": (
        ("cut from a peer", "cut from tracker", "cut to tracker", "partition", "unplugged"),
        _LATE,
    ),
    "processes": (
        (*_ENDS, *_STOPS, "power cut", "client gone", "tracker stopped", "writer killed"),
        ("chunk", "copy", "dial", *_LATE),
    ),
    "tracker": (
        (
            "journal lost",
            "tracker killed",
            "tracker stopped",
            "tracker connection reset",
            "file server slow",
            "cut to tracker",
            "writer stopped",
        ),
        ("message", "tracker", "peer message", "copy", "dial", "read"),
    ),
    "disks": (
        ("disk lost", "replica removed", "replica rotten", "power cut"),
        ("disk", "publication", "reservation", "write", "manifest", *_LATE),
    ),
    "file server": (
        ("file server slow", "source changed", *_STOPS, "cut to tracker", "writer killed"),
        ("copy", "read", "write of a range", *_LATE),
    ),
    "everything": (
        sorted(EVENTS.keys() - {"stand-in killed", "stand-in stopped", "peer lies"}),
        sorted(TRAPS),
    ),
}
# Traps that cost time, and nothing that was achieved; they are drawn so many times as often as the
# others, or nothing would be achieved that could be lost.
MILD_TRAPS = {
    "chunk absent",
    "chunk busy",
    "copy slow",
    "disk slow",
    "message from tracker late",
    "message to tracker late",
    "peer message late",
    "read slow",
}
MILD = 12
MUCH = 60
# Whoever has sent wrong bytes is never asked again, so that its copies are lost to others.
LIES = ("peer lies", "chunk corrupted")
# How often each is drawn: little is to be seen where little goes wrong.
WEIGHTS = (1, 1, 3, 2, 3, 3, 3, 3, 3, 4)


# One seed in so many has no tracker most of the time: for long enough that others stand in for it.
WITHOUT_TRACKER = "without the tracker"
WITHOUT_TRACKER_EVERY = 8
WITHOUT_TRACKER_S = 30.0
_WHO_STANDS_IN = (
    "daemon killed",
    "daemon stopped",
    "power cut",
    "stand-in killed",
    "stand-in stopped",
    "stand-in killed",
    "stand-in stopped",
    "tracker connection reset",
    "client gone",
)


@dataclass(frozen=True, slots=True)
class Job:
    """A job on a node that wants a file, both by number, at some time."""

    at_s: float
    node: int
    file: int
    user: str
    can_read: bool
    chunk_size_bytes: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A job on a node that copies a file to the file server."""

    at_s: float
    node: int
    user: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Together:
    """A job on a node that wants all small files at once."""

    at_s: float
    node: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One seed. ``mixed_cuts``: nodes cut files differently, so that some replicas are of no use to
    others. The last ``small_files`` of the files are small, and wanted ``together`` as well."""

    seed: int
    theme: str
    settings: ClusterSettings
    sizes_bytes: tuple[int, ...]
    jobs: tuple[Job, ...]
    faults: tuple[Fault, ...]
    mixed_cuts: bool = False
    copies: tuple[Copy, ...] = ()
    small_files: int = 0
    together: tuple[Together, ...] = ()
    faults_until_s: float = FAULTS_UNTIL_S


def draw(seed: int) -> Plan:
    """What this seed stands for."""
    rng = Random(f"plan {seed}")
    theme = rng.choices(list(THEMES), WEIGHTS)[0]
    nodes = rng.choice((2, 3, 3, 4, 4, 5, 6, 8, 12))
    chunks_max = 4 if nodes > 6 else 10
    sizes = [rng.randint(1, chunks_max) * CHUNK_BYTES for _ in range(rng.randint(2, 4))]
    sizes = [max(size - rng.randrange(CHUNK_BYTES) * rng.randint(0, 1), 1) for size in sizes]
    if rng.random() < 0.05:
        sizes.append(0)
    settings = _draw_settings(rng, seed, nodes, sizes)
    if theme == "tracker":  # a lease matters while it is out
        rate = min(settings.file_server_rate, 3e6)
        settings = replace(settings, file_server_rate=rate, node_rate=rate)
    settings = _with_racks(settings)
    mixed_cuts = rng.random() < 0.15
    faults = _draw_faults(rng, theme, nodes) + _draw_liar(seed, theme, nodes)
    # Only where no copy can be lost, and every copy is of use, may there be jobs that cannot read.
    kept = theme in ("calm", "chunks", "messages", "cuts", "tracker")
    kept = kept and not any(fault.kind in LIES for fault in faults)
    all_read = mixed_cuts or not kept or settings.disk_bytes != float("inf")
    jobs = _draw_jobs(rng, nodes, len(sizes), mixed_cuts=mixed_cuts, all_read=all_read)
    copies = _draw_copies(seed, settings)
    plan = Plan(seed, theme, settings, tuple(sizes), jobs, faults, mixed_cuts, copies)
    plan = _with_small_files(plan, rng_seed=f"small files {seed}")
    return _take_tracker(plan) if seed % WITHOUT_TRACKER_EVERY == 0 else plan


def _with_racks(settings: ClusterSettings) -> ClusterSettings:
    """In one plan of three nodes stand in racks; the last one may be the only one in its rack."""
    rng = Random(f"racks {settings.seed}")
    if rng.random() < 2 / 3:
        return settings
    nodes = rng.choice((1, 2, 3, 4))
    rate = settings.node_rate * rng.choice((1, nodes))
    return replace(settings, rack_nodes=nodes, rack_rate=rate)


def _with_small_files(plan: Plan, rng_seed: str) -> Plan:
    """Drawn apart, so that the rest of a plan is as it was without them."""
    rng = Random(rng_seed)
    if rng.random() < 0.5:
        return plan
    nodes = range(plan.settings.nodes)
    sizes = [rng.randint(1, CHUNK_BYTES) for _ in range(rng.randint(2, 6))]
    # Each of them must find room on a disk that was drawn for the other files.
    room_bytes = max(plan.settings.disk_bytes, *sizes)
    first = len(plan.sizes_bytes)
    jobs = [
        Job(rng.random() * 2.0, rng.choice(nodes), first + number, "ada", True, CHUNK_BYTES)
        for number in range(len(sizes))
    ]
    spread_s = rng.choice((0.0, 2.0, 6.0))
    together = [Together(rng.random() * spread_s, rng.choice(nodes)) for _ in range(len(nodes))]
    return replace(
        plan,
        settings=replace(plan.settings, disk_bytes=room_bytes),
        sizes_bytes=(*plan.sizes_bytes, *sizes),
        jobs=tuple(sorted([*plan.jobs, *jobs], key=lambda job: job.at_s)),
        small_files=len(sizes),
        together=tuple(together),
    )


def _take_tracker(plan: Plan) -> Plan:
    """The same cluster without its tracker, from the beginning on and for much longer."""
    rng = Random(f"without the tracker {plan.seed}")
    nodes = plan.settings.nodes
    lost = rng.choice(("tracker killed", "tracker killed", "tracker stopped", "journal lost"))
    faults = [Fault(rng.random(), lost, duration_s=rng.uniform(8.0, WITHOUT_TRACKER_S))]
    for _ in range(rng.randint(0, 6)):
        fault = Fault(
            rng.random() * WITHOUT_TRACKER_S,
            rng.choice(_WHO_STANDS_IN),
            rng.randrange(nodes),
            rng.randrange(nodes),
            rng.expovariate(1 / 6.0),
            rng.random(),
        )
        faults.append(fault)
    stretch = WITHOUT_TRACKER_S / FAULTS_UNTIL_S
    jobs = [replace(job, at_s=job.at_s * stretch, can_read=True) for job in plan.jobs]
    copies = [replace(copy, at_s=copy.at_s * stretch) for copy in plan.copies]
    together = [replace(each, at_s=each.at_s * stretch) for each in plan.together]
    return replace(
        plan,
        theme=WITHOUT_TRACKER,
        jobs=tuple(jobs),
        copies=tuple(copies),
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
        together=tuple(together),
        faults_until_s=WITHOUT_TRACKER_S,
    )


def _draw_settings(rng: Random, seed: int, nodes: int, sizes: Sequence[int]) -> ClusterSettings:
    slots_max = rng.randint(1, 3)
    # A piece for each of three readers in less than the margin of a lease; where it is slow, a
    # range takes longer than a lease lasts when the file server is slowed down besides.
    rate = rng.choice((1e6, 3e6, 12e6, 24e6))
    room_bytes = float("inf")
    if rng.random() < 0.25:
        room_bytes = max(sizes) * rng.choice((1.0, 1.2, 2.0))
    return ClusterSettings(
        nodes=nodes,
        seed=seed,
        node_rate=rate * rng.choice((1, 2)),
        file_server_rate=rate,
        slots_max=slots_max,
        uploads_max=rng.choice((1, 2, 4)),
        peers_max=rng.choice((4, 40)),
        latency_s=rng.choice((0.0002, 0.01)),
        check_every=1,
        originals=True,
        piece_bytes=CHUNK_BYTES // 2,
        reader_cost=rng.choice((0.0, 0.05)),
        disk_bytes=room_bytes,
        clock_spread_s=rng.choice((0.0, 500.0)),
        clock_drift=rng.choice((0.0, 0.0005)),
    )


def _draw_jobs(
    rng: Random, nodes: int, files: int, *, mixed_cuts: bool, all_read: bool
) -> tuple[Job, ...]:
    spread_s = rng.choice((0.0, 1.0, 4.0))
    jobs = []
    for file in range(files):
        readers = rng.sample(range(nodes), rng.randint(1, nodes))
        for node in rng.sample(range(nodes), rng.randint(1, nodes)):
            size_bytes = CHUNK_BYTES << (rng.randint(0, 1) if mixed_cuts else 0)
            can_read = all_read or node in readers or rng.random() < 0.7
            at_s = rng.random() * spread_s
            jobs.append(Job(at_s, node, file, rng.choice(("ada", "bob")), can_read, size_bytes))
        # Somebody can always read it, or nobody would ever get it.
        at_s = rng.random() * spread_s
        jobs.append(Job(at_s, readers[0], file, "ada", True, CHUNK_BYTES))
    return tuple(sorted(jobs, key=lambda job: job.at_s))


def _draw_faults(rng: Random, theme: str, nodes: int) -> tuple[Fault, ...]:
    events, words = THEMES[theme]
    traps = [kind for kind in TRAPS if kind.startswith(tuple(words))] if words else []
    if "chunk corrupted" in traps and rng.random() < 0.6:
        traps.remove("chunk corrupted")  # few nodes are trusted for long once there are some
    weights = [MILD if kind in MILD_TRAPS else 1 for kind in traps]
    if traps and rng.random() < 0.3:  # one thing goes wrong again and again
        weights[rng.randrange(len(traps))] = MUCH
    liar = rng.randrange(nodes)
    faults = []
    for _ in range(rng.randint(1, EVENTS_MAX) if events else 0):
        fault = Fault(
            rng.random() * FAULTS_UNTIL_S,
            rng.choice(list(events)),
            rng.randrange(nodes),
            rng.randrange(nodes),
            rng.expovariate(1 / 3.0),
            rng.random(),
        )
        faults.append(fault)
    for _ in range(rng.randint(20, TRAPS_MAX) if traps else 0):
        kind = rng.choices(traps, weights)[0]
        least_s, most_s = TRAPS[kind]
        node = liar if kind == "chunk corrupted" else rng.randrange(nodes)
        at_s = rng.random() * FAULTS_UNTIL_S
        # Mostly short: where everything is late for seconds, nothing happens that could go wrong.
        duration_s = least_s + (most_s - least_s) * rng.random() ** 4
        faults.append(Fault(at_s, kind, node, duration_s=duration_s))
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _draw_copies(seed: int, settings: ClusterSettings) -> tuple[Copy, ...]:
    """In every other plan: mostly short ones, now and then one that others have to wait for."""
    rng = Random(f"copies {seed}")
    copies = []
    for _ in range(rng.randint(1, 5) if rng.random() < 0.5 else 0):
        alone_s = rng.uniform(8, 14) if rng.random() < 0.15 else rng.uniform(0.05, 3)
        size_bytes = int(settings.file_server_rate * alone_s)
        user = rng.choice(("ada", "bob", "eve"))
        copies.append(Copy(rng.random() * 5, rng.randrange(settings.nodes), user, size_bytes))
    return tuple(sorted(copies, key=lambda copy: copy.at_s))


def _draw_liar(seed: int, theme: str, nodes: int) -> tuple[Fault, ...]:
    """Now and then one node sends wrong bytes only. Not two: who lied is never trusted again."""
    rng = Random(f"liar {seed}")
    if theme not in ("chunks", "everything", "file server") or rng.random() > 0.3:
        return ()
    return (Fault(0.0, "peer lies", rng.randrange(nodes), duration_s=rng.uniform(1, 8)),)
