"""What a simulated cluster is like."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swarmcache.chunks import choose_chunk_size
from swarmcache.config import TransferSettings
from swarmcache.eviction import Policy, least_recently_used, replicas_elsewhere_first

FILE_SERVER = "nfs01:/export"
USER = "user"
# What is evicted: with an eye to other nodes, as daemons do it, or by its age alone.
POLICIES: dict[str, Policy] = {"cluster": replicas_elsewhere_first, "lru": least_recently_used}


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Rates in bytes/s, each way.

    ``check_every``: the machine at hand is asked to ``check()`` itself every so many events; 1
    also has every message decoded again. ``originals``: a request may be answered with the original
    path. ``chunk_size_bytes``: None for what daemons choose. ``piece_bytes``: what a reader asks
    of the file server at once; None for whole chunks. ``disk_bytes``: the most that the cache of a
    node may take. ``clock_spread_s``: clocks of nodes differ by up to twice this;
    ``clock_drift``: and run faster or slower by up to this part.
    ``rack_nodes``: so many share the links of a rack, of ``rack_rate``; 0 for no racks.
    ``rack_labels``: daemons know in which rack they are.
    ``policy``: which of ``POLICIES`` says what is evicted.
    """

    nodes: int
    seed: int
    node_rate: float = 125e6
    file_server_rate: float = 125e6
    slots_max: int = 8
    uploads_max: int = TransferSettings().uploads_max
    peers_max: int = TransferSettings().peers_max
    latency_s: float = 0.0002
    publish_s: float = 0.001
    check_every: int = 10_000
    originals: bool = False
    chunk_size_bytes: int | None = None
    piece_bytes: int | None = None
    reader_cost: float = 0.0
    disk_bytes: float = math.inf
    min_age_s: float = 0.0
    clock_spread_s: float = 0.0
    clock_drift: float = 0.0
    policy: str = "cluster"
    rack_nodes: int = 0
    rack_rate: float = math.inf
    rack_labels: bool = True

    def cut_bytes(self, size_bytes: int) -> int:
        """The size of the chunks of a file of this size."""
        return self.chunk_size_bytes or choose_chunk_size(size_bytes)
