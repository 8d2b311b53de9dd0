"""The settings: where they come from, what they may be, and what they mean, with units.

A setting is looked for in the options of the command line, then in the environment
(``SWARMCACHE_CACHE__MIN_FREE`` is ``cache.min_free``), then in one TOML file: ``--config``,
``SWARMCACHE_CONFIG``, ``~/.config/swarmcache/config.toml``, ``/etc/swarmcache/config.toml``, the
first that is there. What no place mentions has its default. Nothing here needs any environment
variable: without ``HOME`` the password database tells the home directory.

Each field below names its type, its unit and the function that reads it. This is the only module
that reads settings; everybody else is handed a ``Config``.

Invariant: a ``Config`` that ``load`` returned is complete and in range, and without a secret it has
loopback addresses only.
"""

from __future__ import annotations

import difflib
import os
import pwd
import re
import shlex
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec
from msgspec import Struct, field

from swarmcache.chunks import CHUNK_SIZE_MAX_BYTES, CHUNK_SIZE_MIN_BYTES
from swarmcache.errors import ConfigError
from swarmcache.locations import (
    SYSTEM_CONFIG,
    default_cache_dir,
    default_socket_candidates,
    default_state_dir,
)
from swarmcache.quantities import (
    DiskLimit,
    HostPort,
    format_size,
    parse_count,
    parse_duration,
    parse_duration_above_zero,
    parse_rate,
    parse_size,
    parse_truth,
)

__all__ = [
    "CacheSettings",
    "CfSettings",
    "ClusterSettings",
    "Config",
    "DaemonSettings",
    "DiskLimit",
    "FileServerSettings",
    "GetSettings",
    "GossipSettings",
    "HostPort",
    "TrackerSettings",
    "TransferSettings",
    "load",
    "load_secrets",
]

ENVIRONMENT_PREFIX = "SWARMCACHE_"
SECRET_MIN_BYTES = 16
SECRETS_MAX_BYTES = 4096  # of the whole file
SECRETS_MAX = 4  # the one in use, its successor, and what was forgotten in there
LABEL_MAX_BYTES = 255
RACK_MAX_BYTES = 64
GOSSIP_RATE_MIN_BYTES_PER_S = 2000  # somebody is asked every second, and answers are due
CONFIG_FILE_MAX_BYTES = 1 << 20
CURRENT_DIR = Path()  # looked up only where a relative path needs it: a job may have lost its own
SOCKET_PATH_MAX_BYTES = 107  # sun_path has 108 bytes, one of them for the NUL: unix(7)


# --- reading one value ---------------------------------------------------------------------------
# As in ``quantities``: each function raises ValueError, whose text says what was expected.

Value = TypeVar("Value")


def parse_chunk_size(value: object) -> int:
    """Bytes: a power of two that every chunk but the last of a file has. Raises ValueError."""
    limits = f"{format_size(CHUNK_SIZE_MIN_BYTES)} to {format_size(CHUNK_SIZE_MAX_BYTES)}"
    expected = f'"auto" or a power of two from {limits}'
    try:
        size_bytes = parse_size(value)
    except ValueError as error:
        raise ValueError(expected) from error
    in_range = CHUNK_SIZE_MIN_BYTES <= size_bytes <= CHUNK_SIZE_MAX_BYTES
    if not in_range or size_bytes.bit_count() != 1:
        raise ValueError(expected)
    return size_bytes


def parse_max_age(value: object) -> float | None:
    """Seconds; None for "none" and for 0. Raises ValueError."""
    try:
        return None if value == "none" else parse_duration(value) or None
    except ValueError as error:
        raise ValueError(f'{error}, or "none"') from error


def parse_label(value: object) -> str:
    """A name of a cluster. Raises ValueError."""
    if not isinstance(value, str) or not 0 < len(value.encode()) <= LABEL_MAX_BYTES:
        raise ValueError(f"a name of at most {LABEL_MAX_BYTES} bytes")
    return value


def parse_rack(value: object) -> str:
    """A label of a place. Raises ValueError."""
    if not isinstance(value, str) or len(value.encode()) > RACK_MAX_BYTES:
        raise ValueError(f"a label of at most {RACK_MAX_BYTES} bytes")
    return value


