"""Disks for tests: that they are what they say, and gone afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.loop_disks import loop_disk


@pytest.mark.box
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size_mib"), [("ext4", 64), ("xfs", 300)])
def test_a_loop_disk_is_a_disk_of_its_own_and_leaves_nothing_behind(
    tmp_path: Path, kind: str, size_mib: int
) -> None:
    with loop_disk(tmp_path, kind, size_mib) as disk:
        assert 0.5 * (size_mib << 20) < disk.free_bytes <= disk.capacity_bytes <= size_mib << 20
        (disk.path / "file").write_bytes(b"some bytes")
        disk.remount("ro")
        with pytest.raises(OSError, match="Read-only"):
            (disk.path / "file").write_bytes(b"others")
        kept_open = (disk.path / "file").open("rb")
        mounts = Path("/proc/mounts").read_text()
        assert str(disk.path) in mounts

    assert str(disk.path) not in Path("/proc/mounts").read_text()
    assert list(tmp_path.iterdir()) == []
    kept_open.close()
