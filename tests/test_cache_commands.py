"""ls, rm, pin, unpin and verify as people use them: real daemons, processes and exit codes."""

from __future__ import annotations

import base64
import json
import os
import pwd
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import msgspec
import pytest

from swarmcache.local_protocol import (
    LINE_MAX_BYTES,
    Answer,
    CachedFile,
    End,
    Failed,
    Get,
    Ls,
    Outcome,
    Rm,
    Working,
)
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.box import wait_until
from tests.disk_helpers import needs_root
from tests.local_daemons import COMMAND, PATIENCE_S, LocalDaemons, LocalNode
from tests.scripted_daemon import HANG_UP, ScriptedDaemon

pytestmark = pytest.mark.slow

MIB = 1 << 20
ANN, BEN = 1001, 1002
HOSTILE_NAMES = [
    b"new\nline",
    b"tab\tand \\backslash",
    b"not-\xff\xfe-utf8",
    b"\x1b[31mred\x1b[0m",
    b"[bold]markup[.bold]",
    b"-dash",
    b"x" * 255,
    "überlang\u202eabc".encode(),
]


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user can reach, on a disk with ACLs."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="swarmcache-test-"))
    directory.chmod(0o755)
    yield directory
    rmtree(directory)


@pytest.fixture
def local(open_dir: Path) -> Iterator[LocalDaemons]:
    with LocalDaemons(open_dir) as local:
        yield local


@pytest.fixture
def node(local: LocalDaemons) -> LocalNode:
    local.start_tracker()
    return local.start_daemon()


@pytest.fixture
def sources(open_dir: Path) -> Path:
    directory = open_dir / "sources"
    directory.mkdir()
    return directory


