"""Files that are written take turns with ranges that are read, at the same slots.

First whole clusters in virtual time, with faults: what must never happen is asserted while they run
(see ``machines.py``). Then the two machines by themselves.
"""

from __future__ import annotations

from functools import partial
from random import Random

import pytest

from swarmcache.handover import LEASE_S
from swarmcache.messages import (
    EndWrite,
    Heartbeat,
    HeldWrite,
    Lease,
    Message,
    NodeAddress,
    Register,
    Registered,
    Renewed,
    ToTracker,
    WantWrite,
    WriteLease,
)
from swarmcache.peer_events import (
    AnswerNoSlot,
    AnswerSlot,
    PeerEffect,
    PeerEvent,
    RequestGone,
    TellTracker,
    TimePassed,
    TrackerConnected,
    TrackerLost,
    TrackerSaid,
    WriterAnswered,
    WriteWanted,
)
from swarmcache.peer_state import PeerState
from swarmcache.peer_writes import PIECE_S
from swarmcache.tracker_events import (
    JournalEnd,
    JournalGrant,
    NodeConnected,
    NodeLost,
    NodeSaid,
    Tell,
)
from swarmcache.tracker_events import TimePassed as TrackerTimePassed
from swarmcache.tracker_state import LEASE_MARGIN_S, TrackerState
from swarmcache.tracker_writes import TURN_S
from tests.machines import MIB, Cluster, version_of
from tests.test_machines import ROUGH, Trouble

SEEDS_PER_TEST = 60
SERVER = "nfs01:/export"
STALL_S = 5.0


# --- whole clusters ------------------------------------------------------------------------------


def run(seed: int) -> Cluster:
    """One cluster in which files are read and written until everybody who survives is done."""
    rng = Random(f"mixed {seed}")
    count = rng.randint(2, 5)
    cluster = Cluster(
        seed,
        nodes=count,
        slots_max=rng.randint(1, 3),
        faults=ROUGH if rng.random() < 0.5 else None,
        piece_max_s=rng.choice((0.05, 0.4)),
    )
    corpus = version_of(f"corpus{seed}", rng.randint(1, 12) * MIB)

    def want(index: int) -> None:
        if not cluster.has(index, corpus):
            cluster.want(index, corpus, user=rng.choice(("ada", "bob")))

    def write() -> None:
        pieces = rng.choice((1, 3, 20, 60))
        writer = cluster.write(rng.randrange(count), pieces, user=rng.choice(("ada", "eve")))
        if rng.random() < 0.2:
            cluster.after(rng.random() * 8, partial(cluster.kill_writer, writer))
        if rng.random() < 0.2:
            pause_s = rng.random() * 8
            cluster.after(rng.random() * 4, partial(cluster.pause_writer, writer, pause_s))

    for index in range(count):
        cluster.after(rng.random() * 3, partial(want, index))
    for _ in range(rng.randint(1, 10)):
        cluster.after(rng.random() * 5, write)
    Trouble(cluster, rng, want).plan(rng.randint(0, 4))
    cluster.run_for(13)
    cluster.run(lambda: cluster.everybody_has(corpus), 400)
    alive = [writer for writer in cluster.writers if writer.node.alive]
    cluster.run(lambda: all(writer.done for writer in alive), 400)
    return cluster


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, 4 * SEEDS_PER_TEST, SEEDS_PER_TEST))
def test_slots_are_never_exceeded_and_nobody_waits_for_ever_whatever_breaks(
    first_seed: int,
) -> None:
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("seed", range(5))
def test_many_files_and_a_corpus_take_turns_without_a_slot_lost(seed: int) -> None:
    cluster = Cluster(seed, nodes=4, slots_max=3)
    corpus = version_of("corpus", 6 * MIB)
    for number in range(40):
        cluster.write(number % 4, 4, user=f"user{number % 3}")
    for index in range(4):
        cluster.want(index, corpus)

    cluster.run(lambda: all(writer.done for writer in cluster.writers), 60)
    cluster.run(lambda: cluster.everybody_has(corpus), 60)

    assert cluster.readers_peak == 3
    assert cluster.unlimited == 0
    assert cluster.originals == 0


def test_who_writes_for_hours_lets_others_have_their_turn() -> None:
    cluster = Cluster(1, nodes=2, slots_max=1)
    corpus = version_of("corpus", 3 * MIB)
    endless = cluster.write(0, 1_000_000, user="eve")
    cluster.run_for(5)
    short = cluster.write(1, 3, user="bob")
    cluster.want(1, corpus, user="eve")

    cluster.run(lambda: short.done and cluster.has(1, corpus), 120)

    assert cluster.unlimited == 0
    left = endless.pieces
    cluster.run_for(30)
    assert endless.pieces < left, "and then it goes on"


