"""locate, hosts and path, with real daemons."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmcache.client import Client
from swarmcache.errors import DaemonUnavailable, DirectoryUnusable, SourceUnreadable
from swarmcache.locate import (
    FileLocations,
    NodeBytes,
    Replica,
    hosts,
    local_path,
    locate,
    own_path,
    rank_hosts,
)
from tests.box import wait_until
from tests.disk_helpers import needs_root
from tests.local_daemons import PATIENCE_S, LocalDaemons, LocalNode

pytestmark = pytest.mark.slow

SIZE_BYTES = 100_000
NODES = "abc"
HERE = os.uname().nodename


class Cluster:
    """Three nodes, and sources that they take for those of a file server."""

    def __init__(self, local: LocalDaemons, directory: Path) -> None:
        self.sources = directory / "sources"
        self.sources.mkdir()
        self._directory = directory
        settings = f'[file_servers.fs]\npaths = ["{self.sources}"]\n'
        self.tracker = local.start_tracker()
        self.nodes = {name: local.start_daemon(name, settings) for name in NODES}

    def put(self, name: str | bytes, data: bytes | None = None) -> Path:
        """A source; without ``data`` another one each time."""
        path = self.sources / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(SIZE_BYTES) if data is None else data)
        return path

    def cache(self, nodes: str, *files: Path) -> list[Path]:
        """Have these nodes cache the files; the copies on the last one."""
        copies: list[Path] = []
        for name in nodes:
            with client_of(self.nodes[name]) as client:
                answers = list(client.get_all(map(os.fsencode, files)))
            assert all(answer.cached for answer in answers), answers
            copies = [Path(answer.path) for answer in answers]
        wait_until(  # the tracker is told a moment later
            lambda: all(self.located(nodes[0], file) >= set(nodes) for file in files),
            PATIENCE_S,
            "replicas to be known",
        )
        return copies

    def located(self, asker: str, file: Path, limit: int | None = None) -> set[str]:
        """The names of the nodes that a node lists as holders."""
        with client_of(self.nodes[asker]) as client:
            [found] = locate(client, [os.fsencode(file)], limit)
        return {self.name_of(replica) for replica in found.replicas}

    def name_of(self, replica: Replica) -> str:
        [name] = [n for n in NODES if replica.path.startswith(bytes(self.nodes[n].cache_dir))]
        return name


def client_of(node: LocalNode) -> Client:
    return Client(os.fsencode(node.socket))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests: each has files of its own."""
    directory = tmp_path_factory.mktemp("locate")
    with LocalDaemons(directory) as local:
        yield Cluster(local, directory)


def spoil(copy: Path) -> None:
    copy.chmod(0o644)
    with open(copy, "r+b") as file:
        file.write(b"tampered with")


def test_every_replica_is_listed_once_with_the_users_path_there(cluster: Cluster) -> None:
    file = cluster.put(b"of three \xff")
    cluster.cache("abc", file)
    user = os.fsencode(cluster.cache("a", file)[0]).removesuffix(os.fsencode(file))
    name = os.path.basename(user)

    with client_of(cluster.nodes["b"]) as client:
        [found] = locate(client, [os.fsencode(file)])

    assert (found.path, found.size_bytes) == (os.fsencode(file), SIZE_BYTES)
    assert (found.more, found.reason, found.readable) == (0, "", True)
    places = [bytes(node.cache_dir) + b"/" + name for node in cluster.nodes.values()]
    expected = [Replica(HERE, place + os.fsencode(file), SIZE_BYTES, True) for place in places]
    assert sorted(found.replicas, key=lambda each: each.path) == expected
    assert cluster.name_of(found.replicas[0]) == "b", "the node that was asked comes first"


