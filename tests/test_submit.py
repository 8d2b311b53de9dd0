"""What ``swarmcache submit`` makes of a command line, with programs in the place of a scheduler's.

They write down what they are called with. A real Slurm is in ``test_slurm.py``; no real Grid Engine
is at hand, so what is tested of it is the command line alone.
"""

from __future__ import annotations

import io
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from swarmcache import scheduler, slurm, slurm_prolog, submit
from swarmcache.client import Client
from swarmcache.errors import DaemonUnavailable, UsageError
from swarmcache.job_script import NoPreference, array_tasks, names_at_scheduler, read_submission
from swarmcache.locate import FileLocations, Replica
from swarmcache.scheduler import CannotSubmit
from swarmcache.slurm_prolog import COMMENT_BYTES_MAX, comment_for, files_in
from swarmcache.slurm_prolog import main as prolog

pytestmark = pytest.mark.slow

# Says what it was called with, then what it was told to say.
PROGRAM = """#!{python} -IS
import json, os, sys
name = os.path.basename(sys.argv[0])
with open({log!r}, "a") as log:
    stdin = "" if sys.stdin.isatty() or name in ("squeue", "sinfo") else sys.stdin.read()
    log.write(json.dumps([name, *sys.argv[1:], stdin]) + "\\n")
with open({answers!r}) as file:
    answers = json.load(file)
words = [name, *sys.argv[1:]]
for known, (stdout, stderr, status) in answers:
    if set(known) <= set(words):
        sys.stdout.write(stdout)
        sys.stderr.write(stderr)
        sys.exit(status)
sys.exit("not told what to say to " + repr(words))
"""
Answer = tuple[str, str, int]


