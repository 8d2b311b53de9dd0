"""Small files that come into a cache directory together.

Each of them comes whole and verified. So none needs a partial file with a journal; what is done
once for each file of the ordinary way is done once for some of them: setting room aside, finding a
user's directory, a transaction.

Invariant: as in ``cache_dir``. A row is there, DOUBTFUL, from before the object has its name until
its links are made; who looks at objects and rows under the lock finds either both or neither.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress

from swarmcache.cache_index import CacheIndex, Replica, Trust
from swarmcache.chunks import ChunkLayout, FileVersion, Manifest, SmallFile
from swarmcache.disk_calls import Stamp, disk_errors, write_all
from swarmcache.errors import LocalError
from swarmcache.manifest_files import SUFFIX, encode_manifest, encode_pack, is_packed
from swarmcache.object_files import READ_ONLY, ObjectFiles, object_name
from swarmcache.partial_store import PartialStore, Reservation
from swarmcache.user_tree import User, UserTree

log = logging.getLogger(__name__)

# Files that are put in place under the lock at once: as many as one message of a client has.
# Look-ups of hits do not need it, others wait for some ten milliseconds. A transaction writes every
# page once that it has changed, and version ids lie anywhere: with 32 files it was one page for
# each file and index, with more much fewer.
SLICE_FILES = 192
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileBatch:
    """Room for some small files, until ``close``. Made by ``CacheDir.begin_batch``."""

    def __init__(
        self,
        wanted: Sequence[tuple[FileVersion, ChunkLayout]],
        reservation: Reservation,
        partials: PartialStore,
        index: CacheIndex,
        tree: UserTree,
        lock: AbstractContextManager[object],
        *,
        objects: ObjectFiles,
        partial_fd: int,
        boot_id: bytes,
        check_mounted: Callable[[], None],
        drop: Callable[[Replica], None],
    ) -> None:
        """``wanted``: files of which nothing is here. ``drop`` removes what is half in place."""
        self._wanted = {version.version_id: (version, layout) for version, layout in wanted}
        self._reservation = reservation
        self._partials = partials
        self._index = index
        self._tree = tree
        self._lock = lock
        self._objects = objects
        self._partial_fd = partial_fd
        self._boot_id = boot_id
        self._check_mounted = check_mounted
        self._drop = drop

    @property
    def versions(self) -> list[FileVersion]:
        """What there is room for."""
        return [version for version, _ in self._wanted.values()]

    def close(self) -> None:
        """Give the room back that was not needed."""
        self._partials.give_back(self._reservation)

    def install(self, files: Sequence[SmallFile], users: Sequence[User]) -> list[bytes]:
        """Make replicas of files whose bytes have been found to have their digests.

        Others than those in ``versions`` are left out. Returns the version ids, also of those for
        which a user's link could not be made; ``Cache.lookup`` for that user raises with the
        reason. Raises NoSpace, LocalError; what was put in place before stays.
        """
        files = [file for file in files if file.version_id in self._wanted]
        for start in range(0, len(files), SLICE_FILES):
            self._install_some(files[start : start + SLICE_FILES], users)
        return [file.version_id for file in files]

    def _install_some(self, files: Sequence[SmallFile], users: Sequence[User]) -> None:
        with disk_errors("put small files in place"):
            try:
                replicas = [self._write(file) for file in files]
                sharing = self._write_manifests(files)
                with self._lock:
                    self._check_mounted()
                    self._put_in_place(replicas, sharing, users)
            except BaseException:
                self._partials.remove_written([file.version_id for file in files])
                raise

    def _write_manifests(self, files: Sequence[SmallFile]) -> list[bytes]:
        """Write the manifests beside; returns the version ids of those that share the first one's.

        A manifest that is not shared has the name of its own file.
        """
        packed: list[tuple[bytes, bytes]] = []
        for file in files:
            version, layout = self._wanted[file.version_id]
            manifest = encode_manifest(version, Manifest(layout, (file.digest,)))
            if is_packed(version, layout):
                packed.append((file.version_id, manifest))
            else:
                self._write_beside(file.version_id.hex() + SUFFIX, manifest)
        if packed:
            self._write_beside(packed[0][0].hex() + SUFFIX, encode_pack(packed))
        return [version_id for version_id, _ in packed]

    def _write_beside(self, name: str, data: bytes) -> None:
        fd = os.open(name, _NEW, 0o600, dir_fd=self._partial_fd)
        try:
            write_all(fd, data, 0)
        finally:
            os.close(fd)

    def _write(self, file: SmallFile) -> Replica:
        """Write a file beside; returns its row."""
        version, layout = self._wanted[file.version_id]
        name = file.version_id.hex()
        fd = os.open(name, _NEW, READ_ONLY, dir_fd=self._partial_fd)
        try:
            write_all(fd, file.data, 0)
            now_s = time.time()
            os.utime(fd, ns=(int(now_s * 1e9), version.mtime_ns))
            status = os.fstat(fd)
            if stat.S_IMODE(status.st_mode) != READ_ONLY:  # the umask is a tight one
                os.fchmod(fd, READ_ONLY)
        finally:
            os.close(fd)
        return Replica(
            file.version_id,
            version.path,
            layout.chunk_size_bytes,
            self._reservation.size_of(file.version_id),
            Trust.DOUBTFUL,
            self._boot_id,
            Stamp.of(status),
            created_s=now_s,
            last_used_s=now_s,
            verified_s=now_s,
        )

    def _put_in_place(
        self, replicas: Sequence[Replica], sharing: Sequence[bytes], users: Sequence[User]
    ) -> None:
        self._partials.hand_over_some(
            self._reservation,
            [replica.version_id for replica in replicas],
            lambda: self._index.insert_linked(replicas, users),
        )
        try:
            self._move_into_objects([replica.version_id for replica in replicas], sharing)
            for user in users:
                self._link(replicas, user)
            self._index.settle_all(
                [(each.version_id, self._settled(each)) for each in replicas], self._boot_id
            )
        except BaseException:
            for replica in replicas:
                with suppress(LocalError):  # what the disk does not let us finish is noted
                    self._drop(replica)
            raise

    def _move_into_objects(self, ids: Sequence[bytes], sharing: Sequence[bytes]) -> None:
        """Every manifest before its object; the one that is ``sharing``'s under all their names."""
        for version_id in sharing[1:]:
            self._enter(os.link, sharing[0].hex() + SUFFIX, version_id, SUFFIX)
        others = set(ids) - set(sharing[1:])
        for version_id in ids:
            if version_id in others:
                self._enter(os.rename, version_id.hex() + SUFFIX, version_id, SUFFIX)
        for version_id in ids:
            self._enter(os.rename, version_id.hex(), version_id)

    def _enter(
        self, call: Callable[..., None], source: str, version_id: bytes, suffix: str = ""
    ) -> None:
        self._objects.enter(call, source, self._partial_fd, version_id, suffix)

    def _link(self, replicas: Sequence[Replica], user: User) -> None:
        objects = {replica.path: object_name(replica.version_id) for replica in replicas}
        for path, error in self._tree.link_all(user, objects, self._objects.fd).items():
            log.warning("no link for uid %d to %s: %s", user.uid, os.fsdecode(path), error)

    def _settled(self, replica: Replica) -> Stamp:
        """What stat says now that all links are made. Raises LocalError if more has changed."""
        stamp = self._objects.stamp(replica.version_id)
        if stamp is None or not stamp.same_but_for_ctime(replica.stamp):
            raise LocalError(f"the copy of {os.fsdecode(replica.path)} was touched just now")
        return stamp
