"""One wanted file version: who waits for it, since when, and until when they will.

Pure logic, and a part of ``PeerState``. Which chunks are asked of whom is the business of its
``Download``.

Whoever waits has patience for ``stall_s`` in which nothing comes, however long the whole takes; for
much longer while the disk of this node works on the file, since nobody else can help then. What
nobody waits for goes on for as long as something comes.

Invariant: ``due_s`` is never later than the time at which somebody's patience ends, or the download
is given up; requests are in the order in which they came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmcache.chunks import FileVersion
from swarmcache.download import Download

# A download that has had nothing for this long tells the tracker what it cannot get, so often.
COMPLAIN_S = 1.0
# While the local disk works on a file (reserving, digesting what an earlier life left, putting it
# in place) nothing else can make progress: that much more patience.
DISK_PATIENCE = 12
# A download that nobody waits for is given up after this long without progress; what it has stays
# on disk for the next request.
ABANDON_S = 60.0


@dataclass(slots=True)
class Fetching:
    """A wanted file version with everything that is not about chunks.

    ``download`` is None until the disk has set room aside. ``blocked``: an earlier attempt at the
    same file version must end first. ``failures``: how often the disk has failed under it.
    ``requests``: who waits for it, and since when.
    """

    version: FileVersion
    file_server: str
    user: str
    chunk_size_bytes: int
    can_read: bool
    stall_s: float
    progress_at_s: float
    complained_at_s: float = 0.0
    download: Download | None = None
    blocked: bool = False
    joined: bool = False
    on_disk: bool = False
    publishing: bool = False
    waiting_for_slot: bool = False
    failures: int = 0
    requests: dict[int, float] = field(default_factory=dict)

    @property
    def disk_works(self) -> bool:
        """Nothing can come before the disk of this node is done with something."""
        return not self.on_disk or self.publishing

    @property
    def patience_s(self) -> float:
        """For how long nothing may come before those who wait are answered."""
        return self.stall_s * (DISK_PATIENCE if self.disk_works else 1)

    def again(self, now_s: float) -> Fetching:
        """A new attempt after the disk has failed under this one. Those who wait go on waiting."""
        requests, self.requests = self.requests, {}
        return Fetching(
            self.version,
            self.file_server,
            self.user,
            self.chunk_size_bytes,
            self.can_read,
            stall_s=self.stall_s,
            progress_at_s=now_s,
            failures=self.failures + 1,
            requests=requests,
        )

    # --- time -----------------------------------------------------------------------------------

    def due_s(self, now_s: float) -> float:
        """When it is to be looked after next, if nothing happens until then."""
        if self.requests:
            oldest_s = next(iter(self.requests.values()))
            at_s = max(self.progress_at_s, oldest_s) + self.patience_s
        else:
            at_s = self.progress_at_s + ABANDON_S
        if self.joined and not self.publishing:
            at_s = min(at_s, self._complaint_due_s())
        if self.download is not None and self.on_disk:
            wake_at_s = self.download.wake_at_s(now_s)
            at_s = at_s if wake_at_s is None else min(at_s, wake_at_s)
        return at_s

    def is_abandoned(self, now_s: float) -> bool:
        """Nobody waits for it, and nothing comes."""
        return not self.requests and now_s >= self.progress_at_s + ABANDON_S

    def take_impatient(self, now_s: float) -> list[int]:
        """The requests that are to be answered now, whatever there is. They wait no longer."""
        patience_s = self.patience_s
        # The same sum as in ``due_s``: a difference may round to less, and wake us for ever.
        impatient = [
            request
            for request, since_s in self.requests.items()
            if now_s >= max(self.progress_at_s, since_s) + patience_s
        ]
        for request in impatient:
            del self.requests[request]
        return impatient

    def take_complaint(self, now_s: float) -> int:
        """Mask of the chunks that nobody gives us, if it is time to tell the tracker: it may not
        know yet that a holder is gone."""
        if not self.joined or self.publishing or now_s < self._complaint_due_s():
            return 0
        self.complained_at_s = now_s
        return self.download.unreachable(now_s) if self.download is not None else 0

    def check(self) -> None:
        """Assert the invariant."""
        since_s = list(self.requests.values())
        assert since_s == sorted(since_s), "the patience of an older request would be forgotten"
        if self.download is not None:
            self.download.check()

    def _complaint_due_s(self) -> float:
        return max(self.progress_at_s, self.complained_at_s) + COMPLAIN_S
