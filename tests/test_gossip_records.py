"""What gossip looks like on the wire, and what it does with bytes that are no gossip."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.errors import BadMessage
from swarmcache.gossip_records import (
    ADDRESS_BYTES_MAX,
    BUCKETS,
    DIGEST_BYTES,
    EPOCH_MAX,
    MEBIBYTE,
    PAYLOAD_BYTES_MAX,
    RING,
    SEQ_MAX,
    TEXT_BYTES,
    Ack,
    Digests,
    DiskHealth,
    Nack,
    NodeProfile,
    NodeStatus,
    Numbered,
    Ping,
    PingFor,
    Profiles,
    ProfilesWanted,
    Received,
    Rumour,
    RumourKind,
    Rumours,
    Statuses,
    StatusesWanted,
    StatusRecord,
    decode_payload,
    encode_ack,
    encode_digests,
    encode_nack,
    encode_numbered,
    encode_ping,
    encode_ping_for,
    encode_profiles,
    encode_profiles_wanted,
    encode_received,
    encode_rumours,
    encode_statuses,
    encode_statuses_wanted,
    node_id,
    pack_profile,
    pack_rumour,
    pack_size,
    pack_status,
    profile_tag,
    profiles_for_datagrams,
    read_body,
    read_profile,
    ring_id,
    status_body,
    unpack_size,
)
from swarmcache.messages import NodeAddress

PROFILE = NodeProfile(NodeAddress("node01.cluster:7381", 7382, "node01"), "rack7", "0.1.0", 1 << 40)
STATUS = NodeStatus(
    5 * MEBIBYTE,
    6 * MEBIBYTE,
    7 * MEBIBYTE,
    3,
    4,
    DiskHealth.FULL,
    b"held",
    True,
)
IDS = st.integers(0, RING - 1)
NUMBERS = st.integers(0, (1 << 32) - 1)
RECORDS = st.builds(
    StatusRecord,
    IDS,
    st.integers(0, EPOCH_MAX),
    st.integers(0, SEQ_MAX),
    st.integers(0, 0xFFFF),
    st.binary(min_size=15, max_size=15),
)
RUMOURS = st.builds(
    Rumour,
    st.sampled_from(RumourKind),
    IDS,
    st.integers(0, EPOCH_MAX),
    st.integers(0, SEQ_MAX),
    IDS,
    st.integers(0, 0xFFFF),
)


def test_all_sections_come_out_as_they_went_in() -> None:
    record = StatusRecord(1 << 40, 1 << 41, 70_000, 12, status_body(STATUS, profile_tag(PROFILE)))
    rumour = Rumour(RumourKind.DEAD, 1 << 42, 1 << 43, 80_000, 1 << 44, 13)
    sums = [*range(BUCKETS)]

    sections = decode_payload(
        b"".join(
            (
                encode_numbered(1),
                encode_ping(2, "host:1"),
                encode_ack(3),
                encode_ping_for(4, 1 << 45),
                encode_nack(5),
                encode_received([6, 7]),
                encode_rumours(8, [pack_rumour(rumour)]),
                encode_statuses(9, [pack_status(record)]),
                encode_profiles([pack_profile(PROFILE)]),
                encode_profiles_wanted([11]),
                encode_statuses_wanted([12, 1 << 46]),
                encode_digests(sums, answered=True),
            )
        )
    )

    statuses = sections.pop(7)
    assert isinstance(statuses, Statuses)
    assert (statuses.limit, statuses.records) == (9, [record])
    assert sections == [
        Numbered(1),
        Ping(2, "host:1"),
        Ack(3),
        PingFor(4, 1 << 45),
        Nack(5),
        Received((6, 7)),
        Rumours(8, [rumour]),
        Profiles([PROFILE]),
        ProfilesWanted([11]),
        StatusesWanted([12, 1 << 46]),
        Digests(sums, True),
    ]
    assert read_body(record.body) == STATUS


@given(RECORDS, RUMOURS)
def test_every_record_and_rumour_survives_the_wire(record: StatusRecord, rumour: Rumour) -> None:
    payload = encode_statuses(1, [pack_status(record)]) + encode_rumours(2, [pack_rumour(rumour)])

    statuses, rumours = decode_payload(payload)

    assert isinstance(statuses, Statuses)
    assert statuses.records == [record]
    assert rumours == Rumours(2, [rumour])
    read_body(record.body)


@given(st.integers(0, 1 << 62))
def test_a_size_is_rounded_down_by_a_mebibyte_or_a_part_in_1024_at_most(size_bytes: int) -> None:
    rounded = unpack_size(pack_size(size_bytes))

    assert rounded <= size_bytes
    assert size_bytes - rounded < max(MEBIBYTE, size_bytes / 1024)
    assert unpack_size(pack_size(rounded)) == rounded


def test_sizes_out_of_range_become_the_least_and_the_greatest() -> None:
    assert unpack_size(pack_size(-1)) == 0
    assert unpack_size(pack_size(1 << 80)) == 2047 << 31 << 20


def test_words_that_do_not_fit_beside_the_address_are_cut() -> None:
    node = "h" * (ADDRESS_BYTES_MAX - 5) + ":7381"
    long = NodeProfile(NodeAddress(node, 1, "n" * 99), "räck" * 9, "v", 5)

    short = read_profile(pack_profile(long))

    assert short.address == NodeAddress(node, 1, "n" * (TEXT_BYTES - ADDRESS_BYTES_MAX - 4))
    assert (short.rack, short.version, short.capacity_bytes) == ("", "", 5)
    assert profile_tag(short) == profile_tag(long)


@pytest.mark.parametrize("node", ["h" * 128 + ":1", "host", ":1", "host:0", "host:65536", "h h:1"])
def test_an_address_that_cannot_be_one_is_refused_where_it_is_packed(node: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        pack_profile(NodeProfile(NodeAddress(node, 1), "", "", 0))


@given(st.lists(st.integers(0, 90), max_size=60))
def test_profiles_travel_in_as_few_datagrams_as_they_fit_into(lengths: list[int]) -> None:
    profiles = [
        NodeProfile(NodeAddress(f"host{number}:1", 1, "n" * length), "rack", "1", 5)
        for number, length in enumerate(lengths)
    ]

    groups = profiles_for_datagrams(pack_profile(each) for each in profiles)

    payloads = [encode_profiles(group) for group in groups]
    come = [section for payload in payloads for section in decode_payload(payload)]
    assert [p for each in come if isinstance(each, Profiles) for p in each.profiles] == profiles
    for payload, following in zip(payloads, groups[1:], strict=False):
        assert len(payload) + 1 + len(following[0]) > PAYLOAD_BYTES_MAX


@pytest.mark.parametrize("words", [b"h:1\0n\0r\0", b"h:1\0n\0r\0v\0x", b"h:1\0n\0r\0v\0\0"])
def test_a_profile_has_four_words_and_nothing_else(words: bytes) -> None:
    with pytest.raises(BadMessage):
        read_profile(b"\0\1" + bytes(8) + words)


def test_an_id_follows_from_the_address() -> None:
    assert ring_id("host:1") == int.from_bytes(node_id("host:1"), "big")
    assert ring_id("host:1") != ring_id("host:2")


@given(st.binary(max_size=PAYLOAD_BYTES_MAX + 1))
def test_any_bytes_decode_or_are_a_bad_message(payload: bytes) -> None:
    with contextlib.suppress(BadMessage):
        decode_payload(payload)


@given(st.data())
def test_gossip_with_some_bytes_changed_decodes_or_is_a_bad_message(data: st.DataObject) -> None:
    payload = bytearray(
        encode_numbered(data.draw(NUMBERS))
        + encode_ping(2, "host:1")
        + encode_profiles([pack_profile(PROFILE)])
        + encode_rumours(8, [pack_rumour(data.draw(RUMOURS))])
        + encode_statuses(9, [pack_status(data.draw(RECORDS))])
        + encode_statuses_wanted([12, 1 << 46])
        + encode_received([6, 7])
    )
    for at in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=4)):
        payload[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(payload)))

    with contextlib.suppress(BadMessage):
        decode_payload(bytes(payload[:end]))


def test_a_datagram_that_is_cut_off_is_a_bad_message() -> None:
    section = encode_statuses(1, [bytes(32)] * 36)
    payload = section + bytes([DIGEST_BYTES])

    for length in range(1, len(payload) + 1):
        if length != len(section):  # between two sections: that is a whole datagram
            with pytest.raises(BadMessage):
                decode_payload(payload[:length])


def test_a_datagram_that_is_too_long_is_a_bad_message() -> None:
    with pytest.raises(BadMessage, match="1185 bytes"):
        decode_payload(encode_ack(1) * 237)
