"""A real tracker and real daemons on this machine's loopback, and the real command line.

    with LocalDaemons(directory) as local:
        node = local.start_daemon("a")
        done = node.run("ls", "--json")

No environment variable is set for any of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import swarmcache
from swarmcache.client import Client
from tests.box import wait_until

PACKAGE_PARENT = Path(swarmcache.__file__).parent.parent
COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(PACKAGE_PARENT)!r})\n"
    "from swarmcache.cli import main; sys.exit(main())",
]
# The same as another user, who need not be able to read this checkout or this Python: what commands
# import is imported before, by showing a help text to nobody.
COMMAND_AS = [
    sys.executable,
    "-c",
    f"import contextlib, io, os, sys; sys.path.insert(0, {str(PACKAGE_PARENT)!r})\n"
    "from swarmcache.cli import main\n"
    "from swarmcache.commands import run\n"
    "import swarmcache.doctor, swarmcache.bundle_get, swarmcache.place_actions\n"
    "with contextlib.redirect_stdout(io.StringIO()): run(['ls', '--help'])\n"
    "uid = int(sys.argv.pop(1))\n"
    "os.setgroups([]); os.setgid(uid); os.setuid(uid); sys.exit(main())",
]
PATIENCE_S = 30.0


class EndedEarly(Exception):
    """A server that should have become ready has ended instead; with what it said."""


class Server:
    """A tracker or daemon process and what it says on stderr."""

    def __init__(
        self, log: Path, *arguments: str | Path, command: Sequence[str | Path] = COMMAND
    ) -> None:
        self._log = log
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen([*command, *arguments], stderr=stderr, env={})
        try:
            wait_until(
                lambda: "ready on" in self.said() or self.process.poll() is not None,
                PATIENCE_S,
                f"{arguments[0]} to be ready",
            )
        except BaseException:  # nobody else knows of it yet
            self.kill()
            raise
        if "ready on" not in self.said():
            raise EndedEarly(self.said())
        self.address = self.said().partition("ready on ")[2].splitlines()[0]

    def said(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        """Let it end in an orderly way."""
        self.process.terminate()
        self.process.wait(timeout=PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=PATIENCE_S)


class LocalNode(Server):
    """A daemon with a socket, a cache directory and the commands of its users."""

    def __init__(
        self,
        directory: Path,
        name: str,
        tracker: str,
        settings: str,
        cache_dir: Path | None,
        command: Sequence[str | Path],
    ) -> None:
        config = directory / f"config-{name}.toml"
        config.write_text(settings)
        self.cache_dir = cache_dir or directory / f"cache-{name}"
        self.socket = directory / f"run-{name}" / "daemon.sock"
        super().__init__(
            directory / f"daemon-{name}.log",
            "daemon",
            "--config",
            config,
            "--listen",
            "127.0.0.1:0",
            "--tracker",
            tracker,
            "--cache-dir",
            self.cache_dir,
            "--socket",
            self.socket,
            command=command,
        )

    def run(
        self, *arguments: str | bytes | Path, uid: int | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """A command, as root or whoever runs the tests, or as another user."""
        command, *rest = arguments
        program = COMMAND if uid is None else [*COMMAND_AS, str(uid)]
        return subprocess.run(
            [*program, command, f"--socket={self.socket}", *rest],
            capture_output=True,
            check=False,
            cwd="/",
            env={},
            timeout=60,
        )

    def get(self, *files: Path | bytes, uid: int | None = None) -> list[bytes]:
        """The paths of the copies of these files, which must all be cached."""
        done = self.run("get", "--strict", "-0", *files, uid=uid)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix(b"\0").split(b"\0")

    def listed(self, *paths: str | bytes | Path, uid: int | None = None) -> list[dict[str, Any]]:
        """What ``ls --json`` prints."""
        done = self.run("ls", "--json", *paths, uid=uid)
        assert done.returncode == 0, done.stderr
        files: list[dict[str, Any]] = json.loads(done.stdout)
        return files

    def status(self) -> dict[str, Any]:
        with Client(os.fsencode(self.socket)) as client:
            return client.status()

    def wait_for_tracker(self) -> None:
        """Until the daemon is connected to the tracker."""
        wait_until(
            lambda: self.status()["node"]["tracker_connected"], PATIENCE_S, "a connected tracker"
        )


class LocalDaemons:
    """Ends all that it has started."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.tracker: Server | None = None

    def __enter__(self) -> LocalDaemons:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_tracker(self, settings: str = "", command: Sequence[str | Path] = COMMAND) -> Server:
        """``settings``: in TOML. ``command``: as in ``start_daemon``."""
        config = self._directory / "config-tracker.toml"
        config.write_text(settings)
        self.tracker = Server(
            self._directory / "tracker.log",
            "tracker",
            "--config",
            config,
            "--listen",
            "127.0.0.1:0",
            "--state-dir",
            self._directory / "state",
            command=command,
        )
        self._stack.callback(self.tracker.kill)
        return self.tracker

    def start_daemon(
        self,
        name: str = "a",
        settings: str = "",
        cache_dir: Path | None = None,
        command: Sequence[str | Path] = COMMAND,
    ) -> LocalNode:
        """A daemon that is connected to the tracker, if there is one. ``settings``: in TOML.

        ``command``: what runs ``swarmcache`` with the arguments that follow.
        """
        # Port 1 of the loopback: nobody listens there, so it is as if the tracker were down.
        tracker = self.tracker.address if self.tracker is not None else "127.0.0.1:1"
        node = LocalNode(self._directory, name, tracker, settings, cache_dir, command)
        self._stack.callback(node.kill)
        if self.tracker is not None:
            node.wait_for_tracker()
        return node