def test_a_writer_that_is_stopped_loses_its_slot_and_gets_another_when_it_wakes() -> None:
    cluster = Cluster(2, nodes=2, slots_max=1)
    stopped = cluster.write(0, 100)
    cluster.run(lambda: stopped.pieces < 90, 30)

    cluster.pause_writer(stopped, 60.0)
    other = cluster.write(1, 10)

    cluster.run(lambda: other.done, 10)
    cluster.run(lambda: stopped.done, 120)
    assert cluster.unlimited == 0


def test_without_a_tracker_files_are_written_all_the_same() -> None:
    cluster = Cluster(3, nodes=2, slots_max=1)
    begun = cluster.write(0, 200)
    cluster.run(lambda: begun.pieces < 190, 30)
    waiting = cluster.write(1, 5)
    cluster.run_for(1)

    cluster.kill_tracker()

    cluster.run(lambda: begun.done and waiting.done, 60)
    assert cluster.unlimited == 2


# --- the node's machine --------------------------------------------------------------------------


class Desk:
    """A node's machine, its clock, and what it says to clients and tracker."""

    def __init__(self, *, connected: bool = True) -> None:
        self.state = PeerState(NodeAddress("m:1", 2), Random(1), stall_s=STALL_S)
        self.now_s = 100.0
        if connected:
            self.tell(TrackerConnected())
            self.said(Registered(LEASE_S, self.now_s))

    def tell(self, event: PeerEvent) -> list[PeerEffect | ToTracker]:
        """Give it an event; returns effects, and for what it tells the tracker the messages."""
        effects = self.state.handle(event, self.now_s)
        self.state.check()
        return [each.message if isinstance(each, TellTracker) else each for each in effects]

    def said(
        self, message: Registered | Renewed | WriteLease | Lease
    ) -> list[PeerEffect | ToTracker]:
        """The tracker says something."""
        return self.tell(TrackerSaid(message))

    def wait(self, duration_s: float) -> list[PeerEffect | ToTracker]:
        """Let time pass, as its timers want; heartbeats are of no interest here."""
        end_s = self.now_s + duration_s
        done: list[PeerEffect | ToTracker] = []
        while (at_s := self.state.wake_at_s()) is not None and at_s <= end_s:
            self.now_s = max(self.now_s, at_s)
            done += self.tell(TimePassed())
        self.now_s = end_s
        kinds = (AnswerSlot, AnswerNoSlot, WantWrite, EndWrite)
        return [each for each in done if isinstance(each, kinds)]

    def want(self, request: int = 1, user: str = "ada") -> bytes:
        """A client wants to write; returns the id that the machine has chosen."""
        (wanted,) = self.tell(WriteWanted(request, SERVER, user))
        assert isinstance(wanted, WantWrite)
        assert (wanted.file_server, wanted.user) == (SERVER, user)
        return wanted.write_id

    def begin(self, request: int = 1) -> bytes:
        """A client writes, and has answered all it was told."""
        write_id = self.want(request)
        until_s = self.now_s + 2.5
        assert self.said(WriteLease(7, write_id, until_s)) == [AnswerSlot(request, until_s)]
        self.tell(WriterAnswered(request))
        return write_id


def test_a_promise_is_renewed_with_the_lease_and_only_to_a_client_that_answers() -> None:
    desk = Desk()
    desk.begin()

    desk.now_s += 1.0
    assert AnswerSlot(1, 103.5) in desk.said(Renewed(103.5))
    desk.now_s += 1.0
    assert desk.said(Renewed(104.5)) == []
    desk.tell(WriterAnswered(1))
    assert AnswerSlot(1, 104.6) in desk.said(Renewed(104.6))


def test_a_promise_is_never_taken_back() -> None:
    desk = Desk()
    desk.begin()

    assert AnswerSlot(1, 102.5) in desk.said(Renewed(102.1))


def test_the_slot_of_a_client_that_does_not_answer_is_given_back_when_it_must_have_stopped() -> (
    None
):
    desk = Desk()
    write_id = desk.begin()
    desk.said(Renewed(102.6))

    assert desk.wait(2.6 + PIECE_S - 0.01) == []
    assert desk.wait(0.02) == [EndWrite(write_id)]
    assert desk.wait(1.0) == []  # a client that is stopped wants nothing
    assert WantWrite(write_id, SERVER, "ada") in desk.tell(WriterAnswered(1))


def test_a_lease_that_was_renewed_too_late_is_given_back_and_wanted_anew() -> None:
    desk = Desk()
    write_id = desk.begin()

    desk.now_s = 102.6  # the tracker may have taken the node for lost
    assert desk.said(Renewed(105.0)) == []

    assert desk.wait(PIECE_S) == [EndWrite(write_id), WantWrite(write_id, SERVER, "ada")]


