"""Who is the tracker for this node: the tracker itself, or a daemon that stands in for it.

Pure logic: ``tracker_client.py`` and the simulator make the connections and say how they ended.

A stand-in is a tracker: it takes the same sessions, runs the same machine, and forgets all when it
ends. Nodes that have lost the tracker turn to the first node of one list: all live members of the
gossip, in the order of a digest of their names. Whoever is first there by its own view, and cannot
reach the tracker either, stands in. Gossip lags behind, so nobody relies on it alone:

* A node asks those before it on the list, and stands in only if none of them answers, or none of
  those who do is able to.
* It asks some of those behind it as well. If one is with the tracker, or with another stand-in, it
  does not stand in. So a newcomer that is first on the list does not divide the cluster.
* Who stands in goes on asking, and trying the tracker, and ends when it hears of either.

A stand-in grants nothing before the leases of its predecessor must have run out. That may have been
a stand-in that is cut off: it knows so ``WATCH_S + CONNECT_S`` later at most, and whoever follows
it has waited for its answer for ``CONNECT_S``. A tracker that was away for long enough to be stood
in for waits in the same way (``handover.py``).

Invariants: this node has one session at most; it stands in only while it is not with the tracker,
nor with another node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import nsmallest
from itertools import dropwhile, islice, takewhile
from random import Random
from typing import TypeAlias

from blake3 import blake3

from swarmcache.handover import LEASE_S, STAND_IN_GRANTS_S
from swarmcache.messages import StandsIn
from swarmcache.peer_events import TimePassed

# Between two attempts to reach the tracker: doubled from the first to the second, for as long as it
# is away. What it takes to notice that it is back, ``STAND_IN_NOTICES_S``, is this and the time
# of one attempt.
RETRY_S = 0.1
RETRY_MAX_S = 1.0
# How long an attempt waits for a machine that does not answer, as does a question to a node. One
# that takes longer has found somebody at the tracker's address: a tracker that has just begun and
# is busy with others, unless attempts end in silence all the time.
CONNECT_S = 1.5
BUSY_S = CONNECT_S + 0.5
# For so long a tracker may be away before anybody looks for a stand-in. To be started again takes
# no longer, and a node has tried several times by then.
AWAY_S = 1.0
# Between two rounds of questions, of who has no tracker and of who stands in.
SEEK_S = 0.5
WATCH_S = 1.0
# How many of the list are asked in one round, and how many of those behind a node that is first.
CANDIDATES_MAX = 6
CHECKS = 3
# A daemon that has just begun knows little of the others: that somebody stands in may take some
# seconds to reach it.
NEWCOMER_S = 15.0
# For how long, and how many, nodes that have asked are known to live.
ASKER_S = 10.0
ASKERS_MAX = 64
ORDERS_MAX = 1 << 14


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live member of the cluster, as the gossip tells."""

    node: str
    standing_in: bool = False


@dataclass(slots=True)
class TrackerReached:
    """A connection to the tracker is up."""


@dataclass(slots=True)
class TrackerUnreachable:
    """An attempt to reach the tracker has failed: nobody is there, or it refuses."""


@dataclass(slots=True)
class TrackerHangs:
    """An attempt has failed: the connection was made, and nothing was said."""


@dataclass(slots=True)
class TrackerGone:
    """The connection to the tracker has ended."""


@dataclass(slots=True)
class NodeTold:
    """The answer of a node that was asked. If it stands in, the connection is open still."""

    node: str
    answer: StandsIn


@dataclass(slots=True)
class NodeSilent:
    """A node that was asked cannot be reached."""

    node: str


@dataclass(slots=True)
class StandInGone:
    """The connection to the stand-in that this node used has ended."""

    node: str


StandInEvent: TypeAlias = (
    TrackerReached
    | TrackerUnreachable
    | TrackerHangs
    | TrackerGone
    | NodeTold
    | NodeSilent
    | StandInGone
    | TimePassed
)


@dataclass(slots=True)
class TryTracker:
    """Connect to the tracker. Ends in ``TrackerReached``, ``TrackerUnreachable`` or
    ``TrackerHangs``."""


@dataclass(slots=True)
class AskNode:
    """Ask a node who is the tracker. Ends in ``NodeTold`` or ``NodeSilent``."""

    node: str


@dataclass(slots=True)
class UseTracker:
    """The connection to the tracker is this node's session, until ``TrackerGone``."""


@dataclass(slots=True)
class UseStandIn:
    """The connection on which this node has answered is the session, until ``StandInGone`` or
    ``LeaveStandIn``."""

    node: str


