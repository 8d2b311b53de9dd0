"""Envelopes of datagrams: what they refuse, whatever is sent, whoever was restarted.

``DATAGRAMS=10000000 pytest tests/test_datagram_auth.py -k generated -s`` for as many as that.
"""

from __future__ import annotations

import os
import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache import datagram_auth
from swarmcache.auth import ClusterKey, Keyring
from swarmcache.datagram_auth import (
    DATAGRAM_BYTES_MAX,
    ENVELOPE_BYTES,
    SKEW_US,
    WINDOW,
    ClusterTime,
    DatagramAuth,
    Opened,
)
from swarmcache.errors import BadMessage
from swarmcache.gossip_records import PAYLOAD_BYTES_MAX, decode_payload, node_id

KEY = ClusterKey.from_secret(b"the secret of this cluster", "default")
KEYS = Keyring([KEY])
A, B, C = "node-a:7381", "node-b:7381", "node-c:7381"
START_US = 1_800_000_000_000_000
SECOND_US = 1_000_000
DATAGRAMS = int(os.environ.get("DATAGRAMS", "20000"))


def node(address: str, keyring: Keyring = KEYS, time_us: int = START_US) -> DatagramAuth:
    return DatagramAuth(keyring, address, time_us)


def refusal(receiver: DatagramAuth, datagram: bytes, time_us: int = START_US + 1) -> str | None:
    """Why the datagram is refused; None if it is not."""
    receiver.refused.clear()
    if receiver.open(datagram, time_us) is not None:
        return None
    [reason] = receiver.refused
    return reason


def test_a_datagram_arrives_once_with_the_id_of_its_sender() -> None:
    a, b = node(A), node(B)
    datagram = a.seal(b"payload", B, START_US + 1)

    assert b.open(datagram, START_US + 2) == Opened(node_id(A), b"payload")
    assert refusal(b, datagram) == "repeated"
    assert len(datagram) == len(b"payload") + ENVELOPE_BYTES


def test_the_largest_datagram_fits_what_every_path_carries() -> None:
    datagram = node(A).seal(bytes(PAYLOAD_BYTES_MAX), B, START_US + 1)

    assert len(datagram) == DATAGRAM_BYTES_MAX <= 1232
    assert refusal(node(B), datagram) is None
    assert refusal(node(B), datagram + b"\0") == "foreign"


@given(payload=st.binary(max_size=64), bit=st.integers(min_value=0))
def test_no_bit_can_be_changed(payload: bytes, bit: int) -> None:
    datagram = node(A).seal(payload, B, START_US + 1)
    changed = int.from_bytes(datagram, "big") ^ (1 << bit % (8 * len(datagram)))

    assert refusal(node(B), changed.to_bytes(len(datagram), "big")) in ("foreign", "forged")


@given(length=st.integers(min_value=0, max_value=ENVELOPE_BYTES + 20))
def test_what_is_cut_off_is_refused(length: int) -> None:
    datagram = node(A).seal(bytes(21), B, START_US + 1)

    assert refusal(node(B), datagram[:length]) in ("foreign", "forged")


def test_what_was_sent_to_another_node_or_comes_back_is_refused() -> None:
    a = node(A)
    datagram = a.seal(b"are you there?", B, START_US + 1)

    assert refusal(node(C), datagram) == "forged"
    assert refusal(a, datagram) == "forged"
    assert refusal(a, a.seal(b"myself", A, START_US + 1)) == "own"


@pytest.mark.parametrize(
    "other",
    [
        ClusterKey.from_secret(b"the secret of that cluster", "default"),
        ClusterKey.from_secret(b"the secret of this cluster", "another label"),
        ClusterKey.from_secret(None),
    ],
)
def test_datagrams_of_another_cluster_are_refused_at_a_glance(other: ClusterKey) -> None:
    datagram = node(A, Keyring([other])).seal(b"", B, START_US + 1)

    assert refusal(node(B), datagram) == "foreign"


