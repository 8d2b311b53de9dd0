"""Preferring nodes with Grid Engine, which knows soft requests: ``-soft -q *@node1,*@node2``.

It takes whichever of them has room, in its own order, and another node where none has. The tasks of
an array have one list in common.
"""

from __future__ import annotations

import os

from swarmcache.job_script import NoPreference
from swarmcache.scheduler import Placement, Rankings, Scheduler, ask

NODES_MAX = 32  # of one list, which is one line of text


class GridEngine(Scheduler):
    """A job for the qsub of Grid Engine."""

    directive = b"#$"

    def check(self) -> None:
        if "SGE_ROOT" not in os.environ:  # others have a qsub, too, whose options mean other things
            raise NoPreference("SGE_ROOT is not set, so this may not be the qsub of Grid Engine")

    def array(self) -> str | None:
        return self.submission.option("-t")

    def directory(self) -> str:
        """The home directory, unless told otherwise."""
        if self.submission.has("-cwd"):
            return os.getcwd()
        return self.submission.option("-wd") or os.path.expanduser("~")

    def variables(self, task: int | None) -> dict[str, str]:
        id_text = "undefined" if task is None else str(task)
        return {"SGE_O_WORKDIR": os.getcwd(), "SGE_TASK_ID": id_text}

    def nodes(self) -> list[str]:
        return ask(["qconf", "-sel"]).stdout.decode(errors="replace").split()

    def place(self, rankings: Rankings, *, wait: bool) -> Placement:
        best = rankings.whole[0].node
        if wait:
            # As a resource, since a second -q would only add to the queues that the user asks for.
            return Placement(["-hard", "-l", f"hostname={best}"], f"waits for {best}")
        queues = ",".join(f"*@{each.node}" for each in rankings.whole[:NODES_MAX])
        return Placement(["-soft", "-q", queues, "-hard"], f"prefers {best}")

    def follow_up(self, placement: Placement, first_line: str, *, wait: bool) -> None:
        """Nothing: the preference is part of the job."""
