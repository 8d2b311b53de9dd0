"""The daemon's disk work: what happens to it when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pytest

from swarmcache import disk_worker
from swarmcache.background import BackgroundTasks
from swarmcache.disk import Cache
from swarmcache.disk_worker import DiskWorker
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import NodeAddress
from swarmcache.peer_events import (
    LoadManifest,
    ManifestLoaded,
    PeerEffect,
    PeerEvent,
    TimePassed,
)
from swarmcache.peer_state import PeerState
from tests.disk_helpers import open_cache

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
    worker = DiskWorker(cache, threads, spawn, shell, lambda _: [], lambda _: None, None, None)
    task = asyncio.create_task(worker.verify(b"v" * 32))
    assert await asyncio.to_thread(cache.pieces.wait, DEADLINE_S)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await asyncio.to_thread(cache.ended.wait, DEADLINE_S)
    threads.shutdown()
    cache.close()


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
    worker = DiskWorker(cache, threads, spawn, shell, lambda _: [], lambda _: None, None, None)
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
        cache, threads, tasks.spawn, shell, lambda _: [hanging], lambda _: None, None, None
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
