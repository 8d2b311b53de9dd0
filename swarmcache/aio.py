"""``Client`` for asyncio: the same names, as coroutines.

    from swarmcache import aio

    async with aio.Client() as client:
        path = await client.get("/nfs/corpus/train.hdf")
        async with client.hold("/nfs/corpus/dev.hdf") as local:
            ...

A request that waits for the daemon needs no thread: the event loop watches its connection. A thread
is borrowed, for a moment, whenever a file has to be opened or looked at, since a file server may
hang. What is about a directory, ``cp`` and ``locate`` keep one busy as long as they take: not one
of those few, but one of the event loop's own (``asyncio.to_thread``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from swarmcache import api
from swarmcache.exchanges import Answer, Exchanges, Progress
from swarmcache.held import ATTEMPTS_MAX, Hold

if TYPE_CHECKING:
    from swarmcache.locate import FileLocations

THREADS_MAX = 4  # which open and look at files; more would not make a file server faster
Result = TypeVar("Result")
AnyPath = str | bytes | os.PathLike[str]


class Client:
    """Talks to this machine's daemon. See ``swarmcache.Client``, also for the arguments.

    It belongs to no event loop in particular. A task that is cancelled ends its request.
    """

    def __init__(
        self, socket_path: str | bytes | None = None, config_file: str | bytes | None = None
    ) -> None:
        self._blocking = api.Client(socket_path, config_file)
        self._pid = os.getpid()
        self._threads: ThreadPoolExecutor | None = None

    async def close(self) -> None:
        """Close all connections, and so end what is held. A later call opens new ones."""
        self._blocking.close()
        threads, self._threads = self._threads, None
        if threads is not None and self._pid == os.getpid():
            threads.shutdown(wait=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def get(
        self,
        path: AnyPath,
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> Answer:
        """See ``swarmcache.Client.get``. ``on_progress`` is called in the event loop."""
        (answer,) = await self.get_many([path], timeout_s, on_progress, strict=strict)
        return answer

    async def get_many(
        self,
        paths: Iterable[AnyPath],
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> list[Answer]:
        """See ``swarmcache.Client.get_many``. ``on_progress`` is called in the event loop."""
        loop = asyncio.get_running_loop()
        end_s = None if timeout_s is None else loop.time() + timeout_s

        def tell(progress: Progress) -> None:
            loop.call_soon_threadsafe(on_progress, progress)  # type: ignore[arg-type]

        names = [os.fsencode(path) for path in paths]
        answers = await self._get_files(names, timeout_s, tell if on_progress else None)
        directories = [index for index, answer in enumerate(answers) if not answer.usable]
        if directories:  # perhaps

            def get_again(some: list[bytes]) -> list[Answer]:
                left_s = None if end_s is None else max(0.0, end_s - loop.time())
                return self._blocking.get_many(some, left_s, tell if on_progress else None)

            found = await asyncio.to_thread(get_again, [names[index] for index in directories])
            for index, answer in zip(directories, found, strict=True):
                answers[index] = answer
        return [answer.check() for answer in answers] if strict else answers

    @asynccontextmanager
    async def hold(
        self,
        path: AnyPath,
        timeout_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        strict: bool = False,
    ) -> AsyncIterator[Answer]:
        """See ``swarmcache.Client.hold``; this one is for ``async with`` only."""
        hold: Hold | None = None
        for _ in range(ATTEMPTS_MAX):
            hold = await self._take(os.fsencode(path))
            if hold is None:
                hold = Hold(await self.get(path, timeout_s, on_progress))
            if hold.held or not hold.answer.cached:
                break
        assert hold is not None
        try:
            yield (hold.check() if strict else hold).answer
        finally:
            hold.release()

    async def cp(self, source: AnyPath, destination: AnyPath, *, register: bool = True) -> str:
        """See ``swarmcache.Client.cp``."""
        return await asyncio.to_thread(self._blocking.cp, source, destination, register=register)

    async def locate(
        self, paths: AnyPath | Iterable[AnyPath], limit: int | None = None
    ) -> list[FileLocations]:
        """See ``swarmcache.Client.locate``."""
        return await asyncio.to_thread(self._blocking.locate, paths, limit)

    async def status(self) -> dict[str, Any]:
        """See ``swarmcache.Client.status``."""
        return await self._in_thread(self._blocking.status)

    # --- threads --------------------------------------------------------------------------------

    def _submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        if self._threads is None or self._pid != os.getpid():  # those of a parent are not here
            self._pid = os.getpid()
            self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="swarmcache")
        return self._threads.submit(function, *args)

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.wrap_future(self._submit(function, *args))

    async def _get_files(
        self,
        names: list[bytes],
        timeout_s: float | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> list[Answer]:
        exchanges = Exchanges(self._blocking.connections, names, timeout_s, on_progress)
        answers: list[Answer] = []
        running: Future[None] | None = None
        try:
            while True:
                running = self._submit(_advance, exchanges)
                await asyncio.wrap_future(running)
                answers += exchanges.take()
                if exchanges.done:
                    return answers
                await _readable(exchanges.fileno(), exchanges.patience_s())
        finally:
            if running is None:
                exchanges.close()
            else:  # once the thread has done with it, should we be cancelled meanwhile
                running.add_done_callback(lambda _: exchanges.close())

    async def _take(self, name: bytes) -> Hold | None:
        running = self._submit(self._blocking.holder().take, name)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            running.add_done_callback(_release)
            raise


def _advance(exchanges: Exchanges) -> None:
    """Do all that can be done without waiting for the daemon."""
    exchanges.receive()
    while exchanges.start():
        pass


async def _readable(fd: int, patience_s: float) -> None:
    """Wait until the descriptor is readable, or for so long."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(fd, arrived.set)
    try:
        with suppress(TimeoutError):  # what is late, ``Exchanges.receive`` finds
            async with asyncio.timeout(patience_s):
                await arrived.wait()
    finally:
        loop.remove_reader(fd)


def _release(done: Future[Hold | None]) -> None:
    """Let go of what nobody waits for any more."""
    if not done.cancelled() and done.exception() is None and (hold := done.result()) is not None:
        hold.release()
