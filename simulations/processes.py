"""How simulated processes and machines end, stand still and begin again.

*Killed*: the kernel closes its sockets, so everybody notices; what it has written stays. *Power
cut*: nobody is told, connections fall silent, and what was not durable is lost in part. *Stopped*:
its clock goes on, connections stay until they have been silent for too long, and it does all that
has come meanwhile when it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from simulations.control_plane import SILENCE_S
from simulations.nodes import Node
from simulations.tracker_host import TrackerHost

if TYPE_CHECKING:
    from simulations.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Stop:
    """A process that stands still; ``number`` tells this time from others."""

    node: Node | None
    number: int


class Processes:
    """All daemons and the tracker of a cluster, as an init system or an admin sees them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._engine = cluster.engine

    def _after(self, delay_s: float) -> float:
        return self._engine.now_s + delay_s

    # --- daemons ---------------------------------------------------------------------------------

    def kill(self, node: Node, *, keeps: float = 1.0) -> None:
        """The daemon ends without a word. ``keeps``: the share of each partial file that the next
        life can use."""
        if not node.alive:
            return
        self._end(node, notice_s=self._cluster.settings.latency_s)
        rng = Random(f"{node.name} {node.life}")
        for replica in node.disk.replicas.values():
            if not replica.published:
                replica.digests = {
                    chunk: digest
                    for chunk, digest in replica.digests.items()
                    if rng.random() < keeps
                }

    def cut_power(self, node: Node, *, keeps: float = 0.5) -> None:
        """The machine is gone at once. ``keeps``: the share of what was not durable that stays."""
        node.powered = False
        if node.alive:
            self._end(node, notice_s=SILENCE_S)
        else:  # its clients may have outlived the daemon
            self._cluster.writers.daemon_ended(node)
        rng = Random(f"{node.name} {node.life} power")
        for version_id, replica in list(node.disk.replicas.items()):
            if not replica.durable:
                kept = [chunk for chunk in replica.digests if rng.random() < keeps]
                node.disk.doubt(version_id, kept)

    def _end(self, node: Node, notice_s: float) -> None:
        cluster = self._cluster
        for fetch in list(node.fetches):
            cluster.network.stop(fetch)
            cluster.transfers.leave_source(fetch)
        served = list(node.serving)
        for reading in list(node.reading):
            if reading.flow is not None:
                cluster.network.stop(reading.flow)
            cluster.file_server.leave(reading)
        links, session, life = dict(node.connected), node.session, node.life
        office, node.office = node.office, None
        node.end_life()
        if office is not None:
            for each, user in list(office.sessions.items()):
                self._engine.at(
                    self._after(notice_s), cluster.control.tracker_lost, (user, each, "ended")
                )
        cluster.stand_ins.end_daemon(node)
        for fetch in served:
            if fetch.source_life == life:
                cluster.network.stop(fetch)
                fetch.admitted = False
                if notice_s < SILENCE_S:
                    self._engine.at(self._after(notice_s), cluster.transfers.reset, fetch)
                else:
                    cluster.transfers.fails_if_it_stalls(fetch)
        for name, link in links.items():
            lost = (cluster.nodes[name], node.name, link)
            self._engine.at(self._after(notice_s), cluster.control.link_lost, lost)
        if session is not None:
            self._engine.at(self._after(notice_s), cluster.control.session_lost, session)
        for replica in node.disk.replicas.values():
            replica.active = False
        # Its clients read from the original.
        for request in list(node.waiting):
            cluster.answer_without_daemon(node, request)
        cluster.writers.daemon_ended(node)
        for request in sorted(node.batches):
            cluster.batch_ended(node, request)

    def start(self, node: Node) -> None:
        """A daemon begins, after a boot if need be."""
        if node.alive or node.lost:
            return
        if not node.powered:
            node.powered = True
            node.clock.reboot(self._engine.now_s)
        node.alive = True
        # What was in place when the former life ended is looked at, and counts.
        for replica in node.disk.replicas.values():
            replica.settled = replica.published
            replica.durable = replica.durable or replica.published
        self._cluster.stand_ins.begin_daemon(node)

    def stop(self, node: Node) -> None:
        """SIGSTOP."""
        if not node.alive or node.stopped:
            return
        node.stopped = True
        node.stops += 1
        for fetch in list(node.serving):
            self._cluster.transfers.hold_up(fetch)
        self._engine.at(self._after(SILENCE_S), self._silent, Stop(node, node.stops))

    def _silent(self, stop: Stop) -> None:
        """The others have had no answer to a ping, and close; it notices when it goes on."""
        node = stop.node
        assert node is not None
        if not node.stopped or node.stops != stop.number:
            return
        for name in list(node.connected):
            self._cluster.control.break_link(node, self._cluster.nodes[name])
        if node.session is not None:
            self._cluster.control.lose_session(node.session, "silent")
        if node.office is not None:
            for session in list(node.office.sessions):
                self._cluster.control.lose_session(session, "silent")

    def go_on(self, node: Node) -> None:
        """SIGCONT."""
        if not node.stopped:
            return
        node.stopped = False
        for fetch in list(node.serving):
            self._cluster.transfers.let_go_on(fetch)
        self._catch_up(node)

    def _catch_up(self, process: Node | TrackerHost) -> None:
        inbox, process.inbox = process.inbox, []
        life = process.life
        for position, (action, argument) in enumerate(inbox):
            if process.life != life:
                return
            if process.stopped:
                process.inbox = [*inbox[position:], *process.inbox]
                return
            action(argument)

    # --- the tracker -----------------------------------------------------------------------------

    def kill_tracker(self) -> None:
        """The tracker ends without a word; its journal stays."""
        host = self._cluster.tracker
        if not host.alive:
            return
        sessions = dict(host.sessions)
        host.end_life()
        for session, node in sessions.items():
            lost = (node, session, "the tracker has ended")
            self._engine.at(
                self._after(self._cluster.settings.latency_s),
                self._cluster.control.tracker_lost,
                lost,
            )

    def start_tracker(self) -> None:
        """A new tracker begins with the journal that is there."""
        host = self._cluster.tracker
        if not host.alive:
            host.begin_life(self._engine.now_s)
            self._cluster.arm_tracker(host)

    def stop_tracker(self) -> None:
        """SIGSTOP."""
        host = self._cluster.tracker
        if host.alive and not host.stopped:
            host.stopped = True
            host.stops += 1
            self._engine.at(self._after(SILENCE_S), self._tracker_silent, Stop(None, host.stops))

    def _tracker_silent(self, stop: Stop) -> None:
        host = self._cluster.tracker
        if host.stopped and host.stops == stop.number:
            for session in list(host.sessions):
                self._cluster.control.lose_session(session, "silent")

    def tracker_goes_on(self) -> None:
        """SIGCONT."""
        host = self._cluster.tracker
        if host.stopped:
            host.stopped = False
            self._catch_up(host)
