"""Paths as they may cross the network: as digests, which tell nothing to who does not know them.

Pure values. A node that is asked about all that lies at or below a path knows the paths of its own
files, and compares their digests and those of the directories above them.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from blake3 import blake3

# Directories whose answer is remembered; files come in the order of their version ids, so in none.
DIRECTORIES_MAX = 1 << 16


def path_digest(path: bytes) -> bytes:
    """32 bytes that stand for an absolute path without symbolic links."""
    return blake3(path.rstrip(b"/")).digest()


class PathMatcher:
    """Which files lie at or below one of some paths. No paths at all stand for all files."""

    def __init__(self, digests: Collection[bytes]) -> None:
        self._digests = frozenset(digests)
        self._below: dict[bytes, bool] = {}

    def matches(self, path: bytes) -> bool:
        """Whether this file does."""
        if not self._digests or path_digest(path) in self._digests:
            return True
        return self._inside(os.path.dirname(path))

    def _inside(self, directory: bytes) -> bool:
        known = self._below.get(directory)
        if known is None:
            known = path_digest(directory) in self._digests
            if not known and directory.rstrip(b"/"):
                known = self._inside(os.path.dirname(directory))
            if len(self._below) >= DIRECTORIES_MAX:
                self._below.clear()
            self._below[directory] = known
        return known
