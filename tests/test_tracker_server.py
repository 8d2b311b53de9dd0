"""The tracker's end of sessions, over real sockets."""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec
import pytest
from aiohttp import web

from swarmcache.auth import ClusterKey, Keyring
from swarmcache.http_server import serving_http
from swarmcache.lease_journal import LeaseJournal
from swarmcache.link import client_session, connect, serve
from swarmcache.messages import Lease, NodeAddress
from swarmcache.quantities import HostPort
from swarmcache.tracker_events import (
    JournalGrant,
    NodeConnected,
    Tell,
    TrackerEffect,
    TrackerEvent,
)
from swarmcache.tracker_server import TrackerServer
from swarmcache.tracker_state import TrackerState

KEY = Keyring([ClusterKey.from_secret(b"the secret of this cluster")])
DEADLINE_S = 20.0
LEASE = Lease(7, b"v" * 32, 0, 1, 1.0)


class Granting:
    """A machine that grants every node one lease at once."""

    def handle(self, event: TrackerEvent, now_s: float) -> list[TrackerEffect]:
        if isinstance(event, NodeConnected):
            return [JournalGrant(LEASE.lease_id, "node"), Tell(event.session, LEASE)]
        return []

    def wake_at_s(self) -> float | None:
        return None


class Journal:
    """Takes no lease, or all."""

    def __init__(self, *, works: bool) -> None:
        self._works = works

    def grant(self, lease_id: int, node: str) -> None:
        assert self._works, "a bug"

    def close(self) -> None:
        pass


@pytest.mark.parametrize("works", [True, False])
async def test_no_node_is_told_of_a_lease_that_is_not_in_the_journal(works: bool) -> None:
    """After a restart the tracker would grant its slot to another node as well."""
    state, journal = cast(TrackerState, Granting()), cast(LeaseJournal, Journal(works=works))
    server = TrackerServer(state, journal, KEY)

    async def serve_node(request: web.Request) -> web.StreamResponse:
        return await serve(request, KEY, "tracker", b"tracker", server.talk)

    application = web.Application()
    application.router.add_get("/v1/tracker", serve_node)
    told: list[bytes] = []
    identity = msgspec.msgpack.encode(NodeAddress("127.0.0.1:1", 2))
    async with (
        serving_http(application, HostPort("127.0.0.1", 0)) as address,
        client_session() as session,
    ):
        link = await connect(session, address, KEY, "tracker", identity)

        def take(data: bytes) -> None:
            told.append(data)
            link.close()

        async with asyncio.timeout(DEADLINE_S):
            await link.receive(take)  # until either side has closed it
        await link.wait_closed()
        await server.wait_closed()

    assert len(told) == works
