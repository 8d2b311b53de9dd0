"""What ``install-cf`` puts where callers of CacheManager look, and what it leaves alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swarmcache
from swarmcache import cf_package
from swarmcache.cf_install import install
from swarmcache.errors import LocalError, UsageError
from tests.local_daemons import COMMAND
from tests.scripted_daemon import ScriptedDaemon, caching_in

# As in RETURNN configurations; the Python that runs them has no swarmcache.
CALLER = """
import importlib, sys
sys.path.append(sys.argv[1] + "/")
sys.path.append(sys.argv[1] + "/cache-manager/")
cm = importlib.import_module("cache-manager")
"""


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "usr local"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedDaemon]:
    (tmp_path / "run").mkdir(mode=0o700)
    with ScriptedDaemon(tmp_path / "run", caching_in(tmp_path / "cache")) as daemon:
        monkeypatch.setenv("SWARMCACHE_SOCKET", str(daemon.path))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield daemon


def call(prefix: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a caller's program in a Python without any package."""
    done = subprocess.run(
        [sys.executable, "-IS", "-c", CALLER + script, prefix, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_command_tells_what_it_has_installed(prefix: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "install-cf", "--prefix", prefix], capture_output=True, text=True, check=True
    )

    installed = {
        prefix / "cache-manager/cf",
        prefix / "cache-manager/__init__.py",
        prefix / "cache-manager/client.py",
        prefix / "cache-manager/cqsub",
        prefix / "cache-manager/cftools.sh",
        prefix / "bin/cf",
    }
    assert set(map(Path, done.stdout.splitlines())) == installed
    assert {path for path in prefix.rglob("*") if not path.is_dir()} == installed
    assert os.path.samefile(prefix / "bin/cf", prefix / "cache-manager/cf")
    assert os.access(prefix / "bin/cf", os.X_OK)


def test_all_users_can_start_it_whatever_the_umask_of_root(prefix: Path) -> None:
    prefix.parent.chmod(0o700)
    former = os.umask(0o077)
    try:
        install(prefix / "below")
    finally:
        os.umask(former)

    others = {path: path.stat().st_mode & 0o005 for path in [prefix, *prefix.rglob("*")]}
    assert {path.name for path, mode in others.items() if mode != 0o005} == {
        "__init__.py",
        "client.py",
        "cftools.sh",
    }
    assert all(mode & 0o004 for mode in others.values())
    assert prefix.parent.stat().st_mode & 0o777 == 0o700


def test_it_can_be_installed_again_while_it_runs(prefix: Path) -> None:
    install(prefix)
    program = prefix / "cache-manager/cf"
    with open(program) as running:
        before = running.read()

        install(prefix)

        running.seek(0)
        assert running.read() == before == program.read_text()
        assert os.fstat(running.fileno()).st_ino != program.stat().st_ino


@pytest.mark.parametrize("name", ["cache-manager/cf", "cache-manager/__init__.py", "bin/cf"])
def test_what_is_not_ours_is_not_replaced(prefix: Path, name: str) -> None:
    file = prefix / name
    file.parent.mkdir(parents=True)
    file.write_text("#!/bin/bash\n")

    with pytest.raises(UsageError, match="is not from swarmcache: move"):
        install(prefix)

    assert [path for path in prefix.rglob("*") if not path.is_dir()] == [file]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LocalError, match=f"cannot install cf below {tmp_path}/file"):
        install(tmp_path / "file")


# --- the Python package --------------------------------------------------------------------------


def test_the_package_needs_nothing_that_python_3_8_does_not_have() -> None:
    tree = ast.parse(Path(cf_package.__file__).read_text(), feature_version=(3, 8))

    imported = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"os", "re", "subprocess", "sys"}


def test_cache_file_gives_the_path_of_the_copy(
    daemon: ScriptedDaemon, prefix: Path, tmp_path: Path
) -> None:
    install(prefix)
    source = tmp_path / "a file.hdf"
    source.write_text("1")

    done = call(
        prefix,
        "print(cm.cacheFile(sys.argv[2]), cm.cacheFile(sys.argv[2].encode(), verbose=False))",
        source,
    )

    copy = f"{tmp_path}/cache/user{source}"
    assert done.stdout == f"{copy} {copy.encode()!r}\n"
    assert done.stderr.count("LOG: request:") == 1


