"""What nodes gossip about, as it travels: records of fixed size in sections of a datagram.

A node is named by its *ring id*, the first ``ID_BYTES`` of the BLAKE3 of its advertised address. Of
10,000 nodes two have the same one once in 5 million clusters. Then each of them is taken for the
other now and then: the room that is shown for one may be that of the other, and none of them is
declared dead while one is alive. Both go on to serve and fetch files, since those are asked for by
address.

A *status* is 32 bytes. Sizes are rounded down to 11 significant bits, and to whole MiB: what comes
out is at most a part in 1,024, or a MiB, less than what went in. Uploads and downloads count up to
255. A *profile* is as long as its words are, at most 160 bytes, and has no id, since that follows
from its address. Which profile is the present one says a tag in the status.

Records carry no time of any clock, but their age: every relay adds how long it has had them.

Decoding raises nothing but BadMessage, whatever the bytes are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from blake3 import blake3

from swarmcache.errors import BadMessage
from swarmcache.messages import NodeAddress

# A datagram is at most 1,232 bytes on the wire (what every IPv6 path carries in one piece), of
# which 48 are for its envelope.
PAYLOAD_BYTES_MAX = 1184
ID_BYTES = 6
RING = 1 << (8 * ID_BYTES)
# Milliseconds since 1970 fit for 8,900 years.
EPOCH_MAX = (1 << 48) - 1
SEQ_MAX = (1 << 24) - 1
DIGEST_BYTES = 4
TAG_BYTES = 2
AGE_UNIT_S = 0.1
AGE_UNITS_MAX = 0xFFFF
# Room for address, name, rack and version together, each followed by a zero byte.
TEXT_BYTES = 150
ADDRESS_BYTES_MAX = 128
BUCKETS = 128
MEBIBYTE = 1 << 20
MANTISSA_BITS = 11
COUNT_MAX = 255


def age_units(age_s: float) -> int:
    """An age as records carry it."""
    return min(max(int(age_s / AGE_UNIT_S), 0), AGE_UNITS_MAX)


def ring_id(node: str) -> int:
    """The place on the ring of the node with this advertised address."""
    return int.from_bytes(node_id(node), "big")


@lru_cache(maxsize=1 << 16)
def node_id(node: str) -> bytes:
    """The same as ``ID_BYTES`` bytes, as envelopes name the sender of a datagram."""
    return blake3(node.encode(errors="surrogateescape")).digest(ID_BYTES)


class DiskHealth(Enum):
    """What a node's cache is good for: it takes replicas, it has no room, it fails."""

    OK = 0
    FULL = 1
    SICK = 2


class MemberState(Enum):
    """What is believed of a node. SUSPECT: it does not answer, and has not been heard since."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """What seldom changes. ``address.node`` is where the node is reached, over TCP and UDP."""

    address: NodeAddress
    rack: str
    version: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What changes all the time. ``held_digest``: over the set of replicas that the node holds,
    cut to ``DIGEST_BYTES``; tells that it has changed, not what it is. ``standing_in``: the node
    acts as the tracker while that is away."""

    free_bytes: int = 0
    used_bytes: int = 0
    pinned_bytes: int = 0
    uploads: int = 0
    downloads: int = 0
    disk: DiskHealth = DiskHealth.OK
    held_digest: bytes = bytes(DIGEST_BYTES)
    standing_in: bool = False

    @property
    def measured(self) -> bool:
        """Whether the node has looked at its disk. One that has nothing free, and nothing that
        could make room, would be full."""
        return self.disk != DiskHealth.OK or self.free_bytes > 0 or self.used_bytes > 0


# --- sizes --------------------------------------------------------------------------------------


def pack_size(size_bytes: int) -> int:
    """A size as 16 bits: MiB with 11 significant bits, rounded down. 0 for what is negative."""
    units = max(size_bytes, 0) // MEBIBYTE
    exponent = max(units.bit_length() - MANTISSA_BITS, 0)
    if exponent > 31:
        return 0xFFFF
    return exponent << MANTISSA_BITS | units >> exponent


def unpack_size(packed: int) -> int:
    """The size in bytes that 16 bits stand for."""
    mantissa = packed & ((1 << MANTISSA_BITS) - 1)
    return (mantissa << (packed >> MANTISSA_BITS)) * MEBIBYTE


# --- status -------------------------------------------------------------------------------------

