"""CacheManager's regression scenarios, each a row: what is done, and what ``cf`` tells and prints.

The numbers and names are those of its test script; those without a number were in the script and
not run by it. Where ``cf`` is meant to do something else than the old client, the row says why in
its docstring, which begins with "Differs". The texts are those that people and scripts search for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.box import require, wait_until
from tests.cf_cluster import FILE_BYTES, ROOM_BYTES, SLOW_BYTES, Call, CfCluster
from tests.swarm_helpers import MIB, PATIENCE_S

pytestmark = [pytest.mark.box, pytest.mark.slow]

Row = Callable[[CfCluster, str], None]
ROWS: list[tuple[str, Row]] = []


def row(*numbers: int) -> Callable[[Row], Row]:
    """Enter a scenario into the table, or two of which the one is the beginning of the other."""

    def enter(run: Row) -> Row:
        ROWS.append((f"{'+'.join(map(str, numbers)) or 'x'}-{run.__name__}", run))
        return run

    return enter


# --- one file ------------------------------------------------------------------------------------


@row(1)
def normal_copy(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.cf(it.here, file).tells(f"LOG: request: {file}", "LOG: start copying .*").copied(file)


@row(2)
def node_copy(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.cf(it.here, file).copied(file)
    it.cf(it.a, file).copied_from_peers(file)
    assert it.box.file_server.bytes_read(file) == FILE_BYTES


@row(3)
def node_copy_newer(it: CfCluster, name: str) -> None:
    it.get(it.here, it.file(name))
    newer = it.file(name)
    it.cf(it.a, newer).copied(newer)


@row(4)
def node_copy_tainted(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.get(it.here, file).write_bytes(b"1")
    it.cf(it.a, file).copied(file)


@row(5)
def node_copy_deleted(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.get(it.here, file)
    it.forget(it.here, file)
    it.cf(it.a, file).copied(file)


@row(6)
def node_copy_other(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.get(it.here, file)
    it.cf(it.a, file).copied_from_peers(file)
    it.forget(it.here, file)
    it.cf(it.b, file).copied_from_peers(file)
    it.cf(it.here, file).copied_from_peers(file)


@row(10)
def use_existing(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.cf(it.here, file).copied(file)
    it.cf(it.here, file).used_existing(file)


@row(15)
def not_found(it: CfCluster, name: str) -> None:
    file = it.box.export / name
    it.cf(it.here, file).tells(f"ERROR: file not found '{file}'").exits(1).prints(file)


# --- room ----------------------------------------------------------------------------------------


@row(7)
def remove_new_file(it: CfCluster, name: str) -> None:
    dummy, file = it.file("dummy", 2 * MIB), it.file(name)
    copy = it.get(it.here, dummy)
    with it.room(it.here):
        it.cf(it.here, file).tells("LOG: not enough free space.*").original(file)
    assert copy.exists()


@row(8)
def remove_old_file(it: CfCluster, name: str) -> None:
    """Differs: a copy goes, and never a file that swarmcache has not put there. Nobody is told
    "removed PATH", since files of other users are nobody else's business."""
    dummy, file = it.file("dummy", 2 * MIB), it.file(name)
    it.forget_all(it.a)
    copy = it.get(it.a, dummy)
    foreign = copy.with_name("foreign")
    foreign.write_bytes(bytes(MIB))
    with it.room(it.a):
        it.cf(it.a, file).copied(file)
    assert not copy.exists()
    assert foreign.exists()


@row(9)
def remove_open_file(it: CfCluster, name: str) -> None:
    dummy, file = it.file("dummy", 2 * MIB), it.file(name)
    it.forget_all(it.a)
    copy = it.get(it.a, dummy)
    with open(copy, "rb"), it.room(it.a):
        it.cf(it.a, file).tells("LOG: not enough free space.*").original(file)
    assert copy.exists()