@pytest.mark.parametrize("cf", ["there", "away"])
def test_cache_file_gives_the_original_path_whatever_happens(
    prefix: Path, tmp_path: Path, cf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMCACHE_SOCKET", "/nowhere/daemon.sock")
    monkeypatch.setenv("HOME", str(tmp_path))
    install(prefix)
    if cf == "away":
        (prefix / "cache-manager/cf").unlink()
    (tmp_path / "file").touch()

    done = call(
        prefix,
        "for name in sys.argv[2:] + ['a\\0b']: print(repr(cm.cacheFile(name)))",
        tmp_path / "file",
        tmp_path / "missing",
    )

    assert done.stdout == f"'{tmp_path}/file'\n'{tmp_path}/missing'\n'a\\x00b'\n"


def test_without_the_package_cf_prints_the_original_path(prefix: Path, tmp_path: Path) -> None:
    """As in the moment in which another version of it is installed, while jobs run."""
    install(prefix)
    program = prefix / "cache-manager/cf"
    packages = str(Path(swarmcache.__file__).resolve().parent.parent)
    text = program.read_text().replace(packages + "'", "/nowhere'")
    program.write_text(text.replace(" -I ", " -IS "))  # this Python has it installed as well
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").touch()

    def cf(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.stderr == "ERROR: No module named 'swarmcache'\n"
        return done.returncode, done.stdout

    assert cf("link") == (0, f"{tmp_path}/file\n")
    assert cf("missing") == cf("-cp", "file", "other") == cf() == (1, "")


def test_a_client_tells_whether_the_path_is_a_cached_one(
    daemon: ScriptedDaemon, prefix: Path, tmp_path: Path
) -> None:
    install(prefix)
    (tmp_path / ".cmclient").write_text(f"CACHE_DIR = {tmp_path}/outputs")
    source = tmp_path / "file"
    source.touch()

    done = call(
        prefix,
        "import client\n"
        "config = client.ClientConfiguration(); config.loadDefault()\n"
        "cm = client.CmClient(config, single=False)\n"
        "print(cm.isConnected(), *cm.fetch(sys.argv[2]))\n"
        "import os; os.environ['SWARMCACHE_SOCKET'] = '/nowhere/daemon.sock'\n"
        "print(cm.isConnected(), *cm.fetch(sys.argv[2]))\n"
        "print(cm.getDestination('fs', sys.argv[2]))\n",
        source,
    )

    copy = f"{tmp_path}/cache/user{source}"
    assert done.stdout == f"True {copy} True\nFalse {source} False\n{tmp_path}/outputs{source}\n"


@pytest.mark.parametrize(("level", "lines"), [("QUIET", 0), ("NORMAL", 2), ("DEBUG", 3)])
def test_the_log_level_says_how_much_is_told(
    daemon: ScriptedDaemon, prefix: Path, tmp_path: Path, level: str, lines: int
) -> None:
    install(prefix)
    (tmp_path / "file").touch()

    done = call(
        prefix,
        f"cm.LogLevel.set(cm.LogLevel.{level}); cm.cacheFile(sys.argv[2])",
        tmp_path / "file",
    )

    assert len(done.stderr.splitlines()) == lines


# --- cqsub ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--try-hard"]])
def test_cqsub_submits_a_job_whose_script_sources_cftools(
    prefix: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """The script as its users wrote them: its work is done by the job, and by nobody before."""
    install(prefix)
    tools, data, done = prefix / "cache-manager", tmp_path / "data", tmp_path / "done"
    data.write_text("1")
    job = tmp_path / "job.sh"
    job.write_text(
        f"#!/bin/bash\n#$ -cwd\nsource '{tools}/cftools.sh'\nexport SGE_TASK_ID=`printf %04d 1`\n"
        f"cf_exec cp $(cf '{data}') '{done}'\n"
    )
    qsub = tmp_path / "bin/qsub"
    qsub.parent.mkdir()
    qsub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    qsub.chmod(0o755)
    environment = {"PATH": f"{qsub.parent}:/usr/bin:/bin", "SGE_ROOT": "/", "HOME": str(tmp_path)}

    submitted = subprocess.run(
        [tools / "cqsub", *arguments, "-N", "my job", job, "a"],
        env={**environment, "SWARMCACHE_SOCKET": str(tmp_path / "missing")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (submitted.returncode, submitted.stdout) == (7, f"-N\nmy job\n{job}\na\n")
    assert "no daemon answers" in submitted.stderr
    assert not done.exists()
    subprocess.run(["bash", job], env=environment, check=True, stdin=subprocess.DEVNULL)
    assert done.read_text() == "1"