def test_a_copy_that_was_touched_or_removed_is_not_listed(cluster: Cluster) -> None:
    touched, removed, unlinked = (cluster.put(name) for name in ("touched", "removed", "unlinked"))
    copies = cluster.cache("bca", touched, removed, unlinked)
    spoil(copies[0])
    objects = (cluster.nodes["a"].cache_dir / ".swarmcache/objects").rglob("*")
    next(path for path in objects if path.is_file() and path.samefile(copies[1])).unlink()
    copies[2].unlink()  # by the user's own name: so it is not what it was, for others, too

    # Once: asked for, it is noticed, and completed again by peers.
    assert cluster.located("a", touched) == cluster.located("b", unlinked) == {"b", "c"}
    for asker in NODES:
        assert cluster.located(asker, removed) == {"b", "c"}, "of which nothing is left"


def test_replicas_of_an_older_state_are_not_listed(cluster: Cluster) -> None:
    file = cluster.put("rewritten")
    cluster.cache("ab", file)
    cluster.put("rewritten")
    assert cluster.located("a", file) == cluster.located("c", file) == set()
    cluster.cache("c", file)
    assert cluster.located("a", file) == {"c"}


def test_no_more_are_listed_than_wanted_and_the_others_are_counted(cluster: Cluster) -> None:
    file = cluster.put("limited")
    cluster.cache("abc", file)
    with client_of(cluster.nodes["b"]) as client:
        [one] = locate(client, [os.fsencode(file)], 1)
        [two] = locate(client, [os.fsencode(file)], 2)
    assert [cluster.name_of(replica) for replica in one.replicas] == ["b"]
    assert (one.more, len(two.replicas), two.more) == (2, 2, 1)


def test_files_directories_and_bundles_in_one_call(cluster: Cluster) -> None:
    inside = [cluster.put(f"tree/{name}") for name in ("x", "y/z", "y/w")]
    cluster.put("lists/x.bundle", b"../tree/x\n\n../tree/y\nmissing\n")
    cluster.cache("ab", inside[0])
    cluster.cache("c", *inside[1:])
    asked = [cluster.sources / name for name in ("tree/y/z", "lists/x.bundle", "nothing")]

    with client_of(cluster.nodes["a"]) as client:
        found = list(locate(client, map(os.fsencode, asked)))

    names = [os.path.relpath(os.fsdecode(each.path), cluster.sources) for each in found]
    assert names[:2] == ["tree/y/z", "tree/x"]
    assert set(names[2:4]) == {"tree/y/z", "tree/y/w"} and names[4] == "lists/missing"
    holders = [{cluster.name_of(replica) for replica in each.replicas} for each in found]
    assert holders == [{"c"}, {"a", "b"}, {"c"}, {"c"}, set(), set()]
    assert [each.readable for each in found] == [True] * 4 + [False] * 2
    assert {each.reason for each in found[4:]} == {"No such file or directory"}


def test_more_files_than_fit_into_a_request_keep_their_order(cluster: Cluster) -> None:
    files = [cluster.put(f"many/{number}", b"%d" % number) for number in range(40)]
    cluster.cache("a", *files)
    with client_of(cluster.nodes["b"]) as client:
        found = list(locate(client, [*map(os.fsencode, files), os.fsencode(files[0])]))
        ranked = hosts(client, map(os.fsencode, [*files, files[0]]))
    assert [os.fsdecode(each.path) for each in found] == [*map(str, files), str(files[0])]
    assert all(len(each.replicas) == 1 for each in found)
    assert ranked == [NodeBytes(HERE, sum(file.stat().st_size for file in files))]


def test_a_node_that_hangs_is_left_out_and_named(cluster: Cluster) -> None:
    file = cluster.put("hanging")
    cluster.cache("abc", file)
    notices: list[str] = []
    cluster.nodes["b"].process.send_signal(signal.SIGSTOP)
    try:
        with client_of(cluster.nodes["a"]) as client:
            [found] = locate(client, [os.fsencode(file)], None, notices.append)
    finally:
        cluster.nodes["b"].process.send_signal(signal.SIGCONT)
    assert {cluster.name_of(replica) for replica in found.replicas} == {"a", "c"}
    assert (found.more, found.reason) == (0, "")
    [notice] = notices
    assert cluster.nodes["b"].address in notice and "did not answer in time" in notice


