"""The client against a real UNIX socket: what it believes, what it does when things go wrong."""

from __future__ import annotations

import base64
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import msgspec
import pytest

from swarmcache import client as client_module
from swarmcache import exchanges, local_socket, look_ups
from swarmcache.client import REQUESTS_MAX, Answer, Client, Progress
from swarmcache.errors import DaemonRefused, DaemonUnavailable
from swarmcache.exchanges import Exchanges
from swarmcache.local_protocol import (
    Answer as DaemonAnswer,
)
from swarmcache.local_protocol import (
    Cached,
    Failed,
    Get,
    NodeStatus,
    Original,
    StatusOf,
    encode_answer,
)
from swarmcache.local_protocol import (
    Progress as DaemonProgress,
)
from swarmcache.local_socket import Connection, Connections
from tests.box import wait_until
from tests.scripted_daemon import HANG_UP, Asked, ScriptedDaemon, caching_in

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(b"content of the source")
    return file


@pytest.fixture
def daemon(run_dir: Path, tmp_path: Path) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon:
        yield daemon


def get(daemon: ScriptedDaemon, path: Path | str | bytes, timeout_s: float | None = None) -> Answer:
    with Client(bytes(daemon.path)) as client:
        return client.get(path, timeout_s)


# --- what is answered ----------------------------------------------------------------------------