def write(directory: Path, *names: str, size_bytes: int = 10) -> list[Path]:
    files = [directory / name for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(os.urandom(size_bytes))
    return files


def names(listed: list[dict[str, object]]) -> list[str]:
    return [Path(str(file["path"])).name for file in listed]


# --- ls ------------------------------------------------------------------------------------------


def test_ls_shows_what_is_cached(node: LocalNode, sources: Path) -> None:
    (file,) = write(sources, "train.hdf", size_bytes=3 * MIB)
    (copy,) = node.get(file)
    node.run("pin", file)

    table = node.run("ls")
    (listed,) = node.listed()

    heading, row = table.stdout.decode().splitlines()
    assert heading.split() == ["size", "age", "used", "replicas", "state", "pinned", "by", "path"]
    size, unit, age, used, replicas, _, pinned_by, path = row.split()
    assert (size, unit, replicas, path) == ("3.0", "MiB", "0", str(file))
    assert age.endswith("s") and used.endswith("s")
    assert pinned_by == pwd.getpwuid(os.getuid()).pw_name
    assert (table.returncode, table.stderr) == (0, b"")
    assert 0 <= listed.pop("idle_s") <= listed.pop("age_s") <= PATIENCE_S
    assert len(listed.pop("version_id")) == 64
    assert listed.pop("in_use") is False
    assert listed == {
        "path": str(file),
        "copies": [os.fsdecode(copy)],
        "size_bytes": 3 * MIB,
        "pinned_by": [pinned_by],
        "verified": True,
        "replicas_elsewhere": 0,
    }


def test_ls_of_an_empty_cache_prints_no_file(node: LocalNode) -> None:
    done = node.run("ls")

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert node.listed() == []


def test_a_path_may_be_of_the_source_of_the_copy_or_of_a_directory(
    node: LocalNode, sources: Path
) -> None:
    write(sources, "a/1", "a/2", "a.3", "b/4")
    copies = node.get(sources / "a", sources / "a.3", sources / "b")
    (sources / "link").symlink_to("a")

    assert names(node.listed("--sort=path", sources)) == ["a.3", "1", "2", "4"]
    assert names(node.listed("--sort=path", sources / "a")) == ["1", "2"]
    assert names(node.listed("--sort=path", sources / "link")) == ["1", "2"]
    assert names(node.listed("--sort=path", copies[0])) == ["1", "2"]
    assert names(node.listed(copies[1])) == ["a.3"]
    assert len(node.listed(node.cache_dir)) == len(node.listed("/")) == 4
    rmtree(sources / "b")
    assert names(node.listed(sources / "b")) == ["4"], "also when the source is gone"


def test_ls_names_what_is_not_cached_and_lists_the_rest(node: LocalNode, sources: Path) -> None:
    cached, other = write(sources, "cached", "other")
    node.get(cached)

    done = node.run("ls", "--json", other, cached, sources / "nothing")

    assert done.returncode == 1
    assert names(json.loads(done.stdout)) == ["cached"]
    assert done.stderr.decode().splitlines() == [
        f"swarmcache: '{other}': not cached",
        f"swarmcache: '{sources}/nothing': not cached",
    ]


def test_ls_sorts(node: LocalNode, sources: Path) -> None:
    for name, size_bytes in (("c", 20), ("a", 10), ("b", 30)):
        node.get(*write(sources, name, size_bytes=size_bytes))
    node.get(sources / "c")

    for sort, expected in (("used", "cba"), ("age", "bac"), ("size", "bca"), ("path", "abc")):
        assert "".join(names(node.listed("--sort", sort))) == expected
        assert "".join(names(node.listed("--sort", sort, "-r"))) == expected[::-1]
    assert "".join(names(node.listed())) == "cba"
    assert sorted(names(node.listed("--sort", "none"))) == ["a", "b", "c"]


def test_names_with_anything_in_them_are_one_line_each_and_can_be_told_exactly(
    node: LocalNode, sources: Path
) -> None:
    files = [bytes(sources) + b"/" + name for name in HOSTILE_NAMES]
    for file in files:
        Path(os.fsdecode(file)).write_bytes(b"1")
    node.get(*files)

    table = node.run("ls").stdout
    listed = node.listed()

    assert len(table.splitlines()) == 1 + len(files)
    assert not any(byte < 32 and byte != 10 for byte in table)
    assert b"new\\nline" in table and b"tab\\tand \\\\backslash" in table
    assert b"not-\\xff\\xfe-utf8" in table and b"\\x1b[31mred" in table
    assert b"[bold]markup[.bold]" in table and b"\\u202e" in table
    exact = [
        base64.b64decode(str(file["path_base64"])) if "path_base64" in file else file["path"]
        for file in listed
    ]
    assert {os.fsencode(str(path)) if isinstance(path, str) else path for path in exact} == set(
        files
    )
    assert sum("path_base64" in file for file in listed) == 1
    done = node.run("rm", "--", *files)
    assert (done.returncode, done.stderr) == (0, b"")
    assert node.listed() == []


def test_ls_counts_the_replicas_on_other_nodes(local: LocalDaemons, sources: Path) -> None:
    tracker = local.start_tracker()
    first, second, third = (local.start_daemon(name) for name in "abc")
    both, single = write(sources, "both", "single")
    first.get(both, single)
    second.get(both)
    third.get(both)

    def elsewhere() -> dict[str, object]:
        return {Path(str(file["path"])).name: file["replicas_elsewhere"] for file in first.listed()}

    wait_until(lambda: elsewhere() == {"both": 2, "single": 0}, PATIENCE_S, "two other holders")
    second.run("rm", both)
    wait_until(lambda: elsewhere() == {"both": 1, "single": 0}, PATIENCE_S, "one other holder")

    for server in (tracker, second, third):  # a node that is left could stand in for the tracker
        server.end()
    wait_until(lambda: elsewhere() == {"both": None, "single": None}, PATIENCE_S, "nobody to ask")
    assert all(row.split()[4] == "-" for row in first.run("ls").stdout.decode().splitlines()[1:])


# --- rm ------------------------------------------------------------------------------------------


def test_rm_takes_files_out_of_the_cache_and_leaves_the_sources(
    node: LocalNode, sources: Path
) -> None:
    write(sources, "a/1", "a/2")
    single, kept = write(sources, "single", "kept")
    copies = node.get(sources / "a", single, kept)

    done = node.run("rm", sources / "a", copies[1])

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert names(node.listed()) == ["kept"]
    assert not os.path.exists(copies[0]) and not os.path.exists(copies[1])
    assert os.path.exists(copies[2])
    assert single.exists() and (sources / "a/1").exists()
    assert node.status()["node"]["disk"]["file_count"] == 1
    assert node.get(single) == [copies[1]], "it can be fetched again"


def test_rm_names_what_is_not_cached_and_removes_the_rest(node: LocalNode, sources: Path) -> None:
    cached, other = write(sources, "cached", "other")
    node.get(cached)

    done = node.run("rm", "--json", other, cached)

    assert done.returncode == 1
    assert [(file["path"], file["done"]) for file in json.loads(done.stdout)] == [
        (str(other), False),
        (str(cached), True),
    ]
    assert done.stderr.decode() == f"swarmcache: '{other}': not cached\n"
    assert node.listed() == []


def test_a_pinned_file_stays_until_it_is_unpinned_or_forced(node: LocalNode, sources: Path) -> None:
    (first, second) = write(sources, "first", "second")
    (copy, _) = node.get(first, second)
    assert node.run("pin", first).returncode == node.run("pin", sources).returncode == 0

    refused = node.run("rm", sources)

    assert refused.returncode == 1
    assert f"'{first}': pinned by ".encode() in refused.stderr
    assert b"unpin it first, or use --force" in refused.stderr
    assert os.path.exists(copy) and len(node.listed()) == 2
    assert node.run("rm", "--force", second).returncode == 0
    assert node.run("unpin", first).returncode == node.run("unpin", first).returncode == 0
    assert node.listed()[0]["pinned_by"] == []
    assert node.run("rm", first).returncode == 0
    assert node.get(second) and node.listed()[0]["pinned_by"] == [], "the pin went with the file"


def test_what_is_being_fetched_is_left_alone(local: LocalDaemons, sources: Path) -> None:
    node = local.start_daemon()  # without a tracker nothing can be read
    (file,) = write(sources, "file")
    done = node.run("get", "--timeout=0", file)
    assert (done.returncode, done.stdout) == (0, bytes(file) + b"\n")

    for path in (file, sources):
        refused = node.run("rm", path)
        assert refused.returncode == 1
        assert refused.stderr.decode() == (
            f"swarmcache: '{file}': it is being fetched, and was left alone\n"
        )
    assert len(node.status()["node"]["downloads"]) == 1


def test_pin_and_unpin_name_what_is_not_cached(node: LocalNode, sources: Path) -> None:
    (file,) = write(sources, "file")

    for command in ("pin", "unpin"):
        done = node.run(command, file)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode() == f"swarmcache: '{file}': not cached\n"


def test_pins_outlive_a_restart(local: LocalDaemons, sources: Path) -> None:
    local.start_tracker()
    node = local.start_daemon()
    (file,) = write(sources, "file")
    node.get(file)
    node.run("pin", file)
    node.end()

    again = local.start_daemon()

    assert len(again.listed()[0]["pinned_by"]) == 1
    assert again.run("rm", file).returncode == 1


def test_a_file_in_use_is_shown_and_can_be_removed_all_the_same(
    node: LocalNode, sources: Path
) -> None:
    used, idle = write(sources, "used", "idle")
    copy, _ = node.get(used, idle)
    with open(copy, "rb") as file:
        wait_until(
            lambda: (
                {f["path"]: f["in_use"] for f in node.listed()}
                == {str(used): True, str(idle): False}
            ),
            PATIENCE_S,
            "the open file to be seen",
        )
        states = [row.split()[5:7] for row in node.run("ls", "--sort=path").stdout.splitlines()]
        done = node.run("rm", used, idle)

        assert states[1][0] == b"idle" and states[2] == [b"in", b"use"]
        assert done.returncode == 0
        assert done.stderr.decode() == (
            f"swarmcache: '{used}': it is in use: whoever has it open keeps it until it is closed\n"
        )
        assert not os.path.exists(copy)
        assert file.read() == used.read_bytes()


# --- verify --------------------------------------------------------------------------------------


def test_verify_digests_files_and_says_so(node: LocalNode, sources: Path) -> None:
    files = write(sources, "a", "b\n", size_bytes=1000)
    node.get(*files)

    done = node.run("verify")
    (single,) = json.loads(node.run("verify", "--json", files[0]).stdout)
    missing = node.run("verify", files[0], sources / "nothing")

    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [f"{sources}/a: ok", f"{sources}/b\\n: ok"]
    assert single == {
        "path": str(files[0]),
        "done": True,
        "note": "",
        "size_bytes": 1000,
        "rotten_chunks": 0,
    }
    assert missing.returncode == 1
    assert missing.stdout.decode() == f"{files[0]}: ok\n"
    assert missing.stderr.decode() == f"swarmcache: '{sources}/nothing': not cached\n"


def test_a_rotten_copy_is_found_and_completed_from_other_nodes(
    local: LocalDaemons, sources: Path
) -> None:
    local.start_tracker()
    first, second = local.start_daemon("a"), local.start_daemon("b")
    (file,) = write(sources, "file", size_bytes=3 * MIB)
    (copy,) = first.get(file)
    second.get(file)
    os.chmod(copy, 0o600)
    with open(copy, "r+b") as rotten:
        rotten.seek(1_000_000)
        byte = rotten.read(1)
        rotten.seek(1_000_000)
        rotten.write(bytes([byte[0] ^ 1]))
    file.rename(sources / "moved")  # nobody can read it from the file server any more

    done = first.run("verify", file)

    assert (done.returncode, done.stdout.decode()) == (1, f"{file}: rotten\n")
    assert b"1 of 12 chunks were rotten" in done.stderr
    wait_until(
        lambda: first.run("ls", file).returncode == 0, PATIENCE_S, "the copy to be complete again"
    )
    assert first.run("verify", file).returncode == 0
    assert Path(os.fsdecode(copy)).read_bytes() == (sources / "moved").read_bytes()


# --- hold ----------------------------------------------------------------------------------------


def held_get(connection: socket.socket, file: Path) -> dict[str, Any]:
    """Get a file, and keep it as long as the connection is open."""
    request = Get(bytes(file), hold=1)
    line = msgspec.json.encode(request) + b"\n"
    with open(file, "rb") as opened:
        socket.send_fds(connection, [line], [opened.fileno()])
    answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
    return answer


def test_what_a_client_holds_is_not_evicted_until_its_connection_closes(
    local: LocalDaemons, sources: Path
) -> None:
    local.start_tracker()
    max_usage_bytes = UNCOUNTED_MAX_BYTES + 5 * MIB // 2  # room for one file, not for two
    settings = f"[cache]\nmax_usage = {max_usage_bytes}\nmin_free = 0\nmin_age = 0\n"
    node = local.start_daemon(settings=settings)
    first, second, third = write(sources, "first", "second", "third", size_bytes=2 * MIB)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(node.socket))
        for hit in (False, True):  # held twice, which counts once
            answer = held_get(connection, first)
            assert answer.get("held") is True and answer["hit"] is hit, answer

        refused = node.run("get", second)

        assert refused.stdout == bytes(second) + b"\n"
        assert b"in use" in refused.stderr
        assert [(f["path"], f["in_use"]) for f in node.listed()] == [(str(first), True)]
    wait_until(
        lambda: not any(f["in_use"] for f in node.listed()), PATIENCE_S, "the hold to be released"
    )
    node.get(second)
    node.get(third)
    assert names(node.listed()) == ["third"]


