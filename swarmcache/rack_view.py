"""What a download knows of its own rack: who else is in it, and what they are bringing in.

Pure logic, and a part of ``Download``: it sends nothing and asks for nothing.

Between racks there is less room than within one. So each chunk should come into a rack once, and
spread in there. Nodes see to that without a leader: whoever asks for a chunk in another rack says
so to its neighbours in its own, which then leave that chunk alone for a while. If it does not come
(the node has died, or its peer is slow) they forget what they were told, and may ask for it, too.

Invariant: every chunk that is coming is brought by a node of this rack that is a neighbour, and
has a time at which that is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from swarmcache.chunks import chunks_in, mask_of
from swarmcache.timers import Timers

# How long a chunk that a neighbour fetches from elsewhere is left to it, if no more is heard of it:
# as long as a transfer may stand still (``download.STALL_S``), after which it ends.
COMING_S = 2.0


class RackView:
    """The neighbours of one download that are in the rack of this node. ``rack``: its label."""

    def __init__(self, rack: str) -> None:
        self.label = rack
        self._others: set[str] = set()
        self._coming = 0
        self._by: dict[int, str] = {}
        self._timers: Timers[int] = Timers()

    def __bool__(self) -> bool:
        """Somebody else is here."""
        return bool(self._others)

    def __contains__(self, node: str) -> bool:
        return node in self._others

    def meet(self, node: str, rack: str) -> bool:
        """A neighbour has come; whether it is in this rack. Without a label nobody is."""
        if not rack or rack != self.label:
            return False
        self._others.add(node)
        return True

    def part(self, node: str) -> None:
        """A neighbour is gone, and brings nothing any more."""
        self._others.discard(node)
        for chunk in [chunk for chunk, by in self._by.items() if by == node]:
            self._forget(chunk)

    def brings(self, node: str, chunks: Sequence[int], now_s: float) -> None:
        """A neighbour says which chunks it is fetching from another rack: these, and no others."""
        if node not in self._others:
            return
        former = [chunk for chunk, by in self._by.items() if by == node]
        for chunk in former:
            if chunk not in chunks:
                self._forget(chunk)
        for chunk in chunks:
            if self._by.setdefault(chunk, node) == node:
                self._coming |= 1 << chunk
                self._timers.set(chunk, now_s + COMING_S)

    def coming(self, now_s: float) -> int:
        """Mask of the chunks that others are bringing in."""
        for chunk in self._timers.pop_due(now_s):
            self._forget(chunk)
        return self._coming

    def came(self, chunks: int) -> None:
        """These chunks are in the rack: they are no longer on their way."""
        for chunk in chunks_in(chunks & self._coming):
            self._forget(chunk)

    def wake_at_s(self) -> float | None:
        """When the next chunk will have been on its way for too long."""
        return self._timers.next_at_s()

    def _forget(self, chunk: int) -> None:
        del self._by[chunk]
        self._coming ^= 1 << chunk
        self._timers.set(chunk, None)

    def check(self) -> None:
        """Assert the invariant."""
        self._timers.check()
        assert self._coming == mask_of(self._by), "what is coming is brought by nobody"
        for chunk, node in self._by.items():
            assert node in self._others, "somebody who is gone brings a chunk"
            assert self._timers.at_s(chunk) is not None, "a chunk would be waited for, for ever"
