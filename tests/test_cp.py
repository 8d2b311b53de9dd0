"""``swarmcache cp``: all of a file or none of it, cached at once, whatever goes wrong."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from swarmcache.client import Client
from swarmcache.clock import now_s
from swarmcache.cp import CopyOutcome, CopyProgress, copy_files
from swarmcache.errors import UsageError
from swarmcache.local_protocol import Answer, End, OfferReplica, Slot, WriteSlot
from swarmcache.write_beside import PREFIX
from tests.box import wait_until
from tests.local_daemons import COMMAND, PACKAGE_PARENT, PATIENCE_S, LocalDaemons
from tests.scripted_daemon import Asked, ScriptedDaemon

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
MTIME_NS = 1_600_000_000_123_456_789


class Nodes:
    """Two nodes with a tracker, and a directory that both take for a file server's."""

    def __init__(self, directory: Path, local: LocalDaemons) -> None:
        self.directory = directory
        self.server = directory / "server"
        self.server.mkdir()
        settings = f'[file_servers.nfs]\npaths = ["{self.server}"]\n'
        local.start_tracker()
        self.first = local.start_daemon("first", settings)
        self.second = local.start_daemon("second", settings)

    def read_bytes(self) -> int:
        """What was ever read from the file server under leases."""
        (server,) = self.first.status()["cluster"]["file_servers"]
        return int(server["read_bytes"])


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with LocalDaemons(directory) as local:
        yield Nodes(directory, local)


@pytest.fixture
def server(nodes: Nodes, request: pytest.FixtureRequest) -> Path:
    """A directory on the file server for one test."""
    directory = nodes.server / str(request.node.name).replace("/", "-")
    directory.mkdir()
    return directory


@pytest.fixture
def client(nodes: Nodes) -> Iterator[Client]:
    """A client of the first node."""
    with Client(os.fsencode(nodes.first.socket)) as client:
        yield client


def make(path: Path, size_bytes: int = 1000, mtime_ns: int = MTIME_NS) -> Path:
    """A source with bytes of its own."""
    path.write_bytes(os.urandom(size_bytes))
    path.chmod(0o640)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def nobody(directory: Path) -> Client:
    """A client without a daemon."""
    return Client(os.fsencode(directory / "no.sock"))


def copied(*sources: Path, to: Path, client: Client | None = None) -> CopyOutcome:
    """What became of the last of these."""
    client = client or nobody(to)
    return list(copy_files(client, map(os.fsencode, sources), os.fsencode(to)))[-1]


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# --- what a copy is ------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 3 * MIB + 17])
def test_a_copy_has_bytes_mode_and_time_and_is_cached_without_being_read_again(
    nodes: Nodes, server: Path, tmp_path: Path, size_bytes: int
) -> None:
    source, target = make(tmp_path / "source", size_bytes), server / "target"

    done = nodes.first.run("cp", source, target)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert target.read_bytes() == source.read_bytes()
    status = target.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, MTIME_NS)
    assert names_in(server) == {"target"}
    for node in (nodes.second, nodes.first):
        (copy,) = node.get(target)
        assert Path(os.fsdecode(copy)).read_bytes() == source.read_bytes()
    assert nodes.read_bytes() == 0


