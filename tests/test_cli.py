"""The command line as jobs and people use it: real processes, real output, real exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

import swarmcache
from swarmcache.cli import plain_get
from swarmcache.client import Progress
from swarmcache.display import ProgressDisplay
from swarmcache.local_protocol import Answer as DaemonAnswer
from swarmcache.local_protocol import NodeStatus, Original
from swarmcache.local_protocol import Progress as DaemonProgress
from tests.scripted_daemon import Asked, ScriptedDaemon, caching_in

PACKAGE_PARENT = Path(swarmcache.__file__).parent.parent
COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(PACKAGE_PARENT)!r})\n"
    "from swarmcache.cli import run; run()",
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def daemon(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon:
        monkeypatch.setenv("SWARMCACHE_SOCKET", str(daemon.path))
        yield daemon


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(b"content of the source")
    return file


def run(
    *arguments: str | bytes | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, cwd=cwd, env=env, timeout=60, check=False
    )


def copies(tmp_path: Path, *paths: Path | bytes, end: bytes = b"\n") -> bytes:
    """What is printed for these sources where all are cached."""
    return b"".join(bytes(tmp_path / "cache/user") + bytes(path) + end for path in paths)


# --- get: what is printed ------------------------------------------------------------------------


def test_get_prints_the_path_of_the_copy_and_nothing_else(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    done = run("get", source)

    assert (done.returncode, done.stdout, done.stderr) == (0, copies(tmp_path, source), b"")


def test_get_prints_one_path_per_file_in_order(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").touch()

    done = run("get", source, tmp_path / "other", source)

    assert done.stdout == copies(tmp_path, source, tmp_path / "other", source)


def test_get_of_a_directory_prints_the_directory_of_its_copies(
    daemon: ScriptedDaemon, tmp_path: Path
) -> None:
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "tree/below/file").write_text("1")

    done = run("get", tmp_path / "tree")

    assert (done.returncode, done.stdout) == (0, copies(tmp_path, tmp_path / "tree"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [b"not-\xff-utf8", b"with space", b"new\nline", b"-dash", b"x" * 255, b"--"]
)
@pytest.mark.parametrize("environment", [{}, {"LANG": "C", "LC_ALL": "C"}])
def test_get_takes_any_name_and_needs_no_environment(
    daemon: ScriptedDaemon, tmp_path: Path, name: bytes, environment: dict[str, str]
) -> None:
    path = bytes(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_text("1")

    plain = run(
        "get", "--", name, cwd=tmp_path, env={**environment, "SWARMCACHE_SOCKET": str(daemon.path)}
    )
    with_nul = run(
        "get", "-0", f"--socket={daemon.path}", "--", name, cwd=tmp_path, env=environment
    )

    assert (plain.returncode, plain.stdout) == (0, copies(tmp_path, path))
    assert (with_nul.returncode, with_nul.stdout) == (0, copies(tmp_path, path, end=b"\0"))


def test_get_without_a_daemon_prints_the_original_and_why(source: Path, run_dir: Path) -> None:
    done = run("get", source, env={"SWARMCACHE_SOCKET": str(run_dir / "daemon.sock")})

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert done.stderr.startswith(f"swarmcache: '{source}': no daemon answers".encode())
    assert done.stderr.endswith(b"using the original path\n")


def test_get_of_files_that_cannot_be_read_prints_the_others_and_exits_1(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")

    done = run("get", tmp_path / "nothing", source, tmp_path / "fifo", "/dev/null", "")

    assert (done.returncode, done.stdout) == (1, copies(tmp_path, source))
    lines = done.stderr.decode().splitlines()
    assert lines[0] == f"swarmcache: '{tmp_path}/nothing': No such file or directory"
    assert lines[1] == f"swarmcache: '{tmp_path}/fifo': is neither a file nor a directory"
    assert lines[2] == "swarmcache: '/dev/null': is neither a file nor a directory"
    assert lines[3] == "swarmcache: '': No such file or directory"


@pytest.mark.parametrize(("options", "code"), [(["--strict"], 3), ([], 0)])
def test_get_exits_3_only_when_strict(
    source: Path, run_dir: Path, options: list[str], code: int
) -> None:
    done = run("get", *options, f"--socket={run_dir}/daemon.sock", source)

    assert (done.returncode, done.stdout) == (code, bytes(source) + b"\n")


def test_get_strict_exits_0_when_all_are_cached(daemon: ScriptedDaemon, source: Path) -> None:
    assert run("get", "--strict", source).returncode == 0


def test_get_passes_the_timeout_on(run_dir: Path, source: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [Original("not in time")]) as daemon:
        done = run("get", "--timeout", "3", "--socket", daemon.path, source)

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert getattr(daemon.asked[0].request, "wait_s", None) == pytest.approx(3, abs=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["get", "--"],
        ["get", "--nonsense", "x"],
        ["get", "--timeout", "-1", "x"],
        ["nonsense"],
        [],
    ],
)
def test_wrong_usage_exits_2_and_prints_nothing(arguments: list[str]) -> None:
    done = run(*arguments)

    assert done.returncode == 2
    if arguments:
        assert done.stdout == b""


# --- get: how it behaves -------------------------------------------------------------------------


def test_get_leaves_stdin_alone(daemon: ScriptedDaemon, source: Path, tmp_path: Path) -> None:
    """As in: while read f; do swarmcache get "$f"; done < list"""
    (tmp_path / "list").write_text(f"{source}\n{source}\n")
    script = 'while read f; do "$@" get "$f"; done < list'

    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND], capture_output=True, cwd=tmp_path, check=True
    )

    assert done.stdout == copies(tmp_path, source, source)


def test_get_does_not_wait_for_the_whole_list_to_print_the_first_path(
    run_dir: Path, source: Path, tmp_path: Path
) -> None:
    first_was_read = threading.Event()

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if asked.path == bytes(source):
            return [Original("the first one")]
        assert first_was_read.wait(timeout=20)
        return [Original("the second one")]

    (tmp_path / "other").touch()
    with (
        ScriptedDaemon(run_dir, answer) as daemon,
        subprocess.Popen(
            [*COMMAND, "get", source, tmp_path / "other"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"SWARMCACHE_SOCKET": str(daemon.path)},
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == bytes(source) + b"\n"
        first_was_read.set()
        assert process.stdout.read() == bytes(tmp_path / "other") + b"\n"


def test_get_survives_closed_standard_streams(daemon: ScriptedDaemon, source: Path) -> None:
    script = '"$@" get "$FILE" <&- 2>&-'
    environment = {"FILE": str(source), "SWARMCACHE_SOCKET": str(daemon.path)}

    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND], stdout=subprocess.PIPE, env=environment, check=True
    )
    without_stdout = subprocess.run(
        ["sh", "-c", '"$@" get "$FILE" >&-', "sh", *COMMAND],
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )

    assert done.stdout.endswith(bytes(source) + b"\n")
    assert without_stdout.returncode == 1
    assert b"cannot write the paths: stdout is closed" in without_stdout.stderr


def test_a_reason_that_nobody_can_be_told_does_not_cost_the_path(
    tmp_path: Path, source: Path
) -> None:
    environment = {"SWARMCACHE_SOCKET": str(tmp_path / "no daemon")}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "get", source],
            stdout=subprocess.PIPE,
            stderr=full,
            env=environment,
            check=False,
        )

    assert (done.stdout, done.returncode) == (bytes(source) + b"\n", 0)


def test_get_says_when_its_output_cannot_be_written(daemon: ScriptedDaemon, source: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "get", source], stdout=full, stderr=subprocess.PIPE, check=False
        )

    assert done.returncode == 1
    assert done.stderr == b"swarmcache: cannot write the paths: No space left on device\n"


@pytest.mark.parametrize("cached", [True, False])
def test_a_plain_get_does_not_import_the_other_commands(
    run_dir: Path, source: Path, tmp_path: Path, cached: bool
) -> None:
    answer_cached = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        yield DaemonProgress(21 << 20, 8 << 20, 4 << 20, 0, peers=3, waiting_for="a slot")
        yield from answer_cached(asked)

    with ScriptedDaemon(run_dir, answer) as daemon:
        env = {"SWARMCACHE_SOCKET": str(daemon.path)}
        if cached:
            run("get", source, env=env)
        imports = subprocess.run(
            [sys.executable, "-X", "importtime", *COMMAND[1:], "get", source],
            capture_output=True,
            text=True,
            check=True,
            env=env,
        ).stderr

    modules = {line.rpartition("|")[2].strip() for line in imports.splitlines()}
    assert "swarmcache.client" in modules
    heavy = {"typer", "rich", "msgspec", "asyncio", "json", "socket", "logging", "argparse"}
    assert heavy & modules == set()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["get", "a", "b"], ["a", "b"]),
        (["get", "a", "--", "-b", "--"], ["a", "-b", "--"]),
        (["get", "-0", "a"], []),
        (["get", "a", "--strict"], []),
        (["get"], []),
        (["status"], []),
        ([], []),
    ],
)
def test_only_a_get_without_options_is_plain(arguments: list[str], names: list[str]) -> None:
    assert plain_get(arguments) == names


# --- get: on a terminal --------------------------------------------------------------------------


def run_on_terminal(*arguments: str | Path, env: dict[str, str]) -> tuple[bytes, bytes]:
    """What goes to stdout, and what to a terminal on stderr."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=env
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        printed, shown = process.stdout.read(), b""
        while select.select([ours], [], [], 10)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
        assert process.wait() == 0
    os.close(ours)
    return printed, shown


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-progress"]])
def test_progress_is_shown_on_a_terminal_unless_unwanted(
    run_dir: Path, source: Path, tmp_path: Path, options: list[str]
) -> None:
    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        yield DaemonProgress(21 << 20, 8 << 20, 4 << 20, 0, peers=3, waiting_for="a slot")
        yield from caching_in(tmp_path / "cache")(asked)

    with ScriptedDaemon(run_dir, answer) as daemon:
        printed, shown = run_on_terminal(
            "get",
            *options,
            source,
            env={"SWARMCACHE_SOCKET": str(daemon.path), "TERM": "xterm", "COLUMNS": "100"},
        )

    assert printed == copies(tmp_path, source)
    wanted = b"8.0 MiB from 3 peers, 4.0 MiB from the file server, waiting for a slot"
    assert (wanted in shown) == (not options)
    assert (b"12.0/21.0 MiB" in shown) == (not options)


