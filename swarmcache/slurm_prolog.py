"""A Slurm prolog that fetches a job's files to its node before the job starts.

slurmd runs it as root, with ``Prolog=`` in slurm.conf naming the program
``swarmcache-slurm-prolog``. What to fetch says the job's comment:

    sbatch --comment=swarmcache:/nfs/corpus/train.hdf,/nfs/corpus/dev.hdf job.sh

with ``%2C``, ``%25`` and ``%20`` for a comma, a per cent sign and a space in a name;
``submit --prefetch`` writes it.

Whatever happens, the job starts, at most ``PREFETCH_S_MAX`` later or a few seconds more: a download
that takes longer goes on beside it. The files are asked for by a process of the job's user, with
none of root's rights. All that root reads of the user's is the comment.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from urllib.parse import quote_from_bytes, unquote_to_bytes

from swarmcache.get import say

PREFIX = "swarmcache:"
COMMENT_BYTES_MAX = 4096
PREFETCH_S_MAX = 60.0
GRACE_S = 5.0  # for a client that does not end in time, before it is killed
KILL_S = 2.0
SCONTROL_S_MAX = 10.0
DIRECTORY_S_MAX = 10.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # slurmd sets none
COMMENT = re.compile(r"(?:^| )Comment=(\S+)")


def comment_for(paths: Iterable[bytes]) -> str:
    """The comment that has these files fetched; the first of them, where it would be too long."""
    comment, separator = PREFIX, ""
    for path in paths:
        longer = comment + separator + quote_from_bytes(path, safe="/+=:@~")
        if len(longer) > COMMENT_BYTES_MAX:
            break
        comment, separator = longer, ","
    return comment


def files_in(comment: str) -> list[bytes]:
    """The absolute paths in a comment; none in one that is not ours."""
    if not comment.startswith(PREFIX):
        return []
    paths = map(unquote_to_bytes, comment.removeprefix(PREFIX).split(","))
    return [path for path in paths if path.startswith(b"/") and b"\0" not in path]


def main() -> int:
    """Fetch what the job's comment names. Always 0: slurmd drains a node whose prolog fails."""
    try:
        files = files_in(os.environ.get("SLURM_JOB_COMMENT") or _comment_by_scontrol())
        if files:
            _get_as(*_user(int(os.environ["SLURM_JOB_UID"])), files)
    except (OSError, KeyError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"slurm prolog: {error!r}")
    return 0


def _comment_by_scontrol() -> str:
    """For versions of Slurm that do not tell the prolog the comment, as 22.05."""
    scontrol = shutil.which("scontrol", path=PATH)
    if scontrol is None:
        return ""
    words = [scontrol, "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    done = subprocess.run(
        words, capture_output=True, timeout=SCONTROL_S_MAX, stdin=subprocess.DEVNULL, check=True
    )
    match = COMMENT.search(done.stdout.decode(errors="replace"))
    return match[1] if match else ""


def _user(uid: int) -> tuple[pwd.struct_passwd, list[int]]:
    """Who a user is, and their groups. Raises KeyError, OSError, RuntimeError.

    In a thread that does not keep this process: a directory service may hang, and nothing
    interrupts the C library then.
    """
    found: Future[tuple[pwd.struct_passwd, list[int]]] = Future()

    def ask() -> None:
        try:
            user = pwd.getpwuid(uid)
            found.set_result((user, os.getgrouplist(user.pw_name, user.pw_gid)))
        except Exception as error:  # for whoever waits
            found.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.result(DIRECTORY_S_MAX)
    except TimeoutError as error:
        told = f"who uid {uid} is was not told within {DIRECTORY_S_MAX:g} s"
        raise TimeoutError(told) from error


def _get_as(user: pwd.struct_passwd, groups: list[int], files: list[bytes]) -> None:
    """Run ``swarmcache get`` as this user, for a limited time. Raises OSError.

    Isolated (-I), so that nothing of the user's is imported outside the job. A process that hangs
    in a dead file server outlives its kill, and is not waited for; it holds nothing of ours open.
    """
    get = [sys.executable, "-I", "-m", "swarmcache", "get", f"--timeout={PREFETCH_S_MAX}"]
    process = subprocess.Popen(
        [*get, "--no-progress", "--", *files],
        env={"PATH": PATH, "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name},
        cwd="/",
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=groups,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(PREFETCH_S_MAX + GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_S)
