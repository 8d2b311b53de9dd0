"""Where things are when no setting says otherwise.

Standard library only, and little of that: the client reads these rules on every cache hit.

root's daemon serves the whole machine from the usual system directories. Anybody else's daemon
lives in ``/var/tmp/swarmcache-UID``: on the node's own disk, kept across reboots, writable without
any set-up, and found without ``HOME`` or any other environment variable.
"""

from __future__ import annotations

SYSTEM_SOCKET = "/run/swarmcache/daemon.sock"
SYSTEM_CONFIG = "/etc/swarmcache/config.toml"
# In a user's directory of the cache: the lists that a ``get`` of bundles has printed.
RESULTS_DIRECTORY = ".swarmcache-bundles"
# In a user's directory of the cache: files that jobs write, for ``cf -cp`` to bring away.
OUTPUTS_DIRECTORY = ".swarmcache-outputs"


def default_socket_candidates(uid: int) -> list[str]:
    """Sockets to try in this order: the user's own daemon's, then the machine's.

    The first one is also where a daemon of that user listens. Whoever connects must trust only a
    directory that the user or root owns.
    """
    if uid == 0:
        return [SYSTEM_SOCKET]
    return [f"{_user_dir(uid)}/daemon.sock", SYSTEM_SOCKET]


def default_cache_dir(uid: int) -> str:
    """The directory that holds the cached files."""
    return "/var/cache/swarmcache" if uid == 0 else f"{_user_dir(uid)}/cache"


def default_state_dir(uid: int) -> str:
    """The directory for what the tracker keeps across restarts."""
    return "/var/lib/swarmcache" if uid == 0 else f"{_user_dir(uid)}/tracker"


def default_output_dir(uid: int) -> str:
    """The directory for files that a job writes and ``cf -cp`` brings to a file server."""
    return f"{_user_dir(uid)}/outputs"


def _user_dir(uid: int) -> str:
    return f"/var/tmp/swarmcache-{uid}"  # noqa: S108 (its owner is checked before it is used)
