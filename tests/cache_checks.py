"""What must be true of a cache directory whatever has happened to it.

For tests that let the disk fail, cut the power or kill the daemon. They look at the directory from
outside, with the index read by SQLite itself.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from swarmcache.cache_dir import CacheDir
from swarmcache.manifest_files import is_pack

_JOURNAL, _MANIFEST = ".chunks", ".manifest"


def strays(root: Path) -> list[str]:
    """Files below the cache directory that neither the index nor the partial files account for."""
    own = root / ".swarmcache"
    with closing(sqlite3.connect(own / "index.sqlite")) as index:
        known = {
            version_id.hex() for (version_id,) in index.execute("SELECT version_id FROM replica")
        }
    objects = {path.name: path for path in (own / "objects").glob("*/*")}
    found = [
        str(path) for name, path in objects.items() if name.removesuffix(_MANIFEST) not in known
    ]
    # A scratch file of no bytes, which the next start removes where the disk would not.
    partial = {name for name in os.listdir(own / "partial") if not name.startswith("lease-")}
    for name in partial:
        stem = name.removesuffix(_JOURNAL)
        if not {stem, stem + _JOURNAL} <= partial or name not in (stem, stem + _JOURNAL):
            found.append(str(own / "partial" / name))
    # A copy that has to be digested again waits as a partial file, and keeps its links meanwhile.
    linked = [*objects.values(), *(own / "partial").iterdir()]
    inodes = {path.stat().st_ino for path in linked}
    for directory, _, names in os.walk(root):
        if not Path(directory).is_relative_to(own):
            links = [Path(directory) / name for name in names]
            found += [str(link) for link in links if link.stat().st_ino not in inodes]
    return found


def missing(root: Path) -> list[str]:
    """Rows of the index without their files."""
    own = root / ".swarmcache"
    with closing(sqlite3.connect(own / "index.sqlite")) as index:
        known = [
            version_id.hex() for (version_id,) in index.execute("SELECT version_id FROM replica")
        ]
    paths = [own / "objects" / name[:2] / name for name in known]
    return [str(path) for path in paths if not path.exists()]


def _in_index(own: Path) -> set[str]:
    with closing(sqlite3.connect(own / "index.sqlite")) as index:
        rows = index.execute("SELECT version_id FROM replica").fetchall()
    return {version_id.hex() for (version_id,) in rows}


def _is_pack(path: Path) -> bool:
    return path.name.endswith(_MANIFEST) and is_pack(path.read_bytes())


def taken_bytes(root: Path) -> int:
    """What the disk says that objects and manifests take of it, and partial files will take.

    Manifests that share a file count as nothing, see ``manifest_files.PACKED_MAX_BYTES``.
    """
    own = root / ".swarmcache"
    objects = [path.stat() for path in (own / "objects").glob("*/*") if not _is_pack(path)]
    partial = [path.stat() for path in (own / "partial").iterdir()]
    taken = sum(512 * status.st_blocks for status in objects)
    return taken + sum(max(status.st_size, 512 * status.st_blocks) for status in partial)


def assert_sound(cache: CacheDir, root: Path, *, exact: bool = True) -> None:
    """Nothing lies about that nobody knows of, and the account is right to the block.

    Not ``exact``: links may be left in the users' directories, and less may be taken than counted.
    """
    found = [stray for stray in strays(root) if exact or "/.swarmcache/" in stray]
    assert not found, f"nobody knows of {found}"
    assert not missing(root), f"in the index, but not there: {missing(root)}"
    account, taken = cache.status().used_bytes, taken_bytes(root)
    right = account == taken or (account > taken and not exact)
    assert right, f"account of {account} bytes, {taken} taken"


def assert_right(cache: CacheDir, version_id: bytes, path: str | None, data: bytes) -> None:
    """A path that was handed out has the right bytes; what peers would get, too."""
    if path is not None:
        assert Path(path).read_bytes() == data, f"wrong bytes in {path}"
    source = cache.open_source(version_id)
    if source is None:
        return
    try:
        for chunk in range(source.layout.chunk_count):
            if source.has(chunk):
                offset, length = (
                    source.layout.offset_bytes(chunk),
                    source.layout.length_bytes(chunk),
                )
                piece = data[offset : offset + length]
                assert os.pread(source.fd, length, offset) == piece, f"wrong bytes in chunk {chunk}"
    finally:
        source.close()
