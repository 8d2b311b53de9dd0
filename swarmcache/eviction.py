"""Which replicas to give up so that a new file fits.

Pure logic: candidates in, choice out. Who is a candidate (old enough, not pinned, not in use), and
all that has to be done to take one away, is the caller's. A policy is one small function, so that
others can be compared with it.

Invariant: what is chosen frees enough, and no single one of the victims could be spared; where all
candidates together are not enough, none is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could go. ``freed_bytes``: what that would give back. ``last_used_s``: the
    later of the last answer and real use."""

    version_id: bytes
    freed_bytes: int
    last_used_s: float


# What a replica is worth at ``now_s``; those that are worth least go first.
Policy = Callable[[Candidate, float], float]


def least_recently_used(candidate: Candidate, now_s: float) -> float:
    """What was used last is worth most."""
    return candidate.last_used_s - now_s


def choose_victims(
    candidates: Iterable[Candidate],
    wanted_bytes: int,
    now_s: float,
    policy: Policy = least_recently_used,
) -> list[Candidate]:
    """The candidates that are worth least until they free ``wanted_bytes``, in this order.

    Empty when all together would not. Ties are decided by version id.
    """
    order = sorted(candidates, key=lambda each: (policy(each, now_s), each.version_id))
    victims: list[Candidate] = []
    freed_bytes = 0
    for candidate in order:
        if freed_bytes >= wanted_bytes:
            break
        victims.append(candidate)
        freed_bytes += candidate.freed_bytes
    if freed_bytes < wanted_bytes:
        return []
    return _without_needless(victims, freed_bytes - wanted_bytes)


def _without_needless(victims: list[Candidate], spare_bytes: int) -> list[Candidate]:
    """Let go of victims that a bigger one, chosen after them, has made needless; the most worth
    ones first."""
    needed: list[Candidate] = []
    for victim in reversed(victims):
        if victim.freed_bytes <= spare_bytes:
            spare_bytes -= victim.freed_bytes
        else:
            needed.append(victim)
    return needed[::-1]
