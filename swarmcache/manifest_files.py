"""Manifests as they lie on the disk, each under a name of its own beside its object.

A manifest is a header, which says of which file version and chunk size it is, the digests in the
order of the chunks, and the root digest. Journals of partial files begin with the same header.

Small files that come together share one file for all their manifests, a *pack*, to which each has a
hard link: a name costs a fraction of what a file costs, to make and to remove, and the pack goes
with the last of its names. It lists the version ids, then the length of each manifest, then the
manifests. All numbers are little-endian.

Pure values: nothing here opens a file.

Invariant: what is decoded is a whole manifest of the file version that was asked for. Who wrote a
pack is not trusted: whatever its list says, the manifest that is found has digests of its own.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from blake3 import blake3

from swarmcache.chunks import DIGEST_BYTES, ChunkLayout, FileVersion, Manifest

SUFFIX = ".manifest"
MANIFEST_MAGIC = b"swcMnfs1"
_PACK_MAGIC = b"swcMnfP1"
# Of a manifest that goes into a pack. Longer ones take a block of their own in any case; these are
# within what every file counts besides its blocks, see partial_store.OVERHEAD_BYTES.
PACKED_MAX_BYTES = 1024
_HEADER = struct.Struct("<8sQqIII")  # magic, size, mtime, chunk size, lengths of path and origin
_PACK = struct.Struct("<8sI")  # magic, number of manifests
_LENGTH_BYTES = 4


def encode_header(magic: bytes, version: FileVersion, layout: ChunkLayout) -> bytes:
    """What a journal or manifest of this file version and chunk size begins with."""
    origin = os.fsencode(version.origin)
    numbers = (version.size_bytes, version.mtime_ns, layout.chunk_size_bytes)
    header = _HEADER.pack(magic, *numbers, len(version.path), len(origin)) + version.path + origin
    return header + blake3(header).digest()


def decode_header(magic: bytes, data: bytes) -> tuple[FileVersion, ChunkLayout, int] | None:
    """File version, layout and length in bytes of the header of ``data``; None if it has none."""
    if len(data) < _HEADER.size:
        return None
    found, size_bytes, mtime_ns, chunk_size_bytes, path_len, origin_len = _HEADER.unpack_from(data)
    end = _HEADER.size + path_len + origin_len
    if found != magic or blake3(data[:end]).digest() != data[end : end + DIGEST_BYTES]:
        return None
    path = data[_HEADER.size : _HEADER.size + path_len]
    origin = os.fsdecode(data[_HEADER.size + path_len : end])
    version = FileVersion(path, size_bytes, mtime_ns, origin)
    return version, ChunkLayout(size_bytes, chunk_size_bytes), end + DIGEST_BYTES


def encode_manifest(version: FileVersion, manifest: Manifest) -> bytes:
    header = encode_header(MANIFEST_MAGIC, version, manifest.layout)
    return header + b"".join(manifest.digests) + manifest.root


def decode_manifest(data: bytes) -> tuple[FileVersion, Manifest] | None:
    """The inverse of ``encode_manifest``; None when the bytes are not a whole manifest."""
    decoded = decode_header(MANIFEST_MAGIC, data)
    if decoded is None:
        return None
    version, layout, start = decoded
    if len(data) != start + DIGEST_BYTES * (layout.chunk_count + 1):
        return None
    digests = [data[at : at + DIGEST_BYTES] for at in range(start, len(data), DIGEST_BYTES)]
    manifest = Manifest(layout, tuple(digests[:-1]))
    return (version, manifest) if manifest.root == digests[-1] else None


def manifest_size_bytes(version: FileVersion, layout: ChunkLayout) -> int:
    """Length of the manifest."""
    header = _HEADER.size + len(version.path) + len(os.fsencode(version.origin)) + DIGEST_BYTES
    return header + (layout.chunk_count + 1) * DIGEST_BYTES


def is_packed(version: FileVersion, layout: ChunkLayout) -> bool:
    """Whether the manifest of a file that comes with others goes into a pack."""
    return manifest_size_bytes(version, layout) <= PACKED_MAX_BYTES


def encode_pack(manifests: Sequence[tuple[bytes, bytes]]) -> bytes:
    """One file for some manifests, each given with the version id of its file."""
    lengths = struct.pack(f"<{len(manifests)}I", *[len(data) for _, data in manifests])
    ids = [version_id for version_id, _ in manifests]
    texts = [data for _, data in manifests]
    return b"".join([_PACK.pack(_PACK_MAGIC, len(ids)), *ids, lengths, *texts])


def is_pack(data: bytes) -> bool:
    """Whether a file that begins with this is one for several manifests."""
    return data.startswith(_PACK_MAGIC)


def manifest_in(data: bytes, version_id: bytes) -> bytes:
    """The manifest of one file: all of ``data``, or its part of a pack; empty if it has none."""
    if not is_pack(data):
        return data
    if len(data) < _PACK.size:
        return b""
    _, count = _PACK.unpack_from(data)
    lengths_at = _PACK.size + count * DIGEST_BYTES
    texts_at = lengths_at + count * _LENGTH_BYTES
    place, odd = divmod(data.find(version_id, _PACK.size, lengths_at) - _PACK.size, DIGEST_BYTES)
    if odd or place < 0 or texts_at > len(data):
        return b""
    *before, length = struct.unpack_from(f"<{place + 1}I", data, lengths_at)
    begin = texts_at + sum(before)
    return data[begin : begin + length]
