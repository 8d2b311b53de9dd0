"""Who may run: the decisions, and the threads that carry them out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.compartments import Compartments
from swarmcache.errors import NoThread

OWNER_MAX, PLACE_MAX = 3, 2
DEADLINE_S = 10.0
PLACES = ("x", "y", None)

Call: TypeAlias = tuple[str, str | None, int]


@given(st.data())
def test_a_call_waits_for_calls_of_its_own_owner_only(data: st.DataObject) -> None:
    compartments: Compartments[Call] = Compartments(OWNER_MAX, PLACE_MAX)
    running: list[Call] = []
    begun: list[Call] = []
    count = data.draw(st.integers(0, 30))
    for number in range(count):
        call = (data.draw(st.sampled_from("ab")), data.draw(st.sampled_from(PLACES)), number)
        of_owner = [each for each in running if each[0] == call[0]]
        if compartments.add(call[0], call[1], call):
            running.append(call)
            begun.append(call)
        else:
            at_place = [each for each in of_owner if each[1] == call[1]]
            assert len(of_owner) == OWNER_MAX or len(at_place) == PLACE_MAX
        ends = data.draw(st.booleans())
        if running and ends:
            end(compartments, running, begun, data.draw(st.integers(0, len(running) - 1)))
        compartments.check()
    while running:
        end(compartments, running, begun, 0)

    assert len(begun) == count, "a call was forgotten"
    assert not compartments.pending("a")
    for owner in "ab":
        for place in PLACES:
            in_turn = [number for *where, number in begun if where == [owner, place]]
            assert in_turn == sorted(in_turn)


def end(compartments: Compartments[Call], running: list[Call], begun: list[Call], at: int) -> None:
    owner, place, _ = running.pop(at)
    following = compartments.ended(owner, place)
    if following is not None:
        running.append(following)
        begun.append(following)
    compartments.check()
    counts = Counter(each[0] for each in running)
    assert all(count <= OWNER_MAX for count in counts.values())


def test_places_take_turns() -> None:
    compartments: Compartments[str] = Compartments(1, 1)
    assert compartments.add("a", "x", "x0")
    for call in ("x1", "x2", "y1", "y2"):
        assert not compartments.add("a", call[0], call)
    assert compartments.pending("a") == 5

    order = [compartments.ended("a", place) for place in "xxyxy"]

    assert order == ["x1", "y1", "x2", "y2", None]


class Hangs:
    """A function that returns when it is allowed to."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Event()

    def __call__(self) -> None:
        self.begun.release()
        assert self.may_end.wait(DEADLINE_S)


@pytest.fixture
def hangs() -> Iterator[Hangs]:
    hangs = Hangs()
    yield hangs
    hangs.may_end.set()


@pytest.fixture
def threads() -> Iterator[CompartmentThreads]:
    threads = CompartmentThreads("test", OWNER_MAX, PLACE_MAX)
    yield threads
    threads.close()


def begin(threads: CompartmentThreads, hangs: Hangs, count: int) -> list[Future[None]]:
    """Fill a place of user 1; returns when as many hang as may."""
    futures = [threads.submit(1, "hung", hangs) for _ in range(count)]
    for _ in range(min(count, PLACE_MAX)):
        assert hangs.begun.acquire(timeout=DEADLINE_S)
    return futures


def test_what_hangs_holds_up_neither_other_owners_nor_other_places(
    threads: CompartmentThreads, hangs: Hangs
) -> None:
    hanging = begin(threads, hangs, 5)
    assert threads.pending(1) == 5

    assert threads.submit(2, "hung", lambda: "another").result(DEADLINE_S) == "another"
    assert threads.submit(1, "sound", lambda: "elsewhere").result(DEADLINE_S) == "elsewhere"
    assert not any(future.done() for future in hanging)

    hangs.may_end.set()
    for future in hanging:
        future.result(DEADLINE_S)


def test_an_error_is_for_who_asked(threads: CompartmentThreads) -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        threads.submit(1, None, fail).result(DEADLINE_S)
    assert threads.submit(1, None, lambda: 1).result(DEADLINE_S) == 1


async def test_a_call_for_which_there_is_no_thread_is_not_counted_as_running(
    threads: CompartmentThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", refuse)
        for _ in range(PLACE_MAX):
            with pytest.raises(NoThread, match="can't start new thread"):
                threads.submit(1, "x", lambda: "never")
        with pytest.raises(NoThread):
            await threads.run(1, "y", lambda: "never")

    assert not threads.pending(1)
    assert threads.submit(1, "x", lambda: "afterwards").result(DEADLINE_S) == "afterwards"


async def test_a_result_can_be_awaited(threads: CompartmentThreads) -> None:
    add: Callable[[int, int], int] = int.__add__
    assert await threads.run(1, None, add, 2, 3) == 5


def test_a_call_that_was_cancelled_is_passed_over(
    threads: CompartmentThreads, hangs: Hangs
) -> None:
    *_, cancelled, last = begin(threads, hangs, PLACE_MAX + 2)
    assert cancelled.cancel()

    hangs.may_end.set()
    last.result(DEADLINE_S)
    assert hangs.begun.acquire(timeout=DEADLINE_S), "the last one has run"
    assert not hangs.begun.acquire(blocking=False), "and the cancelled one has not"


def test_the_end_waits_for_what_is_at_work_and_cancels_what_waits(hangs: Hangs) -> None:
    threads = CompartmentThreads("test", OWNER_MAX, PLACE_MAX)
    *running, waiting = begin(threads, hangs, PLACE_MAX + 1)
    waiting.add_done_callback(lambda _: hangs.may_end.set())
    closing = threading.Thread(target=threads.close)
    closing.start()

    for future in running:
        future.result(DEADLINE_S)
    closing.join(DEADLINE_S)
    assert waiting.cancelled()
    assert threads.submit(1, None, lambda: 1).cancelled()


def test_the_end_does_not_wait_for_what_hangs(
    hangs: Hangs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmcache.compartment_threads.CLOSE_S", 0.01)
    threads = CompartmentThreads("test", OWNER_MAX, PLACE_MAX)
    (future,) = begin(threads, hangs, 1)

    threads.close()

    assert not future.done()