def test_who_has_the_destination_open_keeps_what_was_there(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    target.write_text("before")

    with open(target) as reader:
        assert not copied(source, to=target).error
        assert reader.read() == "before"

    assert target.read_bytes() == source.read_bytes()


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    for name, leads_to in (("link", "elsewhere/old"), ("dangling", "elsewhere/new")):
        (tmp_path / name).symlink_to(leads_to)
    (tmp_path / "elsewhere/old").write_text("before")

    for name in ("link", "dangling"):
        assert not copied(source, to=tmp_path / name).error

        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == source.read_bytes()


def test_several_sources_go_into_a_directory_and_one_that_fails_does_not_stop_the_others(
    nodes: Nodes, server: Path, tmp_path: Path
) -> None:
    first, last = make(tmp_path / "first"), make(tmp_path / "last \udcff\n")

    done = nodes.first.run("cp", first, tmp_path / "none", tmp_path, last, server)

    assert done.returncode == 4
    assert names_in(server) == {"first", "last \udcff\n"}
    assert (server / last.name).read_bytes() == last.read_bytes()
    said = done.stderr.decode().splitlines()
    assert [line.rpartition(": ")[2] for line in said] == [
        "No such file or directory",
        "is a directory",
    ]


def test_the_files_of_a_bundle_go_into_a_directory_and_the_list_does_not(
    nodes: Nodes, server: Path, tmp_path: Path
) -> None:
    (tmp_path / "below").mkdir()
    files = [make(tmp_path / "one"), make(tmp_path / "below/two")]
    listed = ["none.first", "one", str(files[1]), "one", "none.last"]
    (tmp_path / "x.bundle").write_text("\n".join(listed))

    done = nodes.first.run("cp", tmp_path / "x.bundle", server)

    assert done.returncode == 4
    assert names_in(server) == {"one", "two"}
    assert done.stderr.count(b"not copied") == 2
    for source in files:
        assert (server / source.name).read_bytes() == source.read_bytes()


def test_a_bundle_needs_a_directory_unless_it_is_said_to_be_none(tmp_path: Path) -> None:
    bundle, target = tmp_path / "x.bundle", tmp_path / "target"
    bundle.write_text("one\n")

    with pytest.raises(UsageError, match=r"DST must be a directory, for the files that .* lists"):
        copied(bundle, to=target)
    outcomes = copy_files(
        nobody(tmp_path), [os.fsencode(bundle)], os.fsencode(target), bundle=False
    )

    assert [outcome.error for outcome in outcomes] == [""]
    assert target.read_text() == "one\n"


def test_a_source_that_is_said_to_be_a_bundle_and_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\0")

    done = subprocess.run(
        [*COMMAND, "cp", "--bundle", tmp_path / "data", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )

    said = f"Invalid value for SRC... DST: '{tmp_path}/data': it is no list of paths"
    assert done.returncode == 2
    assert said in done.stderr


def test_of_two_sources_with_one_name_the_second_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "to").mkdir()
    first, second = make(tmp_path / "same"), make(tmp_path / "other/same")

    outcome = copied(first, second, to=tmp_path / "to")

    assert outcome.error == "another source of the same name was copied there just now"
    assert (tmp_path / "to/same").read_bytes() == first.read_bytes()


def test_a_source_that_is_not_copied_is_in_the_way_of_no_other_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "target").mkdir()
    gone, source = tmp_path / "gone/result", make(tmp_path / "there/result")
    names = [os.fsencode(path) for path in (gone, source, gone, source)]

    outcomes = list(copy_files(nobody(tmp_path), names, os.fsencode(tmp_path / "target")))

    assert [bool(outcome.error) for outcome in outcomes] == [True, False, True, False]
    assert (tmp_path / "target/result").read_bytes() == source.read_bytes()


def test_several_sources_need_a_directory(tmp_path: Path) -> None:
    source = make(tmp_path / "source")

    with pytest.raises(UsageError, match="must be a directory"):
        copied(source, source, to=tmp_path / "target")

    assert names_in(tmp_path) == {"source"}


