"""How cached files are shown: lines of a table for people, one JSON array for programs.

A name may have any bytes in it. In a table what cannot be printed is escaped, so that every file
is one line and no name can play tricks on a terminal. In JSON, ``path`` is always readable text,
and the exact bytes are in ``path_base64`` where they are not UTF-8.
"""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swarmcache.display import size_text
from swarmcache.errors import LocalError
from swarmcache.get import abandon_stdout
from swarmcache.local_protocol import CachedFile, Outcome

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
HEADINGS = ("size", "age", "used", "replicas", "state", "pinned by", "path")
WIDTHS = (">10", ">5", ">5", ">8", "<8", "<10", "")


def shown_path(path: bytes) -> str:
    """A path on one line, with escapes that can be told from the name."""
    text = path.decode(errors="surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_shown_character, text))


def _shown_character(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character == "\\" or not character.isprintable():
        return character.encode("unicode_escape").decode()
    return character


def duration_text(duration_s: float) -> str:
    """A time for people, in its largest unit, rounded down: "59s", "3h", "20d"."""
    if duration_s < 2 * MINUTE_S:
        return f"{duration_s:.0f}s"
    if duration_s < 2 * HOUR_S:
        return f"{duration_s // MINUTE_S:.0f}m"
    if duration_s < 2 * DAY_S:
        return f"{duration_s // HOUR_S:.0f}h"
    return f"{duration_s // DAY_S:.0f}d"


# --- tables --------------------------------------------------------------------------------------


def heading() -> str:
    """The first line of a table of cached files."""
    return _columns(HEADINGS)


def row(file: CachedFile) -> str:
    """One cached file. ``-``: nobody, and what nobody could be asked."""
    elsewhere = file.replicas_elsewhere
    return _columns(
        (
            size_text(file.size_bytes),
            duration_text(file.age_s),
            duration_text(file.idle_s),
            "-" if elsewhere is None else str(elsewhere),
            _state_text(file),
            ",".join(file.pinned_by) or "-",
            shown_path(file.path),
        )
    )


def _state_text(file: CachedFile) -> str:
    if not file.verified:
        return "in doubt"
    return "in use" if file.in_use else "idle"


def _columns(texts: tuple[str, ...]) -> str:
    return "  ".join(format(text, width) for text, width in zip(texts, WIDTHS, strict=True))


# --- JSON ----------------------------------------------------------------------------------------


def file_fields(file: CachedFile) -> dict[str, Any]:
    """One cached file for programs."""
    return {
        **path_fields("path", file.path),
        "version_id": file.version_id,
        "size_bytes": file.size_bytes,
        "age_s": file.age_s,
        "idle_s": file.idle_s,
        "copies": [_readable(copy) for copy in file.copies],
        "pinned_by": file.pinned_by,
        "verified": file.verified,
        "in_use": file.in_use,
        "replicas_elsewhere": file.replicas_elsewhere,
    }


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """What became of one file, for programs."""
    fields: dict[str, Any] = {
        **path_fields("path", outcome.path),
        "done": outcome.done,
        "note": outcome.note,
        "size_bytes": outcome.size_bytes,
    }
    if outcome.rotten_chunks is not None:
        fields["rotten_chunks"] = outcome.rotten_chunks
    return fields


def path_fields(name: str, path: bytes) -> dict[str, str]:
    text = _readable(path)
    if text.encode() == path:
        return {name: text}
    return {name: text, f"{name}_base64": b64encode(path).decode()}


def _readable(path: bytes) -> str:
    return path.decode(errors="replace")


class JsonArray:
    """An array on stdout, an element per line, written as the elements come.

    It is closed by the end of the ``with`` block only if that was left without an exception: half a
    listing must not look like a whole one.
    """

    def __init__(self) -> None:
        self._before = "[\n"

    def __enter__(self) -> JsonArray:
        return self

    def add(self, element: dict[str, Any]) -> None:
        print(self._before, json.dumps(element, sort_keys=True), sep="", end="")
        self._before = ",\n"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            print("[]" if self._before == "[\n" else "\n]")


@contextmanager
def printing() -> Iterator[None]:
    """To print within, whatever stdout is. Raises LocalError where it cannot be written."""
    if sys.stdout is None:
        raise LocalError("cannot write the result: stdout is closed")
    # In a locale without the characters of a name, what is missing is escaped as well.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # nobody listens any more: typer ends without a word
    except OSError as error:
        abandon_stdout()
        raise LocalError(f"cannot write the result: {error.strerror}") from error
