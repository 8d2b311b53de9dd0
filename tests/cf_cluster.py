"""Three nodes with ``cf`` installed, for the table of scenarios in ``test_cf_scenarios.py``.

    with CfCluster(directory) as it:
        file = it.file("corpus")
        it.cf(it.here, file).copied(file)
        it.cf(it.a, file).copied_from_peers(file)

``here`` and ``b`` keep what was used within the last hour, ``a`` nothing that is not in use. ``b``
waits for ``STALL_S`` only where there is no progress.
``cf`` is started by its installed path and without any environment variable.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarmcache.cf_install import install
from swarmcache.partial_store import UNCOUNTED_MAX_BYTES
from tests.box import Box, Host, Process
from tests.swarm_helpers import MIB, TRANSFER_S, Swarm

FILE_BYTES = MIB
ROOM_BYTES = MIB // 2  # where there is to be no room for a file
MIN_FREE_BYTES = 32 * MIB
# A file of 8 MiB takes 4 s.
SLOW_MBIT = 16.0
STALL_S = 3
# Takes longer than that without progress after which ``b`` gives up, and longer than a lease.
SLOW_BYTES = int(1.3 * STALL_S * SLOW_MBIT * 1e6 / 8)


class Call:
    """One ``cf`` on a node, running or ended, and what is expected of it."""

    def __init__(self, process: Process, node: Host) -> None:
        self.process = process
        self.node = node

    @property
    def told(self) -> list[str]:
        """The lines on stderr, once it has ended."""
        self.process.wait(TRANSFER_S)
        return self.process.stderr.splitlines()

    @property
    def printed(self) -> list[str]:
        self.process.wait(TRANSFER_S)
        return self.process.stdout.removesuffix("\n").split("\n") if self.process.stdout else []

    def tells(self, *patterns: str) -> Call:
        """For each pattern a line of its own that matches as a whole, in this order."""
        lines = iter(self.told)
        for pattern in patterns:
            assert any(re.fullmatch(pattern, line) for line in lines), (pattern, self.told)
        return self

    def tells_not(self, pattern: str) -> Call:
        assert not any(re.search(pattern, line) for line in self.told), (pattern, self.told)
        return self

    def exits(self, code: int) -> Call:
        assert self.process.wait(TRANSFER_S) == code, self.told
        return self

    def prints(self, *lines: str | Path) -> Call:
        assert self.printed == [str(line) for line in lines], self.told
        return self

    # What most rows expect of a get

    def copied(self, file: Path) -> Call:
        """From the file server, at least in part."""
        return self.tells(re.escape(f"LOG: copied {file}"))._has_cached(file)

    def copied_from_peers(self, file: Path) -> Call:
        return self.tells(re.escape(f"LOG: copied peers:{file}"))._has_cached(file)

    def used_existing(self, file: Path) -> Call:
        return self.tells("LOG: using existing file")._has_cached(file)

    def original(self, file: Path) -> Call:
        """Nothing could be cached; the file itself is printed, and the job goes on."""
        return self.exits(0).prints(file)

    def _has_cached(self, file: Path) -> Call:
        self.exits(0)
        (line,) = self.printed
        path = Path(line)
        assert path != file, self.told
        assert path.is_relative_to(self.node.disk)
        assert str(path).endswith(str(file))
        assert path.read_bytes() == file.read_bytes()
        assert int(path.stat().st_mtime) == int(file.stat().st_mtime)
        return self

    @property
    def copy(self) -> Path:
        """The only path that was printed."""
        (line,) = self.printed
        return Path(line)


class CfCluster:
    """The cluster, its files, and what a row may do to them."""

    def __init__(self, directory: Path) -> None:
        self.box = Box(hosts=3, rate_mbit=None, directory=directory, disk_mib=256)
        self.program = directory / "usr/local/bin/cf"
        install(directory / "usr/local")

    def __enter__(self) -> CfCluster:
        self.box.__enter__()
        try:
            self._start()
        except BaseException:
            self.box.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.box.__exit__(None, None, None)

    def _start(self) -> None:
        settings = {
            "file_servers.default.slots_max": 1,
            "cache.min_free": MIN_FREE_BYTES,
        }
        self.swarm = Swarm(self.box, settings)
        self.here, self.a, self.b = self.box.nodes
        self.swarm.cluster.start_tracker()
        self.swarm.cluster.start_daemons([self.here])
        self.swarm.cluster.start_daemons([self.a], {"cache.min_age": "0s"})
        self.swarm.cluster.start_daemons([self.b], {"get.stall": f"{STALL_S}s"})
        self.swarm.wait_for_tracker(self.box.nodes)

    # Files

    def file(self, name: str, size_bytes: int = FILE_BYTES) -> Path:
        """A file of random bytes on the file server, new or in the place of another."""
        return self.box.put(name, os.urandom(size_bytes))

    def files(self, name: str, count: int, size_bytes: int = FILE_BYTES) -> list[Path]:
        return [self.file(f"{name}.{number}", size_bytes) for number in range(1, count + 1)]

    def bundle(self, name: str, members: list[Path]) -> Path:
        return self.box.put(name, "".join(f"{member}\n" for member in members).encode())

    def local(self, node: Host, name: str, size_bytes: int = FILE_BYTES) -> Path:
        """A file on a node's own disk."""
        path = node.disk / name
        path.write_bytes(os.urandom(size_bytes))
        return path

    @contextmanager
    def room(self, node: Host, room_bytes: int = ROOM_BYTES) -> Iterator[None]:
        """Somebody else fills the node's disk until the cache has no more room than that."""
        status = os.statvfs(node.disk)
        kept_bytes = MIN_FREE_BYTES + UNCOUNTED_MAX_BYTES + room_bytes
        size_bytes = status.f_bavail * status.f_frsize - kept_bytes
        assert size_bytes > 0
        filler = node.disk / "filler"
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        try:
            yield
        finally:
            filler.unlink()

    # Links

    @contextmanager
    def slow(self, host: Host) -> Iterator[None]:
        host.shape(up_mbit=SLOW_MBIT, down_mbit=SLOW_MBIT)
        try:
            yield
        finally:
            host.shape(up_mbit=None, down_mbit=None)

    # Commands

    def cf(self, node: Host, *words: str | Path, online: bool = True) -> Call:
        """Start ``cf`` with an empty environment, or with one where it finds no daemon."""
        environment = [] if online else ["SWARMCACHE_SOCKET=/run/nobody"]
        process = node.start(["env", "-i", *environment, self.program, *words], log="cf")
        return Call(process, node)

    def get(self, node: Host, file: Path) -> Path:
        """Cache a file as a preparation, and tell where."""
        return self.cf(node, file).exits(0).copy

    def wait_for_bytes(self, node: Host) -> None:
        """Until the node has fetched something of what it is fetching."""
        self.swarm.wait_for_done(node, 1)

    def forget(self, node: Host, *files: Path) -> None:
        """Take copies out of the node's cache."""
        removed = self.swarm.cluster.command(node, "rm", *files)
        assert removed.wait(TRANSFER_S) == 0, removed.stderr

    def forget_all(self, node: Host) -> None:
        if self.swarm.status(node)["node"]["disk"]["file_count"]:
            self.forget(node, Path("/"))

    def restart_tracker(self, *, forget: bool = False) -> None:
        """Kill it and start it again, perhaps without what it had on its disk."""
        tracker = self.swarm.cluster.tracker
        assert tracker is not None
        self.box.head.kill(tracker)
        if forget:
            shutil.rmtree(self.box.head.disk / "tracker")
        self.swarm.cluster.start_tracker()
        self.swarm.wait_for_tracker(self.box.nodes)