def test_wrong_usage_says_what_was_expected(nodes: Nodes, tmp_path: Path) -> None:
    source = make(tmp_path / "source")

    for arguments in ([source], [source, source, tmp_path / "target"]):
        done = nodes.first.run("cp", *arguments)

        assert done.returncode == 2
        assert b"expected SRC and DST" in done.stderr or b"must be a directory" in done.stderr


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("source", "source and destination are the same file"),
        ("hard link", "source and destination are the same file"),
        ("none/target", "cannot use the destination: No such file or directory"),
        ("none/", "there is no such directory"),
        ("source/target", "cannot use the destination: Not a directory"),
        ("fifo", "the destination is neither file nor directory"),
        ("loop", "cannot use the destination: Too many levels of symbolic links"),
        ("n" * 256, "cannot use the destination: File name too long"),
    ],
)
def test_where_a_file_cannot_be_nothing_is_lost(tmp_path: Path, target: str, error: str) -> None:
    source = make(tmp_path / "source")
    bytes_before = source.read_bytes()
    os.link(source, tmp_path / "hard link")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    before = names_in(tmp_path)

    (outcome,) = copy_files(
        nobody(tmp_path), [os.fsencode(source)], os.fsencode(f"{tmp_path}/{target}")
    )

    assert outcome.error == error
    assert names_in(tmp_path) == before
    assert source.read_bytes() == bytes_before


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_source_that_changes_meanwhile_is_not_copied(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source", 2 * MIB), tmp_path / "target"
    target.write_text("before")

    def grow(_: CopyProgress) -> None:
        with open(source, "ab") as file:
            file.write(b"more")

    outcomes = copy_files(
        nobody(tmp_path), [os.fsencode(source)], os.fsencode(target), on_progress=grow
    )

    assert [outcome.error for outcome in outcomes] == ["the source was changed while it was copied"]
    assert target.read_text() == "before"
    assert names_in(tmp_path) == {"source", "target"}


def test_a_directory_that_goes_away_meanwhile_is_an_error_like_others(tmp_path: Path) -> None:
    source, directory = make(tmp_path / "source", 2 * MIB), tmp_path / "directory"
    directory.mkdir()

    def remove(_: CopyProgress) -> None:
        shutil.rmtree(directory, ignore_errors=True)

    outcomes = copy_files(
        nobody(tmp_path), [os.fsencode(source)], os.fsencode(directory), on_progress=remove
    )

    assert [outcome.error for outcome in outcomes] == [
        "cannot put the copy in place: No such file or directory"
    ]


def test_a_full_file_server_leaves_the_destination_as_it_was(
    nodes: Nodes, server: Path, tmp_path: Path
) -> None:
    large, small = make(tmp_path / "large", MIB), make(tmp_path / "small")
    (server / "large").write_text("before")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*COMMAND, "cp", f"--socket={nodes.first.socket}", large, small, server],
        capture_output=True,
        check=False,
        env={},
        preexec_fn=limit,
    )

    assert done.returncode == 4
    assert b"cannot write the copy: File too large" in done.stderr
    assert names_in(server) == {"large", "small"}
    assert (server / "large").read_text() == "before"
    assert (server / "small").read_bytes() == small.read_bytes()


