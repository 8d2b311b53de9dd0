"""One gossip machine alone, talked to by hand."""

from __future__ import annotations

from random import Random

import pytest

from swarmcache.gossip import PROFILES_ASKED, Gossip
from swarmcache.gossip_claims import RECORD_AGE_MAX_S, REMEMBER_S
from swarmcache.gossip_events import (
    ConnectTried,
    DatagramReceived,
    GossipEffect,
    GossipEvent,
    MembersChanged,
    SendDatagram,
    TimePassed,
    TryConnect,
)
from swarmcache.gossip_records import (
    RING,
    Ack,
    MemberState,
    NodeProfile,
    NodeStatus,
    Numbered,
    Ping,
    PingFor,
    ProfilesWanted,
    Received,
    Rumour,
    RumourKind,
    Rumours,
    Statuses,
    StatusRecord,
    decode_payload,
    encode_ack,
    encode_nack,
    encode_numbered,
    encode_ping,
    encode_profiles,
    encode_profiles_wanted,
    encode_received,
    encode_rumours,
    encode_statuses,
    encode_statuses_wanted,
    node_id,
    pack_profile,
    pack_rumour,
    pack_status,
    profile_tag,
    ring_id,
    status_body,
)
from swarmcache.gossip_spread import (
    CONFIRM_S,
    CONFIRM_WAITS,
    OVERHEAD_BYTES,
    RECEIPTS,
    WAIT_NEAR_S,
)
from swarmcache.messages import NodeAddress

EPOCH = 1_000
SELF = ring_id("self:1")
NOBODY_ELSE = SELF + 1
EVERYBODY = SELF


def profile_of(name: str) -> NodeProfile:
    return NodeProfile(NodeAddress(name, 2), "rack", "1", 1 << 40)


class Alone:
    """A machine that knows some others, none of which exists."""

    def __init__(self, others: int, *, budget_bytes_per_s: float = 12_000.0) -> None:
        self.machine = Gossip(
            profile_of("self:1"), EPOCH, Random(1), budget_bytes_per_s=budget_bytes_per_s
        )
        self.now_s = 0.0
        self.names = [f"other{number}:1" for number in range(others)]
        self.confirming = set(self.names)
        self.effects: list[GossipEffect] = []
        self.tell(TimePassed())
        for name in self.names:
            self.hear(name, self.status(name, 1), encode_profiles([pack_profile(profile_of(name))]))

    def tell(self, event: GossipEvent) -> list[GossipEffect]:
        effects = self.machine.handle(event, self.now_s)
        self.machine.check()
        self.effects += effects
        return effects

    def hear(self, sender: str, *sections: bytes) -> list[GossipEffect]:
        return self.tell(DatagramReceived(node_id(sender), b"".join(sections)))

    def status(
        self,
        name: str,
        seq: int,
        *,
        epoch: int = EPOCH,
        age_s: float = 0.0,
        limit: int | None = None,
    ) -> bytes:
        """What ``name`` says of itself, for nobody else."""
        body = status_body(NodeStatus(), profile_tag(profile_of(name)))
        record = StatusRecord(ring_id(name), epoch, seq, round(age_s * 10), body)
        return encode_statuses(SELF + 1 if limit is None else limit, [pack_status(record)])

    def rumour(
        self,
        kind: RumourKind,
        name: str,
        *,
        seq: int = 1,
        age_s: float = 0.0,
        limit: int = NOBODY_ELSE,
    ) -> bytes:
        """What the first one of the others says of ``name``."""
        origin = ring_id(self.names[0])
        packed = pack_rumour(Rumour(kind, ring_id(name), EPOCH, seq, origin, round(age_s * 10)))
        return encode_rumours(limit, [packed])

    def pass_time(self, duration_s: float, *, silent: str | None = None) -> None:
        """Let it be woken when it wants. All but ``silent`` answer, and help."""
        until_s = self.now_s + duration_s
        while (at_s := self.machine.wake_at_s()) is not None and at_s <= until_s:
            self.now_s = max(at_s, self.now_s)
            for effect in self.tell(TimePassed()):
                if isinstance(effect, SendDatagram) and effect.address != silent:
                    self._answer(effect, silent)
        self.now_s = until_s

    def _answer(self, effect: SendDatagram, silent: str | None) -> None:
        for section in decode_payload(effect.payload):
            match section:
                case Ping(number):
                    self.hear(effect.address, encode_ack(number))
                case PingFor(number, target):
                    lost = silent is not None and target == ring_id(silent)
                    self.hear(effect.address, encode_nack(number) if lost else encode_ack(number))
                case Numbered(number) if effect.address in self.confirming:
                    self.hear(effect.address, encode_received([number]))
                case _:
                    pass

    def state(self, name: str) -> MemberState | None:
        member = self.machine.member(name)
        return None if member is None else member.state


