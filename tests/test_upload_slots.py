"""Who is served, who waits and who is refused by a node that sends chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.upload_slots import LAG_CHUNKS, WAITING_MAX, Upload, UploadSlots

A, B = b"a" * 32, b"b" * 32


def full(uploads_max: int, version_id: bytes = A, held_chunks: int = 100) -> UploadSlots:
    """Slots all of which are taken."""
    slots = UploadSlots(uploads_max)
    for _ in range(uploads_max):
        assert slots.admit(Upload(version_id, held_chunks))
    return slots


def test_whoever_comes_is_served_while_there_are_places() -> None:
    slots = full(4)

    assert not slots.waiting


def test_the_place_of_one_who_has_left_is_free_once() -> None:
    slots = UploadSlots(2)
    ahead = Upload(A, 100)
    assert slots.admit(ahead)
    assert slots.admit(Upload(A, 100))

    slots.leave(ahead)
    slots.leave(ahead)  # its place was given to another one, and then it noticed

    assert not slots.full
    assert slots.admit(Upload(A, 100))
    assert not slots.admit(Upload(A, 100))


def test_an_equal_is_refused_when_all_places_are_taken() -> None:
    slots = full(4, held_chunks=100)

    assert not slots.admit(Upload(A, 100))
    assert not slots.admit(Upload(A, 100 - LAG_CHUNKS))
    assert not slots.waiting


def test_who_lags_behind_one_of_those_served_waits_for_the_next_place() -> None:
    slots = UploadSlots(3)
    ahead = Upload(A, 100)
    for upload in (ahead, Upload(A, 50), Upload(A, 50)):
        assert slots.admit(upload)

    assert slots.admit(Upload(A, 99 - LAG_CHUNKS))
    assert slots.waiting
    assert not slots.admit(Upload(A, 0))

    slots.leave(ahead)
    assert not slots.waiting


def test_who_has_nothing_lags_behind_everybody_who_has_something() -> None:
    """Found in simulation: of a file of five chunks a node got none for five seconds."""
    assert full(2, held_chunks=1).admit(Upload(A, 0))
    assert not full(2, held_chunks=2).admit(Upload(A, 1))
    assert not full(2, held_chunks=0).admit(Upload(A, 0))


def test_another_file_is_not_starved_by_one_that_has_all_places() -> None:
    slots = UploadSlots(2)
    first = Upload(A, 100)
    assert slots.admit(first)
    assert slots.admit(Upload(A, 100))

    assert slots.admit(Upload(B, 100))
    assert not slots.admit(Upload(B, 100))

    slots.leave(first)
    assert not slots.waiting
    assert not slots.admit(Upload(B, 100))  # served already from this file, and not behind
    assert slots.admit(Upload(A, 0))


@given(
    uploads_max=st.integers(1, 5),
    steps=st.lists(
        st.tuples(st.booleans(), st.sampled_from([A, B]), st.integers(0, 9)), max_size=60
    ),
)
def test_there_are_never_more_than_places_and_a_free_place_refuses_nobody(
    uploads_max: int, steps: list[tuple[bool, bytes, int]]
) -> None:
    slots = UploadSlots(uploads_max)
    inside: list[Upload] = []
    for comes, version_id, number in steps:
        if comes:
            upload = Upload(version_id, number)
            before = len(inside)
            if slots.admit(upload):
                inside.append(upload)
                assert before < uploads_max + WAITING_MAX
            else:
                assert before >= uploads_max
        elif inside:
            slots.leave(inside.pop(number % len(inside)))
        slots.check()
        assert slots.waiting == (len(inside) > uploads_max)
