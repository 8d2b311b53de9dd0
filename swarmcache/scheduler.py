"""What ``submit`` needs of a scheduler, and how its programs are run."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

from swarmcache.errors import LocalError
from swarmcache.get import abandon_stdout
from swarmcache.job_script import NoPreference, Submission
from swarmcache.locate import NodeBytes

ANSWER_S_MAX = 20.0  # a scheduler that is this slow has other worries than where a job goes


class CannotSubmit(LocalError):
    """The program that submits jobs cannot be started."""


@dataclass(frozen=True)
class Rankings:
    """Nodes by the scheduler's names, those first that hold most: of all files of the job, and of
    those of each task of an array, if its tasks ask for different files."""

    whole: list[NodeBytes]
    of_tasks: dict[int, list[NodeBytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """``options``: what the command line needs. ``places``: each task's node, to be told later.

    ``what``: for people.
    """

    options: list[str]
    what: str
    places: dict[int, str] = field(default_factory=dict)


class Scheduler(ABC):
    """One job at its scheduler."""

    directive: bytes  # what lines of a job script with options begin with
    variables_read: ClassVar[Mapping[str, str]] = {}  # environment variables that are options

    def __init__(self, submission: Submission) -> None:
        self.submission = submission

    @abstractmethod
    def check(self) -> None:
        """Raises NoPreference for a job whose nodes are not for us to choose."""

    @abstractmethod
    def array(self) -> str | None:
        """Which tasks the job has, if it is an array."""

    @abstractmethod
    def directory(self) -> str:
        """Where the job will start."""

    @abstractmethod
    def variables(self, task: int | None) -> dict[str, str]:
        """What will be set for the job, as far as a script may choose files by it."""

    @abstractmethod
    def nodes(self) -> list[str]:
        """All nodes of the cluster; called before ``place``. Raises NoPreference."""

    @abstractmethod
    def place(self, rankings: Rankings, *, wait: bool) -> Placement:
        """Prefer the best nodes; with ``wait``, insist on the best. Raises NoPreference."""

    @abstractmethod
    def follow_up(self, placement: Placement, first_line: str, *, wait: bool) -> None:
        """What is left to do once the job is submitted, which said ``first_line``.

        Raises NoPreference.
        """

    def with_options(self, options: Sequence[str]) -> list[str]:
        """The command line with more options, before the user's own, which count more."""
        return [self.submission.words[0], *options, *self.submission.words[1:]]


def ask(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program that answers. Raises NoPreference where it does not; with ``check``, fails."""
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, env=env, timeout=ANSWER_S_MAX, check=False
        )
    except OSError as error:
        raise NoPreference(f"{words[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise NoPreference(f"{words[0]} did not answer in {ANSWER_S_MAX:.0f} s") from error
    if check and done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise NoPreference(f"{words[0]} failed: {(said or [f'exit {done.returncode}'])[-1]}")
    return done


def submit(
    words: Sequence[str], stdin: bytes | None, then: Callable[[str], None] | None = None
) -> int:
    """Run ``words`` as if the user had: same stdout, same exit code. Raises CannotSubmit.

    ``stdin``: what it reads, if not this process' own. ``then`` is called with its first line,
    which names the job, while it may still run (``sbatch --wait``).
    """
    with ExitStack() as stack:
        given = None
        if stdin is not None:
            # In memory: the disk for temporary files may be full.
            given = stack.enter_context(open(os.memfd_create("script"), "w+b"))
            given.write(stdin)
            given.seek(0)
        try:
            process = subprocess.Popen(words, stdin=given, stdout=subprocess.PIPE if then else None)
        except OSError as error:
            raise CannotSubmit(f"{words[0]} cannot be run: {error.strerror}") from error
    if then is not None:
        assert process.stdout is not None
        with process.stdout:
            first = process.stdout.readline()
            _pass_on(first)
            if first:
                then(first.decode(errors="replace").strip())
            for line in process.stdout:
                _pass_on(line)
    return process.wait()


def _pass_on(line: bytes) -> None:
    """The job is submitted whether somebody reads that or not."""
    try:
        if sys.stdout is not None:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    except OSError:
        abandon_stdout()
