"""Which file versions a node holds intact: asked of other nodes, and answered to them.

Each question goes over a connection of its own, which ends with the answer. So nodes that never
share a swarm need not keep one, and a question never gets in the way of chunks.

What a node tells is below which directory a user's copies lie there; the path of a file is known
to the node that asks, and does not travel.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from swarmcache.auth import Keyring
from swarmcache.disk import Cache
from swarmcache.errors import BadMessage, LocalError
from swarmcache.link import Link, connect_to_node, serve
from swarmcache.messages import (
    FindReplicas,
    NodeAddress,
    ReplicaPlace,
    ReplicasFound,
    decode_about_replicas,
    encode,
)
from swarmcache.user_names import user_name

log = logging.getLogger(__name__)

Places = list[ReplicaPlace | None]


class ReplicaQuestions:
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
        self._identity = msgspec.msgpack.encode(address)
        self._spawn = spawn

    async def ask(self, address: NodeAddress, user: str, version_ids: Sequence[bytes]) -> Places:
        """What another node holds of these. Raises RemoteError."""
        link = await connect_to_node(
            self._session, address.node, self._keyring, "holder", self._identity
        )
        answers: list[Places] = []

        def take(data: bytes) -> None:
            message = decode_about_replicas(data)
            if not isinstance(message, ReplicasFound):
                raise BadMessage("expected an answer about replicas")
            answers.append(message.places)
            link.close()

        try:
            link.send(encode(FindReplicas(user, list(version_ids))))
            await link.receive(take)
        finally:
            self._spawn(link.wait_closed())
        if not answers:
            raise BadMessage("it closed the connection without an answer")
        return answers[0]

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer another node."""
        return await serve(request, self._keyring, "holder", self._identity, self._answer)

    async def _answer(self, link: Link) -> None:
        asked: list[FindReplicas] = []

        async def answer(message: FindReplicas) -> None:
            link.send(encode(ReplicasFound(await self.places(message.user, message.version_ids))))

        def take(data: bytes) -> None:
            message = decode_about_replicas(data)
            if not isinstance(message, FindReplicas) or asked:
                raise BadMessage("expected one question about replicas")
            asked.append(message)
            self._spawn(answer(message))

        try:
            await link.receive(take)
        finally:
            await link.wait_closed()

    async def places(self, user: str, version_ids: Sequence[bytes]) -> Places:
        """What this node holds of these, and where for the user of this name."""
        if os.geteuid() != 0:
            user = user_name(os.geteuid())  # the only one who has copies here
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._look, user, version_ids)

    def _look(self, user: str, version_ids: Sequence[bytes]) -> Places:
        """Runs in a thread."""
        try:
            return [self._cache.place(version_id, user) for version_id in version_ids]
        except LocalError as error:
            log.info("cannot tell where copies are for %r: %s", user, error)
            return [None for _ in version_ids]
