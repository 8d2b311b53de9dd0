"""The smallest list of faults with which a plan still fails, so that a person can follow it.

Delta debugging (Zeller and Hildebrandt, IEEE Trans. Software Eng. 2002): parts of the list are left
out, halves first, single faults in the end, for as long as the rest fails as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulations.faults import Fault
from simulations.plans import Plan
from simulations.seed_run import run_plan


def shrink(plan: Plan) -> list[Fault]:
    """Faults of which none can be left out, or the plan would not fail. It must fail with all."""

    def fails(faults: Sequence[Fault]) -> bool:
        return run_plan(plan, faults).failure is not None

    return smallest(list(plan.faults), fails)


def smallest(faults: list[Fault], fails: Callable[[Sequence[Fault]], bool]) -> list[Fault]:
    """Part of a list for which ``fails`` still holds, and for which it does not without any one."""
    parts = 2
    if fails([]):
        return []
    while len(faults) > 1:
        size = -(-len(faults) // parts)
        for start in range(0, len(faults), size):
            rest = faults[:start] + faults[start + size :]
            if fails(rest):
                faults = rest
                parts = max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(parts * 2, len(faults))
    return faults
