"""Where the copies are, with users who mean harm: real uids, a real daemon as root."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmcache.errors import CacheDirUnusable, DirectoryUnusable
from swarmcache.local_socket import (
    ANSWER_BYTES_MAX,
    Connection,
    get_line,
    parse_answer,
    path_of,
)
from swarmcache.user_tree import User
from tests.disk_helpers import ME, a_file, needs_root, open_cache, publish, run_as
from tests.local_daemons import LocalDaemons, LocalNode

ANN, BEN, EVE = 6001, 6002, 6003

# What a user may try to do to a path that was handed out to them; each prints nothing and ends with
# something else than 0. In Python, since the shell's tools ask first and do not try.
ATTACKS = {
    "write": "open(path, 'r+b')",
    "truncate": "os.truncate(path, 0)",
    "remove": "os.unlink(path)",
    "rename": "os.rename(path, path + '2')",
    "replace": "open(path + '3', 'w').close(); os.rename(path + '3', path)",
    "chmod": "os.chmod(path, 0o666)",
    "chown": "os.chown(path, os.getuid(), -1)",
    "times": "os.utime(path, (0, 0))",
    "attribute": "os.setxattr(path, 'user.x', b'x')",
    "move the directory": "os.rename(os.path.dirname(path), os.path.dirname(path) + '4')",
    "open the directory to others": "os.chmod(os.path.dirname(path), 0o777)",
}


def attack(uid: int, path: bytes | Path, doing: str) -> bool:
    """Whether a user gets away with it."""
    # The user need not be able to read this Python, so it changes its uid when it runs.
    program = (
        "import array, base64, json, os, socket, sys\n"
        "os.setgroups([]); os.setgid({0}); os.setuid({0})\npath = sys.argv[1]\n"
    )
    command = [sys.executable, "-c", program.format(uid) + doing, os.fsdecode(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "Error: [Errno" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.fixture
def node(root: Path) -> Iterator[LocalNode]:
    root.mkdir()
    root.chmod(0o755)
    with LocalDaemons(root) as local:
        local.start_tracker()
        yield local.start_daemon()


@needs_root
def test_a_daemon_of_root_that_anybody_may_ask_says_so(root: Path, node: LocalNode) -> None:
    """Peers get what they ask for, and without a secret every user of the machine can be one."""
    secret = root / "secret of the cluster"
    secret.touch(mode=0o600)
    secret.write_text("0123456789abcdef" * 2)
    with LocalDaemons(root) as local:
        guarded = local.start_daemon("b", f"[cluster]\nsecret_file = {json.dumps(str(secret))}")

    assert "without cluster.secret_file any user" in node.said()
    assert "secret_file" not in guarded.said()


@pytest.fixture
def file(root: Path, node: LocalNode) -> Path:
    """A source that Ann's and Ben's group may read, and others not."""
    source = root / "sources" / "of the group" / "secret"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"what only the group may read" * 1000)
    for uid in (ANN, BEN):
        link = root / "sources" / str(uid)
        link.mkdir(mode=0o700)
        os.chown(link, uid, uid)
    source.chmod(0o640)
    return source


def allow(source: Path, uid: int) -> None:
    """The test's users are in no group of others, so the source is given to one after the other."""
    os.chown(source, uid, 0)


@pytest.mark.slow
@needs_root
def test_two_users_share_one_inode_and_each_reaches_it_through_his_own_directory_only(
    node: LocalNode, file: Path
) -> None:
    allow(file, ANN)
    [of_ann] = node.get(file, uid=ANN)
    allow(file, BEN)
    [of_ben] = node.get(file, uid=BEN)

    objects = [p for p in (node.cache_dir / ".swarmcache/objects").rglob("*") if p.is_file()]
    [copy] = [path for path in objects if path.suffix != ".manifest"]
    inodes = {os.stat(path).st_ino for path in (of_ann, of_ben, copy)}
    assert (len(inodes), os.stat(copy).st_nlink) == (1, 3)
    assert of_ann == os.fsencode(node.cache_dir) + b"/6001" + os.fsencode(file)
    assert of_ben == os.fsencode(node.cache_dir) + b"/6002" + os.fsencode(file)
    for uid, own, other in ((ANN, of_ann, of_ben), (BEN, of_ben, of_ann)):
        assert run_as(uid, "cat", Path(os.fsdecode(own))).stdout == file.read_bytes()
        way = Path(os.fsdecode(other))
        while way != node.cache_dir:
            assert run_as(uid, "cat", way).returncode != 0
            assert run_as(uid, "ls", way).returncode != 0
            way = way.parent
    for uid in (ANN, BEN, EVE):
        assert run_as(uid, "ls", node.cache_dir).returncode != 0, "who else is there"
        assert run_as(uid, "ls", node.cache_dir / ".swarmcache").returncode != 0
        assert run_as(uid, "cat", copy).returncode != 0
        assert run_as(uid, "ls", Path(f"/proc/{node.process.pid}/fd")).returncode != 0


