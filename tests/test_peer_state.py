"""What a node does next, one machine at a time, without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from random import Random
from typing import TypeVar

import pytest

from swarmcache.chunks import CHUNK_SIZE_MAX_BYTES, FileVersion
from swarmcache.config import TransferSettings
from swarmcache.fetching import ABANDON_S
from swarmcache.messages import (
    LOADS_MAX,
    BetweenNodes,
    FromTracker,
    Gone,
    Have,
    Heartbeat,
    Holders,
    Holding,
    Join,
    Joined,
    Lease,
    Leave,
    Locate,
    Located,
    NodeAddress,
    Peers,
    Query,
    RangeFailed,
    RangeRead,
    Refused,
    Register,
    Registered,
    Renewed,
    Replicas,
    ReportCorrupt,
    Revoked,
    StatusRequest,
    Suspected,
)
from swarmcache.peer_events import (
    AddReplica,
    AnnounceReplicas,
    AnswerCached,
    AnswerHolders,
    AnswerOriginal,
    AnswerStatus,
    CheckCopy,
    ChunkArrived,
    ChunkCorrupt,
    ChunksRead,
    ChunksRecovered,
    CopyWanted,
    DialPeer,
    DistrustPeer,
    DropPartial,
    FetchChunk,
    FilePublished,
    FileWanted,
    HangUp,
    HoldersWanted,
    KeysChanged,
    LoadManifest,
    ManifestLoaded,
    NodesChanged,
    PeerConnected,
    PeerEffect,
    PeerEvent,
    PeerLost,
    PeerSaid,
    PeerUnreachable,
    PublishFailed,
    PublishFile,
    RangeReadDone,
    RangeReadFailed,
    ReadRange,
    RefuseReplica,
    ReplicaAdded,
    ReplicaDropped,
    ReplicaNotAdded,
    ReplicaOffered,
    ReplicasLost,
    ReplicasRecovered,
    RequestGone,
    ReserveSpace,
    SpaceRefused,
    SpaceReserved,
    StatusWanted,
    TellPeer,
    TellTracker,
    TimePassed,
    TrackerConnected,
    TrackerLost,
    TrackerSaid,
    WriteFailed,
)
from swarmcache.peer_neighbours import LINGER_S
from swarmcache.peer_state import BUFFERS_BYTES_MAX, CHECK_AGAIN_S, FLIGHTS_MAX, PeerState

CHUNK_BYTES = 1000
ME = NodeAddress("m:1", 2)
LOWER = NodeAddress("a:1", 2)
HIGHER = NodeAddress("z:1", 2)
Effect = TypeVar("Effect")


def version(name: str = "file", chunks: int = 3) -> FileVersion:
    return FileVersion(b"/nfs/" + name.encode(), chunks * CHUNK_BYTES, 7)


def digest(chunk: int) -> bytes:
    return b"%032d" % chunk


def have(file: FileVersion, *chunks: int, complete: bool = False) -> Have:
    digests = b"".join(digest(chunk) for chunk in chunks)
    return Have(file.version_id, list(chunks), digests, complete, CHUNK_BYTES)


class Bench:
    """One machine, its clock, and all that it has wanted so far."""

    def __init__(
        self,
        *,
        connected: bool = True,
        buffers_bytes_max: int = 1 << 20,
        uploads: Mapping[str, int] | None = None,
    ) -> None:
        self.state = PeerState(
            ME,
            Random(1),
            buffers_bytes_max=buffers_bytes_max,
            uploads_of=lambda node: (uploads or {}).get(node, 0),
        )
        self.now_s = 100.0
        self.seen: list[PeerEffect] = []
        if connected:
            self.tell(TrackerConnected())
            self.said(Registered(3.0, 100.0))
            self.seen.clear()

    def tell(self, *events: PeerEvent) -> list[PeerEffect]:
        """Give it events; returns the effects of these alone."""
        effects: list[PeerEffect] = []
        for event in events:
            effects += self.state.handle(event, self.now_s)
            self.state.check()
        self.seen += effects
        return effects

    def said(self, *messages: FromTracker) -> list[PeerEffect]:
        """The tracker says something."""
        return self.tell(*(TrackerSaid(message) for message in messages))

    def heard(self, peer: NodeAddress, *messages: BetweenNodes) -> list[PeerEffect]:
        """A peer says something."""
        return self.tell(*(PeerSaid(peer.node, message) for message in messages))

    def wait_until(self, at_s: float) -> list[PeerEffect]:
        """Let time pass, waking the machine whenever it asks for it."""
        effects: list[PeerEffect] = []
        for _ in range(10_000):
            wake_at_s = self.state.wake_at_s()
            if wake_at_s is None or wake_at_s > at_s:
                self.now_s = at_s
                return effects
            assert wake_at_s >= self.now_s or not effects, "it wants to be woken in the past"
            self.now_s = max(self.now_s, wake_at_s)
            effects += self.tell(TimePassed())
        raise AssertionError("it wakes again and again")

    def want(self, file: FileVersion, request: int = 1, *, can_read: bool = True) -> None:
        """A client asks for a file."""
        self.tell(FileWanted(request, file, "nfs", "ada", CHUNK_BYTES, can_read))

    def begin(self, file: FileVersion, request: int = 1, *, can_read: bool = True) -> None:
        """A client asks for a file, the disk has room, the tracker knows."""
        self.want(file, request, can_read=can_read)
        self.tell(SpaceReserved(file.version_id, CHUNK_BYTES))
        self.tell(ChunksRecovered(file.version_id, {}))
        self.said(Joined(file.version_id, CHUNK_BYTES))

    def meet(self, peer: NodeAddress, *files: FileVersion) -> None:
        """A peer is introduced and connected."""
        for file in files:
            self.said(Peers(file.version_id, [peer]))
        self.tell(PeerConnected(peer))

    def lease(self, file: FileVersion, lease_id: int, first: int, count: int) -> None:
        """The tracker leases a range for two and a half seconds."""
        self.said(Lease(lease_id, file.version_id, first, count, self.now_s + 2.5))

    def read(self, file: FileVersion, lease_id: int, *chunks: int) -> list[PeerEffect]:
        """Chunks of a leased range come from the file server."""
        digests = {chunk: digest(chunk) for chunk in chunks}
        return self.tell(ChunksRead(file.version_id, lease_id, digests))

    def complete(self, file: FileVersion, request: int = 1, chunks: int = 3) -> None:
        """The whole file is read here and put in place."""
        self.begin(file, request)
        self.lease(file, 1, 0, chunks)
        self.read(file, 1, *range(chunks))
        self.tell(RangeReadDone(file.version_id, 1, 10, 0.1), FilePublished(file.version_id))


def of(kind: type[Effect], effects: Iterable[object]) -> list[Effect]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def told(kind: type[Effect], effects: Iterable[object]) -> list[Effect]:
    """The messages of one kind that the tracker was sent."""
    return of(kind, (effect.message for effect in of(TellTracker, effects)))


def answers(effects: Iterable[object]) -> Counter[int]:
    """How often each request was answered."""
    final = (AnswerCached, AnswerOriginal, AnswerStatus)
    return Counter(effect.request for effect in effects if isinstance(effect, final))


# --- requests -------------------------------------------------------------------------------------


def test_requests_for_one_version_share_one_download() -> None:
    bench = Bench()
    file = version()

    bench.want(file, 1)
    bench.want(file, 2)
    bench.want(version("other"), 3)

    assert len(of(ReserveSpace, bench.seen)) == 2


def test_everybody_who_waits_is_answered_once_when_the_file_is_in_place() -> None:
    bench = Bench()
    file = version()
    bench.want(file, 2)
    bench.complete(file)
    bench.wait_until(300.0)

    assert answers(bench.seen) == Counter({1: 1, 2: 1})
    assert len(of(AnswerCached, bench.seen)) == 2
    assert len(of(PublishFile, bench.seen)) == 1
    assert told(Replicas, bench.seen) == [Replicas([file.version_id])]


def test_an_empty_file_needs_no_tracker() -> None:
    bench = Bench(connected=False)
    file = version(chunks=0)
    bench.want(file)
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES), ChunksRecovered(file.version_id, {}))
    bench.tell(FilePublished(file.version_id))

    assert len(of(AnswerCached, bench.seen)) == 1
    assert told(Join, bench.seen) == []


def test_without_room_the_original_is_the_answer() -> None:
    bench = Bench()
    file = version()
    bench.want(file)

    effects = bench.tell(SpaceRefused(file.version_id, "the disk is full"))

    assert of(AnswerOriginal, effects) == [
        AnswerOriginal(1, file.version_id, "the disk is full", False)
    ]
    assert of(DropPartial, effects) == [DropPartial(file.version_id, False)]


def test_a_disk_that_fails_twice_under_a_download_makes_the_original_the_answer() -> None:
    bench = Bench()
    file = version(chunks=1)
    bench.begin(file)
    for attempt in range(2):
        bench.lease(file, attempt, 0, 1)
        bench.read(file, attempt, 0)
        bench.tell(RangeReadDone(file.version_id, attempt, 10, 0.1))

        effects = bench.tell(PublishFailed(file.version_id, "no"))

        assert of(DropPartial, effects) == [DropPartial(file.version_id, False)]
        assert told(Leave, effects) == [Leave(file.version_id)]
        assert answers(effects) == Counter([1] if attempt else [])
        if attempt == 0:
            [again] = of(ReserveSpace, effects)
            assert again.version == file
            bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES))
            effects = bench.tell(ChunksRecovered(file.version_id, {}))
            assert len(told(Join, effects)) == 1


def test_a_download_is_begun_again_only_when_all_requests_of_the_former_attempt_are_back() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.heard(HIGHER, have(file, 0, 1))
    assert len(of(FetchChunk, bench.seen)) == 2

    effects = bench.tell(WriteFailed(file.version_id, "the disk is lost"))
    assert of(TellPeer, effects) == [TellPeer(HIGHER.node, Gone(file.version_id))]
    effects += bench.tell(PeerUnreachable(file.version_id, 0, HIGHER.node, "lost"))
    effects += bench.tell(WriteFailed(file.version_id, "the disk is lost"))  # the other one's
    assert of(DropPartial, effects) == []
    assert of(ReserveSpace, effects) == []
    effects = bench.tell(PeerUnreachable(file.version_id, 1, HIGHER.node, "lost"))

    assert [type(effect) for effect in effects] == [DropPartial, ReserveSpace]
    assert answers(bench.seen) == Counter()
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES), ChunksRecovered(file.version_id, {}))
    bench.said(Joined(file.version_id, CHUNK_BYTES))
    bench.lease(file, 1, 0, 3)
    bench.read(file, 1, 0, 1, 2)
    bench.tell(RangeReadDone(file.version_id, 1, 10, 0.1), FilePublished(file.version_id))
    assert len(of(AnswerCached, bench.seen)) == 1


def test_a_disk_that_is_lost_before_it_was_looked_through_makes_the_download_begin_again() -> None:
    bench = Bench()
    file = version()
    bench.want(file)
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES))

    effects = bench.tell(WriteFailed(file.version_id, "lost"), ChunksRecovered(file.version_id, {}))

    assert [type(effect) for effect in effects] == [DropPartial, ReserveSpace]
    effects = bench.tell(SpaceRefused(file.version_id, "no cache directory is left"))
    assert [answer.reason for answer in of(AnswerOriginal, effects)] == [
        "no cache directory is left"
    ]


def test_after_the_loss_of_a_disk_all_replicas_are_told_anew_and_no_chunk_is_promised() -> None:
    bench = Bench()
    file = version(chunks=1)
    bench.complete(file, chunks=1)
    bench.meet(HIGHER, file)
    bench.tell(ManifestLoaded(file.version_id, (digest(0),), CHUNK_BYTES))

    assert bench.tell(ReplicasLost()) == [AnnounceReplicas()]

    effects = bench.said(Query(file.version_id, 1, b"\x01"))
    assert [holding.held for holding in told(Holding, effects)] == [b""]
    bench.said(Peers(file.version_id, [HIGHER]))
    effects = bench.tell(ManifestLoaded(file.version_id, (), 0))  # it was on that disk
    assert told(Leave, effects) == [Leave(file.version_id)]
    bench.tell(TrackerLost("away"))
    assert bench.tell(ReplicasLost()) == []


@pytest.mark.parametrize("chunks", [0, 3])
def test_a_client_that_goes_is_not_answered_and_the_download_goes_on(chunks: int) -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.tell(RequestGone(1), RequestGone(99))
    bench.lease(file, 1, 0, 3)
    bench.read(file, 1, 0, 1, 2)

    effects = bench.tell(FilePublished(file.version_id))

    assert answers(bench.seen) == Counter()
    assert told(Replicas, effects) != []


def test_a_download_that_gets_nowhere_is_answered_in_bounded_time() -> None:
    bench = Bench()
    bench.begin(version())
    bench.now_s += 1.0
    bench.want(version(), 2)

    effects = bench.wait_until(105.9)
    assert answers(effects) == Counter([1])
    effects = bench.wait_until(106.1)

    assert answers(effects) == Counter([2])
    (last,) = of(AnswerOriginal, effects)
    assert "no peer has the missing chunks" in last.reason


def test_without_a_tracker_the_answer_says_so() -> None:
    bench = Bench(connected=False)
    file = version()
    bench.tell(TrackerLost("head:7380 does not answer"))
    bench.want(file)
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES), ChunksRecovered(file.version_id, {}))

    (answer,) = of(AnswerOriginal, bench.wait_until(106.0))

    assert "head:7380 does not answer" in answer.reason


def test_who_waits_for_a_slot_is_patient() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    for _ in range(20):
        bench.wait_until(bench.now_s + 1.0)
        bench.said(Renewed(bench.now_s + 2.5, [file.version_id]))
    assert answers(bench.seen) == Counter()

    bench.said(Renewed(bench.now_s + 2.5, []))
    bench.wait_until(bench.now_s + 6.0)

    assert answers(bench.seen) == Counter([1])


def test_progress_keeps_a_request_waiting() -> None:
    bench = Bench()
    file = version(chunks=3)
    bench.begin(file)
    bench.lease(file, 1, 0, 3)
    for chunk in range(2):
        bench.wait_until(bench.now_s + 4.0)
        bench.read(file, 1, chunk)

    assert answers(bench.wait_until(bench.now_s + 4.9)) == Counter()
    assert answers(bench.wait_until(bench.now_s + 0.2)) == Counter([1])


@pytest.mark.parametrize("start_s", [0.1, 0.3, 1.7, 1e6 / 3, 1e9 / 7])
def test_no_rounding_makes_it_wake_for_ever(start_s: float) -> None:
    bench = Bench()
    bench.now_s = start_s
    bench.begin(version())

    bench.wait_until(start_s + 200.0)

    assert list(bench.state.downloads()) == []


def test_a_download_that_nobody_waits_for_is_given_up_and_kept_on_disk() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.tell(RequestGone(1))

    assert of(DropPartial, bench.wait_until(100.0 + ABANDON_S - 1)) == []
    effects = bench.wait_until(100.0 + ABANDON_S + 1)

    assert of(DropPartial, effects) == [DropPartial(file.version_id, True)]
    assert told(Leave, effects) == [Leave(file.version_id)]
    assert list(bench.state.downloads()) == []


def test_what_the_tracker_refuses_is_answered_with_the_original() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)

    effects = bench.said(Refused("too many chunks", file.version_id))

    assert [answer.reason for answer in of(AnswerOriginal, effects)] == ["too many chunks"]


def test_a_revoked_version_is_answered_as_changed_and_dropped() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)

    effects = bench.said(Revoked(file.version_id, "changed"))

    assert [answer.source_changed for answer in of(AnswerOriginal, effects)] == [True]
    assert of(DropPartial, effects) == [DropPartial(file.version_id, False)]


# --- a new attempt at the same version ------------------------------------------------------------


def test_a_new_attempt_waits_for_what_is_under_way_of_the_former_one() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.heard(HIGHER, have(file, 0))
    bench.said(Revoked(file.version_id, "changed"))

    bench.want(file, 2)
    assert len(of(ReserveSpace, bench.seen)) == 1
    effects = bench.tell(PeerUnreachable(file.version_id, 0, HIGHER.node, "reset"))

    assert [type(effect) for effect in effects] == [DropPartial, ReserveSpace]


@pytest.mark.parametrize("kind", [SpaceRefused, PublishFailed, WriteFailed])
def test_what_fails_late_in_a_former_attempt_does_not_end_the_new_one(
    kind: type[SpaceRefused | PublishFailed | WriteFailed],
) -> None:
    bench = Bench()
    file = version(chunks=1)
    if kind is SpaceRefused:
        bench.want(file)
    else:
        bench.begin(file)
        bench.lease(file, 1, 0, 1)
        bench.read(file, 1, 0)
        bench.tell(RangeReadDone(file.version_id, 1, 10, 0.1))
    bench.said(Revoked(file.version_id, "changed"))
    bench.want(file, 2)

    bench.tell(kind(file.version_id, "late"))
    if kind is WriteFailed:
        bench.tell(FilePublished(file.version_id))

    assert answers(bench.seen) == Counter([1])
    assert len(of(ReserveSpace, bench.seen)) == 2


def test_a_file_published_after_it_was_revoked_is_dropped_before_the_new_attempt() -> None:
    bench = Bench()
    file = version(chunks=1)
    bench.begin(file)
    bench.lease(file, 1, 0, 1)
    bench.read(file, 1, 0)
    bench.tell(RangeReadDone(file.version_id, 1, 10, 0.1))
    bench.said(Revoked(file.version_id, "changed"))
    bench.want(file, 2)

    effects = bench.tell(FilePublished(file.version_id))

    assert [type(effect) for effect in effects] == [DropPartial, ReserveSpace]
    assert answers(bench.seen) == Counter([1])


def test_a_swarm_that_cuts_the_file_differently_makes_it_begin_again() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)

    effects = bench.said(Joined(file.version_id, 2 * CHUNK_BYTES))

    assert of(DropPartial, effects) == [DropPartial(file.version_id, False)]
    assert [reserve.chunk_size_bytes for reserve in of(ReserveSpace, effects)] == [2 * CHUNK_BYTES]
    bench.tell(SpaceReserved(file.version_id, 2 * CHUNK_BYTES))
    joined = told(Join, bench.tell(ChunksRecovered(file.version_id, {})))
    assert [join.chunk_size_bytes for join in joined] == [2 * CHUNK_BYTES]
    assert answers(bench.seen) == Counter()


def test_another_cut_during_the_last_step_begins_again_too() -> None:
    bench = Bench()
    file = version(chunks=1)
    bench.begin(file)
    bench.lease(file, 1, 0, 1)
    bench.read(file, 1, 0)
    bench.said(Joined(file.version_id, 2 * CHUNK_BYTES))
    bench.tell(RangeReadDone(file.version_id, 1, 10, 0.1))

    effects = bench.tell(FilePublished(file.version_id))

    assert [type(effect) for effect in effects] == [DropPartial, ReserveSpace]
    assert told(RangeRead, bench.seen) == []
    assert len(told(RangeFailed, bench.seen)) == 1


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_may_be_read_under_until_its_deadline_by_the_own_clock() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 2)

    assert of(ReadRange, bench.seen) == [ReadRange(file.version_id, 5, 0, 2)]
    assert bench.state.may_read(5, 102.49)
    assert not bench.state.may_read(5, 102.5)
    assert not bench.state.may_read(6, 100.0)
    bench.said(Renewed(104.0))
    assert bench.state.may_read(5, 103.9)
    assert not bench.state.may_read(5, 104.0)


def test_a_replica_that_is_being_added_answers_whoever_wants_the_file_meanwhile() -> None:
    bench = Bench()
    file = version()
    assert bench.tell(ReplicaOffered(1, file.version_id)) == [AddReplica(1, file.version_id)]

    assert of(ReserveSpace, bench.tell(FileWanted(2, file, "nfs", "ada", CHUNK_BYTES))) == []
    effects = bench.tell(ReplicaAdded(file.version_id))

    assert told(Replicas, effects) == [Replicas([file.version_id])]
    assert of(AnswerCached, effects) == [AnswerCached(2, file.version_id)]


def test_who_was_introduced_while_a_replica_was_being_added_hears_of_it_and_is_let_go() -> None:
    """Found in simulation: both had the whole file, and stayed connected for ever."""
    bench = Bench()
    file = version()
    bench.tell(ReplicaOffered(1, file.version_id))
    bench.tell(FileWanted(2, file, "nfs", "ada", CHUNK_BYTES))
    bench.meet(HIGHER, file)
    bench.heard(HIGHER, Have(file.version_id, [], b"", complete=True))

    assert LoadManifest(file.version_id) in bench.tell(ReplicaAdded(file.version_id))
    digests = tuple(digest(chunk) for chunk in range(3))
    effects = bench.tell(ManifestLoaded(file.version_id, digests, CHUNK_BYTES))
    (have,) = (effect.message for effect in of(TellPeer, effects))
    assert isinstance(have, Have) and have.complete
    bench.heard(HIGHER, Gone(file.version_id))
    assert of(HangUp, bench.wait_until(101.0 + LINGER_S)) == [HangUp(HIGHER.node)]


def test_a_replica_that_could_not_be_added_is_fetched_by_whoever_wants_the_file() -> None:
    bench = Bench()
    file = version()
    bench.tell(ReplicaOffered(1, file.version_id))
    bench.tell(FileWanted(2, file, "nfs", "ada", CHUNK_BYTES))

    effects = bench.tell(ReplicaNotAdded(file.version_id, "no room"))

    assert effects == [ReserveSpace(file, CHUNK_BYTES)]


def test_a_file_that_is_being_fetched_is_not_made_a_replica_as_well() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)

    (refused,) = bench.tell(ReplicaOffered(9, file.version_id))

    assert refused == RefuseReplica(9, "it is being fetched already")


def test_a_lease_that_ran_out_before_it_was_renewed_stays_over() -> None:
    """Its reader may have been in the middle of a long piece, and not have noticed."""
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 2)

    bench.now_s = 102.5
    bench.said(Renewed(110.0))

    assert not bench.state.may_read(5, 102.6)


def test_a_lease_for_what_is_not_wanted_is_given_back_at_once() -> None:
    bench = Bench()
    file = version()

    bench.lease(file, 5, 0, 2)

    assert [failed.lease_id for failed in told(RangeFailed, bench.seen)] == [5]
    assert not bench.state.may_read(5, 100.0)


@pytest.mark.parametrize(("first", "count"), [(0, 4), (3, 1), (1 << 40, 1)])
def test_a_lease_beyond_the_end_of_the_file_is_given_back(first: int, count: int) -> None:
    bench = Bench()
    file = version(chunks=3)
    bench.begin(file)

    bench.lease(file, 5, first, count)

    assert len(told(RangeFailed, bench.seen)) == 1
    assert of(ReadRange, bench.seen) == []


def test_a_lease_that_nobody_can_read_under_is_given_back() -> None:
    bench = Bench()
    file = version()
    bench.begin(file, can_read=False)

    bench.lease(file, 5, 0, 1)

    assert len(told(RangeFailed, bench.seen)) == 1


def test_a_client_that_can_read_makes_the_node_able_to() -> None:
    bench = Bench()
    file = version()
    bench.begin(file, can_read=False)

    bench.want(file, 2)

    assert [join.can_read for join in told(Join, bench.seen)] == [False, True]


def test_a_read_range_ends_its_lease() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 2)
    bench.read(file, 5, 0, 1)

    effects = bench.tell(RangeReadDone(file.version_id, 5, 2000, 0.5))

    assert told(RangeRead, effects) == [RangeRead(5, file.version_id, 2000, 0.5)]
    assert not bench.state.may_read(5, 100.0)


def test_a_range_that_failed_tells_what_was_read_of_it() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 1, 2)
    bench.read(file, 5, 1)

    effects = bench.tell(RangeReadFailed(file.version_id, 5, "stale file handle"))

    assert told(RangeFailed, effects) == [
        RangeFailed(5, file.version_id, b"\x02", "stale file handle", False)
    ]
    assert answers(bench.seen) == Counter()


def test_a_changed_source_is_told_to_the_tracker_and_to_whoever_waits() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 2)

    effects = bench.tell(RangeReadFailed(file.version_id, 5, "changed", source_changed=True))

    assert [failed.source_changed for failed in told(RangeFailed, effects)] == [True]
    assert [answer.source_changed for answer in of(AnswerOriginal, effects)] == [True]
    assert of(DropPartial, effects) == [DropPartial(file.version_id, False)]


def test_a_lease_is_given_back_only_when_its_reader_has_stopped() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 3)

    effects = bench.tell(WriteFailed(file.version_id, "full"))
    assert told(RangeFailed, effects) == []
    assert not bench.state.may_read(5, bench.now_s)
    effects = bench.tell(RangeReadFailed(file.version_id, 5, "the lease has ended"))

    assert [failed.lease_id for failed in told(RangeFailed, effects)] == [5]
    assert of(DropPartial, effects) == [DropPartial(file.version_id, False)]


def test_a_lease_ends_also_when_the_file_is_in_place_before_its_reader_says_so() -> None:
    bench = Bench()
    file = version(chunks=1)
    bench.begin(file)
    bench.lease(file, 5, 0, 1)
    bench.read(file, 5, 0)
    bench.tell(FilePublished(file.version_id))

    effects = bench.tell(RangeReadDone(file.version_id, 5, 1000, 0.1))

    assert [done.lease_id for done in told(RangeRead, effects)] == [5]
    assert not bench.state.may_read(5, bench.now_s)


# --- the tracker ----------------------------------------------------------------------------------


def test_a_restarted_tracker_is_told_leases_downloads_and_replicas() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 2)
    bench.read(file, 5, 0)
    bench.tell(TrackerLost("gone"))
    assert bench.state.may_read(5, 101.0), "the lease goes on without the tracker"

    effects = bench.tell(TrackerConnected())

    (register,) = told(Register, effects)
    assert register.clock_s == bench.now_s
    assert [(held.lease_id, held.first, held.count) for held in register.leases] == [(5, 0, 2)]
    assert [join.held for join in told(Join, effects)] == [b"\x01"]
    assert len(of(AnnounceReplicas, effects)) == 1
    assert isinstance(effects[0], TellTracker)
    assert effects[0].message is register


def test_a_lease_that_the_tracker_does_not_know_any_more_ends() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 1)
    bench.lease(file, 6, 1, 1)
    bench.tell(TrackerLost("gone"), TrackerConnected())

    bench.said(Registered(3.0, 105.0, [6]))

    assert not bench.state.may_read(5, 100.0)
    assert bench.state.may_read(6, 104.0)


def test_more_leases_than_one_message_holds_are_not_all_announced() -> None:
    bench = Bench()
    files = [version(f"file {number}") for number in range(LOADS_MAX + 5)]
    for number, file in enumerate(files):
        bench.begin(file, number + 1)
        bench.lease(file, number, 0, 1)
    bench.tell(TrackerLost("gone"))

    (register,) = told(Register, bench.tell(TrackerConnected()))

    assert len(register.leases) == LOADS_MAX


def test_heartbeats_come_every_second_while_there_is_work_and_rarely_otherwise() -> None:
    bench = Bench()
    idle = told(Heartbeat, bench.wait_until(130.0))
    bench.begin(version())
    busy = told(Heartbeat, bench.wait_until(134.5))

    assert len(idle) == 3
    assert len(busy) in (4, 5)
    assert [beat.clock_s for beat in busy] == sorted(beat.clock_s for beat in busy)


def test_that_the_secrets_are_others_is_told_at_once_and_to_nobody_while_the_tracker_is_away() -> (
    None
):
    bench = Bench()
    assert len(told(Heartbeat, bench.tell(KeysChanged()))) == 1
    assert told(Heartbeat, bench.wait_until(bench.now_s + 0.5)) == []

    bench.tell(TrackerLost("it is away"))
    assert bench.tell(KeysChanged()) == []


def test_the_tracker_learns_which_chunks_are_here_when_it_asks() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 2)
    bench.read(file, 5, 0, 1)

    effects = bench.said(
        Query(file.version_id, 9, b"\x06"), Query(version("other").version_id, 10, b"\xff")
    )

    assert told(Holding, effects) == [
        Holding(file.version_id, 9, b"\x02"),
        Holding(version("other").version_id, 10, b""),
    ]


def test_a_question_for_the_status_is_answered_once_also_when_the_tracker_goes() -> None:
    bench = Bench()
    bench.tell(StatusWanted(1))
    assert told(StatusRequest, bench.seen) == [StatusRequest(1)]

    bench.tell(TrackerLost("gone"))
    bench.tell(StatusWanted(2))

    assert [(answer.request, answer.cluster) for answer in of(AnswerStatus, bench.seen)] == [
        (1, None),
        (2, None),
    ]


def test_a_question_for_holders_is_answered_once_whatever_the_tracker_does() -> None:
    bench = Bench()
    ids = [version("a").version_id, version("b").version_id]
    holders = [Holders(3, [HIGHER]), Holders(0)]
    for request in range(1, 5):
        bench.tell(HoldersWanted(request, ids, nodes_max=1))
    assert told(Locate, bench.seen) == [Locate(request, ids, 1) for request in range(1, 5)]

    bench.said(Located(1, holders), Located(1, holders), Located(2, holders[:1]), Located(9, []))
    bench.tell(RequestGone(3))
    bench.said(Located(3, holders))
    bench.tell(TrackerLost("gone"))
    bench.said(Located(4, holders))
    bench.tell(HoldersWanted(5, ids))

    assert of(AnswerHolders, bench.seen) == [
        AnswerHolders(1, holders),
        AnswerHolders(2, None, "the tracker's answer makes no sense"),
        AnswerHolders(4, None, "gone"),
        AnswerHolders(5, None, "gone"),
    ]


# --- neighbours -----------------------------------------------------------------------------------


def test_only_the_lower_node_id_dials() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)

    bench.said(Peers(file.version_id, [LOWER, HIGHER, ME]))
    bench.wait_until(104.0)

    assert of(DialPeer, bench.seen) == [DialPeer(HIGHER)]


def test_it_dials_again_later_each_time() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.said(Peers(file.version_id, [HIGHER]))
    waits_s = []
    for _ in range(7):
        bench.tell(PeerLost(HIGHER.node, "refused"))
        failed_s = bench.now_s
        bench.seen.clear()
        while not of(DialPeer, bench.seen):
            bench.said(Renewed(bench.now_s + 2.5, [file.version_id]))
            bench.wait_until(bench.now_s + 0.5)
        waits_s.append(round(bench.now_s - failed_s))

    assert waits_s == [1, 2, 4, 8, 16, 30, 30]


def test_who_is_said_to_be_dead_is_hung_up_and_nothing_more_is_asked_of_it() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.heard(HIGHER, have(file, 0))
    bench.meet(LOWER, file)

    effects = bench.tell(NodesChanged([], [HIGHER.node, "somebody:1"]))
    assert of(HangUp, effects) == [HangUp(HIGHER.node)]

    bench.seen.clear()
    bench.tell(PeerUnreachable(file.version_id, 0, HIGHER.node, "reset"))
    assert of(FetchChunk, bench.seen) == []
    bench.heard(LOWER, have(file, 0))
    assert [fetch.address for fetch in of(FetchChunk, bench.seen)] == [LOWER]


def test_the_dead_are_dialled_only_now_and_then_and_at_once_when_they_are_back() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.tell(NodesChanged([], [HIGHER.node]))
    bench.seen.clear()

    for _ in range(29):
        bench.said(Renewed(bench.now_s + 2.5, [file.version_id]))
        bench.wait_until(bench.now_s + 1.0)
    assert of(DialPeer, bench.seen) == []

    assert of(DialPeer, bench.tell(NodesChanged([HIGHER.node], []))) == [DialPeer(HIGHER)]
    assert of(DialPeer, bench.tell(NodesChanged([HIGHER.node], []))) == []


def test_who_connects_or_is_introduced_again_is_not_dead() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)

    bench.tell(NodesChanged([], [HIGHER.node]))
    assert of(DialPeer, bench.said(Peers(file.version_id, [HIGHER]))) == [DialPeer(HIGHER)]
    bench.tell(PeerConnected(HIGHER))
    assert of(HangUp, bench.tell(NodesChanged([], [HIGHER.node]))) == [HangUp(HIGHER.node)]
    bench.tell(PeerConnected(HIGHER))
    bench.heard(HIGHER, have(file, 0))
    assert [fetch.address for fetch in of(FetchChunk, bench.seen)] == [HIGHER]


def test_who_had_no_upload_slot_to_spare_is_asked_after_others() -> None:
    file = version(chunks=2)
    for busy in (LOWER, HIGHER):
        bench = Bench(uploads={busy.node: FLIGHTS_MAX})
        bench.begin(file)
        bench.meet(LOWER, file)
        bench.meet(HIGHER, file)
        bench.lease(file, 1, 0, 2)  # so nothing is asked before both have told
        bench.heard(LOWER, have(file, 0, 1))
        bench.heard(HIGHER, have(file, 0, 1))
        bench.tell(RangeReadFailed(file.version_id, 1, "stale", False))

        first = of(FetchChunk, bench.seen)[0]
        assert first.address != busy


def test_who_connects_anew_is_told_again_what_it_had_before_its_machine_lost_it() -> None:
    """Nobody has noticed yet that the former connection broke."""
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.lease(file, 1, 0, 3)
    bench.heard(HIGHER, have(file, 0, 1))

    bench.tell(PeerConnected(HIGHER))
    bench.heard(HIGHER, have(file))
    bench.seen.clear()
    bench.read(file, 1, 0)
    bench.wait_until(101.0)

    (told_of,) = [effect.message for effect in of(TellPeer, bench.seen)]
    assert isinstance(told_of, Have)
    assert told_of.chunks == [0]


def test_a_connection_that_no_swarm_needs_is_closed_after_a_while() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.heard(HIGHER, Gone(file.version_id))

    assert of(HangUp, bench.wait_until(99.0 + LINGER_S)) == []
    assert of(HangUp, bench.wait_until(101.0 + LINGER_S)) == [HangUp(HIGHER.node)]


def test_a_peer_that_connects_for_nothing_is_hung_up_too() -> None:
    bench = Bench()
    bench.tell(PeerConnected(HIGHER))

    assert of(HangUp, bench.wait_until(101.0 + LINGER_S)) == [HangUp(HIGHER.node)]


def test_a_neighbour_of_a_dropped_replica_is_hung_up() -> None:
    bench = Bench()
    file = version(chunks=1)
    bench.meet(HIGHER, file)
    bench.tell(ManifestLoaded(file.version_id, (digest(0),), CHUNK_BYTES))
    bench.tell(ReplicaDropped(file.version_id))

    assert of(HangUp, bench.wait_until(101.0 + LINGER_S)) == [HangUp(HIGHER.node)]


def test_a_copy_in_doubt_is_announced_when_it_was_found_good() -> None:
    bench = Bench()
    file = version()

    effects = bench.tell(ReplicasRecovered([file.version_id]))

    assert effects == [TellTracker(Replicas([file.version_id]))]


def test_what_is_wrong_of_a_copy_is_fetched_from_peers_without_a_client() -> None:
    bench = Bench()
    file = version()
    bench.tell(ReplicaDropped(file.version_id))
    bench.tell(CopyWanted(file, "nfs", "ada", CHUNK_BYTES))
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES))
    recovered = {0: digest(0), 2: digest(2)}
    bench.tell(ChunksRecovered(file.version_id, recovered))
    bench.meet(HIGHER, file)
    effects = bench.heard(HIGHER, have(file, 0, 1, 2))

    assert told(Leave, bench.seen) == [Leave(file.version_id)]
    assert [join.can_read for join in told(Join, bench.seen)] == [False]
    assert [fetch.chunk for fetch in of(FetchChunk, effects)] == [1]
    effects = bench.tell(ChunkArrived(file.version_id, 1, HIGHER.node))
    assert of(PublishFile, effects) == [PublishFile(file.version_id)]
    effects = bench.tell(FilePublished(file.version_id))
    assert told(Replicas, effects) == [Replicas([file.version_id])]


def test_a_copy_that_a_peer_says_is_wrong_is_digested_but_not_again_and_again() -> None:
    bench = Bench()
    file, fetched = version(), version("fetched")
    bench.begin(fetched)

    assert bench.said(Suspected(fetched.version_id)) == []
    assert bench.said(Suspected(file.version_id)) == [CheckCopy(file.version_id)]
    assert bench.said(Suspected(file.version_id)) == []
    bench.now_s += CHECK_AGAIN_S
    assert bench.said(Suspected(file.version_id)) == [CheckCopy(file.version_id)]


def test_what_nobody_has_of_a_copy_waits_on_the_disk_for_the_next_client() -> None:
    bench = Bench()
    file = version()
    bench.tell(CopyWanted(file, "nfs", "ada", CHUNK_BYTES))
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES))
    bench.tell(ChunksRecovered(file.version_id, {0: digest(0)}))

    effects = bench.wait_until(101.0 + ABANDON_S)
    assert of(DropPartial, effects) == [DropPartial(file.version_id, keep=True)]


def test_a_copy_that_is_found_whole_again_needs_no_swarm() -> None:
    bench = Bench()
    file = version()
    bench.want(file)
    bench.tell(SpaceReserved(file.version_id, CHUNK_BYTES))
    whole = {chunk: digest(chunk) for chunk in range(3)}
    effects = bench.tell(ChunksRecovered(file.version_id, whole))

    assert effects == [PublishFile(file.version_id)]


def test_a_copy_that_is_wanted_by_a_client_already_stays_wanted() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)

    effects = bench.tell(ReplicaDropped(file.version_id))
    effects += bench.tell(CopyWanted(file, "nfs", "ada", CHUNK_BYTES))

    assert [type(tell.message) for tell in of(TellTracker, effects)] == [Leave, Join]
    assert len(of(ReserveSpace, bench.seen)) == 1


def test_a_dial_that_succeeds_after_the_last_swarm_has_gone_is_hung_up() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.said(Peers(file.version_id, [HIGHER]))
    bench.said(Refused("no", file.version_id))
    bench.wait_until(101.0 + LINGER_S)
    bench.tell(PeerConnected(HIGHER))

    assert of(HangUp, bench.wait_until(102.0 + 2 * LINGER_S)) == [HangUp(HIGHER.node)]


def test_a_neighbour_is_told_what_is_here_and_then_what_comes() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 5, 0, 3)
    bench.read(file, 5, 0)
    bench.meet(HIGHER, file)
    bench.wait_until(100.2)
    bench.read(file, 5, 1)
    bench.wait_until(100.4)

    said = [tell.message for tell in of(TellPeer, bench.seen) if tell.node == HIGHER.node]

    chunks = [chunk for message in said if isinstance(message, Have) for chunk in message.chunks]
    assert chunks == [0, 1]


def test_a_have_of_a_neighbour_that_was_introduced_late_is_not_lost() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.tell(PeerConnected(LOWER))

    bench.heard(LOWER, have(file, 0))

    assert [fetch.chunk for fetch in of(FetchChunk, bench.seen)] == [0]
    bench.said(Peers(file.version_id, [LOWER]))
    bench.heard(LOWER, have(file, 1))
    assert sorted(fetch.chunk for fetch in of(FetchChunk, bench.seen)) == [0, 1]


def test_a_seed_loads_its_digests_once_and_tells_every_neighbour_all() -> None:
    bench = Bench()
    file = version()
    bench.meet(HIGHER, file)
    bench.meet(LOWER, file)
    assert of(LoadManifest, bench.seen) == [LoadManifest(file.version_id)]

    effects = bench.tell(ManifestLoaded(file.version_id, tuple(map(digest, range(3))), CHUNK_BYTES))

    assert {tell.node: tell.message for tell in of(TellPeer, effects)} == {
        HIGHER.node: have(file, 0, 1, 2, complete=True),
        LOWER.node: have(file, 0, 1, 2, complete=True),
    }


def test_two_that_have_all_have_nothing_to_do_with_one_another_any_more() -> None:
    """Found in simulation: each took the other for one that it serves, and stayed connected."""
    bench = Bench()
    file = version()
    bench.meet(HIGHER, file)
    bench.tell(ManifestLoaded(file.version_id, tuple(map(digest, range(3))), CHUNK_BYTES))

    bench.heard(HIGHER, have(file, 0, complete=True))

    assert HangUp(HIGHER.node) in bench.wait_until(bench.now_s + LINGER_S)


def test_who_has_all_and_hears_that_a_neighbour_has_says_that_it_wants_nothing() -> None:
    """Found in simulation: a connection broke, and only one of the two was still fetching; or what
    the other one had been told had come before it began to fetch."""
    bench = Bench()
    left, told = version("a"), version("b")
    bench.meet(HIGHER, told)
    bench.tell(ManifestLoaded(told.version_id, tuple(map(digest, range(3))), CHUNK_BYTES))

    for file in (left, told):
        effects = bench.heard(HIGHER, have(file, complete=True))
        assert effects == [TellPeer(HIGHER.node, Gone(file.version_id))]


def test_who_was_not_listened_to_is_asked_to_tell_all_again() -> None:
    """Found in simulation: it had told of its chunks before this node began to fetch."""
    bench = Bench()
    file, other = version("a"), version("b")
    bench.meet(HIGHER, other)
    assert bench.heard(HIGHER, have(file, 0)) == []
    bench.begin(file)

    (greeting,) = of(TellPeer, bench.heard(HIGHER, have(file, 1)))

    assert isinstance(greeting.message, Have)
    assert greeting.message.again
    bench.said(Peers(file.version_id, [HIGHER]))
    *_, next_greeting = of(TellPeer, bench.seen)
    assert next_greeting.message == have(file), "once is enough"


def test_what_a_neighbour_told_over_an_earlier_connection_it_tells_again_unasked() -> None:
    bench = Bench()
    file, other = version("a"), version("b")
    bench.begin(other, request=2)
    bench.meet(HIGHER, other)
    bench.heard(HIGHER, have(file, 0))
    bench.tell(PeerLost(HIGHER.node, "reset"), PeerConnected(HIGHER))
    bench.begin(file)

    (greeting,) = of(TellPeer, bench.said(Peers(file.version_id, [HIGHER])))

    assert greeting.message == have(file)


def test_who_asks_for_it_is_told_all_again() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.lease(file, 1, 0, 1)
    bench.read(file, 1, 0)
    bench.wait_until(bench.now_s + 1.0)
    greeting = have(file)
    greeting.again = True

    assert bench.heard(HIGHER, greeting) == [TellPeer(HIGHER.node, have(file, 0))]
    assert bench.heard(LOWER, greeting) == [], "it is no neighbour"


def test_who_asks_a_seed_for_it_is_told_all_again() -> None:
    bench = Bench()
    file = version()
    bench.meet(HIGHER, file)
    bench.tell(ManifestLoaded(file.version_id, tuple(map(digest, range(3))), CHUNK_BYTES))
    greeting = have(file)
    greeting.again = True

    effects = bench.heard(HIGHER, greeting)

    assert of(TellPeer, effects) == [TellPeer(HIGHER.node, have(file, 0, 1, 2, complete=True))]


def test_a_chunk_that_was_there_already_is_no_progress() -> None:
    """Found in simulation: chunks that were read in vain kept a client waiting for a third one."""
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.lease(file, 1, 0, 1)
    bench.read(file, 1, 0)
    begin_s = bench.now_s
    bench.wait_until(begin_s + 3.0)
    bench.lease(file, 2, 0, 1)
    bench.read(file, 2, 0)

    assert not of(AnswerOriginal, bench.wait_until(begin_s + 4.9))
    (answer,) = of(AnswerOriginal, bench.wait_until(begin_s + 5.1))
    assert "no progress for 5 s" in answer.reason


def test_chunks_of_a_file_that_is_cut_differently_are_not_heard_of() -> None:
    """The last chunks of two ways to cut a file may be equally long: wrong bytes in the end."""
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)

    other = have(file, 0, 1)
    other.chunk_size_bytes = 2 * CHUNK_BYTES

    assert of(FetchChunk, bench.heard(HIGHER, other)) == []


@pytest.mark.parametrize("manifest_first", [True, False])
def test_a_seed_that_is_cut_differently_leaves_and_is_not_taken_for_a_liar(
    manifest_first: bool,
) -> None:
    """The setting was another one when it was cached: no chunk of it fits the others' chunks."""
    bench = Bench()
    file = version()
    loaded = ManifestLoaded(file.version_id, (digest(0), digest(1)), 2 * CHUNK_BYTES)
    if manifest_first:
        bench.meet(LOWER, file)
        bench.tell(loaded)
    bench.said(Peers(file.version_id, [HIGHER], CHUNK_BYTES))

    effects = bench.tell(PeerConnected(HIGHER))
    effects += [] if manifest_first else bench.tell(loaded)

    assert not [tell for tell in of(TellPeer, effects) if isinstance(tell.message, Have)]
    assert TellPeer(HIGHER.node, Gone(file.version_id)) in effects
    assert told(Leave, effects) == [Leave(file.version_id)]


