"""Authenticated connections over real sockets: who has no secret, or changes a bit, is cut off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from swarmcache import link as link_module
from swarmcache.auth import ClusterKey, Keyring, Purpose
from swarmcache.errors import (
    AuthenticationFailed,
    BadMessage,
    PeerUnavailable,
    SwarmcacheError,
)
from swarmcache.http_server import serving_http
from swarmcache.link import Link, client_session, connect, connect_to_node, serve
from swarmcache.messages import MESSAGE_MAX_BYTES
from swarmcache.quantities import HostPort

KEY = Keyring([ClusterKey.from_secret(b"the secret of this cluster")])
OTHER_KEY = Keyring([ClusterKey.from_secret(b"the secret of that cluster")])
DEADLINE_S = 10.0


@dataclass
class Server:
    """Accepts links on a free port; keeps what it received and how each of them ended."""

    port: int = 0
    finished: int = 0
    wanted: int = 1 << 30
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    links: list[Link] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    ends: list[SwarmcacheError | None] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def address(self) -> HostPort:
        """Where it listens."""
        return HostPort("127.0.0.1", self.port)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of this server."""
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(condition)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _take(self, message: bytes) -> None:
        self.received.append(message)
        if len(self.received) >= self.wanted:
            self.enough.set()

    async def until_received(self, count: int) -> None:
        """Wait until so many messages have come."""
        self.wanted = count
        if len(self.received) < count:
            self.enough.clear()
            async with asyncio.timeout(DEADLINE_S):
                await self.enough.wait()

    async def talk(self, link: Link) -> None:
        """Take what comes over one link until it ends."""
        self.links.append(link)
        await self._notify()
        end: SwarmcacheError | None = None
        try:
            await link.receive(self._take)
        except SwarmcacheError as error:
            end = error
        finally:
            await link.wait_closed()
        self.ends.append(end)

    async def serve(self, request: web.Request, key: Keyring) -> web.StreamResponse:
        """One connection, accepted or not."""
        response = await serve(request, key, "peer", b"server", self.talk)
        self.finished += 1
        await self._notify()
        return response


@asynccontextmanager
async def serving(key: Keyring = KEY) -> AsyncIterator[Server]:
    server = Server()
    application = web.Application()

    async def handle(request: web.Request) -> web.StreamResponse:
        return await server.serve(request, key)

    application.router.add_get("/v1/peer", handle)
    async with serving_http(application, HostPort("127.0.0.1", 0)) as address:
        server.port = address.port
        try:
            yield server
        finally:
            for link in server.links:
                link.close()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with client_session() as session:
        yield session


async def dial(
    session: aiohttp.ClientSession,
    address: HostPort,
    key: Keyring = KEY,
    purpose: Purpose = "peer",
) -> Link:
    async with asyncio.timeout(DEADLINE_S):
        return await connect(session, address, key, purpose, b"client")


class Tamperer:
    """Passes bytes on in both directions; flips one bit of what the client sends when told to."""

    def __init__(self, target: HostPort) -> None:
        self.address = HostPort("127.0.0.1", 0)
        self.flip_next = False
        self.stopped = asyncio.Event()
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = HostPort("127.0.0.1", server.sockets[0].getsockname()[1])
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.host, self._target.port)
        self._writers += [writer, far_writer]
        back = asyncio.create_task(self._pass_on(far_reader, writer))
        self._tasks.add(back)
        await self._pass_on(reader, far_writer, may_flip=True)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        may_flip: bool = False,
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if may_flip and self.flip_next:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        """End every connection without a word."""
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def tampering(target: HostPort) -> AsyncIterator[Tamperer]:
    tamperer = Tamperer(target)
    server = await tamperer.start()
    try:
        yield tamperer
    finally:
        tamperer.cut()
        server.close()
        await server.wait_closed()


@pytest.mark.slow
async def test_more_links_are_open_at_once_than_aiohttp_allows_by_itself(
    session: aiohttp.ClientSession,
) -> None:
    count = 101  # the neighbours of three swarms
    async with serving() as server:
        links = [await dial(session, server.address) for _ in range(count)]
        links[-1].send(b"heard")
        await server.until_received(1)
        for link in links:
            await link.wait_closed()
        await server.until(lambda: server.finished == count)

    assert server.received == [b"heard"]


