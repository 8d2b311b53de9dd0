"""Whoever is the tracker for others: connections of nodes around ``TrackerState``.

Shared by the tracker and by a daemon that stands in for it (``tracker_client.py``).
"""

from __future__ import annotations

import logging

from swarmcache.auth import Keyring
from swarmcache.clock import now_s
from swarmcache.lease_journal import LeaseJournal
from swarmcache.link import Link
from swarmcache.machine_shell import MachineShell
from swarmcache.messages import Lease, Message, Status, WriteLease, decode_to_tracker, encode
from swarmcache.tracker_events import (
    CloseSession,
    JournalEnd,
    JournalGrant,
    JournalPresent,
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


class TrackerServer:
    """One life of a tracker. ``journal``: None for a stand-in, whose leases run out before there
    can be another one."""

    def __init__(self, state: TrackerState, journal: LeaseJournal | None, keyring: Keyring) -> None:
        self._state = state
        self._journal = journal
        self._keyring = keyring
        self._shell: MachineShell[TrackerEvent, TrackerEffect] = MachineShell(
            state, self._carry_out, TimePassed()
        )
        self._links: dict[int, Link] = {}
        self._sessions = 0
        self._unnoted: set[int] = set()  # leases that are not in the journal
        self._closed = False
        self._shell.handle(TimePassed())

    def status(self) -> dict[str, object]:
        """See ``TrackerState.status``."""
        return self._state.status(now_s())

    async def talk(self, link: Link) -> None:
        """Receive from a node until the connection ends."""
        if self._closed:
            await link.wait_closed()
            return
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
            if not self._closed:
                self._shell.handle(NodeLost(session))
            await link.wait_closed()

    def close(self) -> None:
        """End all connections; nothing more is granted or renewed."""
        self._closed = True
        self._shell.stop()
        for link in self._links.values():
            link.close()

    async def wait_closed(self) -> None:
        """``close``, and wait until nothing is left of the connections."""
        self.close()
        for link in list(self._links.values()):
            await link.wait_closed()
        if self._journal is not None:
            self._journal.close()

    def _carry_out(self, effect: TrackerEffect) -> None:
        match effect:
            case Tell():
                link = self._links.get(effect.session)
                if isinstance(effect.message, Status):
                    effect.message.cluster["key_tags"] = self._keyring.tags()
                if link is not None:
                    self._tell(link, effect.message)
            case CloseSession():
                link = self._links.get(effect.session)
                if link is not None:
                    log.warning("closing a connection: %s", effect.reason)
                    link.close()
            case ReportStatistics():
                log.info("%s", statistics_line(effect.report))
            case JournalGrant() | JournalEnd() | JournalPresent():
                if self._journal is not None:
                    self._write_down(self._journal, effect)

    def _tell(self, link: Link, message: Message) -> None:
        if isinstance(message, Lease | WriteLease) and message.lease_id in self._unnoted:
            self._unnoted.remove(message.lease_id)
            link.close()  # so the lease runs out, and no other tracker need know of it
        else:
            link.send(encode(message))

    def _write_down(
        self, journal: LeaseJournal, effect: JournalGrant | JournalEnd | JournalPresent
    ) -> None:
        match effect:
            case JournalGrant():
                self._unnoted.add(effect.lease_id)
                journal.grant(effect.lease_id, effect.node)
                self._unnoted.remove(effect.lease_id)
            case JournalEnd():
                journal.end(effect.lease_id)
            case JournalPresent():
                journal.present()
