"""The Python API against a real daemon: paths, holds, threads, forks, event loops."""

from __future__ import annotations

import ast
import asyncio
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import swarmcache
from swarmcache import aio, exchanges
from swarmcache.local_protocol import LOOK_UP_MAX, Cached, Get
from swarmcache.local_protocol import Answer as DaemonAnswer
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.box import wait_until
from tests.local_daemons import PACKAGE_PARENT, LocalDaemons, LocalNode
from tests.scripted_daemon import Asked, ScriptedDaemon, caching_in

MIB = 1 << 20
DEADLINE_S = 60.0
# Room for one of the big files, not for two.
TIGHT_BYTES = UNCOUNTED_MAX_BYTES + 5 * MIB // 2


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDaemons]:
    with LocalDaemons(tmp_path_factory.mktemp("api")) as local:
        local.start_tracker()
        yield local


@pytest.fixture(scope="module")
def node(local: LocalDaemons) -> LocalNode:
    return local.start_daemon("roomy", "[cache]\nmax_usage = '90%'\nmin_free = 0\n")


@pytest.fixture(scope="module")
def tight_node(local: LocalDaemons) -> LocalNode:
    settings = f"[cache]\nmax_usage = {TIGHT_BYTES}\nmin_free = 0\nmin_age = 0\n"
    return local.start_daemon("tight", settings)


@pytest.fixture
def client(node: LocalNode) -> Iterator[swarmcache.Client]:
    with swarmcache.Client(bytes(node.socket)) as client:
        yield client


@pytest.fixture
def tight_client(tight_node: LocalNode) -> Iterator[swarmcache.Client]:
    with swarmcache.Client(bytes(tight_node.socket)) as client:
        yield client


@pytest.fixture
async def async_client(node: LocalNode) -> AsyncIterator[aio.Client]:
    async with aio.Client(bytes(node.socket)) as client:
        yield client


@pytest.fixture
def daemon_of_all(node: LocalNode, monkeypatch: pytest.MonkeyPatch) -> LocalNode:
    """The daemon that everybody finds."""
    monkeypatch.setenv("SWARMCACHE_SOCKET", str(node.socket))
    return node


def small_files(directory: Path, count: int) -> list[Path]:
    files = [directory / f"file-{number}" for number in range(count)]
    for file in files:
        file.write_text(file.name)
    return files


def big_files(directory: Path) -> tuple[Path, Path]:
    first, second = directory / "first", directory / "second"
    for file in (first, second):
        file.write_bytes(os.urandom(2 * MIB))
    return first, second


# --- functions -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("daemon_of_all")
def test_functions_give_the_paths_of_copies(node: LocalNode, tmp_path: Path) -> None:
    first, *others = small_files(tmp_path, 3)

    path = swarmcache.get(first)
    assert Path(path).is_relative_to(node.cache_dir) and Path(path).read_text() == "file-0"
    assert swarmcache.get_many([bytes(first), str(first)]) == [path, path]
    assert [Path(copy).read_text() for copy in swarmcache.get_many(others)] == ["file-1", "file-2"]
    with swarmcache.hold(first, strict=True) as local:
        assert local == path


@pytest.mark.usefixtures("daemon_of_all")
def test_cp_writes_and_locate_finds(node: LocalNode, tmp_path: Path) -> None:
    (source,) = small_files(tmp_path, 1)
    (tmp_path / "server").mkdir()

    written = swarmcache.cp(source, tmp_path / "server")
    assert Path(written).read_text() == "file-0"
    assert swarmcache.get(written, strict=True).startswith(str(node.cache_dir))
    (found,) = swarmcache.locate(written)
    assert [replica.path for replica in found.replicas] == [os.fsencode(swarmcache.get(written))]
    with pytest.raises(swarmcache.CopyFailed, match="No such file"):
        swarmcache.cp(source, tmp_path / "nowhere" / "file")


