"""Since when the wall clock can be relied on for saying how long something has not been used.

Pure logic. Times of use are noted by the wall clock, for they must outlive reboots. But a wall
clock may be set: one that jumps ahead by a year makes everything a year older at once. So every
look at it is compared with the one before. While the machine runs, the time since its boot tells
how far the clock may have come. Across a reboot nothing tells; a clock that has gone back, or
further ahead than a machine is off as a rule, is taken for one that was set.

Invariant: what ``unused_since_s`` allows to go has not been used for ``max_age_s``, or for half of
that where the clock was set while the machine was off.
"""

from __future__ import annotations

from dataclasses import dataclass

# Two clocks may drift apart, or be drawn together by NTP, by less than this between two looks.
STEP_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class ClockReading:
    """One look at the clocks. ``wall_s``: since the epoch; ``up_s``: since the boot ``boot_id``.

    ``steady_since_s``: by the wall clock, when it was last seen to have been set.
    """

    wall_s: float
    up_s: float
    boot_id: bytes
    steady_since_s: float


def read_clock(
    former: ClockReading | None, wall_s: float, up_s: float, boot_id: bytes, max_age_s: float
) -> ClockReading:
    """The next look; ``former`` is the one before, None if there was none."""
    steady_since_s = wall_s
    if former is not None and _plausible(former, wall_s, up_s, boot_id, max_age_s):
        steady_since_s = former.steady_since_s
    return ClockReading(wall_s, up_s, boot_id, steady_since_s)


def _plausible(
    former: ClockReading, wall_s: float, up_s: float, boot_id: bytes, max_age_s: float
) -> bool:
    passed_s = wall_s - former.wall_s
    if boot_id == former.boot_id:
        return abs(passed_s - (up_s - former.up_s)) <= STEP_MAX_S
    return -STEP_MAX_S <= passed_s <= max_age_s / 2


def unused_since_s(reading: ClockReading, max_age_s: float) -> float | None:
    """What was last used by then has not been used for too long; None: nobody can tell yet."""
    since_s = reading.wall_s - max_age_s
    return since_s if reading.steady_since_s <= since_s else None