@row()
def remove_files(it: CfCluster, name: str) -> None:
    """Old, tainted and outdated copies give way; what is wrong with them is set right."""
    it.forget_all(it.a)
    files = it.files(name, 7)
    copies = [it.get(it.a, file) for file in files]
    copies[5].write_bytes(b"1")
    files[6] = it.file(files[6].name)
    with it.room(it.a):
        for number in (5, 6):
            it.cf(it.a, files[number]).tells("LOG: copied .*").exits(0)
    assert copies[5].read_bytes() == files[5].read_bytes()
    assert copies[6].read_bytes() == files[6].read_bytes()
    assert sum(copy.exists() for copy in copies[:5]) < 5


@row()
def a_time_confusion(it: CfCluster, name: str) -> None:
    """Differs: a copy stays while a peer is served from it, however long ago a job used it, and not
    for a day more. By then the peer has one as well."""
    first, second, third = it.file(name, 24 * MIB), *it.files(name, 2)
    it.forget_all(it.a)
    served, other = it.get(it.a, first), it.get(it.a, second)
    with it.slow(it.b):
        begun = it.cf(it.b, first)
        it.wait_for_bytes(it.b)
        with it.room(it.a):
            it.cf(it.a, third).copied(third)
        assert begun.process.returncode is None
        assert served.exists()
        assert not other.exists()
    begun.copied_from_peers(first)


# --- waiting -------------------------------------------------------------------------------------


@row(11)
def wait_copy(it: CfCluster, name: str) -> None:
    """Differs: the slot changes hands every half second, so that small files overtake big ones."""
    first, second = it.file(f"{name}.a", 8 * MIB), it.file(f"{name}.b")
    with it.slow(it.box.fs):
        begun = it.cf(it.here, first)
        it.wait_for_bytes(it.here)
        waiting = it.cf(it.here, second)
        waiting.process.wait_for_stderr("LOG: no copy slot available. waiting", PATIENCE_S)
    waiting.copied(second)
    begun.copied(first)


@row(12)
def wait_copy_other(it: CfCluster, name: str) -> None:
    first, second = it.file(f"{name}.a"), it.file(f"{name}.b", 8 * MIB)
    for node, file in ((it.a, first), (it.b, first), (it.a, second)):
        it.get(node, file)
    with it.slow(it.a):
        begun = it.cf(it.here, second)
        it.wait_for_bytes(it.here)
        it.cf(it.here, first).copied_from_peers(first)
        assert begun.process.returncode is None
    begun.copied_from_peers(second)


@row(14)
def slow_node_copy(it: CfCluster, name: str) -> None:
    file = it.file(name, SLOW_BYTES)
    it.get(it.here, file)
    with it.slow(it.here):
        it.cf(it.b, file).copied_from_peers(file)


@row(36)
def wait_active(it: CfCluster, name: str) -> None:
    file = it.file(name, 8 * MIB)
    with it.slow(it.box.fs):
        first = it.cf(it.here, file)
        first.process.wait_for_stderr("start copying", PATIENCE_S)
        second = it.cf(it.here, file)
        second.process.wait_for_stderr("LOG: file transfer in progress. wait", PATIENCE_S)
    first.copied(file)
    second.used_existing(file)
    assert it.box.file_server.bytes_read(file) == 8 * MIB


@row(13, 37)
def wait_active_slow_copy(it: CfCluster, name: str) -> None:
    """Longer than the time without progress after which a job gets the original path, and than a
    lease, which is renewed as long as there is progress."""
    file = it.file(name, SLOW_BYTES)
    with it.slow(it.box.fs):
        first = it.cf(it.b, file)
        first.process.wait_for_stderr("start copying", PATIENCE_S)
        second = it.cf(it.b, file)
        second.tells("LOG: file transfer in progress. wait.*").used_existing(file)
    first.copied(file)