def sections_to(effects: list[GossipEffect], kind: type) -> list[tuple[str, object]]:
    """The sections of one kind that are sent, and to whom."""
    return [
        (effect.address, section)
        for effect in effects
        if isinstance(effect, SendDatagram)
        for section in decode_payload(effect.payload)
        if isinstance(section, kind)
    ]


def test_a_record_is_passed_on_as_its_subject_made_it_only_older() -> None:
    alone = Alone(8)
    alone.pass_time(1.0)
    alone.effects.clear()

    alone.hear(alone.names[1], alone.status(alone.names[0], 7, age_s=3.0, limit=EVERYBODY))
    alone.pass_time(2.0)

    subject = ring_id(alone.names[0])
    sent = [
        record
        for _, section in sections_to(alone.effects, Statuses)
        if isinstance(section, Statuses)
        for record in section.records
        if record.subject == subject
    ]
    assert sent and {(record.epoch, record.seq) for record in sent} == {(EPOCH, 7)}
    assert all(30 < record.age <= 50 for record in sent)
    member = alone.machine.member(alone.names[0])
    assert member is not None and member.age_s(alone.now_s) == 5.0


def test_what_is_known_already_is_confirmed_and_passed_on_only_farther_than_before() -> None:
    alone = Alone(8)
    alone.pass_time(1.0)
    half = alone.status(alone.names[0], 2, limit=(SELF + (1 << 46)) % RING)
    everybody = alone.status(alone.names[0], 2, limit=EVERYBODY)
    alone.hear(alone.names[1], half)
    alone.pass_time(2.0)

    again = alone.hear(alone.names[1], encode_numbered(5), half)
    farther = alone.hear(alone.names[1], everybody)
    no_more = alone.hear(alone.names[1], everybody)

    assert sections_to(again, Received) == [(alone.names[1], Received((5,)))]
    assert sections_to(again, Statuses) == sections_to(no_more, Statuses) == []
    assert sections_to(farther, Statuses) != []


def test_a_confirmation_names_the_last_datagrams_of_the_same_sender() -> None:
    alone = Alone(2)
    one, other = alone.names
    alone.hear(other, encode_numbered(99))

    sent = [alone.hear(one, encode_numbered(number)) for number in range(1, RECEIPTS + 3)]

    numbers = [
        section.numbers
        for effects in sent
        for _, section in sections_to(effects, Received)
        if isinstance(section, Received)
    ]
    assert numbers[:2] == [(1,), (1, 2)]
    assert numbers[-1] == tuple(range(3, RECEIPTS + 3))


def test_a_new_life_is_not_told_what_came_from_the_one_before() -> None:
    """It counts from the beginning, and would take its own next ones for confirmed."""
    alone = Alone(1)
    (one,) = alone.names
    alone.hear(one, encode_numbered(7))
    alone.hear(one, alone.status(one, 1, epoch=EPOCH + 1))

    effects = alone.hear(one, encode_numbered(1))

    assert sections_to(effects, Received) == [(one, Received((1,)))]


def numbered_to(alone: Alone, node: str) -> list[int]:
    """The numbers of what it has been sent to confirm."""
    sent = sections_to(alone.effects, Numbered)
    return [each.number for to, each in sent if to == node and isinstance(each, Numbered)]


def quiet_for_a_while(others: int) -> Alone:
    """From now on nobody confirms anything."""
    alone = Alone(others)
    alone.pass_time(20.0)
    alone.effects.clear()
    alone.confirming.clear()
    return alone


def passing_on(count: int) -> Alone:
    """It has sent so many datagrams with the next status of ``other0:1`` to ``other1:1``."""
    alone = quiet_for_a_while(2)
    for seq in range(count):
        alone.hear("other0:1", alone.status("other0:1", seq + 2, limit=EVERYBODY))
        alone.pass_time(WAIT_NEAR_S)
    return alone


