"""Several real disks, one of which is lost under a daemon: real file systems, real processes."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from swarmcache.client import Client
from swarmcache.demo import Program
from swarmcache.errors import DaemonUnavailable
from tests.box import wait_until
from tests.loop_disks import LoopDisk, loop_disk

pytestmark = [pytest.mark.box, pytest.mark.slow]

MIB = 1 << 20
PATIENCE_S = 60.0
LOSS = "lost the cache directory"
SIZES_MIB = {"ext4": 320, "xfs": 384}  # about the same room, for the log of the latter is large
MOUNT_OPTIONS = {"ext4": ["errors=remount-ro"], "xfs": []}


class Node:
    """A daemon of this machine with cache directories on these disks."""

    def __init__(self, place: Path, tracker: str, roots: Sequence[Path], *options: str) -> None:
        self.socket = place / "run" / "daemon.sock"
        self._arguments = [
            "daemon",
            "--listen",
            "127.0.0.1:0",
            "--tracker",
            tracker,
            "--config",
            "/dev/null",
            "--socket",
            str(self.socket),
            *(text for root in roots for text in ("--cache-dir", str(root))),
        ]
        self._environment = {**os.environ, **dict(option.split("=", 1) for option in options)}
        self.start()

    def start(self) -> None:
        self.program = Program("the daemon", self._arguments, self._environment)
        self.program.wait_until_ready()
        self.wait_for(lambda status: status["node"]["tracker_connected"], "the tracker")

    def stop(self) -> None:
        if self.program.process.returncode is None:
            self.program.process.send_signal(signal.SIGTERM)
            wrong = self.program.end()
            assert not wrong, wrong

    def errors(self) -> list[str]:
        return [line for line in self.program.lines if " ERROR " in line or "Traceback" in line]

    def only_error(self) -> str:
        errors = self.errors()
        assert len(errors) == 1, self.program.said()
        return errors[0]

    def status(self) -> dict[str, Any]:
        with Client(bytes(self.socket)) as client:
            return client.status()

    def wait_for(self, condition: Callable[[dict[str, Any]], object], what: str) -> None:
        def fulfilled() -> bool:
            try:
                return bool(condition(self.status()))
            except DaemonUnavailable:
                return False

        wait_until(fulfilled, PATIENCE_S, f"{what}: {self.program.said()}")

    def wait_until_lost(self) -> None:
        """Until the daemon has noticed that a disk is lost."""
        self.wait_for(lambda status: any(d["lost"] for d in status["node"]["directories"]), LOSS)

    def replicas(self) -> int:
        """How many replicas the tracker believes this node to hold."""
        status = self.status()
        nodes = {node["node"]: node["replicas"] for node in status["cluster"]["nodes"]}
        return int(nodes[status["node"]["address"]])

    def getting(self, *files: Path) -> subprocess.Popen[bytes]:
        """Start a ``get``."""
        command = [sys.executable, "-m", "swarmcache", "get", "--no-progress", *map(str, files)]
        environment = {**os.environ, "SWARMCACHE_SOCKET": str(self.socket)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def get(self, *files: Path) -> list[Path]:
        """What ``swarmcache get`` prints; every path must have the bytes of its source."""
        return finish(self.getting(*files), *files)


def finish(getting: subprocess.Popen[bytes], *files: Path) -> list[Path]:
    output, reasons = getting.communicate(timeout=PATIENCE_S)
    assert getting.returncode == 0, reasons
    paths = [Path(line) for line in output.decode().splitlines()]
    for path, file in zip(paths, files, strict=True):
        assert path.read_bytes() == file.read_bytes()
    return paths


class Setting:
    """A tracker, and two disks with an empty cache directory each."""

    def __init__(self, place: Path, disks: Sequence[LoopDisk], started: ExitStack) -> None:
        self.place = place
        self.disks = disks
        self.sources = place / "sources"
        self.roots = [disk.path / "cache" for disk in disks]
        for root in self.roots:
            root.mkdir(mode=0o711)
        self._started = started
        arguments = ["tracker", "--listen", "127.0.0.1:0", "--config", "/dev/null"]
        arguments += ["--state-dir", str(place / "tracker")]
        self._tracker = Program("the tracker", arguments, os.environ)
        started.callback(self._end_tracker)
        self._address = self._tracker.wait_until_ready()

    def _end_tracker(self) -> None:
        self._tracker.process.send_signal(signal.SIGTERM)
        self._tracker.end()

    def node(self, name: str, roots: Sequence[Path], *options: str) -> Node:
        (self.place / name).mkdir()
        node = Node(self.place / name, self._address, roots, *options)
        self._started.callback(node.stop)
        return node

    def file(self, name: str, size_bytes: int) -> Path:
        path = self.sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(secrets.token_bytes(size_bytes))
        return path

    def disk_of(self, path: Path) -> int:
        """On which of the disks a path is; -1 for none."""
        found = [number for number, root in enumerate(self.roots) if path.is_relative_to(root)]
        return found[0] if found else -1


@contextmanager
def setting(place: Path, kinds: Sequence[str]) -> Iterator[Setting]:
    with ExitStack() as mounted:
        disks = [
            mounted.enter_context(loop_disk(place, kind, SIZES_MIB[kind], *MOUNT_OPTIONS[kind]))
            for kind in kinds
        ]
        with ExitStack() as started:
            yield Setting(place, disks, started)


@pytest.fixture
def place(root: Path) -> Path:
    """A directory on a real disk."""
    root.mkdir()
    return root


def test_files_spread_over_two_disks_and_those_of_one_directory_stay_together(place: Path) -> None:
    with setting(place, ["ext4", "xfs"]) as here:
        node = here.node("node", here.roots)
        files = [here.file(f"{i}/{j}", 4 * MIB) for i in range(6) for j in range(3)]
        paths = node.get(*files)

        disks = [here.disk_of(path) for path in paths]
        assert set(disks) == {0, 1}
        assert all(len(set(disks[i : i + 3])) == 1 for i in range(0, 18, 3)), disks
        assert abs(disks.count(0) - 9) <= 6
        shown = node.status()["node"]
        assert [each["path"] for each in shown["directories"]] == [str(r) for r in here.roots]
        for field in ("capacity_bytes", "used_bytes", "file_count"):
            assert shown["disk"][field] == sum(d["disk"][field] for d in shown["directories"])
        assert node.get(*files) == paths
        assert node.errors() == []


def test_the_copy_of_a_directory_is_one_on_one_disk_however_deep_it_is(place: Path) -> None:
    with setting(place, ["ext4", "xfs"]) as here:
        node = here.node("node", here.roots)
        for i in range(4):
            for name in ("f", "deep/f", "deep/deeper/f"):
                here.file(f"tree/{i}/{name}", 4 * MIB)
        getting = node.getting(here.sources / "tree")
        output, reasons = getting.communicate(timeout=PATIENCE_S)

        tree = Path(output.decode().removesuffix("\n"))
        assert here.disk_of(tree) >= 0, reasons
        for source in (here.sources / "tree").rglob("f"):
            copy = tree / source.relative_to(here.sources / "tree")
            assert copy.read_bytes() == source.read_bytes()
        node.get(here.file("single/f", MIB))
        used = [each["disk"]["used_bytes"] > 0 for each in node.status()["node"]["directories"]]
        assert used == [True, True], "the rest of the room is used as well"


# The last three are all that differ in more than the name of the file system.
WAYS: list[tuple[str, Callable[[LoopDisk], None]]] = [
    ("ext4", LoopDisk.shut_down),
    ("ext4", LoopDisk.unmount),
    ("xfs", LoopDisk.shut_down),
    ("ext4", LoopDisk.make_read_only),
    ("xfs", LoopDisk.unmount),
]


@pytest.mark.parametrize(("kind", "lose"), WAYS)
def test_a_lost_disk_takes_only_its_files_away_while_gets_go_on(
    place: Path, kind: str, lose: Callable[[LoopDisk], None]
) -> None:
    with setting(place, [kind, "ext4"]) as here:
        holder = here.node("holder", [place / "holder cache"])
        node = here.node("node", here.roots)
        files = [here.file(f"{i}/f", 8 * MIB) for i in range(6)]
        holder.get(*files)
        disks = [here.disk_of(path) for path in node.get(*files)]
        assert set(disks) == {0, 1}
        wait_until(lambda: node.replicas() == 6, PATIENCE_S, "six replicas")

        lose(here.disks[0])
        if lose is LoopDisk.make_read_only:  # what can be read is handed out until that is noticed
            node.wait_until_lost()

        # Who asks for what was on the lost disk gets it from peers, on the other disk.
        assert [here.disk_of(path) for path in node.get(*files)] == [1] * 6
        wait_until(lambda: node.replicas() == 6, PATIENCE_S, "six replicas again")
        message = node.only_error()
        assert f"{LOSS} {here.roots[0]}: " in message
        lost, rest = sorted(node.status()["node"]["directories"], key=lambda each: not each["lost"])
        assert (lost["path"], rest["path"]) == tuple(map(str, here.roots))
        assert rest["disk"]["file_count"] == 6
        if lose is LoopDisk.unmount:
            assert list(here.disks[0].path.iterdir()) == [], "written below the mount point"
        node.stop()


@pytest.mark.parametrize(("kind", "lose"), WAYS[2:])
def test_a_download_to_a_disk_that_is_lost_goes_on_on_another_one(
    place: Path, kind: str, lose: Callable[[LoopDisk], None]
) -> None:
    with setting(place, [kind, "ext4"]) as here:
        file = here.file("big", 24 * MIB)
        here.node("holder", [place / "holder cache"]).get(file)
        slow = "SWARMCACHE_TRANSFER__DOWNLOAD_RATE_MAX=12MiB"
        node = here.node("node", here.roots, slow)
        (here.disks[1].path / "ballast").write_bytes(bytes(60 * MIB))  # so the other is chosen
        getting = node.getting(file)

        def half(status: dict[str, Any]) -> bool:
            done = [int(each["done_bytes"]) for each in status["node"]["downloads"]]
            return sum(done) >= 6 * MIB

        node.wait_for(half, "a part of the file")
        before = [each["disk"]["used_bytes"] > 0 for each in node.status()["node"]["directories"]]
        lose(here.disks[0])
        [path] = finish(getting, file)

        assert before == [True, False]
        assert here.disk_of(path) == 1
        message = node.only_error()
        assert LOSS in message
        node.stop()


def test_what_is_lost_is_told_to_the_tracker_without_anybody_asking_for_it(place: Path) -> None:
    with setting(place, ["ext4", "xfs"]) as here:
        node = here.node("node", here.roots)
        files = [here.file(f"{i}/f", 8 * MIB) for i in range(4)]
        disks = [here.disk_of(path) for path in node.get(*files)]
        here.disks[1].shut_down()

        wait_until(lambda: node.replicas() == disks.count(0), PATIENCE_S, "fewer replicas")
        assert node.status()["node"]["disk"]["file_count"] == disks.count(0)


def test_with_all_disks_lost_jobs_get_the_original_paths(place: Path) -> None:
    with setting(place, ["ext4", "xfs"]) as here:
        node = here.node("node", here.roots)
        files = [here.file(f"{i}/f", 8 * MIB) for i in range(4)]
        node.get(*files)
        here.disks[0].shut_down()
        here.disks[1].unmount()

        assert node.get(*files) == files
        assert len([line for line in node.errors() if LOSS in line]) == 2
        assert "none is left" in node.errors()[-1]
        getting = node.getting(files[0])
        _, reason = getting.communicate(timeout=PATIENCE_S)
        assert b"no cache directory is left" in reason
        node.stop()


@pytest.mark.parametrize(("kind", "lose"), WAYS[2:])
def test_a_disk_that_was_mended_is_used_again_after_a_restart(
    place: Path, kind: str, lose: Callable[[LoopDisk], None]
) -> None:
    with setting(place, [kind, "xfs"]) as here:
        node = here.node("node", here.roots)
        files = [here.file(f"{i}/f", 8 * MIB) for i in range(4)]
        paths = node.get(*files)
        wait_until(lambda: node.replicas() == 4, PATIENCE_S, "four replicas")
        node.stop()
        node.start()
        assert node.get(*files) == paths
        lose(here.disks[0])
        node.wait_until_lost()
        node.stop()

        if lose is not LoopDisk.unmount:
            node.start()  # the disk is still broken: the other one serves
            assert node.get(files[0])
            assert len(node.errors()) == 1
            node.stop()
            here.disks[0].unmount()
        node.start()  # and now it is away
        message = node.only_error()
        assert f"{here.roots[0]} is not there: is its disk mounted?" in message
        node.stop()
        assert list(here.disks[0].path.iterdir()) == []
        here.disks[0].mount()
        node.start()

        assert node.errors() == []
        again = node.get(*files)
        assert all(here.disk_of(path) >= 0 for path in again)
        assert [p for p in paths if here.disk_of(p) == 1] == [
            p for p, was in zip(again, paths, strict=True) if here.disk_of(was) == 1
        ]
        node.stop()
