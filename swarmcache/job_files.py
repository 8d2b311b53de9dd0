"""Which files a job script asks for, found out without doing the job's work.

bash itself runs the script, since only bash knows what ``"${files[$i]}"`` stands for. But it is a
*restricted* bash (``set -r``) whose PATH has nothing but a few programs that read: see
``job_files.bash``. So, whatever the script says,

* assignments, loops, conditions, functions, arrays, ``$(...)``, ``eval`` and ``source`` work;
* ``swarmcache get`` and ``cf`` note what they are asked for, and print the original path;
* ``TOOLS`` run, as far as they only read; of bash's own commands those that change nothing outside;
* every other command does nothing and succeeds, except one with a slash in its name, which fails;
* nothing is written: a redirection of output leads nowhere;
* it ends after ``LOOK_S_MAX``, with all that it has started; what was noted until then counts.

That protects a user from the script's work, not a machine from its user: it is run by that user, on
the host where the script is submitted.

A restricted bash refuses a command whose output is redirected. To find the files of such commands
as well, redirections are rewritten first (``rewrite``), by patterns that know less of bash than
bash. What they miss is refused, so nothing depends on them but how much is found.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.resources import files as resources
from pathlib import Path

from swarmcache.job_script import JobScript, NoPreference

# Programs that have no way to write: no option, no command.
TOOLS = (
    "basename",
    "cat",
    "cut",
    "dirname",
    "expr",
    "grep",
    "head",
    "id",
    "ls",
    "nl",
    "paste",
    "readlink",
    "realpath",
    "seq",
    "stat",
    "tac",
    "tail",
    "tr",
    "wc",
    "whoami",
)
# Programs that have: job_files.bash passes on what does not. mawk has no sandbox.
TAMED_TOOLS = {"swarmcache-sed": "sed", "swarmcache-awk": "gawk", "swarmcache-sort": "sort"}
SHELLS = {b"sh", b"bash", b"dash", b"ksh"}
LOOK_S_MAX = 10.0
LINGER_S = 1.0
FILES_MAX = 10_000
TOLD_BYTES_MAX = 8 << 20
REWRITTEN_BYTES_MAX = (
    128 << 10
)  # of a script; patterns that find no end look for it again and again
DIRECTORIES_MAX = 8  # changes of directory that are followed

# Variables that would change how bash reads a script, or run something of their own.
_NOT_PASSED_ON = re.compile(
    "BASH_.*|ENV|SHELLOPTS|BASHOPTS|POSIXLY_CORRECT|CDPATH|GLOBIGNORE|PS4|LD_PRELOAD|LD_AUDIT"
)


class Look:
    """A job script, to be looked through once or, for the tasks of an array, several times.

        with Look(script, directory) as look:
            paths = look.files({"SLURM_ARRAY_TASK_ID": "1"})

    ``directory``: where the job will start. Raises NoPreference for what is no script of a shell.
    """

    def __init__(self, script: JobScript, directory: Path) -> None:
        check_shell(script)
        bash = shutil.which("bash")
        if bash is None:
            raise NoPreference("there is no bash here to look into the job script")
        self._script = script
        self._directory = directory
        self._bash = bash
        self._tools = tempfile.TemporaryDirectory(prefix="swarmcache-")
        _lay_out(Path(self._tools.name), _rewritten(script.text, bash))

    def __enter__(self) -> Look:
        return self

    def __exit__(self, *_: object) -> None:
        self._tools.cleanup()

    def files(self, variables: Mapping[str, str], timeout_s: float = LOOK_S_MAX) -> list[bytes]:
        """Absolute paths of what the script asks for and is there, each once, in order.

        ``variables``: what the scheduler sets for the job; the others are this process' own.
        """
        deadline_s = time.monotonic() + timeout_s
        found: dict[bytes, None] = {}
        where, cds_done = self._directory, 0
        for _ in range(DIRECTORIES_MAX + 1):
            moved = False
            environment = self._environment(variables, cds_done)
            for kind, value, *more in _records(self._run(where, environment, deadline_s)):
                if kind == b"cd":
                    where, cds_done, moved = Path(os.fsdecode(value)), int(more[0]), True
                else:
                    found[value] = None
            if not moved:
                break
        return list(filter(os.path.exists, list(found)[:FILES_MAX]))

    def _environment(self, variables: Mapping[str, str], cds_done: int) -> dict[str, str]:
        own = {
            name: value for name, value in os.environ.items() if not _NOT_PASSED_ON.fullmatch(name)
        }
        return {
            **own,
            **variables,
            "SWARMCACHE_DRY_RUN": "1",
            "SWARMCACHE_TOOLS": self._tools.name,
            "SWARMCACHE_CDS_DONE": str(cds_done),
            "SWARMCACHE_CWD": str(self._directory),
        }

    def _run(self, where: Path, environment: dict[str, str], deadline_s: float) -> bytes:
        """What the script tells when it is run in this directory."""
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=0) as pipe:
            try:
                process = subprocess.Popen(
                    [
                        self._bash,
                        "--noprofile",
                        "--norc",
                        "-c",
                        _prelude(),
                        self._script.name,
                        *self._script.arguments,
                    ],
                    cwd=where,
                    env={**environment, "SWARMCACHE_TELL": str(writing)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[writing],
                    start_new_session=True,
                )
            except OSError:  # the directory is not there, or closed
                return b""
            finally:
                os.close(writing)
            try:
                return _read_until_end(pipe.fileno(), process.pid, deadline_s)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def check_shell(script: JobScript) -> None:
    """Raises NoPreference for what another interpreter than a shell like bash runs."""
    first = script.text.split(b"\n", 1)[0]
    if not first.startswith(b"#!"):
        raise NoPreference("the job script does not begin with #!")
    words = first[2:].split()
    names = [os.path.basename(word) for word in words if not word.startswith(b"-")]
    name = names[1] if names[:1] == [b"env"] and len(names) > 1 else b"".join(names[:1])
    if name not in SHELLS:
        raise NoPreference(f"the job script is one for {os.fsdecode(name) or 'nothing'}")
    if b"\0" in script.text:
        raise NoPreference("the job script has bytes that no shell reads")


# --- bash ----------------------------------------------------------------------------------------


def _lay_out(tools: Path, text: bytes) -> None:
    (tools / "job").write_bytes(text)
    for name, program in [*((name, name) for name in TOOLS), *TAMED_TOOLS.items()]:
        place = shutil.which(program)
        if place is not None:
            (tools / name).symlink_to(os.path.realpath(place))


def _records(told: bytes) -> Iterator[list[bytes]]:
    """What a script told: ["file", path] and, as the last, ["cd", path, count]."""
    fields = told.split(b"\0")
    while len(fields) > (count := 3 if fields[0] == b"cd" else 2):  # else it was cut short
        yield fields[:count]
        del fields[:count]


def _prelude() -> str:
    return (resources("swarmcache") / "job_files.bash").read_text()


def _read_until_end(fd: int, pid: int, deadline_s: float) -> bytes:
    """All that is written until nobody can write any more, or until the deadline.

    What a script has left in the background has ``LINGER_S`` after its end.
    """
    told = b""
    ended = os.pidfd_open(pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            selector.register(ended, selectors.EVENT_READ)
            while len(told) < TOLD_BYTES_MAX:
                ready = [key.fd for key, _ in selector.select(deadline_s - time.monotonic())]
                if fd in ready:
                    piece = os.read(fd, 1 << 16)
                    if not piece:
                        break
                    told += piece
                elif ended in ready:
                    selector.unregister(ended)
                    deadline_s = min(deadline_s, time.monotonic() + LINGER_S)
                else:
                    break
    finally:
        os.close(ended)
    return told


# --- rewriting -----------------------------------------------------------------------------------

# Atomic and possessive: what has been taken for one thing is not tried as another as well.
_SINGLE_QUOTED = rb"\$?'[^']*+'"
_SUBSTITUTED = rb"\$\((?>[^()]|\((?>[^()]|\([^()]*+\))*+\))*+\)"
_DOUBLE_QUOTED = rb'"(?>\\.|' + _SUBSTITUTED + rb'|[^"\\])*+"'
_WORD = (
    rb"(?>"
    + b"|".join([rb"\\.", _SINGLE_QUOTED, _SUBSTITUTED, _DOUBLE_QUOTED, rb"\$\{[^{}]*+\}"])
    + rb"|[^\s;|&()<>\"'`\\])++"
)
_PIECE = re.compile(
    b"|".join(
        [
            rb"(?P<escaped>\\.)",
            rb"(?P<comment>(?<![^\s;])#[^\n]*+)",
            rb"(?P<single>" + _SINGLE_QUOTED + rb")",
            rb"(?P<double>" + _DOUBLE_QUOTED + rb")",
            rb"(?P<test>\[\[ .{0,200}? \]\]|\(\(.{0,200}?\)\))",
            rb"(?P<both>&>>?[ \t]*+" + _WORD + rb")",
            rb"(?P<fd>\{\w+\}|(?<![\w$])\d+)?(?P<out>(?<![<>-])>(?:>|\|)?[ \t]*+" + _WORD + rb")",
        ]
    ),
    re.DOTALL,
)
_INNER = re.compile(_SUBSTITUTED, re.DOTALL)
_COMMAND_STARTS = rb"(^|[;&|(`{]|\b(?:then|do|else|elif|if|while|until|time|exec)\b|!)([ \t]*)"
_WITH_SLASH = re.compile(
    _COMMAND_STARTS
    + rb"\"?(?:\$\{?\w+\}?|~|[\w.+-]*)(?:/(?:[\w.+-]+|\$\{?\w+\}?))*/("
    + b"|".join(name.encode() for name in ("swarmcache", "cf", "sed", "awk", "sort", *TOOLS))
    + rb")\"?(?=[ \t;|&)`]|$)",
    re.MULTILINE,
)
# Both would end the script where a command does nothing, or a variable is set by the job only.
_SET_OPTION = re.compile(_COMMAND_STARTS + rb"set(?=[ \t]+[-+][A-Za-z])", re.MULTILINE)
_FIXED_VARIABLE = re.compile(rb"(?<![\w${])(PATH|SHELL|ENV|BASH_ENV|HISTFILE)(?=\+?=)")
_NETWORK = re.compile(rb"/dev/(?:tcp|udp)/")


def rewrite(text: bytes) -> bytes:
    """The script with its output going nowhere, and without what a restricted bash would end at."""
    text = _NETWORK.sub(b"/dev/null/", text)
    text = _FIXED_VARIABLE.sub(rb"_\1", text)
    text = _SET_OPTION.sub(rb"\1\2:", text)
    text = _WITH_SLASH.sub(rb"\1\2\3", text)
    return _PIECE.sub(_without_output, text)


def _without_output(piece: re.Match[bytes]) -> bytes:
    if piece["double"]:
        return _INNER.sub(
            lambda inner: b"$(" + _PIECE.sub(_without_output, inner[0][2:-1]) + b")", piece[0]
        )
    if piece["both"]:
        return b">&199 2>&199"
    if piece["out"]:
        return (piece["fd"] or b"") + b">&199"
    return piece[0]


def _rewritten(text: bytes, bash: str) -> bytes:
    """The script rewritten; as it is, where the patterns have made nonsense of it."""
    if len(text) > REWRITTEN_BYTES_MAX:
        return text
    changed = rewrite(text)
    checked = subprocess.run(
        [bash, "-n"],
        input=changed,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return changed if checked.returncode == 0 else text
