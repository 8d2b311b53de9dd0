"""How what one node says gets to all others, once: who passes it on to whom, and when.

Pure logic: writes datagrams, and sends none.

The ring of ids is the one thing that all nodes agree on without talking. Who has something to say
sends it to its *fingers*, the members 1, 2, 4, 8, ... places on, and makes each of them responsible
for the part of the ring up to the next finger; each of these does the same with its part (broadcast
over a distributed hash table: El-Ansary, Alima, Brand, Haridi 2003). So a record reaches every node
once, over log2(N) hops at most, and every node forwards as much as it receives. Epidemic push sends
everything about five times for the same. Parts are stretches of the ring, not lists of nodes, so it
does no harm that no two nodes know exactly the same members.

Whoever is made responsible for a part confirms it, and what the same node has sent before it, since
confirmations get lost as often as what they confirm. Statuses can wait until the next datagram may
have confirmed them too, and go again only then, or when a later one is confirmed and they are not.
Whoever confirms nothing any more loses its part to the next member of it. What gets lost
nevertheless is found by repair (``gossip.py``).

A member's address is in its profile, which does not travel along: whoever gets a record of somebody
unknown asks its sender for it, and passes the record on when it has come.

A *status* waits for others on the same way, longer where many come by; a *claim* (that a node is
suspected, dead, gone, or there) goes at once. Both have room of their own: claims take a quarter of
a datagram at most while statuses wait, and statuses never the last quarter of the budget.

Invariants: no datagram exceeds ``PAYLOAD_BYTES_MAX``; what waits for a target has a deadline; at
most ``FLIGHTS_MAX`` datagrams are unconfirmed and ``WAITING_MAX`` statuses wait for one target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from swarmcache.gossip_claims import Claim
from swarmcache.gossip_events import GossipEffect, SendDatagram
from swarmcache.gossip_records import (
    NUMBER_BYTES,
    PAYLOAD_BYTES_MAX,
    RING,
    RUMOUR_BYTES,
    SPREAD_HEAD_BYTES,
    STATUS_BYTES,
    STATUSES_MAX,
    NodeProfile,
    encode_numbered,
    encode_ping,
    encode_rumours,
    encode_statuses,
)
from swarmcache.gossip_view import View
from swarmcache.timers import Timers

# Envelope, UDP and IPv4 headers.
OVERHEAD_BYTES = 48 + 28
# A confirmation takes two ways through the network and two event loops: milliseconds. Whoever takes
# longer than this is busy with something else.
CONFIRM_S = 0.2
# Statuses go again when so many times as long has passed as they waited for each other: by then the
# next datagram has gone, and a confirmation of it is one of theirs.
CONFIRM_WAITS = 2
# A confirmation names so many datagrams, the last ones of one sender, for 4 bytes each; they are
# remembered of so many senders.
RECEIPTS = 4
RECEIPTS_OF_MAX = 1024
# Where a quarter of all packets gets lost, five times in vain is nothing unusual if nothing else
# was confirmed meanwhile: 2 in 100. Then others take its part over, and it is only told itself,
# with more and more patience.
TRIES_MAX = 5
LATE_TRIES_MAX = 4
# A member that has confirmed nothing is asked to pass nothing on for so long, or until it is heard.
SILENT_S = 5.0
PASSED_OVER_MAX = 4
# Statuses wait for each other so long at most on the way to the nearest finger, which gets half of
# all, and so long on the way to the farthest ones, which get few.
WAIT_NEAR_S = 1.2
WAIT_FAR_S = 0.15
NEAR_FINGERS = 6
FLIGHTS_MAX = 1024
WAITING_MAX = 4 * STATUSES_MAX
CLAIMS_SHARE = 4
CLAIMS_DEBT = 0.5
BUDGET_S = 1.5
LIST_MAX = 255
# Claims also ride on pings and their answers, which have room: so many times, so many in each.
RIDES = 4
RIDERS = 4
RIDES_MAX = 256


def stay(target: int) -> int:
    """A limit that says to ``target`` that it is to pass nothing on."""
    return (target + 1) % RING


class Budget:
    """How many bytes may be sent: ``rate`` a second, ``BUDGET_S`` of which may be saved up."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.saved_max = rate * BUDGET_S
        self._saved = self.saved_max
        self._at_s = 0.0

    def saved(self, now_s: float) -> float:
        """What part of what may be saved is there: at most 1, below 0 for debts."""
        self._saved = min(self._saved + (now_s - self._at_s) * self.rate, self.saved_max)
        self._at_s = now_s
        return self._saved / self.saved_max

    def spend(self, size_bytes: int) -> None:
        """Sent, with ``OVERHEAD_BYTES``."""
        self._saved -= size_bytes + OVERHEAD_BYTES

    def wait_s(self, part: float) -> float:
        """How long until so much is saved."""
        return max(part * self.saved_max - self._saved, 0.0) / self.rate


