"""Real daemons and commands on real disks that are too small for what is asked of them."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from swarmcache.partial_store import OVERHEAD_BYTES, UNCOUNTED_MAX_BYTES
from tests.box import wait_until
from tests.disk_helpers import change_index, left_in_partial
from tests.local_daemons import LocalDaemons, LocalNode
from tests.loop_disks import LoopDisk, loop_disk

pytestmark = [pytest.mark.box, pytest.mark.slow]

MIB = 1 << 20
DISK_MIB = 480
FILE_MIB = 64
JOBS = 8
SAMPLE_S = 0.01


@dataclass(frozen=True)
class Limits:
    """Which of them decides depends on the disk."""

    min_free_mib: int
    max_usage_mib: int

    def settings(self) -> str:
        return f"""
            [cache]
            min_free = "{self.min_free_mib}MiB"
            max_usage = "{self.max_usage_mib}MiB"
        """

    def fit(self, disk: LoopDisk) -> int:
        """How many files fit on the empty disk, with what is kept for the index and its log."""
        room_mib = min(self.max_usage_mib, disk.free_bytes // MIB - self.min_free_mib)
        return (room_mib - UNCOUNTED_MAX_BYTES // MIB) // (FILE_MIB + 1)


class Watch:
    """Samples free space and usage of a disk in a thread."""

    def __init__(self, disk: LoopDisk, cache_dir: Path) -> None:
        self.free_min_bytes = disk.free_bytes
        self.used_max_bytes = 0
        self.samples = 0
        self._disk = disk
        self._cache_dir = cache_dir
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.free_min_bytes = min(self.free_min_bytes, self._disk.free_bytes)
            self.used_max_bytes = max(self.used_max_bytes, taken_bytes(self._cache_dir))
            self.samples += 1


def taken_bytes(directory: Path) -> int:
    """What everything below a directory takes of the disk, each inode once."""
    taken: dict[int, int] = {}
    for above, directories, files in os.walk(directory):
        for name in [*directories, *files]:
            try:
                status = os.lstat(os.path.join(above, name))
            except FileNotFoundError:
                continue  # moved or removed meanwhile
            taken[status.st_ino] = 512 * status.st_blocks
    return sum(taken.values())


@pytest.fixture
def sources(root: Path) -> list[Path]:
    """Twice as many as there are jobs; each job wants one of its own."""
    directory = root.parent / "sources"
    directory.mkdir()
    files = [directory / f"{number}.dat" for number in range(2 * JOBS)]
    for number, file in enumerate(files):
        file.write_bytes(Random(number).randbytes(FILE_MIB * MIB))
    return files


@contextmanager
def daemon(root: Path, disk: LoopDisk, settings: str) -> Iterator[LocalNode]:
    with LocalDaemons(root.parent) as local:
        local.start_tracker()
        node = local.start_daemon("a", settings, disk.path / "cache")
        yield node
        node.end()


def get(node: LocalNode, source: Path) -> tuple[bool, str]:
    """What a job does: whether it got a copy, and what was said about it."""
    done = node.run("get", "-0", source)
    assert done.returncode == 0, done.stderr
    path = done.stdout.removesuffix(b"\0")
    # As a job would: with the path that was printed, whatever it is.
    compared = subprocess.run(["cmp", path, source], capture_output=True, check=False)
    assert compared.returncode == 0, compared.stderr
    return path != os.fsencode(source), done.stderr.decode()


def age(cache_dir: Path) -> None:
    """As if everything had last been used long ago. The daemon must not be running."""
    for file in (cache_dir / ".swarmcache" / "objects").glob("*/*"):
        status = file.stat()
        os.utime(file, ns=(0, status.st_mtime_ns))
        change_index(
            cache_dir,
            f"UPDATE replica SET last_used_s = 1, ctime_ns = {file.stat().st_ctime_ns}"
            f" WHERE inode = {status.st_ino}",
        )


def assert_nothing_left_over(node: LocalNode) -> None:
    wait_until(lambda: left_in_partial(node.cache_dir) == [], 20.0, "an empty partial/")
    listed = {file["path"] for file in node.listed()}
    objects = list((node.cache_dir / ".swarmcache" / "objects").glob("*/*"))
    assert len(objects) == 2 * len(listed)  # each with its manifest
    users_files = [file for file in (node.cache_dir / "root").rglob("*") if file.is_file()]
    assert len(users_files) == len(listed)
    used_bytes = node.status()["node"]["disk"]["used_bytes"]
    taken = sum(512 * file.stat().st_blocks for file in objects)
    # A file in many pieces has blocks for their list, which our account has as overhead.
    assert used_bytes <= taken <= used_bytes + len(listed) * OVERHEAD_BYTES


@pytest.mark.parametrize(
    ("kind", "limits"),
    [("ext4", Limits(50, 340)), ("xfs", Limits(100, DISK_MIB))],
    ids=["ext4, max_usage decides", "xfs, min_free decides"],
)
def test_jobs_that_together_want_more_than_the_disk_all_get_a_path_and_the_limits_hold(
    root: Path, sources: list[Path], kind: str, limits: Limits
) -> None:
    """Twice: into an empty cache, and into one that is full of files that may go."""
    with loop_disk(root.parent, kind, DISK_MIB) as disk:
        fit = limits.fit(disk)
        for wave in (sources[:JOBS], sources[JOBS:]):
            with (
                daemon(root, disk, limits.settings()) as node,
                Watch(disk, node.cache_dir) as watch,
                ThreadPoolExecutor(JOBS) as threads,
            ):
                answers = list(threads.map(lambda source: get(node, source), wave))
                assert_nothing_left_over(node)
            kept = "bytes are reserved for files that are being fetched", "bytes were used within"
            for is_cached, said in answers:
                assert is_cached or any(reason in said for reason in kept)
            count = sum(is_cached for is_cached, _ in answers)
            seen = (watch.free_min_bytes / MIB, watch.used_max_bytes / MIB)
            print(f"{count} of {JOBS} cached; free >= %.1f MiB, used <= %.1f MiB" % seen)
            assert 1 < count == fit < JOBS
            assert watch.free_min_bytes >= limits.min_free_mib * MIB
            assert watch.used_max_bytes <= limits.max_usage_mib * MIB
            assert watch.samples > 50
            age(node.cache_dir)