# --- several users -------------------------------------------------------------------------------


@needs_root
def test_each_user_sees_and_removes_his_own_and_root_all(node: LocalNode, sources: Path) -> None:
    both, of_ann = write(sources, "both", "of_ann")
    by_ann = node.get(both, of_ann, uid=ANN)
    by_ben = node.get(both, uid=BEN)
    ann_dir = node.cache_dir / str(ANN)
    inode = os.stat(by_ann[0]).st_ino
    assert os.stat(by_ben[0]).st_ino == inode

    assert sorted(names(node.listed(uid=ANN))) == ["both", "of_ann"]
    assert names(node.listed(uid=BEN)) == ["both"]
    assert node.listed(uid=BEN)[0]["copies"] == [os.fsdecode(by_ben[0])]
    assert sorted(names(node.listed())) == ["both", "of_ann"]
    for path in (of_ann, ann_dir, by_ann[0]):
        done = node.run("ls", path, uid=BEN)
        assert (done.returncode, done.stdout) == (1, b""), "not even that it is there"
        assert node.run("rm", path, uid=BEN).returncode == 1

    assert node.run("rm", both, uid=ANN).returncode == 0
    assert not os.path.exists(by_ann[0])
    assert os.stat(by_ben[0]).st_ino == inode, "the file goes with the last user"
    assert names(node.listed(ann_dir)) == ["of_ann"]
    node.get(both, uid=ANN)
    assert node.run("rm", ann_dir).returncode == 0, "root removes one user's copies"
    assert [os.path.exists(path) for path in (*by_ann, *by_ben)] == [False, False, True]
    node.get(both, uid=ANN)
    assert node.run("rm", both).returncode == 0, "root removes a file for everybody"
    assert node.listed() == []


