"""Rot and tampering that leave no trace: found by digesting, kept from everybody, mended."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import queue
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from swarmcache import quiet_read
from swarmcache import scrub as scrubbing
from swarmcache.cache_dir import CacheDir
from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, FileVersion
from swarmcache.disk import Cache
from swarmcache.peer_events import PeerEvent, ReplicasRecovered
from swarmcache.quiet_read import PIECE_BYTES, digest_quietly, open_quietly
from swarmcache.scrub import Scrubber, Stopped
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    User,
    a_file,
    change_index,
    fill,
    object_of,
    open_cache,
    publish,
    recovered,
)
from tests.faulty_disk import Fault, FaultyDisk
from tests.watched_disk import watched

PATIENCE_S = 30.0


def rot(root: Path, version: FileVersion, chunk: int) -> None:
    """Flip a bit so that ``stat`` says what the index says."""
    path = object_of(root, version)
    before = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(chunk * CHUNK_BYTES + 5)
        byte = file.read(1)[0]
        file.seek(chunk * CHUNK_BYTES + 5)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    change_index(root, f"UPDATE replica SET ctime_ns = {path.stat().st_ctime_ns}")


def verified_s(root: Path) -> dict[bytes, float]:
    with closing(sqlite3.connect(root / ".swarmcache" / "index.sqlite")) as connection:
        return dict(connection.execute("SELECT version_id, verified_s FROM replica"))


# --- on demand ------------------------------------------------------------------------------------


def test_a_good_copy_is_found_good_and_stays(cache: CacheDir, root: Path) -> None:
    version, data = a_file(9000)
    path = publish(cache, version, data)[ME.uid]
    change_index(root, "UPDATE replica SET verified_s = 1")

    assert cache.verify(version.version_id) == []
    assert verified_s(root)[version.version_id] > 1
    assert cache.lookup(version, ME) == path
    assert cache.take_damaged() == {}
    assert cache.verify(bytes(32)) is None


def test_a_rotten_chunk_is_found_and_the_copy_kept_from_everybody(
    cache: CacheDir, root: Path
) -> None:
    other = User(ME.uid, "other")
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data, other, ME)
    rot(root, version, 1)
    path = cache.lookup(version, ME)
    assert path is not None, "it left a trace"
    served = cache.open_source(version.version_id)
    assert served is not None
    assert served.has(1)

    assert cache.verify(version.version_id) == [1]

    assert not served.has(1), "still served to the peer that was being served"
    served.close()
    assert cache.open_source(version.version_id) is None
    assert cache.lookup(version, ME) is None
    assert not list(root.glob("*/nfs"))
    assert list(cache.replicas()) == []
    damaged = cache.take_damaged()[version.version_id]
    assert damaged is not None
    assert (damaged.version, damaged.chunk_size_bytes) == (version, CHUNK_BYTES)
    assert set(damaged.users) == {ME, other}

    partial = cache.begin(version, damaged.chunk_size_bytes)
    assert [chunk for chunk, _ in partial.recover()] == [0, 2]
    fill(partial, data).publish(damaged.users)
    assert cache.lookup(version, ME) == path
    assert Path(path).read_bytes() == data
    assert cache.verify(version.version_id) == []


def test_a_copy_without_its_digests_cannot_be_mended(cache: CacheDir, root: Path) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    where = object_of(root, version)
    where.with_name(where.name + ".manifest").write_bytes(b"rotten")

    assert cache.verify(version.version_id) == [0]
    assert cache.take_damaged() == {version.version_id: None}
    assert cache.lookup(version, ME) is None
    assert cache.status().used_bytes == 0


def test_a_chunk_that_the_disk_cannot_read_is_rotten(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data)
    read = os.preadv

    def bad_sector(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if offset == CHUNK_BYTES:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", bad_sector)
    assert cache.verify(version.version_id) == [1]
    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [0, 2]
    partial.discard()


def unreadable_manifest(monkeypatch: pytest.MonkeyPatch, root: Path, version: FileVersion) -> None:
    """The disk finds the sector rotten in which the digests of a file are."""
    where = object_of(root, version)
    inode = os.stat(where.with_name(where.name + ".manifest")).st_ino
    read = os.pread

    def bad_sector(fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", bad_sector)


def test_digests_that_the_disk_cannot_read_are_as_good_as_none(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else it would be the next copy to be digested for ever."""
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data)
    unreadable_manifest(monkeypatch, root, version)

    assert cache.verify(version.version_id) == [0]
    assert cache.take_damaged() == {version.version_id: None}
    assert cache.stalest(time.time()) is None
    path = publish(cache, version, data)[ME.uid]
    assert Path(path).read_bytes() == data


