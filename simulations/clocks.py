"""Clocks of simulated machines, which differ and run at slightly different rates.

A machine's clock counts from its last boot, as ``swarmcache.clock`` does, and nobody can set it. So
clocks never step; they begin anew with a reboot.
"""

from __future__ import annotations


class Clock:
    """``offset_s`` is what it showed at virtual time zero; ``rate`` how many of its seconds pass in
    one virtual second."""

    __slots__ = ("offset_s", "rate")

    def __init__(self, offset_s: float = 0.0, rate: float = 1.0) -> None:
        assert rate > 0
        self.offset_s = offset_s
        self.rate = rate

    def read(self, virtual_s: float) -> float:
        """What the clock shows at this virtual time."""
        return virtual_s * self.rate + self.offset_s

    def when(self, clock_s: float) -> float:
        """The virtual time at which the clock shows this, but for rounding."""
        return (clock_s - self.offset_s) / self.rate

    def reboot(self, virtual_s: float) -> None:
        """The machine boots now: its clock shows zero."""
        self.offset_s = -virtual_s * self.rate
