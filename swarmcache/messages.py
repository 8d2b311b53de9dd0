"""Everything that crosses a socket between nodes and tracker (the control plane).

Messages are msgpack maps with a ``type`` tag; decoding validates every field. Unknown fields are
ignored, so that neighbouring versions can talk during a rolling upgrade. ``VersionId`` is the
32-byte id of a file version: no path of a file ever crosses the network, except in
``PlaceReplica``, whose receiver has nobody else to learn it from.

Bit masks of chunks travel as little-endian bytes (``chunks.mask_to_bytes``).

Limits: one message is at most ``MESSAGE_MAX_BYTES`` long, one ``Have`` names at most
``HAVE_CHUNKS_MAX`` chunks; senders split.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from swarmcache.errors import BadMessage

MESSAGE_MAX_BYTES = 1 << 20
HAVE_CHUNKS_MAX = 8192
REPLICAS_MAX = 8192
# How many file versions one ``Locate`` may name, and how many nodes one ``Located``: an address has
# at most 1,343 characters of 4 bytes, and a message at most MESSAGE_MAX_BYTES.
LOCATE_MAX = 1024
LOCATED_NODES_MAX = 128
# How many holders are named to whoever asks for many small files: one request goes to each.
BATCH_HOLDERS_MAX = 4
# How many file versions one ``FindReplicas`` may name: the answer has a path for each.
FIND_MAX = 64
PATH_MAX_BYTES = 4096
# How many paths one question of an admin may be about, and how many replicas one answer.
DIGESTS_MAX = 1024
SURVEYED_MAX = 1024
# How many ``PlaceReplica`` may be unanswered on one connection: what one request of a client names.
PLACED_AT_ONCE_MAX = 16
# 2: ``Locate``, ``Suspected``. 3: leases to write. 4: ``WhoHas``. A message that the other side
# does not know ends the connection, and with it the leases, so both must know the same ones.
PROTOCOL_VERSION = 4
LOADS_MAX = 64
# How many file servers with a setting of their own a node is told of.
FILE_SERVERS_MAX = 256
WAITING_MAX = 1024
SEEDS_MAX = 16
KEY_TAGS_MAX = 16

VersionId = Annotated[bytes, Meta(min_length=32, max_length=32)]
# ``path_digests.path_digest``
PathDigests = Annotated[
    list[Annotated[bytes, Meta(min_length=32, max_length=32)]], Meta(max_length=DIGESTS_MAX)
]
# Of another length than a version id, since both are claims to slots of the same file server.
WRITE_ID_BYTES = 16
WriteId = Annotated[bytes, Meta(min_length=WRITE_ID_BYTES, max_length=WRITE_ID_BYTES)]
NodeId = Annotated[str, Meta(min_length=1, max_length=255)]
# ``ClusterKey.tag`` of the keys that a process accepts, the one it speaks with first.
KeyTags = Annotated[list[Annotated[str, Meta(max_length=16)]], Meta(max_length=KEY_TAGS_MAX)]
Seeds = Annotated[list[NodeId], Meta(max_length=SEEDS_MAX)]
Name = Annotated[str, Meta(max_length=1024)]
Rack = Annotated[str, Meta(max_length=64)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(gt=0)]
Port = Annotated[int, Meta(gt=0, lt=65536)]
SlotsMax = Annotated[dict[Name, Positive], Meta(max_length=FILE_SERVERS_MAX)]
Mask = Annotated[bytes, Meta(max_length=MESSAGE_MAX_BYTES // 4)]


class Message(Struct, tag_field="type", frozen=False):
    """Base of all messages."""


class NodeAddress(Struct, frozen=True, omit_defaults=True):
    """How to reach a node: ``node`` is the advertised ``host:port`` of its control server.

    ``rack``: where it stands (``daemon.rack``); nodes with the same one are near one another. Empty
    where nobody has said so.
    """

    node: NodeId
    data_port: Port
    name: Name = ""
    rack: Rack = ""


class DiskStatus(Struct, frozen=True):
    """Room on the disk (or disks) of a node's cache, in bytes."""

    capacity_bytes: Count = 0
    free_bytes: Count = 0
    used_bytes: Count = 0
    file_count: Count = 0


class NodeTotals(Struct, frozen=True):
    """What a node has done since its daemon started. ``life`` is another number each time.

    ``requests``: of local clients for files, ``hits`` of them for files that were cached already.
    """

    life: Count = 0
    requests: Count = 0
    hits: Count = 0
    from_peers_chunks: Count = 0
    from_peers_bytes: Count = 0


