"""How messages travel between simulated machines, and what holds them up.

Connections are TCP: messages of one connection arrive in order or not at all. So a lost packet is
seen as a delay, and a cut as a silence that ends in a broken connection; no message inside a
connection is ever lost, doubled or overtaken. (Datagrams of the gossip
are simulated apart, by ``gossip_cluster.py``.)

A *cut* holds up whatever its senders send to its receivers until it ends. A short one is a delay.

Invariant: what was held up is delivered in the order in which it was sent, before anything that was
sent later on the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simulations.engine import Engine

TRACKER = "tracker"


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Nothing gets from any of the senders to any of the receivers."""

    senders: frozenset[str]
    receivers: frozenset[str]

    def holds_up(self, sender: str, receiver: str) -> bool:
        """Whether it lies on this way."""
        return sender in self.senders and receiver in self.receivers


class Wires:
    """All ways between machines, each of ``latency_s``."""

    def __init__(self, engine: Engine, latency_s: float) -> None:
        self._engine = engine
        self._latency_s = latency_s
        self._cuts: dict[Cut, None] = {}
        self._held_up: dict[tuple[str, str], list[tuple[Callable[[Any], None], object]]] = {}

    @property
    def cut(self) -> bool:
        """There is a cut somewhere."""
        return bool(self._cuts)

    def cuts(self) -> list[Cut]:
        """All cuts that there are."""
        return list(self._cuts)

    def blocked(self, sender: str, receiver: str) -> bool:
        """Nothing gets through on this way."""
        return any(cut.holds_up(sender, receiver) for cut in self._cuts)

    def send(
        self, sender: str, receiver: str, action: Callable[[Any], None], argument: object
    ) -> None:
        """Run ``action(argument)`` when what is sent now arrives."""
        if self._cuts and self.blocked(sender, receiver):
            self._held_up.setdefault((sender, receiver), []).append((action, argument))
        else:
            self._engine.at(self._engine.now_s + self._latency_s, action, argument)

    def begin(self, cut: Cut) -> None:
        """Cut."""
        self._cuts[cut] = None

    def end(self, cut: Cut) -> None:
        """Mend: what was held up, and is not by another cut, goes on its way."""
        self._cuts.pop(cut, None)
        arrival_s = self._engine.now_s + self._latency_s
        for way in list(self._held_up):
            if not self.blocked(*way):
                for action, argument in self._held_up.pop(way):
                    self._engine.at(arrival_s, action, argument)
