"""The cache of a node as a whole: what holds whichever directory a file lies in."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarmcache.cache_dir import CacheDir
from swarmcache.cache_index import CacheIndex
from swarmcache.chunks import FileVersion
from swarmcache.disk import Cache, Partial
from swarmcache.disk_calls import reserve
from swarmcache.errors import CacheDirUnusable, DirectoryUnusable, DiskFailed, LocalError, NoSpace
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    a_file,
    fill,
    left_in_partial,
    open_cache,
    write,
)

MIB = 1 << 20


def limited(root: Path, name: str, room_bytes: int = 64 * MIB) -> CacheDir:
    """A cache directory with room of its own, as if it were on a disk of its own."""
    return open_cache(root / name, max_usage=lambda _: room_bytes + UNCOUNTED_MAX_BYTES)


@pytest.fixture
def two(root: Path) -> Iterator[Cache]:
    """``a`` with room for 64 MiB, ``b`` with a bit less."""
    cache = Cache([limited(root, "a"), limited(root, "b", 63 * MIB)])
    yield cache
    cache.close()


def put(cache: Cache, path: bytes, size_bytes: int = 5000, seed: int = 1) -> str:
    """Cache a file; the name of the cache directory that it went to."""
    version, data = a_file(size_bytes, path, seed)
    fill(cache.begin(version, CHUNK_BYTES), data).publish([ME])
    return place(cache, version)


def place(cache: Cache, version: FileVersion) -> str:
    found = cache.lookup(version, ME)
    assert found is not None
    return found.removesuffix("/me" + os.fsdecode(version.path)).rpartition("/")[2]


def lost_directories(cache: Cache) -> list[str]:
    return [os.path.basename(each.path) for each in cache.directories() if each.lost]


def test_what_is_put_into_the_cache_is_there_after_a_restart(root: Path) -> None:
    version, data = a_file(5000)
    first = Cache([open_cache(root)])
    path = fill(first.begin(version, CHUNK_BYTES), data).publish([ME])[ME.uid]
    first.close()

    second = Cache([open_cache(root)])

    assert second.lookup(version, ME) == path == second.user_path(version, ME)
    assert list(second.replicas()) == [version.version_id]
    assert second.status().file_count == 1
    second.close()


# --- where new files go ---------------------------------------------------------------------------


def test_a_new_file_goes_where_most_room_is_left(two: Cache) -> None:
    assert put(two, b"/nfs/1/f", 3 * MIB) == "a"
    assert put(two, b"/nfs/2/f", 1 * MIB) == "b"
    assert put(two, b"/nfs/3/f", 4 * MIB) == "b"
    assert put(two, b"/nfs/4/f") == "a"


def test_files_of_one_source_directory_stay_together_while_they_fit(root: Path) -> None:
    cache = Cache([limited(root, "a", 4 * MIB), limited(root, "b", 3 * MIB)])
    assert put(cache, b"/nfs/one/0", 2 * MIB) == "a"
    assert put(cache, b"/nfs/one/1") == "a"  # although more room is in the other
    assert put(cache, b"/nfs/one/too long", 2 * MIB) == "b"
    assert put(cache, b"/nfs/one/2") == "a"
    cache.close()

    # The disk that has more of them, although the other has some as well, and more room.
    cache = Cache([limited(root, "a", 3 * MIB), limited(root, "b", 4 * MIB)])
    assert put(cache, b"/nfs/one/3") == "a"
    cache.close()


def test_files_of_one_directory_that_are_begun_at_once_go_to_one_disk(two: Cache) -> None:
    versions = [a_file(2 * MIB, b"/nfs/one/%d" % i, i)[0] for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        partials = list(threads.map(lambda version: two.begin(version, MIB), versions))

    assert [each.disk.used_bytes > 0 for each in two.directories()] == [True, False]
    for partial in partials:
        partial.discard()


def test_the_files_of_a_directory_that_is_wanted_as_a_whole_go_to_one_disk(root: Path) -> None:
    cache = Cache([limited(root, "a", 8 * MIB), limited(root, "b", 8 * MIB - 1)])
    for path in (b"/nfs/tree/1/f", b"/nfs/tree/2/f", b"/nfs/tree/2/3/f", b"/nfs/target/of a link"):
        cache.keep_together(b"/nfs/tree", path)
        assert put(cache, path, MIB) == "a"
    assert put(cache, b"/nfs/treetop/f", MIB) == "b"
    assert put(cache, b"/nfs/tree/4/f") == "b"  # not asked for as one of the tree
    cache.close()

    cache = Cache([limited(root, "a", 5 * MIB), limited(root, "b", 8 * MIB)])
    cache.keep_together(b"/nfs/tree", b"/nfs/tree/5/f")
    assert put(cache, b"/nfs/tree/5/f") == "a"  # where most of it is, not where most room is
    cache.close()


def test_a_file_of_which_a_disk_has_something_goes_on_there(root: Path) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    cache = Cache([limited(root, "a", MIB), limited(root, "b", 2 * MIB)])
    partial = cache.begin(version, CHUNK_BYTES)
    write(partial, data, 1)
    cache.close()

    cache = Cache([limited(root, "a", 3 * MIB), limited(root, "b", 2 * MIB)])
    partial = cache.begin(version, CHUNK_BYTES)
    assert [chunk for chunk, _ in partial.recover()] == [1]
    fill(partial, data).publish([ME])
    assert place(cache, version) == "b"
    assert left_in_partial(root / "a") == left_in_partial(root / "b") == []
    cache.close()


def test_the_limits_hold_for_each_disk_by_itself(root: Path) -> None:
    cache = Cache([limited(root, "a", 3 * MIB), limited(root, "b", 3 * MIB)])
    assert put(cache, b"/nfs/1/f", 2 * MIB) != put(cache, b"/nfs/2/f", 2 * MIB)
    with pytest.raises(NoSpace, match=r"cache\.max_usage"):
        cache.begin(a_file(2 * MIB, b"/nfs/3/f")[0], MIB)  # 2 MiB are left, but not together
    put(cache, b"/nfs/4/f", MIB // 2)
    assert cache.status().file_count == 3
    assert cache.status().used_bytes == sum(d.disk.used_bytes for d in cache.directories())
    cache.close()


def test_what_is_asked_of_the_cache_is_answered_by_the_disk_that_has_the_file(two: Cache) -> None:
    put(two, b"/nfs/0/f", 3 * MIB)
    version, data = a_file(9000)
    path = fill(two.begin(version, CHUNK_BYTES), data).publish([ME])[ME.uid]
    assert place(two, version) == "b"

    assert two.user_path(version, ME) == path
    assert len(list(two.replicas())) == 2
    manifest = two.manifest(version.version_id)
    source = two.open_source(version.version_id)
    assert manifest is not None
    assert source is not None
    assert manifest.layout.size_bytes == 9000
    assert os.pread(source.fd, 9000, 0) == data
    source.close()
    two.make_durable([version.version_id])
    two.drop(version.version_id)
    assert two.lookup(version, ME) is None
    assert two.open_source(version.version_id) is None
    assert two.manifest(version.version_id) is None
    assert two.status().file_count == 1


# --- losing a disk --------------------------------------------------------------------------------


def unmount(directory: Path) -> None:
    """To who has it open, a directory that was renamed is as one whose disk was unmounted."""
    directory.rename(directory.with_name("unmounted"))


def mount_another(directory: Path) -> None:
    unmount(directory)
    directory.mkdir()


def remove_everything(directory: Path) -> None:
    shutil.rmtree(directory / ".swarmcache")


LOSSES = [unmount, mount_another, remove_everything]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_disk_takes_only_its_own_files_away(
    two: Cache,
    root: Path,
    lose: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[list[Partial]] = []
    two.on_lost = lambda reason, partials: told.append(partials)
    on_a, on_b = a_file(3 * MIB, b"/nfs/0/f"), a_file(9000, b"/nfs/1/f")
    for version, data in (on_a, on_b):
        fill(two.begin(version, CHUNK_BYTES), data).publish([ME])
    assert [place(two, version) for version, _ in (on_a, on_b)] == ["a", "b"]
    partial = two.begin(a_file(9000, b"/nfs/0/g")[0], CHUNK_BYTES)
    lose(root / "a")

    two.look_after()

    assert lost_directories(two) == ["a"]
    assert told == [[partial]]
    assert two.lookup(on_a[0], ME) is None
    assert place(two, on_b[0]) == "b"
    assert list(two.replicas()) == [on_b[0].version_id]
    with pytest.raises(LocalError):
        write(partial, a_file(9000)[1], 0)
    assert put(two, b"/nfs/0/g", 9000) == "b"  # also what was being fetched for the other
    two.look_after()
    [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "lost the cache directory" in record.message
    assert "Restart the daemon" in record.message
    assert not (root / "a" / ".swarmcache").exists()
    assert not (root / "a" / "me" / "nfs" / "0" / "g").exists()


def test_an_index_that_has_vanished_tells_of_a_lost_disk(root: Path) -> None:
    index = CacheIndex(str(root.parent / "index.sqlite"))
    for name in list(root.parent.iterdir()):
        name.rename(name.with_name("unmounted " + name.name))
    for call in (index.sync, index.shorten_log):
        with pytest.raises(DiskFailed, match="is no longer there"):
            call()
    index.close()


@pytest.mark.parametrize("lose", LOSSES)
def test_a_lost_disk_is_noticed_by_the_next_miss(
    two: Cache, root: Path, lose: Callable[[Path], None]
) -> None:
    assert put(two, b"/nfs/0/f", 9000) == "a"
    version, data = a_file(9000, b"/nfs/0/f")
    lose(root / "a")

    found = two.lookup(version, ME)
    assert found is None or Path(found).read_bytes() == data
    assert put(two, b"/nfs/0/g") == "b"
    assert lost_directories(two) == ["a"]


def test_a_file_that_is_complete_when_the_disk_goes_is_not_put_in_place_there(
    two: Cache, root: Path
) -> None:
    version, data = a_file(9000)
    partial = fill(two.begin(version, CHUNK_BYTES), data)
    unmount(root / "a")

    def publish_meanwhile(reason: str, partials: list[Partial]) -> None:
        with pytest.raises(DiskFailed, match="is lost"):
            partial.publish([ME])

    two.on_lost = publish_meanwhile
    two.look_after()
    assert lost_directories(two) == ["a"]
    with pytest.raises(LocalError, match="no longer open"):
        partial.publish([ME])
    partial.discard()
    assert two.lookup(version, ME) is None


def test_without_any_disk_left_every_request_has_the_reason(two: Cache, root: Path) -> None:
    put(two, b"/nfs/0/f")
    for name in ("a", "b"):
        unmount(root / name)
        (root / "unmounted").rename(root / f"{name} unmounted")

    with pytest.raises(DiskFailed, match=r"no cache directory is left: .*/a.*/b is no longer"):
        two.begin(a_file(9000)[0], CHUNK_BYTES)

    assert two.lookup(a_file(5000, b"/nfs/0/f")[0], ME) is None
    assert two.status().capacity_bytes == 0
    assert list(two.replicas()) == []
    with pytest.raises(DiskFailed):
        two.user_path(a_file(9000)[0], ME)
    two.look_after()
    assert len(lost_directories(two)) == 2


def test_an_error_of_one_file_does_not_lose_the_disk(
    two: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [True] * 4  # both disks, without an eviction and with one

    def bad_sector(fd: int, size_bytes: int, **more: bool) -> bool:
        if bad and bad.pop():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return reserve(fd, size_bytes, **more)

    monkeypatch.setattr("swarmcache.partial_store.reserve", bad_sector)
    with pytest.raises(DiskFailed):
        two.begin(a_file(9000)[0], CHUNK_BYTES)
    assert bad == []
    bad.append(True)
    assert put(two, b"/nfs/0/f") == "b"
    assert put(two, b"/nfs/1/f") == "a"

    assert lost_directories(two) == []


def test_a_file_goes_to_the_next_disk_where_the_first_one_fails(
    two: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_once(directory: CacheDir) -> None:
        calls.append(directory.path)
        if len(calls) <= 2:  # when it is asked for room, and when it is asked what is wrong
            raise DiskFailed("the device does not answer")

    monkeypatch.setattr(CacheDir, "check_alive", fail_once)
    assert put(two, b"/nfs/0/f") == "b"
    assert calls[0] == calls[1] != calls[2]
    assert lost_directories(two) == ["a"]


# --- opening --------------------------------------------------------------------------------------


def open_all(*roots: Path) -> Cache:
    return Cache.open(roots, min_free=lambda capacity: 0, max_usage=lambda capacity: capacity)


def test_one_cache_directory_is_made_where_it_is_not_there(root: Path) -> None:
    open_all(root / "new").close()
    assert (root / "new" / ".swarmcache").is_dir()


def test_two_cache_directories_on_one_disk_are_refused(root: Path) -> None:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    with pytest.raises(CacheDirUnusable, match=r"/a and .*/b are on one disk"):
        open_all(root / "a", root / "b")
    assert os.listdir(root / "a") == []


def test_a_disk_that_is_not_mounted_is_left_out_and_not_taken_for_empty(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "a").mkdir(parents=True)
    cache = open_all(root / "a", root / "mount point" / "cache")

    assert not (root / "mount point").exists()
    assert lost_directories(cache) == ["cache"]
    assert put(cache, b"/nfs/0/f") == "a"
    [record] = caplog.records
    assert "is not there: is its disk mounted? If it is new, run: mkdir -m 711 '" in record.message
    cache.close()
    with pytest.raises(DiskFailed, match=r"b/cache is not there.*c/cache is not there"):
        open_all(root / "b" / "cache", root / "c" / "cache")


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory to be on another disk, which is memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as above:
        os.chmod(above, 0o755)
        yield Path(above) / "cache"


def test_two_disks_are_used_together(root: Path, elsewhere: Path) -> None:
    for directory in (root, elsewhere):
        directory.mkdir()
    cache = open_all(root, elsewhere)
    assert [each.path for each in cache.directories()] == [str(root), str(elsewhere)]
    assert put(cache, b"/nfs/0/f") == "cache"
    cache.close()


def test_the_place_where_a_disk_is_mounted_is_refused(root: Path) -> None:
    root.mkdir()
    with pytest.raises(CacheDirUnusable, match=r"name one below it in cache\.dir, such as /dev/s"):
        open_all(root, Path("/dev/shm"))


@pytest.mark.parametrize("mistake", ["owner", "mode", "link", "in use"])
def test_a_mistake_in_one_of_several_directories_is_not_passed_over(
    root: Path, elsewhere: Path, mistake: str
) -> None:
    root.mkdir()
    elsewhere.mkdir()
    if mistake == "owner":
        if os.geteuid() != 0:
            pytest.skip("giving a directory away needs root")
        os.chown(elsewhere, 6001, 6001)
    elif mistake == "mode":
        elsewhere.chmod(0o777)
    elif mistake == "link":
        elsewhere.rmdir()
        elsewhere.symlink_to("/dev/shm")
    user = open_cache(elsewhere) if mistake == "in use" else None
    with pytest.raises(DirectoryUnusable):
        open_all(root, elsewhere)
    if user is not None:
        user.close()
    open_all(root).close()  # the lock of the good one was let go of
