"""How else a file gets from a file server to many nodes at once, on the same links.

Each method is a small model of its own, on the network and the clock of the simulations. They have
in common what favours them: nobody fails, nobody comes late, messages and decisions cost nothing,
everybody knows at every instant what everybody else has, nothing is digested.

* ``cp``: every node reads the whole file.
* ``whole files``: copies of whole files, under slots, as the predecessor of swarmcache (RWTH's
  CacheManager) makes them with its default settings. Left out: its checks of a source by ssh, of
  0.2 s and more for every copy.
* ``random swarm``: chunks at random from neighbours at random, as in BitTorrent with one seed. The
  file server is one more neighbour of every node. Left out: choking, tit for tat, pieces of blocks.
* ``tree``: the file server at the root, every node sends each chunk on to two others as soon as it
  has it. ``chain``: to one other. Both must know all nodes beforehand, and survive none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from simulations.engine import Engine, SimulationFailed
from simulations.network import Flow, Link, Network
from simulations.settings import ClusterSettings
from swarmcache.chunks import ChunkLayout, chunks_in, full_mask

EVENTS_MAX = 100_000_000
# Defaults of CacheManager's configuration: copies from one file server and from one node at a time,
# and how long a client sleeps that was told to wait.
PREDECESSOR_SERVER_SLOTS = 20
PREDECESSOR_NODE_SLOTS = 1
PREDECESSOR_WAIT_S = 10.0
TREE_CHILDREN = 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one method came to. ``efficiency`` is for the last node, as for a scenario."""

    method: str
    nodes: int
    last_node_s: float
    efficiency: float
    server_bytes: int
    readers_peak: int


@dataclass(slots=True, eq=False)
class Machine:
    """A node, or the file server. ``held``: mask of its chunks; ``asked``: and of those on their
    way to it. ``places``: how many more it may send to at once."""

    up: Link
    down: Link
    held: int = 0
    asked: int = 0
    flights: int = 0
    places: int = 0
    neighbours: list[Machine] = field(default_factory=list)


class Copy(Flow):
    """Bytes on their way from one machine to another. ``then``: what follows."""

    __slots__ = ("chunk", "destination", "source", "then", "world")

    def __init__(
        self,
        world: World,
        source: Machine,
        destination: Machine,
        length_bytes: int,
        then: Callable[[Copy], None],
        chunk: int = 0,
    ) -> None:
        self.world = world
        self.source = source
        self.destination = destination
        self.chunk = chunk
        self.then = then
        super().__init__(source.up, destination.down, length_bytes, math.inf)

    def ended(self, complete: bool) -> None:
        assert complete, "a copy without a deadline ended early"
        self.world.ended(self)


class World:
    """Nodes and a file server of which everybody wants one file at time zero.

    With ``settings.reader_cost`` c, n readers together get 1 / (1 + c * (n - 1)) of its rate.
    """

    def __init__(self, settings: ClusterSettings, size_bytes: int) -> None:
        self.settings = settings
        self.layout = ChunkLayout(size_bytes, settings.cut_bytes(size_bytes))
        self.full = full_mask(self.layout.chunk_count)
        self.engine = Engine(EVENTS_MAX)
        self.network = Network(self.engine)
        self.rng = Random(f"{settings.seed} comparison")
        rate = settings.file_server_rate
        self.server = Machine(Link("file server up", rate), Link("file server down", rate))
        self.server.held = self.full
        self.nodes = [
            Machine(
                Link(f"node {index} up", settings.node_rate),
                Link(f"node {index} down", settings.node_rate),
            )
            for index in range(settings.nodes)
        ]
        self.done = 0
        self.last_node_s = 0.0
        self.readers_peak = 0
        self._reading: dict[Machine, int] = {}

    def copy(self, copy: Copy) -> None:
        """Bytes go on their way."""
        if copy.source is self.server:
            self._reading[copy.destination] = self._reading.get(copy.destination, 0) + 1
            self._adapt()
        self.network.start(copy)

    def copy_whole(
        self, source: Machine, destination: Machine, then: Callable[[Copy], None]
    ) -> None:
        """A copy of the whole file."""
        self.copy(Copy(self, source, destination, self.layout.size_bytes, then))

    def copy_chunk(
        self, source: Machine, destination: Machine, chunk: int, then: Callable[[Copy], None]
    ) -> None:
        """A copy of one chunk."""
        length_bytes = self.layout.length_bytes(chunk)
        self.copy(Copy(self, source, destination, length_bytes, then, chunk))

    def ended(self, copy: Copy) -> None:
        """Bytes have arrived."""
        if copy.source is self.server:
            self._reading[copy.destination] -= 1
            if not self._reading[copy.destination]:
                del self._reading[copy.destination]
            self._adapt()
        copy.then(copy)

    def has_all(self, node: Machine) -> None:
        """A node has the whole file."""
        node.held = self.full
        self.done += 1
        self.last_node_s = self.engine.now_s

    def _adapt(self) -> None:
        readers = len(self._reading)
        self.readers_peak = max(self.readers_peak, readers)
        cost = self.settings.reader_cost
        rate = self.settings.file_server_rate / (1 + cost * max(readers - 1, 0))
        if rate != self.server.up.rate:
            self.network.set_rate(self.server.up, rate)