@row()
def wait_active_parallel(it: CfCluster, name: str) -> None:
    """Five jobs ask for the same ten files: one transfer of each."""
    files = it.files(name, 10, 64 * 1024)
    script = 'cf=$1; shift; for file in "$@"; do env -i "$cf" "$file"; done'
    jobs = [
        it.here.start(["sh", "-c", script, "sh", it.program, *files], log="job") for _ in range(5)
    ]
    assert [job.wait(PATIENCE_S) for job in jobs] == [0] * 5
    told = "".join(job.stderr for job in jobs)
    assert told.count("LOG: copied ") == 10
    assert told.count("LOG: using existing file") == 40
    assert len({job.stdout for job in jobs}) == 1


# --- bundles -------------------------------------------------------------------------------------


def assert_lists(call: Call, members: list[Path]) -> None:
    """A list of paths, one for each member, in order, each of them with the member's bytes."""
    listed = [Path(line) for line in call.copy.read_text().splitlines()]
    assert [path.read_bytes() for path in listed] == [file.read_bytes() for file in members]
    assert call.copy.suffix in {".bundle", ".bd"}


@row(16)
def bundle_archive(it: CfCluster, name: str) -> None:
    """Differs: asked for again, it gives the same list and not a new one beside it."""
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    first = it.cf(it.here, bundle).tells(*(f"LOG: copied {file}" for file in files)).exits(0)
    assert_lists(first, files)
    it.cf(it.here, bundle).tells("LOG: using existing file").prints(first.copy)


@row(17)
def bundle_node_copy(it: CfCluster, name: str) -> None:
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    it.cf(it.here, bundle).exits(0)
    told = it.cf(it.a, bundle).tells(*(f"LOG: copied peers:{file}" for file in files)).exits(0)
    assert_lists(told, files)


@row(18)
def bundle_archive_non_standard_ext(it: CfCluster, name: str) -> None:
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bd", files)
    told = it.cf(it.here, bundle, "--bundle").tells(*(f"LOG: copied {file}" for file in files))
    assert_lists(told.exits(0), files)
    plain = it.cf(it.here, bundle).copied(bundle)
    assert plain.copy.read_bytes() == bundle.read_bytes()


@row(19)
def bundle_fail_all(it: CfCluster, name: str) -> None:
    """Differs in the exit code, as for every path that can be used."""
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    with it.room(it.here):
        told = it.cf(it.here, bundle)
        told.tells(*(f"WARN: cannot cache bundle content: {file}: .*" for file in files))
        told.tells("ERROR: caching of bundle archive failed").original(bundle)


@row()
def bundle_fail(it: CfCluster, name: str) -> None:
    """Room for one of four: that one is cached, and the others read from the file server."""
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    with it.room(it.here, FILE_BYTES + ROOM_BYTES):
        told = it.cf(it.here, bundle).exits(0)
    listed = told.copy.read_text().splitlines()
    original = [path for path, file in zip(listed, files, strict=True) if path == str(file)]
    assert len(original) == 3
    told.tells(*(f"WARN: cannot cache bundle content: {file}: .*" for file in original))
    assert_lists(told, files)


@row(20)
def bundle_fail_missing_one(it: CfCluster, name: str) -> None:
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    files[1].unlink()
    told = it.cf(it.here, bundle).exits(0)
    told.tells(*(f"LOG: copied {files[number]}" for number in (0, 2, 3)))
    told.tells(f"WARN: cannot cache bundle content: {files[1]}: .*")
    listed = told.copy.read_text().splitlines()
    assert [str(files[1])] == [path for path in listed if not Path(path).exists()]
    assert listed.index(str(files[1])) == 1


@row(21)
def bundle_archive_conjunct(it: CfCluster, name: str) -> None:
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    told = it.cf(it.here, "--conjunct", bundle).tells(*(f"LOG: copied {file}" for file in files))
    assert_lists(told.exits(0), files)


