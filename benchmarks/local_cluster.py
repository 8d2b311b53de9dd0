"""A tracker and some daemons on the loopback, as real processes, for as long as a block lasts.

with LocalCluster(directory, nodes=2) as cluster:
    copy, elapsed_s = cluster.nodes[0].get(file)
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from swarmcache.client import Client
from swarmcache.demo import Program

REPOSITORY = Path(__file__).resolve().parent.parent
CONNECT_S_MAX = 10.0
STATUS_PAUSE_S = 0.02


def clean_environment() -> None:
    """Take out of this process' environment, and so of what it starts, what distorts figures.

    Settings of the user; and what forbids Python to keep the compiled modules, which an installed
    package has.
    """
    for name in list(os.environ):
        if name.startswith("SWARMCACHE_"):
            del os.environ[name]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPATH"] = str(REPOSITORY)


def console_script(directory: Path) -> Path:
    """The installed ``swarmcache``, or one like it in ``directory`` where none is installed."""
    installed = Path(sys.executable).with_name("swarmcache")
    if installed.exists():
        return installed
    script = directory / "swarmcache"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom swarmcache.cli import run\n"
        'if __name__ == "__main__":\n    sys.exit(run())\n'
    )
    script.chmod(0o755)
    return script


def run_timed(command: Sequence[str | Path], socket: Path | None = None) -> tuple[str, float]:
    """Run a program; its stdout and the seconds from its start to its end.

    Raises CalledProcessError, TimeoutExpired.
    """
    environment = {**os.environ, **({"SWARMCACHE_SOCKET": str(socket)} if socket else {})}
    began_s = time.perf_counter()
    # No limit of time on the wait itself: Popen.wait would look only every 50 ms then.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, check=True
    )
    elapsed_s = time.perf_counter() - began_s
    return os.fsdecode(done.stdout), elapsed_s


class Node:
    """A daemon that serves, and the way to ask it."""

    def __init__(self, program: Program, socket: Path, script: Path) -> None:
        self.program = program
        self.pid = program.process.pid
        self.socket = socket
        self._script = script

    def get(self, file: Path) -> tuple[Path, float]:
        """``swarmcache get`` as a whole process: the copy, and the seconds that it took.

        Raises ChildProcessError if it printed the original path.
        """
        output, elapsed_s = run_timed([self._script, "get", file], self.socket)
        copy = Path(output.removesuffix("\n"))
        if copy == file.resolve():
            raise ChildProcessError(f"{file} was not cached; the reason is above")
        return copy, elapsed_s

    def wait_until_connected(self) -> None:
        """Until the daemon says that it has a connection to the tracker. Raises TimeoutError."""
        deadline_s = time.monotonic() + CONNECT_S_MAX
        with Client(bytes(self.socket)) as client:
            while not client.status()["node"]["tracker_connected"]:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"no connection to the tracker: {self.program.said()}")
                time.sleep(STATUS_PAUSE_S)  # the daemon tells only who asks

    def reset_peak_rss(self) -> None:
        """Begin anew to look for the peak of ``peak_rss_bytes``."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def peak_rss_bytes(self) -> int:
        """The most memory that the daemon has had resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024
        raise ChildProcessError(f"a daemon has ended: {self.program.said()}")


class LocalCluster:
    """Everything lives in ``directory``, caches included, which may fill the whole disk.

    ``settings``: of ``[cache]``, such as ``{"max_usage": "1GiB"}``.
    """

    def __init__(
        self, directory: Path, nodes: int = 1, settings: Mapping[str, str] | None = None
    ) -> None:
        self.nodes: list[Node] = []
        self._settings = {"min_free": "0%", "max_usage": "100%", **(settings or {})}
        self._directory = directory
        self._node_count = nodes
        self._programs = ExitStack()

    def __enter__(self) -> LocalCluster:
        with ExitStack() as started:
            self._start(started)
            self._programs = started.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._programs.close()

    def _start(self, started: ExitStack) -> None:
        script = console_script(self._directory)
        secret = self._directory / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        config = self._directory / "config.toml"
        # JSON's strings are strings in TOML as well.
        cache = "".join(f"{key} = {json.dumps(value)}\n" for key, value in self._settings.items())
        config.write_text(f"[cluster]\nsecret_file = {json.dumps(str(secret))}\n[cache]\n{cache}")
        self._common = ["--config", str(config), "--log-level", "warning", "--listen"]
        self._common += ["127.0.0.1:0"]
        state_dir = ["--state-dir", str(self._directory / "tracker")]
        tracker = self._run(started, "the tracker", ["tracker", *self._common, *state_dir])
        self._address = tracker.wait_until_ready()
        for number in range(1, self._node_count + 1):
            self.nodes.append(self._start_node(started, number, script))
        for node in self.nodes:
            node.program.wait_until_ready()
            node.wait_until_connected()

    def _start_node(self, started: ExitStack, number: int, script: Path) -> Node:
        place = self.place(number)
        place.mkdir(mode=0o700, exist_ok=True)
        socket = place / "run" / "daemon.sock"
        places = ["--cache-dir", str(place / "cache"), "--socket", str(socket)]
        daemon = ["daemon", *self._common, "--tracker", self._address, *places]
        return Node(self._run(started, f"node {number}", daemon), socket, script)

    def place(self, number: int) -> Path:
        """The directory of a node, counted from 1: its cache is ``cache`` in there."""
        return self._directory / f"node{number}"

    def start_node(self, number: int) -> Node:
        """Start one more node, or one anew that was ended. Does not wait until it is ready."""
        return self._start_node(self._programs, number, console_script(self._directory))

    def end_node(self, node: Node) -> None:
        """End a node before the cluster ends."""
        _end(node.program)

    def _run(self, started: ExitStack, name: str, arguments: list[str]) -> Program:
        program = Program(name, arguments, os.environ)
        started.callback(_end, program)
        return program


def _end(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    wrong = program.end()
    if wrong:
        print(wrong, file=sys.stderr)
