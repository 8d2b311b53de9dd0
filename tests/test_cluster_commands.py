"""replicas and forget: what the caches of all nodes hold, and giving it up, with real daemons."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmcache.cache_client import ask
from swarmcache.client import Client
from swarmcache.commands import run
from swarmcache.local_protocol import CachedFile, Ls
from tests.box import wait_until
from tests.disk_helpers import needs_root
from tests.local_daemons import PATIENCE_S, LocalDaemons

pytestmark = pytest.mark.slow

NODES = "abc"
SIZE_BYTES = 50_000

Run = Callable[..., tuple[int, str, str]]
Forget = Callable[..., tuple[int, dict[str, Any], str]]


class Cluster:
    """Three nodes, and sources that they take for those of a file server."""

    def __init__(self, local: LocalDaemons, directory: Path) -> None:
        self.sources = directory / "sources"
        settings = f'[file_servers.fs]\npaths = ["{self.sources}"]\n'
        self.tracker = local.start_tracker()
        self.nodes = {name: local.start_daemon(name, settings) for name in NODES}

    def put(self, name: str | bytes) -> Path:
        path = self.sources / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(SIZE_BYTES))
        return path

    def get(self, nodes: str, *files: Path) -> None:
        for name in nodes:
            with self.client(name) as client:
                assert all(each.cached for each in client.get_all(map(os.fsencode, files)))

    def client(self, name: str) -> Client:
        return Client(os.fsencode(self.nodes[name].socket))

    def id_of(self, name: str) -> str:
        node_id: str = self.nodes[name].status()["node"]["address"]
        return node_id

    def holders(self, file: Path) -> str:
        """The names of the nodes that have the file."""
        found = ""
        for name in self.nodes:
            with self.client(name) as client:
                answers = list(ask(client, Ls([os.fsencode(file)])))
            found += name if isinstance(answers[0], CachedFile) else ""
        return found


@pytest.fixture
def run_on_a(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command on the first node, in this process: exit code, stdout, stderr."""

    def run_it(command: str, *arguments: str | Path | bytes) -> tuple[int, str, str]:
        options = ["--socket", str(cluster.nodes["a"].socket), "--config", "/dev/null"]
        capfd.readouterr()
        code = run([command, *options, *map(os.fsdecode, arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


@pytest.fixture
def forget(run_on_a: Run) -> Forget:
    """``forget --json``: exit code, what each node said by its address, stderr."""

    def forget_it(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
        code, out, err = run_on_a("forget", "--json", *arguments)
        return code, {each.pop("node"): each for each in json.loads(out)}, err

    return forget_it


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


def test_every_file_is_listed_once_with_its_nodes_and_with_its_path_where_that_is_known(
    cluster: Cluster, run_on_a: Run
) -> None:
    def replicas(path: Path) -> list[dict[str, Any]]:
        code, out, err = run_on_a("replicas", "--json", path)
        assert (code, err) == (0, "")
        files: list[dict[str, Any]] = json.loads(out)
        return files

    here, there = cluster.put(b"list/here \xff"), cluster.put("list/there")
    cluster.get("ab", here)
    cluster.get("bc", there)

    # Of what only other nodes have nobody here knows the path, but they do.
    first, second = replicas(cluster.sources / "list")
    assert first["path_base64"]
    assert first["nodes"] == sorted(map(cluster.id_of, "ab"))
    assert (second["path"], second["nodes"]) == (None, sorted(map(cluster.id_of, "bc")))
    assert (second["size_bytes"], second["idle_s"] < 60) == (SIZE_BYTES, True)
    _, table, _ = run_on_a("replicas", cluster.sources / "list")
    assert re.search(r"48\.8 KiB +2 +\d+s +/\S+/list/here", table)
    assert re.search(r"48\.8 KiB +2 +\d+s +[0-9a-f]{64}\n", table)
    assert replicas(cluster.sources / "lis") == []


def test_a_dataset_goes_from_all_nodes_and_its_neighbours_stay(
    cluster: Cluster, forget: Forget
) -> None:
    files = [cluster.put(f"set/{name}") for name in ("x", "sub/y", "rewritten", "removed")]
    beside = cluster.put("set-2/z")
    cluster.get("abc", beside)
    with cluster.client("a") as client:
        before = client.status()["cluster"]["statistics"]["replicas"]
    cluster.get("bc", *files)
    cluster.put("set/rewritten")
    files[3].unlink()

    code, nodes, stderr = forget(cluster.sources / "set")
    assert code == 1, "all of it was used within cache.min_age"
    assert "stays: it was used within cache.min_age (--unused-for 0" in stderr
    assert nodes[cluster.id_of("b")] == {"dropped": 0, "dropped_bytes": 0, "kept": 4}
    assert cluster.holders(files[0]) == "bc"

    code, nodes, stderr = forget("--unused-for", "0", cluster.sources / "set")
    assert (code, stderr) == (0, "")
    gone = {"dropped": 4, "dropped_bytes": 4 * SIZE_BYTES, "kept": 0}
    none = {"dropped": 0, "dropped_bytes": 0, "kept": 0}
    assert nodes == {cluster.id_of("a"): none, **{cluster.id_of(name): gone for name in "bc"}}
    assert [cluster.holders(file) for file in files] == [""] * 4
    assert cluster.holders(beside) == "abc"
    with cluster.client("a") as client:
        wait_until(  # the tracker is told as well
            lambda: client.status()["cluster"]["statistics"]["replicas"] == before,
            PATIENCE_S,
            "no more replicas at the tracker than before",
        )


def test_what_is_pinned_or_in_use_stays_and_is_named(cluster: Cluster, forget: Forget) -> None:
    pinned, opened, held, idle = (cluster.put(f"kept/{n}") for n in ("pin", "open", "hold", "idle"))
    cluster.get("ab", pinned, opened, held, idle)
    b = cluster.nodes["b"]
    b.run("pin", pinned)
    (copy,) = b.get(opened)
    with (
        open(copy, "rb"),
        cluster.client("b") as client,
        client.hold(os.fsencode(held)),
    ):
        code, nodes, stderr = forget("--unused-for", "0s", cluster.sources / "kept")

    assert code == 1
    assert nodes[cluster.id_of("b")] == {
        "dropped": 1,
        "dropped_bytes": SIZE_BYTES,
        "kept": 3,
    }
    for file, why in ((pinned, "it is pinned"), (opened, "it is in use"), (held, "it is in use")):
        assert f"{cluster.id_of('b')}: '{file}' stays: {why}\n" in stderr
    assert [cluster.holders(each) for each in (pinned, opened, held, idle)] == ["b", "b", "b", ""]


def test_only_what_was_not_used_for_so_long_goes(cluster: Cluster, forget: Forget) -> None:
    file = cluster.put("recent/file")
    cluster.get("a", file)

    code, nodes, stderr = forget("--unused-for", "1d")

    assert (code, stderr) == (0, "")
    assert {each["dropped"] for each in nodes.values()} == {0}
    assert cluster.holders(file) == "a"


@needs_root
def test_a_user_can_neither_list_nor_drop_what_others_have(cluster: Cluster) -> None:
    file = cluster.put("others/file")
    cluster.get("ab", file)

    done = cluster.nodes["a"].run("forget", "--unused-for", "0", cluster.sources, uid=1001)

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"only root and the daemon's own user may do that" in done.stderr
    assert cluster.holders(file) == "ab"


def test_a_node_that_does_not_answer_is_named_and_the_others_are_asked(
    cluster: Cluster, forget: Forget
) -> None:
    file = cluster.put("silent/file")
    cluster.get("abc", file)
    silent = cluster.nodes["c"]
    silent_id = cluster.id_of("c")
    silent.process.send_signal(signal.SIGSTOP)
    try:
        code, nodes, stderr = forget("--unused-for", "0", file)
    finally:
        silent.process.send_signal(signal.SIGCONT)

    assert code == 1
    assert f"{silent_id} cannot be asked: {silent_id} does not answer" in stderr
    assert nodes[cluster.id_of("b")]["dropped"] == nodes[cluster.id_of("a")]["dropped"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what is to go"),
        (["--unused-for", "soon"], "expected a duration"),
        ([""], "expected 1 to 4096 bytes"),
        (["/x"] * 9, "expected at most 8"),
    ],
)
def test_wrong_usage_of_forget_asks_nobody(
    run_on_a: Run, arguments: list[str], message: str
) -> None:
    code, out, err = run_on_a("forget", *arguments)

    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_without_a_tracker_only_this_node_is_asked_and_that_is_said(tmp_path: Path) -> None:
    with LocalDaemons(tmp_path) as local:
        node = local.start_daemon("alone")
        done = node.run("replicas")

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"only this node can be asked: no connection to the tracker" in done.stderr
