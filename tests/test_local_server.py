"""The daemon's UNIX socket, with real clients: no descriptor is ever left open, no line lost."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from swarmcache import local_server
from swarmcache.errors import LocalError
from swarmcache.local_protocol import LINE_MAX_BYTES, AnyRequest, Cached, Failed, Get, Progress
from swarmcache.local_server import (
    CLIENTS_PER_USER_MAX,
    DESCRIPTORS_MAX,
    LocalConnection,
    LocalServer,
)
from tests.box import wait_until

GET = b'{"op": "get", "path": "L25mcy9m"}\n'
STATUS = b'{"op": "status"}\n'
DEADLINE_S = 10.0


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_for_descriptors(count: int) -> None:
    """Until so many are open: what clients have sent is closed in threads."""
    wait_until(lambda: open_descriptors() == count, DEADLINE_S, f"{count} descriptors")


class Daemon:
    """Answers every get at once and closes its descriptor; keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[AnyRequest, int]] = []
        self.connections: list[LocalConnection] = []
        self.closed = asyncio.Event()
        self.answer: Callable[[LocalConnection], None] = lambda connection: connection.send(
            Cached(b"/cache/f", hit=True)
        )
        self.server = LocalServer(path, self._handle)

    def _handle(self, connection: LocalConnection, request: AnyRequest, fds: list[int]) -> None:
        inode = -1
        for fd in fds:
            inode = os.fstat(fd).st_ino
            assert not os.get_inheritable(fd)
            connection.close_files_here([fd])
        self.asked.append((request, inode))
        self.connections.append(connection)
        connection.on_closed[self] = self.closed.set
        self.answer(connection)


class Client:
    """A client that may do anything."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        self.socket.connect(os.fspath(path))

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if fds:
            assert socket.send_fds(self.socket, [data], list(fds)) == len(data)
        else:
            assert self.socket.send(data) == len(data)

    async def line(self) -> dict[str, object]:
        """The next answer; an empty one when the daemon has closed the connection."""
        data = b""
        async with asyncio.timeout(DEADLINE_S):
            while not data.endswith(b"\n"):
                seen = await asyncio.get_running_loop().sock_recv(self.socket, 1)
                if not seen:
                    return {}
                ahead = self._ahead()
                data += seen + self.socket.recv(ahead) if ahead and seen != b"\n" else seen
        answer: dict[str, object] = json.loads(data)
        return answer

    def _ahead(self) -> int:
        """How many bytes of the line are there already."""
        try:
            there = self.socket.recv(1 << 16, socket.MSG_PEEK)
        except BlockingIOError:
            return 0
        line, end, _ = there.partition(b"\n")
        return len(line) + len(end)

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    before = open_descriptors()
    daemon = Daemon(tmp_path / "run" / "daemon.sock")
    yield daemon
    daemon.server.close()
    wait_for_descriptors(before)
    assert not daemon.path.exists()


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[Client]:
    client = Client(daemon.path)
    yield client
    client.close()


@pytest.fixture
def files(tmp_path: Path) -> list[int]:
    """Inodes of some files, which ``opened`` opens."""
    for number in range(DESCRIPTORS_MAX + 4):
        (tmp_path / f"file{number}").write_bytes(b"x")
    return [(tmp_path / f"file{number}").stat().st_ino for number in range(DESCRIPTORS_MAX + 4)]


def opened(tmp_path: Path, *numbers: int) -> tuple[int, ...]:
    return tuple(os.open(tmp_path / f"file{number}", os.O_RDONLY) for number in numbers)


def sent(client: Client, data: bytes, fds: tuple[int, ...]) -> None:
    """Send data with descriptors, and close the client's own copies."""
    client.send(data, fds)
    for fd in fds:
        os.close(fd)


async def test_a_get_arrives_with_its_descriptor(
    daemon: Daemon, client: Client, tmp_path: Path, files: list[int]
) -> None:
    sent(client, GET, opened(tmp_path, 3))

    assert (await client.line())["answer"] == "cached"
    assert daemon.asked == [(Get(b"/nfs/f"), files[3])]
    assert daemon.connections[0].user.uid == os.getuid()


