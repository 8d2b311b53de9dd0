"""What a node's machine is told (events) and what it wants done (effects).

The shell (``peer.py``) and the simulator both carry out effects and turn results into events. One
event per way in which a thing can end; bytes of chunks never appear here, only their numbers.

Effects and events are treated as read-only although they are not frozen: creating a frozen one
costs three times as much, and a simulated cluster creates millions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from swarmcache.chunks import FileVersion
from swarmcache.messages import (
    BetweenNodes,
    DiskStatus,
    FromTracker,
    Holders,
    NodeAddress,
    ToTracker,
)

# --- events: local clients ----------------------------------------------------------------------


@dataclass(slots=True)
class FileWanted:
    """A local client wants this file version. ``can_read``: it handed over an open descriptor.

    ``chunk_size_bytes`` is what this node proposes. Not raised for files that are cached already.
    """

    request: int
    version: FileVersion
    file_server: str
    user: str
    chunk_size_bytes: int
    can_read: bool = True


@dataclass(slots=True)
class RequestGone:
    """The client of this request went away or got another answer. Its download goes on."""

    request: int


@dataclass(slots=True)
class WriteWanted:
    """A local client wants to write a file to this file server. Ends with ``RequestGone``."""

    request: int
    file_server: str
    user: str


@dataclass(slots=True)
class WriterAnswered:
    """The client has got an ``AnswerSlot``, so it is neither stopped nor hangs."""

    request: int


@dataclass(slots=True)
class StatusWanted:
    """A local client wants the state of the cluster."""

    request: int


@dataclass(slots=True)
class HoldersWanted:
    """A local client wants to know which other nodes hold these file versions.

    At most ``messages.LOCATE_MAX`` of them; ``nodes_max``: how many holders to name of each.
    """

    request: int
    version_ids: list[bytes]
    nodes_max: int = 0


@dataclass(slots=True)
class FilesWanted:
    """A local client wants these small files together, as far as peers have them; none is cached.

    Each fits into one chunk. Ends in ``AnswerFiles``; what has not come by then is wanted by the
    client in the ordinary way.
    """

    request: int
    versions: list[FileVersion]


# --- events: the cache --------------------------------------------------------------------------


@dataclass(slots=True)
class SpaceReserved:
    """Room for the whole file is set aside. Recovered chunks follow as ``ChunkRecovered``."""

    version_id: bytes
    chunk_size_bytes: int


@dataclass(slots=True)
class SpaceRefused:
    """There is no room for the file, or the disk failed. ``reason`` is for people."""

    version_id: bytes
    reason: str


@dataclass(slots=True)
class ChunksRecovered:
    """All that an earlier life of the daemon left of this file, each chunk digested anew."""

    version_id: bytes
    digests: dict[int, bytes]


@dataclass(slots=True)
class FilePublished:
    """The file is complete, in place and servable."""

    version_id: bytes


@dataclass(slots=True)
class PublishFailed:
    """The complete file could not be put in place."""

    version_id: bytes
    reason: str


@dataclass(slots=True)
class WriteFailed:
    """The disk refused a chunk, or is lost: the download cannot go on here.

    Comes before the event that ends the effect (``PeerUnreachable`` or ``RangeReadFailed``), if it
    is one that failed.
    """

    version_id: bytes
    reason: str


@dataclass(slots=True)
class ReplicaDropped:
    """A cached copy is no longer there (evicted, tampered with, removed)."""

    version_id: bytes


@dataclass(slots=True)
class ReplicasLost:
    """A disk is lost, and with it many cached copies. Which ones, only that disk could tell."""


@dataclass(slots=True)
class CopyWanted:
    """A cached copy was found to be wrong, in part at least, and shall be complete again.

    Nobody waits for it, and there is no descriptor to read the source through: what is missing must
    come from peers. Comes after ``ReplicaDropped``.
    """

    version: FileVersion
    file_server: str
    user: str
    chunk_size_bytes: int


@dataclass(slots=True)
class ReplicasRecovered:
    """Copies that were in doubt were digested, and are good."""

    version_ids: list[bytes]


@dataclass(slots=True)
class ReplicaOffered:
    """A local client has a copy of what it has just written to this file version."""

    request: int
    version_id: bytes


@dataclass(slots=True)
class ReplicaAdded:
    """The file is in place and servable, without having been fetched."""

    version_id: bytes


@dataclass(slots=True)
class ReplicaNotAdded:
    """It could not be made. ``reason`` is for people."""

    version_id: bytes
    reason: str


@dataclass(slots=True)
class ManifestLoaded:
    """The digests of a replica, in order of the chunks; empty where there is none any more."""

    version_id: bytes
    digests: tuple[bytes, ...]
    chunk_size_bytes: int


# --- events: the tracker ------------------------------------------------------------------------


@dataclass(slots=True)
class TrackerConnected:
    """An authenticated connection to the tracker is up, or to a node that stands in for it."""

    stand_in: bool = False


@dataclass(slots=True)
class TrackerLost:
    """The connection to the tracker is gone, or could not be made. ``reason`` is for people."""

    reason: str


@dataclass(slots=True)
class TrackerSaid:
    """A message from the tracker."""

    message: FromTracker


# --- events: peers ------------------------------------------------------------------------------


@dataclass(slots=True)
class PeerConnected:
    """An authenticated control connection with this peer is up, whoever dialled."""

    address: NodeAddress


@dataclass(slots=True)
class PeerLost:
    """The control connection with this peer is gone, or dialling failed."""

    node: str
    reason: str


@dataclass(slots=True)
class NodesChanged:
    """By gossip: these nodes are alive from now on, those are dead or have left."""

    alive: list[str]
    dead: list[str]


@dataclass(slots=True)
class PeerSaid:
    """A message from a peer."""

    node: str
    message: BetweenNodes


# --- events: chunks fetched from peers ----------------------------------------------------------


@dataclass(slots=True)
class ChunkArrived:
    """The chunk came from this peer, has its digest and is on disk."""

    version_id: bytes
    chunk: int
    node: str


@dataclass(slots=True)
class ChunkCorrupt:
    """This peer delivered bytes that do not have the digest that it announced."""

    version_id: bytes
    chunk: int
    node: str


@dataclass(slots=True)
class ChunkAbsent:
    """This peer does not have the chunk, contrary to what it announced."""

    version_id: bytes
    chunk: int
    node: str


@dataclass(slots=True)
class PeerBusy:
    """This peer has no upload slot left for the chunk just now."""

    version_id: bytes
    chunk: int
    node: str


@dataclass(slots=True)
class PeerUnreachable:
    """The chunk did not come: connection refused, reset, stalled or past its deadline."""

    version_id: bytes
    chunk: int
    node: str
    reason: str


# --- events: small files fetched together, by the number of ``FetchFiles`` ------------------------


@dataclass(slots=True)
class FilesArrived:
    """These of the files that were asked for are in place and servable.

    The others the holder does not have, or there was something of them on the disk already.
    """

    fetch: int
    node: str
    version_ids: list[bytes]
    size_bytes: int


@dataclass(slots=True)
class FilesCorrupt:
    """The holder delivered bytes without the digest that it named itself, of this file version at
    least; nothing of what came with it is kept."""

    fetch: int
    node: str
    version_id: bytes


@dataclass(slots=True)
class HolderBusy:
    """The holder has no upload slot left just now."""

    fetch: int
    node: str


@dataclass(slots=True)
class HolderFailed:
    """Nothing came: connection refused, reset, stalled or past its deadline."""

    fetch: int
    node: str
    reason: str


@dataclass(slots=True)
class FilesNotKept:
    """There is no room here for so many files together, or the disk failed."""

    fetch: int
    node: str
    reason: str


# --- events: chunks read from the file server ---------------------------------------------------


@dataclass(slots=True)
class ChunksRead:
    """Chunks of a leased range, by number with their digests, were read and are on disk."""

    version_id: bytes
    lease_id: int
    digests: Mapping[int, bytes]


@dataclass(slots=True)
class RangeReadDone:
    """The whole leased range was read."""

    version_id: bytes
    lease_id: int
    read_bytes: int
    elapsed_s: float


@dataclass(slots=True)
class RangeReadFailed:
    """Reading the range ended early: lease run out, I/O error, or (``source_changed``) the source
    is no longer this file version."""

    version_id: bytes
    lease_id: int
    reason: str
    source_changed: bool = False


@dataclass(slots=True)
class TimePassed:
    """``wake_at_s`` has come."""


@dataclass(slots=True)
class DiskMeasured:
    """The disk's state, told to the tracker with the next heartbeat."""

    disk: DiskStatus


