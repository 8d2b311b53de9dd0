"""Real file systems of a few hundred MiB, each in a file, mounted through the loop device.

    with loop_disk(tmp_path, "xfs", size_mib=320) as disk:
        cache = open_cache(disk.path / "cache")

The image is sparse, so a disk takes no more than what is written to it. Needs root.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# mkfs refuses to make an XFS smaller than 300 MiB since xfsprogs 5.19.
XFS_MIN_MIB = 300
# -m 0: nothing is kept back for root, so that the free space is what the daemon can fill.
FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): ext4 and XFS
NO_LOG_FLUSH = struct.pack("I", 2)
MKFS = {
    "ext3": ("mkfs.ext3", "-q", "-F", "-m", "0"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


@dataclass(frozen=True)
class LoopDisk:
    """A mounted disk. Everybody may use ``path``, its top directory."""

    path: Path
    image: Path
    mount_options: tuple[str, ...] = ()

    def mount(self) -> None:
        """Mount it, or mount it again after it was lost, when nobody uses it any more."""
        options = ",".join(["loop", *self.mount_options])
        _run("mount", "-o", options, str(self.image), str(self.path))
        self.path.chmod(0o755)

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

    def shut_down(self) -> None:
        """What a file system does when its device has died: from now on everything is EIO."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(fd)

    def make_read_only(self) -> None:
        """What ext4 does to a disk in which it finds damage, if mounted with errors=remount-ro.

        Unlike a remount this happens also while files are open for writing.
        """
        device = _device_at(self.path)
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("damaged by a test")


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
        disk = LoopDisk(path, image, mount_options)
        disk.mount()
        yield disk
    finally:
        # Whatever a failed test has left open must not keep the disk; twice if mounted twice.
        while _device_at(path) is not None:
            _run("umount", "--lazy", str(path))
        image.unlink()
        path.rmdir()


def _device_at(path: Path) -> str | None:
    """The name of the device that is mounted there. Not by stat, which a dead disk refuses."""
    for line in Path("/proc/mounts").read_text().splitlines():
        device, place = line.split()[:2]
        if place == os.fspath(path):
            return os.path.basename(device)
    return None


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
