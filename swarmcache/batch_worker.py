"""Carries out what the node's machine wants of small files that come together.

One thread does all of one request: sets room aside, receives, checks, puts in place. So what comes
is written while the next batch is on its way, and few changes from thread to thread are needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from swarmcache import errors
from swarmcache.chunk_fetcher import ChunkFetcher, FileCorrupt
from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, FileVersion, SmallFile
from swarmcache.disk import Cache, FileBatch, User
from swarmcache.errors import LocalError, NoThread
from swarmcache.link import address_of
from swarmcache.peer_events import (
    FetchFiles,
    FilesArrived,
    FilesCorrupt,
    FilesNotKept,
    HolderBusy,
    HolderFailed,
    PeerEvent,
)
from swarmcache.thread_pool import ThreadPool

log = logging.getLogger(__name__)

# One receives while another one writes; all take turns at the interpreter's lock.
THREADS = 2


class BatchWorker:
    """The batches of one daemon."""

    def __init__(
        self,
        cache: Cache,
        fetcher: ChunkFetcher,
        users: Callable[[int], list[User]],
        handle: Callable[[PeerEvent], None],
        arrived: Callable[[str, FilesArrived], None],
        chunk_size_bytes: int | None,
    ) -> None:
        """``users``: for whom a request wants files. ``handle`` tells the machine, and ``arrived``
        (node, event) hears of what has come just after it; both are called in the event loop.
        ``chunk_size_bytes`` as for ``LocalRequests``."""
        self._cache = cache
        self._fetcher = fetcher
        self._users = users
        self._handle = handle
        self._arrived = arrived
        self._chunk_size_bytes = chunk_size_bytes or CHUNK_SIZE_MIN_BYTES
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPool(THREADS, thread_name_prefix="batch")

    def close(self) -> None:
        """Forget what has not begun and wait for the threads; close the fetcher before."""
        self._threads.shutdown(cancel_futures=True)

    def carry_out(self, effect: FetchFiles) -> None:
        """Carry out ``FetchFiles``."""
        try:
            self._threads.submit(self._run, effect, self._users(effect.request))
        except NoThread as error:
            self._handle(FilesNotKept(effect.fetch, effect.address.node, str(error)))

    def _run(self, effect: FetchFiles, users: Sequence[User]) -> None:
        what = (effect.fetch, effect.address.node)
        event: PeerEvent
        try:
            event = self._fetch(effect, users)
        except FileCorrupt as error:
            event = FilesCorrupt(*what, error.version_id)
        except errors.PeerBusy:
            event = HolderBusy(*what)
        except errors.RemoteError as error:
            log.info("small files from %s: %s", effect.address.node, error)
            event = HolderFailed(*what, str(error))
        except LocalError as error:
            log.info("cannot keep small files: %s", error)
            event = FilesNotKept(*what, str(error))
        except Exception as error:
            log.exception("cannot fetch small files")  # a bug of ours; they are fetched singly
            event = FilesNotKept(*what, f"internal error: {error}")
        self._loop.call_soon_threadsafe(self._ended, effect, event)

    def _ended(self, effect: FetchFiles, event: PeerEvent) -> None:
        self._handle(event)
        if isinstance(event, FilesArrived):
            self._arrived(effect.address.node, event)

    def _fetch(self, effect: FetchFiles, users: Sequence[User]) -> FilesArrived:
        installed: list[bytes] = []
        size_bytes = 0
        host = address_of(effect.address.node).host

        with ExitStack() as stack:
            batches = self._cache.begin_batch(effect.versions, self._chunk_size_bytes)
            for batch in batches:
                stack.callback(batch.close)

            def take(files: list[SmallFile]) -> None:
                nonlocal size_bytes
                for batch in batches:
                    installed.extend(batch.install(files, users))
                size_bytes = sum(len(file.data) for file in files)

            wanted = _versions_of(batches)
            if wanted:
                self._fetcher.fetch_files(
                    (host, effect.address.data_port),
                    [(version.version_id, version.size_bytes) for version in wanted],
                    take,
                    effect.deadline_s,
                    effect.stall_s,
                )
        return FilesArrived(effect.fetch, effect.address.node, installed, size_bytes)


def _versions_of(batches: Sequence[FileBatch]) -> list[FileVersion]:
    return [version for batch in batches for version in batch.versions]
