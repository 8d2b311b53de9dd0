"""Who is suspected, who is gone, and who comes back."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.gossip_claims import (
    CONFIRMATIONS,
    GONE_FACTOR,
    GONE_LEAST,
    GOSSIP_DEATH_S,
    MARGIN_S,
    REMEMBER_S,
    Claim,
    Claims,
    Heard,
)
from swarmcache.gossip_records import BODY_BYTES, RumourKind, StatusRecord
from swarmcache.gossip_view import View
from swarmcache.timers import Timers

OWN, MEMBER, OTHER, STRANGER = 1, 2, 3, 9
EPOCH = 5
NEAR, FAR = 3, 7


class Node:
    """One node that knows some members, each by a record that was made at 0 s."""

    def __init__(self, members: tuple[int, ...] = (MEMBER, OTHER)) -> None:
        self.view = View(OWN, EPOCH)
        self.timers: Timers[tuple[str, int]] = Timers()
        self.claims = Claims(self.view, self.timers, Random(1))
        for member in members:
            self.view.insert(record(member), 0.0, None)

    def hear(
        self, kind: RumourKind, now_s: float, *, origin: int = OTHER, reach: int = NEAR
    ) -> Heard:
        heard = self.claims.hear(claim(kind, now_s, origin=origin), reach, now_s)
        self.claims.check()
        return heard

    def tried_at_s(self) -> float:
        at_s = self.timers.at_s(("suspect", MEMBER))
        assert at_s is not None
        return at_s

    def is_suspected(self) -> bool:
        return bool(self.view.suspected[self.view.find(MEMBER)])


def record(subject: int, epoch: int = EPOCH, seq: int = 1) -> StatusRecord:
    return StatusRecord(subject, epoch, seq, 0, bytes(BODY_BYTES))


def claim(kind: RumourKind, since_s: float, *, subject: int = MEMBER, origin: int = OTHER) -> Claim:
    return Claim(kind, subject, EPOCH, 1, origin, since_s)


def test_a_suspect_is_cleared_by_what_it_has_made_since_and_by_nothing_older() -> None:
    node = Node()
    assert node.hear(RumourKind.SUSPECT, 10.0) is Heard.NEWS
    node.claims.hear_of(MEMBER, EPOCH, 10.0 + MARGIN_S)
    assert node.is_suspected()

    node.claims.hear_of(MEMBER, EPOCH, 10.1 + MARGIN_S)

    assert not node.is_suspected()
    node.claims.check()


def test_a_suspect_is_cleared_by_another_life() -> None:
    node = Node()
    node.hear(RumourKind.SUSPECT, 10.0)
    node.claims.hear_of(MEMBER, EPOCH + 1, 0.0)
    assert not node.is_suspected()


def test_whoever_accuses_tries_sooner_the_more_confirm_it() -> None:
    node = Node()
    assert node.claims.accuse(node.view.find(MEMBER), 10.0) is not None
    alone_s = node.tried_at_s()
    node.hear(RumourKind.SUSPECT, 10.0, origin=OTHER)
    confirmed_s = node.tried_at_s()
    node.hear(RumourKind.SUSPECT, 10.0, origin=STRANGER)
    twice_confirmed_s = node.tried_at_s()

    assert alone_s > confirmed_s > twice_confirmed_s > 10.0
    assert twice_confirmed_s == 10.0 + node.claims.suspicion_s(CONFIRMATIONS)


def test_those_who_have_accused_nobody_try_only_after_those_who_have() -> None:
    accuser, other = Node(), Node()
    accuser.claims.accuse(accuser.view.find(MEMBER), 10.0)
    other.hear(RumourKind.SUSPECT, 10.0)
    assert other.tried_at_s() > accuser.tried_at_s()


def test_a_node_accuses_one_member_in_a_second() -> None:
    node = Node()
    assert node.claims.accuse(node.view.find(MEMBER), 10.0) is not None
    assert node.claims.accuse(node.view.find(OTHER), 10.9) is None
    assert node.claims.accuse(node.view.find(OTHER), 11.0) is not None


def test_more_accusers_than_shorten_its_time_are_no_news() -> None:
    node = Node()
    heard = [
        node.hear(RumourKind.SUSPECT, 10.0, origin=10 + number)
        for number in range(CONFIRMATIONS + 2)
    ]
    assert heard == [Heard.NEWS] * (CONFIRMATIONS + 1) + [Heard.KNOWN]


def test_what_is_known_is_news_if_it_comes_with_a_longer_reach() -> None:
    node = Node()
    node.hear(RumourKind.SUSPECT, 10.0, reach=NEAR)
    assert node.hear(RumourKind.SUSPECT, 10.0, reach=NEAR) is Heard.KNOWN
    assert node.hear(RumourKind.SUSPECT, 10.0, reach=FAR) is Heard.NEWS
    assert node.hear(RumourKind.DEAD, 10.0, reach=NEAR) is Heard.GONE
    assert node.hear(RumourKind.DEAD, 10.0, reach=NEAR) is Heard.KNOWN
    assert node.hear(RumourKind.DEAD, 10.0, reach=FAR) is Heard.NEWS


def test_a_claim_is_refuted_by_what_its_subject_has_made_since() -> None:
    node = Node()
    node.view.replace(node.view.find(MEMBER), record(MEMBER, seq=2), 12.0)
    assert node.hear(RumourKind.SUSPECT, 10.0) is Heard.REFUTED
    assert node.hear(RumourKind.DEAD, 10.0) is Heard.REFUTED
    assert node.hear(RumourKind.LEFT, 10.0) is Heard.GONE  # nobody else says so of it


def test_who_was_convicted_comes_back_by_what_it_has_made_since() -> None:
    node = Node()
    node.claims.accuse(node.view.find(MEMBER), 10.0)
    death = node.claims.convict(node.view.find(MEMBER), 20.0)
    node.claims.check()
    assert node.claims.denial_of(record(MEMBER, seq=1), 30.0) == death
    assert node.claims.denial_of(record(MEMBER, seq=2), 20.0) == death
    assert node.claims.denial_of(record(MEMBER, seq=2), 20.1 + MARGIN_S) is None
    assert node.claims.denial_of(record(MEMBER, epoch=EPOCH - 1, seq=9), 90.0) == death
    assert node.claims.denial_of(record(MEMBER, epoch=EPOCH + 1), 0.0) is None


def test_who_has_left_comes_back_only_in_another_life() -> None:
    node = Node()
    node.hear(RumourKind.LEFT, 10.0)
    assert node.claims.denial_of(record(MEMBER, seq=9), 50.0) is not None
    assert node.claims.denial_of(record(MEMBER, epoch=EPOCH + 1), 50.0) is None


def test_who_is_back_is_no_longer_among_the_dead() -> None:
    node = Node()
    node.hear(RumourKind.DEAD, 10.0)
    gone = node.claims.readmit(MEMBER)
    assert gone is not None and gone.made_s == 0.0
    assert node.timers.at_s(("forget", MEMBER)) is None
    assert node.claims.readmit(MEMBER) is None


def test_the_death_of_a_stranger_is_news_while_it_is_young() -> None:
    node = Node()
    old = claim(RumourKind.DEAD, 0.0, subject=STRANGER)
    assert node.claims.hear(old, FAR, GOSSIP_DEATH_S + 1) is Heard.KNOWN
    assert node.claims.hear(old, FAR, GOSSIP_DEATH_S - 1) is Heard.NEWS
    suspected = claim(RumourKind.SUSPECT, 0.0, subject=STRANGER + 1)
    assert node.claims.hear(suspected, FAR, 0.0) is Heard.KNOWN


def test_only_so_many_deaths_are_remembered() -> None:
    node = Node()
    for number in range(GONE_FACTOR * GONE_LEAST + 10):
        death = claim(RumourKind.DEAD, 1.0, subject=100 + number)
        assert node.claims.hear(death, NEAR, 1.0) is Heard.NEWS
    node.claims.check()
    assert len(node.claims.gone) == GONE_FACTOR * GONE_LEAST
    assert 100 not in node.claims.gone


def test_after_a_sleep_whom_this_node_has_accused_has_time_again() -> None:
    node = Node()
    node.claims.accuse(node.view.find(MEMBER), 10.0)
    node.claims.forgive(1000.0)
    assert node.tried_at_s() == 1000.0 + node.claims.suspicion_s(CONFIRMATIONS)


@pytest.mark.parametrize("nodes", [1, 10, 1000])
def test_the_time_of_a_suspect_shrinks_to_a_least(nodes: int) -> None:
    claims = Node(tuple(range(2, 2 + nodes))).claims
    times_s = [claims.suspicion_s(count) for count in range(10)]
    assert times_s == sorted(times_s, reverse=True)
    assert times_s[CONFIRMATIONS] == pytest.approx(times_s[-1])


Step = tuple[str, int, int, float]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["accuse", "convict", "SUSPECT", "DEAD", "LEFT", "record", "answer"]),
            st.integers(2, 5),  # of whom
            st.integers(EPOCH, EPOCH + 2),
            st.floats(0.0, 40.0),  # how long ago
        ),
        max_size=30,
    )
)
def test_whatever_is_claimed_nobody_comes_back_by_a_record_older_than_its_death(
    steps: list[Step],
) -> None:
    node = Node(members=(2, 3, 4))
    claims, view = node.claims, node.view
    now_s = 50.0
    for what, subject, epoch, ago_s in steps:
        now_s += 0.7
        index = view.find(subject)
        said_s = now_s - ago_s
        if what == "record":
            made = record(subject, epoch, seq=int(said_s * 10))
            if index >= 0 and epoch >= view.epoch(index):
                view.replace(index, made, said_s)
                claims.hear_of(subject, epoch, said_s)
            elif index < 0 and claims.denial_of(made, said_s) is None:
                gone = claims.readmit(subject)
                view.insert(made, said_s, None)
                if gone is not None and epoch <= gone.claim.epoch:
                    assert epoch == gone.claim.epoch and said_s > gone.claim.since_s
        elif what == "answer":
            claims.acquit(subject)
        elif what in RumourKind.__members__:
            said = Claim(RumourKind[what], subject, epoch, 1, OTHER, said_s)
            if claims.hear(said, NEAR, now_s) is Heard.GONE:
                assert view.find(subject) < 0 <= index
        elif index >= 0:
            claims.accuse(index, now_s) if what == "accuse" else claims.convict(index, now_s)
        claims.check()
    for subject in list(claims.gone):
        at_s = node.timers.at_s(("forget", subject))
        assert at_s is not None and at_s <= now_s + REMEMBER_S
