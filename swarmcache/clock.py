"""The one clock of tracker and daemons."""

from __future__ import annotations

import time


def now_s() -> float:
    """Seconds since the machine booted. Goes on while the machine is suspended (unlike
    ``time.monotonic``), so that a lease runs out even if its holder sleeps, and never jumps when
    somebody sets the time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
