"""A whole daemon whose disk fails, or that runs out of descriptors, memory or threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from swarmcache.peer import THREADS_PER_PLACE
from tests.box import wait_until
from tests.faulty_disk import Fault
from tests.local_daemons import (
    COMMAND,
    PACKAGE_PARENT,
    PATIENCE_S,
    EndedEarly,
    LocalDaemons,
    LocalNode,
)

pytestmark = pytest.mark.slow

# Moments at which the disk fails, of each kind of failure; FAULTY_DAEMONS=50 for more of them.
MOMENTS = int(os.environ.get("FAULTY_DAEMONS", "2"))
# A daemon that opens its cache and gets two files makes somewhat more calls than this.
CALLS = 1000
SEED = 4
NOT_DURABLE = "dropped what could not be made durable"
FAULTS = [
    Fault(code, lasting=lasting)
    for code in (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE)
    for lasting in (False, True)
]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
code, lasting, number = (int(sys.argv.pop(1)) for _ in range(3))
import swarmcache.disk
from swarmcache.cli import main
from tests.faulty_disk import Fault, FaultyDisk
from tests.watched_disk import watched
# Not what is imported later: calls on sources and sockets work.
with watched(FaultyDisk(number, Fault(code, lasting=bool(lasting)))):
    sys.exit(main())
"""
# The first buffer for a range that is read from a file server is one too many.
OUT_OF_MEMORY = [
    sys.executable,
    "-c",
    f"""
import errno, mmap, sys
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.cli import main

def refuse(*args, _mmap=mmap.mmap, **options):
    mmap.mmap = _mmap
    raise OSError(errno.ENOMEM, "Cannot allocate memory")

mmap.mmap = refuse
sys.exit(main())
""",
]
# No buffer for a chunk from a peer can be had while the file exists that is named first.
OUT_OF_BUFFERS = [
    sys.executable,
    "-c",
    f"""
import errno, mmap, os, sys, threading
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.cli import main

scarce = sys.argv.pop(1)

def refuse(*args, _mmap=mmap.mmap, **options):
    if threading.current_thread().name.startswith("fetch") and os.path.exists(scarce):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    return _mmap(*args, **options)

mmap.mmap = refuse
sys.exit(main())
""",
]
# The disk fails when it is first asked for all replicas in order to announce them.
UNLISTED = [
    sys.executable,
    "-c",
    f"""
import sys, threading
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.cache_index import CacheIndex
from swarmcache.cli import main
from swarmcache.errors import DiskFailed

def fail(index, boot_id, _trusted_ids=CacheIndex.trusted_ids):
    if not threading.current_thread().name.startswith("disk"):
        return _trusted_ids(index, boot_id)
    CacheIndex.trusted_ids = _trusted_ids
    raise DiskFailed("Input/output error")

CacheIndex.trusted_ids = fail
sys.exit(main())
""",
]
# While the file exists that is named first, the disk cannot read the beginnings of copies.
BAD_SECTOR = [
    sys.executable,
    "-c",
    f"""
import errno, os, sys
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.cli import main

bad = sys.argv.pop(1)

def lost(fd, offset):
    now = not offset and os.path.exists(bad)
    return now and "/objects/" in os.readlink(f"/proc/self/fd/{{fd}}")

def sendfile(out, fd, offset, count, _sendfile=os.sendfile):
    if lost(fd, offset):
        raise OSError(errno.EIO, "Input/output error")
    return _sendfile(out, fd, offset, count)

def preadv(fd, buffers, offset, _preadv=os.preadv):
    if lost(fd, offset):
        raise OSError(errno.EIO, "Input/output error")
    return _preadv(fd, buffers, offset)

os.sendfile, os.preadv = sendfile, preadv
sys.exit(main())
""",
]
# No thread can be started while the file exists that is named first.
OUT_OF_THREADS = [
    sys.executable,
    "-c",
    f"""
import os, sys, threading
sys.path.insert(0, {str(PACKAGE_PARENT)!r})
from swarmcache.cli import main

scarce = sys.argv.pop(1)

def start(thread, _start=threading.Thread.start):
    if os.path.exists(scarce):
        raise RuntimeError("can't start new thread")
    _start(thread)

threading.Thread.start = start
sys.exit(main())
""",
]


