"""A cache index that is lost, damaged or old: every file is served again, nothing is fetched."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from swarmcache.cache_dir import CacheDir
from swarmcache.cache_index import LOG_SIZE_MAX_BYTES, SCHEMA_VERSION, CacheIndex
from swarmcache.errors import LocalError, NoSpace
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    User,
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
)


def index_of(root: Path) -> Path:
    return root / ".swarmcache" / "index.sqlite"


def list_objects(cache: CacheDir) -> None:
    for _ in cache.list_objects():
        pass


def damage_pages(index: Path) -> None:
    """Garbage in all pages but the first, so that only using them shows it."""
    data = bytearray(index.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    index.write_bytes(data)


def make_old(index: Path) -> None:
    change_index(index.parent.parent, f"PRAGMA user_version = {SCHEMA_VERSION - 1}")


def make_new(index: Path) -> None:
    change_index(index.parent.parent, "PRAGMA user_version = 99")


RUINS = [
    lambda index: index.write_bytes(b"garbage " * 1000),
    lambda index: os.truncate(index, 5000),
    lambda index: os.truncate(index, 0),
    lambda index: index.unlink(),
    damage_pages,
    make_old,
    make_new,
]


@pytest.mark.parametrize("ruin", RUINS)
def test_whatever_becomes_of_the_index_every_file_is_served_again(
    root: Path, ruin: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    other = User(ME.uid, "other")
    cache = open_cache(root)
    files = [a_file(5000 * i, b"/nfs/%d" % i, i) for i in range(4)]
    for version, data in files:
        publish(cache, version, data, ME, other)
    cache.close()
    before = {path: path.stat() for path in root.glob("*/nfs/*")}
    ruin(index_of(root))

    cache = open_cache(root)
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "made again from the files" in warnings[0]
    list_objects(cache)
    assert cache.status().file_count == 4
    assert all(cache.lookup(version, ME) is None for version, _ in files), "not digested yet"
    assert set(recovered(cache)) == {version.version_id for version, _ in files}

    for version, data in files:
        for user in (ME, other):
            path = cache.lookup(version, user)
            assert path is not None
            assert Path(path).read_bytes() == data
    assert {path: path.stat().st_ino for path in before} == {
        path: status.st_ino for path, status in before.items()
    }
    for version, _ in files:
        cache.drop(version.version_id)
    assert not list(root.glob("*/nfs")), "a link was forgotten"
    cache.close()
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert sorted(os.listdir(root / ".swarmcache")) == [
        "index.sqlite",
        "lock",
        "objects",
        "partial",
    ]


@pytest.mark.parametrize("listed", [False, True])
def test_a_file_in_doubt_is_there_as_soon_as_its_own_chunks_are_digested(
    root: Path, listed: bool
) -> None:
    other = User(ME.uid, "other")
    version, data = a_file(5 * CHUNK_BYTES)
    cache = open_cache(root)
    path = Path(publish(cache, version, data, other, ME)[ME.uid])
    inode = path.stat().st_ino
    cache.close()
    index_of(root).unlink()
    cache = open_cache(root)
    if listed:
        list_objects(cache)

    # Another chunk size than the one that is proposed now.
    partial = cache.begin(version, 2 * CHUNK_BYTES)
    assert len(dict(partial.recover())) == 5
    assert partial.complete
    assert cache.status().used_bytes == 6 * CHUNK_BYTES
    assert Path(partial.publish([ME])[ME.uid]) == path
    assert path.stat().st_ino == inode, "it was copied"
    assert cache.lookup(version, ME) == str(path)
    list_objects(cache)
    assert cache.status().used_bytes == 6 * CHUNK_BYTES

    # A link that the index does not know of goes with the copy all the same.
    assert os.stat(cache.user_path(version, other)).st_ino == inode
    cache.drop(version.version_id)
    assert not list(root.glob("*/nfs"))
    assert cache.status().used_bytes == 0
    cache.close()


def test_a_rotten_chunk_of_a_file_in_doubt_is_all_that_has_to_be_fetched(root: Path) -> None:
    version, data = a_file(5 * CHUNK_BYTES)
    cache = open_cache(root)
    path = Path(publish(cache, version, data)[ME.uid])
    cache.close()
    index_of(root).unlink()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(3 * CHUNK_BYTES)
        file.write(bytes(10))

    cache = open_cache(root)
    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [0, 1, 2, 4]
    assert not path.exists(), "wrong bytes in a user's directory"
    path = Path(fill(partial, data).publish([ME])[ME.uid])
    assert path.read_bytes() == data
    cache.close()


def test_halves_are_removed_and_what_is_not_ours_is_left_alone(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(root)
    files = [a_file(5000, b"/nfs/%d" % i, i) for i in range(5)]
    for version, data in files:
        publish(cache, version, data)
    cache.close()
    whole, no_manifest, no_object, cut_short, wrong_name = (object_of(root, v) for v, _ in files)
    index_of(root).unlink()
    no_manifest.with_name(no_manifest.name + ".manifest").unlink()
    no_object.unlink()
    cut_short.chmod(0o600)
    os.truncate(cut_short, 10)
    wrong_name.with_name(wrong_name.name + ".manifest").write_bytes(
        whole.with_name(whole.name + ".manifest").read_bytes()
    )
    others = {whole.parent / "notes", whole.parent / "notes.manifest"}
    for other in others:
        other.write_text("mine")

    cache = open_cache(root)
    list_objects(cache)
    assert set(recovered(cache)) == {files[0][0].version_id}
    left = {path for path in (root / ".swarmcache" / "objects").glob("*/*") if path.is_file()}
    assert left == {whole, whole.with_name(whole.name + ".manifest"), *others}
    assert len([r for r in caplog.records if "removed 4 " in r.message]) == 1
    cache.close()


def test_the_first_object_of_a_directory_may_come_while_that_is_compared(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory was not there yet, and the row is."""
    cache = open_cache(root)
    version, data = a_file(CHUNK_BYTES)
    rows_of = CacheIndex.listed

    def listed(index: CacheIndex, first_byte: int) -> set[bytes]:
        if first_byte == version.version_id[0]:
            publish(cache, version, data)
        return rows_of(index, first_byte)

    monkeypatch.setattr(CacheIndex, "listed", listed)
    list_objects(cache)

    path = cache.lookup(version, ME)
    assert path is not None
    assert Path(path).read_bytes() == data
    cache.close()


