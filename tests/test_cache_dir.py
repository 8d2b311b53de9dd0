"""The cache directory on real disks: what is published, resumed, refused and given back."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcache import cache_dir
from swarmcache.cache_dir import CacheDir, Partial, Removal, User
from swarmcache.cache_index import CacheIndex, Replica, Trust
from swarmcache.chunks import ChunkLayout, FileVersion, Manifest
from swarmcache.errors import CacheDirUnusable, DirectoryUnusable, LocalError, NoSpace
from swarmcache.manifest_files import decode_manifest, encode_header, encode_manifest
from swarmcache.partial import JOURNAL_MAGIC, decode_journal, encode_record
from swarmcache.partial_store import OVERHEAD_BYTES, UNCOUNTED_MAX_BYTES
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    REPOSITORY,
    a_file,
    change_index,
    fill,
    killed,
    left_in_partial,
    needs_root,
    object_of,
    open_cache,
    publish,
    recovered,
    run_as,
    write,
)

# --- a file's way into the cache ------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 1])
def test_a_published_file_has_bytes_mtime_and_path_of_its_source(
    cache: CacheDir, root: Path, size_bytes: int
) -> None:
    version, data = a_file(size_bytes, b"/nfs/a b\n/\xff.hdf")
    assert cache.lookup(version, ME) is None

    paths = publish(cache, version, data)

    path = paths[ME.uid]
    assert os.fsencode(path) == os.fsencode(root) + b"/me/nfs/a b\n/\xff.hdf"
    assert cache.lookup(version, ME) == path == cache.user_path(version, ME)
    assert Path(path).read_bytes() == data
    status = os.stat(path)
    assert status.st_mtime_ns == version.mtime_ns
    assert stat.S_IMODE(status.st_mode) == 0o444
    assert left_in_partial(root) == []
    assert list(cache.replicas()) == [version.version_id]
    assert cache.status().file_count == 1


def test_the_manifest_of_a_replica_lists_the_digests_of_its_chunks(cache: CacheDir) -> None:
    version, data = a_file(2 * CHUNK_BYTES + 5)
    assert cache.manifest(version.version_id) is None
    publish(cache, version, data)

    manifest = cache.manifest(version.version_id)

    assert manifest is not None
    assert manifest.layout == ChunkLayout(len(data), CHUNK_BYTES)
    assert manifest.digests[2] == blake3(data[2 * CHUNK_BYTES :]).digest()


def test_another_version_of_a_source_takes_its_place_in_the_users_tree(cache: CacheDir) -> None:
    old, old_data = a_file(5000, seed=1)
    new, new_data = a_file(7000, seed=2)
    path = publish(cache, old, old_data)[ME.uid]

    assert publish(cache, new, new_data)[ME.uid] == path
    assert Path(path).read_bytes() == new_data
    assert cache.lookup(old, ME) == path  # the source was put back
    assert Path(path).read_bytes() == old_data
    cache.drop(new.version_id)  # must not take away what is no longer its own
    assert Path(path).read_bytes() == old_data


def test_pieces_count_only_after_their_chunk_is_committed(cache: CacheDir) -> None:
    version, data = a_file(CHUNK_BYTES + 100)
    partial = cache.begin(version, CHUNK_BYTES)
    partial.write_piece(0, data[:1000])
    partial.write_piece(1000, data[1000:CHUNK_BYTES])
    assert not partial.has(0)

    partial.commit_chunk(0, blake3(data[:CHUNK_BYTES]).digest())
    assert partial.has(0)
    partial.write_piece(0, b"too late, the chunk is being served")
    write(partial, data, 1)

    assert Path(partial.publish([ME])[ME.uid]).read_bytes() == data


def test_many_threads_write_and_serve_one_file_at_once(cache: CacheDir) -> None:
    version, data = a_file(64 * CHUNK_BYTES + 17)
    partial = cache.begin(version, CHUNK_BYTES)
    source = cache.open_source(version.version_id)
    assert source is not None
    chunks = list(range(partial.layout.chunk_count)) * 2  # each one from two peers
    Random(1).shuffle(chunks)

    def fetch(chunk: int) -> bool:
        write(partial, data, chunk)
        begin, length = partial.layout.offset_bytes(chunk), partial.layout.length_bytes(chunk)
        return source.has(chunk) and os.pread(source.fd, length, begin) == data[begin:][:length]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(fetch, chunks))
    assert Path(partial.publish([ME])[ME.uid]).read_bytes() == data
    assert source.has(64)  # still valid, for it is the same file
    source.close()
    source.close()


def hold_up_writes(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The thread called "slow" waits before each write: whether it does, and what it waits for."""
    in_write, go_on = threading.Event(), threading.Event()
    real_pwrite = os.pwrite

    def slow_pwrite(fd: int, piece: bytes, offset_bytes: int) -> int:
        if threading.current_thread().name == "slow":
            in_write.set()
            assert go_on.wait(10)
        return real_pwrite(fd, piece, offset_bytes)

    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    return in_write, go_on


