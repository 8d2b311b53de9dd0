"""Temporary files beside their destination: whose are alive, and whose are left over."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from swarmcache import left_over
from swarmcache.tree_walk import walk
from swarmcache.write_beside import (
    PREFIX,
    SILENT_S_MAX,
    machine_tag,
    make_beside,
    remove_left_over,
)
from tests.local_daemons import COMMAND

UID = os.geteuid()
OTHER_MACHINE = f"{PREFIX}{'0' * 12}-{'1' * 16}"


@pytest.fixture
def directory_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def removed(directory_fd: int, *, owner_uid: int | None = UID, later_s: float = 0.0) -> list[str]:
    failed: list[OSError] = []
    found = remove_left_over(directory_fd, owner_uid, time.time() + later_s, failed.append)
    assert failed == []
    return [each.name for each in found]


def test_a_file_is_its_writers_alone_until_it_is_closed(directory_fd: int) -> None:
    fd, name = make_beside(directory_fd)

    assert os.fstat(fd).st_mode & 0o777 == 0o600
    assert removed(directory_fd, later_s=2 * SILENT_S_MAX) == []
    os.close(fd)
    assert removed(directory_fd) == [name]
    assert os.listdir(directory_fd) == []


@pytest.mark.parametrize("call", [os.open, fcntl.flock])
def test_who_is_ended_while_the_file_server_takes_its_time_leaves_nothing(
    tmp_path: Path, directory_fd: int, call: object
) -> None:
    """A signal is handled when the call that it came in has made the file, or locked it."""
    made: list[str] = []

    def end(_frame: FrameType, event: str, function: object) -> None:
        if event == "c_return" and function is call:
            made.extend(os.listdir(tmp_path))
            raise SystemExit(128 + signal.SIGTERM)

    former = sys.getprofile()
    sys.setprofile(end)
    try:
        with pytest.raises(SystemExit):
            make_beside(directory_fd)
    finally:
        sys.setprofile(former)

    assert len(made) == 1
    assert os.listdir(tmp_path) == []


def test_what_another_machine_writes_is_left_over_only_after_a_day(
    tmp_path: Path, directory_fd: int
) -> None:
    (tmp_path / OTHER_MACHINE).write_text("a part")

    assert removed(directory_fd) == []
    assert removed(directory_fd, later_s=SILENT_S_MAX + 1) == [OTHER_MACHINE]


def test_the_time_of_an_old_source_does_not_make_its_copy_left_over(
    tmp_path: Path, directory_fd: int
) -> None:
    """A copy has it before it is in place: its writer may wait for a slot, and syncs it."""
    (tmp_path / OTHER_MACHINE).write_text("all of it")
    os.utime(tmp_path / OTHER_MACHINE, (0, 0))

    assert removed(directory_fd) == []
    assert removed(directory_fd, later_s=SILENT_S_MAX + 1) == [OTHER_MACHINE]


def test_nothing_else_is_removed(tmp_path: Path, directory_fd: int) -> None:
    ours = f"{PREFIX}{machine_tag()}-"
    (tmp_path / "a file").touch()
    (tmp_path / f"{ours}too-short").touch()
    (tmp_path / f"{ours}{'2' * 16}").symlink_to("a file")
    (tmp_path / f"{ours}{'3' * 16}").mkdir()
    os.mkfifo(tmp_path / f"{ours}{'4' * 16}")
    (tmp_path / f"{ours}{'5' * 16}").touch()
    before = set(os.listdir(directory_fd))

    assert removed(directory_fd, owner_uid=UID + 1) == []
    assert set(os.listdir(directory_fd)) == before
    assert removed(directory_fd, owner_uid=None) == [f"{ours}{'5' * 16}"]


def test_writers_and_those_who_tidy_up_do_not_get_in_each_others_way(directory_fd: int) -> None:
    """Whoever finds a file before its writer has locked it may remove it; its writer notices."""
    ended = threading.Event()

    def tidy() -> None:
        while not ended.is_set():
            removed(directory_fd)

    threads = [threading.Thread(target=tidy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            fd, name = make_beside(directory_fd)
            assert os.path.samestat(os.stat(name, dir_fd=directory_fd), os.fstat(fd))
            os.unlink(name, dir_fd=directory_fd)
            os.close(fd)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_doctor_does_not_take_a_stdout_that_is_full_for_a_directory_that_cannot_be_read(
    tmp_path: Path,
) -> None:
    names = [f"{PREFIX}{machine_tag()}-{number:016}" for number in range(200)]
    for name in names:
        (tmp_path / name).touch()

    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "doctor", "--clean", tmp_path],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )

    assert done.returncode == 1
    assert done.stderr == b"swarmcache: cannot write the result: No space left on device\n"


def test_doctor_ends_in_a_tree_that_is_made_to_have_no_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{PREFIX}{machine_tag()}-{'6' * 16}"
    top = os.open(tmp_path, os.O_RDONLY)
    below = os.dup(top)
    for _ in range(1_100):
        os.mkdir("d", dir_fd=below)
        deeper = os.open("d", os.O_RDONLY, dir_fd=below)
        os.close(below)
        below = deeper
    os.close(below)
    (tmp_path / name).write_text("a part")

    assert left_over.clean([tmp_path]) == 1

    said = capsys.readouterr()
    assert said.out == f"removed: {tmp_path}/{name} (6 B)\n"
    assert "directories are nested more than 256 deep" in said.err
    subprocess.run(["rm", "-r", "d"], cwd=tmp_path, check=True)
    os.close(top)


def test_doctor_looks_below_but_through_no_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{PREFIX}{machine_tag()}-{'6' * 16}"
    for directory in ("clean/below", "elsewhere"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / name).write_text("a part")
    (tmp_path / "clean/link").symlink_to("../elsewhere")

    assert left_over.clean([tmp_path / "clean"]) == 0
    assert left_over.clean([tmp_path / "none"]) == 1

    said = capsys.readouterr()
    assert said.out == f"removed: {tmp_path}/clean/below/{name} (6 B)\n"
    assert "none': cannot be looked through: No such file or directory" in said.err
    assert (tmp_path / "elsewhere" / name).exists()


def test_what_cannot_be_looked_through_is_named_by_its_path(tmp_path: Path) -> None:
    for directory in ("a/one", "b/two"):
        (tmp_path / directory).mkdir(parents=True)
    failed: list[OSError] = []
    for path, directories, _, _ in walk(str(tmp_path), failed.append):
        if path.endswith(("/a", "/b")):
            (below,) = directories
            shutil.rmtree(Path(path, below))
            Path(path, below).touch()

    assert {error.filename for error in failed} == {f"{tmp_path}/a/one", f"{tmp_path}/b/two"}


def test_doctor_looks_through_a_directory_that_is_named_by_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{PREFIX}{machine_tag()}-{'6' * 16}"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / name).write_text("a part")
    (tmp_path / "link").symlink_to("there")

    assert left_over.clean([tmp_path / "link"]) == 0

    assert capsys.readouterr().out == f"removed: {tmp_path}/link/{name} (6 B)\n"


@pytest.mark.slow
@pytest.mark.skipif(UID != 0, reason="needs root")
def test_doctor_goes_on_where_one_directory_cannot_be_cleaned(tmp_path: Path) -> None:
    name = f"{PREFIX}{machine_tag()}-{'6' * 16}"
    (tmp_path / "below").mkdir()
    for directory in (tmp_path, tmp_path / "below"):
        (directory / name).write_text("a part")
    mounts = 'for place in "$0" "$0/below"; do mount --bind "$place" "$place" || exit 9; done'
    read_only = 'mount -o remount,ro,bind "$0" && exec "$@" doctor --clean "$0"'

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{mounts}; {read_only}", tmp_path, *COMMAND],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert done.stdout == f"removed: {tmp_path}/below/{name} (6 B)\n"
    assert "Read-only file system" in done.stderr


@pytest.mark.skipif(UID != 0, reason="needs root")
def test_doctor_names_what_is_left_over_and_may_not_be_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for root on a file server that takes root for nobody."""
    name = f"{PREFIX}{machine_tag()}-{'6' * 16}"
    (tmp_path / name).touch()
    os.chown(tmp_path / name, 6001, 6001)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)

    os.seteuid(6001)
    try:
        failed = left_over.clean([Path()])
    finally:
        os.seteuid(0)

    said = capsys.readouterr()
    assert (failed, said.out) == (1, "")
    assert said.err == f"swarmcache: './{name}': cannot be removed: Permission denied\n"
