"""The swarms that the tracker knows: who is in them, who is whose neighbour, who has which chunk.

Pure logic, and a part of ``TrackerState``, which grants the leases: here are the claims of swarms
for slots, but nobody is chosen to read.

For every chunk of a swarm there is one *guardian*, a connected node that has it. A chunk whose
guardian is gone is asked for among the neighbours of that guardian (only they can have it from
there) and, where these are few, among some others; it is read from the file server again only if
none of them has it. A replica's holder joins the swarm and guards what nobody else does. A swarm
ends with the last node that fetches.

Invariants: every chunk of a swarm is unread, leased, asked for, or guarded by a connected member; a
search ends by itself; neighbours are neighbours on both sides; a swarm with something to read has a
claim in its file server's ledger, and no other swarm has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from swarmcache.chunks import ChunkLayout, full_mask, mask_from_bytes, mask_to_bytes
from swarmcache.messages import (
    LOADS_MAX,
    Holding,
    Join,
    Joined,
    Missing,
    Peers,
    Query,
    ReportCorrupt,
    Revoked,
    Suspected,
)
from swarmcache.neighbourhood import Neighbourhood
from swarmcache.slot_ledger import SlotLedger
from swarmcache.timers import Timers
from swarmcache.tracker_events import TrackerEffect
from swarmcache.tracker_nodes import TrackerNodes

QUERY_S = 1.0

# So many are asked who has the chunks of a guardian that is gone, where there are so many. A few
# neighbours may die together with it, while others have got the chunks from them.
ASKED_MIN = 8


@dataclass(slots=True)
class Member:
    """One node in one swarm. ``trusted``: nobody has had wrong bytes of this file from it."""

    can_read: bool
    complete: bool
    trusted: bool = True
    guarded: int = 0
    failures: int = 0
    failed_s: float = 0.0
    reading: bool = False

    def read_failed(self, now_s: float) -> None:
        """It was to read chunks, and has read none."""
        self.failures += 1
        self.failed_s = now_s


@dataclass(slots=True)
class Search:
    """Chunks without a guardian, and the nodes that have not yet said whether they have them.

    ``doubted``: the guardian itself is asked, since somebody cannot get the chunks. Its neighbours
    are next.
    """

    version_id: bytes
    wanted: int
    waiting: set[str]
    doubted: str | None = None


@dataclass(slots=True)
class Swarm:
    """The nodes that hold or fetch chunks of one file version, while somebody fetches.

    ``order``: its members, who is to read first.
    """

    version_id: bytes
    file_server: str
    user: str
    layout: ChunkLayout
    unread: int
    neighbourhood: Neighbourhood
    members: dict[str, Member] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    searches: set[int] = field(default_factory=set)

    @property
    def wanted(self) -> bool:
        """Somebody fetches it still."""
        return any(not member.complete for member in self.members.values())


class TrackerSwarms:
    """All swarms. ``nodes``: those that are connected; ``ledger``: that of a file server, by name;
    ``holders``: the nodes that have all of a file version.

    All are the caller's, who grants what is free after each call that may have left chunks unread.
    """

    def __init__(
        self,
        rng: Random,
        nodes: TrackerNodes,
        ledger: Callable[[str], SlotLedger],
        holders: Callable[[bytes], Collection[str]],
        *,
        peers_max: int,
    ) -> None:
        self._rng = rng
        self._nodes = nodes
        self._ledger = ledger
        self._holders = holders
        self._peers_max = peers_max
        self._swarms: dict[bytes, Swarm] = {}
        self._of_node: dict[str, set[bytes]] = {}
        self._searches: dict[int, Search] = {}
        self._next_query_id = 1
        self._timers: Timers[int] = Timers()  # by query

    def __getitem__(self, version_id: bytes) -> Swarm:
        return self._swarms[version_id]

    def get(self, version_id: bytes) -> Swarm | None:
        """The swarm of this file version, if somebody fetches it."""
        return self._swarms.get(version_id)

    def sorted(self) -> Iterator[Swarm]:
        """All swarms, by file version."""
        return (swarm for _, swarm in sorted(self._swarms.items()))

    def of(self, node: str) -> Collection[bytes]:
        """The file versions in whose swarms a node is."""
        return self._of_node.get(node, ())

    # --- members come ---------------------------------------------------------------------------

    def create(self, message: Join, layout: ChunkLayout) -> Swarm:
        """A swarm for a file version that nobody fetched; of its holders, so many as suffice."""
        version_id = message.version_id
        unread = full_mask(layout.chunk_count)
        neighbourhood = Neighbourhood(self._rng, self._peers_max)
        swarm = Swarm(version_id, message.file_server, message.user, layout, unread, neighbourhood)
        self._swarms[version_id] = swarm
        chosen = sorted(self._holders(version_id))
        if len(chosen) > self._peers_max // 2:
            chosen = self._rng.sample(chosen, self._peers_max // 2)
        for holder in chosen:
            self._add_member(swarm, holder, complete=True)
        return swarm

    def join(
        self, swarm: Swarm, name: str, message: Join, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A node fetches it, or fetches it anew, and says what it holds of it."""
        member = swarm.members.get(name)
        if member is None:
            member = self._add_member(swarm, name, complete=False)
        member.can_read = message.can_read
        member.complete = False
        layout = ChunkLayout(message.size_bytes, message.chunk_size_bytes)
        held = mask_from_bytes(message.held) if layout == swarm.layout and member.trusted else 0
        lost = member.guarded & ~held
        found = held & swarm.unread
        swarm.unread ^= found
        for query_id in sorted(swarm.searches):  # those that were asked may be gone
            search = self._searches[query_id]
            found |= held & search.wanted
            search.wanted &= ~held
            if not search.wanted:
                self._end_search(query_id, now_s, effects)
        member.guarded = (member.guarded | found) & held
        if lost:
            self._take_over(swarm, lost, self._likely_to_have(swarm, name), now_s, effects)
        joined = Joined(swarm.version_id, swarm.layout.chunk_size_bytes)
        self._nodes.tell(name, joined, effects)
        self._introduce(swarm, name, effects)
        self.reclaim(swarm)

    def completed(self, swarm: Swarm, name: str, effects: list[TrackerEffect]) -> None:
        """A node has all of it: a member that is through, or one that knew it before."""
        member = swarm.members.get(name)
        if member is None:
            self._add_member(swarm, name, complete=True)
            self._introduce(swarm, name, effects)
        else:
            member.complete = True
            if member.trusted:
                member.guarded |= swarm.unread
                swarm.unread = 0
        if swarm.wanted:
            self.reclaim(swarm)
        else:
            self._dissolve(swarm)

    def _add_member(self, swarm: Swarm, name: str, *, complete: bool) -> Member:
        member = Member(can_read=False, complete=complete)
        swarm.members[name] = member
        swarm.order.append(name)
        swarm.neighbourhood.add(name, self._nodes[name].address.rack)
        self._of_node.setdefault(name, set()).add(swarm.version_id)
        if complete:
            member.guarded |= swarm.unread
            swarm.unread = 0
        return member

    # --- neighbours -----------------------------------------------------------------------------

    def _introduce(self, swarm: Swarm, name: str, effects: list[TrackerEffect]) -> None:
        """Give a member neighbours (those it has count anew) and tell both sides."""
        known = sorted(swarm.neighbourhood.of(name))
        chosen = known + swarm.neighbourhood.choose(name, swarm.order)
        for other in chosen:
            self._link(swarm, name, other, effects)
        addresses = [self._nodes[other].address for other in chosen]
        for start in range(0, len(addresses), LOADS_MAX):
            part = addresses[start : start + LOADS_MAX]
            peers = Peers(swarm.version_id, part, swarm.layout.chunk_size_bytes)
            self._nodes.tell(name, peers, effects)

    def _link(self, swarm: Swarm, name: str, other: str, effects: list[TrackerEffect]) -> None:
        """Make two members neighbours, and tell ``other``."""
        swarm.neighbourhood.link(name, other)
        address = self._nodes[name].address
        peers = Peers(swarm.version_id, [address], swarm.layout.chunk_size_bytes)
        self._nodes.tell(other, peers, effects)

    # --- members go -----------------------------------------------------------------------------

    def leave(
        self, version_id: bytes, name: str, now_s: float, effects: list[TrackerEffect]
    ) -> Swarm | None:
        """A node does not fetch it any more, nor hold it. None: it was no member anyway."""
        swarm = self._swarms.get(version_id)
        if swarm is None or name not in swarm.members:
            return None
        self._remove_member(swarm, name, 0, now_s, effects)
        return swarm

    def lose_node(
        self, name: str, reading: Mapping[bytes, int], now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A node is no longer connected; ``reading``: the chunks of file versions that it read."""
        for version_id in sorted(self.of(name)):
            orphaned = reading.get(version_id, 0)
            self._remove_member(self._swarms[version_id], name, orphaned, now_s, effects)
        for query_id, search in list(self._searches.items()):
            if name in search.waiting:
                self._search_answered(query_id, name, 0, now_s, effects)

    def _remove_member(
        self, swarm: Swarm, name: str, orphaned: int, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A node is no longer in the swarm; somebody must take over what it guarded.

        A node that is lost is still a member of its other swarms.
        """
        member = swarm.members.pop(name)
        swarm.order.remove(name)
        self._forget_membership(name, swarm.version_id)
        likely = self._likely_to_have(swarm, name)
        neighbours = swarm.neighbourhood.remove(name)
        if not swarm.wanted:
            self._dissolve(swarm)
            return
        self._take_over(swarm, member.guarded | orphaned, likely, now_s, effects)
        for other in neighbours:
            if swarm.neighbourhood.lacks(other):
                self._introduce(swarm, other, effects)
        self.reclaim(swarm)

    def revoke(self, swarm: Swarm, reason: str, effects: list[TrackerEffect]) -> None:
        """The source is no longer this file version: who fetches it drops all that it has of it.

        Replicas stay: every chunk of them was read while the source was what it should be.
        """
        for name, member in sorted(swarm.members.items()):
            if not member.complete:
                self._nodes.tell(name, Revoked(swarm.version_id, reason), effects)
        self._dissolve(swarm)

    def _dissolve(self, swarm: Swarm) -> None:
        """Nobody fetches it any more: what remains are replicas."""
        del self._swarms[swarm.version_id]
        self._ledger(swarm.file_server).withdraw(swarm.version_id, swarm.user)
        for query_id in swarm.searches:
            del self._searches[query_id]
            self._timers.set(query_id, None)
        for name in swarm.members:
            self._forget_membership(name, swarm.version_id)

    def _forget_membership(self, name: str, version_id: bytes) -> None:
        of_node = self._of_node[name]
        of_node.discard(version_id)
        if not of_node:
            del self._of_node[name]

    # --- what is read ---------------------------------------------------------------------------

    def reclaim(self, swarm: Swarm) -> None:
        """Let the queue know whether this swarm has chunks that must be read."""
        ledger = self._ledger(swarm.file_server)
        if swarm.unread:
            ledger.claim(swarm.version_id, swarm.user)
        else:
            ledger.withdraw(swarm.version_id, swarm.user)

    def reading_begins(self, swarm: Swarm, name: str, chunks: int) -> None:
        """A member has a lease for chunks that were unread."""
        swarm.members[name].reading = True
        swarm.unread &= ~chunks
        self.reclaim(swarm)

    def reading_ends(self, swarm: Swarm, name: str, chunks: int, held: int) -> None:
        """A member has given its lease for ``chunks`` back; it says which of them it holds."""
        member = swarm.members.get(name)
        read = chunks & held
        if member is None or not member.trusted:
            read = 0
        else:
            member.guarded |= read
        if member is not None:
            member.reading = False
        swarm.unread &= ~read
        self._orphan(swarm, chunks & ~read)
        self.reclaim(swarm)

    def reading_ran_out(
        self, swarm: Swarm, name: str, chunks: int, now_s: float, effects: list[TrackerEffect]
    ) -> None:
        """A reader was silent for too long. Others may have what it has read."""
        member = swarm.members.get(name)
        likely: list[str] = []
        if member is not None:
            member.reading = False
            member.read_failed(now_s)
            likely = self._likely_to_have(swarm, name)
        self._take_over(swarm, chunks, likely, now_s, effects)
        self.reclaim(swarm)

    # --- guardians ------------------------------------------------------------------------------

    def _take_over(
        self,
        swarm: Swarm,
        chunks: int,
        likely: list[str],
        now_s: float,
        effects: list[TrackerEffect],
    ) -> None:
        """Find a new guardian for chunks: a complete member, or one of those who may have them."""
        reliable = self._complete_member(swarm) is not None
        if chunks and not reliable:
            reliable = self._enlist_holder(swarm, effects)
        if reliable or not likely or not chunks:
            self._orphan(swarm, chunks)
            return
        self._search(swarm, chunks, likely, now_s, effects)

    def _likely_to_have(self, swarm: Swarm, name: str) -> list[str]:
        """Who may have the chunks that a member guarded."""
        neighbours = swarm.neighbourhood.of(name)
        others: list[str] = []
        if len(neighbours) < ASKED_MIN:
            others = [
                other
                for other, member in swarm.members.items()
                if other != name and other not in neighbours
                if member.trusted and not self._nodes[other].silent
            ]
            others = self._rng.sample(others, min(len(others), ASKED_MIN - len(neighbours)))
        return sorted(neighbours) + others

    def _enlist_holder(self, swarm: Swarm, effects: list[TrackerEffect]) -> bool:
        """Another holder becomes a member, if there is one: those that were chosen are gone."""
        for name in sorted(self._holders(swarm.version_id)):
            if name not in swarm.members and not self._nodes[name].silent:
                self._add_member(swarm, name, complete=True)
                self._introduce(swarm, name, effects)
                return True
        return False

    def _complete_member(self, swarm: Swarm) -> Member | None:
        """A member that can be relied on to have every chunk."""
        for name, member in swarm.members.items():
            if member.complete and member.trusted and not self._nodes[name].silent:
                return member
        return None

    def _orphan(self, swarm: Swarm, chunks: int) -> None:
        """Chunks that nobody guards: a complete member does from now on, or they are unread."""
        member = self._complete_member(swarm)
        if member is not None:
            member.guarded |= chunks
        else:
            swarm.unread |= chunks

    def missing(
        self, name: str, message: Missing, now_s: float, effects: list[TrackerEffect]
    ) -> Swarm | None:
        """A member cannot get chunks: ask those who are said to have them, and introduce them.

        None: it is no member.
        """
        swarm = self._swarms.get(message.version_id)
        if swarm is None or name not in swarm.members:
            return None
        wanted = mask_from_bytes(message.wanted)
        searches = [self._searches[query_id] for query_id in sorted(swarm.searches)]
        doubted: dict[str, None] = {
            search.doubted: None
            for search in searches
            if search.doubted is not None and search.wanted & wanted
        }
        for other in list(swarm.order):
            member = swarm.members[other]
            chunks = member.guarded & wanted
            if not chunks or other == name:
                continue
            member.guarded ^= chunks
            wanted ^= chunks
            self._search(swarm, chunks, [other], now_s, effects, doubted=other)
            doubted[other] = None
        # Also those who are neighbours: one of them may have parted when it could not reach the
        # other, who waits to be dialled. And those whom another one has made us ask just now.
        found = [other for other in doubted if other != name and other in swarm.members]
        if not swarm.neighbourhood.of(name).isdisjoint(found):
            # It has had no success with somebody who has them, so others may have more time.
            found += swarm.neighbourhood.choose_one(name, swarm.order)
        for other in found:
            self._link(swarm, name, other, effects)
            self._link(swarm, other, name, effects)
        return swarm

    def distrust(
        self, message: ReportCorrupt, now_s: float, effects: list[TrackerEffect]
    ) -> Swarm | None:
        """A node delivered wrong bytes: in this swarm it guards nothing and reads nothing more.

        One report is enough, since whoever sent it will not ask that node again and needs its
        chunks from somebody else. It counts for this swarm only: a reporter whose own memory is bad
        would otherwise take the whole cluster's nodes away. None: it is no member.
        """
        if message.node in self._nodes:
            self._nodes.tell(message.node, Suspected(message.version_id), effects)
        swarm = self._swarms.get(message.version_id)
        member = swarm.members.get(message.node) if swarm is not None else None
        if swarm is None or member is None:
            return None
        member.trusted = False
        chunks, member.guarded = member.guarded, 0
        likely = self._likely_to_have(swarm, message.node)
        self._take_over(swarm, chunks, likely, now_s, effects)
        self.reclaim(swarm)
        return swarm

    # --- searches -------------------------------------------------------------------------------

    def _search(
        self,
        swarm: Swarm,
        chunks: int,
        nodes: list[str],
        now_s: float,
        effects: list[TrackerEffect],
        doubted: str | None = None,
    ) -> None:
        """Ask nodes which of these chunks they have."""
        query_id = self._next_query_id
        self._next_query_id += 1
        self._searches[query_id] = Search(swarm.version_id, chunks, set(nodes), doubted)
        swarm.searches.add(query_id)
        self._timers.set(query_id, now_s + QUERY_S)
        query = Query(swarm.version_id, query_id, mask_to_bytes(chunks))
        for node in nodes:
            self._nodes.tell(node, query, effects)

    def holding(
        self, name: str, message: Holding, now_s: float, effects: list[TrackerEffect]
    ) -> Swarm | None:
        """A node says which of the chunks it has that it was asked for. None: nobody waits for
        that any more."""
        search = self._searches.get(message.query_id)
        if search is None or name not in search.waiting:
            return None
        held = mask_from_bytes(message.held)
        self._search_answered(message.query_id, name, held, now_s, effects)
        return self._swarms.get(search.version_id)

    def _search_answered(
        self,
        query_id: int,
        name: str,
        held: int,
        now_s: float,
        effects: list[TrackerEffect],
    ) -> None:
        search = self._searches[query_id]
        search.waiting.discard(name)
        swarm = self._swarms[search.version_id]
        member = swarm.members.get(name)
        if member is not None and member.trusted:
            member.guarded |= held & search.wanted
            search.wanted &= ~held
        if not search.wanted or not search.waiting:
            self._end_search(query_id, now_s, effects)

    def _end_search(self, query_id: int, now_s: float, effects: list[TrackerEffect]) -> None:
        """What nobody has must be read again."""
        search = self._searches.pop(query_id)
        self._timers.set(query_id, None)
        swarm = self._swarms[search.version_id]
        swarm.searches.discard(query_id)
        if search.doubted in swarm.members:
            likely = self._likely_to_have(swarm, search.doubted)
            self._take_over(swarm, search.wanted, likely, now_s, effects)
        else:
            self._orphan(swarm, search.wanted)
        self.reclaim(swarm)

    # --- time -----------------------------------------------------------------------------------

    def wake_at_s(self) -> float | None:
        """When ``end_searches`` may have something to do."""
        return self._timers.next_at_s()

    def end_searches(self, now_s: float, effects: list[TrackerEffect]) -> None:
        """Searches that have taken too long end; who has not answered is silent."""
        for query_id in self._timers.pop_due(now_s):
            for name in self._searches[query_id].waiting:
                self._nodes[name].silent = True
            self._end_search(query_id, now_s, effects)

    def check(self, leased: Mapping[bytes, int]) -> None:
        """Assert the invariants. ``leased``: the chunks of file versions that are being read."""
        self._timers.check()
        for version_id, swarm in self._swarms.items():
            assert version_id == swarm.version_id, "a swarm under another's id"
            self._check_swarm(swarm, leased.get(version_id, 0))
            claimed = (version_id, swarm.user) in self._ledger(swarm.file_server).waiting()
            assert claimed == bool(swarm.unread), "a claim without unread chunks, or none with some"
        for query_id, search in self._searches.items():
            assert query_id in self._swarms[search.version_id].searches, "a search of no swarm"
        for name, version_ids in self._of_node.items():
            for version_id in version_ids:
                assert name in self._swarms[version_id].members, "a node is in a swarm no longer"

    def _check_swarm(self, swarm: Swarm, leased: int) -> None:
        known = swarm.unread | leased
        for query_id in swarm.searches:
            known |= self._searches[query_id].wanted
            ends = self._timers.at_s(query_id) is not None
            assert ends, "a search that ends only if everybody answers"
        for node, member in swarm.members.items():
            assert node in self._nodes, "a member is not connected"
            assert swarm.version_id in self._of_node[node], "a node forgot its swarm"
            known |= member.guarded
        swarm.neighbourhood.check()
        assert known == full_mask(swarm.layout.chunk_count), "a chunk is lost"
        assert sorted(swarm.order) == sorted(swarm.members), "members and their order differ"
