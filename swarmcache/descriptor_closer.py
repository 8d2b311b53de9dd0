"""Closing the descriptors that clients have sent.

That may take as long as their owners like: the process behind a FUSE file is asked first, a socket
may linger. So it is not for the event loop, and those of one user do not wait for another's.

Invariant: a user has a thread exactly as long as there is something to close.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable

log = logging.getLogger(__name__)


def close_file(fd: int, uid: int) -> None:
    """Close a descriptor of this user now, however long that takes."""
    try:
        os.close(fd)
    except OSError as error:  # what was written could not be: that is the client's to know
        log.info("closing a file of uid %d: %s", uid, error)


class DescriptorCloser:
    """Thread-safe. Its threads do not keep the process from ending."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[int, deque[int]] = {}

    def close(self, uid: int, fds: Iterable[int]) -> None:
        """Close these descriptors of a user soon."""
        with self._lock:
            queue = self._queues.get(uid)
            if queue is not None:
                queue.extend(fds)
                return
            self._queues[uid] = deque(fds)
        threading.Thread(target=self._run, args=(uid,), daemon=True, name="close").start()

    def pending(self, uid: int) -> int:
        """How many of a user wait, besides the one that is being closed."""
        with self._lock:
            return len(self._queues.get(uid, ()))

    def _run(self, uid: int) -> None:
        while True:
            with self._lock:
                queue = self._queues[uid]
                if not queue:
                    del self._queues[uid]
                    return
                fd = queue.popleft()
            close_file(fd, uid)
