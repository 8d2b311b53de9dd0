"""``swarmcache demo``: a tracker and four daemons on this machine, and one real file for all four.

Everything is as on a cluster, only nearer: real processes, real sockets on the loopback, a random
file in a directory that plays the file server. No root and no settings are needed, and the
settings of this user are not looked at. At the end nothing is left, which is checked before it is
said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import swarmcache
from swarmcache.client import Client
from swarmcache.display import size_text
from swarmcache.errors import RemoteError, SwarmcacheError

NODES = 4
SLOTS_MAX = 2  # fewer than nodes, so that some nodes never read from the file server
AMPLIFICATION_MAX = 1.01  # promised where no node fails
READY_S_MAX = 30.0
GET_S_MAX = 100.0
END_S_MAX = 10.0
REFRESH_S = 0.1
PLAIN_LINE_S = 1.0
PIECE_BYTES = 4 << 20
SPARE_BYTES = 64 << 20  # for the indexes of the caches and what else is small
SOCKET_PATH_MAX_BYTES = 107  # as in unix(7)
LOG_LINES_MAX = 20
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoFailed(SwarmcacheError):
    """Something is not as it should be; the message says what."""


class Interrupted(BaseException):
    """A signal asked the demo to end."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """Turns the signals that end a program into ``Interrupted``, at a time when that is safe."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = 0
        self._before = {number: signal.signal(number, self._take) for number in ENDING_SIGNALS}

    def _take(self, number: int, _: FrameType | None) -> None:
        if not self._held:
            raise Interrupted(number)
        self._waiting = number

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until this is over."""
        self._held = True
        yield
        self._held = False
        if self._waiting:
            raise Interrupted(self._waiting)

    def leave_alone(self) -> None:
        """No signal has an effect from now on: what must still be done is to clean up."""
        self._held = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_demo(size_bytes: int, console: Console | None = None) -> int:
    """Show the demo and return the exit code. Leaves nothing behind, whatever happens."""
    console = console or Console(highlight=False)
    signals = Signals()
    demo = None
    code = 0
    try:
        demo = Demo(size_bytes, console, signals)
        demo.run()
    except Interrupted as interrupted:
        console.print("Interrupted.")
        code = 128 + interrupted.number
    except (SwarmcacheError, OSError) as error:
        console.print(f"The demo failed: {error}", markup=False, soft_wrap=True)
        code = 1
    finally:
        signals.leave_alone()
        left = demo.clean_up() if demo is not None else []
        signals.restore()
    if left:
        console.print("Not as it should be: " + "; ".join(left), markup=False, soft_wrap=True)
        return code or 1
    console.print("Nothing is left behind: all processes have ended, all files are removed.")
    return code


def _choose_directory(size_bytes: int) -> Path:
    """Where to make a directory: on a disk with room for the file and its copies.

    Raises DemoFailed.
    """
    needed_bytes = (1 + NODES) * size_bytes + SPARE_BYTES
    places = list(dict.fromkeys([tempfile.gettempdir(), "/var/tmp"]))  # noqa: S108 (a new name)
    for place in places:
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free >= needed_bytes:
            return Path(place).resolve() / f"swarmcache-demo-{secrets.token_hex(4)}"
    raise DemoFailed(
        f"{size_text(needed_bytes)} are needed, which is more than there is in"
        f" {' or '.join(places)}; set TMPDIR, or choose a smaller --size"
    )


class Program:
    """A process of ours in a session of its own, so that Ctrl-C does not reach it before us.

    ``address`` is set when it says that it is ready, or fails when it ends without.
    """

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self.address: Future[str] = Future()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "swarmcache", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.decode(errors="replace").rstrip())
            ready = re.fullmatch(r"swarmcache \w+ ready on (\S+)", self.lines[-1])
            if ready and not self.address.done():
                self.address.set_result(ready[1])
        if not self.address.done():
            self.address.set_exception(DemoFailed(f"{self.name} ended early: {self.said()}"))

    def said(self) -> str:
        """Its last lines on stderr."""
        return "".join(f"\n    {line}" for line in self.lines) or "it said nothing"

    def wait_until_ready(self) -> str:
        """The address that it serves on. Raises DemoFailed."""
        try:
            return self.address.result(READY_S_MAX)
        except FutureTimeout as error:
            raise DemoFailed(
                f"{self.name} was not ready within {READY_S_MAX:.0f} s: {self.said()}"
            ) from error

    def output(self) -> bytes:
        """What it wrote to stdout, after its end."""
        assert self.process.stdout is not None
        output = self.process.stdout.read()
        self._reader.join()
        return output

    def end(self) -> str:
        """Wait for its end after SIGTERM; by SIGKILL if need be. What was wrong, or nothing."""
        try:
            code = self.process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        if code is None:
            return f"{self.name} did not end within {END_S_MAX:.0f} s of SIGTERM and was killed"
        if code == 0 or (code == -signal.SIGTERM and self.address.exception() is not None):
            return ""  # a program that was still starting is ended by SIGTERM itself
        return f"{self.name} ended with exit code {code}: {self.said()}"


class Demo:
    """One run, in a directory of its own."""

    def __init__(self, size_bytes: int, console: Console, signals: Signals) -> None:
        """Raises DemoFailed where there is no room."""
        self._directory = _choose_directory(size_bytes)
        self._size_bytes = size_bytes
        self._console = console
        self._signals = signals
        self._socket_directory = self._directory
        if len(bytes(self._socket(NODES))) > SOCKET_PATH_MAX_BYTES:
            self._socket_directory = Path("/tmp") / self._directory.name  # noqa: S108 (a new name)
        self._file = self._directory / "file-server" / "file.bin"
        self._config = self._directory / "config.toml"
        self._environment = _environment()
        self._servers: list[Program] = []
        self._gets: list[Program] = []
        self._clients: list[Client] = []
        self._node_names: dict[str, str] = {}  # by address

    def run(self) -> None:
        """Raises DemoFailed where anything is not as it should be."""
        say = self._console.print
        say(f"Writing {size_text(self._size_bytes)} of random bytes, the file on the file server:")
        say(f"  {self._file}", markup=False, soft_wrap=True)
        digest = self._write_file()
        say(f"Starting a tracker and {NODES} daemons on the loopback")
        self._start_servers()
        say(f"On each of the {NODES} nodes at once: swarmcache get {self._file.name}")
        started_s = time.monotonic()
        self._start_gets()
        with self._shown() as show:
            self._wait_for_gets(show)
        elapsed_s = time.monotonic() - started_s
        paths = self._check_paths()
        self._check_digests(paths, digest)
        self._show_sources()
        say(f"Time from the start of the four commands to the last path: {elapsed_s:.1f} s")

    def _socket(self, number: int) -> Path:
        return self._socket_directory / f"node{number}.run" / "daemon.sock"

    # --- the parts --------------------------------------------------------------------------

    def _write_file(self) -> str:
        """Write the file and return its SHA-256."""
        digest, left_bytes = hashlib.sha256(), self._size_bytes
        for directory in {self._directory, self._socket_directory}:
            directory.mkdir(mode=0o700)
        self._file.parent.mkdir()
        with open(self._file, "wb") as file:
            while left_bytes:
                piece = os.urandom(min(PIECE_BYTES, left_bytes))
                digest.update(piece)
                file.write(piece)
                left_bytes -= len(piece)
        return digest.hexdigest()

    def _start_servers(self) -> None:
        secret = self._directory / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        self._write_config(secret)
        common = ["--config", str(self._config), "--log-level", "warning"]
        state_dir = ["--state-dir", str(self._directory / "tracker")]
        tracker = ["tracker", *common, "--listen", "127.0.0.1:0", *state_dir]
        address = self._start("the tracker", tracker).wait_until_ready()
        for number in range(1, NODES + 1):
            cache, socket = self._directory / f"node{number}" / "cache", self._socket(number)
            cache.parent.mkdir(mode=0o700)
            socket.parent.mkdir(mode=0o700)
            places = ["--cache-dir", str(cache), "--socket", str(socket)]
            daemon = ["daemon", *common, "--listen", "127.0.0.1:0", "--tracker", address, *places]
            self._start(f"node {number}", daemon)
            self._clients.append(Client(bytes(socket)))
        for server in self._servers[1:]:
            self._node_names[server.wait_until_ready()] = server.name

    def _write_config(self, secret: Path) -> None:
        """Settings that depend on nothing but this directory."""
        # JSON's strings are strings in TOML as well.
        self._config.write_text(
            f"[cluster]\nsecret_file = {json.dumps(str(secret))}\n"
            '[cache]\nmin_free = "0%"\nmax_usage = "100%"\n'
            f"[file_servers.demo]\nslots_max = {SLOTS_MAX}\n"
            f"paths = [{json.dumps(str(self._file.parent))}]\n"
        )

    def _start(self, name: str, arguments: list[str]) -> Program:
        with self._signals.held():
            server = Program(name, arguments, self._environment)
            self._servers.append(server)
        return server

    def _start_gets(self) -> None:
        for number in range(1, NODES + 1):
            environment = {
                **self._environment,
                "SWARMCACHE_SOCKET": str(self._socket(number)),
            }
            with self._signals.held():
                get = Program(f"get on node {number}", ["get", str(self._file)], environment)
                self._gets.append(get)

    def _wait_for_gets(self, show: Display) -> None:
        running = select.poll()
        pidfds = {os.pidfd_open(get.process.pid): get for get in self._gets}
        try:
            for pidfd in pidfds:
                running.register(pidfd, select.POLLIN)
            left, give_up_s = len(pidfds), time.monotonic() + GET_S_MAX
            while left:
                for pidfd, _ in running.poll(REFRESH_S * 1000):
                    running.unregister(pidfd)
                    left -= 1
                show.update(self._statuses())
                if time.monotonic() > give_up_s:
                    raise DemoFailed(f"no path after {GET_S_MAX:.0f} s")
        finally:
            for pidfd in pidfds:
                os.close(pidfd)

    def _statuses(self) -> list[dict[str, Any]]:
        return [_status_of(client) for client in self._clients]

    @contextmanager
    def _shown(self) -> Iterator[Display]:
        display = Display(self._size_bytes)
        if not self._console.is_terminal:
            display.print_line = lambda line: self._console.print(line, markup=False)
            yield display
            return
        with Live(console=self._console, get_renderable=display.table, refresh_per_second=10):
            yield display

    def _check_paths(self) -> list[str]:
        """The paths that were printed. Raises DemoFailed where one is not a cached one."""
        paths = []
        for number, get in enumerate(self._gets, 1):
            path = os.fsdecode(get.output()).removesuffix("\n")
            self._console.print(f"node {number} printed {path}", markup=False, soft_wrap=True)
            node = self._directory / f"node{number}"
            if get.process.wait() != 0 or not path.startswith(f"{node}/cache/"):
                raise DemoFailed(f"{get.name} did not print a cached path: {get.said()}")
            paths.append(path)
        if len(set(paths)) != NODES:
            raise DemoFailed("the paths are not different ones")
        return paths

    def _check_digests(self, paths: list[str], digest: str) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            digests = list(threads.map(_sha256, paths))
        for number, found in enumerate(digests, 1):
            self._console.print(f"node {number} SHA-256 {found}")
        if digests != [digest] * NODES:
            raise DemoFailed(f"the file on the file server has SHA-256 {digest}")
        self._console.print("All four copies and the file on the file server are identical.")

    def _show_sources(self) -> None:
        """Where the bytes of each node came from. Raises DemoFailed for more than one file read."""
        table = Table(title="Where the bytes came from", title_justify="left", title_style="bold")
        table.add_column("to")
        for name in ("file server", *self._node_names.values(), "all"):
            table.add_column(name, justify="right")
        read_bytes = 0
        for name, status in zip(self._node_names.values(), self._statuses(), strict=True):
            from_file_server, from_nodes = _sources(status)
            read_bytes += from_file_server
            cells = [from_file_server, *(from_nodes.get(node, 0) for node in self._node_names)]
            table.add_row(name, *(size_text(cell) for cell in [*cells, sum(cells)]))
        self._console.print(table)
        times = read_bytes / self._size_bytes if self._size_bytes else 1.0
        self._console.print(
            f"Read from the file server: {size_text(read_bytes)}, {times:.2f} x the file,"
            f" through at most {SLOTS_MAX} nodes at a time.",
            soft_wrap=True,
        )
        if times > AMPLIFICATION_MAX:
            raise DemoFailed(f"{read_bytes} bytes were read for a file of {self._size_bytes}")

    # --- the end ----------------------------------------------------------------------------

    def clean_up(self) -> list[str]:
        """End all processes, remove all files, and check that. What is not as it should be."""
        for client in self._clients:
            client.close()
        # Without an order to end, a get that was interrupted would take itself for a failure.
        interrupted = [get for get in self._gets if get.process.poll() is None]
        for program in [*interrupted, *self._servers]:
            program.process.terminate()
        for get in self._gets:
            get.end()  # what is wrong with its exit code has been said
        left = [wrong for server in self._servers if (wrong := server.end())]
        for directory in {self._directory, self._socket_directory}:
            try:
                if directory.exists():
                    shutil.rmtree(directory)
            except OSError as error:
                left.append(f"{directory} could not be removed: {error}")
        left += [
            f"process {program.process.pid} ({program.name}) still runs"
            for program in [*self._gets, *self._servers]
            if _is_alive(program.process.pid)
        ]
        return left


class Display:
    """How far the nodes are: a table on a terminal, else a line now and then."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._sources = [(0, 0)] * NODES  # bytes from the file server, from other nodes
        self._next_line_s = 0.0
        self.print_line = _print_nothing

    def update(self, statuses: list[dict[str, Any]]) -> None:
        for number, status in enumerate(statuses):
            if status:
                from_file_server, from_nodes = _sources(status)
                self._sources[number] = (from_file_server, sum(from_nodes.values()))
        if time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + PLAIN_LINE_S
            parts = [f"node {n} {self._percent(n - 1)} %" for n in range(1, NODES + 1)]
            self.print_line("  " + ", ".join(parts))

    def _percent(self, index: int) -> int:
        return 100 * sum(self._sources[index]) // self._size_bytes if self._size_bytes else 100

    def table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for index, (from_file_server, from_nodes) in enumerate(self._sources):
            done_bytes = from_file_server + from_nodes
            table.add_row(
                f"  node {index + 1}",
                ProgressBar(total=max(1, self._size_bytes), completed=done_bytes, width=30),
                f"{self._percent(index):3} %",
                f"{size_text(from_nodes)} from nodes",
                f"{size_text(from_file_server)} from the file server",
            )
        return table


def _print_nothing(line: str) -> None:
    """On a terminal the table says it all."""


def _environment() -> dict[str, str]:
    """Ours, without settings of swarmcache, and with this very package on Python's path."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("SWARMCACHE_")}
    package = str(Path(swarmcache.__path__[0]).resolve().parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH")]))
    return kept


def _status_of(client: Client) -> dict[str, Any]:
    """What a daemon says of its node; nothing where it is gone, which its get will notice."""
    try:
        node: dict[str, Any] = client.status()["node"]
    except RemoteError:
        return {}
    return node


def _sources(status: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Bytes from the file server, and from other nodes by their address."""
    return int(status.get("read_bytes", 0)), dict(status.get("received_bytes", {}))


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
