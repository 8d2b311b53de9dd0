"""get for bundles, with real daemons and the real command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarmcache import bundle_get
from swarmcache.bundle_get import TOLD_MAX, BundleAnswer, get_with_bundles
from swarmcache.cache_client import ask
from swarmcache.client import Answer, Client
from swarmcache.directories import get_everything
from swarmcache.get import run_get
from swarmcache.local_protocol import Ls
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.local_daemons import COMMAND, LocalDaemons, LocalNode

pytestmark = pytest.mark.slow

SIZE_BYTES = 100_000


class Sources:
    """Files and bundles of them, and a node that caches them."""

    def __init__(
        self, directory: Path, node: LocalNode, printed: pytest.CaptureFixture[bytes]
    ) -> None:
        self.directory = directory
        self.node = node
        self._printed = printed
        directory.mkdir()

    def put(self, *names: str) -> list[Path]:
        for name in names:
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            (self.directory / name).write_bytes(os.urandom(SIZE_BYTES))
        return [self.directory / name for name in names]

    def bundle(self, name: str, *lines: str | Path) -> Path:
        path = self.directory / name
        path.write_bytes(b"\n".join(os.fsencode(line) for line in lines))
        return path

    def get(
        self,
        *files: Path,
        code: int = 0,
        strict: bool = False,
        bundle: bool | None = None,
        all_or_nothing: bool = False,
    ) -> tuple[list[Path], str]:
        """What the command prints, but without a process of its own."""
        with Client(os.fsencode(self.node.socket)) as client:
            found = run_get(
                list(map(str, files)),
                client=client,
                strict=strict,
                bundle=bundle,
                all_or_nothing=all_or_nothing,
            )
        printed = self._printed.readouterr()
        assert found == code, printed.err
        return [Path(os.fsdecode(line)) for line in printed.out.splitlines()], printed.err.decode()

    def answer(self, bundle: Path, *, all_or_nothing: bool = False) -> BundleAnswer:
        """What the command is answered."""
        with Client(os.fsencode(self.node.socket)) as client:
            paths = [os.fsencode(bundle)]
            [answer] = get_with_bundles(client, paths, all_or_nothing=all_or_nothing)
        assert isinstance(answer, BundleAnswer)
        return answer

    def copy_of(self, source: Path) -> Path:
        [user] = [path for path in self.node.cache_dir.iterdir() if path.name != ".swarmcache"]
        return Path(f"{user}{source}")

    def cached(self) -> set[str]:
        with Client(os.fsencode(self.node.socket)) as client:
            return {os.path.basename(file.path).decode() for file in ask(client, Ls())}

    def results(self) -> list[Path]:
        return list(self.node.cache_dir.glob("*/.swarmcache-bundles/*"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    with LocalDaemons(tmp_path_factory.mktemp("bundles")) as local:
        local.start_tracker()
        yield local.start_daemon()


@pytest.fixture
def sources(tmp_path: Path, node: LocalNode, capsysbinary: pytest.CaptureFixture[bytes]) -> Sources:
    return Sources(tmp_path / "sources", node, capsysbinary)


def lines_of(path: str | Path) -> list[Path]:
    return [Path(line) for line in Path(path).read_text().removesuffix("\n").split("\n")]


def test_the_result_has_a_line_for_each_line_in_the_same_order(sources: Sources) -> None:
    a, b, tree = sources.put("a", "b", "tree/c")
    bundle = sources.bundle("train.tsv.bundle", "a", b, "", "tree", "./a")

    [path], said = sources.get(bundle)

    assert said == ""
    assert path.name.startswith("train.tsv.") and path.suffix == ".bundle"
    copies = [sources.copy_of(each) for each in (a, b, tree.parent, a)]
    assert lines_of(path) == [*copies[:2], Path(), *copies[2:]]
    assert all(each.is_relative_to(sources.node.cache_dir) and each.exists() for each in copies)
    assert copies[0].read_bytes() == a.read_bytes()
    with open(path, "rb") as file:
        assert file.read().count(b"\n") == 5, "every line has its end"
    before = sources.results()
    assert sources.get(bundle, strict=True) == ([path], "") and sources.results() == before


def test_what_cannot_be_cached_keeps_its_original_path(sources: Sources) -> None:
    [a] = sources.put("a")
    bundle = sources.bundle("x.lst", "missing", a, "/dev/null")

    [path], said = sources.get(bundle, bundle=True)

    assert path.suffix == ".lst"
    missing = sources.directory / "missing"
    assert lines_of(path) == [missing, sources.copy_of(a), Path("/dev/null")]
    assert said.splitlines() == [
        f"swarmcache: cannot cache bundle content: '{missing}': No such file or directory",
        "swarmcache: cannot cache bundle content: '/dev/null': is neither a file nor a directory",
    ]
    assert sources.get(bundle, bundle=True, strict=True, code=3)[0] == [path]


def test_a_bundle_of_which_nothing_can_be_cached_is_used_as_it_is(sources: Sources) -> None:
    names = [f"missing {number}" for number in range(TOLD_MAX + 2)]
    bundle = sources.bundle("x.bundle", *names)
    [path], said = sources.get(bundle)
    assert path == bundle
    assert len(said.splitlines()) == TOLD_MAX + 2
    assert f"and 2 more files of '{bundle}'" in said
    assert said.endswith("none of its files is cached; using the original list\n")

    empty = sources.bundle("empty.bundle")
    [path], said = sources.get(empty)
    assert path == empty and "it lists no files" in said
    assert sources.get(sources.directory / "no.bundle", code=1)[0] == []


def test_bundles_files_and_directories_in_one_call(sources: Sources) -> None:
    a, b, c = sources.put("a", "b", "tree/c")
    first, second = sources.bundle("1.bundle", "a", "b"), sources.bundle("2.bundle", "b", c)
    paths, _ = sources.get(a, first, c.parent, second, b)
    assert paths[::2] == [sources.copy_of(a), sources.copy_of(c.parent), sources.copy_of(b)]
    assert lines_of(paths[1]) == [sources.copy_of(a), sources.copy_of(b)]
    assert lines_of(paths[3]) == [sources.copy_of(b), sources.copy_of(c)]


def test_a_link_to_a_name_that_no_line_can_have_keeps_its_line(sources: Sources) -> None:
    a, _ = sources.put("a", "two\nlines")
    link = sources.directory / "link"
    link.symlink_to("two\nlines")
    bundle = sources.bundle("x.bundle", link, a)

    [path], said = sources.get(bundle)
    assert lines_of(path) == [link, sources.copy_of(a)]
    assert f"'{link}': it leads to a name with a newline" in said
    assert sources.get(bundle, all_or_nothing=True)[0] == [bundle]


def test_a_list_may_be_cached_as_a_file(sources: Sources) -> None:
    [a] = sources.put("a")
    bundle = sources.bundle("x.bundle", a)
    nested = sources.bundle("nested.bundle", bundle, a)
    [path], _ = sources.get(bundle, bundle=False)
    assert path == sources.copy_of(bundle) and path.read_bytes() == bundle.read_bytes()
    [of_nested], _ = sources.get(nested)
    assert lines_of(of_nested) == [path, sources.copy_of(a)], "no list within a list"
    binary = sources.directory / "repository.bundle"
    binary.write_bytes(b"# v2 git bundle\n\0\n")
    assert sources.get(binary) == ([sources.copy_of(binary)], "")
    [path], said = sources.get(binary, bundle=True)
    assert path == binary and "no list of paths" in said


def test_without_a_daemon_a_bundle_is_used_as_it_is(sources: Sources, tmp_path: Path) -> None:
    bundle = sources.bundle("x.lst", *sources.put("a", "b"))
    for options in (["--bundle"], ["--bundle", "--all-or-nothing"]):
        done = sources.node.run("get", "--socket", tmp_path / "nobody", *options, bundle)
        assert (done.returncode, done.stdout) == (0, os.fsencode(bundle) + b"\n")
        assert b"no daemon answers" in done.stderr and b"using the original list" in done.stderr


def test_where_the_list_cannot_be_written_the_bundle_is_used(sources: Sources) -> None:
    bundle = sources.bundle("x.bundle", *sources.put("a"))
    answer = sources.answer(bundle)
    results = Path(answer.path).parent
    moved = results.with_name("moved")
    results.rename(moved)
    results.write_bytes(b"a file of the user's own")
    try:
        answer = sources.answer(bundle)
    finally:
        results.unlink()
        moved.rename(results)
    assert answer.path == str(bundle) and answer.usable and not answer.cached
    assert "cannot be written" in answer.reason


def test_a_copy_that_has_gone_before_the_last_one_came_is_not_listed(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    [a, b] = sources.put("a", "b")

    def get_and_lose(*arguments: Any) -> Iterator[Answer]:
        for number, answer in enumerate(get_everything(*arguments)):
            if number == 0:
                os.unlink(answer.path)
            yield answer

    monkeypatch.setattr(bundle_get, "get_everything", get_and_lose)
    [path], said = sources.get(sources.bundle("x.bundle", a, b))
    assert lines_of(path) == [a, sources.copy_of(b)]
    assert f"'{a}': its copy has made room" in said
    c = sources.put("c")
    assert not sources.answer(sources.bundle("y.bundle", *c, b), all_or_nothing=True).cached


# --- all or nothing ------------------------------------------------------------------------------


def test_all_or_nothing_gives_all(sources: Sources) -> None:
    a, b, _ = sources.put("a", "b", "c")
    answer = sources.answer(sources.bundle("x.bundle", a, b, a), all_or_nothing=True)
    assert answer.cached and not answer.complaints()
    assert lines_of(answer.path) == [sources.copy_of(each) for each in (a, b, a)]


def test_with_a_member_missing_nothing_is_copied(sources: Sources) -> None:
    before = sources.cached()
    bundle = sources.bundle("x.bundle", *sources.put("first", "second"), "missing")
    [path], said = sources.get(bundle, all_or_nothing=True)
    assert path == bundle
    assert "missing' in it: No such file" in said and "using the original list" in said
    assert sources.cached() == before
    assert sources.get(bundle, all_or_nothing=True, strict=True, code=3)[0] == [bundle]
    done = sources.node.run("get", "--all-or-nothing", "--timeout=5", bundle)
    assert done.returncode == 2 and b"--all-or-nothing" in done.stderr


def test_what_was_copied_until_one_failed_is_taken_out_again(sources: Sources) -> None:
    """That a copy has no place is found out when it is there, not before. It has no path that the
    user could be given, and is left to be evicted."""
    old, *new = sources.put("of before", "new 1", "new 2", "in the way/file")
    assert sources.node.get(old)
    place = sources.copy_of(new[-1])
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    place.parent.write_bytes(b"a file of the user's own, where a directory should be")

    answer = sources.answer(sources.bundle("x.bundle", old, *new), all_or_nothing=True)

    assert not answer.cached and answer.path.endswith("/x.bundle")
    assert "not all of its files can be cached" in answer.complaints()[-1]
    assert sources.cached() & {"of before", "new 1", "new 2"} == {"of before"}
    assert sources.copy_of(old).read_bytes() == old.read_bytes()


def test_what_was_there_before_in_a_directory_stays_and_the_rest_of_it_is_taken_out(
    sources: Sources,
) -> None:
    """Also of a directory that cannot be shown as it is, though its files are cached."""
    old, new, older, newer, _ = sources.put("D/old", "D/new", "E/older", "E/newer", "E/deleted")
    sources.get(old, older.parent)
    copies = {old: sources.copy_of(old), older: sources.copy_of(older)}
    newer.write_bytes(b"changed")
    (older.parent / "deleted").unlink()

    bundle = sources.bundle("x.bundle", "D", "E")
    answer = sources.answer(bundle, all_or_nothing=True)

    assert answer.path == str(bundle) and "no longer in it" in answer.complaints()[0]
    assert all(copy.read_bytes() == source.read_bytes() for source, copy in copies.items())
    assert not sources.copy_of(new).exists()
    assert not sources.copy_of(newer).exists()


@pytest.mark.parametrize("mirrored", [True, False])
def test_links_and_directories_that_were_made_go_as_well_and_those_of_before_stay(
    sources: Sources, mirrored: bool
) -> None:
    """Whether a later file fails or the directory itself cannot be shown as it is."""
    [elsewhere, *_] = sources.put("elsewhere", "old/file", "new/file", "in the way/file")
    for name in ("old", "new"):
        (sources.directory / name / "empty" / "below").mkdir(parents=True)
        (sources.directory / name / "link").symlink_to("file")
    (sources.directory / "links" / "sub").mkdir(parents=True)
    (sources.directory / "links" / "sub" / "link").symlink_to(elsewhere)
    if not mirrored:
        [deleted] = sources.put("new/deleted")
        sources.get(deleted)
        deleted.unlink()
    sources.get(sources.directory / "old")
    place = sources.copy_of(sources.directory / "in the way")
    place.write_bytes(b"a file of the user's own, where a directory should be")
    before = {*sources.copy_of(sources.directory).rglob("*")}

    bundle = sources.bundle("x.bundle", "old", "new", "links", "in the way/file")
    answer = sources.answer(bundle, all_or_nothing=True)

    assert answer.path == str(bundle)
    assert {*sources.copy_of(sources.directory).rglob("*")} == before
    assert {"old/link", "old/empty/below"} <= {
        str(each.relative_to(sources.copy_of(sources.directory))) for each in before
    }


def start_with_room(local: LocalDaemons, room_bytes: int) -> LocalNode:
    """A daemon whose cache may take so much, besides what it keeps for itself."""
    max_usage = UNCOUNTED_MAX_BYTES + room_bytes
    return local.start_daemon(settings=f"[cache]\nmax_usage = {max_usage}\nmin_free = 0\n")


def test_room_for_some_is_no_room_for_all(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node = start_with_room(local, 7 << 19)
        sources = Sources(tmp_path / "sources", node, capsysbinary)
        for name in ("1", "2", "3", "4"):
            (sources.directory / name).write_bytes(bytes([int(name)]) * (1 << 20))
        bundle = sources.bundle("x.bundle", "1", "2", "3", "4")

        answer = sources.answer(bundle, all_or_nothing=True)
        assert answer.path == str(bundle) and "there can be room for" in answer.reason
        assert sources.cached() == set()
        three = sources.answer(sources.bundle("y.bundle", "1", "2", "3"), all_or_nothing=True)
        assert three.cached and sources.cached() == {"1", "2", "3"}
        answer = sources.answer(bundle, all_or_nothing=True)
        assert not answer.cached and sources.cached() == {"1", "2", "3"}
        partly = sources.answer(bundle)
        assert [each.cached for each in partly.members] == [True, True, True, False]
        assert lines_of(partly.path)[3] == sources.directory / "4"
        assert not partly.cached and partly.usable


def test_a_bundle_in_the_current_directory(sources: Sources) -> None:
    bundle = sources.bundle("x.bundle", *sources.put("a"))
    done = subprocess.run(
        [*COMMAND, "get", f"--socket={sources.node.socket}", "x.bundle"],
        capture_output=True,
        check=True,
        cwd=sources.directory,
        env={},
    )
    assert lines_of(os.fsdecode(done.stdout).removesuffix("\n")) == [
        sources.copy_of(bundle.with_name("a"))
    ]
