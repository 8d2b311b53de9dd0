"""Reading ranges of a source while it is meddled with."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.chunks import ChunkLayout, FileVersion
from swarmcache.errors import LeaseExpired, NoSpace, SourceChanged, SourceFailed
from swarmcache.source_reader import (
    AHEAD_MAX_BYTES,
    AHEAD_MAX_S,
    AHEAD_MIN_S,
    AHEAD_STEP_BYTES,
    RUN_SHARE,
    Ahead,
    RangeSink,
    Runs,
    read_range,
)

CHUNK_BYTES = 256 * 1024
SIZE_BYTES = 5 * CHUNK_BYTES + 1234
DATA = random.Random(1).randbytes(SIZE_BYTES)
LAYOUT = ChunkLayout(SIZE_BYTES, CHUNK_BYTES)


def digest_of(chunk: int) -> bytes:
    return blake3(DATA[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]).digest()


class Reading:
    """Reads ranges of a file, and can meddle with it at each step."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.fd = os.open(path, flags)
        stat = path.stat()
        self.version = FileVersion(os.fsencode(path), stat.st_size, stat.st_mtime_ns)
        self.target = bytearray(SIZE_BYTES)
        self.digests: dict[int, bytes] = {}
        self.threads: set[threading.Thread] = set()

    def read(
        self,
        first: int,
        count: int,
        may_go_on: Callable[[], bool] = lambda: True,
        meddle: Callable[[], object] = lambda: None,
        split_bytes: int = SIZE_BYTES + 1,
    ) -> int:
        def write_piece(offset: int, piece: memoryview) -> None:
            self.threads.add(threading.current_thread())
            self.target[offset : offset + len(piece)] = piece
            meddle()

        sink = RangeSink(may_go_on, write_piece, self.digests.update)
        return read_range(
            self.fd,
            self.version,
            LAYOUT,
            first,
            count,
            sink,
            split_bytes=split_bytes,
            run_min_bytes=1,
        )


