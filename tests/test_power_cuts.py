"""The power goes, at any moment: whatever the disk has kept, the cache that starts on it is right.

See ``crash_states`` for what a disk may keep.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import pytest

from swarmcache import cache_dir
from swarmcache.cache_dir import CacheDir, User
from swarmcache.chunks import FileVersion
from swarmcache.errors import CacheDirUnusable
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.cache_checks import assert_right, assert_sound
from tests.crash_states import Disk, Mark, Record, Recorder, State, in_order, loose
from tests.disk_helpers import (
    CHUNK_BYTES,
    ME,
    a_file,
    fill,
    install_together,
    open_cache,
    publish,
    write,
)
from tests.watched_disk import watched

SEED = 20_141_006
# States of each scenario in each model, chosen at random; CRASH_STATES=all takes all (an hour).
STATES = os.environ.get("CRASH_STATES", "40")

OTHER = User(os.geteuid(), "other")
SIZE_BYTES = CHUNK_BYTES + 1
FILE = a_file(SIZE_BYTES, b"/nfs/file", 1)
NEWER = a_file(SIZE_BYTES, b"/nfs/file", 2)  # another version of the same source
BESIDE = a_file(SIZE_BYTES, b"/nfs/beside", 3)
BELOW = a_file(SIZE_BYTES, b"/nfs/directory/below", 4)
FILES = [FILE, NEWER, BESIDE, BELOW]

Say = Callable[[object], None]
Model = Callable[[Recorder, Random], Iterator[State]]


# --- what is going on when the power goes ---------------------------------------------------------


def get(cache: CacheDir, file: tuple[FileVersion, bytes], say: Say, *users: User) -> None:
    version, data = file
    publish(cache, version, data, *users)
    say(("syncing", version.version_id))
    cache.make_durable(version.version_id)
    say(("durable", version.version_id))


def first_life(root: Path, say: Say) -> None:
    cache = open_cache(root)
    list(cache.list_objects())
    get(cache, FILE, say, ME)
    cache.close()


def second_user(root: Path, say: Say) -> None:
    cache = open_cache(root)
    list(cache.list_objects())
    cache.lookup(FILE[0], OTHER)
    cache.lookup(FILE[0], ME)
    cache.flush()
    get(cache, BESIDE, say, ME, OTHER)
    cache.close()


def newer_version(root: Path, say: Say) -> None:
    cache = open_cache(root)
    list(cache.list_objects())
    get(cache, NEWER, say, ME)
    cache.close()


def dropped(root: Path, say: Say) -> None:
    cache = open_cache(root)
    list(cache.list_objects())
    say(("dropped", FILE[0].version_id))
    cache.drop(FILE[0].version_id)
    get(cache, FILE, say, ME)
    cache.close()


def resumed(root: Path, say: Say) -> None:
    cache = open_cache(root)
    list(cache.list_objects())
    partial = cache.begin(BESIDE[0], CHUNK_BYTES)
    write(partial, BESIDE[1], 1)
    partial.close()
    partial = cache.begin(BESIDE[0], CHUNK_BYTES)
    for chunk, _ in list(partial.recover()):
        assert chunk == 1
    write(partial, BESIDE[1], 0)
    partial.publish([ME])
    say(("syncing", BESIDE[0].version_id))
    cache.make_durable(BESIDE[0].version_id)
    say(("durable", BESIDE[0].version_id))
    cache.close()


def found_rotten(root: Path, say: Say) -> None:
    """A copy is taken out, because a bit of it has changed, and completed again."""
    version, data = FILE
    name = version.version_id.hex()
    cache = open_cache(root)
    list(cache.list_objects())
    copy = root / ".swarmcache" / "objects" / name[:2] / name
    say(("dropped", version.version_id))
    os.chmod(copy, 0o600)
    cache.verify(version.version_id)
    cache.take_damaged()
    partial = cache.begin(version, CHUNK_BYTES)
    list(partial.recover())
    fill(partial, data)
    partial.publish([ME])
    say(("syncing", version.version_id))
    cache.make_durable(version.version_id)
    say(("durable", version.version_id))
    cache.close()


def evicted(root: Path, say: Say) -> None:
    """A file must make room for another one."""
    room_bytes = SIZE_BYTES + 3 * CHUNK_BYTES  # with its manifest and what else is counted for it
    limit_bytes = UNCOUNTED_MAX_BYTES + room_bytes
    cache = open_cache(root, max_usage=lambda _: limit_bytes, min_age_s=0.0)
    list(cache.list_objects())
    say(("dropped", FILE[0].version_id))
    get(cache, BESIDE, say, ME)
    assert cache.lookup(FILE[0], ME) is None
    cache.close()


def together(root: Path, say: Say) -> None:
    """Small files come together."""
    cache = open_cache(root)
    list(cache.list_objects())
    assert install_together(cache, [BESIDE, BELOW], [ME, OTHER]) != []
    for version, _ in (BESIDE, BELOW):
        say(("syncing", version.version_id))
    cache.make_all_durable([BESIDE[0].version_id, BELOW[0].version_id])
    for version, _ in (BESIDE, BELOW):
        say(("durable", version.version_id))
    cache.close()


SCENARIOS = [
    first_life,
    second_user,
    newer_version,
    dropped,
    resumed,
    found_rotten,
    evicted,
    together,
]


# --- what must be true afterwards -----------------------------------------------------------------


def check(root: Path, promised: set[object], may_be_trusted: set[object], *, ordered: bool) -> None:
    """A daemon starts after the power cut.

    Where nothing is ``ordered``, a user's link can outlast everything that tells what it is. Then
    it is left alone, as if the user had put it there, and the job gets the original path. A good
    copy can have lost its manifest, which shows when it is digested the next time.
    """

    def look_up(version: FileVersion, data: bytes, user: User) -> str | None:
        try:
            path = cache.lookup(version, user)
        except CacheDirUnusable:
            if ordered:
                raise
            path = None
        assert_right(cache, version.version_id, path, data)
        return path

    cache = open_cache(root)
    try:
        for version, data in FILES:
            path = look_up(version, data, ME)
            assert path is None or version.version_id in may_be_trusted, "trusted unseen"
        list(cache.list_objects())
        list(cache.recover_undurable())
        for version, data in FILES:
            for path in filter(None, [look_up(version, data, user) for user in (ME, OTHER)]):
                assert os.stat(path).st_mtime_ns == version.mtime_ns
                assert os.stat(path).st_mode & 0o777 == 0o444
        assert_sound(cache, root, exact=ordered)
        cache.take_damaged()
        for version, data in FILES:
            if look_up(version, data, ME) is None:
                partial = cache.begin(version, CHUNK_BYTES)
                list(partial.recover())
                lost = version.version_id in promised and not partial.complete
                assert not lost, f"{version.path!r} was durable"
                path = fill(partial, data).publish([ME]).get(ME.uid)
                assert path is not None or not ordered, "no link"
                assert_right(cache, version.version_id, path, data)
        assert_sound(cache, root, exact=ordered)
    finally:
        cache.close()


def marks(records: list[Record]) -> tuple[set[object], set[object]]:
    """What is promised, and what may be trusted without a look."""
    promised: set[object] = set()
    may_be_trusted: set[object] = set()
    for record in records:
        match record:
            case Mark(("syncing", what)):
                may_be_trusted.add(what)
            case Mark(("durable", what)):
                promised.add(what)
            case Mark(("dropped", what)):
                promised.discard(what)
    return promised, may_be_trusted


@pytest.fixture
def place() -> Iterator[Path]:
    """Where states are built: in memory if possible, since nothing is lost with it."""
    above = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/var/tmp"
    place = Path(tempfile.mkdtemp(dir=above, prefix="swarmcache-test-"))
    yield place
    shutil.rmtree(place)


def record(root: Path, scenario: Callable[[Path, Say], None]) -> Recorder:
    """Carry out a scenario. All but the first find a cache with a durable replica of FILE."""
    if scenario is not first_life:
        first_life(root, lambda _: None)
    recorder = Recorder(root.parent)
    if scenario is not first_life:
        recorder.begin(("syncing", FILE[0].version_id), ("durable", FILE[0].version_id))
    with watched(recorder):
        scenario(root, recorder.mark)
    return recorder


def distinct(recorder: Recorder, states: Iterable[State]) -> list[State]:
    """Those that differ in what is on the disk, or in what is promised."""
    found: dict[tuple[bytes, str], State] = {}
    for state in states:
        digest = Disk.after(recorder.top, recorder.records, state).digest()
        promises = [sorted(map(repr, each)) for each in marks(recorder.records[: state.length])]
        found.setdefault((digest, repr(promises)), state)
    return list(found.values())


def failure_after(recorder: Recorder, state: State, top: Path, *, ordered: bool) -> str | None:
    """What is wrong with a cache that starts on this state, which is built below ``top``."""
    top.mkdir()
    promises = marks(recorder.records[: state.length])
    try:
        with watched(Disk.after(recorder.top, recorder.records, state).build(top)):
            check(top / "cache", *promises, ordered=ordered)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace(str(top), "")
    finally:
        shutil.rmtree(top)
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", [in_order, loose], ids=lambda each: each.__name__)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_a_cache_is_right_after_a_power_cut_at_any_moment(
    root: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[Path, Say], None],
    model: Model,
) -> None:
    random = Random(SEED)
    recorder = record(root, scenario)
    monkeypatch.setattr(cache_dir, "boot_id", lambda: b"the next boot".ljust(16))
    legal = list(model(recorder, random))
    chosen = distinct(recorder, legal if STATES == "all" else random.sample(legal, int(STATES)))

    failures: Counter[str] = Counter()
    for number, state in enumerate(chosen):
        why = failure_after(recorder, state, place / str(number), ordered=model is in_order)
        if why is not None:
            failures[f"{why} ({state.length} records, {len(state.lost)} of them lost)"] += 1
    recorder.close()

    what = f"{len(chosen)} distinct of {len(legal)} states"
    print(f"{scenario.__name__}, {model.__name__}: {len(recorder.records)} records, {what}")
    assert not failures
