"""How many other nodes hold what could be evicted here, as far as the tracker can say at once.

Asked by the threads that make room, while a job waits for it: so an answer that does not come in
time is done without, and the next question waits until the tracker has had time to recover. What
was answered counts for a few seconds. Two nodes that give up the last two replicas of a file within
that time both take the other one for the last.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from swarmcache.clock import now_s
from swarmcache.holder_questions import HolderQuestions
from swarmcache.messages import LOCATE_MAX

log = logging.getLogger(__name__)

# The tracker answers in milliseconds. A job that waits for room does not notice a quarter second.
ANSWER_S_MAX = 0.25
# What the tracker has answered, or failed to, counts for so long: a node that evicts all the time
# asks no more often, 2,000 questions per second of 10,000 such nodes.
KNOWN_S = 5.0


class ReplicasElsewhere:
    """What is known of them. ``counts`` may be called from any thread but that of the loop."""

    def __init__(
        self,
        questions: HolderQuestions,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """``spawn`` runs a coroutine in the background."""
        self._questions = questions
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._counts: Mapping[bytes, int] = {}
        self._until_s = 0.0

    def counts(self, version_ids: Sequence[bytes]) -> Mapping[bytes, int]:
        """How many other nodes hold these, of those of which it is known. Takes 0.25 s at most.

        Of more than ``LOCATE_MAX`` only the first ones are asked about.
        """
        with self._lock:
            if now_s() >= self._until_s:
                self._counts = self._ask(list(version_ids[:LOCATE_MAX]))
                self._until_s = now_s() + KNOWN_S
            return self._counts

    def _ask(self, version_ids: list[bytes]) -> Mapping[bytes, int]:
        answered: Future[Mapping[bytes, int]] = Future()

        async def ask() -> None:
            counts: dict[bytes, int] = {}
            try:
                async with asyncio.timeout(ANSWER_S_MAX):
                    holders, reason = await self._questions.ask(version_ids)
            except TimeoutError:
                log.info("evicting without knowing of other nodes: no answer from the tracker")
            else:
                if holders is None:
                    log.debug("evicting without knowing of other nodes: %s", reason)
                else:
                    counts = dict(zip(version_ids, (each.count for each in holders), strict=True))
            finally:
                answered.set_result(counts)

        self._loop.call_soon_threadsafe(lambda: self._spawn(ask()))
        wait([answered], ANSWER_S_MAX)  # the loop may be busy, or the daemon about to end
        return answered.result() if answered.done() else {}
