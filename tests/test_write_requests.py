"""The daemon's part in ``cp``: slots for those who are there, replicas of what is true."""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from blake3 import blake3

from swarmcache import write_slot
from swarmcache.chunks import CHUNK_SIZE_MIN_BYTES, FileVersion
from swarmcache.client import Client
from swarmcache.clock import now_s
from swarmcache.compartment_threads import CompartmentThreads
from swarmcache.config import load
from swarmcache.cp import CopyProgress, copy_files
from swarmcache.disk import Cache, User
from swarmcache.disk_calls import SharedFile
from swarmcache.disk_worker import DiskWorker
from swarmcache.local_protocol import Answer, End, Failed, OfferReplica, Working, encode_request
from swarmcache.local_server import LocalConnection, LocalServer
from swarmcache.local_socket import Connection, parse_answer
from swarmcache.peer_events import (
    AddReplica,
    AnswerNoSlot,
    AnswerSlot,
    PeerEvent,
    ReplicaNotAdded,
    ReplicaOffered,
    RequestGone,
    WriteWanted,
)
from swarmcache.peer_writes import PIECE_S
from swarmcache.source_file import SourceExaminer
from swarmcache.write_requests import WriteRequests
from swarmcache.write_slot import WriteSlot
from tests.box import wait_until
from tests.disk_helpers import ME, open_cache
from tests.local_daemons import COMMAND, PATIENCE_S, LocalDaemons, LocalNode
from tests.loop_disks import loop_disk

pytestmark = pytest.mark.slow

MIB = 1024 * 1024


class Node:
    """A node whose file server has one slot."""

    def __init__(self, directory: Path, local: LocalDaemons) -> None:
        self.server = directory / "server"
        self.server.mkdir()
        self.names = (f"name{number}" for number in itertools.count())
        self.settings = f'[file_servers.nfs]\npaths = ["{self.server}"]\nslots_max = 1\n'
        self.local = local
        local.start_tracker(self.settings)
        self.daemon = local.start_daemon("one", self.settings)

    @contextmanager
    def slot(self) -> Iterator[WriteSlot]:
        """A client that wants to write."""
        fd = os.open(self.server, os.O_PATH)
        with Client(os.fsencode(self.daemon.socket)) as client:
            slot = WriteSlot(client, fd)
            try:
                yield slot
            finally:
                slot.close()
                os.close(fd)

    def new_directory(self) -> Path:
        """One on the file server."""
        directory = self.server / next(self.names)
        directory.mkdir()
        return directory

    def used(self) -> int:
        """How many slots are taken, as the tracker says."""
        return len(self.leases())

    def leases(self) -> list[int]:
        """The ids of the leases that are out."""
        (server,) = self.daemon.status()["cluster"]["file_servers"]
        return [lease["lease_id"] for lease in server["leases"]]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("node")
    with LocalDaemons(directory) as local:
        yield Node(directory, local)


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Node]:
    """A node whose daemon and tracker may be ended."""
    with LocalDaemons(tmp_path) as local:
        yield Node(tmp_path, local)


def nothing() -> None:
    """What to do while waiting."""


# --- slots ---------------------------------------------------------------------------------------


def test_a_slot_is_ones_own_until_one_is_through_however_one_ends(node: Node) -> None:
    with node.slot() as first:
        first.wait(nothing)
        with node.slot() as second:
            told = []
            waiting = threading.Thread(target=second.wait, args=(lambda: told.append("to wait"),))
            waiting.start()
            wait_until(lambda: told, PATIENCE_S, "the second one to be told that it waits")
            assert waiting.is_alive()

            first.close()
            waiting.join()

            assert (second.reason, second.file_server) == ("", "nfs")
    wait_until(lambda: node.used() == 0, PATIENCE_S, "the slot to be free")


def is_granted(slot: WriteSlot) -> bool:
    return now_s() < slot._until_s