def test_a_turn_that_is_over_ends_with_the_promise() -> None:
    desk = Desk()
    write_id = desk.begin()

    assert desk.said(Renewed(103.0, turns_over=[write_id])) == []

    assert desk.wait(2.5 + PIECE_S) == [EndWrite(write_id), WantWrite(write_id, SERVER, "ada")]


def test_who_is_gone_needs_no_slot() -> None:
    desk = Desk()
    first = desk.begin(1)
    second = desk.want(2)

    assert desk.tell(RequestGone(2)) == [EndWrite(second)]
    assert desk.tell(RequestGone(1)) == [EndWrite(first)]
    assert desk.tell(WriterAnswered(1)) == []
    assert desk.said(WriteLease(8, second, 110.0)) == []


def test_to_wait_for_a_slot_that_others_use_takes_as_long_as_it_takes() -> None:
    desk = Desk()
    desk.want()

    for _ in range(100):
        desk.tell(WriterAnswered(1))
        desk.wait(1.0)
        assert AnswerSlot(1, None) in desk.said(Renewed(desk.now_s + 2.5))


def test_a_tracker_that_says_nothing_is_waited_for_no_longer_than_for_get() -> None:
    desk = Desk()
    write_id = desk.want()

    assert desk.wait(STALL_S - 0.01) == []
    reason = "the tracker has said nothing for 5 s"
    assert desk.wait(0.02) == [AnswerNoSlot(1, reason), EndWrite(write_id)]


def test_a_tracker_that_goes_away_in_the_middle_is_waited_for_no_longer_than_for_get() -> None:
    desk = Desk()
    desk.begin()
    desk.now_s += 1.0
    desk.tell(TrackerLost("it hung up"))

    desk.wait(STALL_S - 0.01)
    assert desk.wait(0.02) == [AnswerNoSlot(1, "it hung up")]


def test_where_the_tracker_has_been_away_for_long_nobody_waits() -> None:
    desk = Desk(connected=False)
    desk.tell(TrackerLost("connection refused"))
    desk.now_s += STALL_S

    answers = desk.tell(WriteWanted(1, SERVER, "ada"))

    assert answers == [AnswerNoSlot(1, "connection refused")]


def test_a_lease_outlives_a_connection_and_a_claim_is_made_anew() -> None:
    desk = Desk()
    held, waiting = desk.begin(1), desk.want(2)
    desk.tell(WriterAnswered(2))
    desk.tell(TrackerLost("it hung up"))

    said = desk.tell(TrackerConnected())

    (register,) = [each for each in said if isinstance(each, Register)]
    assert register.writes == [HeldWrite(7, held, SERVER, "ada")]
    assert [each for each in said if isinstance(each, WantWrite)] == [
        WantWrite(waiting, SERVER, "ada")
    ]
    assert AnswerSlot(1, 104.0) in desk.said(Registered(LEASE_S, 104.0, adopted=[7]))


def test_a_lease_that_the_tracker_does_not_adopt_is_wanted_anew_after_the_last_piece() -> None:
    desk = Desk()
    write_id = desk.begin()
    desk.tell(TrackerLost("it hung up"))
    desk.tell(TrackerConnected())
    desk.said(Registered(LEASE_S, 104.0))
    desk.tell(WriterAnswered(1))

    assert desk.wait(2.5 + PIECE_S - 0.01) == []
    assert desk.wait(0.02) == [WantWrite(write_id, SERVER, "ada")]


# --- the tracker's machine -----------------------------------------------------------------------


