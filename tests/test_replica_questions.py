"""Questions between nodes over real sockets, with nodes that answer anything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from swarmcache.auth import ClusterKey, Keyring
from swarmcache.cache_dir import CacheDir
from swarmcache.disk import Cache
from swarmcache.errors import AuthenticationFailed, BadMessage, PeerUnavailable
from swarmcache.holder_survey import HolderSurvey
from swarmcache.http_server import serving_http
from swarmcache.link import Link, connect, serve
from swarmcache.locator import run_survey
from swarmcache.messages import (
    FIND_MAX,
    FindReplicas,
    Have,
    Holders,
    Message,
    NodeAddress,
    ReplicaPlace,
    ReplicasFound,
    encode,
)
from swarmcache.quantities import HostPort
from swarmcache.replica_questions import ReplicaQuestions
from swarmcache.user_names import user_name
from tests.disk_helpers import ME, a_file, publish

KEY = Keyring([ClusterKey.from_secret(b"the secret of this cluster")])
DEADLINE_S = 20.0
HERE = NodeAddress("127.0.0.1:1", 2, "asker")
FILE = bytes(32)


class Tasks:
    """Runs coroutines in the background, as a daemon does."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*self.running, return_exceptions=True)


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    tasks = Tasks()
    yield tasks
    await tasks.ended()


@pytest.fixture
async def asker(cache: CacheDir, tasks: Tasks) -> AsyncIterator[ReplicaQuestions]:
    """A node with a cache that can ask others."""
    async with aiohttp.ClientSession() as session:
        with ThreadPoolExecutor(1) as threads:
            yield ReplicaQuestions(Cache([cache]), threads, session, KEY, HERE, tasks.spawn)
            await tasks.ended()


@asynccontextmanager
async def node(
    handle: Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]],
) -> AsyncIterator[NodeAddress]:
    """A node that answers questions in this way."""
    application = web.Application()
    application.router.add_get("/v1/holder", handle)
    async with serving_http(application, HostPort("127.0.0.1", 0)) as address:
        yield NodeAddress(str(address), 2, "holder")


def answering(
    *answers: Message | bytes, key: Keyring = KEY
) -> Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]:
    """Sends these when it is asked, and hangs up after them."""

    async def talk(link: Link) -> None:
        def take(data: bytes) -> None:
            for answer in answers:
                link.send(answer if isinstance(answer, bytes) else encode(answer))
            if not answers:
                link.close()

        try:
            await link.receive(take)
        finally:
            await link.wait_closed()

    async def handle(request: web.Request) -> web.StreamResponse:
        return await serve(request, key, "holder", b"", talk)

    return handle


async def test_a_node_tells_what_it_holds(asker: ReplicaQuestions, cache: CacheDir) -> None:
    version, data = a_file(9000)
    publish(cache, version, data)
    async with node(asker.serve) as address, asyncio.timeout(DEADLINE_S):
        places = await asker.ask(address, "ann", [version.version_id, FILE])
        again = await asker.ask(address, user_name(ME.uid), [])
    assert [place is not None for place in places] == [True, False]
    assert again == []


async def test_an_answer_is_passed_on(asker: ReplicaQuestions) -> None:
    places = [ReplicaPlace(b"/cache/\xff", True), None]
    async with node(answering(ReplicasFound(places))) as address, asyncio.timeout(DEADLINE_S):
        assert places == await asker.ask(address, "ann", [FILE, FILE])


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([], "without an answer"),
        ([b"\xc1"], "not a message"),
        ([FindReplicas("ann", [FILE])], "expected an answer"),
        ([Have(FILE, [], b"")], "not a message"),
        ([encode(ReplicasFound([None])).replace(b"places", b"planes")], "not a message"),
    ],
)
async def test_nonsense_is_no_answer(
    asker: ReplicaQuestions, answers: list[Message | bytes], reason: str
) -> None:
    async with node(answering(*answers)) as address, asyncio.timeout(DEADLINE_S):
        with pytest.raises(BadMessage, match=reason):
            await asker.ask(address, "ann", [FILE])


async def test_who_cannot_be_asked_is_told_from_who_answers_nonsense(
    asker: ReplicaQuestions,
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(PeerUnavailable):
            await asker.ask(NodeAddress("127.0.0.1:1", 2), "ann", [FILE])
        with pytest.raises(BadMessage, match="not an address"):
            await asker.ask(NodeAddress("nonsense", 2), "ann", [FILE])
        stranger = Keyring([ClusterKey.from_secret(b"the secret of that cluster")])
        async with node(answering(key=stranger)) as address:
            with pytest.raises(AuthenticationFailed):
                await asker.ask(address, "ann", [FILE])


@pytest.mark.parametrize(
    "messages",
    [
        [ReplicasFound([])],
        [b"\xc1"],
        [FindReplicas("ann", [FILE]), FindReplicas("ann", [FILE])],
        [FindReplicas("ann", [FILE] * (FIND_MAX + 1))],
        [FindReplicas("a" * 1025, [FILE])],
    ],
)
async def test_a_node_that_asks_nonsense_loses_its_connection(
    asker: ReplicaQuestions,
    messages: list[Message | bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        node(asker.serve) as address,
        aiohttp.ClientSession() as session,
        asyncio.timeout(DEADLINE_S),
    ):
        link = await connect(session, HostPort.parse(address.node), KEY, "holder", b"")
        with caplog.at_level(logging.WARNING):
            for message in messages:
                link.send(message if isinstance(message, bytes) else encode(message))
            await link.receive(lambda _: None)
        await link.wait_closed()
    assert len(caplog.records) == 1, "one line, and no traceback"


async def test_a_name_that_no_user_has_is_answered_with_nothing(
    asker: ReplicaQuestions, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    version, data = a_file(9000)
    publish(cache, version, data)
    assert await asker.places("../etc", [version.version_id]) == [None]
    monkeypatch.setattr("os.geteuid", lambda: ME.uid + 1)
    monkeypatch.setattr("swarmcache.replica_questions.user_name", lambda uid: "own")
    [place] = await asker.places("ann", [version.version_id])
    assert place is not None
    assert place.directory.endswith(b"/own"), "its only user"


async def test_a_survey_ends_with_whoever_waits_for_it(tasks: Tasks) -> None:
    """The client goes away while nodes are being asked: nobody is asked any longer."""
    asked = asyncio.Event()

    async def never(address: NodeAddress) -> list[ReplicaPlace | None]:
        asked.set()
        await asyncio.Event().wait()
        return []

    survey = HolderSurvey([Holders(1, [HERE])], [None])
    waiting = asyncio.create_task(run_survey(survey, never, tasks.spawn))
    async with asyncio.timeout(DEADLINE_S):
        await asked.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
    await tasks.ended()
    assert waiting.cancelled() and not tasks.running