# Free, used, pinned, uploads, downloads, digest of what is held, flags, tag of the profile.
_BODY = struct.Struct(f">HHHBB{DIGEST_BYTES}sB{TAG_BYTES}s")
BODY_BYTES = _BODY.size
# What of a body seldom changes and everybody should know at once: flags and tag, its last bytes.
LASTING_BYTES = 1 + TAG_BYTES
_STANDING_IN = 4
# Subject, epoch, seq, age, body. Numbers of 6 and 3 bytes are two fields each.
STATUS = struct.Struct(f">HIHIBHH{BODY_BYTES}s")
STATUS_BYTES = STATUS.size
# Where in a packed record what is. Its *stamp* is epoch and seq: the greater one is the later one,
# as bytes as well. So whoever passes on records unpacks none of them.
EPOCH_BYTES = 6
SEQ_BYTES = 3
AGE_AT = ID_BYTES + EPOCH_BYTES + SEQ_BYTES
AGE = struct.Struct(">H")
BODY_AT = AGE_AT + AGE.size


class StatusRecord(NamedTuple):
    """A status as its subject made it, ``age`` units of ``AGE_UNIT_S`` ago.

    Of two records of one subject the one with the higher (epoch, seq) is the later one.
    """

    subject: int
    epoch: int
    seq: int
    age: int
    body: bytes


def status_body(status: NodeStatus, tag: bytes) -> bytes:
    """What of a status record is not about who made it when."""
    flags = status.disk.value | (_STANDING_IN if status.standing_in else 0)
    return _BODY.pack(
        pack_size(status.free_bytes),
        pack_size(status.used_bytes),
        pack_size(status.pinned_bytes),
        min(max(status.uploads, 0), COUNT_MAX),
        min(max(status.downloads, 0), COUNT_MAX),
        status.held_digest,
        flags,
        tag,
    )


def read_body(body: bytes) -> NodeStatus:
    """The status in a body, which may be any bytes. A health that is not known yet is SICK."""
    free, used, pinned, uploads, downloads, digest, flags, _ = _BODY.unpack(body)
    disk = DiskHealth(min(flags & 3, DiskHealth.SICK.value))
    return NodeStatus(
        unpack_size(free),
        unpack_size(used),
        unpack_size(pinned),
        uploads,
        downloads,
        disk,
        digest,
        bool(flags & _STANDING_IN),
    )


def body_tag(body: bytes) -> bytes:
    """Which profile the subject has."""
    return body[-TAG_BYTES:]


def lasting(body: bytes) -> bytes:
    """What of a body, or of a packed record, everybody should know at once when it changes."""
    return body[-LASTING_BYTES:]


def pack_status(record: StatusRecord) -> bytes:
    """32 bytes."""
    subject, epoch, seq, age, body = record
    return STATUS.pack(
        subject >> 32,
        subject & 0xFFFFFFFF,
        epoch >> 32,
        epoch & 0xFFFFFFFF,
        seq >> 16,
        seq & 0xFFFF,
        age,
        body,
    )


def read_status(packed: bytes) -> StatusRecord:
    """The record in 32 bytes, which may be any."""
    a, b, c, d, e, f, age, body = STATUS.unpack(packed)
    return StatusRecord(a << 32 | b, c << 32 | d, e << 16 | f, age, body)


# --- profile ------------------------------------------------------------------------------------

_PROFILE_HEAD = struct.Struct(">HQ")
PROFILE_BYTES_MAX = _PROFILE_HEAD.size + TEXT_BYTES


@lru_cache(maxsize=1 << 14)
def pack_profile(profile: NodeProfile) -> bytes:
    """A profile as it travels. Name, rack and version are cut to what ``PROFILE_BYTES_MAX`` leaves
    beside the address.

    Raises ValueError for an address that is too long, or that no node can have.
    """
    address = profile.address
    node = address.node.encode()
    if len(node) > ADDRESS_BYTES_MAX or not _is_address(address.node):
        raise ValueError(f"{address.node!r} is not host:port in {ADDRESS_BYTES_MAX} bytes")
    room = TEXT_BYTES - len(node) - 4
    text = node + b"\0"
    for each in (address.name, profile.rack, profile.version):
        word = each.replace("\0", "").encode(errors="replace")[:room]
        word = word.decode(errors="ignore").encode()
        room -= len(word)
        text += word + b"\0"
    capacity_bytes = min(profile.capacity_bytes, (1 << 64) - 1)
    return _PROFILE_HEAD.pack(address.data_port, capacity_bytes) + text


