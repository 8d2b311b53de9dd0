"""What crosses the data plane's connections: requests, and headers of answers.

A small framed protocol on plain TCP. After the handshake of ``auth`` (purpose ``data``) the peer
that connected sends requests of fixed size, and each is answered by a header of fixed size and, if
the status is OK, by the bytes of the chunk. Requests and headers carry MACs; the bytes are checked
against the chunk's digest. There are no names and no paths in it::

    request   MAC 16 B, kind u8, version id 32 B, chunk u32, chunks held u32
    response  MAC 16 B, status u8, length u32, then ``length`` bytes

Small files are asked for together. Kind 2 has the BLAKE3 of the ids that follow, and their number,
in place of version id and chunk. The answer has a digest for each before the bytes of all, which
lie one after the other; 32 zero bytes stand for a file that is not there::

    request   as above, then the version ids, 32 B each
    response  as above, but with MAC 16 B and the digests, 32 B each, before the ``length`` bytes

``chunk_server.py`` and ``chunk_fetcher.py`` are the two ends. Bytes move in threads only, in
bounded numbers, and in calls that let go of the interpreter's lock.
"""

from __future__ import annotations

import logging
import socket
import struct
from dataclasses import dataclass

from blake3 import blake3

from swarmcache.auth import MAC_BYTES
from swarmcache.chunks import CHUNK_SIZE_MAX_BYTES, DIGEST_BYTES

IDLE_SERVER_S = 60.0
IDLE_CLIENT_S = 30.0  # less than the server's, so that it is the client who closes
assert IDLE_CLIENT_S < IDLE_SERVER_S, "else requests meet closing connections"

FILES_MAX = 1024  # small files in one request
FILES_BYTES_MAX = CHUNK_SIZE_MAX_BYTES  # of all of them: both ends have them in memory at once

KIND_CHUNK, KIND_FILES = 1, 2
OK, ABSENT, BUSY, ERROR = 0, 1, 2, 3
ABSENT_FILE = bytes(DIGEST_BYTES)
REQUEST = struct.Struct("!B32sII")
RESPONSE = struct.Struct("!BI")
REQUEST_BYTES = MAC_BYTES + REQUEST.size
RESPONSE_BYTES = MAC_BYTES + RESPONSE.size

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Which chunk is asked for, and how many chunks of the file the one who asks holds already."""

    version_id: bytes
    chunk: int
    held_chunks: int

    def encode(self) -> bytes:
        return REQUEST.pack(KIND_CHUNK, self.version_id, self.chunk, self.held_chunks)


@dataclass(frozen=True, slots=True)
class FilesRequest:
    """Which small files are asked for together. ``ids``: their version ids, one after the other."""

    ids: bytes

    @property
    def version_ids(self) -> list[bytes]:
        return [self.ids[at : at + DIGEST_BYTES] for at in range(0, len(self.ids), DIGEST_BYTES)]

    @property
    def digest(self) -> bytes:
        """What stands for all of them."""
        return blake3(self.ids).digest()

    def encode(self) -> bytes:
        return REQUEST.pack(KIND_FILES, self.digest, len(self.ids) // DIGEST_BYTES, 0)


def set_timeout(sock: socket.socket, option: int, timeout_s: float) -> None:
    """Let blocking calls on the socket fail with EAGAIN after some time. (Zero means never.)"""
    timeout_us = max(int(timeout_s * 1e6), 1)
    timeval = struct.pack("@ll", timeout_us // 1_000_000, timeout_us % 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, option, timeval)


def shut_down(sock: socket.socket) -> None:
    """Wake whoever is blocked on the socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("the connection was closed already: %s", error)