def test_a_directory_gives_a_directory(client: swarmcache.Client, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (file,) = small_files(tmp_path / "tree", 1)

    tree, copy = client.get_many([tmp_path / "tree", file], strict=True)
    assert Path(copy).parent == Path(tree)


def test_files_and_directories_come_in_the_place_of_what_were_links(
    client: swarmcache.Client, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "real").mkdir(parents=True)
    small_files(tree / "real", 1)
    for name, target in (("a", "real/file-0"), ("b", "real")):
        (tree / name).symlink_to(target)
    assert (Path(client.get(tree, strict=True)) / "a").is_symlink()
    for name in ("a", "b"):
        (tree / name).unlink()
    (tree / "a").write_text("a file now")
    (tree / "b").mkdir()
    (tree / "b" / "file").write_text("in a directory now")

    copy = Path(client.get(tree, strict=True))

    assert not (copy / "a").is_symlink() and not (copy / "b").is_symlink()
    assert (copy / "a").read_text() == "a file now"
    assert (copy / "b" / "file").read_text() == "in a directory now"
    assert not (copy / "real" / "file").exists()


def test_an_answer_is_a_path_that_knows_more(client: swarmcache.Client, tmp_path: Path) -> None:
    (file,) = small_files(tmp_path, 1)
    answer = client.get(file)

    assert answer.cached and not answer.hit
    assert Path(answer).read_text() == "file-0" and answer + ".idx" == f"{answer.path}.idx"
    unpickled = pickle.loads(pickle.dumps(answer))
    assert type(unpickled) is str and unpickled == answer
    assert {type(each) for each in (answer.path, str(answer), f"{answer}")} == {str}


def test_without_a_daemon_there_is_the_original_path_or_an_error(tmp_path: Path) -> None:
    (file,) = small_files(tmp_path, 1)
    missing = tmp_path / "missing"
    with swarmcache.Client(bytes(tmp_path / "no.sock")) as client:
        assert client.get_many([file, missing]) == [str(file), str(missing)]
        with client.hold(file) as local:
            assert local == str(file)
        for ask in (client.get, client.hold):
            with pytest.raises(swarmcache.NotCached, match=r"file-0.*no daemon answers"):
                ask(file, strict=True)
            with pytest.raises(swarmcache.SourceUnreadable, match=r"missing.*No such file"):
                ask(missing, strict=True)
        with pytest.raises(swarmcache.SourceUnreadable):
            client.get_many([missing, file], strict=True)


def test_a_program_imports_only_what_it_uses() -> None:
    program = (
        "import sys; before = set(sys.modules); import swarmcache\n"
        "new = set(sys.modules) - before\n"
        "assert new == {'__future__', 'swarmcache'}, new\n"
        "import swarmcache.get, swarmcache.cp, swarmcache.locate\n"
        "assert all(map(callable, (swarmcache.get, swarmcache.cp, swarmcache.locate)))\n"
        "assert all(getattr(swarmcache, name) for name in swarmcache.__all__)\n"
        "assert set(swarmcache.__all__) <= set(dir(swarmcache))\n"
        "assert not hasattr(swarmcache, 'nothing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE_PARENT,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


# --- many at once --------------------------------------------------------------------------------


def test_many_files_are_looked_up_together(client: swarmcache.Client, tmp_path: Path) -> None:
    """Some are cached already, some are not, some do not exist, some are named twice."""
    files = small_files(tmp_path, LOOK_UP_MAX + 10)
    assert all(answer.cached for answer in client.get_many(files[::2]))
    asked = [*files, tmp_path / "missing", *files[:5]]

    answers = client.get_many(asked)

    missing = answers.pop(len(files))
    assert not missing.usable and missing == str(tmp_path / "missing")
    del asked[len(files)]
    assert [Path(answer).read_text() for answer in answers] == [file.name for file in asked]
    assert all(answer.hit for answer in answers[: len(files) : 2])
    assert all(answer.cached for answer in answers)


def test_a_changed_source_is_no_hit(client: swarmcache.Client, tmp_path: Path) -> None:
    files = small_files(tmp_path, 3)
    client.get_many(files)
    files[1].write_text("changed")

    answers = client.get_many(files)

    assert [answer.hit for answer in answers] == [True, False, True]
    assert Path(answers[1]).read_text() == "changed"


def test_as_many_files_are_open_as_may_be(
    client: swarmcache.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = small_files(tmp_path, 100)
    opened, real_open = [0], exchanges.open_source

    def open_few(asked: bytes, *, real: bool) -> exchanges.Source:
        if len(os.listdir("/proc/self/fd")) > before + 10:
            opened[0] += 1
            refused = OSError(24, "Too many open files")
            raise swarmcache.SourceUnreadable(str(refused)) from refused
        return real_open(asked, real=real)

    client.get(files[0])
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(exchanges, "open_source", open_few)

    answers = client.get_many(files)

    assert opened[0] > 0, "there was no need to wait for others to be closed"
    assert [Path(answer).read_text() for answer in answers] == [file.name for file in files]


@pytest.mark.parametrize("spare", range(1, 5))
def test_a_process_without_descriptors_gets_the_original_path(
    node: LocalNode, tmp_path: Path, spare: int
) -> None:
    """As many are left as are needed for the source, for the connection, ..."""
    (file,) = small_files(tmp_path, 1)
    program = (
        "import json, os, resource, swarmcache\n"
        f"client = swarmcache.Client({str(node.socket)!r})\n"
        "lowest = os.dup(0)\n"
        "os.close(lowest)\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + {spare}, 4096))\n"
        f"print(client.get({str(file)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE_PARENT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    path = Path(os.fsdecode(done.stdout.removesuffix(b"\n")))
    assert path == file or path.is_relative_to(node.cache_dir)


def test_few_descriptors_make_a_call_slower_and_all_files_cached(
    client: swarmcache.Client, node: LocalNode, tmp_path: Path
) -> None:
    files = [str(file) for file in small_files(tmp_path, 100)]
    client.get_many(files, strict=True)
    program = (
        "import os, resource, sys, swarmcache\n"
        f"client = swarmcache.Client({str(node.socket)!r})\n"
        "lowest = os.dup(0)\n"
        "os.close(lowest)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 30, 4096))\n"
        "print(sum(answer.cached for answer in client.get_many(sys.argv[1:])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *files],
        cwd=PACKAGE_PARENT,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"100\n")


def test_threads_share_a_client(client: swarmcache.Client, tmp_path: Path) -> None:
    files = small_files(tmp_path, 40)

    def ask(first: int) -> list[str]:
        some = files[first:] + files[:first]
        with client.hold(some[0], strict=True) as held:
            paths = client.get_many(some, strict=True)
        assert held == paths[0]
        return sorted(paths)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(ask, range(0, 40, 2), timeout=DEADLINE_S))
    assert all(result == results[0] for result in results)


# --- holds ---------------------------------------------------------------------------------------


def is_kept(client: swarmcache.Client, file: Path, other: Path) -> bool:
    """Whether the copy of ``file`` stays when there is only room for one of the two."""
    kept = not client.get(other).cached
    assert client.get(file).hit == kept
    return kept


def held(client: swarmcache.Client, file: Path) -> swarmcache.Hold:
    """A hold of the copy, as soon as the daemon has done with what has to go for it."""
    holds: list[swarmcache.Hold] = []

    def is_held() -> bool:
        holds.append(client.hold(file))
        return holds[-1].held

    wait_until(is_held, DEADLINE_S, "the copy to be held")
    return holds[-1]


def goes(client: swarmcache.Client, file: Path, other: Path) -> bool:
    """Whether the copy can be evicted, as soon as the daemon has done with it."""
    wait_until(lambda: not is_kept(client, file, other), DEADLINE_S, "the copy to be evicted")
    return True


def test_a_hold_keeps_the_copy_until_its_block_ends(
    tight_client: swarmcache.Client, tmp_path: Path
) -> None:
    first, second = big_files(tmp_path)
    with held(tight_client, first), tight_client.hold(first, strict=True) as local:
        assert Path(local).read_bytes() == first.read_bytes()
        with tight_client.hold(first):
            pass
        assert is_kept(tight_client, first, second)
    assert goes(tight_client, first, second)


def test_a_hold_without_a_block_ends_with_its_release_or_the_client(
    tight_node: LocalNode, tight_client: swarmcache.Client, tmp_path: Path
) -> None:
    first, second = big_files(tmp_path)
    hold = held(tight_client, first)
    assert hold.held and is_kept(tight_client, first, second)
    hold.release()
    hold.release()
    assert goes(tight_client, first, second)

    other = swarmcache.Client(bytes(tight_node.socket))
    hold = held(other, first)
    assert is_kept(tight_client, first, second)
    other.close()
    assert goes(tight_client, first, second)
    hold.release()  # of what is no more: nothing happens


def forked(run: Callable[[], None]) -> int:
    """The exit code of a child that calls this and then ends without any of our cleaning up."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_hold_survives_forked_children(tight_client: swarmcache.Client, tmp_path: Path) -> None:
    first, second = big_files(tmp_path)
    (small,) = small_files(tmp_path, 1)
    with held(tight_client, first) as local:
        hold = tight_client.hold(first, strict=True)

        def work() -> None:
            assert tight_client.get(first) == local
            with tight_client.hold(small, strict=True):
                pass
            hold.release()
            tight_client.close()

        assert forked(lambda: None) == 0
        assert forked(work) == 0
        assert hold.held and is_kept(tight_client, first, second)
        hold.release()
        assert is_kept(tight_client, first, second), "held twice"
    assert goes(tight_client, first, second)


def test_a_child_that_lives_on_keeps_what_its_parent_held(
    tight_node: LocalNode, tight_client: swarmcache.Client, tmp_path: Path
) -> None:
    first, second = big_files(tmp_path)
    program = (
        "import os, sys, swarmcache\n"
        f"client = swarmcache.Client({str(tight_node.socket)!r})\n"
        f"while not (hold := client.hold({str(first)!r})).held:\n"
        "    pass\n"
        "with hold:\n"
        "    if os.fork():\n"
        "        os._exit(0)\n"
        "    client.get('/etc/hostname')\n"
        "    print('alone', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE_PARENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as started:
        assert started.stdin is not None and started.stdout is not None
        assert started.stdout.readline() == b"alone\n" and started.wait(DEADLINE_S) == 0
        assert is_kept(tight_client, first, second)
        started.stdin.close()
        assert started.stdout.read() == b"", "the child has ended"
    assert goes(tight_client, first, second)


def test_a_client_goes_along_to_a_child_that_is_spawned(
    client: swarmcache.Client, tmp_path: Path
) -> None:
    (file,) = small_files(tmp_path, 1)
    with pickle.loads(pickle.dumps(client)) as other:
        assert isinstance(other, swarmcache.Client)
        assert other.get(file) == client.get(file)


def test_another_connection_holds_what_one_cannot(tmp_path: Path) -> None:
    """The daemon lets a connection hold so many, here two; and refuses all from the third on."""
    (tmp_path / "run").mkdir(mode=0o700)
    (file,) = small_files(tmp_path, 1)
    caching = caching_in(tmp_path / "cache")
    held: dict[int, int] = {}

    def answer(asked: Asked) -> Iterable[DaemonAnswer]:
        assert isinstance(asked.request, Get)
        for each in caching(asked):
            assert isinstance(each, Cached)
            if asked.request.hold is not None:
                held[asked.connection] = held.get(asked.connection, 0) + 1
                each.held = held[asked.connection] <= 2 and len(held) <= 2
            yield each

    with (
        ScriptedDaemon(tmp_path / "run", answer) as daemon,
        swarmcache.Client(bytes(daemon.path)) as client,
    ):
        assert [client.hold(file).held for _ in range(4)] == [True] * 4
        refused = client.hold(file)
        assert refused.answer.cached and not refused.held
        with pytest.raises(swarmcache.NotCached, match="cannot hold"):
            client.hold(file, strict=True)


def test_a_hold_is_taken_of_the_daemon_that_runs_now(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (file,) = small_files(tmp_path, 1)
    caching = caching_in(tmp_path / "cache")

    def answer(asked: Asked) -> Iterable[DaemonAnswer]:
        for each in caching(asked):
            assert isinstance(asked.request, Get) and isinstance(each, Cached)
            each.held = asked.request.hold is not None
            yield each

    with swarmcache.Client(bytes(tmp_path / "run" / "daemon.sock")) as client:
        for _ in range(2):
            with ScriptedDaemon(tmp_path / "run", answer) as daemon:
                assert client.hold(file, strict=True).held
            daemon.path.unlink()
        assert not client.hold(file).held


# --- asyncio -------------------------------------------------------------------------------------


def text_of(path: str | Path) -> str:
    return Path(path).read_text(errors="surrogateescape")


async def test_coroutines_have_the_same_names(async_client: aio.Client, tmp_path: Path) -> None:
    files = small_files(tmp_path, LOOK_UP_MAX + 10)
    (tmp_path / "tree").mkdir()
    small_files(tmp_path / "tree", 1)

    answers = await async_client.get_many([*files, tmp_path / "tree", tmp_path / "missing"])
    missing, tree = answers.pop(), answers.pop()
    assert list(map(text_of, answers)) == [file.name for file in files]
    assert text_of(tree + "/file-0") == "file-0" and tree.cached and not missing.usable
    assert await async_client.get(files[0]) == answers[0]
    (found,) = await async_client.locate(files[0])
    assert len(found.replicas) == 1
    written = await async_client.cp(files[0], tmp_path / "written")
    assert text_of(written) == "file-0"
    status = await async_client.status()
    assert status["node"]["tracker_connected"]


async def test_a_hold_of_a_coroutine_ends_with_its_block(
    tight_node: LocalNode, tight_client: swarmcache.Client, tmp_path: Path
) -> None:
    first, second = big_files(tmp_path)
    held(tight_client, first).release()
    async with aio.Client(bytes(tight_node.socket)) as client:
        async with client.hold(first, strict=True) as local:
            assert text_of(local) == text_of(first)
            assert is_kept(tight_client, first, second)
        assert goes(tight_client, first, second)


async def test_many_coroutines_wait_with_few_threads(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    files = small_files(tmp_path, 40)
    caching = caching_in(tmp_path / "cache")
    all_asked = threading.Barrier(len(files), timeout=DEADLINE_S)

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        all_asked.wait()
        return caching(asked)

    with ScriptedDaemon(tmp_path / "run", answer) as daemon:
        async with aio.Client(bytes(daemon.path)) as client, asyncio.timeout(DEADLINE_S):
            answers = await asyncio.gather(*map(client.get, files))
    assert list(map(text_of, answers)) == [file.name for file in files]


async def test_directories_that_take_long_hold_up_no_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (file,) = small_files(tmp_path, 1)
    trees = [tmp_path / f"tree-{number}" for number in range(aio.THREADS_MAX)]
    for tree in trees:
        tree.mkdir()
        small_files(tree, 1)
    caching = caching_in(tmp_path / "cache")
    all_asked, go_on = threading.Barrier(len(trees) + 1, timeout=DEADLINE_S), threading.Event()

    def answer(asked: Asked) -> Iterable[DaemonAnswer | bytes]:
        if asked.path != bytes(file):
            all_asked.wait()
            go_on.wait(DEADLINE_S)
        return caching(asked)

    with ScriptedDaemon(tmp_path / "run", answer) as daemon:
        async with aio.Client(bytes(daemon.path)) as client:
            directories = asyncio.gather(*map(client.get, trees))
            await asyncio.to_thread(all_asked.wait)
            try:
                async with asyncio.timeout(5):
                    assert text_of(await client.get(file)) == "file-0"
            finally:
                go_on.set()
                answers = await directories
    assert all(answer.cached for answer in answers)


async def test_a_request_ends_with_the_task_that_made_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    first, second = small_files(tmp_path, 2)
    caching = caching_in(tmp_path / "cache")
    asked, go_on = threading.Event(), threading.Event()

    def answer(request: Asked) -> Iterable[DaemonAnswer | bytes]:
        if request.path == bytes(first):
            asked.set()
            go_on.wait(DEADLINE_S)
        return caching(request)

    before = len(os.listdir("/proc/self/fd"))
    with ScriptedDaemon(tmp_path / "run", answer) as daemon:
        async with aio.Client(bytes(daemon.path)) as client, asyncio.timeout(DEADLINE_S):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.get(first)
            assert await asyncio.to_thread(asked.wait, DEADLINE_S)
            go_on.set()
            answer_for_second = await client.get(second, strict=True)
        assert text_of(answer_for_second) == "file-1"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_client_serves_one_event_loop_after_another(node: LocalNode, tmp_path: Path) -> None:
    (file,) = small_files(tmp_path, 1)
    client = aio.Client(bytes(node.socket))

    first = asyncio.run(client.get(file))
    assert asyncio.run(client.get(file)) == first and first.cached
    asyncio.run(client.close())


# --- documentation -------------------------------------------------------------------------------


async def test_the_examples_of_the_readme_run(
    node: LocalNode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As they are, but for where the files are."""
    for name in ("corpus", "results"):
        (tmp_path / "nfs" / name).mkdir(parents=True)
    for name in ("train", "dev", "a", "b"):
        (tmp_path / "nfs" / "corpus" / f"{name}.hdf").write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWARMCACHE_SOCKET", str(node.socket))
    (tmp_path / "result.hdf").write_text("result")
    readme = (PACKAGE_PARENT / "README.md").read_text()
    section = readme.partition("## From Python\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines(keepends=True) if line[:4].isspace()]
    example = textwrap.dedent("".join(lines)).replace("/nfs/", f"{tmp_path}/nfs/")
    names: dict[str, object] = {}

    compiled = compile(example, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(compiled, names)

    assert str(names["path"]).startswith(str(node.cache_dir)) and names["data"] == b"dev"
    assert text_of(tmp_path / "nfs" / "results" / "result.hdf") == "result"
    said = capsys.readouterr().out
    assert "True True  0\n" in said and str(names["path"]) in said
