"""Which chunk to ask for next: the rarest one, ties broken by chance.

Pure logic: knows how many holders every chunk has, not who they are; sends nothing.

Rarest first comes close to the ideal spread of chunks (Legout et al., IMC 2006); asking in order of
the file loses a factor of 4 to 7. All sets of chunks are bit masks (Python integers), one per
number of holders: picking among 2,048 chunks takes about a microsecond, a scan three hundred.

Invariant: every chunk is in exactly one level, and level n holds the chunks with n known holders.
"""

from __future__ import annotations

from random import Random

from swarmcache.chunks import full_mask


class ChunkPicker:
    """Counts the holders of every chunk and picks among the rarest."""

    def __init__(self, chunk_count: int, rng: Random) -> None:
        self._chunk_count = chunk_count
        self._levels = [full_mask(chunk_count)]
        self._rng = rng

    @property
    def available(self) -> int:
        """Mask of the chunks that have at least one holder."""
        return full_mask(self._chunk_count) ^ self._levels[0]

    def add(self, mask: int) -> None:
        """Each chunk in ``mask`` has one more holder."""
        rising = 0
        for count, level in enumerate(self._levels):
            moved = level & mask
            self._levels[count] = (level ^ moved) | rising
            mask ^= moved
            rising = moved
            if not mask and not rising:
                return
        assert not mask, "a chunk beyond the end of the file"
        if rising:
            self._levels.append(rising)

    def remove(self, mask: int) -> None:
        """Each chunk in ``mask`` has one holder less."""
        falling = 0
        for count in range(len(self._levels) - 1, 0, -1):
            level = self._levels[count]
            moved = level & mask
            self._levels[count] = (level ^ moved) | falling
            mask ^= moved
            falling = moved
        assert not mask, "a chunk without holders lost one"
        self._levels[0] |= falling

    def pick(self, candidates: int) -> int | None:
        """One of the rarest chunks in ``candidates`` that has a holder, or None."""
        for level in self._levels[1:]:
            rarest = level & candidates
            if rarest:
                return self._any_of(rarest)
        return None

    def _any_of(self, mask: int) -> int:
        start = int(self._rng.random() * self._chunk_count)
        above = mask >> start
        if above:
            return start + (above & -above).bit_length() - 1
        return (mask & -mask).bit_length() - 1

    def check(self) -> None:
        """Assert the invariant."""
        seen = 0
        for level in self._levels:
            assert not seen & level, "a chunk is in two levels"
            seen |= level
        assert seen == full_mask(self._chunk_count), "a chunk is in no level"
