"""A disk that fails, at any single call: no crash, no wrong byte, no left-over, no lost space."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from blake3 import blake3

from swarmcache.cache_dir import CacheDir, Partial, User
from swarmcache.chunks import FileVersion
from swarmcache.errors import LocalError
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.cache_checks import assert_right, assert_sound
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    a_file,
    install_together,
    open_cache,
    small_file,
    write,
)
from tests.faulty_disk import FAULTS, Call, CallCounter, Fault, FaultyDisk, KilledAt
from tests.watched_disk import Watcher, watched

SIZE_BYTES = 3 * CHUNK_BYTES + 1
ROOM_BYTES = 6 * (SIZE_BYTES + 4 * CHUNK_BYTES)  # of some files, with all that is counted for each
OTHER = User(os.geteuid(), "other")

# Calls from the same place in the code are let fail twice at most, and where that leaves many, only
# every ninth of them, another ninth for each fault. FAULTS=all takes all (some minutes).
ALL_FAULTS = os.environ.get("FAULTS") == "all"
SAME_PLACE_MAX = 2
MANY = 40
EVERY = 9

Result = TypeVar("Result")


OLD = a_file(SIZE_BYTES, b"/nfs/old", 1)  # cached and durable before the disk begins to fail
BEGUN = a_file(SIZE_BYTES, b"/nfs/begun", 2)  # begun by an earlier life of the daemon
NEW = a_file(SIZE_BYTES, b"/nfs/new", 3)
NEWER = a_file(SIZE_BYTES, b"/nfs/new", 4)  # another version of the same source
GIVEN_UP = a_file(SIZE_BYTES, b"/nfs/given up", 5)
LEFT = a_file(SIZE_BYTES, b"/nfs/left", 6)
EVICTING = a_file(SIZE_BYTES, b"/nfs/evicting", 7)  # comes when there is no room left
TOGETHER = [a_file(SIZE_BYTES, b"/nfs/together/%d" % number, number) for number in (8, 9)]
ALL = [OLD, BEGUN, NEW, NEWER, GIVEN_UP, LEFT, EVICTING, *TOGETHER]


class Life:
    """What a daemon does with its disk in one life. A failure is an answer, and it goes on.

    ``answered``: paths that were handed out, with their bytes; ``dropped``: what was given up by
    rule.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answered: dict[bytes, list[tuple[str, bytes]]] = {}
        self.dropped: set[bytes] = set()
        self.failures: list[LocalError] = []
        self.cache: CacheDir | None = None
        self.max_usage_bytes = 1 << 40
        self.tell: int | None = None  # descriptor to which it tells what it does, before or after

    def attempt(self, function: Callable[..., Result], *arguments: object) -> Result | None:
        try:
            return function(*arguments)
        except LocalError as error:
            self.failures.append(error)
            return None

    def run(self) -> None:
        """All but the end."""
        cache = self.cache = self.attempt(self.open)
        if cache is None:
            return
        self.attempt(list, cache.list_objects())
        self.attempt(list, cache.recover_undurable())
        self.attempt(self.get, cache, OLD, [ME])
        self.attempt(self.get, cache, OLD, [OTHER])
        self.attempt(self.get, cache, BEGUN, [ME, OTHER])
        self.attempt(self.get, cache, NEW, [ME, OTHER])
        self.attempt(self.make_durable, cache, NEW)
        self.attempt(self.get, cache, NEW, [OTHER])
        self.drop(NEW)  # another version of the source comes in its place
        self.attempt(self.get, cache, NEWER, [ME])
        self.attempt(self.make_durable, cache, NEWER)
        self.attempt(self.get_together, cache, TOGETHER, [ME, OTHER])
        self.attempt(self.make_all_durable, cache, TOGETHER)
        for end in (Partial.discard, Partial.close):
            version, data = GIVEN_UP if end is Partial.discard else LEFT
            partial = self.attempt(cache.begin, version, CHUNK_BYTES)
            if partial is not None:
                self.attempt(write, partial, data, 0)
                self.attempt(end, partial)
        self.attempt(cache.drop, NEW[0].version_id)
        self.attempt(cache.verify, BEGUN[0].version_id)
        self.attempt(cache.pin, NEWER[0].version_id, ME.uid)
        self.attempt(cache.remove, OLD[0].version_id, OTHER)
        self.drop(OLD, BEGUN)
        self.max_usage_bytes = UNCOUNTED_MAX_BYTES + ROOM_BYTES
        self.attempt(self.get, cache, EVICTING, [OTHER])
        self.max_usage_bytes = 1 << 40
        self.attempt(cache.flush)
        self.attempt(cache.status)

    def open(self) -> CacheDir:
        return open_cache(self.root, max_usage=lambda _: self.max_usage_bytes, min_age_s=0.0)

    def end(self) -> None:
        if self.cache is not None:
            self.attempt(self.cache.close)

    def get(self, cache: CacheDir, file: tuple[FileVersion, bytes], users: list[User]) -> None:
        """As the daemon does for jobs of these users."""
        version, data = file
        paths = [self.attempt(cache.lookup, version, user) for user in users]
        self.note(cache, file, *paths)
        if None not in paths:
            return
        partial = cache.begin(version, CHUNK_BYTES)
        try:
            fetch(partial, data)
            assert_right(cache, version.version_id, None, data)
            published = partial.publish(users)
        except LocalError:
            self.attempt(partial.discard)
            raise
        self.note(cache, file, *published.values())
        cache.manifest(version.version_id)

    def get_together(
        self, cache: CacheDir, files: list[tuple[FileVersion, bytes]], users: list[User]
    ) -> None:
        """As the daemon does with small files from a peer."""
        for version, _ in files:
            cache.lookup(version, users[0])
        install_together(cache, files, users)
        served = {
            each.version_id: each for each in cache.read_files([v.version_id for v, _ in files])
        }
        for file in files:
            version, _ = file
            self.note(cache, file, *[self.attempt(cache.lookup, version, user) for user in users])
            if version.version_id in served:
                assert served[version.version_id] == small_file(*file), "a peer gets wrong bytes"

    def make_all_durable(self, cache: CacheDir, files: list[tuple[FileVersion, bytes]]) -> None:
        try:
            cache.make_all_durable([version.version_id for version, _ in files])
        except LocalError:
            self.drop(*files)
            raise

    def drop(self, *files: tuple[FileVersion, bytes]) -> None:
        """Nobody has a right to these any more."""
        for version, _ in files:
            self.dropped.add(version.version_id)
            self.say("dropped", version)

    def say(self, what: str, version: FileVersion) -> None:
        if self.tell is not None:
            os.write(self.tell, f"{what} {version.version_id.hex()}\n".encode())

    def make_durable(self, cache: CacheDir, file: tuple[FileVersion, bytes]) -> None:
        try:
            cache.make_durable(file[0].version_id)
        except LocalError:
            self.drop(file)
            raise

    def note(self, cache: CacheDir, file: tuple[FileVersion, bytes], *paths: str | None) -> None:
        version, data = file
        for path in filter(None, paths):
            assert_right_now(path, data)
            self.answered.setdefault(version.version_id, []).append((path, data))
            self.say("answered", version)


