"""Names of users: asked for once, in threads, by whoever has come."""

from __future__ import annotations

import asyncio
import pwd
import threading
from collections.abc import Iterator

import pytest

from swarmcache import user_names
from swarmcache.user_names import UserNames

DEADLINE_S = 10.0


class Directory:
    """A directory service that says what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.asked: list[int] = []
        self.hanging: dict[int, threading.Event] = {}

    def getpwuid(self, uid: int) -> pwd.struct_passwd:
        self.asked.append(uid)
        if uid in self.hanging:
            assert self.hanging[uid].wait(DEADLINE_S)
        name = self.names[uid]  # KeyError, as pwd's own
        return pwd.struct_passwd((name, "x", uid, uid, "", "/", "/bin/sh"))


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Directory]:
    directory = Directory()
    monkeypatch.setattr(pwd, "getpwuid", directory.getpwuid)
    yield directory
    for hanging in directory.hanging.values():
        hanging.set()


async def told(names: UserNames, uid: int) -> str:
    name: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    await asyncio.sleep(0)  # the event loop has its turn whether the name is known or not
    names.tell(uid, name.set_result)
    return await asyncio.wait_for(name, DEADLINE_S)


async def test_a_user_whose_name_takes_long_holds_up_no_other(directory: Directory) -> None:
    directory.names = {1: "ann", 2: "ben"}
    directory.hanging[1] = threading.Event()
    names = UserNames()
    late = [asyncio.create_task(told(names, 1)) for _ in range(3)]
    await asyncio.sleep(0)

    assert await told(names, 2) == "ben"
    assert not any(task.done() for task in late)
    directory.hanging[1].set()
    assert await asyncio.gather(*late) == ["ann"] * 3
    assert sorted(directory.asked) == [1, 2], "once for all who wait"


async def test_a_name_is_known_at_once_when_it_was_told_lately(directory: Directory) -> None:
    directory.names = {1: "ann"}
    names = UserNames()
    await told(names, 1)
    heard: list[str] = []

    names.tell(1, heard.append)

    assert heard == ["ann"]
    assert directory.asked == [1]


async def test_a_name_is_asked_for_again_after_a_while(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_names, "KEPT_S", 0.0)
    directory.names = {1: "ann"}
    names = UserNames()
    assert await told(names, 1) == "ann"
    directory.names[1] = "anna"
    async with asyncio.timeout(DEADLINE_S):
        while await told(names, 1) != "anna":
            pass


async def test_who_has_no_name_may_have_one_the_next_time(directory: Directory) -> None:
    names = UserNames()
    assert await told(names, 1) == "1"
    directory.names[1] = "ann"
    async with asyncio.timeout(DEADLINE_S):
        while await told(names, 1) != "ann":
            pass


async def test_no_more_names_are_kept_than_fit(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_names, "NAMES_MAX", 2)
    directory.names = {uid: f"user{uid}" for uid in range(3)}
    names = UserNames()
    for uid in (0, 1, 2, 2, 1, 0):
        assert await told(names, uid) == f"user{uid}"
    assert directory.asked == [0, 1, 2, 0]


async def test_nobody_is_told_anything_after_the_end(directory: Directory) -> None:
    directory.names = {1: "ann"}
    directory.hanging[1] = threading.Event()
    names = UserNames()
    heard: list[str] = []
    names.tell(1, heard.append)
    names.close()
    directory.hanging[1].set()
    await told(names, 1)
    assert heard == []
