"""A file on its way into the cache: its chunks, and the journal of them.

The journal lists every chunk that has been written, with its digest, so that a daemon that was
killed can go on where it was. It is a list of claims: each is digested again before it counts.

A journal begins with the same header as a manifest (``manifest_files``). There follow records of 36
bytes, chunk number and digest, in the order of arrival.

Invariant: a chunk is had only if all its bytes are written and its digest is in the journal; a
chunk that is had is never written again.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from blake3 import blake3

from swarmcache.chunks import DIGEST_BYTES, ChunkLayout, FileVersion, Manifest
from swarmcache.disk_calls import SharedFile, clone, disk_errors, is_full, write_all
from swarmcache.errors import LocalError
from swarmcache.manifest_files import decode_header, encode_header
from swarmcache.user_tree import User

_RECORD = struct.Struct(f"<I{DIGEST_BYTES}s")
JOURNAL_MAGIC = b"swcJrnl1"
READ_SIZE_BYTES = 1 << 20  # BLAKE3 is at full speed from 128 KiB on; this stays in the L2 cache


def encode_record(chunk: int, digest: bytes) -> bytes:
    """One record of a journal."""
    return _RECORD.pack(chunk, digest)


def decode_journal(
    data: bytes, version: FileVersion, layout: ChunkLayout
) -> tuple[dict[int, set[bytes]], int] | None:
    """The claims in a journal, and its length in bytes up to the last whole record.

    None when it is not one of this file version and chunk size. Where a chunk has been claimed
    with several digests (a power cut can leave junk between good records), each is listed.
    """
    decoded = decode_header(JOURNAL_MAGIC, data)
    if decoded is None or decoded[:2] != (version, layout):
        return None
    start = decoded[2]
    end = start + (len(data) - start) // _RECORD.size * _RECORD.size
    claims: dict[int, set[bytes]] = {}
    for chunk, digest in _RECORD.iter_unpack(data[start:end]):
        if chunk < layout.chunk_count:
            claims.setdefault(chunk, set()).add(digest)
    return claims, end


def journal_size_bytes(version: FileVersion, layout: ChunkLayout) -> int:
    """Length of a journal in which every chunk has one record."""
    header = encode_header(JOURNAL_MAGIC, version, layout)
    return len(header) + layout.chunk_count * _RECORD.size


def digest_range(fd: int, offset_bytes: int, length_bytes: int) -> bytes:
    """BLAKE3 of a range of a file; of what there is of it where the file ends. Raises OSError."""
    hasher = blake3()
    buffer = memoryview(bytearray(min(READ_SIZE_BYTES, max(length_bytes, 1))))
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        wanted = buffer[: min(len(buffer), end - offset_bytes)]
        count = os.preadv(fd, [wanted], offset_bytes)
        if count == 0:
            break
        hasher.update(wanted[:count])
        offset_bytes += count
    return hasher.digest()


class PartialOwner(Protocol):
    """What a partial file asks of the store that it belongs to."""

    def install(self, partial: Partial, users: Sequence[User]) -> dict[int, str]: ...

    def hide(self, partial: Partial) -> list[User]: ...

    def relieve(self, partial: Partial) -> bool: ...

    def discard(self, partial: Partial) -> None: ...

    def leave(self, partial: Partial) -> None: ...


class Partial:
    """One file being fetched; its space is reserved. Made by ``Cache.begin``. Thread-safe.

    ``publish``, ``discard`` or ``close`` ends it; afterwards every write raises LocalError.
    """

    def __init__(
        self,
        owner: PartialOwner,
        version: FileVersion,
        layout: ChunkLayout,
        file: SharedFile,
        journal_fd: int,
        journal_end: int,
        claims: dict[int, set[bytes]],
    ) -> None:
        """Takes over ``file`` and ``journal_fd``."""
        self.version = version
        self.layout = layout
        self.file = file
        self._owner = owner
        self._journal_fd = journal_fd
        self._journal_end = journal_end
        self._claims = claims
        self._digests: dict[int, bytes] = {}
        self._former_users: list[User] = []
        # Taken for every piece that is read, by two threads at a time, so little may be done under
        # it and nothing between: a condition of its own, and ``file`` retained by each writer, made
        # a file of 256 MiB in memory 10 % slower.
        self._lock = threading.RLock()
        self._writers = 0
        self._written = threading.Condition(self._lock)  # when there is no writer any more
        self._open = True

    @property
    def resumable(self) -> bool:
        """Whether an earlier life of the daemon has left chunks that ``recover`` may find good."""
        return bool(self._claims)

    @property
    def complete(self) -> bool:
        return len(self._digests) == self.layout.chunk_count

    def has(self, chunk: int) -> bool:
        """Whether the chunk can be served."""
        return chunk in self._digests

    def recover(self) -> Iterator[tuple[int, bytes]]:
        """Every chunk written by an earlier life of the daemon that still has its digest.

        Yields (chunk, digest) after reading the chunk, so it belongs into a worker thread. What
        does not match is no longer claimed. A file that was a replica and has such chunks is taken
        out of the users' directories until it is published again. Raises LocalError when the disk
        fails.
        """
        claims, self._claims = self._claims, {}
        hidden = False
        for chunk, digests in sorted(claims.items()):
            if not self._begin_use(chunk):
                continue  # fetched anew meanwhile
            try:
                digest = self._digest(chunk)
            finally:
                self._end_use()
            if digest is None or digest not in digests:
                if not hidden:
                    self._former_users = self._owner.hide(self)
                    hidden = True
                continue
            with self._lock:
                self._digests.setdefault(chunk, digest)
            yield chunk, digest

    def write_chunk(self, chunk: int, data: bytes | memoryview, digest: bytes) -> None:
        """Write a chunk whose bytes have been found to have this digest.

        A chunk that is had already is left as it is. Raises NoSpace, LocalError.
        """
        assert len(data) == self.layout.length_bytes(chunk), "the chunk has another length"
        if self._write(chunk, self.layout.offset_bytes(chunk), data):
            self.commit_chunk(chunk, digest)

    def write_piece(self, offset_bytes: int, data: bytes | memoryview) -> None:
        """Write part of one chunk, which counts only after ``commit_chunk``.

        ``offset_bytes`` is from the beginning of the file; the bytes must be of a single chunk.
        Raises NoSpace, LocalError.
        """
        chunk, within = divmod(offset_bytes, self.layout.chunk_size_bytes)
        assert within + len(data) <= self.layout.length_bytes(chunk), "a piece of two chunks"
        self._write(chunk, offset_bytes, data)

    def clone(self, fd: int) -> bool:
        """Take all bytes of another file, of which the disk need not keep a second copy.

        Each chunk counts only after ``commit_chunk``. False where the file system cannot, or the
        other file is not as long. Raises NoSpace, LocalError.
        """
        assert not self._digests, "chunks that are had would be written again"
        if not self._begin_use(0):
            return False
        try:
            with disk_errors("share blocks with another file"):
                cloned = clone(self.file.fd, fd)
                return cloned and os.fstat(self.file.fd).st_size == self.layout.size_bytes
        finally:
            self._end_use()

    def commit_chunk(self, chunk: int, digest: bytes) -> None:
        """All bytes of the chunk are written and have this digest: note it, serve it.

        Raises NoSpace, LocalError; then the chunk is not had.
        """
        self.commit_chunks({chunk: digest})

    def commit_chunks(self, digests: Mapping[int, bytes]) -> None:
        """The same for several chunks; where it raises, none of them is had that was not before."""
        assert all(0 <= chunk < self.layout.chunk_count for chunk in digests)
        assert all(len(digest) == DIGEST_BYTES for digest in digests.values())
        with self._lock:
            self._require_open()
            new = {chunk: digests[chunk] for chunk in digests if chunk not in self._digests}
            records = b"".join(encode_record(*record) for record in new.items())
            # At an offset of our own, so that a record cut short by a full disk is overwritten.
            with disk_errors("write the journal of a partial file"):
                self._put(self._journal_fd, records, self._journal_end)
            self._journal_end += len(records)
            self._digests |= new

    def manifest(self) -> Manifest:
        """Of a file that is complete."""
        assert self.complete, "the manifest of an incomplete file"
        chunks = range(self.layout.chunk_count)
        return Manifest(self.layout, tuple(self._digests[chunk] for chunk in chunks))

    def publish(self, users: Sequence[User]) -> dict[int, str]:
        """Make the complete file a replica, with a link for each of the users.

        Returns the path per uid. A user whose link could not be made is missing in it;
        ``Cache.lookup`` for that user raises with the reason. Raises NoSpace, LocalError: then
        there is no replica, and the partial file is to be discarded. Waits for writers, so it
        belongs into a worker thread.
        """
        assert self.complete, "published before all chunks were there"
        with self._lock:
            self._require_open()
            # A second copy of a chunk may still be on its way to the disk. Its bytes are the
            # same, but they must not change the times of the file after these were noted.
            self._written.wait_for(lambda: self._writers == 0)
            self._require_open()
            former = [user for user in self._former_users if user not in users]
            paths = self._owner.install(self, [*former, *users])
            self._end()
        return paths

    def discard(self) -> None:
        """Give up the file and its space. Raises LocalError; the file is given up all the same."""
        with self._lock:
            if self._open:
                try:
                    self._owner.discard(self)
                finally:
                    self._digests.clear()
                    self._end()

    def close(self) -> None:
        """Leave the file and its space for a later ``Cache.begin`` to resume."""
        with self._lock:
            if self._open:
                self._owner.leave(self)
                self._end()

    def _digest(self, chunk: int) -> bytes | None:
        """BLAKE3 of a chunk as it is on the disk; None when the disk itself finds it rotten."""
        begin, length = self.layout.offset_bytes(chunk), self.layout.length_bytes(chunk)
        with disk_errors("read a partial file"):
            try:
                return digest_range(self.file.fd, begin, length)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return None

    def _write(self, chunk: int, offset_bytes: int, data: bytes | memoryview) -> bool:
        """Write bytes of a chunk; False when the chunk is had already."""
        if not self._begin_use(chunk):
            return False
        try:
            with disk_errors("write a chunk"):
                self._put(self.file.fd, data, offset_bytes)
        finally:
            self._end_use()
        return True

    def _put(self, fd: int, data: bytes | memoryview, offset_bytes: int) -> None:
        """Write; once more if the disk is full, where it could not set the space aside."""
        try:
            write_all(fd, data, offset_bytes)
        except OSError as error:
            if not (is_full(error) and self._owner.relieve(self)):
                raise
            write_all(fd, data, offset_bytes)

    def _begin_use(self, chunk: int) -> bool:
        """Keep the file open for work on a chunk; False when the chunk is had already."""
        with self._lock:
            self._require_open()
            if chunk in self._digests:
                return False
            self._writers += 1
            return True

    def _end_use(self) -> None:
        with self._lock:
            self._writers -= 1
            if self._writers == 0:
                self._written.notify_all()
                if not self._open:
                    self.file.release()

    def _require_open(self) -> None:
        if not self._open:
            raise LocalError("the partial file is no longer open")

    def _end(self) -> None:
        """Whoever still writes needs the descriptor: the last of them lets go of it."""
        self._open = False
        os.close(self._journal_fd)
        if self._writers == 0:
            self.file.release()
