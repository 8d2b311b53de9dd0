"""Many processes that use cached files, against a daemon that must evict all the time.

python -m pytest tests/test_eviction_races.py --races 10000 -s
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.disk_helpers import REPOSITORY
from tests.local_daemons import LocalDaemons
from tests.loop_disks import loop_disk

SOURCES = 40
FIT = 12  # of them, so that most requests need an eviction
SIZE_BYTES = 256 * 1024
READERS = 5
MIN_AGE_S = 0.05


@pytest.mark.box
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_no_reader_ever_misses_a_file_that_must_be_there_or_sees_another(
    root: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    races = request.config.getoption("--races")
    sources = [root.parent / f"{number}.dat" for number in range(SOURCES)]
    for number, source in enumerate(sources):
        source.write_bytes(Random(number).randbytes(SIZE_BYTES + number))
    settings = f"""
        [cache]
        min_free = "0%"
        max_usage = "{UNCOUNTED_MAX_BYTES + FIT * (SIZE_BYTES + 5 * 4096)}B"
        min_age = "{MIN_AGE_S * 1000:.0f}ms"
    """
    with loop_disk(root.parent, kind, 320) as disk, LocalDaemons(root.parent) as local:
        local.start_tracker()
        node = local.start_daemon("a", settings, disk.path / "cache")
        command = [sys.executable, "-m", "tests.racing_reader", str(node.socket)]
        readers = [
            subprocess.Popen(
                [*command, str(seed), str(races // READERS), str(MIN_AGE_S), *map(str, sources)],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in range(READERS)
        ]
        happened: Counter[str] = Counter()
        said = ""
        for reader in readers:
            output, errors = reader.communicate()
            happened.update(json.loads(output) if reader.returncode == 0 else {})
            said += errors
        assert said == ""
        assert node.status()["node"]["disk"]["file_count"] <= FIT + 1
        daemon_said = node.said()

    print(kind, dict(sorted(happened.items())))
    assert "Traceback" not in daemon_said
    # Each of these was put to the test.
    assert happened["fetched"] > 2 * FIT
    for way in ("hit", "opened", "mapped", "held", "gone after min_age"):
        assert happened[way] > 0, way
