"""What a descriptor leads to, asked of the real kernel."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from swarmcache.config import load
from swarmcache.errors import SourceUnreadable
from swarmcache.source_file import (
    Mount,
    MountTable,
    SourceExaminer,
    SourceFile,
    _unescape,
    find_mount,
    same_version,
)
from tests.disk_helpers import as_stranger

NO_SETTINGS = load({}, {}, Path("/dev/null"))
MOUNTED_FOR_ONE = """
import os, socket, subprocess, sys
theirs, victim, file, sock = sys.argv[1:]
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", theirs, victim], check=True)
fd = os.open(file, os.O_RDONLY)
assert os.read(fd, 6) == b"theirs"
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sock)
    socket.send_fds(client, [b"x"], [fd])
    client.recv(1)  # the mount is there as long as we are
"""


@pytest.fixture
def examiner() -> Iterator[SourceExaminer]:
    examiner = SourceExaminer(NO_SETTINGS)
    yield examiner
    examiner.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path.resolve() / "data.hdf"
    path.write_bytes(b"content")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    return path


def examine(examiner: SourceExaminer, path: Path | str, flags: int = os.O_RDONLY) -> SourceFile:
    fd = os.open(path, flags)
    try:
        return examiner.examine(fd)
    finally:
        os.close(fd)


def test_a_file_has_the_name_size_and_time_that_the_kernel_says(
    examiner: SourceExaminer, file: Path
) -> None:
    version = examine(examiner, file).version

    assert version.path == os.fsencode(file)
    assert version.size_bytes == 7
    assert version.mtime_ns == 1_700_000_000_123_456_789


def test_a_symbolic_link_leads_to_the_real_path(
    examiner: SourceExaminer, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "directory").symlink_to(file.parent)
    (file.parent / "link").symlink_to(file)

    assert examine(examiner, tmp_path / "directory" / "link").version.path == os.fsencode(file)


@pytest.mark.parametrize(
    "name", ["a b", "new\nline", "tab\t", "back\\slash", "ümlaut", "x (deleted)"]
)
def test_odd_names_are_names(examiner: SourceExaminer, tmp_path: Path, name: str) -> None:
    path = tmp_path.resolve() / name
    path.write_bytes(b"x")

    assert examine(examiner, path).version.path == os.fsencode(path)


def test_a_name_that_is_not_utf8_is_a_name(examiner: SourceExaminer, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path.resolve()) + b"/\xff\xfe"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert examiner.examine(fd).version.path == path
    finally:
        os.close(fd)


def test_a_deleted_file_is_refused(examiner: SourceExaminer, file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    file.unlink()
    try:
        with pytest.raises(SourceUnreadable, match="does not lead to it"):
            examiner.examine(fd)
        Path(f"{file} (deleted)").write_bytes(b"content")
        with pytest.raises(SourceUnreadable, match="does not lead to it"):
            examiner.examine(fd)
    finally:
        os.close(fd)


def test_a_file_whose_directory_is_gone_is_refused(
    examiner: SourceExaminer, tmp_path: Path
) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "file").write_bytes(b"x")
    fd = os.open(directory / "file", os.O_RDONLY)
    (directory / "file").unlink()
    directory.rmdir()
    directory.write_bytes(b"a file where the directory was")
    try:
        with pytest.raises(SourceUnreadable, match="does not lead to it"):
            examiner.examine(fd)
    finally:
        os.close(fd)


def test_a_file_that_was_replaced_is_refused(examiner: SourceExaminer, file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    (file.parent / "new").write_bytes(b"content")
    os.replace(file.parent / "new", file)
    try:
        with pytest.raises(SourceUnreadable, match="does not lead to it"):
            examiner.examine(fd)
    finally:
        os.close(fd)


def test_a_hard_link_has_the_name_by_which_it_was_opened(
    examiner: SourceExaminer, file: Path
) -> None:
    other = file.parent / "other"
    os.link(file, other)

    assert examine(examiner, other).version.path == os.fsencode(other)
    assert examine(examiner, file).version.path == os.fsencode(file)


def test_a_memory_file_is_refused(examiner: SourceExaminer) -> None:
    fd = os.memfd_create("data")
    try:
        with pytest.raises(SourceUnreadable):
            examiner.examine(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH, os.O_WRONLY | os.O_APPEND])
def test_a_descriptor_that_cannot_be_read_proves_nothing(
    examiner: SourceExaminer, file: Path, flags: int
) -> None:
    with pytest.raises(SourceUnreadable, match="not open for reading"):
        examine(examiner, file, flags)


@pytest.mark.parametrize("path", ["/", "/dev/null", "/proc/self"])
def test_what_is_no_regular_file_is_refused(examiner: SourceExaminer, path: str) -> None:
    with pytest.raises(SourceUnreadable, match="not a regular file"):
        examine(examiner, path)


def test_pipes_and_sockets_are_refused(examiner: SourceExaminer) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(SourceUnreadable, match="not a regular file"):
            examiner.examine(reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_changed_file_is_another_version(examiner: SourceExaminer, file: Path) -> None:
    version = examine(examiner, file).version
    fd = os.open(file, os.O_RDONLY)
    try:
        assert same_version(fd, version)
        os.utime(file, ns=(1, 1_700_000_000_123_456_790))
        assert not same_version(fd, version)
        os.utime(file, ns=(1, version.mtime_ns))
        assert same_version(fd, version)
        os.truncate(file, 6)
        os.utime(file, ns=(1, version.mtime_ns))
        assert not same_version(fd, version)
    finally:
        os.close(fd)


def test_a_file_of_a_configured_prefix_is_shared_and_has_the_file_server_that_is_configured(
    file: Path,
) -> None:
    options = {"file_servers.corpora.paths": [str(file.parent)]}
    config = load(options, {}, Path("/dev/null"))
    examiner = SourceExaminer(config)
    source = examine(examiner, file)
    examiner.close()

    assert source.file_server == "corpora"
    assert source.version.origin == ""


def mounted(examiner: SourceExaminer, fs_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every path be on a file system of this type."""
    mounts = {b"/": Mount(b"/", fs_type, "nfs01:/export")}
    monkeypatch.setattr(examiner._mounts, "current", lambda: mounts)


