"""Everything that crosses a socket: what is sent arrives, what is nothing of ours is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from swarmcache.errors import BadMessage
from swarmcache.messages import (
    HAVE_CHUNKS_MAX,
    LOADS_MAX,
    MESSAGE_MAX_BYTES,
    BetweenNodes,
    FromPlaced,
    FromTracker,
    Gone,
    Have,
    HeldLease,
    Join,
    Leave,
    Message,
    NodeAddress,
    PlaceReplica,
    Register,
    Replicas,
    Revoked,
    ToTracker,
    decode_between_nodes,
    decode_from_placed,
    decode_from_tracker,
    decode_to_placed,
    decode_to_tracker,
    encode,
)

VERSION = b"v" * 32
DECODERS: list[tuple[Any, Callable[[bytes], Any]]] = [
    (ToTracker, decode_to_tracker),
    (FromTracker, decode_from_tracker),
    (BetweenNodes, decode_between_nodes),
    (FromPlaced, decode_from_placed),
]
TYPES = [(kind, decode) for union, decode in DECODERS for kind in get_args(union)]
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Every value that a field of this type may have, as its declaration says."""
    match kind:
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length or 40, 40))
        case inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=min(kind.max_length or 40, 40))
        case inspect.IntType():
            lowest = kind.ge if kind.gt is None else kind.gt + 1
            highest = 2**63 - 1 if kind.lt is None else kind.lt - 1
            highest = highest if kind.le is None else min(highest, kind.le)
            return st.integers(-(2**63) if lowest is None else lowest, highest)
        case inspect.FloatType():
            return st.floats(allow_nan=False)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.UnionType():
            return st.one_of([values(each) for each in kind.types])
        case inspect.ListType():
            return st.lists(values(kind.item_type), max_size=4)
        case inspect.DictType():
            any_value = isinstance(kind.value_type, inspect.AnyType)
            value = plain if any_value else values(kind.value_type)
            return st.dictionaries(values(kind.key_type), value, max_size=3)
        case inspect.StructType():
            return structs(kind)
        case _:
            raise AssertionError(f"no values for {kind}")


def structs(kind: inspect.StructType) -> st.SearchStrategy[Any]:
    """Messages, and the records in them."""
    if kind.cls is Have:
        pairs = st.lists(st.tuples(st.integers(0, 2**40), st.binary(min_size=32, max_size=32)))
        return st.builds(
            lambda version_id, held: Have(
                version_id, [chunk for chunk, _ in held], b"".join(digest for _, digest in held)
            ),
            st.binary(min_size=32, max_size=32),
            pairs,
        )
    return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})