async def test_messages_arrive_in_order_in_both_directions(session: aiohttp.ClientSession) -> None:
    async with serving() as server:
        link = await dial(session, server.address)
        sent = [b"%d" % number * (number % 50) for number in range(2000)]
        for message in sent:
            link.send(message)
        await server.until(lambda: len(server.links) == 1)
        answered: list[bytes] = []
        done = asyncio.Event()

        def take(message: bytes) -> None:
            answered.append(message)
            if len(answered) == len(sent):
                done.set()

        receiving = asyncio.create_task(link.receive(take))
        for message in sent:
            server.links[0].send(message)
        async with asyncio.timeout(DEADLINE_S):
            await done.wait()
        await server.until_received(len(sent))
        await link.wait_closed()
        await receiving
        await server.until(lambda: server.finished == 1)

    assert server.received == sent
    assert answered == sent
    assert server.ends == [None]
    assert link.identity == b"server"
    assert server.links[0].identity == b"client"


async def test_messages_larger_than_a_batch_arrive(session: aiohttp.ClientSession) -> None:
    async with serving() as server:
        link = await dial(session, server.address)
        sent = [bytes([number]) * MESSAGE_MAX_BYTES for number in range(4)]
        for message in sent:
            link.send(message)
        await server.until(lambda: len(server.links) == 1)
        answered: list[bytes] = []
        done = asyncio.Event()
        server.links[0].send(b"x" * MESSAGE_MAX_BYTES)
        server.links[0].send(b"done")
        receiving = asyncio.create_task(
            link.receive(
                lambda message: done.set() if message == b"done" else answered.append(message)
            )
        )
        async with asyncio.timeout(DEADLINE_S):
            await done.wait()
        link.send(b"end")
        server.links[0].send(b"more")
        await server.until_received(5)
        await link.wait_closed()
        await receiving

    assert server.received == [*sent, b"end"]