@pytest.mark.parametrize("fs_type", ["nfs", "nfs4", "lustre", "fuse.sshfs", "beegfs", "9p", "new"])
def test_other_file_systems_than_local_ones_are_shared(
    examiner: SourceExaminer, file: Path, fs_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(examiner, fs_type, monkeypatch)
    source = examine(examiner, file)

    assert source.file_server == "nfs01:/export"
    assert source.version.origin == ""


def test_what_a_user_has_mounted_is_not_taken_for_the_file_server_that_it_is_called(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else whoever lets readers hang there keeps all slots of that one."""
    options = {"file_servers.corpora.paths": [str(file.parent)]}
    examiner = SourceExaminer(load(options, {}, Path("/dev/null")))
    own = Mount(os.fsencode(file.parent), "fuse.sshfs", "nfs01:/export", uid=1001)
    monkeypatch.setattr(examiner._mounts, "current", lambda: {own.point: own})

    source = examine(examiner, file)
    examiner.close()

    assert source.file_server == "nfs01:/export of uid 1001"
    assert source.version.origin == ""


@pytest.mark.parametrize("fs_type", ["ext4", "overlay", "tmpfs", "xfs"])
def test_equal_paths_on_local_file_systems_of_two_machines_are_two_files(
    examiner: SourceExaminer, file: Path, fs_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(examiner, fs_type, monkeypatch)
    source = examine(examiner, file)

    assert source.version.origin != ""
    assert source.file_server != "nfs01:/export"
    assert source.file_server.endswith("nfs01:/export")


def test_many_descriptors_lead_to_what_each_leads_to_alone(
    examiner: SourceExaminer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "deep/b", "deep/over", "deep/c", "gone"]
    (tmp_path / "deep").mkdir()
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_text(file.name)
    local = Mount(b"/", "ext4", "/dev/sda")
    over = Mount(os.fsencode(files[2].resolve()), "nfs", "nfs01:/export")  # of a file, over a file
    monkeypatch.setattr(examiner._mounts, "current", lambda: {b"/": local, over.point: over})
    with ExitStack() as stack:
        fds = [stack.enter_context(file.open("rb")).fileno() for file in files]
        fds.append(stack.enter_context(files[0].open("ab")).fileno())
        fds.append(os.open(tmp_path, os.O_RDONLY))
        stack.callback(os.close, fds[-1])
        files[-1].unlink()

        found = examiner.versions(fds)

        assert found[:4] == [examiner.examine(fd).version for fd in fds[:4]]
        assert [bool(each and each.origin) for each in found[:4]] == [True, True, False, True]
        assert found[4:] == [None, None, None]


def test_the_mount_table_finds_the_mount_of_a_path(tmp_path: Path) -> None:
    table = MountTable()
    try:
        mounts = table.current()
        assert find_mount(mounts, b"/proc/self/status").fs_type == "proc"
        assert find_mount(mounts, b"/proc").point == b"/proc"
        assert find_mount(mounts, b"/processes/of/mine").point == find_mount(mounts, b"/").point
    finally:
        table.close()


@pytest.mark.parametrize(
    ("fs_type", "options", "uid"),
    [
        ("fuse.sshfs", "rw,user_id=1001,group_id=100,allow_other", 1001),
        ("fuseblk", "rw,user_id=0,group_id=0,blksize=4096", 0),
        ("fuse.glusterfs", "rw,max_read=131072", 0),
        ("nfs4", "rw,user_id=1001", 0),
    ],
)
def test_the_mount_table_knows_who_has_mounted_what(fs_type: str, options: str, uid: int) -> None:
    line = f"36 35 0:50 / /home/ann/mnt rw,nosuid shared:7 - {fs_type} nfs01:/export {options}\n"
    table = MountTable()
    table.close()
    table._file = io.BytesIO(line.encode())  # type: ignore[assignment]

    (mount,) = table._read().values()

    assert mount == Mount(b"/home/ann/mnt", fs_type, "nfs01:/export", uid, mount_id=36)


@pytest.mark.parametrize(
    ("field", "plain"),
    [
        (b"/plain", b"/plain"),
        (rb"/a\040b", b"/a b"),
        (rb"/tab\011line\012", b"/tab\tline\n"),
        (rb"/back\134040", rb"/back\040"),
        (rb"\043hash", b"#hash"),
        (b"/\xff", b"/\xff"),
    ],
)
def test_escapes_of_the_mount_table_are_undone(field: bytes, plain: bytes) -> None:
    assert _unescape(field) == plain


@pytest.mark.box
@pytest.mark.slow
def test_a_new_mount_is_seen_and_its_odd_name_understood(tmp_path: Path) -> None:
    point = tmp_path.resolve() / "a b\\c"
    point.mkdir()
    script = (
        "import os, subprocess, sys\n"
        "from swarmcache.source_file import MountTable, find_mount\n"
        "point = sys.argv[1]\n"
        "table = MountTable()\n"
        "before = find_mount(table.current(), os.fsencode(point) + b'/x')\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'odd source', point], check=True)\n"
        "after = find_mount(table.current(), os.fsencode(point) + b'/x')\n"
        "assert before.point != os.fsencode(point), before\n"
        "assert after.point == os.fsencode(point), after\n"
        "assert (after.fs_type, after.source) == ('tmpfs', 'odd source'), after\n"
    )
    subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script, str(point)],
        check=True,
        cwd=Path(__file__).parent.parent,
    )


@contextmanager
def opened_where_it_is_mounted_over(
    theirs: Path, place: Path, file: Path, address: Path
) -> Iterator[int]:
    """A descriptor of ``file``, opened by a process that alone sees ``theirs`` at ``place``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(bytes(address))
        listener.listen()
        program = [sys.executable, "-c", MOUNTED_FOR_ONE, str(theirs), str(place), str(file)]
        with subprocess.Popen(["unshare", "--mount", *program, str(address)]) as process:
            connection, _ = listener.accept()
            with connection:
                _, (fd,), _, _ = socket.recv_fds(connection, 1, 1)
                try:
                    assert os.pread(fd, 6, 0) == b"theirs"
                    yield fd
                finally:
                    os.close(fd)
    assert process.returncode == 0


@pytest.mark.box
@pytest.mark.slow
def test_a_file_mounted_over_the_path_for_its_user_alone_is_refused(
    examiner: SourceExaminer, file: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    with (
        opened_where_it_is_mounted_over(theirs, file, file, tmp_path / "sock") as fd,
        pytest.raises(SourceUnreadable, match="does not lead to it"),
    ):
        examiner.examine(fd)


@pytest.mark.box
@pytest.mark.slow
def test_where_the_daemon_may_not_look_only_its_own_mounts_count(
    examiner: SourceExaminer, tmp_path: Path
) -> None:
    """As below a directory of a file server that does not trust root."""
    secret, theirs = tmp_path.resolve() / "secret", tmp_path / "theirs"
    for directory, content in ((secret, b"secret"), (theirs, b"theirs")):
        directory.mkdir(mode=0o700)
        (directory / "file").write_bytes(content)
        os.utime(directory / "file", (1, 1))
    file = secret / "file"
    true = os.open(file, os.O_RDONLY)
    try:
        with opened_where_it_is_mounted_over(theirs, secret, file, tmp_path / "sock") as false:
            assert os.readlink(f"/proc/self/fd/{false}") == str(file)
            with as_stranger():
                assert examiner.examine(true).version.path == os.fsencode(file)
                with pytest.raises(SourceUnreadable, match="does not lead to it"):
                    examiner.examine(false)
    finally:
        os.close(true)