def test_statuses_go_again_only_when_the_next_datagram_could_have_confirmed_them_too() -> None:
    alone = passing_on(1)
    [number] = numbered_to(alone, "other1:1")
    alone.pass_time(CONFIRM_S + CONFIRM_WAITS * WAIT_NEAR_S - 0.1)
    assert numbered_to(alone, "other1:1") == [number]

    alone.pass_time(0.2)
    assert len(numbered_to(alone, "other1:1")) == 2


def test_what_a_later_confirmation_names_does_not_go_again() -> None:
    alone = passing_on(2)
    numbers = numbered_to(alone, "other1:1")
    assert len(numbers) == 2

    alone.hear("other1:1", encode_received(numbers))
    alone.pass_time(CONFIRM_S + CONFIRM_WAITS * WAIT_NEAR_S)

    assert numbered_to(alone, "other1:1") == numbers


def test_what_was_lost_goes_again_when_a_later_one_is_confirmed() -> None:
    alone = passing_on(2)
    lost, later = numbered_to(alone, "other1:1")

    alone.hear("other1:1", encode_received([later]))
    alone.pass_time(CONFIRM_S + 0.01)

    assert len(numbered_to(alone, "other1:1")) == 3
    alone.hear("other1:1", encode_received([lost]), encode_received([]))  # which is of no use now
    alone.hear("other0:1", encode_received([numbered_to(alone, "other1:1")[-1]]))  # not its own
    alone.pass_time(CONFIRM_S + CONFIRM_WAITS * WAIT_NEAR_S)
    assert len(numbered_to(alone, "other1:1")) > 3


def test_what_is_urgent_goes_again_at_once() -> None:
    alone = quiet_for_a_while(2)

    alone.hear("other0:1", alone.rumour(RumourKind.SUSPECT, "other0:1", limit=EVERYBODY))
    alone.pass_time(0.01)
    assert len(numbered_to(alone, "other1:1")) == 1
    alone.pass_time(CONFIRM_S)

    assert len(numbered_to(alone, "other1:1")) == 2


def carrying(alone: Alone, node: str, subject: str) -> list[int]:
    """The numbers of the datagrams to ``node`` with a status of ``subject``."""
    found = []
    for effect in alone.effects:
        if isinstance(effect, SendDatagram) and effect.address == node:
            sections = decode_payload(effect.payload)
            of = {r.subject for s in sections if isinstance(s, Statuses) for r in s.records}
            numbers = [each.number for each in sections if isinstance(each, Numbered)]
            found += numbers if ring_id(subject) in of else []
    return found


@pytest.mark.parametrize("confirms_others", [False, True])
def test_only_who_confirms_nothing_any_more_loses_its_part(confirms_others: bool) -> None:
    alone = Alone(8)
    alone.pass_time(20.0)
    alone.effects.clear()
    ring = sorted(alone.names, key=lambda name: (ring_id(name) - SELF) % RING)
    first, second, finger, heir = ring[0], ring[1], ring[3], ring[4]
    alone.confirming.discard(finger)

    alone.hear(first, alone.status(first, 2, limit=EVERYBODY))
    alone.pass_time(WAIT_NEAR_S)
    for seq in range(2, 16):
        alone.hear(second, alone.status(second, seq, limit=EVERYBODY))
        alone.pass_time(WAIT_NEAR_S)
        if confirms_others:
            both = carrying(alone, finger, first)
            other = [each for each in carrying(alone, finger, second) if each not in both]
            alone.hear(finger, encode_received(other))

    assert len(carrying(alone, finger, first)) >= 2
    assert (carrying(alone, heir, first) == []) == confirms_others


def test_bytes_that_are_no_gossip_are_counted_and_nothing_is_answered() -> None:
    alone = Alone(2)

    effects = alone.hear(alone.names[0], encode_ping(1, alone.names[0]), b"\xff")

    assert effects == []
    assert alone.machine.bad_datagrams == 1


def test_a_ping_is_answered_to_whoever_it_is() -> None:
    alone = Alone(0)

    effects = alone.hear("stranger:1", encode_ping(7, "stranger:1"))

    assert sections_to(effects, Ack) == [("stranger:1", Ack(7))]


