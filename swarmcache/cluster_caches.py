"""What the caches of all nodes hold, and giving some of it up everywhere, on behalf of an admin.

root or the daemon's own user asks the daemon of one node. It asks the others that were named, each
over a connection of its own; that the asker is a daemon of the cluster is all that these go by, as
with everything else between nodes. Paths are named by their digests: every node knows the paths of
its own files. So it needs no node that knows them all, and no source that is still there.

An answer comes a page at a time, the next one when the former was taken on by the client, so that
nobody has a million of them in memory. What may go is decided by the node that holds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import aiohttp
import msgspec
from aiohttp import web

from swarmcache.auth import Keyring
from swarmcache.cache_requests import keep_alive, sees_all
from swarmcache.disk import Cache, Forgotten, Surveyed
from swarmcache.errors import LocalError, PeerUnavailable, SwarmcacheError
from swarmcache.link import Link, connect_to_node, serve
from swarmcache.local_protocol import (
    AboutNodes,
    Answer,
    End,
    Failed,
    ForgetOn,
    KnownReplica,
    NodeForgot,
    NodeReplicas,
    NodeSilent,
    NotForgotten,
)
from swarmcache.local_server import LocalConnection
from swarmcache.messages import (
    ForgetReplicas,
    FromAdmin,
    GoOn,
    HeldReplica,
    KeptReplica,
    NodeAddress,
    ReplicasForgotten,
    ReplicasSurveyed,
    SurveyFailed,
    SurveyReplicas,
    ToAdmin,
    decode_from_admin,
    decode_to_admin,
    encode,
)
from swarmcache.path_digests import PathMatcher, path_digest

ASKED_AT_ONCE = 32
# A page is a few files to look at, or to take away; a disk that others keep busy takes longer.
PAGE_S_MAX = 30.0

Question: TypeAlias = SurveyReplicas | ForgetReplicas
Page: TypeAlias = list[Surveyed] | Forgotten


class ClusterCaches:
    """Both sides of these questions, for one daemon."""

    def __init__(
        self,
        cache: Cache,
        threads: ThreadPoolExecutor,
        session: aiohttp.ClientSession,
        keyring: Keyring,
        address: NodeAddress,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """``threads`` look at the disk; ``session`` connects to other nodes; ``address`` is this
        node's own; ``spawn`` runs a coroutine in the background."""
        self._cache = cache
        self._threads = threads
        self._session = session
        self._keyring = keyring
        self._address = address
        self._identity = msgspec.msgpack.encode(address)
        self._spawn = spawn
        self._busy: set[LocalConnection] = set()

    # --- local clients --------------------------------------------------------------------------

    def take(self, connection: LocalConnection, request: AboutNodes) -> None:
        """Begin to answer a request."""
        if not sees_all(connection.user):
            connection.send(Failed("only root and the daemon's own user may do that"))
        elif connection in self._busy:
            connection.send(Failed("one request at a time on a connection"))
        else:
            self._busy.add(connection)
            task = self._spawn(self._serve_client(connection, request))
            connection.on_closed[self] = lambda: self._gone(connection, task)

    def _gone(self, connection: LocalConnection, task: asyncio.Task[None]) -> None:
        self._busy.discard(connection)
        task.cancel()

    async def _serve_client(self, connection: LocalConnection, request: AboutNodes) -> None:
        digests = [path_digest(path) for path in request.paths]
        question: Question = SurveyReplicas(digests)
        if isinstance(request, ForgetOn):
            question = ForgetReplicas(digests, request.unused_s)
        alive = self._spawn(keep_alive(connection))
        places = asyncio.Semaphore(ASKED_AT_ONCE)
        sending = asyncio.Lock()

        async def ask_one(node: str) -> None:
            async with places:
                async for answer in self._ask(node, question):
                    async with sending:
                        connection.send(answer)
                        await connection.drained()

        try:
            async with asyncio.TaskGroup() as group:
                for node in dict.fromkeys(request.nodes or [self._address.node]):
                    group.create_task(ask_one(node))
        except Exception as error:
            self._end(connection, Failed(f"internal error: {error}"))
            raise
        else:
            self._end(connection, End())
        finally:
            alive.cancel()

    def _end(self, connection: LocalConnection, answer: Answer) -> None:
        """The last answer. With it the client may ask the next question."""
        self._busy.discard(connection)
        connection.on_closed.pop(self, None)
        connection.send(answer)

    async def _ask(self, node: str, question: Question) -> AsyncIterator[Answer]:
        """All that one node answers, for the client."""
        try:
            if node == self._address.node:
                async for page in self._own_pages(question):
                    yield _own_answer(node, page)
                return
            async for message in self._pages_of(node, question):
                yield _others_answer(node, message)
        except SwarmcacheError as error:
            yield NodeSilent(node, str(error))

    # --- other nodes ----------------------------------------------------------------------------

    async def _pages_of(
        self, node: str, question: Question
    ) -> AsyncIterator[ReplicasSurveyed | ReplicasForgotten]:
        """What another node answers. Raises RemoteError."""
        link = await connect_to_node(self._session, node, self._keyring, "admin", self._identity)
        inbox: asyncio.Queue[ToAdmin] = asyncio.Queue()

        async def receive() -> None:
            reason = "it closed the connection in the middle of its answer"
            try:
                await link.receive(lambda data: inbox.put_nowait(decode_to_admin(data)))
            except SwarmcacheError as error:
                reason = str(error)
            inbox.put_nowait(SurveyFailed(reason))

        self._spawn(receive())
        try:
            link.send(encode(question))
            while True:
                async with asyncio.timeout(PAGE_S_MAX):
                    message = await inbox.get()
                if isinstance(message, SurveyFailed):
                    raise PeerUnavailable(message.reason)
                yield message
                if message.last:
                    return
                link.send(encode(GoOn()))
        except TimeoutError as error:
            raise PeerUnavailable(f"it has said nothing for {PAGE_S_MAX:g} s") from error
        finally:
            self._spawn(link.wait_closed())

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer another node."""
        return await serve(request, self._keyring, "admin", self._identity, self._talk)

    async def _talk(self, link: Link) -> None:
        inbox: asyncio.Queue[FromAdmin] = asyncio.Queue()
        answering = self._spawn(self._answer(link, inbox))
        try:
            await link.receive(lambda data: inbox.put_nowait(decode_from_admin(data)))
        finally:
            answering.cancel()
            await link.wait_closed()

    async def _answer(self, link: Link, inbox: asyncio.Queue[FromAdmin]) -> None:
        question = await inbox.get()
        if isinstance(question, GoOn):
            link.close()
            return
        try:
            async for page in self._own_pages(question):
                link.send(encode(_message(page)))
                await inbox.get()  # whatever it is, the other side is ready for more
        except LocalError as error:
            link.send(encode(SurveyFailed(str(error)[:1024])))
        else:
            link.send(encode(_last(question)))

    # --- this node ------------------------------------------------------------------------------

    async def _own_pages(self, question: Question) -> AsyncIterator[Page]:
        """What this node has, or has given up. Raises LocalError."""
        loop = asyncio.get_running_loop()
        pages = self._begin(question)
        while (page := await loop.run_in_executor(self._threads, next, pages, None)) is not None:
            yield page

    def _begin(self, question: Question) -> Iterator[Page]:
        wanted = PathMatcher(question.paths).matches
        if isinstance(question, ForgetReplicas):
            return self._cache.forget(wanted, question.unused_s)
        return self._cache.survey(wanted)


def _message(page: Page) -> ReplicasSurveyed | ReplicasForgotten:
    """A page for another node, which is not told any path."""
    if isinstance(page, Forgotten):
        kept = [KeptReplica(each.version_id, why) for each, why in page.kept]
        return ReplicasForgotten(page.dropped, page.dropped_bytes, kept)
    return ReplicasSurveyed(
        [HeldReplica(each.version_id, each.size_bytes, _idle_s(each)) for each in page]
    )


def _last(question: Question) -> ReplicasSurveyed | ReplicasForgotten:
    if isinstance(question, ForgetReplicas):
        return ReplicasForgotten(last=True)
    return ReplicasSurveyed(last=True)


def _own_answer(node: str, page: Page) -> Answer:
    if isinstance(page, Forgotten):
        kept = [NotForgotten(each.version_id.hex(), why, each.path) for each, why in page.kept]
        return NodeForgot(node, page.dropped, page.dropped_bytes, kept)
    return NodeReplicas(
        node,
        [
            KnownReplica(each.version_id.hex(), each.size_bytes, _idle_s(each), each.path)
            for each in page
        ],
    )


def _others_answer(node: str, message: ReplicasSurveyed | ReplicasForgotten) -> Answer:
    if isinstance(message, ReplicasForgotten):
        kept = [NotForgotten(each.version_id.hex(), each.why) for each in message.kept]
        return NodeForgot(node, message.dropped, message.dropped_bytes, kept)
    return NodeReplicas(
        node,
        [
            KnownReplica(each.version_id.hex(), each.size_bytes, each.idle_s)
            for each in message.replicas
        ],
    )


def _idle_s(found: Surveyed) -> float:
    return round(max(time.time() - found.last_used_s, 0.0), 3)
