"""Crowds that want other things than one file at one instant."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from simulations.clients import Client
from simulations.scenarios import CROWD_AT_S, Crowd, Result, Watch
from simulations.settings import ClusterSettings
from swarmcache.chunks import FileVersion

# array_job: the last job begins when this many bounds have passed.
SPREAD_FACTOR = 2.0
SMALL_FILE_BYTES = 64 << 10
SMALL_FILES_MAX = 1000
# working_set: so many files, of which a disk holds this part; how many each node wants, one after
# the other, and how skewed: the k-th most popular one is wanted as 1 / k to this power (Breslau et
# al., INFOCOM 1999, found 0.64 to 0.83 for the Web).
FILES = 40
DISK_SHARE = 0.25
WANTS = 60
SKEW = 0.8
# copy_storm: one node in so many copies a file of this part of SIZE to the file server.
COPY_EVERY = 4
COPY_SHARE = 0.25
# racks: so many nodes in each, whose links together have four times the rate of those of the rack.
RACK_NODES = 16
OVERSUBSCRIBED = 4


def array_job(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """Every node wants the same file, one job begins after the other."""
    crowd = Crowd("array_job", settings, size_bytes, jobs=True)
    nodes = crowd.cluster.node_list
    for node in nodes:
        at_s = SPREAD_FACTOR * crowd.bound_s * node.index / len(nodes)
        crowd.want_at(at_s, node, crowd.version.path)
    return crowd.run(nodes, watch)


def small_files(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """Every node wants the same small files at once: 64 KiB each, SIZE in all, 1,000 at most."""
    count = min(max(size_bytes // SMALL_FILE_BYTES, 1), SMALL_FILES_MAX)
    crowd = Crowd("small_files", settings, count * SMALL_FILE_BYTES, jobs=True)
    for number in range(count):
        path = b"/export/small%05d" % number
        version = FileVersion(path, SMALL_FILE_BYTES, 0)
        crowd.cluster.file_server.current[path] = version
        for node in crowd.cluster.node_list:
            crowd.want_at(0.0, node, path)
    return crowd.run(crowd.cluster.node_list, watch)


def working_set(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """Jobs want 40 files, SIZE in all, some more than others; a disk holds a quarter of them."""
    settings = replace(settings, originals=True, disk_bytes=size_bytes * DISK_SHARE)
    crowd = Crowd("working_set", settings, size_bytes, jobs=True)
    current = crowd.cluster.file_server.current
    paths = [b"/export/file%02d" % number for number in range(FILES)]
    for path in paths:
        current[path] = FileVersion(path, max(size_bytes // FILES, 1), 0)
    popularity = [1 / (rank + 1) ** SKEW for rank in range(FILES)]
    rng = Random(f"{settings.seed} working set")
    wants = {node.name: rng.choices(paths, popularity, k=WANTS) for node in crowd.cluster.node_list}

    def next_one(client: Client) -> None:
        """The next job of this node begins when the former one has its file."""
        rest = wants[client.node.name]
        if rest:
            crowd.want_at(crowd.cluster.engine.now_s - CROWD_AT_S, client.node, rest.pop())

    crowd.then = next_one
    for node in crowd.cluster.node_list:
        crowd.want_at(0.0, node, wants[node.name].pop())
    return crowd.run(crowd.cluster.node_list, watch)


def copy_storm(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """Every node wants the file; one in four copies another of SIZE / 4 to the file server."""
    crowd = Crowd("copy_storm", replace(settings, originals=True), size_bytes, jobs=True)
    nodes = crowd.cluster.node_list
    for node in nodes:
        crowd.want_at(0.0, node, crowd.version.path)
        if node.index % COPY_EVERY == 0:
            crowd.copy(node, max(int(size_bytes * COPY_SHARE), 1), "writer")
    return crowd.run(nodes, watch)


def racks(settings: ClusterSettings, size_bytes: int, watch: Watch | None = None) -> Result:
    """A flash crowd in racks of 16 nodes, whose links to the others are oversubscribed 4:1."""
    rack_rate = settings.node_rate * RACK_NODES / OVERSUBSCRIBED
    settings = replace(settings, rack_nodes=RACK_NODES, rack_rate=rack_rate)
    crowd = Crowd("racks", settings, size_bytes)
    return crowd.run(crowd.cluster.node_list, watch)
