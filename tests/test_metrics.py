"""What Prometheus is told: by real servers, read with its own parser."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from swarmcache.clock import now_s
from swarmcache.errors import LocalError
from swarmcache.metrics import KEPT_S, serving_metrics
from swarmcache.quantities import HostPort
from tests.local_daemons import LocalDaemons, Server

SECRET_NAME = "the-name-of-a-source"


def metrics_url(server: Server) -> str:
    """As the server has told on stderr."""
    return server.said().partition(" metrics at ")[2].splitlines()[0]


def figures(server: Server) -> dict[str, float]:
    """By name, with the values of the labels behind it."""
    with urllib.request.urlopen(metrics_url(server), timeout=30) as answer:
        text = answer.read().decode()
    assert SECRET_NAME not in text
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalDaemons]:
    with LocalDaemons(tmp_path) as local:
        yield local


@pytest.mark.slow
def test_tracker_and_daemons_tell_what_they_have_done(local: LocalDaemons, tmp_path: Path) -> None:
    source = tmp_path / SECRET_NAME
    source.write_bytes(bytes(300_000))
    tracker = local.start_tracker("[tracker]\nmetrics = '127.0.0.1:0'\n")
    a = local.start_daemon("a", "[daemon]\nmetrics = '127.0.0.1:0'\n")
    b = local.start_daemon("b", "[daemon]\nmetrics = '127.0.0.1:0'\n")

    for node in (a, b, b):
        node.get(source)

    of_a, of_b = figures(a), figures(b)
    assert of_a["swarmcache_file_server_read_bytes_total"] == 300_000
    assert of_a["swarmcache_peer_sent_bytes_total"] == 300_000
    assert of_b["swarmcache_peer_received_bytes_total"] == 300_000
    assert of_b["swarmcache_file_server_read_bytes_total"] == 0
    assert (of_b["swarmcache_requests_total"], of_b["swarmcache_hits_total"]) == (2, 1)
    assert of_b["swarmcache_tracker_connected"] == 1
    assert of_b[f"swarmcache_disk_files {b.cache_dir}"] == 1
    assert of_b[f"swarmcache_disk_lost {b.cache_dir}"] == 0
    assert of_b["process_resident_memory_bytes"] > 0

    of_tracker = figures(tracker)
    assert of_tracker["swarmcache_nodes"] == 2
    assert (of_tracker["swarmcache_files"], of_tracker["swarmcache_replicas"]) == (1, 2)
    of_server = {name.split()[0]: value for name, value in of_tracker.items() if " " in name}
    assert of_server["swarmcache_file_server_read_bytes_total"] == 300_000
    assert of_server["swarmcache_file_server_read_leases_total"] >= 1
    assert of_server["swarmcache_file_server_slots_used"] == 0
    assert of_server["swarmcache_file_server_slots_max"] == 8


async def test_a_disk_that_fails_at_that_moment_is_an_answer() -> None:
    def describe() -> Iterator[Metric]:
        yield GaugeMetricFamily("x", "Nothing.")
        raise LocalError("could not ask for free space: it is gone")

    anywhere = HostPort("127.0.0.1", 0)
    async with (
        serving_metrics("test", anywhere, describe) as url,
        aiohttp.ClientSession() as session,
        session.get(url) as answer,
    ):
        assert answer.status == 503
        assert await answer.text() == "could not ask for free space: it is gone\n"


async def test_who_asks_without_pause_does_not_keep_the_server_from_its_work() -> None:
    looks: list[str] = []

    def describe() -> Iterator[Metric]:
        looks.append("a long one")
        yield GaugeMetricFamily("x", "Something.")

    async with (
        serving_metrics("test", HostPort("127.0.0.1", 0), describe) as url,
        aiohttp.ClientSession() as session,
    ):
        began_s = now_s()
        for number in range(10):
            version = f"application/openmetrics-text; version=1.0.{number}"
            async with session.get(url, headers={"Accept": version}) as answer:
                assert "# TYPE x gauge" in await answer.text()
        assert len(looks) <= 1 + (now_s() - began_s) / KEPT_S


async def test_the_newer_format_is_spoken_with_those_who_ask_for_it() -> None:
    wanted = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with (
        serving_metrics("test", HostPort("127.0.0.1", 0), lambda: []) as url,
        aiohttp.ClientSession(headers=wanted) as session,
        session.get(url) as answer,
    ):
        assert answer.content_type == "application/openmetrics-text"
        assert (await answer.text()).endswith("# EOF\n")
