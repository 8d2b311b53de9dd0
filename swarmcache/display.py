"""What people see on a terminal: progress.

Imports rich, so it is imported only when there is something to show.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import neg
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from swarmcache.client import Progress

if TYPE_CHECKING:
    from swarmcache.cp import CopyProgress

NAME_COLUMNS_MAX = 28
BINARY_UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]


def size_text(size_bytes: int) -> str:
    """A size for people, rounded: "1.5 GiB"."""
    unit, suffix = pick_unit_and_suffix(size_bytes, BINARY_UNITS, 1024)
    return f"{size_bytes} B" if unit == 1 else f"{size_bytes / unit:.1f} {suffix}"


# --- progress ------------------------------------------------------------------------------------


class _Figures(NamedTuple):
    """The size of a file, and what there is of it by where it came from; or of many together."""

    size_bytes: int
    recovered_bytes: int
    from_peers_bytes: int
    from_file_server_bytes: int


_NO_FIGURES = _Figures(0, 0, 0, 0)


class ProgressDisplay:
    """One bar for all files of a ``get``, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._files: dict[int, _Figures] = {}  # as they were told last, by index
        self._all = _NO_FIGURES
        self._bar: _SwarmProgress | None = None
        self._task = TaskID(0)

    def show(self, progress: Progress) -> None:
        former = self._files.get(progress.index, _NO_FIGURES)
        latest = self._files[progress.index] = _figures(progress)
        # Not added up anew: of a hundred thousand files each tells of itself once at least.
        self._all = _Figures(*map(sum, zip(self._all, latest, map(neg, former), strict=True)))
        if self._bar is None:
            self._bar = _SwarmProgress(self._console)
            self._task = self._bar.add_task("", total=None, sources="")
        self._bar.update(
            self._task,
            description=_name_text(progress.asked, len(self._files)),
            total=self._all.size_bytes,
            completed=sum(self._all[1:]),
            sources=_sources_text(self._all, progress),
        )
        self._bar.start()

    def clear(self) -> None:
        """Take the bar from the terminal until ``show`` is called again."""
        if self._bar is not None:
            self._bar.stop()


class CopyDisplay:
    """One bar for all files of a ``cp``, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = _SwarmProgress(console or Console(stderr=True))
        self._task = self._bar.add_task("", total=None, sources="")
        self._files: dict[int, tuple[int, int]] = {}  # size and what is done, by index

    def show(self, progress: CopyProgress) -> None:
        self._files[progress.index] = (progress.size_bytes, progress.done_bytes)
        waiting = f"waiting for a slot of {progress.waiting_for}" if progress.waiting_for else ""
        self._bar.update(
            self._task,
            description=_name_text(os.fsdecode(progress.source), len(self._files)),
            total=sum(size_bytes for size_bytes, _ in self._files.values()),
            completed=sum(done_bytes for _, done_bytes in self._files.values()),
            sources=waiting or "to the file server",
        )
        self._bar.start()

    def clear(self) -> None:
        """Take the bar from the terminal until ``show`` is called again."""
        self._bar.stop()


class TransferDisplay:
    """One bar for all that is brought somewhere, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = _SwarmProgress(console or Console(stderr=True))
        self._task = self._bar.add_task("", total=None, sources="")

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self._bar.update(self._task, description=what, total=total_bytes, completed=done_bytes)
        self._bar.start()

    def clear(self) -> None:
        """Take the bar from the terminal until ``show`` is called again."""
        self._bar.stop()


class _SwarmProgress(RichProgress):
    """A bar with bytes, rate and remaining time, and below it a line that says where from.

    Where the terminal has gone nobody looks, and nothing is shown from then on: what the bar is
    about goes on.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
            redirect_stdout=False,  # stdout carries paths, whatever it is
            redirect_stderr=False,
        )

    def start(self) -> None:
        with self._while_there_is_a_terminal():
            super().start()

    def stop(self) -> None:
        with self._while_there_is_a_terminal():
            super().stop()

    @contextmanager
    def _while_there_is_a_terminal(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.disable = True
            sys.stderr = None  # else Python tries once more at its end, and exits with 120

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        tasks = list(tasks)
        table = Table.grid(expand=True)
        table.add_row(super().make_tasks_table(tasks))
        for task in tasks:
            table.add_row(Text(task.fields["sources"], style="dim"))
        return table


def _name_text(asked: str, file_count: int) -> str:
    if file_count > 1:
        return f"{file_count} files"
    name = os.path.basename(asked.rstrip("/")).encode(errors="replace").decode()
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= NAME_COLUMNS_MAX else name[: NAME_COLUMNS_MAX - 1] + "…"


def _figures(progress: Progress) -> _Figures:
    return _Figures(
        progress.size_bytes,
        progress.recovered_bytes,
        progress.from_peers_bytes,
        progress.from_file_server_bytes,
    )


def _sources_text(figures: _Figures, latest: Progress) -> str:
    parts = [
        f"{size_text(figures.from_peers_bytes)} from {latest.peers} peers",
        f"{size_text(figures.from_file_server_bytes)} from the file server",
    ]
    if figures.recovered_bytes:
        parts.append(f"{size_text(figures.recovered_bytes)} from an earlier attempt")
    if latest.waiting_for:
        parts.append(f"waiting for {latest.waiting_for}")
    return ", ".join(parts)
