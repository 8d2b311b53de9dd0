"""A cache of very many tiny files: how soon a daemon answers after its start, what disturbs hits.

The files and the rows of the index are made directly, in the shape that the daemon gives them.
Most of them have no source; of those that have, some are asked for again and again. A hit here is
one call of the Python API.
"""

from __future__ import annotations

import os
import pwd
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from benchmarks.local_cluster import LocalCluster, Node
from benchmarks.report import Figure, Options, Skipped, Spread
from swarmcache.cache_dir import CacheDir
from swarmcache.cache_index import CacheIndex, Replica, Trust
from swarmcache.chunks import ChunkLayout, FileVersion, Manifest, choose_chunk_size
from swarmcache.client import Client
from swarmcache.config import load
from swarmcache.disk_calls import Stamp
from swarmcache.manifest_files import encode_manifest
from swarmcache.partial_store import OVERHEAD_BYTES
from swarmcache.source_file import SourceExaminer
from swarmcache.user_tree import User

FILES = 1_000_000
QUICK_FILES = 2_000
FIRST_ANSWER_S_MAX = 2.0
HIT_MS_MAX = 50.0
# A source, a block of data, one for the manifest, two inodes, names in three directories.
DISK_BYTES_PER_FILE = 10_000
STORED_BYTES = 2 * 4096
USED_BYTES = STORED_BYTES + OVERHEAD_BYTES
DATA = b"tiny"
ASKED = 200  # files that have a source
FILES_MIN = 10 * ASKED
FILES_PER_DIRECTORY = 1000
ROWS_AT_ONCE = 10_000
SHARE_TO_FREE = 10  # one tenth
ASKING_S = 10.0
QUICK_ASKING_S = 0.5
PATIENCE_S = 3600.0
PAUSE_S = 0.005


def measure(options: Options) -> list[Figure]:
    """Start, hits, memory, an eviction of a tenth, and a start without the index."""
    count = options.files or (QUICK_FILES if options.quick else FILES)
    with tempfile.TemporaryDirectory(prefix="swarmcache-bench-") as directory:
        place = Path(directory)
        if shutil.disk_usage(place).free < DISK_BYTES_PER_FILE * count:
            raise Skipped(f"{DISK_BYTES_PER_FILE * count / 2**30:.1f} GiB are needed in {place}")
        limits = {"max_usage": str(USED_BYTES * count), "min_age": "0s"}
        with LocalCluster(place, nodes=0, settings=limits) as cluster:
            bench = _Bench(cluster, place, count, QUICK_ASKING_S if options.quick else ASKING_S)
            bench.make_files()
            return bench.measure()


