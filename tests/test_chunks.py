"""File versions, the cutting of files, and bit masks of chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.chunks import (
    CHUNK_SIZE_MAX_BYTES,
    CHUNK_SIZE_MIN_BYTES,
    CHUNKS_WANTED,
    ChunkLayout,
    FileVersion,
    Manifest,
    choose_chunk_size,
    chunks_in,
    full_mask,
    mask_from_bytes,
    mask_of,
    mask_to_bytes,
    range_mask,
)

layouts = st.builds(ChunkLayout, st.integers(0, 5000), st.integers(1, 300))


@given(layouts)
def test_chunks_cover_the_file_once_and_in_order(layout: ChunkLayout) -> None:
    position_bytes = 0
    for chunk in range(layout.chunk_count):
        assert layout.offset_bytes(chunk) == position_bytes
        assert 0 < layout.length_bytes(chunk) <= layout.chunk_size_bytes
        position_bytes += layout.length_bytes(chunk)

    assert position_bytes == layout.size_bytes


@given(layouts, st.data())
def test_the_size_of_a_mask_is_the_sum_of_its_chunks(
    layout: ChunkLayout, data: st.DataObject
) -> None:
    mask = data.draw(st.integers(0, full_mask(layout.chunk_count)))

    assert layout.mask_bytes(mask) == sum(layout.length_bytes(chunk) for chunk in chunks_in(mask))


def test_an_empty_file_has_no_chunks() -> None:
    layout = ChunkLayout(0, 256)

    assert layout.chunk_count == 0
    assert layout.mask_bytes(0) == 0
    with pytest.raises(IndexError):
        layout.length_bytes(0)


@pytest.mark.parametrize("chunk", [-1, 3, 1 << 40])
def test_a_chunk_that_the_file_does_not_have_has_no_length(chunk: int) -> None:
    with pytest.raises(IndexError, match="has 3"):
        ChunkLayout(250, 100).length_bytes(chunk)


@pytest.mark.parametrize(
    "other",
    [
        FileVersion(b"/nfs/b", 10, 20),
        FileVersion(b"/nfs/a", 11, 20),
        FileVersion(b"/nfs/a", 10, 21),
        FileVersion(b"/nfs/a", 10, 20, "node1 boot"),
    ],
)
def test_another_path_size_time_or_origin_is_another_version(other: FileVersion) -> None:
    version = FileVersion(b"/nfs/a", 10, 20)

    assert version.version_id != other.version_id
    assert version.version_id == FileVersion(b"/nfs/a", 10, 20).version_id
    assert len(version.version_id) == 32


def test_a_digit_that_moves_from_size_to_time_makes_another_version() -> None:
    assert FileVersion(b"/a", 1, 23).version_id != FileVersion(b"/a", 12, 3).version_id


def test_the_root_depends_on_every_digest_its_place_and_the_cut() -> None:
    layout = ChunkLayout(250, 100)
    digests = (b"1" * 32, b"2" * 32, b"3" * 32)
    root = Manifest(layout, digests).root

    assert root == Manifest(ChunkLayout(250, 100), digests).root
    assert root != Manifest(layout, digests[::-1]).root
    assert root != Manifest(layout, (*digests[:2], b"4" * 32)).root
    assert root != Manifest(ChunkLayout(251, 100), digests).root
    assert root != Manifest(ChunkLayout(250, 101), digests).root


@given(st.integers(0, 1 << 50))
def test_the_chunk_size_is_a_power_of_two_within_its_limits(size_bytes: int) -> None:
    chunk_size_bytes = choose_chunk_size(size_bytes)

    assert chunk_size_bytes.bit_count() == 1
    assert CHUNK_SIZE_MIN_BYTES <= chunk_size_bytes <= CHUNK_SIZE_MAX_BYTES
    if CHUNK_SIZE_MIN_BYTES < chunk_size_bytes < CHUNK_SIZE_MAX_BYTES:
        count = ChunkLayout(size_bytes, chunk_size_bytes).chunk_count
        assert CHUNKS_WANTED <= count <= 2 * CHUNKS_WANTED


@given(st.sets(st.integers(0, 300)))
def test_a_mask_is_the_set_of_its_chunks(chunks: set[int]) -> None:
    mask = mask_of(chunks)

    assert chunks_in(mask) == sorted(chunks)
    assert mask_from_bytes(mask_to_bytes(mask)) == mask
    assert not mask_to_bytes(mask).endswith(b"\0")


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_range_mask_has_exactly_the_range(first: int, count: int) -> None:
    assert chunks_in(range_mask(first, count)) == list(range(first, first + count))
    assert range_mask(0, count) == full_mask(count)
