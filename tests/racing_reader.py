"""A job that uses cached files in every way, and makes sure that they stay what they are meanwhile.

    python -m tests.racing_reader SOCKET SEED ROUNDS MIN_AGE_S SOURCE...

Prints how often what happened, as JSON; ends with a traceback as soon as a file is missing that
must be there, or is not the one that was asked for. Every round asks the daemon for other files
too, so that it has to evict while this process has a file open, mapped or held.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from blake3 import blake3

from swarmcache.client import Client
from swarmcache.local_socket import ANSWER_BYTES_MAX, Connection

OTHERS_MAX = 6  # files that are asked for while another one is in use


class Reader:
    def __init__(self, socket: str, rng: Random, min_age_s: float, sources: Sequence[Path]) -> None:
        self.happened: Counter[str] = Counter()
        self._socket = socket
        self._client = Client(socket)
        self._rng = rng
        self._min_age_s = min_age_s
        self._sources = sources
        self._digests = {source: blake3(source.read_bytes()).digest() for source in sources}

    def read(self) -> None:
        """Ask for a file and use it, in one of the ways."""
        source = self._rng.choice(self._sources)
        ways = [self._open, self._map, self._hold, self._come_late]
        self._rng.choice(ways)(source)

    def _get(self, source: Path) -> tuple[str | None, float]:
        """The path of the copy, if there is one, and a time before it was printed."""
        began_s = time.monotonic()
        answer = self._client.get(source)
        self.happened["hit" if answer.hit else "fetched" if answer.cached else "original"] += 1
        if not answer.cached:
            assert answer.path == str(source), answer
        return answer.path if answer.cached else None, began_s

    def _open_in_time(self, path: str, source: Path, began_s: float) -> int | None:
        """A descriptor of the copy; None where this process has come too late itself."""
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            fd = None
        took_s = time.monotonic() - began_s
        if fd is not None and os.fstat(fd).st_nlink > 0:
            return fd
        assert took_s > self._min_age_s, f"{path} was gone {took_s:.4f} s after it was printed"
        if fd is None:
            self.happened["too late"] += 1
        else:  # the open had begun when the file was taken away, and had to wait for that
            with os.fdopen(fd, "rb") as file:
                self._check(source, file.read(), "opened while it was evicted")
        return None

    def _open(self, source: Path) -> None:
        path, began_s = self._get(source)
        if path and self._rng.random() < 0.5:  # as a job that does something else first
            self._keep_busy_until(began_s + 0.7 * self._min_age_s)
        fd = self._open_in_time(path, source, began_s) if path else None
        if path is None or fd is None:
            return
        self._use_others()
        self._check_there(path, os.fstat(fd).st_ino)
        with os.fdopen(fd, "rb") as file:
            self._check(source, file.read(), "opened")

    def _map(self, source: Path) -> None:
        path, began_s = self._get(source)
        fd = self._open_in_time(path, source, began_s) if path else None
        if path is None or fd is None:
            return
        inode = os.fstat(fd).st_ino
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
            os.close(fd)
            self._use_others()
            self._check_there(path, inode)
            self._check(source, mapping, "mapped")

    def _hold(self, source: Path) -> None:
        connection = Connection(os.fsencode(self._socket))
        path64 = base64.b64encode(os.fsencode(source)).decode()
        request = json.dumps({"op": "get", "path": path64, "hold": 1}).encode() + b"\n"
        with source.open("rb") as file:
            connection.send(request, file.fileno())
            answer = json.loads(connection.receive_line(ANSWER_BYTES_MAX))
        if answer["answer"] == "cached":
            path = os.fsdecode(base64.b64decode(answer["path"]))
            self._keep_busy_until(time.monotonic() + 1.5 * self._min_age_s)
            self._check(source, Path(path).read_bytes(), "held")
        connection.close()

    def _come_late(self, source: Path) -> None:
        """What comes later finds the file, or nothing: never half of it, or another one."""
        path, _ = self._get(source)
        if path is None:
            return
        self._keep_busy_until(time.monotonic() + 1.5 * self._min_age_s)
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            self.happened["gone after min_age"] += 1
        else:
            self._check(source, data, "there after min_age")

    def _use_others(self) -> None:
        for _ in range(self._rng.randrange(OTHERS_MAX)):
            source = self._rng.choice(self._sources)
            path, began_s = self._get(source)
            fd = self._open_in_time(path, source, began_s) if path else None
            if fd is not None:
                with os.fdopen(fd, "rb") as file:
                    self._check(source, file.read(), "read")

    def _keep_busy_until(self, until_s: float) -> None:
        """Have the daemon evict."""
        while time.monotonic() < until_s:
            self._get(self._rng.choice(self._sources))

    def _check_there(self, path: str, inode: int) -> None:
        try:
            status = os.stat(path)
        except FileNotFoundError as error:
            raise AssertionError(f"{path} is gone while it is in use") from error
        assert status.st_ino == inode, f"{path} is another file while it is in use"

    def _check(self, source: Path, data: bytes | mmap.mmap, how: str) -> None:
        assert blake3(data).digest() == self._digests[source], f"{source}: wrong bytes"
        self.happened[how] += 1


def main() -> None:
    socket, seed, rounds, min_age_s, *sources = sys.argv[1:]
    reader = Reader(socket, Random(int(seed)), float(min_age_s), [Path(each) for each in sources])
    for _ in range(int(rounds)):
        reader.read()
    print(json.dumps(reader.happened))


if __name__ == "__main__":
    main()
