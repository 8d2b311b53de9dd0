"""Small files that come into a cache directory together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarmcache.cache_dir import CacheDir
from swarmcache.cache_index import CacheIndex
from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, FileVersion, SmallFile
from swarmcache.disk import Cache
from swarmcache.errors import CacheDirUnusable, NoSpace
from swarmcache.file_batch import SLICE_FILES
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from swarmcache.user_tree import User
from tests.cache_checks import assert_right, assert_sound
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    a_file,
    fill,
    install_together,
    left_in_partial,
    make_old,
    object_of,
    open_cache,
    publish,
    small_file,
)

OTHER = User(os.geteuid(), "other")
FILES = [
    a_file(100 * number + 1, b"/nfs/%d/%d" % (number % 3, number), number) for number in range(8)
]


def ids(files: list[tuple[FileVersion, bytes]]) -> list[bytes]:
    return [version.version_id for version, _ in files]


def test_all_of_a_batch_are_replicas_with_links_for_their_users(root: Path) -> None:
    cache = open_cache(root)

    assert install_together(cache, FILES, [ME, OTHER]) == ids(FILES)

    for version, data in FILES:
        for user in (ME, OTHER):
            path = cache.lookup(version, user)
            assert_right(cache, version.version_id, path, data)
            assert path is not None and os.stat(path).st_mtime_ns == version.mtime_ns
            assert os.stat(path).st_mode & 0o777 == 0o444
    assert left_in_partial(root) == []
    assert_sound(cache, root)
    cache.make_all_durable(ids(FILES))
    cache.close()


def test_looking_up_many_files_that_are_not_here_costs_no_query_for_each(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(root)
    here, absent = FILES[:2], FILES[2:]
    install_together(cache, here, [ME])
    monkeypatch.setattr(CacheIndex, "find_for", lambda *_: pytest.fail("a query for one file"))

    found = cache.lookup_many([version for version, _ in FILES], ME)

    assert [path is not None for path in found] == [True] * len(here) + [False] * len(absent)
    cache.close()


def test_a_file_that_is_here_without_a_link_is_found_among_many_that_are_not(root: Path) -> None:
    cache = open_cache(root)
    install_together(cache, FILES[:1], [OTHER])

    found = cache.lookup_many([version for version, _ in FILES], ME)

    assert found[0] is not None and os.path.samefile(found[0], object_of(root, FILES[0][0]))
    assert found[1:] == [None] * len(FILES[1:])
    cache.close()


def test_they_are_served_to_peers_as_they_are_or_not_at_all(root: Path) -> None:
    cache = open_cache(root)
    install_together(cache, FILES, [ME])
    big, data = a_file(3 * CHUNK_BYTES, b"/nfs/big", 99)
    publish(cache, big, data)
    touched = object_of(root, FILES[2][0])
    os.utime(touched)

    served = cache.read_files([*ids(FILES), big.version_id, b"n" * 32])

    expected = [small_file(*file) for file in FILES if file is not FILES[2]]
    assert sorted(served, key=lambda file: file.version_id) == sorted(
        expected, key=lambda file: file.version_id
    )
    cache.close()


def test_nothing_is_touched_of_which_there_is_something_already(root: Path) -> None:
    cache = open_cache(root)
    (replica, _), (begun, _), (left, _), (older, data), *others = FILES
    publish(cache, *FILES[0])
    cache.begin(begun, CHUNK_BYTES)
    cache.begin(left, CHUNK_BYTES).close()
    former = FileVersion(older.path, older.size_bytes, older.mtime_ns - 1)
    publish(cache, former, data)

    assert install_together(cache, FILES, [ME]) == ids(others)

    assert cache.lookup(former, ME) is not None
    assert cache.lookup(replica, ME) is not None
    assert cache.begin_batch([version for version, _ in FILES], CHUNK_SIZE_MIN_BYTES) is None
    cache.close()


def test_a_file_that_is_in_the_way_of_a_link_stays_and_is_told_to_who_asks(root: Path) -> None:
    cache = open_cache(root)
    publish(cache, *FILES[3])  # makes the directory
    mine = Path(cache.user_path(FILES[0][0], ME))
    mine.write_text("mine")

    assert install_together(cache, FILES[:3], [ME]) == ids(FILES[:3])

    assert mine.read_text() == "mine"
    with pytest.raises(CacheDirUnusable, match="move it away"):
        cache.lookup(FILES[0][0], ME)
    assert cache.lookup(FILES[1][0], ME) is not None
    mine.unlink()
    assert cache.lookup(FILES[0][0], ME) == str(mine)
    assert_sound(cache, root)
    cache.close()


def test_room_is_set_aside_for_all_and_given_back(root: Path) -> None:
    cache = open_cache(root)
    before = cache.status().used_bytes
    batch = cache.begin_batch([version for version, _ in FILES], CHUNK_SIZE_MIN_BYTES)
    assert batch is not None
    reserved_bytes = cache.status().used_bytes - before
    assert reserved_bytes == 8 * 4096  # a block for each; their manifests share a file

    batch.install([small_file(*file) for file in FILES[:2]], [ME])
    assert cache.status().used_bytes - before == reserved_bytes
    batch.close()

    assert cache.status().used_bytes - before == 2 * 4096
    cache.close()


def test_room_is_made_or_else_the_batch_does_not_begin(root: Path) -> None:
    limit_bytes = UNCOUNTED_MAX_BYTES + 9 * 2 * 4096
    cache = open_cache(root, max_usage=lambda _: limit_bytes, min_age_s=3600.0)
    install_together(cache, FILES, [ME])
    more = [a_file(10, b"/nfs/more/%d" % number, 50 + number) for number in range(4)]

    with pytest.raises(NoSpace, match="max_usage"):
        install_together(cache, more, [ME])
    make_old(root, *[version for version, _ in FILES])
    assert install_together(cache, more, [ME]) == ids(more)

    assert [cache.lookup(version, ME) is None for version, _ in FILES] == [True] * 3 + [False] * 5
    assert cache.status().used_bytes <= limit_bytes
    assert_sound(cache, root)
    cache.close()


def test_a_tight_umask_takes_nothing_away(root: Path) -> None:
    cache = open_cache(root)
    former = os.umask(0o077)
    try:
        install_together(cache, FILES[:2], [ME])
    finally:
        os.umask(former)
    for version, _ in FILES[:2]:
        assert object_of(root, version).stat().st_mode & 0o777 == 0o444
        assert cache.lookup(version, ME) is not None
    cache.close()


def test_what_came_before_a_failure_stays_and_the_rest_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [a_file(10, b"/nfs/many/%d" % number, number) for number in range(SLICE_FILES + 4)]
    cache = open_cache(root)
    renamed, real = [0], os.rename

    def rename_some(*arguments: object, **keywords: object) -> None:
        if renamed[0] > SLICE_FILES + 2:  # with a manifest for all of each slice
            raise OSError(5, "Input/output error")
        real(*arguments, **keywords)  # type: ignore[arg-type]
        renamed[0] += 1

    monkeypatch.setattr(os, "rename", rename_some)
    with pytest.raises(Exception, match="could not put small files in place"):
        install_together(cache, files, [ME])
    monkeypatch.undo()

    here = [cache.lookup(version, ME) is not None for version, _ in files]
    assert here == [True] * SLICE_FILES + [False] * 4
    assert left_in_partial(root) == []
    assert_sound(cache, root)
    assert install_together(cache, files, [ME]) == ids(files[SLICE_FILES:])
    cache.close()


def test_manifests_share_a_file_that_goes_with_the_last_of_them(root: Path) -> None:
    cache = open_cache(root)
    far = a_file(10, b"/nfs/" + b"d" * 200 + b"/" + b"/".join([b"e" * 200] * 4), 77)
    install_together(cache, [*FILES[:3], far], [ME])
    manifests = [Path(f"{object_of(root, version)}.manifest") for version, _ in FILES[:3]]
    alone = Path(f"{object_of(root, far[0])}.manifest").stat()

    assert len({manifest.stat().st_ino for manifest in manifests}) == 1
    assert alone.st_nlink == 1
    cache.drop(FILES[0][0].version_id)
    assert [cache.manifest(each) is not None for each in ids([*FILES[:3], far])] == [
        False,
        True,
        True,
        True,
    ]
    cache.drop(FILES[1][0].version_id)
    assert manifests[2].stat().st_nlink == 1
    assert_sound(cache, root)
    cache.close()


def test_a_manifest_that_a_power_cut_has_left_gives_way(root: Path) -> None:
    cache = open_cache(root)
    for version, _ in FILES[:2]:
        left = Path(f"{object_of(root, version)}.manifest")
        left.parent.mkdir(mode=0o700, exist_ok=True)
        left.write_bytes(b"")

    assert install_together(cache, FILES, [ME]) == ids(FILES)

    assert len(cache.read_files(ids(FILES))) == len(FILES)
    assert_sound(cache, root)
    cache.close()


def test_a_lost_index_is_made_again_from_manifests_that_share_a_file(root: Path) -> None:
    cache = open_cache(root)
    install_together(cache, FILES, [ME])
    used_bytes = cache.status().used_bytes
    cache.close()
    (root / ".swarmcache" / "index.sqlite").unlink()

    cache = open_cache(root)
    list(cache.list_objects())
    good = [version_id for some in cache.recover_undurable() for version_id in some]

    assert sorted(good) == sorted(ids(FILES))
    assert cache.status().used_bytes == used_bytes
    assert len(cache.read_files(ids(FILES))) == len(FILES)
    assert_sound(cache, root)
    cache.close()


def test_the_ordinary_way_goes_on_beside(root: Path) -> None:
    cache = open_cache(root)
    batch = cache.begin_batch([FILES[0][0]], CHUNK_SIZE_MIN_BYTES)
    assert batch is not None
    fill(cache.begin(FILES[1][0], CHUNK_BYTES), FILES[1][1]).publish([ME])
    stranger = SmallFile(FILES[1][0].version_id, b"d" * 32, b"not asked for")

    assert batch.install([stranger, small_file(*FILES[0])], [ME]) == ids(FILES[:1])

    batch.close()
    assert_sound(cache, root)
    cache.close()


def test_the_cache_of_all_disks_takes_and_gives_them(root: Path) -> None:
    directory = CacheDir(root, min_free=lambda _: 0, max_usage=lambda size_bytes: size_bytes)
    cache = Cache([directory])
    (batch,) = cache.begin_batch([version for version, _ in FILES], CHUNK_SIZE_MIN_BYTES)
    batch.install([small_file(*file) for file in FILES], [ME])
    batch.close()
    assert len(cache.read_files(ids(FILES))) == len(FILES)
    assert cache.begin_batch([version for version, _ in FILES], CHUNK_SIZE_MIN_BYTES) == []
    cache.close()