def assert_right_now(path: str, data: bytes) -> None:
    assert Path(path).read_bytes() == data, f"wrong bytes in {path}"


def fetch(partial: Partial, data: bytes) -> None:
    """Some chunks come from peers, the others from the file server, in pieces."""
    had = dict(partial.recover())
    for chunk in range(partial.layout.chunk_count):
        if chunk in had:
            continue
        if chunk % 2 == 0:
            write(partial, data, chunk)
            continue
        begin = partial.layout.offset_bytes(chunk)
        piece = data[begin : begin + partial.layout.length_bytes(chunk)]
        half = len(piece) // 2
        partial.write_piece(begin, piece[:half])
        partial.write_piece(begin + half, piece[half:])
        partial.commit_chunk(chunk, blake3(piece).digest())


def prepare(root: Path) -> None:
    """What earlier lives have left: one durable replica and half a file."""
    cache = open_cache(root)
    list(cache.list_objects())
    partial = cache.begin(OLD[0], CHUNK_BYTES)
    fetch(partial, OLD[1])
    partial.publish([ME])
    cache.make_durable(OLD[0].version_id)
    partial = cache.begin(BEGUN[0], CHUNK_BYTES)
    for chunk in range(2):
        write(partial, BEGUN[1], chunk)
    cache.close()