def test_the_answer_is_the_path_of_a_copy_made_through_the_descriptor(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    answer = get(daemon, source)

    assert answer.cached and not answer.hit and answer.usable
    assert answer.path == f"{tmp_path}/cache/user{source}"
    assert Path(answer.path).read_bytes() == source.read_bytes()
    assert answer.from_peers_bytes == answer.size_bytes == len(source.read_bytes())
    assert daemon.asked[0].content == source.read_bytes()


def test_the_second_answer_is_a_hit_over_the_same_connection(
    daemon: ScriptedDaemon, source: Path
) -> None:
    with Client(bytes(daemon.path)) as client:
        first, second = client.get(source), client.get(str(source))

    assert (first.hit, second.hit) == (False, True)
    assert first.path == second.path
    assert daemon.connections == 1


@pytest.mark.parametrize(
    "name",
    [
        b"with space",
        b"with\nnewline",
        b"not-\xff\xfe-utf8",
        b"x" * 255,
        b"-leading-dash",
        b'quote"backslash\\',
        b"\xc3\xa4\xc3\xb6",
    ],
)
def test_any_name_is_passed_on_byte_by_byte(
    daemon: ScriptedDaemon, tmp_path: Path, name: bytes
) -> None:
    path = bytes(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(b"1")

    answer = get(daemon, path)

    assert daemon.asked[0].path == path
    assert os.fsencode(answer.path).endswith(path)
    assert answer.cached


def test_the_daemon_is_told_the_real_path(
    daemon: ScriptedDaemon, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.parent / "link").symlink_to(source)
    monkeypatch.chdir(source.parent)

    for path in ("link", "./source", str(source.parent / "run" / ".." / "source")):
        get(daemon, path)

    assert [asked.path for asked in daemon.asked] == [bytes(source)] * 3


def test_an_empty_file_is_cached_like_any_other(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    assert get(daemon, tmp_path / "empty").cached


def test_progress_is_reported_while_the_file_comes(run_dir: Path, source: Path) -> None:
    def answer(asked: Asked) -> Iterable[DaemonAnswer]:
        yield DaemonProgress(21, 8, 4, 2, peers=3, waiting_for="a slot")
        yield Original("later")

    seen: list[Progress] = []
    with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
        client.get(source, on_progress=seen.append)

    (progress,) = seen
    assert (progress.size_bytes, progress.from_peers_bytes) == (21, 8)
    assert (progress.from_file_server_bytes, progress.recovered_bytes) == (4, 2)
    assert (progress.peers, progress.waiting_for, progress.index) == (3, "a slot", 0)


def test_the_last_progress_of_a_file_is_that_all_of_it_is_there(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        yield DaemonProgress(21, 8, 4, 2, peers=3, waiting_for="a slot")
        yield from caching_in(tmp_path / "cache")(asked)

    seen: list[tuple[int, int, int, str]] = []
    with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
        client.get(
            source,
            on_progress=lambda p: seen.append(
                (p.from_peers_bytes, p.from_file_server_bytes, p.recovered_bytes, p.waiting_for)
            ),
        )

    assert seen == [(8, 4, 2, "a slot"), (21, 0, 0, "")]


def test_answers_come_in_the_order_of_the_files_whatever_the_daemon_answers_first(
    run_dir: Path, tmp_path: Path
) -> None:
    """The first request is answered last, and no more than the limit are in flight."""
    paths = [tmp_path / f"file-{number}" for number in range(3 * REQUESTS_MAX)]
    for path in paths:
        path.write_text(path.name)
    others = threading.Semaphore(0)
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if asked.path == bytes(paths[0]):
            for _ in paths[1:]:
                assert others.acquire(timeout=10)
        else:
            others.release()
        return cache(asked)

    with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
        answers = list(client.get_all([bytes(path) for path in paths]))

    assert [Path(answer.path).read_text() for answer in answers] == [path.name for path in paths]
    assert REQUESTS_MAX <= daemon.connections <= REQUESTS_MAX + exchanges.LOOK_UPS_MAX


def test_many_threads_share_a_client(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    paths = [tmp_path / f"file-{number}" for number in range(8)]
    for path in paths:
        path.write_text(path.name)
    wrong: list[Answer] = []

    def get_often(client: Client, path: Path) -> None:
        answers = [client.get(path) for _ in range(20)]
        wrong.extend(a for a in answers if not a.cached or Path(a.path).read_text() != path.name)

    with Client(bytes(daemon.path)) as client:
        threads = [threading.Thread(target=get_often, args=(client, path)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []
    assert len(daemon.asked) == 160


def test_a_forked_child_takes_a_connection_of_its_own(daemon: ScriptedDaemon, source: Path) -> None:
    with Client(bytes(daemon.path)) as client:
        client.get(source)
        child = os.fork()
        if child == 0:
            os._exit(0 if client.get(source).hit else 1)
        _, status = os.waitpid(child, 0)
        hit_of_parent = client.get(source).hit

    assert os.waitstatus_to_exitcode(status) == 0
    assert hit_of_parent
    assert [asked.connection for asked in daemon.asked] == [1, 2, 1]


def test_no_thread_of_a_forked_child_takes_a_connection_of_its_parent(
    daemon: ScriptedDaemon,
) -> None:
    connections = Connections(bytes(daemon.path))
    reused = []

    class Inherited(Connection):
        def close(self) -> None:  # just then another thread has something to ask
            super().close()
            connection, was_idle = connections.send(b"")
            reused.append(was_idle)
            connection.close()

    connections.give_back(connections.connect())
    connections.give_back(Inherited(bytes(daemon.path)))
    connections._pid = 0
    connections.send(b"")[0].close()

    assert reused == [False]


def test_an_answer_that_comes_after_an_interrupted_hold_is_not_taken_for_the_next_one(
    run_dir: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"CONTENT OF THE OTHER.")
    cache = caching_in(tmp_path / "cache")
    asked_for_other = threading.Event()
    main = threading.get_ident()

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if not isinstance(asked.request, Get):  # the end of a hold
            return []
        if asked.path == bytes(source):
            signal.pthread_kill(main, signal.SIGUSR1)
            asked_for_other.wait(1)
        else:
            asked_for_other.set()
        (cached,) = cache(asked)
        assert isinstance(cached, Cached)
        return [msgspec.structs.replace(cached, held=True)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
            with pytest.raises(KeyboardInterrupt):
                client.hold(source)
            with client.hold(other) as held:
                assert Path(held).read_bytes() == b"CONTENT OF THE OTHER."
    finally:
        signal.signal(signal.SIGUSR1, former)


@pytest.mark.parametrize(
    "function", [Connection.__init__, Connection.send, Connections.send, Client.send]
)
def test_who_is_interrupted_on_the_way_to_the_daemon_leaves_no_connection(
    run_dir: Path, function: FunctionType
) -> None:
    """As by ^C, at the moment at which a function returns what its caller has no name for yet."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event == "return":
            raise KeyboardInterrupt
        return trace if frame.f_code is function.__code__ else None

    with ScriptedDaemon(run_dir, lambda _: []) as daemon, Client(bytes(daemon.path)) as client:
        former = sys.gettrace()
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                client.status()
        finally:
            sys.settrace(former)
        wait_until(lambda: daemon.open_connections == 0, 10, "the connection to be closed")


def test_an_interrupted_hold_ends_no_other(run_dir: Path, tmp_path: Path, source: Path) -> None:
    """As in a notebook, whose user stops a cell and goes on with what an earlier one holds."""
    other = tmp_path / "other"
    other.write_bytes(b"CONTENT OF THE OTHER.")
    cache = caching_in(tmp_path / "cache")
    main = threading.get_ident()
    released = threading.Semaphore(0)

    def answer(asked: Asked) -> Iterable[DaemonAnswer]:
        if not isinstance(asked.request, Get):
            released.release()
            return []
        if asked.path == bytes(source):
            signal.pthread_kill(main, signal.SIGUSR1)
            return []
        (cached,) = cache(asked)
        assert isinstance(cached, Cached)
        return [msgspec.structs.replace(cached, held=True)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    cache(Asked(Get(bytes(other)), other.read_bytes(), 0))
    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
            first, second = client.hold(other), client.hold(other)
            with pytest.raises(KeyboardInterrupt):
                client.hold(source)
            third = client.hold(other)
            for hold in (first, second, third):
                hold.release()
                assert released.acquire(timeout=10)
            wait_until(lambda: daemon.open_connections == 1, 10, "the first one to be closed")
    finally:
        signal.signal(signal.SIGUSR1, former)

    connections = [asked.connection for asked in daemon.asked]
    assert connections == [1, 1, 1, 2, 1, 1, 2]


def test_no_descriptor_is_left_open(run_dir: Path, tmp_path: Path, source: Path) -> None:
    def open_count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_count()
    with (
        ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon,
        Client(bytes(daemon.path)) as client,
    ):
        for path in (source, Path("/dev/null"), source / "nothing"):
            client.get(path)
        connected = open_count()

    assert connected == before + 3  # the listening socket and both ends of one connection
    assert open_count() == before


def test_a_hit_imports_neither_json_nor_socket(daemon: ScriptedDaemon, source: Path) -> None:
    get(daemon, source)
    program = (
        "import sys; from swarmcache.client import Client;"
        f"assert Client({str(daemon.path)!r}).get({str(source)!r}).hit;"
        "print(sorted({'json', 're', 'socket', 'typing', 'pathlib', 'enum'} & set(sys.modules)))"
    )

    found = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(client_module.__file__).parent.parent,
    )

    assert found.stdout.strip() == "[]"


# --- sources that cannot be cached ---------------------------------------------------------------


def test_what_is_no_regular_file_is_refused_without_waiting(
    daemon: ScriptedDaemon, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bytes(tmp_path / "socket"))
        names = [tmp_path / "fifo", tmp_path / "socket", Path("/dev/null")]
        answers = [get(daemon, name) for name in names]

    assert [answer.usable for answer in answers] == [False] * 3
    assert "neither a file nor a directory" in answers[0].reason
    assert daemon.asked == []


@pytest.mark.parametrize("name", ["nothing", "source/below-a-file", "loop", "", "a\0b", "y" * 256])
def test_what_does_not_exist_is_not_usable(
    daemon: ScriptedDaemon, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (source.parent / "loop").symlink_to("loop")
    monkeypatch.chdir(source.parent)

    answer = get(daemon, name)

    assert not answer.usable and not answer.cached
    assert answer.reason
    assert daemon.asked == []


# --- daemons that fail ---------------------------------------------------------------------------


def assert_original(answer: Answer, source: Path, reason: str) -> None:
    assert not answer.cached
    assert answer.usable
    assert answer.path == str(source)
    assert reason in answer.reason


def test_without_a_daemon_the_answer_is_the_original(source: Path, run_dir: Path) -> None:
    with Client(bytes(run_dir / "daemon.sock")) as client:
        answer = client.get(source)

    assert_original(answer, source, "no daemon answers")


def test_the_original_is_named_by_its_real_path(source: Path, run_dir: Path) -> None:
    (source.parent / "link").symlink_to(source)

    with Client(bytes(run_dir / "daemon.sock")) as client:
        answer = client.get(source.parent / "link")

    assert_original(answer, source, "no daemon answers")


def test_a_socket_left_by_a_dead_daemon_is_no_daemon(source: Path, run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(bytes(run_dir / "daemon.sock"))

    with Client(bytes(run_dir / "daemon.sock")) as client:
        answer = client.get(source)

    assert_original(answer, source, "Connection refused")


def test_the_reason_of_the_daemon_is_passed_on(run_dir: Path, source: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [Original("the disk is full")]) as daemon:
        assert_original(get(daemon, source), source, "the disk is full")


def test_a_refused_request_gives_the_original(run_dir: Path, source: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [Failed("no such user")]) as daemon:
        assert_original(get(daemon, source), source, "no such user")


def test_a_daemon_that_dies_in_mid_request_gives_the_original(run_dir: Path, source: Path) -> None:
    answers: list[DaemonAnswer | bytes] = [DaemonProgress(21, 0, 0, 0, 0), HANG_UP]

    with ScriptedDaemon(run_dir, lambda _: answers) as daemon:
        assert_original(get(daemon, source), source, "went away")


def test_a_new_daemon_is_found_after_the_old_one_has_ended(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    with Client(bytes(run_dir / "daemon.sock")) as client:
        with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as old:
            client.get(source)
        old.path.unlink()
        with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as new:
            answer = client.get(source)

    assert answer.hit
    assert len(new.asked) == 1


def test_an_idle_connection_that_ends_unheard_is_replaced(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    """As when a daemon is restarted in the moment of a second request."""
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        return [HANG_UP] if len(scripted.asked) == 2 else cache(asked)

    with ScriptedDaemon(run_dir, answer) as scripted, Client(bytes(scripted.path)) as client:
        answers = [client.get(source) for _ in range(2)]

    assert [answer.cached for answer in answers] == [True, True]
    assert [asked.connection for asked in scripted.asked] == [1, 1, 2]


def test_a_daemon_that_ends_between_request_and_first_answer_is_asked_no_second_time(
    run_dir: Path, source: Path
) -> None:
    with ScriptedDaemon(run_dir, lambda _: [HANG_UP]) as daemon:
        assert_original(get(daemon, source), source, "went away")

    assert len(daemon.asked) == 1


def encoded(path: bytes) -> bytes:
    return base64.b64encode(path)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\n",
        b"not json\n",
        b"[]\n",
        b"{}\n",
        b'{"answer":"perhaps","reason":"x"}\n',
        b'{"answer":"original"}\n',
        b'{"answer":"original","reason":7}\n',
        b'{"answer":"cached","path":"%s"}\n' % encoded(b"/etc/hostname"),
        b'{"answer":"cached","path":"%s","hit":true}\n' % encoded(b"relative"),
        b'{"answer":"cached","path":"%s","hit":true}\n' % encoded(b"/nul\0"),
        b'{"answer":"cached","path":"","hit":true}\n',
        b'{"answer":"cached","path":"!","hit":true}\n',
        b'{"answer":"cached","path":null,"hit":true}\n',
        b'{"answer":"progress","size_bytes":"many"}\n',
        b'{"answer":"\xff"}\n',
        b'{"answer":"original","reason":"' + b"x" * 200_000,
    ],
)
def test_an_answer_that_makes_no_sense_gives_the_original(
    run_dir: Path, source: Path, nonsense: bytes
) -> None:
    with (
        ScriptedDaemon(run_dir, lambda _: [nonsense]) as daemon,
        Client(bytes(daemon.path)) as client,
    ):
        # Whoever does not want to hear of progress does not read what is said of it.
        answer = client.get(source, on_progress=lambda _: None)

    assert_original(answer, source, "the daemon's answer makes no sense")


@pytest.mark.parametrize("hit", [True, False])
@pytest.mark.parametrize(
    ("name", "reason"), [("nothing", "cannot be reached"), ("short", "the size of the source")]
)
def test_a_copy_that_is_missing_or_has_another_size_is_not_believed(
    run_dir: Path, tmp_path: Path, source: Path, name: str, reason: str, hit: bool
) -> None:
    (tmp_path / "short").write_bytes(b"short")

    with ScriptedDaemon(run_dir, lambda _: [Cached(bytes(tmp_path / name), hit)]) as daemon:
        assert_original(get(daemon, source), source, reason)


def test_answers_in_pieces_are_put_together(run_dir: Path, tmp_path: Path, source: Path) -> None:
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[bytes]:
        whole = b"".join(
            encode_answer(part) for part in cache(asked) if not isinstance(part, bytes)
        )
        return [encode_answer(DaemonProgress(21, 1, 0, 0, 1)) + whole[:10], whole[10:]]

    with ScriptedDaemon(run_dir, answer) as daemon:
        assert get(daemon, source).cached


def test_a_silent_daemon_is_given_up_and_not_asked_for_the_next_file(
    run_dir: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "SILENCE_S_MAX", 0.05)
    paths = [bytes(source)] * (REQUESTS_MAX + 5)

    with ScriptedDaemon(run_dir, lambda _: []) as daemon, Client(bytes(daemon.path)) as client:
        answers = list(client.get_all(paths))

    for answer in answers:
        assert_original(answer, source, "said nothing")
    assert len(daemon.asked) == REQUESTS_MAX


def names_asked(daemon: ScriptedDaemon) -> list[str]:
    return [Path(os.fsdecode(asked.path)).name for asked in daemon.asked]


@pytest.fixture
def numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Paths of small files, of as many as are several look-ups. One request is in flight at a time,
    and whoever takes an order of its own goes backwards."""
    monkeypatch.setattr(exchanges, "REQUESTS_MAX", 1)
    monkeypatch.setattr(exchanges, "LOOK_UPS_MAX", 1)
    keys = (number.to_bytes(8, "big") for number in range(1000, 0, -1))
    monkeypatch.setattr(os, "urandom", lambda _: next(keys))
    paths = [tmp_path / f"{number:03}" for number in range(5 * exchanges.FEW_FILES)]
    for path in paths:
        path.write_bytes(b"small")
    return [bytes(path) for path in paths]


def test_where_small_files_are_nowhere_each_caller_has_an_order_of_its_own_for_the_rest(
    run_dir: Path, tmp_path: Path, numbered: list[bytes]
) -> None:
    """Of nodes that begin together each reads others, and gets from them what they have read."""
    with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon:
        with Client(bytes(daemon.path)) as client:
            answers = list(client.get_all(numbered))
        asked = names_asked(daemon)

    assert [answer.asked for answer in answers] == list(map(os.fsdecode, numbered))
    assert all(answer.cached for answer in answers)
    few = exchanges.FEW_FILES
    names = [Path(os.fsdecode(path)).name for path in numbered]
    parts = [names[start : start + few] for start in range(0, len(names), few)]
    assert asked == [*parts[0], *parts[4], *parts[3], *parts[2], *parts[1]]


def test_larger_files_are_asked_for_in_the_order_of_all_others(
    run_dir: Path, tmp_path: Path, numbered: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads them at the same time shares a swarm."""
    assert exchanges.SMALL_BYTES_MAX == look_ups.SMALL_BYTES_MAX
    monkeypatch.setattr(exchanges, "SMALL_BYTES_MAX", len(b"small") - 1)
    with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon:
        with Client(bytes(daemon.path)) as client:
            assert all(answer.cached for answer in client.get_all(numbered))
        asked = names_asked(daemon)

    assert asked == sorted(asked)


class Stopped:
    """An epoll of a process that was stopped while it waited, as SIGSTOP does: at its end the time
    is up, and the kernel was not asked again what has come."""

    def __init__(self, real: select.epoll) -> None:
        self._real = real

    def poll(self, wait_s: float) -> list[tuple[int, int]]:
        return [] if wait_s else self._real.poll(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_what_came_while_the_client_was_stopped_has_come_in_time(
    run_dir: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "SILENCE_S_MAX", 0.0)
    with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon:
        connections = Connections(bytes(daemon.path))
        call = Exchanges(connections, [bytes(source)])
        while call.start():
            pass
        real = call._arrivals
        assert real is not None and real.poll(10), "the daemon has not answered"
        monkeypatch.setattr(call, "_arrivals", Stopped(real))
        call.receive(0.001)
        (answer,) = call.take()
        call.close()
        connections.close()

    assert answer.cached, answer.reason


def test_a_daemon_that_tells_of_progress_is_not_given_up(
    run_dir: Path, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "SILENCE_S_MAX", 0.08)
    told = threading.Event()
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        for _ in range(5):
            yield DaemonProgress(21, 0, 0, 0, 0)
            told.wait(0.04)
        yield from cache(asked)

    with ScriptedDaemon(run_dir, answer) as daemon:
        assert get(daemon, source).cached


def test_the_timeout_is_passed_to_the_daemon(run_dir: Path, source: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [Original("not in time")]) as daemon:
        get(daemon, source, timeout_s=7.5)
        get(daemon, source)
        get(daemon, source, timeout_s=math.inf)

    with_timeout, without, endless = (asked.request for asked in daemon.asked)
    assert isinstance(with_timeout, Get) and isinstance(without, Get) and isinstance(endless, Get)
    assert with_timeout.wait_s == pytest.approx(7.5, abs=0.5)
    assert without.wait_s is None
    assert endless.wait_s is None


def test_the_timeout_is_for_all_directories_together(run_dir: Path, tmp_path: Path) -> None:
    """They are asked for at once: no answer comes before all have been asked for."""
    directories = [tmp_path / name for name in "abcd"]
    for directory in directories:
        directory.mkdir()
        (directory / "file").touch()
    together = threading.Barrier(len(directories))

    def answer(asked: Asked) -> list[DaemonAnswer | bytes]:
        with suppress(threading.BrokenBarrierError):
            together.wait(3)
        return [Original("not in time")]

    with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
        answers = client.get_many(directories, timeout_s=60)
        waits_s = [each.request.wait_s for each in daemon.asked if isinstance(each.request, Get)]

    assert answers == list(map(str, directories))
    assert not together.broken
    assert len(waits_s) == len(directories)
    assert all(wait_s is not None and wait_s <= 60 for wait_s in waits_s)


def test_a_daemon_that_ignores_the_timeout_is_given_up(
    run_dir: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "GRACE_S", 0.02)

    with ScriptedDaemon(run_dir, lambda _: []) as daemon:
        assert_original(get(daemon, source, timeout_s=0.02), source, "in time")


# --- sources that change -------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def test_a_source_replaced_during_the_transfer_is_asked_for_again(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if len(scripted.asked) == 1:
            replace(source, b"CONTENT OF THE SOURCE")
        return cache(asked)

    with ScriptedDaemon(run_dir, answer) as scripted:
        answer_given = get(scripted, source)

    assert Path(answer_given.path).read_bytes() == b"CONTENT OF THE SOURCE"
    assert [asked.content for asked in scripted.asked] == [
        b"content of the source",
        b"CONTENT OF THE SOURCE",
    ]


def test_a_link_that_leads_elsewhere_after_the_transfer_is_followed_again(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.write_bytes(b"the other one")
    link.symlink_to(source)
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if len(scripted.asked) == 1:
            link.unlink()
            link.symlink_to(other)
        return cache(asked)

    with ScriptedDaemon(run_dir, answer) as scripted:
        assert Path(get(scripted, link).path).read_bytes() == b"the other one"


def test_a_source_that_changes_all_the_time_is_left_alone_after_three_attempts(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        with open(source, "ab") as file:
            file.write(b"more")
        return cache(asked)

    with ScriptedDaemon(run_dir, answer) as daemon:
        assert_original(get(daemon, source), source, "changes all the time")

    assert len(daemon.asked) == 3


def test_a_daemon_that_says_retry_is_asked_again_with_a_new_descriptor(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if len(scripted.asked) > 1:
            return cache(asked)
        replace(source, b"the new one")
        return [Original("the source changed", retry=True)]

    with ScriptedDaemon(run_dir, answer) as scripted:
        assert Path(get(scripted, source).path).read_bytes() == b"the new one"


def test_a_daemon_that_always_says_retry_is_asked_three_times(run_dir: Path, source: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [Original("it changed", retry=True)]) as daemon:
        assert_original(get(daemon, source), source, "it changed")

    assert len(daemon.asked) == 3


def test_a_source_that_goes_away_during_the_transfer_is_not_usable(
    run_dir: Path, tmp_path: Path, source: Path
) -> None:
    cache = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        source.unlink()
        return cache(asked)

    with ScriptedDaemon(run_dir, answer) as daemon:
        assert not get(daemon, source).usable


# --- which daemon is trusted ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_socket_in_a_directory_that_others_may_write_is_not_trusted(
    daemon: ScriptedDaemon, source: Path, run_dir: Path, mode: int
) -> None:
    run_dir.chmod(mode)

    assert_original(get(daemon, source), source, "may be written by others")
    assert daemon.connections == 0


@as_root
def test_a_socket_in_a_directory_of_another_user_is_not_trusted(
    daemon: ScriptedDaemon, source: Path, run_dir: Path
) -> None:
    os.chown(run_dir, 65534, -1)

    assert_original(get(daemon, source), source, "belongs to user 65534")
    assert daemon.connections == 0


@as_root
def test_a_daemon_of_another_user_is_not_trusted(source: Path, run_dir: Path) -> None:
    """The kernel remembers who called listen(), whoever the file belongs to."""
    ready_r, ready_w = os.pipe()
    end_r, end_w = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bytes(run_dir / "daemon.sock"))
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os.close(end_w)
            listener.listen()
            os.write(ready_w, b"1")
            os.read(end_r, 1)
            os._exit(0)
        os.read(ready_r, 1)
        with Client(bytes(run_dir / "daemon.sock")) as client:
            answer = client.get(source)
    for fd in (end_w, end_r, ready_r, ready_w):
        os.close(fd)
    os.waitpid(child, 0)

    assert_original(answer, source, "belongs to user 65534")


# --- where the daemon is looked for --------------------------------------------------------------


@pytest.fixture
def no_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_socket, "default_socket_candidates", lambda uid: ["/nowhere/d.sock"])
    monkeypatch.setattr(local_socket, "SYSTEM_CONFIG", "/nowhere/config.toml")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def found(source: Path, config_file: Path | None = None) -> Answer:
    """The answer of a client that has to find its daemon."""
    with Client(config_file=bytes(config_file) if config_file else None) as client:
        return client.get(source)


def write_config(home: Path, text: str) -> Path:
    file = home / ".config/swarmcache/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


@pytest.mark.usefixtures("no_defaults")
@pytest.mark.parametrize("variable", ["SWARMCACHE_SOCKET", "SWARMCACHE_DAEMON__SOCKET"])
def test_the_socket_may_be_named_in_the_environment(
    daemon: ScriptedDaemon, source: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(daemon.path))

    assert found(source).cached


@pytest.mark.usefixtures("no_defaults")
def test_the_socket_may_be_named_in_the_settings(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'[daemon]\nsocket = "{daemon.path}"\n'
    named = tmp_path / "named.toml"
    named.write_text(text)

    assert found(source, named).cached
    monkeypatch.setenv("SWARMCACHE_CONFIG", str(named))
    assert found(source).cached
    monkeypatch.delenv("SWARMCACHE_CONFIG")
    assert not found(source).cached
    write_config(tmp_path / "home", text)
    assert found(source).cached


@pytest.mark.usefixtures("no_defaults")
def test_wrong_settings_give_the_original(source: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "home", "[daemon]\nsockets = 7\n")

    with Client() as client:
        assert_original(client.get(source), source, "there is no such setting")


@pytest.mark.usefixtures("no_defaults")
def test_settings_that_name_no_socket_are_not_even_parsed(source: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "home", "this is no TOML")

    with Client() as client:
        assert_original(client.get(source), source, "/nowhere/d.sock: No such file")


def test_the_first_default_that_answers_is_taken(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_socket, "SYSTEM_CONFIG", "/nowhere/config.toml")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    candidates = ["/nowhere/d.sock", str(daemon.path)]
    monkeypatch.setattr(local_socket, "default_socket_candidates", lambda uid: candidates)

    assert found(source).cached


# --- status --------------------------------------------------------------------------------------


def test_status_is_what_the_daemon_says(run_dir: Path) -> None:
    peers = [{"node": "n" * 60, "connected": True, "distrusted": False}] * 2000

    def answer(asked: Asked) -> Iterable[DaemonAnswer]:
        assert isinstance(asked.request, StatusOf)
        return [NodeStatus({"address": "127.0.0.1:1", "peers": peers}, None, "no tracker")]

    with ScriptedDaemon(run_dir, answer) as daemon, Client(bytes(daemon.path)) as client:
        status = client.status()

    assert status["node"] == {"address": "127.0.0.1:1", "peers": peers}
    assert (status["cluster"], status["reason"]) == (None, "no tracker")


def test_status_without_a_daemon_is_an_error(run_dir: Path) -> None:
    with Client(bytes(run_dir / "daemon.sock")) as client, pytest.raises(DaemonUnavailable):
        client.status()


def test_a_refused_status_is_an_error(run_dir: Path) -> None:
    with (
        ScriptedDaemon(run_dir, lambda _: [Failed("not now")]) as daemon,
        Client(bytes(daemon.path)) as client,
        pytest.raises(DaemonRefused, match="not now"),
    ):
        client.status()