def test_a_seed_without_digests_leaves_the_swarm() -> None:
    bench = Bench()
    file = version()
    bench.meet(HIGHER, file)

    effects = bench.tell(ManifestLoaded(file.version_id, (), 0))

    assert told(Leave, effects) == [Leave(file.version_id)]


def test_a_complete_node_goes_on_serving_and_parts_from_complete_ones() -> None:
    bench = Bench()
    file = version()
    bench.begin(file)
    bench.meet(HIGHER, file)
    bench.meet(LOWER, file)
    bench.lease(file, 5, 0, 3)
    bench.heard(LOWER, have(file, 0, 1, 2))
    bench.read(file, 5, 0, 1, 2)
    for fetch in of(FetchChunk, bench.seen):
        bench.tell(ChunkArrived(file.version_id, fetch.chunk, LOWER.node))
    bench.tell(RangeReadDone(file.version_id, 5, 3000, 0.1))

    effects = bench.tell(FilePublished(file.version_id))

    gone = [tell.node for tell in of(TellPeer, effects) if isinstance(tell.message, Gone)]
    assert gone == [LOWER.node]


# --- corrupt peers, limits ------------------------------------------------------------------------


def test_a_distrusted_peer_is_never_asked_again_in_any_swarm() -> None:
    bench = Bench()
    file, other, third = version(), version("other"), version("third")
    bench.begin(file)
    bench.begin(other, 2)
    bench.meet(HIGHER, file, other)
    bench.heard(HIGHER, have(file, 0))

    effects = bench.tell(ChunkCorrupt(file.version_id, 0, HIGHER.node))

    assert of(DistrustPeer, effects) == [DistrustPeer(HIGHER.node)]
    assert {report.version_id for report in told(ReportCorrupt, effects)} == {
        file.version_id,
        other.version_id,
    }
    bench.seen.clear()
    bench.heard(HIGHER, have(file, 1), have(other, 0, 1, 2))
    bench.begin(third, 3)
    bench.tell(PeerLost(HIGHER.node, "reset"))
    bench.meet(HIGHER, file, other, third)
    bench.heard(HIGHER, have(file, 0, 1, 2), have(third, 0, 1, 2))
    bench.wait_until(103.0)
    assert of(FetchChunk, bench.seen) == []
    assert third.version_id in {report.version_id for report in told(ReportCorrupt, bench.seen)}


