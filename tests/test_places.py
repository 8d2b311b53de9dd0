"""Where copies are and would be, and what room there could be, as the cache of a node sees it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmcache.cache_dir import CacheDir
from swarmcache.disk import Cache
from swarmcache.errors import CacheDirUnusable
from swarmcache.messages import ReplicaPlace
from swarmcache.partial_store import OVERHEAD_BYTES, UNCOUNTED_MAX_BYTES
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    User,
    a_file,
    change_index,
    fill,
    open_cache,
    publish,
)

MIB = 1 << 20


@pytest.fixture
def two(root: Path) -> Iterator[Cache]:
    """Two directories with limits of their own; ``a`` has more room."""

    def limited(name: str, room_bytes: int) -> CacheDir:
        return open_cache(root / name, max_usage=lambda _: room_bytes + UNCOUNTED_MAX_BYTES)

    cache = Cache([limited("a", 64 * MIB), limited("b", 63 * MIB)])
    yield cache
    cache.close()


def test_a_place_is_below_the_users_directory_whether_the_user_has_a_link_or_not(
    root: Path, cache: CacheDir
) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)

    assert cache.place(version.version_id, "me") == ReplicaPlace(bytes(root / "me"), True)
    assert cache.place(version.version_id, "ann") == ReplicaPlace(bytes(root / "ann"), False)
    assert cache.lookup(version, User(ME.uid, "ann")) == f"{root}/ann{version.path.decode()}"
    assert cache.place(version.version_id, "ann") == ReplicaPlace(bytes(root / "ann"), True)
    assert cache.place(b"?" * 32, "me") is None


@pytest.mark.parametrize("name", ["", ".swarmcache", "..", "a/b", "a\0"])
def test_no_place_has_a_name_that_no_user_has(cache: CacheDir, name: str) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    with pytest.raises(CacheDirUnusable, match="cannot be the name"):
        cache.place(version.version_id, name)


def test_a_copy_that_was_touched_has_no_place_and_is_taken_out(cache: CacheDir) -> None:
    version, data = a_file(9000)
    path = publish(cache, version, data)[ME.uid]
    os.utime(path)
    assert cache.place(version.version_id, "me") is None
    assert list(cache.take_damaged()) == [version.version_id], "what is right of it is kept"


def test_a_copy_in_doubt_has_no_place(root: Path) -> None:
    version, data = a_file(9000)
    cache = open_cache(root)
    publish(cache, version, data)
    cache.close()
    change_index(root, "UPDATE replica SET trust = 0")
    cache = open_cache(root)
    assert cache.place(version.version_id, "me") is None
    assert cache.take_damaged() == {}, "nothing is known of it yet"
    cache.close()


def test_a_copy_that_is_being_evicted_has_no_place_and_is_left_alone(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    seen: list[object] = []
    remove_rows = cache.remove_rows

    def look_first(replicas: object) -> None:
        seen.append(cache.place(version.version_id, "me"))
        remove_rows(replicas)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "remove_rows", look_first)
    monkeypatch.setattr(cache._evictor, "_min_age_s", 0.0)
    cache._evictor.make_room(9000)

    assert seen == [None] and cache.take_damaged() == {}
    assert cache.place(version.version_id, "me") is None


def test_to_ask_for_a_place_is_no_use_of_the_file(cache: CacheDir) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    cache.flush()
    cache.place(version.version_id, "me")
    assert cache._uses.used_s(version.version_id) == 0.0


# --- where copies would be -----------------------------------------------------------------------


def test_a_question_decides_nothing(two: Cache) -> None:
    version, _ = a_file(9000, b"/nfs/x/1")
    assert "/a/me/" in two.user_path(version, ME)
    big, data = a_file(3 * MIB, b"/nfs/y/1")
    fill(two.begin(big, CHUNK_BYTES), data).publish([ME])
    assert "/b/me/" in two.user_path(version, ME), "now there is more room"
    data = a_file(9000, b"/nfs/x/1")[1]
    fill(two.begin(version, CHUNK_BYTES), data).publish([ME])
    assert two.lookup(version, ME) == two.user_path(version, ME)
    assert "/b/me/" in two.user_path(a_file(9000, b"/nfs/x/2")[0], ME), "beside its sibling"


def test_a_place_for_a_file_of_the_users_own_tells_nothing_of_what_others_cache(
    two: Cache, root: Path
) -> None:
    big, data = a_file(3 * MIB, b"/nfs/secret/1")
    fill(two.begin(big, CHUNK_BYTES), data).publish([User(ME.uid, "ann")])
    assert two.own_path(b"/nfs/secret/2", ME) == f"{root}/b/me/nfs/secret/2"
    assert (root / "b/me/nfs/secret").is_dir() and not (root / "a/me").exists()


@pytest.mark.parametrize("path", [b"a", b"/", b"/../a", b"/a/./b", b"/a//b", b"/a/", b"/\0"])
def test_what_is_no_real_path_has_no_place(two: Cache, path: bytes) -> None:
    with pytest.raises(CacheDirUnusable, match="is not a real path"):
        two.own_path(path, ME)


# --- room ----------------------------------------------------------------------------------------


def test_what_is_here_and_stays_needs_no_room(root: Path) -> None:
    limit_bytes = UNCOUNTED_MAX_BYTES + MIB
    directory = open_cache(root, max_usage=lambda _: limit_bytes, min_age_s=3600.0)
    cache = Cache([directory])
    here, data = a_file(256 << 10, b"/nfs/here")
    other, _ = a_file(512 << 10, b"/nfs/other")
    assert cache.room([(here, CHUNK_BYTES), (other, CHUNK_BYTES)])[0] > 768 << 10
    free_bytes = MIB - OVERHEAD_BYTES
    assert cache.room([]) == (0, free_bytes)

    partial = cache.begin(here, CHUNK_BYTES)
    assert cache.room([(here, CHUNK_BYTES)])[0] == 0, "its room is set aside"
    fill(partial, data).publish([ME])
    needed_bytes, room_bytes = cache.room([(here, CHUNK_BYTES), (other, CHUNK_BYTES)])
    assert 512 << 10 < needed_bytes < 600 << 10
    assert needed_bytes < room_bytes < free_bytes - (256 << 10)
    cache.close()


def test_what_could_be_evicted_is_room_and_so_needed_by_what_shall_not_be(root: Path) -> None:
    limit_bytes = UNCOUNTED_MAX_BYTES + MIB
    cache = Cache([open_cache(root, max_usage=lambda _: limit_bytes, min_age_s=0.0)])
    here, data = a_file(256 << 10, b"/nfs/here")
    fill(cache.begin(here, CHUNK_BYTES), data).publish([ME])
    needed_bytes, room_bytes = cache.room([(here, CHUNK_BYTES)])
    assert 256 << 10 <= needed_bytes < 300 << 10
    assert room_bytes > MIB - 64 * 1024
    cache.pin(here.version_id, ME.uid)
    pinned_needed_bytes, pinned_room_bytes = cache.room([(here, CHUNK_BYTES)])
    assert (pinned_needed_bytes, pinned_room_bytes) == (0, room_bytes - needed_bytes)
    cache.close()
