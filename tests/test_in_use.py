"""Whether files are in use, asked of real processes that use them in every way there is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from swarmcache import in_use
from swarmcache.in_use import FileSystem, OpenFiles, UseCheck, file_system_of
from tests.box import SFTP_SERVER, require, wait_until
from tests.disk_helpers import needs_root
from tests.loop_disks import loop_disk

NAME, OTHER_NAME = "object", "users link"


@pytest.fixture
def directory(root: Path) -> Iterator[Path]:
    """With one file that has two names."""
    root.mkdir()
    (root / NAME).write_bytes(b"content" * 1000)
    os.link(root / NAME, root / OTHER_NAME)
    yield root


@pytest.fixture(params=["lease", "proc"])
def check(request: pytest.FixtureRequest, directory: Path) -> Iterator[Callable[[], bool]]:
    """Whether the file is unused, asked in either way."""
    with opened(directory) as fd:
        use_check = UseCheck(fd)
        if request.param == "proc":
            use_check._leases = False
        assert use_check.offers_leases() == (request.param == "lease")

        def unused() -> bool:
            with use_check.unused([NAME], fd) as found:
                return found == {NAME}

        yield unused


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def file_system(directory: Path) -> FileSystem:
    with opened(directory) as fd:
        return file_system_of(fd)


@contextmanager
def process(
    path: Path, script: str = "", uid: int | None = None, under: Sequence[str | Path] = ()
) -> Iterator[None]:
    """Another process, once it has opened ``path`` or run a Python script with it, and waits.

    ``under``: a command that runs the one that follows.
    """
    command: list[str | Path] = ["sh", "-c", 'exec 3<"$1" && echo && exec cat', "sh", path]
    if script:
        program = textwrap.dedent(script) + "\nprint(flush=True)\nsys.stdin.read()\n"
        command = [sys.executable, "-c", program, path]
    with subprocess.Popen(
        [*under, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=uid
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        assert popen.stdout.readline() == b"\n"
        yield
        popen.stdin.close()
        assert popen.wait() == 0


MAPPED = """
    import mmap, os, sys
    with open(sys.argv[1], "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    # Python keeps a descriptor of its own for the mapping, which would hide what is tested.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:
                pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, OTHER_NAME])
@pytest.mark.parametrize("script", ["", MAPPED], ids=["open", "mapped"])
def test_a_file_that_another_process_has_open_or_mapped_is_in_use(
    check: Callable[[], bool], directory: Path, name: str, script: str
) -> None:
    assert check()
    with process(directory / name, script):
        assert not check()
    assert check()


@needs_root
@pytest.mark.slow
def test_a_file_that_another_user_has_open_is_in_use(
    check: Callable[[], bool], directory: Path
) -> None:
    directory.chmod(0o755)
    with process(directory / OTHER_NAME, uid=6001):
        assert not check()
    assert check()


def test_a_descriptor_of_ones_own_counts_as_well(
    check: Callable[[], bool], directory: Path
) -> None:
    with (directory / OTHER_NAME).open("rb"):
        assert not check()
    assert check()


def test_a_file_that_is_not_there_is_not_in_use(check: Callable[[], bool], directory: Path) -> None:
    (directory / NAME).unlink()
    assert check()


