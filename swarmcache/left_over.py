"""``swarmcache doctor --clean``: what killed copies have left on a file server.

Root removes everybody's, other users their own. Links are not followed, nor are mount points
passed; what may still be written stays (``write_beside.py`` says how that shows).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from swarmcache.display import size_text
from swarmcache.get import say
from swarmcache.listing import printing, shown_path
from swarmcache.tree_walk import walk
from swarmcache.write_beside import LeftOver, remove_left_over


def clean(directories: Sequence[Path]) -> int:
    """Remove what is left in these directories and below them, and print its paths.

    Returns how many directories could not be looked through, or files removed; each is named on
    stderr. Raises LocalError where stdout cannot be written.
    """
    failed = 0

    def note(error: OSError, what: str = "looked through") -> None:
        nonlocal failed
        failed += 1
        say(f"{error.filename!r}: cannot be {what}: {error.strerror}")

    def note_file(error: OSError) -> None:
        note(error, "removed")

    with printing():
        for directory in directories:
            for path, each in _removed(directory, note, note_file):
                shown = shown_path(os.fsencode(os.path.join(path, each.name)))
                print(f"removed: {shown} ({size_text(each.size_bytes)})")
    return failed


def _removed(
    directory: Path, onerror: Callable[[OSError], None], on_file: Callable[[OSError], None]
) -> Iterator[tuple[str, LeftOver]]:
    """Remove what is left in a directory and below; the path of where it was, with each.

    ``onerror`` hears of directories, ``on_file`` of files.
    """
    path = ""

    def note_file(error: OSError) -> None:
        error.filename = os.path.join(path, error.filename)
        on_file(error)

    try:
        for path, fd in _below(directory, onerror):
            try:
                for each in remove_left_over(fd, _whose(), time.time(), note_file):
                    yield path, each
            except OSError as error:
                error.filename = path
                onerror(error)
    except OSError as error:  # the directory itself
        error.filename = os.fspath(directory)
        onerror(error)


def _below(directory: Path, onerror: Callable[[OSError], None]) -> Iterator[tuple[str, int]]:
    """All directories with their descriptors, each valid until the next one is asked for."""
    device = None
    # With a slash at its end, a link that was named stands for what it leads to.
    for path, names, _, fd in walk(os.path.join(directory, ""), onerror):
        found = os.fstat(fd).st_dev
        device = found if device is None else device
        if found != device:
            names.clear()
            continue
        yield path, fd


def _whose() -> int | None:
    return None if os.geteuid() == 0 else os.geteuid()