async def test_two_requests_in_one_piece_get_their_descriptors_in_order(
    daemon: Daemon, client: Client, tmp_path: Path, files: list[int]
) -> None:
    sent(client, GET + STATUS + GET, opened(tmp_path, 1, 2))

    for _ in range(3):
        await client.line()
    assert [inode for _, inode in daemon.asked] == [files[1], -1, files[2]]


async def test_a_request_may_come_byte_by_byte(
    daemon: Daemon, client: Client, tmp_path: Path, files: list[int]
) -> None:
    sent(client, GET[:1], opened(tmp_path, 0))
    for byte in GET[1:]:
        client.send(bytes([byte]))
        await asyncio.sleep(0)

    assert (await client.line())["answer"] == "cached"
    assert daemon.asked[0][1] == files[0]


async def test_a_get_without_a_descriptor_is_refused(daemon: Daemon, client: Client) -> None:
    client.send(GET)

    assert (await client.line())["answer"] == "failed"
    assert await client.line() == {}
    assert daemon.asked == []


@pytest.mark.usefixtures("files")
async def test_more_descriptors_than_fit_are_not_kept(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    before = open_descriptors()
    sent(client, GET, opened(tmp_path, *range(DESCRIPTORS_MAX + 1)))
    assert (await client.line())["answer"] == "cached"

    assert open_descriptors() - before == DESCRIPTORS_MAX - 1, "kept until the client goes"
    client.close()
    async with asyncio.timeout(DEADLINE_S):
        await daemon.closed.wait()
    wait_for_descriptors(before - 2)


@pytest.mark.usefixtures("files")
async def test_descriptors_without_requests_end_the_connection(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    before = open_descriptors()
    for _ in range(2):
        sent(client, b" ", opened(tmp_path, *range(DESCRIPTORS_MAX)))
        await asyncio.sleep(0)

    assert (await client.line())["answer"] == "failed"
    assert await client.line() == {}
    assert daemon.asked == []
    wait_for_descriptors(before - 1)


@pytest.mark.usefixtures("files")
async def test_a_user_leaves_no_more_descriptors_than_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    monkeypatch.setattr(local_server, "descriptors_per_user_max", lambda: 3)
    daemon = Daemon(tmp_path / "run" / "daemon.sock")
    first, second = Client(daemon.path), Client(daemon.path)
    for _ in range(4):
        sent(first, GET, opened(tmp_path, 0))
        assert (await first.line())["answer"] == "cached"
    sent(first, STATUS + GET[:1], opened(tmp_path, 0, 1))
    assert (await first.line())["answer"] == "cached"

    sent(second, STATUS + GET[:1], opened(tmp_path, 2, 3))
    assert (await second.line())["reason"] == "the daemon has too many open files of yours"
    assert await second.line() == {}
    async with asyncio.timeout(DEADLINE_S):
        answer = ""
        while answer != "cached":  # as soon as a thread has closed what came with that
            other = Client(daemon.path)
            sent(other, GET, opened(tmp_path, 4))
            answer = str((await other.line())["answer"])
            other.close()
    first.send(GET[1:])
    assert (await first.line())["answer"] == "cached"
    for client in (first, second):
        client.close()
    daemon.server.close()
    wait_for_descriptors(before)


@pytest.mark.usefixtures("files")
async def test_descriptors_do_not_wait_long_for_their_request(
    daemon: Daemon, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "REQUEST_S", 0.0)
    sent(client, GET + STATUS, opened(tmp_path, 0))
    for _ in range(2):
        assert (await client.line())["answer"] == "cached"
    before = open_descriptors()
    sent(client, GET + GET[:-1], opened(tmp_path, 0, 1))
    assert (await client.line())["answer"] == "cached"

    assert "no whole request within 0 s" in str((await client.line())["reason"])
    assert await client.line() == {}
    wait_for_descriptors(before - 1)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("data", [b"x", GET[:-1], b'{"op": "get",'])
async def test_a_client_that_goes_in_the_middle_leaves_nothing(
    daemon: Daemon, client: Client, tmp_path: Path, data: bytes
) -> None:
    other = Client(daemon.path)
    sent(client, data, opened(tmp_path, 0, 1))
    client.close()
    sent(other, GET, opened(tmp_path, 2))

    assert (await other.line())["answer"] == "cached"
    assert len(daemon.asked) == 1
    other.close()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\n",
        b"[]\n",
        b"\xff\xfe\n",
        b'{"op": "ge\x80"}\n',
        b'{"op": "other"}\n',
        b'{"op": "get"}\n',
        b'{"op": "get", "path": ""}\n',
        b'{"op": "get", "path": "L25mcy9m", "colour": 1}\n',
        b'{"op": "get", "path": "L25mcy9m", "wait_s": -1}\n',
        b'{"op": "get", "path": "' + b"QUFB" * 2000 + b'"}\n',
    ],
)
async def test_what_is_no_request_is_refused(
    daemon: Daemon, client: Client, tmp_path: Path, line: bytes
) -> None:
    sent(client, line, opened(tmp_path, 0))

    assert (await client.line())["answer"] == "failed"
    assert await client.line() == {}
    assert daemon.asked == []


