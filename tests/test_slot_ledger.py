"""The slots of one file server: never too many, and nobody is passed over."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarmcache.slot_ledger import SlotLedger

SLOTS = 3
claims = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
users = st.sampled_from(["ada", "bob", "eve"])


class Ledger(RuleBasedStateMachine):
    """Whatever is asked of it, a slot has one lease until it is given back or runs out."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = SlotLedger(SLOTS)
        self.now_s = 0.0
        self.next_id = 1
        self.out: dict[int, float] = {}
        self.standing: dict[tuple[bytes, str], None] = {}

    @rule(claim=claims, user=users)
    def claim(self, claim: bytes, user: str) -> None:
        self.ledger.claim(claim, user)
        self.standing.setdefault((claim, user))

    @rule(claim=claims, user=users)
    def withdraw(self, claim: bytes, user: str) -> None:
        self.ledger.withdraw(claim, user)
        self.standing.pop((claim, user), None)

    @precondition(lambda self: self.ledger.free and self.standing)
    @rule(lease_s=st.integers(1, 5))
    def grant(self, lease_s: int) -> None:
        claim, user = next(self.ledger.waiting())
        self.ledger.grant(self.next_id, claim, "node", user, self.now_s + lease_s)
        self.out[self.next_id] = self.now_s + lease_s
        self.next_id += 1

    @precondition(lambda self: not self.ledger.free)
    @rule()
    def grant_without_a_free_slot(self) -> None:
        with pytest.raises(AssertionError, match="no slot is free"):
            self.ledger.grant(self.next_id, b"a", "node", "ada", self.now_s + 1)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.out)))
        released = self.ledger.release(lease_id)
        assert released is not None
        assert released.lease_id == lease_id
        assert self.ledger.release(lease_id) is None
        del self.out[lease_id]

    @precondition(lambda self: self.out)
    @rule(data=st.data(), until_s=st.integers(0, 60))
    def renew(self, data: st.DataObject, until_s: int) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.out)))
        self.ledger.renew(lease_id, float(until_s))
        self.out[lease_id] = max(self.out[lease_id], float(until_s))

    @rule(passed_s=st.integers(0, 3))
    def time_passes(self, passed_s: int) -> None:
        self.now_s += passed_s
        expired = {lease.lease_id for lease in self.ledger.expired(self.now_s)}
        assert expired == {key for key, until_s in self.out.items() if until_s <= self.now_s}
        for lease_id in expired:
            self.ledger.release(lease_id)
            del self.out[lease_id]

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        self.ledger.check()
        assert self.ledger.leases.keys() == self.out.keys()
        assert len(self.out) <= SLOTS
        assert self.ledger.free == SLOTS - len(self.out)
        assert self.ledger.next_expiry_s() == min(self.out.values(), default=None)
        assert Counter(self.ledger.waiting()) == Counter(self.standing.keys())


TestLedger = pytest.mark.slow(Ledger.TestCase)
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def served(ledger: SlotLedger, count: int) -> list[tuple[bytes, str]]:
    """Who gets the next slots, when each is given back at once."""
    turns = []
    for lease_id in range(count):
        claim, user = next(ledger.waiting())
        turns.append((claim, user))
        ledger.grant(lease_id, claim, "node", user, 1.0)
        ledger.release(lease_id)
    return turns


def test_users_take_turns_whatever_the_number_of_their_claims() -> None:
    ledger = SlotLedger(1)
    for number in range(50):
        ledger.claim(b"ada %d" % number, "ada")
    ledger.claim(b"bob", "bob")
    ledger.claim(b"eve", "eve")

    users_served = [user for _, user in served(ledger, 9)]

    assert users_served == ["ada", "bob", "eve"] * 3


def test_within_one_user_the_first_to_come_is_served_first() -> None:
    ledger = SlotLedger(1)
    for claim in (b"second", b"first", b"third"):
        ledger.claim(claim, "ada")
    ledger.claim(b"second", "ada")

    assert [claim for claim, _ in ledger.waiting()] == [b"second", b"first", b"third"]
    ledger.withdraw(b"second", "ada")
    assert next(ledger.waiting()) == (b"first", "ada")


def test_nobody_starves_while_others_come_and_go() -> None:
    ledger = SlotLedger(1)
    ledger.claim(b"patient", "bob")
    waited = 0
    for number in range(20):
        claim = b"%d" % number
        ledger.claim(claim, f"user {number}")
        first, user = next(ledger.waiting())
        ledger.grant(number, first, "node", user, 1.0)
        ledger.release(number)
        ledger.withdraw(first, user)
        if first == b"patient":
            break
        waited += 1

    assert waited <= 1


def test_all_claims_are_offered_users_in_turn() -> None:
    ledger = SlotLedger(1)
    for claim, user in [(b"a1", "ada"), (b"a2", "ada"), (b"a3", "ada"), (b"b1", "bob")]:
        ledger.claim(claim, user)

    assert [claim for claim, _ in ledger.waiting()] == [b"a1", b"b1", b"a2", b"a3"]


def test_leases_of_an_earlier_life_may_exceed_the_limit_and_then_nothing_is_free() -> None:
    ledger = SlotLedger(1)
    ledger.adopt(1, b"a", "node1", "ada", 5.0)
    ledger.adopt(2, b"a", "node2", "ada", 6.0)

    assert ledger.free == 0
    ledger.release(1)
    assert ledger.free == 0
    ledger.release(2)
    assert ledger.free == 1


def test_a_lease_id_is_used_once() -> None:
    ledger = SlotLedger(2)
    ledger.adopt(1, b"a", "node", "ada", 5.0)

    with pytest.raises(AssertionError, match="used twice"):
        ledger.adopt(1, b"b", "node", "ada", 5.0)


def test_renewing_never_shortens() -> None:
    ledger = SlotLedger(1)
    ledger.adopt(1, b"a", "node", "ada", 5.0)

    ledger.renew(1, 4.0)

    assert ledger.next_expiry_s() == 5.0
