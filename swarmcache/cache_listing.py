"""What is in one cache directory, for those who ask: users about their own, admins about all.

A shell, like the rest of ``cache_dir``, of which it is a part. Thread-safe.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from swarmcache.cache_index import CacheIndex, Entry, Surveyed
from swarmcache.evictor import Evictor
from swarmcache.in_use import FileId
from swarmcache.object_files import ObjectFiles
from swarmcache.user_tree import User
from swarmcache.uses import Uses

YOUNG_HINT = "--unused-for 0 takes it away"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What went, how many and how many bytes; and what was meant to go and stays, each with why."""

    dropped: int
    dropped_bytes: int
    kept: list[tuple[Surveyed, str]]


class CacheListing:
    """The replicas of one cache directory, and what becomes of them when an admin forgets them."""

    def __init__(
        self,
        root: bytes,
        index: CacheIndex,
        objects: ObjectFiles,
        uses: Uses,
        evictor: Evictor,
        *,
        min_age_s: float,
        boot_id: bytes,
    ) -> None:
        """``root``: the path of the cache directory. The others: its parts."""
        self._root = root
        self._index = index
        self._objects = objects
        self._uses = uses
        self._evictor = evictor
        self._min_age_s = min_age_s
        self._boot_id = boot_id

    def entries(self, path: bytes, user: User | None = None) -> Iterator[list[Entry]]:
        """The replicas that a path stands for, a page at a time; each is quick to get.

        ``path``: of a source or of a local copy, or of a directory for all that are below it.
        ``user``: None for one who may see everything; others see what they have a link to.
        """
        name = self.owner_of(path)
        below = path
        if name is not None:
            below = b"/" + path[len(self._root) + 1 :].partition(b"/")[2]
        elif path == self._root:
            below = b"/"
        if user is not None:
            if name not in (None, user.name):
                return
            name = user.name
        for page in self._index.entries(below, name=name, uid=user.uid if user else None):
            yield [self._current(entry) for entry in page]

    def owner_of(self, path: bytes) -> str | None:
        """The name of the user whose copies a path leads to; None for the path of a source."""
        above = self._root + b"/"
        if not path.startswith(above):
            return None
        return path[len(above) :].partition(b"/")[0].decode(errors="replace")

    def _current(self, entry: Entry) -> Entry:
        """An entry with what the index does not know, or not yet."""
        replica = entry.replica
        last_used_s = self._last_used_s(replica.version_id)
        if last_used_s > replica.last_used_s:
            replica = dataclasses.replace(replica, last_used_s=last_used_s)
        trusted = replica.trusted(self._boot_id)
        return dataclasses.replace(entry, replica=replica, root=self._root, trusted=trusted)

    def _last_used_s(self, version_id: bytes) -> float:
        """As far as the daemon and the file system have noted it, which may be not at all."""
        read_s = min(self._objects.read_s(version_id), time.time())
        return max(self._uses.used_s(version_id), read_s)

    def survey(self, wanted: Callable[[bytes], bool]) -> Iterator[list[Surveyed]]:
        """All replicas of sources whose paths are wanted, a page at a time; some may be empty."""
        for page in self._index.survey():
            yield [self._with_use(each) for each in page if wanted(each.path)]

    def forget(
        self, wanted: Callable[[bytes], bool], unused_s: float | None
    ) -> Iterator[Forgotten]:
        """Take these replicas away if they were not used for ``unused_s`` seconds, or (None) may be
        evicted; a page at a time. None that is pinned or in use goes. Slow. Raises LocalError."""
        for page in self.survey(wanted):
            now_s = time.time()
            newest_s = now_s - (self._min_age_s if unused_s is None else unused_s)
            kept: list[tuple[Surveyed, str]] = []
            going: dict[bytes, Surveyed] = {}
            for each in page:
                if each.last_used_s > newest_s:
                    if unused_s is None:
                        kept.append((each, f"it was used within cache.min_age ({YOUNG_HINT})"))
                elif each.pinned:
                    kept.append((each, "it is pinned"))
                else:
                    going[each.version_id] = each
            removed = self._evictor.take_away(going, newest_s, now_s)
            for replica in removed:
                del going[replica.version_id]
            kept += [(each, "it is in use") for each in going.values()]
            dropped_bytes = sum(replica.stamp.size_bytes for replica in removed)
            yield Forgotten(len(removed), dropped_bytes, kept)

    def _with_use(self, found: Surveyed) -> Surveyed:
        """With what the index does not know yet."""
        used_s = max(self._last_used_s(found.version_id), found.last_used_s)
        return dataclasses.replace(found, last_used_s=used_s)

    def files(self, version_ids: Iterable[bytes]) -> dict[bytes, FileId]:
        """Device and inode of each replica that is here."""
        return self._objects.ids(version_ids)

    def linked(self, version_id: bytes) -> list[User]:
        """The users who have a link to the replica."""
        return self._index.links(version_id)
