"""The tracker: the HTTP server around ``TrackerState``."""

from __future__ import annotations

import logging
import os
import time
from random import Random

from aiohttp import web

from swarmcache.auth import Keyring
from swarmcache.clock import now_s
from swarmcache.config import Config
from swarmcache.lease_journal import LeaseJournal
from swarmcache.link import Link, serve
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import Status, decode_to_tracker, encode
from swarmcache.quantities import HostPort
from swarmcache.serving import (
    allow_many_descriptors,
    bind,
    cluster_keys,
    reread_on_hangup,
    say_ready,
    told_to_end,
)
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    NodeConnected,
    NodeLost,
    NodeSaid,
    ReportStatistics,
    Tell,
    TimePassed,
    TrackerEffect,
    TrackerEvent,
)
from swarmcache.tracker_state import TrackerState
from swarmcache.tracker_statistics import statistics_line

log = logging.getLogger(__name__)


class Tracker:
    """One tracker, serving until its runner is cleaned up."""

    def __init__(self, config: Config, keyring: Keyring) -> None:
        self._keyring = keyring
        self._journal = LeaseJournal(config.tracker.state_dir)
        state = TrackerState(
            Random(os.urandom(16)),
            slots_max=config.slots_max,
            peers_max=config.transfer.peers_max,
            earlier_leases=self._journal.earlier,
            first_lease_id=self._journal.first_lease_id,
            statistics_interval_s=config.tracker.statistics_interval_s,
            wall_offset_s=time.time() - now_s(),
            now_s=now_s(),
        )
        self._shell: MachineShell[TrackerEvent, TrackerEffect] = MachineShell(
            state, self._carry_out, TimePassed()
        )
        self._links: dict[int, Link] = {}
        self._sessions = 0

    def application(self) -> web.Application:
        """The HTTP application: one WebSocket per node."""
        application = web.Application()
        application.router.add_get("/v1/tracker", self._serve_node)
        application.on_shutdown.append(self._shut_down)
        return application

    async def _serve_node(self, request: web.Request) -> web.StreamResponse:
        async def talk(link: Link) -> None:
            log.info("%s connected", request.remote)
            await self._talk(link)
            log.info("%s is gone", request.remote)

        return await serve(request, self._keyring, "tracker", b"tracker", talk)

    async def _talk(self, link: Link) -> None:
        """Receive from a node until the connection ends."""
        self._sessions += 1
        session = self._sessions
        self._links[session] = link
        self._shell.handle(NodeConnected(session))
        try:
            await link.receive(
                lambda data: self._shell.handle(NodeSaid(session, decode_to_tracker(data)))
            )
        finally:
            del self._links[session]
            self._shell.handle(NodeLost(session))
            await link.wait_closed()

    def _carry_out(self, effect: TrackerEffect) -> None:
        match effect:
            case Tell():
                link = self._links.get(effect.session)
                if isinstance(effect.message, Status):
                    effect.message.cluster["key_tags"] = self._keyring.tags()
                if link is not None:
                    link.send(encode(effect.message))
            case CloseSession():
                link = self._links.get(effect.session)
                if link is not None:
                    log.warning("closing a connection: %s", effect.reason)
                    link.close()
            case JournalGrant():
                self._journal.grant(effect.lease_id, effect.node)
            case JournalEnd():
                self._journal.end(effect.lease_id)
            case ReportStatistics():
                log.info("%s", statistics_line(effect.report))

    async def _shut_down(self, _: web.Application) -> None:
        for link in list(self._links.values()):
            await link.wait_closed()
        self._shell.stop()
        self._journal.close()


async def run_tracker(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Says ``ready`` on stderr when nodes can connect."""
    allow_many_descriptors()
    told = told_to_end()
    keyring = Keyring(cluster_keys(config))
    reread_on_hangup(config, keyring)
    tracker = Tracker(config, keyring)
    runner = web.AppRunner(tracker.application(), access_log=None, shutdown_timeout=1.0)
    with bind(config.tracker.listen) as listener:
        try:
            await runner.setup()
            await web.SockSite(runner, listener, backlog=4096).start()
            port = int(listener.getsockname()[1])
            say_ready("tracker", HostPort(config.tracker.listen.host, port))
            await told.wait()
        finally:
            await runner.cleanup()
