"""Some nodes of the cluster, remembered across restarts: whom to turn to when the tracker is away.

    <cache.dir>/.swarmcache/peers       "epoch NUMBER", then one advertised address a line

The epoch is that of this daemon's life, so that the next one has a higher one whatever the clock
says. Nothing is synced: who has lost the file asks the tracker.
"""

from __future__ import annotations

import os

from swarmcache.gossip_records import EPOCH_MAX

PEERS_MAX = 64
BYTES_MAX = 64 << 10
_NAME, _NEXT_NAME = "peers", "peers.next"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PeersFile:
    """The file in an open directory of the daemon's own: nothing lands below a mount point whose
    disk has gone. May be used in any thread, by one at a time."""

    def __init__(self, directory: str) -> None:
        """Raises OSError."""
        self._directory_fd = os.open(directory, _DIRECTORY)
        self.epoch, self.peers = self._read()

    def close(self) -> None:
        os.close(self._directory_fd)

    def begin(self, time_ms: int) -> int:
        """The epoch of a new life, which is noted: higher than all before. Raises OSError."""
        self.epoch = min(max(time_ms, self.epoch + 1), EPOCH_MAX)
        self.write(self.peers)
        return self.epoch

    def write(self, peers: list[str]) -> None:
        """Keep these, ``PEERS_MAX`` at most. Raises OSError."""
        self.peers = peers[:PEERS_MAX]
        text = "".join(f"{line}\n" for line in (f"epoch {self.epoch}", *self.peers))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_NEXT_NAME, flags, 0o600, dir_fd=self._directory_fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        os.rename(_NEXT_NAME, _NAME, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)

    def _read(self) -> tuple[int, list[str]]:
        """What the file says; nothing if it is not there, or damaged."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(_NAME, flags, dir_fd=self._directory_fd)
        except FileNotFoundError:
            return 0, []
        try:
            lines = os.read(fd, BYTES_MAX).decode(errors="replace").splitlines()
        finally:
            os.close(fd)
        word, _, number = (lines or [""])[0].partition(" ")
        if word != "epoch" or not (number.isascii() and number.isdigit()):
            return 0, []
        return min(int(number), EPOCH_MAX - 1), lines[1 : 1 + PEERS_MAX]
