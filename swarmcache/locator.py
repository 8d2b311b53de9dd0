"""Where a user's files are, in the whole cluster: the daemon's answers to ``locate`` and ``path``.

A user shows with open descriptors which files they may read, as for ``get``, and hears of no other.
Whom to ask, and until when, decides ``holder_survey.py``.

Invariant: every descriptor that was handed over is closed before the first question is asked.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from typing import Any, TypeVar

from swarmcache.cache_requests import keep_alive
from swarmcache.chunks import choose_chunk_size
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk import Cache, User
from swarmcache.errors import BadMessage, LocalError, SwarmcacheError
from swarmcache.holder_questions import HolderQuestions
from swarmcache.holder_survey import (
    AskHolder,
    HolderAnswered,
    HolderSilent,
    HolderSurvey,
    StopAsking,
    SurveyEffect,
    SurveyEnded,
    SurveyEvent,
    SurveyWanted,
)
from swarmcache.link import address_of
from swarmcache.local_protocol import (
    AboutPlaces,
    Answer,
    CopyPath,
    End,
    Failed,
    Location,
    Locations,
    LocationsOf,
    Notice,
    Room,
    RoomFor,
)
from swarmcache.local_server import LocalConnection
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import LOCATED_NODES_MAX, Holders, NodeAddress, ReplicaPlace
from swarmcache.peer_events import TimePassed
from swarmcache.replica_questions import Places, ReplicaQuestions
from swarmcache.source_file import SourceExaminer, SourceFile

# Of one user at a time; who asks for more waits. ``get`` needs the threads that look as well.
SURVEYS_PER_USER_MAX = 4
LOOKS_PER_USER_MAX = 4
# Some of those that the tracker names may turn out to hold nothing any more.
SPARE_HOLDERS = 4

Result = TypeVar("Result")
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Turns:
    """What one user has under way."""

    def __init__(self) -> None:
        self.surveys = asyncio.Semaphore(SURVEYS_PER_USER_MAX)
        self.looks = asyncio.Semaphore(LOOKS_PER_USER_MAX)


class Locator:
    """The requests of all local clients of one daemon about where files are."""

    def __init__(
        self,
        cache: Cache,
        examiner: SourceExaminer,
        examine_threads: CompartmentThreads,
        tracker: HolderQuestions,
        nodes: ReplicaQuestions,
        address: NodeAddress,
        chunk_size_bytes: int | None,
        spawn: Spawn,
    ) -> None:
        """``address`` is this node's own; ``chunk_size_bytes``: None to choose by the size of the
        file; ``spawn`` runs a coroutine in the background."""
        self._cache = cache
        self._examiner = examiner
        self._threads = examine_threads
        self._tracker = tracker
        self._nodes = nodes
        self._address = address
        self._chunk_size_bytes = chunk_size_bytes
        self._spawn = spawn
        self._turns: defaultdict[int, Turns] = defaultdict(Turns)  # by uid
        self._busy: set[LocalConnection] = set()

    def take(self, connection: LocalConnection, request: AboutPlaces, fds: list[int]) -> None:
        """Begin to answer a request; owns ``fds``."""
        if connection in self._busy:
            connection.close_files(fds)
            connection.send(Failed("one request at a time on a connection"))
            return
        self._busy.add(connection)
        self._spawn(self._serve(connection, request, fds))

    async def _serve(
        self, connection: LocalConnection, request: AboutPlaces, fds: list[int]
    ) -> None:
        alive = self._spawn(keep_alive(connection))
        answers: list[Answer] = []
        try:
            # Not cancelled before all descriptors are closed.
            sources = await asyncio.gather(*(self._examine(connection, fd) for fd in fds))
            task = asyncio.current_task()
            assert task is not None
            connection.on_closed[self] = task.cancel
            if connection.is_open:
                answers = await self._answers(request, sources, connection.user)
        except LocalError as error:
            answers = [Failed(str(error))]
        except Exception as error:
            answers = [Failed(f"internal error: {error}")]
            raise
        finally:
            alive.cancel()
            # Before the answer, after which the client may ask the next question at once.
            self._busy.remove(connection)
            connection.on_closed.pop(self, None)
            connection.send(*answers)

    async def _examine(self, connection: LocalConnection, fd: int) -> SourceFile | str:
        """What a descriptor leads to, or why that is no source. Closes it."""
        try:
            place = self._examiner.place(fd)
            return await self._look(connection.user, self._examiner.examine, fd, place=place)
        except SwarmcacheError as error:
            return str(error)
        finally:
            connection.close_files([fd])

    async def _look(
        self,
        user: User,
        function: Callable[..., Result],
        *args: object,
        place: Hashable = None,
    ) -> Result:
        """Run something in a thread, when it is this user's turn. ``place``: what it depends on."""
        async with self._turns[user.uid].looks:
            return await self._threads.run(user.uid, place, function, *args)

    async def _answers(
        self, request: AboutPlaces, sources: Sequence[SourceFile | str], user: User
    ) -> list[Answer]:
        if isinstance(request, LocationsOf):
            async with self._turns[user.uid].surveys:
                return [*await self._locate(sources, user, request.limit), End()]
        if isinstance(request, RoomFor):
            return [await self._room(sources, user)]
        if not sources:
            path = await self._look(user, self._cache.own_path, request.path, user)
        elif isinstance(sources[0], str):
            return [Failed(sources[0])]
        else:
            path = await self._look(user, self._cache.user_path, sources[0].version, user)
        return [CopyPath(os.fsencode(path))]

    async def _room(self, sources: Sequence[SourceFile | str], user: User) -> Room:
        """What cannot be cached needs no room."""
        versions = [source.version for source in sources if isinstance(source, SourceFile)]
        files = [
            (version, self._chunk_size_bytes or choose_chunk_size(version.size_bytes))
            for version in versions
        ]
        return Room(*await self._look(user, self._cache.room, files))

    # --- where replicas are ---------------------------------------------------------------------

    async def _locate(
        self, sources: Sequence[SourceFile | str], user: User, limit: int | None
    ) -> list[Answer]:
        """A ``Locations`` for each source, in order; before them what there is to say of nodes."""
        files = {
            source.version.version_id: source.version.path
            for source in sources
            if isinstance(source, SourceFile)
        }
        version_ids = list(files)
        here = await self._nodes.places(user.name, version_ids)
        holders, fault = await self._holders(version_ids, limit)
        wanted = [None if limit is None else limit - (place is not None) for place in here]
        survey = HolderSurvey(holders, wanted)
        await run_survey(
            survey, lambda address: self._nodes.ask(address, user.name, version_ids), self._spawn
        )
        found: dict[bytes, tuple[list[Location], int]] = {}
        for number, (version_id, path) in enumerate(files.items()):
            own = here[number]
            places = [(self._address, own)] if own is not None else []
            places += survey.found(number)
            locations = [_location(address, place, path) for address, place in places]
            found[version_id] = (locations, survey.more(number))
        answers: list[Answer] = [
            Notice(f"{_name(address)} ({address.node}): {reason}; what it holds is not listed")
            for address, reason in survey.silent()
        ]
        for source in sources:
            if isinstance(source, str):
                answers.append(Locations(reason=source))
            else:
                locations, more = found[source.version.version_id]
                size_bytes = source.version.size_bytes
                answers.append(Locations(source.version.path, size_bytes, locations, more, fault))
        return answers

    async def _holders(
        self, version_ids: Sequence[bytes], limit: int | None
    ) -> tuple[list[Holders], str]:
        """Whom the tracker names, for each file version; nobody where it cannot be asked, and why.

        One question names ``LOCATED_NODES_MAX`` nodes in all, so these may be several.
        """
        nodes_max = LOCATED_NODES_MAX
        if limit is not None:
            nodes_max = min(limit + SPARE_HOLDERS, LOCATED_NODES_MAX)
        at_once = LOCATED_NODES_MAX // nodes_max
        groups = [version_ids[at : at + at_once] for at in range(0, len(version_ids), at_once)]
        answers = await asyncio.gather(
            *(self._tracker.ask(list(group), nodes_max) for group in groups)
        )
        found: list[Holders] = []
        for holders, reason in answers:
            if holders is None:
                return [Holders(0) for _ in version_ids], reason
            found += holders
        return found, ""