def test_who_is_suspected_and_has_said_something_since_is_cleared_and_the_sender_told() -> None:
    alone = Alone(3)
    suspect = alone.names[2]
    alone.hear(alone.names[0], alone.rumour(RumourKind.SUSPECT, suspect))
    assert alone.state(suspect) is MemberState.SUSPECT

    alone.now_s += 3.0
    alone.hear(suspect, alone.status(suspect, 2))
    assert alone.state(suspect) is MemberState.ALIVE
    effects = alone.hear(alone.names[0], alone.rumour(RumourKind.SUSPECT, suspect, age_s=3.0))

    assert alone.state(suspect) is MemberState.ALIVE
    assert [address for address, _ in sections_to(effects, Statuses)] == [alone.names[0]]


def test_a_node_that_is_suspected_itself_begins_another_epoch_and_says_so_at_once() -> None:
    alone = Alone(3)

    effects = alone.hear(alone.names[0], alone.rumour(RumourKind.SUSPECT, "self:1"))

    records = [
        record
        for _, section in sections_to(effects, Statuses)
        if isinstance(section, Statuses)
        for record in section.records
    ]
    assert {(record.subject, record.epoch) for record in records} == {(SELF, EPOCH + 1)}


def test_who_says_that_a_node_is_suspected_is_answered_whatever_is_left_of_the_budget() -> None:
    alone = Alone(3, budget_bytes_per_s=1.0)
    accuser = alone.names[0]

    effects = alone.hear(accuser, alone.rumour(RumourKind.SUSPECT, "self:1"))

    [(told, section)] = sections_to(effects, Statuses)
    assert isinstance(section, Statuses)
    [record] = section.records
    assert (told, section.limit) == (accuser, ring_id(accuser) + 1)
    assert (record.subject, record.epoch) == (SELF, EPOCH + 1)


def test_nobody_is_declared_dead_without_being_asked_once_more_also_over_tcp() -> None:
    alone = Alone(4)
    suspect = alone.names[2]
    alone.pass_time(60.0, silent=suspect)

    assert alone.state(suspect) is MemberState.DEAD
    last = max(i for i, effect in enumerate(alone.effects) if isinstance(effect, MembersChanged))
    asked = [
        (i, number.number)
        for i, effect in enumerate(alone.effects[:last])
        for _, number in sections_to([effect], Ping)
        if isinstance(number, Ping) and isinstance(effect, SendDatagram)
        if effect.address == suspect
    ]
    tried = [i for i, e in enumerate(alone.effects) if isinstance(e, TryConnect)]
    # The last probe began with a ping, and a connection was tried with it.
    first_of_last = min(i for i, number in asked if number == asked[-1][1])
    assert any(first_of_last < i < last for i in tried)


def test_who_clears_itself_while_it_is_tried_is_not_declared_dead() -> None:
    def silent_for(duration_s: float) -> Alone:
        alone = Alone(4)
        while alone.now_s < duration_s and alone.state("other2:1") is not MemberState.DEAD:
            alone.pass_time(0.1, silent="other2:1")
        return alone

    condemned = silent_for(100.0)
    assert condemned.state("other2:1") is MemberState.DEAD
    alone = silent_for(condemned.now_s - 0.5)
    assert alone.state("other2:1") is MemberState.SUSPECT

    alone.hear(alone.names[0], alone.status("other2:1", 1, epoch=EPOCH + 1))
    alone.pass_time(1.0, silent="other2:1")

    assert alone.state("other2:1") is MemberState.ALIVE


def connect_all(alone: Alone, node: str) -> None:
    """The kernel of this node accepts all connections."""
    for effect in alone.effects:
        if isinstance(effect, TryConnect) and effect.node == node:
            alone.tell(ConnectTried(node, ok=True))
    alone.effects.clear()


def test_an_accepted_connection_saves_a_node_as_long_as_it_says_something_now_and_then() -> None:
    alone = Alone(4)
    node = alone.names[2]

    for second in range(100):
        alone.pass_time(1.0, silent=node)
        connect_all(alone, node)
        if second < 20:
            alone.hear(alone.names[0], alone.status(node, second + 2))
            assert alone.state(node) is MemberState.ALIVE

    assert alone.state(node) is MemberState.DEAD


def test_who_was_declared_dead_does_not_come_back_by_an_old_record_however_late() -> None:
    alone = Alone(3)
    dead = alone.names[2]
    alone.hear(alone.names[0], alone.rumour(RumourKind.DEAD, dead, seq=5))
    assert alone.state(dead) is MemberState.DEAD

    alone.hear(alone.names[1], alone.status(dead, 5))
    alone.hear(alone.names[1], alone.status(dead, 6, age_s=20.0))
    assert alone.state(dead) is MemberState.DEAD
    alone.pass_time(REMEMBER_S + 1.0)
    assert alone.state(dead) is None
    alone.hear(alone.names[1], alone.status(dead, 6, age_s=RECORD_AGE_MAX_S + 1))

    assert alone.state(dead) is None


