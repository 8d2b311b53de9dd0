"""Answers which of many files are cached, all of one request together.

A thread examines the descriptors and looks all files up with one query. What is missing and small
the client may want fetched before it is answered, as far as peers have it: that is one batch for
the machine. What does not come that way is answered as not cached, and the client asks for it
singly.

Invariant: every descriptor that was handed over is closed when its request ends, and until then no
file of it is evicted that has come for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, FileVersion
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk import Cache, User
from swarmcache.errors import LocalError, NoThread, SwarmcacheError
from swarmcache.local_protocol import Found, LookUp
from swarmcache.local_server import LocalConnection
from swarmcache.peer_events import FilesWanted, PeerEvent
from swarmcache.source_file import SourceExaminer, same_version

log = logging.getLogger(__name__)

# Every file up to this size is one chunk, however the cluster cuts files.
SMALL_BYTES_MAX = CHUNK_SIZE_MIN_BYTES
# Fewer files are as quick on their own.
FILES_MIN = 2
# The answer comes by then, with what is there. Half of what the client takes for a daemon that
# hangs; fetching goes on, and whoever asks singly waits for it.
ANSWER_S = 15.0

Answer = Callable[[LocalConnection, Found], None]


@dataclass(slots=True)
class Asked:
    """One request: its descriptors, and in their order the file versions and the copies found."""

    connection: LocalConnection
    fds: list[int]
    versions: list[FileVersion | None]
    paths: list[bytes | None]
    tree: bytes | None
    wait_s: float | None
    timer: asyncio.TimerHandle | None = None

    def missing(self) -> dict[int, FileVersion]:
        """What is small and not there, by place."""
        return {
            place: version
            for place, version in enumerate(self.versions)
            if version is not None
            and self.paths[place] is None
            and 0 < version.size_bytes <= SMALL_BYTES_MAX
        }


class LookUps:
    """The look-ups of all local clients of one daemon."""

    def __init__(
        self,
        cache: Cache,
        examiner: SourceExaminer,
        threads: CompartmentThreads,
        numbers: Iterator[int],
        handle: Callable[[PeerEvent], None],
        count_hits: Callable[[int], None],
        answer: Answer,
    ) -> None:
        """``numbers`` are those of the requests, which nobody else uses. ``handle`` tells the
        machine. ``answer`` sends what is final; it and ``count_hits`` are called in any thread."""
        self._cache = cache
        self._examiner = examiner
        self._threads = threads
        self._numbers = numbers
        self._handle = handle
        self._count_hits = count_hits
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, Asked] = {}

    def users(self, request: int) -> list[User]:
        """For whom files of a batch are fetched; nobody once the client is answered or gone."""
        asked = self._waiting.get(request)
        return [asked.connection.user] if asked is not None else []

    def look_up_in_thread(
        self, connection: LocalConnection, request: LookUp, fds: list[int]
    ) -> None:
        """Owns ``fds``. Answers from here if nothing is to be fetched."""
        nothing: list[bytes | None] = [None] * len(fds)
        asked = Asked(connection, fds, [None] * len(fds), nothing, request.tree, request.wait_s)
        try:
            asked.versions = self._examiner.versions(fds)
            self._find(asked, range(len(fds)))
        except Exception:
            log.exception("cannot look up files")  # a bug of ours; they can still be fetched
        else:
            if request.fetch and len(asked.missing()) >= FILES_MIN:
                self._loop.call_soon_threadsafe(self._want, asked)
                return
        self._count_hits(len(fds) - asked.paths.count(None))
        self._end(asked, Found(asked.paths))

    def answer(self, request: int) -> None:
        """The batch has ended: a thread sees what has come of it."""
        asked = self._waiting.pop(request, None)
        if asked is None:
            return  # answered early, or gone
        asked.connection.on_closed.pop(request, None)
        if asked.timer is not None:
            asked.timer.cancel()
        place = self._examiner.place(asked.fds[0])
        uid = asked.connection.user.uid
        try:
            done = self._threads.submit(uid, place, self._answer_in_thread, asked)
        except NoThread:
            self._answer_former(asked)
            return
        done.add_done_callback(lambda done: self._let_go(asked) if done.cancelled() else None)

    def _want(self, asked: Asked) -> None:
        if not asked.connection.is_open:
            self._count_hits(len(asked.fds) - asked.paths.count(None))
            asked.connection.close_files(asked.fds)
            self._answer(asked.connection, Found(asked.paths))
            return
        number = next(self._numbers)
        self._waiting[number] = asked
        missing = asked.missing()
        for version in missing.values():
            self._cache.hold(version.version_id)
            self._keep_together(asked.tree, version)
        asked.connection.on_closed[number] = lambda: self._gone(number)
        wait_s = ANSWER_S if asked.wait_s is None else min(asked.wait_s, ANSWER_S)
        asked.timer = self._loop.call_later(wait_s, self.answer, number)
        self._handle(FilesWanted(number, list(missing.values())))

    def _keep_together(self, tree: bytes | None, version: FileVersion) -> None:
        try:
            if tree is not None:
                self._cache.keep_together(tree, version.path)
        except LocalError as error:
            log.info("cannot say where a file belongs: %s", error)  # so it goes where room is

    def _gone(self, number: int) -> None:
        asked = self._waiting.pop(number)
        if asked.timer is not None:
            asked.timer.cancel()
        self._answer_former(asked)  # which nobody hears

    def _answer_former(self, asked: Asked) -> None:
        """End a request for which files were fetched with what was there before."""
        self._release(asked)
        asked.connection.close_files(asked.fds)
        self._answer(asked.connection, Found(asked.paths))

    def _release(self, asked: Asked) -> None:
        """What was fetched for it may be evicted again."""
        for version in asked.missing().values():
            self._cache.release(version.version_id)

    def _let_go(self, asked: Asked) -> None:
        """End a request for which files were fetched. In a thread: to close files may take long."""
        self._release(asked)
        asked.connection.close_files_here(asked.fds)

    def _answer_in_thread(self, asked: Asked) -> None:
        """Hand out what has come, where the source is still what was asked for."""
        found = Asked(
            asked.connection,
            asked.fds,
            asked.versions,
            list(asked.paths),
            asked.tree,
            asked.wait_s,
        )
        fetched: list[int] = []
        self._count_hits(len(found.paths) - found.paths.count(None))
        try:
            places = [
                place
                for place, version in asked.missing().items()
                if same_version(asked.fds[place], version)
            ]
            self._find(found, places)
            fetched = [place for place in places if found.paths[place] is not None]
        except SwarmcacheError as error:
            log.debug("cannot look at a source: %s", error)  # a ``get`` tells its client
        except Exception:
            log.exception("cannot look up files")
        self._let_go(asked)
        self._answer(asked.connection, Found(found.paths, fetched))

    def _find(self, asked: Asked, places: Sequence[int]) -> None:
        """Look up the files at these places."""
        wanted = {
            place: version for place in places if (version := asked.versions[place]) is not None
        }
        paths = self._cache.lookup_many(list(wanted.values()), asked.connection.user)
        for place, path in zip(wanted, paths, strict=True):
            asked.paths[place] = None if path is None else os.fsencode(path)

    def _end(self, asked: Asked, found: Found) -> None:
        """End a request for which nothing was fetched. In a thread, as above."""
        asked.connection.close_files_here(asked.fds)
        self._answer(asked.connection, found)
