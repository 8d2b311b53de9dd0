"""When a tracker grants nothing, since another may have done so in its place.

Pure logic, and a part of ``TrackerState``. While the tracker is away a daemon may stand in for it
(``stand_in.py``), whose leases are out when it comes back. It cannot ask for them all, but they
end: a stand-in notices within ``STAND_IN_NOTICES_S`` that the tracker is back, and renews nothing.

How a tracker knows that it was away: it was started long after it was last there, which its journal
tells; time went on while it stood still; all its nodes have gone at once, as when its machine was
cut off; or, having granted nothing in its life, it is told of a stand-in by a node that comes back.

Invariant: nothing is granted while a stand-in that can reach the tracker may have leases out.
"""

from __future__ import annotations

# A dead node's slot is free again after this long; a holder renews three times within it.
LEASE_S = 3.0
# A stand-in grants nothing before it has been without a tracker for so long, by when all that its
# predecessor has granted has run out. It tries the tracker's address every 1.0 s, for 1.5 s each
# time, so it notices within this that the tracker is back.
STAND_IN_GRANTS_S = 5.0
STAND_IN_NOTICES_S = 3.0
# So nobody can have granted anything for a tracker that was away for no longer than this.
AWAY_MAX_S = STAND_IN_GRANTS_S - STAND_IN_NOTICES_S
HANDOVER_S = STAND_IN_NOTICES_S + LEASE_S
# How often a tracker makes sure, and notes, that it is there.
PRESENT_S = 0.5
# Nodes that were lost within so long have gone at once: connections to a machine that is cut off
# end when two pings were not answered, which is not at the same time for all.
AT_ONCE_S = 15.0

assert STAND_IN_GRANTS_S > LEASE_S, "a stand-in would grant what its predecessor has granted"
assert PRESENT_S < AWAY_MAX_S, "a tracker would always seem to have been away"


class Handover:
    """Of one life of a tracker. ``away_s``: how long it was away before, None for never there.

    ``holding``: nothing is to be granted. ``grants_from_s``: not before that in any case.
    """

    def __init__(self, now_s: float, away_s: float | None, grants_from_s: float) -> None:
        self.until_s = grants_from_s
        self.present_at_s = now_s + PRESENT_S
        self._granted = False
        self._gone: dict[str, float] = {}  # nodes that were lost, in the order of time
        self._alone = False
        if away_s is not None and away_s > AWAY_MAX_S:
            self._hold(now_s)
        self.holding = now_s < self.until_s

    def at(self, now_s: float) -> None:
        """Time has gone on; to be called before anything else is."""
        if now_s > self.present_at_s - PRESENT_S + AWAY_MAX_S:
            self._hold(now_s)
        self.holding = now_s < self.until_s

    def present(self, now_s: float) -> bool:
        """Whether it is to be noted again that the tracker is there, and nobody else."""
        if now_s < self.present_at_s:
            return False
        self.present_at_s = now_s + PRESENT_S
        return not self.holding  # or else its next life would not know that it must wait

    def granted(self) -> None:
        """A lease is out."""
        assert not self.holding, "granted while a stand-in may have leases out"
        self._granted = True

    def lost(self, node: str, now_s: float, nodes_left: int) -> None:
        """The connection of a node has ended; so many have one still."""
        self._gone[node] = now_s
        self._alone = not nodes_left
        for other, lost_s in list(self._gone.items()):
            if now_s - lost_s <= AT_ONCE_S:
                break
            del self._gone[other]

    def registered(self, node: str, stood_in: bool, now_s: float) -> None:
        """A node has come, or come back. ``stood_in``: it was with a stand-in meanwhile."""
        self._gone.pop(node, None)
        if (self._alone and self._gone) or (stood_in and not self._granted):
            self._hold(now_s)
        self._alone = False

    def _hold(self, now_s: float) -> None:
        if now_s >= self.until_s:  # or else whoever comes late would hold up all others again
            self.until_s = now_s + HANDOVER_S
        self.holding = now_s < self.until_s

    def check(self) -> None:
        """Assert what must always be so."""
        assert self.until_s >= 0 and self.present_at_s >= 0, "a time before the boot"
