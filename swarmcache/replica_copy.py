"""Making a replica from a copy that is on this machine already, instead of fetching it.

Whoever has just written a file has the bytes at hand. They are taken over without a copy where the
file system can share blocks between files (Btrfs, XFS), and copied where it cannot. Either way
every chunk is digested, and the whole must have the digest that the writer says it has written.

That the writer may be believed follows from the descriptor: who has the file open for writing could
write anything to it, so a lie about its bytes gains nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from blake3 import blake3

from swarmcache.chunks import FileVersion
from swarmcache.clock import now_s
from swarmcache.disk import Cache, Partial, User
from swarmcache.disk_calls import disk_errors
from swarmcache.errors import LocalError, SourceChanged, SourceFailed
from swarmcache.partial import READ_SIZE_BYTES, digest_range
from swarmcache.source_file import same_version


class Waits:
    """Whether the files of one user keep us waiting, which is one of them at a time."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def waited_s(self) -> float:
        """How long the call lasts that is made just now; 0 where there is none."""
        since_s = self._since_s
        return 0.0 if since_s is None else now_s() - since_s

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For a call that may hang with the file system of somebody else."""
        self._since_s = now_s()
        try:
            yield
        finally:
            self._since_s = None


class ReplicaCopy:
    """One replica that is made of a file that somebody has written."""

    def __init__(
        self,
        cache: Cache,
        version: FileVersion,
        chunk_size_bytes: int,
        digest: bytes,
        users: Sequence[User],
        waits: Waits,
    ) -> None:
        """``digest``: BLAKE3 of all bytes. ``waits`` learns of the calls that may hang."""
        self._cache = cache
        self._version = version
        self._chunk_size_bytes = chunk_size_bytes
        self._digest = digest
        self._users = users
        self._waits = waits
        # Held while the partial file is begun or put in place, which waits for our own disk alone.
        self._lock = threading.Lock()
        self._partial: Partial | None = None
        self._given_up = False
        self._published = False

    def make(self, file_fd: int, copy_fd: int) -> None:
        """Make and publish the replica of the file, from its copy. In a thread, since it is slow.

        Raises NoSpace, LocalError; then there is no replica.
        """
        with self._lock:
            self._require_wanted()
            partial = self._partial = self._cache.begin(self._version, self._chunk_size_bytes)
            partial.file.retain()  # to be read as well; who gives up closes it
        try:
            self._fill(partial, copy_fd)
            with self._waits.waiting():
                same = same_version(file_fd, self._version)
            if not same:
                raise SourceChanged("the file was changed meanwhile")
            with self._lock:
                self._require_wanted()
                partial.publish(self._users)
                self._published = True
        except BaseException:
            partial.discard()
            raise
        finally:
            partial.file.release()

    def give_up(self) -> bool:
        """Have nothing more to do with the partial file, though ``make`` may still hang in a call.

        False where the replica is in place already. Waits for the disk. Raises LocalError.
        """
        with self._lock:
            self._given_up = not self._published
            if self._given_up and self._partial is not None:
                self._partial.discard()
            return self._given_up

    def _require_wanted(self) -> None:
        if self._given_up:
            raise LocalError("the copy could not be read for too long")

    def _fill(self, partial: Partial, copy_fd: int) -> None:
        """Have all chunks of the copy. Raises LocalError, SourceChanged where it has others."""
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
                with self._waits.waiting():
                    piece = buffer[: _read(fd, buffer[: end - offset], offset)]
                hasher.update(piece)
                whole.update(piece)
                if not cloned:
                    partial.write_piece(offset, piece)
                offset += len(piece)
            if former.get(chunk, hasher.digest()) != hasher.digest():
                raise LocalError("the cache has other bytes of this file version")
            partial.commit_chunk(chunk, hasher.digest())
        if whole.digest() != self._digest:
            raise SourceChanged("the copy no longer has the bytes that were written")


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


def _read(fd: int, buffer: memoryview, offset: int) -> int:
    try:
        size_bytes = os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise SourceFailed(f"cannot read the copy: {error.strerror}") from error
    if size_bytes == 0:
        raise SourceChanged("the copy is shorter than the file")
    return size_bytes
