"""``swarmcache cf`` as the callers of CacheManager's client use it: real processes, real pipes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import swarmcache
from swarmcache.cf_install import install
from swarmcache.local_protocol import Answer as DaemonAnswer
from swarmcache.local_protocol import Cached, Original, Progress
from tests.scripted_daemon import Asked, ScriptedDaemon, caching_in

PACKAGE_PARENT = Path(swarmcache.__file__).parent.parent
COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(PACKAGE_PARENT)!r})\n"
    "from swarmcache.cli import main; sys.exit(main())",
    "cf",
]
EOF_S_MAX = 0.1


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def daemon(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptedDaemon]:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ScriptedDaemon(run_dir, caching_in(tmp_path / "cache")) as daemon:
        monkeypatch.setenv("SWARMCACHE_SOCKET", str(daemon.path))
        yield daemon


@pytest.fixture
def nobody(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon listens."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SWARMCACHE_SOCKET", str(run_dir / "daemon.sock"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.hdf"
    file.write_bytes(b"content of the source")
    return file


def run(
    *words: str | bytes | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    command: list[str] = COMMAND,
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*command, *words], capture_output=True, cwd=cwd, env=env, timeout=60, check=False
    )


def copy_of(tmp_path: Path, source: Path | bytes) -> bytes:
    return bytes(tmp_path / "cache/user") + bytes(source)


def lines(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    return done.stderr.decode().splitlines()


# --- what is printed -----------------------------------------------------------------------------


def test_one_path_goes_to_stdout_and_the_old_texts_to_stderr(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    first, second = run(source), run(source)

    assert (first.returncode, first.stdout) == (0, copy_of(tmp_path, source) + b"\n")
    assert lines(first) == [f"LOG: request: {source}", f"LOG: copied peers:{source}"]
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert lines(second) == [f"LOG: request: {source}", "LOG: using existing file"]


@pytest.mark.parametrize(
    ("progress", "cached", "told"),
    [
        (
            Progress(9, 0, 0, 0, 0),
            Cached(b"", False, 0, 21),
            ["LOG: start copying {}", "LOG: copied {}"],
        ),
        (
            Progress(9, 0, 0, 0, 0, waiting_for="a slot of nfs01:/export"),
            Cached(b"", False, 11, 10),
            [
                "LOG: start copying {}",
                "LOG: no copy slot available. waiting",
                "LOG: copied {}",
            ],
        ),
        (
            Progress(9, 0, 0, 0, 0, joined=True),
            Cached(b"", False, 21, 0),
            ["LOG: file transfer in progress. wait", "LOG: using existing file"],
        ),
    ],
)
def test_a_transfer_is_told_in_the_old_texts(
    run_dir: Path,
    source: Path,
    tmp_path: Path,
    nobody: None,
    progress: Progress,
    cached: Cached,
    told: list[str],
) -> None:
    cached.path = bytes(source)

    with ScriptedDaemon(run_dir, lambda _: [progress, progress, cached]):
        done = run(source)

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert lines(done)[1:] == [text.format(source) for text in told]


def test_the_name_is_resolved(daemon: ScriptedDaemon, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "sub").mkdir()

    for name in ("link", "sub/../source.hdf", "./source.hdf"):
        assert run(name, cwd=tmp_path).stdout == copy_of(tmp_path, source) + b"\n"


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_what_is_no_file_is_named_its_path_printed_and_1_the_exit_code(
    daemon: ScriptedDaemon, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)

    done = run(path)

    assert (done.returncode, done.stdout) == (1, bytes(path) + b"\n")
    assert lines(done)[1:] == [f"ERROR: file not found '{path}'"]


def test_without_a_daemon_the_original_is_printed_and_0_the_exit_code(
    nobody: None, source: Path
) -> None:
    done = run(source)

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert lines(done)[1].startswith("ERROR: no daemon answers")
    assert lines(done)[2:] == ["ERROR: cannot connect to server"]


def test_an_answer_that_is_no_copy_is_told_with_its_reason(
    run_dir: Path, source: Path, nobody: None
) -> None:
    reason = "not enough free space: it needs 9 bytes"
    with ScriptedDaemon(run_dir, lambda _: [Original(reason)]):
        done = run(source)

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert lines(done)[1:] == [f"LOG: {reason}", "LOG: no local cache available"]


def test_a_setting_makes_it_exit_3_where_the_path_is_not_a_cached_one(
    nobody: None, source: Path, daemon_config: Path
) -> None:
    environment = {**os.environ, "SWARMCACHE_CONFIG": str(daemon_config)}

    assert run(source, env=environment).returncode == 3
    assert run(source, env={**environment, "SWARMCACHE_CF__STRICT": "0"}).returncode == 0


@pytest.fixture
def daemon_config(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text("[cf]\nstrict = true\n")
    return file


@pytest.mark.parametrize("words", [["--help"], ["-V"], [], ["-cp", "S"], ["--config"], ["-ll"]])
def test_what_prints_no_path_has_an_empty_stdout_and_exits_1(words: list[str]) -> None:
    done = run(*words)

    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr


def test_the_command_is_listed_and_has_its_own_help() -> None:
    listed = run("--help", command=COMMAND[:-1])

    assert b"CacheManager's client" in listed.stdout
    assert b"install-cf" in listed.stdout
    assert run("-h").stderr.startswith(b"usage: cf [OPTIONS] FILE")


def test_unknown_options_are_a_warning_and_files_after_the_first_too(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    done = run("--frobnicate", source, "other", "-m", "2")

    assert (done.returncode, done.stdout) == (0, copy_of(tmp_path, source) + b"\n")
    assert lines(done)[:3] == [
        "WARN: unknown option: '--frobnicate'",
        "WARN: -m has no meaning any more: all copies are used",
        "WARN: ignored: 'other'",
    ]


def test_ping_tells_whether_a_daemon_answers(
    daemon: ScriptedDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--ping").returncode == 0
    monkeypatch.setenv("SWARMCACHE_SOCKET", "/nowhere/daemon.sock")
    assert run("--ping").returncode == 1


def test_the_old_settings_are_read_and_what_has_no_meaning_is_named(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path
) -> None:
    (tmp_path / ".cmclient").write_text('MASTER_HOST = "old"\nMIN_AGE = 86400\n')

    done = run(source)

    assert done.returncode == 0
    assert lines(done)[0] == (
        f"WARN: {tmp_path}/.cmclient: no meaning any more, see the daemon's settings:"
        " MASTER_HOST, MIN_AGE"
    )


# --- -d ------------------------------------------------------------------------------------------


def test_d_prints_where_a_file_may_be_written_and_needs_neither_daemon_nor_file(
    nobody: None, tmp_path: Path
) -> None:
    (tmp_path / ".cmclient").write_text(f'CACHE_DIR = "{tmp_path}/local/$(USER)"\n')

    done = run("-d", "out/lattice.cache.1", cwd=tmp_path)

    path = Path(os.fsdecode(done.stdout.removesuffix(b"\n")))
    assert done.returncode == 0
    assert path.is_relative_to(tmp_path / "local")
    assert str(path).endswith(f"{tmp_path}/out/lattice.cache.1")
    path.write_text("can be written")


def test_d_makes_no_path_out_of_a_name_in_a_directory_that_is_removed(
    nobody: None, tmp_path: Path
) -> None:
    (tmp_path / ".cmclient").write_text(f"CACHE_DIR = {tmp_path}/local\n")
    (tmp_path / "gone").mkdir()
    in_directory = ["sh", "-c", 'cd "$0" && rmdir "$0" && "$@"', str(tmp_path / "gone")]

    done = run("-d", "file", command=[*in_directory, *COMMAND])

    assert (done.returncode, done.stdout) == (0, b"file\n")
    assert "there is no current directory" in lines(done)[0]
    assert {path.name for path in tmp_path.iterdir()} == {".cmclient", "run"}


def test_d_prints_the_path_itself_where_others_could_put_something_in_the_way(
    nobody: None, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / ".cmclient").write_text(f"CACHE_DIR = {tmp_path}/open/mine\n")

    done = run("-d", tmp_path / "file")

    assert (done.returncode, done.stdout) == (0, bytes(tmp_path / "file") + b"\n")
    assert "may be written by others" in lines(done)[0]


def test_d_without_a_daemon_uses_no_cache_directory_into_which_others_can_put_something(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon looks at its directories when it starts. The default is below /var/tmp, where
    somebody else may have made it."""
    monkeypatch.setenv("SWARMCACHE_CACHE__DIR", str(tmp_path / "place/cache"))
    (tmp_path / "place").mkdir()

    mine = run("-d", tmp_path / "file")
    (tmp_path / "place").chmod(0o777)
    done = run("-d", tmp_path / "file")

    path = Path(os.fsdecode(mine.stdout.removesuffix(b"\n")))
    assert path.is_relative_to(tmp_path / "place/cache") and path.parent.is_dir()
    assert (done.returncode, done.stdout) == (0, bytes(tmp_path / "file") + b"\n")
    assert "may be written by others" in lines(done)[0]