def test_a_row_whose_files_are_gone_goes_too(root: Path) -> None:
    cache = open_cache(root)
    version, data = a_file(5000)
    path = Path(publish(cache, version, data)[ME.uid])
    shutil.rmtree(object_of(root, version).parent)
    list_objects(cache)
    assert cache.status().file_count == 0
    assert not path.exists()
    cache.close()


def test_rows_that_a_power_cut_took_away_come_back(root: Path) -> None:
    """The object was durable already; the last commits of the index were not."""
    cache = open_cache(root)
    version, data = a_file(5000)
    publish(cache, version, data)
    cache.close()
    change_index(root, "DELETE FROM replica")

    cache = open_cache(root)
    list_objects(cache)
    assert recovered(cache) == [version.version_id]
    cache.close()


def test_links_of_which_a_power_cut_took_the_rows_go_with_the_copy(root: Path) -> None:
    cache = open_cache(root)
    version, data = a_file(5000)
    path = Path(publish(cache, version, data, User(ME.uid, "other"), ME)[ME.uid])
    change_index(root, "DELETE FROM link")

    cache.drop(version.version_id)
    assert not path.exists()
    assert not list(root.glob("*/nfs"))
    cache.close()


def test_what_is_put_in_place_during_the_comparison_is_not_taken_for_a_half(root: Path) -> None:
    cache = open_cache(root)
    version, data = a_file(5000)
    publish(cache, version, data)
    change_index(root, "DELETE FROM replica")
    where = object_of(root, version)
    where.rename(root / "away")
    slices = cache.list_objects()
    for _ in range(version.version_id[0] + 1):  # one per directory, as long as there are no files
        next(slices)
    (root / "away").rename(where)

    for _ in slices:
        pass
    assert where.exists()
    list_objects(cache)
    assert recovered(cache) == [version.version_id]
    cache.close()


@pytest.mark.slow
def test_a_kill_while_a_file_is_taken_back_loses_nothing(root: Path) -> None:
    version, data = a_file(5 * CHUNK_BYTES)
    for call in ("rename", "unlink"):
        script = f"""
            version, data = a_file(5 * CHUNK_BYTES)
            publish(cache, version, data, ME)
            cache.make_durable(version.version_id)
            os.{call} = lambda *names, **directories: die()
            cache.begin(version, CHUNK_BYTES)
        """
        killed(root, script)
        cache = open_cache(root)
        list_objects(cache)
        recovered(cache)
        if cache.lookup(version, ME) is None:
            partial = cache.begin(version, CHUNK_BYTES)
            assert len(dict(partial.recover())) == 5
            partial.publish([ME])
        path = cache.lookup(version, ME)
        assert path is not None
        assert Path(path).read_bytes() == data
        cache.drop(version.version_id)
        assert cache.status().used_bytes == 0
        assert left_in_partial(root) == []
        cache.close()


