"""Eight nodes ask for one file at once: how near does the last one come to what the links allow?

In a cluster in a box (``tests/box.py``), every link 200 Mbit/s each way, disks in memory. Beside
it, in the same box, one node copies a file of the same size with ``cp`` through the network file
system: what it misses to the same bound is what protocols cost even when nobody shares anything.

And once more, with a daemon killed when half of the file has left the file server. All nodes are
reading leased ranges then, so it takes with it a lease, what it has read under it, and what it has
received: how much later are the others done?
"""

from __future__ import annotations

import filecmp
import json
import os
import select
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Figure, Options, Skipped, Spread
from benchmarks.used_memory import leave_memory
from tests.box import Box, Cluster, Gate, Host, Process, missing, wait_until

MIB = 1 << 20
GIB = 1 << 30
RUNS = 3
NODES = 8
QUICK_NODES = 2
SIZE_BYTES = 256 * MIB
RATE_MBIT = 200.0
SLOTS_MAX = 8
CONNECT_S_MAX = 20.0
END_S_MAX = 120.0

EFFICIENCY_MIN = 0.90
# Of the file's size. Headers and acknowledgements of the network file system are part of the first.
LINK_BYTES_MAX = 1.08
FILE_BYTES_MAX = 1.01


@dataclass(frozen=True, slots=True)
class Run:
    """What one box has shown."""

    last_s: float
    link_bytes: int
    file_bytes: int
    readers_peak: int
    cpu_s: float
    copy_s: float
    last_survivor_s: float


def measure(options: Options) -> list[Figure]:
    """Efficiency, amplification, readers, CPU seconds, and what a killed daemon costs."""
    reasons = "; ".join(missing())
    if reasons:
        raise Skipped(f"no cluster in a box: {reasons}")
    nodes = QUICK_NODES if options.quick else NODES
    size_bytes = MIB if options.quick else SIZE_BYTES
    runs = [_run(nodes, size_bytes) for _ in range(options.choose_runs(RUNS))]
    return _figures(runs, nodes, size_bytes)


def bound_s(nodes: int, size_bytes: int) -> float:
    """The least time in which all nodes can have the file, where every link has the same rate."""
    rate_bytes_per_s = RATE_MBIT * 1e6 / 8
    return size_bytes / rate_bytes_per_s * max(1.0, nodes / (1 + nodes))


def _figures(runs: Sequence[Run], nodes: int, size_bytes: int) -> list[Figure]:
    swarm = f"swarm of {nodes}"
    bound = bound_s(nodes, size_bytes)
    efficiency = Spread.of([bound / run.last_s for run in runs])
    of_copies = Spread.of([bound_s(1, size_bytes) / run.copy_s for run in runs])
    link = Spread.of([run.link_bytes / size_bytes for run in runs])
    file = Spread.of([run.file_bytes / size_bytes for run in runs])
    readers = Spread.of([float(run.readers_peak) for run in runs])
    cpu = Spread.of([run.cpu_s / (nodes * size_bytes / GIB) for run in runs])
    return [
        Figure(
            f"{swarm}: last node",
            Spread.of([run.last_s for run in runs]),
            "s",
            "the fluid bound",
            Spread(bound, bound, bound),
        ),
        Figure(
            f"{swarm}: efficiency of the last node",
            efficiency,
            "",
            "one cp alone",
            of_copies,
            f">= {EFFICIENCY_MIN:.2f}",
            efficiency.median >= EFFICIENCY_MIN,
        ),
        Figure(
            f"{swarm}: bytes out of the file server's link",
            link,
            "x size",
            target=f"<= {LINK_BYTES_MAX}",
            met=link.median <= LINK_BYTES_MAX,
        ),
        Figure(
            f"{swarm}: file bytes read from the file server",
            file,
            "x size",
            target=f"<= {FILE_BYTES_MAX}",
            met=file.max <= FILE_BYTES_MAX,
        ),
        Figure(
            f"{swarm}: readers at one instant",
            readers,
            target=f"<= {SLOTS_MAX}",
            met=readers.max <= SLOTS_MAX,
        ),
        Figure(f"{swarm}: CPU of all daemons", cpu, "s per GiB delivered"),
        Figure(
            f"{swarm}, one killed half-way: last of the others",
            Spread.of([run.last_survivor_s for run in runs]),
            "s",
            "none killed",
            Spread.of([run.last_s for run in runs]),
        ),
    ]