@dataclass(slots=True)
class KeysChanged:
    """The daemon accepts other secrets than before, which the tracker is told at once."""


PeerEvent: TypeAlias = (
    FileWanted
    | RequestGone
    | WriteWanted
    | WriterAnswered
    | StatusWanted
    | HoldersWanted
    | FilesWanted
    | SpaceReserved
    | SpaceRefused
    | ChunksRecovered
    | FilePublished
    | PublishFailed
    | WriteFailed
    | ReplicaDropped
    | ReplicasLost
    | CopyWanted
    | ReplicasRecovered
    | ReplicaOffered
    | ReplicaAdded
    | ReplicaNotAdded
    | ManifestLoaded
    | TrackerConnected
    | TrackerLost
    | TrackerSaid
    | PeerConnected
    | PeerLost
    | NodesChanged
    | PeerSaid
    | ChunkArrived
    | ChunkCorrupt
    | ChunkAbsent
    | PeerBusy
    | PeerUnreachable
    | FilesArrived
    | FilesCorrupt
    | HolderBusy
    | HolderFailed
    | FilesNotKept
    | ChunksRead
    | RangeReadDone
    | RangeReadFailed
    | TimePassed
    | KeysChanged
    | DiskMeasured
)


# --- effects ------------------------------------------------------------------------------------


