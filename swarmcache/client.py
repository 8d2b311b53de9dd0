"""Asking this machine's daemon for files: what ``swarmcache get`` and the Python API run.

    with Client() as client:
        path = client.get("/nfs/corpus/train.hdf")
        paths = client.get_many(["/nfs/corpus/a", "/nfs/corpus/b"])
        with client.hold("/nfs/corpus/dev.hdf") as local:
            ...  # not evicted meanwhile

No method raises because of a fault of the cache, unless it is asked to with ``strict``: no daemon,
a full disk or a daemon that dies in mid-request all give the real path of the source, and
``Answer.reason`` says why.

Standard library only, and little of it: see ``local_socket.py``.
"""

from __future__ import annotations

import os
import time

from swarmcache.errors import DaemonRefused
from swarmcache.exchanges import (
    REQUESTS_MAX,
    Answer,
    Exchanges,
    Progress,
    Source,
    open_source,
    real_path_of,
)
from swarmcache.local_socket import STATUS_BYTES_MAX, Connection, Connections, parse_answer

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, Self

    from swarmcache.held import Hold, Holder

__all__ = [
    "REQUESTS_MAX",
    "Answer",
    "Client",
    "Progress",
    "Source",
    "open_source",
    "real_path_of",
]


class Client:
    """Talks to this machine's daemon. Keeps its connections for later calls.

    ``socket_path``: where the daemon listens; without it ``SWARMCACHE_SOCKET``, the settings, this
    user's daemon, root's daemon, in this order. ``config_file``: where the settings are, if not in
    one of the usual places.

    Threads may share a client, and a forked child may go on with it: it opens connections of its
    own. Pickled, as for a child that is spawned, it is a new client of the same daemon.
    """

    def __init__(
        self, socket_path: str | bytes | None = None, config_file: str | bytes | None = None
    ) -> None:
        self._socket_path = os.fsencode(socket_path) if socket_path else None
        self._config_file = os.fsencode(config_file) if config_file else None
        self.connections = Connections(self._socket_path, self._config_file)
        self._holder: Holder | None = None

    def close(self) -> None:
        """Close all connections, and so end what is held. A later call opens new ones."""
        self.connections.close()
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Client], tuple[bytes | None, bytes | None]]:
        return type(self), (self._socket_path, self._config_file)

    def get(
        self,
        path: str | bytes | os.PathLike[str],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> Answer:
        """Cache one file, or a directory with all files in it, and tell where the copy is.

        ``timeout_s``: answer with the original path when the copy is not there in time.
        ``strict``: raise SourceUnreadable or NotCached instead of answering with the original path.
        """
        (answer,) = self.get_many([path], timeout_s, on_progress, strict=strict)
        return answer

    def get_many(
        self,
        paths: Iterable[str | bytes | os.PathLike[str]],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> list[Answer]:
        """Cache many files or directories; the answers are in the order of ``paths``.

        As ``get``, but several times as fast for many. ``timeout_s`` is for all of them together.
        """
        names = [os.fsencode(path) for path in paths]
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        answers = list(self.get_all(names, timeout_s, on_progress))
        directories = [
            index
            for index, answer in enumerate(answers)
            if not answer.usable and os.path.isdir(answer)
        ]
        if directories:
            from swarmcache.directories import get_everything

            left_s = None if end_s is None else max(0.0, end_s - time.monotonic())
            some = [names[index] for index in directories]
            found = get_everything(self, some, left_s, on_progress)
            for index, answer in zip(directories, found, strict=True):
                answers[index] = answer
        return [answer.check() for answer in answers] if strict else answers

    def get_all(
        self,
        paths: Iterable[bytes],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        trees: Mapping[bytes, bytes] | None = None,
    ) -> Iterator[Answer]:
        """Cache many files, some at a time; each answer as soon as it and all before it are there.

        ``timeout_s`` is for all of them together. ``trees``: the directories, by path, of those
        that are to lie on one disk with the other files of such a directory. These are real paths.
        """
        exchanges = Exchanges(self.connections, paths, timeout_s, on_progress, trees)
        try:
            while True:
                yield from exchanges.take()
                if exchanges.start():
                    continue
                if exchanges.done:
                    return
                exchanges.receive(exchanges.patience_s())
        finally:
            exchanges.close()

    def hold(
        self,
        path: str | bytes | os.PathLike[str],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> Hold:
        """Cache one file, and keep the copy from being evicted.

        Used with ``with``, it gives what ``get`` answers, and ends with the block; else it ends
        with its ``release``, when the client is closed, or with its process. A forked child keeps
        the copies that are held, as long as it lives or until it closes the client, but cannot
        release one. A daemon that is restarted forgets holds.

        ``strict``: raise SourceUnreadable or NotCached where no copy is held.
        """
        from swarmcache.held import ATTEMPTS_MAX, Hold

        hold: Hold | None = None
        for _ in range(ATTEMPTS_MAX):
            hold = self.holder().take(os.fsencode(path))
            if hold is None:
                hold = Hold(self.get(path, timeout_s, on_progress))
            if hold.held or not hold.answer.cached:
                break
        assert hold is not None
        return hold.check() if strict else hold

    def holder(self) -> Holder:
        """What holds copies for this client in this process."""
        from swarmcache.held import Holder

        holder = self._holder.here() if self._holder is not None else Holder(self.connections)
        self._holder = holder
        return holder

    def status(self) -> dict[str, Any]:
        """``node``, ``cluster`` (None where the tracker cannot be asked) and ``reason``.

        Raises DaemonUnavailable, DaemonRefused, BadMessage.
        """
        connection, _ = self.send(b'{"op":"status"}\n')
        try:
            message = parse_answer(connection.receive_line(STATUS_BYTES_MAX))
        finally:
            connection.close()
        if message.get("answer") != "status" or not isinstance(message.get("node"), dict):
            raise DaemonRefused(f"the daemon refused: {message.get('reason', 'no reason given')}")
        return message

    def send(self, line: bytes, *fds: int) -> tuple[Connection, bool]:
        """Send on an idle connection or a new one; the second value says that it was idle.

        Raises DaemonUnavailable.
        """
        return self.connections.send(line, *fds)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose request has been answered."""
        self.connections.give_back(connection)
