"""Answers what local clients ask about this node's cache: ls, rm, pin, unpin, verify.

root and the daemon's own user see and change everything; anybody else what they have a link to.
What a path stands for is looked up a page at a time, and no page before the client has taken the
answers of the former one: a listing of a million files costs no more memory than one of a hundred,
and neither look-ups nor downloads wait for it.

Before a file goes, the tracker is told, so that no other node is sent here for it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from swarmcache.chunks import ChunkLayout
from swarmcache.disk import Cache, Entry, Removal, User
from swarmcache.errors import LocalError
from swarmcache.holder_questions import HolderQuestions
from swarmcache.local_protocol import (
    AboutCache,
    CachedFile,
    End,
    Failed,
    Ls,
    Outcome,
    Pin,
    Rm,
    Unpin,
    Verify,
    Working,
)
from swarmcache.local_server import LocalConnection
from swarmcache.peer_events import PeerEvent, ReplicaDropped, ReplicasRecovered
from swarmcache.peer_state import PeerState
from swarmcache.user_names import user_name

# Each may hold a page of answers in memory, which is 2 MB with the longest possible names.
REQUESTS_MAX = 32
REQUESTS_PER_USER_MAX = 4
# How often a client hears that its request is being worked on; it gives up after 30 s of silence.
WORKING_S = 5.0
IN_USE = "it is in use: whoever has it open keeps it until it is closed"
FETCHED = "it is being fetched, and was left alone"

Result = TypeVar("Result")


class CacheRequests:
    """The requests about the cache of one daemon."""

    def __init__(
        self,
        cache: Cache,
        disk_threads: ThreadPoolExecutor,
        state: PeerState,
        tracker: HolderQuestions,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        handle: Callable[[PeerEvent], None],
        users_of: Callable[[bytes], Collection[int]],
        verify: Callable[[bytes], Awaitable[list[int] | None]],
    ) -> None:
        """``tracker`` is asked who else holds a file.

        ``spawn`` runs a coroutine in the background; ``handle`` tells the machine; ``users_of``
        tells the uids of those who wait for a file that is being fetched. ``verify``: see
        ``DiskWorker``.
        """
        self._cache = cache
        self._threads = disk_threads
        self._state = state
        self._tracker = tracker
        self._spawn = spawn
        self._handle = handle
        self._users_of = users_of
        self._verify_now = verify
        self._verifying = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._running: Counter[int] = Counter()  # by uid
        self._busy: set[LocalConnection] = set()

    def take(self, connection: LocalConnection, request: AboutCache) -> None:
        """Begin to answer a request."""
        uid = connection.user.uid
        if connection in self._busy:
            connection.send(Failed("one request at a time on a connection"))
        elif self._running[uid] >= REQUESTS_PER_USER_MAX or self._running.total() >= REQUESTS_MAX:
            connection.send(Failed("too many requests about the cache at once"))
        elif isinstance(request, Unpin) and request.all_users and not sees_all(connection.user):
            connection.send(Failed("only root may take away the pins of other users"))
        else:
            self._running[uid] += 1
            self._busy.add(connection)
            self._spawn(self._serve(connection, request))

    def _ended(self, connection: LocalConnection) -> None:
        self._running[connection.user.uid] -= 1
        self._running += Counter()  # forgets who has none
        self._busy.remove(connection)
        connection.on_closed.pop(self, None)

    async def _serve(self, connection: LocalConnection, request: AboutCache) -> None:
        alive = self._spawn(keep_alive(connection))
        last: End | Failed = End()
        # Not from outside: one that is cancelled before its first step would never be counted off.
        task = asyncio.current_task()
        assert task is not None
        connection.on_closed[self] = task.cancel
        try:
            for path in request.paths or [b"/"] if connection.is_open else ():
                found = await self._do_all(connection, request, path)
                if request.paths:
                    connection.send(*self._not_cached(path, connection.user, found=found))
        except LocalError as error:
            last = Failed(str(error))
        except Exception as error:
            last = Failed(f"internal error: {error}")
            raise
        finally:
            alive.cancel()
            self._ended(connection)  # after the last line the client may ask again at once
            connection.send(last)

    async def _do_all(self, connection: LocalConnection, request: AboutCache, path: bytes) -> bool:
        """Do what is asked with all that a path stands for; whether there was anything."""
        user = connection.user
        visible_to = None if sees_all(user) else user
        found = False
        pages = self._cache.entries(path, visible_to)
        while (page := await self._in_thread(next, pages, None)) is not None:
            found = found or bool(page)
            match request:
                case Ls():
                    connection.send(*await self._describe(page))
                case Rm():
                    for entry in page:
                        for owner in self._owners(path, entry, visible_to):
                            connection.send(await self._remove(entry, owner, force=request.force))
                case Pin() | Unpin():
                    connection.send(*await self._in_thread(self._pin, request, page, user))
                case Verify():
                    for entry in page:
                        connection.send(await self._verify(entry))
            await connection.drained()
        return found

    def _not_cached(self, path: bytes, user: User, *, found: bool) -> list[Outcome]:
        """What a path stands for that is not in the cache, as far as this user may know."""
        below = path.rstrip(b"/") + b"/"
        fetched = [
            Outcome(fetching.version.path, False, FETCHED)
            for fetching in self._state.downloads()
            if (fetching.version.path == path or fetching.version.path.startswith(below))
            and (sees_all(user) or user.uid in self._users_of(fetching.version.version_id))
        ]
        return fetched if found or fetched else [Outcome(path, False, "not cached")]

    async def _in_thread(self, function: Callable[..., Result], *args: object) -> Result:
        return await self._loop.run_in_executor(self._threads, function, *args)

    # --- ls -------------------------------------------------------------------------------------

    async def _describe(self, page: list[Entry]) -> list[CachedFile]:
        version_ids = [entry.replica.version_id for entry in page]
        (holders, _), (in_use, names) = await asyncio.gather(
            self._tracker.ask(version_ids), self._in_thread(self._ask_around, page)
        )
        now_s = time.time()
        return [
            CachedFile(
                path=entry.replica.path,
                version_id=entry.replica.version_id.hex(),
                size_bytes=entry.replica.stamp.size_bytes,
                age_s=round(max(now_s - entry.replica.created_s, 0.0), 3),
                idle_s=round(max(now_s - entry.replica.last_used_s, 0.0), 3),
                copies=entry.copies,
                pinned_by=[names[uid] for uid in entry.pinned_by],
                verified=entry.trusted,
                in_use=entry.replica.version_id in in_use,
                replicas_elsewhere=None if holders is None else holders[number].count,
            )
            for number, entry in enumerate(page)
        ]

    def _ask_around(self, page: list[Entry]) -> tuple[set[bytes], dict[int, str]]:
        """Which of these files are in use, and what those are called who have pinned them.

        Runs in a thread.
        """
        in_use = self._cache.in_use([entry.replica.version_id for entry in page])
        return in_use, _names_of_pins(page)

    # --- rm -------------------------------------------------------------------------------------

    def _owners(self, path: bytes, entry: Entry, user: User | None) -> Iterable[User | None]:
        """From whom to take a copy away: from the user whose copy was named, or everybody (None),
        if the one who asks may do that."""
        return entry.links if self._cache.owner_of(path) is not None else [user]

    async def _remove(self, entry: Entry, owner: User | None, *, force: bool) -> Outcome:
        version_id, path = entry.replica.version_id, entry.replica.path
        expected = await self._in_thread(self._cache.removal, version_id, owner, force)
        goes = expected is Removal.GONE
        in_use = await self._in_thread(self._cache.in_use, [version_id]) if goes else set[bytes]()
        if self._state.fetching(version_id) is not None:
            return Outcome(path, False, FETCHED)
        if goes:
            self._handle(ReplicaDropped(version_id))
        removal = await self._in_thread(self._cache.remove, version_id, owner, force)
        if goes and removal in (Removal.UNLINKED, Removal.PINNED):
            self._handle(ReplicasRecovered([version_id]))  # somebody else came to want it just now
        if removal is Removal.PINNED:
            names = await self._in_thread(_names_of_pins, [entry])
            who = owner.name if owner is not None else ", ".join(names.values())
            return Outcome(path, False, f"pinned by {who}: unpin it first, or use --force")
        return Outcome(path, True, IN_USE if in_use else "", entry.replica.stamp.size_bytes)

    # --- verify ---------------------------------------------------------------------------------

    async def _verify(self, entry: Entry) -> Outcome:
        """Digest one file. One at a time for all clients: it keeps a disk thread busy for long."""
        path, stamp = entry.replica.path, entry.replica.stamp
        if not entry.trusted:
            return Outcome(path, False, "in doubt after a crash, and digested before it is used")
        async with self._verifying:
            rotten = await self._verify_now(entry.replica.version_id)
        if rotten is None:
            return Outcome(path, False, "not cached any more")
        if not rotten:
            return Outcome(path, True, "", stamp.size_bytes, 0)
        count = ChunkLayout(stamp.size_bytes, entry.replica.chunk_size_bytes).chunk_count
        note = f"{len(rotten)} of {count} chunks were rotten: taken out, to be fetched again"
        return Outcome(path, False, note, stamp.size_bytes, len(rotten))

    # --- pin, unpin -----------------------------------------------------------------------------

    def _pin(self, request: Pin | Unpin, page: list[Entry], user: User) -> list[Outcome]:
        """Runs in a thread."""
        outcomes = []
        for entry in page:
            version_id, path = entry.replica.version_id, entry.replica.path
            size_bytes = entry.replica.stamp.size_bytes
            if isinstance(request, Unpin):
                self._cache.unpin(version_id, None if request.all_users else user.uid)
                outcomes.append(Outcome(path, True, "", size_bytes))
            elif self._cache.pin(version_id, user.uid):
                outcomes.append(Outcome(path, True, "", size_bytes))
            else:
                outcomes.append(Outcome(path, False, "not cached any more"))
        return outcomes


def sees_all(user: User) -> bool:
    """Whether a user is root or the daemon's own: one who sees and changes everything."""
    return user.uid in (0, os.geteuid())


def _names_of_pins(page: Iterable[Entry]) -> dict[int, str]:
    """The names of all who have pinned one of these, by uid."""
    return {uid: user_name(uid) for entry in page for uid in entry.pinned_by}


async def keep_alive(connection: LocalConnection) -> None:
    """Let the client know that its request is not forgotten, until this is cancelled."""
    while True:
        await asyncio.sleep(WORKING_S)
        connection.send(Working())