@pytest.mark.parametrize("listed", [False, True])
def test_a_copy_whose_digests_cannot_be_read_keeps_no_other_in_doubt(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, listed: bool
) -> None:
    cache = open_cache(root)
    files = [a_file(3 * CHUNK_BYTES, b"/nfs/%d" % i, i) for i in range(3)]
    for version, data in files:
        publish(cache, version, data)
    cache.close()
    if listed:
        change_index(root, "UPDATE replica SET trust = 0")
    else:
        (root / ".swarmcache" / "index.sqlite").unlink()
    unreadable_manifest(monkeypatch, root, files[0][0])

    cache = open_cache(root)
    for _ in cache.list_objects():
        pass
    assert set(recovered(cache)) == {version.version_id for version, _ in files[1:]}
    assert cache.status().file_count == 2
    partial = cache.begin(files[0][0], CHUNK_BYTES)
    assert Path(fill(partial, files[0][1]).publish([ME])[ME.uid]).read_bytes() == files[0][1]
    cache.close()


def test_a_copy_that_is_replaced_while_it_is_digested_is_not_blamed(
    cache: CacheDir, root: Path
) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data)
    rot(root, version, 2)

    def replace(size_bytes: int) -> None:
        if cache.lookup(version, ME) and not replaced:
            replaced.append(True)
            cache.drop(version.version_id)
            publish(cache, version, data)

    replaced: list[bool] = []
    assert cache.verify(version.version_id, replace) == []
    assert cache.lookup(version, ME) is not None


@pytest.mark.parametrize("of_use", [True, False])
def test_a_copy_that_came_again_before_anybody_mended_it_is_left_alone(
    cache: CacheDir, root: Path, *, of_use: bool
) -> None:
    """Whoever mends it would take it back from those who have got it meanwhile."""
    other = User(ME.uid, "other")
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data, ME, other)
    rot(root, version, 1)
    if not of_use:
        where = object_of(root, version)
        where.with_name(where.name + ".manifest").write_bytes(b"rotten")
    assert cache.verify(version.version_id)

    assert cache.begin_batch([version], CHUNK_SIZE_MIN_BYTES) is None, "told of as a whole"
    partial = cache.begin(version, CHUNK_BYTES)
    assert len(dict(partial.recover())) == (2 if of_use else 0)
    fill(partial, data).publish([ME])

    assert cache.take_damaged() == {}
    links = cache.listing.linked(version.version_id)
    assert set(links) == ({ME, other} if of_use else {ME})


# --- in the background ----------------------------------------------------------------------------


@pytest.fixture
def scrub(root: Path) -> Iterator[Callable[..., queue.Queue[PeerEvent | None]]]:
    """Starts a scrubber: ``scrub(cache, rate)``. None in the queue: it had a look at a copy."""
    running: list[Scrubber] = []

    def start(cache: Cache, rate_bytes_per_s: int | None) -> queue.Queue[PeerEvent | None]:
        told: queue.Queue[PeerEvent | None] = queue.Queue()
        running.append(Scrubber(cache, rate_bytes_per_s, told.put, lambda: told.put(None)))
        running[-1].start()
        return told

    yield start
    for scrubber in running:
        scrubber.stop()


@pytest.mark.slow
def test_the_copies_that_were_not_verified_for_longest_come_first(
    root: Path, scrub: Callable[..., queue.Queue[PeerEvent | None]]
) -> None:
    cache = Cache([open_cache(root)])
    files = [a_file(9000, b"/nfs/%d" % i, i) for i in range(4)]
    for version, data in files:
        fill(cache.begin(version, CHUNK_BYTES), data).publish([ME])
        cache.make_durable([version.version_id])
    for number, (version, _) in enumerate(files[1:], 1):
        change_index(
            root,
            f"UPDATE replica SET verified_s = {5 - number}"
            f" WHERE version_id = x'{version.version_id.hex()}'",
        )
    told = scrub(cache, 1 << 30)

    assert told.get(timeout=PATIENCE_S) is None  # of what was in doubt: nothing
    for _ in files[1:]:
        assert told.get(timeout=PATIENCE_S) is None
    found = verified_s(root)
    order = sorted((version.version_id for version, _ in files), key=found.__getitem__)
    assert order == [files[number][0].version_id for number in (0, 3, 2, 1)]
    cache.close()