def cp(world: World) -> None:
    """Every node reads the whole file from the file server, all at once."""
    for node in world.nodes:
        world.copy_whole(world.server, node, lambda copy: world.has_all(copy.destination))


def whole_files(world: World) -> None:
    """Who asks is sent to a node that has the file and a free slot, or to the file server if that
    has one, or to sleep."""
    world.server.places = PREDECESSOR_SERVER_SLOTS
    holders: list[Machine] = []

    def ask(node: Machine) -> None:
        free = [holder for holder in holders if holder.places]
        if not free and world.server.places:
            free = [world.server]
        if not free:
            world.engine.at(world.engine.now_s + PREDECESSOR_WAIT_S, ask, node)
            return
        source = world.rng.choice(free)
        source.places -= 1
        world.copy_whole(source, node, copied)

    def copied(copy: Copy) -> None:
        world.has_all(copy.destination)
        copy.source.places += 1
        copy.destination.places = PREDECESSOR_NODE_SLOTS
        holders.append(copy.destination)

    for node in world.nodes:
        world.engine.at(0.0, ask, node)


def random_swarm(world: World) -> None:
    """As many chunks in flight as in swarmcache, as many neighbours, as many uploads at once; from
    the file server as many as it has slots."""
    settings, rng, server = world.settings, world.rng, world.server
    server.places = settings.slots_max
    server.neighbours = list(world.nodes)
    for node in world.nodes:
        node.places = settings.uploads_max
    for first, second in _pairs(len(world.nodes), settings.peers_max, rng):
        world.nodes[first].neighbours.append(world.nodes[second])
        world.nodes[second].neighbours.append(world.nodes[first])

    def fill(node: Machine) -> None:
        while node.flights < settings.uploads_max:
            lacking = world.full & ~node.asked
            sources = [each for each in node.neighbours if each.places and each.held & lacking]
            if server.places and lacking:
                sources.append(server)
            if not sources:
                return
            fetch(rng.choice(sources), node)

    def offer(source: Machine) -> None:
        count = len(source.neighbours)
        start = rng.randrange(count) if count and source.places else 0
        for number in range(start, start + count):
            if not source.places:
                return
            node = source.neighbours[number % count]
            if node.flights < settings.uploads_max and source.held & ~node.asked:
                fetch(source, node)

    def fetch(source: Machine, node: Machine) -> None:
        chunk = rng.choice(chunks_in(source.held & ~node.asked))
        node.asked |= 1 << chunk
        node.flights += 1
        source.places -= 1
        world.copy_chunk(source, node, chunk, arrived)

    def arrived(copy: Copy) -> None:
        source, node = copy.source, copy.destination
        source.places += 1
        node.flights -= 1
        node.held |= 1 << copy.chunk
        if node.held == world.full:
            world.has_all(node)
        fill(node)
        offer(source)
        offer(node)

    for node in rng.sample(world.nodes, len(world.nodes)):
        world.engine.at(0.0, fill, node)


def _pairs(count: int, neighbours: int, rng: Random) -> list[tuple[int, int]]:
    """Who knows whom: everybody knows half of ``neighbours``, drawn, and is known by as many."""
    wanted = min(max(neighbours // 2, 1), count - 1)
    pairs: dict[tuple[int, int], None] = {}
    for first in range(count):
        for drawn in rng.sample(range(count - 1), wanted):
            second = drawn + (drawn >= first)
            pairs[min(first, second), max(first, second)] = None
    return list(pairs)


def tree(world: World, children: int = TREE_CHILDREN) -> None:
    """Chunks in the order of the file, from everybody to the same others."""
    everybody = [world.server, *world.nodes]
    for number, machine in enumerate(everybody):
        machine.neighbours = everybody[number * children + 1 : (number + 1) * children + 1]

    def send(source: Machine, destination: Machine, chunk: int) -> None:
        destination.flights = 1
        world.copy_chunk(source, destination, chunk, arrived)

    def arrived(copy: Copy) -> None:
        node, following = copy.destination, copy.chunk + 1
        node.held |= 1 << copy.chunk
        node.flights = 0
        if following == world.layout.chunk_count:
            world.has_all(node)
        elif copy.source.held >> following & 1:
            send(copy.source, node, following)
        for child in node.neighbours:
            # It waits for just this chunk, or is being sent an earlier one and comes to this.
            if not child.flights and child.held.bit_count() == copy.chunk:
                send(node, child, copy.chunk)

    for child in world.server.neighbours:
        send(world.server, child, 0)


def chain(world: World) -> None:
    """A tree in which everybody sends to one other."""
    tree(world, children=1)


METHODS: dict[str, Callable[[World], None]] = {
    "cp": cp,
    "whole files": whole_files,
    "random swarm": random_swarm,
    "tree": tree,
    "chain": chain,
}


def run_method(
    method: str, settings: ClusterSettings, size_bytes: int, bound_s: float
) -> Comparison:
    """Run one method. Raises SimulationFailed when it leaves a node without the file."""
    world = World(settings, size_bytes)
    METHODS[method](world)
    world.engine.run(math.inf)
    if world.done != settings.nodes:
        raise SimulationFailed(f"{method}: {settings.nodes - world.done} nodes without the file")
    return Comparison(
        method,
        settings.nodes,
        world.last_node_s,
        bound_s / world.last_node_s,
        world.server.up.carried_bytes,
        world.readers_peak,
    )
