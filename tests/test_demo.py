"""The demo end to end: real processes, and nothing of them left whatever becomes of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

import swarmcache

pytestmark = pytest.mark.slow

NOTHING_LEFT = "Nothing is left behind: all processes have ended, all files are removed."


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """The TMPDIR of the demo; checked to be empty at the end, and no process to be in there."""
    place = tmp_path / "tmp"
    place.mkdir()
    yield place
    assert list(place.iterdir()) == []
    assert processes_that_mention(place) == []


def processes_that_mention(place: Path) -> list[str]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if bytes(place) in command:
            found.append(os.fsdecode(command.replace(b"\0", b" ")))
    return found


def start_demo(
    place: Path,
    *options: str,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int = subprocess.STDOUT,
) -> subprocess.Popen[str]:
    environment = {
        "TMPDIR": str(place),
        "COLUMNS": "120",
        "PYTHONPATH": str(Path(swarmcache.__path__[0]).parent),
        "PYTHONUNBUFFERED": "1",
        # Settings of the user must not reach the demo.
        "SWARMCACHE_CLUSTER__TRACKER": "nowhere.invalid:1",
        "SWARMCACHE_SOCKET": "/nowhere/daemon.sock",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "swarmcache", "demo", *options],
        stdout=stdout,
        stderr=stderr,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("size", ["20MB", "1", "0"])
def test_four_nodes_print_different_paths_of_identical_copies(place: Path, size: str) -> None:
    with start_demo(place, "--size", size) as demo:
        output, _ = demo.communicate(timeout=100)

    assert demo.returncode == 0, output
    paths = re.findall(r"^node \d printed (/.*)$", output, re.MULTILINE)
    digests = re.findall(r"^node \d SHA-256 ([0-9a-f]{64})$", output, re.MULTILINE)
    assert len(set(paths)) == len(digests) == 4
    assert len(set(digests)) == 1
    assert "1.00 x the file" in output
    assert output.splitlines()[-1] == NOTHING_LEFT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["Writing", "Starting a tracker", "On each of the 4 nodes"])
def test_an_interrupted_demo_cleans_up(place: Path, moment: str, number: signal.Signals) -> None:
    with start_demo(place, "--size", "300MB") as demo:
        assert demo.stdout is not None
        while moment not in demo.stdout.readline():
            pass
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=60)

    assert demo.returncode == 128 + number, output
    assert "Interrupted." in output
    assert output.splitlines()[-1] == NOTHING_LEFT


def test_a_node_that_dies_makes_the_demo_fail_and_clean_up(place: Path) -> None:
    with start_demo(place, "--size", "300MB") as demo:
        assert demo.stdout is not None
        while "On each of the 4 nodes" not in demo.stdout.readline():
            pass
        os.kill(pid_of_node(place, 3), signal.SIGKILL)
        output, _ = demo.communicate(timeout=100)

    assert demo.returncode == 1, output
    assert "The demo failed: get on node 3 did not print a cached path" in output
    assert "node 3 ended with exit code -9" in output


def pid_of_node(place: Path, number: int) -> int:
    (pid,) = (
        int(directory.name)
        for directory in Path("/proc").glob("[0-9]*")
        if f"{place}/".encode() in (command := (directory / "cmdline").read_bytes())
        and f"/node{number}/cache".encode() in command
    )
    return pid


def test_a_demo_without_room_says_so(place: Path) -> None:
    with start_demo(place, "--size", "4PiB") as demo:
        output, _ = demo.communicate(timeout=60)

    assert demo.returncode == 1
    assert "20.0 PiB are needed" in output


def test_a_demo_that_cannot_be_shown_says_so_and_cleans_up(place: Path) -> None:
    with open("/dev/full", "w") as full:
        demo = start_demo(place, "--size", "1", stdout=full, stderr=subprocess.PIPE)
        with demo:
            _, said = demo.communicate(timeout=60)

    assert demo.returncode == 1
    assert said == "swarmcache: cannot write the result: No space left on device\n"
