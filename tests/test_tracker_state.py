"""Who holds what, and who may read what until when: the tracker's machine without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcache import messages
from swarmcache.chunks import mask_from_bytes, mask_to_bytes, range_mask
from swarmcache.handover import LEASE_S
from swarmcache.messages import (
    LOCATE_MAX,
    LOCATED_NODES_MAX,
    SEEDS_MAX,
    BatchHolder,
    Heartbeat,
    HeldBy,
    HeldLease,
    Holders,
    Holding,
    Join,
    Joined,
    Lease,
    Leave,
    Locate,
    Located,
    Message,
    Missing,
    NodeAddress,
    Peers,
    Query,
    RangeFailed,
    RangeRead,
    Refused,
    Register,
    Registered,
    Renewed,
    Replicas,
    ReportCorrupt,
    Revoked,
    Status,
    StatusRequest,
    Suspected,
    ToTracker,
    WhoHas,
)
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    JournalPresent,
    NodeConnected,
    NodeLost,
    NodeSaid,
    ReportStatistics,
    Tell,
    TimePassed,
    TrackerEffect,
)
from swarmcache.tracker_nodes import NODE_SILENT_S
from swarmcache.tracker_state import (
    CHUNK_COUNT_MAX,
    LEASE_MARGIN_S,
    READ_AGAIN_S,
    READ_FAILURES_MAX,
    TrackerState,
)
from swarmcache.tracker_swarms import QUERY_S

MIB = 1 << 20
FILE = b"f" * 32
OTHER = b"o" * 32
SERVER = "nfs01:/export"
WALL_OFFSET_S = 1_800_000_000.0
Kind = TypeVar("Kind")


class Bench:
    """A tracker, its nodes by number, and all that it has told them."""

    def __init__(
        self,
        *,
        slots_max: int = 2,
        peers_max: int = 40,
        earlier: dict[int, str] | None = None,
        seed: int = 1,
        statistics_interval_s: float | None = None,
    ) -> None:
        self._now_s = 1000.0
        self.state = TrackerState(
            Random(seed),
            slots_max=lambda _: slots_max,
            peers_max=peers_max,
            earlier_leases=earlier,
            first_lease_id=100,
            statistics_interval_s=statistics_interval_s,
            wall_offset_s=WALL_OFFSET_S,
            now_s=self.now_s,
        )
        self.sessions: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.offsets_s: dict[str, float] = {}
        self.told: list[tuple[str, Message]] = []
        self.journal: dict[int, str] = {}
        self.closed: list[int] = []
        self.reports: list[dict[str, Any]] = []
        self.present_s = 0.0

    @property
    def now_s(self) -> float:
        """Setting it lets time pass: the tracker is woken whenever it wants."""
        return self._now_s

    @now_s.setter
    def now_s(self, at_s: float) -> None:
        while (wake_at_s := self.state.wake_at_s()) is not None and wake_at_s <= at_s:
            assert wake_at_s > self._now_s - 1e-9
            self._now_s = max(wake_at_s, self._now_s)
            self.handle(TimePassed())
            after_s = self.state.wake_at_s()
            assert after_s is None or after_s > self._now_s, "it wakes again and again"
        self._now_s = at_s

    def handle(
        self, event: NodeConnected | NodeSaid | NodeLost | TimePassed
    ) -> list[TrackerEffect]:
        effects = self.state.handle(event, self.now_s)
        self.state.check()
        for effect in effects:
            match effect:
                case Tell():
                    self.told.append((self.names[effect.session], effect.message))
                case JournalGrant():
                    self.journal[effect.lease_id] = effect.node
                case JournalEnd():
                    self.journal.pop(effect.lease_id, None)
                case CloseSession():
                    self.closed.append(effect.session)
                case ReportStatistics():
                    self.reports.append(effect.report)
                case JournalPresent():
                    self.present_s = self.now_s
        return effects

    def connect(
        self,
        *names: str,
        leases: Iterable[HeldLease] = (),
        offset_s: float = 0.0,
        rack: str = "",
    ) -> None:
        """Nodes connect and register."""
        for name in names:
            session = len(self.names) + 1
            self.sessions[name] = session
            self.names[session] = name
            self.offsets_s[name] = offset_s
            self.handle(NodeConnected(session))
            address = NodeAddress(name, 7382, rack=rack)
            self.say(name, Register(address, self.now_s + offset_s, list(leases)))

    def say(self, name: str, *said: ToTracker) -> list[TrackerEffect]:
        """A node says something; returns what comes of it."""
        effects = []
        for message in said:
            effects += self.handle(NodeSaid(self.sessions[name], message))
        return effects

    def join(
        self, *names: str, file: bytes = FILE, chunks: int = 8, held: int = 0, user: str = "ada"
    ) -> None:
        """Nodes want a file of so many chunks of one MiB."""
        for name in names:
            size_bytes = chunks * MIB
            self.say(name, Join(file, SERVER, user, size_bytes, MIB, mask_to_bytes(held)))

    def lose(self, name: str) -> None:
        """The connection of a node ends."""
        self.handle(NodeLost(self.sessions.pop(name)))

    def beat(self, *names: str) -> None:
        """Heartbeats."""
        for name in names:
            self.say(name, Heartbeat(self.now_s + self.offsets_s[name]))

    def wait_until(self, at_s: float, *beating: str) -> None:
        """Let time pass; some nodes send heartbeats all the time."""
        while beating and self.now_s + 1.0 < at_s:
            self.now_s += 1.0
            self.beat(*beating)
        self.now_s = at_s

    def messages(self, kind: type[Kind], to: str | None = None) -> list[Kind]:
        """What was told so far."""
        return [
            message
            for name, message in self.told
            if isinstance(message, kind) and to in (None, name)
        ]

    def leases(self, to: str | None = None) -> list[Lease]:
        return self.messages(Lease, to)

    def holder(self, lease: Lease) -> str:
        return next(name for name, message in self.told if message is lease)

    def finish(self, lease: Lease, *, rate: float = 8.0 * MIB) -> None:
        """The holder has read its range at this rate (bytes per second)."""
        size_bytes = lease.count * MIB
        done = RangeRead(lease.lease_id, lease.version_id, size_bytes, size_bytes / rate)
        self.say(self.holder(lease), done)

    def out(self) -> list[Lease]:
        """The leases that are out, as they were told."""
        return [lease for lease in self.leases() if lease.lease_id in self.journal]


def held(lease_id: int, first: int = 0, count: int = 1, file: bytes = FILE) -> HeldLease:
    return HeldLease(lease_id, file, SERVER, "ada", first, count)


# --- ranges and slots -----------------------------------------------------------------------------


@pytest.mark.parametrize("slots_max", [1, 2, 5])
@pytest.mark.parametrize("rate", [1e3, 8.0 * MIB, 1e12])
def test_ranges_are_distinct_and_cover_the_file(slots_max: int, rate: float) -> None:
    bench = Bench(slots_max=slots_max)
    bench.connect("a", "b", "c")
    bench.join("a", "b", "c", chunks=100)

    while bench.out():
        assert len(bench.out()) <= slots_max
        bench.finish(bench.out()[0], rate=rate)

    ranges = [(lease.first, lease.count) for lease in bench.leases()]
    chunks = [chunk for first, count in ranges for chunk in range(first, first + count)]
    assert sorted(chunks) == list(range(100))


def test_ranges_take_half_a_second_at_the_rate_that_was_seen_and_shrink_at_the_end() -> None:
    bench = Bench(slots_max=2)
    bench.connect("a", "b")
    bench.join("a", "b", chunks=400)
    for _ in range(6):
        bench.finish(bench.out()[0], rate=20.0 * MIB)
    assert [lease.count for lease in bench.leases()[3:6]] == [10, 10, 10]

    while bench.out():
        bench.finish(bench.out()[0], rate=20.0 * MIB)

    last = [lease.count for lease in bench.leases()[-6:]]
    assert last == sorted(last, reverse=True)
    assert last[-1] == 1


@pytest.mark.parametrize("elapsed_s", [1e-300, 0.0, -1.0, 1e300, float("inf"), float("nan")])
def test_absurd_rates_break_nothing(elapsed_s: float) -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.join("a", "b", chunks=50)
    lease = bench.out()[0]

    bench.say(bench.holder(lease), RangeRead(lease.lease_id, FILE, 2**62, elapsed_s))

    assert len(bench.out()) == 2


def test_a_swift_reader_reads_on_and_a_slow_one_goes_to_the_end_of_the_line() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b", "c")
    bench.join("a", "b", "c", chunks=64)
    readers = []
    for rate in (10e6, 9e6, 2e6, 10e6, 10e6):
        (lease,) = bench.out()
        readers.append(bench.holder(lease))
        bench.finish(lease, rate=rate)

    # "a" is slow the third time.
    assert readers == ["a", "a", "a", "b", "b"]


def test_readers_are_spread_over_the_racks_that_are_known() -> None:
    bench = Bench(slots_max=4)
    bench.connect("a", "b", "c", "d", rack="r1")
    bench.connect("e", "f", rack="r2")
    bench.connect("g")
    bench.join(*"abcdefg", chunks=100)
    for lease in bench.out():
        bench.finish(lease)

    racks = [{"e": "r2", "f": "r2", "g": ""}.get(bench.holder(it), "r1") for it in bench.out()]
    assert sorted(racks) in (["", "r1", "r1", "r2"], ["", "r1", "r2", "r2"])


def test_neighbours_learn_in_which_rack_each_other_stands() -> None:
    bench = Bench()
    bench.connect("a", rack="r1")
    bench.connect("b", rack="r2")
    bench.join("a", "b")

    assert [each.rack for told in bench.messages(Peers, "a") for each in told.peers] == ["r2"]
    assert {each.rack for told in bench.messages(Peers, "b") for each in told.peers} == {"r1"}


def test_the_slots_of_a_server_hold_over_many_swarms_and_users_take_turns() -> None:
    bench = Bench(slots_max=3)
    names = [f"n{number}" for number in range(8)]
    bench.connect(*names)
    for number, name in enumerate(names):
        user = "bob" if number == 7 else "ada"
        bench.join(name, file=bytes([number]) * 32, chunks=30, user=user)
    assert len(bench.out()) == 3

    served = []
    for _ in range(8):
        lease = bench.out()[0]
        bench.finish(lease)
        assert len(bench.out()) == 3
        served.append(bench.out()[-1].version_id)

    assert served.count(b"\7" * 32) >= 3


def test_other_file_servers_have_slots_of_their_own() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.say("a", Join(FILE, "nfs01", "ada", MIB, MIB))
    bench.say("b", Join(OTHER, "nfs02", "ada", MIB, MIB))

    assert len(bench.out()) == 2


def test_a_grant_is_in_the_journal_before_the_node_is_told() -> None:
    bench = Bench()
    bench.connect("a")
    effects = bench.say("a", Join(FILE, SERVER, "ada", MIB, MIB))

    kinds = [
        "told" if isinstance(effect, Tell) and isinstance(effect.message, Lease) else "noted"
        for effect in effects
        if isinstance(effect, JournalGrant)
        or (isinstance(effect, Tell) and isinstance(effect.message, Lease))
    ]
    assert kinds == ["noted", "told"]


def test_who_cannot_read_gets_no_lease() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.say("a", Join(FILE, SERVER, "ada", 4 * MIB, MIB, can_read=False))
    assert bench.out() == []

    bench.join("b", chunks=4)

    assert {bench.holder(lease) for lease in bench.out()} == {"b"}


def test_a_node_that_is_lost_is_not_looked_for_among_the_readers_of_its_other_swarms() -> None:
    """Found in simulation: the tracker ended with a KeyError."""
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.join("a", file=OTHER, chunks=4)
    for _ in range(READ_FAILURES_MAX):
        lease = bench.leases("a")[-1]
        bench.say("a", RangeFailed(lease.lease_id, OTHER, b"", "stale file handle"))
    for name in ("a", "b"):
        bench.say(name, Join(FILE, SERVER, "ada", 4 * MIB, MIB, can_read=False))

    bench.lose("a")  # the slot is free, and both swarms wait for it

    assert bench.out() == []


def test_a_member_that_failed_to_read_may_try_again_when_it_asks_again_some_time_later() -> None:
    """Found in simulation: with nobody else to read, jobs got the original for ever."""
    bench = Bench(slots_max=1)
    bench.connect("a")
    bench.join("a")
    for _ in range(READ_FAILURES_MAX):
        (lease,) = bench.out()
        bench.say("a", RangeFailed(lease.lease_id, FILE, b"", "stale file handle"))
    bench.wait_until(bench.now_s + READ_AGAIN_S / 2, "a")
    bench.say("a", Missing(FILE, b"\xff"))
    assert bench.out() == []

    bench.wait_until(bench.now_s + READ_AGAIN_S / 2, "a")
    bench.say("a", Missing(FILE, b"\xff"))

    assert [bench.holder(lease) for lease in bench.out()] == ["a"]


def test_a_member_that_fails_to_read_three_times_is_not_chosen_again() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a")
    bench.join("a")
    for _ in range(READ_FAILURES_MAX):
        (lease,) = bench.out()
        bench.say("a", RangeFailed(lease.lease_id, FILE, b"", "stale file handle"))
    assert bench.out() == []

    bench.connect("b")
    bench.join("b")

    assert [bench.holder(lease) for lease in bench.out()] == ["b"]


def test_what_was_read_of_a_failed_range_is_not_read_again() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.join("a", chunks=4)
    (lease,) = bench.out()
    assert (lease.first, lease.count) == (0, 4)

    bench.say("a", RangeFailed(lease.lease_id, FILE, b"\x03", "stale file handle"))

    (again,) = bench.out()
    assert again.first == 2


# --- time -----------------------------------------------------------------------------------------


def test_the_slot_of_a_dead_holder_is_free_after_its_lease_and_not_before() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.join("a", chunks=2)
    bench.join("b", chunks=2)
    (lease,) = bench.out()
    assert bench.holder(lease) == "a"
    bench.lose("a")

    bench.wait_until(1000.0 + LEASE_S - 0.01, "b")
    assert [bench.holder(item) for item in bench.out()] == ["a"]
    bench.wait_until(1000.0 + LEASE_S + 0.01, "b")

    assert [bench.holder(item) for item in bench.out()] == ["b"]


def test_a_heartbeat_renews_every_lease_of_the_node() -> None:
    bench = Bench(slots_max=2)
    bench.connect("a")
    bench.join("a")
    bench.join("a", file=OTHER)
    assert len(bench.out()) == 2

    bench.wait_until(1030.0, "a")

    assert len(bench.leases()) == 2
    assert bench.messages(Renewed)[-1].until_s == pytest.approx(1029.0 + LEASE_S - LEASE_MARGIN_S)


def test_who_connects_learns_of_others_and_each_is_named_as_often() -> None:
    bench = Bench()
    names = [f"node-{number}" for number in range(40)]
    bench.connect(*names)
    named = Counter(seed for each in bench.messages(Registered) for seed in each.seeds)

    assert bench.messages(Registered)[0].seeds == []
    assert all(len(each.seeds) <= SEEDS_MAX for each in bench.messages(Registered))
    for number, each in enumerate(bench.messages(Registered)):
        assert len(each.seeds) == min(number, SEEDS_MAX)
        assert names[number] not in each.seeds
    assert min(named[name] for name in names[:20]) > 10


def test_nodes_are_told_of_some_others_every_ten_seconds_and_of_none_that_is_gone() -> None:
    bench = Bench()
    bench.connect("a", "b", "c")
    bench.handle(NodeLost(bench.sessions["c"]))
    bench.told.clear()
    bench.wait_until(1030.5, "a")
    seeds = [each.seeds for each in bench.messages(Renewed)]

    assert [some for some in seeds if some] in ([["b"]] * 2, [["b"]] * 3)
    assert len(seeds) > 20


def test_the_tracker_tells_the_time_by_its_wall_clock() -> None:
    bench = Bench()
    bench.connect("a")

    assert bench.messages(Registered)[-1].time_s == WALL_OFFSET_S + bench.now_s


def test_a_new_lease_prolongs_the_others_of_its_holder_on_both_clocks() -> None:
    bench = Bench(slots_max=2)
    bench.connect("a")
    bench.join("a")
    bench.now_s = 1002.0
    bench.join("a", file=OTHER)
    first, second = bench.out()

    bench.wait_until(second.until_s)

    assert first.lease_id in bench.journal, "its holder still reads under it"


@pytest.mark.parametrize("offset_s", [0.0, -900.0, 1e6, 0.25])
@pytest.mark.parametrize("delay_s", [0.0, 0.4, 2.0])
def test_a_holder_stops_by_its_own_clock_before_the_tracker_gives_its_slot_away(
    offset_s: float, delay_s: float
) -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b", offset_s=offset_s)
    bench.join("a", "b", chunks=2)
    bench.now_s += 0.7
    heartbeat = Heartbeat(bench.now_s + offset_s)
    bench.now_s += delay_s
    bench.say("a", heartbeat)
    (renewed,) = bench.messages(Renewed, "a")
    (lease,) = bench.out()
    bench.lose("a")

    stops_s = max(renewed.until_s, lease.until_s) - offset_s
    bench.wait_until(stops_s)
    assert lease.lease_id in bench.journal
    bench.wait_until(bench.now_s + LEASE_MARGIN_S - 0.01)
    assert lease.lease_id in bench.journal
    bench.wait_until(bench.now_s + delay_s + 0.02)
    assert lease.lease_id not in bench.journal


def test_a_silent_connection_is_closed() -> None:
    bench = Bench()
    bench.connect("a", "b")

    bench.wait_until(1000.0 + NODE_SILENT_S + 1, "b")

    assert bench.closed == [1]


def test_what_waits_for_a_slot_is_told_so() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.join("a")
    bench.join("b", file=OTHER)
    bench.beat("a", "b")

    assert [renewed.waiting for renewed in bench.messages(Renewed, "a")] == [[]]
    assert [renewed.waiting for renewed in bench.messages(Renewed, "b")] == [[OTHER]]


# --- dead nodes -----------------------------------------------------------------------------------


def test_chunks_of_a_dead_node_are_asked_for_and_read_again_only_when_nobody_has_them() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b", "c")
    bench.join("a", chunks=4)
    bench.finish(bench.out()[0])
    bench.join("b", "c", chunks=4)
    assert bench.out() == []
    bench.lose("a")
    queries = bench.messages(Query)
    assert [mask_from_bytes(query.wanted) for query in queries] == [0b1111, 0b1111]

    bench.say("b", Holding(FILE, queries[0].query_id, b"\x03"))
    assert bench.out() == []
    bench.say("c", Holding(FILE, queries[0].query_id, b"\x06"))

    (lease,) = bench.out()
    assert (lease.first, lease.count) == (3, 1)


def test_chunks_that_are_looked_for_are_found_with_who_joins_meanwhile() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b", "c")
    bench.join("a", chunks=4)
    bench.finish(bench.out()[0])
    bench.join("b", chunks=4)
    bench.lose("a")
    bench.join("c", chunks=4, held=0b0111)

    bench.wait_until(1000.0 + QUERY_S + 0.1, "b", "c")

    (lease,) = bench.out()
    assert (lease.first, lease.count) == (3, 1)


def test_a_neighbour_that_does_not_answer_is_not_waited_for_long() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b", "c")
    bench.join("a", chunks=4)
    bench.finish(bench.out()[0])
    bench.join("b", "c", chunks=4)
    bench.lose("a")
    bench.say("c", Holding(FILE, bench.messages(Query)[0].query_id, b""))
    bench.wait_until(1000.0 + QUERY_S - 0.1)
    assert bench.out() == []

    bench.wait_until(1000.0 + QUERY_S + 0.1)

    (lease,) = bench.out()
    assert range_mask(lease.first, lease.count) == 0b1111
    assert bench.holder(lease) == "c", "who did not answer may be stopped"


def test_a_complete_member_guards_what_nobody_else_has() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b", "c")
    bench.join("a", chunks=4)
    bench.finish(bench.out()[0])
    bench.join("b", "c", chunks=4)
    bench.lose("a")
    bench.say("c", Replicas([FILE]))
    for name in ("b", "c"):
        (query,) = bench.messages(Query, name)
        bench.say(name, Holding(FILE, query.query_id, b""))

    bench.wait_until(1010.0, "b", "c")

    assert len(bench.leases()) == 1


def test_a_node_that_registers_anew_keeps_the_leases_that_it_announces() -> None:
    bench = Bench(slots_max=2)
    bench.connect("a")
    bench.join("a", chunks=2)
    (lease,) = bench.out()
    bench.connect("a", leases=[held(lease.lease_id, lease.first, lease.count)])

    assert bench.messages(Registered)[-1].adopted == [lease.lease_id]
    assert bench.closed == [1]
    bench.join("a", chunks=2)
    bench.wait_until(1010.0, "a")
    assert bench.leases() == [lease]
    bench.finish(lease)
    assert bench.out() == []


def test_a_lease_that_a_new_life_of_its_node_does_not_announce_runs_out() -> None:
    bench = Bench(slots_max=2)
    bench.connect("a")
    bench.join("a", chunks=2)
    (first,) = bench.out()
    bench.connect("a")
    bench.join("a", chunks=2)

    bench.wait_until(1000.0 + LEASE_S + 0.1, "a")

    assert first.lease_id not in bench.journal
    assert len(bench.out()) == 1


# --- restart --------------------------------------------------------------------------------------


def test_earlier_leases_block_grants_until_they_must_have_run_out() -> None:
    bench = Bench(earlier={7: "dead"})
    bench.connect("a")
    bench.join("a")
    bench.wait_until(1000.0 + LEASE_S - 0.01, "a")
    assert bench.out() == []

    bench.wait_until(1000.0 + LEASE_S + 0.01, "a")

    assert len(bench.out()) == 1


def test_earlier_leases_that_were_all_announced_block_nothing() -> None:
    bench = Bench(slots_max=2, earlier={7: "a", 8: "b"})
    bench.connect("c")
    bench.join("c", chunks=9)
    bench.connect("a", leases=[held(7, 0, 3)])
    assert bench.out() == []

    bench.connect("b", leases=[])

    (lease,) = bench.out()
    assert lease.first == 3
    assert [registered.adopted for registered in bench.messages(Registered, "a")] == [[7]]


def test_an_announced_lease_takes_a_slot() -> None:
    bench = Bench(slots_max=1, earlier={7: "a"})
    bench.connect("a", leases=[held(7, 0, 3)])
    bench.connect("c")
    bench.join("c", chunks=9)
    assert bench.out() == []

    bench.say("a", RangeRead(7, FILE, 3 * MIB, 0.1))

    assert len(bench.out()) == 1


def test_nobody_can_announce_the_lease_of_another() -> None:
    bench = Bench(slots_max=1, earlier={7: "a"})
    bench.connect("thief", leases=[held(7), held(8), held(99)])
    bench.connect("a", leases=[held(7)])

    assert [registered.adopted for registered in bench.messages(Registered)] == [[], [7]]


def test_lease_ids_go_on_above_all_earlier_ones() -> None:
    bench = Bench()
    bench.connect("a")
    bench.join("a")

    assert bench.out()[0].lease_id == 100


@pytest.mark.parametrize("joined_first", [True, False])
def test_an_announced_range_that_does_not_fit_the_file_only_takes_a_slot(
    joined_first: bool,
) -> None:
    bench = Bench(slots_max=2, earlier={7: "a"})
    if joined_first:
        bench.connect("b")
        bench.join("b", chunks=4)
    bench.connect("a", leases=[held(7, 1, 100)])
    if not joined_first:
        bench.connect("b")
        bench.join("b", chunks=4)

    assert len(bench.out()) == 1
    bench.say("a", RangeRead(7, FILE, 1, 0.1))
    bench.wait_until(1010.0, "a", "b")


def test_a_range_of_absurd_size_is_not_adopted() -> None:
    bench = Bench(earlier={7: "a", 8: "a"})

    bench.connect("a", leases=[held(7, 2**62, 2**62), held(8, 0, CHUNK_COUNT_MAX)])

    assert bench.messages(Registered)[0].adopted == [8]


# --- replicas, members ----------------------------------------------------------------------------


def test_latecomers_get_everything_from_replicas() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.say("a", Replicas([FILE]))

    bench.join("b")

    assert bench.leases() == []
    assert [peer.node for peers in bench.messages(Peers, "b") for peer in peers.peers] == ["a"]
    assert [peer.node for peers in bench.messages(Peers, "a") for peer in peers.peers] == ["b"]


def test_a_lost_replica_makes_the_file_read_again() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.say("a", Replicas([FILE]))
    bench.join("b", chunks=4)
    bench.say("a", Leave(FILE))
    (query,) = bench.messages(Query, "b")

    bench.say("b", Holding(FILE, query.query_id, b"\x01"))

    assert [lease.first for lease in bench.out()] == [1]


def replica_counts(bench: Bench) -> dict[str, int]:
    nodes: Any = bench.state.status(bench.now_s)["nodes"]
    return {node["node"]: node["replicas"] for node in nodes}


def test_what_a_node_does_not_tell_of_anew_it_no_longer_holds() -> None:
    bench = Bench()
    bench.connect("a", "b", "c")
    third = b"t" * 32
    bench.say("a", Replicas([FILE]), Replicas([OTHER]))
    bench.join("b", chunks=4)
    assert bench.leases() == []

    bench.say("a", Replicas([], more=True), Replicas([third]))  # one that has come just now
    bench.say("a", Replicas([OTHER], more=True))
    assert bench.messages(Query, "b") == []
    bench.say("a", Replicas([], more=False))

    assert replica_counts(bench) == {"a": 2, "b": 0, "c": 0}
    (query,) = bench.messages(Query, "b")
    bench.say("b", Holding(FILE, query.query_id, b""))
    assert bench.out() != []
    bench.join("c", file=OTHER)
    assert [peer.node for peers in bench.messages(Peers, "c") for peer in peers.peers] == ["a"]


def test_who_fetches_anew_what_it_has_lost_stays_in_the_swarm() -> None:
    bench = Bench()
    bench.connect("a")
    bench.say("a", Replicas([FILE]), Replicas([], more=True))
    bench.join("a", chunks=4)

    bench.say("a", Replicas([], more=False))

    swarms: Any = bench.state.status(bench.now_s)["swarms"]
    assert [swarm["members"] for swarm in swarms] == [1]
    assert replica_counts(bench) == {"a": 0}


def test_a_changed_source_is_revoked_to_those_who_fetch_it_and_replicas_stay_known() -> None:
    bench = Bench()
    bench.connect("a", "b", "c", "d")
    bench.join("a", "b")
    bench.say("c", Replicas([FILE, OTHER]))
    lease = bench.leases()[0]

    bench.say(
        bench.holder(lease), RangeFailed(lease.lease_id, FILE, b"", "mtime", source_changed=True)
    )

    revoked = sorted(name for name, message in bench.told if isinstance(message, Revoked))
    assert revoked == ["a", "b"]
    assert replica_counts(bench) == {"a": 0, "b": 0, "c": 2, "d": 0}
    bench.wait_until(1010.0, "a", "b", "c", "d")
    bench.join("d")
    assert {peer.node for peers in bench.messages(Peers, "d") for peer in peers.peers} == {"c"}


def test_who_cannot_get_chunks_of_a_neighbour_is_introduced_to_it_anew() -> None:
    """The neighbour has parted when it could not reach the node, which waits to be dialled."""
    bench = Bench()
    bench.connect("a", "b")
    bench.say("a", Replicas([FILE]))
    bench.join("b", chunks=4)
    before = len(bench.messages(Peers, "a")), len(bench.messages(Peers, "b"))

    bench.say("b", Missing(FILE, b"\x0f"))

    after = len(bench.messages(Peers, "a")), len(bench.messages(Peers, "b"))
    assert after == (before[0] + 1, before[1] + 1)


def test_all_who_cannot_get_the_same_chunks_are_introduced_to_who_has_them() -> None:
    """Found in simulation: while the first one's question was not answered the others got nothing,
    every second again."""
    bench = Bench()
    bench.connect("a", "b", "c")
    bench.say("a", Replicas([FILE]))
    bench.join("b", "c", chunks=4)
    before = {name: len(bench.messages(Peers, name)) for name in ("a", "b", "c")}

    for name in ("b", "c"):
        bench.say(name, Missing(FILE, b"\x0f"))

    after = {name: len(bench.messages(Peers, name)) - before[name] for name in ("a", "b", "c")}
    assert after == {"a": 2, "b": 1, "c": 1}


def test_who_gets_nothing_from_a_neighbour_that_has_it_gets_one_more_neighbour() -> None:
    """Found in simulation: with few neighbours each, some knew nobody but one that was busy."""
    bench = Bench(peers_max=4)
    names = [f"n{number:02}" for number in range(12)]
    bench.connect("holder", *names)
    bench.say("holder", Replicas([FILE]))
    bench.join(*names, chunks=4)

    def met(name: str) -> set[str]:
        return {peer.node for peers in bench.messages(Peers, name) for peer in peers.peers}

    starved = next(name for name in names if "holder" in met(name) and len(met(name)) < 4)
    before = met(starved)
    bench.say(starved, Missing(FILE, b"\x0f"))

    (stranger,) = met(starved) - before
    assert starved in met(stranger)
    for _ in range(8):
        bench.say(starved, Missing(FILE, b"\x0f"))
    assert len(met(starved)) == 4, "and no more than it may have"


def test_who_leaves_is_nobodys_neighbour_and_reads_nothing() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.join("a", "b", chunks=4)
    (lease,) = bench.out()
    bench.say("a", Leave(FILE), RangeFailed(lease.lease_id, FILE, b"", "given up"))

    (lease,) = bench.out()
    assert bench.holder(lease) == "b"
    bench.say("a", Leave(FILE), Leave(OTHER))
    bench.say("b", Leave(FILE), RangeFailed(lease.lease_id, FILE, b"", "given up"))
    bench.wait_until(1010.0, "a", "b")
    assert bench.out() == []


def test_who_joins_again_guards_only_what_it_still_holds() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a")
    bench.join("a", chunks=4)
    bench.finish(bench.out()[0])
    assert bench.out() == []

    bench.join("a", chunks=4, held=0b0001)

    assert [(lease.first, lease.count) for lease in bench.out()] == [(1, 3)]


def test_what_a_joining_node_holds_is_not_read() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a")

    bench.join("a", chunks=4, held=0b0111)

    assert [(lease.first, lease.count) for lease in bench.out()] == [(3, 1)]


def test_the_first_to_join_decides_the_chunk_size() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.join("a", chunks=4)
    bench.say("b", Join(FILE, SERVER, "ada", 4 * MIB, 2 * MIB, b"\xff"))

    assert [joined.chunk_size_bytes for joined in bench.messages(Joined)] == [MIB, MIB]


def test_a_file_of_too_many_chunks_is_refused() -> None:
    bench = Bench()
    bench.connect("a")
    bench.say("a", Join(FILE, SERVER, "ada", 2**60, 1))

    assert [refused.version_id for refused in bench.messages(Refused)] == [FILE]


def test_who_delivers_wrong_bytes_guards_nothing_any_more() -> None:
    bench = Bench(slots_max=1)
    bench.connect("a", "b")
    bench.say("a", Replicas([FILE]))
    bench.join("b", chunks=4)
    assert bench.out() == []

    bench.say("b", ReportCorrupt(FILE, "a"), ReportCorrupt(FILE, "nobody"))
    for query in bench.messages(Query, "b"):
        bench.say("b", Holding(FILE, query.query_id, b""))

    assert [bench.holder(lease) for lease in bench.out()] == ["b"]
    assert bench.messages(Suspected, "a") == [Suspected(FILE)]


# --- neighbours -----------------------------------------------------------------------------------


def graph(bench: Bench, file: bytes = FILE) -> dict[str, set[str]]:
    swarm = bench.state._swarms[file]
    return {name: set(swarm.neighbourhood.of(name)) for name in swarm.members}


def connected(edges: dict[str, set[str]]) -> int:
    """How many nodes can be reached from the first one."""
    reached: set[str] = set()
    waiting = [next(iter(edges))]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += edges[name]
    return len(reached)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "peers_max"), [(2, 40), (12, 40), (41, 40), (60, 8)])
def test_neighbours_are_symmetric_limited_and_connected(
    seed: int, count: int, peers_max: int
) -> None:
    bench = Bench(peers_max=peers_max, seed=seed)
    names = [f"n{number:03}" for number in range(count)]
    bench.connect(*names)
    bench.join(*names)

    edges = graph(bench)

    assert connected(edges) == count
    for name, others in edges.items():
        assert len(others) <= peers_max
        assert name not in others
        assert all(name in edges[other] for other in others)


@pytest.mark.slow
def test_every_member_of_a_big_swarm_is_connected_and_has_many_neighbours() -> None:
    bench = Bench()
    names = [f"n{number:03}" for number in range(300)]
    for name in names:
        bench.connect(name)
        bench.join(name)
    for name in names[100:220]:
        bench.lose(name)

    edges = graph(bench)

    assert connected(edges) == 180
    assert min(len(others) for others in edges.values()) >= 10
    assert max(len(others) for others in edges.values()) <= 40


def test_both_sides_of_every_pair_are_told() -> None:
    bench = Bench()
    names = [f"n{number}" for number in range(6)]
    bench.connect(*names)
    bench.join(*names)

    pairs = {
        (name, peer.node)
        for name, message in bench.told
        if isinstance(message, Peers)
        for peer in message.peers
    }
    assert pairs == {(one, other) for one in names for other in names if one != other}


# --- rules of the connection, anything at all -----------------------------------------------------


def test_the_first_message_must_be_a_register() -> None:
    bench = Bench()
    bench.names[1] = "a"
    bench.handle(NodeConnected(1))
    bench.handle(NodeSaid(1, Leave(FILE)))

    assert bench.closed == [1]


def test_another_protocol_is_refused() -> None:
    bench = Bench()
    bench.names[1] = "a"
    bench.handle(NodeConnected(1))
    bench.handle(NodeSaid(1, Register(NodeAddress("a", 1), 0.0, protocol=99)))

    assert bench.closed == [1]
    assert bench.told == []


def test_one_connection_is_one_node() -> None:
    bench = Bench()
    bench.connect("a")
    bench.say("a", Register(NodeAddress("b", 1), 0.0))
    assert bench.closed == [1]

    bench.lose("a")

    assert bench.state.status(bench.now_s)["nodes"] == []


def test_messages_of_a_connection_that_is_gone_are_ignored() -> None:
    bench = Bench()
    bench.connect("a")
    session = bench.sessions["a"]
    bench.lose("a")

    assert bench.handle(NodeSaid(session, Leave(FILE))) == []
    assert bench.handle(NodeLost(session)) == []


def test_the_status_can_be_sent() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.join("a", "b")
    bench.say("a", StatusRequest(5))

    (status,) = bench.messages(Status)
    again = messages.decode_from_tracker(messages.encode(status))
    assert isinstance(again, Status)
    assert again.request_id == 5
    assert {node["node"] for node in again.cluster["nodes"]} == {"a", "b"}
    assert again.cluster["file_servers"][0]["slots_used"] == 2


def test_statistics_tell_reads_waits_and_leases_that_did_not_end_well() -> None:
    bench = Bench(slots_max=1, statistics_interval_s=60.0)
    bench.connect("a", "b", "c")
    bench.join("a")
    bench.join("b", file=OTHER, user="bob")  # waits until the lease of "a" has run out
    bench.lose("a")
    began_s = bench.now_s
    bench.wait_until(began_s + LEASE_S + 1.0, "b", "c")
    bench.say("c", Replicas([FILE, OTHER]))
    bench.wait_until(began_s + 61.0, "b", "c")

    (report,) = bench.reports
    (server,) = report["file_servers"]
    assert (server["reads"], server["ran_out"], server["waits"]) == (2, 1, 1)
    assert server["wait_max_s"] == server["wait_mean_s"] == pytest.approx(LEASE_S)
    assert (report["nodes"], report["files"], report["replicas"]) == (2, 2, 2)
    assert report["replicas_per_file_max"] == 1
    bench.say("b", StatusRequest(1))
    (status,) = bench.messages(Status)
    assert status.cluster["statistics"]["file_servers"][0]["reads"] == 2


def test_who_waits_for_a_reader_does_not_wait_for_a_slot() -> None:
    bench = Bench(slots_max=2)
    bench.connect("a", "b")
    bench.say("a", Join(FILE, SERVER, "ada", 8 * MIB, MIB, can_read=False))
    bench.now_s += 100.0
    bench.say("b", Join(FILE, SERVER, "ada", 8 * MIB, MIB))

    bench.say("b", StatusRequest(1))
    (status,) = bench.messages(Status)
    (server,) = status.cluster["statistics"]["file_servers"]
    assert (server["reads"], server["waits"]) == (1, 0)


def test_a_node_hears_how_many_others_hold_its_files_and_which_were_first() -> None:
    bench = Bench()
    bench.connect("c", "a", "b")
    bench.say("c", Replicas([FILE]))
    bench.say("a", Replicas([FILE, OTHER]))
    bench.say("b", Replicas([FILE]))

    bench.say("a", Locate(7, [FILE, OTHER, b"n" * 32], nodes_max=1))
    bench.say("b", Leave(FILE))
    bench.lose("c")
    bench.say("a", Locate(8, [FILE]))

    assert bench.messages(Located, "a") == [
        Located(7, [Holders(2, [NodeAddress("c", 7382)]), Holders(0), Holders(0)]),
        Located(8, [Holders(0)]),
    ]


def test_an_answer_about_holders_is_short_enough_to_be_sent() -> None:
    """Also with the longest addresses that a node may register with, and all that may be asked."""
    bench = Bench()
    longest = "\U0001f4be"
    files = [b"%032d" % number for number in range(LOCATE_MAX)]
    names = [str(number).rjust(255, longest) for number in range(LOCATED_NODES_MAX + 1)]
    for number, name in enumerate(names):
        bench.sessions[name] = number + 1
        bench.names[number + 1] = name
        bench.handle(NodeConnected(number + 1))
        address = NodeAddress(name, 7382, longest * 1024)
        bench.say(name, Register(address, 0.0), Replicas(files))
    last = names[-1]

    bench.say(last, Locate(1, files[:1], nodes_max=LOCATED_NODES_MAX))
    bench.say(last, Locate(2, files[:4], nodes_max=LOCATED_NODES_MAX))
    bench.say(last, Locate(3, files))

    one, four, all_of_them = bench.messages(Located, last)
    assert [len(holders.nodes) for holders in one.holders] == [LOCATED_NODES_MAX]
    assert [len(holders.nodes) for holders in four.holders] == [LOCATED_NODES_MAX // 4] * 4
    assert [holders.count for holders in all_of_them.holders] == [LOCATED_NODES_MAX] * LOCATE_MAX
    for answer in (one, four, all_of_them):
        data = messages.encode(answer)
        assert len(data) < messages.MESSAGE_MAX_BYTES
        assert messages.decode_from_tracker(data) == answer


def test_for_many_small_files_a_few_holders_are_named_and_each_file_with_one_of_them() -> None:
    bench = Bench()
    bench.connect("a", "b", "c", "d")
    ids = [b"%032d" % number for number in range(8)]
    bench.say("a", Replicas(ids))
    bench.say("b", Replicas(ids[:6]))
    bench.say("c", Replicas(ids[4:7]))

    bench.say("a", WhoHas(1, [*ids, b"n" * 32]))
    bench.say("d", WhoHas(2, ids))
    bench.say("d", WhoHas(3, [b"n" * 32]))

    to_a = bench.messages(HeldBy, "a")[0]
    assert {holder.address.node for holder in to_a.holders} == {"b", "c"}
    masks = [mask_from_bytes(holder.held) for holder in to_a.holders]
    assert masks[0] & masks[1] == 0 and masks[0] | masks[1] == 0b01111111
    to_d, nobody = bench.messages(HeldBy, "d")
    assert to_d == HeldBy(2, [BatchHolder(NodeAddress("a", 7382), b"\xff")])
    assert nobody == HeldBy(3, [])


def test_a_crowd_that_wants_the_same_small_files_is_spread_over_all_holders() -> None:
    bench = Bench()
    holders = [f"h{number:02}" for number in range(20)]
    ids = [b"%032d" % number for number in range(64)]
    bench.connect(*holders, "asks")
    for holder in holders:
        bench.say(holder, Replicas(ids))

    for number in range(200):
        bench.say("asks", WhoHas(number, ids))

    answers = bench.messages(HeldBy)
    assert all(len(answer.holders) == 1 for answer in answers)
    assert len({answer.holders[0].address.node for answer in answers}) >= 15
    longest = messages.encode(answers[0])
    assert messages.decode_from_tracker(longest) == answers[0]


names = st.sampled_from(["a", "b", "c"])
files = st.sampled_from([FILE, OTHER])
masks = st.sampled_from([b"", b"\x01", b"\x0e", b"\xff" * 3, b"\xff" * 5000])
small = st.integers(0, 12)
ids = st.integers(98, 112) | st.sampled_from([0, 7, 8, 2**62])
held_leases = st.builds(
    HeldLease,
    ids,
    files,
    st.just(SERVER),
    st.just("ada"),
    small | st.just(2**62),
    st.integers(1, 9),
)
anything: st.SearchStrategy[ToTracker] = st.one_of(
    st.builds(
        Register,
        st.builds(NodeAddress, names, st.just(1)),
        st.floats(),
        st.lists(held_leases, max_size=3),
    ),
    st.builds(
        Join,
        files,
        st.sampled_from([SERVER, "nfs02"]),
        st.sampled_from(["ada", "bob"]),
        st.sampled_from([1, 4 * MIB, 4 * MIB + 1, 2**62]),
        st.sampled_from([1, MIB, 2 * MIB]),
        masks,
        st.booleans(),
    ),
    st.builds(Leave, files),
    st.builds(Replicas, st.lists(files, max_size=3)),
    st.builds(RangeRead, ids, files, st.integers(0, 2**62), st.floats()),
    st.builds(RangeFailed, ids, files, masks, st.just("no"), st.booleans()),
    st.builds(Heartbeat, st.floats()),
    st.builds(Holding, files, st.integers(0, 6), masks),
    st.builds(ReportCorrupt, files, names | st.just("nobody")),
    st.builds(StatusRequest, small),
    st.builds(Locate, small, st.lists(files, max_size=3), small),
    st.builds(Missing, files, masks),
)
steps = st.one_of(
    st.tuples(names, anything),
    st.tuples(names, st.just("lose")),
    st.tuples(names, st.just("connect")),
    st.tuples(names, st.sampled_from([0.1, 1.0, 3.1])),
)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(steps, max_size=30), st.booleans())
def test_nothing_that_nodes_say_raises_or_breaks_an_invariant(
    script: list[tuple[str, ToTracker | str | float]], restarted: bool
) -> None:
    bench = Bench(slots_max=2, earlier={7: "a", 8: "b"} if restarted else None)
    bench.connect("a", "b", "c")
    for name, step in script:
        if isinstance(step, float):
            bench.wait_until(bench.now_s + step)
        elif step == "lose":
            if name in bench.sessions:
                bench.lose(name)
        elif step == "connect":
            bench.connect(name)
        elif name in bench.sessions and not isinstance(step, str):
            bench.say(name, step)
        adopted = sum(lease_id < 100 for lease_id in bench.journal)
        assert len(bench.journal) <= 2 + adopted
