"""Who is suspected, and who is gone: what nodes claim of each other, and what of it is believed.

Pure logic: sends nothing. What is news goes on to all others (``gossip.py``).

A *claim* says of a member, in one of its lives, that it is suspected, dead or has left, and who
says so. A suspect has a while to clear itself, the shorter the more accuse it (Lifeguard: Dadgar,
Phillips, Currey 2018); when that is over, it is tried by whoever has accused it, and by others only
much later, for the case that those are gone themselves.

Invariants:

* Who is suspected is a member, and has a deadline. Who is gone is none, and is forgotten in time.
* A suspicion and a death are refuted by the subject alone: by a record of a later life, or by one
  that it has made since. So nobody comes back by an old record, as long as death is remembered for
  longer than any record counts.
* Of one subject only as many accusers are remembered as shorten its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import NamedTuple

from swarmcache.gossip_records import (
    ID_BYTES,
    NodeProfile,
    Rumour,
    RumourKind,
    StatusRecord,
    age_units,
    pack_rumour,
)
from swarmcache.gossip_view import View
from swarmcache.timers import Timers

# A record that is older than this says nothing about whether its subject lives. Death is remembered
# for longer than that.
RECORD_AGE_MAX_S = 600.0
REMEMBER_S = 900.0
GONE_FACTOR = 4
GONE_LEAST = 64
# A death that is older is no news; who asks is told of it nevertheless.
GOSSIP_DEATH_S = 60.0
# memberlist's values for a local network are 4 and 6. With 1,000 nodes these are 9 s and 54 s.
SUSPICION_FACTOR = 3.0
SUSPICION_MAX_FACTOR = 6.0
CONFIRMATIONS = 2
ACCUSE_EVERY_S = 1.0
# A suspect's record clears it if it was made so long after the accusation: ages are rounded, and
# leave out the ways through the network.
MARGIN_S = 1.0
EVERYBODY = ID_BYTES * 8  # the reach (``View.reach``) of what this node itself claims
assert REMEMBER_S > RECORD_AGE_MAX_S


class Claim(NamedTuple):
    """A rumour as it is remembered: with the time, on this node's clock, since when it holds."""

    kind: RumourKind
    subject: int
    epoch: int
    seq: int
    origin: int
    since_s: float

    def packed(self, now_s: float) -> bytes:
        """As it travels now."""
        return pack_rumour(Rumour(*self[:5], age_units(now_s - self.since_s)))


@dataclass(slots=True)
class Suspicion:
    """Of a member: since when. ``origins``: who has accused it, and with which ``reach`` this node
    was told. ``mine``: this node has, and will judge."""

    claim: Claim
    origins: dict[int, int]
    mine: bool


@dataclass(slots=True)
class Gone:
    """A former member, dead or left. ``origins``: as in ``Suspicion``."""

    claim: Claim
    origins: dict[int, int]
    profile: NodeProfile | None
    body: bytes | None
    made_s: float


class Heard(Enum):
    """What a claim of somebody else was: to be passed on (``GONE``: and by it a member is gone),
    known already or not worth knowing, or refuted by what this node knows."""

    NEWS = 1
    GONE = 2
    KNOWN = 3
    REFUTED = 4


