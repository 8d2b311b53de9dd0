"""How much memory a daemon needs while a file passes through that is much bigger than the limit.

Two daemons on the loopback, and a sparse file, since what the bytes are does not matter to memory.
The first node reads it from the file server; then the second fetches it from the first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from benchmarks.local_cluster import LocalCluster
from benchmarks.report import Figure, Options, Skipped, Spread

MIB = 1 << 20
SIZE_MIB = 5 * 1024
QUICK_SIZE_MIB = 16
RSS_MIB_MAX = 150
SPARE_MIB = 512


def measure(options: Options) -> list[Figure]:
    """The peak of the resident memory in each of the three parts that a daemon plays."""
    size_mib = QUICK_SIZE_MIB if options.quick else SIZE_MIB
    place = tempfile.gettempdir()
    needed_bytes = (2 * size_mib + SPARE_MIB) * MIB
    if shutil.disk_usage(place).free < needed_bytes:
        raise Skipped(f"{needed_bytes / 2**30:.1f} GiB are needed in {place}")
    peaks_mib: dict[str, list[float]] = {"reads": [], "serves": [], "fetches": []}
    for _ in range(options.choose_runs(1)):
        for part, peak_bytes in _measure_once(size_mib * MIB).items():
            peaks_mib[part].append(peak_bytes / MIB)
    return [
        Figure(
            f"peak RSS of a daemon that {part} {size_mib} MiB",
            Spread.of(peaks),
            "MiB",
            target=f"<= {RSS_MIB_MAX} MiB",
            met=max(peaks) <= RSS_MIB_MAX,
        )
        for part, peaks in peaks_mib.items()
    ]


def _measure_once(size_bytes: int) -> dict[str, int]:
    """Bytes by the part that a daemon plays."""
    with tempfile.TemporaryDirectory(prefix="swarmcache-bench-") as directory:
        file = Path(directory, "file")
        file.touch()
        os.truncate(file, size_bytes)
        with LocalCluster(Path(directory), nodes=2) as cluster:
            reader, fetcher = cluster.nodes
            reader.get(file)
            reads_bytes = reader.peak_rss_bytes()
            reader.reset_peak_rss()
            copy, _ = fetcher.get(file)
            if copy.stat().st_size != size_bytes:
                raise ChildProcessError(f"{copy} has another size than {file}")
            return {
                "reads": reads_bytes,
                "serves": reader.peak_rss_bytes(),
                "fetches": fetcher.peak_rss_bytes(),
            }
