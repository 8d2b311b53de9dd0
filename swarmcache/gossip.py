"""What a node knows of all others, and what it does to know it.

Pure logic: no socket, clock or chance of its own. The daemon and the simulator hand it datagrams
that are authentic, and send those that it returns.

* ``gossip_spread.py`` carries what one node says to all others; ``gossip_probes.py`` asks whether
  somebody is there; ``gossip_claims.py`` says who is suspected and who is gone;
  ``gossip_view.py`` is the table of members. What is decided with these, is here.
* A node publishes its status when it has changed, and every ``period_s`` in any case: the longer,
  the more nodes there are, so that the bytes that a node sends stay the same.
* Who does not answer is *suspected*, everybody is told, the suspect too. It clears itself with a
  new epoch. Who accused it declares it dead after a while (the sooner, the more have accused it),
  but only after asking once more.
* *Repair*: now and then a node sends sums over what it knows to somebody else, and both tell each
  other what differs. A status that is overdue is asked for.

Invariants:

* Only the subject says that it is alive: others pass on what it said, with the age that it has.
* Of two records of one subject the one with the higher (epoch, seq) counts, so a restart always
  wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from swarmcache.errors import BadMessage
from swarmcache.gossip_claims import RECORD_AGE_MAX_S, Claim, Claims, Gone, Heard
from swarmcache.gossip_events import (
    ConnectTried,
    DatagramReceived,
    GossipEffect,
    GossipEvent,
    Leaving,
    MembersChanged,
    SeedsKnown,
    SendDatagram,
    StatusMeasured,
    TimePassed,
    TryConnect,
)
from swarmcache.gossip_probes import HELPERS, PROBE_S, Probe, Probes, Verdict
from swarmcache.gossip_records import (
    AGE_AT,
    AGE_UNIT_S,
    BUCKETS,
    EPOCH_BYTES,
    EPOCH_MAX,
    ID_BYTES,
    LASTING_BYTES,
    PAYLOAD_BYTES_MAX,
    SEQ_MAX,
    STATUS_BYTES,
    STATUSES_MAX,
    Ack,
    Digests,
    MemberState,
    Nack,
    NodeProfile,
    NodeStatus,
    Numbered,
    Ping,
    PingFor,
    Profiles,
    ProfilesWanted,
    Received,
    RumourKind,
    Rumours,
    Section,
    Statuses,
    StatusesWanted,
    StatusRecord,
    age_units,
    body_tag,
    decode_payload,
    encode_ack,
    encode_digests,
    encode_nack,
    encode_ping,
    encode_ping_for,
    encode_profiles,
    encode_profiles_wanted,
    encode_received,
    encode_rumours,
    encode_statuses,
    encode_statuses_wanted,
    lasting,
    pack_profile,
    pack_status,
    profile_tag,
    profiles_for_datagrams,
    read_body,
    read_status,
    ring_id,
    status_body,
)
from swarmcache.gossip_spread import Budget, Spread, stay
from swarmcache.gossip_view import MEMBERS_MAX, View
from swarmcache.timers import Timers

# Bytes that a node sends at most, and what part of that is meant for status. In ten seconds after a
# pause it is 15.8 kB/s at most. With 1,000 nodes and a status every 11 s they take half of it. Of
# 1,000 that start at once and lose 25 % of all packets the last one knows all after 59.5 s; with
# 12 kB/s it was 67.0 s.
BUDGET_BYTES_PER_S = 13_500.0
STATUS_BYTES_PER_S = 6_000.0
# What one status costs each node: 32 bytes, its part of datagrams and of what confirms them, and of
# what goes again. Of 1,000 nodes it takes 50 bytes if nothing gets lost, 83 if a quarter does.
STATUS_COST_BYTES = 66
PERIOD_S = 10.0
PERIOD_MAX_S = 120.0
# A change is told at most so often, as a part of the period; what everybody should know at once (a
# disk that fails, a node that stands in for the tracker) no later than after a second.
CHANGE_PART = 0.7
URGENT_S = 1.0
# A change of less than this part of the capacity can wait for the next period.
CHANGED_PART = 0.02
# Somebody who has accepted a connection, and of whom nothing was heard for so many periods, may
# hang.
HUNG_PERIODS = 3
REPAIR_S = 10.0
REPAIR_SOON_S = 1.0
REPAIR_DATAGRAMS = 3
NEWS_WORTH_REPAIR = 5
OVERDUE_S = 4.0
PULL_PART = 0.2
PULL_MAX = 60
PROFILES_EVERY_S = 0.5
PROFILES_ASKED = 21
PROFILE_PEERS = 4
PROFILE_TRIES = 3
CONTACT_GONE_S = 30.0
INTRODUCE_FACTOR = 6
# Addresses of nodes whose profile is still to come.
HINTS_MAX = 256
# What is left of the budget below this part is not for those who ask. Profiles come before the next
# status of everybody (``gossip_spread.py``), since nobody is known without: when 300 nodes start at
# once, half of all pairs know each other 3 s sooner than with the same part for both.
ANSWER_SAVED = 0.4
PROFILES_SAVED = 0.1
# Helpers answer before those who asked them lose patience, and remember them a little longer.
HELPING_MAX = 256
HELP_NACK_S = 0.4
HELP_S = 2.0
# Nobody is there to repeat what gets lost of them: where a quarter of all packets does, five copies
# fail to arrive once in a thousand times.
LEAVE_COPIES = 5
SEEDS_MAX = 16
# So many of them at once: each answers with what it knows.
CONTACTS_MAX = 4
# Woken this much too late, the node itself has slept.
SLEPT_S = 1.0
assert RECORD_AGE_MAX_S > HUNG_PERIODS * PERIOD_MAX_S


@dataclass(frozen=True, slots=True)
class Member:
    """A node as it is known here. ``profile`` and ``status`` are None until they are heard.

    ``heard_at_s``: when, on this node's clock, its subject made the record that this is from.
    """

    profile: NodeProfile | None
    status: NodeStatus | None
    state: MemberState
    heard_at_s: float

    def age_s(self, now_s: float) -> float:
        """How old this is."""
        return max(now_s - self.heard_at_s, 0.0)


@dataclass(slots=True)
class Unprofiled:
    """A member whose profile is missing. ``sender`` told of it, and has its profile, since nobody
    passes on a record without. ``limit``: how far this node is to pass it on then."""

    sender: int
    limit: int
    tries: int = 0


class Gossip:
    """One node. ``epoch``: a number that is higher with each life of the daemon, as milliseconds
    since 1970 are. Feed it ``TimePassed`` first.

    ``period_s``: how often the status is told at least, if there is budget for it.
    """

    def __init__(
        self,
        profile: NodeProfile,
        epoch: int,
        rng: Random,
        *,
        budget_bytes_per_s: float = BUDGET_BYTES_PER_S,
        period_s: float = PERIOD_S,
    ) -> None:
        assert 0 <= epoch <= EPOCH_MAX, "no epoch"
        self.own_id = ring_id(profile.address.node)
        self.profile = profile
        self.bad_datagrams = 0
        self._rng = rng
        self._address = profile.address.node
        self._epoch = epoch
        self._seq = 0
        self._status = NodeStatus()
        self._body = status_body(self._status, profile_tag(profile))
        self._made_s = -math.inf
        self._said = self._status
        self._period_min_s = period_s
        self._left = False
        self._timers: Timers[tuple[str, int]] = Timers()
        self._view = View(self.own_id, epoch)
        self._budget = Budget(budget_bytes_per_s)
        self._spread = Spread(
            self._view, self._budget, self._timers, self._packed_status, self._profile_of
        )
        self._probes = Probes(rng, self._timers)
        self._claims = Claims(self._view, self._timers, rng)
        self._hints: dict[int, str] = {}
        self._unprofiled: dict[int, Unprofiled] = {}
        self._introduced = 0
        self._news = 0
        self._replies: list[bytes] = []
        self._alive: dict[str, None] = {}
        self._dead: dict[str, None] = {}
        for kind in ("probe", "publish", "repair", "pull", "contact"):
            self._timers.set((kind, 0), 0.0)
        self._begun = False

    # --- the three calls of every machine -------------------------------------------------------

    def handle(self, event: GossipEvent, now_s: float) -> list[GossipEffect]:
        """Apply one event; return what must now be done, in order."""
        effects: list[GossipEffect] = []
        if self._left:
            return effects
        if not self._begun:
            self._begin(now_s)
        due_s = self.wake_at_s()
        if due_s is not None and now_s - due_s > SLEPT_S:
            self._wake_late(now_s)
        match event:
            case DatagramReceived():
                self._receive(event, now_s, effects)
            case TimePassed():
                pass  # as after everything else
            case ConnectTried():
                if event.ok and self._is_fresh(ring_id(event.node), now_s):
                    for verdict in self._probes.connected(ring_id(event.node)):
                        self._judge(verdict, now_s, effects)
            case StatusMeasured():
                self._measure(event.status, now_s)
            case SeedsKnown():
                self._meet(event.addresses, now_s, effects)
            case Leaving():
                self._leave(now_s, effects)
                return effects
        while due := self._timers.pop_due(now_s):
            for kind, number in due:
                self._work(kind, number, now_s, effects)
        if self._alive or self._dead:
            effects.append(MembersChanged(list(self._alive), list(self._dead)))
            self._alive.clear()
            self._dead.clear()
        return effects

    def wake_at_s(self) -> float | None:
        """When ``TimePassed`` is next due. Ask again after every ``handle``."""
        return None if self._left else self._timers.next_at_s()

    def check(self) -> None:
        """Assert the invariants."""
        for part in (self._view, self._claims, self._spread, self._probes, self._timers):
            part.check()

    # --- asked by the shell ---------------------------------------------------------------------

    def members(self) -> list[Member]:
        """All nodes that are known: this one, the live ones, and those that have gone lately."""
        view = self._view
        known = [self._member(index) for index in range(len(view))]
        own = Member(self.profile, read_body(self._body), MemberState.ALIVE, self._made_s)
        return [own, *known, *map(_former_member, self._claims.gone.values())]

    def live(self) -> list[Member]:
        """All others that are alive, as far as is known, or suspected; their profiles are known."""
        view = self._view
        return [self._member(i) for i in range(len(view)) if view.profiles[i] is not None]

    def live_count(self) -> int:
        """How many ``live`` there are."""
        return self._view.reachable

    def is_live(self, node: str) -> bool:
        """Whether this one is among them."""
        index = self._view.find(ring_id(node))
        return index >= 0 and self._view.profiles[index] is not None

    def member(self, node: str) -> Member | None:
        """What is known of the node with this advertised address."""
        subject = ring_id(node)
        if subject == self.own_id:
            return Member(self.profile, read_body(self._body), MemberState.ALIVE, self._made_s)
        index = self._view.find(subject)
        if index >= 0:
            return self._member(index)
        gone = self._claims.gone.get(subject)
        return None if gone is None else _former_member(gone)

    def period_s(self) -> float:
        """How often every node tells its status at least; a record is hardly ever older than this
        and some seconds. Grows with the number of nodes."""
        wanted_s = (len(self._view) + 1) * STATUS_COST_BYTES / STATUS_BYTES_PER_S
        return min(max(wanted_s, self._period_min_s), max(PERIOD_MAX_S, self._period_min_s))

    @property
    def health(self) -> int:
        """How much this node distrusts itself: 0 (well) to 8."""
        return self._probes.health

    def _member(self, index: int) -> Member:
        view = self._view
        state = MemberState.SUSPECT if view.suspected[index] else MemberState.ALIVE
        status = read_body(view.body(index))
        return Member(view.profiles[index], status, state, view.made_s[index])

    # --- time -----------------------------------------------------------------------------------

    def _begin(self, now_s: float) -> None:
        """The first event. From here on nodes that start together drift apart."""
        self._begun = True
        self._made_s = now_s
        self._budget.saved(now_s)
        for kind, span_s in (("probe", 1.0), ("publish", self._period_min_s), ("repair", 2.0),
                             ("pull", 2.0), ("contact", CONTACT_GONE_S)):  # fmt: skip
            self._timers.set((kind, 0), now_s + self._rng.random() * span_s)

    def _wake_late(self, now_s: float) -> None:
        """What should have happened meanwhile was not seen, so nobody is judged by it."""
        self._probes.forgive()
        self._spread.forgive(now_s)
        self._claims.forgive(now_s)

    def _work(self, kind: str, number: int, now_s: float, effects: list[GossipEffect]) -> None:
        """A deadline has come."""
        match kind:
            case "flush" | "flight" | "silent":
                self._spread.due(kind, number, now_s, effects)
            case "ping":
                due = self._probes.due(number, now_s)
                if isinstance(due, Verdict):
                    self._judge(due, now_s, effects)
                elif not due.rounds:
                    self._ping(due.target, due.number, now_s, effects)
                else:
                    self._ask_others(due, now_s, effects)
            case "probe":
                self._probe_next(now_s, effects)
            case "publish":
                self._publish(now_s, urgent=False)
            case "repair":
                self._repair(now_s, effects)
            case "pull":
                self._pull(now_s, effects)
            case "profiles":
                self._ask_for_profiles(now_s, effects)
            case "contact":
                self._contact_gone(now_s, effects)
            case "suspect":
                self._try_suspect(number, now_s, effects)
            case "forget":
                self._claims.forgotten(number)
            case "nack":
                self._nack_late(number, now_s, effects)
            case _:
                assert kind == "help", f"a deadline of kind {kind}"
                del self._probes.helping[number]

    def _again(self, kind: str, after_s: float, now_s: float) -> None:
        """Next time, give or take a tenth."""
        self._timers.set((kind, 0), now_s + after_s * (0.9 + 0.2 * self._rng.random()))

    # --- this node's own status -----------------------------------------------------------------

    def _measure(self, status: NodeStatus, now_s: float) -> None:
        self._status = status
        said, body = self._said, status_body(status, profile_tag(self.profile))
        if lasting(body) != lasting(self._body):
            after_s = URGENT_S
        elif self._has_changed(said, status):
            after_s = CHANGE_PART * self.period_s()
        else:
            return
        self._timers.set_by(("publish", 0), max(self._made_s + after_s, now_s))

    def _has_changed(self, said: NodeStatus, status: NodeStatus) -> bool:
        enough_bytes = CHANGED_PART * self.profile.capacity_bytes
        return (
            abs(said.free_bytes - status.free_bytes) > enough_bytes
            or abs(said.used_bytes - status.used_bytes) > enough_bytes
            or abs(said.pinned_bytes - status.pinned_bytes) > enough_bytes
            or _load_changed(said.uploads, status.uploads)
            or _load_changed(said.downloads, status.downloads)
        )

    def _publish(self, now_s: float, *, urgent: bool) -> None:
        """A new record of this node, for everybody."""
        body = status_body(self._status, profile_tag(self.profile))
        urgent = urgent or lasting(body) != lasting(self._body)
        self._body = body
        self._said = self._status
        self._made_s = now_s
        self._seq += 1
        if self._seq > SEQ_MAX:
            self._set_epoch(self._epoch + 1)
        legs = self._spread.legs(self.own_id)
        self._spread.pass_statuses(legs, [self.own_id], now_s, urgent=urgent)
        self._again("publish", self.period_s(), now_s)

    def _introduce(self, now_s: float) -> None:
        """Let everybody know of this node, as far as it knows everybody itself."""
        self._introduced = self._view.reachable
        self._publish(now_s, urgent=True)

    def _set_epoch(self, epoch: int) -> None:
        self._epoch = min(epoch, EPOCH_MAX)
        self._seq = 0
        self._view.set_own_epoch(self._epoch)

    def _refute(self, epoch: int, now_s: float) -> None:
        """Somebody believes of this life something that is not so: begin another one."""
        if epoch >= self._epoch:
            self._set_epoch(epoch + 1)
            self._probes.feel(1)
            self._publish(now_s, urgent=True)

    def _leave(self, now_s: float, effects: list[GossipEffect]) -> None:
        """Nobody will be here to repeat it, so it is sent more than once."""
        claim = Claim(RumourKind.LEFT, self.own_id, self._epoch, self._seq, self.own_id, now_s)
        for target, limit, _ in self._spread.legs(self.own_id):
            payload = encode_rumours(limit, [claim.packed(now_s)])
            for _ in range(LEAVE_COPIES):
                self._send(target, payload, effects)
        self._left = True

    # --- datagrams ------------------------------------------------------------------------------

    def _receive(self, event: DatagramReceived, now_s: float, effects: list[GossipEffect]) -> None:
        sender = int.from_bytes(event.sender_id, "big")
        try:
            sections = decode_payload(event.payload)
        except BadMessage:
            self.bad_datagrams += 1
            return
        if sender == self.own_id or len(event.sender_id) != ID_BYTES:
            return
        self._probes.heard()
        self._spread.heard(sender)
        for section in sections:
            self._take(section, sender, now_s, effects)
        if self._replies:
            self._send(sender, _fitting(self._replies), effects)
            self._replies = []

    def _take(
        self, section: Section, sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        match section:
            case Statuses():
                self._take_statuses(section, sender, now_s)
            case Numbered():
                receipts = self._spread.receipts(sender, section.number)
                self._replies.append(encode_received(receipts))
            case Received():
                self._spread.confirmed(sender, section.numbers, now_s)
            case Rumours():
                self._take_rumours(section, sender, now_s, effects)
            case Profiles():
                self._take_profiles(section, now_s)
            case Ping() | PingFor():
                self._answer_ping(section, sender, now_s, effects)
            case Ack():
                self._take_ack(section.number, now_s, effects)
            case Nack():
                self._probes.nacked(section.number)
            case ProfilesWanted():
                self._answer_profiles(section.subjects, sender, now_s, effects)
            case StatusesWanted():
                self._answer_statuses(section.subjects, sender, now_s, effects)
            case Digests():
                self._answer_digests(section, sender, now_s, effects)

    def _send(self, subject: int, payload: bytes, effects: list[GossipEffect]) -> None:
        """One whose address is not known cannot be answered."""
        address = self._address_of(subject)
        if address is not None:
            self._send_to(address, payload, effects)

    def _address_of(self, subject: int) -> str | None:
        profile = self._profile_of(subject)
        return self._hints.get(subject) if profile is None else profile.address.node

    def _hint(self, address: str) -> None:
        """Somebody has this address, whose profile may not be known yet."""
        self._hints[ring_id(address)] = address
        if len(self._hints) > HINTS_MAX:
            del self._hints[next(iter(self._hints))]

    def _send_to(self, address: str, payload: bytes, effects: list[GossipEffect]) -> None:
        self._budget.spend(len(payload))
        effects.append(SendDatagram(address, payload))

    def _profile_of(self, subject: int) -> NodeProfile | None:
        if subject == self.own_id:
            return self.profile
        index = self._view.find(subject)
        if index >= 0:
            return self._view.profiles[index]
        gone = self._claims.gone.get(subject)
        return None if gone is None else gone.profile

    def _packed_status(self, subject: int, now_s: float) -> bytes | bytearray | None:
        index = self._view.find(subject)
        if index >= 0:
            return self._view.packed(index, now_s)
        return self._packed_own(now_s) if subject == self.own_id else None

    def _packed_own(self, now_s: float) -> bytes:
        age = age_units(now_s - self._made_s)
        return pack_status(StatusRecord(self.own_id, self._epoch, self._seq, age, self._body))

    # --- status records -------------------------------------------------------------------------

    def _take_statuses(self, section: Statuses, sender: int, now_s: float) -> None:
        """By far the most that is received: the usual case (a member's next record) is here."""
        view = self._view
        records, packed = view.records, section.packed
        news: list[int] = []
        urgent: list[int] = []
        reach = view.reach(section.limit)
        for start in range(0, len(packed), STATUS_BYTES):
            end = start + STATUS_BYTES
            subject = int.from_bytes(packed[start : start + ID_BYTES], "big")
            index = view.find(subject)
            if index >= 0:
                at = index * STATUS_BYTES
                stamp = packed[start + ID_BYTES : start + AGE_AT]
                known = records[at + ID_BYTES : at + AGE_AT]
                if known >= stamp:
                    if reach > view.reaches[index] and known == stamp:
                        view.reaches[index] = reach
                        urgent.append(subject)
                    continue
                if (
                    known.startswith(stamp[:EPOCH_BYTES])
                    and not view.suspected[index]
                    and records.endswith(packed[end - LASTING_BYTES : end], at, at + STATUS_BYTES)
                ):
                    age = packed[start + AGE_AT] << 8 | packed[start + AGE_AT + 1]
                    view.made_s[index] = now_s - age * AGE_UNIT_S
                    records[at : at + STATUS_BYTES] = packed[start:end]
                    view.reaches[index] = reach
                    if view.profiles[index] is not None:
                        news.append(subject)
                    else:
                        self._lack_profile(subject, sender, section.limit, now_s)
                    continue
            record = read_status(packed[start:end])
            if self._take_unusual(record, index, sender, now_s):
                index = view.find(subject)
                view.reaches[index] = reach
                profile = view.profiles[index]
                if profile is not None:
                    urgent.append(subject)
                if profile is None or profile_tag(profile) != body_tag(record.body):
                    self._lack_profile(subject, sender, section.limit, now_s)
        if news or urgent:
            legs = self._spread.legs(section.limit)
            if news and legs:
                self._spread.pass_statuses(legs, news, now_s, urgent=False)
            if urgent and legs:
                self._spread.pass_statuses(legs, urgent, now_s, urgent=True)

    def _take_unusual(self, record: StatusRecord, index: int, sender: int, now_s: float) -> bool:
        """A record of somebody new, of a new life, of a suspect, of somebody who is gone, of this
        node itself. Whether it is believed."""
        made_s = now_s - record.age * AGE_UNIT_S
        if record.subject == self.own_id:
            if (record.epoch, record.seq) > (self._epoch, self._seq):
                self._refute(record.epoch, now_s)  # of a former life whose clock was ahead
            return False
        view = self._view
        new_life = index < 0 or record.epoch > view.epoch(index)
        if new_life:
            self._spread.forget_receipts(record.subject)
        if index < 0:
            return self._take_new(record, made_s, sender, now_s)
        self._news += new_life
        view.replace(index, record, made_s)
        self._claims.hear_of(record.subject, record.epoch, made_s)
        return True

    def _take_new(self, record: StatusRecord, made_s: float, sender: int, now_s: float) -> bool:
        denial = self._claims.denial_of(record, made_s)
        if denial is not None:
            self._replies.append(_for_one(sender, denial, now_s))
            return False
        if now_s - made_s > RECORD_AGE_MAX_S or len(self._view) >= MEMBERS_MAX:
            return False
        profile = None
        former = self._claims.readmit(record.subject)
        if former is not None and former.profile is not None:
            tag = profile_tag(former.profile)
            profile = former.profile if tag == body_tag(record.body) else None
        self._view.insert(record, made_s, profile)
        self._news += 1
        if profile is not None:
            self._report_alive(profile)
        return True

    def _report_alive(self, profile: NodeProfile) -> None:
        node = profile.address.node
        self._dead.pop(node, None)
        self._alive[node] = None

    def _report_dead(self, profile: NodeProfile | None) -> None:
        if profile is not None:
            node = profile.address.node
            self._alive.pop(node, None)
            self._dead[node] = None

    # --- profiles -------------------------------------------------------------------------------

    def _take_profiles(self, section: Profiles, now_s: float) -> None:
        view = self._view
        for profile in section.profiles:
            subject = ring_id(profile.address.node)
            index = view.find(subject)
            if index < 0 or profile_tag(profile) != body_tag(view.body(index)):
                continue
            missed = self._unprofiled.pop(subject, None)
            known = view.profiles[index]
            if known == profile:
                continue
            view.set_profile(index, profile)
            if known is None:
                self._report_alive(profile)
                if missed is not None:
                    legs = self._spread.legs(missed.limit)
                    self._spread.pass_statuses(legs, [subject], now_s, urgent=False)
        if self._introduced * INTRODUCE_FACTOR < view.reachable:
            self._introduce(now_s)

    def _lack_profile(self, subject: int, sender: int, limit: int, now_s: float) -> None:
        self._unprofiled[subject] = Unprofiled(sender, limit)
        self._timers.set_by(("profiles", 0), now_s + PROFILES_EVERY_S / 2)

    def _ask_for_profiles(self, now_s: float, effects: list[GossipEffect]) -> None:
        """Of those who told of them, and after some tries of anybody: in few datagrams, of whoever
        has told of most, and of whoever has told of the one that is missing for longest."""
        missing: dict[int, list[int]] = {}
        anybody = self._some_members(1)
        for subject, each in list(self._unprofiled.items()):
            if self._view.find(subject) < 0:
                del self._unprofiled[subject]
            elif each.tries < PROFILE_TRIES and self._address_of(each.sender) is not None:
                missing.setdefault(each.sender, []).append(subject)
            elif anybody:
                missing.setdefault(anybody[0], []).append(subject)
        first = next(iter(missing), None)
        peers = sorted(missing, key=lambda peer: (peer != first, -len(missing[peer])))
        for peer in peers[:PROFILE_PEERS]:
            subjects = missing[peer][:PROFILES_ASKED]
            for subject in subjects:
                self._unprofiled[subject].tries += 1
                self._unprofiled[subject] = self._unprofiled.pop(subject)  # to the end
            self._send(peer, encode_profiles_wanted(subjects), effects)
        if self._unprofiled:
            self._again("profiles", PROFILES_EVERY_S, now_s)

    def _answer_profiles(
        self, subjects: list[int], sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        known = [self._profile_of(subject) for subject in subjects[:PROFILES_ASKED]]
        packed = [pack_profile(each) for each in known if each is not None]
        for part in profiles_for_datagrams(packed):
            if self._budget.saved(now_s) < PROFILES_SAVED:
                return
            self._send(sender, encode_profiles(part), effects)

    # --- seeds, repair --------------------------------------------------------------------------

    def _meet(self, addresses: list[str], now_s: float, effects: list[GossipEffect]) -> None:
        """Introduce this node to some that it does not take for live members already."""
        strangers = [
            address
            for address in addresses[:SEEDS_MAX]
            if address != self._address and not self.is_live(address)
        ]
        for address in strangers:
            self._hint(address)
        for address in strangers[:CONTACTS_MAX]:
            self._contact(address, now_s, effects)

    def _contact(self, address: str, now_s: float, effects: list[GossipEffect]) -> None:
        nobody = stay(ring_id(address))
        payload = b"".join(
            (
                encode_ping(self._probes.new_number(), self._address),
                encode_statuses(nobody, [self._packed_own(now_s)]),
                encode_profiles([pack_profile(self.profile)]),
                encode_digests(self._view.sums, answered=False),
            )
        )
        self._send_to(address, payload, effects)

    def _contact_gone(self, now_s: float, effects: list[GossipEffect]) -> None:
        """One of those that are thought dead: they may be cut off, as we are from them."""
        self._again("contact", CONTACT_GONE_S, now_s)
        dead = [
            gone.profile.address.node
            for gone in self._claims.gone.values()
            if gone.profile is not None and gone.claim.kind is RumourKind.DEAD
        ]
        if dead:
            self._contact(self._rng.choice(dead), now_s, effects)

    def _repair(self, now_s: float, effects: list[GossipEffect]) -> None:
        peers = self._some_members(1)
        for peer in peers:
            self._send(peer, encode_digests(self._view.sums, answered=False), effects)
        strangers = []
        if self._view.reachable < SEEDS_MAX:  # whoever was asked first may have known nobody either
            strangers = [each for each in self._hints.values() if not self.is_live(each)]
        if strangers:
            self._contact(self._rng.choice(strangers), now_s, effects)
        soon = self._news >= NEWS_WORTH_REPAIR or strangers
        self._news = 0
        self._again("repair", REPAIR_SOON_S if soon else REPAIR_S, now_s)

    def _answer_digests(
        self, digests: Digests, sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        view = self._view
        pairs = enumerate(zip(digests.sums, view.sums, strict=True))
        unequal = {bucket for bucket, (theirs, ours) in pairs if theirs != ours}
        if not unequal or self._address_of(sender) is None:
            return
        if not digests.answered:
            self._send(sender, encode_digests(view.sums, answered=True), effects)
        # Only those whose profile can be asked for as well.
        found = [
            index
            for index, each in enumerate(view.ids)
            if each % BUCKETS in unequal and view.profiles[index] is not None
        ]
        if len(found) > REPAIR_DATAGRAMS * STATUSES_MAX:
            found = self._rng.sample(found, REPAIR_DATAGRAMS * STATUSES_MAX)
        records: list[bytes | bytearray] = [view.packed(index, now_s) for index in found]
        if self.own_id % BUCKETS in unequal:
            records.insert(0, self._packed_own(now_s))
        self._send_records(sender, records[: REPAIR_DATAGRAMS * STATUSES_MAX], now_s, effects)

    def _send_records(
        self,
        peer: int,
        records: list[bytes | bytearray],
        now_s: float,
        effects: list[GossipEffect],
    ) -> None:
        """As far as there is budget: whoever misses the rest asks again, of somebody else."""
        for start in range(0, len(records), STATUSES_MAX):
            if self._budget.saved(now_s) < ANSWER_SAVED:
                return
            part = records[start : start + STATUSES_MAX]
            self._send(peer, encode_statuses(stay(peer), part), effects)

    def _pull(self, now_s: float, effects: list[GossipEffect]) -> None:
        """Ask for records that are overdue: something on their way was lost."""
        tick_s = PULL_PART * self.period_s()
        self._again("pull", tick_s, now_s)
        latest_s = now_s - self._overdue_s()
        earliest_s = latest_s - 3 * tick_s
        view = self._view
        overdue = [i for i, made_s in enumerate(view.made_s) if earliest_s < made_s < latest_s]
        subjects = [view.ids[index] for index in overdue if not view.suspected[index]]
        if len(subjects) > PULL_MAX:
            subjects = self._rng.sample(subjects, PULL_MAX)
        peers = self._some_members(1) if subjects else []
        for peer in peers:
            self._send(peer, encode_statuses_wanted(subjects), effects)

    def _overdue_s(self) -> float:
        return 1.1 * self.period_s() + OVERDUE_S

    def _answer_statuses(
        self, subjects: list[int], sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        view = self._view
        latest_s = now_s - self._overdue_s()
        found = [view.find(subject) for subject in subjects[:PULL_MAX]]
        young = [index for index in found if index >= 0 and view.made_s[index] >= latest_s]
        records: list[bytes | bytearray] = [view.packed(index, now_s) for index in young]
        self._send_records(sender, records, now_s, effects)

    def _some_members(self, count: int) -> list[int]:
        """So many members that can be reached, if there are so many; by chance."""
        view = self._view
        found: list[int] = []
        for _ in range(8 * count if len(view) else 0):
            index = self._rng.randrange(len(view))
            subject = view.ids[index]
            if view.profiles[index] and not view.suspected[index] and subject not in found:
                found.append(subject)
                if len(found) == count:
                    break
        return found

    # --- probes ---------------------------------------------------------------------------------

    def _probe_next(self, now_s: float, effects: list[GossipEffect]) -> None:
        self._again("probe", PROBE_S * self._probes.patience, now_s)
        self._ask_for_unconfirmed()
        target = self._probes.next_target(self._view)
        if target is not None:
            self._begin_probe(target, now_s, effects, trial=False)

    def _begin_probe(
        self, target: int, now_s: float, effects: list[GossipEffect], *, trial: bool
    ) -> Probe | None:
        probe = self._probes.begin(target, now_s, trial=trial)
        if probe is not None:
            self._ping(target, probe.number, now_s, effects)
        return probe

    def _ping(self, target: int, number: int, now_s: float, effects: list[GossipEffect]) -> None:
        """With the news that it is suspected, if it is."""
        payload = encode_ping(number, self._address)
        suspicion = self._claims.suspicion_of(target)
        if suspicion is not None:
            payload += _for_one(target, suspicion, now_s)
        self._send(target, payload + self._spread.riders(target, now_s), effects)

    def _ask_others(self, probe: Probe, now_s: float, effects: list[GossipEffect]) -> None:
        """No direct answer yet: ask through others, and over TCP at once."""
        helpers = [each for each in self._some_members(HELPERS + 1) if each != probe.target]
        for helper in helpers[:HELPERS]:
            self._send(helper, encode_ping_for(probe.number, probe.target), effects)
        probe.helpers += len(helpers[:HELPERS])
        if probe.rounds > 1 or not probe.trial:
            self._ping(probe.target, probe.number, now_s, effects)
        profile = self._profile_of(probe.target)
        if profile is not None:
            effects.append(TryConnect(profile.address.node))

    def _answer_ping(
        self, ping: Ping | PingFor, sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        if isinstance(ping, Ping):
            payload = encode_ack(ping.number) + self._spread.riders(sender, now_s)
            if ring_id(ping.address) == sender:
                self._send_to(ping.address, payload, effects)
                if self._profile_of(sender) is None:
                    self._hint(ping.address)
                if self._view.find(sender) < 0:  # it should know that, and introduce itself
                    self._contact(ping.address, now_s, effects)
            return
        if self._profile_of(ping.target) is None or len(self._probes.helping) >= HELPING_MAX:
            self._replies.append(encode_nack(ping.number))
            return
        number = self._probes.new_number()
        self._probes.helping[number] = (ping.number, sender)
        self._timers.set(("nack", number), now_s + HELP_NACK_S)
        self._timers.set(("help", number), now_s + HELP_S)
        self._ping(ping.target, number, now_s, effects)

    def _nack_late(self, number: int, now_s: float, effects: list[GossipEffect]) -> None:
        helping = self._probes.helping.get(number)
        if helping is not None:
            theirs, asker = helping
            self._send(asker, encode_nack(theirs), effects)

    def _take_ack(self, number: int, now_s: float, effects: list[GossipEffect]) -> None:
        helping = self._probes.helping.pop(number, None)
        if helping is not None:
            theirs, asker = helping
            self._timers.set(("nack", number), None)
            self._timers.set(("help", number), None)
            self._send(asker, encode_ack(theirs), effects)
            return
        verdict = self._probes.acked(number)
        if verdict is not None:
            self._judge(verdict, now_s, effects)

    def _ask_for_unconfirmed(self) -> None:
        """Who does not confirm what it is sent is probed next."""
        for subject in self._spread.unconfirmed:
            self._probes.ask_next(subject)
        self._spread.unconfirmed.clear()

    def _is_fresh(self, subject: int, now_s: float) -> bool:
        """It has said something not too long ago: that its kernel answers is worth something."""
        index = self._view.find(subject)
        if index < 0:
            return False
        return now_s - self._view.made_s[index] < HUNG_PERIODS * self.period_s()

    # --- who is suspected, and who is gone ------------------------------------------------------

    def _judge(self, verdict: Verdict, now_s: float, effects: list[GossipEffect]) -> None:
        subject = verdict.target
        index = self._view.find(subject)
        if index < 0:
            return
        if verdict.alive:
            self._claims.acquit(subject)
        elif verdict.trial and self._claims.suspicion_of(subject) is None:
            pass  # it has cleared itself meanwhile
        elif not verdict.fair:
            if verdict.trial:
                self._claims.put_off(subject, now_s)
        elif verdict.trial:
            claim = self._claims.convict(index, now_s)
            self._lose(subject)
            self._tell_all(claim, now_s, effects)
        else:
            accusation = self._claims.accuse(index, now_s)
            if accusation is not None:
                self._tell_all(accusation, now_s, effects)

    def _tell_all(self, claim: Claim, now_s: float, effects: list[GossipEffect]) -> None:
        """What this node itself claims; first to whom it is about, who may contradict."""
        self._send(claim.subject, _for_one(claim.subject, claim, now_s), effects)
        self._spread.say(claim, self.own_id, now_s)

    def _try_suspect(self, subject: int, now_s: float, effects: list[GossipEffect]) -> None:
        """Its time is over. Nobody is declared dead without being asked once more."""
        probe = self._begin_probe(subject, now_s, effects, trial=True)
        self._claims.put_off(subject, now_s)
        if probe is not None:
            self._probes.next_round(probe, now_s)
            self._ask_others(probe, now_s, effects)

    def _lose(self, subject: int) -> None:
        """It is no member any more."""
        self._unprofiled.pop(subject, None)
        self._report_dead(self._claims.gone[subject].profile)

    def _take_rumours(
        self, section: Rumours, sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        reach = self._view.reach(section.limit)
        for rumour in section.rumours:
            claim = Claim(*rumour[:5], now_s - rumour.age * AGE_UNIT_S)
            if claim.subject == self.own_id:
                self._refute(claim.epoch, now_s)
                # Everybody hears of it in time, but whoever says so should at once.
                self._replies.append(encode_statuses(stay(sender), [self._packed_own(now_s)]))
                continue
            heard = self._claims.hear(claim, reach, now_s)
            if heard is Heard.REFUTED:
                self._contradict(claim, sender, now_s, effects)
            elif heard is not Heard.KNOWN:
                if heard is Heard.GONE:
                    self._lose(claim.subject)
                self._spread.say(claim, section.limit, now_s)

    def _contradict(
        self, claim: Claim, sender: int, now_s: float, effects: list[GossipEffect]
    ) -> None:
        """Something else is known here of somebody who is alive."""
        status = self._packed_status(claim.subject, now_s)
        if status is not None:
            self._replies.append(encode_statuses(stay(sender), [status]))
        if claim.kind is RumourKind.DEAD:  # it should know, and contradict
            self._send(claim.subject, _for_one(claim.subject, claim, now_s), effects)


def _for_one(target: int, claim: Claim, now_s: float) -> bytes:
    return encode_rumours(stay(target), [claim.packed(now_s)])


def _fitting(replies: list[bytes]) -> bytes:
    """As many of them as fit into one datagram, the first ones first."""
    payload = b""
    for each in replies:
        if len(payload) + len(each) <= PAYLOAD_BYTES_MAX:
            payload += each
    return payload


def _load_changed(said: int, load: int) -> bool:
    """From none to some, from some to none, or by more than half and by more than one."""
    return (said == 0) != (load == 0) or abs(said - load) > max(1, said / 2)


def _former_member(gone: Gone) -> Member:
    state = MemberState.LEFT if gone.claim.kind is RumourKind.LEFT else MemberState.DEAD
    status = None if gone.body is None else read_body(gone.body)
    return Member(gone.profile, status, state, gone.made_s)