class Leg(NamedTuple):
    """One way onwards: to ``target``, who is responsible up to ``limit``."""

    target: int
    limit: int
    wait_s: float


@dataclass(slots=True)
class Cargo:
    """What is to be sent to one target, by limit. ``wait_s``: how long what is in a hurry most may
    wait."""

    claims: dict[int, dict[Claim, None]] = field(default_factory=dict)
    statuses: dict[int, dict[int, None]] = field(default_factory=dict)
    wait_s: float = WAIT_NEAR_S

    def empty(self) -> bool:
        return not (self.claims or self.statuses)

    def for_one(self, limit: int) -> Cargo:
        """The same, of which the target is to pass nothing on."""
        return Cargo(_merged(self.claims, limit), _merged(self.statuses, limit), 0.0)

    def status_count(self) -> int:
        return sum(map(len, self.statuses.values()))


@dataclass(slots=True)
class Flight:
    """A numbered datagram that is not confirmed yet. ``began_s``: of the first of its ``tries``."""

    target: int
    cargo: Cargo
    began_s: float
    tries: int = 1


class Spread:
    """What waits to be sent on, and what is on its way.

    ``timers``: those of the whole machine, which calls ``due``.
    ``status_of``: the packed record of a member as of now, or of this node itself; ``profile_of``:
    its profile. Both None if unknown.
    """

    def __init__(
        self,
        view: View,
        budget: Budget,
        timers: Timers[tuple[str, int]],
        status_of: Callable[[int, float], bytes | bytearray | None],
        profile_of: Callable[[int], NodeProfile | None],
    ) -> None:
        self._view = view
        self._budget = budget
        self._status_of = status_of
        self._profile_of = profile_of
        self._waiting: dict[int, Cargo] = {}
        self._flights: dict[int, Flight] = {}
        self._numbers = 0
        self._silent: dict[int, float] = {}
        self._timers = timers
        self._fingers: list[int] = []
        self._distances: list[int] = []
        self._passed_over: list[int] = []
        self._fingers_of = (-1, -1)
        self._silent_version = 0
        self.unconfirmed: list[int] = []
        self._confirmed_s: dict[int, float] = {}
        self._receipts: dict[int, list[int]] = {}
        self._rides: dict[Claim, int] = {}

    # --- who passes on to whom --------------------------------------------------------------------

    def legs(self, limit: int) -> list[Leg]:
        """How everybody between here and ``limit`` is reached. This node's own id: everybody."""
        self._choose_fingers()
        fingers = self._fingers
        end = self._view.distance(limit)
        reach = bisect_left(self._distances, end)
        legs = [
            Leg(target, stay(target), WAIT_NEAR_S)
            for target in self._passed_over
            if self._view.distance(target) < end
        ]
        for number in range(reach):
            last = number + 1 == reach
            wait_s = WAIT_NEAR_S if number < NEAR_FINGERS else WAIT_FAR_S
            legs.append(Leg(fingers[number], limit if last else fingers[number + 1], wait_s))
        return legs

    def _choose_fingers(self) -> None:
        """The members that this node sends to, nearest first; anew when something has changed."""
        view = self._view
        version = (view.version, self._silent_version)
        if version == self._fingers_of:
            return
        self._fingers_of = version
        self._fingers = view.fingers(self._usable)
        self._distances = [view.distance(each) for each in self._fingers]
        # Those before the first finger are in nobody's part. They may hear well enough, and only
        # not be heard.
        first = self._distances[0] if self._fingers else RING
        self._passed_over = []
        for index in view.onwards(view.own_id):
            if view.distance(view.ids[index]) >= first:
                break
            if view.profiles[index] is not None:
                self._passed_over.append(view.ids[index])
                if len(self._passed_over) == PASSED_OVER_MAX:
                    break

    def _usable(self, index: int) -> bool:
        view = self._view
        return (
            view.profiles[index] is not None
            and not view.suspected[index]
            and view.ids[index] not in self._silent
        )

    def heard(self, subject: int) -> None:
        """This member has said something."""
        if self._silent.pop(subject, None) is not None:
            self._timers.set(("silent", subject), None)
            self._silent_version += 1

    # --- what is to be sent -----------------------------------------------------------------------

    def pass_statuses(
        self, legs: Iterable[Leg], subjects: Iterable[int], now_s: float, *, urgent: bool
    ) -> None:
        """The records of these members go on, as they are when they are sent."""
        new = dict.fromkeys(subjects)
        for target, limit, usual_s in legs:
            wait_s = 0.0 if urgent else usual_s
            cargo = self._cargo(target)
            waiting = cargo.statuses.get(limit)
            if waiting is None:
                cargo.statuses[limit] = new.copy()
            else:
                waiting.update(new)
            cargo.wait_s = min(cargo.wait_s, wait_s)
            full = cargo.status_count() >= STATUSES_MAX
            self._timers.set_by(("flush", target), now_s if full else now_s + wait_s)

    def pass_claims(self, legs: Iterable[Leg], claims: Iterable[Claim], now_s: float) -> None:
        """These claims go on, at once."""
        new = dict.fromkeys(claims)
        for target, limit, _ in legs:
            cargo = self._cargo(target)
            cargo.claims.setdefault(limit, {}).update(new)
            cargo.wait_s = 0.0
            self._timers.set_by(("flush", target), now_s)

    def say(self, claim: Claim, limit: int, now_s: float) -> None:
        """Pass on a claim that is news here, in every way."""
        self.pass_claims(self.legs(limit), [claim], now_s)
        if len(self._rides) < RIDES_MAX:
            self._rides[claim] = RIDES

    def riders(self, target: int, now_s: float) -> bytes:
        """What else is to be said in a short datagram to ``target``: some sections, or none."""
        riders = list(self._rides)[:RIDERS]
        if not riders:
            return b""
        for claim in riders:
            rides = self._rides.pop(claim) - 1
            if rides:
                self._rides[claim] = rides
        return encode_rumours(stay(target), [claim.packed(now_s) for claim in riders])

    def _cargo(self, target: int) -> Cargo:
        cargo = self._waiting.get(target)
        if cargo is None:
            cargo = self._waiting[target] = Cargo()
        return cargo

    # --- what happens meanwhile -------------------------------------------------------------------

    def receipts(self, sender: int, number: int) -> list[int]:
        """This datagram has come: which ones are to be confirmed to its sender now."""
        former = self._receipts.pop(sender, [])
        self._receipts[sender] = numbers = [*former[1 - RECEIPTS :], number]
        if len(self._receipts) > RECEIPTS_OF_MAX:
            del self._receipts[next(iter(self._receipts))]
        return numbers

    def forget_receipts(self, sender: int) -> None:
        """It has begun a new life, in which it counts from the beginning."""
        self._receipts.pop(sender, None)

    def confirmed(self, sender: int, numbers: Sequence[int], now_s: float) -> None:
        """These datagrams have arrived there, the last ones of those that have. So others that were
        sent in between are lost, or will be confirmed in a moment."""
        for number in numbers:
            flight = self._flights.get(number)
            if flight is not None and flight.target == sender:
                del self._flights[number]
                self._timers.set(("flight", number), None)
                self._confirmed_s[sender] = now_s
        first = min(numbers, default=0) if len(numbers) >= RECEIPTS else 0
        last = max(numbers, default=0)
        for number, flight in self._flights.items():
            if first < number < last and flight.target == sender:
                self._timers.set_by(("flight", number), now_s + CONFIRM_S)

    def due(self, kind: str, number: int, now_s: float, effects: list[GossipEffect]) -> None:
        """A "flush", "flight" or "silent" has come."""
        if kind == "flush":
            self._flush(number, now_s, effects)
        elif kind == "flight":
            self._give_up_waiting(number, now_s, effects)
        else:
            assert kind == "silent", f"a deadline of kind {kind}"
            del self._silent[number]
            self._silent_version += 1

    def forgive(self, now_s: float) -> None:
        """This node itself has slept: nobody is to blame for what was not confirmed meanwhile."""
        for number in self._flights:
            self._timers.set(("flight", number), now_s + CONFIRM_S)

    def _give_up_waiting(self, number: int, now_s: float, effects: list[GossipEffect]) -> None:
        flight = self._flights.pop(number)
        target = flight.target
        here = self._view.find(target) >= 0
        silent = self._confirmed_s.get(target, -math.inf) < flight.began_s
        if silent:
            flight.cargo.wait_s = 0.0
        if not here or (silent and flight.tries >= TRIES_MAX):
            self._hand_over(flight, now_s)
            if target not in self._silent:
                self._silent[target] = now_s + SILENT_S
                self._timers.set(("silent", target), now_s + SILENT_S)
                self._silent_version += 1
                self.unconfirmed.append(target)
            flight.cargo = flight.cargo.for_one(stay(target))
        if flight.tries == 1 and target not in self._confirmed_s:
            self._say_where(target, effects)
        if flight.tries < TRIES_MAX + LATE_TRIES_MAX and here:
            flight.tries += 1
            self._send(flight, now_s, effects)

    def _say_where(self, target: int, effects: list[GossipEffect]) -> None:
        """It may not know where to send its confirmation: a ping has this node's address."""
        profile, own = self._profile_of(target), self._profile_of(self._view.own_id)
        if profile is not None and own is not None:
            payload = encode_ping(0, own.address.node)
            self._budget.spend(len(payload))
            effects.append(SendDatagram(profile.address.node, payload))

    def _hand_over(self, flight: Flight, now_s: float) -> None:
        """The next member of each part becomes responsible for what is left of it."""
        cargo = flight.cargo
        for limit in {*cargo.claims, *cargo.statuses}:
            heir = self._next_member(flight.target, limit)
            if heir is None:
                continue
            legs = [Leg(heir, limit, 0.0)]
            self.pass_claims(legs, cargo.claims.get(limit, ()), now_s)
            self.pass_statuses(legs, cargo.statuses.get(limit, ()), now_s, urgent=True)

    def _next_member(self, target: int, limit: int) -> int | None:
        view = self._view
        end = view.distance(limit)
        for index in view.onwards(target + 1):
            subject = view.ids[index]
            if view.distance(subject) >= end or view.distance(subject) <= view.distance(target):
                return None
            if self._usable(index):
                return subject
        return None

    # --- datagrams --------------------------------------------------------------------------------

    def _flush(self, target: int, now_s: float, effects: list[GossipEffect]) -> None:
        waiting = self._waiting.pop(target, None)
        if waiting is None or self._profile_of(target) is None:
            return
        enough = 0.0
        while not waiting.empty() and len(self._flights) < FLIGHTS_MAX:
            saved = self._budget.saved(now_s)
            rich = saved >= 1 / CLAIMS_SHARE
            enough = -CLAIMS_DEBT if waiting.claims else 1 / CLAIMS_SHARE
            if saved < enough:
                break
            cargo = self._load(waiting, claims_only=not rich)
            self._send(Flight(target, cargo, now_s), now_s, effects)
        if waiting.empty():
            return
        self._drop_oldest(waiting)
        self._waiting[target] = waiting
        self._timers.set(("flush", target), now_s + max(self._budget.wait_s(enough), WAIT_FAR_S))

    def _load(self, waiting: Cargo, *, claims_only: bool) -> Cargo:
        """Take out of ``waiting`` what fits into one datagram."""
        cargo = Cargo(wait_s=waiting.wait_s)
        room = PAYLOAD_BYTES_MAX - NUMBER_BYTES
        heads_bytes = len(waiting.statuses) * SPREAD_HEAD_BYTES
        all_bytes = heads_bytes + waiting.status_count() * STATUS_BYTES
        if all_bytes <= room and not waiting.claims and not claims_only:  # as nearly always
            cargo.statuses, waiting.statuses = waiting.statuses, cargo.statuses
            return cargo
        with_statuses = bool(waiting.statuses) and not claims_only
        claims_room = room // CLAIMS_SHARE if with_statuses else room
        room -= claims_room - _take(waiting.claims, cargo.claims, RUMOUR_BYTES, claims_room)
        if with_statuses:
            if waiting.status_count() > STATUSES_MAX:
                self._freshest_first(waiting)
            _take(waiting.statuses, cargo.statuses, STATUS_BYTES, room)
        return cargo

    def _freshest_first(self, waiting: Cargo) -> None:
        for limit, subjects in waiting.statuses.items():
            waiting.statuses[limit] = dict.fromkeys(
                sorted(subjects, key=self._made_s, reverse=True)
            )

    def _drop_oldest(self, waiting: Cargo) -> None:
        """There is no budget to send all that comes: the oldest knowledge is worth least."""
        excess = waiting.status_count() - WAITING_MAX
        if excess <= 0:
            return
        each = [(self._made_s(s), limit, s) for limit, ids in waiting.statuses.items() for s in ids]
        for _, limit, subject in sorted(each)[:excess]:
            del waiting.statuses[limit][subject]
            if not waiting.statuses[limit]:
                del waiting.statuses[limit]

    def _made_s(self, subject: int) -> float:
        index = self._view.find(subject)
        return self._view.made_s[index] if index >= 0 else float("inf")

    def _send(self, flight: Flight, now_s: float, effects: list[GossipEffect]) -> None:
        profile = self._profile_of(flight.target)
        if profile is None:
            return
        cargo = flight.cargo
        self._numbers = (self._numbers + 1) & 0xFFFFFFFF
        sections = [encode_numbered(self._numbers)]
        for limit, claims in cargo.claims.items():
            sections.append(encode_rumours(limit, [each.packed(now_s) for each in claims]))
        for limit, subjects in cargo.statuses.items():
            records = [self._status_of(subject, now_s) for subject in subjects]
            sections.append(encode_statuses(limit, [each for each in records if each]))
        payload = b"".join(sections)
        assert len(payload) <= PAYLOAD_BYTES_MAX, f"a datagram of {len(payload)} bytes"
        self._budget.spend(len(payload))
        effects.append(SendDatagram(profile.address.node, payload))
        self._flights[self._numbers] = flight
        late = max(flight.tries - TRIES_MAX, 0)
        confirm_s = CONFIRM_S * 2**late + CONFIRM_WAITS * cargo.wait_s
        self._timers.set(("flight", self._numbers), now_s + confirm_s)

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self._flights) <= FLIGHTS_MAX + len(self._waiting), "too many in flight"
        for target, cargo in self._waiting.items():
            assert self._timers.at_s(("flush", target)) is not None, "never sent"
            assert cargo.status_count() <= 2 * WAITING_MAX, "too many wait for one target"
        for number in self._flights:
            assert self._timers.at_s(("flight", number)) is not None, "never given up"


Item = TypeVar("Item")


def _merged(by_limit: dict[int, dict[Item, None]], limit: int) -> dict[int, dict[Item, None]]:
    items = {item: None for each in by_limit.values() for item in each}
    return {limit: items} if items else {}


def _take(
    waiting: dict[int, dict[Item, None]], taken: dict[int, dict[Item, None]], size: int, room: int
) -> int:
    """Move as many items as fit, each of ``size`` bytes and with one head for each limit. Returns
    the room that is left."""
    for limit in list(waiting):
        count = min((room - SPREAD_HEAD_BYTES) // size, LIST_MAX)
        if count <= 0:
            break
        items = list(waiting[limit])
        taken[limit] = dict.fromkeys(items[:count])
        if count >= len(items):
            del waiting[limit]
        else:
            waiting[limit] = dict.fromkeys(items[count:])
        room -= SPREAD_HEAD_BYTES + size * len(taken[limit])
    return room
