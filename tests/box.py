"""A cluster in a box: real hosts, a real switch and a real file server on one machine.

    with Box(hosts=8, rate_mbit=200, directory=tmp_path) as box:
        (box.export / "corpus").write_bytes(data)          # on the file server's disk
        copy = box.nodes[0].run(["cp", box.export / "corpus", box.nodes[0].disk])
        box.nodes[1].cut_off()

A *host* is a network, mount, UTS and PID namespace. Hosts are joined by one bridge, the *switch*,
in a network namespace of its own. `fs` exports a directory, `head` is meant for the tracker, and
`node1` ... `nodeN` mount the export through sshfs at the path that it has outside. Needs root.

What holds a host together is one process, the *keeper*: process 1 of its PID namespace, which ends
when this process closes a pipe or dies. The kernel then ends everything in the host and gives back
links, mounts and disks, so that even `kill -9` of the test run leaves nothing behind. Nothing has a
name outside the namespaces, so boxes on one machine cannot collide.

**Links.** Each host has one link, shaped by `tc tbf` at both of its ends: what it sends at its own
`eth0`, what it receives at its port of the switch. Segmentation offload stays on, since a timer and
a trip through the bridge for each 1,500 bytes would take more CPU than the daemons under test. tbf
counts the headers that an offloaded packet will have, for the rate and for the counters, so both
mean IP + Ethernet header bytes as on a wire.

Run as a program this file is the file server (`python box.py serve ...`), which starts one
`sftp-server` per connection and writes down every read and write that passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

# Debian packages: iproute2 (ip, tc), util-linux (unshare, nsenter, mount), fuse3, sshfs,
# openssh-sftp-server.
TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "sshfs", "fusermount3")
# Whatever tests beside this one unmount is to be gone, and not kept by a host. One of them may
# remove the directory just then, which unmounts it here as well.
LET_GO_OF_OTHERS = r"""
others() {
    awk '$1 ~ "^/dev/loop" && $2 ~ "/(swarmcache-test|pytest)-" {print $2}' /proc/self/mounts
}
others | xargs --no-run-if-empty umount --lazy || test -z "$(others)"
"""
SFTP_SERVER = Path("/usr/lib/openssh/sftp-server")

# Bytes that a link lets pass at once after a pause. tbf cuts a packet in pieces if it is longer, so
# it must hold an offloaded one (64 KiB and the headers of its 45 segments). 256 KiB are 0.1 % of a
# 256 MiB transfer, and 10 ms at 200 Mbit/s, more than the 4 ms between two ticks of a slow kernel.
BURST_BYTES = 256 * 1024
# Longest time that a packet waits for its link before it is dropped. At 200 Mbit/s this is 1.25 MB
# of buffer for each port, as in a deep-buffered switch; packets to a busy node are late by as much.
QUEUE_S = 0.05
QUEUE_MIN_BYTES = 512 * 1024
# A link without a limit is shaped too, to more than a machine can move, so that counters and cuts
# work in the same way.
UNSHAPED_MBIT = 100_000.0
UNSHAPED_BURST_BYTES = 16 * 1024 * 1024

SFTP_PORT = 7022
OWN = ("--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
NODES_MAX = 200
START_TIMEOUT_S = 20.0
REPOSITORY = Path(__file__).resolve().parents[1]
CLONE_NEWPID = 0x20000000  # linux/sched.h

Argument = str | bytes | os.PathLike[str]
Value = TypeVar("Value")


class BoxUnavailable(Exception):
    """This machine cannot make a box: not root, or a tool is missing."""


def missing() -> list[str]:
    """What keeps this machine from making a box, in words; empty if nothing does."""
    found = [f"{tool} is not installed" for tool in TOOLS if shutil.which(tool) is None]
    if not SFTP_SERVER.exists():
        found.append(f"{SFTP_SERVER} is not installed")
    if not os.path.exists("/dev/fuse"):
        found.append("there is no /dev/fuse")
    if os.geteuid() != 0:
        found.append("not root")
    elif not found and subprocess.run(["unshare", *OWN, "true"], check=False).returncode != 0:
        found.append("no namespaces may be made here")  # as in a container without the capabilities
    return found


def require() -> None:
    """For fixtures: skip the test if this machine cannot make a box, fail it if CI=true."""
    import pytest  # not at the top: the file server's process does without it and starts faster

    reasons = "; ".join(missing())
    if reasons and os.environ.get("CI") == "true":
        pytest.fail(f"no box: {reasons}")
    if reasons:
        pytest.skip(f"no box: {reasons}")


def wait_until(condition: Callable[[], Value], timeout_s: float, what: str) -> Value:
    """The first true value of `condition`, asked every 10 ms: for what has no event to wait on.

    Raises TimeoutError, which says `what` was awaited in vain.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline_s:
            raise TimeoutError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(0.01)


# ---------------------------------------------------------------------------------- processes


