"""The caller's end of questions about places, with a daemon that answers anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from swarmcache.client import Client
from swarmcache.errors import BadMessage, DaemonRefused, DaemonUnavailable
from swarmcache.local_protocol import (
    Answer,
    Cached,
    CopyPath,
    CopyPathOf,
    End,
    Failed,
    Get,
    Location,
    Locations,
    LocationsOf,
    Notice,
    Room,
    Working,
)
from swarmcache.locate import FileLocations, Replica, local_path, locate, own_path, room_for
from swarmcache.place_actions import show_locations, show_paths
from tests.disk_helpers import as_stranger, needs_root
from tests.scripted_daemon import HANG_UP, Asked, ScriptedDaemon


@pytest.fixture
def file(tmp_path: Path) -> bytes:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    return bytes(path)


def daemon_that_answers(directory: Path, *answers: Answer | bytes) -> ScriptedDaemon:
    directory.chmod(0o700)
    return ScriptedDaemon(directory, lambda asked: answers)


def test_answers_come_with_notices_and_signs_of_life(tmp_path: Path, file: bytes) -> None:
    found = Locations(file, 5, [Location("n1", b"/c/\xff", False)], 3, "why")
    answers = (Working(), Notice("n2 is silent"), Working(), found, End())
    notices: list[str] = []
    with daemon_that_answers(tmp_path, *answers) as daemon, Client(bytes(daemon.path)) as client:
        assert list(locate(client, [file], 7, notices.append)) == [
            FileLocations(file, 5, (Replica("n1", b"/c/\xff", 5, False),), 3, "why")
        ]
        list(locate(client, [file]))
        assert [each.request for each in daemon.asked] == [LocationsOf(1, 7), LocationsOf(1)]
        assert daemon.connections == 1, "kept for the next question"
    assert notices == ["n2 is silent"]


def test_what_cannot_be_read_keeps_its_place_and_is_not_asked_about(
    tmp_path: Path, file: bytes
) -> None:
    with (
        daemon_that_answers(tmp_path, Locations(file, 5), End()) as daemon,
        Client(bytes(daemon.path)) as client,
    ):
        missing = file + b"missing"
        answers = list(locate(client, [missing, file, missing]))
        assert [answer.readable for answer in answers] == [False, True, False]
        assert next(locate(client, [missing])).path == missing
        assert [each.request for each in daemon.asked] == [LocationsOf(1)]


@needs_root
def test_what_cannot_be_looked_at_is_named_and_all_else_below_the_directory_is_found(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anything left out because of a link to a directory elsewhere, which is not below."""
    tree, home = root.parent / "tree", root.parent / "home"
    files = [tree / name for name in ("top", "1/f", "2/f", "2/3/f")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tree / "out").symlink_to(root.parent)
    for closed in (home, tree / "2/closed"):
        closed.mkdir(mode=0o700)
    (tree / "link").symlink_to(home / "file")

    def answer(asked: Asked) -> list[Answer]:
        assert isinstance(asked.request, LocationsOf)
        place = Location("n", b"/c", False)
        return [*(Locations(b"/f", 5, [place]) for _ in range(asked.request.count)), End()]

    root.mkdir()
    with ScriptedDaemon(root, answer) as daemon, Client(bytes(daemon.path)) as client:
        daemon.path.chmod(0o666)
        with as_stranger():
            code = show_locations(client, [bytes(tree)], limit=None, bundle=None, as_json=False)

    printed = capsys.readouterr()
    assert (code, printed.out) == (1, "n:/c:5\n" * len(files))
    assert sorted(printed.err.splitlines()) == [
        f"swarmcache: '{tree}/{name}': Permission denied" for name in ("2/closed", "link")
    ]


@needs_root
def test_a_directory_that_may_not_be_listed_is_named_with_the_reason(root: Path) -> None:
    root.mkdir(mode=0o700)
    with as_stranger(), Client(b"/nowhere/daemon.sock") as client:
        assert list(locate(client, [bytes(root)])) == [
            FileLocations(bytes(root), reason="Permission denied", readable=False)
        ]


