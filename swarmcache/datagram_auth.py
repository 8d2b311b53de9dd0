"""Datagrams that only those can make who know the cluster's secret, each taken in once.

Pure logic: no socket, no clock. An envelope of ``ENVELOPE_BYTES`` around each payload::

    version u8, id of the key 4 B, sender 6 B, nonce u64, MAC 16 B, payload

The MAC is keyed BLAKE3 over all of that and the address that the datagram is for, which does not
travel. So what is recorded, changed, sent to somebody else or back to its sender is refused. The id
of the key tells clusters apart (it is of the secret and the cluster's label) before anything else
is done; the MAC is checked before anything is made of the rest. Nothing is ever answered to what
fails.

A nonce is the *cluster's time* in microseconds when the datagram was sealed, and one more than the
last where that is no more. So the datagrams of a sender that was restarted count at once, and
nobody has to remember anything. What is more than ``SKEW_US`` from the receiver's own time is
refused. Of the senders heard lately the latest nonces are kept; from all others nothing counts that
is not newer than ``floor``, which begins with the receiver's own start: so what was recorded before
is refused.

The cluster's time is that of the tracker (``ClusterTime``), which nodes learn when they connect,
and keep when it is away, across restarts too, until the machine itself is started anew
(``peers_file.py``). Who has not learned it goes by its own wall clock, which may be wrong by half a
minute.

What remains: whoever has the secret can speak as everybody. A machine that boots while the tracker
is away, with a wall clock that is more than a minute wrong, is not heard and hears nobody until the
tracker is back. And if the tracker is restarted with a clock set back by more than a minute, what
was recorded in the time that comes again can be replayed in it, once to each node.

Invariant: of one sender no nonce is opened twice, and none that is ``WINDOW`` nonces late.
"""

from __future__ import annotations

import hmac
import struct
from collections import Counter, OrderedDict
from itertools import pairwise
from typing import NamedTuple

from blake3 import blake3

from swarmcache.auth import KEY_ID_BYTES, ClusterKey, Keyring
from swarmcache.gossip_records import ID_BYTES, PAYLOAD_BYTES_MAX, node_id

VERSION = 1
MAC_BYTES = 16  # 128 bits; and a forger gets no answer that would tell whether it has guessed right
KEY_TAG_BYTES = 4
_HEAD = struct.Struct(f">B{KEY_TAG_BYTES}s{ID_BYTES}sQ")
ENVELOPE_BYTES = _HEAD.size + MAC_BYTES
DATAGRAM_BYTES_MAX = ENVELOPE_BYTES + PAYLOAD_BYTES_MAX
_TAG = slice(1, 1 + KEY_TAG_BYTES)
assert ENVELOPE_BYTES <= 48, "what is set aside for it of the 1,232 bytes that every path carries"
assert KEY_TAG_BYTES <= KEY_ID_BYTES

# Two wall clocks that nobody keeps in step are seldom further apart for long; Kerberos allows 5
# min.
SKEW_US = 60_000_000
# One sender's datagrams to one receiver take one way and keep their order, as a rule: what
# overtakes more than so many others counts as lost.
WINDOW = 8
# Senders of whom the latest nonces are kept, more than a cluster has. Only who knows the secret
# gets a place, and for one that is given up ``floor`` rises, so nothing can be replayed for it.
SENDERS_MAX = 16_384


class Opened(NamedTuple):
    """An authentic datagram. ``sender_id``: ``node_id`` of the sender's address."""

    sender_id: bytes
    payload: bytes


class ClusterTime:
    """The tracker's wall clock as this node knows it, in steps of its own steady clock, to which
    ``offset_s`` is added."""

    def __init__(self, wall_s: float, now_s: float) -> None:
        """``wall_s``: what this node's own wall clock shows."""
        self.offset_s = wall_s - now_s

    def learn(self, tracker_s: float, now_s: float) -> None:
        """The tracker has just said that this is the time."""
        self.offset_s = tracker_s - now_s

    def us(self, now_s: float) -> int:
        """Microseconds since 1970."""
        return max(int((self.offset_s + now_s) * 1e6), 0)