class Office:
    """A tracker's machine and the nodes that are connected to it."""

    def __init__(self, slots_max: int = 1, earlier: dict[int, str] | None = None) -> None:
        self.now_s = 1000.0
        self.state = TrackerState(
            Random(1),
            slots_max=lambda _: slots_max,
            earlier_leases=earlier,
            first_lease_id=100,
            now_s=self.now_s,
        )
        self.journal: dict[int, str] = dict(earlier or {})
        self.leases: dict[bytes, int] = {}  # lease ids by write id, as the nodes were told

    def tell(self, event: NodeConnected | NodeLost | NodeSaid | TrackerTimePassed) -> list[Message]:
        """Give it an event; returns what it tells the nodes."""
        told: list[Message] = []
        for effect in self.state.handle(event, self.now_s):
            match effect:
                case Tell():
                    told.append(effect.message)
                    if isinstance(effect.message, WriteLease):
                        lease_id = effect.message.lease_id
                        assert lease_id in self.journal, "told before it was journalled"
                        self.leases[effect.message.write_id] = lease_id
                case JournalGrant():
                    self.journal[effect.lease_id] = effect.node
                case JournalEnd():
                    del self.journal[effect.lease_id]
        self.state.check()
        return told

    def connect(self, session: int, name: str, writes: list[HeldWrite] | None = None) -> Message:
        """A node registers; returns what it is told first."""
        self.tell(NodeConnected(session))
        address = NodeAddress(name, 1)
        told = self.tell(NodeSaid(session, Register(address, self.now_s, writes=writes or [])))
        return told[0]

    def want(self, session: int, number: int, user: str = "ada") -> bytes:
        write_id = number.to_bytes(16, "big")
        self.tell(NodeSaid(session, WantWrite(write_id, SERVER, user)))
        return write_id

    def end(self, session: int, write_id: bytes) -> None:
        self.leases.pop(write_id, None)
        self.tell(NodeSaid(session, EndWrite(write_id)))

    def wait(self, duration_s: float) -> None:
        end_s = self.now_s + duration_s
        while (at_s := self.state.wake_at_s()) is not None and at_s <= end_s:
            self.now_s = max(self.now_s, at_s)
            self.tell(TrackerTimePassed())
        self.now_s = end_s


def test_each_file_takes_a_slot_and_users_take_turns() -> None:
    office = Office(slots_max=2)
    office.connect(1, "a:1")
    files = [office.want(1, number) for number in range(4)]
    other = office.want(1, 9, user="bob")

    assert list(office.leases) == files[:2]
    office.end(1, files[3])  # which only waits
    office.end(1, files[0])
    assert list(office.leases) == [files[1], files[2]]
    office.want(1, 4)
    office.end(1, files[1])
    assert list(office.leases) == [files[2], other]


def test_the_slot_of_a_lost_node_is_free_after_its_lease() -> None:
    office = Office()
    office.connect(1, "a:1")
    office.connect(2, "b:1")
    office.want(1, 1)
    waiting = office.want(2, 2)

    office.tell(NodeLost(1))

    office.wait(LEASE_S - 0.01)
    assert waiting not in office.leases
    office.wait(0.02)
    assert waiting in office.leases
    assert list(office.journal.values()) == ["b:1"]


def test_the_promise_ends_before_the_lease() -> None:
    office = Office()
    office.connect(1, "a:1")
    told = office.tell(NodeSaid(1, WantWrite(b"w" * 16, SERVER, "ada")))

    (lease,) = told
    assert isinstance(lease, WriteLease)
    assert lease.until_s == office.now_s + LEASE_S - LEASE_MARGIN_S
    assert PIECE_S <= LEASE_MARGIN_S


def test_a_restarted_tracker_adopts_what_is_written_and_grants_nothing_else_before() -> None:
    office = Office(slots_max=1, earlier={7: "a:1"})
    office.connect(2, "b:1")
    waiting = office.want(2, 2)
    assert office.leases == {}

    held = HeldWrite(7, b"w" * 16, SERVER, "ada")
    registered = office.connect(1, "a:1", [held])

    assert isinstance(registered, Registered)
    assert registered.adopted == [7]
    assert office.leases == {}
    office.tell(NodeSaid(1, EndWrite(held.write_id)))
    assert waiting in office.leases


def test_a_lease_that_is_nowhere_written_down_is_not_adopted() -> None:
    office = Office()
    registered = office.connect(1, "a:1", [HeldWrite(7, b"w" * 16, SERVER, "ada")])

    assert isinstance(registered, Registered)
    assert registered.adopted == []


def test_one_node_cannot_end_what_another_writes() -> None:
    office = Office()
    office.connect(1, "a:1")
    office.connect(2, "b:1")
    write_id = office.want(1, 1)

    office.tell(NodeSaid(2, EndWrite(write_id)))
    office.want(2, 1)

    assert list(office.journal.values()) == ["a:1"]


@pytest.mark.parametrize(("waiting_user", "over"), [("ada", False), ("bob", True), (None, False)])
def test_a_turn_is_over_when_other_users_wait(waiting_user: str | None, over: bool) -> None:
    office = Office()
    office.connect(1, "a:1")
    write_id = office.want(1, 1)
    if waiting_user is not None:
        office.want(1, 2, user=waiting_user)

    def beat() -> list[bytes]:
        (renewed,) = office.tell(NodeSaid(1, Heartbeat(office.now_s)))
        assert isinstance(renewed, Renewed)
        return renewed.turns_over

    for _ in range(int(TURN_S) - 1):
        office.wait(1.0)
        assert beat() == []
    office.wait(1.0)
    assert beat() == ([write_id] if over else [])
