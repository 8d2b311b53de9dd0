"""The picker against a plain count of holders per chunk."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcache.chunk_picker import ChunkPicker
from swarmcache.chunks import chunks_in, full_mask, mask_of

CHUNKS = 9
masks = st.integers(0, full_mask(CHUNKS))


@settings(max_examples=40)
@given(st.lists(masks, max_size=12), st.data())
def test_it_counts_holders_and_picks_among_the_rarest(
    holders: list[int], data: st.DataObject
) -> None:
    picker = ChunkPicker(CHUNKS, Random(1))
    counts: Counter[int] = Counter()
    gone = data.draw(st.sets(st.sampled_from(range(len(holders))))) if holders else set()
    for mask in holders:
        picker.add(mask)
        counts.update(chunks_in(mask))
        picker.check()
    for position in gone:
        picker.remove(holders[position])
        counts.subtract(chunks_in(holders[position]))
        picker.check()
    candidates = data.draw(masks)

    picked = picker.pick(candidates)

    held = {chunk for chunk, count in counts.items() if count > 0}
    possible = held & set(chunks_in(candidates))
    assert picker.available == mask_of(held)
    if possible:
        fewest = min(counts[chunk] for chunk in possible)
        assert picked in {chunk for chunk in possible if counts[chunk] == fewest}
    else:
        assert picked is None


def test_ties_are_broken_by_chance() -> None:
    picker = ChunkPicker(4, Random(7))
    picker.add(0b1111)
    picker.add(0b0001)

    picked = Counter(picker.pick(0b1111) for _ in range(300))

    assert set(picked) == {1, 2, 3}
    assert min(picked.values()) > 30


def test_the_same_generator_picks_the_same_chunks() -> None:
    first, second = ChunkPicker(64, Random(3)), ChunkPicker(64, Random(3))
    for picker in (first, second):
        picker.add(full_mask(64))

    assert [first.pick(full_mask(64)) for _ in range(20)] == [
        second.pick(full_mask(64)) for _ in range(20)
    ]


def test_a_chunk_beyond_the_end_of_the_file_is_a_bug() -> None:
    with pytest.raises((AssertionError, IndexError)):
        ChunkPicker(3, Random(1)).add(0b1000)


def test_removing_a_holder_that_was_never_added_is_a_bug() -> None:
    picker = ChunkPicker(3, Random(1))
    picker.add(0b001)

    with pytest.raises(AssertionError, match="lost one"):
        picker.remove(0b010)


def test_an_empty_file_has_nothing_to_pick() -> None:
    picker = ChunkPicker(0, Random(1))
    picker.add(0)

    assert picker.available == 0
    assert picker.pick(0) is None
    picker.check()
