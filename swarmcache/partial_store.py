"""The directory of partial files, and the space that is reserved for them.

Space is reserved for the whole of a file before its first byte: set aside on the disk where the
file system can do that, kept account of where it cannot.

Who finds no room has some made, one after the other: what one has freed, no other may take.

Invariant: what replicas and reservations take together never exceeds ``max_usage``, and if all
reserved bytes were written now, the free space would not fall below ``min_free``.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from swarmcache.chunks import ChunkLayout, FileVersion, Manifest
from swarmcache.disk_calls import (
    SharedFile,
    Stamp,
    disk_errors,
    reserve,
    unlink_if_there,
    write_all,
)
from swarmcache.errors import DiskFailed, LocalError, NoSpace
from swarmcache.manifest_files import (
    SUFFIX,
    decode_header,
    encode_header,
    is_packed,
    manifest_size_bytes,
)
from swarmcache.partial import (
    JOURNAL_MAGIC,
    Partial,
    decode_journal,
    encode_record,
    journal_size_bytes,
)
from swarmcache.user_tree import User

log = logging.getLogger(__name__)

PARTIAL_AGE_MAX_S = 24 * 3600.0
# Whoever wants to go on with a partial file has done so by then; see ABANDON_S of the machine.
ABANDONED_S = 300.0
# Kept from both limits for the log of the index, which grows to LOG_SIZE_MAX_BYTES and a
# bit more until it is shortened (measured: 4.8 MiB), and for scratch files.
UNCOUNTED_MAX_BYTES = 8 << 20
# What a file takes besides its blocks and those of its manifest: a row in the index, two inodes
# where they are made on demand (XFS), names in three directories. Measured with a directory for
# each file: 1.9 KiB on ext4, 2.4 KiB on XFS. Small files have a part of a pack in place of the
# second inode, see manifest_files.PACKED_MAX_BYTES.
OVERHEAD_BYTES = 4096
# After an eviction the file system may give the blocks back behind our back (XFS): time to do so.
GIVE_BACK_S = (0.0, 0.001, 0.01, 0.05, 0.2, 0.5)
# A second time for what others on this machine have taken meanwhile; we do not race with them.
EVICTIONS_MAX = 2
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAKE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_JOURNAL = ".chunks"
_NAME = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class SpaceLimits:
    """``min_free`` and ``max_usage`` take the capacity of the disk in bytes.

    ``min_free`` returns the bytes that stay free, ``max_usage`` the bytes that the cache may take.
    ``min_age_s``: what was used since is not given up.
    """

    min_free: Callable[[int], int]
    max_usage: Callable[[int], int]
    min_age_s: float


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for small files that are to come: what each will take of the disk, by version id."""

    sizes_bytes: dict[bytes, int]

    def size_of(self, version_id: bytes) -> int:
        """What one of the files will take."""
        return self.sizes_bytes[version_id]