def test_publish_waits_for_a_second_copy_of_a_chunk_that_is_still_being_written(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(CHUNK_BYTES)
    partial = cache.begin(version, CHUNK_BYTES)
    in_write, go_on = hold_up_writes(monkeypatch)
    slow = threading.Thread(target=write, args=(partial, data, 0), name="slow")
    slow.start()
    assert in_write.wait(10)
    write(partial, data, 0)
    with ThreadPoolExecutor(1) as threads:
        published = threads.submit(partial.publish, [ME])
        with pytest.raises(TimeoutError):
            published.result(timeout=0.05)
        go_on.set()
        published.result(timeout=10)
    slow.join()

    assert cache.lookup(version, ME) is not None


@pytest.mark.parametrize("end", [Partial.discard, Partial.close])
def test_a_partial_file_that_ends_stays_open_for_who_still_writes(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch, end: Callable[[Partial], None]
) -> None:
    version, data = a_file(CHUNK_BYTES)
    partial = cache.begin(version, CHUNK_BYTES)
    in_write, go_on = hold_up_writes(monkeypatch)
    slow = threading.Thread(target=partial.write_piece, args=(0, data), name="slow")
    slow.start()
    assert in_write.wait(10)

    end(partial)

    os.fstat(partial.file.fd)  # or the bytes would go to whatever is opened next
    go_on.set()
    slow.join()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(partial.file.fd)


def test_a_file_can_be_begun_while_another_one_is_being_put_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where space is not set aside, room is counted from the partial files, one of which moves."""
    (first, data), (second, _) = a_file(9000, b"/nfs/first"), a_file(9000, b"/nfs/second")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as in_memory:
        cache = open_cache(Path(in_memory) / "cache")
        put_in_place = cache._partials._install
        begun: list[Partial] = []

        def begin_the_second(partial: Partial, users: Sequence[User]) -> dict[int, str]:
            paths = put_in_place(partial, users)
            begun.append(cache.begin(second, CHUNK_BYTES))
            return paths

        monkeypatch.setattr(cache._partials, "_install", begin_the_second)
        publish(cache, first, data)
        cache.close()

    assert [partial.version for partial in begun] == [second]


def test_nothing_can_be_written_after_a_partial_file_has_ended(cache: CacheDir, root: Path) -> None:
    version, data = a_file(CHUNK_BYTES)
    for end in (Partial.discard, Partial.close):
        partial = cache.begin(version, CHUNK_BYTES)
        end(partial)
        end(partial)
        with pytest.raises(LocalError, match="no longer open"):
            write(partial, data, 0)
    cache.begin(version, CHUNK_BYTES).discard()
    assert left_in_partial(root) == []


def test_a_source_outlives_the_file_that_it_reads(cache: CacheDir) -> None:
    version, data = a_file(CHUNK_BYTES)
    publish(cache, version, data)
    source = cache.open_source(version.version_id)
    assert source is not None
    assert (source.has(0), source.has(1)) == (True, False)

    cache.drop(version.version_id)

    assert os.pread(source.fd, CHUNK_BYTES, 0) == data
    assert cache.open_source(version.version_id) is None
    source.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(source.fd)


def test_chunks_that_are_committed_together_are_had_and_found_again(cache: CacheDir) -> None:
    version, data = a_file(4 * CHUNK_BYTES)
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    digests = [blake3(piece).digest() for piece in pieces]
    partial = cache.begin(version, CHUNK_BYTES)
    for chunk in (0, 1, 3):
        partial.write_piece(chunk * CHUNK_BYTES, pieces[chunk])

    partial.commit_chunks({chunk: digests[chunk] for chunk in (3, 0)})
    journal_end = partial._journal_end
    partial.commit_chunks({0: digests[0]})
    assert partial._journal_end == journal_end  # each is noted once, for which there is room
    partial.commit_chunks({0: digests[0], 1: digests[1]})
    assert [partial.has(chunk) for chunk in range(4)] == [True, True, False, True]

    partial.close()
    found = dict(cache.begin(version, CHUNK_BYTES).recover())
    assert found == {chunk: digests[chunk] for chunk in (0, 1, 3)}


def test_a_discarded_partial_file_serves_nothing(cache: CacheDir) -> None:
    version, data = a_file(2 * CHUNK_BYTES)
    partial = cache.begin(version, CHUNK_BYTES)
    write(partial, data, 1)
    source = cache.open_source(version.version_id)
    assert source is not None
    assert source.has(1)
    partial.discard()
    assert not source.has(1)
    source.close()


# --- going on after a kill ------------------------------------------------------------------------

WRITE_THREE = """
    version, data = a_file(5 * CHUNK_BYTES)
    partial = cache.begin(version, CHUNK_BYTES)
    for chunk in (4, 0, 2): write(partial, data, chunk)
"""


def test_a_killed_download_goes_on_with_what_it_had(root: Path) -> None:
    killed(root, WRITE_THREE)
    version, data = a_file(5 * CHUNK_BYTES)
    cache = open_cache(root)
    partial = cache.begin(version, CHUNK_BYTES)
    assert partial.resumable

    expected = {c: blake3(data[c * CHUNK_BYTES :][:CHUNK_BYTES]).digest() for c in (0, 2, 4)}
    assert dict(partial.recover()) == expected
    assert [partial.has(chunk) for chunk in range(5)] == [True, False, True, False, True]
    fill(partial, data)
    assert Path(partial.publish([ME])[ME.uid]).read_bytes() == data
    cache.close()


def test_a_torn_journal_and_rotten_chunks_cost_only_themselves(root: Path) -> None:
    killed(root, WRITE_THREE)
    version, data = a_file(5 * CHUNK_BYTES)
    name = root / ".swarmcache" / "partial" / version.version_id.hex()
    journal = name.with_suffix(".chunks")
    whole = journal.read_bytes()
    # A power cut: a flipped byte in chunk 4, zeros in the journal, and the last record cut off.
    journal.write_bytes(whole[:-36] + bytes(36) + encode_record(1000, bytes(32)) + whole[-36:-1])
    with name.open("r+b") as file:
        file.seek(4 * CHUNK_BYTES + 7)
        file.write(bytes([data[4 * CHUNK_BYTES + 7] ^ 1]))
    cache = open_cache(root)

    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [0]
    write(partial, data, 4)
    partial.close()

    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [0, 4]
    cache.close()


def test_a_journal_of_another_chunk_size_is_started_over(root: Path) -> None:
    killed(root, WRITE_THREE)
    version, data = a_file(5 * CHUNK_BYTES)
    cache = open_cache(root)
    partial = cache.begin(version, 2 * CHUNK_BYTES)
    assert not partial.resumable
    assert Path(fill(partial, data).publish([ME])[ME.uid]).read_bytes() == data
    assert cache.status().used_bytes == 5 * CHUNK_BYTES + 4096
    cache.close()


def test_old_or_unmatched_files_are_removed_from_partial(root: Path) -> None:
    open_cache(root).close()
    partial = root / ".swarmcache" / "partial"
    for name, age_s in (("ab" * 32, 25 * 3600), ("cd" * 32, 23 * 3600)):
        for suffix in ("", ".chunks"):
            (partial / (name + suffix)).write_bytes(bytes(8192))
            at_s = os.stat(partial).st_mtime - age_s
            os.utime(partial / (name + suffix), (at_s, at_s))
    for name in ("ef" * 32, "01" * 32 + ".chunks", "23" * 32 + ".manifest", "45" * 32 + ".link"):
        (partial / name).write_bytes(b"left over")

    cache = open_cache(root)

    assert left_in_partial(root) == ["cd" * 32, "cd" * 32 + ".chunks"]
    assert cache.status().used_bytes == 2 * 8192
    cache.close()


def test_a_kill_right_after_publishing_loses_nothing(root: Path) -> None:
    killed(root, "publish(cache, *a_file(9000), ME)")
    version, data = a_file(9000)
    cache = open_cache(root)
    path = cache.lookup(version, ME)
    assert path is not None
    assert Path(path).read_bytes() == data
    cache.close()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("doing", "method"),
    [
        ("publish", "insert"),
        ("publish", "doubt"),
        ("publish", "settle"),
        ("link", "doubt"),
        ("link", "settle"),
    ],
)
def test_a_kill_around_any_write_of_the_index_leaves_no_wrong_row(
    root: Path, method: str, when: str, doing: str
) -> None:
    """Digesting afterwards finds what is good, whatever moment it was."""
    version, data = a_file(9000)
    script = f"""
        version, data = a_file(9000)
        if "{doing}" == "link": publish(cache, version, data)
        real = CacheIndex.{method}
        def deadly(*args, **more):
            if "{when}" == "after": real(*args, **more)
            die()
        CacheIndex.{method} = deadly
        if "{doing}" == "link": cache.lookup(version, User(ME.uid, "other"))
        else: publish(cache, version, data)
    """
    killed(root, script)
    cache = open_cache(root)
    found = cache.lookup(version, ME) is not None
    done = (method, when) == ("settle", "after")
    untouched = (doing, method, when) == ("link", "doubt", "before")
    in_place = doing == "link" or method != "insert"
    assert found == (done or untouched)

    assert recovered(cache) == ([version.version_id] if in_place - found else [])
    if not in_place:
        cache.begin(version, CHUNK_BYTES).discard()
        publish(cache, version, data)
    for user in (ME, User(ME.uid, "other")):
        assert Path(cache.lookup(version, user) or "").read_bytes() == data
    cache.drop(version.version_id)
    assert os.listdir(root / "me") == os.listdir(root / "other") == []
    assert cache.status().used_bytes == 0
    cache.close()


def test_a_kill_before_the_file_is_in_place_leaves_the_partial_file(root: Path) -> None:
    killed(
        root,
        """
        CacheDir._move_into_objects = die
        publish(cache, *a_file(9000), ME)
        """,
    )
    version, data = a_file(9000)
    cache = open_cache(root)
    assert cache.lookup(version, ME) is None
    assert recovered(cache) == []
    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [0, 1, 2]
    assert Path(partial.publish([ME])[ME.uid]).read_bytes() == data
    assert cache.status().file_count == 1
    cache.close()


# --- what power cuts and fsync do -----------------------------------------------------------------


def test_after_a_reboot_only_what_was_durable_is_handed_out_unseen(root: Path) -> None:
    cache = open_cache(root)
    durable, good, rotten, unchanged = (a_file(9000, b"/nfs/%d" % i, i) for i in range(4))
    for version, data in (durable, good, rotten, unchanged):
        publish(cache, version, data)
    cache.make_durable(durable[0].version_id)
    cache.close()
    change_index(root, "UPDATE replica SET boot_id = x'00'")
    where = object_of(root, rotten[0])
    where.chmod(0o600)
    with where.open("r+b") as file:
        file.write(bytes(100))  # delayed blocks that never reached the disk
    os.utime(object_of(root, good[0]), ns=(0, 0))  # neither did this time

    cache = open_cache(root)
    assert [cache.lookup(version, ME) is not None for version, _ in (durable, good, rotten)] == [
        True,
        False,
        False,
    ]
    assert list(cache.replicas()) == [durable[0].version_id]
    for version, _ in (good, rotten, unchanged):
        assert cache.open_source(version.version_id) is None

    assert set(recovered(cache)) == {good[0].version_id, unchanged[0].version_id}
    assert set(cache.replicas()) == {v.version_id for v, _ in (durable, good, unchanged)}
    path = cache.lookup(good[0], ME)
    assert path is not None
    assert Path(path).read_bytes() == good[1]
    assert os.stat(path).st_mtime_ns == good[0].mtime_ns
    assert cache.lookup(rotten[0], ME) is None
    assert not where.exists()
    assert not Path(cache.user_path(rotten[0], ME)).exists()
    cache.close()


def test_a_failed_fsync_drops_the_copy_and_is_not_tried_again(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(9000)
    path = publish(cache, version, data)[ME.uid]
    calls = []

    def broken_fsync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken_fsync)
    with pytest.raises(LocalError, match="sync"):
        cache.make_durable(version.version_id)

    assert len(calls) == 1
    assert cache.lookup(version, ME) is None
    assert not Path(path).exists()
    assert not object_of(root, version).exists()
    assert cache.take_damaged() == {version.version_id: None}, "the tracker is to know"


def test_many_copies_are_made_durable_with_one_call(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [a_file(9000, b"/nfs/%d" % number, number) for number in range(3)]
    for version, data in files:
        publish(cache, version, data)
    version_ids = [version.version_id for version, _ in files]
    calls: list[int] = []
    monkeypatch.setattr(cache_dir, "sync_file_system", calls.append)

    cache.make_all_durable([b"absent" * 5 + b"--"])
    assert calls == []
    cache.make_all_durable([*version_ids[:2], b"absent" * 5 + b"--"])

    assert len(calls) == 1
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))
    replicas = [index.find(version_id) for version_id in version_ids]
    index.close()
    assert [replica.trust for replica in replicas if replica is not None] == [
        Trust.DURABLE,
        Trust.DURABLE,
        Trust.WRITTEN,
    ]


def test_a_failed_sync_drops_all_copies_that_it_was_for(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [a_file(9000, b"/nfs/%d" % number, number) for number in range(3)]
    for version, data in files:
        publish(cache, version, data)

    def broken_sync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cache_dir, "sync_file_system", broken_sync)
    with pytest.raises(LocalError, match="sync"):
        cache.make_all_durable([version.version_id for version, _ in files[:2]])

    assert [cache.lookup(version, ME) is not None for version, _ in files] == [False, False, True]
    assert [object_of(root, version).exists() for version, _ in files] == [False, False, True]
    assert cache.take_damaged() == {version.version_id: None for version, _ in files[:2]}


def test_making_links_does_not_take_durability_away(cache: CacheDir, root: Path) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    cache.make_durable(version.version_id)
    cache.lookup(version, User(ME.uid, "me-too"))
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))
    replica = index.find(version.version_id)
    index.close()
    assert replica is not None
    assert replica.trust == Trust.DURABLE


def test_the_index_counts_the_files_of_one_source_directory(cache: CacheDir, root: Path) -> None:
    paths = (b"/nfs/a/1", b"/nfs/a/2", b"/nfs/a/b/3", b"/nfs/4", b"/nfs/ab/5")
    for number, path in enumerate(paths):
        publish(cache, *a_file(10, path, number))
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))

    assert [index.count_beside(path) for path in (b"/nfs/a/new", b"/nfs/new", b"/new")] == [2, 1, 0]
    index.close()


def test_times_of_last_use_reach_the_index_with_flush(cache: CacheDir, root: Path) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    change_index(root, "UPDATE replica SET last_used_s = 1")
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))

    def last_used_s() -> float:
        replica = index.find(version.version_id)
        assert replica is not None
        return replica.last_used_s

    cache.lookup(version, ME)
    assert last_used_s() == 1
    cache.flush()
    assert last_used_s() > 1
    index.close()


# --- tampering ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"\0")


def restore_mtime_after_flip(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, 10)


def exchange(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tamper", "use"),
    [
        (flip, True),
        (restore_mtime_after_flip, True),
        (exchange, False),
        (cut, False),
        (Path.unlink, False),
    ],
)
def test_a_copy_that_somebody_touched_is_taken_out_everywhere(
    cache: CacheDir, root: Path, tamper: Callable[[Path], None], use: bool
) -> None:
    """``use``: what of it is right is of use for the next attempt."""
    version, data = a_file(9000)
    paths = publish(cache, version, data, ME, User(ME.uid, "other"))
    tamper(object_of(root, version))

    # The one who was asked first finds out; the user's own name for it may be still unchanged.
    source = cache.open_source(version.version_id)
    assert source is None
    assert cache.lookup(version, ME) is None
    assert not object_of(root, version).exists()
    assert not Path(paths[ME.uid]).exists()
    assert not (root / "me" / "nfs").exists()  # no empty directories either
    assert cache.status().used_bytes == (16384 if use else 0)
    assert [bool(damaged) for damaged in cache.take_damaged().values()] == [use]
    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == ([1, 2] if use else [])
    path = fill(partial, data).publish([ME])[ME.uid]
    assert cache.lookup(version, ME) == path
    assert Path(path).read_bytes() == data


def test_a_lookup_alone_notices_a_change_through_the_users_link(cache: CacheDir) -> None:
    version, data = a_file(9000)
    path = publish(cache, version, data)[ME.uid]
    restore_mtime_after_flip(Path(path))
    assert cache.lookup(version, ME) is None


def test_a_link_that_the_user_removed_is_made_again(cache: CacheDir, root: Path) -> None:
    version, data = a_file(9000)
    path = publish(cache, version, data)[ME.uid]
    shutil.rmtree(root / "me")
    # Removing a link changes the ctime, so the copy counts as touched.
    assert cache.lookup(version, ME) is None
    assert publish(cache, version, data)[ME.uid] == path
    assert Path(path).read_bytes() == data


# --- the users' directories -----------------------------------------------------------------------


@needs_root
def test_each_user_reaches_the_one_inode_through_their_own_directory_only(
    cache: CacheDir, root: Path
) -> None:
    version, data = a_file(9000)
    bob, eve = User(6001, "bob"), User(6002, "eve")
    publish(cache, version, data, bob)
    theirs = cache.lookup(version, eve)
    assert theirs is not None
    path = Path(cache.user_path(version, bob))
    assert path.stat().st_ino == Path(theirs).stat().st_ino
    assert cache.lookup(version, bob) == str(path)

    assert run_as(bob.uid, "cat", path).stdout == data
    assert run_as(eve.uid, "cat", theirs).stdout == data
    for forbidden in (path, path.parent, root / "bob"):
        assert run_as(eve.uid, "cat", forbidden).returncode != 0
        assert run_as(eve.uid, "ls", forbidden).returncode != 0
    assert run_as(bob.uid, "ls", root / ".swarmcache").returncode != 0

    # Their own files beside ours, but not instead of ours.
    assert run_as(bob.uid, "touch", path.parent / "notes").returncode == 0
    assert run_as(bob.uid, "rm", "-f", path).returncode != 0
    assert run_as(bob.uid, "mv", "-f", path.parent / "notes", path).returncode != 0
    assert run_as(bob.uid, "mv", path.parent, root / "bob" / "elsewhere").returncode != 0
    assert run_as(bob.uid, "sh", "-c", f"echo >> '{path}'").returncode != 0
    assert cache.lookup(version, bob) == str(path)

    cache.drop(version.version_id)
    assert sorted(os.listdir(path.parent)) == ["notes"]
    assert os.listdir(root / "eve") == []


@needs_root
@pytest.mark.parametrize("planted", ["link", "directory", "file"])
def test_a_user_who_plants_something_in_the_way_loses_only_their_own_link(
    cache: CacheDir, root: Path, planted: str
) -> None:
    bob, eve = User(6001, "bob"), User(6002, "eve")
    publish(cache, *a_file(10, b"/nfs/first", 5), bob)
    target = root.parent / "target"
    target.mkdir()
    os.chown(target, bob.uid, bob.uid)
    in_the_way = root / "bob" / "nfs" / "corpus"
    command = {
        "link": ("ln", "-s", target, in_the_way),
        "directory": ("mkdir", in_the_way),
        "file": ("touch", in_the_way),
    }[planted]
    assert run_as(bob.uid, *command).returncode == 0

    version, data = a_file(9000)
    paths = publish(cache, version, data, bob, eve)
    assert list(paths) == [eve.uid]
    with pytest.raises(CacheDirUnusable, match="corpus"):
        cache.lookup(version, bob)
    assert cache.lookup(version, eve) == paths[eve.uid]
    assert os.listdir(target) == []
    cache.drop(version.version_id)
    assert in_the_way.exists()


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: p.symlink_to("/etc")])
def test_a_users_own_file_in_the_place_of_the_link_is_left_alone(
    cache: CacheDir, root: Path, make: Callable[[Path], None]
) -> None:
    version, data = a_file(9000)
    path = Path(cache.user_path(version, ME))
    path.parent.mkdir(parents=True)
    make(path)
    before = path.lstat()

    assert publish(cache, version, data) == {}
    with pytest.raises(CacheDirUnusable, match=r"train\.hdf is not a file of swarmcache"):
        cache.lookup(version, ME)
    assert path.lstat() == before

    path.unlink()
    assert cache.lookup(version, ME) == str(path)


def test_a_users_own_file_that_has_replaced_the_link_survives_the_drop(cache: CacheDir) -> None:
    version, data = a_file(9000)
    path = Path(publish(cache, version, data)[ME.uid])
    path.unlink()
    path.write_text("mine")
    cache.drop(version.version_id)
    assert path.read_text() == "mine"
    assert cache.status().file_count == 0


@needs_root
def test_a_directory_of_another_user_with_the_same_name_is_not_opened(cache: CacheDir) -> None:
    version, data = a_file(9000)
    publish(cache, version, data, User(6001, "bob"))
    with pytest.raises(CacheDirUnusable, match="uid 6002"):
        cache.lookup(version, User(6002, "bob"))
    with pytest.raises(CacheDirUnusable, match="opened to another user"):
        cache.lookup(version, User(ME.uid, "bob"))


@needs_root
def test_a_directory_left_half_made_by_a_kill_is_finished(cache: CacheDir, root: Path) -> None:
    (root / "bob" / "nfs").mkdir(parents=True, mode=0o700)
    (root / "bob").chmod(0o700)
    version, data = a_file(9000)
    assert publish(cache, version, data, User(6001, "bob")) == {}  # not empty: whose is it?
    (root / "bob" / "nfs").rmdir()
    path = cache.lookup(version, User(6001, "bob"))
    assert path is not None
    assert run_as(6001, "cat", path).stdout == data


@needs_root
def test_a_closed_cache_directory_is_named_as_the_reason(cache: CacheDir, root: Path) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    root.chmod(0o700)
    with pytest.raises(CacheDirUnusable, match=r"chmod o\+x"):
        cache.lookup(version, User(6001, "bob"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".swarmcache", "a\0b"])
def test_a_user_name_that_is_no_directory_name_is_refused(cache: CacheDir, name: str) -> None:
    with pytest.raises(CacheDirUnusable):
        cache.user_path(a_file(1)[0], User(ME.uid, name))


@pytest.mark.parametrize(
    "path", [b"x", b"/a/../b", b"/a//b", b"/", b"/a\0b", b"/a/" + b"b/" * 2100]
)
def test_a_path_that_cannot_be_below_the_cache_is_refused(cache: CacheDir, path: bytes) -> None:
    with pytest.raises(CacheDirUnusable):
        cache.user_path(FileVersion(path, 1, 1), ME)


# --- space ----------------------------------------------------------------------------------------


def test_the_limits_hold_for_concurrent_reservations(root: Path) -> None:
    size_bytes = 100 * 4096
    each_bytes = size_bytes + 4096 + OVERHEAD_BYTES  # the journal
    limit_bytes = 10 * each_bytes + UNCOUNTED_MAX_BYTES
    cache = open_cache(root, max_usage=lambda _: limit_bytes)
    versions = [FileVersion(b"/nfs/%d" % i, size_bytes, i) for i in range(40)]

    def begin(version: FileVersion) -> Partial | None:
        try:
            return cache.begin(version, 2 * 4096)
        except NoSpace as error:
            assert "cache.max_usage" in str(error)
            return None

    with ThreadPoolExecutor(8) as threads:
        begun = [partial for partial in threads.map(begin, versions) if partial]

    assert len(begun) == 10
    assert len(left_in_partial(root)) == 20
    blocks = [os.fstat(partial.file.fd).st_blocks * 512 for partial in begun]
    assert min(blocks) >= size_bytes  # set aside by the disk, not only in our account
    begun[0].discard()
    cache.begin(versions[39], 2 * 4096).discard()
    for partial in begun[1:]:
        partial.close()
    assert cache.status().used_bytes == 9 * (size_bytes + 4096)
    cache.close()

    cache = open_cache(root)  # the space stays accounted
    assert cache.status().used_bytes >= 9 * size_bytes
    cache.close()


def test_min_free_is_kept(root: Path) -> None:
    disk = os.statvfs(root.parent)
    room_bytes = 1 << 30
    keep_bytes = disk.f_bavail * disk.f_frsize - UNCOUNTED_MAX_BYTES - room_bytes
    cache = open_cache(root, min_free=lambda capacity_bytes: keep_bytes)
    with pytest.raises(NoSpace, match=r"cache\.min_free"):
        cache.begin(FileVersion(b"/nfs/a", room_bytes * 2, 1), 1 << 20)
    assert left_in_partial(root) == []
    cache.begin(FileVersion(b"/nfs/a", room_bytes // 8, 1), 1 << 20).discard()
    cache.close()


def test_a_download_that_cannot_begin_leaves_only_what_was_there_before(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh, _), (resumed, data) = a_file(9000, b"/nfs/fresh"), a_file(9000, b"/nfs/resumed")
    partial = cache.begin(resumed, CHUNK_BYTES)
    write(partial, data, 1)
    partial.close()
    used_bytes = cache.status().used_bytes

    def broken(fd: int, size_bytes: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "ftruncate", broken)
    for version in (fresh, resumed):
        with pytest.raises(NoSpace):
            cache.begin(version, CHUNK_BYTES)
    monkeypatch.undo()

    name = resumed.version_id.hex()
    assert left_in_partial(root) == [name, name + ".chunks"]
    assert cache.status().used_bytes == used_bytes
    assert [chunk for chunk, _ in cache.begin(resumed, CHUNK_BYTES).recover()] == [1]


def test_publishing_and_dropping_keep_the_account_right(cache: CacheDir) -> None:
    files = [a_file(5000 * i, b"/nfs/%d" % i, i) for i in range(1, 5)]
    for version, data in files:
        publish(cache, version, data)
    expected = sum(-(-len(data) // 4096) * 4096 + 4096 for _, data in files)
    assert (cache.status().file_count, cache.status().used_bytes) == (4, expected)
    for version, _ in files:
        cache.drop(version.version_id)
    assert (cache.status().file_count, cache.status().used_bytes) == (0, 0)


def test_a_full_disk_in_the_middle_of_a_chunk_is_an_answer(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    partial = cache.begin(version, CHUNK_BYTES)
    write(partial, data, 0)
    real_pwrite = os.pwrite
    room = [CHUNK_BYTES + 10]  # the chunk, and a part of its record in the journal

    def full_disk(fd: int, piece: memoryview, offset_bytes: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real_pwrite(fd, piece[: room[0]], offset_bytes)
        room[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(NoSpace):
        write(partial, data, 1)
    assert not partial.has(1)
    monkeypatch.undo()

    write(partial, data, 2)
    partial.close()
    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [0, 2]
    partial.discard()


@pytest.mark.parametrize("call", ["rename", "link", "mkdir", "utime", "fchmod"])
def test_a_publication_that_fails_leaves_nothing_behind(
    cache: CacheDir, root: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(9000)
    partial = fill(cache.begin(version, CHUNK_BYTES), data)

    def broken(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, broken)
    if call == "link":  # only the user's path is missing
        assert partial.publish([ME]) == {}
        monkeypatch.undo()
        assert cache.lookup(version, ME) is not None
        return
    with pytest.raises(NoSpace):
        partial.publish([ME])
    partial.discard()
    monkeypatch.undo()
    assert cache.lookup(version, ME) is None
    assert left_in_partial(root) == []
    assert not object_of(root, version).exists()
    assert cache.status().used_bytes == 0
    publish(cache, version, data)
    assert cache.lookup(version, ME) is not None


IN_A_MOUNT = """
    set -e
    truncate -s 48M "$1/image"
    mkfs.ext3 -q -m 0 "$1/image"
    mkdir "$1/disk"
    mount -o loop "$1/image" "$1/disk"
    "$2" -c "$3" "$4" "$1/disk/cache"
    umount "$1/disk"
"""


@pytest.mark.box
@pytest.mark.slow
def test_a_disk_that_cannot_set_space_aside_is_accounted_for(root: Path) -> None:
    """ext3 has no fallocate: 48 MiB, three files of 20 MiB, one of which does not fit."""
    script = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from tests.disk_helpers import *
        cache = open_cache(Path(sys.argv[2]))
        size = 20 << 20 if cache.status().free_bytes > 49 << 20 else 14 << 20
        files = [a_file(size, b"/nfs/%d" % i, i) for i in range(3)]
        first = cache.begin(files[0][0], 1 << 20)
        assert os.fstat(first.file.fd).st_blocks == 0
        second = cache.begin(files[1][0], 1 << 20)
        for attempt in range(2):  # before and after the space is taken
            try:
                cache.begin(files[2][0], 1 << 20)
            except NoSpace as error:
                assert "min_free" in str(error)
            else:
                raise AssertionError("overbooked")
            if attempt == 0:
                fill(first, files[0][1]).publish([ME])
        path = fill(second, files[1][1]).publish([ME])[ME.uid]
        assert Path(path).read_bytes() == files[1][1]
        cache.drop(files[0][0].version_id)
        cache.begin(files[2][0], 1 << 20).discard()
        cache.close()
    """
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            textwrap.dedent(IN_A_MOUNT),
            "sh",
            str(root.parent),
            sys.executable,
            textwrap.dedent(script),
            str(REPOSITORY),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.box
@pytest.mark.slow
def test_without_acls_only_the_daemons_own_user_is_served(root: Path) -> None:
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from tests.disk_helpers import *
        from swarmcache.user_tree import UserTree, open_cache_root
        path, fd = open_cache_root(sys.argv[2])
        tree = UserTree(path, fd)
        os.close(os.open("object", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        tree.link(ME, b"/nfs/a", ("object", fd), ("scratch", fd), set())
        try:
            tree.link(User(6001, "bob"), b"/nfs/a", ("object", fd), ("scratch", fd), set())
        except CacheDirUnusable as error:
            assert "has no POSIX ACLs" in str(error)
        else:
            raise AssertionError("opened to nobody")
        assert sorted(os.listdir(fd)) == ["me", "object"]
    """
    mount = 'mount -t ramfs ramfs "$1" && chmod 755 "$1" && exec "$2" -c "$3" "$4" "$1/cache"'
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            mount,
            "sh",
            str(root.parent),
            sys.executable,
            textwrap.dedent(script),
            str(REPOSITORY),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- opening --------------------------------------------------------------------------------------


def test_a_cache_directory_with_a_symlink_in_its_place_is_refused(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    root.symlink_to(root.parent / "elsewhere")
    with pytest.raises(CacheDirUnusable, match="symbolic link"):
        open_cache(root)
    assert os.listdir(root.parent / "elsewhere") == []


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_cache_directory_that_others_may_write_is_refused(root: Path, mode: int) -> None:
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(DirectoryUnusable, match="chmod"):
        open_cache(root)
    root.chmod(0o700)
    open_cache(root).close()


@needs_root
def test_a_cache_directory_that_somebody_else_prepared_is_refused(root: Path) -> None:
    root.mkdir()
    os.chown(root, 6001, 6001)
    with pytest.raises(DirectoryUnusable, match="belongs to uid 6001, not to uid 0"):
        open_cache(root)
    os.chown(root, 0, 0)
    (root / ".swarmcache").mkdir(mode=0o700)
    os.chown(root / ".swarmcache", 6001, 6001)
    with pytest.raises(DirectoryUnusable, match="belongs to uid 6001, not to uid 0"):
        open_cache(root)
    os.chown(root.parent, 6001, 6001)
    with pytest.raises(DirectoryUnusable, match="who could exchange"):
        open_cache(root)


def test_a_cache_directory_below_one_that_anybody_may_write_is_refused(root: Path) -> None:
    root.parent.chmod(0o777)
    with pytest.raises(DirectoryUnusable, match="anybody may write"):
        open_cache(root)
    root.parent.chmod(0o1777)
    open_cache(root).close()


@pytest.mark.parametrize("name", [".swarmcache", ".swarmcache/objects"])
def test_a_symlink_inside_the_cache_directory_is_refused(root: Path, name: str) -> None:
    open_cache(root).close()
    shutil.move(root / name, root.parent / "moved")
    (root / name).symlink_to(root.parent / "moved")
    with pytest.raises(CacheDirUnusable, match="is no directory"):
        open_cache(root)


def test_only_one_daemon_at_a_time_can_use_a_cache_directory(root: Path) -> None:
    cache = open_cache(root)
    with pytest.raises(CacheDirUnusable, match="another daemon"):
        open_cache(root)
    cache.close()
    open_cache(root).close()


# --- formats --------------------------------------------------------------------------------------

digests = st.binary(min_size=32, max_size=32)
versions = st.builds(
    FileVersion,
    st.binary(min_size=1, max_size=60),
    st.integers(0, 20),
    st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(codec="utf-8"), max_size=8),
)


@settings(max_examples=50)
@given(
    versions,
    st.lists(st.tuples(st.integers(0, 30), digests), max_size=8),
    st.integers(0, 36),
    st.data(),
)
def test_a_journal_gives_back_whole_records_of_chunks_that_the_file_has(
    version: FileVersion, records: list[tuple[int, bytes]], torn: int, data: st.DataObject
) -> None:
    layout = ChunkLayout(version.size_bytes, 2)
    header = encode_header(JOURNAL_MAGIC, version, layout)
    journal = header + b"".join(encode_record(*record) for record in records)
    kept = records[:-1] if torn and records else records
    cut = journal[: max(len(header), len(journal) - torn)]

    decoded = decode_journal(cut, version, layout)

    assert decoded is not None
    claims, end = decoded
    assert end == len(header) + 36 * len(kept)
    expected: dict[int, set[bytes]] = {}
    for chunk, digest in kept:
        if chunk < layout.chunk_count:
            expected.setdefault(chunk, set()).add(digest)
    assert claims == expected
    at = data.draw(st.integers(0, len(header) - 1))
    broken = cut[:at] + bytes([cut[at] ^ 1]) + cut[at + 1 :]
    assert decode_journal(broken, version, layout) is None
    assert decode_journal(cut, version, ChunkLayout(version.size_bytes, 4)) is None


@given(versions, st.data())
def test_a_manifest_comes_back_whole_or_not_at_all(
    version: FileVersion, data: st.DataObject
) -> None:
    layout = ChunkLayout(version.size_bytes, 2)
    count = layout.chunk_count
    listed = data.draw(st.lists(digests, min_size=count, max_size=count))
    manifest = Manifest(layout, tuple(listed))
    encoded = encode_manifest(version, manifest)
    assert decode_manifest(encoded) == (version, manifest)
    at = data.draw(st.integers(0, len(encoded) - 1))
    assert decode_manifest(encoded[:at]) is None
    assert decode_manifest(encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]) is None


def test_a_copy_that_could_not_be_dropped_and_is_wanted_again_stays(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data)

    def failing(*name: object, **directory: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, pytest.raises(LocalError):
        patch.setattr(os, "unlink", failing)
        cache.drop(version.version_id)
    partial = cache.begin(version, CHUNK_BYTES)
    assert not partial.resumable, "why it was to go is not known here"
    path = fill(partial, data).publish([ME])[ME.uid]

    cache.flush()

    assert cache.lookup(version, ME) == path
    assert Path(path).read_bytes() == data


def test_what_is_just_being_evicted_was_touched_by_nobody(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    publish(cache, version, data)
    version_id = version.version_id
    delete_all = CacheIndex.delete_all
    answers: list[object] = []

    def asked_meanwhile(index: CacheIndex, replicas: Sequence[Replica]) -> None:
        """The files are gone, and the rows are not."""
        answers.extend([cache.open_source(version_id), cache.renew(version_id)])
        answers.append(cache.verify(version_id))
        delete_all(index, replicas)

    monkeypatch.setattr(CacheIndex, "delete_all", asked_meanwhile)
    [forgotten] = cache.listing.forget(lambda path: True, 0.0)

    assert (forgotten.dropped, answers) == (1, [None, False, None])
    assert cache.take_damaged() == {}
    assert "touched" not in caplog.text


def test_nobody_waits_while_the_disk_gives_back_the_room_of_a_big_file(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it does with the last use of the file: for 0.1 s per GiB that is in memory (ext4)."""
    big, other = a_file(3 * CHUNK_BYTES, b"/nfs/big"), a_file(CHUNK_BYTES, b"/nfs/other")
    for file in (big, other):
        publish(cache, *file)
    inode = os.stat(object_of(root, big[0])).st_ino
    close, paths = os.close, []

    def close_slowly(fd: int) -> None:
        status = os.fstat(fd)
        if (status.st_ino, status.st_nlink) == (inode, 0):
            with ThreadPoolExecutor(1) as meanwhile:
                looked_up = meanwhile.submit(cache.lookup, other[0], User(ME.uid, "new"))
                paths.append(looked_up.result(timeout=20))
        close(fd)

    monkeypatch.setattr(os, "close", close_slowly)
    assert cache.remove(big[0].version_id) is Removal.GONE

    assert paths == [cache.user_path(other[0], User(ME.uid, "new"))]


def test_a_copy_that_can_never_be_removed_keeps_nothing_else_from_being_noted(
    cache: CacheDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays, goes, used = (a_file(CHUNK_BYTES, b"/nfs/%d" % number, number) for number in range(3))
    for file in (stays, goes, used):
        publish(cache, *file)
    unlink, failing = os.unlink, [stays, goes]

    def unlink_others(name: str, **directory: int) -> None:
        if any(version.version_id.hex() in os.fsdecode(name) for version, _ in failing):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))  # somebody made it immutable
        unlink(name, **directory)

    monkeypatch.setattr(os, "unlink", unlink_others)
    for version, _ in failing:
        with pytest.raises(LocalError):
            cache.drop(version.version_id)
    failing.remove(goes)
    change_index(root, "UPDATE replica SET last_used_s = 1")
    cache.lookup(used[0], ME)

    with pytest.raises(LocalError, match="remove"):
        cache.flush()
    failing.clear()

    assert not object_of(root, goes[0]).exists()
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))
    replica = index.find(used[0].version_id)
    index.close()
    assert replica is not None and replica.last_used_s > 1


def test_a_file_given_up_while_the_disk_is_found_to_be_full_fails_as_any_other(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(CHUNK_BYTES)
    partial = cache.begin(version, CHUNK_BYTES)

    def full(fd: int, data: bytes, offset: int) -> int:
        partial.discard()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LocalError):
        write(partial, data, 0)