def test_without_a_daemon_it_is_copied_all_the_same_and_said_why(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"

    outcome = copied(source, to=target)

    assert outcome.error == ""
    assert "no daemon answers" in outcome.unsupervised
    assert "no daemon answers" in outcome.not_registered
    assert target.read_bytes() == source.read_bytes()


def test_a_daemon_that_hangs_is_waited_for_once_and_not_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmcache.write_slot.SILENCE_S_MAX", 0.05)
    monkeypatch.setattr(sys.modules["swarmcache.cp"], "SILENCE_S_MAX", 0.05)
    sources = [make(tmp_path / name) for name in "abc"]
    (tmp_path / "server").mkdir()
    tmp_path.chmod(0o700)

    with ScriptedDaemon(tmp_path, lambda _: []) as daemon, Client(bytes(daemon.path)) as client:
        names, server = map(os.fsencode, sources), os.fsencode(tmp_path / "server")
        outcomes = list(copy_files(client, names, server))
        assert len(daemon.asked) == 1

    assert [outcome.error for outcome in outcomes] == ["", "", ""]
    reasons = {outcome.unsupervised for outcome in outcomes}
    assert reasons == {outcome.not_registered for outcome in outcomes}
    assert reasons == {"the daemon said nothing for 0 s"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("ahead_s", [100_000, -100])
def test_in_a_container_with_a_clock_of_its_own_it_is_copied_without_a_slot(
    nodes: Nodes, server: Path, tmp_path: Path, ahead_s: int
) -> None:
    source = make(tmp_path / "source")
    container = ["unshare", "--fork", "--kill-child", "--time", f"--boottime={ahead_s}"]

    done = subprocess.run(
        [*container, *COMMAND, "cp", f"--socket={nodes.first.socket}", source, server],
        capture_output=True,
        check=False,
        env={"PATH": os.defpath},
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0
    assert b"copied without a slot" in done.stderr
    assert b"its clock is not ours" in done.stderr


def test_where_there_can_be_no_more_threads_it_is_copied_all_the_same(
    nodes: Nodes, client: Client, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    source, target = make(tmp_path / "source"), server / "target"

    outcome = copied(source, to=target, client=client)

    assert (outcome.error, outcome.not_registered) == ("", "")
    assert "can't start new thread" in outcome.unsupervised
    assert target.read_bytes() == source.read_bytes()


def test_other_bytes_under_the_same_size_and_time_get_another_time(
    nodes: Nodes, client: Client, server: Path, tmp_path: Path
) -> None:
    """Whoever has cached what was there before would take them for that."""
    source, target = make(tmp_path / "source"), server / "target"
    assert copied(source, to=target, client=client).notes == []
    assert copied(source, to=target, client=client).notes == ["it was the same already"]
    assert target.stat().st_mtime_ns == MTIME_NS
    nodes.second.get(target)

    outcome = copied(make(source), to=target, client=client)

    assert (outcome.error, outcome.not_registered) == ("", "")
    assert outcome.notes == [
        "the time of the source was not kept: what was there before may have had it"
    ]
    assert target.stat().st_mtime_ns > MTIME_NS
    for node in (nodes.first, nodes.second):
        (copy,) = node.get(target)
        assert Path(os.fsdecode(copy)).read_bytes() == source.read_bytes()


def test_what_has_got_another_time_does_not_get_the_first_one_back(
    nodes: Nodes, client: Client, server: Path, tmp_path: Path
) -> None:
    """As of a job that is run again."""
    source, target = make(tmp_path / "source"), server / "target"
    copied(source, to=target, client=client)
    nodes.second.get(target)
    copied(make(source), to=target, client=client)
    time_ns = target.stat().st_mtime_ns

    again = copied(source, to=target, client=client)
    (copy,) = nodes.second.get(target)

    assert Path(os.fsdecode(copy)).read_bytes() == source.read_bytes()
    assert again.notes == ["it was the same already"]
    assert target.stat().st_mtime_ns == time_ns > MTIME_NS

    copied(make(source), to=target, client=client)
    (copy,) = nodes.second.get(target)
    assert Path(os.fsdecode(copy)).read_bytes() == source.read_bytes()


def test_what_somebody_else_puts_there_meanwhile_is_not_taken_for_the_copy(
    nodes: Nodes, client: Client, server: Path, tmp_path: Path
) -> None:
    """As of two jobs that wait for a slot, with sources whose times are all the same."""
    source, target = make(tmp_path / "source"), server / "target"

    def be_faster(progress: CopyProgress) -> None:
        if progress.done_bytes and not target.exists():
            nodes.second.get(make(target))

    (outcome,) = copy_files(
        client, [os.fsencode(source)], os.fsencode(target), on_progress=be_faster
    )

    assert outcome.error == ""
    for node in (nodes.first, nodes.second):
        (copy,) = node.get(target)
        assert Path(os.fsdecode(copy)).read_bytes() == source.read_bytes()
    assert outcome.notes == [
        "the time of the source was not kept: what was there before may have had it"
    ]


def test_what_somebody_else_removes_meanwhile_is_no_reason_not_to_copy(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target")
    tmp_path.chmod(0o700)

    removed = threading.Event()

    def answer(asked: Asked) -> Iterator[Answer]:
        if isinstance(asked.request, WriteSlot):
            yield Slot(None, "nfs")
            assert removed.wait(PATIENCE_S)
            yield Slot(now_s() + PATIENCE_S, "nfs")
        elif isinstance(asked.request, OfferReplica):
            yield End()

    def remove(progress: CopyProgress) -> None:
        if progress.waiting_for:
            target.unlink()
            removed.set()

    with ScriptedDaemon(tmp_path, answer) as daemon, Client(bytes(daemon.path)) as client:
        (outcome,) = copy_files(
            client, [os.fsencode(source)], os.fsencode(target), on_progress=remove
        )

    assert (outcome.error, outcome.unsupervised) == ("", "")
    assert target.read_bytes() == source.read_bytes()


def test_a_disk_that_answers_late_makes_nobody_write_after_the_slots_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, server = make(tmp_path / "source"), tmp_path / "server"
    server.mkdir()
    tmp_path.chmod(0o700)
    until_s, read_late, written_bytes = [0.0], threading.Event(), list[int]()
    granted, read = threading.Event(), os.preadv

    def answer(asked: Asked) -> Iterator[Answer]:
        if isinstance(asked.request, WriteSlot):
            until_s[0] = now_s() + 1.0
            yield Slot(until_s[0], "nfs")
            assert read_late.wait(PATIENCE_S)
            yield Slot(None, "nfs")
            assert granted.wait(PATIENCE_S)
            yield Slot(now_s() + PATIENCE_S, "nfs")
        elif isinstance(asked.request, OfferReplica):
            yield End()

    def answer_late(*arguments: Any) -> int:
        wait_until(lambda: now_s() > until_s[0], PATIENCE_S, "the end of the slot")
        read_late.set()
        return read(*arguments)

    def look(progress: CopyProgress) -> None:
        if progress.waiting_for:
            written_bytes.extend(path.stat().st_size for path in server.iterdir())
            granted.set()

    monkeypatch.setattr(os, "preadv", answer_late)
    with ScriptedDaemon(tmp_path, answer) as daemon, Client(bytes(daemon.path)) as client:
        (outcome,) = copy_files(
            client, [os.fsencode(source)], os.fsencode(server), on_progress=look
        )

    assert (outcome.error, outcome.unsupervised) == ("", "")
    assert written_bytes == [0]


# --- what a kill leaves --------------------------------------------------------------------------

# ``cp`` that stops itself, once, when a part is written.
STOPPING = [
    sys.executable,
    "-c",
    f"""
import os, signal, sys
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache import cp_command
from swarmcache.commands import run
for number in (signal.SIGHUP, signal.SIGTERM):  # whoever runs the tests may ignore them
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
parts = []
def show(bar, progress):
    if progress.done_bytes and not parts:
        parts.append(progress.done_bytes)
        os.kill(os.getpid(), signal.SIGSTOP)
cp_command._Bar.show = show
sys.exit(run(sys.argv[1:]))
""",
]
StartCopy = Callable[[Path, Path], subprocess.Popen[bytes]]


@pytest.fixture
def start_cp(nodes: Nodes) -> Iterator[StartCopy]:
    """Starts a ``cp``, and returns when it has stopped in the middle."""
    with ExitStack() as stack:

        def start(source: Path, target: Path) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [*STOPPING, "cp", f"--socket={nodes.first.socket}", source, target],
                env={},
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ended = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert ended is not None and ended.si_code == os.CLD_STOPPED
            return process

        yield start


def test_what_a_killed_copy_leaves_is_removed_by_the_next_one_but_nothing_that_is_alive(
    nodes: Nodes, server: Path, tmp_path: Path, start_cp: StartCopy
) -> None:
    alive = start_cp(make(tmp_path / "large", 2 * MIB), server / "target")
    (temporary,) = names_in(server)
    assert temporary.startswith(PREFIX)
    small = make(tmp_path / "small")

    nodes.first.run("cp", small, server)
    assert names_in(server) == {temporary, "small"}

    alive.kill()
    alive.wait()
    done = nodes.first.run("cp", small, server / "other")

    assert names_in(server) == {"small", "other"}
    assert f"removed {temporary}" in done.stderr.decode()


def test_a_copy_that_is_ended_by_its_job_system_leaves_nothing(
    server: Path, tmp_path: Path, start_cp: StartCopy
) -> None:
    source = make(tmp_path / "source", 2 * MIB)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process = start_cp(source, server / "target")

        process.send_signal(number)
        process.send_signal(signal.SIGCONT)

        assert process.wait(timeout=PATIENCE_S) == 128 + number
        assert names_in(server) == set()
