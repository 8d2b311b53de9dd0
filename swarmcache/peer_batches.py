"""Small files that clients want together, and the peers from which they come together.

Pure logic, and a part of ``PeerState``. A file of its own costs a swarm, neighbours, announcements,
a request and a transaction; for files that fit into one chunk that is many times what their bytes
cost. So the files of one batch are asked for in one question to the tracker, and of each holder in
one request.

That is a short cut, and no more: what nobody holds, what a holder does not deliver and what this
node cannot keep leaves the batch, is wanted by its client in the ordinary way, and read once.

Invariant: a file version is in one batch at most, and there it is either open (nobody is asked for
it just now) or in flight (exactly one holder is); a batch with neither has been answered.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from swarmcache.chunks import FileVersion, chunks_in, mask_from_bytes
from swarmcache.messages import LOCATE_MAX, HeldBy, WhoHas
from swarmcache.peer_events import (
    AnswerFiles,
    FetchFiles,
    FilesArrived,
    FilesCorrupt,
    FilesNotKept,
    HolderBusy,
    HolderFailed,
    PeerEffect,
    TellTracker,
)

# File versions in all batches together; what is more is fetched file by file.
BATCHED_MAX = 8192
# What one request to a holder brings at most: it is held in memory as a whole, at both ends.
FETCH_BYTES_MAX = 4 << 20
# After so long no holder is asked any more, since the ordinary way knows many at once.
BATCH_S = 5.0
BUSY_PAUSE_S = 0.05  # as a download does
STALL_S = 2.0
DEADLINE_S = 5.0
DEADLINE_RATE_BYTES_PER_S = 256 * 1024

BatchEvent = FilesArrived | FilesCorrupt | HolderBusy | HolderFailed | FilesNotKept


@dataclass(slots=True)
class Batch:
    """``question``: the number under which the tracker is asked just now; else None, and asked
    again at ``ask_at_s``. ``avoided``: holders that have failed."""

    request: int
    open: dict[bytes, FileVersion]
    until_s: float
    question: int | None = None
    asked: list[bytes] = field(default_factory=list)
    ask_at_s: float = 0.0
    in_flight: dict[int, dict[bytes, FileVersion]] = field(default_factory=dict)
    avoided: set[str] = field(default_factory=set)


class PeerBatches:
    """All batches of one node.

    ``ended`` are the file versions that have left their batches since it was last taken:
    whether each has come.
    """

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}  # by request
        self._questions: dict[int, Batch] = {}
        self._fetches: dict[int, Batch] = {}
        self._numbers = 0
        self._count = 0
        self._ended: dict[bytes, bool] = {}

    @property
    def room(self) -> int:
        """How many more file versions may be wanted."""
        return BATCHED_MAX - self._count

    def take_ended(self) -> dict[bytes, bool]:
        """The file versions that have left their batches since the last call."""
        ended, self._ended = self._ended, {}
        return ended

    def want(
        self, request: int, versions: Sequence[FileVersion], now_s: float, effects: list[PeerEffect]
    ) -> None:
        """A client wants these files, of which nothing is under way."""
        assert 0 < len(versions) <= self.room, "more files than there is room for"
        files = {version.version_id: version for version in versions}
        batch = self._batches[request] = Batch(request, files, now_s + BATCH_S)
        self._count += len(files)
        self._ask(batch, now_s, effects)

    def told_holders(
        self,
        message: HeldBy,
        distrusted: Collection[str],
        now_s: float,
        effects: list[PeerEffect],
    ) -> None:
        """The tracker names holders. What none of them has leaves the batch."""
        batch = self._questions.pop(message.request_id, None)
        if batch is None:
            return
        batch.question = None
        asked, batch.asked = batch.asked, []
        for holder in message.holders:
            node = holder.address.node
            if node in distrusted or node in batch.avoided:
                continue
            places = chunks_in(mask_from_bytes(holder.held))
            ids = [asked[place] for place in places if place < len(asked)]
            wanted = [batch.open[each] for each in ids if each in batch.open]
            for some in _portions(wanted):
                for version in some:
                    del batch.open[version.version_id]
                self._numbers += 1
                batch.in_flight[self._numbers] = {each.version_id: each for each in some}
                self._fetches[self._numbers] = batch
                size_bytes = sum(version.size_bytes for version in some)
                deadline_s = DEADLINE_S + size_bytes / DEADLINE_RATE_BYTES_PER_S
                effects.append(
                    FetchFiles(
                        self._numbers,
                        batch.request,
                        holder.address,
                        some,
                        deadline_s=deadline_s,
                        stall_s=STALL_S,
                    )
                )
        self._leave(batch, asked)
        self._go_on(batch, now_s, effects)

    def fetch_ended(self, event: BatchEvent, now_s: float, effects: list[PeerEffect]) -> None:
        """What one holder was asked for has come, in part at least, or has not."""
        batch = self._fetches.pop(event.fetch)
        files = batch.in_flight.pop(event.fetch)
        match event:
            case FilesArrived():
                arrived = set(event.version_ids)
                for version_id in files:
                    self._end(version_id, arrived=version_id in arrived)
            case FilesNotKept():
                for version_id in files:
                    self._end(version_id, arrived=False)
                self._leave(batch, list(batch.open))
            case HolderBusy():
                batch.open |= files
                batch.ask_at_s = now_s + BUSY_PAUSE_S
            case FilesCorrupt() | HolderFailed():
                batch.open |= files
                batch.avoided.add(event.node)
        self._go_on(batch, now_s, effects)

    def tracker_lost(self, now_s: float, effects: list[PeerEffect]) -> None:
        """Nobody can be asked for holders. What is in flight goes on."""
        self._questions.clear()
        for batch in list(self._batches.values()):
            batch.question = None
            batch.asked = []
            self._leave(batch, list(batch.open))
            self._go_on(batch, now_s, effects)

    # --- time -----------------------------------------------------------------------------------

    def wake_at_s(self) -> float | None:
        """When ``look_after`` is next due."""
        if not self._batches:
            return None  # by far the most often, and asked after every event
        return min((_due_s(batch) for batch in self._batches.values() if batch.open), default=None)

    def look_after(self, now_s: float, effects: list[PeerEffect]) -> None:
        """Ask once more for what a busy holder has; give up what nobody answers for."""
        for batch in list(self._batches.values()):
            if batch.open and now_s >= _due_s(batch):
                self._go_on(batch, now_s, effects)

    def check(self) -> None:
        """Assert the invariant."""
        seen: set[bytes] = set()
        count = 0
        for request, batch in self._batches.items():
            assert request == batch.request, "a batch under another's request"
            parts = [batch.open, *batch.in_flight.values()]
            assert any(parts), "a batch that has ended and was not answered"
            for part in parts:
                assert not seen & part.keys(), "a file is wanted twice"
                seen |= part.keys()
                count += len(part)
            for fetch in batch.in_flight:
                assert self._fetches[fetch] is batch, "a fetch of another batch"
            if batch.question is not None:
                assert self._questions[batch.question] is batch, "a question of another batch"
        for question, batch in self._questions.items():
            assert self._batches.get(batch.request) is batch, "a question of a batch that has ended"
            assert question == batch.question, "a question that was forgotten"
        assert count == self._count <= BATCHED_MAX, "files miscounted"
        assert not self._ended, "nobody was told that a file has left its batch"
        fetches = sum(len(batch.in_flight) for batch in self._batches.values())
        assert fetches == len(self._fetches), "a fetch for nobody"

    # --- inside ---------------------------------------------------------------------------------

    def _go_on(self, batch: Batch, now_s: float, effects: list[PeerEffect]) -> None:
        """Ask for what is open when it is time; answer when nothing is left."""
        if now_s >= batch.until_s:
            self._withdraw_question(batch)
            self._leave(batch, list(batch.open))
        if batch.open and batch.question is None and now_s >= batch.ask_at_s:
            self._ask(batch, now_s, effects)
        if not batch.open and not batch.in_flight:
            self._withdraw_question(batch)
            del self._batches[batch.request]
            effects.append(AnswerFiles(batch.request))

    def _ask(self, batch: Batch, now_s: float, effects: list[PeerEffect]) -> None:
        self._numbers += 1
        batch.question = self._numbers
        batch.asked = list(batch.open)[:LOCATE_MAX]
        self._questions[self._numbers] = batch
        effects.append(TellTracker(WhoHas(self._numbers, batch.asked)))

    def _withdraw_question(self, batch: Batch) -> None:
        """Whatever the tracker answers comes too late."""
        if batch.question is not None:
            del self._questions[batch.question]
            batch.question = None

    def _leave(self, batch: Batch, version_ids: Sequence[bytes]) -> None:
        """These are not to be had, as far as they are open."""
        for version_id in version_ids:
            if batch.open.pop(version_id, None) is not None:
                self._end(version_id, arrived=False)

    def _end(self, version_id: bytes, *, arrived: bool) -> None:
        self._count -= 1
        self._ended[version_id] = arrived


def _due_s(batch: Batch) -> float:
    """When something is to be done for the open files of a batch."""
    return batch.until_s if batch.question is not None else min(batch.until_s, batch.ask_at_s)


def _portions(versions: Sequence[FileVersion]) -> list[list[FileVersion]]:
    """Cut what is asked of one holder so that each portion fits into memory."""
    portions: list[list[FileVersion]] = []
    left_bytes = 0
    for version in versions:
        if not portions or version.size_bytes > left_bytes:
            portions.append([])
            left_bytes = FETCH_BYTES_MAX
        portions[-1].append(version)
        left_bytes -= version.size_bytes
    return portions