@dataclass(slots=True)
class TellTracker:
    """Send a message to the tracker. Dropped where the connection is gone (``TrackerLost``)."""

    message: ToTracker


@dataclass(slots=True)
class TellPeer:
    """Send a message to a peer whose connection is up."""

    node: str
    message: BetweenNodes


@dataclass(slots=True)
class DialPeer:
    """Open a control connection. Ends in ``PeerConnected`` or ``PeerLost``."""

    address: NodeAddress


@dataclass(slots=True)
class HangUp:
    """Close the control connection with this peer. No ``PeerLost`` follows."""

    node: str


@dataclass(slots=True)
class ReserveSpace:
    """Set room aside for the file. Ends in ``SpaceReserved`` or ``SpaceRefused``; after the former
    comes ``ChunksRecovered``."""

    version: FileVersion
    chunk_size_bytes: int


@dataclass(slots=True)
class FetchChunk:
    """Get a chunk from a peer, check it, write it. Ends in exactly one of the five chunk events.

    ``held_chunks``: how many of the file this node has. ``deadline_s`` is how long the whole may
    take, ``stall_s`` how long without a byte.
    """

    version_id: bytes
    chunk: int
    length_bytes: int
    digest: bytes
    address: NodeAddress
    held_chunks: int
    deadline_s: float
    stall_s: float


@dataclass(slots=True)
class FetchFiles:
    """Get small files from one holder, check them, put them in place, durable later.

    ``request``: of ``FilesWanted``, whose user gets links. Room is set aside for all of them first;
    of what is on the disk in whatever form already, nothing is touched. Ends in exactly one of the
    five events of small files. ``deadline_s`` and ``stall_s`` as for ``FetchChunk``; they count
    from when a thread turns to it.
    """

    fetch: int
    request: int
    address: NodeAddress
    versions: list[FileVersion]
    deadline_s: float
    stall_s: float