async def test_a_line_without_end_is_refused(daemon: Daemon, client: Client) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        await loop.sock_sendall(client.socket, b" " * (LINE_MAX_BYTES + 1))

    assert (await client.line())["answer"] == "failed"
    assert daemon.asked == []


async def test_requests_after_a_refused_one_are_not_served(daemon: Daemon, client: Client) -> None:
    client.send(b"garbage\n" + STATUS)

    assert (await client.line())["answer"] == "failed"
    assert await client.line() == {}
    assert daemon.asked == []


async def test_a_client_that_reads_nothing_is_cut_off(
    daemon: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "BACKLOG_BYTES", 1 << 20)
    client.send(STATUS)
    await client.line()
    connection = daemon.connections[0]
    for _ in range(100):
        connection.send(Progress(1, 2, 3, 4, 5, waiting_for="a slot" * 10_000))
        if daemon.closed.is_set():
            break

    assert daemon.closed.is_set()
    connection.send(Cached(b"/cache/f", hit=True))


async def test_who_sends_requests_without_pause_does_not_hold_up_others(
    daemon: Daemon, client: Client
) -> None:
    other = Client(daemon.path)
    client.send(STATUS * 2000)
    other.send(STATUS)

    assert (await other.line())["answer"] == "cached"
    assert len(daemon.asked) < 100
    for _ in range(2000):
        assert (await client.line())["answer"] == "cached"
    other.close()


async def test_who_reads_nothing_is_not_listened_to_before_it_has_read(
    daemon: Daemon, client: Client
) -> None:
    daemon.answer = lambda connection: connection.send(Cached(b"p" * 200_000, hit=True))
    client.send(STATUS * 40)
    other = Client(daemon.path)
    for _ in range(10):
        other.send(STATUS)
        assert (await other.line())["answer"] == "cached"

    assert len(daemon.asked) < 10 + 5
    for _ in range(40):
        assert (await client.line())["answer"] == "cached"
    client.send(STATUS)
    assert (await client.line())["answer"] == "cached"
    other.close()


async def test_a_client_that_goes_without_reading_is_forgotten(
    daemon: Daemon, client: Client
) -> None:
    def answer(connection: LocalConnection) -> None:
        connection.send(Cached(b"p" * 2_000_000, hit=True))
        client.close()

    daemon.answer = answer
    client.send(STATUS * 2)

    async with asyncio.timeout(DEADLINE_S):
        await daemon.closed.wait()
    assert len(daemon.asked) == 1


async def test_a_long_answer_arrives_whole(daemon: Daemon, client: Client) -> None:
    path = b"p" * 700_000
    daemon.answer = lambda connection: connection.send(Cached(path, hit=True))
    client.send(STATUS)

    assert (await client.line())["answer"] == "cached"


