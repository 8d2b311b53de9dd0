"""Questions about places keep no other user waiting, and no descriptor open."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from swarmcache.chunks import FileVersion
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk import Cache, User
from swarmcache.errors import SourceUnreadable
from swarmcache.holder_questions import HolderQuestions
from swarmcache.local_protocol import (
    LOCATIONS_FILES_MAX,
    Answer,
    CopyPath,
    CopyPathOf,
    End,
    Failed,
    Locations,
    LocationsOf,
)
from swarmcache.local_server import LocalConnection
from swarmcache.locator import LOOKS_PER_USER_MAX, Locator
from swarmcache.messages import NodeAddress
from swarmcache.replica_questions import ReplicaQuestions
from swarmcache.source_file import SourceExaminer, SourceFile

DEADLINE_S = 20.0


class Connection:
    """A client of whom it is known who it is."""

    def __init__(self, uid: int) -> None:
        self.user = User(uid, f"user{uid}")
        self.is_open = True
        self.on_closed: dict[object, Callable[[], object]] = {}
        self.answered = asyncio.Event()
        self.answers: list[Answer] = []

    def send(self, *answers: Answer) -> None:
        self.answers += answers
        if self.is_open and any(isinstance(a, End | Failed | CopyPath) for a in answers):
            self.answered.set()

    def close_files(self, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        self.is_open = False
        for callback in list(self.on_closed.values()):
            callback()


class Daemon:
    """As much of one as answers: a file server hangs for the files of user 1."""

    def __init__(self) -> None:
        self.may_look = threading.Event()
        self.many_look = asyncio.Event()
        self.looking = self.looking_peak = 0
        self._loop = asyncio.get_running_loop()
        self.hangs: set[int] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self.locator = Locator(
            cast(Cache, self),
            cast(SourceExaminer, self),
            CompartmentThreads("look", 2 * LOOKS_PER_USER_MAX, 2 * LOOKS_PER_USER_MAX),
            cast(HolderQuestions, self),
            cast(ReplicaQuestions, self),
            NodeAddress("m:1", 2, "m"),
            None,
            self._spawn,
        )

    def place(self, fd: int) -> bytes:
        return b"/nfs"

    def examine(self, fd: int) -> SourceFile:
        if fd in self.hangs:
            with self._lock:
                self.looking += 1
                self.looking_peak = max(self.looking, self.looking_peak)
                if self.looking == LOOKS_PER_USER_MAX:
                    self._loop.call_soon_threadsafe(self.many_look.set)
            self.may_look.wait(DEADLINE_S)
            with self._lock:
                self.looking -= 1
        if os.readlink(f"/proc/self/fd/{fd}") == "/dev/null":
            raise SourceUnreadable("not a regular file")
        return SourceFile(FileVersion(b"/nfs/file", 5, 1), "fs")

    def user_path(self, version: FileVersion, user: User) -> str:
        return f"/cache/{user.name}{version.path.decode()}"

    async def places(self, user: str, version_ids: list[bytes]) -> list[None]:
        return [None for _ in version_ids]

    async def ask(self, version_ids: list[bytes], nodes_max: int) -> tuple[None, str]:
        return None, "no tracker"

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def take(self, connection: Connection, request: LocationsOf | CopyPathOf, *fds: int) -> None:
        self.locator.take(cast(LocalConnection, connection), request, list(fds))

    async def ended(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*self.tasks, return_exceptions=True)


def opened(path: Path | str, count: int) -> list[int]:
    return [os.open(path, os.O_RDONLY) for _ in range(count)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    return path


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_user_whose_files_hang_keeps_nobody_else_waiting(file: Path) -> None:
    daemon = Daemon()
    before = open_descriptors()
    hanging = [Connection(1) for _ in range(3)]
    for connection in hanging:
        fds = opened(file, LOCATIONS_FILES_MAX)
        daemon.hangs |= set(fds)
        daemon.take(connection, LocationsOf(LOCATIONS_FILES_MAX), *fds)
    gone = hanging.pop()
    other = Connection(2)
    async with asyncio.timeout(DEADLINE_S):
        await daemon.many_look.wait()
        daemon.take(other, CopyPathOf(b"/any"), *opened(file, 1))
        await other.answered.wait()
        gone.close()
        daemon.may_look.set()
        for connection in hanging:
            await connection.answered.wait()
    await daemon.ended()

    assert other.answers == [CopyPath(b"/cache/user2/nfs/file")]
    assert daemon.looking_peak == LOOKS_PER_USER_MAX
    assert all(len(each.answers) == LOCATIONS_FILES_MAX + 1 for each in hanging)
    assert open_descriptors() == before


async def test_answers_are_in_the_order_of_the_descriptors(file: Path) -> None:
    daemon, connection, before = Daemon(), Connection(1), open_descriptors()
    fds = [*opened("/dev/null", 1), *opened(file, 2), *opened("/dev/null", 1)]
    daemon.take(connection, LocationsOf(4), *fds)
    await daemon.ended()
    unreadable, found = Locations(reason="not a regular file"), Locations(b"/nfs/file", 5)
    found.reason = "no tracker"
    assert connection.answers == [unreadable, found, found, unreadable, End()]
    daemon.take(connection, CopyPathOf(b"/any"), *opened("/dev/null", 1))
    await daemon.ended()
    assert connection.answers[-1] == Failed("not a regular file")
    assert open_descriptors() == before


async def test_a_second_question_before_the_answer_is_refused(file: Path) -> None:
    daemon, connection, before = Daemon(), Connection(1), open_descriptors()
    daemon.take(connection, LocationsOf(1), *opened(file, 1))
    daemon.take(connection, LocationsOf(2), *opened(file, 2))
    assert connection.answers == [Failed("one request at a time on a connection")]
    await daemon.ended()
    assert isinstance(connection.answers[-1], End)
    assert open_descriptors() == before
