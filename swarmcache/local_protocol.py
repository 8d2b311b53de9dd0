"""What the CLI and the daemon say to one another over the local UNIX socket.

One JSON object per line. The client sends requests; the daemon answers each with any number of
other lines (``progress``, ``working``, one per file) and exactly one final line; to ``release``
there is no answer. A ``get`` travels with one open descriptor (SCM_RIGHTS) and a ``look_up`` with
several, sent together with the first byte of their line. Paths are base64 of the raw bytes, since a
path need not be UTF-8.

What ``ls``, ``rm``, ``pin``, ``unpin`` and ``verify`` are about is named by paths: absolute and
without symbolic links, of sources or of local copies. A directory stands for all cached files below
it. A client with more paths than fit into a line sends several requests.

For ``get`` the client (``client.py``) speaks this with the standard library alone, so that a hit
costs no imports; here are the types with which everybody else validates what they are sent.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from swarmcache.errors import BadMessage
from swarmcache.messages import PLACED_AT_ONCE_MAX

LINE_MAX_BYTES = 64 * 1024
# Files in one look-up: with more, what is done once for all of them does not count any more, be it
# of hits (see benchmarks/api.py) or of what is fetched, with a question to the tracker and some
# transactions. An open descriptor of the client and of the daemon for each of them meanwhile; the
# kernel lets 253 come with one message (SCM_MAX_FD).
LOOK_UP_MAX = 192

PATH_MAX_BYTES = 4096
# How many nodes and paths one request about the caches of other nodes may name.
NODES_MAX = 64
PATHS_MAX = 8
# How many files one ``LocationsOf`` may be about.
LOCATIONS_FILES_MAX = 16
# How many files one ``PrefetchTo`` may be about, and how many nodes it may name: a line of them has
# to fit into LINE_MAX_BYTES.
PREFETCH_FILES_MAX = PLACED_AT_ONCE_MAX
PREFETCH_NODES_MAX = 1024

Path = Annotated[bytes, Meta(min_length=1, max_length=PATH_MAX_BYTES)]
SomePaths = Annotated[list[Path], Meta(min_length=1)]


class Request(Struct, tag_field="op", forbid_unknown_fields=True):
    """Base of what a client may ask."""

    @property
    def descriptor_count(self) -> int:
        """How many open descriptors come along."""
        return 0


class Get(Request, tag="get"):
    """Cache the file whose descriptor comes along. ``path``: as the user named it, real path.

    ``progress``: send a ``Progress`` line every so often. ``wait_s``: answer with the original path
    when the copy is not there in time. ``hold``: keep the copy until this connection closes, or
    until a ``Release`` with this number, which the client has chosen.
    ``tree``: real path of the directory whose copy is wanted as a whole, so on one disk.
    """

    path: Path
    progress: bool = False
    wait_s: Annotated[float, Meta(ge=0)] | None = None
    hold: Annotated[int, Meta(ge=0)] | None = None
    tree: Path | None = None

    @property
    def descriptor_count(self) -> int:
        return 1


class LookUp(Request, tag="look_up"):
    """Tell which of the files whose descriptors come along are cached.

    ``fetch``: first fetch those that are small and can be had of peers, for ``wait_s`` at most.
    ``tree`` as for ``Get``.
    """

    count: Annotated[int, Meta(ge=1, le=LOOK_UP_MAX)]
    fetch: bool = False
    wait_s: Annotated[float, Meta(ge=0)] | None = None
    tree: Path | None = None

    @property
    def descriptor_count(self) -> int:
        return self.count


class Release(Request, tag="release"):
    """End one hold of this connection. Not answered, so that nobody waits in order to let go."""

    hold: int


class StatusOf(Request, tag="status"):
    """The state of this node and, through the tracker, of the cluster."""


class Ls(Request, tag="ls"):
    """List these cached files, or all of them; answered by ``CachedFile`` lines and an ``End``."""

    paths: list[Path] = []


class Rm(Request, tag="rm"):
    """Take these files out of the cache; answered by ``Outcome`` lines and an ``End``, as are all
    requests below. ``force``: also those that are pinned."""

    paths: SomePaths
    force: bool = False


class Pin(Request, tag="pin"):
    """Keep these files until they are unpinned by the same user."""

    paths: SomePaths


class Unpin(Request, tag="unpin"):
    """Take this user's pins away, or (``all_users``, for root) everybody's."""

    paths: SomePaths
    all_users: bool = False


class Verify(Request, tag="verify"):
    """Digest these files anew, or all of them."""

    paths: list[Path] = []


class LocationsOf(Request, tag="locations"):
    """On which nodes the files are whose ``count`` descriptors come along.

    Answered by any number of ``Notice``, one ``Locations`` per file in order, and an ``End``.
    ``limit``: of each file no more nodes than these are of interest.
    """

    count: Annotated[int, Meta(ge=1, le=LOCATIONS_FILES_MAX)]
    limit: Annotated[int, Meta(ge=1)] | None = None

    @property
    def descriptor_count(self) -> int:
        return self.count


class CopyPathOf(Request, tag="copy_path"):
    """Where the user's copy of a file is or would be; answered by ``CopyPath``.

    ``opened``: the file's descriptor comes along. Without one, ``path`` is that of a file which the
    user is going to put there: the directories on the way are made.
    """

    path: Path
    opened: bool = True

    @property
    def descriptor_count(self) -> int:
        return int(self.opened)


class RoomFor(Request, tag="room"):
    """Whether there can be room for the files whose ``count`` descriptors come along; answered by
    ``Room``. Nothing is set aside or evicted."""

    count: Annotated[int, Meta(ge=1, le=LOCATIONS_FILES_MAX)]

    @property
    def descriptor_count(self) -> int:
        return self.count


class WriteSlot(Request, tag="write_slot"):
    """A slot, to write a file into the directory whose descriptor comes along.

    Answered by any number of ``Slot`` lines, each of which is to be answered by ``SlotHeard``, and
    perhaps a ``NoSlot``. The slot is given back when the connection closes.
    """

    @property
    def descriptor_count(self) -> int:
        return 1


class SlotHeard(Request, tag="slot_heard"):
    """The client has got a ``Slot``, so it is neither stopped nor hangs. Not answered."""


class OfferReplica(Request, tag="offer_replica"):
    """Make a replica of a file that was just written from what it was copied of.

    Two descriptors come along: the file, open for reading and writing, and what it was copied of,
    open for reading. ``digest``: BLAKE3 of the bytes that were written. Answered by ``End`` or
    ``Failed``.
    """

    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]

    @property
    def descriptor_count(self) -> int:
        return 2


class PrefetchTo(Request, tag="prefetch"):
    """Bring the files whose ``count`` descriptors come along to other nodes, and to this one.

    ``nodes``: names of hosts, or control addresses. ``copies``: how many nodes shall have the files
    in the end, these first; None: just these or, where none are named, all nodes that are known.
    Answered by any number of ``Placed``, ``NodeSilent``, ``Notice`` and ``Transferred``, and an
    ``End``.
    """

    count: Annotated[int, Meta(ge=1, le=PREFETCH_FILES_MAX)]
    nodes: Annotated[list[str], Meta(max_length=PREFETCH_NODES_MAX)] = []
    copies: Annotated[int, Meta(ge=1)] | None = None

    @property
    def descriptor_count(self) -> int:
        return self.count


class ReplicasOn(Request, tag="replicas"):
    """What these nodes hold of sources at or below ``paths``; no paths stand for everything.

    For root and the daemon's own user, as ``ForgetOn``. ``nodes``: control addresses; none stand
    for this node. Answered by any number of ``NodeReplicas`` and ``NodeSilent``, and an ``End``.
    """

    nodes: Annotated[list[str], Meta(max_length=NODES_MAX)] = []
    paths: Annotated[list[Path], Meta(max_length=PATHS_MAX)] = []


class ForgetOn(Request, tag="forget"):
    """Have these nodes give up what they hold, if it was not used for ``unused_s`` (None: if it may
    be evicted). Answered by any number of ``NodeForgot`` and ``NodeSilent``, and an ``End``."""

    nodes: Annotated[list[str], Meta(max_length=NODES_MAX)] = []
    paths: Annotated[list[Path], Meta(max_length=PATHS_MAX)] = []
    unused_s: Annotated[float, Meta(ge=0)] | None = None


class Cached(Struct, tag_field="answer", tag="cached"):
    """Final: the path of the verified copy. ``hit``: it was there before the request.

    ``held``: it is kept until the connection closes, as was asked.
    """

    path: bytes
    hit: bool
    from_peers_bytes: int = 0
    from_file_server_bytes: int = 0
    held: bool = False


class Found(Struct, tag_field="answer", tag="found", omit_defaults=True):
    """Final: for each descriptor, in their order, the verified copy; None where there is none yet,
    or the file is none to cache: a ``get`` tells why. ``fetched``: the places of those that were
    not there before the request."""

    paths: list[bytes | None]
    fetched: list[int] = []


class Original(Struct, tag_field="answer", tag="original"):
    """Final: use the original path, and why. ``retry``: the source changed, ask again."""

    reason: str
    retry: bool = False


class Progress(Struct, tag_field="answer", tag="progress"):
    """Not final: how far the file is. ``joined``: it was being fetched before the request."""

    size_bytes: int
    from_peers_bytes: int
    from_file_server_bytes: int
    recovered_bytes: int
    peers: int
    waiting_for: str = ""
    joined: bool = False


class NodeStatus(Struct, tag_field="answer", tag="status"):
    """Final: this node, and the cluster as the tracker tells it (None where it cannot be asked).

    ``members``: the nodes as they tell of themselves; None where they do not.
    """

    node: dict[str, Any]
    cluster: dict[str, Any] | None
    reason: str = ""
    members: list[dict[str, Any]] | None = None


class CachedFile(Struct, tag_field="answer", tag="file"):
    """Not final: one cached file. ``path`` is that of the source.

    ``copies``: where it lies, for the user who asks; for root, for the first users who have it.
    ``age_s``: since it was cached, ``idle_s``: since it was last used. ``pinned_by``: user names.
    ``verified``: false while it is in doubt after a crash, and not handed out. ``in_use``: some
    process has it open, or a client holds it. ``replicas_elsewhere``: how many other nodes hold it;
    None where the tracker cannot be asked.
    """

    path: bytes
    version_id: str
    size_bytes: int
    age_s: float
    idle_s: float
    copies: list[bytes]
    pinned_by: list[str]
    verified: bool
    in_use: bool
    replicas_elsewhere: int | None


class Outcome(Struct, tag_field="answer", tag="outcome"):
    """Not final: what became of one cached file, or of a path that stands for none.

    ``done``: it is as the request wanted it. ``note`` is for people: why it is not done, or what
    there is to know besides. ``size_bytes`` is None for a path that stands for no cached file,
    ``rotten_chunks`` (how many) for one that was not digested.
    """

    path: bytes
    done: bool
    note: str = ""
    size_bytes: int | None = None
    rotten_chunks: int | None = None


class KnownReplica(Struct):
    """A replica on some node. ``path``: of the source, empty where only another node knows it."""

    version_id: str
    size_bytes: int
    idle_s: float
    path: bytes = b""


class NodeReplicas(Struct, tag_field="answer", tag="node_replicas"):
    """Not final: some of the replicas of one node. An empty ``node`` is this one."""

    node: str
    replicas: list[KnownReplica]


class NotForgotten(Struct):
    """A replica that stays, and why."""

    version_id: str
    why: str
    path: bytes = b""


class NodeForgot(Struct, tag_field="answer", tag="node_forgot"):
    """Not final: how many replicas one node has given up, of how many bytes, and which it keeps."""

    node: str
    dropped: int
    dropped_bytes: int
    kept: list[NotForgotten]


class NodeSilent(Struct, tag_field="answer", tag="node_silent"):
    """Not final: a node cannot be asked, or not to the end."""

    node: str
    reason: str


class Placed(Struct, tag_field="answer", tag="placed"):
    """Not final: what became of one file on one node. ``file``: its number in the request.

    ``node``: its control address, ``name``: of its host; both are empty where no node can have the
    file. ``hit``: it was there before. ``reason``: why it is not there; empty if it is.
    """

    file: int
    node: str = ""
    name: str = ""
    hit: bool = False
    reason: str = ""


class Transferred(Struct, tag_field="answer", tag="transferred"):
    """Not final: how many bytes of the files all nodes together have, out of how many."""

    done_bytes: int
    total_bytes: int


class Location(Struct):
    """A verified replica. ``node``: its host name; ``path``: of the user's copy there.

    ``linked``: the path is there. Or else ``get`` puts it there at once when this user asks.
    """

    node: str
    path: bytes
    linked: bool


class Locations(Struct, tag_field="answer", tag="locations"):
    """Not final: where one file is. ``path``: the real path of the source.

    ``more``: so many more nodes are said to hold it, and were not asked. ``reason``: why this is
    not the whole truth; with an empty path, why the descriptor leads to no file that is cached.
    """

    path: bytes = b""
    size_bytes: int = 0
    locations: list[Location] = []
    more: int = 0
    reason: str = ""


class Notice(Struct, tag_field="answer", tag="notice"):
    """Not final: something that people should know."""

    text: str


class CopyPath(Struct, tag_field="answer", tag="copy_path"):
    """Final: where the copy is or would be."""

    path: bytes


class Room(Struct, tag_field="answer", tag="room"):
    """Final: ``needed_bytes`` of the files that were asked about, out of ``room_bytes`` that could
    be had in all. What is cached already needs room as well if it would be evicted to make some."""

    needed_bytes: int
    room_bytes: int


class Slot(Struct, tag_field="answer", tag="slot"):
    """Not final: write until ``until_s`` (CLOCK_BOOTTIME), whatever comes; None: not yet."""

    until_s: float | None
    file_server: str


class NoSlot(Struct, tag_field="answer", tag="no_slot"):
    """Final: there is no slot to be had, and why. Write without one."""

    reason: str


class Working(Struct, tag_field="answer", tag="working"):
    """Not final: the daemon is alive, and busy with this request."""


class End(Struct, tag_field="answer", tag="end"):
    """Final: that was all."""


class Failed(Struct, tag_field="answer", tag="failed"):
    """Final: the request itself was wrong, or the daemon's disk failed in the middle of it."""

    reason: str


