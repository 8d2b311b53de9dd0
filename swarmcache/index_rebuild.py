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
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

from swarmcache.cache_index import CacheIndex, Replica, Trust
from swarmcache.chunks import ChunkLayout, FileVersion
from swarmcache.disk_calls import Stamp, disk_errors, unlink_if_there
from swarmcache.manifest_files import MANIFEST_MAGIC, SUFFIX, decode_header, is_pack, manifest_in
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
        objects_fd: int,
        index: CacheIndex,
        tree: UserTree,
        lock: AbstractContextManager[object],
        boot_id: bytes,
        stored_bytes: StoredBytes,
        drop: Callable[[Replica], None],
    ) -> None:
        """``lock`` guards objects and index; ``drop``, called with it, removes a replica."""
        self._objects_fd = objects_fd
        self._index = index
        self._tree = tree
        self._lock = lock
        self._boot_id = boot_id
        self._stored_bytes = stored_bytes
        self._drop = drop
        self._users: Collection[User] = ()
        self._orphans: dict[str, int] = {}  # inodes of what has links of nobody knows whom
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
        listed = {version_id.hex() for version_id in self._index.listed(first_byte)}
        objects = {name for name in names if _NAME.fullmatch(name)}
        manifests = {n.removesuffix(SUFFIX) for n in names if n.endswith(SUFFIX)}
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
            fd = os.open(directory, _DIRECTORY, dir_fd=self._objects_fd)
        except FileNotFoundError:  # until the first object comes to it
            return set()
        try:
            return set(os.listdir(fd))
        finally:
            os.close(fd)

    def _inode(self, path: str) -> int | None:
        """Inode of an object or manifest as of now; None when there is none."""
        try:
            return Stamp.of(os.stat(path, dir_fd=self._objects_fd, follow_symlinks=False)).inode
        except FileNotFoundError:
            return None

    # --- pairs without a row ------------------------------------------------------------------

    def _enter(self, names: Sequence[str]) -> None:
        found = {name: self._look_at(name) for name in names}
        with self._lock:
            same = []
            for name, pair in found.items():
                if pair is None:
                    self._remove_pair(name)
                elif self._inode(_path(name)) == pair.replica.stamp.inode:
                    same.append((pair.replica, pair.users))
            self._index.insert_found(same)
        self.found_count += len(same)

    def _look_at(self, name: str) -> Found | None:
        """None when the two do not belong together, or one has gone meanwhile."""
        try:
            status = os.stat(_path(name), dir_fd=self._objects_fd, follow_symlinks=False)
            manifest_fd = os.open(_path(name) + SUFFIX, _READ, dir_fd=self._objects_fd)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(manifest_fd, HEAD_BYTES, 0)
            manifest_status = os.fstat(manifest_fd)
            if packed := is_pack(data):
                data = os.pread(manifest_fd, manifest_status.st_size, 0)
        finally:
            os.close(manifest_fd)
        decoded = decode_header(MANIFEST_MAGIC, manifest_in(data, bytes.fromhex(name)))
        if decoded is None:
            return None
        version, layout, _ = decoded
        stamp = Stamp.of(status)
        if version.version_id.hex() != name or version.size_bytes != stamp.size_bytes:
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

    def _remove_halves(self, names: Sequence[str]) -> None:
        with self._lock:
            for name in names:
                object_there = self._inode(_path(name)) is not None
                manifest_there = self._inode(_path(name) + SUFFIX) is not None
                if object_there and manifest_there:
                    continue  # put in place just now
                replica = self._index.find(bytes.fromhex(name))
                if replica is not None:
                    self._drop(replica)
                self.removed_count += replica is not None or object_there or manifest_there
                self._unlink(name)

    def _remove_pair(self, name: str) -> None:
        """Called with the lock held. It stays if it was entered meanwhile."""
        if self._index.find(bytes.fromhex(name)) is None and self._inode(_path(name)) is not None:
            self._unlink(name)
            self.removed_count += 1

    def _unlink(self, name: str) -> None:
        path = _path(name)
        with suppress(FileNotFoundError):
            status = os.stat(path, dir_fd=self._objects_fd, follow_symlinks=False)
            if status.st_nlink > 1:
                # Whose links these are, only the manifest could tell.
                self._orphans[name] = Stamp.of(status).inode
                return
        unlink_if_there(path, self._objects_fd)
        unlink_if_there(path + SUFFIX, self._objects_fd)

    def _remove_orphans(self) -> None:
        """Their links are gone now. One that was taken back or put in place meanwhile stays."""
        for name, inode in self._orphans.items():
            path = _path(name)
            with self._lock:
                unlisted = self._index.find(bytes.fromhex(name)) is None
                if unlisted and self._inode(path) == inode:
                    unlink_if_there(path, self._objects_fd)
                    unlink_if_there(path + SUFFIX, self._objects_fd)


def _batches(names: Collection[str]) -> Iterator[Sequence[str]]:
    ordered = sorted(names)
    for start in range(0, len(ordered), SLICE_FILES):
        yield ordered[start : start + SLICE_FILES]


def _path(name: str) -> str:
    """Where the object of this name is, below the directory of all objects."""
    return f"{name[:2]}/{name}"