class DatagramAuth:
    """One node's envelopes. ``node`` is its advertised address; ``time_us`` the cluster's time."""

    def __init__(self, keyring: Keyring, node: str, time_us: int) -> None:
        self.refused: Counter[str] = Counter()  # datagrams, by what was wrong
        self._keyring = keyring
        self._own_id = node_id(node)
        self._senders: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()  # the oldest one first
        self._begin(time_us)

    def _begin(self, time_us: int) -> None:
        self._latest_us = time_us
        self._sealed = 0
        self._floor = time_us
        self._senders.clear()

    def seal(self, payload: bytes, node: str, time_us: int) -> bytes:
        """The datagram to send to the node with this advertised address."""
        assert len(payload) <= PAYLOAD_BYTES_MAX, "it would not fit a datagram"
        self._look_at(time_us)
        self._sealed = max(self._sealed + 1, time_us)
        key = self._keyring.speaking
        head = _HEAD.pack(VERSION, key.key_id[:KEY_TAG_BYTES], self._own_id, self._sealed)
        return head + _mac(key, node_id(node), head, payload) + payload

    def open(self, datagram: bytes, time_us: int) -> Opened | None:
        """What is in it; None for what is not authentic, or not new. Raises nothing."""
        opened = self._open(datagram, time_us)
        if isinstance(opened, Opened):
            return opened
        self.refused[opened] += 1
        return None

    def _open(self, datagram: bytes, time_us: int) -> Opened | str:
        """What is in it, or what is wrong with it."""
        key = self._key(datagram)
        if key is None:
            return "foreign"
        head = datagram[: _HEAD.size]
        payload = datagram[ENVELOPE_BYTES:]
        mac = _mac(key, self._own_id, head, payload)
        if not hmac.compare_digest(mac, datagram[_HEAD.size : ENVELOPE_BYTES]):
            return "forged"
        _, _, sender_id, nonce = _HEAD.unpack(head)
        self._look_at(time_us)
        if sender_id == self._own_id:
            return "own"
        if abs(nonce - time_us) > SKEW_US:
            return "untimely"
        return Opened(sender_id, payload) if self._is_new(sender_id, nonce) else "repeated"

    def _key(self, datagram: bytes) -> ClusterKey | None:
        """The key that it is said to be made with, if it can be one of ours at all."""
        if not ENVELOPE_BYTES <= len(datagram) <= DATAGRAM_BYTES_MAX or datagram[0] != VERSION:
            return None
        tag = datagram[_TAG]
        for key in self._keyring.accepted:
            if key.key_id[:KEY_TAG_BYTES] == tag:
                return key
        return None

    def _look_at(self, time_us: int) -> None:
        """Begin anew when the cluster's time has gone back further than others would accept."""
        if time_us < self._latest_us - SKEW_US:
            self._begin(time_us)
        self._latest_us = max(self._latest_us, time_us)

    def _is_new(self, sender_id: bytes, nonce: int) -> bool:
        """Whether this nonce was not opened yet; notes that it is now."""
        recent = self._senders.get(sender_id, (self._floor,))
        if nonce <= recent[0] or nonce in recent:
            return False
        self._senders[sender_id] = tuple(sorted((*recent, nonce))[-WINDOW:])
        self._senders.move_to_end(sender_id)
        if len(self._senders) > SENDERS_MAX:
            _, given_up = self._senders.popitem(last=False)
            self._floor = max(self._floor, given_up[-1])
        return True

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self._senders) <= SENDERS_MAX, "more senders than places"
        for recent in self._senders.values():
            assert 1 < len(recent) <= WINDOW, "a sender without a nonce"
            assert all(a < b for a, b in pairwise(recent)), "twice the same"


def _mac(key: ClusterKey, receiver_id: bytes, head: bytes, payload: bytes) -> bytes:
    return blake3(receiver_id + head + payload, key=key.datagram_key).digest(length=MAC_BYTES)
