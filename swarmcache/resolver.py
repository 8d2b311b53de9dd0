"""Numeric addresses of advertised ones, looked up in threads: a name server may take its time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from swarmcache.quantities import HostPort
from swarmcache.thread_pool import ThreadPool

log = logging.getLogger(__name__)

# As long as name servers let others keep an answer, as a rule. A node that has moved has another
# address from then on; until then it is not reached, and a former address goes on to be used while
# a new one is looked up.
KEPT_S = 300.0
UNKNOWN_S = 10.0
ADDRESSES_MAX = 16_384
LOOKED_UP_MAX = 64
THREADS = 2

Address = tuple[Any, ...]


class Resolver:
    """Of addresses of one family. ``spawn`` runs a coroutine in the background."""

    def __init__(
        self,
        family: socket.AddressFamily,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._family = family
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._known: OrderedDict[str, tuple[float, Address | None]] = OrderedDict()  # until when
        self._looked_up: dict[str, list[Callable[[Address], None]]] = {}
        self._threads = ThreadPool(THREADS, thread_name_prefix="resolve")

    def close(self) -> None:
        """No more look-ups. Does not wait for those that are under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def resolve(self, node: str, use: Callable[[Address], None]) -> None:
        """Call ``use`` with the address: at once, when it is found, or not at all."""
        until_s, address = self._known.get(node, (0.0, None))
        expired = until_s <= self._loop.time()
        if address is not None:
            use(address)
        if not expired:
            return
        waiting = self._looked_up.get(node)
        if waiting is None and len(self._looked_up) < LOOKED_UP_MAX:
            waiting = self._looked_up[node] = []
            self._spawn(self._look_up(node))
        if waiting is not None and address is None and len(waiting) < LOOKED_UP_MAX:
            waiting.append(use)

    async def _look_up(self, node: str) -> None:
        try:
            address = await self._loop.run_in_executor(self._threads, self._ask, node)
        finally:
            waiting = self._looked_up.pop(node)
        former = self._known.pop(node, (0.0, None))[1]
        if len(self._known) >= ADDRESSES_MAX:
            self._known.popitem(last=False)
        kept_s = UNKNOWN_S if address is None else KEPT_S
        self._known[node] = (self._loop.time() + kept_s, address or former)
        if address is not None:
            for use in waiting:
                use(address)

    def _ask(self, node: str) -> Address | None:
        """Runs in a thread."""
        try:
            host_port = HostPort.parse(node)
            found = socket.getaddrinfo(
                host_port.host, host_port.port, family=self._family, type=socket.SOCK_DGRAM
            )
        except (OSError, ValueError) as error:
            log.info("cannot find %s: %s", node, error)
            return None
        return found[0][4]