@dataclass
class _Hits:
    """How long each hit took that was made while a block ran."""

    times_ms: list[float] = field(default_factory=list)

    def figures(self, what: str, *, limit: bool = False) -> list[Figure]:
        ordered = sorted(self.times_ms)
        parts = {"median": ordered[len(ordered) // 2], "p99": ordered[len(ordered) * 99 // 100]}
        figures = [Figure(f"{what}, {p}", Spread.of([ms]), "ms") for p, ms in parts.items()]
        target = f"<= {HIT_MS_MAX:.0f} ms" if limit else ""
        met = ordered[-1] <= HIT_MS_MAX if limit else None
        return [
            *figures,
            Figure(f"{what}, max", Spread.of(ordered[-1:]), "ms", "", None, target, met),
        ]


class _Bench:
    def __init__(self, cluster: LocalCluster, directory: Path, count: int, asking_s: float) -> None:
        self._cluster = cluster
        self._count = count
        self._asking_s = asking_s
        self._sources = directory / "sources"
        self._root = cluster.place(1) / "cache"
        self._user = User(os.getuid(), pwd.getpwuid(os.getuid()).pw_name)
        self._asked = [self._sources / f"{number:09d}" for number in range(ASKED)]

    # --- making them --------------------------------------------------------------------------

    def make_files(self) -> None:
        """All files, and an index that lists them as durable."""
        self._cluster.place(1).mkdir(mode=0o700)
        CacheDir(self._root, min_free=lambda _: 0, max_usage=lambda size: size).close()
        for first in range(256):
            (self._objects() / f"{first:02x}").mkdir(mode=0o700)
        index = CacheIndex(str(self._index()))
        began_s = time.monotonic()
        batch: list[Replica] = []
        for version in self._versions():
            batch.append(self._make_file(version))
            if len(batch) == ROWS_AT_ONCE:
                self._enter(index, batch)
                batch = []
        self._enter(index, batch)
        index.close()
        os.sync()
        made_s = time.monotonic() - began_s
        print(f"made {self._count} files in {made_s:.0f} s", file=sys.stderr, flush=True)

    def _versions(self) -> Iterator[FileVersion]:
        self._sources.mkdir()
        examiner = SourceExaminer(load({}, {}, Path("/dev/null")))
        origin = ""
        for path in self._asked:
            path.write_bytes(DATA)
            with path.open("rb") as file:
                version = examiner.examine(file.fileno()).version
            origin = version.origin
            yield version
        examiner.close()
        for number in range(ASKED, self._count):
            directory = os.fsencode(self._sources.resolve()) + b"/%06d" % (
                number // FILES_PER_DIRECTORY
            )
            yield FileVersion(directory + b"/%09d" % number, len(DATA), 10**18, origin)

    def _make_file(self, version: FileVersion) -> Replica:
        name = version.version_id.hex()
        path = os.fsencode(self._objects() / name[:2] / name)
        layout = ChunkLayout(version.size_bytes, choose_chunk_size(version.size_bytes))
        manifest = Manifest(layout, (blake3(DATA).digest(),))
        _write(path + b".manifest", encode_manifest(version, manifest), 0o600)
        _write(path, DATA, 0o444)
        os.utime(path, ns=(10**18, version.mtime_ns))
        link = os.fsencode(self._root / self._user.name) + version.path
        try:
            os.link(path, link)
        except FileNotFoundError:
            self._make_directories(os.path.dirname(version.path))
            os.link(path, link)
        now_s = time.time()
        return Replica(
            version.version_id,
            version.path,
            layout.chunk_size_bytes,
            STORED_BYTES,
            Trust.DOUBTFUL,
            bytes(16),
            Stamp.of(os.stat(path)),
            created_s=now_s,
            last_used_s=1e9,
            verified_s=now_s,
        )

    def _make_directories(self, path: bytes) -> None:
        at = os.fsencode(self._root / self._user.name)
        for component in path.split(b"/"):
            at = os.path.join(at, component)
            if not os.path.isdir(at):
                os.mkdir(at, 0o700)
                os.chmod(at, 0o1700)  # as the daemon makes them

    def _enter(self, index: CacheIndex, replicas: list[Replica]) -> None:
        index.insert_found((replica, [self._user]) for replica in replicas)
        for replica in replicas:
            index.settle(replica.version_id, replica.stamp, Trust.DURABLE, bytes(16))
        index.mark_complete()
        index.sync()

    def _objects(self) -> Path:
        return self._root / ".swarmcache" / "objects"

    def _index(self) -> Path:
        return self._root / ".swarmcache" / "index.sqlite"

    # --- measuring ----------------------------------------------------------------------------

    def measure(self) -> list[Figure]:
        what = f"{self._count} files: "
        target = f"<= {FIRST_ANSWER_S_MAX:.0f} s"
        node, first_s = self._start()
        with self._hits() as after_start:
            time.sleep(self._asking_s)
        figures = [
            Figure(
                what + "first answer after start",
                Spread.of([first_s]),
                "s",
                "",
                None,
                target,
                first_s <= FIRST_ANSWER_S_MAX,
            ),
            *after_start.figures(what + "a hit right after the start"),
        ]
        node.wait_until_connected()
        with self._hits() as quiet:
            time.sleep(self._asking_s)
        figures += quiet.figures(what + "a hit")
        peak_mib = node.peak_rss_bytes() / 2**20
        figures.append(Figure(what + "peak RSS", Spread.of([peak_mib]), "MiB"))
        figures += self._measure_eviction(node, what)
        self._cluster.end_node(node)
        return figures + self._measure_rebuild(what)

    def _measure_eviction(self, node: Node, what: str) -> list[Figure]:
        """A file so big that a tenth of the cache must go for it."""
        big = self._sources / "big"
        big.touch()
        os.truncate(big, USED_BYTES * self._count // SHARE_TO_FREE)
        left = self._count - self._count // SHARE_TO_FREE * 9 // 10  # the blocks do not fit exactly

        def get_big() -> None:
            with Client(bytes(node.socket)) as client:
                client.get(big)

        began_s = time.monotonic()
        with self._hits() as hits:
            getting = threading.Thread(target=get_big)
            getting.start()
            self._wait(node, lambda count: count <= left)
            freed_s = time.monotonic() - began_s
        getting.join()
        return [
            Figure(what + "evicting a tenth", Spread.of([freed_s]), "s"),
            *hits.figures(what + "a hit while a tenth is evicted", limit=True),
        ]

    def _measure_rebuild(self, what: str) -> list[Figure]:
        """A start without the index."""
        index = CacheIndex(str(self._index()))
        listed, _ = index.totals()
        index.close()
        for path in self._index().parent.glob("index.sqlite*"):
            path.unlink()
        began_s = time.monotonic()
        node, first_s = self._start()
        with self._hits() as hits:
            self._wait(node, lambda count: count >= listed)
            listed_s = time.monotonic() - began_s
        peak_mib = node.peak_rss_bytes() / 2**20
        self._cluster.end_node(node)
        return [
            Figure(what + "first answer without index", Spread.of([first_s]), "s"),
            Figure(what + "all in the index again", Spread.of([listed_s]), "s"),
            *hits.figures(what + "a call while the index is made"),
            Figure(what + "peak RSS while the index is made", Spread.of([peak_mib]), "MiB"),
        ]

    def _start(self) -> tuple[Node, float]:
        """A daemon, and the time from the start of its process to the first cached path."""
        began_s = time.monotonic()
        node = self._cluster.start_node(1)
        with Client(bytes(node.socket)) as client:
            while not client.get(self._asked[0]).cached:
                if time.monotonic() > began_s + PATIENCE_S:
                    raise TimeoutError(f"no answer: {node.program.said()}")
                time.sleep(PAUSE_S)  # the daemon does not listen yet, or says original
        return node, time.monotonic() - began_s

    def _wait(self, node: Node, enough: Callable[[int], bool]) -> None:
        """Until the number of files in the cache is as wanted."""
        with Client(bytes(node.socket)) as client:
            deadline_s = time.monotonic() + PATIENCE_S
            while not enough(client.status()["node"]["disk"]["file_count"]):
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{node.program.said()}")
                time.sleep(0.1)  # the daemon tells only who asks

    @contextmanager
    def _hits(self) -> Iterator[_Hits]:
        """Ask for cached files, one after the other, as long as the block runs."""
        hits = _Hits()
        done = threading.Event()
        socket = bytes(self._cluster.place(1) / "run" / "daemon.sock")

        def ask() -> None:
            with Client(socket) as client:
                number = 0
                while not done.is_set():
                    began_s = time.perf_counter()
                    answer = client.get(self._asked[number % ASKED])
                    elapsed_ms = (time.perf_counter() - began_s) * 1e3
                    if not answer.cached:
                        raise ChildProcessError(f"not cached: {answer.reason}")
                    if answer.hit:  # with no min_age a file may go between two of its hits
                        hits.times_ms.append(elapsed_ms)
                    number += 1
                    time.sleep(PAUSE_S)  # a job now and then, not a load of its own

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield hits
        finally:
            done.set()
            asking.join()


def _write(path: bytes, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    os.write(fd, data)
    os.close(fd)
