"""Who stands in for the tracker: the machines of a whole cluster in virtual time, without sockets.

Whoever is the tracker for others grants whenever it may. What must never be is that two of them
have leases out at the same time, as long as everybody who runs can reach everybody else.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from swarmcache.handover import LEASE_S, PRESENT_S, Handover
from swarmcache.messages import StandsIn
from swarmcache.peer_events import TimePassed
from swarmcache.stand_in import (
    BUSY_S,
    CONNECT_S,
    NEWCOMER_S,
    WATCH_S,
    AskNode,
    BeginStandingIn,
    Candidate,
    EndStandingIn,
    LeaveStandIn,
    LetGo,
    NodeSilent,
    NodeTold,
    StandIn,
    StandInEffect,
    StandInEvent,
    StandInGone,
    TrackerGone,
    TrackerHangs,
    TrackerReached,
    TrackerUnreachable,
    TryTracker,
    UseStandIn,
    UseTracker,
    order_of,
)

TRACKER = "tracker"
LATENCY_S = 0.005
HANDSHAKE_S = 5.0
# Between two pings that are not answered and the end of a connection, at least and at most.
SILENCE_S = (2.5, 7.5)
GRANT_EVERY_S = 0.1


class Process:
    """The tracker, or a node with its daemon. ``office``: what it is as a tracker for others."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.powered = True
        self.stopped = False
        self.stopped_s = 0.0
        self.life = 0
        self.office: Handover | None = None
        self.last_present_s = 0.0
        self.sessions: dict[str, int] = {}  # node -> which one of its sessions
        self.lease_until_s = -math.inf
        self.machine: StandIn | None = None
        self.inbox: list[Callable[[], None]] = []
        self.session_number = 0