class Holders(Struct, frozen=True):
    """Who has a replica of one file version, besides the node that asked: how many, and some."""

    count: Count
    nodes: Annotated[list[NodeAddress], Meta(max_length=LOCATED_NODES_MAX)] = []


class BatchHolder(Struct, frozen=True):
    """A node that has some of the file versions of a ``WhoHas``; ``held``: a bit for each."""

    address: NodeAddress
    held: Mask


class ReplicaPlace(Struct, frozen=True):
    """Where a node holds a replica, verified just now, for a certain user.

    ``directory``: below it lies the user's copy, at the real path of the source; the name of the
    file itself is known to whoever asks. ``linked``: the copy is there; or else a ``get`` of this
    user on that node puts it there at once.
    """

    directory: Annotated[bytes, Meta(min_length=1, max_length=PATH_MAX_BYTES)]
    linked: bool


class HeldReplica(Struct, frozen=True):
    """A replica that a node holds. ``idle_s``: since it was last used."""

    version_id: VersionId
    size_bytes: Count
    idle_s: float


class KeptReplica(Struct, frozen=True):
    """A replica that a node does not give up. ``why`` is for people."""

    version_id: VersionId
    why: Name


class HeldLease(Struct, frozen=True):
    """A lease as its holder remembers it, told to a tracker that may have forgotten it."""

    lease_id: Count
    version_id: VersionId
    file_server: Name
    user: Name
    first: Count
    count: Positive


class HeldWrite(Struct, frozen=True):
    """A lease to write a file, as its holder remembers it."""

    lease_id: Count
    write_id: WriteId
    file_server: Name
    user: Name


# --- node -> tracker ----------------------------------------------------------------------------


class Register(Message, tag="register"):
    """First message on a tracker connection. ``clock_s`` is the node's own clock.

    ``stood_in``: the node was with another tracker since it was last with this one.
    """

    address: NodeAddress
    clock_s: float
    leases: Annotated[list[HeldLease], Meta(max_length=LOADS_MAX)] = []
    disk: DiskStatus = DiskStatus()
    protocol: int = PROTOCOL_VERSION
    writes: Annotated[list[HeldWrite], Meta(max_length=LOADS_MAX)] = []
    totals: NodeTotals = NodeTotals()
    key_tags: KeyTags = []
    stood_in: bool = False


class Join(Message, tag="join"):
    """The node wants this file version. ``held`` are the chunks that it has already.

    ``can_read`` says that it has an open descriptor of the source. ``chunk_size_bytes`` is a
    proposal: the first one to join decides, ``Joined`` tells.
    """

    version_id: VersionId
    file_server: Name
    user: Name
    size_bytes: Positive
    chunk_size_bytes: Positive
    held: Mask = b""
    can_read: bool = True


class Leave(Message, tag="leave"):
    """The node no longer wants, holds or serves this file version."""

    version_id: VersionId


class Replicas(Message, tag="replicas"):
    """Complete, verified copies that the node holds.

    ``more`` is set where the node tells of all that it holds: whether another such message follows.
    What it told before the first of them, and not since, it no longer holds after the last one.
    """

    version_ids: Annotated[list[VersionId], Meta(max_length=REPLICAS_MAX)]
    more: bool | None = None


class RangeRead(Message, tag="range_read"):
    """The leased range was read, digested and is being served. Ends the lease."""

    lease_id: Count
    version_id: VersionId
    read_bytes: Count
    elapsed_s: float


class RangeFailed(Message, tag="range_failed"):
    """The lease ends early: only the chunks in ``held`` were read. ``reason`` is for people."""

    lease_id: Count
    version_id: VersionId
    held: Mask
    reason: Name
    source_changed: bool = False


class WantWrite(Message, tag="want_write"):
    """A client of the node wants to write a file to this file server, which takes one slot.

    ``write_id`` is the node's own choice. Stands until ``EndWrite`` or the end of the connection.
    """

    write_id: WriteId
    file_server: Name
    user: Name


class EndWrite(Message, tag="end_write"):
    """Nobody writes that file just now: ends its lease, or withdraws ``WantWrite``."""

    write_id: WriteId


class Heartbeat(Message, tag="heartbeat"):
    """Renews all leases of the node. ``clock_s`` is the node's own clock when it was sent."""

    clock_s: float
    disk: DiskStatus = DiskStatus()
    totals: NodeTotals = NodeTotals()
    key_tags: KeyTags = []


class Holding(Message, tag="holding"):
    """Answer to ``Query``: which of the chunks in question the node has."""

    version_id: VersionId
    query_id: Count
    held: Mask


