"""The cache of one node: all its cache directories, seen as one.

Each directory is on a disk of its own, with an index and limits of its own. A file version lies in
one of them. New ones go where most room is left, but the files of one source directory stay
together while they fit, since callers rely on the shape of the tree.

A disk that fails, cannot be written or is no longer mounted takes only its own directory out of the
cache. It comes back with the next start of the daemon, and not before: until somebody has looked at
it, nobody knows what it would do next.

A shell: decides nothing about what to fetch, for whom, or what to give up. Thread-safe. ``lookup``,
``renew``, ``open_source``, ``manifest``, ``status``, ``directories`` and ``user_path`` are quick
enough for an event loop; everything else belongs into worker threads.

Invariant: a directory that is lost is never read for an answer or written again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from swarmcache.cache_dir import CacheDir, Damaged, Partial, Removal, User, go_on
from swarmcache.cache_index import Entry, Surveyed
from swarmcache.cache_listing import Forgotten
from swarmcache.chunk_sources import ChunkSource
from swarmcache.chunks import FileVersion, Manifest, SmallFile
from swarmcache.clock import now_s
from swarmcache.disk_calls import disk_errors
from swarmcache.errors import CacheDirUnusable, DiskFailed, LocalError, NoSpace
from swarmcache.file_batch import FileBatch
from swarmcache.in_use import FileId, OpenFiles
from swarmcache.messages import DiskStatus, ReplicaPlace

__all__ = [
    "Cache",
    "ChunkSource",
    "DirectoryStatus",
    "Entry",
    "FileBatch",
    "Forgotten",
    "Partial",
    "Removal",
    "Surveyed",
    "User",
]

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Source directories whose disk is remembered; the index knows it of the others, once they have
# files. More than are being fetched at once.
HOMES_MAX = 4096
# File versions whose directory is remembered, to spare asking the indexes of the others: 6 us each
# of the 14 us that a look-up takes. Some 10 MB when full.
FOUND_MAX = 1 << 16


@dataclass(frozen=True)
class DirectoryStatus:
    """One cache directory. ``lost``: why it is not in use; empty when it is."""

    path: str
    disk: DiskStatus
    lost: str = ""


class Cache:
    """What the daemon has of files."""

    def __init__(self, directories: Sequence[CacheDir], lost: dict[str, str] | None = None) -> None:
        """Takes over the directories. ``lost``: why others cannot be used, by path."""
        self._open_files = OpenFiles(directory.file_system for directory in directories)
        self._all = tuple(directories)
        self._directories = self._all  # those in use; replaced as a whole, so reading needs no lock
        self._lost = dict(lost or {})
        self._suspects: set[CacheDir] = set()
        self._homes: OrderedDict[bytes, CacheDir] = OrderedDict()  # by source directory
        self._found: dict[bytes, CacheDir] = {}  # where a file version was seen last
        self._lock = threading.Lock()
        # Told, in any thread, when a directory is lost: why, and which partial files with it.
        self.on_lost: Callable[[str, list[Partial]], None] = lambda reason, partials: None

    @classmethod
    def open(
        cls,
        roots: Sequence[Path],
        *,
        min_free: Callable[[int], int],
        max_usage: Callable[[int], int],
        min_age_s: float = 0.0,
        max_age_s: float | None = None,
    ) -> Cache:
        """Open the cache directories; the limits are per disk, see ``CacheDir``.

        A single one is made where it is not there. Of several, each must be there, below the place
        where its disk is mounted, so that one that is not mounted is not taken for empty.
        One whose disk is lost is left out, with one line in the log, as long as there is another.
        Raises DirectoryUnusable for a mistake that somebody must mend, DiskFailed when no disk can
        be used.
        """
        several = len(roots) > 1
        if several:
            check_places(roots)
        opened: list[CacheDir] = []
        lost: dict[str, str] = {}
        with ExitStack() as stack:
            for root in roots:
                try:
                    directory = CacheDir(
                        root,
                        min_free=min_free,
                        max_usage=max_usage,
                        min_age_s=min_age_s,
                        max_age_s=max_age_s,
                        make=not several,
                    )
                except DiskFailed as error:
                    lost[os.fspath(root)] = str(error)
                else:
                    stack.callback(directory.close)
                    opened.append(directory)
            if not opened:
                raise DiskFailed("; ".join(lost.values()))
            stack.pop_all()
        for reason in lost.values():
            log.error("%s. The daemon starts without it; restart it when that is mended", reason)
        return cls(opened, lost)

    def close(self) -> None:
        """Keep everything for the next start. Sources that are still open stay valid."""
        for directory in self._all:
            try:
                directory.close()
            except LocalError as error:  # the next start does without what could not be noted
                log.error("while closing %s: %s", directory.path, error)

    # --- replicas -----------------------------------------------------------------------------

    def lookup(self, version: FileVersion, user: User) -> str | None:
        """See ``CacheDir.lookup``. A copy on a disk that fails is none."""
        for directory in self._likely(version.version_id):
            try:
                path = directory.lookup(version, user)
            except DiskFailed as error:
                self._suspect(directory, error)
            else:
                if path is not None:
                    self._note_found(version.version_id, directory)
                    return path
        return None

    def lookup_many(self, versions: Sequence[FileVersion], user: User) -> list[str | None]:
        """``lookup`` for many, at a fraction of the price of each."""
        found: list[str | None] = [None] * len(versions)
        for directory in self._directories:
            missing = [place for place, path in enumerate(found) if path is None]
            if not missing:
                break
            try:
                paths = directory.lookup_many([versions[place] for place in missing], user)
            except DiskFailed as error:
                self._suspect(directory, error)
                continue
            for place, path in zip(missing, paths, strict=True):
                found[place] = path
        return found

    def user_path(self, version: FileVersion, user: User) -> str:
        """Where the user's copy is or, as things are, would go. Decides nothing.

        Raises CacheDirUnusable, DiskFailed.
        """
        places = self._places(version, decide=False)
        if not places:
            raise self._nothing_left()
        return places[0].user_path(version, user)

    def own_path(self, path: bytes, user: User) -> str:
        """Where a file of the user's own would belong, by the path that it is a copy of or shall
        have; the directories on the way are made.

        On the disk with most room, whatever is cached: the user may not be allowed to know.
        Raises CacheDirUnusable, DiskFailed, LocalError.
        """
        for directory in self._ranked(lambda each: (each.room_bytes(),)):
            directory.make_directories(path, user)
            return directory.user_path(FileVersion(path, 0, 0), user)
        raise self._nothing_left()

    def place(self, version_id: bytes, user: str) -> ReplicaPlace | None:
        """See ``CacheDir.place``. Raises CacheDirUnusable."""
        return _first(self._answers(lambda each: each.place(version_id, user), self._suspect))

    def renew(self, version_id: bytes) -> bool:
        """See ``CacheDir.renew``."""
        return any(self._answers(lambda each: each.renew(version_id), self._suspect))

    def replicas(self) -> Iterator[bytes]:
        """Version ids of all verified replicas. Raises LocalError."""
        return self._chain(lambda each: each.replicas())

    def manifest(self, version_id: bytes) -> Manifest | None:
        """See ``CacheDir.manifest``."""
        return _first(self._answers(lambda each: each.manifest(version_id), self._suspect))

    def drop(self, version_id: bytes) -> None:
        """See ``CacheDir.drop``."""
        self._tell(lambda each: each.drop(version_id))

    def make_durable(self, version_ids: Sequence[bytes]) -> None:
        """See ``CacheDir.make_durable`` and ``make_all_durable``."""
        if len(version_ids) == 1:
            self._tell(lambda each: each.make_durable(version_ids[0]))
        else:
            self._tell(lambda each: each.make_all_durable(version_ids))

    def list_objects(self) -> Iterator[None]:
        """See ``CacheDir.list_objects``."""
        return self._chain(lambda each: each.list_objects())

    def recover_undurable(
        self, after_piece: Callable[[int], None] = go_on
    ) -> Iterator[list[bytes]]:
        """See ``CacheDir.recover_undurable``."""
        return self._chain(lambda each: each.recover_undurable(after_piece))

    def stalest(self, before_s: float) -> bytes | None:
        """The replica on all disks that was verified longest ago; None when none was before then.

        Raises LocalError.
        """
        found = self._answers(lambda each: each.stalest(before_s), self._examine)
        return min((each for each in found if each is not None), default=(0.0, None))[1]

    def verify(
        self, version_id: bytes, after_piece: Callable[[int], None] = go_on
    ) -> list[int] | None:
        """See ``CacheDir.verify``."""
        return _first(
            self._answers(lambda each: each.verify(version_id, after_piece), self._examine)
        )

    def take_damaged(self) -> dict[bytes, Damaged | None]:
        """See ``CacheDir.take_damaged``."""
        return {
            version_id: damaged
            for directory in self._directories
            for version_id, damaged in directory.take_damaged().items()
        }

    def open_source(self, version_id: bytes) -> ChunkSource | None:
        """See ``CacheDir.open_source``."""
        return _first(self._answers(lambda each: each.open_source(version_id), self._suspect))

    # --- what its users see to themselves -------------------------------------------------------

    def entries(self, path: bytes, user: User | None = None) -> Iterator[list[Entry]]:
        """See ``CacheDir.entries``. Raises LocalError."""
        return self._chain(lambda each: each.listing.entries(path, user))

    def survey(self, wanted: Callable[[bytes], bool]) -> Iterator[list[Surveyed]]:
        """See ``CacheDir.survey``. Raises LocalError."""
        return self._chain(lambda each: each.listing.survey(wanted))

    def forget(
        self, wanted: Callable[[bytes], bool], unused_s: float | None
    ) -> Iterator[Forgotten]:
        """See ``CacheDir.forget``. Raises LocalError."""
        return self._chain(lambda each: each.listing.forget(wanted, unused_s))

    def owner_of(self, path: bytes) -> str | None:
        """See ``CacheDir.owner_of``."""
        return _first(directory.listing.owner_of(path) for directory in self._directories)

    def in_use(self, version_ids: Sequence[bytes]) -> set[bytes]:
        """Those that a process has open or that a client holds, for people to see.

        Nobody is kept waiting for the answer, which is up to a second old: see ``OpenFiles``.
        Raises LocalError.
        """
        files: dict[bytes, FileId] = {}
        for found in self._answers(lambda each: each.listing.files(version_ids), self._examine):
            files |= found
        with disk_errors("find out which files are in use"):
            opened = self._open_files.among(files.values())
        held = self._all[0].held  # every directory knows of all
        return {each for each, file in files.items() if file in opened or held(each)}

    def linked(self, version_id: bytes) -> list[User]:
        """See ``CacheDir.linked``. Raises LocalError."""
        return [user for each in self._directories for user in each.listing.linked(version_id)]

    def removal(
        self, version_id: bytes, user: User | None = None, even_pinned: bool = False
    ) -> Removal:
        """See ``CacheDir.removal``. Raises LocalError."""
        for directory in self._directories:
            removal = directory.removal(version_id, user, even_pinned)
            if removal is not Removal.ABSENT:
                return removal
        return Removal.ABSENT

    def remove(
        self, version_id: bytes, user: User | None = None, even_pinned: bool = False
    ) -> Removal:
        """See ``CacheDir.remove``. Raises LocalError."""
        for directory in self._directories:
            removal = directory.remove(version_id, user, even_pinned)
            if removal in (Removal.GONE, Removal.UNLINKED):
                self.unpin(version_id, None if user is None else user.uid)
            if removal is not Removal.ABSENT:
                return removal
        return Removal.ABSENT

    def pin(self, version_id: bytes, uid: int) -> bool:
        """Keep a file version until the same user unpins it; False when it is not here.

        Noted on every disk, so that it holds wherever the file is fetched to. Raises LocalError.
        """
        here = [directory.pin(version_id, uid) for directory in self._directories]
        if not any(here):
            self.unpin(version_id, uid)
        return any(here)

    def unpin(self, version_id: bytes, uid: int | None) -> None:
        """Take away the pin of one user, or (None) of everybody. Raises LocalError."""
        for directory in self._directories:
            directory.unpin(version_id, uid)

    # --- the whole ----------------------------------------------------------------------------

    def begin(self, version: FileVersion, chunk_size_bytes: int) -> Partial:
        """Reserve the space for a file and open it, or resume what there is of it.

        Nothing is evicted as long as there is room on another disk. Only one at a time for a
        version. Raises NoSpace when no directory has room within its limits, DiskFailed when none
        is left, LocalError.
        """
        self._examine_suspects()
        places = self._places(version)
        no_space: NoSpace | None = None
        failed: DiskFailed | None = None
        for may_evict in (False, True):
            no_space = None
            for directory in places:
                try:
                    return directory.begin(version, chunk_size_bytes, may_evict=may_evict)
                except NoSpace as error:
                    no_space = no_space or error
                except DiskFailed as error:  # lost or not, another disk may take the file
                    self._leave_if_lost(directory)
                    failed = failed or error
        if no_space is None and failed is not None and self._directories:
            raise failed
        raise no_space or self._nothing_left()

    def begin_batch(
        self, versions: Sequence[FileVersion], chunk_size_bytes: int
    ) -> list[FileBatch]:
        """See ``CacheDir.begin_batch``: for each directory that some of the files go to.

        Nothing is evicted as long as there is room on another disk, where such files are begun one
        by one. Raises NoSpace when there is no room for all of them, DiskFailed, LocalError.
        """
        self._examine_suspects()
        if not self._directories:
            raise self._nothing_left()
        batches: list[FileBatch] = []
        with ExitStack() as stack:
            for directory, some in self._by_place(versions).items():
                may_evict = len(self._directories) == 1
                try:
                    batch = directory.begin_batch(some, chunk_size_bytes, may_evict=may_evict)
                except DiskFailed:
                    self._leave_if_lost(directory)
                    raise
                if batch is not None:
                    stack.callback(batch.close)
                    batches.append(batch)
            stack.pop_all()
        return batches

    def _by_place(self, versions: Sequence[FileVersion]) -> dict[CacheDir, list[FileVersion]]:
        """The files by the directory that each goes to."""
        if len(self._directories) == 1:
            return {self._directories[0]: list(versions)}
        placed: dict[CacheDir, list[FileVersion]] = {}
        for version in versions:
            for directory in self._places(version)[:1]:
                placed.setdefault(directory, []).append(version)
        return placed

    def read_files(self, version_ids: Sequence[bytes]) -> list[SmallFile]:
        """See ``CacheDir.read_files``."""
        found = self._answers(lambda each: each.read_files(version_ids), self._suspect)
        return [file for files in found for file in files]

    def room(self, files: Sequence[tuple[FileVersion, int]]) -> tuple[int, int]:
        """What these files need, out of the room that could be had in all; see ``Room``.

        With each the size of its chunks. An estimate: what is in use cannot be had, and a file must
        fit on one disk. Slow. Raises LocalError.
        """
        needed_bytes = 0
        for version, chunk_size_bytes in files:
            needs = partial(CacheDir.needed_bytes, version=version)
            found = _first(self._answers(needs, self._examine))
            if found is None and self._directories:
                found = self._directories[0].wanted_bytes(version, chunk_size_bytes)
            needed_bytes += found or 0
        room_bytes = self._answers(lambda each: each.attainable_bytes(), self._examine)
        return needed_bytes, sum(room_bytes)

    def pinned_bytes(self) -> int:
        """What all pinned replicas take. Slow. Raises LocalError."""
        return sum(self._answers(lambda each: each.pinned_bytes(), self._examine))

    def hold(self, version_id: bytes) -> None:
        """Keep a file version, whether it is here already or not, until ``release``."""
        for directory in self._all:
            directory.hold(version_id)

    def release(self, version_id: bytes) -> None:
        """End one ``hold``."""
        for directory in self._all:
            directory.release(version_id)

    def tell_before_evicting(self, tell: Callable[[Sequence[bytes]], Future[None]]) -> None:
        """``tell`` is called in a worker thread with the replicas that are to be evicted.

        The future that it returns is done when that can go on.
        """
        for directory in self._all:
            directory.tell_before_evicting(tell)

    def ask_before_evicting(self, ask: Callable[[Sequence[bytes]], Mapping[bytes, int]]) -> None:
        """``ask`` is called in a worker thread with the replicas among which some will be evicted.

        It returns how many other nodes hold them, of those of which that is known, and soon.
        """
        for directory in self._all:
            directory.ask_before_evicting(ask)

    def look_after(self) -> None:
        """Write down when copies were last used, and find out whether all disks still work.

        To be called every few seconds. Raises LocalError.
        """
        self._examine_suspects()
        self._tell(lambda each: each.check_alive())
        self._tell(lambda each: each.look_at_clock(time.time(), now_s()))
        self._tell(lambda each: each.flush())

    def drop_unused(self) -> bool:
        """Take some copies away that were not used for too long; whether there are more. Slow.

        Raises LocalError.
        """
        more = self._answers(lambda each: each.drop_unused(time.time(), now_s()), self._examine)
        return any(list(more))

    def status(self) -> DiskStatus:
        """Room on all disks together. Raises LocalError."""
        disks = [each.disk for each in self.directories()]
        return DiskStatus(
            capacity_bytes=sum(disk.capacity_bytes for disk in disks),
            free_bytes=sum(disk.free_bytes for disk in disks),
            used_bytes=sum(disk.used_bytes for disk in disks),
            file_count=sum(disk.file_count for disk in disks),
        )

    def directories(self) -> list[DirectoryStatus]:
        """Every cache directory, the lost ones as well. Raises LocalError."""
        found = []
        for directory in self._directories:
            try:
                found.append(DirectoryStatus(directory.path, directory.status()))
            except DiskFailed as error:
                self._suspect(directory, error)
        lost = [DirectoryStatus(path, DiskStatus(), why) for path, why in self._lost.items()]
        return found + lost

    # --- asking the directories ---------------------------------------------------------------

    def _answers(
        self, ask: Callable[[CacheDir], Result], failed: Callable[[CacheDir, DiskFailed], None]
    ) -> Iterator[Result]:
        """What the directories in use answer, one after another; ``failed`` hears of the others."""
        for directory in self._directories:
            try:
                answer = ask(directory)
            except DiskFailed as error:
                failed(directory, error)
            else:
                yield answer

    def _tell(self, tell: Callable[[CacheDir], None]) -> None:
        for _ in self._answers(tell, self._examine):
            pass

    def _chain(self, ask: Callable[[CacheDir], Iterator[Result]]) -> Iterator[Result]:
        for directory in self._directories:
            try:
                yield from ask(directory)
            except DiskFailed as error:
                self._examine(directory, error)

    # --- where files are ----------------------------------------------------------------------

    def _likely(self, version_id: bytes) -> Sequence[CacheDir]:
        """All directories in use, beginning with the one where the file version was seen last."""
        directories = self._directories
        found = self._found.get(version_id)
        if found is None:
            return directories
        return sorted(directories, key=lambda directory: directory is not found)

    def _note_found(self, version_id: bytes, directory: CacheDir) -> None:
        if len(self._all) > 1 and self._found.get(version_id) is not directory:
            if len(self._found) >= FOUND_MAX:
                self._found.clear()
            self._found[version_id] = directory

    # --- where new files go -------------------------------------------------------------------

    def _places(self, version: FileVersion, *, decide: bool = True) -> list[CacheDir]:
        """The directories that a file may go to, the best one first.

        That is the one which has some of it already, then the one with files of the same source
        directory, then the one with most room. ``decide``: the next files of the source directory
        shall go there, too.
        """
        if len(self._directories) < 2:
            return list(self._directories)
        version_id = version.version_id
        ranks = self._ranked(
            lambda each: (
                each.knows(version_id),
                each.count_beside(version.path),
                each.room_bytes(),
            )
        )
        order = list(ranks)
        if not order or ranks[order[0]][0]:
            return order
        source_directory = os.path.dirname(version.path)
        if decide:
            # Remembered at once: another file of it may be placed before this one is there.
            home = self._home(source_directory, order[0])
        else:
            home = self._homes.get(source_directory, order[0])
        return sorted(order, key=lambda directory: directory is not home)

    def keep_together(self, tree: bytes, path: bytes) -> None:
        """The copy of a source directory is wanted as a whole, and ``path`` is a file in it.

        So it goes where the others go, or where most files below that directory are already, while
        they fit. Raises LocalError.
        """
        if len(self._directories) < 2:
            return
        home = self._homes.get(tree)
        if home not in self._directories:
            ranks = self._ranked(lambda each: (each.count_below(tree), each.room_bytes()))
            if not ranks:
                return
            home = self._home(tree, next(iter(ranks)))
        self._home(os.path.dirname(path), home, anew=True)

    def _ranked(
        self, rank: Callable[[CacheDir], tuple[int, ...]]
    ) -> dict[CacheDir, tuple[int, ...]]:
        """The ranks of all directories in use that can be asked, the highest first."""
        ranks = {}
        for directory in self._directories:
            try:
                ranks[directory] = rank(directory)
            except DiskFailed as error:
                self._suspect(directory, error)
        return dict(sorted(ranks.items(), key=lambda item: item[1], reverse=True))

    def _home(self, source_directory: bytes, proposed: CacheDir, *, anew: bool = False) -> CacheDir:
        """Where the files of a source directory go: where the one before went, or as proposed."""
        with self._lock:
            home = self._homes.get(source_directory)
            if anew or home not in self._directories:
                home = self._homes[source_directory] = proposed
            self._homes.move_to_end(source_directory)
            if len(self._homes) > HOMES_MAX:
                self._homes.popitem(last=False)
            return home

    # --- losing a disk ------------------------------------------------------------------------

    def _suspect(self, directory: CacheDir, error: DiskFailed) -> None:
        """The disk seems to fail, here where there is no time to ask it."""
        log.debug("%s is suspected to be lost: %s", directory.path, error)
        self._suspects.add(directory)

    def _examine_suspects(self) -> None:
        for directory in list(self._suspects):
            self._suspects.discard(directory)
            self._leave_if_lost(directory)

    def _examine(self, directory: CacheDir, error: DiskFailed) -> None:
        """After a failure: leave the directory if it is lost, else raise ``error`` again."""
        self._leave_if_lost(directory)
        if directory in self._directories:
            raise error

    def _leave_if_lost(self, directory: CacheDir) -> None:
        try:
            directory.probe()
        except DiskFailed as error:
            self._lose(directory, str(error))

    def _lose(self, directory: CacheDir, reason: str) -> None:
        with self._lock:
            if directory not in self._directories:
                return
            self._directories = tuple(d for d in self._directories if d is not directory)
            self._lost[directory.path] = reason
        rest = ", ".join(each.path for each in self._directories)
        log.error(
            "lost the cache directory %s: %s. Its files are no longer in the cache; %s. Restart the"
            " daemon when the disk is mended",
            directory.path,
            reason,
            f"new ones go to {rest}" if rest else "none is left, so jobs get the original paths",
        )
        self.on_lost(reason, directory.abandon())
        directory.close_partials()

    def _nothing_left(self) -> DiskFailed:
        return DiskFailed(f"no cache directory is left: {'; '.join(self._lost.values())}")


def _first(answers: Iterator[Result | None]) -> Result | None:
    """The first that is one. The directories after it are not asked."""
    return next((answer for answer in answers if answer is not None), None)


def check_places(roots: Sequence[Path]) -> None:
    """Refuse cache directories whose room would count twice, or that could hide that a disk is not
    mounted. Raises CacheDirUnusable."""
    devices: dict[int, Path] = {}
    for root in roots:
        try:
            device = os.lstat(root).st_dev
            device_above = os.lstat(os.path.dirname(root)).st_dev
        except OSError as error:
            log.debug("%s: %s", root, error)  # whoever opens it tells what is wrong
            continue
        if device != device_above:
            raise CacheDirUnusable(
                f"the disk of {root} is mounted there, so that without it there would be an empty"
                f" directory: name one below it in cache.dir, such as {root}/swarmcache"
            )
        if device in devices:
            raise CacheDirUnusable(
                f"{devices[device]} and {root} are on one disk, whose room must not count twice:"
                " name only one of them in cache.dir"
            )
        devices[device] = root
