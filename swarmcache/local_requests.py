"""Answers what local clients ask of the daemon: files, and how things stand.

For ``get`` a thread examines the descriptor that came along and answers a cached file at once; all
else is left to the machine. Many files at once are the business of ``look_ups.py``. What
``peer.py`` needs of a file that is wanted (the descriptors to read it through, the users to link it
for) is kept here until the machine has done with it.

Invariant: every descriptor that was handed over is closed when its request ends, and every copy of
it when nothing is fetched through it any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from swarmcache.cache_dir import Damaged
from swarmcache.cache_requests import sees_all
from swarmcache.chunks import FileVersion, choose_chunk_size
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk import Cache, User
from swarmcache.disk_calls import SharedFile
from swarmcache.errors import LocalError, NoThread, SwarmcacheError
from swarmcache.fetching import Fetching
from swarmcache.holds import Holds
from swarmcache.local_protocol import (
    AboutFiles,
    Answer,
    Cached,
    Failed,
    Found,
    Get,
    LookUp,
    NodeStatus,
    Original,
    Progress,
    Release,
    StatusOf,
    encode_answer,
)
from swarmcache.local_server import LocalConnection
from swarmcache.look_ups import LookUps
from swarmcache.peer_events import (
    AnswerCached,
    AnswerFiles,
    AnswerOriginal,
    AnswerStatus,
    CopyWanted,
    FileWanted,
    PeerEvent,
    RequestGone,
    StatusWanted,
)
from swarmcache.peer_state import PeerState
from swarmcache.source_file import SourceExaminer, SourceFile, same_version

log = logging.getLogger(__name__)

PROGRESS_S = 0.25

Task = asyncio.Task[None]
Result = TypeVar("Result")


@dataclass(slots=True)
class LocalRequest:
    """A client that waits for a file. ``file`` is the descriptor that it handed over.

    ``hold``: the number under which the client keeps the copy when it has got it. ``joined``: the
    file was being fetched already when this request came.
    """

    connection: LocalConnection
    source: SourceFile
    file: SharedFile
    hold: int | None
    joined: bool
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


@dataclass(slots=True)
class Work:
    """What the shell holds of one file version that the machine is fetching.

    ``users``: who asked, by uid, or is to get a link. ``files``: a descriptor of the source of each
    who asked, let go of when the work ends. ``failures``: how often it could not be read, by uid.
    ``answers``: tasks that hand out the finished copy.
    """

    from_peers_bytes: int = 0
    from_file_server_bytes: int = 0
    users: dict[int, User] = field(default_factory=dict)
    files: dict[int, SharedFile] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)
    answers: list[Task] = field(default_factory=list)


class LocalRequests:
    """The requests of all local clients of one daemon."""

    def __init__(
        self,
        cache: Cache,
        examiner: SourceExaminer,
        examine_threads: CompartmentThreads,
        state: PeerState,
        numbers: Iterator[int],
        *,
        chunk_size_bytes: int | None,
        spawn: Callable[[Coroutine[Any, Any, None]], Task],
        handle: Callable[[PeerEvent], None],
        node_status: Callable[[], dict[str, Any]],
        members: Callable[[], list[dict[str, Any]] | None],
    ) -> None:
        """``numbers`` are those of the requests, which nobody else uses.

        ``spawn`` runs a coroutine in the background; ``handle`` tells the machine.

        ``chunk_size_bytes``: None to choose by the size of the file. ``node_status``, which may
        raise LocalError, and ``members`` say what there is to say of this node and of all.
        """
        self._cache = cache
        self._examiner = examiner
        self._threads = examine_threads
        self._state = state
        self._numbers = numbers
        self._chunk_size_bytes = chunk_size_bytes
        self._spawn = spawn
        self._handle = handle
        self._node_status = node_status
        self._members = members
        self._loop = asyncio.get_running_loop()
        self._requests: dict[int, LocalRequest] = {}
        self._cluster_status: asyncio.Future[AnswerStatus] | None = None  # the tracker is asked
        self._status_wanted: list[LocalConnection] = []
        self._work: dict[bytes, Work] = {}
        self._holds = Holds(cache)
        self._counting = threading.Lock()
        self._busy: set[LocalConnection] = set()  # those that have not got their answer yet
        self._look_ups = LookUps(
            cache,
            examiner,
            examine_threads,
            numbers,
            handle,
            self._count_hits,
            self._answer_from_thread,
        )

    def take(self, connection: LocalConnection, request: AboutFiles, fds: list[int]) -> None:
        """Begin to answer a request; owns ``fds``."""
        match request:
            case Release():
                self._holds.release(connection, request.hold)
            case _ if connection in self._busy:  # so that nobody has more descriptors of ours
                connection.close_files(fds)
                connection.send(Failed("one request at a time on a connection"))
            case StatusOf():
                self._want_status(connection)
            case Get():
                self._examine(connection, request, fds, self._get_in_thread, fds[0])
            case LookUp():
                self._examine(connection, request, fds, self._look_ups.look_up_in_thread, fds)

    def _examine(
        self,
        connection: LocalConnection,
        request: Get | LookUp,
        fds: list[int],
        function: Callable[..., None],
        files: int | list[int],
    ) -> None:
        """Have a thread answer; ``fds`` are closed should none come to it any more."""
        self._busy.add(connection)
        uid, place = connection.user.uid, self._examiner.place(fds[0]) if fds else None
        try:
            done = self._threads.submit(uid, place, function, connection, request, files)
        except NoThread as error:
            connection.close_files(fds)
            nothing = Found([None] * len(fds))
            many = isinstance(request, LookUp)
            self._answer(connection, nothing if many else Original(str(error)))
            return
        done.add_done_callback(
            lambda done: connection.close_files(fds) if done.cancelled() else None
        )

    def carry_out(self, effect: AnswerCached | AnswerOriginal | AnswerFiles | AnswerStatus) -> None:
        """Give the machine's answer to the client who asked."""
        match effect:
            case AnswerCached():
                work = self._work[effect.version_id]
                work.answers.append(self._spawn(self._verify_and_answer(effect.request, work)))
            case AnswerOriginal():
                self._answer_original(effect.request, effect.reason, retry=effect.source_changed)
            case AnswerFiles():
                self._look_ups.answer(effect.request)
            case AnswerStatus():
                self._answer_status(effect)

    def answer_everybody(self, reason: str) -> None:
        """Answer all who still wait with the original path."""
        for request in list(self._requests):
            self._answer_original(request, reason)

    # --- what is wanted -------------------------------------------------------------------------

    def borrow_file(self, version_id: bytes) -> SharedFile:
        """A descriptor of the source of a file that is being fetched; the caller releases it. Of
        several the one that has failed least: a user's may be of no use to us (O_DIRECT)."""
        work = self._work[version_id]
        file = work.files[min(work.files, key=work.failures.__getitem__)]
        retained = file.retain()
        assert retained, "closed before the work has ended"
        return file

    def source_failed(self, version_id: bytes, file: SharedFile, reason: str) -> None:
        """A descriptor that was borrowed could not be read."""
        work, fetching = self._work.get(version_id), self._state.fetching(version_id)
        if work is None or fetching is None:
            return  # nobody wants it any more
        for uid, each in work.files.items():
            if each is file:
                work.failures[uid] += 1
                path = os.fsdecode(fetching.version.path)
                log.warning("reading %r for uid %d: %s", path, uid, reason)

    def users_of_batch(self, request: int) -> list[User]:
        """For whom small files are fetched together."""
        return self._look_ups.users(request)

    def users_of(self, version_id: bytes) -> Collection[int]:
        """The uids of all who have asked for a file that is being fetched."""
        work = self._work.get(version_id)
        return work.users.keys() if work is not None else ()

    def begin_publishing(self, version_id: bytes) -> list[User]:
        """The file is complete: the users who have asked for it."""
        work = self._work[version_id]
        fetching = self._state.fetching(version_id)
        if fetching is not None and fetching.download is not None:
            work.from_peers_bytes = fetching.download.from_peers_bytes
            work.from_file_server_bytes = fetching.download.from_file_server_bytes
        return list(work.users.values())

    def mend(self, damaged: Damaged) -> None:
        """Fetch from peers what of a copy is wrong. Its users get their links back."""
        version = damaged.version
        file_server = self._examiner.file_server(version)
        if file_server is None:
            return  # whoever asks for the file next will know
        work = self._work.setdefault(version.version_id, Work())
        for user in damaged.users:
            work.users.setdefault(user.uid, user)
        name = damaged.users[0].name if damaged.users else ""
        self._handle(CopyWanted(version, file_server, name, damaged.chunk_size_bytes))
        self.end_work(version.version_id)  # in case that the machine does not want it

    def end_work(self, version_id: bytes) -> list[Task]:
        """Close what is held of a file version, unless it is wanted again already.

        Returns the tasks that hand out the copy.
        """
        work = self._work.get(version_id)
        if work is None:
            return []
        if self._state.fetching(version_id) is None:
            del self._work[version_id]
            for file in work.files.values():
                file.release()
        return work.answers

    def downloads_status(self, whose: str | None = None) -> list[dict[str, Any]]:
        """How far every file is that is being fetched; the paths of those that are fetched for the
        user ``whose``, or of all."""
        return [self._download_status(fetching, whose) for fetching in self._state.downloads()]

    def _download_status(self, fetching: Fetching, whose: str | None) -> dict[str, Any]:
        download = fetching.download
        path = fetching.version.path if whose in (None, fetching.user) else b""
        held = download.held if download is not None else 0
        return {
            "version_id": fetching.version.version_id.hex(),
            "path": os.fsdecode(path).encode(errors="replace").decode(),
            "size_bytes": fetching.version.size_bytes,
            "done_bytes": download.layout.mask_bytes(held) if download is not None else 0,
            "from_peers_bytes": download.from_peers_bytes if download is not None else 0,
            "from_file_server_bytes": (
                download.from_file_server_bytes if download is not None else 0
            ),
            "waiting_for": self._waiting_for(fetching),
        }

    def _waiting_for(self, fetching: Fetching) -> str:
        if not self._state.tracker_connected:
            return "the tracker"
        if fetching.waiting_for_slot:
            return f"a slot of {fetching.file_server}"
        return ""

    # --- get ------------------------------------------------------------------------------------

    def _get_in_thread(self, connection: LocalConnection, get: Get, fd: int) -> None:
        """Answer a hit from here, since every change to another thread takes longer than the rest.

        Whatever else it is, the event loop goes on with it.
        """
        try:
            source = self._examiner.examine(fd)
            path = None
            if get.hold is None:
                path = self._cache.lookup(source.version, connection.user)
        except SwarmcacheError as error:
            connection.close_files_here([fd])
            self._answer_from_thread(connection, Original(str(error)))
        except Exception as error:
            # A bug of ours; the job still gets a path.
            log.exception("cannot look at a source")
            connection.close_files_here([fd])
            self._answer_from_thread(connection, Original(f"internal error: {error}"))
        else:
            if path is None:
                self._loop.call_soon_threadsafe(self._get, connection, get, fd, source)
                return
            connection.close_files_here([fd])
            self._count_hits(1)
            self._answer_from_thread(connection, Cached(os.fsencode(path), hit=True))

    def _count_hits(self, count: int) -> None:
        with self._counting:
            self._state.count_hits(count)

    def _answer(self, connection: LocalConnection, answer: Answer) -> None:
        """The final answer to what a connection has asked."""
        self._busy.discard(connection)
        connection.send(answer)

    def _answer_from_thread(self, connection: LocalConnection, answer: Answer) -> None:
        self._busy.discard(connection)
        connection.send_from_thread(answer)

    def _get(self, connection: LocalConnection, get: Get, fd: int, source: SourceFile) -> None:
        """Go on with a file that was not there, or is to be held."""
        if not connection.is_open:
            connection.close_files([fd])
            self._busy.discard(connection)
            return
        try:
            # Once more: it may have come since, and then nobody would tell.
            hit = self._look_up(connection, source.version, get.hold)
            if hit is None and get.tree is not None:
                self._cache.keep_together(get.tree, source.version.path)
        except SwarmcacheError as error:
            connection.close_files([fd])
            self._answer(connection, Original(str(error)))
            return
        except Exception as error:
            # A bug of ours; the job still gets a path, and the log the traceback.
            connection.close_files([fd])
            self._answer(connection, Original(f"internal error: {error}"))
            raise
        if hit is not None:
            self._count_hits(1)
            connection.close_files([fd])
            self._answer(connection, hit)
            return
        number = next(self._numbers)
        joined = self._state.fetching(source.version.version_id) is not None
        request = LocalRequest(connection, source, connection.share(fd), get.hold, joined)
        self._requests[number] = request
        self._cache.hold(source.version.version_id)  # not evicted before it is handed out
        connection.on_closed[number] = lambda: self._client_gone(number)
        if get.wait_s is not None:
            reason = f"not here within {get.wait_s:g} s"
            late = self._loop.call_later(get.wait_s, self._answer_early, number, reason)
            request.timers.append(late)
        if get.progress:
            self._send_progress(number)
        self._want(number, request)

    def _look_up(
        self, connection: LocalConnection, version: FileVersion, hold: int | None
    ) -> Cached | None:
        """The answer for a file that is cached already."""
        if hold is None:
            path = self._cache.lookup(version, connection.user)
            return None if path is None else Cached(os.fsencode(path), hit=True)
        version_id = version.version_id
        self._cache.hold(version_id)  # before the look-up, or it may be evicted in between
        try:
            path = self._cache.lookup(version, connection.user)
            if path is None:
                return None
            held = self._holds.add(connection, hold, version_id)
            return Cached(os.fsencode(path), hit=True, held=held)
        finally:
            self._cache.release(version_id)

    def _want(self, number: int, request: LocalRequest) -> None:
        source = request.source
        self._let_read(source.version.version_id, request.connection.user, request.file)
        chunk_size_bytes = self._chunk_size_bytes or choose_chunk_size(source.version.size_bytes)
        self._handle(
            FileWanted(
                number,
                source.version,
                source.file_server,
                request.connection.user.name,
                chunk_size_bytes,
            )
        )

    def _let_read(self, version_id: bytes, user: User, file: SharedFile) -> None:
        """A user has shown that they may read a file that is to be fetched, and with what."""
        work = self._work.setdefault(version_id, Work())
        work.users[user.uid] = user
        if user.uid not in work.files:
            file.retain()  # not a second descriptor: there may be none left
            work.files[user.uid] = file

    def want_replica(
        self,
        number: int,
        source: SourceFile,
        user_name: str,
        chunk_size_bytes: int,
        reader: tuple[User, SharedFile] | None = None,
    ) -> None:
        """Have a file fetched that no client waits for. What becomes of the request with this
        number the machine tells whoever has chosen it. ``reader``: who may read it here, if anybody
        may, and with what."""
        version_id = source.version.version_id
        if reader is not None:
            self._let_read(version_id, *reader)
        self._work.setdefault(version_id, Work())
        self._handle(
            FileWanted(
                number,
                source.version,
                source.file_server,
                user_name,
                chunk_size_bytes,
                can_read=reader is not None,
            )
        )
        self.end_work(version_id)  # in case that the machine does not want it

    def _send_progress(self, number: int) -> None:
        request = self._requests.get(number)
        if request is None:
            return
        version = request.source.version
        fetching = self._state.fetching(version.version_id)
        download = fetching.download if fetching is not None else None
        progress = Progress(version.size_bytes, 0, 0, 0, 0, joined=request.joined)
        if fetching is not None and download is not None:
            progress = Progress(
                version.size_bytes,
                download.from_peers_bytes,
                download.from_file_server_bytes,
                download.recovered_bytes,
                len(download.peers),
                waiting_for=self._waiting_for(fetching),
                joined=request.joined,
            )
        request.connection.send(progress)
        request.timers.append(self._loop.call_later(PROGRESS_S, self._send_progress, number))

    def _client_gone(self, number: int) -> None:
        if self._end_request(number) is not None:
            self._handle(RequestGone(number))

    def _answer_early(self, number: int, reason: str) -> None:
        self._answer_original(number, reason)
        self._handle(RequestGone(number))

    def _end_request(self, number: int) -> LocalRequest | None:
        request = self._requests.pop(number, None)
        if request is not None:
            self._busy.discard(request.connection)
            request.connection.on_closed.pop(number, None)
            for timer in request.timers:
                timer.cancel()
            request.file.release()
            self._cache.release(request.source.version.version_id)
        return request

    def _answer_original(self, number: int, reason: str, *, retry: bool = False) -> None:
        request = self._end_request(number)
        if request is not None:
            request.connection.send(Original(reason, retry))

    async def _verify_and_answer(self, number: int, work: Work) -> None:
        """Hand out the copy if the source is still the file version that was asked for."""
        request = self._requests.get(number)
        if request is None:
            return
        version = request.source.version
        sources = (work.from_peers_bytes, work.from_file_server_bytes)
        file = request.file
        file.retain()
        try:
            uid, place = request.connection.user.uid, self._examiner.place(file.fd)
            same = await self._threads.run(uid, place, same_version, file.fd, version)
            path = self._cache.lookup(version, request.connection.user) if same else None
        except SwarmcacheError as error:
            self._answer_original(number, str(error))
            return
        finally:
            file.release()
        if path is None:
            self._answer_original(number, "the source changed meanwhile", retry=True)
        elif number in self._requests:  # or else it was answered meanwhile
            held = request.hold is not None and self._holds.add(
                request.connection, request.hold, version.version_id
            )
            self._end_request(number)
            request.connection.send(Cached(os.fsencode(path), False, *sources, held=held))

    # --- status ---------------------------------------------------------------------------------

    async def cluster_status(self) -> tuple[dict[str, Any] | None, str]:
        """What the tracker says of the cluster; None where it cannot be asked, and why. All who
        want to know while it is being asked get the same answer."""
        if self._cluster_status is None:
            asked = self._cluster_status = self._loop.create_future()
            self._handle(StatusWanted(next(self._numbers)))
        else:
            asked = self._cluster_status
        answer = await asyncio.shield(asked)  # who goes takes it from nobody else
        return answer.cluster, answer.reason

    def _answer_status(self, effect: AnswerStatus) -> None:
        asked, self._cluster_status = self._cluster_status, None
        assert asked is not None, "an answer to nothing"
        asked.set_result(effect)

    def _want_status(self, connection: LocalConnection) -> None:
        self._busy.add(connection)
        self._status_wanted.append(connection)
        if len(self._status_wanted) == 1:
            self._spawn(self._tell_status())

    async def _tell_status(self) -> None:
        """Answer all who want the status by then: it is put together once, and encoded once for all
        who may hear the same."""
        answer: NodeStatus | Failed = Failed("internal error")
        cluster, reason = await self.cluster_status()
        try:
            answer = NodeStatus(self._node_status(), cluster, reason, self._members())
        except LocalError as error:
            answer = Failed(str(error))
        finally:
            lines: dict[str | None, bytes] = {}
            connections, self._status_wanted = self._status_wanted, []
            for connection in connections:
                self._busy.discard(connection)
                whose = self._whose_paths(connection.user)
                if whose not in lines:
                    lines[whose] = encode_answer(self._as_told(answer, whose))
                connection.send_encoded(lines[whose])

    def _whose_paths(self, user: User) -> str | None:
        """Of whose files a user may hear the paths: of all (None), of their own, of nobody's."""
        if sees_all(user):
            return None
        fetching = any(each.user == user.name for each in self._state.downloads())
        return user.name if fetching else ""

    def _as_told(self, answer: NodeStatus | Failed, whose: str | None) -> NodeStatus | Failed:
        """The status without paths that are nobody else's business."""
        if whose is None or isinstance(answer, Failed):
            return answer
        node = {**answer.node, "downloads": self.downloads_status(whose)}
        return NodeStatus(node, answer.cluster, answer.reason, answer.members)
