"""Small files that are wanted together: one machine at a time, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcache.chunks import FileVersion, mask_of, mask_to_bytes
from swarmcache.messages import (
    BatchHolder,
    HeldBy,
    NodeAddress,
    Replicas,
    ReportCorrupt,
    WhoHas,
)
from swarmcache.peer_batches import BATCH_S, BATCHED_MAX, BUSY_PAUSE_S, FETCH_BYTES_MAX
from swarmcache.peer_events import (
    AnswerCached,
    AnswerFiles,
    DistrustPeer,
    FetchFiles,
    FilesArrived,
    FilesCorrupt,
    FilesNotKept,
    FilesWanted,
    HolderBusy,
    HolderFailed,
    PeerEffect,
    PeerEvent,
    ReserveSpace,
    TellTracker,
    TrackerConnected,
    TrackerLost,
)
from tests.test_peer_state import HIGHER, LOWER, Bench, of

REQUEST = 9
FILES = [FileVersion(b"/nfs/%d" % number, 1000 + number, 7) for number in range(5)]
IDS = [version.version_id for version in FILES]


class BatchBench(Bench):
    """A machine, and a client that wants ``FILES`` together."""

    def __init__(self, *, connected: bool = True) -> None:
        super().__init__(connected=connected)
        self.answered = 0

    def want_together(self, *versions: FileVersion) -> list[PeerEffect]:
        return self.tell(FilesWanted(REQUEST, list(versions or FILES)))

    def question(self) -> WhoHas:
        """What the tracker was asked last."""
        told = [effect.message for effect in of(TellTracker, self.seen)]
        return of(WhoHas, told)[-1]

    def held_by(self, *holders: tuple[NodeAddress, list[int]]) -> list[FetchFiles]:
        """The tracker answers the last question, with the numbers of files."""
        question = self.question()
        named = []
        for address, numbers in holders:
            mask = mask_of(question.version_ids.index(IDS[number]) for number in numbers)
            named.append(BatchHolder(address, mask_to_bytes(mask)))
        return of(FetchFiles, self.said(HeldBy(question.request_id, named)))

    def answers(self) -> int:
        return len(of(AnswerFiles, self.seen))


def arrived(fetch: FetchFiles, *numbers: int) -> FilesArrived:
    return FilesArrived(fetch.fetch, fetch.address.node, [IDS[each] for each in numbers], 1000)


@pytest.fixture
def bench() -> BatchBench:
    return BatchBench()


def test_all_files_are_asked_for_at_once_and_of_each_holder_in_one_request(
    bench: BatchBench,
) -> None:
    bench.want_together()
    assert bench.question().version_ids == IDS

    lower, higher = bench.held_by((LOWER, [0, 2]), (HIGHER, [1, 3, 4]))

    assert (lower.address, lower.versions) == (LOWER, [FILES[0], FILES[2]])
    assert (higher.address, higher.versions) == (HIGHER, [FILES[1], FILES[3], FILES[4]])
    assert bench.tell(arrived(lower, 0, 2)) == [TellTracker(Replicas([IDS[0], IDS[2]]))]
    last = bench.tell(arrived(higher, 1, 3, 4))
    assert last == [TellTracker(Replicas([IDS[1], IDS[3], IDS[4]])), AnswerFiles(REQUEST)]
    totals = bench.state.totals()
    assert (totals.from_peers_chunks, totals.from_peers_bytes, totals.requests) == (5, 2000, 5)


def test_what_nobody_holds_holds_up_nothing(bench: BatchBench) -> None:
    bench.want_together()

    assert bench.held_by() == []

    assert bench.answers() == 1
    bench.want(FILES[0])
    assert of(ReserveSpace, bench.seen)[-1].version == FILES[0]


def test_what_a_holder_turns_out_not_to_have_leaves_the_batch(bench: BatchBench) -> None:
    bench.want_together()
    (fetch,) = bench.held_by((LOWER, [0, 1, 2]))
    bench.tell(arrived(fetch, 0))

    assert bench.answers() == 1
    bench.want(FILES[1])
    assert len(of(ReserveSpace, bench.seen)) == 1


def test_without_a_tracker_or_fresh_files_the_client_is_answered_at_once(bench: BatchBench) -> None:
    assert BatchBench(connected=False).want_together() == [AnswerFiles(REQUEST)]
    bench.want(FILES[0])
    assert bench.want_together(FILES[0]) == [AnswerFiles(REQUEST)]


def test_who_wants_one_of_the_files_waits_for_it_and_has_it_with_the_others(
    bench: BatchBench,
) -> None:
    bench.want_together()
    bench.want(FILES[1], request=1)
    assert not of(ReserveSpace, bench.seen), "fetched on its own and in a batch"

    (fetch,) = bench.held_by((LOWER, [0, 1, 2, 3, 4]))
    effects = bench.tell(arrived(fetch, 0, 1, 2, 3, 4))

    assert of(AnswerCached, effects) == [AnswerCached(1, IDS[1])]


def test_who_wants_one_that_does_not_come_fetches_it_then(bench: BatchBench) -> None:
    bench.want_together()
    bench.want(FILES[1], request=1)
    (fetch,) = bench.held_by((LOWER, [0, 1]))

    effects = bench.tell(HolderFailed(fetch.fetch, LOWER.node, "reset"))
    effects += bench.held_by()

    assert [each.version for each in of(ReserveSpace, bench.seen)] == [FILES[1]]
    assert bench.answers() == 1


def test_what_is_in_a_batch_already_is_not_fetched_in_another_one(bench: BatchBench) -> None:
    bench.want_together(*FILES[:3])
    bench.tell(FilesWanted(REQUEST + 1, FILES))
    assert bench.question().version_ids == IDS[3:]


def test_a_file_that_is_named_twice_is_fetched_once_and_forgotten_then(bench: BatchBench) -> None:
    bench.want_together(FILES[0], FILES[1], FILES[0])
    (fetch,) = bench.held_by((LOWER, [0, 1]))
    bench.tell(arrived(fetch, 0, 1))

    assert bench.answers() == 1
    bench.want(FILES[0])  # as if it had been evicted since
    assert of(ReserveSpace, bench.seen)


def test_a_busy_holder_is_asked_again_a_little_later(bench: BatchBench) -> None:
    bench.want_together()
    (fetch,) = bench.held_by((LOWER, [0, 1, 2, 3, 4]))
    asked_before = bench.question().request_id
    bench.tell(HolderBusy(fetch.fetch, LOWER.node))
    assert bench.question().request_id == asked_before

    bench.wait_until(bench.now_s + BUSY_PAUSE_S)

    (again,) = bench.held_by((LOWER, [0, 1, 2, 3, 4]))
    assert again.versions == FILES
    bench.tell(arrived(again, 0, 1, 2, 3, 4))
    assert bench.answers() == 1


def test_a_holder_that_failed_is_not_asked_again_and_another_one_is(bench: BatchBench) -> None:
    bench.want_together()
    (fetch,) = bench.held_by((LOWER, [0, 1, 2, 3, 4]))
    bench.tell(HolderFailed(fetch.fetch, LOWER.node, "no byte for 2 s"))

    (other,) = bench.held_by((LOWER, [0, 1]), (HIGHER, [2, 3, 4]))

    assert other.address == HIGHER
    bench.tell(arrived(other, 2, 3, 4))
    assert bench.answers() == 1


def test_a_liar_is_reported_and_never_asked_again(bench: BatchBench) -> None:
    bench.want_together()
    (fetch,) = bench.held_by((LOWER, [0, 1, 2, 3, 4]))

    effects = bench.tell(FilesCorrupt(fetch.fetch, LOWER.node, IDS[2]))

    assert DistrustPeer(LOWER.node) in effects
    assert TellTracker(ReportCorrupt(IDS[2], LOWER.node)) in effects
    assert bench.held_by((LOWER, [0, 1, 2, 3, 4])) == []
    assert bench.answers() == 1
    bench.want_together()
    assert bench.held_by((LOWER, [0, 1, 2, 3, 4])) == []


def test_a_disk_without_room_for_all_ends_the_batch(bench: BatchBench) -> None:
    bench.want_together()
    lower, higher = bench.held_by((LOWER, [0, 1]), (HIGHER, [2, 3]))
    bench.tell(FilesNotKept(lower.fetch, LOWER.node, "not enough free space"))
    assert bench.answers() == 0, "something is under way still"
    bench.tell(arrived(higher, 2, 3))
    assert bench.answers() == 1


def test_an_answer_of_the_tracker_that_comes_after_the_batch_has_ended_does_no_harm(
    bench: BatchBench,
) -> None:
    """Found in simulation: one holder was busy, and the disk had no room for what another sent."""
    bench.want_together()
    lower, higher = bench.held_by((LOWER, [0, 1]), (HIGHER, [2, 3, 4]))
    bench.tell(HolderBusy(lower.fetch, LOWER.node))
    bench.wait_until(bench.now_s + BUSY_PAUSE_S)
    late = bench.question()
    bench.tell(FilesNotKept(higher.fetch, HIGHER.node, "not enough free space"))
    assert bench.answers() == 1

    assert bench.said(HeldBy(late.request_id, [])) == []


ENDINGS = ["arrived", "busy", "failed", "lies", "no room"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["want", "held", "wait", "lost", "found", *ENDINGS]), st.integers(0, 31)
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=1000)
@given(STEPS)
def test_whatever_happens_every_batch_is_answered_once(steps: list[tuple[str, int]]) -> None:
    bench = BatchBench()
    flying: list[FetchFiles] = []
    requests = 0
    for step, number in steps:
        seen = len(bench.seen)
        match step:
            case "want":
                wanted = [FILES[each] for each in range(5) if number >> each & 1] or FILES
                bench.tell(FilesWanted(REQUEST + requests, wanted))
                requests += 1
            case "held":
                masks = {LOWER: number, HIGHER: 31 - number}
                holders = [BatchHolder(each, mask_to_bytes(mask)) for each, mask in masks.items()]
                asked = [told.message for told in of(TellTracker, bench.seen)]
                for question in of(WhoHas, asked)[-2:]:  # one of them may be of an ended batch
                    bench.said(HeldBy(question.request_id, holders))
            case "wait":
                bench.wait_until(bench.now_s + BUSY_PAUSE_S * (number + 1))
            case "lost":
                bench.tell(TrackerLost("reset"))
            case "found":
                bench.tell(TrackerConnected())
            case _ if flying:
                fetch = flying.pop(number % len(flying))
                bench.tell(_ending(step, fetch, number))
        flying += of(FetchFiles, bench.seen[seen:])
    for fetch in flying:
        bench.tell(HolderFailed(fetch.fetch, fetch.address.node, "reset"))
    bench.wait_until(bench.now_s + BATCH_S)

    answered = sorted(answer.request for answer in of(AnswerFiles, bench.seen))
    assert answered == list(range(REQUEST, REQUEST + requests))


def _ending(step: str, fetch: FetchFiles, number: int) -> PeerEvent:
    node = fetch.address.node
    match step:
        case "arrived":
            some = [each.version_id for each in fetch.versions[: number % 4]]
            return FilesArrived(fetch.fetch, node, some, 1000)
        case "busy":
            return HolderBusy(fetch.fetch, node)
        case "failed":
            return HolderFailed(fetch.fetch, node, "reset")
        case "lies":
            return FilesCorrupt(fetch.fetch, node, fetch.versions[0].version_id)
        case _:  # no room
            return FilesNotKept(fetch.fetch, node, "not enough free space")


def test_a_tracker_that_is_lost_or_silent_holds_up_nobody(bench: BatchBench) -> None:
    bench.want_together()
    bench.tell(TrackerLost("reset"))
    assert bench.answers() == 1

    silent = BatchBench()
    silent.want_together()
    stale = silent.question()
    silent.wait_until(silent.now_s + BATCH_S - 0.01)
    assert silent.answers() == 0
    silent.wait_until(silent.now_s + 0.01)
    assert silent.answers() == 1
    late = BatchHolder(LOWER, mask_to_bytes(mask_of(range(5))))
    assert silent.said(HeldBy(stale.request_id, [late])) == []


def test_an_answer_that_makes_no_sense_does_no_harm(bench: BatchBench) -> None:
    bench.want_together()
    question = bench.question()
    far = BatchHolder(LOWER, mask_to_bytes(mask_of([0, 4, 5, 900])))
    again = BatchHolder(HIGHER, mask_to_bytes(mask_of([0, 4])))

    (fetch,) = of(FetchFiles, bench.said(HeldBy(question.request_id, [far, again])))

    assert fetch.versions == [FILES[0], FILES[4]]
    bench.tell(arrived(fetch, 0, 4))
    assert bench.answers() == 1


def test_one_request_never_brings_more_than_fits_into_memory(bench: BatchBench) -> None:
    size_bytes = FETCH_BYTES_MAX // 4
    versions = [FileVersion(b"/nfs/big%d" % number, size_bytes, 7) for number in range(9)]
    bench.want_together(*versions)
    question = bench.question()
    everything = BatchHolder(LOWER, mask_to_bytes(mask_of(range(9))))

    fetches = of(FetchFiles, bench.said(HeldBy(question.request_id, [everything])))

    assert [len(fetch.versions) for fetch in fetches] == [4, 4, 1]
    for fetch in fetches:
        bench.tell(HolderFailed(fetch.fetch, LOWER.node, "reset"))
    for _ in range(2):  # the first one alone, then the others, that have failed since
        bench.said(HeldBy(bench.question().request_id, []))
    assert bench.answers() == 1


def test_more_files_than_may_be_wanted_at_once_are_left_to_the_ordinary_way(
    bench: BatchBench,
) -> None:
    many = [FileVersion(b"/nfs/many/%d" % number, 10, 7) for number in range(BATCHED_MAX + 1)]
    bench.want_together(*many)
    bench.want(many[-1])
    assert [each.version for each in of(ReserveSpace, bench.seen)] == [many[-1]]
    assert bench.tell(FilesWanted(REQUEST + 1, FILES)) == [AnswerFiles(REQUEST + 1)]