@pytest.mark.parametrize(("kind", "decode"), TYPES, ids=lambda value: value.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_what_is_sent_arrives(
    kind: type[Message], decode: Callable[[bytes], Any], data: st.DataObject
) -> None:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    message = data.draw(structs(described))

    again = decode(encode(message))

    assert again == message
    assert type(again) is kind


@pytest.mark.parametrize("decode", [decode for _, decode in DECODERS])
@given(data=st.binary(max_size=200))
def test_garbage_is_a_bad_message_and_nothing_else(
    decode: Callable[[bytes], Any], data: bytes
) -> None:
    with pytest.raises(BadMessage):
        decode(data)


@pytest.mark.parametrize("decode", [decode for _, decode in DECODERS])
@given(content=plain)
def test_well_formed_msgpack_that_is_no_message_is_refused(
    decode: Callable[[bytes], Any], content: object
) -> None:
    with pytest.raises(BadMessage):
        decode(msgspec.msgpack.encode(content))


@pytest.mark.slow
@settings(max_examples=150)
@given(st.data())
def test_a_damaged_message_is_decoded_or_refused_but_breaks_nothing(data: st.DataObject) -> None:
    kind, decode = data.draw(st.sampled_from(TYPES))
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    damaged = bytearray(encode(data.draw(structs(described))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))

    try:
        message = decode(bytes(damaged))
    except BadMessage:
        return
    assert isinstance(message, Message)


@pytest.mark.parametrize("digests", [b"", b"d" * 31, b"d" * 63, b"d" * 96])
def test_a_have_with_more_or_fewer_digests_than_chunks_is_refused(digests: bytes) -> None:
    with pytest.raises(BadMessage, match="one 32-byte digest per chunk"):
        decode_between_nodes(encode(Have(VERSION, [1, 2], digests)))


def test_a_message_for_somebody_else_is_refused() -> None:
    with pytest.raises(BadMessage):
        decode_from_tracker(encode(Leave(VERSION)))
    with pytest.raises(BadMessage):
        decode_to_tracker(encode(Gone(VERSION)))
    with pytest.raises(BadMessage):
        decode_between_nodes(encode(Revoked(VERSION, "changed")))


@pytest.mark.parametrize(
    "message",
    [
        Leave(b"v" * 31),
        Leave(b"v" * 33),
        Join(VERSION, "nfs", "ada", 0, 1),
        Join(VERSION, "nfs", "ada", 1, 0),
        Join(VERSION, "nfs", "ada", -5, 1),
        Join(VERSION, "n" * 1025, "ada", 1, 1),
        Join(VERSION, "nfs", "ada", 1, 1, bytes(MESSAGE_MAX_BYTES // 4 + 1)),
        Register(NodeAddress("", 1), 0.0),
        Register(NodeAddress("node", 0), 0.0),
        Register(NodeAddress("node", 65536), 0.0),
        Register(NodeAddress("n" * 256, 1), 0.0),
        Register(
            NodeAddress("node", 1),
            0.0,
            [HeldLease(1, VERSION, "nfs", "ada", 0, 1)] * (LOADS_MAX + 1),
        ),
        Register(NodeAddress("node", 1), 0.0, [HeldLease(1, VERSION, "nfs", "ada", 0, 0)]),
        Register(NodeAddress("node", 1), 0.0, [HeldLease(1, VERSION, "nfs", "ada", -1, 1)]),
    ],
    ids=lambda message: str(message)[:60],
)
def test_values_out_of_range_are_refused(message: Message) -> None:
    with pytest.raises(BadMessage):
        decode_to_tracker(encode(message))


def test_a_have_names_only_so_many_chunks() -> None:
    most = Have(VERSION, list(range(HAVE_CHUNKS_MAX)), bytes(32 * HAVE_CHUNKS_MAX))
    assert decode_between_nodes(encode(most)) == most
    assert len(encode(most)) <= MESSAGE_MAX_BYTES

    with pytest.raises(BadMessage):
        decode_between_nodes(
            encode(Have(VERSION, [*most.chunks, 1], bytes(32 * (HAVE_CHUNKS_MAX + 1))))
        )


def test_a_replica_is_placed_under_a_real_path_and_no_other() -> None:
    def placed(path: bytes) -> PlaceReplica:
        return PlaceReplica(path, 1, 2, "nfs01:/export", "alice", 3)

    for path in (b"/nfs/a b", b"/\xff", b"/..a/b."):
        assert decode_to_placed(encode(placed(path))) == placed(path)
    for path in (b"nfs/a", b"/nfs/../a", b"/nfs/./a", b"/nfs//a", b"/nfs/", b"/..", b"/a\0b", b"/"):
        with pytest.raises(BadMessage):
            decode_to_placed(encode(placed(path)))


def test_a_field_of_a_newer_version_is_ignored() -> None:
    newer = msgspec.msgpack.encode({"type": "leave", "version_id": VERSION, "colour": "red"})

    assert decode_to_tracker(newer) == Leave(VERSION)


def test_every_message_has_its_own_tag() -> None:
    tags = [kind.__struct_config__.tag for kind, _ in TYPES]

    assert len(tags) == len(set(tags))
    assert Replicas.__struct_config__.tag == "replicas"


class AddressOfOld(msgspec.Struct):
    """``NodeAddress`` before nodes said in which rack they stand."""

    node: str
    data_port: int
    name: str = ""


def test_nodes_that_know_of_no_racks_and_nodes_that_do_understand_one_another() -> None:
    old = AddressOfOld("n1:7381", 7382, "n1")
    new = NodeAddress("n1:7381", 7382, "n1", "rack 7")
    without = NodeAddress("n1:7381", 7382, "n1")

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=AddressOfOld) == old
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=NodeAddress) == without
    assert msgspec.msgpack.encode(without) == msgspec.msgpack.encode(old)