def failing_daemon(fault: Fault, number: int) -> Sequence[str | Path]:
    """A command for a daemon whose ``number``-th call on the disk fails."""
    numbers = [str(int(each)) for each in (fault.code, fault.lasting, number)]
    return [sys.executable, "-c", PROGRAM, str(PACKAGE_PARENT), *numbers]


def sources(place: Path, count: int) -> list[Path]:
    files = [place / f"source {number}" for number in range(count)]
    for number, file in enumerate(files):
        file.write_bytes(Random(number).randbytes(300_000))
    return files


def assert_usable(node: LocalNode, done: subprocess.CompletedProcess[bytes], *files: Path) -> None:
    """A command that printed one path for each file, with its bytes, and said no more.

    A copy may be gone again where the daemon says that it could not be made durable: what a disk
    did not take is not to be read, either.
    """
    assert done.returncode == 0, done.stderr
    printed = done.stdout.removesuffix(b"\0").split(b"\0")
    for path, file in zip(printed, files, strict=True):
        try:
            found = Path(os.fsdecode(path)).read_bytes()
        except FileNotFoundError:
            wait_until(lambda: NOT_DURABLE in node.said(), 60, "the reason why a copy is gone")
        else:
            assert found == file.read_bytes()


def assert_no_bug(node: LocalNode) -> None:
    """It is alive, and ends as it should."""
    assert node.process.poll() is None, node.said()
    assert node.status()["node"]["address"] == node.address
    node.process.terminate()
    assert node.process.wait(PATIENCE_S) == 0, node.said()
    assert "Traceback" not in node.said(), node.said()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_daemon_whose_disk_fails_lives_on_and_every_job_gets_a_path(
    root: Path, fault: Fault
) -> None:
    root.mkdir()
    random = Random(f"{SEED} {fault}")
    cached, *others = sources(root, 3)
    for moment in range(MOMENTS):
        place = root / str(moment)
        place.mkdir()
        with LocalDaemons(place) as local:
            local.start_tracker()
            node = local.start_daemon()
            node.get(cached)
            node.end()
            command = failing_daemon(fault, random.randrange(CALLS))
            try:
                node = local.start_daemon(command=command)
            except EndedEarly as ended:
                assert "Traceback" not in str(ended), str(ended)
                assert str(ended).splitlines()[-1].startswith("swarmcache: "), str(ended)
                continue
            assert_usable(node, node.run("get", "-0", cached, *others), cached, *others)
            assert_no_bug(node)


# A daemon at rest has 29, and one for each directory on the way while it makes a link.
@pytest.mark.parametrize("descriptors", [40, 44, 50])
def test_a_daemon_without_descriptors_lives_on_and_every_job_gets_a_path(
    root: Path, descriptors: int
) -> None:
    root.mkdir()
    files = sources(root, 6)
    with LocalDaemons(root) as local:
        local.start_tracker()
        command = ["prlimit", f"--nofile={descriptors}:{descriptors}", *COMMAND]
        node = local.start_daemon(command=command)
        with ThreadPoolExecutor(4) as jobs:
            gets = [jobs.submit(node.run, "get", "-0", *files) for _ in range(4)]
            for get in gets:
                assert_usable(node, get.result(), *files)
        # What was lacking was descriptors alone: now that there are some again, all goes well.
        wait_until(lambda: node.run("get", "--strict", files[0]).returncode == 0, 60, "a copy")
        assert_no_bug(node)


def test_a_range_that_cannot_be_read_for_want_of_memory_keeps_no_slot(root: Path) -> None:
    root.mkdir()
    file, other = sources(root, 2)
    with LocalDaemons(root) as local:
        local.start_tracker("file_servers.default.slots_max = 1")
        full = local.start_daemon("a", command=OUT_OF_MEMORY)
        sound = local.start_daemon("b")

        copies = full.get(file) + sound.get(other)

        assert [Path(os.fsdecode(copy)).read_bytes() for copy in copies] == [
            file.read_bytes(),
            other.read_bytes(),
        ]
        assert "cannot read a range" in full.said() and "Cannot allocate memory" in full.said()


def test_chunks_that_cannot_be_fetched_for_want_of_memory_are_fetched_afterwards(
    root: Path,
) -> None:
    root.mkdir()
    scarce = root / "scarce"
    [file] = sources(root, 1)
    with LocalDaemons(root) as local:
        local.start_tracker()
        node = local.start_daemon("a", command=[*OUT_OF_BUFFERS, scarce])
        local.start_daemon("b").get(file)

        scarce.touch()
        assert_usable(node, node.run("get", "-0", file), file)
        scarce.unlink()

        node.get(file)
        assert "cannot fetch a chunk" in node.said() and "Cannot allocate memory" in node.said()