class Together:
    """Lets two threads go on when both have come here for the first time."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)
        self._seen: set[int] = set()

    def meet(self) -> bool:
        if threading.get_ident() not in self._seen:
            self._seen.add(threading.get_ident())
            self._barrier.wait(10)
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def reading(path: Path) -> Iterator[Reading]:
    reading = Reading(path)
    yield reading
    os.close(reading.fd)


def test_a_range_is_read_and_digested_and_nothing_else(reading: Reading) -> None:
    read_bytes = reading.read(4, 2)

    begin = 4 * CHUNK_BYTES
    assert read_bytes == SIZE_BYTES - begin
    assert reading.target == bytes(begin) + DATA[begin:]
    assert reading.digests == {chunk: digest_of(chunk) for chunk in (4, 5)}


def test_a_long_range_is_read_by_two_threads(reading: Reading) -> None:
    read_bytes = reading.read(0, 6, Together().meet, split_bytes=SIZE_BYTES)

    assert read_bytes == SIZE_BYTES
    assert len(reading.threads) == 2
    (other,) = reading.threads - {threading.current_thread()}
    assert other.daemon, "if it hangs the process ends nevertheless"
    assert reading.target == DATA
    assert reading.digests == {chunk: digest_of(chunk) for chunk in range(6)}


def test_a_long_range_is_read_by_one_thread_where_there_is_no_other(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    assert reading.read(0, 6, split_bytes=SIZE_BYTES) == SIZE_BYTES
    assert reading.threads == {threading.current_thread()}
    assert reading.target == DATA


def test_when_one_thread_fails_the_other_does_not_go_on(reading: Reading) -> None:
    together = Together()

    def only_the_other() -> bool:
        together.meet()
        return threading.current_thread().name.startswith("read along")

    with pytest.raises(LeaseExpired):
        reading.read(0, 6, may_go_on=only_the_other, split_bytes=SIZE_BYTES)

    for thread in threading.enumerate():
        if thread.name.startswith("read along"):
            thread.join(10)
            assert not thread.is_alive()


def test_what_one_thread_fails_with_is_told_whichever_it_is(reading: Reading) -> None:
    together = Together()
    failed = threading.Event()

    def fail_in_the_other() -> None:
        together.meet()
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise NoSpace("the disk is full")
        failed.wait(10)

    with pytest.raises(NoSpace, match="the disk is full"):
        reading.read(0, 6, meddle=fail_in_the_other, split_bytes=SIZE_BYTES)


@given(first=st.integers(0, 100), count=st.integers(1, 2000), run_min=st.integers(1, 20))
def test_runs_are_all_of_a_range_in_order_and_the_last_ones_short(
    first: int, count: int, run_min: int
) -> None:
    runs = Runs(first, count, run_min)

    taken = [*iter(runs.take, range(first + count, first + count))]

    assert [chunk for run in taken for chunk in run] == list(range(first, first + count))
    assert all(len(run) >= run_min for run in taken[:-1])
    left = count
    for run in taken:
        assert len(run) <= max(left / RUN_SHARE, run_min)
        left -= len(run)


def test_reading_stops_when_the_lease_is_over_and_what_was_read_counts(reading: Reading) -> None:
    last_of_two = slice(2 * CHUNK_BYTES - 8, 2 * CHUNK_BYTES)

    with pytest.raises(LeaseExpired):
        reading.read(0, 6, may_go_on=lambda: not any(reading.target[last_of_two]))

    assert reading.digests == {chunk: digest_of(chunk) for chunk in (0, 1)}
    assert not any(reading.target[2 * CHUNK_BYTES :])


@pytest.mark.parametrize(
    ("first_s", "ahead_s"),
    [(0.001, AHEAD_MIN_S), (0.1, 0.2), (5.0, AHEAD_MAX_S)],
)
def test_as_much_is_asked_for_ahead_as_comes_in_twice_the_time_of_the_first_piece(
    first_s: float, ahead_s: float
) -> None:
    ahead = Ahead()
    assert ahead.size_bytes == AHEAD_STEP_BYTES

    ahead.note(AHEAD_STEP_BYTES, first_s)
    for rate_bytes_per_s in (3_000_000, 5_000_000):
        ahead.note(rate_bytes_per_s // 10, 0.1)
        assert ahead.size_bytes == max(int(rate_bytes_per_s * ahead_s), AHEAD_STEP_BYTES)

    ahead.note(100, 1.0)
    assert ahead.size_bytes == AHEAD_STEP_BYTES
    ahead.note(AHEAD_MAX_BYTES, AHEAD_MIN_S / 2)
    assert ahead.size_bytes == AHEAD_MAX_BYTES
    ahead.note(100, 0.0)
    assert ahead.size_bytes == AHEAD_MAX_BYTES


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: os.truncate(path, 10), id="cut"),
        pytest.param(lambda path: os.truncate(path, SIZE_BYTES + 1), id="appended to"),
        pytest.param(lambda path: os.utime(path, ns=(0, 0)), id="touched"),
        pytest.param(lambda path: path.chmod(0o640), id="ctime only"),
    ],
)
def test_a_source_that_changes_while_it_is_read_is_noticed(
    reading: Reading, path: Path, change: Callable[[Path], object]
) -> None:
    with pytest.raises(SourceChanged):
        reading.read(1, 2, meddle=lambda: change(path))

    assert reading.digests == {}


def test_a_source_that_is_another_version_is_not_read(reading: Reading, path: Path) -> None:
    os.utime(path, ns=(0, 0))

    with pytest.raises(SourceChanged):
        reading.read(0, 1)

    assert reading.target == bytes(SIZE_BYTES)


def test_an_error_of_the_file_server_is_named(path: Path) -> None:
    reading = Reading(path, os.O_WRONLY)
    try:
        with pytest.raises(SourceFailed, match="Bad file descriptor"):
            reading.read(0, 1)
    finally:
        os.close(reading.fd)


def test_what_the_sink_raises_passes_through(reading: Reading) -> None:
    def no_space() -> None:
        raise NoSpace("the disk is full")

    with pytest.raises(NoSpace):
        reading.read(0, 1, meddle=no_space)