@pytest.mark.parametrize(("seq", "epoch", "age_s"), [(6, EPOCH, 0.0), (0, EPOCH + 1, 30.0)])
def test_a_later_record_or_a_new_life_brings_the_dead_back(
    seq: int, epoch: int, age_s: float
) -> None:
    alone = Alone(3)
    dead = alone.names[2]
    alone.hear(alone.names[0], alone.rumour(RumourKind.DEAD, dead, seq=5))
    alone.now_s += 5.0

    alone.hear(alone.names[1], alone.status(dead, seq, epoch=epoch, age_s=age_s))

    assert alone.state(dead) is MemberState.ALIVE


def test_who_has_left_comes_back_with_a_new_life_only() -> None:
    alone = Alone(3)
    leaver = alone.names[2]
    alone.hear(alone.names[0], alone.rumour(RumourKind.LEFT, leaver))
    alone.now_s += 5.0

    alone.hear(alone.names[1], alone.status(leaver, 99))
    assert alone.state(leaver) is MemberState.LEFT
    alone.hear(alone.names[1], alone.status(leaver, 0, epoch=EPOCH + 1))

    assert alone.state(leaver) is MemberState.ALIVE


def test_a_node_that_has_slept_accuses_nobody_of_what_it_has_missed() -> None:
    alone = Alone(6)
    alone.pass_time(3.0)
    alone.pass_time(1.2)
    alone.effects.clear()

    alone.now_s += 30.0
    alone.tell(TimePassed())
    assert alone.machine.health > 0
    alone.pass_time(1.5)

    assert sections_to(alone.effects, Rumours) == []


def test_status_keeps_to_the_budget_and_a_death_goes_all_the_same() -> None:
    alone = Alone(30, budget_bytes_per_s=2_000.0)
    alone.pass_time(5.0)
    alone.effects.clear()
    began_s = alone.now_s
    for seq in range(2, 80):
        statuses = [alone.status(name, seq, limit=EVERYBODY) for name in alone.names]
        for half in (statuses[:15], statuses[15:]):
            alone.hear(alone.names[seq % 30], *half)
        alone.pass_time(0.25)
    spent = sum(
        len(effect.payload) + OVERHEAD_BYTES
        for effect in alone.effects
        if isinstance(effect, SendDatagram)
    )
    # What may have been saved before comes on top, and probes and confirmations do not wait.
    assert spent < 2_000.0 * (alone.now_s - began_s) * 1.25 + 4_000

    alone.effects.clear()
    death = alone.rumour(RumourKind.DEAD, alone.names[5], seq=99, limit=EVERYBODY)
    alone.hear(alone.names[0], death)
    alone.pass_time(0.01)

    told = [address for address, _ in sections_to(alone.effects, Rumours)]
    assert len(set(told)) == 5


def test_profiles_are_asked_of_who_has_told_of_most_and_of_who_has_waited_longest() -> None:
    alone = Alone(6)
    alone.effects.clear()
    told = {
        "other0:1": 1,
        "other1:1": 2,
        "other2:1": 5,
        "other3:1": 4,
        "other4:1": 3,
        "other5:1": 9,
    }
    for sender, count in told.items():
        for number in range(count):
            alone.hear(sender, alone.status(f"new{number}-{sender}", 1))

    alone.pass_time(0.3)

    assert [
        (effect.address, len(section.subjects))
        for effect in alone.effects
        if isinstance(effect, SendDatagram)
        for section in decode_payload(effect.payload)
        if isinstance(section, ProfilesWanted)
    ] == [("other0:1", 1), ("other5:1", 9), ("other2:1", 5), ("other3:1", 4)]


def test_profiles_are_sent_when_there_is_no_budget_left_for_records() -> None:
    alone = Alone(30, budget_bytes_per_s=2_000.0)
    wanted = [ring_id(name) for name in alone.names[:PROFILES_ASKED]]
    while any(
        isinstance(effect, SendDatagram)
        for effect in alone.hear("other0:1", encode_statuses_wanted(wanted))
    ):
        pass

    assert alone.hear("other0:1", encode_profiles_wanted(wanted))
