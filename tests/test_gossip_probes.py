"""Probes alone: whom they ask when, and what they come to."""

from __future__ import annotations

from random import Random

import pytest

from swarmcache.gossip_probes import (
    DIRECT_PINGS,
    DIRECT_S,
    INDIRECT_S,
    ROUNDS,
    TRIAL_ROUNDS,
    Probes,
    Verdict,
)
from swarmcache.timers import Timers

TARGET = 7


@pytest.mark.parametrize(("trial", "rounds"), [(False, ROUNDS), (True, TRIAL_ROUNDS)])
def test_who_does_not_answer_is_asked_again_and_then_others_are(trial: bool, rounds: int) -> None:
    timers: Timers[tuple[str, int]] = Timers()
    probes = Probes(Random(1), timers)
    probes.begin(TARGET, 0.0, trial=trial)
    asked: list[tuple[float, int, int]] = []
    verdict = None

    while (now_s := timers.next_at_s()) is not None:
        for _, number in timers.pop_due(now_s):
            due = probes.due(number, now_s)
            if isinstance(due, Verdict):
                verdict = due
            else:
                asked.append((now_s, due.pings, due.rounds))
        probes.check()

    direct_s = DIRECT_PINGS * DIRECT_S
    assert asked == [(DIRECT_S, 2, 0)] + [
        (direct_s + number * INDIRECT_S, 2, number + 1) for number in range(rounds)
    ]
    assert verdict is not None and (verdict.target, verdict.alive) == (TARGET, False)
