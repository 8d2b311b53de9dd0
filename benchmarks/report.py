"""Figures, each beside what it is compared with, and the table that shows them.

A figure is met or not, in words; it is for people to judge, so a target that is missed ends
nothing. What is compared takes turns, so that a machine that is slow for a while is slow for both.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Skipped(Exception):
    """This machine cannot run a benchmark; the message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for. ``quick``: the smallest variant, which measures nothing.

    ``files``: how many files ``many_files`` and ``small_files`` have.
    """

    runs: int | None = None
    quick: bool = False
    files: int | None = None

    def choose_runs(self, usual: int) -> int:
        """How often to repeat a measurement whose usual number of runs is given."""
        return self.runs or (1 if self.quick else usual)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest value of several runs."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, unit: str = "") -> str:
        """For the table, such as ``12.1 (11.8..13.0) ms``; one value is shown alone."""
        shown = _number(self.median)
        if self.min != self.max:
            shown += f" ({_number(self.min)}..{_number(self.max)})"
        return f"{shown} {unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    ``unit`` is that of ``value`` and ``compared_value``; ``ratio`` is the first by the second.
    ``met`` is None where there is no target.
    """

    what: str
    value: Spread
    unit: str = ""
    compared_with: str = ""
    compared_value: Spread | None = None
    target: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Of the medians; None where nothing is compared, or with zero."""
        if self.compared_value is None or self.compared_value.median == 0:
            return None
        return self.value.median / self.compared_value.median

    def verdict(self) -> str:
        """Met or not, in words."""
        return "" if self.met is None else "met" if self.met else "NOT MET"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        compared = self.compared_value
        return {
            "what": self.what,
            "unit": self.unit,
            "value": _spread_dict(self.value),
            "compared_with": self.compared_with,
            "compared_value": _spread_dict(compared) if compared is not None else None,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met,
        }


def in_turns(
    first: Callable[[], float], second: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
    """Measure both ``pairs`` times; they take turns at going first. The results of each."""
    results: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        for index in order:
            results[index].append((first, second)[index]())
    return results


def machine() -> dict[str, Any]:
    """What the figures were measured on; the load tells whether others used it too."""
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


HEADINGS = ("what", "value", "compared with", "ratio", "target", "met?")


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines of text, a column as wide as its widest cell."""
    rows = [HEADINGS, *(_cells(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(figure: Figure) -> tuple[str, ...]:
    compared = figure.compared_with
    if figure.compared_value is not None:
        compared = f"{compared}: {figure.compared_value.text(figure.unit)}"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    value = figure.value.text(figure.unit)
    return (figure.what, value, compared, ratio, figure.target, figure.verdict())


def _number(value: float) -> str:
    """Three digits that matter, or all before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{digits}f}"


def _spread_dict(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "min": spread.min, "max": spread.max}
