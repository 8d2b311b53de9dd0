"""What users are called on this machine.

A directory service that is slow or away may take long to say it, for one user or for all. So a
thread of that user's own asks, and who waits for the answer are that user's clients only.
"""

from __future__ import annotations

import asyncio
import pwd
from collections.abc import Callable

from swarmcache.compartment_threads import CompartmentThreads

# A job with many clients asks once in so long, and who is given another name has it soon.
KEPT_S = 300.0
# More users than a machine has at once; one who may make user namespaces is 65,536 of them.
NAMES_MAX = 1024


class UserNames:
    """The names of those who have come lately."""

    def __init__(self) -> None:
        self._threads = CompartmentThreads("name", 1, 1, idle_max=0)
        self._names: dict[int, asyncio.Future[str]] = {}
        self._loop = asyncio.get_running_loop()

    def tell(self, uid: int, listener: Callable[[str], None]) -> None:
        """Call ``listener`` with a user's name: at once if it is known, or else later.

        Raises NoThread.
        """
        name = self._names.get(uid)
        if name is None:
            name = self._look_up(uid)
        if name.done():
            listener(name.result())
        else:
            name.add_done_callback(
                lambda name: None if name.cancelled() else listener(name.result())
            )

    def close(self) -> None:
        """Whoever waits is told nothing any more."""
        for name in self._names.values():
            name.cancel()
        self._names.clear()

    def _look_up(self, uid: int) -> asyncio.Future[str]:
        if len(self._names) >= NAMES_MAX:
            del self._names[next(iter(self._names))]
        name = asyncio.wrap_future(self._threads.submit(uid, None, user_name, uid))
        self._names[uid] = name
        name.add_done_callback(lambda name: self._found(uid, name))
        return name

    def _found(self, uid: int, name: asyncio.Future[str]) -> None:
        if name.cancelled():
            return
        # Who has none may have one as soon as the directory service is back.
        kept_s = KEPT_S if name.result() != str(uid) else 0.0
        self._loop.call_later(kept_s, self._forget, uid, name)

    def _forget(self, uid: int, name: asyncio.Future[str]) -> None:
        if self._names.get(uid) is name:
            del self._names[uid]


def user_name(uid: int) -> str:
    """What a user is called, or the number where they have no name. May take long."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
