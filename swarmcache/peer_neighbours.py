"""The nodes that share swarms with this one: who is connected, who is dialled, who is left alone.

Pure logic, and a part of ``PeerState``. What neighbours tell one another, and who is asked for
what, is none of its business.

Of two neighbours the one with the lower node id dials. A connection that breaks is made again,
later each time; one that no swarm needs any more is kept for a while. Who is dead according to all
others is dialled now and then only, in case that they are wrong.

Invariant: a neighbour that shares a swarm with this node, and is this node's to dial, is connected,
or being dialled, or there is a time at which it will be.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from swarmcache.messages import NodeAddress
from swarmcache.peer_events import DialPeer, HangUp, PeerEffect
from swarmcache.timers import Timers

REDIAL_S = 1.0
REDIAL_MAX_S = 30.0
# A connection that no swarm needs any more is kept this long for the next one.
LINGER_S = 30.0
# As many as a node fetches at once and more; one that is forgotten costs a second or so.
UNHEARD_MAX = 256


@dataclass(slots=True)
class Neighbour:
    """Another node that shares at least one swarm with this one, or did until recently.

    ``versions``: the file versions, and how their swarms cut them (0: not told). ``unheard``: those
    of which it has told over this connection when nothing could be made of that here, the latest
    ones. ``dead``: all others say so, and nothing was heard of it since.
    """

    address: NodeAddress
    versions: dict[bytes, int] = field(default_factory=dict)
    unheard: dict[bytes, None] = field(default_factory=dict)
    up: bool = False
    dialling: bool = False
    dead: bool = False
    failures: int = 0

    def not_heard(self, version_id: bytes) -> None:
        """It has told of chunks of this file version, which is not being fetched (yet)."""
        self.unheard[version_id] = None
        if len(self.unheard) > UNHEARD_MAX:
            del self.unheard[next(iter(self.unheard))]


class PeerNeighbours:
    """All neighbours of the node with this id."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._neighbours: dict[str, Neighbour] = {}
        self._timers: Timers[str] = Timers()

    # --- what is known --------------------------------------------------------------------------

    def get(self, node: str) -> Neighbour | None:
        """This neighbour, or None where it is none."""
        return self._neighbours.get(node)

    def all(self) -> Iterable[Neighbour]:
        """Every neighbour, and those that were until recently."""
        return self._neighbours.values()

    def of(self, version_id: bytes) -> list[Neighbour]:
        """Those that share the swarm of this file version."""
        return [each for each in self._neighbours.values() if version_id in each.versions]

    # --- swarms ---------------------------------------------------------------------------------

    def meet(
        self,
        address: NodeAddress,
        version_id: bytes,
        chunk_size_bytes: int,
        effects: list[PeerEffect],
    ) -> Neighbour:
        """Share a swarm with this node from now on. It is dialled where need be."""
        neighbour = self._neighbours.get(address.node)
        if neighbour is None:
            neighbour = self._neighbours[address.node] = Neighbour(address)
        neighbour.address = address
        neighbour.dead = False  # or else the tracker had no connection with it
        neighbour.versions[version_id] = chunk_size_bytes
        self._timers.set(address.node, None)
        self._dial(neighbour, effects)
        return neighbour

    def part(self, node: str, version_id: bytes, now_s: float) -> None:
        """There is nothing left to exchange with this neighbour in this swarm."""
        neighbour = self._neighbours.get(node)
        if neighbour is not None:
            neighbour.versions.pop(version_id, None)
            if not neighbour.versions:
                self._timers.set(node, now_s + LINGER_S)

    # --- connections ----------------------------------------------------------------------------

    def connected(self, address: NodeAddress, now_s: float) -> Neighbour:
        """There is a connection, whoever of both has made it."""
        neighbour = self._neighbours.get(address.node)
        if neighbour is None:
            # It heard of us from the tracker before we heard of it.
            neighbour = self._neighbours[address.node] = Neighbour(address)
        neighbour.address = address
        neighbour.unheard.clear()
        neighbour.dialling = False
        neighbour.up = True
        neighbour.dead = False
        neighbour.failures = 0
        if not neighbour.versions:
            self._timers.set(address.node, now_s + LINGER_S)
        return neighbour

    def lost(self, node: str, wanted: Container[bytes], now_s: float) -> list[bytes]:
        """There is no connection any more. Returns which swarms both were in.

        Only in those of ``wanted`` file versions they still are: where this node has the whole
        file, it is for the other one to come again.
        """
        neighbour = self._neighbours.get(node)
        if neighbour is None:
            return []
        neighbour.dialling = False
        neighbour.up = False
        shared = sorted(neighbour.versions)
        for version_id in shared:
            if version_id not in wanted:
                del neighbour.versions[version_id]
        if neighbour.versions:
            neighbour.failures += 1
            wait_s = min(REDIAL_S * 2 ** (neighbour.failures - 1), REDIAL_MAX_S)
            self._timers.set(node, now_s + (REDIAL_MAX_S if neighbour.dead else wait_s))
        else:
            del self._neighbours[node]
            self._timers.set(node, None)
        return shared

    def died(self, node: str, effects: list[PeerEffect]) -> bool:
        """All others say that this node is dead: hang up. Returns whether it is ``lost`` by that.

        Should it be alive after all, it hears that we hang up, or dials, or is introduced again.
        """
        neighbour = self._neighbours.get(node)
        if neighbour is None or neighbour.dead:
            return False
        neighbour.dead = True
        if neighbour.up:
            effects.append(HangUp(node))
        return not neighbour.dialling  # or else that fails soon

    def came_back(self, node: str, effects: list[PeerEffect]) -> None:
        """It lives after all, or again: dial at once."""
        neighbour = self._neighbours.get(node)
        if neighbour is not None and neighbour.dead:
            neighbour.dead = False
            neighbour.failures = 0
            self._look_after(neighbour, effects)

    # --- time -----------------------------------------------------------------------------------

    def wake_at_s(self) -> float | None:
        """When ``look_after`` is next due."""
        return self._timers.next_at_s()

    def look_after(self, now_s: float, effects: list[PeerEffect]) -> None:
        """Dial again, and hang up what no swarm needs, where it is time."""
        for node in self._timers.pop_due(now_s):
            neighbour = self._neighbours.get(node)
            if neighbour is not None:
                self._look_after(neighbour, effects)

    def check(self) -> None:
        """Assert the invariant."""
        self._timers.check()
        for node, neighbour in self._neighbours.items():
            assert node == neighbour.address.node, "a neighbour under another's name"
            assert not (neighbour.up and neighbour.dialling), "dialling a neighbour that is up"
            ours = neighbour.versions and self._node < node
            coming = neighbour.up or neighbour.dialling or self._timers.at_s(node) is not None
            assert coming or not ours, "a neighbour that this node would never dial again"

    # --- inside ---------------------------------------------------------------------------------

    def _dial(self, neighbour: Neighbour, effects: list[PeerEffect]) -> None:
        ours = self._node < neighbour.address.node
        if ours and not neighbour.up and not neighbour.dialling:
            neighbour.dialling = True
            effects.append(DialPeer(neighbour.address))

    def _look_after(self, neighbour: Neighbour, effects: list[PeerEffect]) -> None:
        if neighbour.dialling:
            return
        if neighbour.versions:
            self._dial(neighbour, effects)
            return
        del self._neighbours[neighbour.address.node]
        if neighbour.up:
            effects.append(HangUp(neighbour.address.node))