@pytest.mark.slow
@needs_root
def test_who_may_not_read_the_source_gets_nothing_of_its_copy(node: LocalNode, file: Path) -> None:
    allow(file, ANN)
    node.get(file, uid=ANN)
    for uid in (EVE, BEN):
        done = node.run("get", file, uid=uid)
        assert (done.returncode, done.stdout) == (1, b"")
        assert not (node.cache_dir / str(uid)).exists()
    allow(file, EVE)  # and now Ann may no longer read it
    done = node.run("get", file, uid=ANN)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.slow
@needs_root
def test_nothing_that_a_user_does_to_a_copy_changes_it(node: LocalNode, file: Path) -> None:
    allow(file, ANN)
    [path] = node.get(file, uid=ANN)
    before = os.stat(path)

    assert {name: attack(ANN, path, doing) for name, doing in ATTACKS.items()} == dict.fromkeys(
        ATTACKS, False
    )

    after = os.stat(path)
    assert [after[i] for i in (stat.ST_MODE, stat.ST_INO, stat.ST_SIZE, stat.ST_MTIME)] == [
        before[i] for i in (stat.ST_MODE, stat.ST_INO, stat.ST_SIZE, stat.ST_MTIME)
    ]
    assert node.get(file, uid=ANN) == [path]


@pytest.mark.slow
@needs_root
def test_what_users_put_beside_the_copies_survives_and_is_never_followed(
    node: LocalNode, file: Path, root: Path
) -> None:
    victim = root / "victim"
    victim.mkdir()
    (victim / "precious").write_text("keep me")
    allow(file, ANN)
    [path] = node.get(file, uid=ANN)
    place = Path(os.fsdecode(path)).parent
    for doing in (
        "open(path + '/notes', 'w').write('mine')",
        f"os.symlink({str(victim)!r}, path + '/link')",
        "os.mkdir(path + '/own'); open(path + '/own/file', 'w').close()",
        "os.mkfifo(path + '/fifo')",
    ):
        assert attack(ANN, place, doing), doing

    assert node.run("verify", file).returncode == 0
    assert node.run("doctor", "--config=/dev/null").returncode == 0
    assert node.run("rm", file).returncode == 0

    assert sorted(os.listdir(place)) == ["fifo", "link", "notes", "own"]
    assert os.listdir(victim) == ["precious"]
    assert node.get(file, uid=ANN) == [path]
    assert run_as(ANN, "rm", "-r", place / "own", place / "link", place / "notes").returncode == 0


def ask(node: LocalNode, uid: int, file: Path, flags: int = 0) -> Connection:
    """A user's ``get``, when the daemon has begun to fetch the file for it."""
    fd = os.open(file, os.O_RDONLY | flags)
    os.seteuid(uid)
    try:
        connection = Connection(os.fsencode(node.socket))
    finally:
        os.seteuid(0)
    connection.send(get_line(os.fsencode(file), None), fd)
    os.close(fd)
    assert parse_answer(connection.receive_line(ANSWER_BYTES_MAX))["answer"] == "progress"
    return connection


@pytest.mark.slow
@needs_root
def test_a_descriptor_that_cannot_be_read_does_not_keep_the_file_from_others(root: Path) -> None:
    """A read of a size that is no multiple of a sector fails with O_DIRECT."""
    root.mkdir()
    root.chmod(0o755)
    file = root / "file"
    file.write_bytes(os.urandom(3_000_001))
    with LocalDaemons(root) as local:
        tracker = local.start_tracker()
        node = local.start_daemon()
        tracker.process.send_signal(signal.SIGSTOP)  # nobody reads before both have asked
        users = {EVE: ask(node, EVE, file, os.O_DIRECT), ANN: ask(node, ANN, file)}
        tracker.process.send_signal(signal.SIGCONT)

        for uid, connection in users.items():
            answer = {"answer": "progress"}
            while answer["answer"] == "progress":
                answer = parse_answer(connection.receive_line(ANSWER_BYTES_MAX))
            connection.close()
            assert answer["answer"] == "cached", answer
            assert os.fsencode(f"/{uid}/") in path_of(answer["path"])
        assert f"for uid {EVE}: cannot read the source" in node.said()


