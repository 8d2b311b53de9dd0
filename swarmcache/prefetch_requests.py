"""Answers ``prefetch``: brings files to nodes before anybody there asks for them.

The client's descriptors show that its user may read the files, and this node reads them through
these where nobody has them yet. Every node that shall have them is asked over a connection of its
own, joins the swarms of the files, and gets them from there. Whom to ask decides ``placement.py``;
which nodes there are says ``known_nodes``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from swarmcache.auth import Keyring
from swarmcache.cache_requests import keep_alive
from swarmcache.chunks import choose_chunk_size
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.disk import User
from swarmcache.disk_calls import SharedFile
from swarmcache.errors import LocalError, PeerUnavailable, SwarmcacheError
from swarmcache.holder_questions import HolderQuestions
from swarmcache.link import Link, connect_to_node
from swarmcache.local_protocol import (
    End,
    Failed,
    NodeSilent,
    Notice,
    Placed,
    PrefetchTo,
    Transferred,
)
from swarmcache.local_server import LocalConnection
from swarmcache.messages import (
    LOCATED_NODES_MAX,
    FromPlaced,
    NodeAddress,
    NotPlaced,
    PlaceReplica,
    Placing,
    ReplicaPlaced,
    decode_from_placed,
    encode,
)
from swarmcache.placed_replicas import PlacedReplicas
from swarmcache.placement import KnownNode, Placement, rank
from swarmcache.source_file import SourceExaminer, SourceFile

log = logging.getLogger(__name__)

# Connections to nodes at once, for one client. The others wait until some of these have the files.
NODES_AT_ONCE_MAX = 256
# A node tells every second how far it is.
SILENCE_S_MAX = 30.0
PROGRESS_S = 0.5

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(slots=True)
class WantedFile:
    """A file that is to be brought somewhere. ``number``: in the client's request.

    ``lone``: no other node is known to have it. ``done_bytes``: by node, of what is under way.
    """

    number: int
    source: SourceFile
    file: SharedFile
    chunk_size_bytes: int
    lone: bool = True
    done_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def size_bytes(self) -> int:
        return self.source.version.size_bytes


class PrefetchRequests:
    """The requests of all local clients of one daemon for files on other nodes."""

    def __init__(
        self,
        placed: PlacedReplicas,
        examiner: SourceExaminer,
        examine_threads: CompartmentThreads,
        holders: HolderQuestions,
        known_nodes: Callable[[Sequence[str]], Awaitable[tuple[list[KnownNode], str]]],
        session: aiohttp.ClientSession,
        keyring: Keyring,
        address: NodeAddress,
        chunk_size_bytes: int | None,
        spawn: Spawn,
    ) -> None:
        """``known_nodes`` tells of all nodes, and why these may not be all; of those that are named
        if anything is known of them.

        ``address`` is this node's own; ``chunk_size_bytes``: None to choose by the size of the
        file; ``spawn`` runs a coroutine in the background.
        """
        self.placed = placed
        self.holders = holders
        self.known_nodes = known_nodes
        self.address = address
        self.spawn = spawn
        self._examiner = examiner
        self._threads = examine_threads
        self._session = session
        self._keyring = keyring
        self._identity = msgspec.msgpack.encode(address)
        self._chunk_size_bytes = chunk_size_bytes
        self._busy: set[LocalConnection] = set()

    def take(self, connection: LocalConnection, request: PrefetchTo, fds: list[int]) -> None:
        """Begin to answer a request; owns ``fds``."""
        if connection in self._busy:
            connection.close_files(fds)
            connection.send(Failed("one request at a time on a connection"))
            return
        self._busy.add(connection)
        self.spawn(self._serve(connection, request, [connection.share(fd) for fd in fds]))

    async def _serve(
        self, connection: LocalConnection, request: PrefetchTo, files: list[SharedFile]
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        alive = self.spawn(keep_alive(connection))
        answer: End | Failed = End()
        with ExitStack() as stack:
            for file in files:
                stack.callback(file.release)
            try:
                wanted = await self._examine(connection, files)
                # Not before: no descriptor may be closed while a thread looks at it.
                connection.on_closed[self] = task.cancel
                if wanted and connection.is_open:
                    await Prefetch(self, connection, request, wanted).run()
            except Exception as error:
                answer = Failed(f"internal error: {error}")
                raise
            finally:
                alive.cancel()
                self._busy.remove(connection)
                connection.on_closed.pop(self, None)
                connection.send(answer)

    async def _examine(
        self, connection: LocalConnection, files: Sequence[SharedFile]
    ) -> list[WantedFile]:
        """Those that can be brought anywhere; of the others the client is told."""
        wanted: dict[bytes, WantedFile] = {}
        for number, file in enumerate(files):
            try:
                place = self._examiner.place(file.fd)
                examine = self._examiner.examine
                source = await self._threads.run(connection.user.uid, place, examine, file.fd)
                if source.version.origin:
                    raise LocalError("it is on a file system that only this machine sees")
            except SwarmcacheError as error:
                connection.send(Placed(number, reason=str(error)))
                continue
            size_bytes = source.version.size_bytes
            chunk_size_bytes = self._chunk_size_bytes or choose_chunk_size(size_bytes)
            wanted.setdefault(
                source.version.version_id, WantedFile(number, source, file, chunk_size_bytes)
            )
        return list(wanted.values())

    async def connect(self, node: str) -> Link:
        """A connection to a node that is to take replicas. Raises RemoteError."""
        return await connect_to_node(self._session, node, self._keyring, "prefetch", self._identity)


class Prefetch:
    """One request, from what is known of the nodes until all of them have answered."""

    def __init__(
        self,
        requests: PrefetchRequests,
        connection: LocalConnection,
        request: PrefetchTo,
        files: Sequence[WantedFile],
    ) -> None:
        self._requests = requests
        self._connection = connection
        self._request = request
        self._files = {file.source.version.version_id: file for file in files}
        self._own = requests.address.node
        self._names: dict[str, str] = {}
        self._places = asyncio.Semaphore(NODES_AT_ONCE_MAX)
        self._copies = 0
        self._unreadable: dict[int, str] = {}  # why this node cannot read a file for the others

    async def run(self) -> None:
        """Returns when the client knows of each node that was asked."""
        nodes, reason = await self._requests.known_nodes(self._request.nodes)
        if reason:
            self._connection.send(Notice(f"there may be nodes that are not known here: {reason}"))
        if all(each.node != self._own for each in nodes):
            nodes.append(KnownNode(self._own, self._requests.address.name))
        self._names = {each.node: each.name for each in nodes}
        held = await self._holders()
        ranked = self._rank(nodes, held)
        placement = Placement([each.node for each in ranked], self._request.copies)
        self._copies = min(len(ranked), self._request.copies or len(ranked))
        helpers = [self._requests.spawn(self._tell_progress())]
        helpers += [
            self._requests.spawn(self._read_for_others(file))
            for file in self._files.values()
            if file.lone and ranked
        ]
        try:
            async with asyncio.TaskGroup() as group:

                async def bring(node: str) -> None:
                    async with self._places:
                        succeeded = await self._bring(node)
                    begin(placement.ended(node, succeeded=succeeded))
                    await self._connection.drained()

                def begin(nodes: Sequence[str]) -> None:
                    for node in nodes:
                        group.create_task(bring(node))

                begin(placement.more())
        finally:
            for task in helpers:
                task.cancel()
            placement.check()

    # --- whom to ask ----------------------------------------------------------------------------

    async def _holders(self) -> Counter[str]:
        """How many of the files each node has, as far as the tracker says."""
        held: Counter[str] = Counter()
        holders, _ = await self._requests.holders.ask(list(self._files), LOCATED_NODES_MAX)
        for file, known in zip(self._files.values(), holders or [], strict=False):
            file.lone = not known.count
            held.update(address.node for address in known.nodes)
        for version_id in self._files:
            try:
                held[self._own] += await self._requests.placed.renew(version_id)
            except LocalError as error:
                log.info("cannot look for a replica here: %s", error)
        return held

    def _rank(self, nodes: Sequence[KnownNode], held: Counter[str]) -> list[KnownNode]:
        """Those that are to be asked, the first ones first. The client is told why others are not,
        unless others are as good."""
        request = self._request
        if request.copies is None and request.nodes:
            named = set(request.nodes)
            known = {name for each in nodes for name in (each.node, each.name)}
            for name in dict.fromkeys(request.nodes):
                if name not in known:
                    self._connection.send(NodeSilent(name, "no node of this name is known"))
            nodes = [each for each in nodes if {each.node, each.name} & named]
        total_bytes = sum(file.size_bytes for file in self._files.values())
        nodes = [
            each if held[each.node] == len(self._files) else each.lacking_room(total_bytes)
            for each in nodes
        ]
        ranked = rank(nodes, request.nodes, held)
        if request.copies is None or len(ranked) < request.copies:
            for each in nodes:
                if each.trouble:
                    self._connection.send(NodeSilent(each.node, each.trouble))
        return ranked

    # --- one node -------------------------------------------------------------------------------

    async def _bring(self, node: str) -> bool:
        """Whether the node has all files in the end. The client is told of each."""
        if node == self._own:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._take_here(file)) for file in self._files.values()]
            return all(task.result() for task in tasks)
        try:
            return await self._ask(node)
        except SwarmcacheError as error:
            self._connection.send(NodeSilent(node, str(error)))
            return False

    async def _take_here(self, file: WantedFile) -> bool:
        try:
            hit = await self._obtain(file)
        except LocalError as error:
            self._tell(file, self._own, reason=str(error))
            return False
        self._tell(file, self._own, hit=hit)
        return True

    async def _obtain(self, file: WantedFile) -> bool:
        """Have the file here. Raises LocalError."""
        user = self._connection.user
        reader: tuple[User, SharedFile] = (user, file.file)
        return await self._requests.placed.obtain(
            file.source, user.name, file.chunk_size_bytes, reader
        )

    async def _read_for_others(self, file: WantedFile) -> None:
        """Somebody must: nobody else may read it, or has it."""
        try:
            await self._obtain(file)
        except LocalError as error:
            self._unreadable[file.number] = str(error)

    async def _ask(self, node: str) -> bool:
        """Have another node take the files. Raises RemoteError."""
        waiting = dict(self._files)
        failed = False
        link = await self._requests.connect(node)
        loop = asyncio.get_running_loop()

        def take(data: bytes) -> None:
            nonlocal failed
            silence.reschedule(loop.time() + SILENCE_S_MAX)
            message = decode_from_placed(data)
            file = waiting.get(message.version_id)
            if file is None:
                return  # how far it was, told when it was done
            if not isinstance(message, Placing):
                del waiting[message.version_id]
            failed |= self._heard(file, node, message)
            if not waiting:
                link.close()

        try:
            async with asyncio.timeout(SILENCE_S_MAX) as silence:
                for file in self._files.values():
                    link.send(encode(self._wish(file)))
                await link.receive(take)
        except TimeoutError as error:
            raise PeerUnavailable(f"it has said nothing for {SILENCE_S_MAX:g} s") from error
        finally:
            self._requests.spawn(link.wait_closed())
        if waiting:
            raise PeerUnavailable("it closed the connection before it had all files")
        return not failed

    def _wish(self, file: WantedFile) -> PlaceReplica:
        version = file.source.version
        return PlaceReplica(
            version.path,
            version.size_bytes,
            version.mtime_ns,
            file.source.file_server,
            self._connection.user.name,
            file.chunk_size_bytes,
        )

    def _heard(self, file: WantedFile, node: str, message: FromPlaced) -> bool:
        """Tell the client what a node said of a file; whether the node will not have it."""
        match message:
            case Placing():
                file.done_bytes[node] = min(message.done_bytes, file.size_bytes)
            case ReplicaPlaced():
                self._tell(file, node, hit=message.hit)
            case NotPlaced():
                self._tell(file, node, reason=message.reason)
        return isinstance(message, NotPlaced)

    def _tell(self, file: WantedFile, node: str, *, hit: bool = False, reason: str = "") -> None:
        file.done_bytes[node] = 0 if reason else file.size_bytes
        unreadable = self._unreadable.get(file.number)
        if reason and unreadable and node != self._own:
            reason += f"; this node cannot read the file for others: {unreadable}"
        name = self._names.get(node, node)
        self._connection.send(Placed(file.number, node, name, hit, reason))

    async def _tell_progress(self) -> None:
        total_bytes = self._copies * sum(file.size_bytes for file in self._files.values())
        while True:
            for version_id, file in self._files.items():
                here_bytes = self._requests.placed.done_bytes(version_id)
                if here_bytes:
                    file.done_bytes[self._own] = here_bytes
            done_bytes = sum(file.done_bytes.total() for file in self._files.values())
            self._connection.send(Transferred(min(done_bytes, total_bytes), total_bytes))
            await asyncio.sleep(PROGRESS_S)