class World:
    """A cluster in which everything takes a few milliseconds, and gossip ``lag_s``."""

    def __init__(self, seed: int, nodes: int, lag_s: float = 3.0) -> None:
        self.now_s = 1000.0
        self.rng = Random(seed)
        self.lag_s = lag_s
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        self.history: list[tuple[float, dict[str, bool]]] = []
        self.tracker = Process(TRACKER)
        self.tracker.office = Handover(self.now_s, None, 0.0)
        self.names = [f"node{number}:7381" for number in range(nodes)]
        self.processes = {name: Process(name) for name in self.names}
        self.cut: set[tuple[str, str]] = set()
        for process in self.processes.values():
            self._begin_daemon(process)
        self._look()
        self._grant()

    # --- time -----------------------------------------------------------------------------------

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now_s + delay_s, self.count, action))

    def run(self, duration_s: float) -> None:
        end_s = self.now_s + duration_s
        while self.heap[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self.heap)
            action()
        self.now_s = end_s

    def _look(self) -> None:
        """What gossip will tell of this moment."""
        state = {
            name: bool(each.machine and each.machine.standing_in)
            for name, each in self.processes.items()
            if each.alive and not each.stopped
        }
        self.history.append((self.now_s, state))
        self.after(0.25, self._look)

    def members(self) -> list[Candidate]:
        known: dict[str, bool] = {}
        for at_s, state in reversed(self.history):
            known = state
            if at_s <= self.now_s - self.lag_s:
                break
        return [Candidate(node, standing) for node, standing in known.items()]

    # --- whoever is a tracker for others --------------------------------------------------------

    def _grant(self) -> None:
        """Everybody who may grant does, and renews what it has granted."""
        for process in [self.tracker, *self.processes.values()]:
            office = process.office
            if office is None or not process.alive or process.stopped:
                continue
            office.at(self.now_s)
            if office.present(self.now_s):
                process.last_present_s = self.now_s
            if not process.sessions:
                continue
            if not office.holding:
                office.granted()
                self._no_other_lease(process)
            if not office.holding or self.now_s < process.lease_until_s:
                process.lease_until_s = self.now_s + LEASE_S
        self.after(GRANT_EVERY_S, self._grant)

    def _no_other_lease(self, granter: Process) -> None:
        for other in [self.tracker, *self.processes.values()]:
            assert other is granter or other.lease_until_s <= self.now_s, (
                f"{granter.name} grants at {self.now_s - 1000:.2f} s, "
                f"while leases of {other.name} are out"
            )

    # --- faults ---------------------------------------------------------------------------------

    def kill(self, process: Process, *, power: bool = False) -> None:
        process.alive = process.stopped = False
        process.powered = not power
        process.life += 1
        process.machine = None
        users, process.sessions = process.sessions, {}
        if process is not self.tracker:
            process.office = None
        for name in sorted(users):
            delay_s = self.rng.uniform(*SILENCE_S) if power else LATENCY_S
            self._session_ends_after(delay_s, self.processes[name], process)
        for other in [self.tracker, *self.processes.values()]:
            known = other.sessions.pop(process.name, None) is not None
            if known and other.office is not None:
                other.office.lost(process.name, self.now_s, len(other.sessions))

    def start(self, process: Process) -> None:
        if process.alive:
            return
        process.alive = process.powered = True
        if process is self.tracker:
            away_s = self.now_s - process.last_present_s
            process.office = Handover(self.now_s, away_s, 0.0)
        else:
            self._begin_daemon(process)

    def stop(self, process: Process) -> None:
        if not process.alive or process.stopped:
            return
        process.stopped = True
        process.stopped_s = self.now_s
        for name in sorted(process.sessions):
            delay_s = self.rng.uniform(*SILENCE_S)
            self._session_ends_after(delay_s, self.processes[name], process, if_stopped=True)

    def go_on(self, process: Process) -> None:
        if not process.stopped:
            return
        process.stopped = False
        inbox, process.inbox = process.inbox, []
        for action in inbox:
            action()

    def _session_ends_after(
        self, delay_s: float, user: Process, server: Process, *, if_stopped: bool = False
    ) -> None:
        life, number = user.life, user.session_number
        stopped_s = server.stopped_s

        def end() -> None:
            if if_stopped and (not server.stopped or server.stopped_s != stopped_s):
                return
            if user.life != life or user.session_number != number:
                return
            gone = TrackerGone() if server is self.tracker else StandInGone(server.name)
            self._end_session(server, user)
            self.tell(user, gone)

        self.after(delay_s, end)

    def _end_session(self, server: Process, user: Process) -> None:
        number = user.session_number

        def notice() -> None:
            if server.sessions.get(user.name) == number and server.office is not None:
                del server.sessions[user.name]
                server.office.at(self.now_s)
                server.office.lost(user.name, self.now_s, len(server.sessions))

        self._when_running(server, notice)

    def _when_running(self, process: Process, action: Callable[[], None]) -> None:
        if process.stopped:
            process.inbox.append(action)
        elif process.alive:
            action()

    # --- daemons --------------------------------------------------------------------------------

    def _begin_daemon(self, process: Process) -> None:
        process.office = None
        process.machine = StandIn(
            process.name, "label", self.members, Random(self.rng.random()), self.now_s
        )
        self._arm(process)

    def tell(self, process: Process, event: StandInEvent) -> None:
        life = process.life

        def handle() -> None:
            if process.life != life or process.machine is None:
                return
            effects = process.machine.handle(event, self.now_s)
            process.machine.check()
            for effect in effects:
                self._carry_out(process, effect)
            self._arm(process)

        self._when_running(process, handle)

    def _arm(self, process: Process) -> None:
        assert process.machine is not None
        at_s = process.machine.wake_at_s()
        if at_s is None:
            return
        life = process.life

        def wake() -> None:
            if process.life != life or process.machine is None:
                return
            due_s = process.machine.wake_at_s()
            if due_s is not None and due_s <= self.now_s:
                self.tell(process, TimePassed())

        self.after(max(at_s - self.now_s, 0.0) + 1e-6, lambda: self._when_running(process, wake))

    def _carry_out(self, process: Process, effect: StandInEffect) -> None:
        match effect:
            case TryTracker():
                self._try_tracker(process)
            case AskNode():
                self._ask(process, self.processes[effect.node])
            case UseTracker():
                self._use(process, self.tracker)
            case UseStandIn():
                self._use(process, self.processes[effect.node])
            case LetGo():
                pass
            case LeaveStandIn():
                self._end_session(self.processes[effect.node], process)
                process.session_number += 1
            case BeginStandingIn():
                process.office = Handover(self.now_s, None, effect.grants_from_s)
            case EndStandingIn():
                process.office = None
                users, process.sessions = process.sessions, {}
                for name in sorted(users):
                    self._session_ends_after(LATENCY_S, self.processes[name], process)

    def _use(self, process: Process, server: Process) -> None:
        process.session_number += 1
        if server.office is None or not server.alive:
            gone = TrackerGone() if server is self.tracker else StandInGone(server.name)
            self.after(LATENCY_S, partial(self.tell, process, gone))
            return
        server.sessions[process.name] = process.session_number
        server.office.at(self.now_s)
        server.office.registered(process.name, False, self.now_s)

    def _try_tracker(self, process: Process) -> None:
        tracker, life = self.tracker, process.life
        began_s = self.now_s

        def look() -> None:
            if process.life != life:
                return
            if (process.name, TRACKER) in self.cut or not tracker.powered:
                self.after(CONNECT_S, partial(self.tell, process, TrackerUnreachable()))
            elif not tracker.alive:
                self.tell(process, TrackerUnreachable())
            elif not tracker.stopped:
                self.tell(process, TrackerReached())
            elif self.now_s >= began_s + HANDSHAKE_S:
                self.tell(process, TrackerHangs())
            else:
                self.after(0.05, look)

        self.after(LATENCY_S, look)

    def _ask(self, process: Process, other: Process) -> None:
        life, began_s = process.life, self.now_s

        def look() -> None:
            if process.life != life:
                return
            cut = (process.name, other.name) in self.cut
            if (not other.alive and other.powered) or self.now_s >= began_s + CONNECT_S:
                self.tell(process, NodeSilent(other.name))
            elif cut or other.stopped or other.machine is None:
                self.after(0.05, look)
            else:
                answer = other.machine.answer(process.name, self.now_s)
                self.tell(process, NodeTold(other.name, answer))

        self.after(LATENCY_S, look)

    # --- seen from outside ----------------------------------------------------------------------

    def first(self) -> Process:
        """The node that is first on the list, of those that run."""
        running = [name for name in self.names if self.processes[name].alive]
        return self.processes[min(running, key=lambda name: order_of("label", name))]

    def standing_in(self) -> list[str]:
        return [
            name
            for name, each in self.processes.items()
            if each.machine is not None and each.machine.standing_in
        ]

    def with_whom(self) -> set[str | None]:
        return {
            TRACKER if each.machine.with_tracker else each.machine.session
            for each in self.processes.values()
            if each.machine is not None
        }