def parse_gossip_rate(value: object) -> float:
    """Bytes per second. Raises ValueError."""
    try:
        rate_bytes_per_s = parse_rate(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "off"') from error
    if rate_bytes_per_s < GOSSIP_RATE_MIN_BYTES_PER_S:
        raise ValueError(f'{GOSSIP_RATE_MIN_BYTES_PER_S} bytes per second or more, or "off"')
    return rate_bytes_per_s


def parse_path(value: object) -> Path:
    """A path, possibly relative to the place that mentions it. Raises ValueError."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError("a path")
    return Path(value)


def parse_paths(value: object) -> tuple[Path, ...]:
    """One path or a list of different paths. Raises ValueError."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        paths = tuple(parse_path(each) for each in values)
    except ValueError as error:
        raise ValueError("a path or a list of paths") from error
    if not paths or len(set(paths)) < len(paths):
        raise ValueError("a path or a list of different paths")
    return paths


def parse_prefixes(value: object) -> tuple[Path, ...]:
    """Path prefixes of a file server: absolute, without ``..``. Raises ValueError."""
    prefixes = parse_paths(value)
    if not all(prefix.is_absolute() and ".." not in prefix.parts for prefix in prefixes):
        raise ValueError('absolute paths without "..", such as ["/work"]')
    return prefixes


def _or_none(parse: Callable[[object], Value], word: str) -> Callable[[object], Value | None]:
    """The same setting, or ``word`` for none of it."""
    return lambda value: None if value == word else parse(value)


# --- the settings --------------------------------------------------------------------------------
# The name of a field is the key in the file plus its unit; ``field(name=...)`` is the key.


class Settings(Struct, frozen=True):
    """Base of the tables of the file. Fields without a default depend on the user."""


class ClusterSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all nodes must agree on. Clusters with different labels never mix."""

    label: Annotated[str, parse_label] = "default"
    tracker: Annotated[HostPort, HostPort.parse] = HostPort("127.0.0.1", 7380)
    secret_file: Annotated[Path | None, _or_none(parse_path, "none")] = None


class TrackerSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tracker: the address that it listens on, what it keeps across restarts, and how often it
    logs what has happened. ``metrics``: where figures can be asked for."""

    listen: Annotated[HostPort, HostPort.parse] = HostPort("127.0.0.1", 7380)
    metrics: Annotated[HostPort | None, _or_none(HostPort.parse, "none")] = None
    state_dir: Annotated[Path, parse_path]
    statistics_interval_s: Annotated[float | None, _or_none(parse_duration_above_zero, "none")] = (
        field(name="statistics_interval", default=600.0)
    )


class DaemonSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node daemon. ``advertise`` is what others are told; None: the address of ``listen``.
    ``rack``: where it stands; nodes with the same one are near one another. ``metrics``: where
    figures can be asked for."""

    listen: Annotated[HostPort, HostPort.parse] = HostPort("127.0.0.1", 7381)
    advertise: Annotated[HostPort | None, _or_none(HostPort.parse, "none")] = None
    rack: Annotated[str, parse_rack] = ""
    metrics: Annotated[HostPort | None, _or_none(HostPort.parse, "none")] = None
    socket: Annotated[Path, parse_path]

    @property
    def told(self) -> HostPort:
        """The address that other nodes are told. Raises ConfigError where it is nobody's."""
        address = self.advertise or self.listen
        if address.is_unspecified:
            name = "advertise" if self.advertise else "listen"
            raise ConfigError(
                f'daemon.{name} = "{address}" stands for all addresses of this node: expected '
                "daemon.advertise (--advertise HOST:PORT), at which other nodes reach it"
            )
        return address


class CacheSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cache directories and how much of their disks they may take."""

    dirs: Annotated[tuple[Path, ...], parse_paths] = field(name="dir")
    min_free: Annotated[DiskLimit, DiskLimit.parse] = DiskLimit(None, 5.0)
    max_usage: Annotated[DiskLimit, DiskLimit.parse] = DiskLimit(None, 50.0)
    min_age_s: Annotated[float, parse_duration] = field(name="min_age", default=3600.0)
    max_age_s: Annotated[float | None, parse_max_age] = field(name="max_age", default=14 * 86400.0)
    # 5 % of what a spinning disk reads, and 2 TB in three days. HDFS began with the same rate per
    # node, and takes 1 MiB/s per disk since HDFS-7430, for disks that are not emptied every week.
    scrub_rate_bytes_per_s: Annotated[int | None, _or_none(parse_rate, "none")] = field(
        name="scrub_rate", default=8 << 20
    )


class FileServerSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file server. ``paths`` name it by prefix where its mount source is of no use."""

    slots_max: Annotated[int, parse_count] = 8
    paths: Annotated[tuple[Path, ...], parse_prefixes] = ()


class TransferSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Traffic between nodes. None: no limit; for the chunk size: chosen by the size of the file."""

    uploads_max: Annotated[int, parse_count] = 4
    peers_max: Annotated[int, parse_count] = 40
    upload_rate_max_bytes_per_s: Annotated[int | None, _or_none(parse_rate, "none")] = field(
        name="upload_rate_max", default=None
    )
    download_rate_max_bytes_per_s: Annotated[int | None, _or_none(parse_rate, "none")] = field(
        name="download_rate_max", default=None
    )
    chunk_size_bytes: Annotated[int | None, _or_none(parse_chunk_size, "auto")] = field(
        name="chunk_size", default=None
    )


class GossipSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What nodes tell one another of themselves. None: they do not."""

    rate_max_bytes_per_s: Annotated[float | None, _or_none(parse_gossip_rate, "off")] = field(
        name="rate_max", default=13_500.0
    )


class GetSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``get``: after so long without any progress it prints the original path."""

    stall_s: Annotated[float, parse_duration_above_zero] = field(name="stall", default=5.0)


class CfSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``cf``: with ``strict`` it exits 3 where a path is not a cached one."""

    strict: Annotated[bool, parse_truth] = False


class Config(Struct, frozen=True, kw_only=True):
    """All settings. ``file`` is the file that was read, None if there was none.

    ``file_servers`` always has the entry "default".
    """

    cluster: ClusterSettings
    tracker: TrackerSettings
    daemon: DaemonSettings
    cache: CacheSettings
    file_servers: dict[str, FileServerSettings]
    transfer: TransferSettings
    gossip: GossipSettings
    get: GetSettings
    cf: CfSettings
    file: Path | None = None

    def slots_max(self, file_server: str) -> int:
        """How many nodes may transfer with this file server at once."""
        return self.file_servers.get(file_server, self.file_servers["default"]).slots_max

    def slots_table(self) -> dict[str, int]:
        """The same for all that have a setting of their own, and for all others: ``default``."""
        return {name: server.slots_max for name, server in self.file_servers.items()}

    def file_server_for_path(self, path: bytes) -> str | None:
        """The file server that is configured for the longest prefix of ``path``, if any.

        ``path`` is a real path. Only whole components count: "/work" is no prefix of "/works".
        """
        longest, found = -1, None
        for name, settings in self.file_servers.items():
            for prefix in settings.paths:
                directory = os.fsencode(prefix).rstrip(b"/")
                if (path + b"/").startswith(directory + b"/") and len(directory) > longest:
                    longest, found = len(directory), name
        return found


SECTIONS: dict[str, type[Settings]] = {
    "cluster": ClusterSettings,
    "tracker": TrackerSettings,
    "daemon": DaemonSettings,
    "cache": CacheSettings,
    "file_servers": FileServerSettings,
    "transfer": TransferSettings,
    "gossip": GossipSettings,
    "get": GetSettings,
    "cf": CfSettings,
}
# (section, setting), or ("file_servers", file server, setting)
Key = tuple[str, ...]

# The settings that have an option of their own; whoever calls ``load`` may give any other.
OPTION_NAMES: dict[Key, str] = {
    ("cluster", "tracker"): "--tracker",
    ("cluster", "secret_file"): "--secret-file",
    ("tracker", "listen"): "--listen",
    ("tracker", "state_dir"): "--state-dir",
    ("daemon", "listen"): "--listen",
    ("daemon", "advertise"): "--advertise",
    ("daemon", "socket"): "--socket",
    ("cache", "dir"): "--cache-dir",
}


@dataclass(frozen=True, slots=True)
class Given:
    """A value as found. ``place`` is for people; relative paths start at ``base``."""

    value: object
    place: str
    base: Path


# --- finding them --------------------------------------------------------------------------------


def load(
    options: Mapping[str, object],
    environ: Mapping[str, str],
    config_file: Path | None = None,
    uid: int | None = None,
) -> Config:
    """All settings from all places.

    ``options`` are dotted keys ("cache.min_free"); those that are None were not given.
    ``config_file`` is what ``--config`` said; ``/dev/null`` stands for no file. ``uid`` is the user
    whose defaults apply, by default the one of this process. Raises ConfigError.
    """
    uid = os.getuid() if uid is None else uid
    home = _home_dir(environ, uid)
    file = _find_file(environ, config_file, home)
    given = {
        **_defaults_given(uid),
        **(_file_given(file) if file else {}),
        **_environment_given(environ),
        **_options_given(options),
    }
    values = {key: _read_value(key, found, home) for key, found in given.items()}
    config = Config(
        **{name: _section(name, values) for name in SECTIONS if name != "file_servers"},
        file_servers=_file_servers(values),
        file=file,
    )
    _check(config, given)
    return config


def load_secrets(path: Path, uid: int | None = None) -> list[bytes]:
    """The cluster's secrets, one a line, without the white space around them; at least 16 bytes
    each. The first one is spoken with, the others are accepted as well.

    The file must belong to ``uid`` (by default the user of this process) or root, and be readable
    by nobody else. Raises ConfigError, whose text says what to run.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_secret_file(path, os.fstat(descriptor), os.getuid() if uid is None else uid)
            content = os.read(descriptor, SECRETS_MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the secret: {error.strerror}") from error
    if len(content) > SECRETS_MAX_BYTES:
        raise ConfigError(f"{path}: longer than {SECRETS_MAX_BYTES} bytes")
    secrets = [line.strip() for line in content.split(b"\n") if line.strip()]
    if len(secrets) > SECRETS_MAX:
        raise ConfigError(f"{path}: more than {SECRETS_MAX} secrets, each in a line of its own")
    shortest_bytes = min(map(len, secrets), default=0)
    if shortest_bytes < SECRET_MIN_BYTES:
        raise ConfigError(
            f"{path}: a secret of {shortest_bytes} bytes, expected {SECRET_MIN_BYTES} or more; "
            f"run: (umask 077; head -c 32 /dev/urandom | base64 > {shlex.quote(str(path))})"
        )
    return secrets


def _check_secret_file(path: Path, status: os.stat_result, uid: int) -> None:
    name = shlex.quote(str(path))
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: the secret must be in a regular file")
    if status.st_uid not in (uid, 0):
        raise ConfigError(
            f"{path}: the secret belongs to uid {status.st_uid}, expected {uid} or root; "
            f"run: chown {uid} {name}"
        )
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path}: the secret is open to others (mode {status.st_mode & 0o777:03o}); "
            f"run: chmod 600 {name}"
        )


def _home_dir(environ: Mapping[str, str], uid: int) -> Path | None:
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        try:
            home = pwd.getpwuid(uid).pw_dir
        except KeyError:  # a user that this machine does not know, as in some containers
            return None
    return Path(home)


def _find_file(environ: Mapping[str, str], asked: Path | None, home: Path | None) -> Path | None:
    if asked is None and environ.get("SWARMCACHE_CONFIG"):
        asked = Path(environ["SWARMCACHE_CONFIG"])
    if asked is not None:
        return asked
    candidates = [home / ".config/swarmcache/config.toml"] if home else []
    # A home directory that cannot be searched (root squash, stale mount) has no configuration.
    return next((f for f in [*candidates, Path(SYSTEM_CONFIG)] if os.path.exists(f)), None)


def _defaults_given(uid: int) -> dict[Key, Given]:
    defaults = {
        ("daemon", "socket"): default_socket_candidates(uid)[0],
        ("cache", "dir"): default_cache_dir(uid),
        ("tracker", "state_dir"): default_state_dir(uid),
    }
    return {key: Given(value, "default", Path("/")) for key, value in defaults.items()}


def _file_given(file: Path) -> dict[Key, Given]:
    try:
        with open(file, "rb") as opened:
            data = opened.read(CONFIG_FILE_MAX_BYTES + 1)
        if len(data) > CONFIG_FILE_MAX_BYTES:
            raise ConfigError(f"{file}: longer than {format_size(CONFIG_FILE_MAX_BYTES)}")
        tables = tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the settings: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{file}: expected TOML: {error}") from error
    base = Path(os.path.abspath(file)).parent
    return {key: Given(value, str(file), base) for key, value in _flatten(tables, str(file))}


def _flatten(tables: Mapping[str, Any], place: str) -> Iterator[tuple[Key, object]]:
    for section, table in tables.items():
        if section not in SECTIONS:
            raise _unknown((section,), place)
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: {section} = {_show(table)}: expected a table [{section}]")
        for name, value in table.items():
            if section != "file_servers":
                yield (section, name), value
            elif isinstance(value, dict):
                yield from (((section, name, setting), each) for setting, each in value.items())
            else:
                raise ConfigError(
                    f"{place}: {_spell((section, name))} = {_show(value)}: "
                    f"expected a table [{_spell((section, name))}]"
                )


def _environment_given(environ: Mapping[str, str]) -> dict[Key, Given]:
    """Settings from the environment. An empty variable is as good as none."""
    found = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not text:
            continue
        if variable in ("SWARMCACHE_CONFIG", "SWARMCACHE_SOCKET"):
            continue
        place = f"environment variable {variable}"
        names = variable.removeprefix(ENVIRONMENT_PREFIX).split("__")
        lower = [name.lower() for name in names]
        if lower[0] == "file_servers":  # their names may have capital letters
            lower[1:-1] = names[1:-1]
        key = _key(lower, place, "__")
        many = key[-1] in ("dir", "paths")
        found[key] = Given(text.split(":") if many else text, place, CURRENT_DIR)
    if environ.get("SWARMCACHE_SOCKET"):
        place = "environment variable SWARMCACHE_SOCKET"
        found["daemon", "socket"] = Given(environ["SWARMCACHE_SOCKET"], place, CURRENT_DIR)
    return found


def _options_given(options: Mapping[str, object]) -> dict[Key, Given]:
    found = {}
    for dotted, value in options.items():
        if value is not None:
            key = _key(dotted.split("."), f"option {dotted}", ".")
            found[key] = Given(value, f"option {OPTION_NAMES.get(key, dotted)}", CURRENT_DIR)
    return found


def _key(names: list[str], place: str, joint: str) -> Key:
    """The key of a list of names; the name of a file server may contain the ``joint``."""
    if len(names) >= 3 and names[0] == "file_servers":
        server = joint.join(names[1:-1])
        return (names[0], "default" if server == "DEFAULT" else server, names[-1])
    if len(names) != 2:
        raise _unknown(tuple(names), place)
    return tuple(names)


# --- putting them together -----------------------------------------------------------------------


def _read_value(key: Key, given: Given, home: Path | None) -> object:
    """The value of one setting in its own unit. Raises ConfigError."""
    fields = msgspec.structs.fields(SECTIONS[key[0]]) if key[0] in SECTIONS else ()
    parse = next((get_args(each.type)[1] for each in fields if each.encode_name == key[-1]), None)
    if parse is None or (len(key) == 3) != (key[0] == "file_servers"):
        raise _unknown(key, given.place)
    try:
        if key == ("file_servers", "default", "paths"):
            raise ValueError("no paths: every path has the default unless another file server does")
        value = parse(given.value)
    except ValueError as error:
        raise ConfigError(
            f"{given.place}: {_spell(key)} = {_show(given.value)}: expected {error}"
        ) from error
    if isinstance(value, Path):
        return _absolute(value, given, home)
    if key == ("cache", "dir"):
        return tuple(_absolute(each, given, home) for each in value)
    return value


def _absolute(path: Path, given: Given, home: Path | None) -> Path:
    """Relative paths start where they were written; "~" is the home directory of the user."""
    if path.parts[:1] == ("~",) and home is not None:
        path = home.joinpath(*path.parts[1:])
    return Path(os.path.abspath(given.base / path))


def _section(name: str, values: Mapping[Key, object]) -> Any:
    fields = msgspec.structs.fields(SECTIONS[name])
    given = {each.name: (name, each.encode_name) for each in fields}
    return SECTIONS[name](**{field: values[key] for field, key in given.items() if key in values})


def _file_servers(values: Mapping[Key, object]) -> dict[str, FileServerSettings]:
    """The settings of each file server; what one does not mention is as for the default."""
    tables: dict[str, dict[str, Any]] = {"default": {}}
    for key, value in values.items():
        if key[0] == "file_servers":
            tables.setdefault(key[1], {})[key[2]] = value
    return {
        name: FileServerSettings(**(tables["default"] | given)) for name, given in tables.items()
    }


def _check(config: Config, given: Mapping[Key, Given]) -> None:
    """Relations between settings. Raises ConfigError."""

    def refuse(key: Key, value: object, expected: str) -> ConfigError:
        place = given[key].place if key in given else "default"
        return ConfigError(f"{place}: {_spell(key)} = {_show(value)}: expected {expected}")

    addresses = {
        ("cluster", "tracker"): config.cluster.tracker,
        ("tracker", "listen"): config.tracker.listen,
        ("tracker", "metrics"): config.tracker.metrics,
        ("daemon", "listen"): config.daemon.listen,
        ("daemon", "advertise"): config.daemon.advertise,
        ("daemon", "metrics"): config.daemon.metrics,
    }
    for key, address in addresses.items():
        if config.cluster.secret_file is None and address and not address.is_loopback:
            raise refuse(key, address, "a loopback address, since cluster.secret_file is not set")
    if config.cluster.tracker.port == 0:
        raise refuse(("cluster", "tracker"), config.cluster.tracker, "the port of the tracker")
    for name in ("listen", "advertise"):
        address = addresses["daemon", name]
        if address and address.port == 65535:
            raise refuse(("daemon", name), address, "a port up to 65534: the next is for data")
    if len(os.fsencode(config.daemon.socket)) > SOCKET_PATH_MAX_BYTES:
        raise refuse(
            ("daemon", "socket"),
            config.daemon.socket,
            f"a path of at most {SOCKET_PATH_MAX_BYTES} bytes (a limit of UNIX sockets)",
        )
    owners: dict[Path, str] = {}
    for name, settings in config.file_servers.items():
        for prefix in settings.paths:
            if owners.setdefault(prefix, name) != name:
                raise refuse(
                    ("file_servers", name, "paths"),
                    prefix,
                    f"a path that file server {owners[prefix]} does not have already",
                )


def _unknown(key: Key, place: str) -> ConfigError:
    """The error for a key that there is not, with the nearest one that there is."""
    known = {section: _keys(section, key) for section in SECTIONS}
    if len(key) == 1:
        near = difflib.get_close_matches(key[0], known, n=1)
    else:
        spelled = [each for keys in known.values() for each in keys]
        near = difflib.get_close_matches(_spell(key), spelled, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"expected one of {', '.join(known.get(key[0], known))}"
    return ConfigError(f"{place}: {_spell(key)}: there is no such setting; {hint}")


def _keys(section: str, like: Key) -> list[str]:
    """The keys of a section, spelled; of a file server's, those of the server in ``like``."""
    server = (like[1] if len(like) == 3 else "default",) if section == "file_servers" else ()
    fields = msgspec.structs.fields(SECTIONS[section])
    return [_spell((section, *server, each.encode_name)) for each in fields]


def _spell(key: Key) -> str:
    """A key as in TOML: names with other characters than letters, digits, - and _ in quotes."""
    return ".".join(n if re.fullmatch(r"[\w-]+", n, re.ASCII) else f'"{n}"' for n in key)


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, (str, Path, HostPort)) else str(value)