@pytest.mark.slow
def test_who_opens_a_file_while_it_is_taken_away_waits_and_harms_nobody(directory: Path) -> None:
    """The opener reads all of it, or finds nothing; this process is not ended by the signal."""
    with ExitStack() as stack:
        fd = stack.enter_context(opened(directory))
        use_check = UseCheck(fd)
        with use_check.unused([NAME], fd) as unused:
            assert unused == {NAME}
            reader = subprocess.Popen(
                ["cat", directory / OTHER_NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            # The kernel has sent its signal when the opener waits in the open.
            wait_until_in_open(reader.pid)
            with pytest.raises(BlockingIOError):
                os.open(NAME, os.O_RDONLY | os.O_NONBLOCK, dir_fd=fd)
            os.unlink(NAME, dir_fd=fd)
            os.unlink(OTHER_NAME, dir_fd=fd)
        output, errors = reader.communicate(timeout=20)

    assert (output, errors) == (b"content" * 1000, b"")


def wait_until_in_open(pid: int) -> None:
    """Until the process sleeps in ``open``, waiting for a lease to be given back."""
    wchan = Path(f"/proc/{pid}/wchan")  # the function in the kernel in which it sleeps
    wait_until(lambda: "break_lease" in wchan.read_text(), 20.0, "the opener waits for the lease")


def test_leases_that_the_kernel_refuses_are_not_counted_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "leases are off")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with opened(directory) as fd:
        use_check = UseCheck(fd)
        assert not use_check.offers_leases()
        with use_check.unused([NAME], fd) as unused:
            assert unused == {NAME}
        with (directory / OTHER_NAME).open("rb"), use_check.unused([NAME], fd) as unused:
            assert unused == set()
    assert sorted(os.listdir(directory)) == [NAME, OTHER_NAME]


# --- for people to see ---------------------------------------------------------------------------


def test_what_other_processes_have_open_or_mapped_is_seen(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "SEEN_MAX_S", 0.0)
    status = (directory / NAME).stat()
    file = (status.st_dev, status.st_ino)
    open_files = OpenFiles([file_system(directory)])

    assert open_files.among([file]) == set()
    with process(directory / OTHER_NAME):
        assert open_files.among([file, (0, 0)]) == {file}
    with process(directory / NAME, MAPPED):
        assert open_files.among([file]) == {file}
    with open(directory / NAME, "rb"):
        assert open_files.among([file]) == set(), "this process does not count"


@pytest.mark.box
@pytest.mark.slow
def test_a_file_that_somebody_has_open_on_a_failing_disk_hides_no_other(
    directory: Path, check: Callable[[], bool], tmp_path: Path
) -> None:
    status = (directory / NAME).stat()
    file = (status.st_dev, status.st_ino)
    with loop_disk(tmp_path, "xfs", 320) as disk:
        other = disk.path / "other"
        other.touch()
        with process(other):
            disk.shut_down()
            with pytest.raises(OSError, match="Input/output error"):
                other.stat()
            assert check()
            with process(directory / NAME):
                assert not check()
                assert OpenFiles([file_system(directory)]).among([file]) == {file}


@pytest.mark.box
@pytest.mark.slow
def test_what_is_open_on_a_hung_file_server_keeps_nobody_waiting(
    directory: Path, check: Callable[[], bool], tmp_path: Path
) -> None:
    status = (directory / NAME).stat()
    file = (status.st_dev, status.st_ino)
    with file_server(tmp_path) as (mount, server), process(mount / "file"), hung(server):
        assert check()
        with process(directory / NAME):
            assert not check()
            assert OpenFiles([file_system(directory)]).among([file]) == {file}


@contextmanager
def file_server(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Where one of its own is mounted, with one file that must be looked at there every time."""
    require()
    export, mount = tmp_path / "export", tmp_path / "mount"
    for each in (export, mount):
        each.mkdir()
    (export / "file").touch()
    options = "passive,attr_timeout=0,entry_timeout=0,dir_cache=no"
    sshfs = ["sshfs", "-f", f"server:{export}", str(mount), "-o", options]
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        server = stack.enter_context(popen([str(SFTP_SERVER)], theirs))
        stack.callback(server.kill)
        stack.enter_context(popen(sshfs, ours))
        wait_until(mount.is_mount, 20, "the mount")
        stack.callback(lambda: subprocess.run(["fusermount3", "-u", mount], check=True))
        yield mount, server


def popen(command: list[str], connection: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=connection.fileno(), stdout=connection.fileno())


@contextmanager
def hung(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """For as long as the block takes, which must not be long."""
    late = threading.Timer(10, lambda: server.send_signal(signal.SIGCONT))
    server.send_signal(signal.SIGSTOP)
    late.start()
    try:
        yield
        assert not late.finished.is_set(), "it was waited for"
    finally:
        late.cancel()
        server.send_signal(signal.SIGCONT)


@needs_root
@pytest.mark.slow
def test_a_file_that_is_open_through_another_mount_or_in_another_namespace_is_in_use(
    directory: Path, check: Callable[[], bool], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bind = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    container = *("unshare", "--mount", "sh", "-c", bind, "sh"), directory, elsewhere
    with process(elsewhere / OTHER_NAME, under=container):
        assert not (elsewhere / OTHER_NAME).exists(), "it is in a namespace of its own"
        assert not check()
    assert check()


def test_proc_is_not_looked_through_for_every_question(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "SEEN_MAX_S", 3600.0)
    status = (directory / NAME).stat()
    open_files = OpenFiles([file_system(directory)])
    assert open_files.among([(status.st_dev, status.st_ino)]) == set()

    with process(directory / NAME):
        assert open_files.among([(status.st_dev, status.st_ino)]) == set()
