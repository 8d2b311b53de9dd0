"""Is that node there? Asked directly, twice, then through others and over TCP at once.

Pure logic: knows of a probe only who is asked for and what has come back; SWIM (Das, Gupta,
Motivala 2002) with the local health of Lifeguard (Dadgar, Phillips, Currey 2018): a node that may
itself be the trouble is more patient with others, and accuses nobody.

Invariants: a probe ends in one verdict; ``health`` lies between 0 (well) and ``HEALTH_MAX``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from swarmcache.gossip_view import View
from swarmcache.timers import Timers

# SWIM's and memberlist's values for a local network are a probe a second, and half a second for the
# answer. That is enough to ask twice: where a quarter of all packets gets lost, of 100 nodes that
# are there 56 answer the first time, 81 one of both, and asking helpers takes ten datagrams.
PROBE_S = 1.0
DIRECT_S = 0.25
DIRECT_PINGS = 2
INDIRECT_S = 0.75
# Where a quarter of all packets gets lost, a node that is there fails to answer in one round of
# asking others 6 times in 100, in two rounds once in 500. Before it is declared dead it gets
# one more: in a cluster that has just started hardly any helper knows where it is.
ROUNDS = 2
TRIAL_ROUNDS = 3
HELPERS = 3
HEALTH_MAX = 8
# A node that feels worse than this accuses nobody.
ACCUSING_HEALTH_MAX = 4
PROBES_MAX = 256


@dataclass(slots=True)
class Probe:
    """``trial``: of a suspect that is about to be declared dead. ``pings``: sent before anybody is
    asked to help; ``rounds``: of asking ``helpers``. ``heard``: somebody has said something since
    the probe began, so this node is not cut off."""

    target: int
    number: int
    trial: bool
    pings: int = 1
    rounds: int = 0
    helpers: int = 0
    nacks: int = 0
    heard: bool = False


@dataclass(slots=True)
class Verdict:
    """What a probe came to. ``fair``: this node may believe itself that nobody is there."""

    target: int
    alive: bool
    trial: bool
    fair: bool


def _nobody() -> array[int]:
    return array("Q")


@dataclass(slots=True)
class Probes:
    """All probes of one node that are under way.

    ``timers``: those of the whole machine, which calls ``due`` for each "ping". ``helping``: pings
    on behalf of others: by our number, theirs and who they are.
    """

    rng: Random
    timers: Timers[tuple[str, int]]
    health: int = 0
    helping: dict[int, tuple[int, int]] = field(default_factory=dict)
    _probes: dict[int, Probe] = field(default_factory=dict)
    _round: array[int] = field(default_factory=_nobody)
    _numbers: int = 0

    @property
    def patience(self) -> int:
        """By what all times of probes are multiplied."""
        return 1 + self.health

    def feel(self, change: int) -> None:
        """Worse (above 0) or better."""
        self.health = min(max(self.health + change, 0), HEALTH_MAX)

    def new_number(self) -> int:
        """One that is not in use."""
        self._numbers = (self._numbers + 1) & 0xFFFFFFFF
        return self._numbers

    def next_target(self, view: View) -> int | None:
        """Everybody's turn comes once in each round, in an order of its own."""
        for _ in range(2):
            while self._round:
                target = self._round.pop()
                index = view.find(target)
                if index >= 0 and view.profiles[index] is not None and not self.asks_for(target):
                    return target
            self._round = view.ids[:]  # 8 bytes each; a list of them takes 40
            self.rng.shuffle(self._round)
        return None

    def ask_next(self, target: int) -> None:
        """There is reason to ask for this one first."""
        if len(self._round) < 2 or target not in self._round[-4:]:
            self._round.append(target)

    def asks_for(self, target: int) -> bool:
        """It is being probed."""
        return any(probe.target == target for probe in self._probes.values())

    def begin(self, target: int, now_s: float, *, trial: bool) -> Probe | None:
        """A probe, whose ping is to be sent with its number; None if there are too many."""
        if len(self._probes) >= PROBES_MAX:
            return None
        probe = Probe(target, self.new_number(), trial)
        self._probes[probe.number] = probe
        self.timers.set(("ping", probe.number), now_s + DIRECT_S * self.patience)
        return probe

    def next_round(self, probe: Probe, now_s: float) -> None:
        """Everybody is asked now, who can help."""
        probe.rounds += 1
        self.timers.set(("ping", probe.number), now_s + INDIRECT_S * self.patience)

    def heard(self) -> None:
        """A datagram of anybody."""
        for probe in self._probes.values():
            probe.heard = True

    def acked(self, number: int) -> Verdict | None:
        """The answer has come; None if nobody waits for it."""
        probe = self._probes.pop(number, None)
        if probe is None:
            return None
        self.timers.set(("ping", number), None)
        self.feel(-1)
        return Verdict(probe.target, alive=True, trial=probe.trial, fair=True)

    def nacked(self, number: int) -> None:
        """A helper has no answer yet, but is there itself."""
        probe = self._probes.get(number)
        if probe is not None:
            probe.nacks += 1

    def connected(self, target: int) -> Iterator[Verdict]:
        """A connection was accepted: ends the probes of this target."""
        for probe in [each for each in self._probes.values() if each.target == target]:
            del self._probes[probe.number]
            self.timers.set(("ping", probe.number), None)
            yield Verdict(target, alive=True, trial=probe.trial, fair=True)

    def due(self, number: int, now_s: float) -> Probe | Verdict:
        """The deadline of a "ping" has come: the probe needs another ping (while it has had no
        ``rounds``), or help, or here is its verdict."""
        probe = self._probes[number]
        if not probe.rounds and probe.pings < DIRECT_PINGS:
            probe.pings += 1
            self.timers.set(("ping", number), now_s + DIRECT_S * self.patience)
            return probe
        if probe.rounds == (TRIAL_ROUNDS if probe.trial else ROUNDS):
            del self._probes[number]
            return self._without_answer(probe)
        self.next_round(probe, now_s)
        return probe

    def _without_answer(self, probe: Probe) -> Verdict:
        # Whose helpers are silent as well may be cut off itself. (Lifeguard counts each of them; in
        # halves that are cut off from each other nobody would ever be well enough to accuse.)
        silent = probe.helpers - probe.nacks
        if silent >= probe.helpers:
            self.feel(2)
        elif silent > probe.helpers / 2:
            self.feel(1)
        fair = probe.heard and self.health <= ACCUSING_HEALTH_MAX
        return Verdict(probe.target, alive=False, trial=probe.trial, fair=fair)

    def forgive(self) -> None:
        """This node has slept: what did not answer meanwhile is not to blame."""
        for number in self._probes:
            self.timers.set(("ping", number), None)
        self._probes.clear()
        self.feel(1)

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.health <= HEALTH_MAX, "health out of range"
        assert len(self._probes) <= PROBES_MAX, "too many probes"
        for number in self._probes:
            assert self.timers.at_s(("ping", number)) is not None, "a probe without an end"
