"""One file version on its way to this node: which chunk to ask whom for, and whom to tell.

Pure logic: not responsible for sending or receiving in any way. ``peer_state.py`` feeds it what
happened and carries its requests out of the machine.

A chunk is missing, in flight (asked of one or more peers), being read (in a range leased to this
node) or held (on disk, digest right). Sets of chunks are bit masks.

Where racks are known each chunk should come into a rack once. So peers in other racks are asked
only for what nobody in this one has or is fetching (``rack_view.py``), which is the rarest there
is, and therefore first; and of the peers in another rack one after the other is told of a new chunk
first, so that they need not find out who fetches it.

Invariant: every chunk is in exactly one of these four states; a chunk is asked only of a peer that
announced it with the digest that we expect, at most once per peer, and of two peers at once only
when nothing else is left to ask for.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from swarmcache.chunk_picker import ChunkPicker
from swarmcache.chunks import (
    DIGEST_BYTES,
    ChunkLayout,
    FileVersion,
    chunks_in,
    full_mask,
    mask_of,
    range_mask,
)
from swarmcache.messages import HAVE_CHUNKS_MAX, Have, NodeAddress
from swarmcache.peer_events import FetchChunk, TellPeer
from swarmcache.rack_view import RackView

# A peer that takes this many times as long as others is not asked again for that it has just been.
SLOW_FACTOR = 2.0
# Announcements of one download are collected this long at the most: 200 messages per second and
# neighbour, whatever the rate.
ANNOUNCE_INTERVAL_S = 0.005
# A chunk that so many neighbours have already can wait: one more source for it matters little, and
# soon many neighbours have it and need not be told. Saves half of the messages of a large swarm;
# the last of 300 simulated nodes loses 1 % by it (and 3 % if 0.5 s pass).
COMMON_HOLDERS = 3
# Of so few neighbours one is enough, which can serve all of them. Measured with eight nodes at
# 200 Mbit/s: 30 % fewer messages, 14 % less processor time of all daemons.
FEW_NEIGHBOURS_MAX = 8
COMMON_INTERVAL_S = 0.1
# A request is repeated at another peer when nothing else is left to ask for and it has taken this
# many times the usual time.
HEDGE_FACTOR = 3.0
HEDGE_MIN_S = 0.2
HEDGES_MIN = 2  # and one more for every hundred chunks
STALL_S = 2.0
DEADLINE_S = 5.0
DEADLINE_RATE_BYTES_PER_S = 256 * 1024
BUSY_BACKOFF_S = 0.05
FAILURE_BACKOFF_S = 1.0
FAILURE_BACKOFF_MAX_S = 30.0
# The digest of a chunk that nobody has announced.
UNKNOWN = b""
ALL = -1  # the mask of all chunks


@dataclass(slots=True)
class PeerView:
    """What a download knows of one neighbour.

    ``mask``: chunks that it has told of. ``complete``: it has all. ``source``: it may be asked (not
    distrusted). ``busy``: it had no upload slot to spare when it came. ``flights``: how many chunks
    it is being asked for. ``near``: it is in the rack of this node. ``turns``: the chunks that it
    is told of at once; of those in another rack each has some. ``service_s``: how long a chunk from
    it takes, smoothed.
    """

    address: NodeAddress
    mask: int = 0
    complete: bool = False
    source: bool = True
    busy: bool = False
    flights: int = 0
    near: bool = False
    turns: int = ALL
    service_s: float = 0.0
    failures: int = 0
    not_before_s: float = 0.0


class Download:
    """The chunks of one file version, and the neighbours that have them."""

    def __init__(
        self,
        version: FileVersion,
        layout: ChunkLayout,
        rng: Random,
        window: int,
        *,
        rack: str = "",
    ) -> None:
        """``window``: the most chunks in flight; as many as a peer sends at once. ``rack``: where
        this node stands."""
        self.version = version
        self.layout = layout
        self.chunk_count = layout.chunk_count
        self.peers: dict[str, PeerView] = {}
        self._neighbours_most = 0  # at one time: those who are complete leave
        self.held = 0
        self.from_peers_bytes = 0
        self.from_file_server_bytes = 0
        self.recovered_bytes = 0
        self.hedges = 0
        self._hedges_max = HEDGES_MIN + self.chunk_count // 100
        self.conflicts = 0
        self._full = full_mask(self.chunk_count)
        self._missing = self._full
        self._reading = 0
        self._flights: dict[int, dict[str, float]] = {}
        self._flight_count = 0
        self._digests = [UNKNOWN] * self.chunk_count
        self._picker = ChunkPicker(self.chunk_count, rng)
        self._rng = rng
        self._window = window
        self._last_source: PeerView | None = None
        self._rack = RackView(rack)
        self._bringing = 0  # chunks asked for in other racks, and not yet announced in this one
        self._claimed = 0
        self._fresh = 0
        self._late = 0
        self._late_due_s = math.inf
        self._turns_taken = False
        self._common = 0
        self._announced_s = -math.inf
        self._common_since_s = math.inf
        self._service_s = 0.0
        self._backoff_ends_s: list[float] = []

    # --- what is known --------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """All chunks are held."""
        return self.held == self._full

    @property
    def digests(self) -> tuple[bytes, ...]:
        """The digests of all chunks of a complete download."""
        assert self.complete, "digests of a file that is not complete"
        return tuple(self._digests)

    def unreachable(self, now_s: float) -> int:
        """Mask of the missing chunks that no neighbour has who answers."""
        reach = 0
        for peer in self.peers.values():
            if peer.source and peer.not_before_s <= now_s:
                reach |= peer.mask
        return self._missing & ~reach

    # --- neighbours -----------------------------------------------------------------------------

    def add_peer(
        self, address: NodeAddress, *, source: bool, busy: bool = False, again: bool = False
    ) -> list[TellPeer]:
        """A neighbour is there (or introduced once more): tells it all that this node holds.

        ``again``: it is asked to do the same, since it was not listened to before.
        """
        if address.node not in self.peers:
            near = self._rack.meet(address.node, address.rack)
            # It may be back before what it was asked for has ended.
            flights = sum([address.node in asked for asked in self._flights.values()])
            self.peers[address.node] = PeerView(
                address, source=source, busy=busy, flights=flights, near=near
            )
            self._take_turns(address.rack)
            self._neighbours_most = max(self._neighbours_most, len(self.peers))
        haves = self._haves(self.held & ~self._fresh)
        haves[0].again = again
        return [TellPeer(address.node, have) for have in haves]

    def remove_peer(self, node: str) -> None:
        """A neighbour is gone. Chunks in flight from it end in their own events."""
        peer = self.peers.pop(node, None)
        if peer is not None:
            self._forget_chunks(peer, peer.mask)
            self._turn_from(peer)
            self._rack.part(node)
            self._take_turns(peer.address.rack)

    def distrust(self, node: str) -> None:
        """Never ask this neighbour again; it may still ask us."""
        peer = self.peers.get(node)
        if peer is not None and peer.source:
            self._forget_chunks(peer, peer.mask)
            peer.source = False
            self._turn_from(peer)

    def peer_has(self, node: str, chunks: Sequence[int], digests: bytes) -> bool:
        """A neighbour announced chunks, with their digests in the same order.

        The first digest heard of a chunk counts until all who announced it are gone; a neighbour
        with another one is not taken for a holder of that chunk. Returns whether there may be
        something new to ask for.
        """
        peer = self.peers.get(node)
        if peer is None:
            return False
        known = self._digests
        mask = 0
        start = 0
        for chunk in chunks:
            digest = digests[start : start + DIGEST_BYTES]
            start += DIGEST_BYTES
            if chunk >= self.chunk_count:
                self.conflicts += 1
            elif known[chunk] == digest:
                mask |= 1 << chunk
            elif known[chunk] == UNKNOWN and peer.source:
                known[chunk] = digest
                mask |= 1 << chunk
            else:
                self.conflicts += 1
        mask &= ~peer.mask
        peer.mask |= mask
        if peer.near:
            self._rack.came(mask)
        mask &= ~self.held
        if not mask or not peer.source:
            return False
        self._picker.add(mask)
        return self._flight_count < self._window and bool(mask & self._missing)

    def peer_brings(self, node: str, chunks: Sequence[int], now_s: float) -> None:
        """A neighbour in this rack has asked for chunks in another one; see ``RackView``."""
        here = [chunk for chunk in chunks if chunk < self.chunk_count]
        self._rack.brings(node, here, now_s)

    def peer_completed(self, node: str) -> None:
        """This neighbour says that it holds every chunk."""
        peer = self.peers.get(node)
        if peer is not None:
            peer.complete = True

    def peer_is_complete(self, node: str) -> bool:
        """This neighbour holds every chunk."""
        peer = self.peers.get(node)
        return peer is not None and (peer.complete or peer.mask == self._full)

    # --- what happened to chunks ----------------------------------------------------------------

    def recovered(self, digests: dict[int, bytes]) -> None:
        """Chunks that an earlier life of the daemon left on disk."""
        for chunk, digest in digests.items():
            self._digests[chunk] = digest
            self._hold(chunk)
            self.recovered_bytes += self.layout.length_bytes(chunk)

    def read_begins(self, first: int, count: int) -> None:
        """This node reads a leased range itself; what it holds of it, it reads again."""
        mask = range_mask(first, count) & self._full & self._missing
        self._missing ^= mask
        self._reading |= mask

    def read_ends(self, first: int, count: int) -> None:
        """The lease has ended; what was not read is missing again."""
        mask = range_mask(first, count) & self._reading
        self._reading ^= mask
        self._missing |= mask
        self._forget_digests(mask)

    def chunk_read(self, chunk: int, digest: bytes) -> None:
        """A chunk of a leased range is on disk. What was read here overrules what was heard."""
        known = self._digests[chunk]
        if known not in (UNKNOWN, digest):
            self.conflicts += 1
            for peer in self.peers.values():
                self._forget_chunks(peer, peer.mask & 1 << chunk)
        self._digests[chunk] = digest
        self.from_file_server_bytes += self.layout.length_bytes(chunk)
        self._hold(chunk)

    def chunk_arrived(self, chunk: int, node: str, now_s: float) -> None:
        """A chunk from a peer is on disk."""
        assert node in self._flights.get(chunk, {}), "a chunk arrived that was not asked for"
        self._hold(chunk)
        elapsed_s = self._land(chunk, node, now_s)
        length_bytes = self.layout.length_bytes(chunk)
        self.from_peers_bytes += length_bytes
        self._service_s = _smooth(self._service_s, elapsed_s)
        peer = self.peers.get(node)
        if peer is not None:
            peer.failures = 0
            peer.service_s = _smooth(peer.service_s, elapsed_s)
            if peer.source and peer.service_s < SLOW_FACTOR * self._service_s:
                self._last_source = peer

    def chunk_absent(self, chunk: int, node: str, now_s: float) -> None:
        """The peer does not have the chunk after all."""
        self._land(chunk, node, now_s)
        peer = self.peers.get(node)
        if peer is not None:
            self._forget_chunks(peer, peer.mask & 1 << chunk)

    def peer_busy(self, chunk: int, node: str, now_s: float) -> None:
        """The peer has no upload slot left: ask it again a little later."""
        self._land(chunk, node, now_s)
        self._back_off(node, now_s + BUSY_BACKOFF_S)

    def peer_failed(self, chunk: int, node: str, now_s: float) -> None:
        """The peer stalled, reset or refused: leave it for others, longer each time."""
        self._land(chunk, node, now_s)
        peer = self.peers.get(node)
        # Requests that were under way together fail together, which counts once.
        if peer is not None and peer.not_before_s <= now_s:
            peer.failures += 1
            wait_s = FAILURE_BACKOFF_S * 2 ** (peer.failures - 1)
            self._back_off(node, now_s + min(wait_s, FAILURE_BACKOFF_MAX_S))

    def chunk_corrupt(self, chunk: int, node: str, now_s: float) -> None:
        """The peer delivered wrong bytes: it is not asked again."""
        self._land(chunk, node, now_s)
        self.distrust(node)

    # --- what to do -----------------------------------------------------------------------------

    def requests(self, now_s: float, flights_max: int) -> list[FetchChunk]:
        """Chunks to ask for now, at most ``flights_max``; they count as in flight from here on."""
        requests: list[FetchChunk] = []
        room = min(flights_max, self._window - self._flight_count)
        while room > 0:
            request = self._next_request(now_s) or self._next_hedge(now_s)
            if request is None:
                break
            requests.append(request)
            room -= 1
        return requests

    def announcements(self, now_s: float) -> list[TellPeer]:
        """Tell every neighbour that lacks them the chunks that came since the last time."""
        if self._common and now_s >= self._common_due_s(now_s):
            self._fresh |= self._common
            self._common = 0
            self._common_since_s = math.inf
        told = self._claims() if self._bringing != self._claimed else []
        fresh, late = self._due(now_s)
        if not fresh | late:
            return told
        haves: dict[int, list[Have]] = {}
        random = self._rng.random
        # In random order, or those who came first would fill one another's upload slots.
        lacking = [
            (random(), node, mask)
            for node, peer in self.peers.items()
            if (mask := (fresh & peer.turns | (0 if peer.near else late)) & ~peer.mask)
        ]
        lacking.sort()
        for _, node, mask in lacking:
            if mask not in haves:
                haves[mask] = self._haves(mask)
            for have in haves[mask]:
                told.append(TellPeer(node, have))
        return told

    def _due(self, now_s: float) -> tuple[int, int]:
        """What is to be announced now: chunks that came, and those of which so far not everybody in
        other racks has been told."""
        late_is_due = self._late and now_s >= self._late_due_s
        if not (self._fresh or late_is_due) or now_s < self._announced_s + ANNOUNCE_INTERVAL_S:
            return 0, 0
        self._announced_s = now_s
        fresh, self._fresh = self._fresh, 0
        self._bringing &= ~fresh  # what the others are told of now is no longer coming
        self._claimed &= ~fresh
        if self._turns_taken:
            if not self._late:
                self._late_due_s = now_s + COMMON_INTERVAL_S
            self._late |= fresh
        late = self._late if now_s >= self._late_due_s else 0
        self._late ^= late
        return fresh, late

    def wake_at_s(self, now_s: float) -> float | None:
        """When ``requests`` or ``announcements`` may have something new without any event."""
        at_s = self._common_due_s(now_s) if self._common else math.inf
        if self._late:
            at_s = min(at_s, max(self._late_due_s, self._announced_s + ANNOUNCE_INTERVAL_S))
        if self._fresh:
            at_s = min(at_s, self._announced_s + ANNOUNCE_INTERVAL_S)
        if self._rack:
            self._rack.coming(now_s)
            at_s = min(at_s, self._rack.wake_at_s() or math.inf)
        ends_s = self._backoff_ends_s
        while ends_s and ends_s[0] <= now_s:
            heapq.heappop(ends_s)
        # With a full window the next request comes with the end of another one.
        if ends_s and ends_s[0] < at_s and self._flight_count < self._window:
            at_s = ends_s[0]
        may_hedge = self._flights and self.hedges < self._hedges_max
        if may_hedge and not self._missing & self._picker.available:
            after_s = self._hedge_after_s()
            for since_s, _ in self._asked_once():
                if now_s < since_s + after_s < at_s:
                    at_s = since_s + after_s
        return None if at_s == math.inf else at_s

    # --- inside ---------------------------------------------------------------------------------

    def _haves(self, mask: int) -> list[Have]:
        chunks = chunks_in(mask)
        version_id = self.version.version_id
        return [
            Have(
                version_id,
                part,
                b"".join([self._digests[chunk] for chunk in part]),
                chunk_size_bytes=self.layout.chunk_size_bytes,
            )
            for start in range(0, max(len(chunks), 1), HAVE_CHUNKS_MAX)
            for part in (chunks[start : start + HAVE_CHUNKS_MAX],)
        ]

    def _claims(self) -> list[TellPeer]:
        """Tell this rack what this node is fetching from others."""
        self._claimed = self._bringing
        have = Have(self.version.version_id, [], b"", coming=chunks_in(self._bringing))
        return [TellPeer(node, have) for node, peer in self.peers.items() if peer.near]

    def _take_turns(self, rack: str) -> None:
        """The neighbours in another rack are told of chunks by turns, so that one of them brings a
        chunk in and not all do. If it does not, the others hear of it a little later."""
        if not rack or rack == self._rack.label:
            return
        others = sorted(node for node, peer in self.peers.items() if peer.address.rack == rack)
        # A bit in each group of so many: a number of groups, divided by a group of ones.
        groups = -(-self.chunk_count // max(len(others), 1))
        every = ((1 << len(others) * groups) - 1) // ((1 << len(others)) - 1) if others else 0
        for turn, node in enumerate(others):
            self.peers[node].turns = every << turn if len(others) > 1 else ALL
        self._turns_taken = any(peer.turns != ALL for peer in self.peers.values())

    def _common_due_s(self, now_s: float) -> float:
        """When the chunks that can wait are to be announced; the clock starts with the first."""
        if self._common_since_s == math.inf:
            self._common_since_s = now_s
        return self._common_since_s + COMMON_INTERVAL_S

    def _hold(self, chunk: int) -> None:
        bit = 1 << chunk
        if self.held & bit:
            return
        self.held |= bit
        self._missing &= ~bit
        self._reading &= ~bit
        if not self.peers:
            self._bringing &= ~bit  # whoever joins is told of all that is held
        elif self._bringing & bit or not self._is_common(chunk):
            self._fresh |= bit
        else:
            self._common |= bit
        self._picker.forget(chunk)

    def _is_common(self, chunk: int) -> bool:
        """So many neighbours have it already that the others need not be told at once."""
        enough = 1 if self._neighbours_most <= FEW_NEIGHBOURS_MAX else COMMON_HOLDERS
        return self._picker.holders(chunk) >= enough

    def _land(self, chunk: int, node: str, now_s: float) -> float:
        """A request has ended; the chunk is missing again unless somebody else is asked for it."""
        flights = self._flights.get(chunk, {})
        since_s = flights.pop(node, None)
        if since_s is None:
            return 0.0
        self._flight_count -= 1
        if not flights:
            del self._flights[chunk]
            if not self.held >> chunk & 1:
                self._bringing &= ~(1 << chunk)
            if not (self.held | self._reading) >> chunk & 1:
                self._missing |= 1 << chunk
                self._forget_digests(1 << chunk)
        peer = self.peers.get(node)
        if peer is not None:
            peer.flights -= 1
        return now_s - since_s

    def _forget_chunks(self, peer: PeerView, mask: int) -> None:
        peer.mask &= ~mask
        if not peer.source:
            return
        self._picker.remove(mask & ~self.held)
        self._forget_digests(mask)

    def _forget_digests(self, mask: int) -> None:
        """What nobody who announced it has any more may come with another digest."""
        for chunk in chunks_in(mask & ~self._picker.available & self._missing):
            self._digests[chunk] = UNKNOWN

    def _turn_from(self, peer: PeerView) -> None:
        """Do not ask this one next."""
        if self._last_source is peer:
            self._last_source = None

    def _back_off(self, node: str, until_s: float) -> None:
        peer = self.peers.get(node)
        if peer is not None:
            peer.not_before_s = until_s
            self._turn_from(peer)
            heapq.heappush(self._backoff_ends_s, until_s)

    def _wanted_elsewhere(self, wanted: int, now_s: float) -> int:
        """What of it is to be asked for in other racks: what nobody in this one has or brings."""
        if not self._rack:
            return wanted
        here = self._rack.coming(now_s)
        for peer in self.peers.values():
            if peer.near and peer.source and not peer.failures:
                here |= peer.mask
        return wanted & ~here

    def _usable(self, now_s: float, wanted: int, elsewhere: int) -> list[PeerView]:
        """The peers that may be asked now and have something of what is wanted, in this rack and
        elsewhere."""
        peers = self.peers.values()
        usable = [
            peer
            for peer in peers
            if peer.not_before_s <= now_s
            and peer.source
            and peer.mask & (wanted if peer.near else elsewhere)
        ]
        flights_max = 1
        if len(usable) < self._window:
            sources = sum([1 for peer in peers if peer.source and peer.mask])
            flights_max = -(-self._window // max(sources, 1))
        return [peer for peer in usable if peer.flights < flights_max]

    def _next_request(self, now_s: float) -> FetchChunk | None:
        """The rarest chunk of the peer that has just delivered, or of one that we ask for least;
        first what is not yet in this rack.

        Whoever has just delivered has a place free for us; see ``upload_slots.py``. Who was busy
        and has delivered nothing yet comes after the others.
        """
        wanted = self._missing & self._picker.available
        if not wanted:
            return None
        elsewhere = self._wanted_elsewhere(wanted, now_s)
        last, self._last_source = self._last_source, None
        if last is not None and last.mask & (wanted if last.near else elsewhere):
            return self._ask_rarest(last, wanted if last.near else elsewhere, now_s)
        usable = self._usable(now_s, wanted, elsewhere)
        if not usable:
            return None
        if self._rack:
            usable = [peer for peer in usable if not peer.near] or usable
        random = self._rng.random
        loads = [peer.flights + (peer.busy and not peer.service_s) + random() for peer in usable]
        peer = usable[loads.index(min(loads))]
        return self._ask_rarest(peer, wanted if peer.near else elsewhere, now_s)

    def _ask_rarest(self, peer: PeerView, wanted: int, now_s: float) -> FetchChunk:
        chunk = self._picker.pick(wanted & peer.mask)
        assert chunk is not None, "the peer has nothing of what is wanted"
        self._missing ^= 1 << chunk
        return self._ask(chunk, peer, now_s)

    def _next_hedge(self, now_s: float) -> FetchChunk | None:
        """Nothing new is left to ask for: ask a second peer for what takes longest."""
        if self._missing & self._picker.available or self.hedges >= self._hedges_max:
            return None
        overdue_s = now_s - self._hedge_after_s()
        late = [(since_s, chunk) for since_s, chunk in self._asked_once() if since_s <= overdue_s]
        for _, chunk in sorted(late):
            asked = self._flights[chunk]
            others = [
                peer
                for peer in self._usable(now_s, 1 << chunk, 1 << chunk)
                if peer.address.node not in asked
            ]
            if others:
                self.hedges += 1
                return self._ask(chunk, self._best(others), now_s)
        return None

    def _asked_once(self) -> list[tuple[float, int]]:
        """The chunks for which one peer is asked, and since when; not those that have come in
        another way meanwhile."""
        return [
            (next(iter(flights.values())), chunk)
            for chunk, flights in self._flights.items()
            if len(flights) == 1 and not self.held >> chunk & 1
        ]

    def _hedge_after_s(self) -> float:
        return max(HEDGE_MIN_S, HEDGE_FACTOR * self._service_s)

    def _best(self, peers: Iterable[PeerView]) -> PeerView:
        """The peer that is expected to deliver a chunk first; chance decides among equals."""
        usual_s = self._service_s or 1.0
        random = self._rng.random
        return min(
            peers,
            key=lambda peer: (
                (peer.flights + 1) * (peer.service_s or usual_s) + 0.1 * usual_s * random()
            ),
        )

    def _ask(self, chunk: int, peer: PeerView, now_s: float) -> FetchChunk:
        node = peer.address.node
        self._flights.setdefault(chunk, {})[node] = now_s
        self._flight_count += 1
        peer.flights += 1
        if self._rack and not peer.near:
            self._bringing |= 1 << chunk
        length_bytes = self.layout.length_bytes(chunk)
        return FetchChunk(
            self.version.version_id,
            chunk,
            length_bytes,
            self._digests[chunk],
            peer.address,
            self.held.bit_count(),
            deadline_s=DEADLINE_S + length_bytes / DEADLINE_RATE_BYTES_PER_S,
            stall_s=STALL_S,
        )

    def check(self) -> None:
        """Assert the invariant."""
        self._picker.check()
        self._rack.check()
        known = mask_of(self._flights) | self._fresh
        assert not self._bringing & ~known, (
            "what is said to be coming is not, or has been announced"
        )
        for node, peer in self.peers.items():
            asked = sum(node in flights for flights in self._flights.values())
            assert peer.flights == asked, "what a neighbour is asked for is miscounted"
            assert peer.near == (node in self._rack), "a neighbour has moved to another rack"
            assert peer.turns == ALL or not peer.near, "a neighbour in this rack hears of less"
        flying = mask_of(self._flights) & ~self.held & ~self._reading
        assert not self.held & self._missing, "a held chunk is missing"
        assert not self.held & self._reading, "a held chunk is being read"
        assert not self._reading & self._missing, "a chunk being read is missing"
        assert not flying & self._missing, "a chunk in flight is missing"
        assert self.held | self._missing | self._reading | flying == self._full, "a chunk is lost"
        assert self._flight_count == sum(len(flights) for flights in self._flights.values())
        for chunk in chunks_in(self.held):
            assert self._digests[chunk] != UNKNOWN, "a held chunk without a digest"
        available = 0
        for peer in self.peers.values():
            available |= peer.mask if peer.source else 0
        assert available & ~self.held == self._picker.available, "the picker miscounts"


def _smooth(old: float, new: float) -> float:
    """Exponential smoothing with weight 1/4, from the first value on."""
    return new if old == 0.0 else old + (new - old) / 4
