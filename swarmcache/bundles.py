"""Bundles: files that list the paths of other files, one a line.

A line is a path as bytes, whatever they are; only the newline ends it. The last line may have none.
Where every newline follows a carriage return, that belongs to it. A relative path starts at the
directory of the bundle, with symbolic links to the bundle resolved. An empty line names nothing.
White space and ``#`` are parts of names. A member may be a directory; one that is a bundle itself
is a file like any other.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from blake3 import blake3

from swarmcache.client import open_source
from swarmcache.errors import SourceUnreadable, UsageError
from swarmcache.locations import RESULTS_DIRECTORY

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Sequence

SUFFIX = b".bundle"
# A list of a million files has some 100 MB. What is larger, or is no text, is a file whose name
# happens to end like that (as git's do).
BUNDLE_BYTES_MAX = 256 << 20
LINE_BYTES_MAX = 4096  # linux/limits.h: PATH_MAX
# Jobs run for a week, and may open the list once more near their end.
RESULT_AGE_MAX_S = 14 * 86400.0
DIGEST_BYTES = 12  # enough for a user's own lists; the content is compared as well
STEM_BYTES_MAX, SUFFIX_BYTES_MAX = 180, 40  # of names of at most 255 bytes (NAME_MAX)


class NoBundle(UsageError):
    """The file is no list of paths; the message says why."""


def read_if_bundle(path: bytes, wanted: bool | None) -> list[bytes] | None:
    """What ``read_bundle`` reads; None for what is no bundle.

    ``wanted``: whether the user says that it is one; or else (None) its name tells, and a file that
    is no list of paths in spite of its name is none. Raises SourceUnreadable, NoBundle.
    """
    if not (path.endswith(SUFFIX) if wanted is None else wanted) or os.path.isdir(path):
        return None
    try:
        return read_bundle(path)
    except NoBundle:
        if wanted:
            raise
        return None


def read_bundle(path: bytes) -> list[bytes]:
    """The absolute path in each line, in order; empty for an empty line.

    Raises SourceUnreadable, NoBundle.
    """
    source = open_source(path)
    try:
        if source.size_bytes > BUNDLE_BYTES_MAX:
            raise NoBundle(f"it is no list of paths: it has more than {BUNDLE_BYTES_MAX} bytes")
        with open(source.fd, "rb", closefd=False) as file:
            data = file.read(BUNDLE_BYTES_MAX)
    except OSError as error:
        raise SourceUnreadable(error.strerror or str(error)) from error
    finally:
        source.close()
    return parse_bundle(data, os.path.dirname(source.real_path))


def parse_bundle(data: bytes, directory: bytes) -> list[bytes]:
    """The absolute path in each line; ``directory`` is where relative ones start. Raises NoBundle.

    A line is not looked up: it may name anything, or nothing.
    """
    if b"\0" in data:
        raise NoBundle("it is no list of paths: there is a NUL byte in it")
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if b"\n" in data and data.count(b"\r\n") == data.count(b"\n"):
        lines = [line.removesuffix(b"\r") for line in lines]
    if any(len(line) > LINE_BYTES_MAX for line in lines):
        raise NoBundle(f"it is no list of paths: a line has more than {LINE_BYTES_MAX} bytes")
    return [line and os.path.join(directory, line) for line in lines]


# --- the results ---------------------------------------------------------------------------------


def write_result(directory: bytes, name: bytes, lines: Sequence[bytes]) -> bytes:
    """Write these lines into a file, and tell where it is. Raises OSError.

    ``directory``: the user's own in the cache. ``name``: of the bundle; the file is called after it
    and after its content. So equal lines give the same file, and nothing piles up: those that
    nobody has asked for or read for ``RESULT_AGE_MAX_S`` are removed. Its time of modification is
    when it was written, that of access when it was last asked for.
    """
    data = b"".join(line + b"\n" for line in lines)
    results = os.path.join(directory, os.fsencode(RESULTS_DIRECTORY))
    stem, suffix = os.path.splitext(name)
    digest = blake3(data).hexdigest(DIGEST_BYTES).encode()
    path = os.path.join(results, stem[:STEM_BYTES_MAX] + b"." + digest + suffix[-SUFFIX_BYTES_MAX:])
    if not _has(path, data):  # or no more than a power cut has left of it
        os.makedirs(results, mode=0o700, exist_ok=True)
        _put(path, data)
        _remove_old(results, time.time() - RESULT_AGE_MAX_S)
    return path


def _has(path: bytes, data: bytes) -> bool:
    """Whether a file has this content. If so, its time of access is now."""
    try:
        with open(path, "rb") as file:
            found = file.read(len(data) + 1) == data
            if found:
                os.utime(file.fileno(), ns=(time.time_ns(), os.stat(path).st_mtime_ns))
            return found
    except FileNotFoundError:
        return False


def _put(path: bytes, data: bytes) -> None:
    name = b"new-%d-%d" % (os.getpid(), time.monotonic_ns())
    beside = os.path.join(os.path.dirname(path), name)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _remove_old(results: bytes, before_s: float) -> None:
    """Remove the results that were not used since then, and what a killed process has left."""
    with os.scandir(results) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed by another process of the user
                status = entry.stat(follow_symlinks=False)
                if max(status.st_atime, status.st_mtime) < before_s:
                    os.unlink(entry.path)
