"""Mutual authentication of two processes that share the cluster's secret, and MACs afterwards.

Pure logic: no socket, no clock, no random source; nonces are arguments. Three frames of fixed size,
``HELLO_BYTES``, ``CHALLENGE_BYTES`` and ``PROOF_BYTES`` long, so a stream needs no other framing::

    initiator -> acceptor   HELLO      purpose, identity, nonce, which key
    acceptor  -> initiator  CHALLENGE  identity, nonce, proof of the acceptor
    initiator -> acceptor   PROOF      proof of the initiator

A proof is keyed BLAKE3 over a label of the prover's role and everything that both sides said. So no
proof fits another role, purpose, identity or connection: what is recorded, reflected or passed on
to a server of another kind is refused. HELLO is padded: whoever has not proven anything gets no
more bytes than they sent.

While the secret is being changed, a process accepts several keys; HELLO says which is meant. Who
does not accept that answers with another, so that both sides see what is wrong.

The secret itself is not stretched: it must be random (32 bytes), not a pass phrase, since whoever
sees a CHALLENGE can try secrets offline. Nothing here hides contents; it only proves who speaks.

Invariant: ``done`` is true exactly if the other side has proven that it knows the key, for this
purpose, over a nonce that this side chose. After an error a machine stays failed.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blake3 import blake3

from swarmcache.errors import AuthenticationFailed, BadMessage

Purpose = Literal["tracker", "stand-in", "peer", "holder", "admin", "prefetch", "data"]

KEY_BYTES = 32
NONCE_BYTES = 32
IDENTITY_MAX_BYTES = 255
MAC_BYTES = 16  # [bytes] 128 bits: a forger has one try per connection
KEY_ID_BYTES = 8
TAG_CHARACTERS = 8
_PROOF_SIZE_BYTES = 32

_MAGIC = b"swarmc02"
_KIND_HELLO, _KIND_CHALLENGE, _KIND_PROOF = 1, 2, 3
# magic, kind, purpose, identity length, identity, nonce, id of the key; zeros up to a CHALLENGE
_HELLO = struct.Struct("!8sB8sB255s32s8s16x")
_CHALLENGE = struct.Struct("!8sBB255s32s32s")
_PROOF = struct.Struct("!8sB32s")
HELLO_BYTES = _HELLO.size
CHALLENGE_BYTES = _CHALLENGE.size
PROOF_BYTES = _PROOF.size
assert CHALLENGE_BYTES <= HELLO_BYTES, "a stranger must not get more than they sent"

_LABEL_ACCEPTOR = b"acceptor proves "
_LABEL_INITIATOR = b"initiator proves"
_LABEL_TO_ACCEPTOR = b"to the acceptor "
_LABEL_TO_INITIATOR = b"to the initiator"


@dataclass(frozen=True, slots=True, repr=False)
class ClusterKey:
    """What a secret is turned into: one key for proofs, one to derive the keys of sessions, one for
    datagrams. ``key_id`` tells keys apart and is no secret."""

    key_id: bytes
    proof_key: bytes
    session_key: bytes
    datagram_key: bytes

    @classmethod
    def from_secret(cls, secret: bytes | None, label: str = "") -> ClusterKey:
        """Derive the keys. ``None`` is the well-known empty key, fit for loopback only.

        ``label`` is the cluster's: with another one, all keys are others.
        """
        material = blake3(label.encode()).digest() + (secret or b"")

        def derived(use: str, size_bytes: int = KEY_BYTES) -> bytes:
            context = f"swarmcache 2026 cluster secret: {use}"
            return blake3(material, derive_key_context=context).digest(length=size_bytes)

        return cls(
            derived("key id", KEY_ID_BYTES),
            derived("proofs"),
            derived("sessions"),
            derived("datagrams"),
        )

    @property
    def tag(self) -> str:
        """What tells it apart from others, for people; no secret."""
        return self.key_id[: TAG_CHARACTERS // 2].hex()

    def __repr__(self) -> str:
        return f"<ClusterKey {self.tag}>"


class Keyring:
    """The keys that a process uses just now. May be read in any thread.

    It speaks with the first one and accepts all, so that a secret can be changed node by node.
    """

    def __init__(self, keys: Sequence[ClusterKey]) -> None:
        self.replace(keys)

    @property
    def speaking(self) -> ClusterKey:
        """The key to begin with."""
        return self.accepted[0]

    def replace(self, keys: Sequence[ClusterKey]) -> None:
        """From now on these."""
        assert keys, "who has no key cannot speak"
        self.accepted = tuple(keys)

    def tags(self) -> list[str]:
        """What tells the keys apart, for people, in their order."""
        return [key.tag for key in self.accepted]

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(self.tags())}>"


class SessionKeys:
    """MACs for the messages of one connection after its handshake; not safe for several threads.

    The MAC covers the number of the message in its direction, so a message that is replayed,
    reordered, left out or sent back to its sender does not open.
    """

    def __init__(self, send: bytes, receive: bytes) -> None:
        assert len(send) == KEY_BYTES, "a key has 32 bytes"
        assert len(receive) == KEY_BYTES, "a key has 32 bytes"
        self._send = send
        self._receive = receive
        self._sent_count = 0
        self._received_count = 0

    def seal(self, payload: bytes) -> bytes:
        """The next message to send: a MAC of ``MAC_BYTES``, then the payload."""
        mac = _mac(self._send, self._sent_count, payload)
        self._sent_count += 1
        return mac + payload

    def open(self, frame: bytes) -> bytes:
        """The payload of the next received message. Raises AuthenticationFailed."""
        payload = frame[MAC_BYTES:]
        expected = _mac(self._receive, self._received_count, payload)
        if not hmac.compare_digest(expected, frame[:MAC_BYTES]):
            raise AuthenticationFailed(
                f"message {self._received_count} was changed, repeated or lost on its way"
            )
        self._received_count += 1
        return payload


class _Side:
    """What both ends of a handshake have in common.

    ``nonce``: 32 fresh random bytes; ``identity``: who we are, at most 255 bytes.
    """

    def __init__(
        self, keys: Keyring, purpose: Purpose, nonce: bytes, identity: bytes = b""
    ) -> None:
        assert len(nonce) == NONCE_BYTES, "a nonce has 32 bytes"
        assert len(identity) <= IDENTITY_MAX_BYTES, "an identity has at most 255 bytes"
        self._accepted = keys.accepted
        self._key = keys.speaking
        self._purpose = purpose
        self._nonce = nonce
        self._identity = identity
        self._peer_identity = b""
        self._transcript = b""
        self._state: Literal["new", "waiting", "done", "failed"] = "new"

    @property
    def done(self) -> bool:
        """Whether the other side has proven that it knows the key."""
        return self._state == "done"

    @property
    def peer_identity(self) -> bytes:
        """Who the other side is: at most 255 bytes. Only to be asked when ``done``."""
        assert self.done, "nothing is proven yet"
        return self._peer_identity

    @property
    def key(self) -> ClusterKey:
        """The key that the other side has proven to know. Only to be asked when ``done``."""
        assert self.done, "nothing is proven yet"
        return self._key

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._purpose}, {self._state}>"

    def _proof(self, label: bytes) -> bytes:
        return blake3(label + self._transcript, key=self._key.proof_key).digest()

    def _session_key(self, label: bytes) -> bytes:
        return blake3(label + self._transcript, key=self._key.session_key).digest()

    def _handled_as(self, state: Literal["new", "waiting"]) -> None:
        """Check that a frame is due, and count the machine as failed until it was accepted."""
        if self._state != state:
            raise BadMessage(f"no handshake frame was expected (handshake is {self._state})")
        self._state = "failed"


class Initiator(_Side):
    """The side that connects."""

    def first(self) -> bytes:
        """The HELLO frame. To be called once, before anything is received."""
        assert self._state == "new", "HELLO is sent once"
        self._state = "waiting"
        self._transcript = _HELLO.pack(
            _MAGIC,
            _KIND_HELLO,
            self._purpose.encode(),
            len(self._identity),
            self._identity,
            self._nonce,
            self._key.key_id,
        )
        return self._transcript

    def handle(self, frame: bytes) -> bytes | None:
        """Take the CHALLENGE and return the PROOF frame to send.

        Raises AuthenticationFailed if the acceptor does not know the key or serves something else,
        BadMessage if this is no CHALLENGE.
        """
        self._handled_as("waiting")
        _check_frame(frame, _KIND_CHALLENGE, CHALLENGE_BYTES, "accepting")
        _, _, identity_bytes, identity, _, proof = _CHALLENGE.unpack(frame)
        self._peer_identity = _unpadded(identity, identity_bytes, "accepting")
        self._transcript += frame[:-_PROOF_SIZE_BYTES]
        if not hmac.compare_digest(self._proof(_LABEL_ACCEPTOR), proof):
            raise _not_proven("accepting")
        self._state = "done"
        return _PROOF.pack(_MAGIC, _KIND_PROOF, self._proof(_LABEL_INITIATOR))

    def session_keys(self) -> SessionKeys:
        """The MAC keys for what follows. Only to be called when ``done``."""
        assert self.done, "nothing is proven yet"
        return SessionKeys(
            send=self._session_key(_LABEL_TO_ACCEPTOR),
            receive=self._session_key(_LABEL_TO_INITIATOR),
        )


class Acceptor(_Side):
    """The side that was connected to."""

    @property
    def wanted_bytes(self) -> int:
        """How many bytes the next frame has; 0 when none is due."""
        return {"new": HELLO_BYTES, "waiting": PROOF_BYTES, "done": 0, "failed": 0}[self._state]

    def handle(self, frame: bytes) -> bytes | None:
        """Take HELLO and return the CHALLENGE frame to send, or take PROOF and return None.

        Raises AuthenticationFailed if the initiator does not know the key or wants something that
        is not served here, BadMessage if this is not the frame that is due.
        """
        if self._state == "waiting":
            self._handle_proof(frame)
            return None
        return self._handle_hello(frame)

    def session_keys(self) -> SessionKeys:
        """The MAC keys for what follows. Only to be called when ``done``."""
        assert self.done, "nothing is proven yet"
        return SessionKeys(
            send=self._session_key(_LABEL_TO_INITIATOR),
            receive=self._session_key(_LABEL_TO_ACCEPTOR),
        )

    def _handle_hello(self, frame: bytes) -> bytes:
        self._handled_as("new")
        _check_frame(frame, _KIND_HELLO, HELLO_BYTES, "connecting")
        _, _, purpose, identity_bytes, identity, _, key_id = _HELLO.unpack(frame)
        if purpose.rstrip(b"\0") != self._purpose.encode():
            raise AuthenticationFailed(
                f"the connecting side wants {purpose!r}, but {self._purpose!r} is served here"
            )
        self._key = next((key for key in self._accepted if key.key_id == key_id), self._key)
        self._peer_identity = _unpadded(identity, identity_bytes, "connecting")
        body = _CHALLENGE.pack(
            _MAGIC,
            _KIND_CHALLENGE,
            len(self._identity),
            self._identity,
            self._nonce,
            bytes(_PROOF_SIZE_BYTES),
        )[:-_PROOF_SIZE_BYTES]
        self._transcript = frame + body
        self._state = "waiting"
        return body + self._proof(_LABEL_ACCEPTOR)

    def _handle_proof(self, frame: bytes) -> None:
        self._handled_as("waiting")
        _check_frame(frame, _KIND_PROOF, PROOF_BYTES, "connecting")
        _, _, proof = _PROOF.unpack(frame)
        if not hmac.compare_digest(self._proof(_LABEL_INITIATOR), proof):
            raise _not_proven("connecting")
        self._state = "done"


def _not_proven(sender: str) -> AuthenticationFailed:
    return AuthenticationFailed(
        f"the {sender} side does not know the cluster's secret, or has another cluster.label"
    )


def _mac(key: bytes, count: int, payload: bytes) -> bytes:
    return blake3(count.to_bytes(8, "big") + payload, key=key).digest(length=MAC_BYTES)


def _check_frame(frame: bytes, kind: int, size_bytes: int, sender: str) -> None:
    if len(frame) != size_bytes:
        raise BadMessage(
            f"the {sender} side sent {len(frame)} bytes as a handshake frame of {size_bytes}"
        )
    if frame[: len(_MAGIC)] != _MAGIC or frame[len(_MAGIC)] != kind:
        raise BadMessage(f"the {sender} side speaks another protocol")


def _unpadded(identity: bytes, size_bytes: int, sender: str) -> bytes:
    if any(identity[size_bytes:]):
        raise BadMessage(f"the {sender} side sent an identity longer than it says")
    return identity[:size_bytes]
