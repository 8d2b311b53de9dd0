"""Making a replica from a copy that is on this machine already, instead of fetching it.

Whoever has just written a file has the bytes at hand. They are taken over without a copy where the
file system can share blocks between files (Btrfs, XFS), and copied where it cannot. Either way
every chunk is digested, and the whole must have the digest that the writer says it has written.

That the writer may be believed follows from the descriptor: who has the file open for writing could
write anything to it, so a lie about its bytes gains nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from blake3 import blake3

from swarmcache.chunks import FileVersion
from swarmcache.disk import Cache, Partial, User
from swarmcache.disk_calls import disk_errors
from swarmcache.errors import LocalError, SourceChanged, SourceFailed
from swarmcache.partial import READ_SIZE_BYTES, digest_range
from swarmcache.source_file import same_version


def add_replica(
    cache: Cache,
    version: FileVersion,
    chunk_size_bytes: int,
    file_fd: int,
    copy_fd: int,
    digest: bytes,
    users: Sequence[User],
) -> None:
    """Make and publish a replica of the file ``file_fd``, from its copy ``copy_fd``.

    ``digest``: BLAKE3 of all bytes. Slow. Raises NoSpace, LocalError; then there is no replica.
    """
    partial = cache.begin(version, chunk_size_bytes)
    try:
        _fill(partial, copy_fd, digest)
        if not same_version(file_fd, version):
            raise SourceChanged("the file was changed meanwhile")
        partial.publish(users)
    except BaseException:
        partial.discard()
        raise


def is_replica(cache: Cache, version_id: bytes, digest: bytes) -> bool:
    """Whether the replica of this file version has these bytes. Slow. Raises LocalError."""
    source = cache.open_source(version_id)
    if source is None:
        return False
    try:
        with disk_errors("read a replica"):
            return digest_range(source.fd, 0, os.fstat(source.fd).st_size) == digest
    finally:
        source.close()


def _fill(partial: Partial, copy_fd: int, digest: bytes) -> None:
    """Have all chunks of the copy. Raises LocalError, SourceChanged where its bytes are others."""
    former = dict(partial.recover()) if partial.resumable else {}
    cloned = not former and partial.clone(copy_fd)
    whole = blake3()
    buffer = memoryview(bytearray(READ_SIZE_BYTES))
    for chunk in range(partial.layout.chunk_count):
        hasher = blake3()
        offset = partial.layout.offset_bytes(chunk)
        end = offset + partial.layout.length_bytes(chunk)
        while offset < end:
            # What is digested is what the replica has, also if somebody writes to the copy.
            fd = partial.file.fd if cloned else copy_fd
            piece = buffer[: _read(fd, buffer[: end - offset], offset)]
            hasher.update(piece)
            whole.update(piece)
            if not cloned:
                partial.write_piece(offset, piece)
            offset += len(piece)
        if former.get(chunk, hasher.digest()) != hasher.digest():
            raise LocalError("the cache has other bytes of this file version")
        partial.commit_chunk(chunk, hasher.digest())
    if whole.digest() != digest:
        raise SourceChanged("the copy no longer has the bytes that were written")


def _read(fd: int, buffer: memoryview, offset: int) -> int:
    try:
        size_bytes = os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise SourceFailed(f"cannot read the copy: {error.strerror}") from error
    if size_bytes == 0:
        raise SourceChanged("the copy is shorter than the file")
    return size_bytes
