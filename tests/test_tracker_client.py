"""A daemon's session with its tracker, over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from swarmcache.auth import ClusterKey, Keyring
from swarmcache.background import BackgroundTasks
from swarmcache.config import load
from swarmcache.http_server import serving_http
from swarmcache.link import Link, client_session, serve
from swarmcache.messages import NodeAddress, Renewed, encode
from swarmcache.peer_events import TrackerConnected, TrackerLost, TrackerSaid
from swarmcache.quantities import HostPort
from swarmcache.tracker_client import TrackerClient

KEY = Keyring([ClusterKey.from_secret(b"the secret of this cluster")])
DEADLINE_S = 30.0


async def talk(link: Link) -> None:
    """What a tracker says that has nothing else to say."""
    link.send(encode(Renewed(1.0)))
    await link.receive(lambda data: None)
    await link.wait_closed()


async def serve_node(request: web.Request) -> web.StreamResponse:
    return await serve(request, KEY, "tracker", b"tracker", talk)


async def test_a_session_that_ends_with_a_bug_is_followed_by_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    application = web.Application()
    application.router.add_get("/v1/tracker", serve_node)
    heard: list[str] = []
    heard_again = asyncio.Event()

    def handle(event: TrackerConnected | TrackerLost | TrackerSaid) -> None:
        heard.append(type(event).__name__)
        assert len(heard) != 2, "a bug"
        if len(heard) == 5:
            heard_again.set()

    tasks = BackgroundTasks("test")
    async with (
        serving_http(application, HostPort("127.0.0.1", 0)) as address,
        client_session() as session,
    ):
        config = load({"cluster.tracker": str(address)}, {}, Path("/dev/null"))
        client = TrackerClient(
            config, session, KEY, NodeAddress("127.0.0.1:1", 2), lambda: [], tasks.spawn, handle
        )
        client.start()
        try:
            await asyncio.wait_for(heard_again.wait(), DEADLINE_S)
        finally:
            await client.stop()
            await tasks.end()

    session_with_it = ["TrackerConnected", "TrackerSaid"]
    assert heard[:5] == [*session_with_it, "TrackerLost", *session_with_it]
    assert "AssertionError: a bug" in caplog.text