AboutCache = Ls | Rm | Pin | Unpin | Verify
AboutFiles = Get | LookUp | Release | StatusOf
AboutPlaces = LocationsOf | CopyPathOf | RoomFor
AboutWriting = WriteSlot | SlotHeard | OfferReplica
AboutNodes = ReplicasOn | ForgetOn
AnyRequest = AboutFiles | AboutCache | AboutPlaces | AboutWriting | AboutNodes | PrefetchTo
OfFiles = Cached | Found | Original | Progress | NodeStatus
OfPlaces = Notice | Locations | CopyPath | Room | Working | End | Failed
OfWriting = Slot | NoSlot | Working | End | Failed
OfNodes = NodeReplicas | NodeForgot | NodeSilent | Working | End | Failed
OfPrefetch = Placed | NodeSilent | Notice | Transferred | Working | End | Failed
Answer = OfNodes | OfPrefetch | OfFiles | CachedFile | Outcome | OfPlaces | OfWriting

AboutFile = CachedFile | Outcome
OfCache = AboutFile | Working | End | Failed
Decoded = TypeVar("Decoded")

_requests: msgspec.json.Decoder[AnyRequest] = msgspec.json.Decoder(AnyRequest)
_answers: msgspec.json.Decoder[OfCache] = msgspec.json.Decoder(OfCache)
_place_answers: msgspec.json.Decoder[OfPlaces] = msgspec.json.Decoder(OfPlaces)
_node_answers: msgspec.json.Decoder[OfNodes] = msgspec.json.Decoder(OfNodes)
_prefetch_answers: msgspec.json.Decoder[OfPrefetch] = msgspec.json.Decoder(OfPrefetch)
_encoder = msgspec.json.Encoder()


