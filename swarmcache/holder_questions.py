"""Who waits for the tracker to say which other nodes hold some file versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from swarmcache.messages import Holders
from swarmcache.peer_events import AnswerHolders, HoldersWanted, PeerEvent, RequestGone


class HolderQuestions:
    """The questions of one daemon that have no answer yet."""

    def __init__(self, numbers: Iterator[int], handle: Callable[[PeerEvent], None]) -> None:
        """``numbers`` are those of requests to the machine, which nobody else uses; ``handle``
        tells the machine."""
        self._numbers = numbers
        self._handle = handle
        self._waiting: dict[int, asyncio.Future[AnswerHolders]] = {}

    async def ask(
        self, version_ids: list[bytes], nodes_max: int = 0
    ) -> tuple[list[Holders] | None, str]:
        """The other holders of each file version, at most so many of them by name.

        None where the tracker cannot be asked, and why. At most ``LOCATE_MAX`` file versions.
        """
        number = next(self._numbers)
        future: asyncio.Future[AnswerHolders] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._handle(HoldersWanted(number, version_ids, nodes_max))
        try:
            answer = await future
            return answer.holders, answer.reason
        finally:
            if self._waiting.pop(number, None) is not None:
                self._handle(RequestGone(number))

    def carry_out(self, effect: AnswerHolders) -> None:
        """Give the machine's answer to whoever waits for it."""
        future = self._waiting.pop(effect.request)
        if not future.done():
            future.set_result(effect)
