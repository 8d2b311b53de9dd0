"""Replicas that no client of this node has asked for: another node has, for one of its own clients.

Here nobody has shown that they may read the source. So the file is fetched from peers alone, and
opened to nobody: who wants it later shows an open descriptor, as always, and then has it at once.
What must make room for it goes as for any other file.

Whether it comes is told to the node that asked, over the connection on which it did. When that ends
nobody waits for the file any more; what is under way goes on as long as bytes come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from aiohttp import web

from swarmcache.auth import Keyring
from swarmcache.chunks import FileVersion
from swarmcache.disk import Cache, User
from swarmcache.disk_calls import SharedFile
from swarmcache.errors import BadMessage, LocalError, NotCached
from swarmcache.link import Link, serve
from swarmcache.local_requests import LocalRequests
from swarmcache.messages import (
    PLACED_AT_ONCE_MAX,
    Message,
    NodeAddress,
    NotPlaced,
    PlaceReplica,
    Placing,
    ReplicaPlaced,
    decode_to_placed,
    encode,
)
from swarmcache.peer_events import AnswerCached, AnswerOriginal, PeerEvent, RequestGone
from swarmcache.peer_state import PeerState
from swarmcache.source_file import SourceFile

log = logging.getLogger(__name__)

# How often it is told how far a file is.
PROGRESS_S = 1.0


class PlacedReplicas:
    """Those of one daemon, on behalf of other nodes and of this one's own clients."""

    def __init__(
        self,
        cache: Cache,
        threads: ThreadPoolExecutor,
        state: PeerState,
        files: LocalRequests,
        keyring: Keyring,
        address: NodeAddress,
        numbers: Iterator[int],
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        handle: Callable[[PeerEvent], None],
    ) -> None:
        """``threads`` look at the disk; ``files`` knows what is being fetched; ``numbers`` are
        those of requests to the machine, which nobody else uses; ``handle`` tells the machine."""
        self._cache = cache
        self._threads = threads
        self._state = state
        self._files = files
        self._keyring = keyring
        self._identity = msgspec.msgpack.encode(address)
        self._numbers = numbers
        self._spawn = spawn
        self._handle = handle
        self._waiting: dict[int, asyncio.Future[str]] = {}  # why there is none; empty if there is

    async def obtain(
        self,
        source: SourceFile,
        user_name: str,
        chunk_size_bytes: int,
        reader: tuple[User, SharedFile] | None = None,
    ) -> bool:
        """Have a replica of this file; whether it was here before.

        ``reader``: a user of this node, and what they have opened it with. Raises LocalError.
        """
        version_id = source.version.version_id
        loop = asyncio.get_running_loop()
        if await self.renew(version_id):
            return True
        # Once more: it may have come since, and then nobody would tell.
        if self._state.fetching(version_id) is None and self._cache.renew(version_id):
            return True
        number = next(self._numbers)
        ended = self._waiting[number] = loop.create_future()
        try:
            self._files.want_replica(number, source, user_name, chunk_size_bytes, reader)
            reason = await ended
        finally:
            if self._waiting.pop(number, None) is not None:
                self._handle(RequestGone(number))
        if reason:
            raise NotCached(reason)
        return False

    async def renew(self, version_id: bytes) -> bool:
        """See ``Cache.renew``. Raises LocalError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._cache.renew, version_id)

    def asked_for(self, request: int) -> bool:
        """Whether this number of a request is one of these."""
        return request in self._waiting

    def carry_out(self, effect: AnswerCached | AnswerOriginal) -> None:
        """Give the machine's answer to whoever waits for it."""
        ended = self._waiting.pop(effect.request)
        if not ended.done():
            ended.set_result(effect.reason if isinstance(effect, AnswerOriginal) else "")

    def done_bytes(self, version_id: bytes) -> int:
        """How much there is of a file that is being fetched."""
        fetching = self._state.fetching(version_id)
        if fetching is None or fetching.download is None:
            return 0
        return fetching.download.layout.mask_bytes(fetching.download.held)

    # --- on behalf of other nodes ---------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer another node."""
        return await serve(request, self._keyring, "prefetch", self._identity, self._talk)

    async def _talk(self, link: Link) -> None:
        under_way: set[asyncio.Task[None]] = set()

        def take(data: bytes) -> None:
            message = decode_to_placed(data)
            if len(under_way) >= PLACED_AT_ONCE_MAX:
                raise BadMessage("too many files at once")
            task = self._spawn(self._place(link, message))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

        try:
            await link.receive(take)
        finally:
            for task in under_way:
                task.cancel()
            await link.wait_closed()

    async def _place(self, link: Link, wanted: PlaceReplica) -> None:
        version = FileVersion(wanted.path, wanted.size_bytes, wanted.mtime_ns)
        version_id = version.version_id
        telling = self._spawn(self._tell_progress(link, version_id))
        answer: Message = NotPlaced(version_id, "the daemon is being stopped")
        try:
            source = SourceFile(version, wanted.file_server)
            hit = await self.obtain(source, wanted.user, wanted.chunk_size_bytes)
            answer = ReplicaPlaced(version_id, hit)
        except LocalError as error:
            answer = NotPlaced(version_id, str(error)[:1024])
        except Exception as error:
            answer = NotPlaced(version_id, f"internal error: {error}"[:1024])
            raise
        finally:
            telling.cancel()
            link.send(encode(answer))

    async def _tell_progress(self, link: Link, version_id: bytes) -> None:
        while True:
            link.send(encode(Placing(version_id, self.done_bytes(version_id))))
            await asyncio.sleep(PROGRESS_S)
