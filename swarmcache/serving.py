"""What the two servers, tracker and daemon, start and end with."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from swarmcache.auth import ClusterKey, Keyring
from swarmcache.config import Config, load_secrets
from swarmcache.errors import ConfigError
from swarmcache.quantities import HostPort

log = logging.getLogger(__name__)


def cluster_keys(config: Config) -> list[ClusterKey]:
    """The keys of the configured secrets, in their order. Raises ConfigError."""
    file = config.cluster.secret_file
    secrets = [None] if file is None else load_secrets(file)
    return [ClusterKey.from_secret(secret, config.cluster.label) for secret in secrets]


def reread_on_hangup(
    config: Config, keyring: Keyring, on_change: Callable[[], None] = lambda: None
) -> None:
    """From now on SIGHUP makes this process read its secret file again; if it has none, SIGHUP ends
    it, as ever. A file that is no good changes nothing. ``on_change`` is called when
    it has changed something."""
    file = config.cluster.secret_file
    if file is None:
        return

    def reread() -> None:
        try:
            keyring.replace(cluster_keys(config))
        except ConfigError as error:
            log.error("the former secrets stay in use: %s", error)
        else:
            log.warning("read %s again: %r", file, keyring)
            on_change()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)


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


def bind_datagrams(listener: socket.socket) -> socket.socket:
    """A UDP socket at the address of a listening socket. Raises OSError."""
    sock = socket.socket(listener.family, socket.SOCK_DGRAM)
    try:
        sock.bind(listener.getsockname())
    except OSError:
        sock.close()
        raise
    return sock


def software_version() -> str:
    """Of this swarmcache; empty when it runs from a directory of sources."""
    try:
        return version("swarmcache")
    except PackageNotFoundError:
        return ""


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
