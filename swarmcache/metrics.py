"""Figures for Prometheus, or whatever else reads its text format: ``GET /metrics``.

On an address of its own, and only where the settings name one, since whoever asks there has shown
no secret. So there are sums and counts of whole servers and disks: no source, no user, no job.

Imported only where figures are wanted, since the library takes as long as the rest of a daemon.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from swarmcache.clock import now_s
from swarmcache.errors import LocalError
from swarmcache.http_server import serving_http
from swarmcache.quantities import HostPort
from swarmcache.serving import software_version

Described = Callable[[], Iterable[Metric]]

# So long the same figures are told: those of a tracker with 10,000 nodes take 20 ms, in which
# nothing else is done. Anybody may ask, and some hundreds at once would cost nodes their leases.
KEPT_S = 1.0


class _Figures(Collector):
    """What one server has to tell, and how its process is: now, or within the last ``KEPT_S``."""

    def __init__(self, describe: Described) -> None:
        self._describe = describe
        self._process = ProcessCollector(registry=None)
        self._metrics: list[Metric] = []
        self._kept_until_s = -math.inf

    def collect(self) -> Iterator[Metric]:
        if now_s() >= self._kept_until_s:
            self._metrics = list(self._look())
            self._kept_until_s = now_s() + KEPT_S
        return iter(self._metrics)

    def _look(self) -> Iterator[Metric]:
        yield _gauge("build_info", "Version of the software.", 1, version=software_version())
        yield from self._process.collect()
        yield from self._describe()


@asynccontextmanager
async def serving_metrics(server: str, listen: HostPort, describe: Described) -> AsyncIterator[str]:
    """Answer with what ``describe`` returns, called in the event loop; the URL.

    ``server`` is what a line on stderr calls it, which names the URL. Raises OSError.
    """
    figures = _Figures(describe)

    async def answer(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        try:
            body = encode(figures)
        except LocalError as error:
            return web.Response(status=503, text=f"{error}\n")
        response = web.Response(body=body, headers={"Content-Type": content_type})
        response.force_close()  # nobody proves anything here, so a connection must not last
        return response

    application = web.Application()
    application.router.add_get("/metrics", answer)
    async with serving_http(application, listen) as address:
        url = f"http://{address}/metrics"
        print(f"swarmcache {server} metrics at {url}", file=sys.stderr, flush=True)
        yield url


def daemon_figures(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Of ``Daemon.status``."""
    totals = status["totals"]
    gossip = status["gossip"]
    yield _gauge(
        "tracker_connected",
        "Whether the daemon is connected to the tracker itself, not to a stand-in.",
        status["tracker_connected"],
    )
    yield _counter("requests", "Files that local clients have asked for.", totals["requests"])
    yield _counter("hits", "Those that were cached already.", totals["hits"])
    yield _counter(
        "peer_received_bytes", "From other nodes.", sum(status["received_bytes"].values())
    )
    yield _counter("peer_sent_bytes", "To other nodes.", status["uploaded_bytes"])
    yield _counter("file_server_read_bytes", "From file servers.", status["read_bytes"])
    yield _gauge("downloads", "Files that are being fetched.", len(status["downloads"]))
    yield _gauge("uploads", "Chunks that are being sent.", status["uploads"])
    yield _gauge(
        "distrusted_peers",
        "Nodes that have delivered wrong bytes and are not asked again.",
        sum(peer["distrusted"] for peer in status["peers"]),
    )
    if gossip is not None:
        yield _gauge("live_nodes", "Other nodes that are alive.", gossip["others"])
        yield _labelled(
            CounterMetricFamily,
            "gossip_datagrams_refused",
            "Datagrams that were not taken.",
            ["reason"],
            [([reason], count) for reason, count in gossip["refused"].items()],
        )
    yield from _disks(status["directories"])


def _disks(directories: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    for field, (name, text) in {
        "capacity_bytes": ("capacity_bytes", "Size of the disk."),
        "free_bytes": ("free_bytes", "Room on the disk."),
        "used_bytes": ("used_bytes", "What the cache takes, with what is set aside for files."),
        "file_count": ("files", "Replicas."),
    }.items():
        yield _labelled(
            GaugeMetricFamily,
            f"disk_{name}",
            text,
            ["directory"],
            [([each["path"]], each["disk"][field]) for each in directories],
        )
    yield _labelled(
        GaugeMetricFamily,
        "disk_lost",
        "Whether the cache directory is out of use, since its disk fails or is gone.",
        ["directory"],
        [([each["path"]], bool(each["lost"])) for each in directories],
    )


def tracker_figures(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Of ``TrackerState.status``."""
    statistics = status["statistics"]
    yield _gauge("nodes", "Nodes that are connected.", len(status["nodes"]))
    yield _gauge("files", "File versions of which there are replicas.", statistics["files"])
    yield _gauge("replicas", "Replicas of all of them.", statistics["replicas"])
    yield _gauge("swarms", "File versions that are being fetched.", len(status["swarms"]))
    yield _gauge("corrupt_nodes", "Nodes that have delivered wrong bytes.", len(status["corrupt"]))
    for field, text in {
        "requests": "Files that clients have asked for, on all nodes.",
        "hits": "Those that were cached already.",
        "from_peers_bytes": "What nodes have got from one another.",
    }.items():
        yield _counter(f"cluster_{field}", text, statistics[field])
    for field, text in {
        "slots_max": "Nodes that may transfer with the file server at once.",
        "slots_used": "Nodes that do.",
        "waiting": "Swarms and files to be written that wait for a slot.",
    }.items():
        yield _of_servers(GaugeMetricFamily, field, text, status["file_servers"], field)
    for field, (name, text) in {
        "reads": ("read_leases", "Leases to read a range."),
        "read_bytes": ("read_bytes", "What was read under leases."),
        "writes": ("write_leases", "Leases to write a file."),
        "ran_out": ("leases_ran_out", "Leases whose holders were gone or hung."),
        "failed": ("leases_failed", "Leases that were given up before their ends."),
        "waits": ("waits", "Waits for a slot that have ended with one."),
        "wait_s": ("wait_seconds", "How long these took together."),
    }.items():
        servers = statistics["file_servers"]
        yield _of_servers(CounterMetricFamily, name, text, servers, field)


def _of_servers(
    family: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    servers: Sequence[Mapping[str, Any]],
    field: str,
) -> Metric:
    rows = [([server["name"]], server[field]) for server in servers]
    return _labelled(family, f"file_server_{name}", text, ["file_server"], rows)


def _labelled(
    family: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    made = family(f"swarmcache_{name}", text, labels=labels)
    for values, figure in rows:
        made.add_metric(values, figure)
    return made


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"swarmcache_{name}", text, value=value)


def _gauge(name: str, text: str, value: float, **labels: str) -> Metric:
    return _labelled(GaugeMetricFamily, name, text, list(labels), [(list(labels.values()), value)])
