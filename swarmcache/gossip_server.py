"""The daemon's part in the gossip: socket, clock, names and files around ``Gossip``.

A UDP socket with the number of the control port. A datagram is authenticated as it comes, and one
task hands those that are authentic to the machine, at once. Nothing is sent in answer to the
others, and nothing is made of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from swarmcache.auth import Keyring
from swarmcache.background import BackgroundTasks
from swarmcache.clock import now_s
from swarmcache.datagram_auth import (
    DATAGRAM_BYTES_MAX,
    ENVELOPE_BYTES,
    VERSION,
    ClusterTime,
    DatagramAuth,
    Opened,
)
from swarmcache.datagrams import Address, Datagrams
from swarmcache.gossip import Gossip, Member
from swarmcache.gossip_events import (
    CONNECT_S,
    ConnectTried,
    DatagramReceived,
    GossipEffect,
    GossipEvent,
    Leaving,
    MembersChanged,
    SeedsKnown,
    SendDatagram,
    StatusMeasured,
    TimePassed,
    TryConnect,
)
from swarmcache.gossip_records import NodeProfile, NodeStatus
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import Registered, Renewed
from swarmcache.peers_file import PEERS_MAX, PeersFile
from swarmcache.resolver import Resolver

log = logging.getLogger(__name__)

# How often this node looks at itself; what changes little is not told for that.
MEASURE_S = 2.0
# How often those who are alive are written down, and turned to while the tracker is away.
REMEMBER_S = 60.0
ASK_FORMER_S = 10.0
FORMER_ASKED = 3
CONNECTS_MAX = 64


class GossipServer:
    """One node's gossip. ``members`` are known once it is started."""

    def __init__(
        self,
        sock: socket.socket,
        profile: NodeProfile,
        keyring: Keyring,
        file: PeersFile,
        measure: Callable[[], Awaitable[NodeStatus]],
        on_change: Callable[[MembersChanged], None],
        *,
        rate_max_bytes_per_s: float,
    ) -> None:
        """Takes over socket and file. ``measure`` says how this node is; ``on_change`` hears who
        has come and gone, in the event loop."""
        self._time = ClusterTime(time.time(), now_s())
        if file.offset_s is not None:
            self._time.offset_s = file.offset_s
        self._auth = DatagramAuth(keyring, profile.address.node, self._time.us(now_s()))
        self._datagrams = Datagrams(sock, self._open)
        self._datagrams.drop_others(ENVELOPE_BYTES, DATAGRAM_BYTES_MAX, VERSION)
        self._file = file
        self._measure = measure
        self._on_change = on_change
        self._profile = profile
        self._rate_max_bytes_per_s = rate_max_bytes_per_s
        self._tracker_heard_s = -math.inf
        self._connects = 0
        self._background = BackgroundTasks("gossip")
        self._spawn = self._background.spawn
        self._resources = AsyncExitStack()

    async def start(self) -> None:
        """Take part. Raises OSError; then nothing is left open but what was handed over."""
        try:
            await asyncio.to_thread(self._file.begin, self._time.us(now_s()) // 1000)
        except OSError as error:
            log.warning("cannot write down the epoch: %s", error)
        self._gossip = Gossip(
            self._profile,
            self._file.epoch,
            random.Random(os.urandom(16)),
            budget_bytes_per_s=self._rate_max_bytes_per_s,
        )
        self._shell: MachineShell[GossipEvent, GossipEffect] = MachineShell(
            self._gossip, self._carry_out, TimePassed()
        )
        async with AsyncExitStack() as stack:
            await self._datagrams.start()
            stack.push_async_callback(self._datagrams.stop)
            self._resolver = Resolver(self._datagrams.family, self._spawn)
            stack.callback(self._resolver.close)
            stack.push_async_callback(self._background.end)
            self._shell.handle(TimePassed())
            self._shell.handle(StatusMeasured(await self._measure()))
            self._shell.handle(SeedsKnown(self._file.peers))
            for task in (self._receive(), self._look_at_itself(), self._remember()):
                self._spawn(task)
            stack.callback(self._leave)
            self._resources = stack.pop_all()

    async def stop(self) -> None:
        """Tell the others, and end."""
        await self._resources.aclose()
        try:
            await asyncio.to_thread(self._file.write, self._peers())
        except OSError as error:
            log.warning("cannot write down the other nodes: %s", error)
        self._file.close()

    # --- what others may ask, in the event loop -------------------------------------------------

    def members(self) -> list[Member]:
        """All that are known, this node included; see ``Gossip.members``."""
        return self._gossip.members()

    def live(self) -> list[Member]:
        """Those who are believed to be alive."""
        return self._gossip.live()

    def member(self, node: str) -> Member | None:
        """What is known of the node with this address."""
        return self._gossip.member(node)

    def tracker_said(self, message: Registered | Renewed) -> None:
        """What the tracker says of the time and of others."""
        self._tracker_heard_s = now_s()
        if message.time_s:
            self._time.learn(message.time_s, now_s())
            self._file.offset_s = self._time.offset_s
        if message.seeds:
            self._shell.handle(SeedsKnown(message.seeds))

    def status(self) -> dict[str, Any]:
        """How it goes, as plain data. ``others``: how many are alive; ``refused``: datagrams that
        were not taken, by reason."""
        return {
            "others": len(self._gossip.live()),
            "refused": dict(self._auth.refused + self._datagrams.lost()),
        }

    # --- in and out -----------------------------------------------------------------------------

    async def _receive(self) -> None:
        """A bug of ours costs the datagram: this is the only task that hears the others."""
        while True:
            opened = await self._datagrams.receive()
            try:
                self._shell.handle(DatagramReceived(opened.sender_id, opened.payload))
            except Exception:
                log.exception("a datagram was not taken")

    def _open(self, datagram: bytes) -> Opened | None:
        return self._auth.open(datagram, self._time.us(now_s()))

    def _carry_out(self, effect: GossipEffect) -> None:
        match effect:
            case SendDatagram():
                self._send(effect)
            case TryConnect():
                self._try_connect(effect.node)
            case MembersChanged():
                for node in effect.alive:
                    log.info("%s is alive", node)
                for node in effect.dead:
                    log.info("%s is gone", node)
                self._on_change(effect)

    def _send(self, effect: SendDatagram) -> None:
        def send(address: Address) -> None:
            datagram = self._auth.seal(effect.payload, effect.address, self._time.us(now_s()))
            self._datagrams.send(datagram, address)

        self._resolver.resolve(effect.address, send)

    def _try_connect(self, node: str) -> None:
        if self._connects < CONNECTS_MAX:
            self._connects += 1
            self._spawn(self._connect(node))
        else:
            self._shell.handle(ConnectTried(node, False))

    async def _connect(self, node: str) -> None:
        """Whether the node's control port takes a connection."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Address] = loop.create_future()

        def take(address: Address) -> None:
            if not found.done():
                found.set_result(address)

        self._resolver.resolve(node, take)
        try:
            async with asyncio.timeout(CONNECT_S):
                address = await found
                _, writer = await asyncio.open_connection(*address[:2])
        except OSError:  # TimeoutError is one
            ok = False
        else:
            ok = True
            writer.transport.abort()
        finally:
            self._connects -= 1
        self._shell.handle(ConnectTried(node, ok))

    # --- now and then ----------------------------------------------------------------------------

    async def _look_at_itself(self) -> None:
        """A bug of ours costs one look, or else others would be told for ever how this node was."""
        while True:
            await asyncio.sleep(MEASURE_S)
            try:
                self._shell.handle(StatusMeasured(await self._measure()))
            except Exception:
                log.exception("cannot tell how this node is")

    async def _remember(self) -> None:
        """Write down who is alive; turn to those of former times while the tracker is away."""
        written_s = now_s()
        while True:
            await asyncio.sleep(ASK_FORMER_S)
            if now_s() - self._tracker_heard_s > REMEMBER_S and self._file.peers:
                some = random.sample(self._file.peers, min(FORMER_ASKED, len(self._file.peers)))
                self._shell.handle(SeedsKnown(some))
            if now_s() - written_s >= REMEMBER_S:
                written_s = now_s()
                try:
                    await asyncio.to_thread(self._file.write, self._peers())
                except OSError as error:
                    log.warning("cannot write down the other nodes: %s", error)

    def _peers(self) -> list[str]:
        """Some who are alive, and as many of former times as there is room for."""
        known = [each.profile.address.node for each in self._gossip.live() if each.profile]
        nodes = [node for node in known if node != self._profile.address.node]
        some = random.sample(nodes, min(PEERS_MAX, len(nodes)))
        return list(dict.fromkeys([*some, *self._file.peers]))[:PEERS_MAX]

    def _leave(self) -> None:
        self._shell.handle(Leaving())
        self._shell.stop()
