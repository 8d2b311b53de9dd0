"""One cache directory: replicas, partial files, free space.

    <cache.dir>/.swarmcache/index.sqlite           which replicas there are
    <cache.dir>/.swarmcache/objects/ab/<id>        a replica, read-only, with the source's mtime
    <cache.dir>/.swarmcache/objects/ab/<id>.manifest   its digests, see ``manifest_files``
    <cache.dir>/.swarmcache/partial/<id>           being fetched, its space reserved
    <cache.dir>/.swarmcache/partial/<id>.chunks    journal of the chunks that it has
    <cache.dir>/<user>/<real path of the source>   hard link to the replica

A shell: decides nothing about what to fetch, for whom, or what to give up. All classes are
thread-safe. ``lookup``, ``open_source``, ``manifest``, ``status`` and ``user_path`` are quick
enough for an event loop; everything else belongs into worker threads.

Invariant: a path that ``lookup`` or ``publish`` returns is a link to a file whose every chunk has
been verified, and which has not been touched since. A kill at any moment keeps that true.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from swarmcache.cache_index import CacheIndex, Replica, Trust
from swarmcache.cache_listing import CacheListing
from swarmcache.chunk_sources import ChunkSource, OpenReplicas
from swarmcache.chunks import ChunkLayout, FileVersion, Manifest, SmallFile
from swarmcache.clock import boot_id
from swarmcache.disk_calls import (
    LastUsesLock,
    Stamp,
    disk_errors,
    status_within,
    sync_file_system,
    unlink_if_there,
    write_all,
)
from swarmcache.errors import CacheDirUnusable, DiskFailed, LocalError, NoSpace
from swarmcache.evictor import Evictor
from swarmcache.file_batch import FileBatch
from swarmcache.in_use import UseCheck
from swarmcache.index_rebuild import SLICE_FILES, IndexRebuild
from swarmcache.manifest_files import SUFFIX, encode_manifest
from swarmcache.messages import DiskStatus, ReplicaPlace
from swarmcache.object_files import ObjectFiles, finish, object_name
from swarmcache.own_directory import check_ours
from swarmcache.partial import Partial
from swarmcache.partial_store import PartialStore, SpaceLimits
from swarmcache.retention import Retention
from swarmcache.user_tree import User, UserTree, open_cache_root
from swarmcache.uses import Uses

__all__ = ["CacheDir", "Partial", "User"]

log = logging.getLogger(__name__)

# So many copies that were in doubt, or those of so much time, are made durable and told of
# together; ``get`` does not wait for that. Seldom, since what others have written is synced along.
RECOVERED_MAX = 1000
RECOVERED_S = 10.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAKE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def go_on(size_bytes: int) -> None:
    """After each piece that was digested: nothing."""


class Removal(Enum):
    """How an attempt to remove a replica ends."""

    GONE = "the file is gone"
    UNLINKED = "the user's link is gone; others have theirs"
    PINNED = "it is pinned, and stays"
    ABSENT = "there is none, or none for this user"


@dataclass(frozen=True, slots=True)
class Damaged:
    """A copy that was taken out and waits as a partial file: fetch what of it is wrong.

    ``users``: those whose links are gone with it.
    """

    version: FileVersion
    chunk_size_bytes: int
    users: tuple[User, ...] = ()


class CacheDir:
    """The files below one cache directory. One process at a time can have it open."""

    def __init__(
        self,
        root: Path,
        *,
        min_free: Callable[[int], int],
        max_usage: Callable[[int], int],
        min_age_s: float = 0.0,
        max_age_s: float | None = None,
        make: bool = True,
    ) -> None:
        """Open the cache directory without reading what is in it.

        ``min_free`` and ``max_usage`` take the capacity of the disk and return the space that
        stays free, and the space that the cache may take, all in bytes. ``min_age_s``: a replica
        used within this time is not evicted; ``max_age_s``: one that was not used for so long goes,
        but not before ``min_age_s``. ``make``: whether a directory that is not there is made, or
        taken for one whose disk is not mounted.
        Raises DirectoryUnusable with what to do about it; DiskFailed, LocalError when the disk
        fails.
        """
        self._boot_id = boot_id()
        # Guards objects, links and what the index says of them; held for well under 1 ms each.
        self._objects_lock = LastUsesLock()
        self._damaged: dict[bytes, Damaged | None] = {}
        self._damaged_lock = threading.Lock()
        self._uses = Uses()
        # Where the disk failed in the middle of it, for ``flush`` to finish.
        self._half_dropped: dict[bytes, Replica] = {}
        self._half_linked: set[str] = set()
        with ExitStack() as stack:
            path, self._root_fd = open_cache_root(os.fspath(root), make=make)
            stack.callback(os.close, self._root_fd)
            self.path = os.fsdecode(path)
            own = self.path + "/.swarmcache"
            self._open_directories(stack, path, own)
            self._sources = OpenReplicas(self._objects.open)
            self._index = CacheIndex(own + "/index.sqlite")
            stack.callback(self._index.close)
            self._listed = self._index.complete or self._begin_empty(own)
            self._use_check = UseCheck(self._partial_fd)
            self.file_system = self._use_check.file_system
            self._evictor = Evictor(self._index, self._uses, self, min_age_s)
            self.listing = CacheListing(
                path,
                self._index,
                self._objects,
                self._uses,
                self._evictor,
                min_age_s=min_age_s,
                boot_id=self._boot_id,
            )
            self._retention: Retention | None = None
            if max_age_s is not None:
                kept_s = max(max_age_s, min_age_s)
                self._retention = Retention(
                    self._index, self._uses, self._evictor, self._boot_id, kept_s
                )
            self._partials = PartialStore(
                self._partial_fd,
                SpaceLimits(min_free, max_usage, min_age_s),
                self._replicas_taken,
                self._evictor.make_room,
                self._install,
                self._tree.unlink_all,
            )
            self._abandoned = False
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Keep everything for the next start. Sources that are still open stay valid."""
        self._partials.close()
        self._sources.let_go_of_all()
        with self._resources:
            if not self._abandoned:
                self.flush()

    # --- losing the disk ----------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise DiskFailed when the directory is gone, hidden, or cannot be written. Quick."""
        with disk_errors(f"use {self.path}"):
            self._check_mounted()
            os.utime(self._lock_fd)  # a change that needs no room

    def probe(self) -> None:
        """The same, and ask the device itself. Slow: it fsyncs. Raises DiskFailed."""
        self.check_alive()
        with disk_errors(f"use {self.path}"):
            os.fsync(self._lock_fd)

    def abandon(self) -> list[Partial]:
        """The disk is lost: never write to it again.

        Returns the partial files that are lost with it; ``close_partials`` ends them. The
        descriptors stay open until ``close``, so that no thread that is still at work finds another
        file under their numbers.
        """
        self._abandoned = True
        self._sources.let_go_of_all()
        return self._partials.abandon()

    def close_partials(self) -> None:
        """End all open partial files; who writes to one gets a LocalError from now on."""
        self._partials.close()

    def _check_mounted(self) -> None:
        """Raise DiskFailed when the path no longer leads to what was opened."""
        ours = os.fstat(self._root_fd)
        try:
            there = os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DiskFailed(f"{self.path} is no longer there (is its disk mounted?)") from error
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise DiskFailed(f"{self.path} is another directory now (is its disk mounted?)")
        if os.fstat(self._lock_fd).st_nlink == 0:
            raise DiskFailed(f"somebody has removed {self.path}/.swarmcache")

    # --- replicas -----------------------------------------------------------------------------

    def lookup(self, version: FileVersion, user: User) -> str | None:
        """Path of a verified replica for this user, None when there is none.

        Makes the user's link where it is missing. A replica that is not what it was when it was
        published is dropped. Raises CacheDirUnusable when this user's link cannot be made,
        LocalError when the disk fails.
        """
        version_id = version.version_id
        found = self._index.find_for(version_id, user)
        if found is None:
            return None
        if not self._uses.note_used(version_id, time.time()):
            return None  # it is being evicted
        replica, linked = found
        path = self._tree.path(user, version.path)
        if not (linked and replica.trusted(self._boot_id) and self._is(path, replica.stamp)):
            # Or else a disk that was unmounted would look like one whose files were removed.
            with disk_errors(f"use {self.path}"):
                self._check_mounted()
            with self._objects_lock:
                checked = self._checked(version_id)
                if checked is None:
                    return None
                _, failed = self._link(checked, [user])
            if failed:
                raise failed[user.uid]
        return os.fsdecode(path)

    def lookup_many(self, versions: Sequence[FileVersion], user: User) -> list[str | None]:
        """``lookup`` for many; one that cannot be looked up is left out. Raises DiskFailed."""
        version_ids = [each.version_id for each in versions]
        ready = self._index.find_ready(version_ids, user, self._boot_id)
        # Those that are not here at all, often most of them, shall not cost a query each.
        listed = self._index.listed_among([each for each in version_ids if each not in ready])
        now_s = time.time()
        return [
            self._ready_path(each, user, ready, now_s)
            if each.version_id in ready or each.version_id in listed
            else None
            for each in versions
        ]

    def _ready_path(
        self, version: FileVersion, user: User, ready: dict[bytes, Stamp], now_s: float
    ) -> str | None:
        stamp = ready.get(version.version_id)
        try:
            if stamp is None:
                return self.lookup(version, user)
            if not self._uses.note_used(version.version_id, now_s):
                return None  # it is being evicted
            path = self._tree.path(user, version.path)
            return os.fsdecode(path) if self._is(path, stamp) else self.lookup(version, user)
        except DiskFailed:
            raise
        except LocalError as error:
            log.info("cannot look up a copy: %s", error)
            return None

    def user_path(self, version: FileVersion, user: User) -> str:
        """Where the user's copy is or would be. Raises CacheDirUnusable."""
        return os.fsdecode(self._tree.path(user, version.path))

    def make_directories(self, path: bytes, user: User) -> None:
        """See ``UserTree.make_directories``."""
        self._tree.make_directories(user, path)

    def place(self, version_id: bytes, user: str) -> ReplicaPlace | None:
        """Where the replica is for the user of this name, if it is what it was when it was
        published; one that is not is taken out. Nothing is handed out, and no link is made.

        Raises CacheDirUnusable for a name that cannot have copies.
        """
        directory = self._tree.directory(User(-1, user))
        with disk_errors(f"use {self.path}"):
            self._check_mounted()
        with self._objects_lock:
            if self._uses.leaving(version_id) or self._checked(version_id) is None:
                return None
            linked = any(user == each.name for each in self._index.links(version_id))
        return ReplicaPlace(directory, linked)

    def renew(self, version_id: bytes) -> bool:
        """Whether there is a replica that is what it was when it was published; it counts as used
        now, though nobody gets it. Raises LocalError."""
        with disk_errors(f"use {self.path}"):
            self._check_mounted()
        with self._objects_lock:
            if self._checked(version_id) is None:
                return False
            return self._uses.note_used(version_id, time.time())

    def replicas(self) -> Iterator[bytes]:
        """Version ids of all verified replicas."""
        return self._index.trusted_ids(self._boot_id)

    def manifest(self, version_id: bytes) -> Manifest | None:
        """The digests of a replica; None when there is none, or its manifest is damaged."""
        decoded = self._objects.manifest(version_id)
        return decoded[1] if decoded else None

    def drop(self, version_id: bytes) -> None:
        """Remove a replica and all links to it; nothing happens when there is none."""
        with self._objects_lock:
            replica = self._index.find(version_id)
            if replica is not None:
                self._drop(replica)

    # --- what its users see to themselves, see also ``listing`` -----------------------------------

    def removal(
        self, version_id: bytes, user: User | None = None, even_pinned: bool = False
    ) -> Removal:
        """What ``remove`` would do."""
        links = self._index.links(version_id)
        if (user is not None and user not in links) or self._index.find(version_id) is None:
            return Removal.ABSENT
        pinned_by = self._index.pinned_by(version_id)
        if not even_pinned and (pinned_by if user is None else user.uid in pinned_by):
            return Removal.PINNED
        last = user is None or (links == [user] and set(pinned_by) <= {user.uid})
        return Removal.GONE if last else Removal.UNLINKED

    def remove(
        self, version_id: bytes, user: User | None = None, even_pinned: bool = False
    ) -> Removal:
        """Take a replica and its pins away from one user, or (None) from everybody.

        The file goes when nobody has a link to it any more, and nobody else has pinned it.
        """
        with self._objects_lock:
            removal = self.removal(version_id, user, even_pinned)
            replica = self._index.find(version_id)
            if replica is None or removal in (Removal.ABSENT, Removal.PINNED):
                return removal
            self._index.unpin(version_id, None if user is None else user.uid)
            if user is None or removal is Removal.GONE:
                self._drop(replica)
            else:
                self._unlink(replica, user)
            return removal

    def pin(self, version_id: bytes, uid: int) -> bool:
        """Keep a file version until the same user unpins it; whether there is a replica of it."""
        self._uses.note_used(version_id, time.time())  # who is about to evict it thinks again
        with self._objects_lock:  # as whoever removes it has
            self._index.pin(version_id, uid)
            return self._index.find(version_id) is not None

    def unpin(self, version_id: bytes, uid: int | None) -> None:
        """Take away the pin of one user, or (None) of everybody."""
        self._index.unpin(version_id, uid)

    # --- the disk -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the times of last use into the index, keep its log short, finish what failed.

        To be called every now and then; a kill loses the times noted since. Raises LocalError.
        """
        try:  # what frees room first, since the index may need it
            self._finish_what_failed()
        finally:
            self._uses.flush(self._index.touch)
            self._index.shorten_log()

    def _finish_what_failed(self) -> None:
        """Raises LocalError for what still fails; the others are finished all the same."""
        failed: LocalError | None = None
        with self._objects_lock:
            for replica in list(self._half_dropped.values()):
                try:
                    self._drop(replica)
                except LocalError as error:
                    failed = failed or error
            self._clear_scratch()
        self._partials.tidy()
        if failed is not None:
            raise failed

    def make_durable(self, version_id: bytes) -> None:
        """Bring a replica onto the disk, so that it outlives a power cut. Slow.

        A copy whose fsync fails is dropped, since nobody knows what of it the disk has: fsync
        reports an error once and would then succeed. Raises LocalError in that case.
        """
        with ExitStack() as stack, disk_errors(f"sync {object_name(version_id)}"):
            self._check_mounted()
            try:
                fds = self._objects.open_to_sync(stack, version_id)
            except FileNotFoundError:
                return  # dropped meanwhile
            inode = Stamp.of(os.fstat(fds[0])).inode
            try:
                for fd in fds:
                    os.fsync(fd)
            except OSError:
                with self._objects_lock:
                    replica = self._index.find(version_id)
                    if replica is not None and replica.stamp.inode == inode:
                        self._lose(version_id)
                raise
        # Under the lock nobody is making a link, which would write back the trust of before.
        with self._objects_lock:
            self._index.mark_durable({version_id: inode})
        self._index.sync()

    def list_objects(self) -> Iterator[None]:
        """Compare the index with what is on the disk, as the first thing after a start. Slow.

        Works between one ``next`` and the other, a few milliseconds each. Raises LocalError.
        """
        rebuild = IndexRebuild(
            self._objects,
            self._index,
            self._tree,
            self._objects_lock,
            self._boot_id,
            self._partials.stored_bytes,
            self._drop,
        )
        for _ in rebuild.slices():
            self._index.shorten_log()
            yield
        self._listed = True

    def recover_undurable(
        self, after_piece: Callable[[int], None] = go_on
    ) -> Iterator[list[bytes]]:
        """Digest the replicas that a power cut or a kill has left in doubt. Very slow.

        Yields the version ids of those that are good, some at a time; the others are taken out, see
        ``take_damaged``. Until then ``lookup`` does not know them, but ``begin`` does.
        ``after_piece`` as for ``verify``. Raises LocalError when the disk fails.
        """
        good: list[bytes] = []
        began_s = time.monotonic()
        for version_id in self._index.untrusted_ids(self._boot_id):
            if self._recover(version_id, after_piece):
                good.append(version_id)
                self._index.shorten_log()
            if len(good) >= RECOVERED_MAX or time.monotonic() > began_s + RECOVERED_S:
                self._make_all_durable(good, self._index.doubt)
                yield good
                good, began_s = [], time.monotonic()
        self._make_all_durable(good, self._index.doubt)
        yield good

    def make_all_durable(self, version_ids: Sequence[bytes]) -> None:
        """As ``make_durable``, with one call for all of them that are here.

        Every fsync empties the cache of the drive, which takes longer than to fetch or to digest a
        small file. Where the one call fails, nobody knows for which of them: all are dropped.
        Nobody else may make a replica of one of them anew meanwhile. Raises LocalError.
        """
        self._make_all_durable(version_ids, self._lose)

    def _make_all_durable(
        self, version_ids: Sequence[bytes], failed: Callable[[bytes], None]
    ) -> None:
        inodes = {version_id: self._objects.inode(version_id) for version_id in version_ids}
        version_ids = [version_id for version_id in version_ids if inodes[version_id]]
        if not version_ids:
            return
        try:
            with disk_errors("sync the file system of the cache"):
                self._check_mounted()
                sync_file_system(self._objects.fd)
        except LocalError:
            with self._objects_lock:
                for version_id in version_ids:
                    failed(version_id)
            raise
        for start in range(0, len(version_ids), SLICE_FILES):
            some = version_ids[start : start + SLICE_FILES]
            with self._objects_lock:
                self._index.mark_durable({each: inodes[each] for each in some})
        self._index.sync()

    def verify(
        self, version_id: bytes, after_piece: Callable[[int], None] = go_on
    ) -> list[int] | None:
        """Digest a replica: the chunks that are not what they were. None when there is no replica.

        One that has such chunks, or was touched, is taken out; ``take_damaged`` tells of it.
        ``after_piece`` is called with the number of bytes after each piece, and may wait, or raise
        to give up. What this can see and what not is said in ``quiet_read``. Very slow. Raises
        LocalError when the disk fails.
        """
        replica = self._index.find(version_id)
        if replica is None or not replica.trusted(self._boot_id):
            return None
        shown = os.fsdecode(replica.path)
        with ExitStack() as stack, disk_errors(f"check the copy of {shown}"):
            fd, stamp = self._objects.open_in(stack, version_id)
            bad = self._objects.bad_chunks(version_id, fd, after_piece)
            with self._objects_lock:
                replica = self._checked(version_id)
                if replica is None:
                    # Taken out or dropped by somebody else, perhaps before it could be opened.
                    return None if stamp is None else bad
                if stamp is None or replica.stamp.inode != stamp.inode:
                    return []  # another one has taken its place just now
                if bad:
                    log.warning(
                        "%d chunks of the copy of %s are rotten: taken out", len(bad), shown
                    )
                    self._take_out(replica)
                else:
                    self._index.mark_verified(version_id, time.time())
                return bad

    def stalest(self, before_s: float) -> tuple[float, bytes] | None:
        """When the replica that waits longest for ``verify`` was last digested, and its version id.

        None when all have been since ``before_s``.
        """
        return self._index.stalest(self._boot_id, before_s)

    def take_damaged(self) -> dict[bytes, Damaged | None]:
        """The copies that were taken out, or could not be made durable, since the last call and did
        not come again, by version id.

        None for one of which nothing was of use any more.
        """
        with self._damaged_lock:
            damaged, self._damaged = self._damaged, {}
        return damaged

    def open_source(self, version_id: bytes) -> ChunkSource | None:
        """The chunks of a replica or partial file, to serve them; the caller closes it.

        None when there is neither. Raises LocalError when the disk fails.
        """
        partial = self._partials.find(version_id)
        if partial is not None and partial.file.retain():
            return ChunkSource(partial.file, partial.layout, partial.has)
        replica = self._index.find(version_id)
        if replica is None:
            return None
        source = self._open_replica(replica)
        if source is not None and replica.trusted(self._boot_id):
            with disk_errors("look at a replica"):
                if Stamp.of(os.fstat(source.fd)) == replica.stamp:
                    return source
        if source is not None:
            source.close()
        # Not as the index says: changed by somebody, or by us just now.
        with self._objects_lock:
            checked = self._checked(version_id)
            return self._open_replica(checked) if checked else None

    # --- the whole ----------------------------------------------------------------------------

    def begin(
        self, version: FileVersion, chunk_size_bytes: int, *, may_evict: bool = True
    ) -> Partial:
        """Reserve the space for a file and open it, or resume what there is of it.

        A complete copy that is not known to be right is resumed as well: its chunks become claims
        for ``Partial.recover``. Only one at a time for a version. ``may_evict``: whether others are
        given up where there is no room. Raises NoSpace within the limits set, and LocalError.
        """
        self.check_alive()
        taken_back = self._take_back(version.version_id)
        if taken_back is not None:
            chunk_size_bytes = taken_back.chunk_size_bytes
        return self._partials.begin(version, chunk_size_bytes, may_evict=may_evict)

    def begin_batch(
        self, versions: Sequence[FileVersion], chunk_size_bytes: int, *, may_evict: bool = True
    ) -> FileBatch | None:
        """Set room aside for those of some small files of which nothing is here, in whatever form
        or version, and none is in ``take_damaged``; None when there are no such files.

        None of them may be begun meanwhile. Raises NoSpace within the limits set, and LocalError.
        """
        self.check_alive()
        version_ids = [version.version_id for version in versions]
        # As for ``knows``: the index may not list all objects yet.
        here = self._index.listed_among(version_ids) | self._objects.ids(version_ids).keys()
        known_paths = self._index.known_paths([version.path for version in versions])
        wanted = [
            (version, ChunkLayout(version.size_bytes, chunk_size_bytes))
            for version in versions
            if version.version_id not in here
            and version.path not in known_paths
            and version.version_id not in self._damaged
            and not self._partials.knows(version.version_id)
        ]
        if not wanted:
            return None
        return FileBatch(
            wanted,
            self._partials.reserve_all(wanted, may_evict=may_evict),
            self._partials,
            self._index,
            self._tree,
            self._objects_lock,
            objects=self._objects,
            partial_fd=self._partial_fd,
            boot_id=self._boot_id,
            check_mounted=self._check_mounted,
            drop=self._drop,
        )

    def read_files(self, version_ids: Sequence[bytes]) -> list[SmallFile]:
        """The replicas among these that have a single chunk, to serve them to a peer.

        Raises LocalError when the disk fails.
        """
        found = self._index.find_all(version_ids)
        files = [self._read_file(replica) for replica in found.values()]
        return [file for file in files if file is not None]

    def _read_file(self, replica: Replica) -> SmallFile | None:
        """None for one that has more chunks, or is not what the index says; others look into it."""
        layout = ChunkLayout(replica.stamp.size_bytes, replica.chunk_size_bytes)
        if layout.chunk_count != 1 or not replica.trusted(self._boot_id):
            return None
        manifest = self.manifest(replica.version_id)
        with disk_errors("read a replica"):
            try:
                fd = self._objects.open(replica.version_id)
            except FileNotFoundError:
                return None
            try:
                data = os.read(fd, layout.size_bytes)
                as_expected = Stamp.of(os.fstat(fd)) == replica.stamp
            finally:
                os.close(fd)
        if manifest is None or not as_expected or len(data) != layout.size_bytes:
            return None
        return SmallFile(replica.version_id, manifest.digests[0], data)

    def knows(self, version_id: bytes) -> bool:
        """Whether there is a replica, trusted or not, or a partial file. Raises LocalError."""
        # Not what the index says: it may not list all of them yet.
        return self._partials.knows(version_id) or self._objects.stamp(version_id) is not None

    def count_beside(self, path: bytes) -> int:
        """How many replicas there are of sources in the same directory; counts to 1000."""
        return self._index.count_beside(path)

    def count_below(self, directory: bytes) -> int:
        """How many replicas there are of sources below a directory; counts to 1000."""
        return self._index.count_below(directory)

    def room_bytes(self) -> int:
        """How much more the limits allow. Raises LocalError when the disk fails."""
        return self._partials.room_bytes()

    def attainable_bytes(self) -> int:
        """How much room there would be if all was evicted that may be. Slow. Raises LocalError."""
        return max(0, self._partials.balance_bytes() + self._evictor.spare_bytes())

    def pinned_bytes(self) -> int:
        """What the pinned replicas take. Slow. Raises LocalError."""
        return self._evictor.pinned_bytes()

    def needed_bytes(self, version: FileVersion) -> int | None:
        """What of ``attainable_bytes`` would be lost to a file that stays, or is being fetched.

        None where there is nothing of it. Raises LocalError.
        """
        version_id = version.version_id
        if not self.knows(version_id):
            return None
        return self._evictor.spare_bytes(version_id)

    def wanted_bytes(self, version: FileVersion, chunk_size_bytes: int) -> int:
        """What is to be reserved for a file of which nothing is here. Raises LocalError."""
        return self._partials.wanted_bytes(
            version, ChunkLayout(version.size_bytes, chunk_size_bytes)
        )

    def status(self) -> DiskStatus:
        """Room on the disk; what partial files have reserved counts as used. Raises LocalError."""
        file_count, stored_bytes = self._index.totals()
        with disk_errors("ask for free space"):
            disk = os.fstatvfs(self._root_fd)
        return DiskStatus(
            capacity_bytes=disk.f_blocks * disk.f_frsize,
            free_bytes=disk.f_bavail * disk.f_frsize,
            used_bytes=stored_bytes + self._partials.reserved_bytes(),
            file_count=file_count,
        )

    # --- opening ------------------------------------------------------------------------------

    def _begin_empty(self, own: str) -> bool:
        """Whether an index that lists nothing yet is right, since there is nothing to list."""
        with disk_errors("list the objects"):
            empty = not os.listdir(self._objects.fd)
        if empty:
            self._index.mark_complete()
        elif self._index.lost:
            log.warning(
                "the cache index in %s is %s: made again from the files, but without the pins",
                own,
                self._index.lost,
            )
        return empty

    def _replicas_taken(self) -> tuple[int, int]:
        """How many replicas there are, and what all take; until that is known, what is in use."""
        if self._listed:
            return self._index.totals()
        disk = os.fstatvfs(self._root_fd)
        return 0, (disk.f_blocks - disk.f_bfree) * disk.f_frsize

    def _open_directories(self, stack: ExitStack, path: bytes, own: str) -> None:
        """What is the daemon's ``own`` of the cache directory, and where its users have theirs."""
        with disk_errors(f"open {own}"):
            status = os.fstat(self._root_fd)
            self._root, self._root_id = path, (status.st_dev, status.st_ino)
            self._device = status.st_dev
            own_fd = self._open_directory(stack, ".swarmcache", self._root_fd)
            check_ours(own_fd, own, "cache.dir", forbidden=0o077)
            self._lock_fd = self._lock_directory(stack, own_fd, own)
            self._objects = ObjectFiles(self._open_directory(stack, "objects", own_fd))
            self._partial_fd = self._open_directory(stack, "partial", own_fd)
            self._tree = UserTree(path, self._root_fd)

    def _open_directory(self, stack: ExitStack, name: str, above_fd: int) -> int:
        with suppress(FileExistsError):  # from an earlier start
            os.mkdir(name, 0o700, dir_fd=above_fd)
            os.fsync(above_fd)  # or else a power cut takes all that is below, durable or not
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=above_fd)
        except NotADirectoryError as error:
            raise CacheDirUnusable(
                f"{name} in the cache directory is no directory: remove it"
            ) from error
        stack.callback(os.close, fd)
        return fd

    def _lock_directory(self, stack: ExitStack, own_fd: int, own: str) -> int:
        try:
            fd = os.open("lock", _MAKE, 0o600, dir_fd=own_fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise CacheDirUnusable(f"{own}/lock is no file: remove it") from error
            raise
        stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheDirUnusable(
                f"another daemon uses {own}: stop it, or name another directory in cache.dir"
            ) from error
        return fd

    # --- replicas, inside ---------------------------------------------------------------------

    def _is(self, path: bytes, stamp: Stamp) -> bool:
        """Whether the object is what it was, and the user's link leads to it.

        Not by one ``lstat``, which is quicker: a link that is listed may not have been made, since
        its user has mounted something on the way, and a file system of theirs need never answer.
        """
        try:
            root = os.lstat(self._root)
            if (root.st_dev, root.st_ino) != self._root_id:
                return False
            status = status_within(path[len(self._root) + 1 :], self._root_fd)
        except OSError:
            return False  # whatever it is, the slow way finds out
        return status.st_dev == self._device and Stamp.of(status) == stamp

    def _checked(self, version_id: bytes) -> Replica | None:
        """The replica if it may be handed out. One that somebody has touched is taken out."""
        replica = self._index.find(version_id)
        if replica is None or not replica.trusted(self._boot_id):
            return None
        if self._uses.leaving(version_id):
            return None  # its files may be gone already, and nobody but us has touched them
        stamp = self._objects.stamp(version_id)
        if stamp == replica.stamp:
            return replica
        log.warning(
            "the copy of %s was touched (%s, expected %s): taken out",
            os.fsdecode(replica.path),
            stamp,
            replica.stamp,
        )
        self._take_out(replica)
        return None

    def _link(
        self, replica: Replica, users: Sequence[User]
    ) -> tuple[dict[int, str], dict[int, LocalError]]:
        """Make links to an object: the path, or the reason why there is none, per uid.

        Afterwards the index has the new ctime, and a doubtful replica is a written one. When the
        index fails in between, the replica stays in doubt and the LocalError is raised.
        """
        version_id = replica.version_id
        paths: dict[int, str] = {}
        failed: dict[int, LocalError] = {}
        displaced = self._doubt_other_versions(replica)
        self._index.doubt(version_id, users)
        for user in users:
            try:
                paths[user.uid] = self._link_one(replica, user)
            except LocalError as error:
                failed[user.uid] = error
        self._settle(replica, [user for user in users if user.uid in paths])
        for other in displaced:
            self._settle(other)
        return paths, failed

    def _doubt_other_versions(self, replica: Replica) -> list[Replica]:
        """Other versions of the same source, whose link count changes when a link gives way."""
        ids = set(self._index.versions_of(replica.path)) - {replica.version_id}
        checked = [self._checked(version_id) for version_id in sorted(ids)]
        others = [other for other in checked if other is not None]
        for other in others:
            self._index.doubt(other.version_id)
        return others

    def _settle(self, replica: Replica, linked: Sequence[User] = ()) -> None:
        """Note the ctime that links made or taken have left. Raises LocalError if more changed."""
        stamp = self._objects.stamp(replica.version_id)
        if stamp is None or not stamp.same_but_for_ctime(replica.stamp):
            raise LocalError(f"the copy of {os.fsdecode(replica.path)} was touched just now")
        trust = max(replica.trust, Trust.WRITTEN)
        self._index.settle(replica.version_id, stamp, trust, self._boot_id, linked)

    def _link_one(self, replica: Replica, user: User) -> str:
        path = self._tree.path(user, replica.path)
        scratch = replica.version_id.hex() + ".link"
        self._clear_scratch()
        self._half_linked.add(scratch)
        self._tree.link(
            user,
            replica.path,
            (object_name(replica.version_id), self._objects.fd),
            (scratch, self._partial_fd),
            self._index.versions_of(replica.path).values(),
        )
        self._half_linked.discard(scratch)
        return os.fsdecode(path)

    def _clear_scratch(self) -> None:
        with disk_errors("remove a scratch link"):
            for name in list(self._half_linked):
                unlink_if_there(name, self._partial_fd)
                self._half_linked.discard(name)

    def _unlink(self, replica: Replica, user: User) -> None:
        """Take one user's link away. In doubt meanwhile, since the object's ctime changes."""
        settled = self._checked(replica.version_id)
        self._index.doubt(replica.version_id)
        self._tree.unlink(user, replica.path, replica.stamp.inode)
        self._index.unlink(replica.version_id, user)
        if settled is not None:
            self._settle(settled)

    def _drop(self, replica: Replica) -> None:
        """Remove links, files and row, in this order, so that after a kill it can be repeated.

        After a failure of the disk ``flush`` repeats it.
        """
        self._half_dropped[replica.version_id] = replica
        with suppress(NoSpace):  # to remove a file needs no room, and gives some
            self._index.doubt(replica.version_id)
        self._remove_files(replica)
        self._sources.let_go(replica.version_id)
        self._index.delete(replica.version_id)
        del self._half_dropped[replica.version_id]

    def _remove_files(self, replica: Replica) -> None:
        self._unlink_users(replica)
        # A big file takes the disk long, and whoever looks something up must not wait for that.
        self._objects_lock.close_later(self._objects.keep(replica.version_id))
        self._objects.remove(replica.version_id)

    def _unlink_users(self, replica: Replica) -> list[User]:
        """Take a copy out of all users' directories; returns in whose it was."""
        users = self._index.links(replica.version_id)
        for user in users:
            self._tree.unlink(user, replica.path, replica.stamp.inode)
        status = self._objects.status(replica.version_id)
        if status is not None and status.st_nlink > 1:
            # The index does not know of all: it was lost, and made again.
            users += self._tree.unlink_all(replica.path, Stamp.of(status).inode)
        return users

    # --- copies that may be wrong -------------------------------------------------------------

    def _lose(self, version_id: bytes) -> None:
        """Drop a copy that was told of already. ``take_damaged`` tells that it is gone."""
        with self._damaged_lock:
            self._damaged[version_id] = None
        self.drop(version_id)

    def _take_out(self, replica: Replica) -> None:
        """Nobody is to use this copy any more. What of it is right can still be of use.

        ``take_damaged`` tells of it, so that the rest can be fetched from peers.
        """
        version_id = replica.version_id
        self._sources.withhold(version_id)
        stamp = self._objects.stamp(version_id)
        users = self._unlink_users(replica)
        # Of another file in its place, or one of another size, nothing is known at all.
        same_file = stamp is not None and (stamp.inode, stamp.size_bytes) == (
            replica.stamp.inode,
            replica.stamp.size_bytes,
        )
        taken_back = self._take_back(version_id) if same_file else None
        if taken_back is None:
            self._drop(replica)
        else:
            taken_back = dataclasses.replace(taken_back, users=tuple(users))
        with self._damaged_lock:
            self._damaged[version_id] = taken_back

    def _take_back(self, version_id: bytes) -> Damaged | None:
        """Turn an object into a partial file that ``begin`` will resume; None if there is none.

        After a kill on the way there is either a doubtful row with its object, or a partial file.
        """
        if self._objects.stamp(version_id) is None:
            return None  # the usual case of ``begin``, which must not wait for the lock
        name = object_name(version_id)
        with self._objects_lock, disk_errors(f"take back {name}"):
            half_dropped = self._half_dropped.get(version_id)
            if half_dropped is not None:  # or else ``flush`` would drop what comes in its place
                self._drop(half_dropped)
                return None
            stamp = self._objects.stamp(version_id)
            decoded = self._objects.manifest(version_id)
            if stamp is None or decoded is None or stamp.size_bytes != decoded[0].size_bytes:
                return None
            version, manifest = decoded
            self._index.doubt(version_id)
            if not self._partials.adopt(version, manifest, (name, self._objects.fd)):
                return None
            self._objects.remove_manifest(version_id)
            self._index.delete(version_id)
            self._sources.let_go(version_id)
            return Damaged(version, manifest.layout.chunk_size_bytes)

    def _recover(self, version_id: bytes, after_piece: Callable[[int], None]) -> bool:
        """Digest a replica in doubt; whether it is one that can be trusted now."""
        with ExitStack() as stack, disk_errors(f"check {object_name(version_id)}"):
            fd, stamp = self._objects.open_in(stack, version_id)
            bad = self._objects.bad_chunks(version_id, fd, after_piece)
            with self._objects_lock:
                replica = self._index.find(version_id)
                if replica is None or replica.trusted(self._boot_id):
                    return False  # dropped or published anew meanwhile
                if stamp is None and self._objects.stamp(version_id) is not None:
                    return False  # it is just being evicted
                if bad or self._objects.stamp(version_id) != stamp:
                    shown = os.fsdecode(replica.path)
                    log.warning("the copy of %s did not survive: taken out", shown)
                    self._take_out(replica)
                    return False
                # A power cut may have taken the time of the source away, or the mode.
                finish(fd, replica.stamp.mtime_ns)
                stamp = Stamp.of(os.fstat(fd))
                self._index.settle(
                    version_id, stamp, Trust.WRITTEN, self._boot_id, verified_s=time.time()
                )
                return True

    # --- eviction -----------------------------------------------------------------------------

    def hold(self, version_id: bytes) -> None:
        """Keep a file version, whether it is here already or not, until ``release``."""
        self._uses.hold(version_id)

    def release(self, version_id: bytes) -> None:
        """End one ``hold``."""
        self._uses.release(version_id)

    def held(self, version_id: bytes) -> bool:
        """Whether a client holds the replica."""
        return self._uses.held(version_id)

    def tell_before_evicting(self, tell: Callable[[Sequence[bytes]], Future[None]]) -> None:
        """See ``Cache.tell_before_evicting``."""
        self._evictor.tell = tell

    def ask_before_evicting(self, ask: Callable[[Sequence[bytes]], Mapping[bytes, int]]) -> None:
        """See ``Cache.ask_before_evicting``."""
        self._evictor.ask_elsewhere = ask

    def look_at_clock(self, wall_s: float, up_s: float) -> None:
        """See ``Retention``."""
        if self._retention is not None:
            self._retention.look_at_clock(wall_s, up_s)

    def drop_unused(self, wall_s: float, up_s: float) -> bool:
        """See ``Retention``."""
        return self._retention is not None and self._retention.drop_unused(wall_s, up_s)

    def real_use_s(self, version_id: bytes) -> float:
        """See ``ObjectFiles.read_s``."""
        return self._objects.read_s(version_id)

    @contextmanager
    def unused(self, version_ids: Sequence[bytes]) -> Iterator[set[bytes]]:
        """See ``UseCheck.unused``."""
        names = {object_name(version_id): version_id for version_id in version_ids}
        for version_id in version_ids:
            self._sources.let_go(version_id)  # unless a peer is being served
        with (
            disk_errors("find out which files are in use"),
            self._use_check.unused(list(names), self._objects.fd) as unused,
        ):
            yield {names[name] for name in unused}

    def remove_files(self, version_id: bytes) -> Replica | None:
        """Remove all of a replica but its row, which is returned; None when there is none."""
        with self._objects_lock:
            replica = self._index.find(version_id)
            if replica is not None:
                self._half_dropped[version_id] = replica
                self._remove_files(replica)
            return replica

    def remove_rows(self, replicas: Sequence[Replica]) -> None:
        """Remove the rows of what ``remove_files`` has removed."""
        with self._objects_lock:
            self._index.delete_all(replicas)
            for replica in replicas:
                self._half_dropped.pop(replica.version_id, None)
        try:
            self._index.shorten_log()
        except NoSpace as error:  # the next call has more room
            log.info("%s", error)

    def _open_replica(self, replica: Replica) -> ChunkSource | None:
        layout = ChunkLayout(replica.stamp.size_bytes, replica.chunk_size_bytes)
        with disk_errors("open a replica"), suppress(FileNotFoundError):
            return self._sources.open(replica.version_id, layout)
        return None

    # --- publishing ---------------------------------------------------------------------------

    def _install(self, partial: Partial, users: Sequence[User]) -> dict[int, str]:
        """Make a complete partial file a replica; returns the path per uid of a user."""
        version_id = partial.version.version_id
        with self._objects_lock, disk_errors(f"publish {version_id.hex()}"):
            self._check_mounted()
            self.drop(version_id)  # one in doubt, which nobody waits for any more
            replica = self._new_replica(partial)
            self._partials.hand_over(version_id, lambda: self._index.insert(replica))
            try:
                self._move_into_objects(partial)
                paths, failed = self._link(replica, self._with_former(replica, users))
            except BaseException:
                self._drop(replica)
                raise
            with self._damaged_lock:
                self._damaged.pop(version_id, None)  # nobody need mend what is right again
        for uid, error in failed.items():
            log.warning("no link for uid %d: %s", uid, error)
        return paths

    def _with_former(self, replica: Replica, users: Sequence[User]) -> Sequence[User]:
        """``users``, and those who had links before the copy had to be digested again."""
        with self._damaged_lock:
            damaged = self._damaged.get(replica.version_id)
        former = [] if damaged is None else list(damaged.users)
        status = self._objects.status(replica.version_id)
        if status is not None and status.st_nlink > 1:
            inode = Stamp.of(status).inode
            former += self._tree.linked_users(self._tree.users(), replica.path, inode)
        return [*(user for user in dict.fromkeys(former) if user not in users), *users]

    def _new_replica(self, partial: Partial) -> Replica:
        """The row of a file that is about to be published, with its final times and mode."""
        version = partial.version
        fd = partial.file.fd
        finish(fd, version.mtime_ns)
        now_s = time.time()
        return Replica(
            version.version_id,
            version.path,
            partial.layout.chunk_size_bytes,
            self._partials.stored_bytes(version, partial.layout),
            Trust.DOUBTFUL,
            self._boot_id,
            Stamp.of(os.fstat(fd)),
            created_s=now_s,
            last_used_s=now_s,
            verified_s=now_s,
        )

    def _move_into_objects(self, partial: Partial) -> None:
        version_id = partial.version.version_id
        name = version_id.hex()
        data = encode_manifest(partial.version, partial.manifest())
        fd = os.open(name + SUFFIX, _MAKE | os.O_TRUNC, 0o600, dir_fd=self._partial_fd)
        try:
            write_all(fd, data, 0)
        finally:
            os.close(fd)
        for suffix in (SUFFIX, ""):
            self._objects.enter(os.rename, name + suffix, self._partial_fd, version_id, suffix)
