"""What the tests of cache directories share; also used by the scripts that they have killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from blake3 import blake3

from swarmcache.cache_dir import CacheDir, Partial, User
from swarmcache.cache_index import CacheIndex
from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, FileVersion, SmallFile
from swarmcache.errors import CacheDirUnusable, NoSpace

# The scripts import everything from here.
__all__ = [
    "CHUNK_BYTES",
    "ME",
    "REPOSITORY",
    "CacheDir",
    "CacheDirUnusable",
    "CacheIndex",
    "NoSpace",
    "Path",
    "User",
    "a_file",
    "as_stranger",
    "blake3",
    "change_index",
    "fill",
    "install_together",
    "killed",
    "left_in_partial",
    "make_old",
    "needs_root",
    "object_of",
    "open_cache",
    "os",
    "publish",
    "recovered",
    "run_as",
    "small_file",
    "write",
]

CHUNK_BYTES = 4096
REPOSITORY = Path(__file__).resolve().parent.parent
ME = User(os.geteuid(), "me")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="serving other users needs root")


def open_cache(
    root: Path,
    min_free: Callable[[int], int] = lambda capacity_bytes: 0,
    max_usage: Callable[[int], int] = lambda capacity_bytes: capacity_bytes,
    min_age_s: float = 3600.0,
) -> CacheDir:
    """A cache directory; within its limits, and where nothing is evicted during a test."""
    return CacheDir(root, min_free=min_free, max_usage=max_usage, min_age_s=min_age_s)


def a_file(
    size_bytes: int, path: bytes = b"/nfs/corpus/train.hdf", seed: int = 1
) -> tuple[FileVersion, bytes]:
    return FileVersion(path, size_bytes, 1_234_567_890_123_456_789 + seed), Random(seed).randbytes(
        size_bytes
    )


def write(partial: Partial, data: bytes, chunk: int) -> None:
    begin = partial.layout.offset_bytes(chunk)
    piece = data[begin : begin + partial.layout.length_bytes(chunk)]
    partial.write_chunk(chunk, piece, blake3(piece).digest())


def fill(partial: Partial, data: bytes) -> Partial:
    for chunk in range(partial.layout.chunk_count):
        write(partial, data, chunk)
    return partial


def publish(cache: CacheDir, version: FileVersion, data: bytes, *users: User) -> dict[int, str]:
    return fill(cache.begin(version, CHUNK_BYTES), data).publish(users or [ME])


def install_together(
    cache: CacheDir, files: Sequence[tuple[FileVersion, bytes]], users: Sequence[User]
) -> list[bytes]:
    """Small files come together from a peer; returns the version ids of those that are kept."""
    batch = cache.begin_batch([version for version, _ in files], CHUNK_SIZE_MIN_BYTES)
    if batch is None:
        return []
    try:
        return batch.install([small_file(*file) for file in files], users)
    finally:
        batch.close()


def small_file(version: FileVersion, data: bytes) -> SmallFile:
    return SmallFile(version.version_id, blake3(data).digest(), data)


def recovered(cache: CacheDir) -> list[bytes]:
    """Digest all that is in doubt: the version ids of what is good."""
    return [version_id for some in cache.recover_undurable() for version_id in some]


def object_of(root: Path, version: FileVersion) -> Path:
    name = version.version_id.hex()
    return root / ".swarmcache" / "objects" / name[:2] / name


def left_in_partial(root: Path) -> list[str]:
    return sorted(os.listdir(root / ".swarmcache" / "partial"))


def change_index(root: Path, statement: str) -> None:
    connection = sqlite3.connect(root / ".swarmcache" / "index.sqlite")
    with connection:
        connection.execute(statement)
    connection.close()


def make_old(root: Path, *versions: FileVersion, age_s: float = 36_000.0) -> None:
    """As if they had last been used long ago, the first one longest ago."""
    for number, version in enumerate(versions):
        used_s = int(time.time() - age_s) + number
        change_index(
            root,
            f"UPDATE replica SET last_used_s = {used_s}"
            f" WHERE version_id = x'{version.version_id.hex()}'",
        )
        mtime_ns = os.stat(object_of(root, version)).st_mtime_ns
        os.utime(object_of(root, version), ns=(used_s * 10**9, mtime_ns))
        stamp = os.stat(object_of(root, version)).st_ctime_ns
        change_index(
            root,
            f"UPDATE replica SET ctime_ns = {stamp}"
            f" WHERE version_id = x'{version.version_id.hex()}'",
        )


def killed(root: Path, script: str) -> None:
    """Run a script with ``cache`` open on the directory in another process, then kill -9 it."""
    head = """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from tests.disk_helpers import *
        root = Path(sys.argv[2])
        cache = open_cache(root)
        def die(*ignored): os.kill(os.getpid(), signal.SIGKILL)
    """
    program = textwrap.dedent(head) + textwrap.dedent(script) + "\ndie()\n"
    done = subprocess.run(
        [sys.executable, "-c", program, str(REPOSITORY), str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@contextmanager
def as_stranger() -> Iterator[None]:
    """This process, if it is root's, as a user who has no rights."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def run_as(uid: int, *command: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, user=uid, group=uid, extra_groups=[], capture_output=True, check=False
    )