@lru_cache(maxsize=1 << 14)
def read_profile(packed: bytes) -> NodeProfile:
    """The profile in these bytes. Raises BadMessage."""
    if not _PROFILE_HEAD.size < len(packed) <= PROFILE_BYTES_MAX:
        raise BadMessage(f"a profile of {len(packed)} bytes")
    data_port, capacity_bytes = _PROFILE_HEAD.unpack_from(packed)
    words = packed[_PROFILE_HEAD.size :].split(b"\0")
    if len(words) != 5 or words[4]:
        raise BadMessage("a profile has four words, and nothing after them")
    try:
        node, name, rack, version = (word.decode() for word in words[:4])
    except UnicodeDecodeError as error:
        raise BadMessage("a profile that is not text") from error
    if len(words[0]) > ADDRESS_BYTES_MAX or not data_port or not _is_address(node):
        raise BadMessage("a profile without an address")
    return NodeProfile(NodeAddress(node, data_port, name), rack, version, capacity_bytes)


@lru_cache(maxsize=1 << 14)
def _is_address(node: str) -> bool:
    host, colon, port = node.rpartition(":")
    if not host or not colon or not node.isprintable() or " " in node:
        return False
    return port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536


@lru_cache(maxsize=1 << 14)
def profile_tag(profile: NodeProfile) -> bytes:
    """What the status records of a node with this profile say of it."""
    return blake3(pack_profile(profile)).digest(TAG_BYTES)


# --- rumour -------------------------------------------------------------------------------------


class RumourKind(Enum):
    """What one node says of another, or of itself when it leaves."""

    SUSPECT = 1
    DEAD = 2
    LEFT = 3


# Kind, subject, epoch, seq, origin, age.
_RUMOUR = struct.Struct(">BHIHIBHHIH")
RUMOUR_BYTES = _RUMOUR.size


class Rumour(NamedTuple):
    """``origin`` says of ``subject``, whose latest record that it knows is (epoch, seq), so much,
    since ``age`` units of ``AGE_UNIT_S``."""

    kind: RumourKind
    subject: int
    epoch: int
    seq: int
    origin: int
    age: int


def pack_rumour(rumour: Rumour) -> bytes:
    """24 bytes."""
    kind, subject, epoch, seq, origin, age = rumour
    return _RUMOUR.pack(
        kind.value,
        subject >> 32,
        subject & 0xFFFFFFFF,
        epoch >> 32,
        epoch & 0xFFFFFFFF,
        seq >> 16,
        seq & 0xFFFF,
        origin >> 32,
        origin & 0xFFFFFFFF,
        age,
    )


# --- sections -----------------------------------------------------------------------------------
#
# A payload is a row of sections, each of a kind (one byte) and a body whose length follows from
# its own head. Lists begin with their length in one byte.


@dataclass(slots=True)
class Ping:
    """Are you there? ``address`` of the sender, who may not be known to the receiver."""

    number: int
    address: str


@dataclass(slots=True)
class Ack:
    """Answer to ``Ping`` or ``PingFor``: the one that was asked for is there."""

    number: int


@dataclass(slots=True)
class PingFor:
    """Is this one there? I get no answer from it."""

    number: int
    target: int


@dataclass(slots=True)
class Nack:
    """Answer to ``PingFor``: I am there, but have no answer of that one yet either."""

    number: int


@dataclass(slots=True)
class Numbered:
    """A datagram that its receiver is to confirm."""

    number: int


@dataclass(slots=True)
class Received:
    """Confirms these datagrams."""

    numbers: Sequence[int]


@dataclass(slots=True)
class Rumours:
    """To be passed on to all nodes between the receiver and ``limit`` on the ring."""

    limit: int
    rumours: list[Rumour]


@dataclass(slots=True)
class Statuses:
    """To be passed on to all nodes between the receiver and ``limit`` on the ring.

    ``packed``: the records, one behind the other; ``records`` for those who look at few.
    """

    limit: int
    packed: bytes

    @property
    def records(self) -> list[StatusRecord]:
        starts = range(0, len(self.packed), STATUS_BYTES)
        return [read_status(self.packed[at : at + STATUS_BYTES]) for at in starts]


@dataclass(slots=True)
class Profiles:
    """Answer to ``ProfilesWanted``."""

    profiles: list[NodeProfile]


@dataclass(slots=True)
class ProfilesWanted:
    """Asks for the profiles of these nodes."""

    subjects: list[int]


@dataclass(slots=True)
class StatusesWanted:
    """Asks for the status records of these nodes, of which the sender has none that is young."""

    subjects: list[int]


