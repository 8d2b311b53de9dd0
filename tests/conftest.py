"""What all tests share: a clean environment, and a reason wherever a cluster in a box cannot be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from swarmcache.cache_dir import CacheDir
from tests.box import missing
from tests.disk_helpers import open_cache

# The machine is shared: how long an example takes says nothing about the code.
settings.register_profile("swarmcache", deadline=None)
settings.load_profile("swarmcache")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests are that could always be longer."""
    parser.addoption(
        "--races", type=int, default=200, help="uses of cached files while others are evicted"
    )


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip the tests marked "box" where no box can be made, and say why.

    Not in continuous integration: there they fail, so that nobody takes them for passed.
    """
    box_items = [item for item in items if item.get_closest_marker("box")]
    if not box_items or os.environ.get("CI") == "true":
        return
    reasons = "; ".join(missing())
    if reasons:
        for item in box_items:
            item.add_marker(pytest.mark.skip(reason=f"no cluster in a box: {reasons}"))


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the developer's shell has set."""
    for variable in os.environ:
        if variable.startswith("SWARMCACHE_"):
            monkeypatch.delenv(variable)


@pytest.fixture
def root() -> Iterator[Path]:
    """A cache directory to be, on a real disk, in a place that every user can reach."""
    above = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="swarmcache-test-"))
    above.chmod(0o755)
    yield above / "cache"
    shutil.rmtree(above)


@pytest.fixture
def cache(root: Path) -> Iterator[CacheDir]:
    cache = open_cache(root)
    yield cache
    cache.close()