class Missing(Message, tag="missing"):
    """The node has had nothing for a while, and no neighbour that answers has these chunks."""

    version_id: VersionId
    wanted: Mask


class ReportCorrupt(Message, tag="report_corrupt"):
    """A peer delivered bytes that do not have the digest that it announced."""

    version_id: VersionId
    node: NodeId


class StatusRequest(Message, tag="status_request"):
    """Asks for the state of the whole cluster."""

    request_id: Count


class Locate(Message, tag="locate"):
    """Asks which other nodes hold replicas of these file versions.

    ``nodes_max``: how many holders to name per file version; they are always counted.
    """

    request_id: Count
    version_ids: Annotated[list[VersionId], Meta(max_length=LOCATE_MAX)]
    nodes_max: Annotated[int, Meta(ge=0, le=LOCATED_NODES_MAX)] = 0


class WhoHas(Message, tag="who_has"):
    """Asks for nodes from which to fetch these file versions, many from each. They are small."""

    request_id: Count
    version_ids: Annotated[list[VersionId], Meta(max_length=LOCATE_MAX)]


# --- tracker -> node ----------------------------------------------------------------------------


class Registered(Message, tag="registered"):
    """The tracker knows the node now. ``until_s``: end of its held leases, on the node's clock.

    ``seeds``: some other nodes that are connected, by advertised address. ``time_s``: the tracker's
    wall clock, which the cluster goes by; 0 where it does not say.
    ``slots_max``: of each file server that has a setting of its own, and of all others
    (``default``), for a node that may have to stand in for the tracker.
    """

    lease_s: float
    until_s: float
    adopted: list[int] = []
    seeds: Seeds = []
    time_s: float = 0.0
    slots_max: SlotsMax = {}


class Joined(Message, tag="joined"):
    """The node is in the swarm, whose chunks have this size."""

    version_id: VersionId
    chunk_size_bytes: Positive


class Peers(Message, tag="peers"):
    """Nodes to exchange chunks of this file version with. Both sides of a pair are told.

    ``chunk_size_bytes``: how the swarm cuts the file (0: not told). A holder whose replica is cut
    differently is of no use to it, and leaves.
    """

    version_id: VersionId
    peers: Annotated[list[NodeAddress], Meta(max_length=LOADS_MAX)]
    chunk_size_bytes: Count = 0


class Lease(Message, tag="lease"):
    """Read this range of chunks from the file server, until ``until_s`` on the node's clock."""

    lease_id: Count
    version_id: VersionId
    first: Count
    count: Positive
    until_s: float


class WriteLease(Message, tag="write_lease"):
    """The file of this ``WantWrite`` may be written, until ``until_s`` on the node's clock."""

    lease_id: Count
    write_id: WriteId
    until_s: float


class Renewed(Message, tag="renewed"):
    """Answer to ``Heartbeat``. All leases of the node now end at ``until_s`` (node's clock).

    ``waiting`` are the node's swarms that wait for a slot of their file server, or for an answer of
    the nodes that may have chunks which somebody misses. ``turns_over``: files that were written
    for long while others wait; their leases are to be given back soon, and wanted anew.
    ``seeds`` and ``time_s`` as in ``Registered``; seeds come with some answers only.
    """

    until_s: float
    waiting: Annotated[list[VersionId], Meta(max_length=WAITING_MAX)] = []
    turns_over: Annotated[list[WriteId], Meta(max_length=WAITING_MAX)] = []
    seeds: Seeds = []
    time_s: float = 0.0


class Query(Message, tag="query"):
    """Which of these chunks do you have? Asked when somebody cannot get them."""

    version_id: VersionId
    query_id: Count
    wanted: Mask


class Revoked(Message, tag="revoked"):
    """The source is no longer this file version: drop what was fetched of it."""

    version_id: VersionId
    reason: Name


class Suspected(Message, tag="suspected"):
    """A peer says that the node has delivered wrong bytes of this file version."""

    version_id: VersionId


class Status(Message, tag="status"):
    """The state of the cluster, as plain data (see ``TrackerState.status``)."""

    request_id: Count
    cluster: dict[str, Any]


class Located(Message, tag="located"):
    """Answer to ``Locate``: the other holders of each file version, in the order of the question.

    Named are those who told of theirs first: ``LOCATED_NODES_MAX`` in all, shared out evenly.
    """

    request_id: Count
    holders: Annotated[list[Holders], Meta(max_length=LOCATE_MAX)]


class HeldBy(Message, tag="held_by"):
    """Answer to ``WhoHas``. No file version is held by two of these nodes; some by none of them."""

    request_id: Count
    holders: Annotated[list[BatchHolder], Meta(max_length=BATCH_HOLDERS_MAX)]


