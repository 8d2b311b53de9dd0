"""The entry point of ``swarmcache``.

``swarmcache get FILE...`` without options goes straight to the daemon: a job that asks for a cached
file waits for Python to start and for little else. Everything else is in ``commands.py``, whose
imports take ten times as long.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from typing import NoReturn


def run() -> NoReturn:
    """What the installed script does: ``main``, and the end of the process."""
    code = main()
    if not plain_get(sys.argv[1:]):
        sys.exit(code)
    # Everything is written and closed that anybody else sees. To take modules and objects apart
    # one by one, as Python does at its end, makes a job wait for nothing.
    os._exit(code)


def main() -> int:
    """Run the command line in ``sys.argv`` and return the exit code."""
    if sys.argv[1:2] == ["cf"]:  # has a command line of its own, and is called as often
        from swarmcache.cf import run_cf

        return run_cf(sys.argv[2:])
    names = plain_get(sys.argv[1:])
    if names:
        from swarmcache.client import Client
        from swarmcache.get import run_get

        return run_get(names, client=Client())
    from swarmcache.commands import run

    return run(sys.argv[1:])


def plain_get(arguments: list[str]) -> list[str]:
    """The FILEs of a ``get`` without options; nothing where this is anything else."""
    if arguments[:1] != ["get"]:
        return []
    before, after = arguments[1:], list[str]()
    if "--" in before:
        at = before.index("--")
        before, after = before[:at], before[at + 1 :]
    if any(name.startswith("-") for name in before):
        return []
    return before + after
