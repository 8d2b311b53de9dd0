"""How gossip went, as a picture: bytes, and what was known when. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulations.gossip_scenarios import GossipResult
from simulations.plots import LIMIT, MORE, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_INCHES = (5.0, 3.8)
# What the project promises of every node, over ten seconds.
BYTES_PER_S_MAX = 16_000


def draw(result: GossipResult, path: str) -> None:
    """Write the picture. Raises OSError."""
    from matplotlib.figure import Figure

    panels = [_bytes]
    if result.ages_s:
        panels.append(_ages)
    if result.known:
        panels.append(_known)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    settings = result.settings
    figure.suptitle(
        f"gossip {result.scenario}: {settings.nodes} nodes, {settings.loss:.0%} loss, "
        f"seed {settings.seed}"
    )
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(axes, result)
    figure.savefig(path, metadata={"Date": None} if path.endswith((".svg", ".pdf")) else None)


def _bytes(axes: Axes, result: GossipResult) -> None:
    """What the nodes have sent in each second."""
    for number, (name, color) in enumerate((("mean", OURS), ("p99 of the nodes", MORE))):
        axes.plot([each[number] for each in result.sent], color=color, label=name)
    axes.axhline(BYTES_PER_S_MAX, color=LIMIT, linestyle="--", label="limit over 10 s")
    axes.set(title="Bytes sent per node", xlabel="s", ylabel="bytes/s", ylim=0, xlim=0)
    axes.legend(loc="best")


def _ages(axes: Axes, result: GossipResult) -> None:
    """Which part of what everybody knows of everybody is how old at most."""
    count = len(result.ages_s)
    parts = [(number + 1) / count for number in range(count)]
    axes.step(result.ages_s, parts, where="post", color=OURS)
    axes.set(title="Age of a status", xlabel="s", ylabel="part", ylim=(0, 1), xlim=0)


def _known(axes: Axes, result: GossipResult) -> None:
    """How many nodes knew it when, for each thing that there was to know."""
    for times_s in result.known:
        axes.step([0.0, *times_s], range(len(times_s) + 1), where="post", color=OURS, alpha=0.6)
    axes.set(title="Nodes that know", xlabel="s", ylabel="nodes", ylim=0, xlim=0)