class Claims:
    """What one node believes of members and former members.

    ``timers``: those of the whole machine, which at each "suspect" tries the suspect, and calls
    ``forgotten`` at each "forget". ``gone``: by subject; not to be changed by others.
    """

    def __init__(self, view: View, timers: Timers[tuple[str, int]], rng: Random) -> None:
        self.gone: dict[int, Gone] = {}
        self._suspicions: dict[int, Suspicion] = {}
        self._view = view
        self._timers = timers
        self._rng = rng
        self._accused_s = -math.inf

    # --- what this node itself has found out ----------------------------------------------------

    def accuse(self, index: int, now_s: float) -> Claim | None:
        """This member does not answer: what to tell it and all others, if anything."""
        if now_s - self._accused_s < ACCUSE_EVERY_S:
            return None
        self._accused_s = now_s
        view = self._view
        subject, epoch = view.ids[index], view.epoch(index)
        suspicion = self._suspicions.get(subject)
        if suspicion is not None:
            if suspicion.mine or len(suspicion.origins) > CONFIRMATIONS:
                return None
            epoch = suspicion.claim.epoch
        seq = view.seq(index)
        claim = Claim(RumourKind.SUSPECT, subject, epoch, seq, view.own_id, now_s)
        self._suspect(claim, index, EVERYBODY, now_s)
        return claim

    def convict(self, index: int, now_s: float) -> Claim:
        """This member was tried, and is dead: what to tell it and all others."""
        view = self._view
        subject, epoch, seq = view.ids[index], view.epoch(index), view.seq(index)
        claim = Claim(RumourKind.DEAD, subject, epoch, seq, view.own_id, now_s)
        self._bury(claim, index, EVERYBODY, now_s)
        return claim

    def acquit(self, subject: int) -> None:
        """It has answered, so it is not suspected here any more, if it was."""
        if self._suspicions.pop(subject, None) is not None:
            self._timers.set(("suspect", subject), None)
            self._view.set_suspected(self._view.find(subject), suspected=False)

    def put_off(self, subject: int, now_s: float) -> None:
        """Try it again later."""
        self._timers.set(("suspect", subject), now_s + self.suspicion_s(CONFIRMATIONS))

    def forgive(self, now_s: float) -> None:
        """This node has slept: whom it has accused has a while to clear itself, from now on."""
        for subject, suspicion in self._suspicions.items():
            at_s = self._timers.at_s(("suspect", subject))
            if suspicion.mine and at_s is not None:
                self._timers.set(("suspect", subject), max(at_s, now_s + self.suspicion_s(2)))

    def suspicion_of(self, subject: int) -> Claim | None:
        """What it is to be told of itself, if it is suspected."""
        suspicion = self._suspicions.get(subject)
        return None if suspicion is None else suspicion.claim

    def suspicion_s(self, confirmations: int) -> float:
        """How long a suspect has to clear itself: the shorter the more confirm the suspicion."""
        nodes = len(self._view) + 1
        least_s = SUSPICION_FACTOR * max(math.log10(nodes), 1.0)
        most_s = SUSPICION_MAX_FACTOR * least_s
        part = math.log(confirmations + 1) / math.log(CONFIRMATIONS + 1)
        return max(most_s - (most_s - least_s) * part, least_s)

    # --- what others say ------------------------------------------------------------------------

    def hear(self, claim: Claim, reach: int, now_s: float) -> Heard:
        """Another node claims this, of somebody else than this node."""
        index = self._view.find(claim.subject)
        if index < 0:
            return Heard.NEWS if self._is_news_of_stranger(claim, reach, now_s) else Heard.KNOWN
        if self._is_refuted(claim, index):
            return Heard.REFUTED
        if claim.kind is not RumourKind.SUSPECT:
            self._bury(claim, index, reach, now_s)
            return Heard.GONE
        suspicion = self._suspicions.get(claim.subject)
        if suspicion is not None and not _adds(suspicion.origins, claim.origin, reach):
            return Heard.KNOWN
        self._suspect(claim, index, reach, now_s)
        return Heard.NEWS

    def hear_of(self, subject: int, epoch: int, made_s: float) -> None:
        """A record that this member has made then has come: it may clear it."""
        suspicion = self._suspicions.get(subject)
        if suspicion is not None and _clears(epoch, made_s, suspicion.claim):
            self.acquit(subject)

    def denial_of(self, record: StatusRecord, made_s: float) -> Claim | None:
        """What is known of somebody who is no member and refutes this record, if anything does."""
        gone = self.gone.get(record.subject)
        if gone is None or _returns(record, made_s, gone.claim):
            return None
        return gone.claim

    def readmit(self, subject: int) -> Gone | None:
        """It is a member again: who it was, if it was one."""
        gone = self.gone.pop(subject, None)
        if gone is not None:
            self._timers.set(("forget", subject), None)
        return gone

    def forgotten(self, subject: int) -> None:
        """A "forget" has come."""
        del self.gone[subject]

    def _is_refuted(self, claim: Claim, index: int) -> bool:
        view = self._view
        if claim.kind is RumourKind.LEFT:
            return view.epoch(index) > claim.epoch
        return _clears(view.epoch(index), view.made_s[index], claim)

    def _is_news_of_stranger(self, claim: Claim, reach: int, now_s: float) -> bool:
        if claim.kind is RumourKind.SUSPECT:
            return False
        gone = self.gone.get(claim.subject)
        if gone is None:
            if now_s - claim.since_s > GOSSIP_DEATH_S:
                return False
            self._remember(Gone(claim, {claim.origin: reach}, None, None, claim.since_s), now_s)
            return True
        if claim.epoch < gone.claim.epoch or not _adds(gone.origins, claim.origin, reach):
            return False
        if claim.epoch > gone.claim.epoch:
            gone.claim = claim
        gone.origins[claim.origin] = reach
        return True

    # --- what is remembered of it ---------------------------------------------------------------

    def _suspect(self, claim: Claim, index: int, reach: int, now_s: float) -> None:
        """Take note of an accusation."""
        subject = claim.subject
        suspicion = self._suspicions.get(subject)
        if suspicion is None:
            suspicion = self._suspicions[subject] = Suspicion(claim, {}, mine=False)
            self._view.set_suspected(index, suspected=True)
        suspicion.origins[claim.origin] = reach
        suspicion.mine = suspicion.mine or claim.origin == self._view.own_id
        since_s = suspicion.claim.since_s
        if suspicion.mine:
            at_s = since_s + self.suspicion_s(len(suspicion.origins) - 1)
        else:  # the others judge, unless they are gone themselves
            at_s = since_s + self.suspicion_s(0) + self._rng.random() * self.suspicion_s(0)
        self._timers.set(("suspect", subject), max(at_s, now_s))

    def _bury(self, claim: Claim, index: int, reach: int, now_s: float) -> None:
        view = self._view
        profile, body, made_s = view.profiles[index], view.body(index), view.made_s[index]
        self.acquit(claim.subject)
        view.remove(index)
        self._remember(Gone(claim, {claim.origin: reach}, profile, body, made_s), now_s)

    def _remember(self, gone: Gone, now_s: float) -> None:
        self.gone[gone.claim.subject] = gone
        self._timers.set(("forget", gone.claim.subject), now_s + REMEMBER_S)
        if len(self.gone) > GONE_FACTOR * max(len(self._view), GONE_LEAST):
            self.readmit(next(iter(self.gone)))

    def check(self) -> None:
        """Assert the invariants."""
        view = self._view
        for subject, suspicion in self._suspicions.items():
            index = view.find(subject)
            assert index >= 0 and view.suspected[index], "a suspicion of somebody who is not here"
            assert self._timers.at_s(("suspect", subject)) is not None, "suspected for ever"
            assert 1 <= len(suspicion.origins) <= CONFIRMATIONS + 1, "accused by too many"
        assert sum(view.suspected) == len(self._suspicions), "suspected for no reason"
        for subject in self.gone:
            assert view.find(subject) < 0, "gone and here"
            assert self._timers.at_s(("forget", subject)) is not None, "gone for ever"
        assert view.own_id not in self.gone, "a node that thinks itself dead"


def _adds(origins: dict[int, int], origin: int, reach: int) -> bool:
    """Whether it is worth knowing that this one says so as well, or was heard farther away."""
    known = origins.get(origin)
    return len(origins) <= CONFIRMATIONS if known is None else reach > known


def _clears(epoch: int, made_s: float, claim: Claim) -> bool:
    """Whether a record refutes a suspicion, or a death: it is of a later life, or was made
    since."""
    return epoch > claim.epoch or (epoch == claim.epoch and made_s > claim.since_s + MARGIN_S)


def _returns(record: StatusRecord, made_s: float, claim: Claim) -> bool:
    """Whether the subject of a record is back, of which this was claimed."""
    if record.epoch != claim.epoch:
        return record.epoch > claim.epoch
    lately = record.seq > claim.seq and made_s > claim.since_s + MARGIN_S
    return lately and claim.kind is RumourKind.DEAD
