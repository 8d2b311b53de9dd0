"""The handshake and the MACs, without a socket."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.auth import (
    CHALLENGE_BYTES,
    HELLO_BYTES,
    MAC_BYTES,
    PROOF_BYTES,
    Acceptor,
    ClusterKey,
    Initiator,
    Keyring,
    SessionKeys,
)
from swarmcache.errors import AuthenticationFailed, BadMessage, RemoteError

KEY = Keyring([ClusterKey.from_secret(b"the secret of this cluster")])
OTHER_KEY = Keyring([ClusterKey.from_secret(b"the secret of that cluster")])
NONCE_1, NONCE_2, NONCE_3 = b"1" * 32, b"2" * 32, b"3" * 32


def shake_hands(initiator: Initiator, acceptor: Acceptor) -> None:
    challenge = acceptor.handle(initiator.first())
    assert challenge is not None
    proof = initiator.handle(challenge)
    assert proof is not None
    assert acceptor.handle(proof) is None


def session() -> tuple[SessionKeys, SessionKeys]:
    initiator, acceptor = Initiator(KEY, "data", NONCE_1), Acceptor(KEY, "data", NONCE_2)
    shake_hands(initiator, acceptor)
    return initiator.session_keys(), acceptor.session_keys()


def flipped(frame: bytes, bit: int) -> bytes:
    return (int.from_bytes(frame, "big") ^ (1 << bit)).to_bytes(len(frame), "big")


def test_both_sides_learn_who_the_other_is() -> None:
    initiator = Initiator(KEY, "peer", NONCE_1, b"node-1:7381")
    acceptor = Acceptor(KEY, "peer", NONCE_2, b"n" * 255)

    shake_hands(initiator, acceptor)

    assert initiator.done
    assert acceptor.done
    assert acceptor.peer_identity == b"node-1:7381"
    assert initiator.peer_identity == b"n" * 255


def test_without_a_secret_the_well_known_key_serves() -> None:
    initiator = Initiator(Keyring([ClusterKey.from_secret(None)]), "peer", NONCE_1)
    acceptor = Acceptor(Keyring([ClusterKey.from_secret(None)]), "peer", NONCE_2)

    shake_hands(initiator, acceptor)

    assert acceptor.done
    assert Keyring([ClusterKey.from_secret(None)]) != KEY


def test_an_initiator_refuses_an_acceptor_with_another_secret() -> None:
    initiator = Initiator(KEY, "data", NONCE_1)
    challenge = Acceptor(OTHER_KEY, "data", NONCE_2).handle(initiator.first())
    assert challenge is not None

    with pytest.raises(AuthenticationFailed, match="accepting side"):
        initiator.handle(challenge)

    assert not initiator.done


def test_an_acceptor_refuses_an_initiator_with_another_secret() -> None:
    acceptor = Acceptor(KEY, "data", NONCE_2)
    impostor = Initiator(OTHER_KEY, "data", NONCE_1)
    acceptor.handle(impostor.first())
    accomplice = Acceptor(OTHER_KEY, "data", NONCE_2)
    other = Initiator(OTHER_KEY, "data", NONCE_1)
    challenge = accomplice.handle(other.first())
    assert challenge is not None
    proof = other.handle(challenge)
    assert proof is not None

    with pytest.raises(AuthenticationFailed, match="connecting side"):
        acceptor.handle(proof)

    assert not acceptor.done


OLD, NEW = (ClusterKey.from_secret(b"%s secret, random" % age) for age in (b"old", b"new"))


@pytest.mark.parametrize(
    ("ours", "theirs", "spoken"),
    [
        ([OLD], [OLD, NEW], OLD),
        ([OLD, NEW], [OLD], OLD),
        ([OLD, NEW], [NEW, OLD], OLD),
        ([NEW, OLD], [OLD, NEW], NEW),
        ([NEW], [NEW, OLD], NEW),
        ([NEW, OLD], [NEW], NEW),
    ],
)
def test_while_the_secret_is_changed_both_sides_agree_on_one_key(
    ours: list[ClusterKey], theirs: list[ClusterKey], spoken: ClusterKey
) -> None:
    initiator = Initiator(Keyring(ours), "data", NONCE_1)
    acceptor = Acceptor(Keyring(theirs), "data", NONCE_2)

    shake_hands(initiator, acceptor)

    assert initiator.key == acceptor.key == spoken
    sealed = initiator.session_keys().seal(b"something")
    assert acceptor.session_keys().open(sealed) == b"something"


def test_a_secret_that_is_not_accepted_yet_or_any_more_opens_nothing() -> None:
    initiator = Initiator(Keyring([NEW, OLD]), "data", NONCE_1)
    challenge = Acceptor(Keyring([OLD]), "data", NONCE_2).handle(initiator.first())
    assert challenge is not None

    with pytest.raises(AuthenticationFailed, match="accepting side"):
        initiator.handle(challenge)


def test_clusters_of_another_label_do_not_mix_although_they_have_the_same_secret() -> None:
    here, there = (Keyring([ClusterKey.from_secret(b"s" * 32, label)]) for label in ("a", "b"))
    initiator = Initiator(here, "data", NONCE_1)
    challenge = Acceptor(there, "data", NONCE_2).handle(initiator.first())
    assert challenge is not None

    with pytest.raises(AuthenticationFailed, match="label"):
        initiator.handle(challenge)


def test_an_acceptor_serves_one_purpose_only() -> None:
    hello = Initiator(KEY, "peer", NONCE_1).first()

    with pytest.raises(AuthenticationFailed, match="peer"):
        Acceptor(KEY, "data", NONCE_2).handle(hello)


def test_a_hello_whose_purpose_was_changed_on_the_way_ends_in_failure() -> None:
    initiator = Initiator(KEY, "peer", NONCE_1)
    hello = initiator.first().replace(b"peer", b"data")
    challenge = Acceptor(KEY, "data", NONCE_2).handle(hello)
    assert challenge is not None

    with pytest.raises(AuthenticationFailed):
        initiator.handle(challenge)


def test_a_recorded_proof_does_not_open_another_connection() -> None:
    initiator, acceptor = Initiator(KEY, "data", NONCE_1), Acceptor(KEY, "data", NONCE_2)
    hello = initiator.first()
    challenge = acceptor.handle(hello)
    assert challenge is not None
    proof = initiator.handle(challenge)
    assert proof is not None
    later = Acceptor(KEY, "data", NONCE_3)
    later.handle(hello)

    with pytest.raises(AuthenticationFailed):
        later.handle(proof)


def test_the_proof_of_an_acceptor_sent_back_to_it_is_refused() -> None:
    acceptor = Acceptor(KEY, "data", NONCE_2)
    challenge = acceptor.handle(Initiator(KEY, "data", NONCE_1).first())
    assert challenge is not None
    other = Initiator(KEY, "data", NONCE_1)
    other_challenge = Acceptor(KEY, "data", NONCE_3).handle(other.first())
    assert other_challenge is not None
    head = (other.handle(other_challenge) or b"")[:-32]

    with pytest.raises(AuthenticationFailed):
        acceptor.handle(head + challenge[-32:])


def test_a_hello_sent_back_to_its_sender_is_no_challenge() -> None:
    initiator = Initiator(KEY, "data", NONCE_1)

    with pytest.raises(BadMessage):
        initiator.handle(initiator.first()[:CHALLENGE_BYTES])


@pytest.mark.parametrize("sender", ["initiator", "acceptor"])
def test_an_identity_that_was_changed_on_the_way_is_refused(sender: str) -> None:
    initiator = Initiator(KEY, "peer", NONCE_1, b"initiator")
    acceptor = Acceptor(KEY, "peer", NONCE_2, b"acceptor")
    hello = initiator.first()
    if sender == "initiator":
        hello = hello.replace(b"initiator", b"inItiator")
    challenge = acceptor.handle(hello)
    assert challenge is not None

    with pytest.raises(AuthenticationFailed):
        initiator.handle(challenge.replace(b"acceptor", b"acCeptor"))


def test_a_stranger_never_gets_more_bytes_than_it_sent() -> None:
    hello = Initiator(KEY, "data", NONCE_1).first()
    challenge = Acceptor(KEY, "data", NONCE_2, b"n" * 255).handle(hello)

    assert challenge is not None
    assert len(challenge) == CHALLENGE_BYTES <= len(hello) == HELLO_BYTES


def test_after_an_error_a_machine_stays_failed() -> None:
    acceptor = Acceptor(KEY, "data", NONCE_2)
    with pytest.raises(BadMessage):
        acceptor.handle(b"")

    with pytest.raises(BadMessage, match="failed"):
        acceptor.handle(Initiator(KEY, "data", NONCE_1).first())

    assert acceptor.wanted_bytes == 0
    assert repr(acceptor) == "<Acceptor data, failed>"


def test_a_finished_handshake_takes_no_more_frames() -> None:
    initiator, acceptor = Initiator(KEY, "data", NONCE_1), Acceptor(KEY, "data", NONCE_2)
    shake_hands(initiator, acceptor)

    with pytest.raises(BadMessage, match="done"):
        acceptor.handle(bytes(PROOF_BYTES))
    with pytest.raises(BadMessage, match="done"):
        initiator.handle(bytes(CHALLENGE_BYTES))


def test_the_key_is_not_shown() -> None:
    key = KEY.speaking

    for shown in (repr(KEY), repr(key)):
        assert key.tag in shown
        assert not any(each.hex() in shown for each in (key.proof_key, key.session_key))


def test_messages_open_in_order_in_both_directions() -> None:
    ours, theirs = session()

    for payload in (b"first", b"", b"third" * 1000):
        assert theirs.open(ours.seal(payload)) == payload
        assert ours.open(theirs.seal(payload)) == payload


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda first, second: [first, first], id="replayed"),
        pytest.param(lambda first, second: [second], id="first one cut out"),
        pytest.param(lambda first, second: [first[:-1]], id="shortened"),
        pytest.param(lambda first, second: [first + b"\0"], id="lengthened"),
        pytest.param(lambda first, second: [b""], id="empty"),
    ],
)
def test_messages_that_were_tampered_with_do_not_open(
    attack: Callable[[bytes, bytes], list[bytes]],
) -> None:
    ours, theirs = session()
    frames = attack(ours.seal(b"first"), ours.seal(b"second"))
    for frame in frames[:-1]:
        theirs.open(frame)

    with pytest.raises(AuthenticationFailed):
        theirs.open(frames[-1])


def test_a_message_sent_back_to_its_sender_does_not_open() -> None:
    ours, _ = session()

    with pytest.raises(AuthenticationFailed):
        ours.open(ours.seal(b"echo"))


def test_another_connection_has_other_keys() -> None:
    ours, _ = session()
    initiator, acceptor = Initiator(KEY, "data", NONCE_1), Acceptor(KEY, "data", NONCE_3)
    shake_hands(initiator, acceptor)

    with pytest.raises(AuthenticationFailed):
        acceptor.session_keys().open(ours.seal(b"hello"))


@given(st.integers(0, 8 * (MAC_BYTES + 7) - 1))
def test_no_flipped_bit_of_a_message_goes_unnoticed(bit: int) -> None:
    ours, theirs = session()

    with pytest.raises(AuthenticationFailed):
        theirs.open(flipped(ours.seal(b"payload"), bit))


@given(st.integers(0, 8 * CHALLENGE_BYTES - 1))
def test_no_flipped_bit_of_a_challenge_goes_unnoticed(bit: int) -> None:
    initiator = Initiator(KEY, "data", NONCE_1, b"me")
    challenge = Acceptor(KEY, "data", NONCE_2, b"you").handle(initiator.first())
    assert challenge is not None

    with pytest.raises(RemoteError):
        initiator.handle(flipped(challenge, bit))


@given(st.integers(0, 8 * HELLO_BYTES - 1))
def test_no_flipped_bit_of_a_hello_goes_unnoticed(bit: int) -> None:
    initiator, acceptor = Initiator(KEY, "data", NONCE_1, b"me"), Acceptor(KEY, "data", NONCE_2)

    with pytest.raises(RemoteError):
        initiator.handle(acceptor.handle(flipped(initiator.first(), bit)) or b"")


def frames_of(size_bytes: int, head: bytes) -> st.SearchStrategy[bytes]:
    """Anything, things of the right size, and things that begin like a frame."""
    rest = st.binary(min_size=size_bytes - len(head), max_size=size_bytes - len(head))
    return (
        st.binary(max_size=400)
        | st.binary(min_size=size_bytes, max_size=size_bytes)
        | rest.map(lambda data: head + data)
    )


@given(frames_of(HELLO_BYTES, Initiator(KEY, "data", NONCE_1).first()[:17]), st.binary())
def test_no_bytes_bring_an_acceptor_out_of_its_errors(first: bytes, second: bytes) -> None:
    acceptor = Acceptor(KEY, "data", NONCE_2)

    for frame in (first, second):
        try:
            acceptor.handle(frame)
        except RemoteError:
            assert acceptor.wanted_bytes == 0
    assert not acceptor.done


@given(frames_of(CHALLENGE_BYTES, b"swarmc02\x02"))
def test_no_bytes_bring_an_initiator_out_of_its_errors(frame: bytes) -> None:
    initiator = Initiator(KEY, "data", NONCE_1)
    initiator.first()

    with pytest.raises(RemoteError):
        initiator.handle(frame)
    assert not initiator.done


@given(st.binary())
def test_no_bytes_open_as_a_message(frame: bytes) -> None:
    _, theirs = session()

    with pytest.raises(AuthenticationFailed):
        theirs.open(frame)
