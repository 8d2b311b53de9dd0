"""Who connects to a control port and proves nothing, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import pytest
from aiohttp import web

from swarmcache import http_server
from swarmcache.auth import ClusterKey, Keyring
from swarmcache.http_server import serving_http
from swarmcache.link import Link, client_session, connect, serve
from swarmcache.messages import MESSAGE_MAX_BYTES
from swarmcache.metrics import serving_metrics
from swarmcache.quantities import HostPort

KEY = Keyring([ClusterKey.from_secret(b"the secret of this cluster")])
ANYWHERE = HostPort("127.0.0.1", 0)
DEADLINE_S = 20.0
NEVER_S = 3600.0

# What somebody may send who does not go on; the last one waits for a handshake.
BEGINNINGS = {
    "nothing": b"",
    "half a line": b"GET /v1/peer HT",
    "half a request": b"GET /v1/peer HTTP/1.1\r\nHost: x\r\n",
    "half a body": b"POST /v1/peer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    "another question": b"GET /v1/else HTTP/1.1\r\nHost: x\r\n\r\n",
    "no handshake": (
        b"GET /v1/peer HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ),
}


@asynccontextmanager
async def echoing() -> AsyncIterator[HostPort]:
    """A control port that sends every message back to whoever knows the secret."""

    async def talk(link: Link) -> None:
        try:
            await link.receive(link.send)
        finally:
            await link.wait_closed()

    async def handle(request: web.Request) -> web.StreamResponse:
        return await serve(request, KEY, "peer", b"server", talk)

    application = web.Application()
    application.router.add_get("/v1/peer", handle)
    async with serving_http(application, ANYWHERE) as address:
        yield address


@contextmanager
def strangers(address: HostPort, count: int, data: bytes) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            sock = stack.enter_context(
                socket.create_connection((address.host, address.port), timeout=DEADLINE_S)
            )
            sock.sendall(data)
            found.append(sock)
        yield found


def is_cut(sock: socket.socket) -> bool:
    """Whether the server ends the connection, whatever it has said before."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


async def echo(link: Link, message: bytes) -> None:
    """Returns when the message has come back."""
    back = asyncio.Event()
    receiving = asyncio.create_task(
        link.receive(lambda data: back.set() if data == message else None)
    )
    link.send(message)
    async with asyncio.timeout(DEADLINE_S):
        await back.wait()
    receiving.cancel()


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_who_does_not_prove_anything_is_cut_off_in_time(
    monkeypatch: pytest.MonkeyPatch, beginning: str
) -> None:
    monkeypatch.setattr(http_server, "STRANGER_S", 0.1)
    async with echoing() as address:
        with strangers(address, 1, BEGINNINGS[beginning]) as [stranger]:
            assert await asyncio.to_thread(is_cut, stranger)


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_who_proves_nothing_makes_room_for_others_and_takes_none_of_those_who_did(
    monkeypatch: pytest.MonkeyPatch, beginning: str
) -> None:
    monkeypatch.setattr(http_server, "STRANGER_S", NEVER_S)
    monkeypatch.setattr(http_server, "STRANGERS_MAX", 8)
    async with echoing() as address, client_session() as session:
        with strangers(address, 12, BEGINNINGS[beginning]) as earlier:
            link = await connect(session, address, KEY, "peer", b"node")
            await echo(link, b"the server has seen the proof")
            with strangers(address, 12, BEGINNINGS[beginning]) as later:
                assert await asyncio.to_thread(is_cut, earlier[-1])
                assert await asyncio.to_thread(is_cut, later[0])
                await echo(link, b"still there")
                await link.wait_closed()


async def test_of_who_proves_nothing_little_is_taken_in() -> None:
    """Or else some thousands of them, at a frame each, would have all memory."""
    size_bytes = 2 << 20  # less than the largest frame of those who are known
    begun = b"\x82\xff" + size_bytes.to_bytes(8, "big") + bytes(4)
    async with echoing() as address:
        with strangers(address, 1, BEGINNINGS["no handshake"] + begun) as [stranger]:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            stranger.settimeout(0.2)
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(stranger.sendall, bytes(size_bytes - 1))


async def test_what_comes_right_behind_the_proof_is_taken_in() -> None:
    async with echoing() as address, client_session() as session:
        link = await connect(session, address, KEY, "peer", b"node")
        for _ in range(8):
            link.send(bytes(MESSAGE_MAX_BYTES // 2))
        await echo(link, b"the last one")
        await link.wait_closed()


async def test_who_has_proven_it_stays_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "STRANGER_S", 0.5)
    async with echoing() as address, client_session() as session:
        link = await connect(session, address, KEY, "peer", b"node")
        with strangers(address, 1, b"") as [stranger]:
            assert await asyncio.to_thread(is_cut, stranger), "who came later than the link"

        await echo(link, b"still there")
        await link.wait_closed()


async def test_the_port_for_figures_is_no_place_to_stay_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "STRANGER_S", NEVER_S)
    monkeypatch.setattr(http_server, "STRANGERS_MAX", 8)
    async with serving_metrics("tracker", ANYWHERE, lambda: []) as url:
        address = HostPort.parse(url.split("/")[2])
        asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        with strangers(address, 12, b"") as silent, strangers(address, 1, asked) as [asking]:
            assert await asyncio.to_thread(is_cut, silent[0])
            assert await asyncio.to_thread(is_cut, asking), "it has its answer"