@pytest.mark.slow
def test_no_rate_is_no_scrubbing_but_doubts_are_settled(
    root: Path, scrub: Callable[..., queue.Queue[PeerEvent | None]]
) -> None:
    version, data = a_file(9000)
    directory = open_cache(root)
    publish(directory, version, data)
    directory.make_durable(version.version_id)
    directory.close()
    (root / ".swarmcache" / "index.sqlite").unlink()
    cache = Cache([open_cache(root)])
    told = scrub(cache, None)

    assert told.get(timeout=PATIENCE_S) is None
    assert told.get(timeout=PATIENCE_S) == ReplicasRecovered([version.version_id])
    assert cache.lookup(version, ME) is not None
    cache.close()


def test_a_disk_that_fails_once_does_not_keep_files_in_doubt(
    root: Path,
    scrub: Callable[..., queue.Queue[PeerEvent | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version, data = a_file(9000)
    cache = open_cache(root)
    publish(cache, version, data)
    cache.close()
    change_index(root, "DELETE FROM replica")
    monkeypatch.setattr(scrubbing, "PAUSE_S", 0.0)
    cache = open_cache(root)

    with watched(FaultyDisk(0, Fault(errno.EMFILE))):
        told = scrub(Cache([cache]), None)
        assert told.get(timeout=PATIENCE_S) is None

    assert told.get(timeout=PATIENCE_S) == ReplicasRecovered([version.version_id])
    assert cache.lookup(version, ME) is not None
    cache.close()


def test_a_scrubber_stops_in_the_middle_of_a_file(root: Path) -> None:
    version, data = a_file(64 * CHUNK_BYTES)
    cache = Cache([open_cache(root)])
    fill(cache.begin(version, CHUNK_BYTES), data).publish([ME])
    cache.make_durable([version.version_id])
    change_index(root, "UPDATE replica SET verified_s = 1")
    # At this rate a chunk takes an hour.
    scrubber = Scrubber(cache, 1, lambda event: None, lambda: None)
    scrubber.start()
    scrubber.stop()

    with pytest.raises(Stopped):
        scrubber.go_on(1)
    assert verified_s(root) == {version.version_id: 1}
    cache.close()


# --- unnoticed ------------------------------------------------------------------------------------


@contextmanager
def closed_after(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def write_cold(path: Path, data: bytes) -> None:
    """A file that is on the disk and not in the page cache."""
    path.write_bytes(data)
    with closed_after(os.open(path, os.O_RDONLY)) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> set[int]:
    """The pages of a file that are in the page cache, as cachestat(2) of Linux 6.5 says."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = set()
    with closed_after(os.open(path, os.O_RDONLY)) as fd:
        for page in range(-(-path.stat().st_size // mmap.PAGESIZE)):
            where = (ctypes.c_uint64 * 2)(page * mmap.PAGESIZE, mmap.PAGESIZE)
            counts = (ctypes.c_uint64 * 5)()
            if libc.syscall(451, fd, where, counts, 0) != 0:
                pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
            if counts[0]:
                found.add(page)
    return found


def test_reading_in_the_background_leaves_page_cache_and_atime_as_they_were(root: Path) -> None:
    root.mkdir()
    path = root / "file"
    data = os.urandom(16 * PIECE_BYTES + 5)
    write_cold(path, data)
    used = os.open(path, os.O_RDONLY | os.O_NOATIME)
    os.posix_fadvise(used, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(used, 1 << 20, (1 << 20) + 12345)
    before = resident(path)
    assert 0 < len(before) < len(data) // mmap.PAGESIZE // 2
    os.utime(path, (1, 1))

    pieces: list[int] = []
    directory = os.open(root, os.O_RDONLY)
    with closed_after(open_quietly("file", directory)) as fd:
        digest = digest_quietly(fd, 0, len(data), pieces.append)
    os.close(directory)
    os.close(used)

    assert digest == blake3(data).digest()
    assert sum(pieces) == len(data)
    assert path.stat().st_atime == 1
    assert resident(path) == before


def test_reading_in_the_background_has_the_lowest_priority_for_that_time_only(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.mkdir()
    path = root / "file"
    write_cold(path, bytes(100))
    order: list[object] = []
    set_priority = quiet_read._set_priority
    read = os.preadv

    def note_priority(priority: int) -> None:
        set_priority(priority)
        order.append(priority >> 13)

    def note_read(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        count = read(fd, buffers, offset, *flags)
        order.append("read")
        return count

    monkeypatch.setattr(quiet_read, "_set_priority", note_priority)
    monkeypatch.setattr(os, "preadv", note_read)
    with closed_after(os.open(path, os.O_RDONLY)) as fd:
        digest_quietly(fd, 0, 100, lambda size_bytes: None)
    assert order == [3, "read", 0]