def settled(world: World, where: str | None) -> bool:
    return world.with_whom() == {where}


def test_without_the_tracker_the_first_of_the_list_stands_in_within_seconds() -> None:
    world = World(1, nodes=6)
    world.run(10.0)
    assert settled(world, TRACKER)

    world.kill(world.tracker)
    world.run(4.0)

    assert world.standing_in() == [world.first().name]
    assert settled(world, world.first().name)
    world.run(1.5)
    assert world.first().lease_until_s > world.now_s


def test_when_the_tracker_is_back_everybody_goes_back_to_it() -> None:
    world = World(2, nodes=6)
    world.run(10.0)
    world.kill(world.tracker)
    world.run(30.0)

    world.start(world.tracker)
    world.run(2.0)

    assert settled(world, TRACKER)
    assert not world.standing_in()


def test_a_tracker_that_is_started_anew_at_once_is_not_stood_in_for() -> None:
    world = World(3, nodes=6)
    world.run(10.0)

    world.kill(world.tracker)
    world.run(0.8)
    world.start(world.tracker)
    world.run(1.0)

    assert settled(world, TRACKER)
    assert world.tracker.lease_until_s > world.now_s


def test_a_newcomer_that_is_first_on_the_list_joins_who_stands_in() -> None:
    world = World(4, nodes=6, lag_s=1e9)  # gossip tells what was so in the beginning
    newcomer = world.first()
    world.kill(newcomer)
    world.run(10.0)
    world.kill(world.tracker)
    world.run(10.0)
    (standing,) = world.standing_in()

    world.start(newcomer)
    world.run(NEWCOMER_S + 30.0)

    assert world.standing_in() == [standing]
    assert settled(world, standing)


