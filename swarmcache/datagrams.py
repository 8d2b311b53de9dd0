"""Datagrams in and out of one UDP socket: asyncio-dgram, with a limit on everything.

As it is, asyncio-dgram keeps whatever comes until somebody asks for it, raises the error of one
datagram in whoever sends or receives the next one, and waits for ever where the kernel takes no
more. Here a datagram is looked at when it comes, and kept only if it is accepted. What is too much
is dropped and counted, since datagrams may get lost anyhow: accepted ones beyond ``RECEIVED_MAX``,
those to send beyond ``SENDING_MAX``. An error is counted, and is no business of the next datagram.
A transport that does not move for ``SEND_S``, or that has ended by itself, is replaced by another
one over the same socket.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from asyncio_dgram import TransportClosed
from asyncio_dgram.aio import DatagramServer, Protocol

from swarmcache import socket_filter

log = logging.getLogger(__name__)

# What comes while the loop is busy for a moment waits in the kernel: 800 datagrams, and for as long
# as it takes to drain them. The system may allow less (net.core.rmem_max).
RECEIVE_BUFFER_BYTES = 1 << 20
# The loop takes some datagrams in before their reader has its turn; more than that is a flood.
RECEIVED_MAX = 1024
# A second and more of all that a node may send.
SENDING_MAX = 256
SEND_S = 1.0

Address = tuple[Any, ...]
Accepted = TypeVar("Accepted")


class Datagrams(Generic[Accepted]):
    """One socket. ``accept`` makes of a datagram what ``receive`` returns, or None of one that is
    dropped; it must not block or raise.

    ``counts``: "flooded" (accepted, but too many), "unsent", "errors"; see also ``lost``.
    """

    def __init__(self, sock: socket.socket, accept: Callable[[bytes], Accepted | None]) -> None:
        """Takes the socket over, which is bound already."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self.counts: Counter[str] = Counter()
        self._sock = sock
        self._accept = accept
        self._outbox: asyncio.Queue[tuple[bytes, Address]] = asyncio.Queue(SENDING_MAX)
        self._ended = False
        self._replacing = asyncio.Lock()
        self._dropped = 0

    @property
    def family(self) -> socket.AddressFamily:
        """Of the addresses that can be sent to."""
        return self._sock.family

    def drop_others(self, size_min: int, size_max: int, first_byte: int) -> None:
        """What has another size, or begins with another byte, would not be accepted: let the kernel
        drop it, if it can."""
        try:
            socket_filter.drop_others(self._sock, size_min, size_max, first_byte)
        except OSError as error:
            log.info("the kernel does not filter datagrams: %s", error)

    def lost(self) -> Counter[str]:
        """``counts``, and "dropped" by the kernel: others, and what nobody read in time."""
        if not self._ended:
            dropped = socket_filter.dropped(self._sock)
            self.counts["dropped"] += (dropped - self._dropped) % (1 << 32)
            self._dropped = dropped
        return self.counts

    async def start(self) -> None:
        """Begin to send and to receive. Raises OSError."""
        self._stream = await self._open()
        self._sender = asyncio.create_task(self._send_all())

    async def stop(self) -> None:
        """Send what waits, within ``SEND_S``, and close the socket."""
        try:
            async with asyncio.timeout(SEND_S):
                await self._outbox.join()
        except TimeoutError:
            self.counts["unsent"] += self._outbox.qsize()
        self._ended = True
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)
        self._stream.abort()
        self._sock.close()

    def send(self, data: bytes, address: Address) -> None:
        """Send soon; ``address`` is numeric. Never waits: what finds no room is dropped."""
        try:
            self._outbox.put_nowait((data, address))
        except asyncio.QueueFull:
            self.counts["unsent"] += 1

    async def receive(self) -> Accepted:
        """What was made of the next datagram. To be called by one task only."""
        while True:
            stream = self._stream
            try:
                received: Any = await stream.recv()
            except (TransportClosed, OSError) as error:
                if self._ended:
                    await asyncio.Event().wait()  # whoever stops us ends this task as well
                await self._replace(stream, f"has ended: {error}")
            else:
                accepted: Accepted = received[0]
                return accepted

    async def _open(self) -> _Stream:
        received = _Inbox(self.counts)
        writable = asyncio.Event()
        errors: asyncio.Queue[Exception] = asyncio.Queue()
        transport: Any  # asyncio-dgram's types say that it takes something else
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Protocol(received, errors, writable, self._accept, self.counts),
            sock=self._sock.dup(),
        )
        transport.set_write_buffer_limits(high=0)  # what was sent is with the kernel
        return _Stream(transport, received, errors, writable)

    async def _replace(self, stream: _Stream, why: str) -> None:
        async with self._replacing:
            if stream is not self._stream:
                return  # somebody else has done it
            log.warning("the transport of datagrams %s", why)
            while stream is self._stream:
                try:
                    self._stream = await self._open()
                except OSError as error:  # no descriptor left, or the like
                    log.error("no datagrams for a moment: %s", error)
                    await asyncio.sleep(SEND_S)
            stream.abort()

    async def _send_all(self) -> None:
        while True:
            data, address = await self._outbox.get()
            stream = self._stream
            try:
                async with asyncio.timeout(SEND_S):
                    await stream.send(data, address)
            except TimeoutError:
                self.counts["unsent"] += self._drop_waiting()
                await self._replace(stream, f"has sent nothing for {SEND_S:g} s")
            except TransportClosed:
                self.counts["unsent"] += 1
                await self._replace(stream, "has ended")
            except (OSError, ValueError) as error:
                self.counts["errors"] += 1
                log.debug("a datagram to %s was not sent: %s", address, error)
            finally:
                self._outbox.task_done()

    def _drop_waiting(self) -> int:
        """Nothing that waits for so long is worth being sent."""
        count = self._outbox.qsize()
        for _ in range(count):
            self._outbox.get_nowait()
            self._outbox.task_done()
        return count


class _Inbox(asyncio.Queue[Any]):
    """What came and was not asked for yet. Full, it takes only the news that no more will come."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def put_nowait(self, item: Any) -> None:
        if self.qsize() >= RECEIVED_MAX and item[0] is not None:
            self._counts["flooded"] += 1
        else:
            super().put_nowait(item)


class _Stream(DatagramServer):
    """One that can be given up at once."""

    _transport: asyncio.DatagramTransport

    def abort(self) -> None:
        """Unlike ``close``, do not wait for the kernel to take what was sent."""
        self._transport.abort()


class _Protocol(Protocol):
    """Keeps only what is accepted, and no errors."""

    def __init__(
        self,
        received: _Inbox,
        errors: asyncio.Queue[Exception],
        writable: asyncio.Event,
        accept: Callable[[bytes], Any],
        counts: Counter[str],
    ) -> None:
        super().__init__(received, errors, writable)
        self._accept = accept
        self._counts = counts

    def datagram_received(self, data: Any, addr: Any) -> None:
        accepted = self._accept(data)
        if accepted is not None:
            super().datagram_received(accepted, addr)

    def error_received(self, exc: Exception) -> None:
        self._counts["errors"] += 1
