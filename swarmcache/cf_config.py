"""The settings file of CacheManager's client, ``~/.cmclient``, as far as it still means something.

    # a comment
    MASTER_HOST = "cluster-cn-1"
    CACHE_DIR = "/var/tmp/$(USER)"
    MIN_FREE = 100 * 1024 * 1024

``CACHE_DIR`` says where ``cf -d`` puts the files that a job writes, ``IGNORE_BUNDLE`` that a
``*.bundle`` is a file like any other. The rest was about things that are the daemon's now. The
file is never evaluated; a line that makes no sense is named, and the others count all the same.
"""

from __future__ import annotations

import os
import pwd
import stat

from swarmcache.local_socket import reason_of

FILE_NAME = b".cmclient"
FILE_BYTES_MAX = 64 * 1024

CACHE_DIR_KEYS = ("CACHE_DIR", "CACHE_DIR_I6", "CACHE_DIR_CLUSTER")
WITHOUT_MEANING = {
    "MASTER_HOST",
    "MASTER_HOST_I6",
    "MASTER_HOST_CLUSTER",
    "MASTER_PORT",
    "MAX_USAGE",
    "MIN_AGE",
    "MIN_FREE",
    "SLOW_COPY",
    "SOCKET_TIMEOUT",
    "STAT_TIMEOUT",
}
# The old client called these hosts the cluster, and all others I6.
CLUSTER_HOST_STARTS = ("cluster-cn", "cn-")


class CfConfig:
    """What the file says. ``cache_dir``: None where it says nothing. ``remarks``: for stderr."""

    __slots__ = ("cache_dir", "ignore_bundle", "remarks")

    def __init__(self) -> None:
        self.cache_dir: str | None = None
        self.ignore_bundle = False
        self.remarks: list[str] = []


def read_config(named: str | None) -> CfConfig:
    """Read the file that the caller named, else the user's own. Raises nothing."""
    config = CfConfig()
    file = os.fsencode(named) if named is not None else _default_file()
    if file is None:
        return config
    shown = os.fsdecode(file)
    try:
        text = _read(file)
    except FileNotFoundError:
        if named is not None:
            config.remarks.append(
                f"ERROR: cannot read config file {shown}. using build-in defaults"
            )
    except (OSError, ValueError) as error:
        config.remarks.append(
            f"ERROR: cannot read config file {shown}: {reason_of(error)}. using build-in defaults"
        )
    else:
        _read_lines(config, text, shown)
    return config


def _default_file() -> bytes | None:
    home = os.environb.get(b"HOME", b"")
    if not home.startswith(b"/"):
        try:
            home = os.fsencode(pwd.getpwuid(os.getuid()).pw_dir)
        except KeyError:  # a user that this machine does not know, as in some containers
            return None
    return home + b"/" + FILE_NAME


def _read(file: bytes) -> str:
    """The text of a regular file. Raises OSError, ValueError."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a FIFO
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a regular file")
        content = os.read(fd, FILE_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"longer than {FILE_BYTES_MAX} bytes")
    return os.fsdecode(content)


def _read_lines(config: CfConfig, text: str, shown: str) -> None:
    directories: dict[str, str] = {}
    useless: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not key or key.startswith("#"):
            continue
        try:
            if not equals:
                raise ValueError("expected KEY = value")
            if key in CACHE_DIR_KEYS:
                directories[key] = _directory(value)
            elif key == "IGNORE_BUNDLE":
                config.ignore_bundle = _truth(value)
            elif key not in WITHOUT_MEANING:
                raise ValueError(f"there is no {key}")
            elif key not in useless:
                useless.append(key)
        except ValueError as error:
            config.remarks.append(f"ERROR: {shown}, line {number}: {error}")
    config.cache_dir = _chosen(directories)
    if useless:
        config.remarks.append(
            f"WARN: {shown}: no meaning any more, see the daemon's settings: {', '.join(useless)}"
        )


def _text(value: str) -> str:
    """A text in quotes, or without. Raises ValueError."""
    if value[:1] in ("'", '"'):
        end = value.find(value[0], 1)
        after = value[end + 1 :].lstrip()
        if end < 0 or (after and not after.startswith("#")):
            raise ValueError(f"expected one text in quotes, not {value}")
        return value[1:end]
    return value


def _directory(value: str) -> str:
    """An absolute path, ``$(HOST)`` and ``$(USER)`` filled in. Raises ValueError."""
    path = _text(value).replace("$(HOST)", _host_name()).replace("$(USER)", _user_name())
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f'expected an absolute path such as "/var/tmp/$(USER)", not {value}')
    return path


def _truth(value: str) -> bool:
    text = _text(value)
    if text not in ("True", "False", "1", "0"):
        raise ValueError(f"expected True or False, not {value}")
    return text in ("True", "1")


def _chosen(directories: dict[str, str]) -> str | None:
    """The cache directory for this host: the special one before the general one."""
    on_cluster = _host_name().startswith(CLUSTER_HOST_STARTS)
    special = directories.get("CACHE_DIR_CLUSTER" if on_cluster else "CACHE_DIR_I6")
    return special or directories.get("CACHE_DIR")


def _host_name() -> str:
    return os.uname().nodename.partition(".")[0]


def _user_name() -> str:
    """The name that the system knows, since job systems clear ``USER``."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