def decode_request(line: bytes) -> AnyRequest:
    """Decode one line of a client. Raises BadMessage."""
    return _decode(_requests, line, "a request")


def decode_cache_answer(line: bytes) -> OfCache:
    """Decode one line of the daemon's answer to a request about the cache. Raises BadMessage."""
    return _decode(_answers, line, "an answer")


def decode_place_answer(line: bytes) -> OfPlaces:
    """Decode one line of the daemon's answer to a request about places. Raises BadMessage."""
    return _decode(_place_answers, line, "an answer")


def decode_node_answer(line: bytes) -> OfNodes:
    """Decode one line of the daemon's answer to a request about nodes. Raises BadMessage."""
    return _decode(_node_answers, line, "an answer")


def decode_prefetch_answer(line: bytes) -> OfPrefetch:
    """Decode one line of the daemon's answer to ``PrefetchTo``. Raises BadMessage."""
    return _decode(_prefetch_answers, line, "an answer")


def _decode(decoder: msgspec.json.Decoder[Decoded], line: bytes, what: str) -> Decoded:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadMessage(f"not {what}: {error}") from error


def encode_request(
    request: AboutCache | AboutPlaces | AboutNodes | OfferReplica | PrefetchTo,
) -> bytes:
    """One request as a line."""
    return _encoder.encode(request) + b"\n"


def encode_answer(answer: Answer) -> bytes:
    """One answer as a line."""
    return _encoder.encode(answer) + b"\n"