def live(life: Life, watcher: Watcher) -> None:
    """One life in which every call goes through the watcher, and what must be true then."""
    with watched(watcher):
        life.run()
    if life.cache is not None:
        life.cache.flush()  # as the daemon does every few seconds; the disk is well again
        assert_sound(life.cache, life.root)
    with watched(watcher):
        life.end()
    # Another version of the source may have taken the place of the one that was answered.
    versions: dict[str, list[bytes]] = {}
    for path, data in itertools.chain(*life.answered.values()):
        versions.setdefault(path, []).append(data)
    for path, right in versions.items():
        if os.path.exists(path):
            assert Path(path).read_bytes() in right, f"wrong bytes in {path}"


def live_again(life: Life) -> None:
    """The next life, on a disk that is well: everything is right, and everything can be had."""
    root = life.root
    cache = open_cache(root)
    try:
        list(cache.list_objects())
        list(cache.recover_undurable())
        assert_sound(cache, root)
        for version, data in ALL:
            path = cache.lookup(version, ME)
            assert_right(cache, version.version_id, path, data)
            if version.version_id in life.answered and version.version_id not in life.dropped:
                assert path is not None, f"{version.path!r} was answered, and is lost"
        assert_sound(cache, root)
        for version, data in ALL:
            if cache.lookup(version, ME) is None:
                partial = cache.begin(version, CHUNK_BYTES)
                fetch(partial, data)
                paths = partial.publish([ME])
                assert_right(cache, version.version_id, paths[ME.uid], data)
        assert_sound(cache, root)
    finally:
        cache.close()


def calls_of_a_life(root: Path) -> CallCounter:
    prepare(root)
    life = Life(root)
    counter = CallCounter()
    live(life, counter)
    assert life.failures == []
    live_again(life)
    shutil.rmtree(root)
    return counter


def failure_of(root: Path, number: int, fault: Fault) -> str | None:
    """What went wrong when the n-th call failed like that; None when all is as it should be."""
    prepare(root)
    life = Life(root)
    open_before = len(os.listdir("/proc/self/fd"))
    try:
        live(life, FaultyDisk(number, fault))
        assert len(os.listdir("/proc/self/fd")) <= open_before, "a descriptor was left open"
        live_again(life)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(root)
    return None


def chosen(calls: list[Call], numbers: Sequence[int], first: int) -> Sequence[int]:
    """Those that are let fail; see the head of this file."""
    if ALL_FAULTS:
        return numbers
    rare = [n for n in numbers if calls[:n].count(calls[n]) < SAME_PLACE_MAX]
    return rare if len(rare) <= MANY else rare[first % EVERY :: EVERY]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_call_that_fails_costs_only_what_it_was_for(root: Path, fault: Fault) -> None:
    calls = calls_of_a_life(root).calls
    possible = [number for number, call in enumerate(calls) if fault.can_hit(call)]
    numbers = chosen(calls, possible, FAULTS.index(fault))

    failures = {number: failure_of(root, number, fault) for number in numbers}

    print(f"{fault}: {len(numbers)} of {len(calls)} calls")
    assert {f"{n} ({calls[n].name})": why for n, why in failures.items() if why} == {}


def live_until_killed(life: Life, number: int) -> None:
    """A life in another process, which is killed before the n-th call."""
    answers, told = os.pipe()
    child = os.fork()
    if child == 0:
        life.tell = told
        with watched(KilledAt(number)):
            life.run()
            life.end()
        os._exit(1)
    os.close(told)
    with open(answers) as lines:
        for line in lines:
            what, version_id = line.split()
            if what == "answered":
                life.answered[bytes.fromhex(version_id)] = []
            else:
                life.dropped.add(bytes.fromhex(version_id))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it lived on"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_kill_before_any_call_loses_nothing(root: Path) -> None:
    calls = calls_of_a_life(root).calls
    numbers = range(len(calls))
    places = [number for number in numbers if calls[number] not in calls[:number]]

    for number in numbers if ALL_FAULTS else places[::3]:
        prepare(root)
        life = Life(root)
        live_until_killed(life, number)
        live_again(life)
        shutil.rmtree(root)
