"""How one run went, as a picture of four plots. Needs matplotlib, the extra ``plots``.

Matplotlib is imported only when something is to be drawn, without its global state: no display, no
settings of the user's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from simulations.scenarios import Result
from swarmcache.quantities import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (11.0, 7.5)
BARS_MAX = 40
OURS, LIMIT, MORE = "#1f6f8b", "#c0392b", "#e0a030"
SUFFIXES = (".png", ".svg", ".pdf")


def problem_with(path: str) -> str | None:
    """Why nothing could be drawn there. Asked before a run of minutes, not after it."""
    if find_spec("matplotlib") is None:
        return "needs matplotlib: pip install 'swarmcache[plots]'"
    if Path(path).suffix not in SUFFIXES:
        return f"expected a name that ends in {' or '.join(SUFFIXES)}"
    if not Path(path).absolute().parent.is_dir():
        return "there is no such directory"
    return None


def draw(result: Result, path: str) -> None:
    """Write the picture. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(
        f"{result.scenario}: {format_size(result.size_bytes)} to {result.nodes} nodes, "
        f"seed {result.seed}, efficiency {result.efficiency:.3f}"
    )
    _completion(axes[0][0], result)
    _readers(axes[0][1], result)
    _sources(axes[1][0], result)
    _distribution(axes[1][1], result)
    figure.savefig(path, metadata={"Date": None} if path.endswith((".svg", ".pdf")) else None)


def _completion(axes: Axes, result: Result) -> None:
    """How many nodes have the file when, and the instant before which no protocol could be done."""
    times_s = result.observed.answered_s
    axes.step([0.0, *times_s], range(len(times_s) + 1), where="post", color=OURS, label="nodes")
    axes.axvline(result.bound_s, color=LIMIT, linestyle="--", label="fluid bound")
    axes.set(title="Nodes that have the file", xlabel="s", ylabel="nodes", ylim=0, xlim=0)
    axes.legend(loc="upper left")


def _readers(axes: Axes, result: Result) -> None:
    """How many nodes read from the file server, and how many may."""
    readers = [*result.observed.readers, (result.last_node_s, result.observed.readers[-1][1])]
    times_s, counts = zip(*readers, strict=True)
    axes.step(times_s, counts, where="post", color=OURS, label="readers")
    axes.axhline(result.slots_max, color=LIMIT, linestyle="--", label="slots")
    axes.set(title="Readers of the file server", xlabel="s", ylim=0, xlim=0)
    axes.legend(loc="lower right")


def _sources(axes: Axes, result: Result) -> None:
    """What each machine has sent, in sizes of the file: the file server, then the busiest node
    first."""
    observed = result.observed
    sent = sorted((each / result.size_bytes for each in observed.sent_bytes), reverse=True)
    axes.fill_between(range(1, len(sent) + 1), sent, step="mid", color=OURS, label="nodes")
    server = observed.server_bytes / result.size_bytes
    axes.axhline(server, color=MORE, label="file server")
    axes.set(title="Bytes by source, busiest node first", xlabel="node", ylabel="x size of file")
    axes.set(ylim=0, xlim=(0.5, len(sent) + 0.5))
    axes.legend(loc="upper right")


def _distribution(axes: Axes, result: Result) -> None:
    """How many nodes took how long."""
    times_s = result.observed.answered_s
    axes.hist(times_s, bins=min(BARS_MAX, max(len(times_s) // 4, 5)), color=OURS)
    axes.axvline(result.median_node_s, color=MORE, label="median")
    axes.set(title="Time until a node has the file", xlabel="s", ylabel="nodes")
    axes.legend(loc="upper left")
