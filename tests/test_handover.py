"""When a tracker grants nothing, since another may have done so in its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.handover import (
    AT_ONCE_S,
    AWAY_MAX_S,
    HANDOVER_S,
    PRESENT_S,
    STAND_IN_GRANTS_S,
    STAND_IN_NOTICES_S,
    Handover,
)

T0 = 1000.0


class Life:
    """A life of a tracker, which is woken whenever it wants."""

    def __init__(self, away_s: float | None = None, grants_from_s: float = 0.0) -> None:
        self.now_s = T0
        self.handover = Handover(T0, away_s, grants_from_s)

    def go_on(self, duration_s: float) -> None:
        end_s = self.now_s + duration_s
        while self.handover.present_at_s <= end_s:
            self.now_s = self.handover.present_at_s
            self.handover.at(self.now_s)
            assert self.handover.present(self.now_s) is not self.handover.holding
        self.stand_still(end_s - self.now_s)

    def stand_still(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.handover.at(self.now_s)
        self.handover.check()

    def register(self, node: str, *, stood_in: bool = False) -> None:
        self.handover.registered(node, stood_in, self.now_s)

    def lose(self, node: str, left: int) -> None:
        self.handover.lost(node, self.now_s, left)

    def held_s(self) -> float:
        """For how long nothing more is granted."""
        begin_s = self.now_s
        while self.handover.holding:
            self.go_on(0.25)
        return self.now_s - begin_s


@pytest.mark.parametrize(
    ("away_s", "held_s"), [(None, 0.0), (AWAY_MAX_S, 0.0), (AWAY_MAX_S + 0.1, HANDOVER_S)]
)
def test_a_tracker_that_was_away_for_long_waits_for_the_leases_of_a_stand_in(
    away_s: float | None, held_s: float
) -> None:
    assert Life(away_s).held_s() == held_s


def test_a_stand_in_waits_until_its_time() -> None:
    assert Life(grants_from_s=T0 + 4.5).held_s() == 4.5


@given(st.floats(0.0, 20.0), st.floats(0.0, 3 * PRESENT_S))
def test_a_tracker_that_has_stood_still_waits_if_somebody_may_have_granted_meanwhile(
    still_s: float, before_s: float
) -> None:
    life = Life()
    life.go_on(before_s)

    life.stand_still(still_s)

    if still_s > AWAY_MAX_S:
        assert life.handover.holding
    if still_s < AWAY_MAX_S - PRESENT_S:
        assert not life.handover.holding


@given(st.floats(0.0, 30.0))
def test_nothing_is_granted_while_leases_of_a_stand_in_may_be_out(away_s: float) -> None:
    """A stand-in grants from its time on until it notices, and each lease lasts three seconds."""
    life = Life(away_s)
    noticed_s = away_s + STAND_IN_NOTICES_S
    leases_end_s = noticed_s + 3.0 if noticed_s > STAND_IN_GRANTS_S else 0.0

    assert away_s + life.held_s() >= leases_end_s


def test_a_tracker_that_nobody_stood_in_for_grants_while_it_is_there() -> None:
    life = Life()
    for _ in range(3):
        life.register("a")
        life.go_on(100.0)
        life.lose("a", 0)
        life.go_on(100.0)

    life.register("a")
    life.register("b")

    assert not life.handover.holding


def test_a_tracker_that_has_lost_all_its_nodes_waits_for_what_others_may_hold() -> None:
    life = Life()
    for node in "abc":
        life.register(node)
    life.go_on(60.0)
    for left, node in enumerate("cba"):
        life.lose(node, 2 - left)
        life.go_on(2.0)

    life.register("a")

    assert life.held_s() == HANDOVER_S


def test_a_node_that_was_lost_long_ago_holds_up_nobody() -> None:
    life = Life()
    life.register("a")
    life.register("b")
    life.lose("b", 1)
    life.go_on(AT_ONCE_S + 1)
    life.lose("a", 0)

    life.register("a")

    assert not life.handover.holding


def test_a_new_tracker_is_told_of_a_stand_in_and_waits_once() -> None:
    life = Life()
    life.register("a", stood_in=True)
    life.go_on(2.0)
    life.register("b", stood_in=True)

    assert life.held_s() == HANDOVER_S - 2.0
    life.handover.granted()
    life.register("c", stood_in=True)
    assert not life.handover.holding


def test_granting_too_early_is_a_bug() -> None:
    life = Life(away_s=10.0)

    with pytest.raises(AssertionError, match="granted while"):
        life.handover.granted()
