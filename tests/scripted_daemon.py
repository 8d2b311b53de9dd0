"""The daemon's end of the local socket, with answers that a test decides.

A real UNIX socket and real descriptors; only what a daemon would do between request and answer is
left out.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from swarmcache.local_protocol import (
    LOOK_UP_MAX,
    Answer,
    AnyRequest,
    Cached,
    Found,
    Get,
    LookUp,
    decode_request,
    encode_answer,
)

HANG_UP = b""  # instead of an answer: close the connection


@dataclass(frozen=True)
class Asked:
    """One request. ``content``: what could be read through the descriptor that came along."""

    request: AnyRequest
    content: bytes
    connection: int

    @property
    def path(self) -> bytes:
        assert isinstance(self.request, Get)
        return self.request.path


AnswerFunction = Callable[[Asked], Iterable[Answer | bytes]]


class ScriptedDaemon:
    """Listens in ``directory`` until ``close``. Every request is noted in ``asked``."""

    def __init__(self, directory: Path, answer: AnswerFunction, name: str = "daemon.sock") -> None:
        self.path = directory / name
        self.asked: list[Asked] = []
        self.connections = 0
        self._answer = answer
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(bytes(self.path))
        self._listener.listen(100)
        self._start(self._accept)

    @property
    def open_connections(self) -> int:
        """How many connections no side has closed yet."""
        return len(self._open)

    def close(self) -> None:
        """End like a daemon that is killed: no connection survives, the socket file does."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in list(self._open):
            with suppress(OSError):  # its client has gone already
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)
            assert not thread.is_alive()
        self._listener.close()

    def __enter__(self) -> ScriptedDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # shut down by close()
                return
            self.connections += 1
            self._open.append(connection)
            self._start(self._serve, connection, self.connections)

    def _serve(self, connection: socket.socket, number: int) -> None:
        buffer, descriptors = b"", list[int]()
        with connection:
            while True:
                try:
                    arrived, fds, _, _ = socket.recv_fds(connection, 65536, LOOK_UP_MAX)
                except OSError:
                    arrived, fds = b"", []
                descriptors += fds
                buffer += arrived
                if not arrived:
                    break
                *lines, buffer = buffer.split(b"\n")
                if not all(self._serve_line(connection, number, x, descriptors) for x in lines):
                    break
            self._open.remove(connection)
        for fd in descriptors:
            os.close(fd)

    def _serve_line(
        self, connection: socket.socket, number: int, line: bytes, descriptors: list[int]
    ) -> bool:
        request = decode_request(line)
        if isinstance(request, LookUp):  # all of it shall be asked for singly
            for _ in range(request.count):
                os.close(descriptors.pop(0))
            connection.sendall(encode_answer(Found([None] * request.count)))
            return True
        content = b""
        if isinstance(request, Get):
            with open(descriptors.pop(0), "rb") as file:
                file.seek(0)  # the position is shared with the client and earlier requests
                content = file.read()
        asked = Asked(request, content, number)
        self.asked.append(asked)
        for answer in self._answer(asked):
            if answer == HANG_UP:
                return False
            try:
                connection.sendall(answer if isinstance(answer, bytes) else encode_answer(answer))
            except OSError:  # the client went away
                return False
        return True


def caching_in(cache: Path) -> AnswerFunction:
    """Answers as a daemon with this cache directory would."""

    def answer(asked: Asked) -> Iterable[Answer]:
        copy = os.fsencode(cache) + b"/user" + asked.path
        hit = os.path.exists(copy) and Path(os.fsdecode(copy)).read_bytes() == asked.content
        if not hit:
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            Path(os.fsdecode(copy)).write_bytes(asked.content)
            if os.path.exists(asked.path):
                shutil.copystat(asked.path, copy)
        size_bytes = 0 if hit else len(asked.content)
        return [Cached(copy, hit, from_peers_bytes=size_bytes)]

    return answer