@dataclass(slots=True)
class ReadRange:
    """Read a leased range from the file server through the client's descriptor.

    Ends in ``RangeReadDone`` or ``RangeReadFailed``. The reader asks
    ``PeerState.may_read(lease_id, now_s)`` before every piece.
    """

    version_id: bytes
    lease_id: int
    first: int
    count: int


@dataclass(slots=True)
class PublishFile:
    """All chunks are there: put the file in place. Ends in ``FilePublished``, ``PublishFailed``."""

    version_id: bytes


@dataclass(slots=True)
class DropPartial:
    """Forget what was fetched, published or not. ``keep``: leave a partial file on disk, for a
    later attempt to resume. Nothing else is under way for this file version when this is asked
    for."""

    version_id: bytes
    keep: bool


@dataclass(slots=True)
class LoadManifest:
    """Read a replica's digests. Ends in ``ManifestLoaded``."""

    version_id: bytes


@dataclass(slots=True)
class AddReplica:
    """Make the replica that was offered. Ends in ``ReplicaAdded`` or ``ReplicaNotAdded``."""

    request: int
    version_id: bytes


@dataclass(slots=True)
class RefuseReplica:
    """Tell who offered a replica that it is not made, and why."""

    request: int
    reason: str


@dataclass(slots=True)
class CheckCopy:
    """Digest a replica, if there is one: a peer has got wrong bytes of it. Ends in nothing, or as
    every copy that is found to be wrong, in ``ReplicaDropped``."""

    version_id: bytes


@dataclass(slots=True)
class AnnounceReplicas:
    """Send all replicas of the cache to the tracker, and that there are no others.

    ``Replicas`` messages with ``more`` set, the first one before the cache is asked.
    """


@dataclass(slots=True)
class AnswerCached:
    """Answer this request with the cached copy."""

    request: int
    version_id: bytes


@dataclass(slots=True)
class AnswerOriginal:
    """Answer this request with the original path; ``reason`` is for people.

    ``source_changed``: the client may ask again, for the file version that is there now.
    """

    request: int
    version_id: bytes
    reason: str
    source_changed: bool = False


@dataclass(slots=True)
class AnswerSlot:
    """Tell who wants to write that it may until ``until_s``, by the clock of this machine.

    None: not yet, others have all slots. Each is followed by ``WriterAnswered`` as soon as the
    client has got it. What was told earlier stays true.
    """

    request: int
    until_s: float | None


@dataclass(slots=True)
class AnswerNoSlot:
    """Tell who wants to write to go on without a slot: there is no tracker to ask. The last one."""

    request: int
    reason: str


@dataclass(slots=True)
class AnswerStatus:
    """Answer a ``StatusWanted``. ``cluster`` is None where the tracker cannot be asked."""

    request: int
    cluster: dict[str, object] | None
    reason: str = ""


@dataclass(slots=True)
class AnswerHolders:
    """Answer a ``HoldersWanted``: the holders of each file version, in the order of the question.

    ``holders`` is None where the tracker cannot be asked.
    """

    request: int
    holders: list[Holders] | None
    reason: str = ""


@dataclass(slots=True)
class AnswerFiles:
    """Answer a ``FilesWanted`` with those of the files that are cached now."""

    request: int


@dataclass(slots=True)
class DistrustPeer:
    """Close the data connections with a peer that delivered wrong bytes."""

    node: str


PeerEffect: TypeAlias = (
    TellTracker
    | TellPeer
    | DialPeer
    | HangUp
    | ReserveSpace
    | FetchChunk
    | FetchFiles
    | ReadRange
    | PublishFile
    | DropPartial
    | LoadManifest
    | AddReplica
    | RefuseReplica
    | CheckCopy
    | AnnounceReplicas
    | AnswerCached
    | AnswerOriginal
    | AnswerSlot
    | AnswerNoSlot
    | AnswerStatus
    | AnswerHolders
    | AnswerFiles
    | DistrustPeer
)
