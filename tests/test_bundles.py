"""Lists of files: how they are read, and where the lists of their copies are kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache import bundles
from swarmcache.bundles import (
    LINE_BYTES_MAX,
    RESULT_AGE_MAX_S,
    NoBundle,
    parse_bundle,
    read_bundle,
    read_if_bundle,
    write_result,
)
from swarmcache.errors import SourceUnreadable
from swarmcache.locations import RESULTS_DIRECTORY

LINES = [b"/a/b", b"/c d"]


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"/a\n/b\n", [b"/a", b"/b"]),
        (b"/a\n/b", [b"/a", b"/b"]),
        (b"/a\n\n/a\n", [b"/a", b"", b"/a"]),
        (b"/a\r\nb\r\n", [b"/a", b"/dir/b"]),
        (b"/a\r\nb", [b"/a", b"/dir/b"]),
        (b"/a\r\n/b\n", [b"/a\r", b"/b"]),
        (b"/a\r", [b"/a\r"]),
        (b"b/../c\n./d\n", [b"/dir/b/../c", b"/dir/./d"]),
        (b" /a \n#b\n\xff\xfe\n", [b"/dir/ /a ", b"/dir/#b", b"/dir/\xff\xfe"]),
        (b"/a\x0bb\x85\n", [b"/a\x0bb\x85"]),
    ],
)
def test_each_line_is_a_path(data: bytes, paths: list[bytes]) -> None:
    assert paths == parse_bundle(data, b"/dir")


@given(
    st.lists(st.binary(max_size=20).filter(lambda line: not set(line) & set(b"\n\r\0"))),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_all_lines_come_back_in_their_order(lines: list[bytes], end: bytes) -> None:
    data = b"".join(line + end for line in lines)
    expected = [line and os.path.join(b"/dir", line) for line in lines]
    assert parse_bundle(data, b"/dir") == expected
    if lines and lines[-1]:
        assert parse_bundle(data.removesuffix(end), b"/dir") == expected


@pytest.mark.parametrize("data", [b"/a\n\0", b"x" * (LINE_BYTES_MAX + 1)])
def test_what_is_no_list_is_a_file_whose_name_looks_like_one(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "repository.bundle"
    file.write_bytes(data)

    assert read_if_bundle(bytes(file), None) is None
    with pytest.raises(NoBundle, match="no list of paths"):
        read_if_bundle(bytes(file), True)


def test_a_file_of_any_size_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "BUNDLE_BYTES_MAX", 9)
    (tmp_path / "x.bundle").write_bytes(b"/a/b/c/d\n")
    (tmp_path / "y.bundle").write_bytes(b"/a/b/c/de\n")
    assert read_if_bundle(bytes(tmp_path / "x.bundle"), None) == [b"/a/b/c/d"]
    assert read_if_bundle(bytes(tmp_path / "y.bundle"), None) is None


def test_the_name_tells_what_is_a_bundle_unless_the_user_does(tmp_path: Path) -> None:
    for name in ("x.bundle", "x.lst"):
        (tmp_path / name).write_bytes(b"/a\n")
    (tmp_path / "directory.bundle").mkdir()
    by_name, other = bytes(tmp_path / "x.bundle"), bytes(tmp_path / "x.lst")

    assert read_if_bundle(by_name, None) == [b"/a"] == read_if_bundle(other, True)
    assert read_if_bundle(other, None) is None and read_if_bundle(by_name, False) is None
    for wanted in (None, True):
        assert read_if_bundle(bytes(tmp_path / "directory.bundle"), wanted) is None
    with pytest.raises(SourceUnreadable, match="No such file"):
        read_if_bundle(bytes(tmp_path / "missing.bundle"), None)


def test_relative_lines_start_where_the_bundle_really_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.bundle").write_bytes(b"a\n")
    (tmp_path / "x.bundle").symlink_to("real/x.bundle")
    assert read_bundle(bytes(tmp_path / "x.bundle")) == [bytes(tmp_path / "real" / "a")]


def results_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory / RESULTS_DIRECTORY))


def test_equal_lists_are_one_file_and_others_are_not(tmp_path: Path) -> None:
    first = write_result(bytes(tmp_path), b"x.bundle", LINES)
    again = write_result(bytes(tmp_path), b"x.bundle", LINES)
    turned = write_result(bytes(tmp_path), b"x.bundle", LINES[::-1])
    other = write_result(bytes(tmp_path), b"y.lst", LINES)

    assert first == again and len({first, turned, other}) == 3 == len(results_in(tmp_path))
    assert first.endswith(b".bundle") and other.endswith(b".lst")
    assert Path(os.fsdecode(first)).read_bytes() == b"/a/b\n/c d\n"
    assert Path(os.fsdecode(turned)).read_bytes() == b"/c d\n/a/b\n"


@pytest.mark.parametrize("name", [b"x", b".bundle", b"\xff" * 248 + b".bundle", b"x." + b"y" * 253])
def test_any_name_of_a_bundle_will_do(tmp_path: Path, name: bytes) -> None:
    path = write_result(bytes(tmp_path), name, LINES)
    assert os.path.getsize(path) == 10
    assert path.endswith(b".bundle") == name.endswith(b".bundle") or name == b".bundle"


def old(path: bytes, age_s: float) -> None:
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_what_nobody_has_asked_for_in_a_while_is_removed(tmp_path: Path) -> None:
    kept, gone, asked, read = (
        write_result(bytes(tmp_path), name, LINES) for name in (b"kept", b"gone", b"asked", b"read")
    )
    left = tmp_path / RESULTS_DIRECTORY / "left by a process that was killed"
    left.write_bytes(b"/a")
    old(kept, RESULT_AGE_MAX_S - 60)
    for each in (gone, asked, read, bytes(left)):
        old(each, RESULT_AGE_MAX_S + 60)
    os.utime(read, (time.time(), os.stat(read).st_mtime))  # as the kernel does
    written_ns = os.stat(asked).st_mtime_ns

    assert write_result(bytes(tmp_path), b"asked", LINES) == asked
    assert os.stat(asked).st_mtime_ns == written_ns, "to its readers it is an old file"
    assert len(results_in(tmp_path)) == 5, "nothing is removed when nothing is added"
    new = write_result(bytes(tmp_path), b"new", LINES)

    assert {os.fsdecode(os.path.basename(path)) for path in (kept, asked, read, new)} == set(
        results_in(tmp_path)
    )


def cut_short(path: bytes) -> None:
    os.chmod(path, 0o644)
    os.truncate(path, 3)


def altered(path: bytes) -> None:
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(b"/e")


@pytest.mark.parametrize("spoil", [cut_short, altered, os.unlink])
def test_a_list_that_is_not_what_it_was_is_written_again(
    tmp_path: Path, spoil: Callable[[bytes], None]
) -> None:
    path = write_result(bytes(tmp_path), b"x.bundle", LINES)
    spoil(path)
    assert write_result(bytes(tmp_path), b"x.bundle", LINES) == path
    assert Path(os.fsdecode(path)).read_bytes() == b"/a/b\n/c d\n"
    assert len(results_in(tmp_path)) == 1


def test_a_list_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_result(bytes(tmp_path), b"x.bundle", LINES)
    assert results_in(tmp_path) == []
