"""What users see of a cache directory, and take out of it: listings, removal, pins."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from swarmcache import cache_index
from swarmcache.cache_dir import CacheDir, Removal
from swarmcache.cache_index import USERS_MAX, CacheIndex, Entry, Replica, Trust
from swarmcache.disk_calls import Stamp
from swarmcache.user_tree import User
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    a_file,
    change_index,
    killed,
    needs_root,
    object_of,
    open_cache,
    publish,
    recovered,
)

ANN, BEN = User(1001, "ann"), User(1002, "ben")


def listed(cache: CacheDir, path: bytes = b"/", user: User | None = None) -> list[Entry]:
    return [entry for page in cache.listing.entries(path, user) for entry in page]


def paths(cache: CacheDir, path: bytes = b"/", user: User | None = None) -> list[bytes]:
    return [entry.replica.path for entry in listed(cache, path, user)]


# --- listings ------------------------------------------------------------------------------------


def test_a_path_stands_for_a_file_or_for_all_below_a_directory(cache: CacheDir, root: Path) -> None:
    names = [b"/n/a", b"/n/a!", b"/n/a.hdf", b"/n/a/x", b"/n/a/y\n\xff", b"/n/a0", b"/n/b/a"]
    for seed, name in enumerate(names):
        publish(cache, *a_file(10, name, seed))
    mine = bytes(root) + b"/me"

    assert paths(cache) == names
    assert paths(cache, bytes(root)) == names
    assert paths(cache, b"/n/a") == [b"/n/a", b"/n/a/x", b"/n/a/y\n\xff"]
    assert paths(cache, b"/n/a!") == [b"/n/a!"]
    assert paths(cache, b"/n") == paths(cache, mine) == paths(cache, mine + b"/n") == names
    assert paths(cache, mine + b"/n/b") == [b"/n/b/a"]
    for nothing in (b"/m", b"/n/a/x/y", bytes(root) + b"/\xff/n", mine + b"2", mine + b"/n/a/z"):
        assert paths(cache, nothing) == []


def test_a_listing_in_pages_has_every_file_once_also_those_of_one_path(
    cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_index, "LISTED_ROWS", 3)
    for seed in range(10):
        publish(cache, *a_file(10, b"/n/%d" % (seed // 4), seed))

    pages = list(cache.listing.entries(b"/n"))

    assert [len(page) for page in pages if page] == [3, 3, 3, 1]
    found = [entry.replica.version_id for page in pages for entry in page]
    assert len(set(found)) == 10


def test_an_entry_tells_where_the_copy_is_and_when_it_was_used(cache: CacheDir, root: Path) -> None:
    version, data = a_file(3 * CHUNK_BYTES)
    path = publish(cache, version, data)[ME.uid]
    (before,) = listed(cache)
    cache.lookup(version, ME)
    cache.pin(version.version_id, 7)

    (entry,) = listed(cache)

    assert entry.copies == [os.fsencode(path)]
    assert entry.replica.stamp.size_bytes == len(data)
    assert before.replica.last_used_s < entry.replica.last_used_s, "known before it is written down"
    assert entry.pinned_by == (7,)
    assert entry.trusted
    change_index(root, "UPDATE replica SET trust = 0")
    assert not listed(cache)[0].trusted


def test_the_last_use_is_also_when_a_process_has_read_the_copy(cache: CacheDir, root: Path) -> None:
    publish(cache, *a_file(10))  # which leaves the time of a read
    cache.flush()
    change_index(root, "UPDATE replica SET last_used_s = 1.0")

    (entry,) = listed(cache)

    assert entry.replica.last_used_s == pytest.approx(time.time(), abs=60)


@needs_root
def test_a_user_sees_the_files_that_are_linked_for_him_and_nobody_elses_paths(
    cache: CacheDir, root: Path
) -> None:
    both, other = a_file(10, b"/n/both", 1), a_file(10, b"/n/other", 2)
    publish(cache, *both, ANN, BEN)
    publish(cache, *other, ANN)
    of_ann = bytes(root) + b"/ann"

    assert paths(cache, b"/", BEN) == paths(cache, b"/n", BEN) == [b"/n/both"]
    assert paths(cache, b"/", User(BEN.uid, "ann")) == []
    assert [entry.copies for entry in listed(cache, b"/", BEN)] == [[bytes(root) + b"/ben/n/both"]]
    assert paths(cache, of_ann, BEN) == []
    assert paths(cache, of_ann, ANN) == paths(cache, of_ann) == [b"/n/both", b"/n/other"]
    assert [len(entry.copies) for entry in listed(cache)] == [2, 1]
    assert cache.listing.owner_of(of_ann + b"/n") == "ann"
    assert cache.listing.owner_of(b"/n") is cache.listing.owner_of(bytes(root)) is None


def test_of_many_users_only_some_are_named(tmp_path: Path) -> None:
    index = CacheIndex(str(tmp_path / "index"))
    stamp = Stamp(1, 2, 3, 4)
    row = Replica(b"v" * 32, b"/n", 1, 1, Trust.DOUBTFUL, b"b" * 16, stamp, 1.0, 1.0, 1.0)
    index.insert(row)
    index.doubt(row.version_id, [User(uid, f"user{uid}") for uid in range(USERS_MAX + 1)])
    for uid in range(USERS_MAX + 1):
        index.pin(row.version_id, uid)

    [[entry], []] = index.entries(b"/n")

    assert len(entry.links) == len(entry.pinned_by) == USERS_MAX
    assert [
        [e.links for e in page] for page in index.entries(name=f"user{USERS_MAX}", uid=USERS_MAX)
    ] == [[(User(USERS_MAX, f"user{USERS_MAX}"),)]]
    index.close()


# --- removal and pins ----------------------------------------------------------------------------


@needs_root
def test_the_file_goes_with_its_last_link(cache: CacheDir, root: Path) -> None:
    version, data = a_file(2 * CHUNK_BYTES)
    made = publish(cache, version, data, ANN, BEN)
    version_id = version.version_id

    assert cache.remove(version_id, ME) is Removal.ABSENT
    assert cache.remove(version_id, ANN) is Removal.UNLINKED
    assert not os.path.exists(made[ANN.uid])
    assert cache.listing.linked(version_id) == [BEN]
    assert cache.lookup(version, BEN) == made[BEN.uid]
    assert Path(made[BEN.uid]).read_bytes() == data

    assert cache.remove(version_id, ANN) is Removal.ABSENT
    assert cache.remove(version_id, BEN) is Removal.GONE
    assert cache.lookup(version, BEN) is None
    assert not object_of(root, version).exists()
    assert cache.status().used_bytes == 0


def test_what_is_pinned_is_not_removed_unless_it_must(cache: CacheDir) -> None:
    version, data = a_file(10)
    publish(cache, version, data)
    cache.pin(version.version_id, ME.uid)

    assert cache.remove(version.version_id, ME) is Removal.PINNED
    assert cache.remove(version.version_id) is Removal.PINNED
    assert cache.lookup(version, ME) is not None
    assert cache.remove(version.version_id, ME, even_pinned=True) is Removal.GONE

    publish(cache, version, data)
    assert listed(cache)[0].pinned_by == (), "a pin goes with what its user removes"


@needs_root
def test_a_file_that_another_user_has_pinned_outlives_all_links(cache: CacheDir) -> None:
    version, data = a_file(10)
    publish(cache, version, data, ANN)
    cache.pin(version.version_id, 0)

    assert cache.remove(version.version_id, ANN) is Removal.UNLINKED
    assert [(entry.links, entry.pinned_by) for entry in listed(cache)] == [((), (0,))]
    assert cache.remove(version.version_id) is Removal.PINNED
    assert cache.remove(version.version_id, even_pinned=True) is Removal.GONE


def test_what_is_in_doubt_can_be_removed(cache: CacheDir, root: Path) -> None:
    version, data = a_file(10)
    (path,) = publish(cache, version, data).values()
    change_index(root, "UPDATE replica SET trust = 0")

    assert cache.remove(version.version_id, ME) is Removal.GONE
    assert not os.path.exists(path)


@needs_root
def test_a_link_of_a_file_in_doubt_is_removed_and_the_doubt_stays(
    cache: CacheDir, root: Path
) -> None:
    version, data = a_file(10)
    made = publish(cache, version, data, ANN, BEN)
    change_index(root, "UPDATE replica SET trust = 0")

    assert cache.remove(version.version_id, ANN) is Removal.UNLINKED
    assert not os.path.exists(made[ANN.uid])
    assert cache.lookup(version, BEN) is None
    assert recovered(cache) == [version.version_id]
    assert cache.lookup(version, BEN) == made[BEN.uid]


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("last", ["doubt", "unlink", "settle"])
def test_a_kill_while_a_link_is_removed_costs_nobody_the_file(root: Path, last: str) -> None:
    script = f"""
        version, data = a_file(10)
        publish(cache, version, data, User(1001, "ann"), User(1002, "ben"))
        whole = cache._index.{last}
        def once(*arguments):
            whole(*arguments)
            die()
        cache._index.{last} = once
        cache.remove(version.version_id, User(1001, "ann"))
    """
    killed(root, script)

    cache = open_cache(root)
    version, data = a_file(10)
    in_doubt = [] if last == "settle" else [version.version_id]
    assert recovered(cache) == in_doubt
    path = cache.lookup(version, BEN)
    assert path is not None and Path(path).read_bytes() == data
    assert cache.remove(version.version_id, ANN) in (Removal.UNLINKED, Removal.ABSENT)
    assert cache.remove(version.version_id, BEN) is Removal.GONE
    cache.close()
