"""Where files are, told by three nodes that lose them in all ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.box import Box, Host, wait_until
from tests.swarm_helpers import PATIENCE_S, TRANSFER_S, Swarm

pytestmark = [pytest.mark.box, pytest.mark.slow]

SIZES_BYTES = {"a": 300_000, "b": 200_000, "c": 100_000}


class Places:
    """A swarm of three, and what its commands print."""

    def __init__(self, box: Box) -> None:
        self.swarm = Swarm(box)
        self.swarm.start()
        self.nodes = box.nodes

    def lines(
        self, node: Host, *arguments: str | Path, uid: int = 0, code: int = 0
    ) -> tuple[list[str], str]:
        """What a command prints on stdout and stderr."""
        process = self.swarm.cluster.command(node, *arguments, uid=uid)
        assert process.wait(PATIENCE_S) == code, process.stderr
        return process.stdout.splitlines(), process.stderr

    def cache(self, file: Path, *nodes: Host) -> list[Path]:
        """Have these nodes cache a file; their copies, seen from outside."""
        gets = [self.swarm.cluster.get(node, file, options=["--strict"]) for node in nodes]
        copies = [path for get in gets for path in self.swarm.cluster.paths(get, TRANSFER_S)]
        names = {node.name for node in nodes}
        wait_until(lambda: names <= self.holders(nodes[0], file), PATIENCE_S, "known replicas")
        return copies

    def holders(self, node: Host, file: Path) -> set[str]:
        return {line.partition(":")[0] for line in self.lines(node, "locate", file)[0]}


def test_locations_are_those_of_this_moment(tmp_path: Path) -> None:
    with Box(hosts=3, directory=tmp_path) as box:
        places = Places(box)
        first, second, third = box.nodes
        files = {name: places.swarm.put(name, size) for name, size in SIZES_BYTES.items()}
        on_first, on_second, on_third = places.cache(files["a"], *box.nodes)
        places.cache(files["b"], first, second)
        places.cache(files["c"], first, third)

        lines, said = places.lines(second, "locate", *files.values())
        assert said == "" and len(lines) == 7
        size_bytes = SIZES_BYTES["a"]
        assert lines[0] == f"node2:{on_second}:{size_bytes}", "its own comes first"
        assert set(lines[1:3]) == {
            f"node1:{on_first}:{size_bytes}",
            f"node3:{on_third}:{size_bytes}",
        }
        ranked, _ = places.lines(third, "hosts", *files.values())
        assert ranked == ["node1 600000", "node2 500000", "node3 400000"]
        bundle = files["a"].with_name("x.bundle")
        bundle.write_text("a\nb\na\n")
        assert places.lines(first, "hosts", "--limit=2", bundle)[0] == [
            "node1 500000",
            "node2 500000",
        ]

        # One is tampered with, by root: nobody else can. One is removed. Whoever asks first makes
        # the nodes notice; then they complete their copies again.
        first.run(["sh", "-c", 'chmod u+w "$0" && echo 1 > "$0"', on_first])
        second.run(["rm", on_second])
        assert places.holders(third, files["a"]) == {"node3"}

        # The source is rewritten: what is cached is of another file version.
        files["b"].write_bytes(os.urandom(SIZES_BYTES["b"]))
        for node in box.nodes:
            assert places.holders(node, files["b"]) == set()

        # A node dies, another one hangs: neither keeps anybody waiting for long.
        first.kill(places.swarm.cluster.daemons["node1"])
        assert places.holders(second, files["c"]) == {"node3"}
        third.stop(places.swarm.cluster.daemons["node3"])
        lines, said = places.lines(second, "locate", files["c"])
        assert lines == [] and "node3" in said
        third.cont(places.swarm.cluster.daemons["node3"])
