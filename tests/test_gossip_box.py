"""Gossip between hosts: a flood of garbage; a secret that is changed while the cluster works.

``FLOOD_S=10 pytest tests/test_gossip_box.py -k flood -s`` floods for so long, and is strict; on a
machine with nothing else to do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from swarmcache.auth import ClusterKey
from swarmcache.datagram_auth import KEY_TAG_BYTES
from tests.box import Box, Cluster, Host, Process, wait_until
from tests.swarm_helpers import MIB, PATIENCE_S, TRANSFER_S, Swarm

pytestmark = [pytest.mark.box, pytest.mark.slow]

FLOOD_PER_S = 20_000
FLOOD_S = int(os.environ.get("FLOOD_S", "4"))
# How much longer a transfer may take. While other tests run beside this one, two transfers differ
# by more than that anyhow.
SLOWER_MAX = 1.2 if FLOOD_S >= 10 else 1.6
# Half of it looks like ours at a glance, so that the kernel does not drop it. Small, or the link
# would be full of it: with their headers they take 8 % of 200 Mbit/s. Prints how many were sent.
FLOODER = """
import random, socket, sys, time
host, port, tag, per_s, duration_s = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
head = b"\\x01" + bytes.fromhex(tag)
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.connect((host, port))
rng = random.Random(1)
noise = [rng.randbytes(rng.randrange(20, 80)) for _ in range(500)]
noise += [head + rng.randbytes(rng.randrange(30, 80)) for _ in range(500)]
began_s = time.monotonic()
sent = 0
while (elapsed_s := time.monotonic() - began_s) < float(duration_s):
    while sent < elapsed_s * float(per_s):
        sock.send(noise[sent % len(noise)])
        sent += 1
    time.sleep(0.001)
print(sent)
"""


def gossip(swarm: Swarm, node: Host) -> dict[str, Any]:
    found: dict[str, Any] = swarm.status(node)["node"]["gossip"]
    return found


def wait_for_others(swarm: Swarm, nodes: Iterable[Host]) -> None:
    nodes = list(nodes)
    for node in nodes:
        swarm.wait_for(
            node,
            lambda status: status["node"]["gossip"]["others"] == len(nodes) - 1,
            "all others by gossip",
        )


def has_read_again(process: Process, times: int) -> bool:
    return process.stderr.count("again:") == times


def assert_nobody_was_lost(swarm: Swarm) -> None:
    for process in swarm.cluster.daemons.values():
        assert "is gone" not in process.stderr


def memory_bytes(process: Process, field: str) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def received_by(host: Host) -> int:
    """UDP datagrams and ICMP messages that have come to a host."""
    rows = [line.split() for line in host.run(["cat", "/proc/net/snmp"]).stdout.splitlines()]
    tables = {
        names[0]: dict(zip(names[1:], map(int, values[1:]), strict=True))
        for names, values in pairwise(rows)
        if names[0] == values[0]
    }
    return tables["Udp:"]["InDatagrams"] + tables["Udp:"]["NoPorts"] + tables["Icmp:"]["InMsgs"]


def timed_get(swarm: Swarm, node: Host, file: Path) -> float:
    began_s = time.monotonic()
    swarm.assert_all_cached([swarm.cluster.get(node, file, options=["--strict"])], file)
    return time.monotonic() - began_s


def test_a_flood_of_garbage_is_not_answered_and_slows_nobody_down(tmp_path: Path) -> None:
    with Box(hosts=3, directory=tmp_path) as box:
        swarm = Swarm(box)
        swarm.start()
        victim, *holders = box.nodes
        files = [swarm.put(f"corpus{number}", FLOOD_S * 10 * MIB) for number in range(3)]
        for file in files:
            swarm.assert_all_cached(swarm.get_everywhere(file, holders), file)
        wait_for_others(swarm, box.nodes)
        timed_get(swarm, victim, files[0])
        undisturbed_s = timed_get(swarm, victim, files[1])
        daemon = swarm.cluster.daemons[victim.name]
        before_bytes = memory_bytes(daemon, "VmRSS")
        answers = received_by(box.head)
        Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")  # VmHWM begins anew

        key = ClusterKey.from_secret(swarm.cluster.secret_file.read_bytes().strip(), "default")
        flooder = box.head.start(
            [
                sys.executable,
                "-c",
                FLOODER,
                victim.address,
                str(Cluster.DAEMON_PORT),
                key.key_id[:KEY_TAG_BYTES].hex(),
                str(FLOOD_PER_S),
                str(FLOOD_S),
            ]
        )
        disturbed_s = timed_get(swarm, victim, files[2])
        assert flooder.wait(TRANSFER_S) == 0
        sent = int(flooder.stdout)

        grown_bytes = memory_bytes(daemon, "VmHWM") - before_bytes
        refused = gossip(swarm, victim)["refused"]
        print(f"{sent} sent, {refused}, get {undisturbed_s:.2f} s, then {disturbed_s:.2f} s,")
        print(f"memory {grown_bytes / MIB:+.1f} MiB of {before_bytes / MIB:.0f} MiB")
        assert sent >= 0.9 * FLOOD_PER_S * FLOOD_S
        assert sum(refused.values()) > 0.5 * sent
        assert grown_bytes <= 8 * MIB
        assert disturbed_s <= SLOWER_MAX * undisturbed_s
        assert received_by(box.head) == answers
        assert_nobody_was_lost(swarm)
        assert all(gossip(swarm, node)["others"] == 2 for node in box.nodes)


def test_the_secret_of_a_running_cluster_is_changed_and_nothing_is_dropped(tmp_path: Path) -> None:
    with Box(hosts=8, directory=tmp_path) as box:
        swarm = Swarm(box)
        swarm.start()
        wait_for_others(swarm, box.nodes)
        secret_file = swarm.cluster.secret_file
        old = secret_file.read_text().strip()
        new = "b" * 64
        assert swarm.cluster.tracker is not None
        processes = [swarm.cluster.tracker, *swarm.cluster.daemons.values()]
        for number, secrets in enumerate(([old, new], [new, old], [new]), 1):
            file = swarm.put(f"corpus{number}", 32 * MIB)
            gets = swarm.get_everywhere(file)
            swarm.wait_for_done(box.nodes[0], MIB)
            secret_file.write_text("\n".join(secrets))
            for process in processes:
                process.signal(signal.SIGHUP)
                wait_until(
                    partial(has_read_again, process, number), PATIENCE_S, "the secret read again"
                )
            swarm.assert_all_cached(gets, file)
            small = swarm.put(f"small{number}", MIB)
            swarm.assert_all_cached(swarm.get_everywhere(small), small)

        assert_nobody_was_lost(swarm)
        wait_for_others(swarm, box.nodes)
        swarm.wait_for_tracker(box.nodes)