@dataclass(slots=True)
class LetGo:
    """Close the connection on which this node has answered: it is of no use."""

    node: str


@dataclass(slots=True)
class LeaveStandIn:
    """Close the session with this node. No ``StandInGone`` follows."""

    node: str
    reason: str


@dataclass(slots=True)
class BeginStandingIn:
    """Be the tracker for whoever asks, and grant nothing before ``grants_from_s``."""

    grants_from_s: float


@dataclass(slots=True)
class EndStandingIn:
    """Close all sessions, and forget them."""

    reason: str


StandInEffect: TypeAlias = (
    TryTracker
    | AskNode
    | UseTracker
    | UseStandIn
    | LetGo
    | LeaveStandIn
    | BeginStandingIn
    | EndStandingIn
)


@dataclass(slots=True)
class Round:
    """One round of questions. ``order``: the list. ``checking``: those behind this node are being
    asked. ``sent``: this node follows what another one has said, and does not stand in.
    ``heard``: somebody has answered."""

    order: list[str]
    to_ask: deque[str]
    asked: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    checking: bool = False
    sent: bool = False
    heard: bool = False


@lru_cache(ORDERS_MAX)
def order_of(label: str, node: str) -> bytes:
    """The place of a node on the list of its cluster: the smallest comes first."""
    return blake3(f"{label}\n{node}".encode()).digest(length=16)


