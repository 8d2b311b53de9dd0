"""Some nodes of the cluster, remembered across restarts: whom to turn to when the tracker is away.

    <cache.dir>/.swarmcache/peers       "epoch NUMBER", "time BOOT NUMBER" if it is known, then
                                        one advertised address a line

The epoch is that of this daemon's life, so that the next one has a higher one whatever the clock
says. The time is what the tracker's clock was ahead of this machine's steady clock, in ms; it holds
until the next boot. Nothing is synced: who has lost the file asks the tracker.
"""

from __future__ import annotations

import os

from swarmcache.clock import boot_id
from swarmcache.gossip_records import EPOCH_MAX

PEERS_MAX = 64
BYTES_MAX = 64 << 10
# More than any epoch has; and Python reads numbers of thousands of digits slowly, or not at all.
DIGITS_MAX = 40
_NAME, _NEXT_NAME = "peers", "peers.next"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PeersFile:
    """The file in an open directory of the daemon's own: nothing lands below a mount point whose
    disk has gone. May be used in any thread, by one at a time.

    ``offset_s``: see ``ClusterTime``; None if the tracker has not told it since the machine booted.
    Whoever sets it has it written with the next ``write``."""

    def __init__(self, directory: str) -> None:
        """Raises OSError."""
        self._directory_fd = os.open(directory, _DIRECTORY)
        self._boot = boot_id().hex()
        self.epoch, self.offset_s, self.peers = self._read()

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
        lines = [f"epoch {self.epoch}", *self.peers]
        if self.offset_s is not None:
            lines.insert(1, f"time {self._boot} {round(self.offset_s * 1000)}")
        text = "".join(f"{line}\n" for line in lines)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_NEXT_NAME, flags, 0o600, dir_fd=self._directory_fd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        os.rename(_NEXT_NAME, _NAME, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)

    def _read(self) -> tuple[int, float | None, list[str]]:
        """What the file says; nothing if it is not there, or damaged."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(_NAME, flags, dir_fd=self._directory_fd)
        except FileNotFoundError:
            return 0, None, []
        try:
            lines = os.read(fd, BYTES_MAX).decode(errors="replace").splitlines()
        finally:
            os.close(fd)
        word, _, number = (lines or [""])[0].partition(" ")
        if word != "epoch" or not _is_number(number):
            return 0, None, []
        epoch, peers = min(int(number), EPOCH_MAX - 1), lines[1:]
        if not (peers and peers[0].startswith("time ")):
            return epoch, None, peers[:PEERS_MAX]
        _, boot, offset = (*peers[0].split(" "), "", "")[:3]
        known = boot == self._boot and _is_number(offset)
        return epoch, int(offset) / 1000 if known else None, peers[1 : 1 + PEERS_MAX]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX
