"""``kill -9`` of a real daemon, again and again, in the middle of everything it does.

The cache is on a small disk of its own that holds a part of the files only, so that it must evict
all the time. Some files are pinned: those must be there for ever once they were answered. A peer
that is not killed has the small files, so that those come together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from swarmcache.cache_dir import User
from swarmcache.chunks import FileVersion
from swarmcache.client import Answer, Client
from tests.cache_checks import assert_right, assert_sound
from tests.disk_helpers import open_cache
from tests.local_daemons import LocalDaemons, LocalNode
from tests.loop_disks import LoopDisk, loop_disk

pytestmark = [pytest.mark.box, pytest.mark.slow]

# KILL_CYCLES=500 for the whole truth.
CYCLES = int(os.environ.get("KILL_CYCLES", "12"))
SEED = 9
LOOK_EVERY = 5
LIFE_S_MAX = 0.7
JOBS = 4
DISK_MIB = 96
MIB = 1 << 20
SMALL_BYTES = 64 * 1024
SIZES = [3 * MIB + 1] * 12 + [SMALL_BYTES] * 24 + [0]
TOGETHER = 8
PINNED = 8
CHUNK_BYTES = 256 * 1024
PATIENCE_S = 60.0


@dataclass
class Workload:
    """Files on a file server, and what was answered about them."""

    directory: Path
    data: dict[Path, bytes] = field(default_factory=dict)
    pinned: list[Path] = field(default_factory=list)
    answered: set[Path] = field(default_factory=set)
    hits: int = 0
    copies: int = 0
    together: int = 0
    refused: int = 0
    gone: int = 0
    wrong: list[str] = field(default_factory=list)

    def make(self, random: Random) -> None:
        for number, size_bytes in enumerate(SIZES):
            path = self.directory / f"directory {number % 3}" / f"file {number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.data[path] = random.randbytes(size_bytes)
            path.write_bytes(self.data[path])
        self.pinned = sorted(random.sample(sorted(self.data), PINNED))

    def change(self, random: Random) -> None:
        """Another version of one file that is not pinned."""
        path = random.choice(sorted(self.data.keys() - set(self.pinned)))
        self.data[path] = random.randbytes(len(self.data[path]) + 1)
        path.write_bytes(self.data[path])

    def small(self) -> list[Path]:
        """The files that may come together."""
        return sorted(path for path, data in self.data.items() if 0 < len(data) <= 2 * SMALL_BYTES)

    def file_server(self) -> str:
        return f'[file_servers.sources]\npaths = ["{self.directory}"]\n'

    def settings(self) -> str:
        return f"""
            [cache]
            min_free = "8MiB"
            max_usage = "44MiB"
            min_age = "0s"
            {self.file_server()}
        """

    def version(self, path: Path) -> FileVersion:
        status = path.stat()
        return FileVersion(bytes(path), status.st_size, status.st_mtime_ns)

    def look_at(self, path: Path, answer: Answer) -> None:
        """What a job does with the answer."""
        if "cache.max_usage leaves" in answer.reason:
            self.refused += 1  # all the room is for pinned files, and for files being fetched
            return
        try:
            if "No such file" in answer.reason:
                raise FileNotFoundError  # the client has looked as well
            found = Path(answer.path).read_bytes()
        except FileNotFoundError:
            # Nothing is young here, so a job can come too late; but never for what is pinned.
            self.gone += 1
            if path in self.pinned:
                self.wrong.append(f"{answer.path} is pinned, and is gone")
            return
        if not answer.cached:
            self.wrong.append(f"{answer.path} is not cached: {answer.reason}")
        if found != self.data[path]:
            self.wrong.append(f"{answer.path} is wrong")
        self.hits += answer.hit
        self.copies += not answer.hit
        self.answered.add(path)


def jobs_until(node: LocalNode, workload: Workload, ended: threading.Event, random: Random) -> None:
    """Jobs that get one file after the other, until the daemon is dead."""
    with Client(bytes(node.socket)) as client:
        while not ended.is_set():
            paths = random.sample(workload.small(), TOGETHER)
            if random.random() < 0.5:
                paths = [random.choice(sorted(workload.data))]
            answers = client.get_many(paths, timeout_s=PATIENCE_S)
            if ended.is_set():  # or else they are those of a client whose daemon is gone
                return
            for path, answer in zip(paths, answers, strict=True):
                workload.look_at(path, answer)
                workload.together += not answer.hit and len(paths) > 1 and answer.cached


def live_and_die(node: LocalNode, workload: Workload, random: Random) -> None:
    """Jobs ask the daemon for files until it is killed, at a random moment."""
    ended = threading.Event()
    with ThreadPoolExecutor(JOBS) as threads:
        jobs = [
            threads.submit(jobs_until, node, workload, ended, Random(random.random()))
            for _ in range(JOBS)
        ]
        ended.wait(random.uniform(0.0, LIFE_S_MAX))  # nothing to wait for: any moment will do
        ended.set()
        node.kill()
    for job in jobs:
        job.result()


def look_inside(root: Path, workload: Workload) -> None:
    """What a daemon would find, had it all the time that it needs."""
    me = User(os.geteuid(), "root")
    cache = open_cache(root)
    try:
        list(cache.list_objects())
        list(cache.recover_undurable())
        cache.take_damaged()
        for path, data in workload.data.items():
            version = workload.version(path)
            copy = cache.lookup(version, me)
            assert_right(cache, version.version_id, copy, data)
            if copy is None and path in workload.pinned and path in workload.answered:
                partial = cache.begin(version, CHUNK_BYTES)
                list(partial.recover())
                assert partial.complete, f"{path} is pinned, was answered, and is lost"
                partial.publish([me])
        assert_sound(cache, root)
    finally:
        cache.close()


@pytest.fixture
def place(root: Path) -> Path:
    """A directory on a real disk."""
    root.mkdir()
    return root


@pytest.fixture
def disk(place: Path) -> Iterator[LoopDisk]:
    with loop_disk(place, "ext4", DISK_MIB) as disk:
        yield disk


@pytest.mark.timeout(3600)
def test_no_kill_at_any_moment_loses_or_spoils_a_file(place: Path, disk: LoopDisk) -> None:
    random = Random(SEED)
    workload = Workload(place / "sources")
    workload.make(random)
    root = disk.path / "cache"
    with LocalDaemons(place) as local:
        local.start_tracker()
        local.start_daemon("b", workload.file_server()).get(*workload.small())
        node = local.start_daemon("a", workload.settings(), root)
        for path in workload.pinned:
            node.get(path)
        assert node.run("pin", *workload.pinned).returncode == 0
        workload.answered |= set(workload.pinned)
        for cycle in range(CYCLES):
            workload.change(random)
            live_and_die(node, workload, random)
            assert workload.wrong == []
            if cycle % LOOK_EVERY == 0:
                look_inside(root, workload)
            node = local.start_daemon("a", workload.settings(), root)
        node.end()
    look_inside(root, workload)

    counts = f"{workload.hits} hits, {workload.copies} copies, {workload.together} of them together"
    counts += f", {workload.refused} without room"
    print(f"{CYCLES} kills: {counts}, {workload.gone} evicted before they were opened")
    assert workload.hits + workload.copies > 0
    assert workload.together > 0
