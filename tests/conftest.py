"""What all tests share: a clean environment, and a reason wherever a cluster in a box cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

BOX_COMMANDS = ("ip", "tc", "sshfs", "setfacl", "unshare")
SFTP_SERVER = Path("/usr/lib/openssh/sftp-server")

# The machine is shared: how long an example takes says nothing about the code.
settings.register_profile("swarmcache", deadline=None)
settings.load_profile("swarmcache")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip the tests marked "box" where no box can be built, and say why."""
    box_items = [item for item in items if item.get_closest_marker("box")]
    reason = _why_no_box() if box_items else None
    if reason is not None:
        for item in box_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the developer's shell has set."""
    for variable in os.environ:
        if variable.startswith("SWARMCACHE_"):
            monkeypatch.delenv(variable)


@cache
def _why_no_box() -> str | None:
    """What this machine lacks for a cluster in a box, or None."""
    if os.geteuid() != 0:
        return "a cluster in a box needs root"
    missing = [command for command in BOX_COMMANDS if shutil.which(command) is None]
    missing += [str(path) for path in (SFTP_SERVER, Path("/dev/fuse")) if not path.exists()]
    if missing:
        return f"a cluster in a box needs {', '.join(missing)}"
    attempt = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "ip", "link", "add", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    if attempt.returncode != 0:
        return f"a cluster in a box needs namespaces and bridges: {attempt.stderr.strip()}"
    return None
