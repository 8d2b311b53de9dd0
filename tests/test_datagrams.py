"""Datagrams over real sockets: floods, errors and sockets that take no more do no harm."""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from swarmcache import datagrams as module
from swarmcache.datagrams import Address, Datagrams
from swarmcache.resolver import Resolver
from swarmcache.socket_filter import SO_ATTACH_FILTER

DEADLINE_S = 10.0


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on asyncio's own loop and on the daemon's, uvloop, whose transports are others."""

    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **fixtures: object) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**fixtures))

    wanted = inspect.signature(test)
    new_loop = inspect.signature(run).parameters["new_loop"]
    run.__signature__ = wanted.replace(  # type: ignore[attr-defined]
        parameters=[new_loop, *wanted.parameters.values()]
    )
    loops = (asyncio.new_event_loop, uvloop.new_event_loop)
    return pytest.mark.parametrize("new_loop", loops, ids=("asyncio", "uvloop"))(run)


def udp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


@asynccontextmanager
async def open_datagrams(
    sock: socket.socket | None = None, accept: Callable[[bytes], bytes | None] = bytes
) -> AsyncIterator[tuple[Datagrams[bytes], Address]]:
    sock = sock or udp_socket()
    address = sock.getsockname()
    datagrams = Datagrams(sock, accept)
    await datagrams.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield datagrams, address
    finally:
        await datagrams.stop()


@on_both_loops
async def test_datagrams_come_and_go() -> None:
    async with open_datagrams() as (one, _), open_datagrams() as (other, address):
        one.send(b"first", address)
        one.send(b"second", address)

        assert [await other.receive(), await other.receive()] == [b"first", b"second"]


@on_both_loops
async def test_the_last_words_are_said() -> None:
    async with open_datagrams() as (other, address):
        async with open_datagrams() as (one, _):
            for _ in range(module.SENDING_MAX):
                one.send(b"good-bye", address)

        for _ in range(module.SENDING_MAX):
            assert await other.receive() == b"good-bye"


@on_both_loops
async def test_only_what_is_accepted_is_kept() -> None:
    def accept(data: bytes) -> bytes | None:
        return data if data.startswith(b"ours") else None

    async with open_datagrams() as (one, _), open_datagrams(accept=accept) as (other, address):
        for data in (b"theirs", b"", b"ours"):
            one.send(data, address)

        assert await other.receive() == b"ours"


class Unfiltered(socket.socket):
    """A socket of a kernel that takes no filter."""

    def setsockopt(self, level: int, option: int, value: Any) -> None:  # type: ignore[override]
        if option == SO_ATTACH_FILTER:
            raise PermissionError(errno.EPERM, "no filters here")
        super().setsockopt(level, option, value)


@on_both_loops
async def test_what_cannot_be_ours_is_dropped_by_the_kernel_and_counted() -> None:
    seen: list[bytes] = []

    def accept(data: bytes) -> bytes:
        seen.append(data)
        return data

    others = [b"short", b"?" * 10, b"!" * 21]
    ours = [b"!" * 10, b"!" * 20]
    async with open_datagrams() as (one, _), open_datagrams(accept=accept) as (other, address):
        other.drop_others(10, 20, ord("!"))
        for data in [*others, *ours]:
            one.send(data, address)

        assert [await other.receive(), await other.receive()] == ours == seen
        assert other.lost()["dropped"] == other.lost()["dropped"] == len(others)


@on_both_loops
async def test_without_a_filter_everything_comes_to_who_must_check_anyhow(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    sock = Unfiltered(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    async with open_datagrams() as (one, _), open_datagrams(sock) as (other, address):
        other.drop_others(10, 20, ord("!"))
        one.send(b"short", address)

        assert await other.receive() == b"short"
        assert "no filters here" in caplog.text
        assert not +other.lost()


@on_both_loops
async def test_a_flood_that_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECEIVED_MAX", 10)
    with udp_socket() as flooder:
        async with open_datagrams() as (datagrams, address):
            while datagrams.counts["flooded"] < 100:
                flooder.sendto(b"flood", address)
                await asyncio.sleep(0)
            taken = 0
            while datagrams.counts["flooded"] >= 100 and taken < 10:
                assert await datagrams.receive() == b"flood"
                taken += 1

    assert taken == 10


@on_both_loops
async def test_what_finds_no_room_to_be_sent_is_dropped() -> None:
    async with open_datagrams() as (datagrams, address):
        for _ in range(module.SENDING_MAX + 7):
            datagrams.send(b"", address)

        assert datagrams.counts["unsent"] == 7


@on_both_loops
async def test_the_error_of_one_datagram_is_no_business_of_the_next() -> None:
    async with open_datagrams() as (one, own), open_datagrams() as (other, address):
        nobody = udp_socket()
        closed = nobody.getsockname()
        nobody.close()
        for bad in (("255.255.255.255", 9), ("127.0.0.1", 0), closed):
            one.send(b"lost", bad)
            one.send(b"kept", address)
            assert await other.receive() == b"kept"
        one.send(bytes(70_000), address)
        one.send(b"kept", address)
        other.send(b"back", own)

        assert await other.receive() == b"kept"
        assert await one.receive() == b"back"
        assert one.counts["errors"] >= 3


def a_socket_that_nobody_reads(tmp_path: Path) -> tuple[socket.socket, socket.socket, Any]:
    """A stand-in for a network card that hangs: ours, theirs, and its address."""
    ours, theirs = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
    theirs.bind(str(tmp_path / "theirs"))
    return ours, theirs, str(tmp_path / "theirs")


async def send_until_it_hangs(
    datagrams: Datagrams[bytes], address: Address, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, module.__name__):
        while "has sent nothing" not in caplog.text:
            datagrams.send(bytes(1000), address)
            await asyncio.sleep(0.001)


@pytest.mark.slow
@on_both_loops
async def test_a_socket_that_takes_no_more_does_not_hold_up_the_next_datagrams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SEND_S", 0.2)
    ours, theirs, address = a_socket_that_nobody_reads(tmp_path)
    theirs.setblocking(False)
    with theirs:
        async with open_datagrams(ours) as (datagrams, _):
            await send_until_it_hangs(datagrams, address, caplog)
            while True:
                try:
                    theirs.recv(2000)
                except BlockingIOError:
                    break
            datagrams.send(b"goes on", address)
            got = b""
            while got != b"goes on":
                got = await asyncio.get_running_loop().sock_recv(theirs, 2000)

    assert datagrams.counts["unsent"] > 0


@pytest.mark.slow
@on_both_loops
async def test_nothing_is_left_of_a_socket_that_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SEND_S", 0.2)
    ours, theirs, address = a_socket_that_nobody_reads(tmp_path)
    with theirs:
        open_before = len(os.listdir("/proc/self/fd"))
        async with open_datagrams(ours) as (datagrams, _):
            await send_until_it_hangs(datagrams, address, caplog)

        for _ in range(3):  # turns of the loop, in which transports end
            await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) < open_before  # ours is closed as well


@on_both_loops
async def test_a_transport_that_ends_by_itself_is_replaced() -> None:
    async with open_datagrams() as (one, _), open_datagrams() as (other, address):
        other._stream.close()
        receiving = asyncio.create_task(other.receive())
        one._stream.close()
        while not receiving.done():
            one.send(b"after all", address)
            await asyncio.sleep(0.001)

        assert receiving.result() == b"after all"


# --- names ----------------------------------------------------------------------------------------


@on_both_loops
async def test_names_are_looked_up_once_and_what_is_none_is_dropped() -> None:
    tasks: list[asyncio.Task[None]] = []

    def spawn(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(coroutine))
        return tasks[-1]

    resolver = Resolver(socket.AF_INET, spawn)
    used: list[Address] = []
    for _ in range(3):
        resolver.resolve("localhost:7381", used.append)
        resolver.resolve("[::1]:7381", used.append)
        resolver.resolve("no address", used.append)
    assert used == []
    await asyncio.gather(*tasks)

    assert used == [("127.0.0.1", 7381)] * 3
    resolver.resolve("localhost:7381", used.append)
    resolver.resolve("no address", used.append)
    assert used == [("127.0.0.1", 7381)] * 4
    assert len(tasks) == 3
    resolver.close()
