"""The node daemon: sockets, threads and the timer around ``PeerState``.

The event loop carries the control plane. Whatever may block runs in threads: looking at sources,
the disk, reading from the file server, and the chunks themselves.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from itertools import islice
from typing import Any

import msgspec
from aiohttp import web

from swarmcache import errors
from swarmcache.auth import IDENTITY_MAX_BYTES, Keyring
from swarmcache.background import BackgroundTasks
from swarmcache.batch_worker import BatchWorker
from swarmcache.cache_requests import CacheRequests
from swarmcache.chunk_fetcher import ChunkFetcher
from swarmcache.chunk_protocol import ChunkRequest
from swarmcache.chunk_server import ChunkServer
from swarmcache.clock import now_s
from swarmcache.cluster_caches import ClusterCaches
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.config import Config
from swarmcache.disk import Cache
from swarmcache.disk_calls import SharedFile
from swarmcache.disk_worker import DiskWorker
from swarmcache.errors import BadMessage, ConfigError, LocalError, NoThread, SwarmcacheError
from swarmcache.gossip_records import ADDRESS_BYTES_MAX, NodeProfile
from swarmcache.gossip_server import GossipServer
from swarmcache.holder_questions import HolderQuestions
from swarmcache.http_server import serving_on
from swarmcache.link import Link, address_of, client_session, connect_to_node, node_behind, serve
from swarmcache.local_protocol import (
    AboutCache,
    AboutNodes,
    AboutPlaces,
    AboutWriting,
    AnyRequest,
    PrefetchTo,
)
from swarmcache.local_requests import LocalRequests
from swarmcache.local_server import LocalConnection, LocalServer
from swarmcache.locator import Locator
from swarmcache.machine_shell import MachineShell
from swarmcache.members import known_nodes, member_fields
from swarmcache.messages import (
    Message,
    NodeAddress,
    Registered,
    Renewed,
    Replicas,
    decode_between_nodes,
    encode,
)
from swarmcache.partial import Partial
from swarmcache.peer_events import (
    AddReplica,
    AnnounceReplicas,
    AnswerCached,
    AnswerFiles,
    AnswerHolders,
    AnswerNoSlot,
    AnswerOriginal,
    AnswerSlot,
    AnswerStatus,
    CheckCopy,
    ChunkAbsent,
    ChunkArrived,
    ChunkCorrupt,
    ChunksRead,
    DialPeer,
    DistrustPeer,
    DropPartial,
    FetchChunk,
    FetchFiles,
    FilesArrived,
    HangUp,
    KeysChanged,
    LoadManifest,
    NodesChanged,
    PeerBusy,
    PeerConnected,
    PeerEffect,
    PeerEvent,
    PeerLost,
    PeerSaid,
    PeerUnreachable,
    PublishFile,
    RangeReadDone,
    RangeReadFailed,
    ReadRange,
    RefuseReplica,
    ReserveSpace,
    TellPeer,
    TellTracker,
    TimePassed,
    TrackerConnected,
    TrackerLost,
    TrackerSaid,
    WriteFailed,
)
from swarmcache.peer_state import BUFFERS_BYTES_MAX, FLIGHTS_MAX, PeerState
from swarmcache.peers_file import PeersFile
from swarmcache.placed_replicas import PlacedReplicas
from swarmcache.placement import KnownNode, nodes_of_status
from swarmcache.prefetch_requests import PrefetchRequests
from swarmcache.quantities import HostPort
from swarmcache.replica_questions import ReplicaQuestions
from swarmcache.replicas_elsewhere import ReplicasElsewhere
from swarmcache.serving import (
    allow_many_descriptors,
    bind,
    bind_datagrams,
    cluster_keys,
    reread_on_hangup,
    say_ready,
    software_version,
    told_to_end,
)
from swarmcache.source_file import SourceExaminer
from swarmcache.source_reader import RangeSink, read_range
from swarmcache.stand_in import Candidate
from swarmcache.status_meter import StatusMeter
from swarmcache.thread_pool import ThreadPool
from swarmcache.tracker_client import TrackerClient
from swarmcache.write_requests import WriteRequests

log = logging.getLogger(__name__)

DISK_THREADS = 4
# Files that are digested as a whole at once, before they are gone on with or since somebody wants
# to know: a disk that turns is no quicker with more.
DIGEST_THREADS = 2
# Threads that read from file servers, and that look at files of clients: of each user so many, and
# as many of those at one file server, so that one that hangs does not hold up all.
THREADS_PER_USER = 16
THREADS_PER_PLACE = 8
LOOK_THREADS = 2  # for other nodes, which do not wait until those of the disk have time
PROGRESS_S = 0.25
# Replicas in one message of an announcement, of which the next is read when the former is on its
# way: a million at once would take 200 MiB, and hold up clients for more than a second.
ANNOUNCED_AT_ONCE = 1000
ANNOUNCE_AGAIN_S = 5.0
BINDS_MAX = 16
# So long after its start a node knows of all others by gossip, with plenty to spare.
SETTLED_S = 60.0

SOURCE_ERRORS = errors.SourceChanged | errors.SourceFailed | errors.LeaseExpired


class Daemon:
    """One node daemon. ``start`` it, and ``stop`` it in the end."""

    def __init__(self, config: Config, keyring: Keyring) -> None:
        self._config = config
        self._keyring = keyring
        self._loop = asyncio.get_running_loop()
        self._received_bytes: Counter[str] = Counter()
        self._read_bytes = 0
        self._uploaded_bytes = 0
        self._links: dict[str, Link] = {}
        self.gossip: GossipServer | None = None
        self._announcing = asyncio.Lock()
        self._background = BackgroundTasks("daemon")
        self._spawn = self._background.spawn
        self._encoded: tuple[Message | None, bytes] = (None, b"")
        self._started_s = now_s()
        self._resources = AsyncExitStack()

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> HostPort:
        """Serve; returns the address of the control server.

        Raises LocalError, ConfigError, OSError; then nothing is left open.
        """
        async with AsyncExitStack() as stack:
            self._open_cache(stack)
            address = await self._listen(stack)
            self._start_machine(stack)
            await self._serve(stack)
            self._resources = stack.pop_all()
        return address

    async def stop(self) -> None:
        """End everything in an orderly way; who still waits gets the original path."""
        await self._resources.aclose()

    def keys_changed(self) -> None:
        """The keyring is another: the tracker is to know."""
        if self._tracker.link is not None:
            self._shell.handle(KeysChanged())

    def _open_cache(self, stack: AsyncExitStack) -> None:
        self._examiner = SourceExaminer(self._config)
        stack.callback(self._examiner.close)
        self._cache = open_cache(self._config)
        stack.callback(self._cache.close)
        self._disk_threads = ThreadPool(DISK_THREADS, thread_name_prefix="disk")
        self._digest_threads = ThreadPool(DIGEST_THREADS, thread_name_prefix="digest")
        self._look_threads = ThreadPool(LOOK_THREADS, thread_name_prefix="look")
        for threads in (self._disk_threads, self._digest_threads, self._look_threads):
            stack.push_async_callback(asyncio.to_thread, threads.shutdown, cancel_futures=True)
        per_user = (THREADS_PER_USER, THREADS_PER_PLACE)
        self._read_threads = CompartmentThreads("read", *per_user)
        self._examine_threads = CompartmentThreads("examine", *per_user)
        self._copy_threads = CompartmentThreads("copy", 1, 1)
        for compartments in (self._read_threads, self._examine_threads, self._copy_threads):
            stack.push_async_callback(asyncio.to_thread, compartments.close)

    async def _listen(self, stack: AsyncExitStack) -> HostPort:
        """Open both ports, and decide how this node is called."""
        listen, advertised = self._config.daemon.listen, self._config.daemon.told
        transfer = self._config.transfer
        self._listener, self._datagram_socket = self._bind(listen)
        stack.callback(self._listener.close)
        port = int(self._listener.getsockname()[1])
        self._chunk_server = ChunkServer(
            self._keyring,
            self._cache.open_source,
            read_files=self._cache.read_files,
            uploads_max=transfer.uploads_max,
            upload_rate_max_bytes_per_s=transfer.upload_rate_max_bytes_per_s,
            on_uploaded=self._uploaded,
            on_unreadable=self._unreadable,
        )
        data_port = await self._chunk_server.start(listen.host, port + 1 if listen.port else 0)
        stack.push_async_callback(self._chunk_server.stop)
        advertised = HostPort(advertised.host, advertised.port or port)
        self.address = NodeAddress(
            str(advertised), data_port, socket.gethostname()[:64], self._config.daemon.rack
        )
        self._identity = msgspec.msgpack.encode(self.address)
        if len(self._identity) > IDENTITY_MAX_BYTES:
            told = f"the advertised address {advertised} and daemon.rack are too long together"
            raise ConfigError(told)
        node = self.address.node
        if self._datagram_socket is not None and len(node.encode()) > ADDRESS_BYTES_MAX:
            raise ConfigError(
                f'daemon.advertise = "{node}": expected at most {ADDRESS_BYTES_MAX} bytes, which is'
                ' what the gossip carries, or gossip.rate_max = "off"'
            )
        return HostPort(listen.host, port)

    def _bind(self, listen: HostPort) -> tuple[socket.socket, socket.socket | None]:
        """The control port, and the same for datagrams. Raises OSError."""
        for _ in range(BINDS_MAX):
            listener = bind(listen)
            if self._config.gossip.rate_max_bytes_per_s is None:
                return listener, None
            try:
                return listener, bind_datagrams(listener)
            except OSError:
                listener.close()
                if listen.port:
                    raise
        raise OSError(errno.EADDRINUSE, "no port is free for TCP and UDP")

    def _start_machine(self, stack: AsyncExitStack) -> None:
        self._state = PeerState(
            self.address,
            random.Random(os.urandom(16)),
            peers_max=self._config.transfer.peers_max,
            window=self._config.transfer.uploads_max,
            stall_s=self._config.get.stall_s,
            buffers_bytes_max=BUFFERS_BYTES_MAX,
            life=int.from_bytes(os.urandom(7)),
            uploads_of=self._uploads_of,
        )
        self._shell: MachineShell[PeerEvent, PeerEffect] = MachineShell(
            self._state, self._carry_out, TimePassed()
        )
        numbers = self._numbers = itertools.count(1)
        self._local = LocalRequests(
            self._cache,
            self._examiner,
            self._examine_threads,
            self._state,
            numbers,
            chunk_size_bytes=self._config.transfer.chunk_size_bytes,
            spawn=self._spawn,
            handle=self._shell.handle,
            node_status=self.status,
            members=self._members,
        )
        self._holder_questions = HolderQuestions(numbers, self._shell.handle)
        elsewhere = ReplicasElsewhere(self._holder_questions, self._spawn)
        self._cache.ask_before_evicting(elsewhere.counts)
        self._disk = DiskWorker(
            self._cache,
            self._disk_threads,
            self._digest_threads,
            self._spawn,
            self._shell,
            self._local.end_work,
            self._local.mend,
            self._config.cache.scrub_rate_bytes_per_s,
            self._config.cache.max_age_s,
        )
        self._start_batches(stack)
        self._writing = WriteRequests(
            self._cache,
            self._examiner,
            self._examine_threads,
            self._copy_threads,
            self._disk,
            numbers,
            chunk_size_bytes=self._config.transfer.chunk_size_bytes,
            spawn=self._spawn,
            handle=self._shell.handle,
        )
        self._about_cache = CacheRequests(
            self._cache,
            self._disk_threads,
            self._state,
            self._holder_questions,
            spawn=self._spawn,
            handle=self._shell.handle,
            users_of=self._local.users_of,
            verify=self._disk.verify,
        )
        stack.callback(self._stop_machine)

    def _start_batches(self, stack: AsyncExitStack) -> None:
        self._fetcher = ChunkFetcher(
            self._keyring,
            self.address.node.encode(),
            threads=FLIGHTS_MAX,
            buffers_bytes_max=BUFFERS_BYTES_MAX,
            download_rate_max_bytes_per_s=self._config.transfer.download_rate_max_bytes_per_s,
        )
        self._batches = BatchWorker(
            self._cache,
            self._fetcher,
            self._local.users_of_batch,
            self._shell.handle,
            self._files_arrived,
            self._config.transfer.chunk_size_bytes,
        )
        stack.push_async_callback(asyncio.to_thread, self._batches.close)
        stack.push_async_callback(asyncio.to_thread, self._fetcher.close)

    async def _serve(self, stack: AsyncExitStack) -> None:
        self._session = client_session()
        await stack.enter_async_context(self._session)
        self._tracker = TrackerClient(
            self._config,
            self._session,
            self._keyring,
            self.address,
            self._candidates,
            self._spawn,
            self._hear_of_tracker,
        )
        self._start_questions()
        await stack.enter_async_context(serving_on(self._listener, self._application(), 1024))
        stack.push_async_callback(self._end_tasks)
        self._local_server = LocalServer(
            self._config.daemon.socket, self._take_request, self._examine_threads.pending
        )
        stack.callback(self._local_server.close)
        stack.callback(self._local.answer_everybody, "the daemon is being stopped")
        if self._datagram_socket is not None:
            await self._start_gossip(self._datagram_socket, stack)
        self._tracker.start()
        self._disk.start()
        stack.push_async_callback(asyncio.to_thread, self._disk.stop)

    def _start_questions(self) -> None:
        """What nodes ask one another about files, for clients or by themselves."""
        self._replica_questions = ReplicaQuestions(
            self._cache, self._look_threads, self._session, self._keyring, self.address, self._spawn
        )
        self._cluster_caches = ClusterCaches(
            self._cache,
            self._disk_threads,
            self._session,
            self._keyring,
            self.address,
            self._spawn,
        )
        self._placed = PlacedReplicas(
            self._cache,
            self._disk_threads,
            self._state,
            self._local,
            self._keyring,
            self.address,
            self._numbers,
            spawn=self._spawn,
            handle=self._shell.handle,
        )
        self._prefetches = PrefetchRequests(
            self._placed,
            self._examiner,
            self._examine_threads,
            self._holder_questions,
            self._known_nodes,
            self._session,
            self._keyring,
            self.address,
            self._config.transfer.chunk_size_bytes,
            self._spawn,
        )
        self._locator = Locator(
            self._cache,
            self._examiner,
            self._examine_threads,
            self._holder_questions,
            self._replica_questions,
            self.address,
            self._config.transfer.chunk_size_bytes,
            self._spawn,
        )

    async def _start_gossip(self, sock: socket.socket, stack: AsyncExitStack) -> None:
        """Tell other nodes of this one, and hear of them. Raises OSError."""
        rate_max = self._config.gossip.rate_max_bytes_per_s
        assert rate_max is not None, "gossip is off"
        meter = StatusMeter(
            self._cache,
            uploads=lambda: self._chunk_server.uploads,
            downloads=lambda: len(self._state.downloads()),
            standing_in=lambda: self._tracker.standing_in,
        )
        path = next(each.path for each in self._cache.directories() if not each.lost)
        gossip = GossipServer(
            sock,
            NodeProfile(
                self.address,
                self._config.daemon.rack,
                software_version(),
                self._cache.status().capacity_bytes,
            ),
            self._keyring,
            PeersFile(f"{path}/.swarmcache"),
            lambda: self._loop.run_in_executor(self._look_threads, meter.measure),
            lambda change: self._shell.handle(NodesChanged(change.alive, change.dead)),
            rate_max_bytes_per_s=rate_max,
        )
        await gossip.start()
        stack.push_async_callback(gossip.stop)
        self.gossip = gossip

    async def _end_tasks(self) -> None:
        await self._tracker.stop()
        await self._background.end()
        for link in list(self._links.values()):
            await link.wait_closed()

    def _stop_machine(self) -> None:
        self._shell.stop()
        self._state.stop_reading()

    def _take_request(
        self, connection: LocalConnection, request: AnyRequest, fds: list[int]
    ) -> None:
        if isinstance(request, AboutCache):
            self._about_cache.take(connection, request)
        elif isinstance(request, AboutPlaces):
            self._locator.take(connection, request, fds)
        elif isinstance(request, AboutNodes):
            self._cluster_caches.take(connection, request)
        elif isinstance(request, PrefetchTo):
            self._prefetches.take(connection, request, fds)
        elif isinstance(request, AboutWriting):
            self._writing.take(connection, request, fds)
        else:
            self._local.take(connection, request, fds)

    def status(self) -> dict[str, Any]:
        """This node, as plain data."""
        return {
            "address": self.address.node,
            "data_port": self.address.data_port,
            "name": self.address.name,
            "running_s": round(now_s() - self._started_s, 3),
            **self._tracker.status(),
            "received_bytes": dict(self._received_bytes),
            "read_bytes": self._read_bytes,
            "uploaded_bytes": self._uploaded_bytes,
            "uploads": self._chunk_server.uploads,
            "totals": msgspec.to_builtins(self._state.totals()),
            "peers": [
                {"node": node, "connected": connected, "distrusted": distrusted}
                for node, connected, distrusted in self._state.neighbours()
            ],
            "downloads": self._local.downloads_status(),
            "key_tags": self._keyring.tags(),
            "gossip": None if self.gossip is None else self.gossip.status(),
            "disk": msgspec.to_builtins(self._cache.status()),
            "directories": msgspec.to_builtins(self._cache.directories()),
        }

    def _members(self) -> list[dict[str, Any]] | None:
        """All nodes, as they tell of themselves; None where they do not."""
        return None if self.gossip is None else member_fields(self.gossip.members(), now_s())

    def _uploads_of(self, node: str) -> int:
        """How many uploads a node has told that it had."""
        member = None if self.gossip is None else self.gossip.member(node)
        return 0 if member is None or member.status is None else member.status.uploads

    async def _known_nodes(self, named: Sequence[str]) -> tuple[list[KnownNode], str]:
        """All nodes that are known to this one, and why these may not be all.

        The tracker is asked as well where the gossip may not have told of all yet: of those that
        are ``named``, or of any, soon after the start of this daemon.
        """
        nodes = [] if self.gossip is None else known_nodes(self.gossip.members())
        known = {name for each in nodes for name in (each.node, each.name)}
        if now_s() - self._started_s > SETTLED_S and self.gossip is not None and known >= {*named}:
            return nodes, ""
        cluster, reason = await self._local.cluster_status()
        nodes += [each for each in nodes_of_status(cluster or {}) if each.node not in known]
        return nodes, reason

    # --- the tracker ----------------------------------------------------------------------------

    def _hear_of_tracker(self, event: TrackerConnected | TrackerLost | TrackerSaid) -> None:
        told = event.message if isinstance(event, TrackerSaid) else None
        # A stand-in knows no more of the time, and of others, than this node does.
        gossip = self.gossip if self._tracker.with_tracker else None
        if gossip is not None and isinstance(told, Registered | Renewed):
            gossip.tracker_said(told)
        self._shell.handle(event)

    def _candidates(self) -> list[Candidate]:
        """Who may stand in for the tracker."""
        live = self.gossip.live() if self.gossip is not None else []
        return [
            Candidate(
                member.profile.address.node, member.status is not None and member.status.standing_in
            )
            for member in live
            if member.profile is not None
        ]

    async def _announce_replicas(self) -> None:
        """Again after a while where the disk fails, or else nobody would ask for what is here."""
        link = self._tracker.link
        while link is not None and link is self._tracker.link:
            try:
                async with self._announcing:  # or the tracker would mix them up
                    await self._announce_to(link)
                return
            except LocalError as error:
                log.error("cannot tell the tracker of all replicas, and will try again: %s", error)
            await asyncio.sleep(ANNOUNCE_AGAIN_S)

    async def _announce_to(self, link: Link) -> None:
        """Raises LocalError."""
        link.send(encode(Replicas([], more=True)))
        version_ids = self._cache.replicas()

        def next_some() -> list[bytes]:
            return list(islice(version_ids, ANNOUNCED_AT_ONCE))

        while some := await self._loop.run_in_executor(self._disk_threads, next_some):
            link.send(encode(Replicas(some, more=True)))
            await link.drained()
        link.send(encode(Replicas([], more=False)))

    # --- peers ----------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/v1/peer", self._serve_peer)
        application.router.add_get("/v1/stand-in", self._tracker.serve)
        application.router.add_get("/v1/holder", self._replica_questions.serve)
        application.router.add_get("/v1/admin", self._cluster_caches.serve)
        application.router.add_get("/v1/prefetch", self._placed.serve)
        return application

    async def _serve_peer(self, request: web.Request) -> web.StreamResponse:
        return await serve(request, self._keyring, "peer", self._identity, self._talk)

    async def _dial(self, address: NodeAddress) -> None:
        try:
            link = await connect_to_node(
                self._session, address.node, self._keyring, "peer", self._identity
            )
        except SwarmcacheError as error:
            log.info("cannot reach %s: %s", address.node, error)
            self._shell.handle(PeerLost(address.node, str(error)))
            return
        await self._talk(link)

    async def _talk(self, link: Link) -> None:
        """Receive from a peer until the connection ends."""
        address = await node_behind(link)
        node = address.node
        former = self._links.get(node)
        self._links[node] = link
        if former is not None:
            former.close()
        self._shell.handle(PeerConnected(address))
        reason = "it closed the connection"
        try:
            await link.receive(
                lambda data: self._shell.handle(PeerSaid(node, decode_between_nodes(data)))
            )
        except SwarmcacheError as error:
            reason = str(error)
        finally:
            if self._links.get(node) is link:
                del self._links[node]
                self._shell.handle(PeerLost(node, reason))
            await link.wait_closed()

    def _hang_up(self, node: str) -> None:
        link = self._links.pop(node, None)
        if link is not None:
            link.close()

    def _tell_peer(self, effect: TellPeer) -> None:
        link = self._links.get(effect.node)
        if link is None:
            return
        if self._encoded[0] is not effect.message:  # the same message often goes to many
            self._encoded = (effect.message, encode(effect.message))
        link.send(self._encoded[1])

    # --- effects --------------------------------------------------------------------------------

    def _carry_out(self, effect: PeerEffect) -> None:
        match effect:
            case TellPeer():
                self._tell_peer(effect)
            case TellTracker():
                self._tracker.send(effect.message)
            case FetchChunk():
                self._fetch_chunk(effect)
            case ReadRange():
                self._read(effect)
            case DialPeer():
                self._spawn(self._dial(effect.address))
            case HangUp():
                self._hang_up(effect.node)
            case DistrustPeer():
                log.error("%s delivers wrong bytes; it is not asked again", effect.node)
            case AnnounceReplicas():
                self._spawn(self._announce_replicas())
            case AnswerCached() | AnswerOriginal() if self._placed.asked_for(effect.request):
                self._placed.carry_out(effect)
            case FetchFiles():
                self._batches.carry_out(effect)
            case AnswerCached() | AnswerOriginal() | AnswerFiles() | AnswerStatus():
                self._local.carry_out(effect)
            case AnswerHolders():
                self._holder_questions.carry_out(effect)
            case AnswerSlot() | AnswerNoSlot() | AddReplica() | RefuseReplica():
                self._writing.carry_out(effect)
            case PublishFile():
                users = self._local.begin_publishing(effect.version_id)
                self._disk.publish(effect.version_id, users)
            case ReserveSpace() | DropPartial() | LoadManifest() | CheckCopy():
                self._disk.carry_out(effect)

    # --- chunks ---------------------------------------------------------------------------------

    def _fetch_chunk(self, effect: FetchChunk) -> None:
        partial = self._disk.partial(effect.version_id)
        assert partial is not None, "fetching a chunk without room for it"
        try:
            future = self._fetcher.fetch(
                (address_of(effect.address.node).host, effect.address.data_port),
                ChunkRequest(effect.version_id, effect.chunk, effect.held_chunks),
                effect.length_bytes,
                effect.digest,
                lambda data: self._write_chunk(partial, effect, data),
                effect.deadline_s,
                effect.stall_s,
            )
        except (BadMessage, NoThread) as error:
            what = (effect.version_id, effect.chunk, effect.address.node)
            log.info("chunk %d from %s: %s", effect.chunk, effect.address.node, error)
            self._shell.handle(PeerUnreachable(*what, str(error)))
            return
        future.add_done_callback(
            lambda done: self._loop.call_soon_threadsafe(self._fetch_ended, effect, done)
        )

    def _write_chunk(self, partial: Partial, effect: FetchChunk, data: memoryview) -> None:
        """Runs in a thread. A second copy of a chunk may come after the file was put in place."""
        if not partial.has(effect.chunk):
            partial.write_chunk(effect.chunk, data, effect.digest)

    def _fetch_ended(self, effect: FetchChunk, future: Future[int]) -> None:
        """Whatever happened the machine is told, or else the chunk would be in flight for ever."""
        if future.cancelled():
            return
        node = effect.address.node
        what = (effect.version_id, effect.chunk, node)
        error = future.exception()
        match error:
            case None:
                self._received_bytes[node] += future.result()
                self._shell.handle(ChunkArrived(*what))
            case errors.ChunkCorrupt():
                self._shell.handle(ChunkCorrupt(*what))
            case errors.ChunkAbsent():
                self._shell.handle(ChunkAbsent(*what))
            case errors.PeerBusy():
                self._shell.handle(PeerBusy(*what))
            case errors.RemoteError():
                log.info("chunk %d from %s: %s", effect.chunk, node, error)
                self._shell.handle(PeerUnreachable(*what, str(error)))
            case LocalError():
                self._shell.handle(WriteFailed(effect.version_id, str(error)))
                self._shell.handle(PeerUnreachable(*what, str(error)))
            case _:
                log.error("cannot fetch a chunk", exc_info=error)
                self._shell.handle(PeerUnreachable(*what, f"internal error: {error}"))

    def _files_arrived(self, node: str, event: FilesArrived) -> None:
        self._received_bytes[node] += event.size_bytes
        self._disk.files_arrived(event.version_ids)

    def _read(self, effect: ReadRange) -> None:
        source = self._local.borrow_file(effect.version_id)
        fetching = self._state.fetching(effect.version_id)
        assert fetching is not None, "reading what nobody wants"
        user, place = fetching.user, fetching.file_server
        try:
            self._read_threads.submit(user, place, self._read_range, effect, source)
        except NoThread as error:
            source.release()
            self._shell.handle(RangeReadFailed(effect.version_id, effect.lease_id, str(error)))

    def _read_range(self, effect: ReadRange, source: SharedFile) -> None:
        """Read a leased range, in a thread of its own; releases ``source``.

        Whatever happens the machine is told of the end, or else it would renew the lease for ever.
        """
        tell = self._shell.handle_from_thread
        began_s = time.monotonic()
        try:
            read_bytes = self._read_into_partial(effect, source.fd)
        except SwarmcacheError as error:
            if not isinstance(error, SOURCE_ERRORS):
                tell(WriteFailed(effect.version_id, str(error)))
            if isinstance(error, errors.SourceFailed):
                failed = self._local.source_failed
                self._loop.call_soon_threadsafe(failed, effect.version_id, source, str(error))
            changed = isinstance(error, errors.SourceChanged)
            tell(RangeReadFailed(effect.version_id, effect.lease_id, str(error), changed))
        except Exception as error:
            log.exception("cannot read a range")
            reason = f"internal error: {error}"
            tell(RangeReadFailed(effect.version_id, effect.lease_id, reason))
        else:
            elapsed_s = time.monotonic() - began_s
            self._read_bytes += read_bytes
            tell(RangeReadDone(effect.version_id, effect.lease_id, read_bytes, elapsed_s))
        finally:
            source.release()

    def _read_into_partial(self, effect: ReadRange, fd: int) -> int:
        """Returns the number of bytes read. Raises what ``read_range`` does."""
        partial = self._disk.partial(effect.version_id)
        if partial is None:
            raise errors.LeaseExpired("the file was given up before its range was read")

        def on_chunks(digests: Mapping[int, bytes]) -> None:
            partial.commit_chunks(digests)
            self._shell.handle_from_thread(ChunksRead(effect.version_id, effect.lease_id, digests))

        sink = RangeSink(
            lambda: self._state.may_read(effect.lease_id, now_s()), partial.write_piece, on_chunks
        )
        return read_range(fd, partial.version, partial.layout, effect.first, effect.count, sink)

    def _uploaded(self, _version_id: bytes, size_bytes: int, _peer: bytes) -> None:
        self._uploaded_bytes += size_bytes

    def _unreadable(self, version_id: bytes) -> None:
        """Runs in a thread."""
        self._loop.call_soon_threadsafe(self._disk.check_unreadable, version_id)


def open_cache(config: Config) -> Cache:
    """Open the cache directories of the configuration. Raises LocalError."""
    cache = config.cache
    return Cache.open(
        cache.dirs,
        min_free=cache.min_free.resolve_bytes,
        max_usage=cache.max_usage.resolve_bytes,
        min_age_s=cache.min_age_s,
        max_age_s=cache.max_age_s,
    )


async def run_daemon(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Says ``ready`` on stderr when jobs can ask."""
    # What is here now stays as long as the process. To look through it for garbage held up all
    # clients for 30 ms each time, measured while a tenth of a million files was being evicted.
    gc.freeze()
    allow_many_descriptors()
    told = told_to_end()
    keyring = Keyring(cluster_keys(config))
    if config.cluster.secret_file is None and os.geteuid() == 0:
        log.warning("without cluster.secret_file any user of this machine may take what is cached")
    daemon = Daemon(config, keyring)
    reread_on_hangup(config, keyring, daemon.keys_changed)
    async with AsyncExitStack() as stack:
        address = await daemon.start()
        stack.push_async_callback(daemon.stop)
        if config.daemon.metrics is not None:
            from swarmcache.metrics import daemon_figures, serving_metrics

            await stack.enter_async_context(
                serving_metrics(
                    "daemon", config.daemon.metrics, lambda: daemon_figures(daemon.status())
                )
            )
        say_ready("daemon", address)
        await told.wait()