def test_a_node_that_alone_is_cut_off_from_the_tracker_does_not_stand_in() -> None:
    world = World(5, nodes=6)
    world.run(10.0)
    lonely = world.first()
    world.cut.add((lonely.name, TRACKER))
    del world.tracker.sessions[lonely.name]
    world.tell(lonely, TrackerGone())

    world.run(60.0)

    assert not world.standing_in()


def test_a_node_that_knows_nobody_else_does_not_stand_in() -> None:
    world = World(6, nodes=1)
    world.run(10.0)
    world.kill(world.tracker)

    world.run(60.0)

    assert settled(world, None)


def test_who_asks_is_told_who_stands_in() -> None:
    world = World(7, nodes=4)
    world.run(10.0)
    world.kill(world.tracker)
    world.run(10.0)
    (standing,) = world.standing_in()

    answers = {
        name: each.machine.answer("somebody", world.now_s)
        for name, each in world.processes.items()
        if each.machine is not None
    }

    assert {answer.by for answer in answers.values()} == {standing}
    assert not any(answer.tracker for answer in answers.values())


def test_a_busy_tracker_that_has_just_begun_is_not_stood_in_for() -> None:
    machine = StandIn("a", "label", lambda: [Candidate("b")], Random(1), 0.0)
    machine.handle(TrackerReached(), 100.0)
    machine.handle(TrackerGone(), 200.0)
    machine.handle(TimePassed(), 200.2)
    machine.handle(TrackerUnreachable(), 200.2)
    machine.handle(TimePassed(), 201.6)
    machine.handle(TrackerUnreachable(), 201.7)
    assert machine.answer("c", 202.0).able
    assert TryTracker() in machine.handle(TimePassed(), 203.0)
    assert machine.answer("c", 203.0 + CONNECT_S).able
    assert not machine.answer("c", 203.0 + BUSY_S).able

    machine.handle(TrackerHangs(), 208.0)
    machine.handle(TimePassed(), 210.0)
    assert machine.answer("c", 214.0).able, "it hangs every time"


def standing_in_second() -> tuple[StandIn, str, str]:
    """A node that stands in since it could not reach the one before it; and both others."""
    first, second, third = sorted("abc", key=lambda name: order_of("label", name))
    machine = StandIn(second, "label", lambda: [Candidate(first), Candidate(third)], Random(1), 0.0)
    machine.handle(TrackerReached(), 100.0)
    machine.handle(TrackerGone(), 200.0)
    machine.handle(TimePassed(), 200.2)
    machine.handle(TrackerUnreachable(), 200.2)
    assert AskNode(first) in machine.handle(TimePassed(), 202.0)
    assert AskNode(third) in machine.handle(NodeSilent(first), 202.0)
    assert BeginStandingIn(205.0 + WATCH_S) in machine.handle(NodeTold(third, StandsIn()), 202.0)
    machine.handle(TrackerUnreachable(), 202.0)
    machine.handle(NodeTold(second, StandsIn(by=second)), 202.0)
    machine.handle(TimePassed(), 204.0)
    machine.handle(TrackerUnreachable(), 204.0)
    return machine, first, third


def test_two_that_stand_in_agree_on_the_one_that_comes_first() -> None:
    machine, first, _ = standing_in_second()

    done = machine.handle(NodeTold(first, StandsIn(by=first)), 204.1)

    assert [type(effect) for effect in done] == [LeaveStandIn, EndStandingIn, UseStandIn]
    machine.check()


