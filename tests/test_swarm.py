"""Promises kept by real daemons on the hosts of a box: one file server, many nodes, many faults.

Each test says in its name what must hold. What is asserted was seen from outside: by the file
server that writes down every read, by the counters of the links, by reading the printed paths.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from swarmcache.peer import THREADS_PER_USER
from tests.box import Box, wait_until
from tests.swarm_helpers import (
    CHUNK_BYTES,
    FLIPPING_DAEMON,
    MIB,
    PATIENCE_S,
    TRANSFER_S,
    Swarm,
    digest_of,
    leases_in,
)

pytestmark = [pytest.mark.box, pytest.mark.slow]

# Bytes on a link for each byte of a file: headers of TCP, IP and Ethernet, requests, digests.
OVERHEAD = 1.08
STALL_S = 5.0
# A daemon's and a client's start, and the last answer, on a busy machine.
STALL_GRACE_S = 3.0
# A file server as slow as this reads a file of 16 MiB in 7 s: time to break something meanwhile.
SLOW_MBIT = 20.0

MakeSwarm = Callable[..., Swarm]


@pytest.fixture
def make_swarm(tmp_path: Path) -> Iterator[MakeSwarm]:
    """Makes a running swarm: ``make_swarm(4, slots_max=2, file_server_mbit=20)``."""
    with ExitStack() as stack:

        def make(
            hosts: int,
            *,
            running: int | None = None,
            slots_max: int = 8,
            file_server_mbit: float | None = None,
            stall_s: float = STALL_S,
        ) -> Swarm:
            box = stack.enter_context(Box(hosts=hosts, rate_mbit=200.0, directory=tmp_path))
            if file_server_mbit is not None:
                box.fs.shape(up_mbit=file_server_mbit, down_mbit=file_server_mbit)
            settings = {"file_servers.default.slots_max": slots_max, "get.stall": stall_s}
            swarm = Swarm(box, settings)
            swarm.start(box.nodes[:running])
            return swarm

        yield make


# --- without faults ------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "slots_max"), [(6, 8), (5, 2)])
def test_a_file_reaches_every_node_and_leaves_the_file_server_once(
    make_swarm: MakeSwarm, nodes: int, slots_max: int
) -> None:
    swarm = make_swarm(nodes, slots_max=slots_max)
    file_server = swarm.box.file_server
    file = swarm.put("corpus", 64 * MIB)
    sent_before = swarm.box.fs.bytes_sent()

    swarm.assert_all_cached(swarm.get_everywhere(file), file)

    assert swarm.box.fs.bytes_sent() - sent_before <= OVERHEAD * 64 * MIB
    assert 64 * MIB <= file_server.bytes_read(file) <= 1.01 * 64 * MIB
    assert min(nodes, slots_max) >= file_server.readers_peak(file) >= 2


def test_a_latecomer_gets_everything_from_peers(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(3, running=2)
    file = swarm.put("corpus", 16 * MIB)
    early, latecomer = swarm.box.nodes[:2], swarm.box.nodes[2]
    swarm.assert_all_cached(swarm.get_everywhere(file, early), file)
    read_before = swarm.box.file_server.bytes_read()

    swarm.cluster.start_daemons([latecomer])
    swarm.wait_for_tracker([latecomer])
    swarm.assert_all_cached(swarm.get_everywhere(file, [latecomer]), file)

    assert swarm.box.file_server.bytes_read() == read_before
    # The tracker counts the same, as soon as all nodes have sent their next heartbeats.
    swarm.wait_for(
        latecomer,
        lambda status: status["cluster"]["statistics"]["requests"] == 3,
        "the last request in the statistics",
    )
    counted = swarm.status(latecomer)["cluster"]["statistics"]
    assert counted["from_peers_bytes"] >= 16 * MIB
    assert [each["read_bytes"] for each in counted["file_servers"]] == [16 * MIB]
    assert (counted["files"], counted["replicas_per_file_max"]) == (1, 3)


def test_twenty_gets_of_one_file_on_one_node_are_one_download(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(1)
    (node,) = swarm.box.nodes
    file = swarm.put("corpus", 32 * MIB)
    received_before = node.bytes_received()

    gets = [swarm.cluster.get(node, file) for _ in range(20)]
    found = swarm.paths(gets)

    assert file not in found, [get.stderr for get in gets]
    assert len(set(found)) == 1
    assert digest_of(found[0]) == swarm.digests[file][-1]
    assert node.bytes_received() - received_before <= OVERHEAD * 32 * MIB
    assert swarm.box.file_server.bytes_read(file) <= 1.01 * 32 * MIB


def test_the_single_file_of_one_user_does_not_wait_for_all_files_of_another(
    make_swarm: MakeSwarm,
) -> None:
    """Also: where the copies lie, and who can look at them."""
    ann, ben = 1001, 1002
    swarm = make_swarm(2, slots_max=1, file_server_mbit=SLOW_MBIT)
    first, second = swarm.box.nodes
    many = [swarm.put(f"of_ann_{number}", 3 * MIB) for number in range(5)]
    single = swarm.put("of_ben", 3 * MIB)

    get_many = swarm.cluster.get(first, *many, uid=ann)
    swarm.wait_for(second, lambda status: len(status["cluster"]["swarms"]) >= 3, "a queue")
    get_single = swarm.cluster.get(first, single, uid=ben)
    copies = swarm.cluster.paths(get_many, TRANSFER_S)
    (copy,) = swarm.cluster.paths(get_single, TRANSFER_S)

    reads = swarm.box.file_server.reads
    assert max(read.answered_s for read in reads(single)) < max(
        read.answered_s for path in many for read in reads(path)
    )
    assert swarm.box.file_server.readers_peak() == 1
    for path, cached in zip([*many, single], [*copies, copy], strict=True):
        assert cached != path and digest_of(cached) == swarm.digests[path][-1]
    for reader, own, foreign in ((ann, copies[0], copy), (ben, copy, copies[0])):
        assert first.run(["cat", own], uid=reader, check=False).returncode == 0
        assert first.run(["cat", foreign], uid=reader, check=False).returncode != 0
        assert first.run(["ls", foreign.parent], uid=reader, check=False).returncode != 0


def test_files_of_every_size_and_name_arrive_under_their_real_path(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    files = [
        swarm.put("empty", 0),
        swarm.put("one byte", 1),
        swarm.put("one chunk\nand no more", CHUNK_BYTES),
        swarm.put(os.fsdecode(b"one chunk and a byte \xff\xfe"), CHUNK_BYTES + 1),
        swarm.put("n" * 255, 1000),
    ]
    link, detour = swarm.box.export / "link", swarm.box.export / "directory"
    link.symlink_to(files[1].name)
    detour.symlink_to(".")
    asked = [*files, link, detour / files[4].name]
    real = [*files, files[1], files[4]]

    gets = {node: swarm.cluster.get(node, *asked, options=["-0"]) for node in swarm.box.nodes}

    for node, get in gets.items():
        assert get.wait(TRANSFER_S) == 0, get.stderr
        copies = [Path(name) for name in get.stdout.removesuffix("\0").split("\0")]
        for source, copy in zip(real, copies, strict=True):
            assert str(copy) == f"{node.disk}/cache/root{source}", get.stderr
            assert digest_of(copy) == swarm.digests[source][-1]
            assert copy.stat().st_mtime_ns == source.stat().st_mtime_ns


def test_what_cannot_be_read_is_named_and_the_other_paths_are_printed(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(1)
    (node,) = swarm.box.nodes
    good = swarm.put("good", 1000)
    missing, closed, fifo, device = (
        swarm.box.export / name for name in ("missing", "closed", "fifo", "device")
    )
    closed.mkdir(mode=0o700)
    os.mkfifo(fifo, 0o644)
    os.mknod(device, 0o644 | stat.S_IFCHR, os.makedev(1, 5))

    get = swarm.cluster.get(node, missing, closed / "file", fifo, good, device, uid=1001)

    assert get.wait(PATIENCE_S) == 1
    assert get.stdout == f"{node.disk}/cache/1001{good}\n"
    reasons = dict(
        zip((missing, closed / "file", fifo, device), get.stderr.splitlines(), strict=True)
    )
    assert all(str(path) in reason for path, reason in reasons.items())
    assert "No such file" in reasons[missing]
    assert "Permission denied" in reasons[closed / "file"]
    assert "neither a file nor a directory" in reasons[fifo]
    assert "neither a file nor a directory" in reasons[device]


# --- nodes that fail -----------------------------------------------------------------------------


def test_a_slot_is_free_soon_after_its_holder_was_killed_and_the_others_finish(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(4, slots_max=1, file_server_mbit=SLOW_MBIT)
    file = swarm.put("corpus", 16 * MIB)
    gets = swarm.get_everywhere(file)
    reader = swarm.wait_for_reader()
    watcher = next(node for node in swarm.box.nodes if node is not reader.node)

    reader.node.kill(swarm.cluster.daemons[reader.node.name])
    swarm.wait_for(
        watcher,
        lambda status: reader.lease_id not in leases_in(status).values(),
        "the end of a dead node's lease",
        timeout_s=5.0,
    )
    swarm.wait_for(watcher, leases_in, "a lease for another node")

    victim = swarm.box.nodes.index(reader.node)
    assert swarm.paths([gets.pop(victim)]) == [file]
    swarm.assert_all_cached(gets, file)
    assert swarm.box.file_server.readers_peak(file) == 1


def test_a_holder_that_was_stopped_for_longer_than_its_lease_does_not_read_on(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(4, slots_max=2, file_server_mbit=SLOW_MBIT)
    file = swarm.put("corpus", 24 * MIB)
    gets = swarm.get_everywhere(file)
    reader = swarm.wait_for_reader()
    watcher = next(node for node in swarm.box.nodes if node is not reader.node)
    daemon = swarm.cluster.daemons[reader.node.name]

    reader.node.stop(daemon)
    swarm.wait_for(
        watcher,
        lambda status: (
            len(leases_in(status)) == 2 and swarm.node_id(reader.node) not in leases_in(status)
        ),
        "two other nodes with leases",
    )
    reader.node.cont(daemon)

    # The stopped node made no progress for some seconds: it may well give up.
    swarm.assert_right([gets.pop(swarm.box.nodes.index(reader.node))], file)
    swarm.assert_all_cached(gets, file)
    assert swarm.box.file_server.readers_peak(file) <= 2


def test_a_killed_daemon_fetches_only_what_is_missing_when_it_is_back(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    file = swarm.put("corpus", 64 * MIB)
    holder, node = swarm.box.nodes
    swarm.assert_all_cached(swarm.get_everywhere(file, [holder]), file)

    interrupted = swarm.cluster.get(node, file)
    done_bytes = swarm.wait_for_done(node, 32 * MIB)
    node.kill(swarm.cluster.daemons[node.name])
    assert swarm.paths([interrupted]) == [file]
    swarm.cluster.start_daemons([node])
    swarm.wait_for_tracker([node])
    received_before = node.bytes_received()
    swarm.assert_all_cached(swarm.get_everywhere(file, [node]), file)

    missing_bytes = 64 * MIB - done_bytes + 2 * CHUNK_BYTES
    assert node.bytes_received() - received_before <= OVERHEAD * missing_bytes


def test_a_peer_that_sends_flipped_bits_is_found_out_and_not_asked_again(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(4, running=3)
    liar = swarm.box.nodes[3]
    honest = swarm.box.nodes[:3]
    swarm.cluster.start_daemons([liar], program=FLIPPING_DAEMON)
    swarm.wait_for_tracker([liar])
    first, second = swarm.put("first", 16 * MIB), swarm.put("second", 16 * MIB)

    gets = swarm.get_everywhere(first)
    swarm.assert_all_cached(gets, first)
    # Whoever had no need of the liar so far needs it for a file that nobody else has.
    for node in honest:
        file = swarm.put(f"for {node.name}", MIB)
        swarm.assert_all_cached(swarm.get_everywhere(file, [liar]), file)
        swarm.assert_all_cached(swarm.get_everywhere(file, [node]), file)

    for node in honest:
        swarm.wait_for(node, lambda status: distrusted(status) == [swarm.node_id(liar)], "distrust")
        assert swarm.node_id(liar) not in swarm.status(node)["node"]["received_bytes"]
        table = swarm.cluster.command(node, "status")
        assert table.wait(PATIENCE_S) == 0
        assert f"Not asked again, having sent wrong bytes: {swarm.node_id(liar)}" in table.stdout
    (corrupt,) = swarm.status(liar)["cluster"]["corrupt"]
    assert corrupt["node"] == swarm.node_id(liar)
    assert corrupt["reports"] >= 3  # one of each node and swarm in which it met the liar

    uploaded_bytes = swarm.status(liar)["node"]["uploaded_bytes"]
    swarm.assert_all_cached(swarm.get_everywhere(second), second)
    assert swarm.status(liar)["node"]["uploaded_bytes"] == uploaded_bytes


def distrusted(status: dict[str, object]) -> list[str]:
    """Peers that this node does not ask any more."""
    node = status["node"]
    assert isinstance(node, dict)
    return [peer["node"] for peer in node["peers"] if peer["distrusted"]]


def test_a_file_is_read_again_when_its_only_holder_sends_flipped_bits(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(3, running=2)
    liar = swarm.box.nodes[2]
    swarm.cluster.start_daemons([liar], program=FLIPPING_DAEMON)
    swarm.wait_for_tracker([liar])
    file = swarm.put("corpus", 8 * MIB)
    swarm.assert_all_cached(swarm.get_everywhere(file, [liar]), file)

    swarm.assert_all_cached(swarm.get_everywhere(file, swarm.box.nodes[:2]), file)


def test_nodes_that_are_cut_off_hold_up_nobody_and_finish_when_they_are_back(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(5)
    file = swarm.put("corpus", 64 * MIB)
    serving, downloading, *others = swarm.box.nodes
    swarm.assert_all_cached(swarm.get_everywhere(file, [serving, others[0]]), file)

    gets = {node: swarm.cluster.get(node, file) for node in [downloading, *others[1:]]}
    swarm.wait_for_done(downloading, 8 * MIB)
    for node in (serving, downloading):
        node.cut_off()
    swarm.assert_all_cached([gets[node] for node in others[1:]], file)
    for node in (serving, downloading):
        node.heal()

    begin_s = time.monotonic()
    swarm.assert_right([gets[downloading]], file)
    assert time.monotonic() - begin_s <= PATIENCE_S
    swarm.wait_for_tracker([downloading])
    swarm.assert_all_cached(swarm.get_everywhere(file, [downloading]), file)


def test_a_daemon_goes_on_when_it_has_a_file_whose_file_server_hangs(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(2)
    holder, node = swarm.box.nodes
    file = swarm.put("corpus", 8 * MIB)
    swarm.assert_all_cached([swarm.cluster.get(holder, file)], file)
    node.shape(up_mbit=None, down_mbit=SLOW_MBIT)
    get = swarm.cluster.get(node, file, options=["--timeout", "1"])
    assert swarm.paths([get]) == [file]  # nobody waits for the copy any more, which still comes
    node.run(["sh", "-c", "kill -STOP $(pidof sshfs)"])
    assert swarm.status(node)["node"]["downloads"]
    wait_until(
        lambda: not swarm.status(node)["node"]["downloads"], TRANSFER_S, "the copy to be complete"
    )


# Opens a file many times, stops the file server, and asks for what it has opened.
ASKS_FOR_WHAT_HANGS = """
import os, signal, socket, subprocess, sys
path, connections = sys.argv[1], []
fds = [os.open(path, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
subprocess.run(["sh", "-c", "kill -STOP $(pidof sshfs)"], check=True)
for fd in fds:
    connections.append(socket.socket(socket.AF_UNIX))
    connections[-1].connect(os.environ["SWARMCACHE_SOCKET"])
    socket.send_fds(connections[-1], [b'{"op": "get", "path": "L25mcy9m"}\\n'], [fd])
print("asked", file=sys.stderr, flush=True)
signal.pause()
"""


def test_who_waits_for_a_file_server_that_hangs_keeps_nobody_else_waiting(
    make_swarm: MakeSwarm,
) -> None:
    swarm = make_swarm(1)
    (node,) = swarm.box.nodes
    file, local = swarm.put("corpus", CHUNK_BYTES), node.disk / "local"
    local.write_bytes(b"of this machine")
    asking = node.start(
        [sys.executable, "-c", ASKS_FOR_WHAT_HANGS, file, str(2 * THREADS_PER_USER)],
        env={"SWARMCACHE_SOCKET": str(swarm.cluster.SOCKET)},
    )
    asking.wait_for_stderr("asked", PATIENCE_S)

    for uid in (0, 1001):
        (copy,) = swarm.paths([swarm.cluster.get(node, local, uid=uid)])
        assert copy != local
        assert copy.read_bytes() == b"of this machine"
    assert swarm.status(node)["node"]["tracker_connected"]


def test_what_only_a_node_had_that_is_cut_off_is_read_again(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(3)
    file = swarm.put("corpus", 8 * MIB)
    holder, *others = swarm.box.nodes
    swarm.assert_all_cached(swarm.get_everywhere(file, [holder]), file)
    holder.cut_off()

    swarm.assert_all_cached(swarm.get_everywhere(file, others), file)


# --- a tracker that fails ------------------------------------------------------------------------


def test_a_tracker_that_was_killed_in_mid_swarm_and_comes_back_costs_nothing_but_time(
    make_swarm: MakeSwarm,
) -> None:
    # The pause leaves little of the default, and a machine may be busy with other things.
    swarm = make_swarm(4, slots_max=2, file_server_mbit=SLOW_MBIT, stall_s=PATIENCE_S)
    file = swarm.put("corpus", 24 * MIB)
    gets = swarm.get_everywhere(file)
    swarm.wait_for_reader()

    assert swarm.cluster.tracker is not None
    swarm.box.head.kill(swarm.cluster.tracker)
    back_at_s = time.monotonic() + 3.0
    wait_until(lambda: time.monotonic() >= back_at_s, PATIENCE_S, "three seconds")
    assert all(get.returncode is None for get in gets), "the tracker was back too late"
    swarm.cluster.start_tracker()

    swarm.assert_all_cached(gets, file)
    assert swarm.box.file_server.readers_peak(file) <= 2


@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_node_alone_without_a_tracker_prints_the_original_path_in_time(
    make_swarm: MakeSwarm, fault: str
) -> None:
    """Where there are others, one of them stands in for the tracker: see test_lost_tracker.py."""
    swarm = make_swarm(1)
    file = swarm.put("corpus", 4 * MIB)
    assert swarm.cluster.tracker is not None
    if fault == "killed":
        swarm.box.head.kill(swarm.cluster.tracker)
    else:
        swarm.box.head.cut_off()

    begin_s = time.monotonic()
    gets = swarm.get_everywhere(file)
    assert swarm.paths(gets) == [file]
    assert time.monotonic() - begin_s <= STALL_S + STALL_GRACE_S
    for get in gets:
        assert "no progress for 5 s" in get.stderr
        assert "using the original path" in get.stderr
    assert swarm.box.file_server.bytes_read() == 0


# --- a source that changes -----------------------------------------------------------------------


@pytest.mark.parametrize("change", ["replaced", "replaced by a longer one", "appended to"])
def test_a_source_that_changes_in_mid_swarm_gives_no_mixed_and_no_stale_bytes(
    make_swarm: MakeSwarm, change: str
) -> None:
    swarm = make_swarm(3, file_server_mbit=SLOW_MBIT)
    file = swarm.put("corpus", 16 * MIB)
    gets = swarm.get_everywhere(file)
    # Who has all of it may have looked at the source for the last time.
    assert swarm.wait_for_done(swarm.box.nodes[0], 4 * MIB) < 12 * MIB, "the change comes too late"

    if change == "replaced":
        swarm.put("corpus", 16 * MIB)
    elif change == "replaced by a longer one":
        swarm.put("corpus", 17 * MIB)
    else:
        swarm.append(file, MIB)
    assert all(get.returncode is None for get in gets), "the change came too late"

    swarm.assert_right(gets, file)
    swarm.assert_all_cached(swarm.get_everywhere(file), file)


# --- strangers -----------------------------------------------------------------------------------


def test_a_stranger_with_another_secret_gets_nothing_and_is_not_listed(
    make_swarm: MakeSwarm, tmp_path: Path
) -> None:
    swarm = make_swarm(3, running=2)
    *friends, stranger = swarm.box.nodes
    file = swarm.put("corpus", 8 * MIB)
    swarm.assert_all_cached(swarm.get_everywhere(file, friends), file)

    own_secret = tmp_path / "another_secret"
    own_secret.touch(mode=0o600)
    own_secret.write_text("0123456789abcdef0123456789abcdef\n")
    sent_before = sum(friend.bytes_sent() for friend in friends)
    swarm.cluster.secret_file = own_secret
    (daemon,) = swarm.cluster.start_daemons([stranger])
    assert swarm.paths([swarm.cluster.get(stranger, file)]) == [file]

    assert not swarm.status(stranger)["node"]["tracker_connected"]
    assert "does not know the cluster's secret" in daemon.stderr
    assert swarm.cluster.tracker is not None
    refusals = swarm.cluster.tracker.stderr
    assert stranger.address in refusals and "Traceback" not in refusals
    listed = [node["node"] for node in swarm.status(friends[0])["cluster"]["nodes"]]
    assert sorted(listed) == sorted(map(swarm.node_id, friends))
    assert sum(friend.bytes_sent() for friend in friends) - sent_before < CHUNK_BYTES


@pytest.mark.parametrize(
    ("server", "option"), [("daemon", "--listen"), ("tracker", "--listen"), ("daemon", "--tracker")]
)
def test_without_a_secret_a_server_keeps_to_its_own_machine(
    make_swarm: MakeSwarm, server: str, option: str
) -> None:
    swarm = make_swarm(1, running=0)
    (node,) = swarm.box.nodes
    directory = {"daemon": "--cache-dir", "tracker": "--state-dir"}[server]

    refused = swarm.cluster.command(
        node, server, option, f"{node.address}:7391", directory, node.disk / "own"
    )

    assert refused.wait(PATIENCE_S) == 2
    assert f"option {option}: " in refused.stderr
    assert "expected a loopback address, since cluster.secret_file is not set" in refused.stderr