def test_what_the_daemon_takes_for_no_file_is_not_said_to_have_no_replicas(
    tmp_path: Path, file: bytes
) -> None:
    with (
        daemon_that_answers(tmp_path, Locations(reason="mounted for you alone"), End()) as daemon,
        Client(bytes(daemon.path)) as client,
    ):
        [found] = locate(client, [file])
    assert found == FileLocations(file, reason="mounted for you alone", readable=False)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([Failed("no")], DaemonRefused),
        ([HANG_UP], DaemonUnavailable),
        ([End()], BadMessage),
        ([Locations(), HANG_UP], DaemonUnavailable),
        ([b"nonsense\n"], BadMessage),
        ([Cached(b"/x", hit=True)], BadMessage),
    ],
)
def test_half_an_answer_is_none(
    tmp_path: Path, file: bytes, answers: Iterable[Answer | bytes], error: type[Exception]
) -> None:
    with (
        daemon_that_answers(tmp_path, *answers) as daemon,
        Client(bytes(daemon.path)) as client,
        pytest.raises(error),
    ):
        list(locate(client, [file]))


def test_a_daemon_that_was_restarted_is_asked_again(tmp_path: Path, file: bytes) -> None:
    answer = CopyPath(b"/cache/me" + file)
    with Client(bytes(tmp_path / "daemon.sock")) as client:
        for _ in range(2):
            with daemon_that_answers(tmp_path, answer) as daemon:
                assert local_path(client, file) == answer.path
                assert len(daemon.asked) == 1
            daemon.path.unlink()


def test_a_connection_that_ends_in_the_middle_is_tried_once_more(
    tmp_path: Path, file: bytes
) -> None:
    """It was idle: that its daemon had gone shows only when the answer does not come."""
    answer = CopyPath(b"/cache/me" + file)
    tries: Iterator[list[Answer | bytes]] = iter(
        [[answer], [HANG_UP], [answer], [HANG_UP], [HANG_UP]]
    )
    tmp_path.chmod(0o700)
    with (
        ScriptedDaemon(tmp_path, lambda asked: next(tries)) as daemon,
        Client(bytes(daemon.path)) as client,
    ):
        assert local_path(client, file) == local_path(client, file) == answer.path
        assert list(map(type, (each.request for each in daemon.asked))) == [CopyPathOf] * 3
        with pytest.raises(DaemonUnavailable):
            room_for(client, [0])


def test_a_file_that_the_daemon_refuses_does_not_cost_the_paths_of_the_others(
    tmp_path: Path, file: bytes, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    answers: Iterator[list[Answer | bytes]] = iter([[Failed("not this one")], [CopyPath(b"/c")]])
    tmp_path.chmod(0o700)
    with (
        ScriptedDaemon(tmp_path, lambda asked: next(answers)) as daemon,
        Client(bytes(daemon.path)) as client,
    ):
        code = show_paths(client, [file, file], bundle=None, end=b"\n", config_file=None)

    printed = capfdbinary.readouterr()
    assert (code, printed.out) == (1, b"/c\n")
    assert b"file': not this one" in printed.err


@pytest.mark.parametrize("answer", [CopyPath(b"relative"), CopyPath(b""), End(), Room(1, 2)])
def test_what_is_no_path_is_not_taken_for_one(tmp_path: Path, file: bytes, answer: Answer) -> None:
    with (
        daemon_that_answers(tmp_path, answer) as daemon,
        Client(bytes(daemon.path)) as client,
        pytest.raises(BadMessage),
    ):
        own_path(client, file)


def test_other_requests_go_on_over_the_same_connection(tmp_path: Path, file: bytes) -> None:
    def answer(asked: Asked) -> list[Answer]:
        if isinstance(asked.request, Get):
            return [Cached(file, hit=True)]
        return [Room(1, 2)]

    tmp_path.chmod(0o700)
    with ScriptedDaemon(tmp_path, answer) as daemon, Client(bytes(daemon.path)) as client:
        with open(file, "rb") as source:
            assert room_for(client, [source.fileno()] * 3) == Room(1, 2)
        assert client.get(file.decode()).hit
        assert daemon.connections == 1