def test_d_prints_the_directory_that_it_has_looked_at_whatever_a_link_to_it_becomes(
    nobody: None, tmp_path: Path
) -> None:
    """In a directory like /tmp, the link may be somebody else's."""
    mine, link = tmp_path / "mine", tmp_path / "sticky/me"
    for directory in (mine, link.parent):
        directory.mkdir()
    link.parent.chmod(0o1777)
    link.symlink_to(mine)
    (tmp_path / ".cmclient").write_text(f"CACHE_DIR = {link}\n")

    done = run("-d", tmp_path / "file")

    assert (done.returncode, done.stdout) == (0, bytes(mine) + bytes(tmp_path / "file") + b"\n")


# --- how it is called ----------------------------------------------------------------------------


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Like /usr/local, but with a name that a shell script must quote."""
    install(tmp_path / "usr $local")
    return tmp_path / "usr $local"


@pytest.mark.parametrize("how", ["path", "PATH", "by another name"])
def test_it_is_called_by_its_path_or_found_in_path(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path, prefix: Path, how: str
) -> None:
    """RASR's argv[0] is "cf", whatever the path; a job's Python variables must do no harm."""
    socket = {"SWARMCACHE_SOCKET": str(daemon.path)}
    hostile = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere", "PYTHONSTARTUP": "x"}
    (tmp_path / "os.py").write_text("raise SystemExit('the wrong module')")
    environment = {**socket, **hostile, "PATH": f"{prefix}/bin:/usr/bin:/bin"}
    executable: str | Path = {
        "path": prefix / "cache-manager/cf",
        "PATH": Path("cf"),
        "by another name": prefix / "bin/cf",
    }[how]

    done = subprocess.run(
        ["sh", "-c", '"$0" "$1"', executable, source],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    renamed = subprocess.run(
        ["cf", source],
        executable=prefix / "cache-manager/cf",
        capture_output=True,
        env=environment,
        check=False,
    )

    for each in (done, renamed):
        assert (each.returncode, each.stdout) == (0, copy_of(tmp_path, source) + b"\n"), each.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [b"not-\xff-utf8", b"with space", b"-dash", b"--", b"$(touch evil)", b"a;b `c`"]
)
@pytest.mark.parametrize("environment", [{}, {"LANG": "C", "LC_ALL": "C"}])
def test_any_name_will_do_and_no_variable_is_needed(
    daemon: ScriptedDaemon,
    tmp_path: Path,
    prefix: Path,
    name: bytes,
    environment: dict[str, str],
) -> None:
    path = bytes(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_text("1")
    before = sorted(os.listdir(tmp_path))

    done = run(
        "--",
        name,
        cwd=tmp_path,
        env={**environment, "SWARMCACHE_SOCKET": str(daemon.path)},
        command=[str(prefix / "cache-manager/cf")],
    )

    assert (done.returncode, done.stdout) == (0, copy_of(tmp_path, path) + b"\n"), done.stderr
    assert sorted({*os.listdir(tmp_path)} - {"cache"}) == before


def test_it_works_with_an_empty_environment(source: Path, prefix: Path) -> None:
    done = run(source, env={}, command=[str(prefix / "cache-manager/cf")], cwd=Path("/"))

    assert done.returncode == 0
    assert os.path.samefile(done.stdout.removesuffix(b"\n"), source) or done.stdout.endswith(
        bytes(source) + b"\n"
    )


def test_without_its_python_it_prints_the_original(source: Path, tmp_path: Path) -> None:
    install(tmp_path / "local")
    program = tmp_path / "local/cache-manager/cf"
    program.write_text(program.read_text().replace(sys.executable, "/nowhere/python"))
    (tmp_path / "link").symlink_to(source)

    done = run("link", cwd=tmp_path, command=[str(program)])
    missing = run("nothing", cwd=tmp_path, command=[str(program)])

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert b"run swarmcache install-cf again" in done.stderr
    assert (missing.returncode, missing.stdout) == (1, b"")


# --- pipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [COMMAND, [*COMMAND[:-1], "get"]], ids=["cf", "get"])
def test_stdin_is_not_read_and_stdout_ends_with_the_process(
    daemon: ScriptedDaemon, source: Path, tmp_path: Path, command: list[str]
) -> None:
    """RASR reads until the end of the pipe. Somebody that inherits it would keep all from ending.

    The best of some runs, since nobody says when a busy machine runs the thread that reads.
    """
    late_s = []
    for _ in range(5):
        with subprocess.Popen(
            [*command, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            ends_s: list[float] = []
            printed: list[bytes] = []

            def read(
                process: subprocess.Popen[bytes] = process,
                printed: list[bytes] = printed,
                ends_s: list[float] = ends_s,
            ) -> None:
                assert process.stdout is not None
                printed.append(process.stdout.read())
                ends_s.append(time.monotonic())

            reader = threading.Thread(target=read)
            reader.start()
            assert process.wait(timeout=30) == 0
            ended_s = time.monotonic()
            reader.join(timeout=30)
            assert printed == [copy_of(tmp_path, source) + b"\n"]
            late_s.append(ends_s[0] - ended_s)
    assert min(late_s) < EOF_S_MAX
    assert daemon.path.exists()


def test_nobody_needs_to_read_stderr(run_dir: Path, source: Path, nobody: None) -> None:
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run([*COMMAND, source], stdout=subprocess.PIPE, stderr=writing, check=False)
    os.close(writing)

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")


def test_streams_may_be_closed(daemon: ScriptedDaemon, source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" <&- 2>&-', "sh", *COMMAND, source], stdout=subprocess.PIPE, check=False
    )
    without_stdout = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, source], stderr=subprocess.PIPE, check=False
    )

    assert (done.returncode, done.stdout) == (0, copy_of(tmp_path, source) + b"\n")
    assert without_stdout.returncode == 1
    assert b"ERROR: cannot write the result: stdout is closed" in without_stdout.stderr


def test_a_full_disk_below_stdout_is_no_success(daemon: ScriptedDaemon, source: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, source], stdout=full, stderr=subprocess.PIPE, check=False)

    assert done.returncode == 1
    assert b"ERROR: cannot write the result: No space left on device" in done.stderr


def test_a_hit_imports_nothing_that_takes_its_time(daemon: ScriptedDaemon, source: Path) -> None:
    run(source)
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND[1:], source],
        capture_output=True,
        text=True,
        check=True,
    ).stderr

    modules = {line.rpartition("|")[2].strip() for line in imports.splitlines()}
    assert "swarmcache.cf" in modules
    heavy = {"typer", "rich", "msgspec", "asyncio", "json", "socket", "logging", "argparse"}
    assert (heavy | {"swarmcache.cf_actions", "swarmcache.config"}) & modules == set()


def test_a_daemon_that_goes_away_is_no_obstacle(run_dir: Path, source: Path, nobody: None) -> None:
    def answer(_: Asked) -> Iterable[DaemonAnswer | bytes]:
        return [Progress(9, 0, 0, 0, 0), b""]  # hangs up

    with ScriptedDaemon(run_dir, answer):
        done = run(source)

    assert (done.returncode, done.stdout) == (0, bytes(source) + b"\n")
    assert lines(done)[-1] == "LOG: no local cache available"