def test_while_the_secret_is_changed_nothing_is_refused_and_afterwards_the_old_one_is() -> None:
    old, new = (ClusterKey.from_secret(secret) for secret in (b"old", b"new"))
    rings = [Keyring([old]), Keyring([old])]
    a, b = node(A, rings[0]), node(B, rings[1])
    time_us = START_US
    for keys in ([old, new], [new, old], [new]):
        for ring in rings:
            ring.replace(keys)
            for sender, receiver, name in ((a, b, B), (b, a, A)):
                time_us += 1
                assert receiver.open(sender.seal(b"", name, time_us), time_us) is not None

    late = node(C, Keyring([old])).seal(b"", B, time_us)
    assert refusal(b, late, time_us) == "foreign"


# --- replays -------------------------------------------------------------------------------------


def test_some_may_overtake_others_and_none_counts_twice() -> None:
    a, b = node(A), node(B)
    sent = [a.seal(b"%d" % number, B, START_US + 1) for number in range(WINDOW)]

    for datagram in reversed(sent):
        assert refusal(b, datagram) is None
    for datagram in sent:
        assert refusal(b, datagram) == "repeated"
    b.check()


@given(seed=st.integers(min_value=0, max_value=10**9))
def test_in_whatever_order_they_come_and_however_often_each_counts_once(seed: int) -> None:
    rng = Random(seed)
    a, b = node(A), node(B)
    sent = [a.seal(b"", B, START_US + rng.randrange(50)) for _ in range(40)]
    opened = []
    for _ in range(120):
        datagram = rng.choice(sent)
        if b.open(datagram, START_US + 100) is not None:
            opened.append(datagram)
        b.check()

    assert len(opened) == len(set(opened)) > 0


@pytest.mark.parametrize("off_us", [-SKEW_US - 2, SKEW_US + 2, (1 << 63) - START_US])
def test_what_is_too_old_or_from_the_far_future_is_refused(off_us: int) -> None:
    a, b = node(A, time_us=0), node(B, time_us=0)

    assert refusal(b, a.seal(b"", B, START_US + off_us), START_US) == "untimely"


def test_clocks_that_differ_by_half_a_minute_do_no_harm() -> None:
    behind, ahead = node(A), node(B, time_us=START_US + 30 * SECOND_US)
    for second in range(31, 40):
        time_us = START_US + second * SECOND_US
        there = behind.seal(b"", B, time_us)
        back = ahead.seal(b"", A, time_us + 30 * SECOND_US)
        assert refusal(ahead, there, time_us + 30 * SECOND_US) is None
        assert refusal(behind, back, time_us) is None


def test_a_sender_that_was_restarted_is_heard_at_once() -> None:
    b = node(B)
    for life in range(3):
        time_us = START_US + (1 + life) * SECOND_US
        assert refusal(b, node(A, time_us=time_us).seal(b"", B, time_us), time_us) is None


def test_a_receiver_that_was_restarted_takes_nothing_from_before() -> None:
    recorded = node(A).seal(b"", B, START_US + 1)
    restarted = node(B, time_us=START_US + SECOND_US)

    assert refusal(restarted, recorded, START_US + 2 * SECOND_US) == "repeated"


def test_senders_that_are_forgotten_leave_nothing_to_be_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datagram_auth, "SENDERS_MAX", 3)
    b = node(B)
    recorded = []
    for number in range(10):
        sender = node(f"node-{number}:7381")
        recorded.append(sender.seal(b"", B, START_US + 1 + number))
        assert refusal(b, recorded[-1], START_US + 20) is None
        b.check()

    assert [refusal(b, each, START_US + 20) for each in recorded] == ["repeated"] * 10


def test_a_tracker_whose_clock_was_set_back_or_forth_ends_no_conversation() -> None:
    a, b = node(A), node(B)
    for time_us in (START_US + 1, START_US - 3600 * SECOND_US, START_US + 7200 * SECOND_US):
        b.open(a.seal(b"on its way just then", B, time_us + 1), time_us + 2)
        recorded = a.seal(b"", B, time_us + 3)
        assert refusal(b, recorded, time_us + 4) is None
        assert refusal(b, recorded, time_us + 5) == "repeated"


