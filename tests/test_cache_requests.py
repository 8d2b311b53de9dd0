"""The daemon's answers about its cache: in pages, within limits, and gone with their client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from swarmcache import cache_requests
from swarmcache.cache_dir import CacheDir
from swarmcache.cache_index import LISTED_ROWS, Replica, Trust
from swarmcache.cache_requests import REQUESTS_PER_USER_MAX, CacheRequests
from swarmcache.disk import Cache, Entry
from swarmcache.disk_calls import Stamp
from swarmcache.holder_questions import HolderQuestions
from swarmcache.local_protocol import (
    AboutCache,
    AboutFile,
    AnyRequest,
    CachedFile,
    End,
    Failed,
    Ls,
    Outcome,
    Pin,
    Rm,
    Unpin,
    Verify,
    Working,
    decode_cache_answer,
    encode_request,
)
from swarmcache.local_server import LocalConnection, LocalServer
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import NodeAddress
from swarmcache.peer_events import (
    AnswerHolders,
    PeerEffect,
    PeerEvent,
    ReplicaDropped,
    ReplicasRecovered,
    TimePassed,
)
from swarmcache.peer_state import PeerState
from tests.disk_helpers import ME, a_file, publish

DEADLINE_S = 20.0
FILES = 10_000


class Pages(Cache):
    """A cache that counts the pages that were asked of it, and digests until told to end."""

    def __init__(self, directory: CacheDir) -> None:
        super().__init__([directory])
        self.pages = 0

    def entries(self, path: bytes, user: Any = None) -> Iterator[list[Entry]]:
        for page in super().entries(path, user):
            self.pages += 1
            yield page


class Daemon:
    """As much of a daemon as answers requests about its cache. ``told``: the machine's events."""

    def __init__(self, cache: Pages, socket: Path) -> None:
        self.cache = cache
        self.told: list[PeerEvent] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.threads = ThreadPoolExecutor(2)
        state = PeerState(NodeAddress("m:1", 2), Random(1))
        self._shell: MachineShell[PeerEvent, PeerEffect] = MachineShell(
            state, self._carry_out, TimePassed()
        )
        self.verify_started = asyncio.Event()
        self.verify_may_end = asyncio.Event()
        self.verifying = 0
        self.verifying_peak = 0
        self.tracker = HolderQuestions(itertools.count(1), self._handle)
        self.requests = CacheRequests(
            cache,
            self.threads,
            state,
            self.tracker,
            spawn=self._spawn,
            handle=self._handle,
            users_of=lambda version_id: [],
            verify=self._verify,
        )
        self.socket = socket
        self.server = LocalServer(socket, self._take)

    def _take(self, connection: LocalConnection, request: AnyRequest, fds: list[int]) -> None:
        assert isinstance(request, AboutCache) and not fds
        self.requests.take(connection, request)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _handle(self, event: PeerEvent) -> None:
        self.told.append(event)
        self._shell.handle(event)

    def _carry_out(self, effect: PeerEffect) -> None:
        if isinstance(effect, AnswerHolders):
            self.tracker.carry_out(effect)

    async def _verify(self, version_id: bytes) -> list[int] | None:
        self.verifying += 1
        self.verifying_peak = max(self.verifying_peak, self.verifying)
        self.verify_started.set()
        try:
            await self.verify_may_end.wait()
        finally:
            self.verifying -= 1
        return []

    async def all_done(self) -> None:
        """Wait until nobody's request is being worked on."""
        async with asyncio.timeout(DEADLINE_S):
            while self.tasks:
                await asyncio.wait(self.tasks)

    async def close(self) -> None:
        self.server.close()
        await self.all_done()
        self.threads.shutdown()


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, daemon: Daemon) -> Client:
        return cls(*await asyncio.open_unix_connection(str(daemon.socket), limit=1 << 16))

    def ask(self, *requests: AboutCache) -> None:
        for request in requests:
            self.writer.write(encode_request(request))

    async def answer(self) -> AboutFile | Working | End | Failed:
        async with asyncio.timeout(DEADLINE_S):
            return decode_cache_answer(await self._reader.readline())

    async def answers(self, *requests: AboutCache) -> list[AboutFile | Working | End | Failed]:
        """Ask, and read until there is a final answer for each request."""
        self.ask(*requests)
        found = []
        finals = 0
        while finals < len(requests):
            found.append(await self.answer())
            finals += isinstance(found[-1], (End, Failed))
        return found

    def close(self) -> None:
        self.writer.close()