class PartialStore:
    """All partial files of a cache directory, open or left from before. Thread-safe."""

    def __init__(
        self,
        directory_fd: int,
        limits: SpaceLimits,
        replicas: Callable[[], tuple[int, int]],
        make_room: Callable[[int, int], None],
        install: Callable[[Partial, Sequence[User]], dict[int, str]],
        unlink_users: Callable[[bytes, int], list[User]],
    ) -> None:
        """``directory_fd`` stays the caller's. ``replicas``: their number, and what all take.

        ``make_room`` evicts replicas of so many bytes, each its own and so many more; or it raises
        NoSpace. ``install`` makes a
        complete partial file a replica. ``unlink_users`` takes a file that was one (real path of
        the source, inode) out of the users' directories; returns in whose it was. Counts what
        earlier lives have left; removes what is too old to resume. Raises LocalError.
        """
        self._fd = directory_fd
        self._limits = limits
        self._replicas = replicas
        self._make_room = make_room
        self._install = install
        self._unlink_users = unlink_users
        # Also keeps two reservations from counting on the same free space.
        self._lock = threading.RLock()
        # Taken before the other one, and held while replicas are evicted.
        self._room_lock = threading.Lock()
        self._claim: tuple[bytes, int] | None = None  # for whom that is, and how much
        self._abandoned = False
        self._open: dict[bytes, Partial] = {}
        self._reserved_bytes: dict[bytes, int] = {}  # of every partial file, open or not
        self._unallocated: dict[bytes, int] = {}  # what of that the disk has not set aside, at most
        # Of small files that are put in place at once: the bytes that are left, and how many files.
        self._batches: dict[Reservation, tuple[int, int]] = {}
        self._half_removed: set[bytes] = set()  # the disk failed in the middle of it
        with disk_errors("look through the partial files"):
            self._account()

    def find(self, version_id: bytes) -> Partial | None:
        """The partial file if it is open."""
        return self._open.get(version_id)

    def knows(self, version_id: bytes) -> bool:
        """Whether there is a partial file, open or left by an earlier life, or the rest of one."""
        return version_id in self._reserved_bytes or version_id in self._half_removed

    def close(self) -> None:
        """Leave all partial files for the next start."""
        for partial in list(self._open.values()):
            partial.close()

    def abandon(self) -> list[Partial]:
        """The disk is lost: nothing can be begun or put in place any more.

        Returns the partial files that are open, for ``close`` to end.
        """
        with self._lock:
            self._abandoned = True
            return list(self._open.values())

    def reserved_bytes(self) -> int:
        """What all partial files take or may still take."""
        # Without the lock, which ``begin`` may hold for as long as the disk sets space aside.
        batches_bytes = sum(left_bytes for left_bytes, _ in list(self._batches.values()))
        return sum(list(self._reserved_bytes.values())) + batches_bytes

    def stored_bytes(
        self, version: FileVersion, layout: ChunkLayout, *, packed: bool = False
    ) -> int:
        """What a replica takes of the disk, with its manifest if that is not ``packed`` with those
        of others, in whole blocks."""
        return self._in_blocks(*_sizes_bytes(version, layout, packed=packed))

    def wanted_bytes(self, version: FileVersion, layout: ChunkLayout) -> int:
        """What is reserved for a file. The journal is no shorter than the manifest."""
        return self._in_blocks(version.size_bytes, journal_size_bytes(version, layout))

    def _in_blocks(self, *sizes: int) -> int:
        with disk_errors("ask for the size of a block"):
            return _in_blocks(os.fstatvfs(self._fd).f_frsize, *sizes)

    def begin(
        self, version: FileVersion, chunk_size_bytes: int, *, may_evict: bool = True
    ) -> Partial:
        """See ``CacheDir.begin``."""
        layout = ChunkLayout(version.size_bytes, chunk_size_bytes)
        try:
            return self._begin(version, layout)
        except NoSpace as error:
            if not may_evict:
                raise
            refusal = error
        wanted_bytes = self.wanted_bytes(version, layout)
        with self._room_made(version, wanted_bytes, refusal):
            return self._begin(version, layout)

    @contextmanager
    def _room_made(
        self, version: FileVersion, wanted_bytes: int, refusal: NoSpace
    ) -> Iterator[None]:
        """Evict for a file version, and let nobody else have that. Raises NoSpace."""
        with self._room_lock:
            self._claim = (version.version_id, wanted_bytes)
            try:
                self._find_room(version.version_id, wanted_bytes)
                yield
            except NoSpace as reason:
                reserved_bytes = self.reserved_bytes()
                fetched = f"{reserved_bytes} bytes are reserved for files that are being fetched, "
                why = f"{fetched if reserved_bytes else ''}{reason}"
                raise NoSpace(f"{refusal}: {why}") from reason
            finally:
                self._claim = None

    def reserve_all(
        self, files: Sequence[tuple[FileVersion, ChunkLayout]], *, may_evict: bool = True
    ) -> Reservation:
        """Set room aside, in our account, for small files that will come whole.

        ``hand_over_some`` and ``give_back`` end it. Raises NoSpace, LocalError.
        """
        with disk_errors("ask for the size of a block"):
            block = os.fstatvfs(self._fd).f_frsize
        sizes = {
            version.version_id: _in_blocks(
                block, *_sizes_bytes(version, layout, packed=is_packed(version, layout))
            )
            for version, layout in files
        }
        first = files[0][0]
        wanted_bytes = sum(sizes.values()) + (len(sizes) - 1) * OVERHEAD_BYTES
        try:
            return self._reserve_all(first, sizes, wanted_bytes)
        except NoSpace as error:
            if not may_evict:
                raise
            refusal = error
        with self._room_made(first, wanted_bytes, refusal):
            return self._reserve_all(first, sizes, wanted_bytes)

    def _reserve_all(
        self, first: FileVersion, sizes: dict[bytes, int], wanted_bytes: int
    ) -> Reservation:
        with self._lock, disk_errors("ask for free space"):
            self._require_disk()
            self._check_room(first, wanted_bytes)
            reservation = Reservation(sizes)
            self._batches[reservation] = (sum(sizes.values()), len(sizes))
            return reservation

    def hand_over_some(
        self, reservation: Reservation, version_ids: Sequence[bytes], insert: Callable[[], None]
    ) -> None:
        """As ``hand_over``, for some of the files of a reservation."""
        with self._lock:
            self._require_disk()
            insert()
            left_bytes, count = self._batches[reservation]
            left_bytes -= sum(map(reservation.size_of, version_ids))
            self._batches[reservation] = (left_bytes, count - len(version_ids))

    def remove_written(self, version_ids: Sequence[bytes]) -> None:
        """Remove what was written of small files that are not put in place; later what the disk
        does not let us remove now."""
        with self._lock:
            self._half_removed.update(version_ids)
            with suppress(LocalError):
                self.tidy()

    def give_back(self, reservation: Reservation) -> None:
        """What is left of a reservation is not needed."""
        with self._lock:
            del self._batches[reservation]

    def _begin(self, version: FileVersion, layout: ChunkLayout) -> Partial:
        version_id = version.version_id
        name = version_id.hex()
        with self._lock, disk_errors(f"begin {name}"), ExitStack() as stack:
            self._require_disk()
            assert version_id not in self._open, "begun twice at once"
            claims, journal_end = self._resumable(name, version, layout)
            if journal_end == 0:
                self._remove(version_id)
                self._check_room(version, self.wanted_bytes(version, layout))
                stack.callback(self._remove, version_id)
            else:
                # Read-only already if a publication was cut short.
                os.chmod(name, 0o600, dir_fd=self._fd)
            fd = os.open(name, _MAKE, 0o600, dir_fd=self._fd)
            file = SharedFile(fd)
            stack.callback(file.release)
            journal_fd = os.open(name + _JOURNAL, _MAKE, 0o600, dir_fd=self._fd)
            stack.callback(os.close, journal_fd)
            self._reserve(version, layout, fd, journal_fd)
            if journal_end == 0:
                header = encode_header(JOURNAL_MAGIC, version, layout)
                write_all(journal_fd, header, 0)
                journal_end = len(header)
            os.ftruncate(journal_fd, journal_end)
            partial = Partial(self, version, layout, file, journal_fd, journal_end, claims)
            self._open[version_id] = partial
            self._half_removed.discard(version_id)
            stack.pop_all()
            return partial

    def adopt(self, version: FileVersion, manifest: Manifest, object_at: tuple[str, int]) -> bool:
        """Take a complete file back that may be wrong, so that ``begin`` resumes it.

        ``object_at``: its name and the descriptor of its directory. What it takes of the disk
        counts as reserved from now on. The digests of the manifest become claims, to be verified
        like those of a download that was cut short. False when a download of the same file version
        is open, which needs no such help. Raises LocalError.
        """
        version_id = version.version_id
        name = version_id.hex()
        with self._lock, disk_errors(f"take back {name}"):
            if version_id in self._open:
                return False
            self._remove(version_id)
            records = [encode_record(*record) for record in enumerate(manifest.digests)]
            journal = encode_header(JOURNAL_MAGIC, version, manifest.layout) + b"".join(records)
            fd = os.open(name + _JOURNAL, _MAKE | os.O_TRUNC, 0o600, dir_fd=self._fd)
            try:
                write_all(fd, journal, 0)
            finally:
                os.close(fd)
            os.rename(object_at[0], name, src_dir_fd=object_at[1], dst_dir_fd=self._fd)
            self._reserved_bytes[version_id] = self.wanted_bytes(version, manifest.layout)
            self._unallocated[version_id] = 0
            return True

    def install(self, partial: Partial, users: Sequence[User]) -> dict[int, str]:
        """Make a complete partial file a replica. For ``Partial.publish``."""
        version_id = partial.version.version_id
        self._require_disk()
        reserved_bytes = self._reserved_bytes[version_id]
        try:
            paths = self._install(partial, users)
        except BaseException:
            self._reserved_bytes[version_id] = reserved_bytes  # until it is discarded
            raise
        try:
            with disk_errors("remove a journal"):
                self._remove(version_id)
        except LocalError as error:
            log.error("%s; tried again later", error)  # the replica is as good without that
            self._forget(version_id)
        return paths

    def hand_over(self, version_id: bytes, insert: Callable[[], None]) -> None:
        """``insert`` counts a file as a replica; it never counts twice, or an eviction would make
        room for it a second time. For ``CacheDir``."""
        with self._lock:
            insert()
            self._reserved_bytes.pop(version_id, None)

    def hide(self, partial: Partial) -> list[User]:
        """Take a file that was a replica out of the users' directories. For ``Partial.recover``.

        Raises LocalError.
        """
        with disk_errors("take back a copy"):
            return self._hide(partial.version.version_id.hex())

    def relieve(self, partial: Partial) -> bool:
        """Make room on a disk that is full in spite of our account. For ``Partial``.

        Happens where the disk cannot set space aside and others have taken it. False when nothing
        can be evicted, or the disk has room and a quota is full. Raises LocalError.
        """
        with self._room_lock:
            with disk_errors("ask for free space"):
                disk = os.fstatvfs(self._fd)
                free_bytes = disk.f_bavail * disk.f_frsize
                missing_bytes = self._unallocated_now(partial.version.version_id) - free_bytes
            if missing_bytes > 0:
                try:
                    self._make_room(missing_bytes, 0)
                except NoSpace as reason:
                    log.warning("the disk of the cache is full: %s", reason)
                    return False
            return True

    def discard(self, partial: Partial) -> None:
        """Remove a partial file, release its space. For ``Partial.discard``.

        Raises LocalError; then what is left of it stays accounted for.
        """
        try:
            with disk_errors("remove a partial file"):
                self._remove(partial.version.version_id)
        finally:
            self.leave(partial)

    def leave(self, partial: Partial) -> None:
        """Keep a partial file and its space, closed. For ``Partial.close``."""
        with self._lock:
            self._open.pop(partial.version.version_id, None)

    def _require_disk(self) -> None:
        if self._abandoned:
            raise DiskFailed("the disk of this cache directory is lost")

    def _account(self) -> None:
        names = set(os.listdir(self._fd))
        oldest_s = time.time() - PARTIAL_AGE_MAX_S
        kept: set[str] = set()
        for name in names:
            if _NAME.fullmatch(name) and name + _JOURNAL in names:
                pair = [self._stat(name), self._stat(name + _JOURNAL)]
                if max(status.st_mtime for status in pair) >= oldest_s:
                    version_id = bytes.fromhex(name)
                    self._reserved_bytes[version_id] = sum(map(_taken_bytes, pair))
                    self._unallocated[version_id] = _unallocated_bytes(pair[0])
                    kept |= {name, name + _JOURNAL}
        for name in names - kept:
            if _NAME.fullmatch(name):
                self._hide(name)
            unlink_if_there(name, self._fd)

    def _hide(self, name: str) -> list[User]:
        try:
            status = self._stat(name)
            if status.st_nlink == 1:
                return []  # the usual case: it has never been a replica
            fd = os.open(name + _JOURNAL, _READ, dir_fd=self._fd)
        except FileNotFoundError:
            return []
        with os.fdopen(fd, "rb") as file:
            decoded = decode_header(JOURNAL_MAGIC, file.read())
        return self._unlink_users(decoded[0].path, Stamp.of(status).inode) if decoded else []

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def _resumable(
        self, name: str, version: FileVersion, layout: ChunkLayout
    ) -> tuple[dict[int, set[bytes]], int]:
        """Claims and length in bytes of a journal to go on with; length 0 when there is none."""
        try:
            size_bytes = self._stat(name).st_size
            fd = os.open(name + _JOURNAL, _READ, dir_fd=self._fd)
        except FileNotFoundError:
            return {}, 0
        with os.fdopen(fd, "rb") as file:
            journal = decode_journal(file.read(), version, layout)
        return journal if journal and size_bytes == version.size_bytes else ({}, 0)

    def room_bytes(self) -> int:
        """How much more the limits allow. Raises LocalError when the disk fails."""
        return max(0, self.balance_bytes())

    def balance_bytes(self) -> int:
        """The same; below 0 it is what is missing to keep the limits. Raises LocalError."""
        with self._lock, disk_errors("ask for free space"):
            return min(self._rooms_bytes())

    def _rooms_bytes(self, for_version: bytes = b"") -> tuple[int, int]:
        """What is left of ``max_usage``, and what is free above ``min_free``."""
        disk = os.fstatvfs(self._fd)
        capacity_bytes = disk.f_blocks * disk.f_frsize
        count, taken_bytes = self._replicas()
        taken_bytes += self.reserved_bytes() + UNCOUNTED_MAX_BYTES
        batches = list(self._batches.values())
        count += len(self._reserved_bytes) + sum(count for _, count in batches)
        taken_bytes += (count + 1) * OVERHEAD_BYTES
        unallocated = sum(self._unallocated_now(version_id) for version_id in self._unallocated)
        unallocated += sum(left_bytes for left_bytes, _ in batches)
        free_bytes = disk.f_bavail * disk.f_frsize - unallocated - UNCOUNTED_MAX_BYTES
        claim = self._claim
        if claim is not None and claim[0] != for_version:
            taken_bytes += claim[1] + OVERHEAD_BYTES
            free_bytes -= claim[1]
        return (
            self._limits.max_usage(capacity_bytes) - taken_bytes,
            free_bytes - self._limits.min_free(capacity_bytes),
        )

    def _check_room(self, version: FileVersion, wanted_bytes: int) -> None:
        """Raise NoSpace when the limits do not allow this much more."""
        allowed_bytes, free_bytes = self._rooms_bytes(version.version_id)
        room_bytes = max(0, min(allowed_bytes, free_bytes))
        if wanted_bytes > room_bytes:
            limit = "cache.max_usage" if allowed_bytes < free_bytes else "cache.min_free"
            raise NoSpace(
                f"not enough free space: {os.fsdecode(version.path)} needs {wanted_bytes}"
                f" bytes, but {limit} leaves {room_bytes} on this node"
            )

    def _find_room(self, version_id: bytes, wanted_bytes: int) -> None:
        """Evict until the limits allow this much more. Raises NoSpace, which says why it cannot."""
        missing_bytes, overhead_bytes = self._missing(version_id, wanted_bytes)
        if missing_bytes <= 0:  # so it was the disk itself that refused
            missing_bytes = wanted_bytes
        for _ in range(EVICTIONS_MAX):
            missing_bytes -= self._give_up_partials(missing_bytes, overhead_bytes)
            if missing_bytes > 0:
                self._make_room(missing_bytes, overhead_bytes)
            for pause_s in GIVE_BACK_S:
                time.sleep(pause_s)
                missing_bytes, overhead_bytes = self._missing(version_id, wanted_bytes)
                if missing_bytes <= 0:
                    return

    def _missing(self, version_id: bytes, wanted_bytes: int) -> tuple[int, int]:
        """What the tighter limit lacks, and what it gets back for a file besides its blocks."""
        with self._lock, disk_errors("ask for free space"):
            allowed_bytes, free_bytes = self._rooms_bytes(version_id)
        if allowed_bytes < free_bytes:
            return wanted_bytes - allowed_bytes, OVERHEAD_BYTES
        return wanted_bytes - free_bytes, 0

    def _give_up_partials(self, wanted_bytes: int, overhead_bytes: int) -> int:
        """Remove partial files that nobody has gone on with for long; returns bytes given back."""
        freed_bytes = 0
        newest_s = time.time() - max(self._limits.min_age_s, ABANDONED_S)
        with self._lock, disk_errors("look through the partial files"):
            closed = self._reserved_bytes.keys() - self._open.keys()
            written_s = {version_id: self._written_s(version_id) for version_id in closed}
            for version_id in sorted(closed, key=written_s.__getitem__):
                if freed_bytes >= wanted_bytes or written_s[version_id] > newest_s:
                    break
                freed_bytes += self._reserved_bytes[version_id] + overhead_bytes
                self._remove(version_id)
        return freed_bytes

    def _written_s(self, version_id: bytes) -> float:
        names = (version_id.hex(), version_id.hex() + _JOURNAL)
        with suppress(FileNotFoundError):
            return max(self._stat(name).st_mtime for name in names)
        return 0.0  # removed by somebody; only the account of it is left

    def _unallocated_now(self, version_id: bytes) -> int:
        most = self._unallocated.get(version_id, 0)  # none of a file that is given up meanwhile
        try:
            return min(most, _unallocated_bytes(self._stat(version_id.hex()))) if most else 0
        except FileNotFoundError:
            return 0  # just now put in place as a replica, all of it written

    def _reserve(self, version: FileVersion, layout: ChunkLayout, fd: int, journal_fd: int) -> None:
        version_id = version.version_id
        self._reserved_bytes[version_id] = self.wanted_bytes(version, layout)
        set_aside = reserve(fd, version.size_bytes)
        self._unallocated[version_id] = 0 if set_aside else version.size_bytes
        reserve(journal_fd, journal_size_bytes(version, layout), keep_size=True)

    def tidy(self) -> None:
        """Remove what could not be removed because the disk failed. Raises LocalError."""
        with self._lock, disk_errors("remove a partial file"):
            for version_id in self._half_removed - set(self._open):
                self._remove(version_id)

    def _remove(self, version_id: bytes) -> None:
        with self._lock:
            self._half_removed.add(version_id)
            self._hide(version_id.hex())
            for suffix in ("", _JOURNAL, SUFFIX):
                unlink_if_there(version_id.hex() + suffix, self._fd)
            self._forget(version_id)
            self._half_removed.discard(version_id)

    def _forget(self, version_id: bytes) -> None:
        with self._lock:
            self._open.pop(version_id, None)
            self._reserved_bytes.pop(version_id, None)
            self._unallocated.pop(version_id, None)


def _sizes_bytes(version: FileVersion, layout: ChunkLayout, *, packed: bool) -> list[int]:
    """Of the files that a replica takes for itself."""
    return (
        [version.size_bytes]
        if packed
        else [version.size_bytes, manifest_size_bytes(version, layout)]
    )


def _in_blocks(block: int, *sizes: int) -> int:
    return sum(-(-size // block) * block for size in sizes)


def _taken_bytes(status: os.stat_result) -> int:
    return max(status.st_size, 512 * status.st_blocks)  # st_blocks counts 512 bytes, always


def _unallocated_bytes(status: os.stat_result) -> int:
    return max(0, status.st_size - 512 * status.st_blocks)