@needs_root
def test_a_pin_is_a_users_own(node: LocalNode, sources: Path) -> None:
    (file,) = write(sources, "file")
    by_ann, by_ben = node.get(file, uid=ANN), node.get(file, uid=BEN)
    node.run("pin", file, uid=ANN)

    assert node.listed(uid=BEN)[0]["pinned_by"] == [str(ANN)]
    assert node.run("unpin", file, uid=BEN).returncode == 0
    assert node.listed()[0]["pinned_by"] == [str(ANN)], "it was not Ben's to take away"
    refused = node.run("unpin", "--all-users", file, uid=BEN)
    assert refused.returncode == 1
    assert b"only root may take away the pins of other users" in refused.stderr
    assert node.run("rm", file, uid=ANN).returncode == 1
    assert node.run("rm", file).returncode == 1
    assert node.run("rm", file, uid=BEN).returncode == 0, "his own copy is not pinned"
    assert os.path.exists(by_ann[0]) and not os.path.exists(by_ben[0])
    assert node.run("unpin", file).returncode == 0, "root's own pin, of which there is none"
    assert node.listed()[0]["pinned_by"] == [str(ANN)]
    assert node.run("unpin", "--all-users", file).returncode == 0
    assert node.listed()[0]["pinned_by"] == []
    assert node.run("rm", file, uid=ANN).returncode == 0
    assert node.listed() == []


