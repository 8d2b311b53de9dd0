"""What caching costs a node that is alone: ``swarmcache get`` of a fresh file, beside ``cp``.

Both are whole processes that read a fresh file of the same size, whose pages are in memory, and
write the copy to the same file system, in turns. What either has left to be written back is written
back before the next one starts, or else the disk's debts of one would be paid by the other. And
both find as much memory for their copy as was in use a moment ago (``used_memory.py``).
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.local_cluster import LocalCluster, Node, run_timed
from benchmarks.report import Figure, Options, Skipped, Spread, in_turns
from benchmarks.used_memory import leave_memory

MIB = 1 << 20
PAIRS = 7
SIZES_MIB = (1, 256)
TMPFS = Path("/dev/shm")
# Promise 4: never slower than a copy.
SLOWER_MAX = 1.05
LATER_S_MAX = 0.050


def measure(options: Options) -> list[Figure]:
    """Figures for each size on tmpfs and on the disk of the temporary directory."""
    sizes_mib = SIZES_MIB[:1] if options.quick else SIZES_MIB
    pairs = options.choose_runs(PAIRS)
    figures = []
    for name, place in (("tmpfs", TMPFS), ("disk", Path(tempfile.gettempdir()))):
        _check_room(place, sum(sizes_mib) * MIB * (pairs + 4))
        with tempfile.TemporaryDirectory(dir=place, prefix="swarmcache-bench-") as directory:
            for size_mib in sizes_mib:
                below = Path(directory, str(size_mib))
                below.mkdir()
                figures.append(_measure_one(below, name, size_mib, pairs))
    return figures


def _check_room(place: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(place).free < needed_bytes:
        raise Skipped(f"{needed_bytes >> 20} MiB are needed in {place}")


def _measure_one(directory: Path, name: str, size_mib: int, pairs: int) -> Figure:
    with LocalCluster(directory) as cluster:
        alone = _Alone(directory, cluster.nodes[0], size_mib * MIB)
        alone.copy()
        alone.get()  # the first one compiles and reads in what later ones find
        copies_s, gets_s = in_turns(alone.copy, alone.get, pairs)
    ours, copies = Spread.of(gets_s), Spread.of(copies_s)
    return Figure(
        f"single node, cold, {size_mib} MiB on {name}",
        _in_ms(ours),
        "ms",
        "cp",
        _in_ms(copies),
        f"<= {SLOWER_MAX} x cp + {LATER_S_MAX * 1000:.0f} ms",
        ours.median <= SLOWER_MAX * copies.median + LATER_S_MAX,
    )


class _Alone:
    """One node, and a fresh file for each measurement."""

    def __init__(self, directory: Path, node: Node, size_bytes: int) -> None:
        self._directory = directory
        self._node = node
        self._size_bytes = size_bytes
        self._count = 0

    def copy(self) -> float:
        """Seconds that ``cp`` takes."""
        source = self._fresh_file()
        target = self._directory / "copy"
        _, elapsed_s = run_timed(["cp", source, target])
        source.unlink()
        target.unlink()
        return elapsed_s

    def get(self) -> float:
        """Seconds that ``swarmcache get`` takes. Raises ChildProcessError if the copy is wrong."""
        source = self._fresh_file()
        copy, elapsed_s = self._node.get(source)
        if not filecmp.cmp(source, copy, shallow=False):
            raise ChildProcessError(f"{copy} is not {source}")
        source.unlink()
        return elapsed_s

    def _fresh_file(self) -> Path:
        self._count += 1
        source = self._directory / f"source{self._count}"
        with source.open("wb") as file:
            for _ in range(0, self._size_bytes, MIB):
                file.write(os.urandom(MIB))
        leave_memory(self._directory, self._size_bytes)
        subprocess.run(["sync", "-f", self._directory], check=True)
        return source


def _in_ms(seconds: Spread) -> Spread:
    return Spread(seconds.median * 1e3, seconds.min * 1e3, seconds.max * 1e3)