def test_requests_in_flight_are_limited_over_all_downloads_and_none_starves() -> None:
    bench = Bench()
    files = [version(f"file {number}", chunks=20) for number in range(4)]
    peers = [NodeAddress(f"n{number}:1", 2) for number in range(3)]
    for number, file in enumerate(files):
        bench.begin(file, number + 1)
    for peer in peers:
        bench.meet(peer, *files)
    bench.seen.clear()
    for file in files:
        for peer in peers:
            bench.heard(peer, have(file, *range(20)))

    flying = of(FetchChunk, bench.seen)
    assert len(flying) == FLIGHTS_MAX
    done: Counter[bytes] = Counter()
    while flying:
        fetch = flying.pop(0)
        done[fetch.version_id] += 1
        arrived = ChunkArrived(fetch.version_id, fetch.chunk, fetch.address.node)
        flying += of(FetchChunk, bench.tell(arrived))
        assert len(flying) <= FLIGHTS_MAX

    assert done == Counter({file.version_id: 20 for file in files})


def test_the_largest_chunks_fill_all_places_that_a_node_has() -> None:
    uploads_max = TransferSettings().uploads_max
    chunks = 2 * uploads_max
    file = FileVersion(b"/nfs/large", chunks * CHUNK_SIZE_MAX_BYTES, 1)
    bench = Bench(buffers_bytes_max=BUFFERS_BYTES_MAX)
    bench.want(file)
    bench.tell(SpaceReserved(file.version_id, CHUNK_SIZE_MAX_BYTES))
    bench.tell(ChunksRecovered(file.version_id, {}))
    bench.meet(HIGHER, file)
    digests = b"".join(digest(chunk) for chunk in range(chunks))
    bench.heard(HIGHER, Have(file.version_id, list(range(chunks)), digests))

    assert len(of(FetchChunk, bench.seen)) == uploads_max


def test_bytes_in_flight_are_limited_over_all_downloads() -> None:
    bench = Bench(buffers_bytes_max=5 * CHUNK_BYTES + 1)
    file, other = version(chunks=9), version("other", chunks=9)
    bench.begin(file)
    bench.begin(other, 2)
    bench.meet(HIGHER, file, other)
    bench.heard(HIGHER, have(file, *range(9)), have(other, *range(9)))

    flying = of(FetchChunk, bench.seen)
    assert sum(fetch.length_bytes for fetch in flying) == 5 * CHUNK_BYTES
    total = len(flying)
    while flying:
        fetch = flying.pop(0)
        arrived = ChunkArrived(fetch.version_id, fetch.chunk, HIGHER.node)
        new = of(FetchChunk, bench.tell(arrived))
        total += len(new)
        flying += new
        assert sum(fetch.length_bytes for fetch in flying) <= 5 * CHUNK_BYTES

    assert total == 18