def test_who_asks_while_there_is_no_thread_is_answered_and_gets_copies_afterwards(
    root: Path,
) -> None:
    root.mkdir()
    scarce = root / "scarce"
    files = sources(root, 2)
    with LocalDaemons(root) as local:
        local.start_tracker()
        node = local.start_daemon(command=[*OUT_OF_THREADS, scarce])

        scarce.touch()
        for _ in range(THREADS_PER_PLACE // len(files) + 1):
            done = node.run("get", "-0", *files)
            assert_usable(node, done, *files)
            assert b"can't start new thread" in done.stderr
        scarce.unlink()

        def opened() -> set[str]:
            descriptors = Path(f"/proc/{node.process.pid}/fd").iterdir()
            return {os.readlink(fd) for fd in descriptors if fd.is_symlink()}

        wait_until(lambda: opened().isdisjoint(map(str, files)), PATIENCE_S, "closed descriptors")
        node.get(*files)


def test_a_range_for_which_there_is_no_thread_is_read_afterwards(root: Path) -> None:
    root.mkdir()
    scarce = root / "scarce"
    file, other = sources(root, 2)
    empty = root / "empty"
    empty.touch()
    with LocalDaemons(root) as local:
        local.start_tracker("file_servers.default.slots_max = 1")
        node = local.start_daemon("a", command=[*OUT_OF_THREADS, scarce])
        sound = local.start_daemon("b")
        node.run("get", empty)  # leaves a thread that looks at files, but none that reads

        scarce.touch()
        assert_usable(node, node.run("get", "-0", file), file)
        sound.get(other)
        scarce.unlink()

        node.get(file)


def test_chunks_and_files_for_which_there_is_no_thread_come_from_peers_afterwards(
    root: Path,
) -> None:
    root.mkdir()
    scarce = root / "scarce"
    big, other = sources(root, 2)
    small = root / "small"
    small.write_bytes(b"of one chunk")
    with LocalDaemons(root) as local:
        local.start_tracker()
        node = local.start_daemon("a", command=[*OUT_OF_THREADS, scarce])
        sound = local.start_daemon("b")
        sound.get(big, small, other)
        empty = root / "empty"
        empty.touch()
        node.run("get", empty)  # leaves a thread that looks at files, but none that fetches

        scarce.touch()
        assert_usable(node, node.run("get", "-0", big), big)
        assert_usable(node, node.run("get", "-0", small, other), small, other)
        scarce.unlink()

        node.get(big, small, other)
        assert not node.status()["node"]["read_bytes"]
        assert_no_bug(node)


def test_a_copy_that_the_disk_cannot_read_for_a_peer_is_taken_out_at_once(root: Path) -> None:
    root.mkdir()
    (file,) = sources(root, 1)
    bad = root / "bad"
    with LocalDaemons(root) as local:
        local.start_tracker()
        settings = f'[file_servers.fs]\npaths = ["{root}"]\n'
        node = local.start_daemon("a", settings, command=[*BAD_SECTOR, bad])
        other = local.start_daemon("b", settings)
        node.get(file)

        bad.touch()
        other.get(file)

        taken_out = f"1 chunks of the copy of {file} are rotten: taken out"
        wait_until(lambda: taken_out in node.said(), PATIENCE_S, "the copy to be taken out")
        bad.unlink()
        (copy,) = node.get(file)
        assert Path(os.fsdecode(copy)).read_bytes() == file.read_bytes()
        assert_no_bug(node)


def test_replicas_of_which_the_disk_could_not_tell_are_announced_later(root: Path) -> None:
    root.mkdir()
    (file,) = sources(root, 1)
    settings = f'[file_servers.fs]\npaths = ["{root}"]\n'
    with LocalDaemons(root) as local:
        local.start_tracker()
        node = local.start_daemon("a", settings)
        (copy,) = node.get(file)
        node.end()
        node = local.start_daemon("a", settings, command=UNLISTED)
        other = local.start_daemon("b", settings)

        wait_until(
            lambda: copy in other.run("locate", file).stdout, PATIENCE_S, "the tracker to know"
        )

        assert "cannot tell the tracker of all replicas" in node.said()
        assert_no_bug(node)
