"""prefetch: files are brought to nodes before anybody there asks for them, with real daemons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmcache.cache_client import ask
from swarmcache.client import Client
from swarmcache.commands import run
from swarmcache.local_protocol import Answer, CachedFile, Ls, Placed
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from swarmcache.prefetch import run_prefetch
from tests.box import wait_until
from tests.disk_helpers import as_stranger, needs_root
from tests.local_daemons import PATIENCE_S, LocalDaemons, LocalNode
from tests.scripted_daemon import Asked, ScriptedDaemon

pytestmark = pytest.mark.slow

SIZE_BYTES = 300_000  # two chunks

Prefetch = Callable[..., tuple[int, list[dict[str, Any]], str]]


class Cluster:
    """Three nodes, the last of which has room for little, and sources of a file server."""

    def __init__(self, local: LocalDaemons, directory: Path) -> None:
        self.local = local
        self.sources = directory / "sources"
        settings = f'[file_servers.fs]\npaths = ["{self.sources}"]\n'
        self.tracker = local.start_tracker()
        small = f"cache.max_usage = {UNCOUNTED_MAX_BYTES + 2 * SIZE_BYTES}\n{settings}"
        self.nodes: dict[str, LocalNode] = {
            name: local.start_daemon(name, small if name == "c" else settings) for name in "abc"
        }

    def put(self, name: str | bytes, size_bytes: int = SIZE_BYTES) -> Path:
        path = self.sources / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size_bytes))
        return path

    def id_of(self, name: str) -> str:
        return self.nodes[name].address

    def holders(self, file: Path) -> str:
        """The names of the nodes that have the file."""
        found = ""
        for name, node in self.nodes.items():
            with Client(os.fsencode(node.socket)) as client:
                (answer,) = ask(client, Ls([os.fsencode(file)]))
            found += name if isinstance(answer, CachedFile) else ""
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One for all tests: each has a directory of its own. Other users can reach its sockets."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="swarmcache-test-"))
    directory.chmod(0o755)
    try:
        with LocalDaemons(directory) as local:
            yield Cluster(local, directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def prefetch(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> Prefetch:
    """``prefetch --json`` on the first node, in this process: exit code, lines, stderr."""

    def prefetch_it(*arguments: str | Path) -> tuple[int, list[dict[str, Any]], str]:
        options = ["--socket", str(cluster.nodes["a"].socket), "--config", "/dev/null"]
        capfd.readouterr()
        code = run(["prefetch", "--json", *options, *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, json.loads(out), err

    return prefetch_it


def test_a_file_is_brought_to_a_node_which_is_named_and_to_the_one_that_reads_it(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    file = cluster.put("one/file")

    code, lines, err = prefetch("--node", cluster.id_of("b"), file)

    assert (code, err) == (0, "")
    (line,) = lines
    name = line.pop("name")
    assert name == cluster.nodes["b"].status()["node"]["name"]
    assert line == {
        "path": str(file),
        "size_bytes": SIZE_BYTES,
        "node": cluster.id_of("b"),
        "placed": True,
        "hit": False,
        "reason": "",
    }
    assert cluster.holders(file) == "ab"


def test_a_get_on_that_node_is_a_hit_and_has_the_right_bytes(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    file = cluster.put(b"hit/\xff file")
    assert prefetch("--node", cluster.id_of("b"), file)[0] == 0

    with Client(os.fsencode(cluster.nodes["b"].socket)) as client:
        (answer,) = client.get_all([os.fsencode(file)])

    assert answer.hit
    assert Path(answer.path).read_bytes() == file.read_bytes()


@needs_root
def test_a_prefetched_file_is_opened_to_nobody_who_has_not_shown_that_they_may_read_it(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    file = cluster.put("private/file")
    file.chmod(0o600)
    os.chown(file, 12345, 12345)
    assert prefetch("--node", cluster.id_of("b"), file)[0] == 0
    (listed,) = cluster.nodes["b"].listed(file)

    assert listed["copies"] == []
    stranger = cluster.nodes["b"].run("get", "--strict", file, uid=12346)
    assert (stranger.returncode, stranger.stdout) == (1, b"")
    (path,) = cluster.nodes["b"].get(file, uid=12345)
    assert b"/12345/" in path


def test_as_many_nodes_as_are_wanted_have_the_files_and_asking_again_changes_nothing(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    files = [cluster.put(f"some/{number}", 1000) for number in range(20)]

    code, lines, err = prefetch("--nodes", "2", cluster.sources / "some")
    again = prefetch("--nodes", "2", *files)

    assert (code, err) == (0, "")
    nodes = {line["node"] for line in lines}
    assert len(nodes) == 2
    assert len(lines) == 40
    assert again[0] == 0
    assert all(line["hit"] for line in again[1])
    assert {line["path"] for line in again[1]} == {str(file) for file in files}


def test_a_node_without_room_is_not_asked_and_another_one_takes_the_files(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    big = cluster.put("room/big", 4 * SIZE_BYTES)

    code, lines, err = prefetch("--all", big)
    assert code == 3
    assert cluster.holders(big) == "ab"
    assert [line["node"] for line in lines if not line["placed"]] == [cluster.id_of("c")]
    assert "full" in err or "bytes" in err  # as soon as it has told, or when it is asked

    code, lines, err = prefetch("--nodes", "3", big)
    assert code == 3
    assert "2 of 3 nodes have all files" in err


def test_files_and_nodes_that_are_not_there_are_named_and_the_others_are_served(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    file = cluster.put("there/file")
    bundle = cluster.put("there/list.bundle")
    bundle.write_text("file\nmissing\n")

    code, lines, err = prefetch("--node", cluster.id_of("b"), bundle)
    assert code == 1
    assert [(line["path"], line["placed"]) for line in lines] == [(str(file), True)]
    assert f"{str(bundle.parent / 'missing')!r}: No such file or directory" in err

    code, lines, err = prefetch("--node", "nobody", "--node", cluster.id_of("b"), file)
    assert code == 3
    assert "nobody is not asked any more: no node of this name is known" in err
    assert {line["node"]: line["placed"] for line in lines} == {
        "nobody": False,
        cluster.id_of("b"): True,
    }


@needs_root
def test_all_that_may_be_read_below_a_directory_is_brought_and_what_may_not_is_named(
    cluster: Cluster, prefetch: Prefetch
) -> None:
    files = [cluster.put(f"whole/{name}", 1000) for name in ("top", "1/f", "2/f", "3/f")]
    tree = files[0].parent
    (tree / "out").symlink_to(cluster.put("beyond/file").parent)

    code, lines, err = prefetch("--node", cluster.id_of("b"), tree)
    assert (code, err) == (0, "")
    assert {line["path"] for line in lines if line["placed"]} == set(map(str, files))

    (tree / "closed").mkdir(mode=0o700)
    with as_stranger():
        code, lines, err = prefetch("--node", cluster.id_of("b"), tree)
    assert (code, err) == (1, f"swarmcache: '{tree}/closed': Permission denied\n")
    assert {line["path"] for line in lines if line["placed"]} == set(map(str, files))


def test_a_node_that_has_gone_is_named(cluster: Cluster, prefetch: Prefetch) -> None:
    file = cluster.put("gone/file")
    settings = f'[file_servers.fs]\npaths = ["{cluster.sources}"]\n'
    with_d = cluster.local.start_daemon("d", settings)
    os.kill(with_d.process.pid, 19)  # it hangs: the tracker knows it a while longer

    code, lines, err = prefetch("--node", with_d.address, "--node", cluster.id_of("b"), file)

    assert code == 3
    assert {line["node"]: line["placed"] for line in lines} == {
        with_d.address: False,
        cluster.id_of("b"): True,
    }
    assert f"{with_d.address} is not asked any more" in err
    with_d.kill()


def test_people_read_a_line_per_node(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    file = cluster.put("shown/file")
    done = cluster.nodes["b"].run("prefetch", "--nodes", "1", file)

    assert done.stdout.decode().splitlines()[0].endswith(": 1 of 1 files, 293.0 KiB")


def test_half_an_array_does_not_look_like_a_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    tmp_path.chmod(0o700)

    def answer(asked: Asked) -> Iterator[Answer]:
        yield Placed(0, "127.0.0.1:1", "b")
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    with ScriptedDaemon(tmp_path, answer) as daemon, Client(bytes(daemon.path)) as client:
        paths = [bytes(file)]
        code = run_prefetch(
            client, paths, nodes=[], copies=None, bundle=None, progress=False, as_json=True
        )

    assert code == 130
    with pytest.raises(json.JSONDecodeError):
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options", [[], ["--all", "--nodes", "2"], ["--node", "a", "--all"], ["--nodes", "0"]]
)
def test_one_way_to_name_nodes_is_expected(
    options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["prefetch", *options, "file"]) == 2
    assert "--node" in capfd.readouterr().err


def test_a_file_of_this_machine_alone_goes_nowhere(
    cluster: Cluster, prefetch: Prefetch, tmp_path: Path
) -> None:
    file = tmp_path / "own"
    file.write_bytes(b"own")

    code, lines, err = prefetch("--all", file)

    assert (code, lines) == (1, [])
    assert "it is on a file system that only this machine sees" in err


def test_files_are_brought_to_nodes_while_the_tracker_is_away(tmp_path: Path) -> None:
    """One of the nodes stands in for it."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(SIZE_BYTES))
    settings = f'[file_servers.fs]\npaths = ["{tmp_path}"]\n'
    with LocalDaemons(tmp_path) as local:
        tracker = local.start_tracker()
        nodes = [local.start_daemon(name, settings) for name in "ab"]
        wait_until(
            lambda: all(node.status()["node"]["gossip"]["others"] == 1 for node in nodes),
            PATIENCE_S,
            "the other node",
        )
        tracker.kill()

        done = nodes[0].run("prefetch", "--all", file)

        assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr
        assert all(node.listed(file)[0]["verified"] for node in nodes)


def test_without_a_tracker_the_reason_is_told_and_this_node_is_the_only_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    with LocalDaemons(tmp_path) as local:
        node = local.start_daemon("a", f'[file_servers.fs]\npaths = ["{tmp_path}"]\n')
        done = node.run("prefetch", "--nodes", "2", file)

    assert done.returncode == 3
    assert (
        b"there may be nodes that are not known here: no connection to the tracker" in done.stderr
    )
    assert b"0 of 2 nodes have all files" in done.stderr
