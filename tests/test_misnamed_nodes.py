"""What nodes of a cluster do with one whose advertised address is none."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from swarmcache.auth import ClusterKey, Keyring
from swarmcache.chunks import ChunkLayout, FileVersion, choose_chunk_size
from swarmcache.link import client_session, connect
from swarmcache.messages import (
    Have,
    NodeAddress,
    Peers,
    Register,
    Replicas,
    decode_between_nodes,
    decode_from_tracker,
    encode,
)
from swarmcache.quantities import HostPort
from tests.local_daemons import EndedEarly, LocalDaemons, LocalNode

KEY = Keyring([ClusterKey.from_secret(None, "default")])
NOWHERE = NodeAddress("no address", 1, "nowhere")
IDENTITY = msgspec.msgpack.encode(NOWHERE)
DEADLINE_S = 30.0


def everything_of(file: Path) -> Have:
    """What a node tells that has all of a file."""
    status = file.stat()
    version = FileVersion(bytes(file), status.st_size, status.st_mtime_ns)
    layout = ChunkLayout(status.st_size, choose_chunk_size(status.st_size))
    data = file.read_bytes()
    chunks = list(range(layout.chunk_count))
    digests = [
        blake3(data[layout.offset_bytes(chunk) :][: layout.length_bytes(chunk)]).digest()
        for chunk in chunks
    ]
    return Have(version.version_id, chunks, b"".join(digests), complete=True)


async def get_with_help(local: LocalDaemons, node: LocalNode, files: list[Path]) -> None:
    """``get``, while a node that nobody can reach says that it has all of the files."""
    haves = [everything_of(file) for file in files]
    assert local.tracker is not None
    async with client_session() as session:
        tracker = await connect(
            session, HostPort.parse(local.tracker.address), KEY, "tracker", IDENTITY
        )
        peer = await connect(session, HostPort.parse(node.address), KEY, "peer", IDENTITY)
        registered = asyncio.Event()

        def say(version_id: bytes) -> None:
            for have in haves:
                if have.version_id == version_id:
                    peer.send(encode(have))

        def introduced(data: bytes) -> None:
            registered.set()
            message = decode_from_tracker(data)
            if isinstance(message, Peers):
                say(message.version_id)

        def greeted(data: bytes) -> None:
            message = decode_between_nodes(data)
            if isinstance(message, Have):
                say(message.version_id)

        talks = [
            asyncio.create_task(link.receive(take))
            for link, take in ((tracker, introduced), (peer, greeted))
        ]
        tracker.send(encode(Register(NOWHERE, 0.0)))
        tracker.send(encode(Replicas([have.version_id for have in haves])))
        try:
            async with asyncio.timeout(DEADLINE_S):
                await registered.wait()
                await asyncio.to_thread(node.run, "get", *files)
        finally:
            for link in (tracker, peer):
                await link.wait_closed()
            await asyncio.gather(*talks, return_exceptions=True)


@pytest.mark.slow
def test_a_node_that_cannot_be_reached_keeps_nobody_from_asking_others(
    tmp_path: Path,
) -> None:
    files = [tmp_path / name for name in ("p", "q", "r", "s", "t")]
    other = tmp_path / "other"
    for file in [*files, other]:
        file.write_bytes(bytes(file) * 50_000)
    settings = f'[file_servers.fs]\npaths = ["{tmp_path}"]\n'
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node, holder = local.start_daemon("a", settings), local.start_daemon("b", settings)
        holder.get(other)

        asyncio.run(get_with_help(local, node, files))
        (copy,) = node.get(other)

        assert Path(os.fsdecode(copy)).read_bytes() == other.read_bytes()
        assert [*node.status()["node"]["received_bytes"]] == [holder.address]
        assert "from no address: not an address: 'no address'" in node.said()
        assert "Traceback" not in node.said()


async def run_with_holder(
    local: LocalDaemons, node: LocalNode, file: Path, *arguments: str | Path
) -> subprocess.CompletedProcess[bytes]:
    """A command, while the tracker says that a node without any name holds the file."""
    assert local.tracker is not None
    nameless = NodeAddress("no address", 1)
    async with client_session() as session:
        tracker = await connect(
            session,
            HostPort.parse(local.tracker.address),
            KEY,
            "tracker",
            msgspec.msgpack.encode(nameless),
        )
        registered = asyncio.Event()
        talk = asyncio.create_task(tracker.receive(lambda _: registered.set()))
        tracker.send(encode(Register(nameless, 0.0)))
        tracker.send(encode(Replicas([everything_of(file).version_id])))
        try:
            async with asyncio.timeout(DEADLINE_S):
                await registered.wait()
                return await asyncio.to_thread(node.run, *arguments)
        finally:
            await tracker.wait_closed()
            await asyncio.gather(talk, return_exceptions=True)


@pytest.mark.slow
def test_locate_names_a_node_that_cannot_be_reached_and_lists_the_others(tmp_path: Path) -> None:
    file = tmp_path / "corpus"
    file.write_bytes(b"bytes")
    settings = f'[file_servers.fs]\npaths = ["{tmp_path}"]\n'
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        node = local.start_daemon("a", settings)
        (copy,) = node.get(file)

        done = asyncio.run(run_with_holder(local, node, file, "locate", file))

        assert copy in done.stdout
        assert b"no address (no address): not an address: 'no address'" in done.stderr
        assert done.returncode == 0


@pytest.mark.slow
def test_a_name_that_is_too_long_for_the_gossip_is_refused_at_the_start(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret of this cluster")
    secret.chmod(0o600)
    name = ".".join(["name"] * 30)
    settings = (
        f'cluster.secret_file = "{secret}"\ndaemon.advertise = "{name}:7381"\n'
        'gossip.rate_max = "{}"\n'
    )
    with LocalDaemons(tmp_path) as local:
        with pytest.raises(EndedEarly) as refused:
            local.start_daemon("a", settings.format("13500"))
        local.start_daemon("b", settings.format("off"))

    assert f'daemon.advertise = "{name}:7381": expected at most 128 bytes' in str(refused.value)
    assert "Traceback" not in str(refused.value)
