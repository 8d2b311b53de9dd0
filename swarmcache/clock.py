"""The one clock of tracker and daemons."""

from __future__ import annotations

import os
import time
from pathlib import Path


def now_s() -> float:
    """Seconds since the machine booted. Goes on while the machine is suspended (unlike
    ``time.monotonic``), so that a lease runs out even if its holder sleeps, and never jumps when
    somebody sets the time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> bytes:
    """16 bytes that change when the machine is started, or with every call if that is unknown."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except FileNotFoundError:
        return os.urandom(16)
    return bytes.fromhex(text.strip().replace("-", ""))