@row(22)
def bundle_fail_conjunct(it: CfCluster, name: str) -> None:
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    with it.room(it.here, 3 * FILE_BYTES + ROOM_BYTES):
        told = it.cf(it.here, "--conjunct", bundle)
        told.tells("LOG: result is not cached").tells_not("LOG: copied").original(bundle)


@row(23)
def bundle_fail_missing_one_conjunct(it: CfCluster, name: str) -> None:
    """Differs: nothing is copied that would be of no use."""
    files = it.files(name, 4)
    bundle = it.bundle(f"{name}.bundle", files)
    files[1].unlink()
    told = it.cf(it.here, "--conjunct", bundle).tells(f"WARN: .*{files[1]}.*")
    told.tells("ERROR: caching of bundle archive failed").original(bundle)
    told.tells_not("LOG: copied")
    it.cf(it.here, files[0]).copied(files[0])


# --- where copies are ----------------------------------------------------------------------------


@row(24)
def location(it: CfCluster, name: str) -> None:
    file = it.file(name)
    copies = {node.name: it.get(node, file) for node in it.box.nodes}
    told = it.cf(it.here, "-l", file).tells("LOG: 3 locations found").exits(0)
    expected = {f"{node}:{copy}:{FILE_BYTES}" for node, copy in copies.items()}
    assert set(told.printed) == expected
    assert len(it.cf(it.here, "-ll", "2", file).exits(0).printed) == 2
    assert len(it.cf(it.here, "-ll", "0", file).exits(0).printed) == 3