def _run(nodes: int, size_bytes: int) -> Run:
    place = "/dev/shm"
    with (
        tempfile.TemporaryDirectory(dir=place, prefix="swarmcache-bench-") as directory,
        Box(hosts=nodes, rate_mbit=RATE_MBIT, directory=Path(directory)) as box,
    ):
        cluster = Cluster(box, {"file_servers.default.slots_max": SLOTS_MAX})
        cluster.start()
        for node in box.nodes:
            wait_until(
                lambda node=node: _is_connected(cluster, node),  # type: ignore[misc]
                CONNECT_S_MAX,
                f"{node.name} to reach the tracker",
            )
        # Just written, so the file server has it in memory.
        file = box.put("file", os.urandom(size_bytes))
        leave_memory(box.directory, nodes * size_bytes)
        link_before_bytes, cpu_before_s = box.fs.bytes_sent(), _cpu_s(cluster)
        with Gate(box.directory) as gate:
            gets = [cluster.get(node, file, gate=gate) for node in box.nodes]
            began_s = gate.open(gets)
            _wait_for_all(gets)
        last_s = time.monotonic() - began_s
        link_bytes, cpu_s = box.fs.bytes_sent() - link_before_bytes, _cpu_s(cluster) - cpu_before_s
        _check_copies(cluster, box.nodes, gets, file)
        return Run(
            last_s,
            link_bytes,
            box.file_server.bytes_read(file),
            box.file_server.readers_peak(file),
            cpu_s,
            _copy_s(box, size_bytes),
            _last_survivor_s(box, cluster, size_bytes),
        )


def _last_survivor_s(box: Box, cluster: Cluster, size_bytes: int) -> float:
    """Seconds until the last node has another file, of those whose daemon is not killed."""
    file = box.put("third", os.urandom(size_bytes))
    leave_memory(box.directory, len(box.nodes) * size_bytes)
    *others, victim = box.nodes
    half_bytes = box.fs.bytes_sent_so_far() + size_bytes // 2
    with Gate(box.directory) as gate:
        gets = [cluster.get(node, file, gate=gate) for node in others]
        given_up = cluster.get(victim, file, gate=gate)
        began_s = gate.open([*gets, given_up])
        wait_until(
            lambda: box.fs.bytes_sent_so_far() >= half_bytes, END_S_MAX, "half of it to be read"
        )
        victim.kill(cluster.daemons.pop(victim.name))
        _wait_for_all(gets)
        elapsed_s = time.monotonic() - began_s
    _check_copies(cluster, others, gets, file)
    _wait_for_all([given_up])
    return elapsed_s


def _is_connected(cluster: Cluster, node: Host) -> bool:
    status = cluster.command(node, "status", "--json")
    if status.wait(CONNECT_S_MAX) != 0:
        raise ChildProcessError(f"{status!r}: {status.stderr}")
    return bool(json.loads(status.stdout)["node"]["tracker_connected"])


def _wait_for_all(processes: Sequence[Process]) -> None:
    """Until the last one has ended, to the millisecond. Raises TimeoutError."""
    running = select.poll()
    pidfds = [os.pidfd_open(process.pid) for process in processes]
    try:
        for pidfd in pidfds:
            running.register(pidfd, select.POLLIN)
        deadline_s = time.monotonic() + END_S_MAX
        left = len(pidfds)
        while left:
            ended = running.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
            if not ended:
                raise TimeoutError(f"{left} gets did not end in {END_S_MAX:g} s")
            for pidfd, _ in ended:
                running.unregister(pidfd)
                left -= 1
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def _check_copies(
    cluster: Cluster, nodes: Sequence[Host], gets: Sequence[Process], file: Path
) -> None:
    """Raises ChildProcessError where a node has no right copy of its own."""
    for node, get in zip(nodes, gets, strict=True):
        (path,) = cluster.paths(get, END_S_MAX)
        if not path.is_relative_to(node.disk) or not filecmp.cmp(path, file, shallow=False):
            raise ChildProcessError(f"{get!r} on {node.name} printed {path}: {get.stderr[-2000:]}")


def _copy_s(box: Box, size_bytes: int) -> float:
    """Seconds that ``cp`` takes on one node, through the network file system."""
    file = box.put("other", os.urandom(size_bytes))
    node = box.nodes[0]
    began_s = time.monotonic()
    copy = node.start(["cp", file, node.disk / "other"])
    _wait_for_all([copy])
    elapsed_s = time.monotonic() - began_s
    if copy.wait(END_S_MAX) != 0:
        raise ChildProcessError(f"{copy!r}: {copy.stderr}")
    return elapsed_s


def _cpu_s(cluster: Cluster) -> float:
    """CPU seconds that all daemons have taken so far."""
    return sum(_cpu_s_of(daemon.pid) for daemon in cluster.daemons.values())


def _cpu_s_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)
