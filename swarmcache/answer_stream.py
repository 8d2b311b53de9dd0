"""The caller's end of requests that the daemon answers with many lines, over some time."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from swarmcache.client import Client
from swarmcache.errors import DaemonRefused, DaemonUnavailable
from swarmcache.local_protocol import End, Failed, Working
from swarmcache.local_socket import SILENCE_S_MAX, Connection

Answer = TypeVar("Answer")


def ask(
    client: Client,
    request: bytes,
    decode: Callable[[bytes], Answer | End | Failed | Working],
    line_bytes_max: int,
    fds: Sequence[int] = (),
) -> Iterator[Answer]:
    """Send an encoded request, and yield what the daemon answers until it says that this is all.

    ``fds``: descriptors that go along. Signs of life are left out.
    Raises DaemonUnavailable, DaemonRefused, BadMessage.
    """
    connection, _ = client.send(request, *fds)
    try:
        for line in lines(connection, line_bytes_max):
            match decode(line):
                case End():
                    break
                case Failed() as failed:
                    raise DaemonRefused(failed.reason)
                case Working():
                    pass
                case answer:
                    yield answer
    except BaseException:  # GeneratorExit as well: the rest of the answer would be in the way
        connection.close()
        raise
    client.give_back(connection)


def lines(connection: Connection, line_bytes_max: int) -> Iterator[bytes]:
    """The lines that come in, for ever. Raises DaemonUnavailable, BadMessage."""
    arrival = select.poll()
    arrival.register(connection.fileno(), select.POLLIN)
    while True:
        if not arrival.poll(SILENCE_S_MAX * 1000):
            raise DaemonUnavailable(f"the daemon said nothing for {SILENCE_S_MAX:.0f} s")
        yield from connection.receive(line_bytes_max)
