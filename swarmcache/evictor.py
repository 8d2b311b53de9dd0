"""Makes room in one cache directory: finds the victims, and takes them away in good order.

Chosen first, all of them, and asked whether anybody uses them; only if they are enough does the
first one go. Then a few at a time: nobody can open them any more, the daemon hands them out no
more, the tracker is told, and they are removed. No lock is held longer than for one file.

A victim that somebody opens between the choice and its turn is spared and another one is chosen. If
there is none, those that went before went in vain; it takes an open of an old file within
milliseconds to get there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from swarmcache.cache_index import CacheIndex, Replica
from swarmcache.errors import NoSpace
from swarmcache.eviction import Candidate, Policy, choose_victims, replicas_elsewhere_first
from swarmcache.in_use import FILES_MAX
from swarmcache.uses import Uses

log = logging.getLogger(__name__)

# A policy can choose among at least so many, if there are so many.
CHOICE_MIN = 256
# Longest wait for the daemon to tell the tracker. It takes milliseconds; if the daemon is stuck,
# room is worth more than a tracker that knows at once.
TELL_MAX_S = 1.0


class Store(Protocol):
    """What an evictor asks of the cache directory. All calls may be made from any thread."""

    def real_use_s(self, version_id: bytes) -> float:
        """When some process last read the file, as far as the mount keeps such times; else 0."""

    def unused(self, version_ids: Sequence[bytes]) -> AbstractContextManager[set[bytes]]:
        """Those that nobody uses, at most ``FILES_MAX``; inside the block it stays so."""

    def remove_files(self, version_id: bytes) -> Replica | None:
        """Remove all of a replica but its row, which is returned; None when there is none."""

    def remove_rows(self, replicas: Sequence[Replica]) -> None:
        """Remove the rows of what ``remove_files`` has removed."""


@dataclass(slots=True)
class Kept:
    """Bytes of the cache by what keeps them; the others are kept by nothing, at first sight."""

    young_bytes: int
    pinned_bytes: int
    others_bytes: int
    others_count: int
    in_use_bytes: int = 0

    def why(self, min_age_s: float) -> str:
        """Why not enough can be evicted."""
        reasons = (
            (self.young_bytes, f"were used within cache.min_age ({min_age_s:g} s)"),
            (self.pinned_bytes, "are pinned"),
            (self.in_use_bytes, "are in use"),
        )
        told = [f"{size_bytes} bytes {reason}" for size_bytes, reason in reasons if size_bytes]
        return f"of what is cached {', '.join(told)}" if told else "nothing can be evicted"


class Evictor:
    """Evicts the replicas of one cache directory. Thread-safe: one pass waits for the other."""

    def __init__(
        self,
        index: CacheIndex,
        uses: Uses,
        store: Store,
        min_age_s: float,
        policy: Policy = replicas_elsewhere_first,
    ) -> None:
        """``min_age_s``: what was used within this time stays."""
        self._index = index
        self._uses = uses
        self._store = store
        self._min_age_s = min_age_s
        # Told which replicas are to go. The future is done when that can go on.
        self.tell: Callable[[Sequence[bytes]], Future[None]] = _tell_nobody
        # Asked how many other nodes have these replicas, as far as that can be known soon.
        self.ask_elsewhere: Callable[[Sequence[bytes]], Mapping[bytes, int]] = _ask_nobody
        self._policy = policy
        self._alone = threading.Lock()

    def spare_bytes(self, version_id: bytes | None = None) -> int:
        """What could be evicted, at first sight: of all replicas, or of one. What is in use counts,
        too, since nobody is asked. Slow. Raises LocalError."""
        newest_s = time.time() - self._min_age_s
        if version_id is None:
            return Kept(*self._index.kept(newest_s)).others_bytes
        replica = self._index.find(version_id)
        if replica is None or self._index.wanted([version_id], newest_s):
            return 0
        return replica.stored_bytes

    def pinned_bytes(self) -> int:
        """What is pinned. Slow. Raises LocalError."""
        return Kept(*self._index.kept(time.time() - self._min_age_s)).pinned_bytes

    def make_room(self, wanted_bytes: int, overhead_bytes: int = 0) -> None:
        """Take replicas away that have so many bytes, each its own and ``overhead_bytes``. Slow.

        Raises NoSpace, which says what keeps the others; LocalError when the disk fails.
        """
        with self._alone:
            self._make_room(wanted_bytes, overhead_bytes)

    def drop_unused(self, since_s: float, now_s: float, files_max: int) -> tuple[int, int]:
        """Take replicas away that were last used by ``since_s``, whether there is room or not.

        Looks at so many at most. Returns how many went, and how many were looked at. Those that
        are in use count as used at ``now_s``. Slow. Raises LocalError.
        """
        kept = Kept(0, 0, 0, 0)
        dropped = looked_at = 0
        candidates = (version_id for version_id, _, _ in self._candidates(since_s, kept))
        for some in _in_slices(islice(candidates, files_max)):
            looked_at += len(some)
            dropped += len(self.take_away(some, since_s, now_s))
        return dropped, looked_at

    def take_away(
        self, version_ids: Iterable[bytes], newest_s: float, now_s: float
    ) -> list[Replica]:
        """Take those of some replicas away that nobody uses, has pinned, or has used after
        ``newest_s``; returns these. Those that are in use count as used at ``now_s``. Slow.

        Raises LocalError.
        """
        removed: list[Replica] = []
        for some in _in_slices(version_ids):
            with self._alone:  # who needs room does not wait for all of them
                with self._store.unused(some) as unused:
                    in_use = set(some) - unused
                self._note_use(dict.fromkeys(in_use, now_s))
                going = [version_id for version_id in some if version_id not in in_use]
                removed += self._evict(going, newest_s)
        return removed

    def _make_room(self, wanted_bytes: int, overhead_bytes: int) -> None:
        while wanted_bytes > 0:
            began_s = time.monotonic()
            newest_s = time.time() - self._min_age_s
            victims = self._choose(wanted_bytes, overhead_bytes, newest_s)
            freed_bytes = 0
            for some in _in_slices(victims):
                replicas = self._evict(some, newest_s)
                freed_bytes += sum(each.stored_bytes + overhead_bytes for each in replicas)
            wanted_bytes -= freed_bytes
            log.info(
                "evicted up to %d copies, %d bytes, in %.3f s",
                len(victims),
                freed_bytes,
                time.monotonic() - began_s,
            )

    def _choose(self, wanted_bytes: int, overhead_bytes: int, newest_s: float) -> list[bytes]:
        """Victims that nobody uses just now. Raises NoSpace where there are not enough."""
        kept = Kept(*self._index.kept(newest_s))
        # Where all together are not enough, nobody need look at each.
        enough = kept.others_bytes + kept.others_count * overhead_bytes >= wanted_bytes
        source = self._candidates(newest_s, kept) if enough else iter(())
        candidates: dict[bytes, Candidate] = {}
        unused: set[bytes] = set()
        while True:
            missing_bytes = wanted_bytes - sum(each.freed_bytes for each in candidates.values())
            for version_id, stored_bytes, last_used_s in source:
                freed_bytes = stored_bytes + overhead_bytes
                candidates[version_id] = Candidate(version_id, freed_bytes, last_used_s)
                missing_bytes -= freed_bytes
                if missing_bytes <= 0 and len(candidates) >= CHOICE_MIN:
                    break
            elsewhere = self.ask_elsewhere(list(candidates))
            known = [
                replace(each, replicas_elsewhere=elsewhere.get(version_id, 0))
                for version_id, each in candidates.items()
            ]
            victims = choose_victims(known, wanted_bytes, time.time(), self._policy)
            if not victims:
                raise NoSpace(kept.why(self._min_age_s))
            asked = [each.version_id for each in victims if each.version_id not in unused]
            for some in _in_slices(asked):
                with self._store.unused(some) as found:
                    unused |= found
            in_use = [version_id for version_id in asked if version_id not in unused]
            if not in_use:
                return [each.version_id for each in victims]
            for version_id in in_use:
                kept.in_use_bytes += candidates.pop(version_id).freed_bytes - overhead_bytes
            # What is in use now need not be asked about again for as long as it is young.
            self._note_use(dict.fromkeys(in_use, time.time()))

    def _candidates(self, newest_s: float, kept: Kept) -> Iterator[tuple[bytes, int, float]]:
        """All that are old enough and neither pinned nor held, least recently used first.

        Each as version id, bytes and time of last use.
        A file that a process has read since it was last answered gets its place in the index by
        that time. If that is further back than this page, it comes again when its turn is there.
        """
        for page in self._index.eviction_pages(newest_s):
            page_end_s = page[-1][0]
            read_s: dict[bytes, float] = {}
            here: list[tuple[bytes, int, float]] = []
            for last_used_s, version_id, stored_bytes in page:
                if self._uses.held(version_id):
                    kept.in_use_bytes += stored_bytes
                    continue
                now_s = time.time()  # which a clock that was wrong for a while may have overtaken
                read = min(self._store.real_use_s(version_id), now_s)
                used_s = max(self._uses.used_s(version_id), read, last_used_s)
                if used_s > last_used_s:
                    read_s[version_id] = used_s
                if used_s > newest_s:
                    kept.young_bytes += stored_bytes
                elif used_s <= page_end_s:
                    here.append((version_id, stored_bytes, used_s))
            self._note_use(read_s)
            yield from sorted(here, key=lambda each: each[2])

    def _note_use(self, used_s: Mapping[bytes, float]) -> None:
        if not used_s:
            return
        try:
            self._index.touch(used_s)
        except NoSpace as error:  # the index cannot grow before something is evicted
            log.info("%s", error)

    def _evict(self, version_ids: Sequence[bytes], newest_s: float) -> list[Replica]:
        """Take those of a few replicas away that are still not in use, and return them."""
        leaving: list[bytes] = []
        removed: list[Replica] = []
        try:
            with self._store.unused(version_ids) as unused:
                leaving += [
                    version_id
                    for version_id in version_ids
                    if version_id in unused and self._uses.leave(version_id, newest_s)
                ]
                wanted = self._index.wanted(leaving, newest_s)
                going = [version_id for version_id in leaving if version_id not in wanted]
                if going:
                    wait([self.tell(going)], TELL_MAX_S)
                for version_id in going:
                    replica = self._store.remove_files(version_id)
                    if replica is not None:
                        removed.append(replica)
        finally:
            # Not before: only now are the files closed, and the disk has room again, which the log
            # of the index may need.
            try:
                self._store.remove_rows(removed)
            finally:
                for version_id in leaving:
                    self._uses.left(version_id)
        return removed


def _tell_nobody(version_ids: Sequence[bytes]) -> Future[None]:
    told: Future[None] = Future()
    told.set_result(None)
    return told


def _ask_nobody(version_ids: Sequence[bytes]) -> Mapping[bytes, int]:
    return {}


def _in_slices(version_ids: Iterable[bytes]) -> Iterator[list[bytes]]:
    rest = iter(version_ids)
    while some := list(islice(rest, FILES_MAX)):
        yield some