@dataclass(slots=True)
class Digests:
    """What the sender knows, in a constant size: a sum over the members of each bucket.

    Asks for the records of those buckets that differ. ``answered``: the sender has just answered
    the same question, and this is not to be answered with another question."""

    sums: Sequence[int]
    answered: bool


Section: TypeAlias = (
    Ping | Ack | PingFor | Nack | Numbered | Received | Rumours | Statuses | Profiles
    | ProfilesWanted | StatusesWanted | Digests
)  # fmt: skip

_NUMBER = struct.Struct(">BI")
_PING = struct.Struct(">BIB")
_PING_FOR = struct.Struct(">BIHI")
_LIST = struct.Struct(">BB")
_SPREAD = struct.Struct(">BHIB")
_DIGESTS = struct.Struct(f">BB{BUCKETS}I")
_ID = struct.Struct(">HI")

(_KIND_PING, _KIND_ACK, _KIND_PING_FOR, _KIND_NACK, _KIND_NUMBERED, _KIND_RECEIVED, _KIND_RUMOURS,
 _KIND_STATUSES, _KIND_PROFILES, _KIND_PROFILES_WANTED, _KIND_STATUSES_WANTED, _KIND_DIGESTS,
 ) = range(1, 13)  # fmt: skip

NUMBER_BYTES = _NUMBER.size
SPREAD_HEAD_BYTES = _SPREAD.size
LIST_HEAD_BYTES = _LIST.size
STATUSES_MAX = (PAYLOAD_BYTES_MAX - NUMBER_BYTES - SPREAD_HEAD_BYTES) // STATUS_BYTES
WANTED_MAX = (PAYLOAD_BYTES_MAX - LIST_HEAD_BYTES) // ID_BYTES
assert STATUS_BYTES == 32 and PROFILE_BYTES_MAX == 160 and RUMOUR_BYTES == 24
assert _DIGESTS.size <= PAYLOAD_BYTES_MAX


def encode_ping(number: int, address: str) -> bytes:
    """``address``: at most 255 bytes."""
    data = address.encode()
    return _PING.pack(_KIND_PING, number, len(data)) + data


def encode_ack(number: int) -> bytes:
    return _NUMBER.pack(_KIND_ACK, number)


def encode_ping_for(number: int, target: int) -> bytes:
    return _PING_FOR.pack(_KIND_PING_FOR, number, target >> 32, target & 0xFFFFFFFF)


def encode_nack(number: int) -> bytes:
    return _NUMBER.pack(_KIND_NACK, number)


def encode_numbered(number: int) -> bytes:
    return _NUMBER.pack(_KIND_NUMBERED, number)


def encode_received(numbers: Sequence[int]) -> bytes:
    return struct.pack(f">BB{len(numbers)}I", _KIND_RECEIVED, len(numbers), *numbers)


def encode_rumours(limit: int, rumours: Sequence[bytes]) -> bytes:
    """Of packed rumours."""
    return _spread(_KIND_RUMOURS, limit, rumours)


def encode_statuses(limit: int, records: Sequence[bytes | bytearray]) -> bytes:
    """Of packed records."""
    return _spread(_KIND_STATUSES, limit, records)


def encode_profiles(profiles: Sequence[bytes]) -> bytes:
    """Of packed profiles, each behind its length in one byte."""
    parts = [part for each in profiles for part in (bytes((len(each),)), each)]
    return _LIST.pack(_KIND_PROFILES, len(profiles)) + b"".join(parts)


def profiles_for_datagrams(profiles: Iterable[bytes]) -> list[list[bytes]]:
    """Packed profiles in groups, each of which fits into one datagram."""
    groups: list[list[bytes]] = []
    room = 0
    for each in profiles:
        if len(each) + 1 > room:
            groups.append([])
            room = PAYLOAD_BYTES_MAX - LIST_HEAD_BYTES
        groups[-1].append(each)
        room -= len(each) + 1
    return groups


def encode_profiles_wanted(subjects: Sequence[int]) -> bytes:
    return _ids(_KIND_PROFILES_WANTED, subjects)


def encode_statuses_wanted(subjects: Sequence[int]) -> bytes:
    return _ids(_KIND_STATUSES_WANTED, subjects)


def encode_digests(sums: Iterable[int], *, answered: bool) -> bytes:
    return _DIGESTS.pack(_KIND_DIGESTS, answered, *sums)


def _spread(kind: int, limit: int, records: Sequence[bytes | bytearray]) -> bytes:
    head = _SPREAD.pack(kind, limit >> 32, limit & 0xFFFFFFFF, len(records))
    return head + b"".join(records)


