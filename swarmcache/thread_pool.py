"""A fixed number of threads for calls that may block; fewer where there can be no more of them."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from swarmcache.errors import NoThread

log = logging.getLogger(__name__)


class ThreadPool(ThreadPoolExecutor):
    """A ``ThreadPoolExecutor`` whose calls wait for the threads there are where there can be no
    further one.

    As it is, that one queues a call and raises what prevents another thread: nobody has its future,
    and it may be made all the same. Here ``submit`` raises NoThread if there is no thread at all;
    then the call is not made. The next one tries again to have a thread.
    """

    _told = False

    def _adjust_thread_count(self) -> None:
        """Called by ``submit``, under its lock, with the call in the queue."""
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not self._threads:
                self._work_queue.get_nowait()  # nobody else takes anything, so it is this call
                raise NoThread(f"the daemon has too few threads: {error}") from error
            if not self._told:
                log.warning("going on with %d threads: %s", len(self._threads), error)
            self._told = True