@needs_root
def test_what_another_user_fetches_is_not_told(local: LocalDaemons, sources: Path) -> None:
    node = local.start_daemon()
    (file,) = write(sources, "file")
    node.run("get", "--timeout=0", file, uid=ANN)

    assert b"being fetched" in node.run("rm", file, uid=ANN).stderr
    assert b"not cached" in node.run("rm", file, uid=BEN).stderr
    assert b"being fetched" in node.run("rm", file).stderr


# --- usage, and when things go wrong -------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls", "--sort", "colour"],
        ["ls", ""],
        ["rm"],
        ["rm", ""],
        ["pin"],
        ["unpin"],
        ["rm", "/" + "x" * 5000],
    ],
)
def test_wrong_usage_exits_2_and_asks_nobody(arguments: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with ScriptedDaemon(tmp_path, lambda _: [End()]) as daemon:
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, env={}, cwd=tmp_path, check=False
        )

        assert (done.returncode, done.stdout) == (2, b"")
        assert daemon.asked == []


def test_every_command_has_help_that_tells_its_exit_codes() -> None:
    for command in ("ls", "rm", "pin", "unpin", "verify"):
        done = subprocess.run([*COMMAND, command, "--help"], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(f"Usage: swarmcache {command}".encode())
        assert b"--json" in done.stdout
        assert b"Exit code" in done.stdout


FILE = CachedFile(b"/nfs/f", "ab" * 32, 10, 1.0, 1.0, [b"/c/u/nfs/f"], [], True, True, 3)


def ask(daemon: ScriptedDaemon, *arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    command, *rest = arguments
    return subprocess.run(
        [*COMMAND, command, f"--socket={daemon.path}", *rest],
        capture_output=True,
        check=False,
        env={},
    )


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (HANG_UP, b"the daemon went away"),
        (Failed("the disk failed"), b"the disk failed"),
        (b"nonsense\n", b"not an answer"),
    ],
)
def test_half_a_listing_does_not_look_like_a_whole_one(
    tmp_path: Path, end: Answer | bytes, said: bytes
) -> None:
    tmp_path.chmod(0o700)
    with ScriptedDaemon(tmp_path, lambda _: [FILE, Working(), end]) as daemon:
        done = ask(daemon, "ls", "--json", "--sort=none")

    assert done.returncode == 1
    assert said in done.stderr
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout)


