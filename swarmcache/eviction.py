"""Which replicas to give up so that a new file fits.

Pure logic: candidates in, choice out. Who is a candidate (old enough, not pinned, not in use), and
all that has to be done to take one away, is the caller's. A policy is one small function, so that
others can be compared with it.

``replicas_elsewhere_first`` is what daemons use. A replica that another node has as well is cheap
to lose: it comes back from there, while the last one costs a read of the file server. Where nothing
is known of other nodes it is the same as ``least_recently_used``.

Invariant: what is chosen frees enough, and no single one of the victims could be spared; where all
candidates together are not enough, none is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# The last replica of a file that was used within this time goes after everything else.
WANTED_S = 3600.0
# Younger ones are equally old.
AGE_MIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could go. ``freed_bytes``: what that would give back. ``last_used_s``: the
    later of the last answer and real use. ``replicas_elsewhere``: how many other nodes are known to
    have it."""

    version_id: bytes
    freed_bytes: int
    last_used_s: float
    replicas_elsewhere: int = 0


Worth = tuple[float, ...]
# What a replica is worth at ``now_s``; those that are worth least go first.
Policy = Callable[[Candidate, float], Worth]


def least_recently_used(candidate: Candidate, now_s: float) -> Worth:
    """What was used last is worth most."""
    return (candidate.last_used_s - now_s,)


def replicas_elsewhere_first(candidate: Candidate, now_s: float) -> Worth:
    """The oldest go first, and of equally old ones those that other nodes have as well; the last
    replica of a file that was wanted within ``WANTED_S`` goes last.

    Equally old are ages between the same two powers of two: how likely a file is to be wanted again
    falls about as 1 / age where some files are far more popular than others, so within a factor of
    two age says less than what it would cost to get the file back.
    """
    age_s = max(now_s - candidate.last_used_s, AGE_MIN_S)
    _, age_class = math.frexp(age_s)
    return (
        not candidate.replicas_elsewhere and age_s < WANTED_S,
        -age_class,
        not candidate.replicas_elsewhere,
        candidate.last_used_s - now_s,
    )


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