async def test_a_client_without_the_secret_is_refused(
    session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(OTHER_KEY) as server:
        with pytest.raises(AuthenticationFailed):
            await dial(session, server.address)
        await server.until(lambda: server.finished == 1)

    assert server.links == []
    assert "does not know the cluster's secret" in caplog.text or "handshake" in caplog.text


@pytest.mark.slow
async def test_a_server_refuses_who_sends_no_handshake(session: aiohttp.ClientSession) -> None:
    async with serving() as server:
        socket = await session.ws_connect(f"http://{server.address}/v1/peer")
        await socket.send_bytes(b"let me in")
        await server.until(lambda: server.finished == 1)
        await socket.close()

    assert server.links == []


async def test_a_server_that_cannot_prove_itself_is_refused(
    session: aiohttp.ClientSession,
) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for frame in socket:
            await socket.send_bytes(frame.data)
        return socket

    application = web.Application()
    application.router.add_get("/v1/peer", echo)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        with pytest.raises((AuthenticationFailed, BadMessage)):
            await dial(session, HostPort("127.0.0.1", runner.addresses[0][1]))
    finally:
        await runner.cleanup()


@pytest.mark.slow
async def test_a_bit_flipped_on_the_way_breaks_the_connection(
    session: aiohttp.ClientSession,
) -> None:
    async with serving() as server, tampering(server.address) as tamperer:
        link = await dial(session, tamperer.address)
        await server.until(lambda: len(server.links) == 1)
        tamperer.flip_next = True

        link.send(b"delete nothing")
        await server.until(lambda: server.finished == 1)
        await link.wait_closed()

    assert isinstance(server.ends[0], AuthenticationFailed)
    assert server.received == []


async def test_a_bit_flipped_during_the_handshake_fails_it(session: aiohttp.ClientSession) -> None:
    async with serving() as server, tampering(server.address) as tamperer:
        tamperer.flip_next = True

        with pytest.raises(SwarmcacheError):
            await dial(session, tamperer.address)

    assert server.links == []


async def test_a_peer_that_goes_without_a_word_is_unavailable(
    session: aiohttp.ClientSession,
) -> None:
    async with serving() as server, tampering(server.address) as tamperer:
        link = await dial(session, tamperer.address)
        await server.until(lambda: len(server.links) == 1)
        tamperer.cut()

        with pytest.raises(PeerUnavailable):
            async with asyncio.timeout(DEADLINE_S):
                await link.receive(lambda _: None)
        await server.until(lambda: server.finished == 1)
        await link.wait_closed()

    assert isinstance(server.ends[0], PeerUnavailable)


async def test_a_port_where_nobody_listens_is_unavailable(session: aiohttp.ClientSession) -> None:
    async with serving() as server:
        address = server.address

    with pytest.raises(PeerUnavailable):
        await dial(session, address)


async def test_a_name_that_cannot_be_one_is_unavailable(session: aiohttp.ClientSession) -> None:
    with pytest.raises(PeerUnavailable, match=r"a\.\.b:1: "):
        await dial(session, HostPort("a..b", 1))
    with pytest.raises(BadMessage, match=r"a\.\.b:1"):
        await connect_to_node(session, "a..b:1", KEY, "peer", b"")


async def test_a_server_of_another_kind_is_unavailable(session: aiohttp.ClientSession) -> None:
    async with serving() as server:
        with pytest.raises(PeerUnavailable):
            await dial(session, server.address, purpose="tracker")


async def test_nobody_is_sent_elsewhere_by_who_has_not_proven_who_they_are(
    session: aiohttp.ClientSession,
) -> None:
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        raise web.HTTPFound("/somebody/elses/server")

    application = web.Application()
    application.router.add_get("/{path:.*}", handle)
    async with serving_http(application, HostPort("127.0.0.1", 0)) as address:
        with pytest.raises(PeerUnavailable, match="sends us elsewhere"):
            await dial(session, address)

    assert asked == ["/v1/peer"]


@pytest.mark.slow
async def test_a_server_that_says_nothing_is_given_up_in_bounded_time(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_S", 0.2)

    async def silent(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        await asyncio.Event().wait()
        return socket

    application = web.Application()
    application.router.add_get("/v1/peer", silent)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    began_s = asyncio.get_running_loop().time()
    try:
        with pytest.raises(PeerUnavailable, match="does not answer"):
            await dial(session, HostPort("127.0.0.1", runner.addresses[0][1]))
        assert asyncio.get_running_loop().time() - began_s < 3.0
    finally:
        await runner.cleanup()


@pytest.mark.slow
async def test_who_reads_too_slowly_loses_the_connection(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "BACKLOG_BYTES", 8 << 20)
    async with serving() as server:
        link = await dial(session, server.address)
        await server.until(lambda: len(server.links) == 1)
        slow = server.links[0]

        # Nobody receives on the client's side.
        for _ in range(64):
            slow.send(bytes(MESSAGE_MAX_BYTES))

        async with asyncio.timeout(DEADLINE_S):
            await slow.wait_closed()
        await link.wait_closed()


async def test_who_has_much_to_say_can_wait_until_it_is_on_its_way(
    session: aiohttp.ClientSession,
) -> None:
    async with serving() as server:
        link = await dial(session, server.address)
        async with asyncio.timeout(DEADLINE_S):
            for number in range(20):
                link.send(b"%d" % number * 100_000)
                await link.drained()
        await server.until_received(20)

        link.send(b"never sent")
        await link.wait_closed()
        await link.drained()


async def test_what_is_sent_on_a_closed_link_is_dropped(session: aiohttp.ClientSession) -> None:
    async with serving() as server:
        link = await dial(session, server.address)
        await link.wait_closed()
        link.send(b"too late")
        await server.until(lambda: server.finished == 1)

    assert server.received == []
    assert server.ends == [None]


async def test_who_is_gone_before_the_connection_is_taken_costs_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = iter([ConnectionResetError("Cannot write to closing transport")])

    async def gone(socket: web.WebSocketResponse, request: web.Request) -> None:
        for error in tries:
            raise error  # the first time; aiohttp tries again with what the handler returns

    monkeypatch.setattr(web.WebSocketResponse, "prepare", gone)
    async with serving() as server, asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
        with caplog.at_level(logging.INFO):
            writer.write(b"GET /v1/peer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await reader.read()
        writer.close()
    assert [record.name for record in caplog.records] == ["swarmcache.link"]


async def test_a_connection_ends_when_its_secret_is_withdrawn_and_not_before(
    session: aiohttp.ClientSession,
) -> None:
    old, new = ClusterKey.from_secret(b"the old secret"), ClusterKey.from_secret(b"the new secret")
    keyring = Keyring([old, new])
    async with serving(keyring) as server:
        link = await dial(session, server.address, Keyring([old]))
        link.send(b"before")
        await server.until_received(1)
        keyring.replace([new, old])
        link.send(b"meanwhile")
        await server.until_received(2)

        keyring.replace([new])
        link.send(b"afterwards")
        await server.until(lambda: server.finished == 1)
        await link.wait_closed()

    assert isinstance(server.ends[0], AuthenticationFailed)
    assert server.received == [b"before", b"meanwhile"]