class Programs:
    """sbatch, qsub and their like. The first answer whose words are all there is given."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self._log, self._answers = directory / "calls", directory / "answers"
        text = PROGRAM.format(python=sys.executable, log=str(self._log), answers=str(self._answers))
        for name in ("sbatch", "squeue", "sinfo", "scontrol", "qsub", "qconf"):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(stat.S_IRWXU)
        self.answer()

    def answer(self, *more: tuple[str, Answer]) -> None:
        """``more``: words that are called, and what is answered, before the usual."""
        start = f"Job 1 to start at {time.time():.0f} using 1 processors on nodes n1 in partition m"
        usual: list[tuple[str, Answer]] = [
            ("sbatch --test-only", ("", f"sbatch: {start}\n", 0)),
            ("sbatch", ("Submitted batch job 77\n", "", 0)),
            ("sinfo", ("n1 idle\nn2 mix\nn3 alloc\nn1 idle\nn4 drain\nn5 idle*\n", "", 0)),
            ("squeue", ("", "", 0)),
            ("scontrol", ("", "", 0)),
            ("qconf", ("n1.cluster\nn2.cluster\n", "", 0)),
            ("qsub", ('Your job 5 ("job.sh") has been submitted\n', "", 0)),
        ]
        answers = [(words.split(), answer) for words, answer in [*more, *usual]]
        self._answers.write_text(json.dumps(answers))

    def calls(self, name: str) -> list[list[str]]:
        """With what this program was called so far, but for tests; the last word was its stdin."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        calls = [json.loads(line) for line in lines]
        return [call[1:] for call in calls if call[0] == name and "--test-only" not in call]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path)
    monkeypatch.setenv("PATH", f"{programs.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("SGE_ROOT", str(tmp_path))
    monkeypatch.setattr(slurm, "START_S_MAX", 0.0)
    return programs


class Files:
    """Files, and which nodes hold them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._holders: dict[bytes, list[str]] = {}

    def add(self, name: str, size_bytes: int, *nodes: str) -> None:
        path = self._directory / name
        path.write_bytes(bytes(size_bytes))
        self._holders[bytes(path)] = list(nodes)

    def locate(self, client: Client, paths: list[bytes], **_: object) -> Iterator[FileLocations]:
        for path in paths:
            size_bytes = os.path.getsize(path)
            replicas = [Replica(node, path, size_bytes, True) for node in self._holders[path]]
            yield FileLocations(path, size_bytes, tuple(replicas), reason="so it is")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """``a`` is on n1, ``b``, which is larger, on n2 to n5, ``c`` nowhere."""
    monkeypatch.chdir(tmp_path)
    files = Files(tmp_path)
    files.add("a", 10, "n1.cluster")
    files.add("b", 20, "n2", "n3", "n4", "n5")
    files.add("c", 30)
    monkeypatch.setattr(submit, "locate", files.locate)
    return files


def script(text: str, name: str = "job.sh") -> str:
    Path(name).write_text(f"#!/bin/bash\n{text}\n")
    return name


def run(*words: str, wait: bool = False, prefetch: bool = False, dry_run: bool = False) -> int:
    client = Client(b"/missing")
    return submit.run_submit(
        list(words), client=client, wait=wait, prefetch=prefetch, dry_run=dry_run
    )


# --- Slurm ---------------------------------------------------------------------------------------


def test_a_job_is_told_to_be_on_the_best_node_with_room(
    programs: Programs, files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    job = script("#SBATCH --mem=4G\ncf a; swarmcache get b")

    assert run("sbatch", "-p", "gpu", job, "x") == 0

    assert programs.calls("sbatch") == [["--nodelist=n2", "-p", "gpu", job, "x", ""]]
    assert capfd.readouterr() == ("Submitted batch job 77\n", "swarmcache: prefers n2\n")


def test_a_job_that_does_not_start_there_may_go_elsewhere(programs: Programs, files: Files) -> None:
    programs.answer(("squeue", ("77\n", "", 0)))

    run("sbatch", script("cf b"))

    assert programs.calls("scontrol") == [["--oneliner", "update JobId=77 ReqNodeList=\n"]]


@pytest.mark.parametrize(
    ("queue", "said"),
    [
        (("77\n", "", 0), "77 may wait for the best node: Access denied"),
        (("", "slurm_load_jobs error: no contact\n", 1), "77 may wait for the best node"),
        (("", "slurm_load_jobs error: Invalid job id specified\n", 1), ""),
    ],
)
def test_who_submits_is_told_of_a_job_that_could_not_be_let_go(
    programs: Programs,
    files: Files,
    capfd: pytest.CaptureFixture[str],
    queue: Answer,
    said: str,
) -> None:
    programs.answer(("squeue", queue), ("scontrol", ("", "Access denied\n", 1)))

    assert run("sbatch", script("cf b")) == 0

    assert said in capfd.readouterr().err
    assert bool(programs.calls("scontrol")) == bool(said)


def test_a_job_of_which_slurm_tells_nothing_is_let_go(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it waited for its node for ever, since squeue was not there, or hung."""
    for name in ("bash", "cat"):
        (programs.bin / name).symlink_to(shutil.which(name) or "missing")
    (programs.bin / "squeue").unlink()
    monkeypatch.setenv("PATH", str(programs.bin))

    assert run("sbatch", script("cf b")) == 0

    assert programs.calls("scontrol") == [["--oneliner", "update JobId=77 ReqNodeList=\n"]]


def test_tasks_are_let_go_though_it_took_too_long_to_tell_them_their_nodes(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them may have been told."""
    program = programs.bin / "scontrol"
    program.rename(programs.bin / "scontrol.real")
    program.write_text(
        f'#!/bin/sh\nmkdir "{programs.bin}/called" 2> /dev/null && exec sleep 1000\n'
        f'exec "{programs.bin}/scontrol.real" "$@"\n'
    )
    program.chmod(stat.S_IRWXU)
    programs.answer(("squeue", ("77_0\n", "", 0)), ("scontrol.real", ("", "", 0)))
    monkeypatch.setattr(scheduler, "ANSWER_S_MAX", 2.0)

    assert run("sbatch", "-a0-1", script("F=(a b); cf ${F[$SLURM_ARRAY_TASK_ID]}")) == 0

    assert [call[-1] for call in programs.calls("scontrol.real")] == [
        "update JobId=77 StartTime=now\n",
        "update JobId=77_0 ReqNodeList=\n",
    ]


def test_with_wait_a_job_stays_with_the_best_node_though_it_is_busy(
    programs: Programs, files: Files
) -> None:
    """But not with one that is down or does not answer."""
    late = time.time() + 5000
    answer = ("", f"sbatch: Job 1 to start at {late:.0f} using 1 processors on nodes n2 in m\n", 0)
    programs.answer(("sbatch --test-only --nodelist=n2", answer))

    run("sbatch", script("cf b"), wait=True)
    run("sbatch", script("cf b"))

    assert programs.calls("sbatch") == [["--nodelist=n2", "job.sh", ""], ["job.sh", ""]]
    assert programs.calls("scontrol") == []


def test_a_node_where_the_job_cannot_run_is_passed_over(programs: Programs, files: Files) -> None:
    refused = ("", "allocation failure: Requested node configuration is not available\n", 1)
    programs.answer(("sbatch --test-only --nodelist=n2", refused))

    run("sbatch", script("cf a b"), wait=True)
    run("sbatch", script("cf a; cf b"), wait=True)

    assert [call[0] for call in programs.calls("sbatch")] == ["--nodelist=n1", "--nodelist=n3"]


def test_tasks_of_an_array_are_told_their_own_nodes_before_it_begins(
    programs: Programs, files: Files
) -> None:
    names = "FILES=(a b c b); cf ${FILES[$SLURM_ARRAY_TASK_ID]}"
    programs.answer(("squeue", ("77_1\n77_2\n77_9\n", "", 0)))

    run("sbatch", "-a0-3%2", "--parsable", script(names))

    assert programs.calls("sbatch") == [["--begin=now+60", "-a0-3%2", "--parsable", "job.sh", ""]]
    places = "".join(
        f"update JobId=77_{task} ReqNodeList={node}\n"
        for task, node in ((0, "n1"), (1, "n2"), (3, "n2"))
    )
    assert [call[-1] for call in programs.calls("scontrol")] == [
        places,
        "update JobId=77 StartTime=now\n",
        "update JobId=77_1 ReqNodeList=\n",
    ]


@pytest.mark.parametrize(
    ("words", "text", "reason"),
    [
        (["-w", "n1"], "cf b", "names its nodes itself"),
        (["-wn1"], "cf b", "names its nodes itself"),
        ([], "#SBATCH --nodelist=n1\ncf b", "names its nodes itself"),
        ([], "#SBATCH\t--nodelist=n1\ncf b", "names its nodes itself"),
        (["-M", "other"], "cf b", "another cluster"),
        ([], "#SBATCH hetjob\ncf b", "several in one"),
        (["--quiet"], "cf b", "does not tell the job's id"),
        (["--array=1-3"], "cf b", "all tasks of the array ask for the same files"),
        (["--array=1-x"], "cf b$SLURM_ARRAY_TASK_ID", "1-x"),
        (["--array=0-1", "--hold"], "F=(a b); cf ${F[SLURM_ARRAY_TASK_ID]}", "is held"),
        (["--array=0-1", "-b", "18:00"], "F=(a b); cf ${F[SLURM_ARRAY_TASK_ID]}", "begins later"),
        ([], "cf missing; cf -cp a b", "asks for no file that is there"),
        ([], "cf c", "no node holds files of the job; so it is"),
        ([], "", "asks for no file that is there"),
    ],
)
def test_a_job_that_cannot_be_placed_is_submitted_as_it_is(
    programs: Programs,
    files: Files,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    text: str,
    reason: str,
) -> None:
    programs.answer(("sbatch", ("77;cluster\n", "sbatch: error: no\n", 3)))
    words = ["sbatch", *words, script(text)]

    assert run(*words) == 3

    assert programs.calls("sbatch") == [[*words[1:], ""]]
    said = capfd.readouterr()
    assert said.out == "77;cluster\n"
    assert reason in said.err and said.err.endswith("no node is preferred\nsbatch: error: no\n")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SBATCH_ARRAY_INX", "1-3", "all tasks of the array ask for the same files"),
        ("SBATCH_CLUSTERS", "other", "another cluster"),
        ("SLURM_CLUSTERS", "other", "another cluster"),
    ],
)
def test_what_sbatch_finds_in_its_environment_counts_as_well(
    programs: Programs,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    reason: str,
) -> None:
    monkeypatch.setenv(variable, value)

    run("sbatch", script("cf b"))
    run("sbatch", "--wrap=cf b")

    assert programs.calls("sbatch") == [["job.sh", ""], ["--wrap=cf b", ""]]
    assert capfd.readouterr().err.count(reason) == 2


def test_the_command_line_counts_more_than_the_environment_and_that_more_than_the_script(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ARRAY_INX", "0-2")
    job = script("#SBATCH --array=0-3\nF=(a b a b); cf ${F[$SLURM_ARRAY_TASK_ID]}")

    run("sbatch", job)
    run("sbatch", "--array=0-1", job)

    places = [call[-1].count("ReqNodeList") for call in programs.calls("scontrol")]
    assert places == [3, 0, 2, 0]


def test_all_tasks_of_an_array_that_was_not_known_to_be_one_are_let_go(
    programs: Programs, files: Files
) -> None:
    programs.answer(("squeue", ("77_2\n77_3\n", "", 0)))

    run("sbatch", script("#PBS -t 1-3\ncf b"))

    let_go = "update JobId=77_2 ReqNodeList=\nupdate JobId=77_3 ReqNodeList=\n"
    assert programs.calls("scontrol") == [["--oneliner", let_go]]


@pytest.mark.parametrize(
    ("program", "answer"),
    [("sinfo", ("", "slurm_load_node: no contact\n", 1)), ("sinfo", ("", "", 0))],
)
def test_a_scheduler_that_tells_nothing_gets_the_job_all_the_same(
    programs: Programs, files: Files, program: str, answer: Answer
) -> None:
    programs.answer((program, answer))

    assert run("sbatch", script("cf b")) == 0

    assert programs.calls("sbatch") == [["job.sh", ""]]


def test_a_script_may_come_from_stdin_or_be_one_command(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"#!/bin/sh\n#SBATCH -J x\ncf a\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    run("sbatch", "-p", "gpu")
    run("sbatch", "--wrap=swarmcache get b")
    run("sbatch", "--wrap", "swarmcache get b")

    assert programs.calls("sbatch") == [
        ["--nodelist=n1", "-p", "gpu", text.decode()],
        ["--nodelist=n2", "--wrap=swarmcache get b", ""],
        ["--nodelist=n2", "--wrap", "swarmcache get b", ""],
    ]


@pytest.mark.parametrize(
    "words", [["sbatch", "typo.sh"], ["sbatch", "-p", "gpu", "typo.sh"], ["qsub", "-cwd", "plain"]]
)
def test_stdin_is_left_alone_where_a_word_may_name_the_script(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """It may be a pipe that never ends."""
    Path("plain").write_text("cf a\n")
    reading, writing = os.pipe()
    with open(reading) as pipe, open(writing, "w"):
        monkeypatch.setattr(sys, "stdin", pipe)

        assert run(*words, dry_run=True) == 0


def test_a_word_that_can_name_no_file_keeps_no_job_from_being_submitted(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the script from stdin each word is asked whether it is a file."""
    text = b"#!/bin/sh\ncf a\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    words = ["--export", "A=" + "long" * 100]

    assert run("sbatch", *words) == 0

    assert programs.calls("sbatch") == [["--nodelist=n1", *words, text.decode()]]


def test_a_job_in_another_language_is_submitted_as_it_is(
    programs: Programs, files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("job.py").write_text("#!/usr/bin/env python3\nimport os; os.remove('a')\n")

    assert run("sbatch", "job.py") == 0

    assert programs.calls("sbatch") == [["job.py", ""]]
    assert "one for python3" in capfd.readouterr().err
    assert Path("a").exists()


def test_a_dry_run_prints_the_command_and_submits_nothing(
    programs: Programs, files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("sbatch", "-J", "two words", script("cf b"), dry_run=True) == 0

    assert programs.calls("sbatch") == []
    assert capfd.readouterr().out == "sbatch --nodelist=n2 -J 'two words' job.sh\n"


def test_the_prolog_is_told_what_all_tasks_ask_for(
    programs: Programs, files: Files, tmp_path: Path
) -> None:
    text = "#SBATCH --array=0-1\nF=(a c); cf b; cf ${F[SLURM_ARRAY_TASK_ID]}"

    run("sbatch", script(text), prefetch=True)
    run("sbatch", "--comment=mine", script("cf b"), prefetch=True)

    first, second = programs.calls("sbatch")
    assert f"--comment=swarmcache:{tmp_path}/b" in first
    assert second == ["--nodelist=n2", "--comment=mine", "job.sh", ""]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_COMMENT": "swarmcache:/etc/passwd"},
        {"SLURM_JOB_COMMENT": "swarmcache:/etc/passwd", "SLURM_JOB_UID": "3999999999"},
        {"SLURM_JOB_COMMENT": "swarmcache:/etc/passwd", "SLURM_JOB_UID": "x"},
    ],
)
def test_a_prolog_that_can_fetch_nothing_succeeds(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("SLURM_JOB_COMMENT", "SLURM_JOB_UID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert prolog() == 0


def test_a_prolog_whose_complaint_nobody_can_be_told_succeeds() -> None:
    """Slurm takes a node out of use where its prolog fails."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", "import sys, swarmcache.slurm_prolog as p; sys.exit(p.main())"],
            stderr=full,
            cwd=Path(submit.__file__).parents[1],
            env={"SLURM_JOB_COMMENT": "swarmcache:/etc/passwd"},
            check=False,
        )

    assert done.returncode == 0


@pytest.mark.parametrize("call", ["pwd.getpwuid", "os.getgrouplist"])
def test_a_prolog_does_not_wait_for_a_directory_service_that_hangs(call: str) -> None:
    program = (
        "import os, pwd, sys, swarmcache.slurm_prolog as p; p.DIRECTORY_S_MAX = 0.1\n"
        f"{call} = lambda *_, pipe=os.pipe(): os.read(pipe[0], 1)\n"
        "sys.exit(p.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        cwd=Path(submit.__file__).parents[1],
        env={"SLURM_JOB_COMMENT": "swarmcache:/etc/passwd", "SLURM_JOB_UID": "0"},
        timeout=20,
        check=False,
    )

    assert done.returncode == 0
    assert b"who uid 0 is was not told within 0.1 s" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a prolog is run by root")
def test_a_prolog_does_not_wait_for_a_daemon_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's settings name its socket: they are looked for in the user's own home."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "daemon.sock"))
        daemon.listen()
        settings = tmp_path / ".config/swarmcache/config.toml"
        settings.parent.mkdir(parents=True)
        settings.write_text(f"[daemon]\nsocket = '{tmp_path}/daemon.sock'\n")
        user = pwd.struct_passwd(("root", "x", 0, 0, "", str(tmp_path), "/bin/sh"))
        monkeypatch.setattr("pwd.getpwuid", lambda uid: user)
        monkeypatch.setattr(slurm_prolog, "GRACE_S", -57.0)  # so that the client is killed
        monkeypatch.setenv("SLURM_JOB_UID", "0")
        monkeypatch.setenv("SLURM_JOB_COMMENT", "swarmcache:/etc/passwd")
        begun_s = time.monotonic()

        assert prolog() == 0

        assert time.monotonic() - begun_s < slurm_prolog.PREFETCH_S_MAX - 10
        daemon.settimeout(0)
        with suppress(BlockingIOError):  # a client that had not even begun, on a busy machine
            connection, _ = daemon.accept()
            with connection:
                connection.settimeout(20)
                while connection.recv(1 << 16):  # until it is gone
                    pass


# --- Grid Engine ---------------------------------------------------------------------------------


def test_grid_engine_is_asked_softly_for_all_holders_the_best_first(
    programs: Programs, files: Files, capfd: pytest.CaptureFixture[str]
) -> None:
    job = script("#$ -t 1-3\n#$-cwd\ncf a; cf b")

    assert run("qsub", "-tc", "2", job) == 0

    soft = ["-soft", "-q", "*@n2.cluster,*@n1.cluster", "-hard"]
    assert programs.calls("qsub") == [[*soft, "-tc", "2", job, ""]]
    assert capfd.readouterr().out == 'Your job 5 ("job.sh") has been submitted\n'


def test_grid_engine_waits_for_the_best_node_if_told_to(programs: Programs, files: Files) -> None:
    run("qsub", "-cwd", script("cf a; cf b"), wait=True)

    assert programs.calls("qsub") == [["-hard", "-l", "hostname=n2.cluster", "-cwd", "job.sh", ""]]


def test_tasks_of_grid_engine_ask_for_their_own_files(programs: Programs, files: Files) -> None:
    run("qsub", "-cwd", "-t", "1-2", script("F=(c a c); cf ${F[$SGE_TASK_ID]}"))

    assert "*@n1.cluster" in programs.calls("qsub")[0]


def test_a_job_of_grid_engine_starts_at_home_without_cwd(
    programs: Programs, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "bin"))

    run("qsub", script("cf b"))
    run("qsub", "-wd", str(tmp_path), script("cf b"))

    assert [call[0] for call in programs.calls("qsub")] == ["job.sh", "-soft"]


def test_another_qsub_than_that_of_grid_engine_gets_no_options_of_ours(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGE_ROOT")

    run("qsub", "-cwd", script("cf b"))

    assert programs.calls("qsub") == [["-cwd", "job.sh", ""]]


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [DaemonUnavailable("no daemon answers"), OSError(28, "full")])
def test_whatever_fails_the_job_is_submitted_as_it_is(
    programs: Programs, files: Files, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(client: Client, paths: list[bytes], **_: object) -> Iterator[FileLocations]:
        raise fault

    monkeypatch.setattr(submit, "locate", fail)

    assert run("sbatch", script("cf b")) == 0

    assert programs.calls("sbatch") == [["job.sh", ""]]


def test_other_commands_than_those_of_schedulers_are_refused(programs: Programs) -> None:
    with pytest.raises(UsageError, match="expected sbatch or qsub, not 'srun'"):
        run("srun", "job.sh")
    with pytest.raises(UsageError, match="--prefetch is for sbatch"):
        run("qsub", "job.sh", prefetch=True)


def test_a_scheduler_that_is_not_installed_is_named(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    with pytest.raises(CannotSubmit, match="/missing/sbatch cannot be run: No such file"):
        run("/missing/sbatch", script("cf b"))


def run_in(directory: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """A program that imports the swarmcache that is tested."""
    return subprocess.run(
        command,
        cwd=directory,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(submit.__file__).parents[1])},
        check=False,
    )


def test_the_command_line_passes_options_and_exit_codes_on(
    programs: Programs, tmp_path: Path
) -> None:
    programs.answer(("sbatch", ("5\n", "", 9)))
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\ncf {tmp_path}/answers\n")
    command = [sys.executable, "-m", "swarmcache", "submit", "--socket=/missing"]

    for separator in ([], ["--"]):
        words = ["sbatch", "--help", "-p", "x", "job.sh"]
        done = run_in(tmp_path, [*command, *separator, *words])

        assert (done.returncode, done.stdout) == (9, "5\n")
        assert "no node is preferred" in done.stderr
    assert programs.calls("sbatch") == [["--help", "-p", "x", "job.sh", ""]] * 2


def test_where_no_temporary_file_can_be_written_the_job_is_submitted_as_it_is(
    tmp_path: Path,
) -> None:
    """As on full disks: Python finds no directory for such files."""
    (tmp_path / "job.sh").write_text("#!/bin/sh\ncf /etc/passwd\n")
    (tmp_path / "sbatch").symlink_to("/bin/echo")
    command = [sys.executable, "-m", "swarmcache", "submit", "--", "./sbatch", "job.sh"]

    done = run_in(tmp_path, ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *command])

    assert (done.returncode, done.stdout) == (0, "job.sh\n"), done.stderr
    assert "No usable temporary directory" in done.stderr


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("3", [3]), ("1-4", [1, 2, 3, 4]), ("0-9:4%2", [0, 4, 8]), ("7,1-2,2", [7, 1, 2])],
)
def test_the_tasks_of_an_array(text: str, tasks: list[int]) -> None:
    assert array_tasks(text) == tasks


@pytest.mark.parametrize("text", ["", "a", "1-", "1-2:0", "-1", "0-99999999", "1-500,600-1200"])
def test_an_array_that_makes_no_sense_or_is_too_large_is_refused(text: str) -> None:
    with pytest.raises(NoPreference):
        array_tasks(text)


@pytest.mark.timeout(10)
def test_many_tasks_may_ask_for_many_files() -> None:
    paths = [b"/nfs/%d" % number for number in range(4000)]
    wanted: submit.FilesOfTasks = {task: [b"own %d" % task, *paths] for task in range(300)}

    assert submit.common_files(wanted) == paths


def test_nodes_have_the_schedulers_names_where_no_two_could_be_meant() -> None:
    known = ["n1", "n2.a", "n3.a", "n3.b", "n4"]

    names = names_at_scheduler(["n1.x", "n2", "n3", "n3.b", "n4.a", "n4.b", "n5"], known)

    assert names == {"n1.x": "n1", "n2": "n2.a", "n3.b": "n3.b"}


def test_a_comment_names_any_files_and_no_more_than_fit() -> None:
    paths = [b"/a b", b"/c,d%", b"/\xff\n", b"/plain-+=:@~._x"]

    assert files_in(comment_for(paths)) == paths
    assert comment_for([b"/nfs/train.hdf"]) == "swarmcache:/nfs/train.hdf"
    many = comment_for(b"/file%d" % number for number in range(10_000))
    assert 1000 < len(many) <= COMMENT_BYTES_MAX
    assert files_in(many)[-1].startswith(b"/file")


@pytest.mark.parametrize(
    "comment", ["", "mine", "swarmcache:", "swarmcache:relative,--help", "swarmcache:/a%00b"]
)
def test_a_comment_that_names_no_files_is_left_alone(comment: str) -> None:
    assert files_in(comment) == []


def test_the_script_is_the_first_word_that_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_text("no script")
    text = "#SBATCH -J 'a b' # why\n\n  # more\n#SBATCH\t--mem=1\n#SBATCH-n2\necho\n#SBATCH --mem=2"
    script(text, "job")

    found = read_submission(
        ["sbatch", "-o", "log", ".", "job", "job"],
        directive=b"#SBATCH",
        variables={},
        slurm=True,
    )

    assert (found.script.name, found.script.arguments) == ("job", ["job"])
    assert found.options == ["-J", "a b", "--mem=1", "-n2", "-o", "log", "."]
