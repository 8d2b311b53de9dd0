"""The cache of one node: all its cache directories, seen as one.

A shell: decides nothing about what to fetch, for whom, or what to give up. All classes are
thread-safe. ``lookup``, ``open_source``, ``manifest``, ``status`` and ``user_path`` are quick
enough for an event loop; everything else belongs into worker threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swarmcache.cache_dir import CacheDir, ChunkSource, Partial, Removal, User
from swarmcache.cache_index import Entry
from swarmcache.chunks import FileVersion, Manifest
from swarmcache.messages import DiskStatus

__all__ = ["Cache", "ChunkSource", "Entry", "Partial", "Removal", "User"]


class Cache:
    """What the daemon has of files. Every method is that of ``CacheDir``."""

    def __init__(self, directories: Sequence[CacheDir]) -> None:
        """Takes over the directories: one, for now."""
        [self._directory] = directories

    def close(self) -> None:
        """Keep everything for the next start. Sources that are still open stay valid."""
        self._directory.close()

    # --- replicas -----------------------------------------------------------------------------

    def lookup(self, version: FileVersion, user: User) -> str | None:
        return self._directory.lookup(version, user)

    def user_path(self, version: FileVersion, user: User) -> str:
        return self._directory.user_path(version, user)

    def replicas(self) -> Iterator[bytes]:
        return self._directory.replicas()

    def manifest(self, version_id: bytes) -> Manifest | None:
        return self._directory.manifest(version_id)

    def drop(self, version_id: bytes) -> None:
        self._directory.drop(version_id)

    def flush(self) -> None:
        self._directory.flush()

    def make_durable(self, version_id: bytes) -> None:
        self._directory.make_durable(version_id)

    def list_objects(self) -> Iterator[None]:
        return self._directory.list_objects()

    def recover_undurable(self) -> Iterator[bytes]:
        return self._directory.recover_undurable()

    def open_source(self, version_id: bytes) -> ChunkSource | None:
        return self._directory.open_source(version_id)

    # --- what its users see to themselves -------------------------------------------------------

    def entries(self, path: bytes, user: User | None = None) -> Iterator[list[Entry]]:
        return self._directory.entries(path, user)

    def owner_of(self, path: bytes) -> str | None:
        return self._directory.owner_of(path)

    def linked(self, version_id: bytes) -> list[User]:
        return self._directory.linked(version_id)

    def remove(
        self, version_id: bytes, user: User | None = None, *, even_pinned: bool = False
    ) -> Removal:
        return self._directory.remove(version_id, user, even_pinned=even_pinned)

    def pin(self, version_id: bytes, uid: int) -> None:
        self._directory.pin(version_id, uid)

    def unpin(self, version_id: bytes, uid: int | None) -> None:
        self._directory.unpin(version_id, uid)

    # --- the whole ----------------------------------------------------------------------------

    def begin(self, version: FileVersion, chunk_size_bytes: int) -> Partial:
        return self._directory.begin(version, chunk_size_bytes)

    def status(self) -> DiskStatus:
        return self._directory.status()
