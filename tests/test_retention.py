"""Copies that nobody uses for too long go; what is in use, pinned or held stays; clocks are set."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from swarmcache import retention
from swarmcache.cache_dir import CacheDir
from swarmcache.chunks import FileVersion
from tests.disk_helpers import CHUNK_BYTES, ME, a_file, make_old, object_of, publish

DAY_S = 86400.0
MAX_AGE_S = 14 * DAY_S
UP_S = 1000.0


def open_with_retention(root: Path, max_age_s: float | None = MAX_AGE_S) -> CacheDir:
    return CacheDir(
        root,
        min_free=lambda capacity_bytes: 0,
        max_usage=lambda capacity_bytes: capacity_bytes,
        min_age_s=3600.0,
        max_age_s=max_age_s,
    )


def publish_some(cache: CacheDir, count: int) -> list[FileVersion]:
    versions = []
    for number in range(count):
        version, data = a_file(2 * CHUNK_BYTES, b"/nfs/%d" % number, number)
        publish(cache, version, data)
        versions.append(version)
    return versions


def here(cache: CacheDir, versions: Sequence[FileVersion]) -> list[bool]:
    replicas = set(cache.replicas())
    return [version.version_id in replicas for version in versions]


class Clocks:
    """Wall clock and time since the boot, which go on together unless the former is set."""

    def __init__(self) -> None:
        self.wall_s = time.time()
        self.up_s = UP_S

    def go_on(self, seconds: float) -> None:
        self.wall_s += seconds
        self.up_s += seconds

    def drop_all(self, cache: CacheDir) -> None:
        while cache.drop_unused(self.wall_s, self.up_s):
            pass


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def cache(root: Path, clocks: Clocks) -> Iterator[CacheDir]:
    opened = open_with_retention(root)
    opened.look_at_clock(clocks.wall_s, clocks.up_s)
    yield opened
    opened.close()


def test_what_nobody_used_for_so_long_goes_and_the_tracker_is_told_before(
    cache: CacheDir, clocks: Clocks, root: Path
) -> None:
    (version,) = publish_some(cache, 1)
    path = cache.user_path(version, ME)
    told: list[bytes] = []

    def tell(version_ids: Sequence[bytes]) -> Future[None]:
        assert object_of(root, version).exists()
        told.extend(version_ids)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    cache.tell_before_evicting(tell)
    clocks.go_on(MAX_AGE_S - 60.0)
    clocks.drop_all(cache)
    assert (here(cache, [version]), told) == ([True], [])

    clocks.go_on(120.0)
    clocks.drop_all(cache)
    assert (here(cache, [version]), told) == ([False], [version.version_id])
    assert not os.path.lexists(path)
    assert not object_of(root, version).exists()
    assert cache.status().file_count == 0


def test_what_is_open_pinned_held_served_or_was_read_stays(root: Path, clocks: Clocks) -> None:
    clocks.go_on(-30 * DAY_S)
    cache = open_with_retention(root)
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    clocks.go_on(30 * DAY_S)
    versions = publish_some(cache, 7)
    opened, pinned, held, served, read, answered, _ = versions
    make_old(root, *versions, age_s=MAX_AGE_S + DAY_S)
    os.utime(object_of(root, read), ns=(time.time_ns(), read.mtime_ns))
    cache.pin(pinned.version_id, ME.uid)
    cache.hold(held.version_id)
    source = cache.open_source(served.version_id)
    assert source is not None
    cache.lookup(answered, ME)

    with open(object_of(root, opened), "rb"):
        clocks.drop_all(cache)
    assert here(cache, versions) == [True, True, True, True, True, True, False]

    # To have been open was a use. The others follow when they are let go of.
    source.close()
    cache.release(held.version_id)
    cache.unpin(pinned.version_id, ME.uid)
    cache.flush()
    make_old(root, pinned, held, age_s=MAX_AGE_S + DAY_S)
    clocks.drop_all(cache)
    assert here(cache, versions) == [True, False, False, True, True, True, False]
    cache.close()


def test_many_files_go_in_parts_of_bounded_size(
    cache: CacheDir, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "FILES_MAX", 3)
    versions = publish_some(cache, 7)
    clocks.go_on(MAX_AGE_S + 60.0)

    left = []
    for _ in range(3):
        more = cache.drop_unused(clocks.wall_s, clocks.up_s)
        left.append((more, sum(here(cache, versions))))
    assert left == [(True, 4), (True, 1), (False, 0)]


def test_a_clock_that_jumps_ahead_by_a_year_empties_nothing(
    cache: CacheDir, clocks: Clocks, caplog: pytest.LogCaptureFixture
) -> None:
    versions = publish_some(cache, 2)
    clocks.go_on(DAY_S)
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    clocks.wall_s += 365 * DAY_S
    clocks.drop_all(cache)
    assert here(cache, versions) == [True, True]
    assert caplog.text.count("the clock was set") == 1

    clocks.go_on(MAX_AGE_S - DAY_S)
    clocks.drop_all(cache)
    assert here(cache, versions) == [True, True]
    clocks.go_on(2 * DAY_S)
    clocks.drop_all(cache)
    assert here(cache, versions) == [False, False]


def test_a_clock_that_jumps_ahead_while_the_daemon_is_down_empties_nothing(
    root: Path, clocks: Clocks
) -> None:
    cache = open_with_retention(root)
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    versions = publish_some(cache, 1)
    cache.close()
    clocks.wall_s += 365 * DAY_S

    cache = open_with_retention(root)
    clocks.drop_all(cache)
    assert here(cache, versions) == [True]
    cache.close()


def test_restarts_of_the_daemon_do_not_make_copies_younger(root: Path, clocks: Clocks) -> None:
    cache = open_with_retention(root)
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    versions = publish_some(cache, 1)
    for _ in range(3):
        cache.close()
        clocks.go_on(5 * DAY_S)
        cache = open_with_retention(root)
        cache.look_at_clock(clocks.wall_s, clocks.up_s)
    clocks.drop_all(cache)
    assert here(cache, versions) == [False]
    cache.close()


def test_a_use_that_was_noted_by_a_clock_ahead_of_time_is_no_use_in_the_future(
    cache: CacheDir, clocks: Clocks
) -> None:
    (version,) = publish_some(cache, 1)
    cache._index.touch({version.version_id: clocks.wall_s + 365 * DAY_S})
    clocks.wall_s -= 3600.0
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    clocks.go_on(MAX_AGE_S + 7200.0)
    clocks.drop_all(cache)
    assert here(cache, [version]) == [False]


def test_without_max_age_nothing_goes_and_no_clock_is_looked_at(root: Path, clocks: Clocks) -> None:
    cache = open_with_retention(root, None)
    versions = publish_some(cache, 1)
    clocks.go_on(1000 * DAY_S)
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    clocks.drop_all(cache)
    assert here(cache, versions) == [True]
    assert cache._index.clock() is None
    cache.close()


def test_what_is_kept_for_min_age_does_not_go_before(root: Path, clocks: Clocks) -> None:
    cache = open_with_retention(root, 60.0)  # and min_age is an hour
    cache.look_at_clock(clocks.wall_s, clocks.up_s)
    versions = publish_some(cache, 1)
    clocks.go_on(1800.0)
    clocks.drop_all(cache)
    assert here(cache, versions) == [True]
    clocks.go_on(1860.0)
    clocks.drop_all(cache)
    assert here(cache, versions) == [False]
    cache.close()


def test_an_index_of_before_there_was_a_clock_in_it_keeps_its_pins(
    root: Path, clocks: Clocks
) -> None:
    cache = open_with_retention(root)
    (version,) = publish_some(cache, 1)
    cache.pin(version.version_id, ME.uid)
    cache.close()
    connection = sqlite3.connect(root / ".swarmcache" / "index.sqlite")
    with connection:
        connection.execute("DROP TABLE clock")
    connection.close()

    cache = open_with_retention(root)
    clocks.drop_all(cache)
    assert cache._index.pinned_by(version.version_id) == [ME.uid]
    cache.close()
