"""What the daemon keeps for its clients, and lets go of when they go."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swarmcache import holds as holds_module
from swarmcache import local_requests
from swarmcache.cache_dir import CacheDir
from swarmcache.chunks import FileVersion
from swarmcache.disk import Cache
from swarmcache.fetching import Fetching
from swarmcache.holds import Holds
from swarmcache.local_protocol import AnyRequest, Cached
from swarmcache.local_requests import LocalRequests
from swarmcache.local_server import LocalConnection, LocalServer
from swarmcache.peer_events import AnswerStatus, PeerEvent, StatusWanted
from swarmcache.user_names import user_name

DEADLINE_S = 20.0
FIRST, SECOND, THIRD = (bytes([number]) * 32 for number in (1, 2, 3))


class Connections:
    """Real connections to a server that answers anything."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._newest: asyncio.Queue[LocalConnection] = asyncio.Queue()
        self.server = LocalServer(path, self._handle)

    def _handle(self, connection: LocalConnection, request: AnyRequest, fds: list[int]) -> None:
        connection.send(Cached(b"/", hit=True))
        self._newest.put_nowait(connection)

    async def connect(self) -> tuple[LocalConnection, asyncio.StreamWriter]:
        """The two ends of a new one."""
        _, writer = await asyncio.open_unix_connection(str(self._path))
        writer.write(b'{"op":"status"}\n')
        async with asyncio.timeout(DEADLINE_S):
            return await self._newest.get(), writer


@pytest.fixture
async def connections(tmp_path: Path) -> AsyncIterator[Connections]:
    connections = Connections(tmp_path / "run" / "daemon.sock")
    yield connections
    connections.server.close()


async def closed(connection: LocalConnection, writer: asyncio.StreamWriter) -> None:
    """Close the client's end, and wait until the server has noticed."""
    gone = asyncio.Event()
    connection.on_closed["test"] = gone.set
    writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await gone.wait()


async def test_a_copy_is_held_until_the_last_connection_that_holds_it_closes(
    connections: Connections, cache: CacheDir
) -> None:
    holds = Holds(Cache([cache]))
    first, second = await connections.connect(), await connections.connect()

    assert holds.add(first[0], 1, FIRST) and holds.add(first[0], 2, FIRST)
    assert holds.add(second[0], 1, FIRST) and holds.add(second[0], 2, SECOND)
    assert cache.held(FIRST) and cache.held(SECOND)
    await closed(*second)
    assert cache.held(FIRST) and not cache.held(SECOND)
    await closed(*first)
    assert not cache.held(FIRST)


async def test_nothing_is_held_for_a_client_that_has_gone(
    connections: Connections, cache: CacheDir
) -> None:
    holds = Holds(Cache([cache]))
    connection, writer = await connections.connect()
    await closed(connection, writer)

    assert not holds.add(connection, 1, FIRST)
    assert not cache.held(FIRST)


async def test_a_connection_holds_so_many_copies_and_no_more(
    connections: Connections, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds_module, "HOLDS_MAX", 2)
    holds = Holds(Cache([cache]))
    connection, writer = await connections.connect()

    assert holds.add(connection, 1, FIRST) and holds.add(connection, 2, SECOND)
    assert not holds.add(connection, 3, THIRD) and not cache.held(THIRD)
    assert holds.add(connection, 1, FIRST), "which it holds already"
    await closed(connection, writer)
    assert not cache.held(FIRST) and not cache.held(SECOND)


async def test_a_hold_ends_when_it_is_released_and_not_before(
    connections: Connections, cache: CacheDir
) -> None:
    holds = Holds(Cache([cache]))
    connection, writer = await connections.connect()
    other, other_writer = await connections.connect()
    assert holds.add(connection, 1, FIRST) and holds.add(connection, 2, FIRST)

    holds.release(connection, 1)
    holds.release(connection, 1)
    holds.release(connection, 3)
    holds.release(other, 2)
    assert cache.held(FIRST)
    holds.release(connection, 2)
    assert not cache.held(FIRST)
    await closed(connection, writer)
    await closed(other, other_writer)


async def test_a_number_stands_for_one_hold_at_a_time(
    connections: Connections, cache: CacheDir
) -> None:
    holds = Holds(Cache([cache]))
    connection, writer = await connections.connect()

    assert holds.add(connection, 1, FIRST)
    assert not holds.add(connection, 1, SECOND) and not cache.held(SECOND)
    holds.release(connection, 1)
    assert holds.add(connection, 1, SECOND) and not cache.held(FIRST)
    await closed(connection, writer)


