"""What known callers of ``cf`` do, step by step, with a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmcache.cf_install import install
from tests.local_daemons import LocalDaemons

pytestmark = pytest.mark.slow


class Caller:
    """Has ``cf`` installed and a daemon; files lie in ``directory``."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.program = directory / "local/cache-manager/cf"
        self.environment = environment

    def file(self, name: str, text: str = "1") -> Path:
        path = self.directory / "nfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def check_output(self, *words: str | Path, directory: Path | None = None) -> bytes:
        """As Python programs call it: an exit code other than 0 ends the job."""
        return subprocess.run(
            ["cf", *words],
            executable=self.program,
            env=self.environment,
            cwd=directory,
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        ).stdout


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    install(tmp_path / "local")
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node = local.start_daemon()
        # As Sisyphus leaves it to its workers, and what tells the test's daemon from others.
        kept = {"HOME": str(tmp_path), "PWD": "/", "USER": "ann", "LANG": "en_US.UTF-8"}
        yield Caller(tmp_path, {**kept, "SWARMCACHE_SOCKET": str(node.socket)})


def test_rasr_writes_to_the_path_of_d_and_copies_it_back(caller: Caller) -> None:
    """Several times, as a job does that is run again, and relative to its directory."""
    directory = caller.file("out/other").parent
    for content in ("first", "second, longer"):
        printed = caller.check_output("-d", "lattice.cache.1", directory=directory)
        path = os.fsdecode(printed).removesuffix("\n")
        Path(path).write_text(content)

        caller.check_output("-cp", path, "lattice.cache.1", directory=directory)

        target = directory / "lattice.cache.1"
        copy = Path(os.fsdecode(caller.check_output(target)).strip())
        assert Path(path).name == copy.name == "lattice.cache.1"
        assert len({path, str(copy), str(target)}) == 3
        assert target.read_text() == copy.read_text() == Path(path).read_text() == content


def test_fairseq_pairs_the_lines_of_a_list_with_those_of_a_manifest(caller: Caller) -> None:
    """The list is named relatively, its last line has no end, one file occurs twice."""
    files = [caller.file(f"audio/{name}.wav", name) for name in ("a", "b")]
    lines = [files[1], files[0], files[1], caller.directory / "nfs/missing.wav"]
    bundle = caller.file("audio/train.tsv.bundle", "\n".join(map(str, lines)))

    printed = caller.check_output(bundle.name, directory=bundle.parent)

    cached = Path(os.fsdecode(printed).strip()).read_text().splitlines()
    assert [Path(path).name for path in cached] == ["b.wav", "a.wav", "b.wav", "missing.wav"]
    assert cached[0] == cached[2] != str(files[1])
    assert cached[3] == str(lines[3])


def test_the_common_path_of_copies_is_that_of_their_sources(caller: Caller) -> None:
    names = ["a/1", "a/2", "a/deep/3"]
    files = [caller.file(f"tree/{name}") for name in names]

    copies = [os.fsdecode(caller.check_output(file)).strip() for file in files]

    common = os.path.commonpath(copies)
    assert common.endswith(f"{caller.directory}/nfs/tree/a")
    assert [os.path.relpath(copy, common) for copy in copies] == ["1", "2", "deep/3"]


def test_a_shell_expands_it_in_an_argument_and_in_a_loop(caller: Caller) -> None:
    files = [caller.file(f"{number}.txt", f"content {number}\n") for number in range(3)]
    script = (
        "set -ueo pipefail\n"
        "cat `cf $1`\n"
        'x=$(cf "$2"); cat "$x"\n'
        'printf "%s\\n" "$@" | while read -r f; do cf "$f"; done\n'
    )
    environment = {"PATH": f"{caller.program.parent}:/usr/bin:/bin"}

    done = subprocess.run(
        ["/bin/bash", "-c", script, "bash", *files],
        env={**caller.environment, **environment},
        capture_output=True,
        text=True,
        check=True,
    )

    *contents, first, second, third = done.stdout.splitlines()
    assert contents == ["content 0", "content 1"]
    assert [Path(path).name for path in (first, second, third)] == ["0.txt", "1.txt", "2.txt"]


def test_what_a_caller_puts_beside_a_copy_does_no_harm(caller: Caller) -> None:
    """One unpacks its archive beside the copy."""
    archive = caller.file("data.zip")
    copy = Path(os.fsdecode(caller.check_output(archive)).strip())
    (copy.parent / "audio").mkdir()
    (copy.parent / "audio/1.ogg").write_text("unpacked")

    again = caller.check_output(archive)
    other = Path(os.fsdecode(caller.check_output(caller.file("audio/1.ogg", "another"))).strip())

    assert os.fsdecode(again).strip() == str(copy)
    assert other.read_text() == "another"
    assert (copy.parent / "audio/1.ogg").read_text() == "unpacked"


IMPORT = """
import importlib, json, sys
sys.path += [sys.argv[1] + "/", sys.argv[1] + "/cache-manager/"]
cm = importlib.import_module("cache-manager")
"""
PROGRAM = """
local, target, other, missing = sys.argv[2:]
client = cm.CmClient(cm.ClientConfiguration())
places = []
print(json.dumps([
    cm.copyFile(local, target),
    client.copy(local, other, register=False),
    cm.copyFile(missing, target),
    client.getLocations([target, other], places),
    [place[1:] for place in places],
    client.getLocations([missing], []),
    cm.cacheFile(target),
]))
"""


def test_a_python_program_copies_finds_and_caches(caller: Caller) -> None:
    """In a Python without any package, as a RETURNN configuration may run in."""
    local, target = caller.file("local"), caller.directory / "nfs/target"
    names = [local, target, caller.directory / "nfs/other", caller.directory / "missing"]

    done = subprocess.run(
        [sys.executable, "-IS", "-c", IMPORT + PROGRAM, caller.program.parent.parent, *names],
        env=caller.environment,
        stdout=subprocess.PIPE,
        check=True,
    )

    *results, copy = json.loads(done.stdout)
    assert copy != str(target)
    assert Path(copy).read_bytes() == target.read_bytes() == local.read_bytes()
    assert results == [True, True, False, True, [[copy, 1]], False]


def test_a_python_program_is_told_where_files_with_odd_names_are(caller: Caller) -> None:
    files = [caller.file(name) for name in ("a\r\nb", "c:d\ne", "f\vg", "h")]
    for file in files:
        caller.check_output(file)
    program = (
        "places = []\n"
        "told = cm.CmClient().getLocations(sys.argv[2:], places)\n"
        "print(json.dumps([told, places]))\n"
    )

    done = subprocess.run(
        [sys.executable, "-IS", "-c", IMPORT + program, caller.program.parent.parent, *files],
        env=caller.environment,
        stdout=subprocess.PIPE,
        check=True,
    )

    told, places = json.loads(done.stdout)
    assert told
    assert [os.path.basename(path) for _, path, _ in places] == [file.name for file in files]
    assert [Path(path).read_text() for _, path, _ in places] == ["1"] * len(files)
    assert len({host for host, _, _ in places}) == 1
