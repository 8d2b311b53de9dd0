"""Real file systems of a few hundred MiB, each in a file, mounted through the loop device.

    with loop_disk(tmp_path, "xfs", size_mib=320) as disk:
        cache = open_cache(disk.path / "cache")

The image is sparse, so a disk takes no more than what is written to it. Needs root.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# mkfs refuses to make an XFS smaller than 300 MiB since xfsprogs 5.19.
XFS_MIN_MIB = 300
# -m 0: nothing is kept back for root, so that the free space is what the daemon can fill.
MKFS = {
    "ext3": ("mkfs.ext3", "-q", "-F", "-m", "0"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


@dataclass(frozen=True)
class LoopDisk:
    """A mounted disk. Everybody may use ``path``, its top directory."""

    path: Path

    @property
    def capacity_bytes(self) -> int:
        status = os.statvfs(self.path)
        return status.f_blocks * status.f_frsize

    @property
    def free_bytes(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def remount(self, *options: str) -> None:
        """Change mount options, as in ``remount("ro")``."""
        _run("mount", "-o", ",".join(["remount", *options]), str(self.path))

    def unmount(self) -> None:
        """Take the disk away as if it had been pulled out, whoever uses it."""
        _run("umount", "--lazy", str(self.path))


@contextmanager
def loop_disk(above: Path, kind: str, size_mib: int, *mount_options: str) -> Iterator[LoopDisk]:
    """Make and mount a disk below ``above``, which every user must be able to reach."""
    assert kind != "xfs" or size_mib >= XFS_MIN_MIB, "mkfs.xfs would refuse"
    reasons = missing()
    if reasons and os.environ.get("CI") != "true":
        pytest.skip(f"no loop disk: {'; '.join(reasons)}")
    name = f"{kind}-{secrets.token_hex(4)}"
    image, path = above / f"{name}.image", above / name
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    try:
        _run(*MKFS[kind], str(image))
        _run("mount", "-o", ",".join(["loop", *mount_options]), str(image), str(path))
        path.chmod(0o755)
        yield LoopDisk(path)
    finally:
        # Whatever a failed test has left open must not keep the disk; twice if mounted twice.
        while os.path.ismount(path):
            _run("umount", "--lazy", str(path))
        image.unlink()
        path.rmdir()


def missing() -> list[str]:
    """Why no loop disk can be made here."""
    if os.geteuid() != 0:
        return ["mounting needs root"]
    tools = ("mount", "umount", *(command[0] for command in MKFS.values()))
    reasons = [f"{tool} is not installed" for tool in tools if shutil.which(tool) is None]
    if not Path("/dev/loop-control").exists():
        reasons.append("the kernel has no loop device")
    return reasons


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
