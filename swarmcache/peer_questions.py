"""What clients of this node want to know of the tracker: the cluster's state, and holders of files.

Pure logic, and a part of ``PeerState``.

Invariant: a question is answered exactly once, unless whoever asked is gone: by the tracker, or, as
soon as there is none, with the reason for that.
"""

from __future__ import annotations

from swarmcache.messages import Locate, Located, Status, StatusRequest
from swarmcache.peer_events import (
    AnswerHolders,
    AnswerStatus,
    HoldersWanted,
    PeerEffect,
    StatusWanted,
    TellTracker,
)


class PeerQuestions:
    """All such questions that are open."""

    def __init__(self, reason: str) -> None:
        """``reason``: why there is no tracker yet."""
        self._no_tracker: str | None = reason
        self._status: set[int] = set()
        self._holders: dict[int, int] = {}  # how many file versions were asked about

    # --- clients --------------------------------------------------------------------------------

    def want_status(self, event: StatusWanted, effects: list[PeerEffect]) -> None:
        """A client wants to know the state of the cluster."""
        if self._no_tracker is not None:
            effects.append(AnswerStatus(event.request, None, self._no_tracker))
        else:
            self._status.add(event.request)
            effects.append(TellTracker(StatusRequest(event.request)))

    def want_holders(self, event: HoldersWanted, effects: list[PeerEffect]) -> None:
        """A client wants to know who holds some file versions."""
        if self._no_tracker is not None:
            effects.append(AnswerHolders(event.request, None, self._no_tracker))
        else:
            self._holders[event.request] = len(event.version_ids)
            question = Locate(event.request, event.version_ids, event.nodes_max)
            effects.append(TellTracker(question))

    def gone(self, request: int) -> None:
        """Whoever asked waits no longer."""
        self._status.discard(request)
        self._holders.pop(request, None)

    # --- the tracker ----------------------------------------------------------------------------

    def told_status(self, message: Status, effects: list[PeerEffect]) -> None:
        """The tracker answers."""
        if message.request_id in self._status:
            self._status.remove(message.request_id)
            effects.append(AnswerStatus(message.request_id, message.cluster))

    def told_holders(self, message: Located, effects: list[PeerEffect]) -> None:
        """The tracker answers: one list of holders for each file version, in their order."""
        asked = self._holders.pop(message.request_id, None)
        if asked == len(message.holders):
            effects.append(AnswerHolders(message.request_id, message.holders))
        elif asked is not None:
            reason = "the tracker's answer makes no sense"
            effects.append(AnswerHolders(message.request_id, None, reason))

    def tracker_connected(self) -> None:
        """There is a tracker to be asked."""
        self._no_tracker = None

    def tracker_lost(self, reason: str, effects: list[PeerEffect]) -> None:
        """There is none any more."""
        self._no_tracker = reason
        effects.extend(AnswerStatus(request, None, reason) for request in sorted(self._status))
        self._status.clear()
        effects.extend(AnswerHolders(request, None, reason) for request in sorted(self._holders))
        self._holders.clear()

    def check(self) -> None:
        """Assert the invariant."""
        assert self._no_tracker is None or not (self._status or self._holders), "asked of nobody"
