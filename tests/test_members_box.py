"""Who is known to be alive, by all nodes of a cluster of hosts; and seen without a tracker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.box import Box, Host, wait_until
from tests.swarm_helpers import PATIENCE_S, Swarm

pytestmark = [pytest.mark.box, pytest.mark.slow]

DEAD_S_MAX = 10.0
# A host that is cut off may come back, and is given more time; one that is back is asked for.
SILENT_S_MAX = 30.0
HEALED_S_MAX = 30.0
# Of eight nodes each tells of itself every few seconds.
AGE_S_MAX = 20.0


def members(swarm: Swarm, node: Host) -> dict[str, dict[str, Any]]:
    """What a node knows of all, by their addresses."""
    return {each["node"]: each for each in swarm.status(node)["members"]}


def seconds_until(
    swarm: Swarm, nodes: Iterable[Host], subjects: Iterable[Host], state: str, limit_s: float
) -> float:
    """How long it takes until all these nodes believe this of the others among ``subjects``."""
    began_s = time.monotonic()
    pairs = [(node, subject) for node in nodes for subject in subjects if node is not subject]

    def believed() -> bool:
        while pairs:
            node, subject = pairs[0]
            known = members(swarm, node).get(swarm.node_id(subject))
            if known is None or known["state"] != state:
                return False
            del pairs[0]
        return True

    wait_until(believed, limit_s, f"everybody to take {[*subjects]} for {state}")
    return time.monotonic() - began_s


def test_the_dead_are_known_soon_who_was_cut_off_returns_and_all_is_seen_without_a_tracker(
    tmp_path: Path,
) -> None:
    with Box(hosts=8, directory=tmp_path) as box:
        swarm = Swarm(box)
        swarm.start()
        seconds_until(swarm, box.nodes, box.nodes, "alive", PATIENCE_S)
        *alive, victim = box.nodes
        *others, unplugged = alive

        victim.kill(swarm.cluster.daemons[victim.name])
        dead_s = seconds_until(swarm, alive, [victim], "dead", DEAD_S_MAX)

        unplugged.cut_off()
        silent_s = seconds_until(swarm, others, [unplugged], "dead", SILENT_S_MAX)
        unplugged.heal()
        healed_s = seconds_until(swarm, alive, alive, "alive", HEALED_S_MAX)
        print(f"killed: {dead_s:.1f} s, cut off: {silent_s:.1f} s, healed: {healed_s:.1f} s")

        assert swarm.cluster.tracker is not None
        box.head.kill(swarm.cluster.tracker)
        for node in (others[0], unplugged):
            found = members(swarm, node)
            assert {found[swarm.node_id(each)]["state"] for each in alive} == {"alive"}
            assert max(found[swarm.node_id(each)]["age_s"] for each in alive) <= AGE_S_MAX
            assert all(found[swarm.node_id(each)]["capacity_bytes"] for each in alive)
            assert found[swarm.node_id(victim)]["state"] == "dead"
        shown = swarm.cluster.command(others[0], "status")
        as_json = swarm.cluster.command(others[0], "status", "--json")
        assert (shown.wait(PATIENCE_S), as_json.wait(PATIENCE_S)) == (0, 0)
        rows = [line for line in shown.stdout.splitlines() if line.startswith("│")]
        names = [row.split("│")[1].strip() for row in rows if ":7381" in row]
        assert names == [swarm.node_id(node) for node in box.nodes]
        assert len(json.loads(as_json.stdout)["members"]) == len(box.nodes)
