"""Brings the index to what is on the disk: the first thing after every start, in the background.

After a kill there is nothing to do. After a power cut the last rows may be missing, and an index
that was lost is made again altogether. Only names, times and the heads of manifests are looked at,
so what is found here is DOUBTFUL until it is digested (``CacheDir.recover_undurable``, or a ``get``
of that very file).

Done in slices: look at some files, then enter them, holding the lock for that alone, so that the
daemon answers meanwhile.

Invariant: what is removed here could never be served: an object without a manifest, a manifest
without an object, a pair that does not belong together, a row without both. No user's link to it
stays behind, where it would be in the way of the next copy.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from swarmcache.cache_index import CacheIndex, Replica, Trust
from swarmcache.chunks import ChunkLayout, FileVersion
from swarmcache.disk_calls import Stamp, disk_errors
from swarmcache.manifest_files import MANIFEST_MAGIC, SUFFIX, decode_header, is_pack, manifest_in
from swarmcache.object_files import ObjectFiles, object_name, read_if_sound
from swarmcache.user_tree import User, UserTree

log = logging.getLogger(__name__)

# Measured with 10,000 files: 100 rows are entered in 1.5 ms, and reading 100 heads takes 4 ms.
SLICE_FILES = 100
# A head has 68 bytes and two names: the real path, and the boot id of a file of one machine.
HEAD_BYTES = 8192
_NAME = re.compile("[0-9a-f]{64}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class StoredBytes(Protocol):
    """``PartialStore.stored_bytes``."""

    def __call__(
        self, version: FileVersion, layout: ChunkLayout, *, packed: bool = False
    ) -> int: ...


@dataclass(slots=True)
class Found:
    """An object and its manifest that belong together, and who has links to it."""

    replica: Replica
    users: Sequence[User]


class IndexRebuild:
    """One comparison of the index with the disk."""

    def __init__(
        self,
        objects: ObjectFiles,
        index: CacheIndex,
        tree: UserTree,
        lock: AbstractContextManager[object],
        boot_id: bytes,
        stored_bytes: StoredBytes,
        drop: Callable[[Replica], None],
    ) -> None:
        """``lock`` guards objects and index; ``drop``, called with it, removes a replica."""
        self._objects = objects
        self._index = index
        self._tree = tree
        self._lock = lock
        self._boot_id = boot_id
        self._stored_bytes = stored_bytes
        self._drop = drop
        self._users: Collection[User] = ()
        self._orphans: dict[bytes, int] = {}  # inodes of what has links of nobody knows whom
        self.found_count = 0
        self.removed_count = 0

    def slices(self) -> Iterator[None]:
        """Do the work, a little between one ``next`` and the other. Raises LocalError."""
        with disk_errors("compare the cache index with the disk"):
            self._users = self._tree.users()
            for first_byte in range(256):
                yield from self._compare(first_byte)
            if self._orphans:
                yield from self._tree.unlink_everywhere(set(self._orphans.values()))
                self._remove_orphans()
        self._index.mark_complete()
        if self.removed_count:
            log.warning("removed %d files and rows without the other half", self.removed_count)
        if self.found_count:
            log.info("found %d copies that the cache index did not list", self.found_count)

    def _compare(self, first_byte: int) -> Iterator[None]:
        """All version ids that begin with this byte: one directory of objects."""
        names = self._names(f"{first_byte:02x}")
        listed = self._index.listed(first_byte)
        objects = {bytes.fromhex(name) for name in names if _NAME.fullmatch(name)}
        beside = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
        manifests = {bytes.fromhex(name) for name in beside if _NAME.fullmatch(name)}
        yield
        halves = (objects ^ manifests) | (listed - objects - manifests)
        for batch in _batches(halves):
            self._remove_halves(batch)
            yield
        for batch in _batches((objects & manifests) - listed):
            self._enter(batch)
            yield

    def _names(self, directory: str) -> set[str]:
        try:
            fd = os.open(directory, _DIRECTORY, dir_fd=self._objects.fd)
        except FileNotFoundError:  # until the first object comes to it
            return set()
        try:
            return set(os.listdir(fd))
        finally:
            os.close(fd)

    # --- pairs without a row ------------------------------------------------------------------

    def _enter(self, version_ids: Sequence[bytes]) -> None:
        found = {version_id: self._look_at(version_id) for version_id in version_ids}
        with self._lock:
            same = []
            for version_id, pair in found.items():
                if pair is None:
                    self._remove_pair(version_id)
                elif self._objects.inode(version_id) == pair.replica.stamp.inode:
                    same.append((pair.replica, pair.users))
            self._index.insert_found(same)
        self.found_count += len(same)

    def _look_at(self, version_id: bytes) -> Found | None:
        """None when the two do not belong together, or one has gone meanwhile."""
        status = self._objects.status(version_id)
        if status is None:
            return None
        try:
            manifest_fd = os.open(object_name(version_id) + SUFFIX, _READ, dir_fd=self._objects.fd)
        except FileNotFoundError:
            return None
        try:
            data = read_if_sound(manifest_fd, HEAD_BYTES)
            manifest_status = os.fstat(manifest_fd)
            if packed := is_pack(data):
                data = read_if_sound(manifest_fd, manifest_status.st_size)
        finally:
            os.close(manifest_fd)
        decoded = decode_header(MANIFEST_MAGIC, manifest_in(data, version_id))
        if decoded is None:
            return None
        version, layout, _ = decoded
        stamp = Stamp.of(status)
        if version.version_id != version_id or version.size_bytes != stamp.size_bytes:
            return None
        users: Sequence[User] = ()
        if status.st_nlink > 1:
            users = self._tree.linked_users(self._users, version.path, stamp.inode)
        replica = Replica(
            version.version_id,
            version.path,
            layout.chunk_size_bytes,
            self._stored_bytes(version, layout, packed=packed),
            Trust.DOUBTFUL,
            self._boot_id,
            # The time that it must have; whether it has shows when it is digested.
            Stamp(stamp.size_bytes, version.mtime_ns, stamp.ctime_ns, stamp.inode),
            created_s=manifest_status.st_mtime,
            last_used_s=status.st_atime,
            verified_s=0.0,
        )
        return Found(replica, users)

    # --- what can never be served -------------------------------------------------------------

    def _remove_halves(self, version_ids: Sequence[bytes]) -> None:
        with self._lock:
            for version_id in version_ids:
                object_there = self._objects.status(version_id) is not None
                manifest_there = self._objects.has_manifest(version_id)
                if object_there and manifest_there:
                    continue  # put in place just now
                replica = self._index.find(version_id)
                if replica is not None:
                    self._drop(replica)
                self.removed_count += replica is not None or object_there or manifest_there
                self._remove(version_id)

    def _remove_pair(self, version_id: bytes) -> None:
        """Called with the lock held. It stays if it was entered meanwhile."""
        if self._index.find(version_id) is None and self._objects.status(version_id) is not None:
            self._remove(version_id)
            self.removed_count += 1

    def _remove(self, version_id: bytes) -> None:
        status = self._objects.status(version_id)
        if status is not None and status.st_nlink > 1:
            # Whose links these are, only the manifest could tell.
            self._orphans[version_id] = Stamp.of(status).inode
        else:
            self._objects.remove(version_id)

    def _remove_orphans(self) -> None:
        """Their links are gone now. One that was taken back or put in place meanwhile stays."""
        for version_id, inode in self._orphans.items():
            with self._lock:
                unlisted = self._index.find(version_id) is None
                if unlisted and self._objects.inode(version_id) == inode:
                    self._objects.remove(version_id)


def _batches(version_ids: Collection[bytes]) -> Iterator[Sequence[bytes]]:
    ordered = sorted(version_ids)
    for start in range(0, len(ordered), SLICE_FILES):
        yield ordered[start : start + SLICE_FILES]
