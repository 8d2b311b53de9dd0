"""The command line that submits a job, and the script in it.

Both schedulers have too many options to know which of them take a value. So the script is found by
what it is: the first word that names a file which begins with ``#!``.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from swarmcache.errors import LocalError

SCRIPT_BYTES_MAX = 4 << 20  # as Slurm's own limit, max_script_size
TASKS_MAX = 1000  # of an array; each is looked through and placed by itself


class NoPreference(LocalError):
    """Nothing can be preferred for this job; the message says why."""


@dataclass(frozen=True)
class JobScript:
    """``name``: what it will find in ``$0``, about; ``arguments``: in ``$@``."""

    text: bytes
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Submission:
    """``words``: the command line. ``stdin``: the script, where it came from there.

    ``options``: those in the script, then those of environment variables, then those of the command
    line; later ones count more. ``joined``: a value may follow a short option without a space
    (``-a1-4``).
    """

    words: list[str]
    script: JobScript
    options: list[str]
    joined: bool
    stdin: bytes | None = None

    def option(self, *names: str) -> str | None:
        """The value of an option, by its short (``-a``) and long (``--array``) names."""
        found = None
        for index, word in enumerate(self.options):
            for name in names:
                if word == name:
                    found = self.options[index + 1] if index + 1 < len(self.options) else ""
                elif name.startswith("--") and word.startswith(name + "="):
                    found = word[len(name) + 1 :]
                elif self.joined and len(name) == 2 and word.startswith(name):
                    found = word[2:]
        return found

    def has(self, *names: str) -> bool:
        """Whether one of these options is there, with or without a value."""
        return self.option(*names) is not None


def read_submission(
    words: list[str], *, directive: bytes, variables: Mapping[str, str], slurm: bool
) -> Submission:
    """Find the script of ``words``: a file, with Slurm also the value of ``--wrap``, or stdin.

    ``directive``: what lines of the script with options begin with. ``variables``: environment
    variables that are options, and which. Raises NoPreference.
    """
    set_outside = [
        f"{option}={os.environ[name]}" for name, option in variables.items() if os.environ.get(name)
    ]
    for index, word in enumerate(words[1:], 1):
        text = _script_text(word)
        if text is not None:
            script = JobScript(text, word, words[index + 1 :])
            options = _directives(text, directive) + set_outside + words[1:index]
            return Submission(words, script, options, slurm)
    wrapped = Submission(words, JobScript(b"", "sh"), set_outside + words[1:], slurm)
    if slurm and (command := wrapped.option("--wrap")) is not None:
        return replace(wrapped, script=JobScript(b"#!/bin/sh\n" + os.fsencode(command), "sh"))
    if sys.stdin is None or sys.stdin.isatty() or not _is_script_on_stdin(words[1:]):
        raise NoPreference("the command line names no file that begins with #!")
    text = sys.stdin.buffer.read()
    options = _directives(text, directive) + set_outside + words[1:]
    return Submission(words, JobScript(text, "sh"), options, slurm, text)


def _is_script_on_stdin(words: Sequence[str]) -> bool:
    """Whether no word can be meant as the script: each is an option or may be the value of one.

    Else the scheduler will not read stdin, which may never end.
    """
    before = ""
    for word in words:
        # os.path, since a value may be too long for a name, which is an error to pathlib.
        may_be_value = before.startswith("-") and "=" not in before and not os.path.isfile(word)
        if not word.startswith("-") and not may_be_value:
            return False
        before = word
    return True


def _script_text(word: str) -> bytes | None:
    """The file of this name, if it is a script."""
    try:
        if not Path(word).is_file():
            return None
        with open(word, "rb") as file:
            text = file.read(SCRIPT_BYTES_MAX)
    except (OSError, ValueError):
        return None
    return text if text.startswith(b"#!") else None


def _directives(text: bytes, prefix: bytes) -> list[str]:
    """The options in a script's comments, which end with its first command.

    No space is needed behind the prefix, neither for sbatch nor for qsub (``#$-cwd``).
    """
    options: list[str] = []
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith(b"#"):
            break
        if line.startswith(prefix):
            try:
                options += shlex.split(os.fsdecode(line[len(prefix) :]), comments=True)
            except ValueError:  # quotes that do not end: the scheduler will say so
                continue
    return options


def array_tasks(text: str) -> list[int]:
    """The task ids that an array stands for: ``1-7:2,9%3``. Raises NoPreference."""
    tasks: dict[int, None] = {}
    for part in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part.strip())
        if match is None or match[3] == "0":
            raise NoPreference(f"no array of tasks is understood by {text!r}")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        tasks.update(dict.fromkeys(islice(range(first, last + 1, step), TASKS_MAX + 1)))
        if len(tasks) > TASKS_MAX:
            raise NoPreference(f"an array of more than {TASKS_MAX} tasks is not looked through")
    return list(tasks)


def names_at_scheduler(nodes: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The scheduler's names of these nodes, without those that it has not.

    A daemon may call itself ``n1.example.org`` where the scheduler has ``n1``, or the other way
    round: first labels decide, where no two nodes share one.
    """
    nodes, exact = list(nodes), set(known)
    by_label: defaultdict[str, list[str]] = defaultdict(list)
    for name in exact:
        by_label[_first_label(name)].append(name)
    shared = Counter(map(_first_label, nodes))
    found: dict[str, str] = {}
    for node in nodes:
        label = _first_label(node)
        if node in exact:
            found[node] = node
        elif shared[label] == 1 and len(by_label[label]) == 1:
            found[node] = by_label[label][0]
    return found


def _first_label(name: str) -> str:
    return name.partition(".")[0]