def test_a_promise_is_renewed_as_long_as_the_client_answers(node: Node) -> None:
    with node.slot() as slot:
        slot.wait(nothing)
        promised_s = slot._until_s

        wait_until(lambda: slot._until_s > promised_s + 2.0, PATIENCE_S, "two renewals")


def test_a_client_that_is_stopped_keeps_others_waiting_no_longer_than_its_promise(
    node: Node, tmp_path: Path
) -> None:
    endless, directory = tmp_path / "endless", node.new_directory()
    endless.touch()
    os.truncate(endless, 1 << 40)
    stopped = subprocess.Popen(
        [*COMMAND, "cp", f"--socket={node.daemon.socket}", endless, directory], env={}
    )
    try:
        wait_until(lambda: list(directory.iterdir()), PATIENCE_S, "the copy to begin")
        stopped.send_signal(signal.SIGSTOP)
        (beside,) = directory.iterdir()
        with node.slot() as slot:
            slot.wait(nothing)
            assert slot.reason == ""
            written, leases = beside.stat().st_size, node.leases()

            stopped.send_signal(signal.SIGCONT)
            promised_s = slot._until_s
            wait_until(lambda: slot._until_s > promised_s + 1.0, PATIENCE_S, "some time to pass")
            grown_bytes = beside.stat().st_size - written
            if node.leases() == leases:  # or else this machine is too busy to keep a slot
                assert grown_bytes <= MIB, "the piece that was on its way, and no more"
        wait_until(lambda: beside.stat().st_size > written + 8 * MIB, PATIENCE_S, "it to go on")
    finally:
        stopped.kill()
        stopped.wait()


def test_a_daemon_that_is_restarted_goes_on_with_those_who_write(
    mortal: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_slot, "PATIENCE_S", PATIENCE_S)  # this machine may be busy
    with mortal.slot() as slot:
        slot.wait(nothing)
        mortal.daemon.kill()
        mortal.daemon = mortal.local.start_daemon("one", mortal.settings)

        wait_until(lambda: mortal.used() == 1 and is_granted(slot), PATIENCE_S, "a new promise")
        assert slot.reason == ""


def test_a_tracker_that_ends_for_good_holds_nobody_up(mortal: Node, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(4 * MIB))
    assert mortal.local.tracker is not None
    tracker = mortal.local.tracker

    def end_it(progress: CopyProgress) -> None:
        if progress.done_bytes and tracker.process.poll() is None:
            tracker.kill()

    with Client(os.fsencode(mortal.daemon.socket)) as client:
        (outcome,) = copy_files(
            client, [os.fsencode(source)], os.fsencode(mortal.server), on_progress=end_it
        )

    assert (outcome.error, outcome.not_registered) == ("", "")
    assert (mortal.server / "source").read_bytes() == source.read_bytes()


def made(examiner: SourceExaminer, handle: Callable[[PeerEvent], None]) -> WriteRequests:
    none: Any = None  # whatever makes replicas
    return WriteRequests(
        none,
        examiner,
        CompartmentThreads("examine", 1, 1),
        none,
        none,
        itertools.count(1),
        chunk_size_bytes=None,
        spawn=asyncio.create_task,
        handle=handle,
    )


@contextmanager
def writing(
    path: Path, events: asyncio.Queue[PeerEvent]
) -> Iterator[tuple[WriteRequests, LocalServer]]:
    """What answers clients that write, and its socket; the machine is the test."""
    examiner = SourceExaminer(load({}, {}, Path("/dev/null")))
    requests = made(examiner, events.put_nowait)
    yield requests, LocalServer(path, cast(Any, requests.take))
    examiner.close()


