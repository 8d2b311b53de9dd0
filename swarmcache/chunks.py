"""File versions, chunks and their digests.

A *file version* names the content of a file by its real path, size and modification time. It is
cut into *chunks* of equal size (the last one may be shorter). A *manifest* lists the BLAKE3 digest
of every chunk and one root digest over them.

Pure values: nothing here opens a file or a socket.

Invariant: two parties that agree on ``version_id`` and ``chunk_size_bytes`` agree on where every
chunk begins and ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from blake3 import blake3

DIGEST_BYTES = 32
CHUNK_SIZE_MIN_BYTES = 256 * 1024
CHUNK_SIZE_MAX_BYTES = 16 * 1024 * 1024
# A pipeline of M chunks over N nodes needs M + log2(N) steps instead of M (Mundinger, Weber, Weiss,
# J. Scheduling 2008). With 512 chunks and 10,000 nodes the ramp costs 2.6 %.
CHUNKS_WANTED = 512


@dataclass(frozen=True)
class FileVersion:
    """One state of one source file.

    ``path`` is the real path (bytes, as the kernel spells it). ``origin`` is empty for files of a
    shared file system; for a file system that only one machine can see it identifies that machine,
    so that equal paths on two machines are never taken for the same file.
    """

    path: bytes
    size_bytes: int
    mtime_ns: int
    origin: str = ""

    @cached_property
    def version_id(self) -> bytes:
        """BLAKE3 over path, size, mtime and origin; 32 bytes. NUL cannot occur in a path."""
        name = b"\0".join(
            (self.path, b"%d" % self.size_bytes, b"%d" % self.mtime_ns, os.fsencode(self.origin))
        )
        return blake3(name).digest()


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Where the chunks of a file of ``size_bytes`` begin and end. An empty file has no chunks."""

    size_bytes: int
    chunk_size_bytes: int

    @property
    def chunk_count(self) -> int:
        return -(-self.size_bytes // self.chunk_size_bytes)

    def offset_bytes(self, chunk: int) -> int:
        return chunk * self.chunk_size_bytes

    def length_bytes(self, chunk: int) -> int:
        """Length of one chunk. Raises IndexError for a chunk that the file does not have."""
        rest_bytes = self.size_bytes - chunk * self.chunk_size_bytes
        if chunk < 0 or rest_bytes <= 0:
            raise IndexError(f"chunk {chunk} of a file that has {self.chunk_count}")
        return self.chunk_size_bytes if rest_bytes > self.chunk_size_bytes else rest_bytes

    def mask_bytes(self, mask: int) -> int:
        """Total size of the chunks in a bit mask."""
        total = mask.bit_count() * self.chunk_size_bytes
        if mask >> (self.chunk_count - 1) & 1 if self.chunk_count else 0:
            total -= self.chunk_count * self.chunk_size_bytes - self.size_bytes
        return total


@dataclass(frozen=True, slots=True)
class Manifest:
    """The digests of all chunks of one file version, in order."""

    layout: ChunkLayout
    digests: tuple[bytes, ...]

    @property
    def root(self) -> bytes:
        """BLAKE3 over size, chunk size and the chunk digests in order; 32 bytes."""
        hasher = blake3(b"%d %d" % (self.layout.size_bytes, self.layout.chunk_size_bytes))
        hasher.update(b"".join(self.digests))
        return hasher.digest()


@dataclass(frozen=True, slots=True)
class SmallFile:
    """The whole of a file that has one chunk: its bytes, and the digest that they should have."""

    version_id: bytes
    digest: bytes
    data: bytes | memoryview


def choose_chunk_size(size_bytes: int) -> int:
    """Chunk size for a file: size / 512, rounded down to a power of two within the limits."""
    wanted = max(size_bytes // CHUNKS_WANTED, 1)
    power_of_two = 1 << (wanted.bit_length() - 1)
    return min(max(power_of_two, CHUNK_SIZE_MIN_BYTES), CHUNK_SIZE_MAX_BYTES)


def full_mask(chunk_count: int) -> int:
    """The bit mask that has every chunk."""
    return (1 << chunk_count) - 1


def range_mask(first: int, count: int) -> int:
    """The bit mask of ``count`` chunks from ``first`` on."""
    return ((1 << count) - 1) << first


def mask_of(chunks: Iterable[int]) -> int:
    """The bit mask of the given chunks."""
    mask = 0
    for chunk in chunks:
        mask |= 1 << chunk
    return mask


def chunks_in(mask: int) -> list[int]:
    """The chunks of a bit mask, lowest first."""
    chunks = []
    while mask:
        lowest = mask & -mask
        chunks.append(lowest.bit_length() - 1)
        mask ^= lowest
    return chunks


def mask_to_bytes(mask: int) -> bytes:
    """A bit mask as the shortest little-endian byte string."""
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def mask_from_bytes(data: bytes) -> int:
    """The inverse of ``mask_to_bytes``."""
    return int.from_bytes(data, "little")
