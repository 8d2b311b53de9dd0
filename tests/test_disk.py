"""The cache of a node as a whole: what holds whichever directory a file lies in."""

from __future__ import annotations

from pathlib import Path

from swarmcache.disk import Cache
from tests.disk_helpers import CHUNK_BYTES, ME, a_file, fill, open_cache


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