# --- where files are, and lists of them ----------------------------------------------------------

# Ask with descriptors of any kind, where an honest client opens the file for reading; and for a
# place outside of the user's own directory.
ASK_RAW = """
def ask(request, *fds):
    daemon = socket.socket(socket.AF_UNIX)
    daemon.connect({socket!r})
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    daemon.sendmsg([json.dumps(request).encode() + b"\\n"], rights)
    return json.loads(daemon.makefile("rb").readline())
fd = os.open(path, os.O_PATH)
encoded = base64.b64encode(path.encode()).decode()
answer = ask({{"op": "locations", "count": 1}}, fd)
assert answer["locations"] == [] and answer["path"] == "" and answer["reason"], answer
answer = ask({{"op": "copy_path", "path": encoded}}, fd)
assert answer["answer"] == "failed", answer
answer = ask({{"op": "room", "count": 1}}, fd)
assert answer["needed_bytes"] == 0, answer
for name in (b"/../6001/x", b"/a/./b", b"/a//b", b"a", b"/a\\0b", b"/"):
    encoded = base64.b64encode(name).decode()
    answer = ask({{"op": "copy_path", "path": encoded, "opened": False}})
    assert answer["answer"] == "failed", answer
"""


@pytest.mark.slow
@needs_root
def test_who_may_not_read_the_source_does_not_learn_where_it_is(
    node: LocalNode, file: Path
) -> None:
    allow(file, ANN)
    node.get(file, uid=ANN)
    for command in ("locate", "hosts", "path"):
        done = node.run(command, file, uid=EVE)
        assert (done.returncode, done.stdout) == (1, b""), command
        assert b"Permission denied" in done.stderr
    assert attack(EVE, file, ASK_RAW.format(socket=str(node.socket)))
    assert not (node.cache_dir / str(EVE)).exists(), "asking makes nothing"

    allow(file, BEN)
    done = node.run("locate", "--json", file, uid=BEN)
    [located] = json.loads(done.stdout)
    [replica] = located["replicas"]
    assert replica["path"] == f"{node.cache_dir}/{BEN}{file}" and not replica["linked"]
    assert str(ANN) not in done.stdout.decode()
    [copy] = node.get(file, uid=BEN)
    assert copy == os.fsencode(replica["path"])


@pytest.mark.slow
@needs_root
def test_a_list_of_copies_is_its_users_own(node: LocalNode, file: Path) -> None:
    allow(file, ANN)
    bundle = file.with_name("x.bundle")
    bundle.write_text("secret\n")
    [result] = (Path(os.fsdecode(path)) for path in node.get(bundle, uid=ANN))

    assert result.parent.parent == node.cache_dir / str(ANN)
    assert run_as(ANN, "cat", result).stdout == os.fsencode(f"{node.cache_dir}/{ANN}{file}\n")
    assert os.stat(result).st_uid == ANN and os.stat(result.parent).st_mode & 0o777 == 0o700
    assert run_as(EVE, "cat", result).returncode != 0
    assert b"users put there" not in node.run("doctor", "--config=/dev/null").stdout
    assert attack(ANN, result.parent, "os.rename(path, path + '2'); os.symlink('/etc', path)")
    assert node.run("get", bundle, uid=ANN).stdout == os.fsencode(bundle) + b"\n"
    assert node.run("verify").returncode == 0


# --- every place where something may be in the way ------------------------------------------------

