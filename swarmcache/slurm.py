"""Preferring nodes with Slurm.

Slurm knows nodes that a job *must* have (``--nodelist``), and features that it would like; of nodes
that it would like it knows nothing. So a job is told to be on the best node that has room and where
it would start as soon as anywhere (``sbatch --test-only`` says so). If it has not started
``START_S_MAX`` later, that is taken back (``scontrol update ReqNodeList=``), and it goes wherever
there is room.

An array stays one job with one id. Where its tasks ask for different files, each task gets a node
of its own: the array is submitted to begin later, its tasks are told their nodes, then it begins.
If this process dies in between, it begins by itself.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import ClassVar

from swarmcache.job_script import NoPreference, Submission
from swarmcache.locate import NodeBytes
from swarmcache.scheduler import Placement, Rankings, Scheduler, ask

NODES_ASKED_MAX = 16  # how many nodes are tried, from the best on
# How much later than elsewhere a job may start on the node that holds its files. Slurm's times are
# estimates, which count what jobs before it might take, idle nodes or not.
LATER_S_MAX = 30.0
# States of nodes, as sinfo shortens them; a mark behind one ("*": does not answer) is no good sign.
WITH_ROOM = {"idle", "mix"}
BUSY = {"alloc", "comp", "plnd", "resv"}
# A controller may let three seconds pass before it looks at a new job (batch_sched_delay).
START_S_MAX = 6.0
START_POLL_S = 0.5
BEGIN = "--begin=now+60"  # of an array whose tasks are about to be told their nodes
STARTS = re.compile(rb"to start at (\d+) using")
JOB_ID = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*)?(?: on cluster \S+)?")
# Where somebody's own choice of nodes, another cluster, or a second job in one is in the way.
TAKEN: dict[tuple[str, ...], str] = {
    ("--nodelist", "-w"): "the job names its nodes itself",
    ("--nodefile", "-F"): "the job names its nodes itself",
    ("--clusters", "-M"): "the job goes to another cluster",
    (":",): "the job is one of several in one",
    ("hetjob",): "the job is one of several in one",
    ("--test-only",): "the job is only a test",
    ("--quiet", "-Q"): "sbatch --quiet does not tell the job's id",
}
NOT_NOW: dict[tuple[str, ...], str] = {
    ("--begin", "-b"): "the array begins later",
    ("--hold", "-H"): "the array is held",
}


class Slurm(Scheduler):
    """A job for sbatch."""

    directive = b"#SBATCH"
    variables_read: ClassVar[Mapping[str, str]] = {
        "SBATCH_ARRAY_INX": "--array",
        "SBATCH_CLUSTERS": "--clusters",
        "SLURM_CLUSTERS": "--clusters",
        "SBATCH_JOB_NAME": "--job-name",
    }

    def __init__(self, submission: Submission) -> None:
        super().__init__(submission)
        self._starts_s: dict[str | None, float | None] = {}
        self._states: dict[str, str] = {}

    def check(self) -> None:
        _refuse(self.submission, TAKEN)

    def array(self) -> str | None:
        return self.submission.option("--array", "-a")

    def directory(self) -> str:
        return self.submission.option("--chdir", "-D") or os.getcwd()

    def variables(self, task: int | None) -> dict[str, str]:
        name = self.submission.option("--job-name", "-J") or self.submission.script.name
        found = {"SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_NAME": name}
        return found if task is None else {**found, "SLURM_ARRAY_TASK_ID": str(task)}

    def nodes(self) -> list[str]:
        answer = ask(["sinfo", "--noheader", "--Node", "--format=%N %t"])
        lines = [line.split() for line in _text(answer.stdout).splitlines()]
        self._states = {line[0]: line[1] for line in lines if len(line) == 2}
        return list(self._states)

    def place(self, rankings: Rankings, *, wait: bool) -> Placement:
        if rankings.of_tasks:
            return self._place_tasks(rankings.of_tasks, wait)
        if self.array() is not None and not wait:
            raise NoPreference(
                "all tasks of the array ask for the same files, which one node cannot serve alone"
            )
        node = self._choose(rankings.whole, Counter(), wait)
        if node is None:
            raise NoPreference("no node that holds its files could start it now")
        what = f"waits for {node}" if wait else f"prefers {node}"
        return Placement([f"--nodelist={node}"], what)

    def _place_tasks(self, of_tasks: Mapping[int, list[NodeBytes]], wait: bool) -> Placement:
        _refuse(self.submission, NOT_NOW)
        places: dict[int, str] = {}
        for task, ranked in of_tasks.items():
            node = self._choose(ranked, Counter(places.values()), wait)
            if node is not None:
                places[task] = node
        if not places:
            raise NoPreference("no node that holds files of a task could start it now")
        do = "wait for" if wait else "prefer"
        what = f"{len(places)} of {len(of_tasks)} tasks {do} a node that holds their files"
        return Placement([BEGIN], what, places)

    def _choose(self, ranked: list[NodeBytes], taken: Counter[str], wait: bool) -> str | None:
        """The best node where the job starts as soon as anywhere; with ``wait``, at any time.

        Of those that hold the same, one that fewer other tasks have ``taken``. Raises NoPreference.
        """
        ordered = sorted(ranked, key=lambda each: (-each.size_bytes, taken[each.node], each.node))
        states = WITH_ROOM | BUSY if wait else WITH_ROOM
        nodes = [each.node for each in ordered if self._states[each.node] in states]
        for node in nodes[:NODES_ASKED_MAX]:
            start_s = self._start_s(node)
            if start_s is None:
                continue
            anywhere_s = start_s if wait else self._start_s(None)
            if anywhere_s is not None and start_s <= anywhere_s + LATER_S_MAX:
                return node
        return None

    def _start_s(self, node: str | None) -> float | None:
        """When the job could start on this node, or anywhere, in seconds since 1970.

        None: never. Slurm is asked once.
        """
        if node not in self._starts_s:
            options = ["--test-only"] if node is None else ["--test-only", f"--nodelist={node}"]
            answer = ask(
                self.with_options(options),
                env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
                stdin=self.submission.stdin or b"",
                check=False,
            )
            match = STARTS.search(answer.stderr)
            self._starts_s[node] = float(match[1]) if match and answer.returncode == 0 else None
        return self._starts_s[node]

    def follow_up(self, placement: Placement, first_line: str, *, wait: bool) -> None:
        match = JOB_ID.fullmatch(first_line)
        if match is None:
            raise NoPreference(f"sbatch did not tell the job's id, but {first_line!r}")
        job = match[1]
        ids = {f"{job}_{task}" for task in placement.places} or {job}
        if placement.places:
            _begin_on(job, placement.places)
        if not wait:
            _let_go(job, ids)


def _refuse(submission: Submission, reasons: Mapping[tuple[str, ...], str]) -> None:
    for names, reason in reasons.items():
        if submission.has(*names):
            raise NoPreference(reason)


def _begin_on(job: str, places: Mapping[int, str]) -> None:
    """Tell the tasks of a waiting array their nodes, and let it begin."""
    try:
        _update({f"{job}_{task}": f"ReqNodeList={node}" for task, node in places.items()})
    finally:
        _update({job: "StartTime=now"})


def _let_go(job: str, ids: Collection[str]) -> None:
    """Wait for these to start; what does not may go elsewhere. Raises NoPreference."""
    deadline_s = time.monotonic() + START_S_MAX
    try:
        while _pending(job, ids) and time.monotonic() < deadline_s:
            time.sleep(START_POLL_S)  # Slurm tells nobody when a job starts
    finally:  # a user who does not want to wait wants the job to wait even less
        fault = _update(dict.fromkeys(_pending(job, ids), "ReqNodeList="))
    if fault and (waiting := _pending(job, ids)):
        raise NoPreference(f"{', '.join(waiting)} may wait for the best node: {fault}")


def _pending(job: str, ids: Collection[str]) -> list[str]:
    """Which of these have not started; all of them, if Slurm cannot say so.

    Of an array its tasks, since Slurm lets no array go as a whole. One that has ended may be
    unknown by now.
    """
    words = ["squeue", "--noheader", "--array", f"--jobs={job}", "--states=PENDING"]
    try:
        answer = ask([*words, "--format=%i"], check=False)
    except NoPreference:
        return sorted(ids)
    if answer.returncode != 0 and b"Invalid job id" not in answer.stderr:
        return sorted(ids)
    waiting = set(_text(answer.stdout).split())
    return sorted(each for each in waiting if each in ids or each.partition("_")[0] in ids)


def _update(changes: Mapping[str, str]) -> str:
    """Change jobs, by id; one that has started meanwhile stays as it is.

    Returns the last thing that Slurm had against it, or why it did not answer; some of the changes
    may have been made then.
    """
    lines = [f"update JobId={job} {change}\n" for job, change in changes.items()]
    if not lines:
        return ""
    try:
        answer = ask(["scontrol", "--oneliner"], stdin="".join(lines).encode(), check=False)
    except NoPreference as error:
        return str(error)
    return "".join(_text(answer.stderr).strip().splitlines()[-1:])


def _text(output: bytes) -> str:
    return output.decode(errors="replace")
