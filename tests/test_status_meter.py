"""What a node says of itself is what its cache is like."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmcache import status_meter
from swarmcache.disk import Cache
from swarmcache.errors import DiskFailed
from swarmcache.gossip_records import DiskHealth
from swarmcache.status_meter import StatusMeter
from tests.disk_helpers import CHUNK_BYTES, ME, a_file, open_cache, publish


@pytest.fixture
def cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    monkeypatch.setattr(status_meter, "SLOW_S", 0.0)
    cache = Cache([open_cache(root)])
    yield cache
    cache.close()


def test_room_load_and_what_is_held(cache: Cache) -> None:
    meter = StatusMeter(cache, uploads=lambda: 3, downloads=lambda: 5, standing_in=lambda: True)
    empty = meter.measure()
    version, data = a_file(5 * CHUNK_BYTES)
    [directory] = cache._all
    publish(directory, version, data, ME)
    filled = meter.measure()
    cache.pin(version.version_id, ME.uid)
    pinned = meter.measure()
    cache.drop(version.version_id)

    assert (empty.uploads, empty.downloads, empty.disk) == (3, 5, DiskHealth.OK)
    assert empty.standing_in
    assert empty.free_bytes > 0
    assert filled.used_bytes > empty.used_bytes
    assert filled.held_digest != empty.held_digest
    assert (filled.pinned_bytes, pinned.pinned_bytes) == (0, filled.used_bytes)
    assert meter.measure().held_digest == empty.held_digest


def test_a_disk_without_room_is_full_and_one_that_fails_is_sick(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Cache([open_cache(root, min_free=lambda capacity_bytes: capacity_bytes)])
    meter = StatusMeter(full, uploads=lambda: 0, downloads=lambda: 0, standing_in=lambda: False)
    assert meter.measure().disk is DiskHealth.FULL

    def fail() -> None:
        raise DiskFailed("it fails")

    monkeypatch.setattr(full, "status", fail)
    assert meter.measure().disk is DiskHealth.SICK
    full.close()