# Without a buffer Python hands the terminal even the nothing that is left to write. So it fails at
# once, and not only where the bar was just being drawn.
ON_TERMINAL = {"TERM": "xterm", "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_a_terminal_that_goes_away_does_not_cost_the_path(
    run_dir: Path, source: Path, tmp_path: Path
) -> None:
    """As after ``swarmcache get FILE >paths & disown; exit``."""
    ours, theirs = pty.openpty()

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        yield DaemonProgress(21 << 20, 8 << 20, 4 << 20, 0, peers=3)
        os.read(ours, 1)  # the bar is there
        os.close(ours)
        yield from caching_in(tmp_path / "cache")(asked)

    with ScriptedDaemon(run_dir, answer) as daemon:
        done = subprocess.run(
            [*COMMAND, "get", source],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={"SWARMCACHE_SOCKET": str(daemon.path), **ON_TERMINAL},
            check=False,
        )
    os.close(theirs)

    assert (done.returncode, done.stdout) == (0, copies(tmp_path, source))


SHOWING = {
    "ProgressDisplay": "Progress(0, b'f', dict.fromkeys(Progress.__slots__, 1))",
    "CopyDisplay": "CopyProgress(0, b'f', 2, 1)",
    "TransferDisplay": "'prefetch', 1, 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("display", SHOWING)
def test_every_bar_ends_quietly_with_its_terminal(display: str) -> None:
    ours, theirs = pty.openpty()
    script = f"""
import sys
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.client import Progress
from swarmcache.cp import CopyProgress
from swarmcache.display import {display}
display = {display}()
display.show({SHOWING[display]})
sys.stdin.read()
for _ in range(2):
    display.show({SHOWING[display]})
    display.clear()
print("done")
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=ON_TERMINAL,
    ) as process:
        os.close(theirs)
        os.read(ours, 1)  # the bar is there
        os.close(ours)
        printed, _ = process.communicate()

    assert (process.returncode, printed) == (0, b"done\n")


@pytest.mark.slow
@pytest.mark.timeout(10)
def test_a_bar_for_many_files_shows_the_latest_of_each_and_keeps_up_with_them() -> None:
    file_count = 20_000
    shown = Console(file=io.StringIO(), force_terminal=True, width=120)
    display = ProgressDisplay(shown)
    for from_peers_bytes in (1, 3):
        for index in range(file_count):
            figures = dict.fromkeys(Progress.__slots__, 1) | {"from_peers_bytes": from_peers_bytes}
            display.show(Progress(index, b"f", figures | {"size_bytes": 10}))
    display.clear()

    assert isinstance(shown.file, io.StringIO)
    assert "58.6 KiB from 1 peers, 19.5 KiB from the file server" in shown.file.getvalue()
    assert "97.7/195.3 KiB" in shown.file.getvalue()


# --- the other commands --------------------------------------------------------------------------

STATUS = NodeStatus(
    node={
        "address": "127.0.0.1:7381",
        "tracker_connected": True,
        "peers": [
            {"node": "127.0.0.1:7391", "connected": True, "distrusted": False},
            {"node": "127.0.0.1:7401", "connected": False, "distrusted": True},
        ],
        "downloads": [
            {
                "version_id": "ab" * 32,
                "path": "/nfs/[data]/train.hdf",
                "size_bytes": 4 << 30,
                "done_bytes": 3 << 30,
                "from_peers_bytes": 2 << 30,
                "from_file_server_bytes": 1 << 30,
                "waiting_for": "chunks",
            }
        ],
        "disk": {
            "capacity_bytes": 100 << 30,
            "free_bytes": 50 << 30,
            "used_bytes": 5 << 30,
            "file_count": 7,
        },
    },
    cluster={
        "nodes": [
            {
                "node": "127.0.0.1:7381",
                "name": "n1",
                "connected_s": 3723.5,
                "capacity_bytes": 100 << 30,
                "free_bytes": 50 << 30,
                "used_bytes": 5 << 30,
                "file_count": 7,
                "replicas": 7,
                "leases": 1,
            }
        ],
        "file_servers": [
            {
                "name": "nfs01:/export",
                "slots_max": 8,
                "slots_used": 1,
                "waiting": 2,
                "read_bytes": 1 << 30,
                "leases": [
                    {
                        "lease_id": 1,
                        "node": "127.0.0.1:7381",
                        "version_id": "ab" * 32,
                        "first": 0,
                        "count": 8,
                        "remaining_s": 2.5,
                    }
                ],
            }
        ],
        "swarms": [
            {
                "version_id": "ab" * 32,
                "size_bytes": 4 << 30,
                "chunk_count": 512,
                "members": 3,
                "complete": 1,
                "unread_chunks": 100,
                "leased_chunks": 8,
                "waiting": 1,
            }
        ],
        "corrupt": [{"node": "127.0.0.1:7401", "reports": 2}],
    },
)


@pytest.mark.slow
def test_status_shows_nodes_swarms_slots_and_distrusted_peers(run_dir: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [STATUS]) as daemon:
        done = run("status", "--socket", daemon.path, env={"COLUMNS": "200"})

    text = done.stdout.decode()
    assert done.returncode == 0
    for expected in (
        "This node: 127.0.0.1:7381, tracker connected, 1 peers",
        "7 files, 5.0 GiB; disk: 50.0 GiB free of 100.0 GiB",
        "Not asked again, having sent wrong bytes: 127.0.0.1:7401",
        "/nfs/[data]/train.hdf",
        "nfs01:/export",
        "1/8",
        "1:02:03",
        "abababababab",
    ):
        assert expected in text


def test_status_as_json_is_one_object(run_dir: Path) -> None:
    with ScriptedDaemon(run_dir, lambda _: [STATUS]) as daemon:
        done = run("status", "--json", "--socket", daemon.path)

    assert json.loads(done.stdout) == {
        "node": STATUS.node,
        "cluster": STATUS.cluster,
        "reason": "",
        "members": None,
    }


def test_status_shows_each_disk_where_there_are_several_or_one_is_lost(run_dir: Path) -> None:
    directories = [
        {"path": "/disk1/cache", "disk": {"file_count": 3, "used_bytes": 1 << 30}, "lost": ""},
        {"path": "/disk2/cache", "disk": {}, "lost": "Input/output error"},
    ]
    answer = NodeStatus({**STATUS.node, "directories": directories}, None)
    with ScriptedDaemon(run_dir, lambda _: [answer]) as daemon:
        text = run("status", "--socket", daemon.path, env={"COLUMNS": "200"}).stdout.decode()

    assert "/disk1/cache: 3 files, 1.0 GiB" in text
    assert "lost: /disk2/cache: Input/output error" in text


STATISTICS = {
    "period_s": 7384.0,
    **{"requests": 110, "hits": 70, "from_peers_chunks": 51, "from_peers_bytes": 3 << 30},
    **{"nodes": 2, "files": 40, "replicas": 60},
    **{"replicas_per_file_mean": 1.5, "replicas_per_file_max": 2},
    "file_servers": [
        {
            **{"name": "nfs01:/export", "reads": 12, "read_bytes": 1 << 30, "writes": 3},
            **{"ran_out": 1, "failed": 4, "waits": 5, "wait_s": 6.5, "wait_max_s": 2.25},
            **{"wait_mean_s": 1.3, "waiting": 6, "waiting_longest_s": 0.5},
        }
    ],
}


def test_statistics_of_the_tracker_as_tables_and_as_json(run_dir: Path) -> None:
    assert STATUS.cluster is not None
    answer = NodeStatus(STATUS.node, {**STATUS.cluster, "statistics": STATISTICS})
    with ScriptedDaemon(run_dir, lambda _: [answer]) as daemon:
        socket = ("--socket", daemon.path)
        shown = run("status", "--tracker", *socket, env={"COLUMNS": "200"})
        as_json = run("status", "--tracker", "--json", *socket)

    assert json.loads(as_json.stdout) == STATISTICS
    text = shown.stdout.decode()
    for expected in ("2:03:04", "110", "70", "3.0 GiB", "1.5", "nfs01:/export", "1.0 GiB", "2.25"):
        assert expected in text


def test_statistics_without_a_tracker_are_an_error(run_dir: Path) -> None:
    answer = NodeStatus(STATUS.node, None, "no connection")
    with ScriptedDaemon(run_dir, lambda _: [answer]) as daemon:
        done = run("status", "--tracker", "--socket", daemon.path)

    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"swarmcache: the tracker cannot be asked: no connection\n"


@pytest.mark.slow
def test_status_without_a_tracker_says_why(run_dir: Path) -> None:
    answer = NodeStatus(STATUS.node, None, "the tracker does not answer")
    with ScriptedDaemon(run_dir, lambda _: [answer]) as daemon:
        done = run("status", "--socket", daemon.path)

    assert b"The cluster cannot be shown: the tracker does not answer" in done.stdout


@pytest.mark.parametrize("command", ["status", "doctor"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_report_that_cannot_be_written_is_said(
    run_dir: Path, command: str, options: list[str]
) -> None:
    with (
        ScriptedDaemon(run_dir, lambda _: [STATUS]) as daemon,
        open("/dev/full", "wb") as full,
    ):
        socket = daemon.path if command == "status" else run_dir / "none"
        words = [*COMMAND, command, *options, f"--socket={socket}", "--config=/dev/null"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, check=False)
        closed = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", *words], stderr=subprocess.PIPE, check=False
        )

    assert done.returncode == closed.returncode == 1
    assert done.stderr == b"swarmcache: cannot write the result: No space left on device\n"
    assert closed.stderr == b"swarmcache: cannot write the result: stdout is closed\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--version"], ["install-cf", "--prefix=x"], ["submit", "--dry-run", "sbatch"]]
)
def test_a_line_that_cannot_be_written_is_said(tmp_path: Path, arguments: list[str]) -> None:
    words = ["sh", "-c", 'exec "$@" > "$0"', "/dev/full", *COMMAND, *arguments]
    done = subprocess.run(words, stderr=subprocess.PIPE, cwd=tmp_path, check=False)
    words[2] = 'exec "$@" >&-'
    closed = subprocess.run(words, stderr=subprocess.PIPE, cwd=tmp_path, check=False)

    assert done.returncode == closed.returncode == 1
    assert done.stderr.endswith(b"swarmcache: cannot write the result: No space left on device\n")
    assert closed.stderr.endswith(b"swarmcache: cannot write the result: stdout is closed\n")
    assert b"Traceback" not in done.stderr


def test_status_without_a_daemon_exits_1(run_dir: Path) -> None:
    done = run("status", "--socket", run_dir / "daemon.sock")

    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"swarmcache: no daemon answers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["daemon", "--listen", "10.0.0.1:7381"], "--listen"),
        (["daemon", "--listen", "nonsense"], "--listen"),
        (["daemon", "--config", "/nowhere/config.toml"], "/nowhere/config.toml"),
        (["tracker", "--listen", "127.0.0.1:99999"], "--listen"),
    ],
)
def test_wrong_settings_are_one_line_on_stderr_and_exit_2(
    arguments: list[str], message: str
) -> None:
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"swarmcache: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["daemon", "tracker"])
def test_an_address_in_use_is_one_line_on_stderr(tmp_path: Path, server: str) -> None:
    places = {
        "daemon": ["--cache-dir", str(tmp_path / "cache"), "--socket", str(tmp_path / "d.sock")],
        "tracker": ["--state-dir", str(tmp_path / "state")],
    }
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        done = run(server, "--config", "/dev/null", "--listen", listen, *places[server])

    assert done.returncode == 1
    assert b"already in use" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_every_command_has_help() -> None:
    for command in ("get", "status", "daemon", "tracker", "demo"):
        done = run(command, "--help")

        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(f"Usage: swarmcache {command}".encode())
