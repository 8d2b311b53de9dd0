"""Carries out what the node's machine wants of the disk, and looks after the disk meanwhile.

The disk may block, so all of it runs in threads. What is asked about one file version is done in
the order in which it was asked for. Every ``LocalError`` becomes an event or a line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from swarmcache.cache_dir import Damaged
from swarmcache.disk import Cache, Partial, User
from swarmcache.errors import DiskFailed, LocalError
from swarmcache.machine_shell import MachineShell
from swarmcache.peer_events import (
    CheckCopy,
    ChunksRecovered,
    DiskMeasured,
    DropPartial,
    FilePublished,
    LoadManifest,
    ManifestLoaded,
    PeerEffect,
    PeerEvent,
    PublishFailed,
    ReplicaAdded,
    ReplicaDropped,
    ReplicaNotAdded,
    ReplicasLost,
    ReserveSpace,
    SpaceRefused,
    SpaceReserved,
    WriteFailed,
)
from swarmcache.retention import PASS_S
from swarmcache.scrub import Scrubber, Stopped

log = logging.getLogger(__name__)

DISK_STATUS_S = 5.0
# Between two parts of a pass through what nobody uses, for whoever needs the disk.
BREATH_S = 0.5
# So long a copy is not made durable for the sake of those who are being answered. It takes them
# milliseconds, but for a user all of whose threads hang: nobody else may be made to wait for that.
ANSWERS_S = 2.0

Task = asyncio.Task[None]
Result = TypeVar("Result")


class DiskWorker:
    """The disk work of one daemon. It holds the partial files that are being filled."""

    def __init__(
        self,
        cache: Cache,
        threads: ThreadPoolExecutor,
        digest_threads: ThreadPoolExecutor,
        spawn: Callable[[Coroutine[Any, Any, None]], Task],
        shell: MachineShell[PeerEvent, PeerEffect],
        end_work: Callable[[bytes], Collection[Task]],
        mend: Callable[[Damaged], None],
        scrub_rate_bytes_per_s: int | None,
        max_age_s: float | None,
    ) -> None:
        """``digest_threads`` are for what takes as long as a file is big, so that nobody else waits
        for that. ``spawn`` runs a coroutine in the background; ``shell`` tells the machine.

        ``end_work`` is called when a partial file is let go of; it returns the tasks that hand out
        the finished copy. ``mend`` has a copy that was taken out completed again. ``max_age_s``:
        how long a copy stays that nobody uses; None for ever.
        """
        self._cache = cache
        self._threads = threads
        self._digest_threads = digest_threads
        self._spawn = spawn
        self._handle = shell.handle
        self._end_work = end_work
        self._mend = mend
        self._max_age_s = max_age_s
        self._loop = loop = asyncio.get_running_loop()
        self._scrubber = Scrubber(
            cache,
            scrub_rate_bytes_per_s,
            shell.handle_from_thread,
            lambda: loop.call_soon_threadsafe(self._look_at_damaged),
        )
        self._partials: dict[bytes, Partial] = {}
        self._syncing = asyncio.Lock()
        self._undurable: set[bytes] = set()  # what the next sync shall make durable
        self._tail: dict[bytes, Task] = {}  # the last of the work on each file version
        self._in_place: set[Task | None] = set()  # those that have only to make it durable
        self._unreadable: set[bytes] = set()  # what is being digested for that

    def start(self) -> None:
        """Begin to look after the disks."""

        def on_lost(reason: str, partials: list[Partial]) -> None:
            self._loop.call_soon_threadsafe(self._lost, reason, partials)

        self._cache.on_lost = on_lost
        self._cache.tell_before_evicting(self._tell_evicted)
        self._spawn(self._look_after_disk())
        if self._max_age_s is not None:
            self._spawn(self._drop_unused(min(PASS_S, self._max_age_s / 4)))
        self._scrubber.start()

    def stop(self) -> None:
        """Look after nothing any more. Waits for a thread; call it before the cache is closed."""
        self._scrubber.stop()

    def partial(self, version_id: bytes) -> Partial | None:
        """The file that is being filled, once there is room for it. Safe to call from a thread."""
        return self._partials.get(version_id)

    def carry_out(self, effect: ReserveSpace | DropPartial | LoadManifest | CheckCopy) -> None:
        match effect:
            case ReserveSpace():
                self._after(effect.version.version_id, self._reserve(effect), SpaceRefused)
            case DropPartial():
                self._drop(effect)
            case CheckCopy():
                self._spawn(self._check(effect.version_id))
            case LoadManifest():
                load = self._load_manifest(effect.version_id)
                if self._tail.get(effect.version_id) in self._in_place:
                    self._spawn(load)  # peers wait for it, and to fsync a big file takes minutes
                else:
                    self._after(effect.version_id, load)

    def publish(self, version_id: bytes, users: Sequence[User]) -> None:
        """Carry out ``PublishFile``, with links for these users."""
        self._after(version_id, self._publish(version_id, users), PublishFailed)

    def add_replica(self, version_id: bytes, make: Coroutine[Any, Any, None]) -> None:
        """Carry out ``AddReplica``: ``make`` makes the replica, or raises LocalError."""
        self._after(version_id, self._add_replica(version_id, make), ReplicaNotAdded)

    def _after(
        self,
        version_id: bytes,
        coroutine: Coroutine[Any, Any, None],
        failed: Callable[[bytes, str], PeerEvent] | None = None,
    ) -> None:
        """Run disk work on one file version in the order in which it was asked for.

        ``failed`` makes the event that tells the machine of a bug of ours, so that no job waits.
        """
        former = self._tail.get(version_id)

        async def in_turn() -> None:
            if former is not None:
                await asyncio.wait([former])
            try:
                await coroutine
            except Exception as error:
                if failed is not None:
                    self._handle(failed(version_id, f"internal error: {error}"))
                raise
            finally:
                if self._tail.get(version_id) is asyncio.current_task():
                    del self._tail[version_id]

        self._tail[version_id] = self._spawn(in_turn())

    async def _in_thread(self, function: Callable[..., Result], *args: object) -> Result:
        return await self._loop.run_in_executor(self._threads, function, *args)

    async def _in_digest_thread(self, function: Callable[..., Result], *args: object) -> Result:
        return await self._loop.run_in_executor(self._digest_threads, function, *args)

    # --- one file version -----------------------------------------------------------------------

    async def _reserve(self, effect: ReserveSpace) -> None:
        version_id = effect.version.version_id
        try:
            partial = await self._in_thread(
                self._cache.begin, effect.version, effect.chunk_size_bytes
            )
        except LocalError as error:
            self._handle(SpaceRefused(version_id, str(error)))
            return
        self._partials[version_id] = partial
        self._handle(SpaceReserved(version_id, partial.layout.chunk_size_bytes))
        digests: dict[int, bytes] = {}
        if partial.resumable:
            try:
                digests = await self._in_digest_thread(self._recover, partial)
            except LocalError as error:
                self._handle(WriteFailed(version_id, str(error)))
            except Stopped:
                return  # nobody waits for it any more
        self._handle(ChunksRecovered(version_id, digests))

    def _recover(self, partial: Partial) -> dict[int, bytes]:
        """What there is of a file; raises Stopped when the daemon ends. Runs in a thread."""
        digests: dict[int, bytes] = {}
        for chunk, digest in partial.recover():
            digests[chunk] = digest
            self._scrubber.go_on(partial.layout.length_bytes(chunk))
        return digests

    async def _publish(self, version_id: bytes, users: Sequence[User]) -> None:
        partial = self._partials[version_id]
        try:
            await self._in_thread(partial.publish, users)
        except LocalError as error:
            self._handle(PublishFailed(version_id, str(error)))
            return
        del self._partials[version_id]
        self._handle(FilePublished(version_id))
        await self._answer_and_make_durable([version_id])

    async def _add_replica(self, version_id: bytes, make: Coroutine[Any, Any, None]) -> None:
        try:
            await make
        except LocalError as error:
            self._handle(ReplicaNotAdded(version_id, str(error)))
            return
        self._handle(ReplicaAdded(version_id))
        await self._answer_and_make_durable([version_id])

    def files_arrived(self, version_ids: Sequence[bytes]) -> None:
        """Small files are in place: see to it that they are durable. The machine has been told."""
        task = self._spawn(self._answer_and_make_durable(version_ids))
        self._tail |= dict.fromkeys(version_ids, task)

        def ended(_: Task) -> None:
            for version_id in version_ids:
                if self._tail.get(version_id) is task:
                    del self._tail[version_id]

        task.add_done_callback(ended)

    async def _answer_and_make_durable(self, version_ids: Sequence[bytes]) -> None:
        task = asyncio.current_task()
        self._in_place.add(task)
        try:
            answers = [each for version_id in version_ids for each in self._end_work(version_id)]
            if answers:  # jobs do not share the disk with our fsync
                await asyncio.wait(answers, timeout=ANSWERS_S)
            await self._make_durable(version_ids)
        finally:
            self._in_place.remove(task)

    async def _make_durable(self, version_ids: Sequence[bytes]) -> None:
        """Wait until the copies are durable, or dropped.

        One thread at a time does it, for all that wait: many small files would keep all threads
        busy with an fsync each.
        """
        self._undurable.update(version_ids)
        async with self._syncing:
            if self._undurable.isdisjoint(version_ids):
                return  # they went along with others
            some, self._undurable = self._undurable, set()
            try:
                await self._in_thread(self._cache.make_durable, sorted(some))
            except LocalError as error:
                log.error("dropped what could not be made durable: %s", error)

    def _drop(self, effect: DropPartial) -> None:
        version_id = effect.version_id
        partial = self._partials.pop(version_id, None)
        self._end_work(version_id)
        self._after(version_id, self._drop_on_disk(version_id, partial, keep=effect.keep))

    async def _drop_on_disk(
        self, version_id: bytes, partial: Partial | None, *, keep: bool
    ) -> None:
        try:
            if partial is not None:
                await self._in_thread(partial.close if keep else partial.discard)
            elif not keep:
                await self._in_thread(self._cache.drop, version_id)
        except DiskFailed as error:  # whether it is lost, the next look at all disks will tell
            log.info("cannot drop what was fetched: %s", error)
        except LocalError as error:
            log.error("cannot drop what was fetched: %s", error)

    async def _load_manifest(self, version_id: bytes) -> None:
        loaded = ManifestLoaded(version_id, (), 0)
        try:
            manifest = await self._in_thread(self._cache.manifest, version_id)
            if manifest is not None:
                chunk_size_bytes = manifest.layout.chunk_size_bytes
                loaded = ManifestLoaded(version_id, manifest.digests, chunk_size_bytes)
        except LocalError as error:
            log.error("cannot read a manifest: %s", error)
        self._handle(loaded)

    def _tell_evicted(self, version_ids: Sequence[bytes]) -> Future[None]:
        """Have the tracker told in the event loop; runs in a thread."""
        told: Future[None] = Future()

        def tell() -> None:
            for version_id in version_ids:
                self._handle(ReplicaDropped(version_id))
            told.set_result(None)

        self._loop.call_soon_threadsafe(tell)
        return told

    # --- the whole ------------------------------------------------------------------------------

    def _lost(self, reason: str, partials: Sequence[Partial]) -> None:
        """A disk is lost: what was being fetched to it must be begun again."""
        for partial in partials:
            version_id = partial.version.version_id
            if self._partials.get(version_id) is partial:
                self._handle(WriteFailed(version_id, reason))
        self._handle(ReplicasLost())

    async def _look_after_disk(self) -> None:
        """Now and then write down when copies were last used, and measure the disk."""
        while True:
            self._look_at_damaged()
            try:
                await self._in_thread(self._cache.look_after)
            except LocalError as error:
                log.error("the disk of the cache fails: %s", error)
            try:
                self._handle(DiskMeasured(self._cache.status()))
            except LocalError as error:
                log.error("cannot measure the disk of the cache: %s", error)
            await asyncio.sleep(DISK_STATUS_S)

    async def _drop_unused(self, pause_s: float) -> None:
        """Now and then take copies away that were not used for too long."""
        while True:
            more = False
            try:
                more = await self._in_thread(self._cache.drop_unused)
            except LocalError as error:
                log.error("cannot drop copies that nobody uses: %s", error)
            await asyncio.sleep(BREATH_S if more else pause_s)

    # --- copies that are wrong ------------------------------------------------------------------

    async def verify(self, version_id: bytes) -> list[int] | None:
        """``Cache.verify``; what is wrong is fetched again from peers. Raises LocalError.

        When this is cancelled, the thread leaves off as well.
        """
        cancelled = threading.Event()

        def after_piece(size_bytes: int) -> None:
            self._scrubber.go_on(size_bytes)
            if cancelled.is_set():
                raise Stopped

        try:
            bad = await self._in_digest_thread(self._cache.verify, version_id, after_piece)
        except Stopped as error:
            raise LocalError("the daemon is being stopped") from error
        except asyncio.CancelledError:
            cancelled.set()
            raise
        self._look_at_damaged()
        return bad

    async def _check(self, version_id: bytes) -> None:
        """A peer says that it got wrong bytes."""
        try:
            bad = await self.verify(version_id)
        except LocalError as error:
            log.error("cannot check what a peer says is wrong: %s", error)
            return
        if bad is not None:
            verdict = "and so it is" if bad else "but it is right"
            log.warning("a peer says that our copy of %s is wrong, %s", version_id.hex(), verdict)

    def check_unreadable(self, version_id: bytes) -> None:
        """The disk could not read a chunk of this replica for a peer: digest it, unless that is
        under way. Else it would be announced until it is scrubbed, and each peer would ask for it.
        """
        if version_id not in self._unreadable:
            self._unreadable.add(version_id)
            self._spawn(self._check_unreadable(version_id))

    async def _check_unreadable(self, version_id: bytes) -> None:
        try:
            await self.verify(version_id)
        except LocalError as error:
            log.error("cannot check what could not be read: %s", error)
        finally:
            self._unreadable.remove(version_id)

    def _look_at_damaged(self) -> None:
        """Copies that were taken out are no longer announced, and shall be complete again."""
        for version_id, damaged in self._cache.take_damaged().items():
            self._handle(ReplicaDropped(version_id))
            if damaged is not None:
                self._mend(damaged)
