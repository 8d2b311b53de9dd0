"""The caller's end of requests about this node's cache: what to list, remove, pin or verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swarmcache import answer_stream
from swarmcache.client import Client
from swarmcache.local_protocol import (
    LINE_MAX_BYTES,
    AboutCache,
    AboutFile,
    decode_cache_answer,
    encode_request,
)

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
        answers: Iterator[AboutFile] = answer_stream.ask(
            client, encode_request(request), decode_cache_answer, LISTED_BYTES_MAX
        )
        yield from answers


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
