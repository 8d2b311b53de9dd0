"""A real Slurm on the hosts of a box: munged everywhere, slurmctld on `head`, slurmd on the nodes.

    slurm = Slurm(box, {"node1": 1, "node2": 2, "node3": 3})      # all nodes are idle
    job = slurm.sbatch(box.nodes[0], "--wrap", "sleep 1000")
    slurm.wait_for({job: ("RUNNING", "node1")})

Nothing of it lies outside the box: the hosts' `/run` is theirs alone. A job has a node to itself.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.box import Box, Host, Process, wait_until

# Debian packages: munge, slurmctld, slurmd, slurm-client.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo")
# Daemons are where an ordinary user's PATH may not lead. Jobs have PATH from who submits them.
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PATIENCE_S = 30.0
# Somebody whom the hosts know: slurmd looks up whom it starts a job for.
USER, UID = "daemon", 1
Where = tuple[str, str]


def missing_programs() -> list[str]:
    """What is not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


class Slurm:
    """The controller and its nodes, all of which are idle when this is made.

    `weights`: of the nodes by name; Slurm takes the idle one with the least weight first.
    """

    def __init__(self, box: Box, weights: Mapping[str, int], prolog: str) -> None:
        self._box = box
        config, self._key = box.directory / "slurm.conf", box.directory / "munge.key"
        self.env = {"SLURM_CONF": str(config), "PATH": PATH}
        config.write_text(self._settings(weights, prolog))
        self._key.write_bytes(os.urandom(1024))
        self._key.chmod(0o400)
        for munge in [self._start_munge(host) for host in (box.head, *box.nodes)]:
            munge.wait_for_stderr("Created socket", PATIENCE_S)
        box.head.start(["slurmctld", "-D"], env=self.env)
        for node in box.nodes:
            node.start(["slurmd", "-D", "-N", node.name], env=self.env)
        self.wait_until_idle()

    def _settings(self, weights: Mapping[str, int], prolog: str) -> str:
        lines = [
            "ClusterName=box",
            f"SlurmctldHost=head({self._box.head.address})",
            "SlurmUser=root",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            "StateSaveLocation=/run/slurmctld",
            "SlurmctldPidFile=/run/slurmctld.pid",
            "SlurmdSpoolDir=/run/slurmd",
            "SlurmdPidFile=/run/slurmd.pid",
            # A namespace has no cgroups of its own.
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "PropagateResourceLimits=NONE",
            f"Prolog={prolog}",
            # Whole nodes, one slot each, whatever this machine has. Looked at every second.
            "SelectType=select/linear",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "ReturnToService=2",
        ]
        for node in self._box.nodes:
            weight = weights[node.name]
            lines.append(f"NodeName={node.name} NodeAddr={node.address} CPUs=1 Weight={weight}")
        lines.append("PartitionName=main Nodes=ALL Default=YES State=UP DefaultTime=60")
        return "\n".join(lines) + "\n"

    def _start_munge(self, host: Host) -> Process:
        """--force: the way to the key is one for all users, which munged does not like."""
        host.run(["mkdir", "/run/munge", "/run/slurmctld", "/run/slurmd"])
        files = [f"--key-file={self._key}", "--pid-file=/run/munged.pid"]
        files += ["--seed-file=/run/munged.seed", "--log-file=/run/munged.log"]
        return host.start(["munged", "--foreground", "--force", *files], env={"PATH": PATH})

    # Jobs

    def sbatch(
        self, host: Host, *arguments: str | Path, options: str = "--output=/dev/null"
    ) -> str:
        """Submit a job from `host`, as USER. Returns its id."""
        words = ["sbatch", "--parsable", options, *arguments]
        return host.run(words, env=self.env, uid=UID).stdout.strip()

    def call(self, *words: str, check: bool = True) -> str:
        """Run one of Slurm's programs on the controller's host, as root. Returns its stdout."""
        return self._box.head.run(list(words), env=self.env, check=check).stdout

    def jobs(self) -> dict[str, Where]:
        """State and nodes of all jobs that wait or run, tasks of arrays one by one."""
        lines = self.call("squeue", "--noheader", "--array", "--format=%i|%T|%N").splitlines()
        found = {job: (state, node) for job, state, node in (line.split("|") for line in lines)}
        return found

    def wait_for(self, expected: Mapping[str, Where]) -> None:
        """Until these jobs are in these states, on these nodes."""
        try:
            wait_until(lambda: self.jobs().items() >= expected.items(), PATIENCE_S, "jobs")
        except TimeoutError as error:
            raise TimeoutError(f"{expected} expected, but there are {self.jobs()}") from error

    def wait_until_idle(self) -> None:
        """End all jobs, and wait until no node is busy with them."""

        def idle() -> bool:
            self.call("scancel", "--full", "--state=RUNNING", check=False)
            self.call("scancel", "--state=PENDING", check=False)
            states = self.call("sinfo", "--noheader", "--Node", "--format=%t", check=False).split()
            return states == ["idle"] * len(self._box.nodes) and not self.jobs()

        wait_until(idle, PATIENCE_S, "idle nodes")
