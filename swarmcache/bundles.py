"""Bundles: files that list the paths of other files, one a line.

A line is a path as bytes, whatever they are; only the newline ends it. The last line may have none.
Where every newline follows a carriage return, that belongs to it. A relative path starts at the
directory of the bundle, with symbolic links to the bundle resolved. An empty line names nothing.
White space and ``#`` are parts of names. A member may be a directory; one that is a bundle itself
is a file like any other.
"""

from __future__ import annotations

import os

from swarmcache.client import open_source
from swarmcache.errors import SourceUnreadable, UsageError

SUFFIX = b".bundle"
# A list of a million files has some 100 MB. What is larger, or is no text, is a file whose name
# happens to end like that (as git's do).
BUNDLE_BYTES_MAX = 256 << 20
LINE_BYTES_MAX = 4096  # linux/limits.h: PATH_MAX


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
