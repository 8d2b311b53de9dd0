"""``get`` for directories: the copy shows what the source shows, or the original is named."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarmcache.client import Answer, Client
from swarmcache.directories import get_everything
from swarmcache.local_protocol import Answer as DaemonAnswer
from swarmcache.local_protocol import Original
from tests.disk_helpers import as_stranger, needs_root
from tests.scripted_daemon import Asked, ScriptedDaemon, caching_in


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def daemon(tmp_path: Path, cache: Path) -> Iterator[ScriptedDaemon]:
    (tmp_path / "run").mkdir(mode=0o700)
    with ScriptedDaemon(tmp_path / "run", caching_in(cache)) as daemon:
        yield daemon


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    write(tree, "a", "below/b", "below/deeper/c")
    return tree


def write(directory: Path, *names: str) -> None:
    """Files whose content is their name."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(os.fsencode(name))


def get(daemon: ScriptedDaemon, *paths: Path) -> list[Answer]:
    with Client(bytes(daemon.path)) as client:
        return list(get_everything(client, [bytes(path) for path in paths]))


def get_one(daemon: ScriptedDaemon, path: Path) -> Answer:
    (answer,) = get(daemon, path)
    return answer


def shown_by(directory: Path | str) -> dict[str, bytes]:
    """What a job sees that reads everything below a directory."""
    files = (Path(where) / name for where, _, names in os.walk(directory) for name in names)
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def assert_original(answer: Answer, tree: Path, reason: str) -> None:
    assert (answer.path, answer.cached, answer.usable) == (str(tree), False, True)
    assert reason in answer.reason


def test_the_copy_of_a_directory_is_a_directory_with_the_same_files(
    daemon: ScriptedDaemon, tree: Path, cache: Path
) -> None:
    first, again = get_one(daemon, tree), get_one(daemon, tree)

    assert first.path == again.path == f"{cache}/user{tree}"
    assert (first.cached, first.hit, again.hit) == (True, False, True)
    assert shown_by(first.path) == shown_by(tree)
    assert first.size_bytes == sum(map(len, shown_by(tree).values()))


def test_files_and_directories_are_answered_in_the_order_of_the_arguments(
    daemon: ScriptedDaemon, tree: Path, cache: Path, tmp_path: Path
) -> None:
    write(tmp_path, "file")
    paths = [tree / "below", tmp_path / "file", tmp_path / "nothing", tree, tree / "a"]

    answers = get(daemon, *paths)

    assert [answer.path.removeprefix(f"{cache}/user") for answer in answers] == list(
        map(str, paths)
    )
    assert [answer.usable for answer in answers] == [True, True, False, True, True]


