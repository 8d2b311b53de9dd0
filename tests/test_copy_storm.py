"""Hundreds of ``cp`` and ``get`` at once, at one file server with four slots.

What is asserted is what the file server has seen: it writes down every read and every write.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from random import Random

import msgspec
import pytest

from swarmcache.write_beside import PREFIX
from tests.box import REPOSITORY, Box, Cluster, Host, Process
from tests.copy_clients import IN_MIDDLE, IN_QUEUE, Ended, Plan
from tests.swarm_helpers import Swarm, digest_of

pytestmark = [pytest.mark.box, pytest.mark.slow]

# COPY_STORM=200 for the whole truth: 200 cp, 200 get, 12 to 20 of the former killed.
FILES = int(os.environ.get("COPY_STORM", "16"))
NODES = 4
# Of the clients of each node, by their number: the cp have even ones.
DIES = {4: IN_QUEUE, 2: IN_MIDDLE}
if FILES > 16:
    DIES |= {20: IN_QUEUE, 50: IN_MIDDLE, 80: IN_MIDDLE}
SLOTS_MAX = 4
SIZE_BYTES_MAX = 2 << 20
# So slow that nobody is done before the next one comes.
FILE_SERVER_MBIT = 50.0
STORM_S_MAX = 110.0 if FILES <= 16 else 900.0


class Storm:
    """Clients on all nodes of a swarm: each writes files of its own, and all read the same ones."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._random = Random(5)
        self.written = swarm.box.export / "written"
        self.written.mkdir(mode=0o777)
        self.corpus = [
            swarm.put(f"corpus{number}", self._size_bytes()) for number in range(FILES // NODES)
        ]
        self.digests: dict[str, str] = {}  # of what is to be written, by name

    def _size_bytes(self) -> int:
        return self._random.randint(1, SIZE_BYTES_MAX)

    def start(self, node: Host) -> Process:
        """All clients of one node at once; every other one writes."""
        commands = []
        for number in range(FILES // NODES):
            name = f"{node.name}-{number}"
            data = self._random.randbytes(self._size_bytes())
            (node.disk / name).write_bytes(data)
            self.digests[name] = hashlib.sha256(data).hexdigest()
            commands.append(["cp", str(node.disk / name), str(self.written)])
            commands.append(["get", "--strict", str(self.corpus[number])])
        (node.disk / "logs").mkdir()
        plan = Plan(commands, DIES, str(node.disk / "logs"))
        (node.disk / "plan").write_bytes(msgspec.json.encode(plan))
        return node.start(
            [sys.executable, "-m", "tests.copy_clients", node.disk / "plan"],
            env={"PYTHONPATH": str(REPOSITORY), "SWARMCACHE_SOCKET": str(Cluster.SOCKET)},
            directory=REPOSITORY,
        )

    def left_over(self) -> list[Path]:
        return [path for path in self.written.iterdir() if path.name.startswith(PREFIX)]


def test_a_storm_of_copies_and_gets_keeps_to_the_slots_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Box(hosts=NODES, directory=tmp_path) as box:
        box.fs.shape(up_mbit=FILE_SERVER_MBIT, down_mbit=FILE_SERVER_MBIT)
        swarm = Swarm(box, {"file_servers.default.slots_max": SLOTS_MAX})
        swarm.start()
        storm = Storm(swarm)
        runs = [storm.start(node) for node in box.nodes]
        ended = [each for run in runs for each in _ended(run)]

        assert len(ended) == 2 * FILES, "nobody waits for ever"
        in_middle = [each for each in ended if DIES.get(each.number) == IN_MIDDLE]
        assert {each.code for each in in_middle} == {-9}
        others = {each.code for each in ended if each.number not in DIES}
        assert others == {0}, [each for each in ended if each.code > 0]
        assert [each.said for each in ended if "without a slot" in each.said] == []
        # Where a name is looked up just when a file gets it, sshfs takes the two for two files.
        not_cached = [each for each in ended if "not cached" in each.said]
        assert [each for each in not_cached if "its name does not lead" not in each.said] == []
        assert len(not_cached) <= FILES // 8
        assert 2 <= box.file_server.transfers_peak() <= SLOTS_MAX

        for each in ended:
            if each.command[0] == "get":
                source, copy = Path(each.command[-1]), Path(each.said.rstrip("\n"))
                assert copy != source
                continue
            name = os.path.basename(each.command[1])
            there = storm.written / name
            assert each.code or there.exists(), "a file that was said to be written is lost"
            if there.exists():
                assert digest_of(there) == storm.digests[name]

        # Those who came later on the same node have removed some, and may have died since.
        removed = sum(each.said.count("left by a killed copy") for each in ended)
        assert 1 <= removed + len(storm.left_over()) <= len(in_middle)
        for number, node in enumerate(box.nodes):
            (node.disk / "last").write_bytes(b"last")
            if number % 2:
                mend = swarm.cluster.command(node, "doctor", "--clean", box.export)
            else:
                target = storm.written / f"last-{node.name}"
                mend = swarm.cluster.command(node, "cp", node.disk / "last", target)
            assert mend.wait(60) == 0
        assert storm.left_over() == []
        cached = next(each for each in ended if _is_silent_copy(each))
        written = storm.written / os.path.basename(cached.command[1])
        other = next(node for node in box.nodes if not written.name.startswith(node.name))
        (copy,) = swarm.cluster.paths(swarm.cluster.get(other, written), 60)
        assert (copy == written, digest_of(copy)) == (False, storm.digests[written.name])
        assert other.name not in {read.host for read in box.file_server.reads(written)}

        with capsys.disabled():
            last_s = max(each.ended_s - each.began_s for each in ended)
            killed = sum(each.code == -9 for each in ended)
            print(
                f"\n{FILES} cp and {FILES} get: the last one after {last_s:.1f} s;"
                f" {box.file_server.transfers_peak()} transfers at once; {killed} killed"
            )


def _is_silent_copy(ended: Ended) -> bool:
    return (ended.command[0], ended.code, ended.said) == ("cp", 0, "")


def _ended(run: Process) -> list[Ended]:
    assert run.wait(STORM_S_MAX) == 0, run.stderr
    lines = run.stdout.splitlines()
    return [msgspec.json.decode(line, type=Ended) for line in lines]