PATH = b"/nfs/corpus/deep/train.hdf"
LEVELS = ["me", "me/nfs", "me/nfs/corpus", "me/nfs/corpus/deep", "me/nfs/corpus/deep/train.hdf"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_link_in_the_way_is_refused_at_every_level_and_not_followed(
    root: Path, level: str, cached: bool
) -> None:
    version, data = a_file(9000, PATH)
    cache = open_cache(root)
    if cached:
        publish(cache, version, data, User(ME.uid, "other"))
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (root / level).parent.mkdir(parents=True, exist_ok=True)
    for below in (root / "me").rglob("*"):
        below.chmod(0o1700)
    (root / level).symlink_to(elsewhere)

    if not cached:
        assert publish(cache, version, data) == {}
    with pytest.raises(CacheDirUnusable, match=f"{level} is not a .* of swarmcache: move it away"):
        cache.lookup(version, ME)
    cache.drop(version.version_id)
    assert os.listdir(elsewhere) == []
    assert (root / level).is_symlink()
    cache.close()


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_a_link_that_takes_the_place_of_a_directory_is_not_followed_when_the_copy_goes(
    root: Path, level: str
) -> None:
    version, data = a_file(9000, PATH)
    cache = open_cache(root)
    publish(cache, version, data)
    moved = root.parent / "moved"
    (root / level).rename(moved)
    (root / level).symlink_to(moved)
    before = sorted(moved.rglob("*"))

    cache.drop(version.version_id)

    assert sorted(moved.rglob("*")) == before
    assert cache.lookup(version, ME) is None
    cache.close()


@pytest.mark.parametrize(
    "name", [".swarmcache", ".swarmcache/objects", ".swarmcache/partial", ".swarmcache/lock"]
)
def test_a_link_in_the_place_of_what_is_the_daemons_is_refused(root: Path, name: str) -> None:
    open_cache(root).close()
    elsewhere = root.parent / "elsewhere"
    (root / name).rename(elsewhere)
    (root / name).symlink_to(elsewhere)
    with pytest.raises(CacheDirUnusable, match="remove it"):
        open_cache(root)


@needs_root
@pytest.mark.parametrize("planted", ["link", "directory"])
def test_a_way_to_the_cache_directory_that_somebody_else_could_turn_is_refused(
    root: Path, planted: str
) -> None:
    root.parent.chmod(0o1777)  # as /var/tmp: anybody may put something there, none take it away
    if planted == "link":
        (root.parent / "target").mkdir()
        os.symlink(root.parent / "target", root.parent / "way")
        os.lchown(root.parent / "way", EVE, EVE)
    else:
        (root.parent / "way").mkdir()
        os.chown(root.parent / "way", EVE, EVE)
    with pytest.raises(DirectoryUnusable, match=r"uid 6003.*name another directory in cache\.dir"):
        open_cache(root.parent / "way" / "cache")


MOUNTS = """
import ctypes, os, signal, sys
from pathlib import Path
import pytest
from swarmcache.cache_dir import Removal
from swarmcache.errors import CacheDirUnusable
from swarmcache.user_tree import User
from tests.disk_helpers import ME, a_file, object_of, open_cache, publish

libc = ctypes.CDLL(None, use_errno=True)
root = Path(sys.argv[1])

def mount_hanging(place):
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % fuse
    assert libc.mount(b"theirs", os.fsencode(place), b"fuse", 6, options) == 0, ctypes.get_errno()
    signal.alarm(10)  # whoever asks this file system would wait for ever
"""

MOUNTED_BELOW = """
cache = open_cache(root)
beside, below = a_file(1000, b"/nfs/beside"), a_file(1000, b"/nfs/theirs/file")
place = Path(publish(cache, *beside)[ME.uid]).parent / "theirs"
place.mkdir(mode=0o1700)
mount_hanging(place)
other = User(6001, "ann")
assert list(publish(cache, *below, ME, other)) == [other.uid]
with pytest.raises(CacheDirUnusable, match="unmount it"):
    cache.lookup(below[0], ME)
assert cache.lookup_many([below[0]], ME) == [None]
assert cache.remove(below[0].version_id) is Removal.GONE
"""


# What is left of a copy without index and manifest: links of nobody knows whom.
MOUNTED_BESIDE_ORPHANS = """
cache = open_cache(root)
version, data = a_file(1000, b"/nfs/orphan")
link = Path(publish(cache, version, data)[ME.uid])
cache.close()
(root / ".swarmcache/index.sqlite").unlink()
orphan = object_of(root, version)
orphan.with_name(orphan.name + ".manifest").unlink()
hanging, bound, elsewhere = link.parent / "hanging", link.parent / "bound", root.parent / "kept"
for directory in (hanging, bound, elsewhere):
    directory.mkdir()
os.link(orphan, elsewhere / "kept")
assert libc.mount(os.fsencode(elsewhere), os.fsencode(bound), None, 4096, None) == 0
deep = os.open(link.parent, os.O_RDONLY)
for _ in range(1100):
    os.mkdir("deep", dir_fd=deep)
    above, deep = deep, os.open("deep", os.O_RDONLY, dir_fd=deep)
    os.close(above)
mount_hanging(hanging)

cache = open_cache(root)
list(cache.list_objects())
assert not link.exists() and not orphan.exists()
assert os.listdir(elsewhere) == ["kept"], "that was not the daemon's"
"""


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(
    ("script", "said"),
    [(MOUNTED_BELOW, "something is mounted on"), (MOUNTED_BESIDE_ORPHANS, "made again from")],
)
def test_a_file_system_of_the_user_that_never_answers_holds_up_nobody(
    root: Path, script: str, said: str
) -> None:
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", MOUNTS + script, str(root)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    subprocess.run(["rm", "-rf", root], check=True)  # which shutil cannot, so deep
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
