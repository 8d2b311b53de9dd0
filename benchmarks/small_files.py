"""A directory of many small files: cold from a peer, when it is there already, and for a crowd.

``swarmcache get DIRECTORY``, as a whole process. Beside the former, in turns, a loop that does on
the same disk the least that a cache has to do there for each file: make, write, rename and link it.
Beside the latter ``cp -r`` of the directory, which has neither a network nor digests nor an index.
What nobody has yet several nodes want at once, which here have to share the processor; beside it
one of them alone.

Nothing is removed before the end: for each file that it makes ext4 passes over all inodes that were
freed within the last minutes, which is what would be measured then.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.api import SIZE_BYTES, make_files
from benchmarks.local_cluster import LocalCluster, Node, run_timed
from benchmarks.report import Figure, Options, Spread, in_turns

FILES = 10_000
QUICK_FILES = 20
RUNS = 3
CROWD = 4
CROWD_PART = 5  # of the files; each run has others
COLD_PER_S_MIN = 2000.0
WARM_S_MAX = 1.0


def measure(options: Options) -> list[Figure]:
    """One figure for cold, one for warm, one for a crowd."""
    count = options.files or (QUICK_FILES if options.quick else FILES)
    runs = options.choose_runs(RUNS)
    with tempfile.TemporaryDirectory(prefix="swarmcache-bench-") as name:
        sources = Path(name, "sources")
        make_files(sources, count)
        with LocalCluster(Path(name), nodes=1) as cluster:
            holder = cluster.nodes[0]
            holder.get(sources)
            numbers = itertools.count(2)

            def get_cold() -> float:
                """On a node that has nothing yet."""
                node = cluster.start_node(next(numbers))
                node.program.wait_until_ready()
                node.wait_until_connected()
                elapsed_s = node.get(sources)[1]
                cluster.end_node(node)
                return count / elapsed_s

            def put_per_s() -> float:
                return _put_per_s(Path(name, f"bare{next(numbers)}"), count)

            def copy_s() -> float:
                return run_timed(["cp", "-r", sources, Path(name, f"copy{next(numbers)}")])[1]

            cold, put = in_turns(get_cold, put_per_s, runs)
            warm, copied_again = in_turns(lambda: holder.get(sources)[1], copy_s, runs)
    fetched, found = Spread.of(cold), Spread.of(warm)
    what = f"{count} files of 10 KiB: "
    return [
        Figure(
            what + "cold, from a peer",
            fetched,
            "files/s",
            "make, write, rename, link",
            Spread.of(put),
            f">= {COLD_PER_S_MIN:.0f}/s",
            fetched.median >= COLD_PER_S_MIN,
        ),
        Figure(
            what + "warm, get DIRECTORY",
            found,
            "s",
            "cp -r",
            Spread.of(copied_again),
            f"<= {WARM_S_MAX:.0f} s",
            found.median <= WARM_S_MAX,
        ),
        _for_a_crowd(-(-count // CROWD_PART), runs),
    ]


def _for_a_crowd(count: int, runs: int) -> Figure:
    """Until the last of them has all files, of which nobody had any."""
    with tempfile.TemporaryDirectory(prefix="swarmcache-bench-") as name:
        numbers = itertools.count()
        with LocalCluster(Path(name), nodes=CROWD) as cluster:

            def last_s(nodes: Sequence[Node]) -> float:
                sources = Path(name, f"sources{next(numbers)}")
                make_files(sources, count)
                with ThreadPoolExecutor(len(nodes)) as threads:
                    asked = [threads.submit(node.get, sources) for node in nodes]
                return max(each.result()[1] for each in asked)

            crowd, alone = in_turns(
                lambda: last_s(cluster.nodes), lambda: last_s(cluster.nodes[:1]), runs
            )
    what = f"{count} files of 10 KiB that nobody has: {CROWD} nodes at once"
    return Figure(what, Spread.of(crowd), "s", "one node", Spread.of(alone))


def _put_per_s(place: Path, count: int) -> float:
    """The bare limit, in one process and one thread."""
    beside, objects, links = (place / each for each in ("beside", "objects", "links"))
    for directory in (beside, objects, links):
        directory.mkdir(parents=True)
    data = os.urandom(SIZE_BYTES)
    began_s = time.perf_counter()
    for number in range(count):
        name = f"{number:064d}"
        fd = os.open(beside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        os.write(fd, data)
        os.close(fd)
        os.rename(beside / name, objects / name)
        os.link(objects / name, links / name)
    return count / (time.perf_counter() - began_s)