@row(25)
def location_newer(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.get(it.here, file)
    it.get(it.a, file)
    it.cf(it.here, "-l", it.file(name)).tells("LOG: 0 locations found").exits(0).prints()


@row(26)
def location_deleted(it: CfCluster, name: str) -> None:
    file = it.file(name)
    copy = it.get(it.here, file)
    it.get(it.a, file)
    it.forget(it.a, file)
    told = it.cf(it.here, "-l", file).tells("LOG: 1 locations found").exits(0)
    told.prints(f"{it.here.name}:{copy}:{FILE_BYTES}")


@row(27)
def locations(it: CfCluster, name: str) -> None:
    files = it.files(name, 3)
    for file in files:
        it.get(it.here, file)
        it.get(it.a, file)
    it.cf(it.here, "-l", *files).tells("LOG: 6 locations found").exits(0)


@row(28)
def locations_bundle(it: CfCluster, name: str) -> None:
    files = it.files(name, 4, 64 * 1024)
    for file in files:
        it.get(it.here, file)
        it.get(it.a, file)
    bundle = it.bundle(f"{name}.bundle", files)
    it.cf(it.here, "-l", bundle).tells("LOG: 8 locations found").exits(0)


# --- to the file server --------------------------------------------------------------------------


@row(29)
def copy_to_server(it: CfCluster, name: str) -> None:
    local, file = it.local(it.here, name), it.box.export / name
    it.cf(it.here, "-cp", local, file).tells(f"LOG: copied {local} to {file}").exits(0).prints()
    assert file.read_bytes() == local.read_bytes()
    it.cf(it.a, file).copied_from_peers(file)
    it.cf(it.here, file).used_existing(file)
    assert it.box.file_server.bytes_read(file) < FILE_BYTES


@row(30)
def copy_to_server_fail(it: CfCluster, name: str) -> None:
    local = it.local(it.here, name)
    target = it.box.export / "notexisting" / name
    it.cf(it.here, "-cp", local, target).tells(f"ERROR: cannot copy {local} to .*").exits(1)
    missing = it.here.disk / "missing"
    it.cf(it.here, "-cp", missing, it.box.export).tells("ERROR: file not found .*").exits(1)


@row(31)
def copy_to_server_wait(it: CfCluster, name: str) -> None:
    first, second = it.local(it.here, f"{name}.a", 8 * MIB), it.local(it.here, f"{name}.b")
    earlier = len(it.box.file_server.writes())  # those of other scenarios
    with it.slow(it.here):
        begun = it.cf(it.here, "-cp", first, it.box.export)
        wait_until(
            lambda: len(it.box.file_server.writes()) > earlier, PATIENCE_S, "the first file's bytes"
        )
        waiting = it.cf(it.here, "-cp", second, it.box.export)
        waiting.process.wait_for_stderr("LOG: no copy slot available. waiting", PATIENCE_S)
    begun.tells(f"LOG: copied {first} to {it.box.export}/.*").exits(0)
    waiting.tells(f"LOG: copied {second} to {it.box.export}/.*").exits(0)


@row(32)
def copy_no_register(it: CfCluster, name: str) -> None:
    local, file = it.local(it.here, name), it.box.export / name
    it.cf(it.here, "-cp", "-n", local, file).tells(f"LOG: copied {local} to {file}").exits(0)
    it.cf(it.a, file).copied(file)


@row(33)
def copy_bundle_to_server(it: CfCluster, name: str) -> None:
    files = [it.local(it.here, f"{name}.{number}") for number in range(4)]
    bundle = it.here.disk / f"{name}.bundle"
    bundle.write_text("".join(f"{file}\n" for file in files))
    target = it.box.export / f"{name}.d"
    target.mkdir()
    told = it.cf(it.here, "-cp", bundle, target).exits(0)
    told.tells(*(f"LOG: copied {file} to {target}/{file.name}" for file in files))
    assert {path.name for path in target.iterdir()} == {file.name for file in files}


@row(34)
def copy_bundle_to_server_with_error(it: CfCluster, name: str) -> None:
    files = [it.local(it.here, f"{name}.{number}") for number in range(4)]
    missing = [it.here.disk / f"notexisting.{number}" for number in range(2)]
    bundle = it.here.disk / f"{name}.bundle"
    bundle.write_text("".join(f"{file}\n" for file in (missing[0], *files, missing[1])))
    target = it.box.export / f"{name}.d"
    target.mkdir()
    told = it.cf(it.here, "-cp", bundle, f"{target}/").exits(1)
    told.tells(
        f"ERROR: cannot copy {missing[0]} .*",
        *(f"LOG: copied {file} to {target}/{file.name}" for file in files),
        f"ERROR: cannot copy {missing[1]} .*",
    )


@row(35)
def copy_to_server_offline(it: CfCluster, name: str) -> None:
    """Here it is the daemon that is away; without the tracker it is waited for five seconds."""
    local, file = it.local(it.here, name), it.box.export / name
    told = it.cf(it.here, "-cp", local, file, online=False).exits(0)
    told.tells(re.escape(f"LOG: copied {local} to {file} (unsupervised)"))
    assert file.read_bytes() == local.read_bytes()


# --- the server ----------------------------------------------------------------------------------


@row(38)
def read_server_db(it: CfCluster, name: str) -> None:
    file = it.file(name)
    it.get(it.here, file)
    it.restart_tracker()
    it.cf(it.a, file).copied_from_peers(file)


@row()
def read_plain_server_db(it: CfCluster, name: str) -> None:
    """Differs: there is no database to be read in an old form. Nodes tell what they hold, also to a
    tracker that knows nothing."""
    file = it.file(name)
    it.get(it.here, file)
    it.restart_tracker(forget=True)
    it.cf(it.a, file).copied_from_peers(file)


# --- the table -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CfCluster]:
    require()
    with CfCluster(tmp_path_factory.mktemp("box")) as made:
        yield made


@pytest.mark.parametrize("run", [run for _, run in ROWS], ids=[name for name, _ in ROWS])
def test_scenario(it: CfCluster, run: Row) -> None:
    run(it, run.__name__)


def test_no_scenario_is_missing() -> None:
    entered = [number for name, _ in ROWS for number in name.split("-")[0].split("+")]

    assert sorted(entered) == sorted([*map(str, range(1, 39)), *["x"] * 5])
