"""Jobs go where their files are, with a real Slurm and real daemons on the hosts of a box."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.box import Box, Host, require, wait_until
from tests.slurm import PATIENCE_S, UID, USER, Slurm, missing_programs
from tests.swarm_helpers import MIB, Swarm

pytestmark = [pytest.mark.box, pytest.mark.slow]

KIB = 1024
SUBMIT_S = 60.0


class Site:
    """Three nodes with swarmcache and Slurm. Slurm takes node1 first, node3 last."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.first, self.second, self.third = box.nodes
        self.swarm = Swarm(box)
        self.swarm.start()
        prolog = str(Path(sys.executable).parent / "swarmcache-slurm-prolog")
        self.slurm = Slurm(box, {"node1": 1, "node2": 2, "node3": 3}, prolog)

    def put(self, name: str, size_bytes: int, *holders: Host) -> Path:
        """A file of the export that these nodes hold."""
        path = self.swarm.put(name, size_bytes)
        self.swarm.assert_all_cached(self.swarm.get_everywhere(path, holders), path)
        return path

    def script(self, name: str, text: str) -> Path:
        """A job script of the export, which waits for its end when it has done its work."""
        path = self.box.export / name
        path.write_text(f"#!/bin/bash\n#SBATCH --output=/dev/null\n{text}\nsleep 1000\n")
        return path

    def submit(
        self, *words: str | Path, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`swarmcache submit` on the first node, as an ordinary user."""
        command = ["swarmcache", "submit", *options, "--", "sbatch", "--parsable", *words]
        return self.first.run(command, env=self.slurm.env, uid=UID, timeout_s=SUBMIT_S)

    def occupy(self, *nodes: Host) -> list[str]:
        """Jobs of somebody else, running on these nodes."""
        jobs = {
            self.slurm.sbatch(self.first, f"--nodelist={node.name}", "--wrap=sleep 1000"): node
            for node in nodes
        }
        self.slurm.wait_for({job: ("RUNNING", node.name) for job, node in jobs.items()})
        return list(jobs)


@pytest.fixture(scope="module")
def the_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require()
    if missing := ", ".join(missing_programs()):
        assert os.environ.get("CI") != "true", f"not installed: {missing}"
        pytest.skip(f"not installed: {missing}")
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("slurm")
        yield Site(stack.enter_context(Box(hosts=3, rate_mbit=None, directory=directory)))


@pytest.fixture
def site(the_site: Site) -> Iterator[Site]:
    yield the_site
    the_site.slurm.wait_until_idle()


def test_a_job_goes_to_the_node_that_holds_its_file_though_another_comes_first(site: Site) -> None:
    file = site.put("held by the third", MIB, site.third)
    job = site.script("one_file.sh", f'DATA=$(swarmcache get "{file}" 2> /dev/null)')

    # Not the job itself, which would fetch the file, so that node1 held it as well.
    unplaced = site.slurm.sbatch(site.first, "--wrap=sleep 1000")
    site.slurm.wait_for({unplaced: ("RUNNING", "node1")})
    site.slurm.wait_until_idle()
    placed = site.submit(job)

    site.slurm.wait_for({placed.stdout.strip(): ("RUNNING", "node3")})
    assert placed.stderr == "swarmcache: prefers node3\n"


def test_a_busy_node_is_not_waited_for_unless_that_is_wanted(site: Site) -> None:
    large = site.put("large", 2 * MIB, site.third)
    small = site.put("small", 10 * KIB, site.second)
    job = site.script("two_files.sh", f"for file in {large} {small}; do swarmcache get $file; done")
    (occupant,) = site.occupy(site.third)

    # In this order: a job that runs fetches what its node has not, which makes that the best.
    waiting = site.submit(job, options=("--wait-for-best",)).stdout.strip()
    second_best = site.submit(job).stdout.strip()

    site.slurm.wait_for(
        {
            second_best: ("RUNNING", "node2"),
            waiting: ("PENDING", ""),
            occupant: ("RUNNING", "node3"),
        }
    )
    neither = site.submit(job)
    site.slurm.wait_for({neither.stdout.strip(): ("RUNNING", "node1")})
    assert "no node that holds its files could start it now" in neither.stderr
    site.slurm.call("scancel", occupant)
    site.slurm.wait_for({waiting: ("RUNNING", "node3")})


def test_each_task_of_an_array_goes_where_its_own_file_is_and_none_waits_for_that(
    site: Site,
) -> None:
    """Of two tasks whose files are on one node, the other one goes elsewhere."""
    site.put("part1", MIB, site.second)
    site.put("part2", MIB, site.third)
    site.put("part3", MIB, site.third)
    job = site.script("array.sh", f"swarmcache get {site.box.export}/part$SLURM_ARRAY_TASK_ID")

    submitted = site.submit("--array=1-3", job)

    array = submitted.stdout.strip()
    assert "3 of 3 tasks prefer a node that holds their files" in submitted.stderr
    site.slurm.wait_for({f"{array}_1": ("RUNNING", "node2")})
    others = {site.slurm.jobs()[f"{array}_{task}"] for task in (2, 3)}
    assert ("RUNNING", "node3") in others
    wait_until(
        lambda: (
            {site.slurm.jobs()[f"{array}_{task}"] for task in (2, 3)}
            == {("RUNNING", "node1"), ("RUNNING", "node3")}
        ),
        PATIENCE_S,
        "the task that was let go to run on node1",
    )


def test_no_task_of_an_array_waits_though_it_was_not_known_to_be_one(site: Site) -> None:
    """Slurm also reads other schedulers' options in a script."""
    file = site.put("unknown_array", MIB, site.third)

    submitted = site.submit(site.script("pbs.sh", f"#PBS -t 1-3\ncf {file}"))

    array = submitted.stdout.strip()
    tasks = [f"{array}_{task}" for task in (1, 2, 3)]
    site.slurm.wait_for({tasks[0]: ("RUNNING", "node3")})
    wait_until(
        lambda: {site.slurm.jobs()[task][0] for task in tasks} == {"RUNNING"},
        PATIENCE_S,
        "tasks that were let go to run elsewhere",
    )
    assert submitted.stderr == "swarmcache: prefers node3\n"


def test_the_prolog_fetches_the_files_of_a_job_before_it_starts_as_its_user(site: Site) -> None:
    """What Slurm's own comment names; what cannot be had holds no job up."""
    file = site.swarm.put("held by nobody, yet", MIB)
    closed = site.swarm.put("closed to others", MIB)
    closed.chmod(0o600)
    cache = site.third.disk / "cache" / USER
    seen = site.third.disk / "seen"
    check = site.script(
        "check.sh", f'ls "{cache}{site.box.export}" > {seen}.new; mv {seen}.new {seen}'
    )
    wrapped = f'--wrap=swarmcache get {str(file)!r} "{closed}" {site.box.export}/missing'

    submitted = site.submit("--nodelist=node3", wrapped, options=("--prefetch", "--dry-run"))
    comment = next(word for word in shlex.split(submitted.stdout) if "comment" in word)
    job = site.slurm.sbatch(site.first, "--nodelist=node3", comment, check)

    wait_until(seen.exists, PATIENCE_S, "the job to begin")
    assert site.slurm.jobs()[job] == ("RUNNING", "node3")
    assert file.name in seen.read_text().splitlines()
    assert closed.name not in seen.read_text()
