"""What all tests share: a clean environment, and a reason wherever a cluster in a box cannot be."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest
from hypothesis import settings

from tests.box import missing

# The machine is shared: how long an example takes says nothing about the code.
settings.register_profile("swarmcache", deadline=None)
settings.load_profile("swarmcache")


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
