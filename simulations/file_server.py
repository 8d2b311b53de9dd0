"""A simulated file server: its links, what its files are now, and who reads or writes there.

Who writes under a slot is a reader to it. It counts them itself, whatever the tracker believes.
With ``cost_per_reader`` c, n of them together get ``rate / (1 + c * (n - 1))``: real ones thrash.

Invariant, checked whenever a reader comes: no more than ``slots_max`` nodes read at once. Not
counted is what ARCHITECTURE.md names as the remainder: one piece that was asked for under a lease,
and that takes longer than ``LEASE_MARGIN_S``, when the lease has run out on its holder's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from simulations.engine import SimulationFailed
from simulations.network import Link, Network
from swarmcache.chunks import FileVersion
from swarmcache.tracker_state import LEASE_MARGIN_S


class Reader(Protocol):
    """One node that reads. ``piece_since_s``: when it asked for what is on its way now."""

    piece_since_s: float

    def lease_is_over(self, now_s: float) -> bool:
        """Its lease has run out on its own clock."""


@dataclass(frozen=True, slots=True)
class FileServerSettings:
    """Rates in bytes/s."""

    rate: float
    slots_max: int
    cost_per_reader: float = 0.0


class FileServer:
    """One file server."""

    def __init__(self, name: str, network: Network, settings: FileServerSettings) -> None:
        self.name = name
        self.up = Link("file server", settings.rate)
        self.down = Link("file server, writes", settings.rate)
        self.slots_max = settings.slots_max
        self.readers: dict[Reader, None] = {}
        self.readers_peak = 0
        self.checked = 0
        # How many read from when on.
        self.history: list[tuple[float, int]] = [(0.0, 0)]
        self.current: dict[bytes, FileVersion] = {}  # by path
        self._settings = settings
        self._network = network
        self._slowness = 1.0

    def enter(self, reader: Reader, now_s: float) -> None:
        """A node begins to read. Raises SimulationFailed when there are too many."""
        self.readers[reader] = None
        count = len(self.readers)
        self.checked += 1
        if count > self.slots_max:
            count -= sum(self._is_remainder(each, now_s) for each in self.readers)
        if count > self.slots_max:
            raise SimulationFailed(
                f"{count} readers of {self.name} at {now_s:.6f} s, but {self.slots_max} slots"
            )
        self.readers_peak = max(self.readers_peak, count)
        self._changed()

    def leave(self, reader: Reader) -> None:
        """A node reads no more."""
        if self.readers.pop(reader, reader) is None:
            self._changed()

    def slow_down(self, slowness: float) -> None:
        """Everything takes so many times as long from now on; 1 is normal."""
        self._slowness = slowness
        self._adapt(always=True)

    def is_current(self, version: FileVersion) -> bool:
        """The file is still this file version."""
        return self.current.get(version.path) == version

    @staticmethod
    def _is_remainder(reader: Reader, now_s: float) -> bool:
        return reader.piece_since_s + LEASE_MARGIN_S <= now_s and reader.lease_is_over(now_s)

    def _changed(self) -> None:
        self.history.append((self._network.now_s, len(self.readers)))
        self._adapt()

    def _adapt(self, *, always: bool = False) -> None:
        cost = self._settings.cost_per_reader
        if cost or always:
            others = max(len(self.readers) - 1, 0)
            rate = self._settings.rate / self._slowness / (1 + cost * others)
            if rate != self.up.rate:
                self._network.set_rate(self.up, rate)
                self._network.set_rate(self.down, rate)
