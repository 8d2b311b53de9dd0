"""The daemon's disk work: what happens to it when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from swarmcache import disk_worker
from swarmcache.background import BackgroundTasks
from swarmcache.disk import Cache, Partial
from swarmcache.disk_worker import DiskWorker
from swarmcache.errors import LocalError
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import NodeAddress
from swarmcache.peer_events import (
    ChunksRecovered,
    DiskMeasured,
    LoadManifest,
    ManifestLoaded,
    PeerEffect,
    PeerEvent,
    ReserveSpace,
    TimePassed,
)
from swarmcache.peer_state import PeerState
from tests.disk_helpers import CHUNK_BYTES, a_file, open_cache, write

DEADLINE_S = 20.0


class EndlessFile(Cache):
    """Has one file, which is digested for ever."""

    def __init__(self, root: Path) -> None:
        super().__init__([open_cache(root)])
        self.pieces = threading.Event()
        self.ended = threading.Event()

    def verify(
        self, version_id: bytes, after_piece: Callable[[int], None] = lambda size_bytes: None
    ) -> list[int] | None:
        try:
            while True:
                self.pieces.set()
                after_piece(1)
        finally:
            self.ended.set()


async def test_digesting_ends_when_nobody_waits_for_it(root: Path) -> None:
    cache = EndlessFile(root)
    threads = ThreadPoolExecutor(1)

    def spawn(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(coroutine)

    shell: MachineShell[PeerEvent, PeerEffect] = MachineShell(
        PeerState(NodeAddress("m:1", 2), Random(1)), lambda effect: None, TimePassed()
    )
    worker = DiskWorker(
        cache, threads, threads, spawn, shell, lambda _: [], lambda _: None, None, None
    )
    task = asyncio.create_task(worker.verify(b"v" * 32))
    assert await asyncio.to_thread(cache.pieces.wait, DEADLINE_S)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await asyncio.to_thread(cache.ended.wait, DEADLINE_S)
    threads.shutdown()
    cache.close()


class Events:
    """A machine that is told something, and says nothing."""

    def __init__(self, events: asyncio.Queue[PeerEvent]) -> None:
        self.handle = events.put_nowait
        self.handle_from_thread = events.put_nowait


class Listener:
    """A machine that only listens."""

    def __init__(self) -> None:
        self.manifest_loaded = asyncio.Event()

    def handle(self, event: PeerEvent, now_s: float) -> list[PeerEffect]:
        if isinstance(event, ManifestLoaded):
            self.manifest_loaded.set()
        return []

    def wake_at_s(self) -> float | None:
        return None


class SlowSync(Cache):
    """A cache whose syncs take until the test lets them go on; ``synced`` has what each was for."""

    def __init__(self, root: Path) -> None:
        super().__init__([open_cache(root)])
        self.synced: list[list[bytes]] = []
        self.began, self.go_on = threading.Event(), threading.Event()

    def make_durable(self, version_ids: Sequence[bytes]) -> None:
        self.synced.append(list(version_ids))
        self.began.set()
        assert self.go_on.wait(DEADLINE_S)


async def test_what_comes_during_a_sync_is_made_durable_by_the_next_one(root: Path) -> None:
    cache = SlowSync(root)
    threads = ThreadPoolExecutor(2)
    tasks: list[asyncio.Task[None]] = []

    def spawn(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(coroutine))
        return tasks[-1]

    async def made() -> None:
        """A replica that is there already."""

    shell: MachineShell[PeerEvent, PeerEffect] = MachineShell(
        Listener(), lambda effect: None, TimePassed()
    )
    worker = DiskWorker(
        cache, threads, threads, spawn, shell, lambda _: [], lambda _: None, None, None
    )
    first, *others = [bytes([number]) * 32 for number in range(1, 7)]

    worker.add_replica(first, made())
    assert await asyncio.to_thread(cache.began.wait, DEADLINE_S)
    for version_id in others:
        worker.add_replica(version_id, made())
    await asyncio.sleep(0)
    cache.go_on.set()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*tasks)

    assert cache.synced[0] == [first]
    assert sorted(chain(*cache.synced[1:])) == others and len(cache.synced) <= 3
    shell.stop()
    threads.shutdown()
    cache.close()


async def test_a_client_whose_answer_hangs_keeps_no_file_from_the_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All threads of a user may hang, and with them the answer to who asked with the others."""
    monkeypatch.setattr(disk_worker, "ANSWERS_S", 0.05)
    cache, machine = SlowSync(root), Listener()
    cache.go_on.set()
    threads, tasks = ThreadPoolExecutor(2), BackgroundTasks("test")
    hanging = tasks.spawn(asyncio.sleep(2 * DEADLINE_S))

    async def made() -> None:
        """A replica that is there already."""

    shell: MachineShell[PeerEvent, PeerEffect] = MachineShell(
        machine, lambda effect: None, TimePassed()
    )
    worker = DiskWorker(
        cache, threads, threads, tasks.spawn, shell, lambda _: [hanging], lambda _: None, None, None
    )
    version_id = b"v" * 32

    worker.add_replica(version_id, made())
    worker.carry_out(LoadManifest(version_id))
    await asyncio.wait_for(machine.manifest_loaded.wait(), DEADLINE_S)

    assert cache.synced == [[version_id]]
    assert not hanging.done()
    shell.stop()
    await tasks.end()
    threads.shutdown()
    cache.close()


