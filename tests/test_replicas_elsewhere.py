"""What threads that make room are told of other nodes, and how long they wait for it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from swarmcache import replicas_elsewhere
from swarmcache.holder_questions import HolderQuestions
from swarmcache.messages import LOCATE_MAX, Holders
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from swarmcache.peer_events import AnswerHolders, HoldersWanted, PeerEvent, RequestGone
from swarmcache.replicas_elsewhere import ReplicasElsewhere
from tests.local_daemons import LocalDaemons

FIRST, SECOND, THIRD = (bytes([number]) * 32 for number in range(3))

Answer = Callable[[HoldersWanted], AnswerHolders | None]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer for an answer than a job is kept waiting for it."""
    monkeypatch.setattr(replicas_elsewhere, "ANSWER_S_MAX", 30.0)


class Machine:
    """Answers what a node's machine is asked about holders, and notes it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.said: list[PeerEvent] = []
        self.questions = HolderQuestions(itertools.count(1), self.handle)

    def handle(self, event: PeerEvent) -> None:
        self.said.append(event)
        if isinstance(event, HoldersWanted) and (answer := self.answer(event)) is not None:
            self.questions.carry_out(answer)


def counts(
    machine: Machine, *questions: list[bytes], between: Callable[[], None] = lambda: None
) -> list[Mapping[bytes, int]]:
    """What a thread is told that asks these questions, one after the other."""

    async def ask_all() -> list[Mapping[bytes, int]]:
        async with asyncio.TaskGroup() as group:

            def spawn(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
                return group.create_task(coroutine)

            elsewhere = ReplicasElsewhere(machine.questions, spawn)
            found = []
            for question in questions:
                found.append(await asyncio.to_thread(elsewhere.counts, question))
                between()
            return found

    return asyncio.run(ask_all())


def two_and_none(wanted: HoldersWanted) -> AnswerHolders:
    holders = [Holders(0 if each == SECOND else 2) for each in wanted.version_ids]
    return AnswerHolders(wanted.request, holders, "")


def test_the_tracker_says_how_many_others_there_are() -> None:
    assert counts(Machine(two_and_none), [FIRST, SECOND]) == [{FIRST: 2, SECOND: 0}]


def test_an_answer_counts_for_a_few_seconds_before_the_tracker_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = time.monotonic()
    monkeypatch.setattr(replicas_elsewhere, "now_s", lambda: now_s)
    machine = Machine(two_and_none)

    def later() -> None:
        nonlocal now_s
        now_s += replicas_elsewhere.KNOWN_S * 0.6

    found = counts(machine, [FIRST], [SECOND], [THIRD], between=later)

    assert found == [{FIRST: 2}, {FIRST: 2}, {THIRD: 2}]
    assert machine.said == [HoldersWanted(1, [FIRST], 0), HoldersWanted(2, [THIRD], 0)]


def test_no_more_is_asked_than_fits_into_a_message() -> None:
    version_ids = [number.to_bytes(32) for number in range(LOCATE_MAX + 1)]

    (found,) = counts(Machine(two_and_none), version_ids)

    assert list(found) == version_ids[:LOCATE_MAX]


def test_without_a_tracker_nothing_is_known() -> None:
    assert counts(Machine(lambda _: AnswerHolders(1, None, "no tracker")), [FIRST]) == [{}]


def test_nobody_waits_long_or_twice_for_a_tracker_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas_elsewhere, "ANSWER_S_MAX", 0.05)
    machine = Machine(lambda _: None)
    began_s = time.monotonic()

    assert counts(machine, [FIRST], [FIRST]) == [{}, {}]
    assert time.monotonic() - began_s >= 0.05
    assert machine.said == [HoldersWanted(1, [FIRST], 0), RequestGone(1)]


@pytest.mark.slow
def test_a_daemon_gives_up_what_another_one_has_rather_than_the_last_replica(
    tmp_path: Path,
) -> None:
    size_bytes = 1 << 20
    files = [tmp_path / name for name in ("lonely", "common", "new")]
    for file in files:
        file.write_bytes(file.name.encode() * (size_bytes // len(file.name)))
    settings = f"""
        cache.max_usage = {UNCOUNTED_MAX_BYTES + 5 * size_bytes // 2}
        cache.min_age = "0s"
        file_servers.fs.paths = ["{tmp_path}"]
        """
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node, other = (local.start_daemon(name, settings) for name in "ab")
        node.get(*files[:2])
        other.get(files[1])

        node.get(files[2])

        assert {each["path"] for each in node.listed()} == {str(files[0]), str(files[2])}