class StandIn:
    """The machine: ``handle`` an event, carry out what it returns, ask ``wake_at_s``.

    ``members``: the live members of the cluster; this node may be among them.
    """

    def __init__(
        self,
        node: str,
        label: str,
        members: Callable[[], Iterable[Candidate]],
        rng: Random,
        now_s: float,
    ) -> None:
        self.node = node
        self.with_tracker = False
        self.session: str | None = None  # the stand-in that this node uses
        self.standing_in = False
        self._label = label
        self._members = members
        self._rng = rng
        self._began_s = now_s
        self._others = False  # there were others at the last look
        self._newcomer = True  # never with a tracker or a stand-in
        self._lost_s = now_s  # when this node was last with either
        self._attempt_s: float | None = None  # since when an attempt is under way
        self._hangs = False
        self._failed = False  # an attempt has failed since the tracker was lost
        self._wait_s = RETRY_S
        self._try_at_s: float | None = now_s
        # Who comes before this node and has asked it: so they live, whatever the gossip tells.
        self._askers: dict[str, float] = {}
        self._round: Round | None = None
        self._round_at_s: float | None = now_s + AWAY_S

    # --- the three calls of every machine -------------------------------------------------------

    def handle(self, event: StandInEvent, now_s: float) -> list[StandInEffect]:
        """Apply one event; return what must now be done, in order."""
        effects: list[StandInEffect] = []
        match event:
            case TrackerReached():
                self._reached(effects)
            case TrackerUnreachable() | TrackerHangs():
                self._hangs = isinstance(event, TrackerHangs)
                self._failed = True
                self._attempt_s = None
                self._try_again(now_s)
            case TrackerGone():
                self.with_tracker = False
                self._lose(now_s)
                self._failed = self._hangs = False
                self._wait_s = RETRY_S
                self._try_again(now_s)
            case NodeTold():
                self._told(event.node, event.answer, now_s, effects)
            case NodeSilent():
                self._not_there(event.node, now_s, effects)
            case StandInGone():
                if self.session == event.node:
                    self.session = None
                    self._lose(now_s)
            case TimePassed():
                self._time(now_s, effects)
        return effects

    def wake_at_s(self) -> float | None:
        """When ``TimePassed`` is next due, or None. Ask again after every ``handle``."""
        busy_at_s = None
        if self.standing_in and self._attempt_s is not None and not self._hangs:
            busy_at_s = self._attempt_s + BUSY_S
        times_s = (self._try_at_s, self._round_at_s, busy_at_s)
        return min((at_s for at_s in times_s if at_s is not None), default=None)

    def check(self) -> None:
        """Assert the invariants."""
        assert not (self.with_tracker and self.session is not None), "two sessions"
        assert not (self.with_tracker and self.standing_in), "stands in for a tracker that is there"
        elsewhere = self.session not in (None, self.node)
        assert not (self.standing_in and elsewhere), "stands in, and is with another"
        assert self.session != self.node or self.standing_in, "with itself, and does not stand in"
        assert self.with_tracker or self._attempt_s is not None or self._try_at_s is not None, (
            "the tracker is not tried any more"
        )
        if self._round is not None:
            assert self._round.waiting, "a round that waits for nobody"
            assert self._round_at_s is None, "two rounds"
        elif not self.with_tracker and (self.session is None or self.standing_in):
            assert self._round_at_s is not None, "nobody looks for a stand-in any more"

    # --- asked by others ------------------------------------------------------------------------

    def answer(self, node: str, now_s: float) -> StandsIn:
        """What a node that asks is told. If this node stands in, a session begins with that."""
        if self._before(node, self.node):
            self._askers[node] = now_s
            if len(self._askers) > ASKERS_MAX:
                del self._askers[next(iter(self._askers))]
        by = self.node if self.standing_in else self.session or ""
        return StandsIn(by, tracker=self.with_tracker, able=self._able(now_s))

    def _able(self, now_s: float) -> bool:
        """Whether this node would stand in, if nobody does that is to be preferred."""
        if self.with_tracker or not self._failed or self._tracker_busy(now_s):
            return False
        if now_s < self._lost_s + AWAY_S:
            return False
        if self._newcomer and now_s < self._began_s + NEWCOMER_S:
            return False
        return self._others

    def _tracker_busy(self, now_s: float) -> bool:
        """Somebody is at the tracker's address and says nothing yet."""
        pending = self._attempt_s is not None and now_s >= self._attempt_s + BUSY_S
        return pending and not self._hangs

    # --- the tracker ----------------------------------------------------------------------------

    def _reached(self, effects: list[StandInEffect]) -> None:
        self._attempt_s = self._try_at_s = None
        self._end("the tracker is back", effects)
        self._leave("the tracker is back", effects)
        self.with_tracker = True
        self._newcomer = False
        self._round = self._round_at_s = None
        effects.append(UseTracker())

    def _try_again(self, now_s: float) -> None:
        self._try_at_s = now_s + self._wait_s * self._rng.uniform(0.5, 1.0)
        self._wait_s = min(self._wait_s * 2, RETRY_MAX_S)

    def _time(self, now_s: float, effects: list[StandInEffect]) -> None:
        if self._try_at_s is not None and now_s >= self._try_at_s:
            self._try_at_s = None
            self._attempt_s = now_s
            effects.append(TryTracker())
        if self.standing_in and self._tracker_busy(now_s):
            self._end("somebody is at the tracker's address again", effects)
            self._lose(now_s)
        if self._round_at_s is not None and now_s >= self._round_at_s:
            self._begin_round(now_s, effects)

    # --- sessions -------------------------------------------------------------------------------

    def _lose(self, now_s: float) -> None:
        """This node has no tracker from now on."""
        self._lost_s = now_s
        if self._round is None:
            self._round_at_s = now_s + AWAY_S * self._rng.uniform(1.0, 1.5)

    def _use(self, node: str, effects: list[StandInEffect]) -> None:
        self._leave("another node stands in", effects)
        self.session = node
        self._newcomer = False
        effects.append(UseStandIn(node))

    def _leave(self, reason: str, effects: list[StandInEffect]) -> None:
        if self.session is not None:
            effects.append(LeaveStandIn(self.session, reason))
            self.session = None

    def _begin(self, now_s: float, effects: list[StandInEffect]) -> None:
        self.standing_in = True
        grants_from_s = max(self._lost_s + STAND_IN_GRANTS_S, now_s + LEASE_S + WATCH_S)
        effects += (BeginStandingIn(grants_from_s), AskNode(self.node))

    def _end(self, reason: str, effects: list[StandInEffect]) -> None:
        if self.standing_in:
            if self.session == self.node:
                self._leave(reason, effects)
            self.standing_in = False
            effects.append(EndStandingIn(reason))

    # --- a round of questions -------------------------------------------------------------------

    def _before(self, node: str, other: str) -> bool:
        return order_of(self._label, node) < order_of(self._label, other)

    def _begin_round(self, now_s: float, effects: list[StandInEffect]) -> None:
        self._round_at_s = None
        if self.with_tracker or (self.session is not None and not self.standing_in):
            return
        members = {member.node: member.standing_in for member in self._members()}
        self._others = bool(members.keys() - {self.node})
        members[self.node] = self.standing_in
        for node, asked_s in self._askers.items():
            if now_s <= asked_s + ASKER_S:
                members.setdefault(node, False)
        key = {node: order_of(self._label, node) for node in members}
        first = nsmallest(CANDIDATES_MAX + CHECKS, members, key=key.__getitem__)
        # Whoever is known to stand in is asked before all others.
        known = sorted((node for node in members if members[node]), key=key.__getitem__)
        known = [node for node in known if node != self.node][:CHECKS]
        to_ask = deque(dict.fromkeys([*known, *first[:CANDIDATES_MAX]]))
        self._round = Round(first, to_ask)
        if self.standing_in:
            self._ask_at_once(now_s, effects)
        else:
            self._ask_next(now_s, effects)

    def _end_round(self, now_s: float) -> None:
        self._round = None
        pause_s = WATCH_S if self.standing_in else SEEK_S
        self._round_at_s = None
        if not self.with_tracker and (self.session is None or self.standing_in):
            self._round_at_s = now_s + pause_s * self._rng.uniform(0.5, 1.0)

    def _ask_next(self, now_s: float, effects: list[StandInEffect]) -> None:
        """Ask the next on the list; where this node itself is next, those behind it."""
        asking = self._round
        assert asking is not None, "asking outside of a round"
        while asking.to_ask:
            node = asking.to_ask.popleft()
            if node in asking.asked:
                continue
            if node != self.node:
                self._ask(node, effects)
                return
            if asking.sent or not self._able(now_s):
                continue
            self._check_others(now_s, effects)
            return
        self._end_round(now_s)

    def _ask(self, node: str, effects: list[StandInEffect]) -> None:
        assert self._round is not None
        self._round.asked.add(node)
        self._round.waiting.add(node)
        effects.append(AskNode(node))

    def _ask_at_once(self, now_s: float, effects: list[StandInEffect]) -> None:
        """Who stands in asks those before it and some behind it together: if it is cut off it is to
        know that soon, however many they are."""
        asking = self._round
        assert asking is not None
        before = takewhile(lambda node: node != self.node, list(asking.to_ask))
        asking.to_ask.clear()
        for node in before:
            self._ask(node, effects)
        self._check_others(now_s, effects)

    def _check_others(self, now_s: float, effects: list[StandInEffect]) -> None:
        asking = self._round
        assert asking is not None
        behind = dropwhile(lambda node: node != self.node, asking.order)
        asking.checking = True
        for node in islice((node for node in behind if node != self.node), CHECKS):
            if node not in asking.asked:
                self._ask(node, effects)
        if not asking.waiting:
            self._conclude(now_s, effects)

    def _conclude(self, now_s: float, effects: list[StandInEffect]) -> None:
        """Nobody has said anything against it. Who reaches nobody is cut off, and leaves the file
        server to the others."""
        assert self._round is not None
        if not self.standing_in:
            if self._round.heard and self._able(now_s):
                self._begin(now_s, effects)
        elif not self._round.heard:
            self._end("nobody else can be reached", effects)
            self._lost_s = now_s
        elif self.session is None:
            effects.append(AskNode(self.node))
        self._end_round(now_s)

    def _told(
        self, node: str, answer: StandsIn, now_s: float, effects: list[StandInEffect]
    ) -> None:
        stands_in = answer.by == node and not answer.tracker
        if node == self.node:
            if stands_in and self.standing_in and self.session is None:
                self._use(node, effects)
            elif stands_in:
                effects.append(LetGo(node))
            return
        asking = self._round
        if asking is None or node not in asking.waiting:
            if stands_in:
                effects.append(LetGo(node))
            return
        asking.heard = True
        if stands_in and (not self.standing_in or self._before(node, self.node)):
            self._end("another node stands in as well", effects)
            self._use(node, effects)
            self._end_round(now_s)
        elif answer.tracker:
            self._end_for_tracker(now_s, effects)
        elif answer.by and not stands_in and answer.by != self.node:
            # It may be that we have not heard of that node, or that it is gone by now.
            asking.checking = False
            asking.sent = True
            asking.to_ask = deque([answer.by])
            asking.waiting &= {answer.by}
            if not asking.waiting:
                self._ask_next(now_s, effects)
        elif answer.able and not self.standing_in and self._before(node, self.node):
            self._end_round(now_s)  # it is about to
        else:
            if stands_in:
                effects.append(LetGo(node))  # and will come to us
            self._not_there(node, now_s, effects)

    def _end_for_tracker(self, now_s: float, effects: list[StandInEffect]) -> None:
        """Others have the tracker: nobody stands in for it."""
        if self.standing_in:
            self._end("others are with the tracker", effects)
            self._lost_s = now_s
        self._end_round(now_s)

    def _not_there(self, node: str, now_s: float, effects: list[StandInEffect]) -> None:
        """This node has nothing to say about who is the tracker."""
        asking = self._round
        if asking is None or node not in asking.waiting:
            return
        asking.waiting.discard(node)
        if asking.waiting:
            return
        if asking.checking:
            self._conclude(now_s, effects)
        else:
            self._ask_next(now_s, effects)
