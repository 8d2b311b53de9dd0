"""Memory for what is measured, that was in use just now.

A virtual machine gets memory from its host when it is touched for the first time, which takes
longer than what is done with it. Measured: a ``cp`` of 256 MiB takes 0.07 s into memory that an
earlier copy has left, 0.68 s otherwise; and a second file of that size for eight nodes, whose disks
were in memory, took two seconds longer than the first one.
"""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20


def leave_memory(directory: Path, size_bytes: int) -> None:
    """Use so much memory for a file in ``directory``, and leave it to whoever needs some next."""
    scratch = directory / "scratch"
    with scratch.open("wb") as file:
        for _ in range(0, size_bytes, MIB):
            file.write(bytes(MIB))
    scratch.unlink()