class Process:
    """A process of a host, leader of a session of its own. Its output goes to two files.

    `pid` is its number outside the host. stdin is /dev/null.
    """

    def __init__(self, popen: subprocess.Popen[bytes], log: Path, command: Sequence[str]) -> None:
        self._popen = popen
        self.pid = popen.pid
        self.command = list(command)
        self.stdout_file = log.with_name(log.name + ".out")
        self.stderr_file = log.with_name(log.name + ".err")

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else f"exit {self.returncode}"
        return f"<Process {self.pid} {shlex.join(self.command)[:80]!r}, {state}>"

    @property
    def returncode(self) -> int | None:
        """Exit status, minus the signal's number if one ended it, None while it runs."""
        return self._popen.poll()

    @property
    def stdout(self) -> str:
        """What it has written so far; bytes that are not UTF-8 as in `os.fsdecode`."""
        return os.fsdecode(self.stdout_file.read_bytes())

    @property
    def stderr(self) -> str:
        return os.fsdecode(self.stderr_file.read_bytes())

    def wait(self, timeout_s: float) -> int:
        """Exit status. Raises TimeoutError, with the end of stderr, if it is still running."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(
                f"{self!r} did not end in {timeout_s:g} s: {self.stderr[-2000:]}"
            ) from error

    def wait_for_stderr(self, text: str, timeout_s: float) -> None:
        """Until it has written `text` to stderr. Raises ChildProcessError if it ends before."""

        def written() -> bool:
            ended = self.returncode is not None
            if text in self.stderr:
                return True
            if ended:
                raise ChildProcessError(f"{self!r} without {text!r}: {self.stderr[-2000:]}")
            return False

        wait_until(written, timeout_s, f"{text!r} on stderr of {self!r}")

    def signal(self, number: signal.Signals) -> None:
        """To the whole process group; nothing happens once its leader has ended."""
        if self.returncode is None:
            os.killpg(self.pid, number)


class Gate:
    """Holds processes back just before they run their programs, and lets all go at one instant.

    `directory`: one for this gate alone, which hosts see at the same path. A FIFO keeps them:
    opening it for reading waits for somebody who writes (fifo(7)). Once open it stays so until the
    end of the `with` block.
    """

    _WAITS = "waits at the gate"

    def __init__(self, directory: Path) -> None:
        self._fifo = directory / "gate"
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Gate:
        os.mkfifo(self._fifo, 0o644)
        self._cleanup.callback(self._fifo.unlink)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def before(self, command: Sequence[str]) -> list[str]:
        """What to start in place of `command`, so that it waits here first."""
        script = f'echo {self._WAITS} >&2; : < "$0"; exec "$@"'
        return ["sh", "-euc", script, str(self._fifo), *command]

    def open(self, processes: Iterable[Process]) -> float:
        """Let them go, once all have come here. Returns the instant, of `time.monotonic`."""
        for process in processes:
            process.wait_for_stderr(self._WAITS, START_TIMEOUT_S)
        opened_s = time.monotonic()
        self._cleanup.callback(os.close, os.open(self._fifo, os.O_RDWR))  # which waits for nobody
        return opened_s


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _children_into(pid_namespace: Path) -> None:
    """Processes that this thread starts from now on are born in the PID namespace."""
    with open(pid_namespace) as file:
        if _libc().setns(file.fileno(), CLONE_NEWPID) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {pid_namespace}")


class _Keeper:
    """The process that keeps a set of namespaces, and the way into them."""

    def __init__(self, script: str, *, whole_host: bool) -> None:
        """Run `script` (sh) as process 1 of new namespaces; `wait_ready` waits for its end."""
        own = OWN if whole_host else ("--net", "--pid", "--fork", "--kill-child")
        # Process 1 inherits orphans; with SIGCHLD ignored the kernel buries them.
        script += "\necho ready\nexec env --ignore-signal=CHLD cat > /dev/null\n"
        self._popen = subprocess.Popen(
            ["unshare", *own, "sh", "-euc", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        namespaces = ["net", "mnt", "uts"] if whole_host else ["net"]
        options = {"net": "--net", "mnt": "--mount", "uts": "--uts"}
        self._enter = [f"{options[name]}=/proc/{self.pid}/ns/{name}" for name in namespaces]

    def wait_ready(self) -> None:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if line != b"ready\n":
            raise BoxUnavailable(f"a host could not be set up (see stderr); it said {line!r}")

    def popen(
        self,
        arguments: Sequence[str],
        *,
        uid: int = 0,
        directory: Path = Path("/"),
        env: Mapping[str, str] | None = None,
        stdout: int = subprocess.DEVNULL,
        stderr: int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process inside. The PID of what is returned is that of the process itself."""
        identity = [f"--setuid={uid}", f"--setgid={uid}"] if uid else []
        _children_into(Path(f"/proc/{self.pid}/ns/pid_for_children"))
        try:
            return subprocess.Popen(
                ["nsenter", *self._enter, *identity, f"--wdns={directory}", "--", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=env,
                start_new_session=True,
            )
        finally:
            _children_into(Path("/proc/thread-self/ns/pid"))

    def call(self, arguments: Sequence[str], text: str = "") -> str:
        """Run an administrator's tool in the network namespace only. Returns its stdout."""
        return subprocess.run(
            ["nsenter", self._enter[0], "--", *arguments],
            input=text,
            text=True,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout

    def let_go(self) -> None:
        """End process 1, with which the kernel kills everything inside."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def end(self) -> None:
        """`let_go`, and wait until nothing is left. What was started inside must be waited for."""
        self.let_go()
        try:
            self._popen.wait(START_TIMEOUT_S)
        finally:
            self._popen.kill()  # a script that hangs; its process 1 goes with it
            self._popen.wait()
            assert self._popen.stdout is not None
            self._popen.stdout.close()


# -------------------------------------------------------------------------------------- hosts


def _tbf(mbit: float | None) -> tuple[str, int]:
    """Parameters of tbf for a rate, and the length of its queue in bytes."""
    burst_bytes = UNSHAPED_BURST_BYTES if mbit is None else BURST_BYTES
    rate_bit = round((UNSHAPED_MBIT if mbit is None else mbit) * 1e6)
    queue_bytes = max(QUEUE_MIN_BYTES, round(rate_bit / 8 * QUEUE_S))
    limit_bytes = queue_bytes + burst_bytes
    return f"tbf rate {rate_bit}bit burst {burst_bytes} limit {limit_bytes}", limit_bytes


class _LinkEnd:
    """One direction of a link: the device that sends into it, and how that is shaped."""

    def __init__(self, keeper: _Keeper, device: str, mbit: float | None) -> None:
        self._keeper = keeper
        self._device = device
        shape, self._limit_bytes = _tbf(mbit)
        self._tc(f"qdisc add dev {device} root handle 1: {shape}")

    def _tc(self, *lines: str) -> None:
        self._keeper.call(["tc", "-batch", "-"], "\n".join(lines) + "\n")

    def shape(self, mbit: float | None) -> None:
        shape, self._limit_bytes = _tbf(mbit)
        self._tc(f"qdisc change dev {self._device} root handle 1: {shape}")

    def cut(self) -> None:
        """Drop everything without a word, what is queued now included."""
        self._tc(f"qdisc replace dev {self._device} parent 1:1 handle 20: blackhole")

    def heal(self) -> None:
        self._tc(
            f"qdisc replace dev {self._device} parent 1:1 handle 10: bfifo "
            f"limit {self._limit_bytes}"
        )

    def bytes_passed(self) -> int:
        """IP + Ethernet header bytes that have left through this end."""
        text = self._keeper.call(["tc", "-s", "-j", "qdisc", "show", "dev", self._device])
        return sum(int(entry["bytes"]) for entry in json.loads(text) if entry.get("root"))


class Host:
    """One machine of the box. Made by `Box`.

    Attributes: `name`, also its hostname; `address` (IPv4, also known by name on every host);
    `disk`, a directory on a tmpfs of its own, at the same path inside the host and outside.
    From outside, that path is a symlink into the host: use it, but do not `resolve()` it.
    """

    def __init__(
        self, name: str, address: str, directory: Path, script: Callable[[Host], str]
    ) -> None:
        self.name = name
        self.address = address
        self.directory = directory / "hosts" / name
        self.disk = self.directory / "disk"
        self.logs = directory / "logs" / name
        self.logs.mkdir(parents=True)
        self.directory.mkdir(parents=True)
        self.keeper = _Keeper(script(self), whole_host=True)
        self.disk.symlink_to(f"/proc/{self.keeper.pid}/root{self.disk}")
        self._processes: list[Process] = []
        self._up: _LinkEnd | None = None
        self._down: _LinkEnd | None = None

    def __repr__(self) -> str:
        running = sum(process.returncode is None for process in self._processes)
        return f"<Host {self.name} {self.address}, {running} processes>"

    def plug_in(self, switch: _Keeper, rate_mbit: float | None) -> None:
        """Join the link whose other end, named like the host, is in the switch."""
        self.keeper.call(
            ["ip", "-batch", "-"],
            f"link set dev eth0 up addrgenmode none\naddr add {self.address}/16 dev eth0\n",
        )
        self._up = _LinkEnd(self.keeper, "eth0", rate_mbit)
        self._down = _LinkEnd(switch, self.name, rate_mbit)

    # Processes

    def start(
        self,
        arguments: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        uid: int = 0,
        directory: Path = Path("/"),
        log: str = "",
        gate: Gate | None = None,
    ) -> Process:
        """Start a process here, in a session of its own.

        `env` is added to this process' environment. `uid` is its user and group. `log` names the
        files with its output below `logs`; the default is the program's name. It runs its program
        when the `gate`, if there is one, is opened.
        """
        command = [os.fsdecode(argument) for argument in arguments]
        stem = log or os.path.basename(command[0])
        path = self.logs / f"{len(self._processes):03d}-{stem}"
        with (
            open(path.with_name(path.name + ".out"), "wb") as out,
            open(path.with_name(path.name + ".err"), "wb") as err,
        ):
            popen = self.keeper.popen(
                gate.before(command) if gate else command,
                uid=uid,
                directory=directory,
                env={**os.environ, **(env or {})},
                stdout=out.fileno(),
                stderr=err.fileno(),
            )
        process = Process(popen, path, command)
        self._processes.append(process)
        return process

    def run(
        self,
        arguments: Sequence[Argument],
        *,
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        uid: int = 0,
        directory: Path = Path("/"),
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here until it ends.

        Raises ChildProcessError if it fails and `check`; TimeoutError, after having killed it.
        """
        process = self.start(arguments, env=env, uid=uid, directory=directory)
        try:
            status = process.wait(timeout_s)
        finally:
            self.kill(process)
        if check and status != 0:
            raise ChildProcessError(f"{process!r} on {self.name}: {process.stderr[-2000:]}")
        return subprocess.CompletedProcess(process.command, status, process.stdout, process.stderr)

    def kill(self, process: Process) -> None:
        """`kill -9` of its process group, and wait until it is gone."""
        process.signal(signal.SIGKILL)
        process.wait(START_TIMEOUT_S)

    def stop(self, process: Process) -> None:
        """SIGSTOP to its process group, and wait until its leader has stopped."""
        process.signal(signal.SIGSTOP)
        wait_until(lambda: _state(process.pid) in "TZ", START_TIMEOUT_S, f"{process!r} to stop")

    def cont(self, process: Process) -> None:
        """SIGCONT to its process group."""
        process.signal(signal.SIGCONT)

    # Link

    @property
    def up(self) -> _LinkEnd:
        assert self._up is not None, f"{self.name} is not plugged in"
        return self._up

    @property
    def down(self) -> _LinkEnd:
        assert self._down is not None, f"{self.name} is not plugged in"
        return self._down

    def shape(self, *, up_mbit: float | None, down_mbit: float | None) -> None:
        """Other rates for what it sends and receives, from now on; None lifts the limit."""
        self.up.shape(up_mbit)
        self.down.shape(down_mbit)

    def cut_off(self, *, up: bool = True, down: bool = True) -> None:
        """Pull the cable: no packet passes, no end is told. TCP connections outlive a short cut.

        With `up` only, the host hears but is not heard; with `down` only, the reverse.
        """
        if up:
            self.up.cut()
        if down:
            self.down.cut()

    def heal(self) -> None:
        """Put the cable back."""
        self.up.heal()
        self.down.heal()

    def bytes_sent(self) -> int:
        """Bytes that left through its link since the start, IP and Ethernet headers included."""
        return self.up.bytes_passed()

    def bytes_received(self) -> int:
        return self.down.bytes_passed()

    def bytes_sent_so_far(self) -> int:
        """About `bytes_sent`, for who asks again and again: that starts two processes each time,
        which a host that is busy feels. An offloaded packet counts with one header (4 % less).
        """
        for line in Path(f"/proc/{self.keeper.pid}/net/dev").read_text().splitlines():
            device, _, counters = line.partition(":")
            if device.strip() == "eth0":
                return int(counters.split()[8])
        raise LookupError(f"{self!r} has no eth0")

    # End

    def end(self) -> None:
        """Kill everything here and give back what the host is made of."""
        self.keeper.let_go()
        # The keeper cannot end before all that it has taken with it are waited for.
        for process in self._processes:
            process.wait(START_TIMEOUT_S)
        self.keeper.end()


def _state(pid: int) -> str:
    """One letter, as in proc(5): R, S, D, T (stopped), Z ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---------------------------------------------------------------------------------------- box


def _closed_ancestor(path: Path) -> Path | None:
    """The topmost directory above `path` that other users may not pass."""
    for ancestor in reversed(path.parents):
        if not ancestor.stat().st_mode & stat.S_IXOTH:
            return ancestor
    return None


def _open_ways(kept: Iterable[Path]) -> Iterator[str]:
    """Shell lines after which every user can reach the `kept` directories.

    pytest's temporary directories and an interpreter below /root are closed to others. In the host,
    and only there, such a directory is replaced by an empty one with the `kept` ones in it.
    """
    ways: dict[Path, list[Path]] = {}
    for path in kept:
        closed = _closed_ancestor(path)
        if closed is not None and path not in ways.setdefault(closed, []):
            ways[closed].append(path)
    for closed, paths in ways.items():
        for number, path in enumerate(paths):
            yield f"mkdir /run/keep{number}"
            yield f"mount --rbind {shlex.quote(str(path))} /run/keep{number}"
        yield f"mount -t tmpfs -o mode=755 home {shlex.quote(str(closed))}"
        for number, path in enumerate(paths):
            yield f"mkdir -p {shlex.quote(str(path))}"
            yield f"mount --move /run/keep{number} {shlex.quote(str(path))}"
            yield f"rmdir /run/keep{number}"


class Box:
    """A cluster of `hosts` nodes, `head` and `fs`, from `with` to the end of its block.

    Parameters: `hosts`, number of nodes; `rate_mbit`, rate of every link in each direction in
    Mbit/s, None for no limit; `directory`, an existing directory for this box alone; `disk_mib`,
    size of each host's disk in MiB; `attr_timeout_s`, for how long nodes believe what they know of
    a file's size and mtime without asking `fs`.

    Attributes: `nodes`, `head`, `fs`; `box["node3"]`; `export`, the file server's directory, an
    ordinary one outside and a network mount at the same path on nodes; `file_server`, the witness.

    What the network file system is like: NFS with close-to-open consistency. A node's page cache
    keeps what was read of a file until an `open` finds another size or mtime. SFTP carries whole
    seconds of mtime, so nodes cannot tell a file from another of the same size, put in its place
    within the same second: use `put`. Root on a node may read everything (no root squash).

    Raises BoxUnavailable where `missing()` says why.
    """

    def __init__(
        self,
        hosts: int = 8,
        rate_mbit: float | None = 200.0,
        *,
        directory: Path,
        disk_mib: int = 2048,
        attr_timeout_s: float = 0.0,
    ) -> None:
        assert 1 <= hosts <= NODES_MAX, f"{hosts} nodes"
        self.directory = directory.resolve(strict=True)
        self.export = self.directory / "export"
        self.rate_mbit = rate_mbit
        self._node_names = [f"node{number}" for number in range(1, hosts + 1)]
        self._disk_mib = disk_mib
        self._attr_timeout_s = attr_timeout_s
        self._cleanup = contextlib.ExitStack()
        self._put_mtime_s = int(time.time()) - 100_000  # far from the times of other writers
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> Box:
        reasons = missing()
        if reasons:
            raise BoxUnavailable("; ".join(reasons))
        try:
            self._set_up()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @property
    def nodes(self) -> list[Host]:
        return [self._hosts[name] for name in self._node_names]

    @property
    def head(self) -> Host:
        return self._hosts["head"]

    @property
    def fs(self) -> Host:
        return self._hosts["fs"]

    def put(self, name: str, data: bytes) -> Path:
        """Write a file of the export, or put another one in its place in one step, as `mv` does.

        Its mtime is in whole seconds, which nodes see exactly, and later than that of any earlier
        `put` of this box, so that nodes can tell the versions of a file apart.
        """
        path, beside = self.export / name, self.directory / "being_put"
        beside.write_bytes(data)
        self._put_mtime_s += 1
        os.utime(beside, (self._put_mtime_s, self._put_mtime_s))
        os.replace(beside, path)
        return path

    def _addresses(self) -> dict[str, str]:
        nodes = {name: f"10.77.1.{number}" for number, name in enumerate(self._node_names, 1)}
        return {"head": "10.77.0.1", "fs": "10.77.0.2", **nodes}

    def _set_up(self) -> None:
        self.directory.chmod(0o755)
        self.export.mkdir()
        addresses = self._addresses()
        (self.directory / "etc_hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        self._switch = _Keeper("", whole_host=False)
        self._cleanup.callback(self._switch.end)
        for name, address in addresses.items():
            self._hosts[name] = Host(name, address, self.directory, self._script)
            self._cleanup.callback(self._hosts[name].end)
        for keeper in [self._switch, *(host.keeper for host in self._hosts.values())]:
            keeper.wait_ready()
        self._connect()
        self.file_server = FileServer(self.fs, self.export)
        mounts = [self.file_server.mount(node, self._attr_timeout_s) for node in self.nodes]
        for mount in mounts:
            if mount.wait(START_TIMEOUT_S) != 0:
                raise BoxUnavailable(f"cannot mount the export: {mount.stderr}")

    def _connect(self) -> None:
        lines = ["link add name switch type bridge mcast_snooping 0"]
        for host in self._hosts.values():
            lines += [
                f"link add name {host.name} type veth peer name eth0 netns {host.keeper.pid}",
                f"link set dev {host.name} master switch up addrgenmode none",
            ]
        lines.append("link set dev switch up addrgenmode none")
        self._switch.call(["ip", "-batch", "-"], "\n".join(lines) + "\n")
        for host in self._hosts.values():
            host.plug_in(self._switch, self.rate_mbit)

    def _script(self, host: Host) -> str:
        """What makes a namespace a host of this box, for sh."""
        directory = shlex.quote(str(self.directory))
        prefixes = (Path(sys.prefix), Path(sys.base_prefix))
        kept = [self.directory, REPOSITORY, *(prefix.resolve() for prefix in prefixes)]
        return "\n".join(
            [
                "umask 022",
                LET_GO_OF_OTHERS,
                f"echo {host.name} > /proc/sys/kernel/hostname",
                # Whatever this machine's default is, figures shall be the same everywhere. reno is
                # the one that every kernel grants a namespace; at round trips as short as these,
                # cubic, most clusters' default, grows its window as reno does (RFC 9438, 4.3).
                "echo reno > /proc/sys/net/ipv4/tcp_congestion_control",
                "ip link set dev lo up",
                "mount -t tmpfs -o mode=755 run /run",
                "mount -t tmpfs -o mode=1777 var-tmp /var/tmp",
                *_open_ways(kept),
                f"mount --bind {directory}/etc_hosts /etc/hosts",
                f"mount -t tmpfs -o mode=755 hosts {directory}/hosts",
                f"mkdir -p {directory}/hosts/{host.name}/disk",
                f"mount -t tmpfs -o mode=1777,size={self._disk_mib}m disk"
                f" {directory}/hosts/{host.name}/disk",
            ]
        )


# -------------------------------------------------------------------------------- file server


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """One SFTP request of a node that was answered with data (a read) or brought some (a write).

    Times are those of `time.monotonic()` on this machine: `asked_s`, when the request reached the
    file server; `answered_s`, when the last byte of the answer was on its way. `length` is what was
    really read or written, in bytes, which at the end of a file is less than what was asked for.
    """

    asked_s: float
    answered_s: float
    host: str
    path: str
    offset: int
    length: int


@dataclasses.dataclass(slots=True)
class Burst:
    """A run of accesses of one host to nearly contiguous, growing offsets of one file."""

    host: str
    path: str
    begin_s: float
    end_s: float
    end_offset: int


class FileServer:
    """The export of `fs`: an SFTP server, and the witness of all that passes through it."""

    def __init__(self, host: Host, export: Path) -> None:
        self._host = host
        self._export = export
        self._journal = host.logs / "journal"
        self._journal.touch()
        script = [sys.executable, "-I", __file__, "serve", host.address, str(self._journal)]
        self.process = host.start(script, log="file-server")
        self.process.wait_for_stderr("file server ready", START_TIMEOUT_S)

    def mount(self, node: Host, attr_timeout_s: float) -> Process:
        """Start mounting the export on a node. The process ends when the mount is there."""
        options = {
            "directport": SFTP_PORT,
            # NFS: pages stay while size and mtime do, and are checked at each open.
            "auto_cache": None,
            "dir_cache": "no",
            "attr_timeout": attr_timeout_s,
            "ac_attr_timeout": attr_timeout_s,
            "entry_timeout": attr_timeout_s,
            "negative_timeout": 0,
            # Permissions as on the file server, for every user.
            "allow_other": None,
            "default_permissions": None,
        }
        text = ",".join(
            key if value is None else f"{key}={value}" for key, value in options.items()
        )
        return node.start(["sshfs", f"fs:{self._export}", self._export, "-o", text], log="sshfs")

    def reads(self, path: Path | None = None) -> list[Access]:
        """Every answered read so far, of one file or of all, by the time it was asked."""
        return self._accesses("read", path)

    def writes(self, path: Path | None = None) -> list[Access]:
        return self._accesses("write", path)

    def bytes_read(self, path: Path | None = None) -> int:
        """File bytes that were sent to nodes, each as often as it was sent."""
        return sum(access.length for access in self.reads(path))

    def readers_peak(self, path: Path | None = None, *, pause_s: float = 0.1) -> int:
        """The largest number of hosts that were reading at the same instant.

        A host reads from the first request of a *burst* to the answer of its last one. A burst is a
        run of reads by one host in one file in which every read begins near the end of what the run
        covers (at most `NEAR_BYTES` off, since the kernel reads ahead and out of order) and is
        asked at most `pause_s` after the run's last answer. So a host that is stopped or waits for
        a new lease does not count, one that digests a chunk between two reads does. Instants count
        that belong to two bursts' ends both, so the figure is rather too high than too low.
        """
        return _hosts_peak(_bursts(self.reads(path), pause_s))

    def transfers_peak(self, *, pause_s: float = 0.1) -> int:
        """The largest number of files that were read or written at the same instant.

        A file counts once for each host that has a burst in it, as for `readers_peak`.
        """
        accesses = sorted([*self.reads(), *self.writes()], key=lambda access: access.asked_s)
        bursts = _bursts(accesses, pause_s)
        return _peak((burst, (burst.host, burst.path)) for burst in bursts)

    def _accesses(self, kind: str, path: Path | None) -> list[Access]:
        found = []
        with open(self._journal, encoding="ascii") as journal:
            for line in journal:
                if not line.endswith("\n"):
                    break  # being written right now
                operation, *fields = json.loads(line)
                access = Access(*fields)
                if operation == kind and path in (None, Path(access.path)):
                    found.append(access)
        return sorted(found, key=lambda access: access.asked_s)


# How far a read may begin from the end of the burst that it belongs to: twice the 128 KiB that
# Linux reads ahead by default.
NEAR_BYTES = 256 * 1024


def _bursts(accesses: Iterable[Access], pause_s: float) -> list[Burst]:
    """`accesses`, in the order of `asked_s`, as bursts."""
    found: list[Burst] = []
    latest: dict[tuple[str, str], list[Burst]] = {}
    for access in accesses:
        bursts = latest.setdefault((access.host, access.path), [])
        bursts[:] = [burst for burst in bursts if access.asked_s - burst.end_s <= pause_s]
        near = [b for b in bursts if abs(access.offset - b.end_offset) <= NEAR_BYTES]
        if near:
            burst = min(near, key=lambda b: abs(access.offset - b.end_offset))
        else:
            burst = Burst(access.host, access.path, access.asked_s, access.answered_s, 0)
            bursts.append(burst)
            found.append(burst)
        burst.end_s = max(burst.end_s, access.answered_s)
        burst.end_offset = max(burst.end_offset, access.offset + access.length)
    return found


def _hosts_peak(bursts: Iterable[Burst]) -> int:
    """The largest number of hosts with a burst at one instant."""
    return _peak((burst, burst.host) for burst in bursts)


def _peak(bursts: Iterable[tuple[Burst, object]]) -> int:
    """The largest number of different things, each named beside its burst, with a burst at one
    instant; bursts are closed intervals."""
    edges = [
        edge
        for number, (burst, who) in enumerate(bursts)
        for edge in ((burst.begin_s, 0, number, who), (burst.end_s, 1, number, who))
    ]
    open_bursts: dict[object, int] = {}
    peak = 0
    for _, is_end, _, who in sorted(edges):
        open_bursts[who] = open_bursts.get(who, 0) + (-1 if is_end else 1)
        peak = max(peak, sum(count > 0 for count in open_bursts.values()))
    return peak


# ------------------------------------------------------------------------ swarmcache in a box


class Cluster:
    """swarmcache in a box: the tracker on `head`, a daemon on each node that was given one.

        cluster = Cluster(box, {"file_servers.default.slots_max": 2})
        cluster.start()
        gets = [cluster.get(node, file) for node in box.nodes]
        paths = [cluster.paths(get, timeout_s=60) for get in gets]

    `settings` are dotted keys of the configuration, for tracker and daemons alike. `tracker` and
    `daemons` (by name of host) are the processes that were started last.
    """

    PROGRAM = (os.fspath(Path(sys.executable).with_name("swarmcache")),)  # as it was installed
    SOCKET = Path("/run/swarmcache/daemon.sock")
    TRACKER_PORT = 7380
    DAEMON_PORT = 7381

    def __init__(self, box: Box, settings: Mapping[str, object] | None = None) -> None:
        self.box = box
        self._settings = dict(settings or {})
        self.secret_file = box.directory / "secret"
        self.secret_file.touch(mode=0o600)
        self.secret_file.write_text(os.urandom(32).hex() + "\n")
        self._tracker_address = f"{box.head.address}:{self.TRACKER_PORT}"
        self.tracker: Process | None = None
        self.daemons: dict[str, Process] = {}

    def start(self, nodes: Iterable[Host] | None = None) -> None:
        """The tracker, then a daemon on each of `nodes` (default: all); returns when all serve."""
        self.start_tracker()
        self.start_daemons(self.box.nodes if nodes is None else nodes)

    def start_tracker(self) -> Process:
        """Also after a `kill`: the state directory is the same."""
        state = self.box.head.disk / "tracker"
        arguments: list[Argument] = ["tracker", "--listen", self._tracker_address]
        arguments += ["--state-dir", state, "--secret-file", self.secret_file]
        process = self._command(self.box.head, arguments)
        process.wait_for_stderr("swarmcache tracker ready on", START_TIMEOUT_S)
        self.tracker = process
        return process

    def start_daemons(
        self,
        nodes: Iterable[Host],
        settings: Mapping[str, object] | None = None,
        *,
        program: Sequence[str] = PROGRAM,
    ) -> list[Process]:
        """Start daemons side by side, with further settings; returns when all serve.

        `program`: what the interpreter is to run instead of swarmcache as it is, such as `-c` and a
        script that breaks something first.
        """
        started = {node: self._daemon(node, settings or {}, program) for node in nodes}
        for process in started.values():
            process.wait_for_stderr("swarmcache daemon ready on", START_TIMEOUT_S)
        self.daemons.update((node.name, process) for node, process in started.items())
        return list(started.values())

    def get(
        self,
        node: Host,
        *files: Argument,
        options: Sequence[str] = (),
        uid: int = 0,
        gate: Gate | None = None,
    ) -> Process:
        """Start `swarmcache get` for `files` on `node`; it runs when the `gate` is opened."""
        return self.command(node, "get", *options, *files, uid=uid, gate=gate)

    def command(
        self, node: Host, *arguments: Argument, uid: int = 0, gate: Gate | None = None
    ) -> Process:
        """Start any `swarmcache` command that talks to the node's daemon."""
        env = {"SWARMCACHE_SOCKET": str(self.SOCKET)}
        return self._command(node, arguments, env, uid, gate=gate)

    @staticmethod
    def paths(get: Process, timeout_s: float) -> list[Path]:
        """What a `get` printed, one path a line. Raises ChildProcessError if it failed."""
        if get.wait(timeout_s) != 0:
            raise ChildProcessError(f"{get!r}: {get.stderr[-2000:]}")
        return [Path(line) for line in get.stdout.removesuffix("\n").split("\n")]

    def _daemon(
        self, node: Host, settings: Mapping[str, object], program: Sequence[str] = PROGRAM
    ) -> Process:
        arguments: list[Argument] = ["daemon", "--tracker", self._tracker_address]
        arguments += ["--listen", f"{node.address}:{self.DAEMON_PORT}"]
        arguments += ["--cache-dir", node.disk / "cache", "--socket", self.SOCKET]
        arguments += ["--secret-file", self.secret_file]
        return self._command(node, arguments, setting_variables(settings), program=program)

    def _command(
        self,
        host: Host,
        arguments: Sequence[Argument],
        env: Mapping[str, str] | None = None,
        uid: int = 0,
        program: Sequence[str] = PROGRAM,
        gate: Gate | None = None,
    ) -> Process:
        settings = setting_variables(self._settings)
        return host.start(
            [sys.executable, *program, *arguments],
            env={"PYTHONPATH": str(REPOSITORY), **settings, **(env or {})},
            uid=uid,
            log=f"swarmcache-{os.fsdecode(arguments[0])}",
            gate=gate,
        )


def setting_variables(settings: Mapping[str, object]) -> dict[str, str]:
    """The environment variables that override these settings, given by their dotted keys."""
    return {
        "SWARMCACHE_" + key.upper().replace(".", "__"): str(value)
        for key, value in settings.items()
    }


# ------------------------------------------------------------ the file server's own process

# draft-ietf-secsh-filexfer-02, version 3 of SFTP, which OpenSSH speaks
SSH_FXP_OPEN, SSH_FXP_CLOSE, SSH_FXP_READ, SSH_FXP_WRITE = 3, 4, 5, 6
SSH_FXP_STATUS, SSH_FXP_HANDLE, SSH_FXP_DATA = 101, 102, 103
PACKET_MAX_BYTES = 1024 * 1024
# The answers may run ahead of the wire by at most this much, so that `answered_s` means something.
UNSENT_MAX_BYTES = 64 * 1024


class _Connection:
    """One node's SFTP connection: passes packets on in both directions and keeps the journal."""

    def __init__(self, client: socket.socket, host: str, journal: int) -> None:
        self._client = client
        self._host = host
        self._journal = journal
        self._server = subprocess.Popen(
            [SFTP_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        # id of a request that waits for its answer: what, when, path, offset, length
        self._asked: dict[int, tuple[str, float, str, int, int]] = {}
        self._paths: dict[bytes, str] = {}

    def serve(self) -> None:
        """Until the node closes the connection."""
        answers = threading.Thread(target=self._pass_answers, daemon=True)
        answers.start()
        assert self._server.stdin is not None
        with self._client.makefile("rb") as requests:
            for packet in _packets(requests):
                self._note_request(packet, time.monotonic())
                _write_all(self._server.stdin.fileno(), packet)
        self._server.stdin.close()
        self._server.wait()
        answers.join()
        self._client.close()

    def _pass_answers(self) -> None:
        assert self._server.stdout is not None
        with os.fdopen(os.dup(self._server.stdout.fileno()), "rb", 256 * 1024) as answers:
            for packet in _packets(answers):
                # Before it is passed on: the next request may come with the handle at once.
                if packet[4] == SSH_FXP_HANDLE:
                    self._note_handle(packet)
                try:
                    self._client.sendall(packet)
                except (ConnectionResetError, BrokenPipeError):
                    return  # the node is gone; `serve` notices as well
                if packet[4] in (SSH_FXP_DATA, SSH_FXP_STATUS):
                    self._note_answer(packet, time.monotonic())

    def _note_request(self, packet: bytes, now_s: float) -> None:
        kind, request = packet[4], int.from_bytes(packet[5:9], "big")
        if kind == SSH_FXP_OPEN:
            path, _ = _string(packet, 9)
            self._asked[request] = ("open", now_s, os.fsdecode(path), 0, 0)
        elif kind in (SSH_FXP_READ, SSH_FXP_WRITE):
            handle, end = _string(packet, 9)
            offset, length = struct.unpack_from(">QI", packet, end)
            what = "read" if kind == SSH_FXP_READ else "write"
            self._asked[request] = (what, now_s, self._paths[handle], offset, length)

    def _note_handle(self, packet: bytes) -> None:
        opened = self._asked.pop(int.from_bytes(packet[5:9], "big"), None)
        if opened is not None:
            handle, _ = _string(packet, 9)
            self._paths[handle] = opened[2]

    def _note_answer(self, packet: bytes, now_s: float) -> None:
        """A read ends with data, a write with status 0; other answers carry no file bytes."""
        asked = self._asked.pop(int.from_bytes(packet[5:9], "big"), None)
        if asked is None:
            return
        what, asked_s, path, offset, length = asked
        number = int.from_bytes(packet[9:13], "big")  # length of the data, or the status
        if packet[4] == SSH_FXP_DATA:
            length = number
        elif what != "write" or number != 0:
            return
        line = json.dumps([what, asked_s, now_s, self._host, path, offset, length])
        os.write(self._journal, line.encode("ascii") + b"\n")


def _packets(stream: BinaryIO) -> Iterator[bytes]:
    """The SFTP packets of a stream, each with its four bytes of length, until it ends."""
    while True:
        try:
            head = stream.read(4)
            size = int.from_bytes(head, "big")
            if len(head) < 4:
                return
            assert size <= PACKET_MAX_BYTES, f"SFTP packet of {size} bytes"
            body = stream.read(size)
        except ConnectionResetError:
            return
        if len(body) < size:
            return
        yield head + body


def _string(packet: bytes, start: int) -> tuple[bytes, int]:
    """The string at `start`, and where it ends."""
    begin = start + 4
    end = begin + int.from_bytes(packet[start:begin], "big")
    return packet[begin:end], end


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _serve(address: str, journal_file: str) -> None:
    """Accept connections of nodes for ever."""
    journal = os.open(journal_file, os.O_WRONLY | os.O_APPEND)
    listener = socket.create_server((address, SFTP_PORT), backlog=NODES_MAX)
    print("file server ready", file=sys.stderr, flush=True)
    while True:
        client, (client_address, _) = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_MAX_BYTES)
        name = socket.gethostbyaddr(client_address)[0]
        connection = _Connection(client, name, journal)
        threading.Thread(target=connection.serve, daemon=True).start()


if __name__ == "__main__":
    _serve(*sys.argv[2:])