class Refused(Message, tag="refused"):
    """The tracker cannot do what the node asked; names what and why."""

    reason: Name
    version_id: bytes = b""


class StandsIn(Message, tag="stands_in"):
    """First message of a node that is asked to be the tracker: who is, as far as it knows.

    ``by``: the node that stands in for the tracker, or nobody. If it is the one that was asked,
    the connection goes on as one with the tracker. ``tracker``: it is with the tracker itself.
    ``able``: it would stand in if nobody does that comes before it.
    """

    by: Annotated[str, Meta(max_length=255)] = ""
    tracker: bool = False
    able: bool = False


# --- node <-> node ------------------------------------------------------------------------------


class Have(Message, tag="have", omit_defaults=True):
    """The sender has these chunks now. ``digests`` are theirs, 32 bytes each, in the same order.

    An empty ``Have`` says that the sender is in the swarm. ``complete``: it has all chunks; those
    that the receiver has itself it has not been told of. ``chunk_size_bytes``: how the sender cuts
    the file (0: not told). The last chunks of two ways to cut it may be equally long. ``coming``:
    told to those in the rack of the sender: all chunks that it is fetching from another rack.
    ``again``: what the receiver has told before came when the sender could make nothing of it: it
    is to tell all that it has once more.
    """

    version_id: VersionId
    chunks: Annotated[list[Count], Meta(max_length=HAVE_CHUNKS_MAX)]
    digests: bytes
    complete: bool = False
    chunk_size_bytes: Count = 0
    coming: Annotated[list[Count], Meta(max_length=HAVE_CHUNKS_MAX)] | None = None
    again: bool = False


class Gone(Message, tag="gone"):
    """The sender has left the swarm of this file version and serves nothing of it."""

    version_id: VersionId


# --- node -> node that is said to hold replicas, on a short connection of its own ----------------


class FindReplicas(Message, tag="find_replicas"):
    """Asks which of these file versions the node holds intact just now, and where for this user."""

    user: Name
    version_ids: Annotated[list[VersionId], Meta(max_length=FIND_MAX)]


class ReplicasFound(Message, tag="replicas_found"):
    """Answer to ``FindReplicas``, in the order of the question; None for what is not held."""

    places: Annotated[list[ReplicaPlace | None], Meta(max_length=FIND_MAX)]


# --- node -> node, on behalf of an admin, on a short connection of its own -----------------------


class SurveyReplicas(Message, tag="survey_replicas"):
    """Asks for all replicas of sources at or below these paths; of all sources if there are none.

    Answered by any number of ``ReplicasSurveyed``, of which only the last one is ``last``.
    """

    paths: PathDigests = []


class ForgetReplicas(Message, tag="forget_replicas"):
    """Give up these replicas, if they were not used for ``unused_s``; None: for as long as keeps
    them from being evicted. None that is pinned or in use goes.

    Answered by any number of ``ReplicasForgotten``, of which only the last one is ``last``.
    """

    paths: PathDigests = []
    unused_s: Annotated[float, Meta(ge=0)] | None = None


class GoOn(Message, tag="go_on"):
    """An answer that was not the last one has been taken in."""


class ReplicasSurveyed(Message, tag="replicas_surveyed"):
    """Some of the replicas."""

    replicas: Annotated[list[HeldReplica], Meta(max_length=SURVEYED_MAX)] = []
    last: bool = False


class ReplicasForgotten(Message, tag="replicas_forgotten"):
    """How many went, and what they had; and those that were asked for and stay."""

    dropped: Count = 0
    dropped_bytes: Count = 0
    kept: Annotated[list[KeptReplica], Meta(max_length=SURVEYED_MAX)] = []
    last: bool = False


class SurveyFailed(Message, tag="survey_failed"):
    """The last answer: the node's disk fails."""

    reason: Name


# --- node -> node that is to take replicas, on a connection of its own ----------------------------


class PlaceReplica(Message, tag="place_replica"):
    """Have a replica of this file version: fetch it from peers, or keep the one that is there.

    Answered by any number of ``Placing``, and one ``ReplicaPlaced`` or ``NotPlaced``. It opens the
    file to nobody on the receiving node. ``user``: whose turn at the file server it is. At most
    ``PLACED_AT_ONCE_MAX`` of them may be unanswered.
    """

    path: Annotated[bytes, Meta(min_length=2, max_length=PATH_MAX_BYTES)]
    size_bytes: Count
    mtime_ns: int
    file_server: Name
    user: Name
    chunk_size_bytes: Positive