def _ids(kind: int, subjects: Sequence[int]) -> bytes:
    ids = b"".join([each.to_bytes(ID_BYTES, "big") for each in subjects])
    return _LIST.pack(kind, len(subjects)) + ids


# --- decoding -----------------------------------------------------------------------------------


def decode_payload(payload: bytes) -> list[Section]:
    """All sections of a datagram. Raises BadMessage, and nothing else."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise BadMessage(f"a datagram of {len(payload)} bytes")
    sections: list[Section] = []
    at = 0
    try:
        while at < len(payload):
            section, at = _decode_section(payload, at)
            sections.append(section)
    except struct.error as error:
        raise BadMessage("a datagram that is cut off") from error
    return sections


def _decode_section(payload: bytes, at: int) -> tuple[Section, int]:
    """The section that begins there, and where the next one begins."""
    kind = payload[at]
    if kind == _KIND_NUMBERED:
        return Numbered(_NUMBER.unpack_from(payload, at)[1]), at + NUMBER_BYTES
    if kind in (_KIND_RUMOURS, _KIND_STATUSES):
        return _decode_spread(kind, payload, at)
    if kind in (_KIND_PROFILES, _KIND_PROFILES_WANTED, _KIND_STATUSES_WANTED, _KIND_RECEIVED):
        return _decode_list(kind, payload, at)
    if kind == _KIND_PING:
        _, number, length = _PING.unpack_from(payload, at)
        data, at = _take(payload, at + _PING.size, length)
        try:
            address = data.decode()
        except UnicodeDecodeError as error:
            raise BadMessage("an address that is not text") from error
        if not _is_address(address):
            raise BadMessage("a ping without an address")
        return Ping(number, address), at
    if kind == _KIND_PING_FOR:
        _, number, high, low = _PING_FOR.unpack_from(payload, at)
        return PingFor(number, high << 32 | low), at + _PING_FOR.size
    if kind == _KIND_DIGESTS:
        _, answered, *sums = _DIGESTS.unpack_from(payload, at)
        return Digests(sums, bool(answered)), at + _DIGESTS.size
    _, number = _NUMBER.unpack_from(payload, at)
    if kind == _KIND_ACK:
        return Ack(number), at + NUMBER_BYTES
    if kind == _KIND_NACK:
        return Nack(number), at + NUMBER_BYTES
    raise BadMessage(f"a section of kind {kind}")


def _decode_spread(kind: int, payload: bytes, at: int) -> tuple[Section, int]:
    _, high, low, count = _SPREAD.unpack_from(payload, at)
    limit = high << 32 | low
    at += SPREAD_HEAD_BYTES
    if kind == _KIND_STATUSES:
        data, at = _take(payload, at, count * STATUS_BYTES)
        return Statuses(limit, data), at
    data, at = _take(payload, at, count * RUMOUR_BYTES)
    return Rumours(limit, [_read_rumour(*fields) for fields in _RUMOUR.iter_unpack(data)]), at


def _read_rumour(
    kind: int, a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, age: int
) -> Rumour:
    if not RumourKind.SUSPECT.value <= kind <= RumourKind.LEFT.value:
        raise BadMessage(f"a rumour of kind {kind}")
    return Rumour(RumourKind(kind), a << 32 | b, c << 32 | d, e << 16 | f, g << 32 | h, age)


def _decode_list(kind: int, payload: bytes, at: int) -> tuple[Section, int]:
    _, count = _LIST.unpack_from(payload, at)
    at += LIST_HEAD_BYTES
    if kind == _KIND_RECEIVED:
        data, at = _take(payload, at, 4 * count)
        return Received(struct.unpack(f">{count}I", data)), at
    if kind == _KIND_PROFILES:
        profiles = []
        for _ in range(count):
            length, at = _take(payload, at, 1)
            packed, at = _take(payload, at, length[0])
            profiles.append(read_profile(packed))
        return Profiles(profiles), at
    data, at = _take(payload, at, ID_BYTES * count)
    subjects = [high << 32 | low for high, low in _ID.iter_unpack(data)]
    if kind == _KIND_PROFILES_WANTED:
        return ProfilesWanted(subjects), at
    return StatusesWanted(subjects), at


def _take(payload: bytes, at: int, length: int) -> tuple[bytes, int]:
    data = payload[at : at + length]
    if len(data) < length:
        raise BadMessage("a datagram that is cut off")
    return data, at + length
