"""What feeds a machine: events from the loop and from threads, each once and in its order."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from swarmcache import machine_shell
from swarmcache.clock import now_s
from swarmcache.machine_shell import MachineShell

THREADS = 4
EVENTS = 500
DEADLINE_S = 20.0


class Recorder:
    """A machine that notes its events and wants nothing."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.all_there = asyncio.Event()

    def handle(self, event: tuple[int, int], now_s: float) -> list[None]:
        self.events.append(event)
        if len(self.events) == THREADS * EVENTS:
            self.all_there.set()
        return []

    def wake_at_s(self) -> float | None:
        return None


async def test_every_event_of_every_thread_arrives_once_and_in_its_order() -> None:
    machine = Recorder()
    shell: MachineShell[tuple[int, int], None] = MachineShell(machine, lambda _: None, (-1, -1))

    def tell(thread: int) -> None:
        for event in range(EVENTS):
            shell.handle_from_thread((thread, event))

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    await asyncio.wait_for(machine.all_there.wait(), 60)
    for thread in threads:
        thread.join()

    assert len(machine.events) == THREADS * EVENTS
    for number in range(THREADS):
        assert [e for t, e in machine.events if t == number] == list(range(EVENTS))


async def test_events_of_threads_that_follow_closely_wake_the_loop_together() -> None:
    machine = Recorder()
    shell: MachineShell[tuple[int, int], None] = MachineShell(machine, lambda _: None, (-1, -1))
    loop = asyncio.get_running_loop()
    turns: list[float] = []
    empty_inbox = shell._empty_inbox

    def counted() -> None:
        turns.append(loop.time())
        empty_inbox()

    shell._empty_inbox = counted  # type: ignore[method-assign]

    def tell() -> None:
        for event in range(THREADS * EVENTS):
            shell.handle_from_thread((0, event))

    await asyncio.gather(asyncio.to_thread(tell), machine.all_there.wait())

    pauses_s = [after - before for before, after in itertools.pairwise(turns)]
    assert all(pause_s > 0.0005 for pause_s in pauses_s)


class Script:
    """A machine whose events say in words what it wants, and which wants its timer after each."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.timer_at_s: float | None = None
        self.timer_came = asyncio.Event()

    def handle(self, event: str, now_s: float) -> list[str]:
        self.events.append(event)
        if event == "timer":
            self.timer_at_s = None
            self.timer_came.set()
            return []
        self.timer_at_s = self.timer_at_s or now_s
        assert event != "fail", "as it was told"
        return event.split() if " " in event else []

    def wake_at_s(self) -> float | None:
        return self.timer_at_s


async def test_an_effect_that_fails_costs_no_other_and_not_the_timer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    carried_out: list[str] = []

    def carry_out(effect: str) -> None:
        if effect == "impossible":
            raise OSError("cannot do it")
        carried_out.append(effect)

    machine = Script()
    shell = MachineShell(machine, carry_out, "timer")

    shell.handle("one impossible two")

    assert carried_out == ["one", "two"]
    await asyncio.wait_for(machine.timer_came.wait(), DEADLINE_S)
    (said,) = caplog.records
    assert said.exc_info is not None and "cannot do it" in str(said.exc_info[1])


async def test_an_event_at_which_the_machine_fails_costs_no_other_and_not_the_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine_shell, "FAILED_PAUSE_S", 0.1)
    machine = Script()

    def carry_out(effect: str) -> None:
        shell.handle(effect)

    shell = MachineShell(machine, carry_out, "timer")

    began_s = now_s()
    with pytest.raises(AssertionError, match="as it was told"):
        shell.handle("fail behind")
    assert machine.events == ["fail behind", "fail"]
    await asyncio.wait_for(machine.timer_came.wait(), DEADLINE_S)

    assert machine.events == ["fail behind", "fail", "behind", "timer"]
    assert now_s() - began_s >= 0.1