async def test_one_write_or_offer_at_a_time_on_a_connection(tmp_path: Path) -> None:
    """Each of them keeps descriptors open here."""
    events: asyncio.Queue[PeerEvent] = asyncio.Queue()
    slot, offer = b'{"op":"write_slot"}\n', encode_request(OfferReplica(bytes(32)))
    (tmp_path / "empty").touch()
    directory, empty = os.open(tmp_path, os.O_PATH), os.open(tmp_path / "empty", os.O_RDWR)
    path = tmp_path / "run/daemon.sock"
    with writing(path, events) as (requests, server), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        reader, writer = await asyncio.open_unix_connection(sock=client.dup())

        async def answer() -> Any:
            return parse_answer(await asyncio.wait_for(reader.readline(), PATIENCE_S))

        socket.send_fds(client, [slot + slot], [directory, directory])
        assert (await answer())["reason"] == "one request at a time on a connection"
        wanted = await asyncio.wait_for(events.get(), PATIENCE_S)
        assert isinstance(wanted, WriteWanted)
        requests.carry_out(AnswerNoSlot(wanted.request, "there is none"))
        assert (await answer())["answer"] == "no_slot"

        socket.send_fds(client, [offer + offer + slot], [*[empty] * 4, directory])
        answers = [(await answer())["answer"] for _ in range(3)]
        assert answers == ["failed", "failed", "end"]

        socket.send_fds(client, [slot], [directory])
        assert isinstance(await asyncio.wait_for(events.get(), PATIENCE_S), WriteWanted)
        assert events.empty()
        writer.close()
        server.close()
    os.close(directory)
    os.close(empty)


@pytest.mark.parametrize("client_leaves", [True, False])
async def test_who_is_cut_off_by_the_daemon_may_still_be_writing(
    tmp_path: Path, client_leaves: bool
) -> None:
    """So its slot is nobody else's before its promise has run out."""
    events: asyncio.Queue[PeerEvent] = asyncio.Queue()
    path = tmp_path / "run/daemon.sock"
    with writing(path, events) as (requests, server), socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
        fd = os.open(tmp_path, os.O_PATH)
        socket.send_fds(client, [b'{"op":"write_slot"}\n'], [fd])
        os.close(fd)
        wanted = await asyncio.wait_for(events.get(), PATIENCE_S)
        assert isinstance(wanted, WriteWanted)
        until_s = now_s() + 0.2
        requests.carry_out(AnswerSlot(wanted.request, until_s))
        if client_leaves:
            client.close()
        else:
            server.close()

        gone = await asyncio.wait_for(events.get(), PATIENCE_S)

        assert gone == RequestGone(wanted.request)
        assert client_leaves or now_s() >= until_s + PIECE_S
    if client_leaves:
        server.close()


# --- replicas ------------------------------------------------------------------------------------


def offer(
    daemon: LocalNode, file: Path, copy: Path, *, digest: bytes | None = None, how: int = os.O_RDWR
) -> dict[str, Any]:
    """What the daemon answers to who offers a replica."""
    fds = [os.open(file, how), os.open(copy, os.O_RDONLY)]
    connection = Connection(os.fsencode(daemon.socket))
    try:
        line = encode_request(OfferReplica(digest or blake3(copy.read_bytes()).digest()))
        connection.send(line, *fds)
        arrival = select.poll()
        arrival.register(connection.fileno(), select.POLLIN)
        while True:
            assert arrival.poll(PATIENCE_S * 1000)
            for each in map(parse_answer, connection.receive()):
                if each["answer"] != "working":
                    return each
    finally:
        connection.close()
        for fd in fds:
            os.close(fd)


def test_only_who_may_write_a_file_can_say_what_is_in_it(node: Node, tmp_path: Path) -> None:
    file, copy = node.new_directory() / "file", tmp_path / "copy"
    file.write_bytes(b"the truth")
    copy.write_bytes(b"not at all"[:9])
    shorter = tmp_path / "shorter"
    shorter.write_bytes(b"short")

    read_only = offer(node.daemon, file, copy, how=os.O_RDONLY)
    write_only = offer(node.daemon, file, copy, how=os.O_WRONLY)
    append_only = offer(node.daemon, file, copy, how=os.O_RDWR | os.O_APPEND)
    wrong_digest = offer(node.daemon, file, copy, digest=blake3(b"the truth").digest())
    wrong_size = offer(node.daemon, file, shorter)
    directory = offer(node.daemon, file, tmp_path, digest=b"d" * 32)

    answers = (read_only, write_only, append_only, wrong_digest, wrong_size, directory)
    assert [answer["reason"] for answer in answers] == [
        "the file is not open for reading and writing",
        "the file is not open for reading and writing",
        "the file is not open for reading and writing",
        "the copy no longer has the bytes that were written",
        "the copy is no regular file of the same size",
        "the copy is no regular file of the same size",
    ]
    assert node.daemon.listed() == []
    (cached,) = node.daemon.get(file)
    assert Path(os.fsdecode(cached)).read_bytes() == b"the truth"


