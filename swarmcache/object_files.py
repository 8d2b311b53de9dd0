"""The files below ``objects/``: every replica and, beside it, its manifest, by version id.

Knows nothing of rows, users or trust, and holds no lock: ``cache_dir`` says what may be handed
out, and when. All names are relative to one descriptor, so that what happens to the path above
does not matter.

Invariant: an object has its name only after its manifest has, and loses it before. So whatever has
the name of an object can be digested.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from swarmcache.chunks import ChunkLayout, FileVersion, Manifest
from swarmcache.disk_calls import Stamp, disk_errors, unlink_if_there
from swarmcache.in_use import FileId
from swarmcache.manifest_files import SUFFIX, decode_manifest, manifest_in
from swarmcache.quiet_read import digest_quietly, open_quietly

READ_ONLY = 0o444
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def object_name(version_id: bytes) -> str:
    """Where an object is below ``objects/``; its manifest has ``SUFFIX`` behind that."""
    name = version_id.hex()
    return f"{name[:2]}/{name}"


class ObjectFiles:
    """The objects of one cache directory. Thread-safe, as far as the file system is.

    Methods raise LocalError when the disk fails, if they do not say OSError.
    """

    def __init__(self, fd: int) -> None:
        """``fd``: the directory ``objects/``, which stays the caller's."""
        self.fd = fd

    # --- looking ------------------------------------------------------------------------------

    def status(self, version_id: bytes) -> os.stat_result | None:
        """What stat says; None when there is no such file."""
        with disk_errors("look at a replica"):
            try:
                status = os.stat(object_name(version_id), dir_fd=self.fd, follow_symlinks=False)
            except FileNotFoundError:
                return None
        return status if stat.S_ISREG(status.st_mode) else None

    def stamp(self, version_id: bytes) -> Stamp | None:
        """``status``, as far as it tells whether the file was touched."""
        status = self.status(version_id)
        return None if status is None else Stamp.of(status)

    def inode(self, version_id: bytes) -> int:
        """0 where there is none."""
        stamp = self.stamp(version_id)
        return 0 if stamp is None else stamp.inode

    def ids(self, version_ids: Iterable[bytes]) -> dict[bytes, FileId]:
        """Device and inode of each object that is here."""
        found = {each: self.status(each) for each in version_ids}
        return {each: (s.st_dev, s.st_ino) for each, s in found.items() if s is not None}

    def read_s(self, version_id: bytes) -> float:
        """When some process last read the file, as far as the mount keeps such times; else 0."""
        status = self.status(version_id)
        return 0.0 if status is None else status.st_atime

    def manifest(self, version_id: bytes) -> tuple[FileVersion, Manifest] | None:
        """What the manifest says; None when there is none, it is damaged or another file's."""
        name = object_name(version_id) + SUFFIX
        with disk_errors(f"read {name}"):
            try:
                fd = os.open(name, _READ, dir_fd=self.fd)
            except FileNotFoundError:
                return None
            try:
                data = read_if_sound(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        decoded = decode_manifest(manifest_in(data, version_id))
        return decoded if decoded and decoded[0].version_id == version_id else None

    def has_manifest(self, version_id: bytes) -> bool:
        """Whether there is one, whatever it says."""
        with disk_errors("look at a manifest"):
            try:
                os.stat(object_name(version_id) + SUFFIX, dir_fd=self.fd, follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    # --- reading ------------------------------------------------------------------------------

    def open(self, version_id: bytes) -> int:
        """Open an object so that it does not count as use, see ``quiet_read``.

        Raises OSError; FileNotFoundError also while it is being evicted.
        """
        return open_quietly(object_name(version_id), self.fd)

    def open_in(self, stack: ExitStack, version_id: bytes) -> tuple[int, Stamp | None]:
        """``open`` until the end of ``stack``; (-1, None) when there is none. Raises OSError."""
        try:
            fd = self.open(version_id)
        except FileNotFoundError:
            return -1, None
        stack.callback(os.close, fd)
        return fd, Stamp.of(os.fstat(fd))

    def open_to_sync(self, stack: ExitStack, version_id: bytes) -> list[int]:
        """All that an fsync must bring onto the disk for an object to outlive a power cut.

        The object comes first. Raises OSError.
        """
        name = object_name(version_id)
        fds = []
        for each in (name, name + SUFFIX, name[:2]):
            fds.append(open_quietly(each, self.fd))
            stack.callback(os.close, fds[-1])
        return [*fds, self.fd]

    def bad_chunks(
        self, version_id: bytes, fd: int, after_piece: Callable[[int], None]
    ) -> list[int]:
        """The chunks of an open object that do not have their digest; the first where nothing can
        be said, as of no object (-1). Very slow. Raises OSError."""
        decoded = self.manifest(version_id) if fd >= 0 else None
        if decoded is None or os.fstat(fd).st_size != decoded[0].size_bytes:
            return [0]
        manifest = decoded[1]
        return [
            chunk
            for chunk, digest in enumerate(manifest.digests)
            if _digest(fd, manifest.layout, chunk, after_piece) != digest
        ]

    # --- changing -----------------------------------------------------------------------------

    def enter(
        self,
        call: Callable[..., None],
        source: str,
        from_fd: int,
        version_id: bytes,
        suffix: str = "",
    ) -> None:
        """Give what was written elsewhere its name, with ``os.rename`` or ``os.link``.

        ``suffix``: that of a manifest, which goes first. Raises OSError.
        """
        target = object_name(version_id) + suffix
        fds = {"src_dir_fd": from_fd, "dst_dir_fd": self.fd}
        try:
            call(source, target, **fds)
        except FileNotFoundError:  # one of 256 directories, nearly always there
            with suppress(FileExistsError):  # made by another thread just now
                os.mkdir(target[:2], 0o700, dir_fd=self.fd)
            call(source, target, **fds)
        except FileExistsError:  # a manifest that a power cut has left; a rename would replace it
            os.unlink(target, dir_fd=self.fd)
            call(source, target, **fds)

    def keep(self, version_id: bytes) -> int:
        """A descriptor that keeps the file there, whatever becomes of its names.

        It cannot be read through it, and does not count as in use. -1 where there can be none.
        """
        try:
            return os.open(object_name(version_id), _KEEP, dir_fd=self.fd)
        except OSError:
            return -1

    def remove(self, version_id: bytes) -> None:
        """Remove an object and its manifest, as far as they are there."""
        name = object_name(version_id)
        with disk_errors(f"remove {name}"):
            unlink_if_there(name, self.fd)
            unlink_if_there(name + SUFFIX, self.fd)

    def remove_manifest(self, version_id: bytes) -> None:
        """Remove the manifest of an object that has gone elsewhere."""
        name = object_name(version_id) + SUFFIX
        with disk_errors(f"remove {name}"):
            unlink_if_there(name, self.fd)


def finish(fd: int, mtime_ns: int) -> None:
    """Give a complete file the time of its source, and take away the right to write it.

    Raises OSError.
    """
    status = os.fstat(fd)
    if status.st_mtime_ns != mtime_ns:
        os.utime(fd, ns=(status.st_atime_ns, mtime_ns))
    if stat.S_IMODE(status.st_mode) != READ_ONLY:
        os.fchmod(fd, READ_ONLY)


def read_if_sound(fd: int, size_bytes: int) -> bytes:
    """The first bytes of a file; none where the disk itself has found them to be rotten.

    Raises OSError for anything else.
    """
    try:
        return os.pread(fd, size_bytes, 0)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def _digest(
    fd: int, layout: ChunkLayout, chunk: int, after_piece: Callable[[int], None]
) -> bytes | None:
    """None for a chunk that the disk itself has found to be rotten. Raises OSError."""
    try:
        begin, length = layout.offset_bytes(chunk), layout.length_bytes(chunk)
        return digest_quietly(fd, begin, length, after_piece)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
