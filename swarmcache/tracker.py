"""The tracker: the HTTP server around ``TrackerState``."""

from __future__ import annotations

import logging
import os
import time
from contextlib import AsyncExitStack
from random import Random

from aiohttp import web

from swarmcache.auth import Keyring
from swarmcache.clock import now_s
from swarmcache.config import Config
from swarmcache.http_server import serving_http
from swarmcache.lease_journal import LeaseJournal
from swarmcache.link import Link, serve
from swarmcache.serving import (
    allow_many_descriptors,
    cluster_keys,
    reread_on_hangup,
    say_ready,
    told_to_end,
)
from swarmcache.tracker_server import TrackerServer
from swarmcache.tracker_state import TrackerState

log = logging.getLogger(__name__)


class Tracker:
    """One tracker, serving until its runner is cleaned up."""

    def __init__(self, config: Config, keyring: Keyring) -> None:
        self._keyring = keyring
        journal = LeaseJournal(config.tracker.state_dir)
        state = TrackerState(
            Random(os.urandom(16)),
            slots_max=config.slots_max,
            peers_max=config.transfer.peers_max,
            earlier_leases=journal.earlier,
            first_lease_id=journal.first_lease_id,
            away_s=journal.away_s,
            slots_told=config.slots_table(),
            statistics_interval_s=config.tracker.statistics_interval_s,
            wall_offset_s=time.time() - now_s(),
            now_s=now_s(),
        )
        self._server = TrackerServer(state, journal, keyring)

    def application(self) -> web.Application:
        """The HTTP application: one WebSocket per node."""
        application = web.Application()
        application.router.add_get("/v1/tracker", self._serve_node)
        application.on_shutdown.append(self._shut_down)
        return application

    def status(self) -> dict[str, object]:
        """See ``TrackerState.status``."""
        return self._server.status()

    async def _serve_node(self, request: web.Request) -> web.StreamResponse:
        async def talk(link: Link) -> None:
            log.info("%s connected", request.remote)
            await self._server.talk(link)
            log.info("%s is gone", request.remote)

        return await serve(request, self._keyring, "tracker", b"tracker", talk)

    async def _shut_down(self, _: web.Application) -> None:
        await self._server.wait_closed()


async def run_tracker(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Says ``ready`` on stderr when nodes can connect."""
    allow_many_descriptors()
    told = told_to_end()
    keyring = Keyring(cluster_keys(config))
    reread_on_hangup(config, keyring)
    tracker = Tracker(config, keyring)
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(
            serving_http(tracker.application(), config.tracker.listen, backlog=4096)
        )
        if config.tracker.metrics is not None:
            from swarmcache.metrics import serving_metrics, tracker_figures

            await stack.enter_async_context(
                serving_metrics(
                    "tracker", config.tracker.metrics, lambda: tracker_figures(tracker.status())
                )
            )
        say_ready("tracker", address)
        await told.wait()
