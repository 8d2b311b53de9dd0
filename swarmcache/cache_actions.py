"""What ls, rm, pin, unpin and verify do once their options are known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

from swarmcache.cache_client import ask
from swarmcache.client import Client
from swarmcache.get import say
from swarmcache.listing import (
    JsonArray,
    file_fields,
    heading,
    outcome_fields,
    printing,
    row,
    shown_path,
)
from swarmcache.local_protocol import AboutCache, AboutFile, CachedFile, Ls, Outcome, Verify

EXIT_NOT_ALL = 1

# What may be sorted by; "none" stands for files as they come.
SORT_KEYS: dict[str, Callable[[CachedFile], tuple[float, bytes]]] = {
    "used": lambda file: (file.idle_s, file.path),
    "age": lambda file: (file.age_s, file.path),
    "size": lambda file: (-file.size_bytes, file.path),
    "path": lambda file: (0, file.path),
}


def show_files(
    client: Client, paths: list[bytes], *, sort: str, reverse: bool, as_json: bool
) -> int:
    """List cached files on stdout and return the exit code."""
    complaints = _Complaints()
    files = complaints.files(ask(client, Ls(paths)))
    if sort != "none":
        files = iter(sorted(files, key=SORT_KEYS[sort], reverse=reverse))
    with printing(), ExitStack() as stack:
        if as_json:
            array = stack.enter_context(JsonArray())
            for file in files:
                array.add(file_fields(file))
        else:
            for number, file in enumerate(files):
                if number == 0:
                    print(heading())
                print(row(file))
    return complaints.exit_code


def act(client: Client, request: AboutCache, *, as_json: bool) -> int:
    """Have something done, complain on stderr of what is not, and return the exit code."""
    complaints = _Complaints()
    with ExitStack() as stack:
        if as_json or isinstance(request, Verify):  # all others have nothing to print
            stack.enter_context(printing())
        array = stack.enter_context(JsonArray()) if as_json else None
        for answer in ask(client, request):
            if not isinstance(answer, Outcome):
                continue
            complaints.note(answer)
            if array is not None:
                array.add(outcome_fields(answer))
            elif answer.rotten_chunks is not None:
                result = "rotten" if answer.rotten_chunks else "ok"
                print(f"{shown_path(answer.path)}: {result}", flush=True)
    return complaints.exit_code


class _Complaints:
    """Tells on stderr what there is to say of single files, and keeps the exit code."""

    def __init__(self) -> None:
        self.exit_code = 0

    def note(self, outcome: Outcome) -> None:
        """Take notice of what became of a file."""
        if not outcome.done:
            self.exit_code = EXIT_NOT_ALL
        if outcome.note:
            say(f"{os.fsdecode(outcome.path)!r}: {outcome.note}")

    def files(self, answers: Iterable[AboutFile]) -> Iterator[CachedFile]:
        """The files among the answers; all others are noted."""
        for answer in answers:
            if isinstance(answer, CachedFile):
                yield answer
            else:
                self.note(answer)
