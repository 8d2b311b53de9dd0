"""A daemon's session with the tracker, or with who stands in for it: the shell around ``StandIn``.

Also where this daemon stands in itself: its server for others, with whom it talks like all others.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from random import Random
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from swarmcache.auth import Keyring
from swarmcache.clock import now_s
from swarmcache.config import Config
from swarmcache.errors import PeerHangs, SwarmcacheError
from swarmcache.link import Link, connect, connect_to_node, node_behind, serve
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import (
    Heartbeat,
    Message,
    NodeAddress,
    Register,
    Registered,
    decode_from_tracker,
    decode_stands_in,
    encode,
)
from swarmcache.peer_events import TimePassed, TrackerConnected, TrackerLost, TrackerSaid
from swarmcache.stand_in import (
    CONNECT_S,
    AskNode,
    BeginStandingIn,
    Candidate,
    EndStandingIn,
    LeaveStandIn,
    LetGo,
    NodeSilent,
    NodeTold,
    StandIn,
    StandInEffect,
    StandInEvent,
    StandInGone,
    TrackerGone,
    TrackerHangs,
    TrackerReached,
    TrackerUnreachable,
    TryTracker,
    UseStandIn,
    UseTracker,
)
from swarmcache.tracker_server import TrackerServer
from swarmcache.tracker_state import TrackerState

log = logging.getLogger(__name__)

# Lease ids of a stand-in begin anywhere above this: those of trackers are microseconds since 1970.
LEASE_IDS_FROM = 1 << 60


class TrackerClient:
    """One daemon's. Takes connections at once; ``start`` it, and ``stop`` it in the end."""

    def __init__(
        self,
        config: Config,
        session: aiohttp.ClientSession,
        keyring: Keyring,
        address: NodeAddress,
        members: Callable[[], Iterable[Candidate]],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        handle: Callable[[TrackerConnected | TrackerLost | TrackerSaid], None],
    ) -> None:
        """``members``: the live nodes of the cluster. ``handle`` hears of the session, in the event
        loop."""
        self._config = config
        self._http = session
        self._keyring = keyring
        self._identity = msgspec.msgpack.encode(address)
        self._spawn = spawn
        self._handle = handle
        self._machine = StandIn(
            address.node, config.cluster.label, members, Random(os.urandom(16)), now_s()
        )
        self._shell: MachineShell[StandInEvent, StandInEffect] = MachineShell(
            self._machine, self._carry_out, TimePassed()
        )
        self._offered: dict[str, Link] = {}  # connections that may become the session, by node
        self._reached: Link | None = None
        self._slots = config.slots_table()  # as the tracker has told last
        self._server: TrackerServer | None = None
        self._reason = ""
        self.link: Link | None = None

    # --- what the daemon asks -------------------------------------------------------------------

    def start(self) -> None:
        """Look for the tracker."""
        self._shell.handle(TimePassed())

    async def stop(self) -> None:
        """End the session, and those of others."""
        self._shell.stop()
        if self._server is not None:
            await self._server.wait_closed()
        link, self.link = self.link, None
        if link is not None:
            await link.wait_closed()

    def send(self, message: Message) -> None:
        """To the tracker. Lost if there is no session."""
        if isinstance(message, Register | Heartbeat):
            message.key_tags = self._keyring.tags()
        if self.link is not None:
            self.link.send(encode(message))

    @property
    def standing_in(self) -> bool:
        """Whether this daemon stands in."""
        return self._machine.standing_in

    @property
    def with_tracker(self) -> bool:
        """Whether the session is with the tracker itself."""
        return self._machine.with_tracker

    def status(self) -> dict[str, Any]:
        """As plain data. ``stand_in``: the node that is this node's tracker, or None."""
        return {
            "tracker_connected": self._machine.with_tracker,
            "stand_in": self._machine.session,
        }

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer a node that asks who is the tracker. If it is this one, that begins a session."""
        return await serve(request, self._keyring, "stand-in", self._identity, self._answer)

    async def _answer(self, link: Link) -> None:
        asking = await node_behind(link)
        link.send(encode(self._machine.answer(asking.node, now_s())))
        if self._server is not None:
            await self._server.talk(link)
        else:
            await link.drained()
            await link.wait_closed()

    # --- effects --------------------------------------------------------------------------------

    def _carry_out(self, effect: StandInEffect) -> None:
        match effect:
            case TryTracker():
                self._spawn(self._try_tracker())
            case AskNode():
                self._spawn(self._ask(effect.node))
            case UseTracker():
                assert self._reached is not None, "a tracker that nobody has reached"
                log.info("connected to the tracker at %s", self._config.cluster.tracker)
                self._begin_session(self._reached, stand_in=False)
            case UseStandIn():
                log.warning("%s stands in for the tracker", effect.node)
                self._begin_session(self._offered.pop(effect.node), stand_in=True)
            case LetGo():
                self._offered.pop(effect.node).close()
            case LeaveStandIn():
                link = self.link
                assert link is not None, "left without a session"
                self._end_session(link, f"left {effect.node}: {effect.reason}")
                link.close()
            case BeginStandingIn():
                self._begin_standing_in(effect.grants_from_s)
            case EndStandingIn():
                log.warning("standing in for the tracker no longer: %s", effect.reason)
                assert self._server is not None, "ended before it began"
                self._spawn(self._server.wait_closed())
                self._server = None

    def _begin_session(self, link: Link, *, stand_in: bool) -> None:
        self.link = link
        self._reason = ""
        self._handle(TrackerConnected(stand_in))

    def _end_session(self, link: Link, reason: str) -> None:
        """If this is the session still."""
        if self.link is link:
            self.link = None
            log.warning("%s", reason)
            self._handle(TrackerLost(reason))

    def _begin_standing_in(self, grants_from_s: float) -> None:
        log.warning("standing in for the tracker")
        state = TrackerState(
            Random(os.urandom(16)),
            slots_max=lambda name: self._slots.get(name, self._slots["default"]),
            peers_max=self._config.transfer.peers_max,
            first_lease_id=LEASE_IDS_FROM + int.from_bytes(os.urandom(7)),
            grants_from_s=grants_from_s,
            slots_told=self._slots,
            now_s=now_s(),
        )
        self._server = TrackerServer(state, None, self._keyring)

    # --- connections ----------------------------------------------------------------------------

    async def _try_tracker(self) -> None:
        address = self._config.cluster.tracker
        try:
            link = await connect(self._http, address, self._keyring, "tracker", self._identity)
        except SwarmcacheError as error:
            self._say_unreachable(f"no connection to the tracker: {error}")
            hangs = isinstance(error, PeerHangs)
            self._shell.handle(TrackerHangs() if hangs else TrackerUnreachable())
            return
        self._reached = link
        self._shell.handle(TrackerReached())
        reason = await _receive(link, lambda data: self._take(link, data))
        self._end_session(link, f"lost the tracker: {reason}")
        self._shell.handle(TrackerGone())
        await link.wait_closed()

    def _say_unreachable(self, reason: str) -> None:
        """Each reason once, in the log; and to the daemon, if it has no session."""
        if reason != self._reason:
            log.warning("%s", reason)
        self._reason = reason
        if self.link is None:
            self._handle(TrackerLost(reason))

    async def _ask(self, node: str) -> None:
        """Ask a node who is the tracker; if it is that one, the connection may be the session."""
        try:
            link = await connect_to_node(
                self._http,
                node,
                self._keyring,
                "stand-in",
                self._identity,
                timeout_s=CONNECT_S,
            )
        except SwarmcacheError as error:
            log.info("%s cannot be asked who is the tracker: %s", node, error)
            self._shell.handle(NodeSilent(node))
            return
        late = asyncio.get_running_loop().call_later(CONNECT_S, link.close)
        answered = False

        def take(data: bytes) -> None:
            nonlocal answered
            if answered:
                self._take(link, data)
                return
            answer = decode_stands_in(data)
            answered = True
            late.cancel()
            if answer.by == node and not answer.tracker:
                self._offered[node] = link
            self._shell.handle(NodeTold(node, answer))

        reason = await _receive(link, take)
        late.cancel()
        await self._ask_ended(node, link, reason, answered)

    async def _ask_ended(self, node: str, link: Link, reason: str, answered: bool) -> None:
        if not answered:
            self._shell.handle(NodeSilent(node))
        elif self.link is link:
            self._end_session(link, f"lost {node}, which stood in for the tracker: {reason}")
            self._shell.handle(StandInGone(node))
        await link.wait_closed()

    def _take(self, link: Link, data: bytes) -> None:
        message = decode_from_tracker(data)
        if self.link is not link:
            return
        if isinstance(message, Registered) and "default" in message.slots_max:
            self._slots = message.slots_max
        self._handle(TrackerSaid(message))


async def _receive(link: Link, take: Callable[[bytes], None]) -> str:
    """Receive until the connection ends, and say why it did.

    A bug of ours ends it as well: one that ended only this would leave the daemon with a session in
    which it hears nothing, and nobody would begin another.
    """
    try:
        await link.receive(take)
    except SwarmcacheError as error:
        return str(error)
    except Exception as error:
        log.exception("ending a session with the tracker, or with who may stand in for it")
        return f"internal error: {error}"
    return "it closed the connection"
