"""Answers what local clients ask that write files: a slot, and a replica of what they wrote.

The client writes by itself, with its user's own rights. The daemon knows the file server from the
descriptor of the directory, and asks the machine; what the machine says goes to the client as it
comes. When the connection closes, however the client ends, the machine knows that nobody writes.

A replica is made for a client that has the file open for writing: who may only read it must not
decide what others get to see of it.

Invariant: every descriptor that was handed over is closed when its request ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from swarmcache.chunks import FileVersion, choose_chunk_size
from swarmcache.clock import now_s
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk import Cache
from swarmcache.disk_calls import SharedFile
from swarmcache.disk_worker import DiskWorker
from swarmcache.errors import (
    LocalError,
    NoThread,
    SourceFailed,
    SourceUnreadable,
    SwarmcacheError,
)
from swarmcache.local_protocol import (
    AboutWriting,
    End,
    Failed,
    NoSlot,
    OfferReplica,
    Slot,
    SlotHeard,
    Working,
    WriteSlot,
)
from swarmcache.local_server import LocalConnection
from swarmcache.peer_events import (
    AddReplica,
    AnswerNoSlot,
    AnswerSlot,
    PeerEvent,
    RefuseReplica,
    ReplicaDropped,
    ReplicaOffered,
    RequestGone,
    WriterAnswered,
    WriteWanted,
)
from swarmcache.peer_writes import PIECE_S
from swarmcache.replica_copy import ReplicaCopy, Waits, is_replica
from swarmcache.source_file import SourceExaminer

WORKING_S = 1.0
# So long a call may take that reads a copy. Others wait for the file meanwhile, and what was copied
# from is meant to be on the node. ``get`` waits for up to a minute where a disk works on a file.
HANGS_S = 10.0

Task = asyncio.Task[None]
Result = TypeVar("Result")


@dataclass(slots=True)
class Writer:
    """A client that writes to this file server, and until when it was told that it may."""

    connection: LocalConnection
    file_server: str
    until_s: float = 0.0


@dataclass(slots=True)
class Offer:
    """A file that a client has written, and a copy of it, whose BLAKE3 is ``digest``.

    ``done`` tells why there is no replica of it, or nothing.
    """

    connection: LocalConnection
    version: FileVersion
    file: SharedFile
    copy: SharedFile
    digest: bytes
    done: asyncio.Future[str]


class WriteRequests:
    """The requests of all clients of one daemon that write."""

    def __init__(
        self,
        cache: Cache,
        examiner: SourceExaminer,
        examine_threads: CompartmentThreads,
        copy_threads: CompartmentThreads,
        disk: DiskWorker,
        numbers: Iterator[int],
        *,
        chunk_size_bytes: int | None,
        spawn: Callable[[Coroutine[Any, Any, None]], Task],
        handle: Callable[[PeerEvent], None],
    ) -> None:
        """``numbers``, ``chunk_size_bytes``, ``spawn`` and ``handle`` as for ``LocalRequests``.

        ``copy_threads`` make replicas, one at a time for each user, who is their owner.
        """
        self._cache = cache
        self._examiner = examiner
        self._examine_threads = examine_threads
        self._copy_threads = copy_threads
        self._disk = disk
        self._numbers = numbers
        self._chunk_size_bytes = chunk_size_bytes
        self._spawn = spawn
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._writers: dict[int, Writer] = {}
        self._by_connection: dict[LocalConnection, int] = {}
        self._offers: dict[int, Offer] = {}
        self._waits: dict[int, Waits] = {}  # by uid
        self._busy: set[LocalConnection] = set()  # those that write, or offer what they wrote

    def take(self, connection: LocalConnection, request: AboutWriting, fds: list[int]) -> None:
        """Begin to answer a request; owns ``fds``."""
        match request:
            case SlotHeard():
                number = self._by_connection.get(connection)
                if number is not None:
                    self._handle(WriterAnswered(number))
            case _ if connection in self._busy:  # so that nobody has more descriptors of ours
                connection.close_files(fds)
                connection.send(Failed("one request at a time on a connection"))
            case WriteSlot():
                self._busy.add(connection)
                self._spawn(self._want_slot(connection, *fds))
            case OfferReplica():
                self._busy.add(connection)
                self._spawn(self._add_replica(connection, request.digest, *fds))

    def carry_out(self, effect: AnswerSlot | AnswerNoSlot | AddReplica | RefuseReplica) -> None:
        """Give the machine's answer to the client who asked."""
        match effect:
            case AnswerSlot() | AnswerNoSlot():
                self._answer(effect)
            case AddReplica():
                offer = self._offers[effect.request]
                self._disk.add_replica(effect.version_id, self._make(offer))
            case RefuseReplica():
                self._offers[effect.request].done.set_result(effect.reason)

    def _end(self, connection: LocalConnection, answer: NoSlot | End | Failed) -> None:
        """The last answer. With it the client may ask the next question."""
        self._busy.discard(connection)
        connection.send(answer)

    # --- slots ----------------------------------------------------------------------------------

    def _answer(self, effect: AnswerSlot | AnswerNoSlot) -> None:
        writer = self._writers.get(effect.request)
        if writer is None:
            return  # the client has gone, and the machine is about to hear of it
        if isinstance(effect, AnswerNoSlot):
            self._forget(effect.request)
            self._end(writer.connection, NoSlot(effect.reason))
            return
        if effect.until_s is not None:
            writer.until_s = effect.until_s
        writer.connection.send(Slot(effect.until_s, writer.file_server))

    async def _want_slot(self, connection: LocalConnection, directory_fd: int) -> None:
        try:
            file_server = await self._examine_threads.run(
                connection.user.uid,
                self._examiner.place(directory_fd),
                self._examiner.file_server_of_directory,
                directory_fd,
            )
        except SwarmcacheError as error:
            self._end(connection, NoSlot(str(error)))
            return
        except Exception as error:
            self._end(connection, NoSlot(f"internal error: {error}"))
            raise
        finally:
            connection.close_files([directory_fd])
        if not connection.is_open:
            self._busy.discard(connection)
            return
        number = next(self._numbers)
        self._writers[number] = Writer(connection, file_server)
        self._by_connection[connection] = number
        connection.on_closed[self] = lambda: self._gone(number)
        self._handle(WriteWanted(number, file_server, connection.user.name))

    def _gone(self, number: int) -> None:
        """A client that has left writes no more. One that was cut off (this daemon is being
        stopped) goes on as long as it was told that it may, and nobody answers for it."""
        writer = self._forget(number)
        self._busy.discard(writer.connection)
        wait_s = 0.0 if writer.connection.client_left else writer.until_s + PIECE_S - now_s()
        if wait_s > 0:
            self._loop.call_later(wait_s, self._handle, RequestGone(number))
        else:
            self._handle(RequestGone(number))

    def _forget(self, number: int) -> Writer:
        writer = self._writers.pop(number)
        del self._by_connection[writer.connection]
        writer.connection.on_closed.pop(self, None)
        return writer

    # --- replicas -------------------------------------------------------------------------------

    async def _add_replica(
        self, connection: LocalConnection, digest: bytes, file_fd: int, copy_fd: int
    ) -> None:
        file, copy = connection.share(file_fd), connection.share(copy_fd)
        alive = self._spawn(_keep_alive(connection))
        try:
            uid, place = connection.user.uid, self._examiner.place(file.fd)
            version = await _keeping_open(
                partial(self._examine_threads.submit, uid, place), self._examine, file, copy
            )
            reason = ""
            if version.size_bytes:  # an empty file needs no replica
                offer = Offer(connection, version, file, copy, digest, asyncio.Future())
                reason = await self._offer(offer)
            self._end(connection, Failed(reason) if reason else End())
        except SwarmcacheError as error:
            self._end(connection, Failed(str(error)))
        except Exception as error:
            self._end(connection, Failed(f"internal error: {error}"))
            raise
        finally:
            alive.cancel()
            file.release()
            copy.release()

    def _examine(self, file: SharedFile, copy: SharedFile) -> FileVersion:
        """What a replica is to be made of. Raises SourceUnreadable, SourceFailed."""
        # Of a file with the attribute "a" (append only), who may add to it cannot change the rest.
        if fcntl.fcntl(file.fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND) != os.O_RDWR:
            raise SourceUnreadable("the file is not open for reading and writing")
        version = self._examiner.examine(file.fd).version
        found = os.fstat(copy.fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != version.size_bytes:
            raise SourceUnreadable("the copy is no regular file of the same size")
        return version

    async def _offer(self, offer: Offer) -> str:
        """Have the machine decide; the reason why there is no replica, or nothing."""
        version_id, uid = offer.version.version_id, offer.connection.user.uid
        if self._cache.lookup(offer.version, offer.connection.user) is not None:
            if await self._copying(uid, is_replica, self._cache, version_id, offer.digest):
                return ""
            # Of what was there before, whose size and time happen to be the same.
            self._handle(ReplicaDropped(version_id))
            await self._copying(uid, self._cache.drop, version_id)
        number = next(self._numbers)
        self._offers[number] = offer
        try:
            self._handle(ReplicaOffered(number, version_id))
            return await offer.done
        finally:
            del self._offers[number]

    async def _make(self, offer: Offer) -> None:
        """For ``DiskWorker``: make the replica. Raises LocalError."""
        reason = "internal error"
        try:
            await self._make_unless_it_hangs(offer)
            reason = ""
        except LocalError as error:
            reason = str(error)
            raise
        finally:
            if not offer.done.done():
                offer.done.set_result(reason)

    async def _make_unless_it_hangs(self, offer: Offer) -> None:
        """Others want the same file, and wait for this: no longer than its user's files answer."""
        version, user = offer.version, offer.connection.user
        chunk_size_bytes = self._chunk_size_bytes or choose_chunk_size(version.size_bytes)
        waits = self._waits.setdefault(user.uid, Waits())
        copy = ReplicaCopy(self._cache, version, chunk_size_bytes, offer.digest, [user], waits)

        def make(file: SharedFile, copied: SharedFile) -> None:
            copy.make(file.fd, copied.fd)

        submit = partial(self._copy_threads.submit, user.uid, None)
        making = _keeping_open(submit, make, offer.file, offer.copy)
        try:
            while not (await asyncio.wait([making], timeout=WORKING_S))[0]:
                hangs = waits.waited_s() > HANGS_S
                if hangs and await asyncio.to_thread(copy.give_up):
                    raise SourceFailed(f"the copy could not be read for {HANGS_S:g} s")
            await making
        finally:
            making.cancel()  # if it waits for its turn; it does nothing to one that has ended

    async def _copying(self, uid: int, function: Callable[..., Result], *args: object) -> Result:
        """What may take long: each user waits for their own files only, should these hang."""
        return await self._copy_threads.run(uid, None, function, *args)


def _keeping_open(
    submit: Callable[[Callable[[], Result]], Future[Result]],
    function: Callable[..., Result],
    *files: SharedFile,
) -> asyncio.Future[Result]:
    """``function(*files)``, which ``submit`` runs in a thread: they stay open until it has ended.

    Raises NoThread.
    """
    with ExitStack() as stack:
        for file in files:
            file.retain()
            stack.callback(file.release)
        kept = stack.pop_all()

    def call() -> Result:
        with kept:
            return function(*files)

    try:
        future = submit(call)
    except NoThread:
        kept.close()
        raise
    # Cancelled, it is not called at all.
    future.add_done_callback(lambda ended: kept.close() if ended.cancelled() else None)
    return asyncio.wrap_future(future)


async def _keep_alive(connection: LocalConnection) -> None:
    """Let the client know that its request is not forgotten, until this is cancelled."""
    while True:
        await asyncio.sleep(WORKING_S)
        connection.send(Working())
