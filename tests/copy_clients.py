"""Many clients at once on one node: ``python -m tests.copy_clients PLAN``.

One process, which has imported all that is needed, and a child for each client: so hundreds take
little memory, and each can die for itself. PLAN is a file with a ``Plan`` in JSON. Prints an
``Ended`` in JSON per client, a line each, in the order in which they end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from swarmcache.client import Client
from swarmcache.commands import run
from swarmcache.cp import CopyProgress, copy_files

IN_QUEUE, IN_MIDDLE = "in the queue", "in the middle"


class Plan(msgspec.Struct):
    """The command lines of all clients.

    ``dies``: when some of them, by their number, are killed: as soon as they wait for a slot, or
    as soon as some bytes are written. ``logs``: a directory for what they say.
    """

    commands: list[list[str]]
    dies: dict[int, str]
    logs: str


class Ended(msgspec.Struct):
    """One client and its end. ``code``: minus the signal's number if one ended it. Times are those
    of ``time.monotonic()`` on this machine."""

    number: int
    command: list[str]
    code: int
    began_s: float
    ended_s: float
    said: str


def run_clients(plan: Plan) -> None:
    """Run all of them at once, until the last one has ended."""
    began_s = time.monotonic()
    running = {_start(plan, number): number for number in range(len(plan.commands))}
    while running:
        pid, status = os.wait()
        number = running.pop(pid)
        said = _log(plan, number).read_bytes().decode(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        ended = Ended(number, plan.commands[number], code, began_s, time.monotonic(), said)
        print(msgspec.json.encode(ended).decode(), flush=True)


def _start(plan: Plan, number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(_log(plan, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        if number in plan.dies:
            _copy_and_die(plan.commands[number], plan.dies[number])
        else:
            code = run(plan.commands[number])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _copy_and_die(command: list[str], when: str) -> None:
    def die(progress: CopyProgress) -> None:
        if progress.waiting_for if when == IN_QUEUE else progress.done_bytes:
            os.kill(os.getpid(), signal.SIGKILL)

    *sources, destination = map(os.fsencode, command[1:])
    for outcome in copy_files(Client(), sources, destination, on_progress=die):
        print(outcome)


def _log(plan: Plan, number: int) -> Path:
    return Path(plan.logs) / f"client-{number}"


if __name__ == "__main__":
    run_clients(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan))
