"""Manifests as they lie on the disk, alone and several in one file."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as some

from swarmcache.chunks import ChunkLayout, FileVersion, Manifest
from swarmcache.manifest_files import (
    decode_manifest,
    encode_manifest,
    encode_pack,
    is_pack,
    manifest_in,
    manifest_size_bytes,
)

Entry = tuple[FileVersion, Manifest]

VERSIONS = some.builds(
    FileVersion,
    path=some.binary(min_size=1, max_size=80).map(lambda name: b"/" + name),
    size_bytes=some.integers(0, 5000),
    mtime_ns=some.integers(-(2**40), 2**62),
    origin=some.text("abc-", max_size=9),
)


@some.composite
def entries(draw: some.DrawFn) -> Entry:
    version = draw(VERSIONS)
    layout = ChunkLayout(version.size_bytes, 1000)
    digests = tuple(os.urandom(32) for _ in range(layout.chunk_count))
    return version, Manifest(layout, digests)


def packed(files: list[Entry]) -> bytes:
    return encode_pack([(each[0].version_id, encode_manifest(*each)) for each in files])


@settings(max_examples=30)
@given(some.lists(entries(), min_size=1, max_size=9))
def test_each_file_finds_its_manifest_alone_or_in_a_pack(files: list[Entry]) -> None:
    data = packed(files)
    assert is_pack(data)
    for version, manifest in files:
        alone = encode_manifest(version, manifest)
        assert not is_pack(alone)
        assert len(alone) == manifest_size_bytes(version, manifest.layout)
        assert manifest_in(alone, version.version_id) == alone
        found = decode_manifest(manifest_in(data, version.version_id))
        assert found is not None and found[0] == version  # of two of one version the first
    assert manifest_in(data, b"x" * 32) == b""


@settings(max_examples=50)
@given(some.lists(entries(), min_size=1, max_size=5), some.data())
def test_of_a_pack_that_was_cut_or_changed_only_whole_manifests_are_found(
    files: list[Entry], data: some.DataObject
) -> None:
    pack = packed(files)
    wanted = data.draw(some.sampled_from(files))
    end = data.draw(some.integers(0, len(pack)))
    changed = bytearray(pack[:end])
    if changed and data.draw(some.booleans()):
        changed[data.draw(some.integers(0, len(changed) - 1))] ^= data.draw(some.integers(1, 255))

    decoded = decode_manifest(manifest_in(bytes(changed), wanted[0].version_id))

    assert decoded is None or decoded in files
