"""The lines of the daemon, as its clients read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache.errors import BadMessage
from swarmcache.local_protocol import Answer, Cached, Original, Progress, encode_answer
from swarmcache.local_socket import is_progress, parse_answer, path_of

paths = st.binary().filter(lambda path: b"\0" not in path).map(lambda path: b"/" + path)
sizes_bytes = st.integers(0, (1 << 63) - 1)


@given(
    st.builds(
        Cached,
        path=paths,
        hit=st.booleans(),
        from_peers_bytes=sizes_bytes,
        from_file_server_bytes=sizes_bytes,
        held=st.booleans(),
    )
)
def test_a_copy_is_read_without_a_json_parser_as_one_would_read_it(answer: Cached) -> None:
    line = encode_answer(answer).rstrip(b"\n")

    message, expected = parse_answer(line), json.loads(line)

    assert isinstance(message["path"], bytes)  # a JSON parser would have made a str of it
    assert path_of(message["path"]) == answer.path
    assert {**message, "path": expected["path"]} == expected


@pytest.mark.parametrize(
    "line",
    [
        b'{"answer":"cached","path":"Lw==","hit":true,"more":"text"}',
        b'{"answer":"cached","path":"Lw==","hit":true,"more":[1,false]}',
        b'{"answer":"cached","path":"Lw==","hit":true,"more":-1.5}',
        b'{"answer":"cached","path":"Lw==","hit":true,"more":%d}' % (1 << 70),
        b'{"answer":"cached","path":"Lw=="}',
        b'{"answer": "cached", "hit": true}',
    ],
)
def test_what_a_later_daemon_may_say_besides_is_read_as_well(line: bytes) -> None:
    assert parse_answer(line) == json.loads(line)


@pytest.mark.parametrize("line", [b'{"answer":"cached","path":"', b'{"answer":"cached","path":"x"'])
def test_half_an_answer_makes_no_sense(line: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_answer(line)


@pytest.mark.parametrize(
    ("answer", "progress"), [(Progress(1, 0, 0, 0, 0), True), (Original("progress"), False)]
)
def test_progress_is_told_from_the_final_answer(answer: Answer, progress: bool) -> None:
    assert is_progress(encode_answer(answer)) == progress