# --- status --------------------------------------------------------------------------------------


class Asking:
    """Real connections to ``LocalRequests``, whose machine is the test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.wanted: asyncio.Queue[PeerEvent] = asyncio.Queue()
        self.made = 0
        none = cast(Any, None)  # whatever is about files
        self.requests = LocalRequests(
            none,
            none,
            none,
            none,
            itertools.count(1),
            chunk_size_bytes=None,
            spawn=asyncio.create_task,
            handle=self.wanted.put_nowait,
            node_status=self._node_status,
            members=lambda: None,
        )
        self.server = LocalServer(path, cast(Any, self.requests.take))

    def _node_status(self) -> dict[str, Any]:
        self.made += 1
        return {"made": self.made}

    async def next_question(self) -> int:
        """The number of what the tracker is asked."""
        async with asyncio.timeout(DEADLINE_S):
            event = await self.wanted.get()
        assert isinstance(event, StatusWanted)
        return event.request

    async def ask(self, count: int = 1) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(str(self._path))
        writer.write(b'{"op":"status"}\n' * count)
        return reader, writer


@pytest.fixture
async def asking(tmp_path: Path) -> AsyncIterator[Asking]:
    asking = Asking(tmp_path / "run" / "daemon.sock")
    yield asking
    asking.server.close()


async def line(reader: asyncio.StreamReader) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE_S):
        answer: dict[str, Any] = json.loads(await reader.readline())
    return answer


async def test_of_a_status_one_connection_gets_one_at_a_time(asking: Asking) -> None:
    reader, writer = await asking.ask(3)
    number = await asking.next_question()
    for _ in range(2):
        assert (await line(reader))["reason"] == "one request at a time on a connection"
    asking.requests.carry_out(AnswerStatus(number, {"nodes": []}, ""))
    assert (await line(reader))["cluster"] == {"nodes": []}

    writer.write(b'{"op":"status"}\n')
    asking.requests.carry_out(AnswerStatus(await asking.next_question(), None, "no tracker"))
    assert (await line(reader))["reason"] == "no tracker"
    assert asking.wanted.empty()
    writer.close()


async def test_all_who_wait_for_the_status_get_what_the_tracker_was_asked_once(
    asking: Asking,
) -> None:
    first = await asking.ask()
    number = await asking.next_question()
    others = [await asking.ask(2) for _ in range(3)]
    for reader, _ in others:  # that is refused, so the one before it is waiting
        assert (await line(reader))["answer"] == "failed"
    gone = others.pop()
    gone[1].close()
    of_a_prefetch = asyncio.create_task(asking.requests.cluster_status())
    given_up = asyncio.create_task(asking.requests.cluster_status())
    await asyncio.sleep(0)
    given_up.cancel()

    asking.requests.carry_out(AnswerStatus(number, {"nodes": []}, ""))

    for reader, writer in [first, *others]:
        assert (await line(reader))["node"] == {"made": 1}
        writer.close()
    assert await of_a_prefetch == ({"nodes": []}, "")
    assert asking.wanted.empty()


@pytest.mark.parametrize("everything", [True, False])
async def test_who_may_not_see_all_hears_no_names_of_what_others_fetch(
    asking: Asking, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    """As with ``ls``. That something is fetched, and how far it is, is no secret."""
    versions = [FileVersion(b"/nfs/mine", 1, 1), FileVersion(b"/nfs/another's", 2, 2)]
    users = [user_name(os.getuid()), "another"]
    fetching = [
        Fetching(version, "nfs", user, 1 << 20, True, stall_s=5.0, progress_at_s=0.0)
        for version, user in zip(versions, users, strict=True)
    ]
    state = SimpleNamespace(downloads=lambda: fetching, tracker_connected=True)
    monkeypatch.setattr(asking.requests, "_state", state)
    monkeypatch.setattr(
        asking.requests,
        "_node_status",
        lambda: {"downloads": asking.requests.downloads_status()},
    )
    monkeypatch.setattr(local_requests, "sees_all", lambda _: everything)

    reader, writer = await asking.ask()
    asking.requests.carry_out(AnswerStatus(await asking.next_question(), None, ""))
    downloads = (await line(reader))["node"]["downloads"]
    writer.close()

    names = ["/nfs/mine", "/nfs/another's" if everything else ""]
    assert [each["path"] for each in downloads] == names
    assert [each["size_bytes"] for each in downloads] == [1, 2]
