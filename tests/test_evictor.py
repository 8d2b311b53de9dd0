"""Making room in a cache directory: who goes, who stays for which reason, and in which order."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from swarmcache import disk_calls, partial_store
from swarmcache.cache_dir import CacheDir
from swarmcache.cache_index import PAGE_ROWS, CacheIndex, Trust
from swarmcache.chunks import FileVersion
from swarmcache.errors import NoSpace
from swarmcache.partial_store import OVERHEAD_BYTES, UNCOUNTED_MAX_BYTES
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    a_file,
    fill,
    left_in_partial,
    make_old,
    object_of,
    open_cache,
    publish,
)
from tests.loop_disks import loop_disk

SIZE_BYTES = 4 * CHUNK_BYTES
FILE_BYTES = SIZE_BYTES + 4096 + OVERHEAD_BYTES  # with its manifest
HOUR_S = 3600.0


def small_cache(root: Path, files: int, min_age_s: float = HOUR_S) -> CacheDir:
    """With room for so many files of ``SIZE_BYTES``."""
    limit_bytes = files * FILE_BYTES + UNCOUNTED_MAX_BYTES
    return open_cache(root, max_usage=lambda _: limit_bytes, min_age_s=min_age_s)


def numbered(number: int, size_bytes: int = SIZE_BYTES) -> tuple[FileVersion, bytes]:
    return a_file(size_bytes, b"/nfs/%d" % number, number)


@pytest.fixture
def three(root: Path) -> Iterator[tuple[CacheDir, list[FileVersion]]]:
    """A cache that is full of three files, all of them old, the first one oldest."""
    cache = small_cache(root, 3)
    versions = [numbered(number)[0] for number in range(3)]
    for number in range(3):
        publish(cache, *numbered(number))
    make_old(root, *versions)
    yield cache, versions
    cache.close()


def here(cache: CacheDir, versions: Sequence[FileVersion]) -> list[bool]:
    replicas = set(cache.replicas())
    return [version.version_id in replicas for version in versions]


def begin(cache: CacheDir, files: int = 1) -> None:
    """Ask for room for a file as big as so many of the others, and give it back."""
    size_bytes = SIZE_BYTES + (files - 1) * FILE_BYTES
    cache.begin(a_file(size_bytes, b"/nfs/new")[0], 1 << 20).discard()


def test_the_least_recently_used_file_makes_room_and_leaves_nothing(
    three: tuple[CacheDir, list[FileVersion]], root: Path
) -> None:
    cache, versions = three
    path = cache.user_path(versions[0], ME)

    publish(cache, *numbered(3))

    assert here(cache, versions) == [False, True, True]
    assert not os.path.lexists(path)
    assert not object_of(root, versions[0]).exists()
    assert not object_of(root, versions[0]).with_suffix(".manifest").exists()
    assert cache.lookup(versions[0], ME) is None
    assert cache.status().used_bytes == 3 * (SIZE_BYTES + 4096)


def test_what_other_nodes_have_as_well_goes_before_what_is_as_old(
    three: tuple[CacheDir, list[FileVersion]],
) -> None:
    cache, versions = three
    asked: list[set[bytes]] = []

    def ask(version_ids: Sequence[bytes]) -> dict[bytes, int]:
        asked.append(set(version_ids))
        return {versions[0].version_id: 0, versions[2].version_id: 5}

    cache.ask_before_evicting(ask)

    begin(cache)
    assert here(cache, versions) == [True, True, False]
    begin(cache, 2)
    assert here(cache, versions) == [False, True, False]
    assert asked == [{each.version_id for each in some} for some in (versions, versions[:2])]


def test_what_users_put_beside_a_copy_stays_when_it_is_evicted(
    three: tuple[CacheDir, list[FileVersion]],
) -> None:
    cache, versions = three
    place = Path(cache.user_path(versions[0], ME)).parent
    (place / "notes").write_text("mine")
    (place / "link").symlink_to("/etc")

    begin(cache, 3)

    assert here(cache, versions) == [False, False, False]
    assert sorted(os.listdir(place)) == ["link", "notes"]


def test_a_lookup_keeps_a_file(three: tuple[CacheDir, list[FileVersion]]) -> None:
    cache, versions = three
    assert cache.lookup(versions[0], ME)
    begin(cache)
    assert here(cache, versions) == [True, False, True]

    cache.flush()  # whether the index has heard of it makes no difference
    begin(cache, 2)
    assert here(cache, versions) == [True, False, False]


def test_a_file_that_a_job_has_read_keeps_its_place_by_that(
    three: tuple[CacheDir, list[FileVersion]], root: Path
) -> None:
    cache, versions = three
    for version, ago_s in ((versions[0], 2 * HOUR_S), (versions[1], HOUR_S / 2)):
        where = object_of(root, version)
        status = where.stat()
        os.utime(where, ns=(time.time_ns() - int(ago_s * 1e9), status.st_mtime_ns))

    begin(cache)
    assert here(cache, versions) == [True, True, False]
    begin(cache, 2)
    assert here(cache, versions) == [False, True, False]
    with pytest.raises(NoSpace, match=r"within cache\.min_age \(3600 s\)"):
        begin(cache, 3)
    assert here(cache, versions) == [False, True, False]


def test_the_order_is_right_across_pages_of_the_index(root: Path) -> None:
    """Files read since they were answered take their place, on whatever page that is."""
    count = PAGE_ROWS + 50
    cache = open_cache(root, min_age_s=HOUR_S)
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))
    now_s = time.time()
    version, data = a_file(10)
    publish(cache, version, data)
    row = index.find(version.version_id)
    assert row is not None
    cache.drop(version.version_id)
    for number in range(count):
        index.insert(
            dataclasses.replace(
                row,
                version_id=number.to_bytes(32, "big"),
                trust=Trust.DOUBTFUL,
                last_used_s=now_s - 10 * HOUR_S + number,
            )
        )
    read_s = {(0).to_bytes(32, "big"): now_s - 10 * HOUR_S + 3.5}
    read_s[(1).to_bytes(32, "big")] = now_s - 10 * HOUR_S + PAGE_ROWS + 7.5
    read_s[(2).to_bytes(32, "big")] = now_s
    cache.real_use_s = lambda version_id: read_s.get(version_id, 0.0)  # type: ignore[method-assign]
    told: list[bytes] = []

    def tell(version_ids: Sequence[bytes]) -> Future[None]:
        told.extend(version_ids)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    cache.tell_before_evicting(tell)
    with pytest.raises(NoSpace):
        cache._evictor.make_room(row.stored_bytes * count)
    assert told == []
    cache._evictor.make_room(row.stored_bytes * (count - 1))

    order = [int.from_bytes(version_id, "big") for version_id in told]
    expected = [3, 0, *range(4, PAGE_ROWS + 8), 1, *range(PAGE_ROWS + 8, count)]
    assert order == expected
    index.close()
    cache.close()


def test_what_is_pinned_held_open_or_served_stays_and_is_told_as_the_reason(root: Path) -> None:
    cache = small_cache(root, 5)
    versions = [numbered(number)[0] for number in range(5)]
    paths = [publish(cache, *numbered(number))[ME.uid] for number in range(5)]
    pinned, held, _, served, _ = versions
    cache.pin(pinned.version_id, ME.uid)
    cache.hold(held.version_id)
    cache.flush()
    make_old(root, *versions)
    source = cache.open_source(served.version_id)
    assert source is not None

    with Path(paths[2]).open("rb"), pytest.raises(NoSpace) as refused:
        begin(cache, 2)
    each_bytes = SIZE_BYTES + 4096
    kept = f"{each_bytes} bytes are pinned, {3 * each_bytes} bytes are in use"
    assert kept in str(refused.value)
    assert here(cache, versions) == [True] * 5

    make_old(root, *versions)
    with Path(paths[2]).open("rb"):
        begin(cache)
    assert here(cache, versions) == [True, True, True, True, False]

    source.close()
    cache.unpin(pinned.version_id, ME.uid)
    cache.release(held.version_id)
    make_old(root, *versions[:4])
    begin(cache, 5)
    assert here(cache, versions) == [False] * 5
    cache.close()


def test_nothing_is_evicted_in_vain(three: tuple[CacheDir, list[FileVersion]], root: Path) -> None:
    cache, versions = three
    with pytest.raises(NoSpace, match="nothing can be evicted"):
        begin(cache, 4)
    assert here(cache, versions) == [True] * 3
    assert left_in_partial(root) == []

    cache.hold(versions[2].version_id)
    with pytest.raises(NoSpace, match="bytes are in use"):
        begin(cache, 3)
    assert here(cache, versions) == [True] * 3


def test_the_tracker_is_told_before_the_files_go_and_nobody_gets_them_meanwhile(
    three: tuple[CacheDir, list[FileVersion]], root: Path
) -> None:
    cache, versions = three
    seen: list[tuple[int, list[bool], str | None, object]] = []

    def tell(version_ids: Sequence[bytes]) -> Future[None]:
        there = [object_of(root, version).exists() for version in versions]
        path = cache.lookup(versions[0], ME)
        source = cache.open_source(versions[0].version_id)
        seen.append((len(version_ids), there, path, source))
        told: Future[None] = Future()
        told.set_result(None)
        return told

    cache.tell_before_evicting(tell)
    begin(cache, 2)

    assert seen == [(2, [True, True, True], None, None)]
    assert here(cache, versions) == [False, False, True]


def test_a_victim_that_is_asked_for_after_the_choice_is_spared_and_another_one_goes(
    three: tuple[CacheDir, list[FileVersion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, versions = three
    real = cache._uses.leave
    with ExitStack() as stack:

        def leave(version_id: bytes, newest_s: float) -> bool:
            path = cache.lookup(versions[0], ME)  # between the choice and its turn
            assert path is not None
            monkeypatch.setattr(cache._uses, "leave", real)
            return real(version_id, newest_s)

        monkeypatch.setattr(cache._uses, "leave", leave)
        begin(cache)
        stack.pop_all()

    assert here(cache, versions) == [True, False, True]


def test_an_answer_that_was_given_just_now_counts_although_min_age_is_nothing(root: Path) -> None:
    cache = small_cache(root, 1, min_age_s=0.0)
    version, data = numbered(0)
    publish(cache, version, data)
    cache.hold(version.version_id)  # a job is waiting for its path
    with pytest.raises(NoSpace, match="in use"):
        begin(cache)
    cache.release(version.version_id)
    begin(cache)
    assert here(cache, [version]) == [False]
    cache.close()


def test_downloads_that_begin_at_once_do_not_take_the_room_from_one_another(root: Path) -> None:
    """Forty threads want room that only evictions can make; each gets what its own has made."""
    cache = small_cache(root, 8)
    old = [numbered(number)[0] for number in range(8)]
    for number in range(8):
        publish(cache, *numbered(number))
    make_old(root, *old)
    limit_bytes = 8 * (SIZE_BYTES + 4096)

    def put(number: int) -> bool:
        version, data = numbered(number)
        try:
            partial = cache.begin(version, CHUNK_BYTES)
        except NoSpace:
            return False
        with cache._partials._lock:  # or a file that is just put in place may be seen twice
            assert cache.status().used_bytes <= limit_bytes
        fill(partial, data).publish([ME])
        return True

    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(put, range(100, 140)))

    assert done.count(True) == 8  # the new ones are young
    assert here(cache, old) == [False] * 8
    assert left_in_partial(root) == []
    cache.close()


def test_partial_files_that_nobody_goes_on_with_are_given_up_first(
    three: tuple[CacheDir, list[FileVersion]], root: Path
) -> None:
    cache, versions = three
    begin(cache)  # the oldest goes
    left, new = numbered(10)[0], numbered(11)[0]
    cache.begin(left, CHUNK_BYTES).close()
    begin_new = cache.begin(new, CHUNK_BYTES)  # evicts another: what is left is too young
    begin_new.discard()
    assert here(cache, versions) == [False, False, True]
    assert len(left_in_partial(root)) == 2

    old_s = time.time() - 2 * HOUR_S
    for name in left_in_partial(root):
        os.utime(root / ".swarmcache" / "partial" / name, (old_s, old_s))
    begin(cache, 2)

    assert left_in_partial(root) == []
    assert here(cache, versions) == [False, False, True]


def test_a_disk_that_is_full_in_spite_of_the_account_is_tried_again_after_an_eviction(
    three: tuple[CacheDir, list[FileVersion]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, versions = three
    cache.drop(versions[2].version_id)
    real = disk_calls.reserve
    refused = 0

    def full(fd: int, size_bytes: int, *, keep_size: bool = False) -> bool:
        nonlocal refused
        if cache.status().file_count == 2:
            refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, size_bytes, keep_size=keep_size)

    monkeypatch.setattr(partial_store, "reserve", full)
    begin(cache)
    assert refused == 1
    assert here(cache, versions) == [False, True, False]
    assert left_in_partial(root) == []

    monkeypatch.setattr(cache, "status", lambda: type("", (), {"file_count": 2}))
    with pytest.raises(NoSpace, match="could not begin"):  # only one more time
        begin(cache)
    assert here(cache, versions) == [False, False, False]
    assert left_in_partial(root) == []


@pytest.mark.box
@pytest.mark.slow
def test_a_write_to_a_disk_that_others_have_filled_evicts_and_goes_on(tmp_path: Path) -> None:
    """ext3 cannot set space aside, so that others may take what was meant for a download."""
    with loop_disk(tmp_path, "ext3", 64) as disk:
        root = disk.path / "cache"
        cache = open_cache(root)
        old, old_data = a_file(16 << 20, b"/nfs/old", 1)
        fill(cache.begin(old, 1 << 20), old_data).publish([ME])
        make_old(root, old)
        new, data = a_file(8 << 20, b"/nfs/new", 2)
        partial = cache.begin(new, 1 << 20)
        with (disk.path / "others").open("wb", buffering=0) as others, pytest.raises(OSError):
            while others.write(bytes(1 << 20)):
                pass

        fill(partial, data)

        assert Path(partial.publish([ME])[ME.uid]).read_bytes() == data
        assert list(cache.replicas()) == [new.version_id]
        cache.close()


def test_a_time_of_use_in_the_future_is_taken_for_now(
    three: tuple[CacheDir, list[FileVersion]], root: Path
) -> None:
    """A clock that was wrong for a while must not keep files for ever."""
    cache, versions = three
    where = object_of(root, versions[0])
    os.utime(where, (time.time() + 10**8, where.stat().st_mtime))
    begin(cache)
    index = CacheIndex(str(root / ".swarmcache" / "index.sqlite"))
    replica = index.find(versions[0].version_id)
    index.close()
    assert replica is not None
    assert replica.last_used_s <= time.time()
    assert here(cache, versions) == [True, False, True]
