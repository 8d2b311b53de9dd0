"""One download: every chunk in one state, asked of the right peers, told to those who lack it."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmcache.chunks import ChunkLayout, FileVersion, chunks_in, full_mask
from swarmcache.download import (
    ANNOUNCE_INTERVAL_S,
    COMMON_INTERVAL_S,
    Download,
)
from swarmcache.messages import HAVE_CHUNKS_MAX, Have, NodeAddress
from swarmcache.peer_events import FetchChunk, TellPeer
from swarmcache.rack_view import COMING_S

CHUNK_BYTES = 100
WINDOW = 4
NODES = ["a", "b", "c", "d"]
nodes = st.sampled_from(NODES)


def right(chunk: int) -> bytes:
    return b"right %03d" % chunk + bytes(23)


def wrong(chunk: int) -> bytes:
    return b"wrong %03d" % chunk + bytes(23)


def address(node: str, rack: str = "") -> NodeAddress:
    return NodeAddress(node, 7382, rack=rack)


def fresh(chunk_count: int, *, seed: int = 1, peers: str = "", rack: str = "") -> Download:
    """A download whose last chunk is one byte long, with these peers."""
    size_bytes = max((chunk_count - 1) * CHUNK_BYTES + 1, 0)
    layout = ChunkLayout(size_bytes, CHUNK_BYTES)
    assert layout.chunk_count == chunk_count
    version = FileVersion(b"/nfs/file", size_bytes, 1)
    download = Download(version, layout, Random(seed), WINDOW, rack=rack)
    for node in peers:
        download.add_peer(address(node), source=True)
    return download


def announce(download: Download, node: str, *chunks: int) -> None:
    download.peer_has(node, chunks, b"".join(right(chunk) for chunk in chunks))


def told_chunks(told: list[TellPeer]) -> Counter[tuple[str, int]]:
    """Who was told of which chunk how often."""
    return Counter((tell.node, chunk) for tell in told for chunk in _chunks_of(tell))


def _chunks_of(tell: TellPeer) -> list[int]:
    return list(getattr(tell.message, "chunks", []))


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Peers come, lie, stall and go; leases begin and end; chunks come from both sides."""

    @initialize(
        chunk_count=st.integers(0, 7),
        seed=st.integers(0, 3),
        racks=st.lists(st.sampled_from(["", "r1", "r2"]), min_size=5, max_size=5),
        data=st.data(),
    )
    def begin(self, chunk_count: int, seed: int, racks: list[str], data: st.DataObject) -> None:
        self.racks = racks
        self.download = fresh(chunk_count, seed=seed, rack=racks[0])
        self.count = chunk_count
        self.now_s = 0.0
        self.flying: set[tuple[int, str]] = set()
        self.lease: tuple[int, int] | None = None
        self.announced: dict[str, dict[int, bytes]] = {}
        self.sources: set[str] = set()
        recovered = data.draw(st.sets(st.integers(0, 6)))
        self.held = {chunk for chunk in recovered if chunk < chunk_count}
        self.download.recovered({chunk: right(chunk) for chunk in self.held})

    @rule(node=nodes, source=st.booleans())
    def peer_comes(self, node: str, source: bool) -> None:
        rack = self.racks["abcd".index(node) + 1]
        told = self.download.add_peer(address(node, rack), source=source)
        assert told, "even who holds nothing says that it is in the swarm"
        assert {tell.node for tell in told} == {node}
        assert {chunk for _, chunk in told_chunks(told)} <= self.held
        if node not in self.announced:
            self.announced[node] = {}
            if source:
                self.sources.add(node)

    @rule(node=nodes)
    def peer_goes(self, node: str) -> None:
        self.download.remove_peer(node)
        self.announced.pop(node, None)
        self.sources.discard(node)

    @rule(node=nodes)
    def distrust(self, node: str) -> None:
        self.download.distrust(node)
        self.sources.discard(node)

    @rule(node=nodes, chunks=st.lists(st.integers(0, 8), max_size=8), lies=st.booleans())
    def peer_has(self, node: str, chunks: list[int], lies: bool) -> None:
        digests = [wrong(chunk) if lies else right(chunk) for chunk in chunks]
        self.download.peer_has(node, chunks, b"".join(digests))
        if node in self.announced:
            for chunk, digest in zip(chunks, digests, strict=True):
                self.announced[node].setdefault(chunk, digest)

    @rule(node=nodes, chunks=st.lists(st.integers(0, 8), max_size=3))
    def peer_brings(self, node: str, chunks: list[int]) -> None:
        self.download.peer_brings(node, chunks, self.now_s)

    @rule(room=st.integers(0, 8))
    def ask(self, room: int) -> None:
        requests = self.download.requests(self.now_s, room)
        assert len(requests) <= room
        for request in requests:
            self._check_request(request)
            self.flying.add((request.chunk, request.address.node))
        assert len(self.flying) <= WINDOW

    def _check_request(self, request: FetchChunk) -> None:
        chunk, node = request.chunk, request.address.node
        assert (chunk, node) not in self.flying, "asked twice"
        assert chunk not in self.held
        assert node in self.sources
        assert chunk in self.announced[node]
        assert request.length_bytes == self.download.layout.length_bytes(chunk)
        assert not self._in_lease(chunk)
        if any(other == chunk for other, _ in self.flying):
            assert not self.download._missing & self.download._picker.available, "a needless hedge"

    def _in_lease(self, chunk: int) -> bool:
        return bool(self.download._reading >> chunk & 1)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), outcome=st.sampled_from(["arrived", "absent", "busy", "failed", "wrong"]))
    def request_ends(self, data: st.DataObject, outcome: str) -> None:
        chunk, node = data.draw(st.sampled_from(sorted(self.flying)))
        self.flying.discard((chunk, node))
        match outcome:
            case "arrived":
                self.download.chunk_arrived(chunk, node, self.now_s)
                self.held.add(chunk)
            case "absent":
                self.download.chunk_absent(chunk, node, self.now_s)
                self.announced.get(node, {}).pop(chunk, None)
            case "busy":
                self.download.peer_busy(chunk, node, self.now_s)
            case "failed":
                self.download.peer_failed(chunk, node, self.now_s)
            case "wrong":
                self.download.chunk_corrupt(chunk, node, self.now_s)
                self.sources.discard(node)

    @precondition(lambda self: self.lease is None and self.count > 0)
    @rule(data=st.data())
    def lease_begins(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, self.count - 1))
        self.lease = (first, data.draw(st.integers(1, self.count - first)))
        self.download.read_begins(*self.lease)

    @precondition(lambda self: self.lease is not None)
    @rule(data=st.data())
    def chunk_is_read(self, data: st.DataObject) -> None:
        assert self.lease is not None
        first, count = self.lease
        chunk = data.draw(st.integers(first, first + count - 1))
        self.download.chunk_read(chunk, right(chunk))
        self.held.add(chunk)

    @precondition(lambda self: self.lease is not None)
    @rule()
    def lease_ends(self) -> None:
        assert self.lease is not None
        self.download.read_ends(*self.lease)
        self.lease = None

    @rule(passed_s=st.sampled_from([0.0, 0.01, 0.05, 0.5, 40.0]))
    def time_passes(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule()
    def announcements(self) -> None:
        told = self.download.announcements(self.now_s)
        for (node, chunk), times in told_chunks(told).items():
            assert times == 1
            assert chunk in self.held
            assert node in self.announced
            assert not self.download.peers[node].mask >> chunk & 1, "told to one who has it"
        if told_chunks(told):
            assert self.download.announcements(self.now_s + ANNOUNCE_INTERVAL_S / 2) == []

    @invariant()
    def every_chunk_is_in_one_state(self) -> None:
        if not hasattr(self, "download"):
            return
        self.download.check()
        assert set(chunks_in(self.download.held)) == self.held
        assert self.download.complete == (len(self.held) == self.count)
        unreachable = self.download.unreachable(self.now_s)
        reach = {chunk for node in self.sources for chunk in chunks_in(self._mask(node))}
        missing = set(chunks_in(self.download._missing))
        assert set(chunks_in(unreachable)) >= missing - reach
        wake_at_s = self.download.wake_at_s(self.now_s)
        assert wake_at_s is None or wake_at_s > self.now_s or self._unannounced()

    def _unannounced(self) -> int:
        return self.download._fresh | self.download._late

    def _mask(self, node: str) -> int:
        return self.download.peers[node].mask

    def teardown(self) -> None:
        """One honest peer with everything is enough to finish, however it went before."""
        if not hasattr(self, "download"):
            return
        for chunk, node in sorted(self.flying):
            self.download.peer_failed(chunk, node, self.now_s)
        if self.lease is not None:
            self.download.read_ends(*self.lease)
        for node in list(self.download.peers):
            self.download.remove_peer(node)
        self.download.add_peer(address("z"), source=True)
        announce(self.download, "z", *range(self.count))
        for _ in range(self.count):
            for request in self.download.requests(self.now_s, 100):
                self.download.chunk_arrived(request.chunk, "z", self.now_s)
        self.download.check()
        assert self.download.complete


TestAnyOrderOfEvents = pytest.mark.slow(AnyOrderOfEvents.TestCase)
TestAnyOrderOfEvents.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def asked(download: Download, now_s: float = 0.0, room: int = 100) -> list[tuple[int, str]]:
    return [(request.chunk, request.address.node) for request in download.requests(now_s, room)]


def test_an_empty_file_is_complete_at_once() -> None:
    download = fresh(0, peers="a")

    assert download.complete
    assert download.digests == ()
    assert asked(download) == []
    download.check()


def test_the_rarest_chunk_of_a_peer_is_asked_for_first() -> None:
    download = fresh(3, peers="abc")
    announce(download, "a", 0, 1, 2)
    announce(download, "b", 0, 1)
    announce(download, "c", 0)

    first: dict[str, int] = {}
    for chunk, node in asked(download):
        first.setdefault(node, chunk)

    assert first["a"] == 2


def test_the_last_chunk_is_asked_for_with_its_own_length() -> None:
    download = fresh(2, peers="a")
    announce(download, "a", 0, 1)

    lengths = {request.chunk: request.length_bytes for request in download.requests(0.0, 10)}

    assert lengths == {0: CHUNK_BYTES, 1: 1}


def test_requests_are_spread_over_the_peers() -> None:
    download = fresh(40, peers="abcd")
    for node in "abcd":
        announce(download, node, *range(40))

    per_peer = Counter(node for _, node in asked(download))

    assert per_peer == dict.fromkeys("abcd", 1)


def test_few_peers_are_asked_for_more_at_once() -> None:
    download = fresh(40, peers="ab")
    for node in "ab":
        announce(download, node, *range(40))

    assert Counter(node for _, node in asked(download)) == {"a": 2, "b": 2}


def test_who_has_just_delivered_is_asked_again() -> None:
    """Its place for us is free, and we have none with the others, who may all be busy."""
    for seed in range(20):
        download = fresh(40, seed=seed, peers="abcdefgh")
        for node in "abcdefgh":
            announce(download, node, *range(40))
        asked_at = {node: chunk for chunk, node in asked(download)}
        now_s = 0.0
        for node in list(asked_at) * 5:
            now_s += 0.1
            download.chunk_arrived(asked_at[node], node, now_s)
            [(chunk, again)] = asked(download, now_s)
            asked_at[again] = chunk

            assert again == node


def test_who_delivers_slowly_is_not_asked_again_at_once() -> None:
    slow_again = 0
    for seed in range(50):
        download = fresh(40, seed=seed, peers="abcdefgh")
        for node in "abcdefgh":
            announce(download, node, *range(40))
        (slow_chunk, slow), *others = asked(download)
        for chunk, node in others:
            download.chunk_arrived(chunk, node, 0.1)
        asked(download, 0.1)
        download.chunk_arrived(slow_chunk, slow, 10.0)
        slow_again += [node for _, node in asked(download, 10.0)] == [slow]

    assert slow_again < 25  # by chance only: one of five that have nothing to do


def test_a_peer_that_has_gone_or_lied_is_not_asked_again() -> None:
    for end in (Download.remove_peer, Download.distrust):
        download = fresh(9, peers="ab")
        announce(download, "a", *range(9))
        announce(download, "b", *range(9))
        chunk = next(chunk for chunk, node in asked(download) if node == "a")
        download.chunk_arrived(chunk, "a", 0.1)
        end(download, "a")

        assert {node for _, node in asked(download, 0.1)} == {"b"}


def test_no_more_is_asked_for_than_there_is_room() -> None:
    download = fresh(10, peers="a")
    announce(download, "a", *range(10))

    assert len(asked(download, room=3)) == 3
    assert asked(download, room=0) == []


def test_who_was_busy_is_asked_after_the_others_until_it_has_delivered() -> None:
    first = set()
    for seed in range(20):
        download = fresh(8, seed=seed)
        download.add_peer(address("a"), source=True, busy=True)
        announce(download, "a", *range(8))
        delivered = seed % 2
        if delivered:
            (request,) = download.requests(0.0, 1)
            download.chunk_arrived(request.chunk, "a", 0.1)
            (request,) = download.requests(0.1, 1)  # of the same one, which has a place free
            download.chunk_absent(request.chunk, "a", 0.1)
        for node in "bc":
            download.add_peer(address(node), source=True)
            announce(download, node, *range(8))
        (request,) = download.requests(0.2, 1)
        first.add((delivered, request.address.node))

    assert first == {(0, "b"), (0, "c"), (1, "a"), (1, "b"), (1, "c")}


def test_a_peer_with_another_digest_is_no_holder() -> None:
    download = fresh(1, peers="ab")
    announce(download, "a", 0)
    download.peer_has("b", [0], wrong(0))
    download.remove_peer("a")

    assert asked(download) == []
    assert download.conflicts == 1


def test_a_digest_is_forgotten_with_the_last_who_announced_it() -> None:
    download = fresh(1, peers="a")
    download.peer_has("a", [0], wrong(0))
    download.remove_peer("a")
    download.add_peer(address("b"), source=True)
    announce(download, "b", 0)

    assert [request.digest for request in download.requests(0.0, 1)] == [right(0)]


def test_a_digest_is_forgotten_also_when_its_peer_goes_during_a_lease() -> None:
    download = fresh(1, peers="a")
    download.peer_has("a", [0], wrong(0))
    download.read_begins(0, 1)
    download.remove_peer("a")
    download.read_ends(0, 1)
    download.add_peer(address("b"), source=True)
    announce(download, "b", 0)

    assert [request.digest for request in download.requests(0.0, 1)] == [right(0)]


def test_a_digest_is_forgotten_also_when_its_peer_goes_during_a_request() -> None:
    download = fresh(1, peers="a")
    download.peer_has("a", [0], wrong(0))
    download.requests(0.0, 1)
    download.remove_peer("a")
    download.peer_failed(0, "a", 1.0)
    download.add_peer(address("b"), source=True)
    announce(download, "b", 0)

    assert [request.digest for request in download.requests(1.0, 1)] == [right(0)]


def test_what_was_read_here_overrules_what_was_heard() -> None:
    download = fresh(1, peers="a")
    download.peer_has("a", [0], wrong(0))
    download.read_begins(0, 1)

    download.chunk_read(0, right(0))

    assert download.digests == (right(0),)
    assert not download.peer_is_complete("a")
    assert told_chunks(download.announcements(1.0)) == Counter({("a", 0): 1})


def test_a_distrusted_peer_is_not_asked_but_still_told() -> None:
    download = fresh(2, peers="ab")
    announce(download, "a", 0, 1)
    announce(download, "b", 0)
    (request,) = (request for request in download.requests(0.0, 9) if request.chunk == 1)
    download.chunk_corrupt(1, request.address.node, 0.5)
    announce(download, "a", 0, 1)
    download.read_begins(1, 1)
    download.chunk_read(1, right(1))

    assert "a" not in [node for _, node in asked(download, 1.0)]
    assert ("b", 1) in told_chunks(download.announcements(1.0))


def test_what_a_peer_was_asked_for_before_it_was_lost_counts_when_it_is_back() -> None:
    for seed in range(10):
        download = fresh(2, seed=seed, peers="a")
        announce(download, "a", 0)
        assert asked(download) == [(0, "a")]
        download.remove_peer("a")
        for node in "ab":
            download.add_peer(address(node), source=True)
            announce(download, node, 1)

        assert asked(download) == [(1, "b")]
        download.check()


def test_who_comes_back_after_its_corruption_is_added_as_no_source() -> None:
    download = fresh(1)
    download.add_peer(address("a"), source=False)
    announce(download, "a", 0)

    assert asked(download) == []
    assert download.unreachable(0.0) == 0b1


def test_a_late_request_is_repeated_at_another_peer_only_when_nothing_else_is_left() -> None:
    download = fresh(2, peers="ab")
    announce(download, "a", 0)
    announce(download, "b", 0)
    assert len(asked(download)) == 1
    download.add_peer(address("c"), source=True)
    announce(download, "c", 1)

    assert [chunk for chunk, _ in asked(download, 9.0, room=1)] == [1]
    assert [chunk for chunk, _ in asked(download, 9.0, room=1)] == [0]
    assert asked(download, 99.0) == [], "the third one"


def test_a_hedge_is_due_when_the_download_asks_to_be_woken() -> None:
    for step in range(50):
        download = fresh(1, peers="ab")
        now_s = 1000.0 + step / 7
        announce(download, "a", 0)
        announce(download, "b", 0)
        assert len(asked(download, now_s)) == 1

        wake_at_s = download.wake_at_s(now_s)

        assert wake_at_s is not None
        assert len(asked(download, wake_at_s)) == 1


def test_the_loser_of_a_hedge_changes_nothing() -> None:
    download = fresh(1, peers="ab")
    announce(download, "a", 0)
    announce(download, "b", 0)
    asked(download)
    asked(download, 9.0)

    download.chunk_arrived(0, "a", 9.1)
    download.peer_failed(0, "b", 9.2)

    assert download.complete
    download.check()


def test_what_has_come_is_not_asked_for_again_because_the_other_one_is_still_at_it() -> None:
    download = fresh(2, peers="abc")
    for peer in "abc":
        announce(download, peer, 0)
    ((_, first),) = asked(download)
    ((_, second),) = asked(download, 9.0)
    download.chunk_arrived(0, second, 9.1)

    assert asked(download, 99.0) == []
    download.peer_failed(0, first, 99.0)
    download.check()


def test_a_chunk_that_one_of_two_peers_failed_to_bring_is_not_missing() -> None:
    download = fresh(1, peers="ab")
    announce(download, "a", 0)
    announce(download, "b", 0)
    ((_, first),) = asked(download)
    asked(download, 9.0)

    download.peer_failed(0, first, 9.1)

    assert asked(download, 9.1) == []
    download.check()


def test_a_busy_peer_is_asked_again_soon_and_a_failing_one_later_each_time() -> None:
    download = fresh(1, peers="a")
    announce(download, "a", 0)
    now_s = 0.0
    waits_s = []
    for _ in range(8):
        assert asked(download, now_s) == [(0, "a")]
        download.peer_failed(0, "a", now_s)
        assert asked(download, now_s) == []
        wake_at_s = download.wake_at_s(now_s)
        assert wake_at_s is not None
        waits_s.append(wake_at_s - now_s)
        now_s = wake_at_s
    assert asked(download, now_s) == [(0, "a")]
    download.peer_busy(0, "a", now_s)
    wake_at_s = download.wake_at_s(now_s)
    assert wake_at_s is not None

    assert waits_s == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert wake_at_s - now_s < 0.1


def test_chunks_are_announced_in_batches_and_not_to_who_has_them() -> None:
    peers = "abcdefghi"
    download = fresh(4, peers=peers)
    announce(download, "b", 1)
    download.read_begins(0, 4)
    download.chunk_read(0, right(0))
    assert told_chunks(download.announcements(1.0)) == Counter((peer, 0) for peer in peers)
    download.chunk_read(1, right(1))
    download.chunk_read(2, right(2))

    assert download.announcements(1.0 + ANNOUNCE_INTERVAL_S / 2) == []
    wake_at_s = download.wake_at_s(1.001)
    assert wake_at_s is not None
    told = download.announcements(wake_at_s)

    lacking = {(peer, chunk) for peer in peers for chunk in (1, 2)} - {("b", 1)}
    assert told_chunks(told) == Counter(lacking)
    assert len(told) == len(peers)


@pytest.mark.parametrize(("neighbours", "holders"), [(8, 1), (9, 3)])
def test_what_enough_neighbours_have_the_others_are_told_a_little_later(
    neighbours: int, holders: int
) -> None:
    peers = "abcdefghi"[:neighbours]
    download = fresh(2, peers=peers)
    for peer in peers[: holders - 1]:
        announce(download, peer, 0)
    for peer in peers[:holders]:
        announce(download, peer, 1)
    for peer in peers[6:]:
        download.remove_peer(peer)  # it was a neighbour nevertheless
    download.read_begins(0, 2)

    download.chunk_read(0, right(0))
    assert {chunk for _, chunk in told_chunks(download.announcements(1.0))} == {0}
    download.chunk_read(1, right(1))
    assert download.announcements(2.0) == []
    wake_at_s = download.wake_at_s(2.0)
    assert wake_at_s == 2.0 + COMMON_INTERVAL_S
    later = told_chunks(download.announcements(wake_at_s))
    assert later == Counter((peer, 1) for peer in peers[holders:6])


def test_a_newcomer_hears_of_every_chunk_exactly_once() -> None:
    download = fresh(3, peers="a")
    download.read_begins(0, 3)
    download.chunk_read(0, right(0))
    download.announcements(1.0)
    download.chunk_read(1, right(1))

    told = told_chunks(download.add_peer(address("b"), source=True))
    told += told_chunks(download.announcements(2.0))

    assert {chunk: times for (node, chunk), times in told.items() if node == "b"} == {0: 1, 1: 1}


def test_who_is_alone_announces_nothing_and_sleeps() -> None:
    download = fresh(3)
    download.read_begins(0, 3)
    download.chunk_read(0, right(0))
    assert download.announcements(1.0) == []
    assert download.wake_at_s(1.0) is None

    told = told_chunks(download.add_peer(address("a"), source=True))
    told += told_chunks(download.announcements(2.0))

    assert told == Counter({("a", 0): 1})


def test_what_many_chunks_are_announced_with_is_split_into_messages() -> None:
    count = HAVE_CHUNKS_MAX + 5
    download = fresh(count)
    download.recovered({chunk: right(chunk) for chunk in range(count)})
    download.announcements(1.0)

    told = download.add_peer(address("a"), source=True)

    assert [len(_chunks_of(tell)) for tell in told] == [HAVE_CHUNKS_MAX, 5]


def test_chunks_beyond_the_end_of_the_file_are_ignored() -> None:
    download = fresh(2, peers="a")
    announce(download, "a", 1, 2, 1 << 60)

    assert asked(download) == [(1, "a")]
    download.check()


def test_recovered_chunks_are_not_asked_for() -> None:
    download = fresh(3, peers="a")
    download.recovered({1: right(1)})
    announce(download, "a", 0, 1, 2)

    assert sorted(asked(download)) == [(0, "a"), (2, "a")]
    assert download.recovered_bytes == CHUNK_BYTES
    assert download.held == 0b010
    assert download.held != full_mask(3)


# --- racks ----------------------------------------------------------------------------------------


def in_racks(chunk_count: int, *, near: str = "", far: str = "", seed: int = 1) -> Download:
    """A download in one rack; peers in it and in another one."""
    download = fresh(chunk_count, seed=seed, rack="here")
    for node in near:
        download.add_peer(address(node, "here"), source=True)
    for node in far:
        download.add_peer(address(node, "there"), source=True)
    return download


def coming(told: list[TellPeer]) -> dict[str, list[int]]:
    """What its rack is told to be on its way."""
    return {
        tell.node: tell.message.coming
        for tell in told
        if isinstance(tell.message, Have) and tell.message.coming is not None
    }


def test_what_the_rack_has_is_asked_for_there_and_elsewhere_only_what_it_has_not() -> None:
    for seed in range(10):
        download = in_racks(4, near="a", far="xyz", seed=seed)
        announce(download, "a", 0, 1)
        for node in "xyz":
            announce(download, node, 0, 1, 2)

        requests = dict(asked(download))
        assert requests.pop(2) in "xyz"
        assert requests in ({0: "a"}, {1: "a"})


def test_the_rack_is_told_what_is_fetched_from_elsewhere_and_when_that_fails() -> None:
    download = in_racks(2, near="ab", far="x")
    announce(download, "x", 0)
    assert asked(download) == [(0, "x")]
    assert coming(download.announcements(0.0)) == {"a": [0], "b": [0]}
    assert download.announcements(0.0) == []

    download.peer_busy(0, "x", 0.1)
    assert coming(download.announcements(0.1)) == {"a": [], "b": []}
    assert asked(download, 1.0) == [(0, "x")]
    download.announcements(1.0)
    download.chunk_arrived(0, "x", 2.0)
    told = download.announcements(2.0)
    assert coming(told) == {}
    assert told_chunks(told) == Counter({("a", 0): 1, ("b", 0): 1})


def test_what_another_node_of_the_rack_fetches_is_left_to_it_until_it_fails_or_goes() -> None:
    download = in_racks(3, near="ab", far="x")
    announce(download, "x", 0, 1, 2)
    download.peer_brings("a", [0, 1], 0.0)
    download.peer_brings("b", [2], 0.0)
    assert asked(download, 0.0) == []

    download.peer_brings("a", [0], 0.1)
    assert asked(download, 0.1) == [(1, "x")]
    download.remove_peer("b")
    assert asked(download, 0.2) == [(2, "x")]
    wake_at_s = download.wake_at_s(0.2)
    assert wake_at_s == COMING_S + 0.1
    assert asked(download, wake_at_s) == [(0, "x")]


def test_what_only_a_failing_neighbour_in_the_rack_has_is_asked_for_elsewhere() -> None:
    download = in_racks(2, near="a", far="x")
    announce(download, "a", 0)
    announce(download, "x", 0)
    assert asked(download) == [(0, "a")]
    download.peer_failed(0, "a", 0.1)

    assert asked(download, 0.1) == [(0, "x")]


def test_of_another_rack_one_node_hears_of_a_chunk_at_once_and_the_others_a_little_later() -> None:
    download = in_racks(12, near="a", far="xyz")
    download.add_peer(address("o"), source=True)
    download.read_begins(0, 12)
    for chunk in range(12):
        download.chunk_read(chunk, right(chunk))

    at_once = told_chunks(download.announcements(0.0))
    assert Counter(node for node, _ in at_once) == dict(a=12, o=12, x=4, y=4, z=4)
    assert len({chunk for node, chunk in at_once if node in "xyz"}) == 12
    wake_at_s = download.wake_at_s(0.0)
    assert wake_at_s == COMMON_INTERVAL_S
    later = told_chunks(download.announcements(wake_at_s))
    assert {(node, chunk) for node in "xyz" for chunk in range(12)} <= at_once.keys() | later.keys()
    assert not any(node == "a" for node, _ in later)


def test_a_download_that_ends_leaves_nobody_out() -> None:
    download = in_racks(12, far="xyz")
    download.read_begins(0, 12)
    for chunk in range(12):
        download.chunk_read(chunk, right(chunk))

    told = told_chunks(download.announcements(math.inf))
    assert told.keys() == {(node, chunk) for node in "xyz" for chunk in range(12)}