def test_an_offer_that_is_true_replaces_a_replica_that_is_not(node: Node, tmp_path: Path) -> None:
    """The same size and time, other bytes: somebody has copied as ``cp --preserve`` does."""
    file, copy = node.new_directory() / "file", tmp_path / "copy"
    file.write_bytes(b"before")
    os.utime(file, (1, 1))
    (cached,) = node.daemon.get(file)
    for path in (file, copy):
        path.write_bytes(b"after!")
        os.utime(path, (1, 1))

    assert offer(node.daemon, file, copy)["answer"] == "end"
    assert offer(node.daemon, file, copy)["answer"] == "end", "there already"

    assert node.daemon.get(file) == [cached]
    assert Path(os.fsdecode(cached)).read_bytes() == b"after!"


class Offering:
    """A client of whom it is known who it is, and what it is answered in the end."""

    def __init__(self, uid: int) -> None:
        self.user = User(uid, f"user{uid}")
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()

    def share(self, fd: int) -> SharedFile:
        return SharedFile(fd, os.close)

    def send(self, answer: Answer) -> None:
        if not isinstance(answer, Working):
            self.answers.put_nowait(answer)


class Events:
    """A machine that is told something, and says nothing."""

    def __init__(self, events: asyncio.Queue[PeerEvent]) -> None:
        self.handle = events.put_nowait
        self.handle_from_thread = events.put_nowait


