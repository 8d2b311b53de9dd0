"""Which nodes hold some file versions right now: whom to ask, and when to ask nobody any more.

Pure logic: ``locator.py`` connects to nodes and asks them.

The tracker knows who has announced a replica, which is no proof: the copy may have been touched or
removed since, by somebody who did not tell. So each node that it names is asked, about all of the
file versions at once: where there are more holders than the tracker names, one that it has named
for one file may well hold the next one too.

Invariant: no node is asked twice, at most ``ASKED_AT_ONCE`` at a time, and the survey ends within
``SURVEY_S``, or as soon as enough holders are known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from swarmcache.messages import Holders, NodeAddress, ReplicaPlace
from swarmcache.peer_events import TimePassed

ASKED_AT_ONCE = 32
# One node: to connect, to prove who it is, to look at some files. It takes milliseconds; a node
# whose disk is busy may need some more, and one that takes longer than this is no place for a job.
ANSWER_S = 3.0
SURVEY_S = 8.0


@dataclass(slots=True)
class SurveyWanted:
    """Begin."""


@dataclass(slots=True)
class HolderAnswered:
    """A node has told of each file version where it holds it, or None."""

    node: str
    places: list[ReplicaPlace | None]


@dataclass(slots=True)
class HolderSilent:
    """A node cannot be reached, or its answer makes no sense. ``reason`` is for people."""

    node: str
    reason: str


SurveyEvent: TypeAlias = SurveyWanted | HolderAnswered | HolderSilent | TimePassed


@dataclass(slots=True)
class AskHolder:
    """Ask this node. Ends in ``HolderAnswered`` or ``HolderSilent``, or with ``StopAsking``."""

    address: NodeAddress


@dataclass(slots=True)
class StopAsking:
    """The answer of this node is not waited for any longer."""

    node: str


@dataclass(slots=True)
class SurveyEnded:
    """``found``, ``more`` and ``silent`` are final. Nobody is being asked."""


SurveyEffect: TypeAlias = AskHolder | StopAsking | SurveyEnded


class HolderSurvey:
    """One survey. ``handle`` ``SurveyWanted`` first."""

    def __init__(self, holders: Sequence[Holders], wanted: Sequence[int | None]) -> None:
        """``holders``: what the tracker says of each file version. ``wanted``: how many holders are
        enough, for each; None for all that can be found."""
        assert len(holders) == len(wanted), "one number for each file version"
        self._holders = holders
        self._wanted = wanted
        self._named = [{address.node for address in each.nodes} for each in holders]
        enough = [number for number, most in enumerate(wanted) if most is None or most > 0]
        self._addresses = {a.node: a for number in enough for a in holders[number].nodes}
        self._ranks = {node: rank for rank, node in enumerate(self._addresses)}
        self._waiting = deque(self._addresses.values())
        self._asked: dict[str, float] = {}  # until when an answer is waited for
        self._answers: dict[str, list[ReplicaPlace | None]] = {}
        self._silent: dict[str, str] = {}
        self._ends_at_s = 0.0
        self._ended = False

    # --- the three calls of every machine -------------------------------------------------------

    def handle(self, event: SurveyEvent, now_s: float) -> list[SurveyEffect]:
        """Apply one event; return what must now be done, in order."""
        if self._ended:
            return []
        effects: list[SurveyEffect] = []
        match event:
            case SurveyWanted():
                self._ends_at_s = now_s + SURVEY_S
            case HolderAnswered():
                self._take_answer(event)
            case HolderSilent():
                if self._asked.pop(event.node, None) is not None:
                    self._silent[event.node] = event.reason
            case TimePassed():
                self._give_up_on_late(now_s, effects)
        if self._known_enough() or now_s >= self._ends_at_s:
            self._waiting.clear()
            effects += [StopAsking(node) for node in self._asked]
            self._asked.clear()
        while self._waiting and len(self._asked) < ASKED_AT_ONCE:
            address = self._waiting.popleft()
            self._asked[address.node] = min(now_s + ANSWER_S, self._ends_at_s)
            effects.append(AskHolder(address))
        if not self._asked:
            self._ended = True
            effects.append(SurveyEnded())
        return effects

    def wake_at_s(self) -> float | None:
        """When ``TimePassed`` is next due, or None. Ask again after every ``handle``."""
        return min(self._asked.values(), default=None)

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self._asked) <= ASKED_AT_ONCE, "too many nodes are being asked"
        waiting = {address.node for address in self._waiting}
        groups = (waiting, self._asked.keys(), self._answers.keys(), self._silent.keys())
        assert sum(map(len, groups)) <= len(self._ranks), "a node would be asked twice"
        assert not (self._ended and self._asked), "ended while somebody is being asked"

    # --- the result -----------------------------------------------------------------------------

    def found(self, number: int) -> list[tuple[NodeAddress, ReplicaPlace]]:
        """The holders of one file version and where they hold it: as many as wanted, those first
        that the tracker heard of first."""
        return self._all_found(number)[: self._wanted[number]]

    def more(self, number: int) -> int:
        """How many more nodes may hold that file version: they were not asked, or not listed."""
        yes = {address.node for address, _ in self._all_found(number)}
        no = self._named[number] & (self._answers.keys() | self._silent.keys()) - yes
        unknown = max(0, self._holders[number].count - len(yes) - len(no))
        return unknown + len(yes) - len(self.found(number))

    def silent(self) -> list[tuple[NodeAddress, str]]:
        """The nodes that have not answered, and why."""
        return [(self._addresses[node], reason) for node, reason in self._silent.items()]

    # --- inside ---------------------------------------------------------------------------------

    def _take_answer(self, event: HolderAnswered) -> None:
        if self._asked.pop(event.node, None) is None:
            return  # too late
        if len(event.places) == len(self._holders):
            self._answers[event.node] = event.places
        else:
            self._silent[event.node] = "its answer makes no sense"

    def _give_up_on_late(self, now_s: float, effects: list[SurveyEffect]) -> None:
        for node in [node for node, until_s in self._asked.items() if now_s >= until_s]:
            del self._asked[node]
            self._silent[node] = "it did not answer in time"
            effects.append(StopAsking(node))

    def _known_enough(self) -> bool:
        """Whether there are as many holders of each file version as were wanted."""
        if any(most is None for most in self._wanted):
            return False
        return all(
            len(self._all_found(number)) >= most
            for number, most in enumerate(self._wanted)
            if most is not None
        )

    def _all_found(self, number: int) -> list[tuple[NodeAddress, ReplicaPlace]]:
        return [
            (self._addresses[node], place)
            for node in sorted(self._answers, key=self._ranks.__getitem__)
            if (place := self._answers[node][number]) is not None
        ]
