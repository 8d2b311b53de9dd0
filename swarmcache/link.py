"""One authenticated control connection, between a node and the tracker or between two nodes.

A WebSocket (aiohttp) that begins with the handshake of ``auth.py``. Afterwards every frame carries
a MAC and a batch of messages: whatever is waiting when the socket is ready goes out together, so a
burst of small messages costs one system call. Bytes of chunks never travel here (see
``chunk_protocol.py``).

Limits: ``HANDSHAKE_S`` for the handshake, ``BATCH_BYTES`` per batch plus one message,
``BACKLOG_BYTES`` waiting to be sent; whoever reads more slowly than that loses the connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
from aiohttp import web

from swarmcache.auth import NONCE_BYTES, Acceptor, Initiator, Keyring, Purpose
from swarmcache.errors import (
    AuthenticationFailed,
    BadMessage,
    PeerHangs,
    PeerUnavailable,
    SwarmcacheError,
)
from swarmcache.http_server import is_known
from swarmcache.messages import MESSAGE_MAX_BYTES, NodeAddress
from swarmcache.quantities import HostPort

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
# A machine in the same building answers in a millisecond; a packet that is lost is sent again after
# a second.
CONNECT_S = 1.5
PING_S = 5.0
BATCH_BYTES = MESSAGE_MAX_BYTES
FRAME_MAX_BYTES = BATCH_BYTES + MESSAGE_MAX_BYTES + 4096
BACKLOG_BYTES = 64 << 20

_encode_batch = msgspec.msgpack.Encoder().encode
_batch_decoder: msgspec.msgpack.Decoder[list[bytes]] = msgspec.msgpack.Decoder(list[bytes])

Socket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse


class Link:
    """An open connection. ``identity`` is what the other side proved to be."""

    def __init__(self, socket: Socket, keyring: Keyring, side: Initiator | Acceptor) -> None:
        self.identity = side.peer_identity
        self._socket = socket
        self._keyring = keyring
        self._key = side.key
        self._keys = side.session_keys()
        self._queue: list[bytes] = []
        self._queued_bytes = 0
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()  # nothing waits to be sent
        self._idle.set()
        self._closed = False
        self._writer = asyncio.create_task(self._write())

    def send(self, message: bytes) -> None:
        """Queue one message; it goes out as soon as the socket takes it. Never blocks."""
        if self._closed:
            return
        self._queue.append(message)
        self._queued_bytes += len(message)
        if self._queued_bytes > BACKLOG_BYTES:
            log.warning("closing a connection whose other end reads too slowly")
            self.close()
        self._wanted.set()

    async def drained(self) -> None:
        """Wait until nothing is waiting to be sent, or the connection has ended."""
        if self._queue and not self._closed:
            self._idle.clear()
            await self._idle.wait()

    async def receive(self, handle: Callable[[bytes], None]) -> None:
        """Pass every message to ``handle``, in order, until the connection ends.

        Returns when it was closed in an orderly way. Raises BadMessage or AuthenticationFailed when
        the other side broke the rules, PeerUnavailable when it went away.
        """
        try:
            async for frame in self._socket:
                if frame.type is not aiohttp.WSMsgType.BINARY:
                    raise BadMessage("expected a binary frame")
                if self._key not in self._keyring.accepted:
                    raise AuthenticationFailed("the secret of this connection was withdrawn")
                for message in _decode_batch(self._keys.open(frame.data)):
                    handle(message)
        except aiohttp.ClientError as error:
            raise PeerUnavailable(str(error)) from error
        if not self._closed and self._socket.close_code != aiohttp.WSCloseCode.OK:
            raise PeerUnavailable("the connection broke")

    def close(self) -> None:
        """Close at once; what is queued is lost."""
        self._closed = True
        self._queue.clear()
        self._wanted.set()
        self._idle.set()

    async def wait_closed(self) -> None:
        """Close, and wait until nothing of the connection is left."""
        self.close()
        await self._writer

    async def _write(self) -> None:
        try:
            while not self._closed:
                await self._wanted.wait()
                self._wanted.clear()
                while self._queue:
                    await self._socket.send_bytes(self._keys.seal(_encode_batch(self._take())))
                self._idle.set()
        except (ConnectionError, aiohttp.ClientError) as error:
            log.debug("sending failed: %s", error)
        finally:
            self._closed = True
            self._idle.set()
            await self._socket.close()

    def _take(self) -> list[bytes]:
        """The next batch."""
        size_bytes = 0
        count = 0
        while count < len(self._queue) and size_bytes < BATCH_BYTES:
            size_bytes += len(self._queue[count])
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        self._queued_bytes -= size_bytes
        return batch


def client_session() -> aiohttp.ClientSession:
    """What ``connect`` needs. To be closed in the end.

    How many connections there are is for those who open them: each swarm brings ``peers_max``
    neighbours. aiohttp would let the 101st wait until another one ends. It would also go wherever a
    server sends it, before that has proven anything: anybody may have the port of a daemon that is
    down, and a server on this machine may take a request of root's for more than it is.
    """
    stay = aiohttp.TraceConfig()
    stay.on_request_redirect.append(_refuse_redirect)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        trace_configs=[stay],
    )


async def _refuse_redirect(
    _: aiohttp.ClientSession, __: object, redirect: aiohttp.TraceRequestRedirectParams
) -> None:
    redirect.response.close()
    raise aiohttp.ClientError("it sends us elsewhere")


async def connect(
    session: aiohttp.ClientSession,
    address: HostPort,
    keyring: Keyring,
    purpose: Purpose,
    identity: bytes,
    *,
    timeout_s: float | None = None,
) -> Link:
    """Connect to a tracker or a node: to its machine in ``CONNECT_S``, and to the process in
    ``timeout_s``, or ``HANDSHAKE_S``.

    Raises PeerUnavailable when it cannot be reached, PeerHangs when only its kernel answers,
    AuthenticationFailed when it does not know the secret, BadMessage when it does not speak our
    protocol.
    """
    try:
        async with asyncio.timeout(timeout_s or HANDSHAKE_S):
            socket = await session.ws_connect(
                f"http://{address}/v1/{purpose}", max_msg_size=FRAME_MAX_BYTES, heartbeat=PING_S
            )
            return await _closing_on_error(socket, _initiate(socket, keyring, purpose, identity))
    except aiohttp.ServerTimeoutError as error:
        raise PeerUnavailable(f"{address} does not answer") from error
    except TimeoutError as error:
        raise PeerHangs(f"{address} does not answer") from error
    except (aiohttp.ClientError, OSError, UnicodeError) as error:  # the last for no name of a host
        raise PeerUnavailable(f"{address}: {error}") from error


async def connect_to_node(
    session: aiohttp.ClientSession,
    node: str,
    keyring: Keyring,
    purpose: Purpose,
    identity: bytes,
    *,
    timeout_s: float | None = None,
) -> Link:
    """``connect`` to a node by its advertised address. Raises BadMessage also if it is none."""
    address = address_of(node)
    return await connect(session, address, keyring, purpose, identity, timeout_s=timeout_s)


def address_of(node: str) -> HostPort:
    """The advertised address of a node, as others have told it. Raises BadMessage if it is none."""
    try:
        return HostPort.parse(node)
    except ValueError as error:
        raise BadMessage(f"not an address: {node!r}") from error


async def node_behind(link: Link) -> NodeAddress:
    """Which node the other side has proven to be. Raises BadMessage, the link being closed then."""
    try:
        return msgspec.msgpack.decode(link.identity, type=NodeAddress)
    except msgspec.MsgspecError as error:
        await link.wait_closed()
        raise BadMessage(f"not a node: {error}") from error


async def serve(
    request: web.Request,
    keyring: Keyring,
    purpose: Purpose,
    identity: bytes,
    talk: Callable[[Link], Awaitable[None]],
) -> web.StreamResponse:
    """Take a connection in a request handler of ``http_server``, and ``talk`` over it to its end.

    What the other side does wrong costs it the connection and us one line in the log.
    """
    socket = web.WebSocketResponse(
        max_msg_size=FRAME_MAX_BYTES, heartbeat=PING_S, compress=False, timeout=1.0
    )
    try:
        await socket.prepare(request)
        link = await _accept_in_time(socket, keyring, purpose, identity)
        is_known(request)
        await talk(link)
    except SwarmcacheError as error:
        log.warning("%s: %s", request.remote, error)
    except (ConnectionError, aiohttp.ClientError) as error:
        log.info("%s has gone before the handshake: %s", request.remote, error)
        if not socket.prepared:
            return web.Response()  # which nobody reads; aiohttp wants one that it can end
    return socket


async def _accept_in_time(
    socket: web.WebSocketResponse, keyring: Keyring, purpose: Purpose, identity: bytes
) -> Link:
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            return await _closing_on_error(socket, _accept(socket, keyring, purpose, identity))
    except TimeoutError as error:
        raise PeerUnavailable("the connecting side did not prove who it is in time") from error


async def _closing_on_error(socket: Socket, handshake: Awaitable[Link]) -> Link:
    try:
        return await handshake
    except (SwarmcacheError, TypeError, asyncio.CancelledError):
        await socket.close()
        raise


async def _initiate(
    socket: aiohttp.ClientWebSocketResponse, keyring: Keyring, purpose: Purpose, identity: bytes
) -> Link:
    side = Initiator(keyring, purpose, os.urandom(NONCE_BYTES), identity)
    await socket.send_bytes(side.first())
    proof = side.handle(await _receive_frame(socket))
    assert proof is not None, "the initiator always has the last word"
    await socket.send_bytes(proof)
    return Link(socket, keyring, side)


async def _accept(
    socket: web.WebSocketResponse, keyring: Keyring, purpose: Purpose, identity: bytes
) -> Link:
    side = Acceptor(keyring, purpose, os.urandom(NONCE_BYTES), identity)
    while not side.done:
        answer = side.handle(await _receive_frame(socket))
        if answer is not None:
            await socket.send_bytes(answer)
    return Link(socket, keyring, side)


async def _receive_frame(socket: Socket) -> bytes:
    frame = await socket.receive()
    if frame.type is aiohttp.WSMsgType.BINARY:
        return bytes(frame.data)
    if frame.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED):
        # A server that was not convinced by our proof says no more than this.
        raise AuthenticationFailed("the other side ended the handshake")
    raise BadMessage("expected a handshake frame")


def _decode_batch(payload: bytes) -> list[bytes]:
    try:
        return _batch_decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise BadMessage(f"not a batch of messages: {error}") from error