def test_more_paths_than_fit_into_a_line_are_several_requests(tmp_path: Path) -> None:
    paths = [b"/nfs/" + b"%d" % number + b"x" * 200 for number in range(1000)]
    tmp_path.chmod(0o700)
    with ScriptedDaemon(tmp_path, lambda _: [End()]) as daemon:
        done = ask(daemon, "rm", *paths)

        assert (done.returncode, done.stderr) == (0, b"")
        assert daemon.connections == 1
        requests = [asked.request for asked in daemon.asked]
    assert len(requests) > 1
    batches = [request.paths for request in requests if isinstance(request, Rm)]
    assert [path for batch in batches for path in batch] == paths
    assert all(sum(len(path) * 4 / 3 for path in batch) < LINE_MAX_BYTES for batch in batches)


def test_ls_without_a_path_asks_for_everything(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with ScriptedDaemon(tmp_path, lambda _: [FILE, End()]) as daemon:
        done = ask(daemon, "ls")

        assert [asked.request for asked in daemon.asked] == [Ls([])]
    assert done.stdout.decode().splitlines()[1].split() == (
        ["10", "B", "1s", "1s", "3", "in", "use", "-", "/nfs/f"]
    )


def test_a_result_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with (
        ScriptedDaemon(tmp_path, lambda _: [FILE, End()]) as daemon,
        open("/dev/full", "w") as full,
    ):
        command = [*COMMAND, "ls", f"--socket={daemon.path}"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        closed = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False
        )

    assert done.returncode == 1
    assert done.stderr == b"swarmcache: cannot write the result: No space left on device\n"
    assert closed.returncode == 1
    assert closed.stderr == b"swarmcache: cannot write the result: stdout is closed\n"


@pytest.mark.parametrize("command", ["rm", "pin", "unpin"])
def test_who_prints_nothing_needs_no_stdout(tmp_path: Path, command: str) -> None:
    tmp_path.chmod(0o700)
    with ScriptedDaemon(tmp_path, lambda _: [Outcome(b"/f", True), End()]) as daemon:
        words = [*COMMAND, command, f"--socket={daemon.path}", "/f"]
        done = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", *words], stderr=subprocess.PIPE, check=False
        )

        assert (done.returncode, done.stderr) == (0, b"")
        assert len(daemon.asked) == 1


def test_without_a_daemon_there_is_one_line_on_stderr(tmp_path: Path) -> None:
    for command in (["ls"], ["rm", "x"], ["pin", "x"], ["unpin", "x"], ["verify"]):
        done = subprocess.run(
            [*COMMAND, command[0], f"--socket={tmp_path}/daemon.sock", *command[1:]],
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"swarmcache: no daemon answers")