class Placing(Message, tag="placing"):
    """How much of a file the node has. Sent about once a second, so that its silence tells."""

    version_id: VersionId
    done_bytes: Count


class ReplicaPlaced(Message, tag="replica_placed"):
    """The node has the replica now. ``hit``: it had it before."""

    version_id: VersionId
    hit: bool


class NotPlaced(Message, tag="not_placed"):
    """The node does not take the replica, and why."""

    version_id: VersionId
    reason: Name


ToTracker = (
    Register
    | Join
    | Leave
    | Replicas
    | RangeRead
    | RangeFailed
    | WantWrite
    | EndWrite
    | Heartbeat
    | Holding
    | Missing
    | ReportCorrupt
    | StatusRequest
    | Locate
    | WhoHas
)
FromTracker = (
    Registered
    | Joined
    | Peers
    | Lease
    | WriteLease
    | Renewed
    | Query
    | Revoked
    | Suspected
    | Status
    | Located
    | HeldBy
    | Refused
)
BetweenNodes = Have | Gone
AboutReplicas = FindReplicas | ReplicasFound
FromAdmin = SurveyReplicas | ForgetReplicas | GoOn
ToAdmin = ReplicasSurveyed | ReplicasForgotten | SurveyFailed
FromPlaced = Placing | ReplicaPlaced | NotPlaced

_encoder = msgspec.msgpack.Encoder()
_to_tracker: msgspec.msgpack.Decoder[ToTracker] = msgspec.msgpack.Decoder(ToTracker)
_from_tracker: msgspec.msgpack.Decoder[FromTracker] = msgspec.msgpack.Decoder(FromTracker)
_stands_in: msgspec.msgpack.Decoder[StandsIn] = msgspec.msgpack.Decoder(StandsIn)
_between_nodes: msgspec.msgpack.Decoder[BetweenNodes] = msgspec.msgpack.Decoder(BetweenNodes)
_about_replicas: msgspec.msgpack.Decoder[AboutReplicas] = msgspec.msgpack.Decoder(AboutReplicas)
_from_admin: msgspec.msgpack.Decoder[FromAdmin] = msgspec.msgpack.Decoder(FromAdmin)
_to_placed: msgspec.msgpack.Decoder[PlaceReplica] = msgspec.msgpack.Decoder(PlaceReplica)
_from_placed: msgspec.msgpack.Decoder[FromPlaced] = msgspec.msgpack.Decoder(FromPlaced)
_to_admin: msgspec.msgpack.Decoder[ToAdmin] = msgspec.msgpack.Decoder(ToAdmin)


def encode(message: Message) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_to_tracker(data: bytes) -> ToTracker:
    """Decode what a node sent to the tracker. Raises BadMessage."""
    return _decode(_to_tracker, data)


def decode_from_tracker(data: bytes) -> FromTracker:
    """Decode what the tracker sent to a node. Raises BadMessage."""
    return _decode(_from_tracker, data)


def decode_stands_in(data: bytes) -> StandsIn:
    """Decode the first word of a node that was asked to be the tracker. Raises BadMessage."""
    return _decode(_stands_in, data)


def decode_between_nodes(data: bytes) -> BetweenNodes:
    """Decode what another node sent. Raises BadMessage."""
    message = _decode(_between_nodes, data)
    if isinstance(message, Have) and len(message.digests) != 32 * len(message.chunks):
        raise BadMessage("a Have must carry one 32-byte digest per chunk")
    return message


def decode_about_replicas(data: bytes) -> AboutReplicas:
    """Decode a question about replicas, or its answer. Raises BadMessage."""
    return _decode(_about_replicas, data)


def decode_from_admin(data: bytes) -> FromAdmin:
    """Decode what another node asks on behalf of an admin. Raises BadMessage."""
    return _decode(_from_admin, data)


def decode_to_admin(data: bytes) -> ToAdmin:
    """Decode the answer to that. Raises BadMessage."""
    return _decode(_to_admin, data)


def decode_to_placed(data: bytes) -> PlaceReplica:
    """Decode what a node is asked that is to take a replica. Raises BadMessage."""
    message = _decode(_to_placed, data)
    names = message.path.split(b"/")
    if names[0] or b"\0" in message.path or {b"", b".", b".."} & set(names[1:]):
        raise BadMessage("not the real path of a file")
    return message


def decode_from_placed(data: bytes) -> FromPlaced:
    """Decode the answer to that. Raises BadMessage."""
    return _decode(_from_placed, data)


Decoded = TypeVar("Decoded")


def _decode(decoder: msgspec.msgpack.Decoder[Decoded], data: bytes) -> Decoded:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadMessage(f"not a message: {error}") from error
