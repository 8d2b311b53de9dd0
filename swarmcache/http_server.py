"""An HTTP server on a port that anybody can connect to.

aiohttp's own would keep a connection for ever on which nothing is asked, or half of something.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from swarmcache.quantities import HostPort
from swarmcache.serving import bind
from swarmcache.strangers import Strangers

# Twice the HANDSHAKE_S of link.py, which begins when a request is complete: so it is not cut short.
STRANGER_S = 10.0
# All nodes of a cluster may come at once, when the tracker is there again, so these are many: as
# many as wait in its backlog. To shake hands with more than that takes longer than anybody waits.
STRANGERS_MAX = 4096

# What one of them may send: a request with its headers and a handshake have some KiB. Of the frames
# that follow each may have megabytes, which thousands of strangers are not to have at once.
STRANGER_BYTES_MAX = 64 << 10

STRANGERS = web.AppKey("strangers", Strangers[web.RequestHandler])


class _Connection(web.RequestHandler):
    """Counts as a stranger until it ends, or ``is_known`` takes it from ``STRANGERS``."""

    __slots__ = ("_came_bytes", "_strangers")

    def __init__(self, server: web.Server, strangers: Strangers[web.RequestHandler]) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # as for AppRunner: nothing is logged
        )
        self._strangers = strangers
        self._came_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._strangers.add(self)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self in self._strangers:
            self._came_bytes += len(data)
            if self._came_bytes > STRANGER_BYTES_MAX and self.transport is not None:
                self.transport.pause_reading()  # until it is no stranger any more, or cut off

    def connection_lost(self, exc: BaseException | None) -> None:
        self._strangers.discard(self)
        super().connection_lost(exc)


def _abort(connection: web.RequestHandler) -> None:
    if connection.transport is not None:
        connection.transport.abort()


def is_known(request: web.Request) -> None:
    """Whoever has made this request has proven who they are."""
    request.app[STRANGERS].discard(request.protocol)
    request.protocol.resume_reading()  # much may have come right behind the proof


@asynccontextmanager
async def serving_on(
    listener: socket.socket, application: web.Application, backlog: int
) -> AsyncIterator[None]:
    """Serve until the end of the block. Raises OSError.

    ``application[STRANGERS]`` are the connections that have not proven who they are: ``is_known``
    takes those from it that have.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # There may be one such port for figures as well, and half is for those who are known.
    count_max = min(STRANGERS_MAX, descriptors // 4)
    strangers = application[STRANGERS] = Strangers(count_max, STRANGER_S, _abort)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    server = runner.server
    assert server is not None, "it was just set up"
    try:
        accepting = await asyncio.get_running_loop().create_server(
            lambda: _Connection(server, strangers), sock=listener, backlog=backlog
        )
        try:
            yield
        finally:
            accepting.close()
    finally:
        await runner.cleanup()


@asynccontextmanager
async def serving_http(
    application: web.Application, listen: HostPort, backlog: int = 128
) -> AsyncIterator[HostPort]:
    """``serving_on`` at the address that it gives. Raises OSError."""
    with bind(listen) as listener:
        async with serving_on(listener, application, backlog):
            yield HostPort(listen.host, int(listener.getsockname()[1]))