def test_a_directory_is_named_by_its_real_path(
    daemon: ScriptedDaemon, tree: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("tree")

    assert get_one(daemon, tmp_path / "link").path == f"{cache}/user{tree}"


def test_names_of_any_bytes_are_mirrored(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    write(tmp_path / "tree", "not-\udcff-utf8/new\nline")

    answer = get_one(daemon, tmp_path / "tree")

    assert shown_by(answer.path) == shown_by(tmp_path / "tree")


def test_empty_directories_are_mirrored(daemon: ScriptedDaemon, tree: Path) -> None:
    (tree / "empty/emptier").mkdir(parents=True)

    assert (Path(get_one(daemon, tree).path) / "empty/emptier").is_dir()


def test_links_to_files_lead_to_their_copies(
    daemon: ScriptedDaemon, tree: Path, cache: Path, tmp_path: Path
) -> None:
    write(tmp_path, "elsewhere")
    (tree / "inside").symlink_to("below/b")
    (tree / "below/absolute").symlink_to(tree / "a")
    (tree / "outside").symlink_to("../elsewhere")
    (tree / "broken").symlink_to("nothing")

    copy = Path(get_one(daemon, tree).path)

    names = ("inside", "below/absolute", "outside")
    assert [(copy / name).read_text() for name in names] == ["below/b", "a", "elsewhere"]
    assert all((copy / name).resolve().is_relative_to(cache) for name in names)
    assert not (copy / "broken").is_symlink()


def test_a_directory_that_has_only_links_is_mirrored(
    daemon: ScriptedDaemon, tmp_path: Path
) -> None:
    """So do model hubs lay out their caches: snapshots/REVISION/NAME leads to blobs/DIGEST."""
    write(tmp_path / "hub", "blobs/1", "blobs/2")
    snapshot = tmp_path / "hub/snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "model").symlink_to("../../blobs/1")
    (snapshot / "tokens").symlink_to("../../blobs/2")

    answer = get_one(daemon, snapshot)

    assert answer.cached
    assert shown_by(answer.path) == {"model": b"blobs/1", "tokens": b"blobs/2"}


def test_links_to_directories_inside_are_links_again_and_may_go_round_in_circles(
    daemon: ScriptedDaemon, tree: Path, cache: Path
) -> None:
    (tree / "below/circle").symlink_to("..")

    copy = Path(get_one(daemon, tree).path)

    assert (copy / "below/circle/below/b").read_text() == "below/b"
    assert (copy / "below/circle").resolve() == copy


def test_threads_that_get_one_directory_at_once_all_have_its_links(
    daemon: ScriptedDaemon, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "link").symlink_to("a")
    together = threading.Barrier(2)

    def replace_together(source: bytes, target: bytes) -> None:
        together.wait(10)
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr("swarmcache.directories.os.replace", replace_together)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(get_one, [daemon] * 2, [tree] * 2))

    assert [(answer.cached, answer.reason) for answer in answers] == [(True, "")] * 2


def test_a_link_that_has_changed_is_changed_in_the_copy(daemon: ScriptedDaemon, tree: Path) -> None:
    (tree / "link").symlink_to("a")
    get_one(daemon, tree)
    (tree / "link").unlink()
    (tree / "link").symlink_to("below/b")

    assert (Path(get_one(daemon, tree).path) / "link").read_text() == "below/b"


def test_a_link_that_has_gone_goes_from_the_copy(daemon: ScriptedDaemon, tree: Path) -> None:
    (tree / "link").symlink_to("a")
    get_one(daemon, tree)
    (tree / "link").unlink()

    assert shown_by(get_one(daemon, tree).path) == shown_by(tree)


def test_a_link_to_a_directory_elsewhere_gives_the_original(
    daemon: ScriptedDaemon, tree: Path, tmp_path: Path
) -> None:
    (tree / "link").symlink_to(tmp_path)

    assert_original(get_one(daemon, tree), tree, "'link' in it leads to a directory elsewhere")
    assert daemon.asked == []


@pytest.mark.parametrize("text", ["link", "a/beyond", "nothing"])
@pytest.mark.parametrize("place", ["", "below"])
def test_a_link_that_leads_nowhere_is_left_out_of_the_copy(
    daemon: ScriptedDaemon, tree: Path, text: str, place: str
) -> None:
    (tree / place / "link").symlink_to(text)

    answer = get_one(daemon, tree)

    assert answer.cached
    assert not (Path(answer.path) / place / "link").is_symlink()


@needs_root
@pytest.mark.parametrize("place", ["", "below"])
def test_a_link_into_somebodys_private_home_gives_the_original(root: Path, place: str) -> None:
    tree, home = root.parent / "tree", root.parent / "home"
    write(tree, "a", "below/b")
    home.mkdir(mode=0o700)
    (tree / place / "link").symlink_to(home / "file")

    with as_stranger(), Client(b"/nowhere/daemon.sock") as client:
        (answer,) = get_everything(client, [bytes(tree)])

    assert_original(answer, tree, f"{os.path.join(place, 'link')!r} in it: Permission denied")


def test_one_file_that_falls_back_gives_the_original(
    tmp_path: Path, tree: Path, cache: Path
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        full = asked.path.endswith(b"/b")
        return [Original("the disk is full")] if full else caching_in(cache)(asked)

    with ScriptedDaemon(tmp_path / "run", answer) as daemon:
        assert_original(get_one(daemon, tree), tree, "below/b': the disk is full")


def test_a_cached_file_that_the_source_has_no_longer_gives_the_original(
    daemon: ScriptedDaemon, tree: Path
) -> None:
    get_one(daemon, tree)
    (tree / "a").unlink()

    assert_original(get_one(daemon, tree), tree, "'a' is cached but no longer in it")


def test_a_directory_without_files_gives_the_original(
    daemon: ScriptedDaemon, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()

    assert_original(get_one(daemon, tmp_path / "empty"), tmp_path / "empty", "no files")


def test_what_is_neither_file_nor_directory_nor_link_is_left_out(
    daemon: ScriptedDaemon, tree: Path
) -> None:
    os.mkfifo(tree / "fifo")

    copy = Path(get_one(daemon, tree).path)

    assert not (copy / "fifo").exists()
    assert sorted(shown_by(copy)) == ["a", "below/b", "below/deeper/c"]


def test_copies_with_other_paths_than_their_sources_give_the_original(
    tmp_path: Path, tree: Path
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    numbers = iter(range(10))

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        return caching_in(tmp_path / f"disk-{next(numbers)}")(asked)

    with ScriptedDaemon(tmp_path / "run", answer) as daemon:
        assert_original(get_one(daemon, tree), tree, "several disks")