def test_small_corrections_of_the_clock_are_not_noticed() -> None:
    a, b = node(A), node(B)
    time_us = START_US + SECOND_US
    for step_us in (0, -SECOND_US // 2, 3, -7, SECOND_US):
        time_us += step_us
        assert refusal(b, a.seal(b"", B, time_us), time_us) is None


def test_the_cluster_goes_by_the_trackers_clock_as_soon_as_it_is_heard() -> None:
    time = ClusterTime(wall_s=1000.0, now_s=10.0)
    assert time.us(11.0) == 1_001_000_000

    time.learn(5000.0, 12.0)

    assert time.us(13.5) == 5_001_500_000


# --- generated datagrams --------------------------------------------------------------------------


class Generator:
    """Makes datagrams of all kinds for B, most of them by somebody who does not know the secret."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.sender = node(A)
        self.time_us = START_US
        self.recorded = self.authentic()
        self._foreign = [
            node(A, Keyring([ClusterKey.from_secret(b"the secret of this cluster", label)]))
            for label in ("another", "a third", "")
        ]
        self.kinds = (
            self.noise,
            self.disguised,
            self.truncated,
            self.oversized,
            self.replayed,
            self.wrong_label,
            self.far_future,
            self.authentic,
            self.type_confused,
        )

    def some(self, count_max: int) -> bytes:
        return self.rng.randbytes(self.rng.randrange(count_max))

    def noise(self) -> bytes:
        return self.some(self.rng.choice((2, ENVELOPE_BYTES, 2000)))

    def disguised(self) -> bytes:
        """With a head like ours."""
        return self.recorded[: self.rng.randrange(1, ENVELOPE_BYTES)] + self.some(1300)

    def truncated(self) -> bytes:
        datagram = self.sender.seal(self.some(200), B, self.time_us)
        return datagram[: self.rng.randrange(len(datagram))]

    def oversized(self) -> bytes:
        return self.sender.seal(bytes(PAYLOAD_BYTES_MAX), B, self.time_us) + self.some(300) + b"."

    def replayed(self) -> bytes:
        return self.recorded

    def wrong_label(self) -> bytes:
        return self.rng.choice(self._foreign).seal(self.some(200), B, self.time_us)

    def far_future(self) -> bytes:
        off_us = SKEW_US + self.rng.randrange(1, 1 << 60)
        return node(A).seal(self.some(200), B, self.time_us + off_us)

    def authentic(self) -> bytes:
        """And noise inside."""
        return self.sender.seal(self.some(200), B, self.time_us)

    def type_confused(self) -> bytes:
        """Authentic, with sections that are not what their kinds say."""
        sections = [
            struct.pack(">BI", self.rng.randrange(16), self.rng.getrandbits(32)) + self.some(60)
            for _ in range(self.rng.randrange(8))
        ]
        return self.sender.seal(b"".join(sections), B, self.time_us)


@pytest.mark.timeout(7200)
def test_whatever_is_generated_no_exception_escapes_and_only_authentic_ones_are_opened() -> None:
    made = Generator(DATAGRAMS)
    b = node(B, time_us=START_US - 1)
    assert b.open(made.recorded, START_US) is not None
    opened = decoded = 0
    for number in range(DATAGRAMS):
        made.time_us += 50
        make = made.kinds[number % len(made.kinds)]
        found = b.open(make(), made.time_us)
        assert (found is not None) == (make in (made.authentic, made.type_confused)), number
        if found is not None:
            opened += 1
            try:
                decode_payload(found.payload)
                decoded += 1
            except BadMessage:
                pass
    b.check()
    print(f"{DATAGRAMS} datagrams: {opened} opened, {decoded} of them decoded, {dict(b.refused)}")

    assert set(b.refused) == {"foreign", "forged", "untimely", "repeated"}