async def run_survey(
    survey: HolderSurvey, ask: Callable[[NodeAddress], Awaitable[Places]], spawn: Spawn
) -> None:
    """Carry out a survey; returns when it has ended."""
    ended = asyncio.Event()
    asked: dict[str, asyncio.Task[None]] = {}

    async def ask_one(address: NodeAddress) -> None:
        try:
            places = await ask(address)
        except SwarmcacheError as error:
            shell.handle(HolderSilent(address.node, str(error)))
        else:
            shell.handle(HolderAnswered(address.node, places))

    def carry_out(effect: SurveyEffect) -> None:
        match effect:
            case AskHolder():
                asked[effect.address.node] = spawn(ask_one(effect.address))
            case StopAsking():
                asked[effect.node].cancel()
            case SurveyEnded():
                ended.set()

    shell: MachineShell[SurveyEvent, SurveyEffect] = MachineShell(survey, carry_out, TimePassed())
    try:
        shell.handle(SurveyWanted())
        await ended.wait()
    finally:
        shell.stop()
        for task in asked.values():
            task.cancel()


def _name(address: NodeAddress) -> str:
    """What a node is called, as the scheduler knows it."""
    if address.name:
        return address.name
    try:
        return address_of(address.node).host
    except BadMessage:  # it cannot be asked, which is what there is to say of it
        return address.node


def _location(address: NodeAddress, place: ReplicaPlace, path: bytes) -> Location:
    return Location(_name(address), place.directory + path, place.linked)