async def test_copies_that_hang_keep_nobody_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may offer a copy in a file system of its own, whose reads never end."""
    path, hangs, may_end = tmp_path / "file", threading.Semaphore(0), threading.Event()
    path.write_bytes(b"12345")
    hung = blake3(b"hung").digest()

    def compare(_cache: Cache, _version_id: bytes, digest: bytes) -> bool:
        if digest == hung:
            hangs.release()
            assert may_end.wait(PATIENCE_S)
        return True

    class Full:
        def lookup(self, version: FileVersion, user: User) -> str:
            return "/cached"

    monkeypatch.setattr("swarmcache.write_requests.is_replica", compare)
    examiner, none = SourceExaminer(load({}, {}, Path("/dev/null"))), cast(Any, None)
    requests = WriteRequests(
        cast(Any, Full()),
        examiner,
        CompartmentThreads("examine", 9, 9),
        CompartmentThreads("copy", 1, 1),
        none,
        itertools.count(1),
        chunk_size_bytes=None,
        spawn=asyncio.create_task,
        handle=none,
    )

    def offer(client: Offering, digest: bytes) -> None:
        fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)]
        requests.take(cast(LocalConnection, client), OfferReplica(digest), fds)

    hanging = [Offering(uid) for uid in range(1001, 1017) for _ in range(2)]
    for client in hanging:
        offer(client, hung)
    for _ in range(16):
        assert await asyncio.to_thread(hangs.acquire, timeout=PATIENCE_S)
    other = Offering(1017)
    offer(other, blake3(b"12345").digest())
    assert isinstance(await asyncio.wait_for(other.answers.get(), PATIENCE_S), End)
    assert not hangs.acquire(blocking=False), "of each user one at a time"
    assert all(client.answers.empty() for client in hanging)

    may_end.set()
    for client in hanging:
        assert isinstance(await asyncio.wait_for(client.answers.get(), PATIENCE_S), End)
    examiner.close()


async def test_a_copy_that_hangs_keeps_the_file_from_nobody(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wants it waits for the replica that is made, and the user's next one for the thread."""
    monkeypatch.setattr("swarmcache.write_requests.HANGS_S", 0.05)
    monkeypatch.setattr("swarmcache.write_requests.WORKING_S", 0.02)
    paths = [root.parent / "hangs", root.parent / "waits"]
    for path in paths:
        path.write_bytes(b"12345")
    hanging, may_end, read = paths[0].stat().st_ino, threading.Event(), os.preadv
    digest = blake3(b"12345").digest()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.fstat(fd).st_ino == hanging:
            assert may_end.wait(PATIENCE_S)
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    events: asyncio.Queue[PeerEvent] = asyncio.Queue()
    cache, disk_threads = Cache([open_cache(root)]), ThreadPoolExecutor(2)
    copy_threads = CompartmentThreads("copy", 1, 1)
    examiner = SourceExaminer(load({}, {}, Path("/dev/null")))
    disk = DiskWorker(
        cache,
        disk_threads,
        disk_threads,
        asyncio.create_task,
        cast(Any, Events(events)),
        lambda _: [],
        lambda _: None,
        None,
        None,
    )
    requests = WriteRequests(
        cache,
        examiner,
        CompartmentThreads("examine", 9, 9),
        copy_threads,
        disk,
        itertools.count(1),
        chunk_size_bytes=None,
        spawn=asyncio.create_task,
        handle=events.put_nowait,
    )
    clients = [Offering(1001), Offering(1001)]
    for client, path in zip(clients, paths, strict=True):
        fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)]
        requests.take(cast(LocalConnection, client), OfferReplica(digest), fds)
        offered = await asyncio.wait_for(events.get(), PATIENCE_S)
        assert isinstance(offered, ReplicaOffered)
        requests.carry_out(AddReplica(offered.request, offered.version_id))

    ended = [await asyncio.wait_for(events.get(), PATIENCE_S) for _ in clients]

    assert [type(event) for event in ended] == [ReplicaNotAdded, ReplicaNotAdded]
    for client in clients:
        answer = await asyncio.wait_for(client.answers.get(), PATIENCE_S)
        assert isinstance(answer, Failed) and "could not be read for" in answer.reason
    fd = os.open(paths[0], os.O_RDONLY)
    version = examiner.examine(fd).version
    os.close(fd)
    anew = cache.begin(version, CHUNK_SIZE_MIN_BYTES)
    may_end.set()
    await asyncio.to_thread(copy_threads.close)
    anew.write_chunk(0, b"12345", digest)
    anew.publish([ME])
    assert list(cache.replicas()) == [version.version_id]
    disk_threads.shutdown()
    examiner.close()
    cache.close()


async def test_an_offer_for_which_there_is_no_thread_is_refused_and_its_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    examiner = SourceExaminer(load({}, {}, Path("/dev/null")))
    requests = made(examiner, cast(Any, None))
    client = Offering(1001)
    fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)]

    requests.take(cast(LocalConnection, client), OfferReplica(b"d" * 32), fds)

    answer = await asyncio.wait_for(client.answers.get(), PATIENCE_S)
    assert isinstance(answer, Failed) and "can't start new thread" in answer.reason
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    examiner.close()


@pytest.mark.box
def test_a_copy_on_a_disk_that_can_share_blocks_takes_no_more_room(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "xfs", size_mib=320) as disk, LocalDaemons(tmp_path) as local:
        node = local.start_daemon("one", cache_dir=disk.path / "cache")
        source, target = disk.path / "source", tmp_path / "target"
        source.write_bytes(os.urandom(64 * MIB))
        os.sync()
        free_before = disk.free_bytes

        assert node.run("cp", source, target).returncode == 0

        (cached,) = node.get(target)
        assert Path(os.fsdecode(cached)).read_bytes() == source.read_bytes()
        os.sync()
        assert free_before - disk.free_bytes < 8 * MIB
        source.write_bytes(b"others")
        assert Path(os.fsdecode(cached)).read_bytes() == target.read_bytes()