@pytest.fixture
async def daemon(cache: CacheDir, tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(Pages(cache), tmp_path / "run" / "daemon.sock")
    yield daemon
    await daemon.close()


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    client = await Client.connect(daemon)
    yield client
    client.close()


def add_rows(cache: CacheDir, count: int) -> None:
    """Put many replicas into the index, which is all that a listing looks at."""
    stamp = Stamp(10, 1, 1, 1)
    rows = (
        Replica(
            b"%032d" % number,
            b"/nfs/corpus/%06d" % number,
            4096,
            4096,
            Trust.DOUBTFUL,
            b"b" * 16,
            stamp,
            1.0,
            1.0,
            1.0,
        )
        for number in range(count)
    )
    cache._index.insert_found((row, [ME]) for row in rows)


# --- pages ---------------------------------------------------------------------------------------


async def test_a_long_listing_waits_for_its_client_while_others_are_answered(
    daemon: Daemon, client: Client, cache: CacheDir
) -> None:
    version, data = a_file(10, b"/nfs/hit")
    publish(cache, version, data)
    add_rows(cache, FILES)
    slow, other = client, await Client.connect(daemon)
    slow.ask(Ls())
    first = await slow.answer()

    for _ in range(50):
        answers = await other.answers(Ls([b"/nfs/hit"]))
        assert isinstance(answers[0], CachedFile) and answers[0].path == b"/nfs/hit"
        assert daemon.cache.lookup(version, ME) is not None
    pages_ahead = daemon.cache.pages - 50 * 2

    assert pages_ahead < FILES / LISTED_ROWS / 2, "it does not read ahead of its client"
    found = [first]
    while not isinstance(found[-1], End):
        found.append(await slow.answer())
    files = [file for file in found if isinstance(file, CachedFile)]
    assert len({file.path for file in files}) == len(files) == FILES + 1
    other.close()


async def test_a_listing_ends_when_its_client_goes(
    daemon: Daemon, client: Client, cache: CacheDir
) -> None:
    add_rows(cache, FILES)
    client.ask(Ls())
    await client.answer()

    client.close()
    await daemon.all_done()

    assert daemon.cache.pages < FILES / LISTED_ROWS
    again = await Client.connect(daemon)
    assert isinstance((await again.answers(Ls([b"/none"])))[-1], End)
    again.close()


# --- limits --------------------------------------------------------------------------------------


async def test_one_request_at_a_time_on_a_connection(daemon: Daemon, client: Client) -> None:
    answers = await client.answers(Ls(), Ls())

    assert [type(answer) for answer in answers] == [Failed, End]
    assert [type(answer) for answer in await client.answers(Ls())] == [End]


async def test_one_user_cannot_take_all_requests(
    daemon: Daemon, client: Client, cache: CacheDir
) -> None:
    publish(cache, *a_file(10))
    busy = [await Client.connect(daemon) for _ in range(REQUESTS_PER_USER_MAX)]
    for each in busy:
        each.ask(Verify())
    async with asyncio.timeout(DEADLINE_S):
        await daemon.verify_started.wait()

    [refused] = await client.answers(Ls())
    assert isinstance(refused, Failed) and "too many requests" in refused.reason
    daemon.verify_may_end.set()
    for each in busy:
        assert isinstance(await last(each), End)
        each.close()
    assert daemon.verifying_peak == 1, "files are digested one at a time"
    assert isinstance((await client.answers(Ls()))[-1], End)


async def last(client: Client) -> object:
    """The final answer."""
    while not isinstance(answer := await client.answer(), (End, Failed)):
        pass
    return answer


async def test_a_client_hears_that_a_long_request_is_worked_on(
    daemon: Daemon, client: Client, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_requests, "WORKING_S", 0.01)
    publish(cache, *a_file(10))
    client.ask(Verify())

    assert isinstance(await client.answer(), Working)
    daemon.verify_may_end.set()
    assert isinstance(await last(client), End)


async def test_verifying_ends_when_its_client_goes(
    daemon: Daemon, client: Client, cache: CacheDir
) -> None:
    publish(cache, *a_file(10))
    client.ask(Verify())
    async with asyncio.timeout(DEADLINE_S):
        await daemon.verify_started.wait()

    client.close()
    await daemon.all_done()

    assert daemon.verifying == 0


# --- removal -------------------------------------------------------------------------------------


async def test_the_tracker_is_told_before_a_file_goes(
    daemon: Daemon, client: Client, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(10)
    publish(cache, version, data)
    told_before: list[PeerEvent] = []
    drop = cache._drop

    def watched(replica: Replica) -> None:
        told_before.extend(daemon.told)
        drop(replica)

    monkeypatch.setattr(cache, "_drop", watched)
    answers = await client.answers(Rm([version.path]))

    assert told_before == [ReplicaDropped(version.version_id)]
    assert [type(answer) for answer in answers] == [Outcome, End]
    assert cache.lookup(version, ME) is None


async def test_a_file_that_is_pinned_in_the_last_moment_stays_and_is_announced_again(
    daemon: Daemon, client: Client, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(10)
    publish(cache, version, data)
    remove = daemon.cache.remove

    def late(*arguments: Any) -> object:
        cache.pin(version.version_id, 1)
        return remove(*arguments)

    monkeypatch.setattr(daemon.cache, "remove", late)
    outcome, _ = await client.answers(Rm([version.path]))

    assert isinstance(outcome, Outcome) and not outcome.done
    assert daemon.told == [
        ReplicaDropped(version.version_id),
        ReplicasRecovered([version.version_id]),
    ]
    assert cache.lookup(version, ME) is not None


async def test_a_pin_on_what_has_just_gone_is_not_promised(
    daemon: Daemon, client: Client, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, data = a_file(10)
    publish(cache, version, data)
    pin = daemon.cache.pin

    def late(version_id: bytes, uid: int) -> bool:
        cache.drop(version_id)
        return pin(version_id, uid)

    monkeypatch.setattr(daemon.cache, "pin", late)
    outcome, _ = await client.answers(Pin([version.path]))

    assert isinstance(outcome, Outcome)
    assert (outcome.done, outcome.note) == (False, "not cached any more")
    assert cache._index.pinned_by(version.version_id) == []
    assert isinstance((await client.answers(Unpin([version.path])))[-1], End)


async def test_a_bug_ends_the_request_and_not_the_connection(
    daemon: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[list[Entry]]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(daemon.cache, "entries", broken)
    [failed] = await client.answers(Ls())
    monkeypatch.undo()

    assert failed == Failed("internal error: a bug")
    assert isinstance((await client.answers(Ls()))[-1], End)