def test_commands_print_lines_or_json(cluster: Cluster) -> None:
    first, second = cluster.put(b"a\nb"), cluster.put("c:d")
    cluster.cache("ba", first)
    cluster.cache("a", second)
    node = cluster.nodes["a"]

    located = node.run("locate", first, second)
    assert (located.returncode, located.stderr) == (0, b"")
    lines = located.stdout.decode().splitlines()
    assert len(lines) == 3, "one line for each, whatever the names"
    assert lines[0].startswith(f"{HERE}:{node.cache_dir}/")
    assert lines[0].endswith(rf"/a\nb:{SIZE_BYTES}") and lines[2].endswith(f"/c:d:{SIZE_BYTES}")
    ranked = node.run("hosts", first, second, "missing")
    assert (ranked.returncode, ranked.stdout.decode()) == (1, f"{HERE} {2 * SIZE_BYTES}\n")
    assert b"'/missing': No such file or directory" in ranked.stderr

    shown = json.loads(node.run("locate", "--json", "--limit=1", first).stdout)
    [replica] = shown[0].pop("replicas")
    reason, path = "", os.fsdecode(first)
    assert shown == [{"path": path, "size_bytes": SIZE_BYTES, "more": 1, "reason": reason}]
    assert replica["node"] == HERE and replica["linked"] and replica["path"].endswith(path)
    assert json.loads(node.run("hosts", "--json", cluster.sources / "none").stdout) == []


def test_without_the_tracker_only_this_nodes_replica_is_listed_and_that_is_said(
    tmp_path: Path,
) -> None:
    file = tmp_path / "source"
    file.write_bytes(bytes(10_000))
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node = local.start_daemon()
        node.get(file)
        assert local.tracker is not None
        local.tracker.kill()
        wait_until(
            lambda: not node.status()["node"]["tracker_connected"], PATIENCE_S, "a lost tracker"
        )
        done = node.run("locate", file, file)
        path = node.run("path", file)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count(b"other nodes may hold replicas, too: ") == 1
    assert (path.returncode, path.stderr) == (0, b"")


def test_what_is_no_bundle_although_it_should_be_is_named_and_the_rest_is_done(
    cluster: Cluster,
) -> None:
    binary, file = cluster.put("binary", b"\0"), cluster.put("file")
    bundle = cluster.put("x.lst", b"file\n")
    [copy] = cluster.cache("a", file)
    for command in ("locate", "path"):
        done = cluster.nodes["a"].run(command, "--bundle", binary, bundle)
        assert done.returncode == 1 and done.stdout.count(bytes(copy)) == 1
        assert len(done.stdout.splitlines()) == len(done.stderr.splitlines()) == 1
        assert b"/binary': it is no list of paths" in done.stderr


# --- path ----------------------------------------------------------------------------------------


def test_the_path_is_where_the_copy_comes_to_lie(cluster: Cluster) -> None:
    file, other = cluster.put("to come"), cluster.put("tree of one/file")
    with client_of(cluster.nodes["a"]) as client:
        path = local_path(client, os.fsencode(file))
        tree = local_path(client, os.fsencode(other.parent))
        assert not os.path.lexists(path) and not os.path.lexists(tree), "nothing is copied"
        assert os.fsencode(client.get(file).path) == path == local_path(client, os.fsencode(file))
        assert os.fsencode(client.get(other).path) == tree + b"/file"
        with pytest.raises(SourceUnreadable):
            local_path(client, os.fsencode(cluster.sources / "missing"))


def test_a_bundle_has_a_path_for_each_of_its_files(cluster: Cluster) -> None:
    files = [cluster.put("p1"), cluster.put("p2")]
    cluster.put("paths.bundle", b"p1\nmissing\np2\n")
    done = cluster.nodes["a"].run("path", "-0", cluster.sources / "paths.bundle")
    with client_of(cluster.nodes["a"]) as client:
        expected = [local_path(client, os.fsencode(file)) for file in files]
    assert done.stdout == b"".join(path + b"\0" for path in expected)
    assert done.returncode == 1 and done.stderr.count(b"missing': No such file") == 1


