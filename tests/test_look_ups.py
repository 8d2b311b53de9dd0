"""Many small files from a peer: real daemons, and a client that wants all of them at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from swarmcache import exchanges
from swarmcache.client import Answer, Client, open_source
from swarmcache.local_socket import look_up_line
from tests.box import wait_until
from tests.local_daemons import LocalDaemons, LocalNode

pytestmark = pytest.mark.slow

LOOK_UP_FILES = 64  # so that few files are several look-ups
COUNT = LOOK_UP_FILES + 10


class Pair:
    """A node that holds small files, and one that does not."""

    def __init__(self, directory: Path, local: LocalDaemons) -> None:
        self.sources = directory / "sources"
        random = Random(1)
        for number in range(COUNT):
            file = self.sources / str(number % 3) / f"file {number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(random.randbytes(random.randint(1, 20_000)))
        self.files = sorted(path for path in self.sources.rglob("*") if path.is_file())
        self._settings = f'[file_servers.sources]\npaths = ["{self.sources}"]\n'
        local.start_tracker()
        self.holder = self.start(local, "holder")
        self.cold = self.start(local, "cold")

    def start(self, local: LocalDaemons, name: str) -> LocalNode:
        return local.start_daemon(name, self._settings)

    def get(self, node: LocalNode) -> list[Answer]:
        """All files, each of them right and cached."""
        with Client(bytes(node.socket)) as client:
            answers = client.get_many(self.files, strict=True)
        for file, answer in zip(self.files, answers, strict=True):
            assert Path(answer).read_bytes() == file.read_bytes()
            assert os.stat(answer).st_mtime_ns == file.stat().st_mtime_ns
        return answers


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(exchanges, "LOOK_UP_FILES", LOOK_UP_FILES)
    with LocalDaemons(tmp_path) as local:
        yield Pair(tmp_path, local)


def test_all_come_together_from_the_peer_and_none_from_the_file_server(pair: Pair) -> None:
    assert not any(answer.hit for answer in pair.get(pair.holder))

    answers = pair.get(pair.cold)

    assert not any(answer.hit for answer in answers)
    assert sum(answer.from_peers_bytes for answer in answers) == sum(
        file.stat().st_size for file in pair.files
    )
    status = pair.cold.status()["node"]
    assert status["read_bytes"] == 0
    assert status["totals"]["requests"] == status["totals"]["from_peers_chunks"] == COUNT
    # So the tracker has never heard of a swarm for them: nobody was introduced to anybody.
    assert status["peers"] == []
    assert all(answer.hit for answer in pair.get(pair.cold))
    directory = pair.cold.get(pair.sources)[0]
    assert sorted(os.listdir(directory)) == [b"0", b"1", b"2"]


def test_what_nobody_holds_and_what_has_changed_comes_the_ordinary_way(pair: Pair) -> None:
    pair.get(pair.holder)
    changed, new = pair.files[5], pair.sources / "0" / "new"
    changed.write_bytes(b"changed")
    new.write_bytes(b"new")
    pair.files.append(new)

    pair.get(pair.cold)

    status = pair.cold.status()["node"]
    assert status["read_bytes"] == len(b"changed") + len(b"new")


def test_a_client_that_goes_leaves_nothing_open(pair: Pair) -> None:
    """It asks, and does not wait for the answer; the files come all the same."""
    pair.get(pair.holder)
    descriptors = Path(f"/proc/{pair.cold.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    sources = [open_source(bytes(file)) for file in pair.files[:LOOK_UP_FILES]]
    with Client(bytes(pair.cold.socket)) as client:
        connection, _ = client.send(
            look_up_line(len(sources), None, None), *(source.fd for source in sources)
        )
        connection.close()
    for source in sources:
        source.close()

    wait_until(lambda: len(list(descriptors.iterdir())) <= before + 10, 10.0, "closed files")
    pair.get(pair.cold)


def test_a_holder_that_dies_holds_up_nobody(pair: Pair) -> None:
    pair.get(pair.holder)
    pair.holder.kill()

    pair.get(pair.cold)


def test_clients_that_want_the_same_files_at_once_share_what_comes(pair: Pair) -> None:
    pair.get(pair.holder)
    with Client(bytes(pair.cold.socket)) as one, Client(bytes(pair.cold.socket)) as two:
        first, second = one.get_all(map(bytes, pair.files)), two.get_all(map(bytes, pair.files))
        for file, a, b in zip(pair.files, first, second, strict=True):
            assert a.cached and a == b and Path(a).read_bytes() == file.read_bytes()

    assert pair.cold.status()["node"]["totals"]["from_peers_chunks"] == COUNT


def test_links_outlast_the_daemon_and_its_successor_trusts_the_copies(
    pair: Pair, tmp_path: Path
) -> None:
    pair.get(pair.holder)
    pair.get(pair.cold)
    pair.cold.kill()

    with LocalDaemons(tmp_path) as local:
        again = pair.start(local, "cold")
        assert all(answer.hit for answer in pair.get(again))
