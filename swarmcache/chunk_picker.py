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
        self._full = full_mask(chunk_count)
        self._levels = [self._full]
        self._counts = [0] * chunk_count
        self._rng = rng

    @property
    def available(self) -> int:
        """Mask of the chunks that have at least one holder."""
        return self._full ^ self._levels[0]

    def add(self, mask: int) -> None:
        """Each chunk in ``mask`` has one more holder."""
        counts, levels = self._counts, self._levels
        while mask:
            bit = mask & -mask
            mask ^= bit
            chunk = bit.bit_length() - 1
            count = counts[chunk]
            counts[chunk] = count + 1
            levels[count] ^= bit
            if count + 1 == len(levels):
                levels.append(0)
            levels[count + 1] |= bit

    def remove(self, mask: int) -> None:
        """Each chunk in ``mask`` has one holder less."""
        counts, levels = self._counts, self._levels
        while mask:
            bit = mask & -mask
            mask ^= bit
            chunk = bit.bit_length() - 1
            count = counts[chunk]
            assert count, "a chunk without holders lost one"
            counts[chunk] = count - 1
            levels[count] ^= bit
            levels[count - 1] |= bit

    def forget(self, chunk: int) -> None:
        """This chunk is wanted no more: none of its holders counts from here on."""
        bit = 1 << chunk
        self._levels[self._counts[chunk]] ^= bit
        self._counts[chunk] = 0
        self._levels[0] |= bit

    def holders(self, chunk: int) -> int:
        """How many holders this chunk has."""
        return self._counts[chunk]

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
        assert seen == self._full, "a chunk is in no level"
        for chunk, count in enumerate(self._counts):
            assert self._levels[count] >> chunk & 1, "a chunk is in the wrong level"
