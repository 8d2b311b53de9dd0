"""The caller's end of requests about this node's cache: what to list, remove, pin or verify."""

from __future__ import annotations

import select
from collections.abc import Iterator, Sequence

from swarmcache.client import Client
from swarmcache.errors import DaemonRefused, DaemonUnavailable
from swarmcache.local_protocol import (
    LINE_MAX_BYTES,
    AboutCache,
    AboutFile,
    End,
    Failed,
    Working,
    decode_cache_answer,
    encode_request,
)
from swarmcache.local_socket import SILENCE_S_MAX, Connection

# Of paths in one request: base64 makes a third more of them, and quotes and the rest need room.
BATCH_BYTES_MAX = LINE_MAX_BYTES // 2
PATH_EXTRA_BYTES = 8
# Of one answer: the copies of some users, with the longest possible paths.
LISTED_BYTES_MAX = 1 << 20


def ask(client: Client, request: AboutCache) -> Iterator[AboutFile]:
    """Send a request, and what the daemon tells of each file, as it comes in.

    With more paths than fit into one line these are several requests, one after another.
    Raises DaemonUnavailable, DaemonRefused, BadMessage.
    """
    for paths in _batches(request.paths):
        request.paths = paths
        connection, _ = client.send(encode_request(request))
        try:
            yield from _answers(connection)
        except BaseException:  # GeneratorExit as well: the rest of the answer would be in the way
            connection.close()
            raise
        client.give_back(connection)


def _batches(paths: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size_bytes = 0
    for path in paths:
        size_bytes += len(path) + PATH_EXTRA_BYTES
        if batch and size_bytes > BATCH_BYTES_MAX:
            yield batch
            batch, size_bytes = [], len(path) + PATH_EXTRA_BYTES
        batch.append(path)
    yield batch


def _answers(connection: Connection) -> Iterator[AboutFile]:
    arrival = select.poll()
    arrival.register(connection.fileno(), select.POLLIN)
    while True:
        if not arrival.poll(SILENCE_S_MAX * 1000):
            raise DaemonUnavailable(f"the daemon said nothing for {SILENCE_S_MAX:.0f} s")
        for line in connection.receive(LISTED_BYTES_MAX):
            match decode_cache_answer(line):
                case End():
                    return
                case Failed() as failed:
                    raise DaemonRefused(failed.reason)
                case Working():
                    pass
                case answer:
                    yield answer
