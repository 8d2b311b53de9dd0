"""What the two servers, tracker and daemon, start and end with."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys

from swarmcache.auth import ClusterKey
from swarmcache.config import Config, load_secret
from swarmcache.quantities import HostPort


def cluster_key(config: Config) -> ClusterKey:
    """The key of the configured secret. Raises ConfigError."""
    file = config.cluster.secret_file
    return ClusterKey.from_secret(None if file is None else load_secret(file))


def allow_many_descriptors() -> None:
    """Raise the limit of open files to what the system allows: a connection is a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bind(address: HostPort) -> socket.socket:
    """A listening socket on the first address that the name stands for. Raises OSError."""
    found = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, where = found[0]
    return socket.create_server(where[:2], family=family, backlog=4096)


def say_ready(server: str, address: HostPort) -> None:
    """Tell whoever started the server that it serves."""
    print(f"swarmcache {server} ready on {address}", file=sys.stderr, flush=True)


def told_to_end() -> asyncio.Event:
    """From now on SIGTERM and SIGINT set this event instead of ending the process at once."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    return told