def test_who_stands_in_and_hears_of_another_that_does_waits_for_what_that_one_says() -> None:
    """Both are asked together, and either may answer first."""
    machine, first, third = standing_in_second()
    assert machine.handle(NodeTold(third, StandsIn(by=first)), 204.1) == []

    done = machine.handle(NodeTold(first, StandsIn(by=first)), 204.1)

    assert [type(effect) for effect in done] == [LeaveStandIn, EndStandingIn, UseStandIn]
    machine.check()


def test_who_stands_in_and_hears_of_the_tracker_ends() -> None:
    machine, first, _ = standing_in_second()

    done = machine.handle(NodeTold(first, StandsIn(tracker=True)), 204.1)

    assert [type(effect) for effect in done] == [LeaveStandIn, EndStandingIn]
    machine.check()


def test_who_stands_in_and_is_answered_by_nobody_ends() -> None:
    machine, first, third = standing_in_second()
    assert machine.handle(NodeSilent(first), 205.5) == []

    done = machine.handle(NodeSilent(third), 205.5)

    assert [type(effect) for effect in done] == [LeaveStandIn, EndStandingIn]
    machine.check()


@pytest.mark.parametrize("seed", range(20))
def test_who_stands_in_and_is_cut_off_is_through_before_its_successor_begins(seed: int) -> None:
    """Found in simulation: it asked one after the other, and granted itself what was there."""
    world = World(seed, nodes=6)
    world.run(20.0)
    world.kill(world.tracker)
    world.run(4.0 + 4.0 * Random(seed).random())
    (alone,) = world.standing_in()
    for other in world.names:
        world.cut |= {(alone, other), (other, alone)} if other != alone else set()

    world.run(WATCH_S + CONNECT_S + 0.5)
    assert alone not in world.standing_in()
    world.run(20.0)  # that nobody grants while leases of others are out is asserted in there
    assert len(world.standing_in()) == 1


def trouble(world: World) -> None:
    """Something goes wrong, and is well again some seconds later."""
    rng = world.rng
    everybody = [world.tracker, *world.processes.values()]
    # Mostly those on whom much depends.
    favourites = [world.tracker, *(world.processes[name] for name in world.standing_in())]
    process = rng.choice(favourites if rng.random() < 0.6 else everybody)
    duration_s = rng.choice((rng.uniform(0.0, 3.0), rng.uniform(3.0, 12.0), rng.uniform(10, 40)))
    if rng.random() < 0.5:
        world.stop(process)
        world.after(duration_s, partial(world.go_on, process))
    elif process.alive:
        world.kill(process, power=rng.random() < 0.3)
        world.after(duration_s, partial(world.start, process))


def run(seed: int) -> None:
    rng = Random(f"world {seed}")
    world = World(seed, nodes=rng.randint(2, 9), lag_s=rng.choice((0.5, 3.0, 8.0)))
    world.run(rng.uniform(2.0, 20.0))
    for _ in range(rng.randint(1, 8)):
        trouble(world)
        world.run(rng.choice((0.3, 3.0, 15.0)))
    world.run(60.0)
    for process in [world.tracker, *world.processes.values()]:
        world.go_on(process)
        world.start(process)
    world.run(20.0)
    assert settled(world, TRACKER), f"nodes are with {world.with_whom()}"
    world.kill(world.tracker, power=rng.random() < 0.5)
    world.run(40.0)
    (standing,) = world.standing_in()
    assert settled(world, standing), f"nodes are with {world.with_whom()}"


@pytest.mark.parametrize("seed", range(8))
def test_nobody_grants_while_leases_of_another_are_out_whatever_breaks(seed: int) -> None:
    run(seed)


def test_the_tracker_is_woken_often_enough_to_notice_that_it_stood_still() -> None:
    assert PRESENT_S > GRANT_EVERY_S, "in this world it is, or the model would be of no use"
