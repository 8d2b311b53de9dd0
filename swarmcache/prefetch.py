"""What ``swarmcache prefetch`` does once its options are known."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

from swarmcache import answer_stream
from swarmcache.client import Client, Source, open_source
from swarmcache.display import TransferDisplay, size_text
from swarmcache.errors import SourceUnreadable
from swarmcache.get import say
from swarmcache.listing import JsonArray, path_fields, printing
from swarmcache.local_protocol import (
    LINE_MAX_BYTES,
    PREFETCH_FILES_MAX,
    PREFETCH_NODES_MAX,
    NodeSilent,
    Notice,
    Placed,
    PrefetchTo,
    Transferred,
    decode_prefetch_answer,
    encode_request,
)
from swarmcache.locate import files_of

EXIT_UNREADABLE = 1
EXIT_NOT_PLACED = 3

Answer = Placed | NodeSilent | Notice | Transferred


@dataclass(slots=True)
class NodeResult:
    """What a node has of all files. ``hits``: of these, what it had before."""

    name: str
    count: int = 0
    size_bytes: int = 0
    hits: int = 0


def run_prefetch(
    client: Client,
    paths: Sequence[bytes],
    *,
    nodes: Sequence[str],
    copies: int | None,
    bundle: bool | None,
    progress: bool,
    as_json: bool,
) -> int:
    """Bring the files to the nodes, print what each has then, and return the exit code.

    ``nodes``: names; ``copies``: how many nodes shall have them; neither: all. Raises
    DaemonUnavailable, DaemonRefused, BadMessage.
    """
    shown = progress and sys.stderr is not None and sys.stderr.isatty()
    display = TransferDisplay() if shown else None
    try:
        with printing(), ExitStack() as stack:
            array = stack.enter_context(JsonArray()) if as_json else None
            run = _Run(client, nodes, copies, array, display)
            try:
                for batch in run.batches(paths, bundle):
                    run.bring(batch)
            finally:
                run.clear()
            if array is None:
                run.show()
    except KeyboardInterrupt:
        return 130  # as a shell does: 128 + SIGINT
    return run.exit_code()


class _Run:
    def __init__(
        self,
        client: Client,
        nodes: Sequence[str],
        copies: int | None,
        array: JsonArray | None,
        display: TransferDisplay | None,
    ) -> None:
        self._client = client
        self._nodes = list(nodes)
        self._copies = copies
        self._array = array
        self._display = display
        self._results: dict[str, NodeResult] = {}
        self._count = 0  # of files that can be brought
        self._unreadable = False
        self._failed = False
        self._said: set[str] = set()

    # --- the files ------------------------------------------------------------------------------

    def batches(self, paths: Sequence[bytes], bundle: bool | None) -> Iterator[list[Source]]:
        """The files that ``paths`` stand for, open, as many as one request may be about."""
        seen: set[bytes] = set()
        batch: list[Source] = []
        try:
            for path in chain.from_iterable(
                files_of(each, bundle, self._cannot_read) for each in paths
            ):
                try:
                    source = open_source(path)
                except SourceUnreadable as error:
                    self._cannot_read(path, str(error))
                    continue
                batch.append(source)
                if source.real_path in seen:
                    batch.pop().close()
                seen.add(source.real_path)
                if len(batch) == PREFETCH_FILES_MAX:
                    yield batch
                    _close(batch)
            if batch:
                yield batch
        finally:
            _close(batch)

    # --- the nodes ------------------------------------------------------------------------------

    def bring(self, files: Sequence[Source]) -> None:
        """One request."""
        request = PrefetchTo(len(files), self._nodes[:PREFETCH_NODES_MAX], self._copies)
        answers: Iterator[Answer] = answer_stream.ask(
            self._client,
            encode_request(request),
            decode_prefetch_answer,
            LINE_MAX_BYTES,
            [source.fd for source in files],
        )
        self._count += len(files)
        placed: dict[str, int] = {}
        for answer in answers:
            match answer:
                case Transferred():
                    if self._display is not None:
                        self._display.show("prefetch", answer.done_bytes, answer.total_bytes)
                case Notice():
                    self._complain(answer.text)
                case NodeSilent():
                    self._silent(answer, files)
                case Placed():
                    if self._placed(answer, files[answer.file]):
                        placed[answer.node] = placed.get(answer.node, 0) + 1
        if self._copies is not None:  # the next files go to the same nodes
            complete = [node for node, count in placed.items() if count == len(files)]
            former = [node for node in self._nodes if node in complete]
            self._nodes = former + [node for node in complete if node not in former]

    def _placed(self, answer: Placed, file: Source) -> bool:
        """Whether the file is there."""
        if not answer.node:
            self._count -= 1
            self._cannot_read(file.real_path, answer.reason)
            return False
        result = self._results.setdefault(answer.node, NodeResult(answer.name))
        if answer.reason:
            self._failed = True
            self._complain(
                f"{answer.name} ({answer.node}): {os.fsdecode(file.real_path)!r}: {answer.reason}"
            )
        else:
            result.count += 1
            result.size_bytes += file.size_bytes
            result.hits += answer.hit
        self._add(file, answer.node, answer.name, hit=answer.hit, reason=answer.reason)
        return not answer.reason

    def _silent(self, answer: NodeSilent, files: Sequence[Source]) -> None:
        self._failed = True
        self._complain(f"{answer.node} is not asked any more: {answer.reason}")
        for file in files:
            self._add(file, answer.node, "", hit=False, reason=answer.reason)

    def _add(self, file: Source, node: str, name: str, *, hit: bool, reason: str) -> None:
        if self._array is not None:
            self._array.add(
                {
                    **path_fields("path", file.real_path),
                    "size_bytes": file.size_bytes,
                    "node": node,
                    "name": name or node,
                    "placed": not reason,
                    "hit": hit,
                    "reason": reason,
                }
            )

    # --- what people see ------------------------------------------------------------------------

    def _cannot_read(self, path: bytes, reason: str) -> None:
        self._unreadable = True
        self._complain(f"{os.fsdecode(path)!r}: {reason}")

    def _complain(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.clear()
            say(text)

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._display is not None:
            self._display.clear()

    def show(self) -> None:
        """A line per node."""
        names = [result.name for result in self._results.values()]
        for node, result in sorted(self._results.items(), key=lambda item: (item[1].name, item[0])):
            name = result.name if names.count(result.name) == 1 else node
            before = f", {result.hits} of them before" if result.hits else ""
            size = size_text(result.size_bytes)
            print(f"{name}: {result.count} of {self._count} files, {size}{before}")

    def exit_code(self) -> int:
        """What became of all of it. Says on stderr where there are too few nodes."""
        complete = sum(result.count == self._count for result in self._results.values())
        missing = self._failed
        if self._copies is not None and self._count:
            missing = complete < self._copies
            if missing:
                say(f"{complete} of {self._copies} nodes have all files")
        if self._unreadable:
            return EXIT_UNREADABLE
        return EXIT_NOT_PLACED if missing else 0


def _close(batch: list[Source]) -> None:
    while batch:
        batch.pop().close()
