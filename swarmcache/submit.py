"""``swarmcache submit``: a job goes to a node that holds its files, if there is room just now.

``job_files.py`` finds out what the job script asks for, ``locate.py`` who holds that; ``slurm.py``
and ``grid_engine.py`` know how to prefer a node. Wherever one of them does not know, the job is
submitted as it is, with a notice. stdout and exit code are the scheduler's own in every case.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from swarmcache.client import Client
from swarmcache.errors import SwarmcacheError, UsageError
from swarmcache.get import say
from swarmcache.grid_engine import GridEngine
from swarmcache.job_files import LOOK_S_MAX, Look
from swarmcache.job_script import NoPreference, array_tasks, names_at_scheduler, read_submission
from swarmcache.listing import printing
from swarmcache.locate import NodeBytes, files_of, locate, rank_hosts
from swarmcache.scheduler import Placement, Rankings, Scheduler, submit
from swarmcache.slurm import Slurm
from swarmcache.slurm_prolog import comment_for

SCHEDULERS: dict[str, type[Scheduler]] = {"sbatch": Slurm, "qsub": GridEngine}
TASK_VARIABLES = (b"SLURM_ARRAY_TASK_ID", b"SGE_TASK_ID")
TASKS_LOOK_S_MAX = 30.0  # for all tasks of an array together

FilesOfTasks = dict[int | None, list[bytes]]  # by task; None: of a job that is no array


def run_submit(
    words: list[str], *, client: Client, wait: bool, prefetch: bool, dry_run: bool
) -> int:
    """Submit a job and return the exit code of ``words``. Raises UsageError, CannotSubmit, and
    LocalError where what ``dry_run`` prints cannot be written.

    ``wait``: insist on the best node. ``prefetch``: have its files fetched before it starts.
    ``dry_run``: only print the command that would be run.
    """
    program = os.path.basename(words[0])
    if program not in SCHEDULERS:
        raise UsageError(f"expected sbatch or qsub, not {words[0]!r}")
    if prefetch and program != "sbatch":
        raise UsageError("--prefetch is for sbatch")
    kind = SCHEDULERS[program]
    try:
        submission = read_submission(
            words,
            directive=kind.directive,
            variables=kind.variables_read,
            slurm=kind is Slurm,
        )
    except NoPreference as error:
        say(f"{error}: no node is preferred")
        return _show(words) if dry_run else submit(words, None)
    scheduler, placement = kind(submission), Placement([], "")
    try:
        wanted = _files_of_tasks(scheduler)
        common = common_files(wanted)
        if prefetch and common and not submission.has("--comment"):
            placement = Placement([f"--comment={comment_for(common)}"], "")
        scheduler.check()
        chosen = scheduler.place(_rank(scheduler, client, wanted), wait=wait)
        placement = replace(chosen, options=placement.options + chosen.options)
        say(placement.what)
    except (SwarmcacheError, OSError) as error:  # no room in /tmp is no reason to submit nothing
        say(f"{error}: no node is preferred")
    words = scheduler.with_options(placement.options)
    if dry_run:
        return _show(words, placement.places)

    def then(first_line: str) -> None:
        try:
            scheduler.follow_up(placement, first_line, wait=wait)
        except NoPreference as error:
            say(str(error))

    return submit(words, submission.stdin, then if placement.what else None)


def _show(words: list[str], places: Mapping[int, str] | None = None) -> int:
    with printing():
        print(shlex.join(words))
    for task, node in (places or {}).items():
        say(f"task {task}: {node}")
    return 0


# --- what the job asks for -----------------------------------------------------------------------


def _files_of_tasks(scheduler: Scheduler) -> FilesOfTasks:
    """What the job asks for; of an array, what each task does. Raises NoPreference."""
    script = scheduler.submission.script
    array = scheduler.array()
    tasks: list[int | None] = [None] if array is None else list(array_tasks(array))
    if not any(variable in script.text for variable in TASK_VARIABLES):
        tasks = tasks[:1]
    deadline_s = time.monotonic() + (LOOK_S_MAX if len(tasks) == 1 else TASKS_LOOK_S_MAX)
    found: FilesOfTasks = {}
    with Look(script, Path(scheduler.directory())) as look:
        for task in tasks:
            left_s = min(LOOK_S_MAX, deadline_s - time.monotonic())
            if left_s <= 0:
                say(f"only {len(found)} of {len(tasks)} tasks were looked through in time")
                break
            found[task] = look.files(scheduler.variables(task), left_s)
    if not any(found.values()):
        raise NoPreference("the job script asks for no file that is there")
    return found


def common_files(wanted: FilesOfTasks) -> list[bytes]:
    """What all tasks ask for."""
    first, *others = wanted.values()
    common = set(first).intersection(*others)
    return [path for path in first if path in common]


# --- who holds it --------------------------------------------------------------------------------


def _say_why(path: bytes, reason: str) -> None:
    say(f"{os.fsdecode(path)!r}: {reason}")


def _rank(scheduler: Scheduler, client: Client, wanted: FilesOfTasks) -> Rankings:
    """Nodes by how much they hold of it. Raises NoPreference, and what ``locate`` raises."""
    paths = {path: None for files in wanted.values() for path in files}  # each once
    members = {path: list(files_of(path, None, _say_why)) for path in paths}
    files = list(dict.fromkeys(file for some in members.values() for file in some))
    found = dict(zip(files, locate(client, files, on_notice=say, bundle=False), strict=True))
    nodes = scheduler.nodes()

    def rank(paths: Iterable[bytes]) -> list[NodeBytes]:
        held = rank_hosts(found[file] for path in paths for file in members[path])
        names = names_at_scheduler((each.node for each in held), nodes)
        return [replace(each, node=names[each.node]) for each in held if each.node in names]

    whole = rank(members)
    if not whole:
        reasons = {file.reason: None for file in found.values() if file.reason}
        raise NoPreference("; ".join(["no node holds files of the job", *reasons]))
    if len({tuple(sorted(paths)) for paths in wanted.values()}) == 1:
        return Rankings(whole)
    return Rankings(
        whole, {task: rank(paths) for task, paths in wanted.items() if task is not None}
    )