class Unwell(Cache):
    """A cache in which there is always something that cannot be done."""

    def look_after(self) -> None:
        raise LocalError("could not remove a copy")


async def test_a_disk_that_is_unwell_is_measured_all_the_same(root: Path) -> None:
    """Or else other nodes would go on hearing how much room it had before."""
    cache, threads, tasks = Unwell([open_cache(root)]), ThreadPoolExecutor(2), BackgroundTasks("t")
    events: asyncio.Queue[PeerEvent] = asyncio.Queue()
    machine = cast(Any, Events(events))
    worker = DiskWorker(
        cache, threads, threads, tasks.spawn, machine, lambda _: [], lambda _: None, None, None
    )
    worker.start()
    async with asyncio.timeout(DEADLINE_S / 4):
        while not isinstance(await events.get(), DiskMeasured):
            pass

    await asyncio.to_thread(worker.stop)
    await tasks.end()
    threads.shutdown()
    cache.close()


async def test_a_copy_is_served_while_it_is_being_made_durable(root: Path) -> None:
    """That may take minutes after a big file was written, and other nodes wait for its digests."""
    cache, machine = SlowSync(root), Listener()
    threads, tasks = ThreadPoolExecutor(2), BackgroundTasks("test")
    shell: MachineShell[PeerEvent, PeerEffect] = MachineShell(
        machine, lambda effect: None, TimePassed()
    )
    worker = DiskWorker(
        cache, threads, threads, tasks.spawn, shell, lambda _: [], lambda _: None, None, None
    )

    async def made() -> None:
        """A replica that is there already."""

    worker.add_replica(b"v" * 32, made())
    assert await asyncio.to_thread(cache.began.wait, DEADLINE_S)
    worker.carry_out(LoadManifest(b"v" * 32))
    await asyncio.wait_for(machine.manifest_loaded.wait(), DEADLINE_S / 4)

    cache.go_on.set()
    shell.stop()
    await tasks.end()
    threads.shutdown()
    cache.close()


class Digesting:
    """Files of which an earlier life has left something, and digesting that takes its time."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.cache = Cache([open_cache(root)])
        self.files = [a_file(3 * CHUNK_BYTES, b"/nfs/%d" % number) for number in range(count)]
        for version, data in self.files:
            partial = self.cache.begin(version, CHUNK_BYTES)
            write(partial, data, 0)
            write(partial, data, 1)
            partial.close()
        self.began, self.go_on = threading.Semaphore(0), threading.Event()
        digest = Partial._digest

        def slowly(partial: Partial, chunk: int) -> bytes | None:
            self.began.release()
            assert self.go_on.wait(DEADLINE_S)
            return digest(partial, chunk)

        monkeypatch.setattr(Partial, "_digest", slowly)
        self.threads, self.digest_threads = ThreadPoolExecutor(4), ThreadPoolExecutor(2)
        self.tasks = BackgroundTasks("test")
        self.events: asyncio.Queue[PeerEvent] = asyncio.Queue()

    def worker(self) -> DiskWorker:
        return DiskWorker(
            self.cache,
            self.threads,
            self.digest_threads,
            self.tasks.spawn,
            cast(Any, Events(self.events)),
            lambda _: [],
            lambda _: None,
            None,
            None,
        )

    async def close(self) -> None:
        await self.tasks.end()
        self.digest_threads.shutdown()
        self.threads.shutdown()
        self.cache.close()


async def test_what_is_digested_keeps_no_other_file_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart, say, when many big files are wanted of which some is here already."""
    digesting = Digesting(root, monkeypatch, 8)
    worker = digesting.worker()
    versions = [version for version, _ in digesting.files]
    for version in versions:
        worker.carry_out(ReserveSpace(version, CHUNK_BYTES))
    assert await asyncio.to_thread(digesting.began.acquire, timeout=DEADLINE_S)
    other = a_file(CHUNK_BYTES, b"/nfs/other")[0]

    worker.carry_out(ReserveSpace(other, CHUNK_BYTES))
    events: list[PeerEvent] = []
    while ChunksRecovered(other.version_id, {}) not in events:
        events.append(await asyncio.wait_for(digesting.events.get(), DEADLINE_S))

    digesting.go_on.set()
    while len(events) < 2 * len(versions) + 2:
        events.append(await asyncio.wait_for(digesting.events.get(), DEADLINE_S))
    recovered = [event for event in events if isinstance(event, ChunksRecovered)]
    assert {event.version_id: len(event.digests) for event in recovered} == {
        other.version_id: 0,
        **{version.version_id: 2 for version in versions},
    }
    await digesting.close()


async def test_a_daemon_that_ends_does_not_digest_to_the_end_what_it_goes_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digesting = Digesting(root, monkeypatch, 1)
    worker = digesting.worker()
    worker.carry_out(ReserveSpace(digesting.files[0][0], CHUNK_BYTES))
    assert await asyncio.to_thread(digesting.began.acquire, timeout=DEADLINE_S)

    worker.stop()
    digesting.go_on.set()
    digesting.digest_threads.shutdown()
    await digesting.close()

    assert not digesting.began.acquire(blocking=False), "another chunk was digested"