def test_a_file_of_the_users_own_has_a_place_beside_the_copies(cluster: Cluster) -> None:
    wanted = os.fsencode(cluster.sources / "results" / "of a job")
    with client_of(cluster.nodes["a"]) as client:
        place = own_path(client, wanted)
        assert place.endswith(wanted) and os.path.isdir(os.path.dirname(place))
        Path(os.fsdecode(place)).write_bytes(b"results")
        source = cluster.put("results/input")
        assert client.get(source).cached, "the directory is the daemon's, and goes on to be used"


@pytest.fixture
def without_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source, and settings with the cache directories ``one`` and ``two``, not there yet."""
    config = tmp_path / "config.toml"
    config.write_text(f'[cache]\ndir = ["{tmp_path}/one", "{tmp_path}/two"]\n')
    file = tmp_path / "source"
    file.write_bytes(b"x")
    monkeypatch.setenv("SWARMCACHE_SOCKET", str(tmp_path / "no daemon"))
    return file, config


@needs_root
def test_without_a_daemon_nothing_is_looked_for_in_what_somebody_else_has_made(
    tmp_path: Path, without_daemon: tuple[Path, Path]
) -> None:
    """Anybody can be the first to make /var/tmp/swarmcache-UID, and put there what they like."""
    file, config = without_daemon
    with Client() as client:
        planted = local_path(client, os.fsencode(file), config)
        os.makedirs(os.path.dirname(planted))
        Path(os.fsdecode(planted)).write_bytes(b"something else")
        os.chown(tmp_path / "one", 6003, -1)
        with pytest.raises(DirectoryUnusable, match="one belongs to uid 6003"):
            local_path(client, os.fsencode(file), config)
        copy = planted.replace(b"/one/", b"/two/", 1)
        os.makedirs(os.path.dirname(copy))
        Path(os.fsdecode(copy)).write_bytes(b"x")
        assert local_path(client, os.fsencode(file), config) == copy


def test_without_a_daemon_the_path_is_what_the_settings_say(
    tmp_path: Path, without_daemon: tuple[Path, Path]
) -> None:
    file, config = without_daemon
    with Client() as client:
        by_settings = local_path(client, os.fsencode(file), config)
        user = by_settings.removeprefix(b"%b/one/" % bytes(tmp_path)).partition(b"/")[0]
        assert by_settings == b"%b/one/%b%b" % (bytes(tmp_path), user, bytes(file))
        copy = b"%b/two/%b%b" % (bytes(tmp_path), user, bytes(file))
        os.makedirs(os.path.dirname(copy))
        Path(os.fsdecode(copy)).write_bytes(b"x")
        assert local_path(client, os.fsencode(file), config) == copy, "where it is"
        with pytest.raises(DaemonUnavailable):
            own_path(client, os.fsencode(tmp_path / "new" / "file"))
        with pytest.raises(DaemonUnavailable):
            list(locate(client, [os.fsencode(file)]))


# --- ranking -------------------------------------------------------------------------------------


def test_nodes_are_ranked_by_what_they_hold_of_all_files_together() -> None:
    def file(name: bytes, size_bytes: int, *nodes: str) -> FileLocations:
        replicas = tuple(Replica(node, b"/" + name, size_bytes, True) for node in nodes)
        return FileLocations(name, size_bytes, replicas)

    big, small = file(b"big", 100, "n1", "n2", "n2"), file(b"small", 1, "n2", "n3", "n0")
    assert rank_hosts([big, small, big, FileLocations(b"none", 7)]) == [
        NodeBytes("n2", 101),
        NodeBytes("n1", 100),
        NodeBytes("n0", 1),
        NodeBytes("n3", 1),
    ]
