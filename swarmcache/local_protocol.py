"""What the CLI and the daemon say to one another over the local UNIX socket.

One JSON object per line. The client sends requests; the daemon answers each with any number of
``progress`` lines and exactly one final line. A ``get`` travels with one open descriptor
(SCM_RIGHTS), sent together with the first byte of its line. Paths are base64 of the raw bytes,
since a path need not be UTF-8.

The client (``client.py``) speaks this with the standard library alone, so that a hit costs no
imports; here are the types with which the daemon validates what it is sent.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from swarmcache.errors import BadMessage

LINE_MAX_BYTES = 64 * 1024


class Request(Struct, tag_field="op", forbid_unknown_fields=True):
    """Base of what a client may ask."""


class Get(Request, tag="get"):
    """Cache the file whose descriptor comes along. ``path``: as the user named it, real path.

    ``progress``: send a ``Progress`` line every so often. ``wait_s``: answer with the original path
    when the copy is not there in time.
    """

    path: Annotated[bytes, Meta(min_length=1, max_length=4096)]
    progress: bool = False
    wait_s: Annotated[float, Meta(ge=0)] | None = None


class StatusOf(Request, tag="status"):
    """The state of this node and, through the tracker, of the cluster."""


class Cached(Struct, tag_field="answer", tag="cached"):
    """Final: the path of the verified copy. ``hit``: it was there before the request."""

    path: bytes
    hit: bool
    from_peers_bytes: int = 0
    from_file_server_bytes: int = 0


class Original(Struct, tag_field="answer", tag="original"):
    """Final: use the original path, and why. ``retry``: the source changed, ask again."""

    reason: str
    retry: bool = False


class Progress(Struct, tag_field="answer", tag="progress"):
    """Not final: how far the file is."""

    size_bytes: int
    from_peers_bytes: int
    from_file_server_bytes: int
    recovered_bytes: int
    peers: int
    waiting_for: str = ""


class NodeStatus(Struct, tag_field="answer", tag="status"):
    """Final: this node, and the cluster as the tracker tells it (None where it cannot be asked)."""

    node: dict[str, Any]
    cluster: dict[str, Any] | None
    reason: str = ""


class Failed(Struct, tag_field="answer", tag="failed"):
    """Final: the request itself was wrong."""

    reason: str


Answer = Cached | Original | Progress | NodeStatus | Failed

_requests = msgspec.json.Decoder(Get | StatusOf)
_encoder = msgspec.json.Encoder()


def decode_request(line: bytes) -> Get | StatusOf:
    """Decode one line of a client. Raises BadMessage."""
    try:
        request: Get | StatusOf = _requests.decode(line)
        return request
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadMessage(f"not a request: {error}") from error


def encode_answer(answer: Answer) -> bytes:
    """One answer as a line."""
    return _encoder.encode(answer) + b"\n"