async def test_a_directory_service_that_is_slow_holds_up_who_it_is_asked_for(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    named = pwd.getpwuid(os.getuid())

    def slow(uid: int) -> pwd.struct_passwd:
        begun.set()
        assert may_end.wait(DEADLINE_S), "the event loop waits for it"
        return named

    monkeypatch.setattr(pwd, "getpwuid", slow)
    early, goes = Client(daemon.path), Client(daemon.path)
    early.send(STATUS)
    goes.close()
    assert await asyncio.to_thread(begun.wait, DEADLINE_S)
    assert daemon.asked == []
    may_end.set()

    assert (await early.line())["answer"] == "cached"
    assert [connection.user.name for connection in daemon.connections] == [named.pw_name]
    early.close()


async def test_too_many_clients_of_one_user_are_refused(
    daemon: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "CLIENTS_PER_USER_MAX", 2)
    client.send(STATUS)
    await client.line()
    second, third = Client(daemon.path), Client(daemon.path)

    assert (await third.line())["reason"] == "too many requests at once"
    second.send(STATUS)
    assert (await second.line())["answer"] == "cached"
    second.close()
    third.close()


async def test_the_socket_of_a_dead_daemon_is_replaced_and_that_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "daemon.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))

    server = LocalServer(path, lambda *_: None)
    with pytest.raises(LocalError, match="another daemon listens"):
        LocalServer(path, lambda *_: None)
    server.close()


async def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    path.write_bytes(b"thesis")

    with pytest.raises(LocalError, match="no socket"):
        LocalServer(path, lambda *_: None)

    assert path.read_bytes() == b"thesis"


async def test_closing_the_server_ends_every_connection(daemon: Daemon, client: Client) -> None:
    client.send(STATUS)
    await client.line()

    daemon.server.close()

    assert await client.line() == {}
    assert daemon.closed.is_set()
    daemon.server = LocalServer(daemon.path, lambda *_: None)


def lingering_socket(stack: ExitStack, linger_s: int) -> socket.socket:
    """Whoever closes it last waits until somebody has read what was sent, who never does."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    sock = socket.create_connection(listener.getsockname())
    stack.enter_context(listener.accept()[0])
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger_s))
    return sock


async def test_a_descriptor_whose_closing_takes_long_holds_up_nobody(daemon: Daemon) -> None:
    with ExitStack() as stack:
        hostile, client = Client(daemon.path), Client(daemon.path)
        sock = lingering_socket(stack, linger_s=int(2 * DEADLINE_S))
        hostile.send(b"{", (sock.fileno(),))
        sock.close()
        hostile.send(b"}\n")  # no request
        assert await hostile.line()
        assert await hostile.line() == {}
        begin_s = time.monotonic()

        client.send(STATUS)
        assert await client.line()

        assert time.monotonic() - begin_s < DEADLINE_S
        hostile.close()
        client.close()


async def test_after_a_descriptor_that_cannot_be_closed_the_others_are(
    daemon: Daemon, client: Client
) -> None:
    client.send(STATUS)
    await client.line()
    (connection,) = daemon.connections
    before = open_descriptors()
    reader, writer = os.pipe()
    os.close(writer)

    connection.close_files([writer, reader])

    wait_for_descriptors(before)
    connection.close_files([os.open("/", os.O_RDONLY)])
    wait_for_descriptors(before)


async def test_who_has_too_many_that_are_looked_at_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run" / "daemon.sock"
    pending = {os.getuid(): CLIENTS_PER_USER_MAX}
    server = LocalServer(path, lambda client, *_: client.send(Failed("any")), pending.__getitem__)
    try:
        for answer in ("any", "hang when they are looked at"):
            client = Client(path)
            client.send(STATUS)
            assert answer in str(await client.line())
            client.close()
            pending[os.getuid()] += 1
    finally:
        server.close()


async def test_who_has_too_many_that_hang_is_refused(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "DESCRIPTORS_MAX", 1)
    with ExitStack() as stack:
        sock = lingering_socket(stack, linger_s=int(2 * DEADLINE_S))
        ours = [os.dup(sock.fileno()), *os.pipe()]
        sock.close()
        # The first one is being closed, the others wait.
        for fd in ours:
            daemon.server.closer.submit(os.getuid(), None, os.close, fd)

        late = Client(daemon.path)
        assert "hang when they are closed" in str(await late.line())
        late.close()