def test_until_everything_is_listed_all_that_the_disk_has_in_use_counts_as_ours(
    root: Path,
) -> None:
    cache = open_cache(root)
    publish(cache, *a_file(5000))
    cache.close()
    index_of(root).unlink()
    cache = open_cache(root, max_usage=lambda _: UNCOUNTED_MAX_BYTES + (1 << 20))
    with pytest.raises(NoSpace, match="max_usage"):
        cache.begin(a_file(5000, b"/nfs/new")[0], CHUNK_BYTES)
    list_objects(cache)
    cache.begin(a_file(5000, b"/nfs/new")[0], CHUNK_BYTES).discard()
    cache.close()


def test_last_use_is_taken_from_the_file_and_digesting_is_no_use(root: Path) -> None:
    version, data = a_file(5000)
    cache = open_cache(root)
    publish(cache, version, data)
    cache.close()
    index_of(root).unlink()
    os.utime(object_of(root, version), ns=(10**18, version.mtime_ns))

    cache = open_cache(root)
    list_objects(cache)
    recovered(cache)
    cache.close()
    connection = sqlite3.connect(index_of(root))
    assert connection.execute("SELECT last_used_s FROM replica").fetchall() == [(1e9,)]
    connection.close()
    assert object_of(root, version).stat().st_atime_ns == 10**18


@pytest.mark.slow
def test_the_log_of_the_index_stays_short_however_much_is_written_and_read(root: Path) -> None:
    version, data = a_file(5000)
    cache = open_cache(root)
    publish(cache, version, data)
    cache.close()
    index = CacheIndex(str(index_of(root)))

    def write() -> None:
        for number in range(5000):  # some 60 MiB of log
            index.touch({version.version_id: float(number)})

    writer = threading.Thread(target=write)
    writer.start()
    log = index_of(root).with_name("index.sqlite-wal")
    longest_bytes = 0
    while writer.is_alive():
        index.totals()
        index.shorten_log()
        longest_bytes = max(longest_bytes, log.stat().st_size)
    writer.join()
    index.close()

    assert longest_bytes < 3 * LOG_SIZE_MAX_BYTES


@needs_root
def test_the_links_of_all_users_are_found_again(root: Path) -> None:
    bob, eve = User(6001, "bob"), User(6002, "eve")
    version, data = a_file(5000)
    cache = open_cache(root)
    publish(cache, version, data, bob, eve)
    cache.close()
    index_of(root).unlink()
    cache = open_cache(root)
    list_objects(cache)
    assert recovered(cache) == [version.version_id]
    index = CacheIndex(str(index_of(root)))
    assert set(index.links(version.version_id)) == {bob, eve}
    index.close()
    path = cache.lookup(version, bob)
    assert path is not None
    assert run_as(bob.uid, "cat", path).stdout == data

    cache.drop(version.version_id)
    assert [os.listdir(root / name) for name in ("bob", "eve")] == [[], []]
    cache.close()


@pytest.mark.slow
def test_damage_found_later_is_an_answer_and_mended_by_a_restart(root: Path) -> None:
    cache = open_cache(root)
    for i in range(300):  # so many that the look-up has pages to read
        publish(cache, *a_file(0, b"/nfs/%d" % i, i))
    cache.close()
    index = index_of(root)
    connection = sqlite3.connect(index)
    [(page,)] = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_replica_1'"
    )
    connection.close()
    with index.open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xa5" * 4096)

    cache = open_cache(root)
    with pytest.raises(LocalError, match="a restart makes it again"):
        cache.lookup(a_file(0, b"/nfs/7", 7)[0], ME)
    cache.close()
    cache = open_cache(root)
    list_objects(cache)
    assert len(recovered(cache)) == 300
    assert cache.lookup(a_file(0, b"/nfs/7", 7)[0], ME) is not None
    cache.close()


def test_an_index_of_a_former_version_keeps_its_rows_and_loses_what_nobody_asks_for(
    root: Path,
) -> None:
    cache = open_cache(root)
    version, data = a_file(10)
    publish(cache, version, data)
    cache.close()
    change_index(root, "CREATE INDEX replica_by_trust ON replica (trust, version_id)")

    cache = open_cache(root)

    assert list(cache.replicas()) == [version.version_id]
    with closing(sqlite3.connect(index_of(root))) as connection:
        names = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'index'").fetchall()
    assert ("replica_by_trust",) not in names and ("replica_by_use",) in names
    cache.close()
