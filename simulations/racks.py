"""Racks: nodes that reach the others, and the file server, over two links which they share.

The file server stands in no rack. ``label`` is what daemons have as ``daemon.rack``.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulations.network import Link
from simulations.settings import ClusterSettings


@dataclass(frozen=True, slots=True)
class Rack:
    """The links of one rack: out of it, and into it."""

    label: str
    up: Link
    down: Link


def racks_of(settings: ClusterSettings) -> list[Rack | None]:
    """The rack of every node, by number; None for all where there are none."""
    if not settings.rack_nodes:
        return [None] * settings.nodes
    rate = settings.rack_rate
    count = -(-settings.nodes // settings.rack_nodes)
    racks = [
        Rack(
            f"rack {number}" if settings.rack_labels else "",
            Link(f"rack {number} up", rate),
            Link(f"rack {number} down", rate),
        )
        for number in range(count)
    ]
    return [racks[index // settings.rack_nodes] for index in range(settings.nodes)]


def between(source: Rack | None, destination: Rack | None) -> tuple[Link, ...]:
    """The links of racks on a way. None: the file server, or a cluster without racks."""
    if source is destination:
        return ()
    out = (source.up,) if source is not None else ()
    return (*out, destination.down) if destination is not None else out
