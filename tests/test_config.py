"""Settings: what may be written, where it may be written, and which place wins."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from ipaddress import IPv6Address
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcache import config as config_module
from swarmcache.config import SECTIONS, Config, DiskLimit, HostPort, load, load_secrets
from swarmcache.errors import ConfigError
from swarmcache.locations import (
    SYSTEM_SOCKET,
    default_cache_dir,
    default_socket_candidates,
    default_state_dir,
)
from swarmcache.quantities import (
    DURATION_MAX_S,
    SIZE_MAX_BYTES,
    SIZE_UNITS,
    format_duration,
    format_size,
    parse_count,
    parse_duration,
    parse_rate,
    parse_size,
)

NO_FILE = Path("/dev/null")
KIB, MIB, GIB = 1024, 1024**2, 1024**3


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def error_of(
    options: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path = NO_FILE,
) -> str:
    with pytest.raises(ConfigError) as raised:
        load(options or {}, environ or {}, file)
    return str(raised.value)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_bytes(b"sixteen bytes ok\n")
    file.chmod(0o600)
    return file


# --- sizes, durations, counts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (0, 0),
        (500, 500),
        ("500", 500),
        ("500B", 500),
        ("500MB", 500_000_000),
        ("500mb", 500_000_000),
        ("5GiB", 5 * GIB),
        (" 5 GiB ", 5 * GIB),
        ("5G", 5 * GIB),
        ("1.5KiB", 1536),
        ("0.0001KiB", 0),
        ("1TB", 10**12),
        (SIZE_MAX_BYTES, SIZE_MAX_BYTES),
    ],
)
def test_a_size_is_a_number_of_bytes_with_or_without_a_unit(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


NO_SIZES = ["", "GiB", "-1", "5 parsecs", "5%", "1e3", "1,5GiB", "8EiB", "8192PiB", "\u0665GiB"]


@pytest.mark.parametrize(
    "text",
    [*NO_SIZES, -1, SIZE_MAX_BYTES + 1, float("nan"), float("inf"), True, None, [5]],
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        parse_size(text)


@given(st.integers(0, SIZE_MAX_BYTES))
def test_a_formatted_size_is_read_back_exactly(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(0, 8000), st.sampled_from(sorted(SIZE_UNITS)))
def test_a_size_is_its_number_times_its_unit_in_any_case(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * SIZE_UNITS[unit]
    assert parse_size(f"{number} {unit.upper()}") == number * SIZE_UNITS[unit]


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        (0, 0.0),
        (30, 30.0),
        (0.5, 0.5),
        ("30", 30.0),
        ("30s", 30.0),
        ("250ms", 0.25),
        ("1h", 3600.0),
        ("5m", 300.0),
        ("5 min", 300.0),
        ("1h30m", 5400.0),
        ("1d 12h", 129600.0),
        ("1.5h", 5400.0),
    ],
)
def test_a_duration_is_a_number_of_seconds_with_or_without_units(
    text: object, duration_s: float
) -> None:
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize(
    "text", ["", "h", "-1s", "1 fortnight", "1h30", True, None, "10000d", float("inf"), "1e3"]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a duration such as"):
        parse_duration(text)


@given(st.floats(0, DURATION_MAX_S))
def test_a_formatted_duration_is_read_back_exactly(duration_s: float) -> None:
    assert parse_duration(format_duration(duration_s)) == duration_s


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.0, "0s"), (0.25, "250ms"), (5.0, "5s"), (90.0, "90s"), (120.0, "2m"), (7200.0, "2h")],
)
def test_a_duration_is_written_in_its_largest_whole_unit(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


def test_a_rate_may_say_per_second() -> None:
    assert parse_rate("100MB/s") == parse_rate("100MB") == parse_rate(100_000_000) == 100_000_000


@pytest.mark.parametrize("text", [0, "0", "fast", "100Mbit/s", "/s"])
def test_what_is_no_rate_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="bytes per second"):
        parse_rate(text)


@pytest.mark.parametrize("text", [0, -1, 1.5, "1.5", True, "many", 1_000_001, "9" * 5000])
def test_what_is_no_count_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a whole number from 1 to"):
        parse_count(text)


# --- shares of a disk ----------------------------------------------------------------------------


def test_a_share_of_a_disk_is_resolved_against_its_capacity() -> None:
    assert DiskLimit.parse("5%").resolve_bytes(1000) == 50
    assert DiskLimit.parse("0.1%").resolve_bytes(999) == 0
    assert DiskLimit.parse("5GiB").resolve_bytes(10 * GIB) == 5 * GIB


def test_a_size_is_never_more_than_the_disk() -> None:
    assert DiskLimit.parse("5GiB").resolve_bytes(GIB) == GIB


@pytest.mark.parametrize("text", ["101%", "-1%", "%", "5 per cent", None])
def test_what_is_no_share_of_a_disk_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="of the disk"):
        DiskLimit.parse(text)


@given(
    st.builds(DiskLimit, st.integers(0, SIZE_MAX_BYTES))
    | st.builds(DiskLimit, st.none(), st.floats(0, 100))
)
def test_a_written_disk_limit_is_read_back_exactly(limit: DiskLimit) -> None:
    assert DiskLimit.parse(str(limit)) == limit


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("127.0.0.1:7380", "127.0.0.1", 7380, True),
        ("127.8.8.8:0", "127.8.8.8", 0, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:7380", "::1", 7380, True),
        ("10.0.0.1:65535", "10.0.0.1", 65535, False),
        ("0.0.0.0:7380", "0.0.0.0", 7380, False),
        ("[fd00::1]:7380", "fd00::1", 7380, False),
        ("localhost.example.org:7380", "localhost.example.org", 7380, False),
        ("head:7380", "head", 7380, False),
        ("node_1-a.example.org.:7380", "node_1-a.example.org.", 7380, False),
        ("büro:7380", "büro", 7380, False),
        (f"{'n' * 63}.example:7380", f"{'n' * 63}.example", 7380, False),
    ],
)
def test_an_address_is_read_and_written(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = HostPort.parse(text)

    assert (host, port) == (address.host, address.port)
    assert address.is_loopback == is_loopback
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "head",
        ":7380",
        "head:",
        "head:65536",
        "head:x",
        "::1:7380",
        "[head]:1",
        "a b:1",
        7380,
        ".:1",
        "head..example:1",
        ".head:1",
        f"{'n' * 64}:1",
        f"{'n' * 63}.{'n' * 64}.example:1",
        f"{'name.' * 60}:1",
        "head\0:1",
        "head#1:1",
        "head?:1",
        "head\udcff:1",
    ],
)
def test_what_is_no_address_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="host:port"):
        HostPort.parse(text)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_a_written_address_is_read_back_exactly(ip: object, port: int) -> None:
    host = str(ip)

    assert HostPort.parse(str(HostPort(host, port))) == HostPort(host, port)
    assert str(HostPort(host, port)).startswith("[") == isinstance(ip, IPv6Address)


# --- defaults ------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = load({}, {}, NO_FILE, uid=1000)

    assert str(config.cluster.tracker) == "127.0.0.1:7380"
    assert config.cluster.secret_file is None
    assert str(config.tracker.listen) == "127.0.0.1:7380"
    assert str(config.daemon.listen) == "127.0.0.1:7381"
    assert config.daemon.advertise is None
    assert str(config.cache.min_free) == "5%"
    assert str(config.cache.max_usage) == "50%"
    assert config.cache.min_age_s == 3600
    assert config.slots_max("any:/export") == 8
    assert (config.transfer.uploads_max, config.transfer.peers_max) == (4, 40)
    assert config.transfer.upload_rate_max_bytes_per_s is None
    assert config.transfer.download_rate_max_bytes_per_s is None
    assert config.transfer.chunk_size_bytes is None
    assert config.get.stall_s == 5


def test_root_and_other_users_have_their_own_directories() -> None:
    root, user = load({}, {}, NO_FILE, uid=0), load({}, {}, NO_FILE, uid=1000)

    assert str(root.daemon.socket) == "/run/swarmcache/daemon.sock"
    assert root.cache.dirs == (Path("/var/cache/swarmcache"),)
    assert root.tracker.state_dir == Path("/var/lib/swarmcache")
    assert str(user.daemon.socket) == "/var/tmp/swarmcache-1000/daemon.sock"
    assert user.cache.dirs == (Path("/var/tmp/swarmcache-1000/cache"),)
    assert user.tracker.state_dir == Path("/var/tmp/swarmcache-1000/tracker")


def test_a_user_tries_their_own_daemon_before_the_machines() -> None:
    assert default_socket_candidates(0) == [SYSTEM_SOCKET]
    assert default_socket_candidates(7) == ["/var/tmp/swarmcache-7/daemon.sock", SYSTEM_SOCKET]
    assert default_cache_dir(7) != default_state_dir(7) != default_cache_dir(8)


def test_every_field_names_the_function_that_reads_it() -> None:
    for section in SECTIONS.values():
        for each in msgspec.structs.fields(section):
            assert callable(get_args(each.type)[1]), each.name


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0:7381", "[::]:7381"])
def test_what_is_nobodys_address_is_not_told_to_others(listen: str) -> None:
    config = load({"daemon.listen": listen, "cluster.secret_file": "/secret"}, {})
    with pytest.raises(ConfigError, match=r"daemon\.listen .* expected daemon\.advertise"):
        _ = config.daemon.told
    options = {"daemon.listen": listen, "cluster.secret_file": "/secret"}
    config = load({**options, "daemon.advertise": "node1:7381"}, {})
    assert config.daemon.told == HostPort("node1", 7381)
    with pytest.raises(ConfigError, match=r"daemon\.advertise = "):
        _ = load({**options, "daemon.advertise": listen}, {}).daemon.told


EVERY_SETTING = """
[cluster]
label = "experiments"
tracker = "head:7000"
secret_file = "secret"
[tracker]
listen = "0.0.0.0:7000"
state_dir = "state"
statistics_interval = "none"
[daemon]
listen = "[::]:7001"
advertise = "node1:0"
rack = "r17"
socket = "/run/d.sock"
[cache]
dir = ["/scratch/a", "b"]
min_free = "5GiB"
max_usage = "80%"
min_age = "30m"
max_age = "0"
scrub_rate = "20MB/s"
[file_servers.default]
slots_max = 3
[file_servers."nfs01:/export"]
slots_max = 20
paths = ["/lustre", "/lustre/big/"]
[file_servers.home]
paths = "/home"
[transfer]
uploads_max = 2
peers_max = 5
upload_rate_max = "100MB/s"
download_rate_max = 1_000_000
chunk_size = "1MiB"
[gossip]
rate_max = "off"
[get]
stall = "10s"
"""


def test_every_setting_can_be_written_in_the_file(tmp_path: Path) -> None:
    config = load({}, {}, write(tmp_path / "config.toml", EVERY_SETTING))

    assert config.cluster == config_module.ClusterSettings(
        label="experiments", tracker=HostPort("head", 7000), secret_file=tmp_path / "secret"
    )
    assert config.tracker == config_module.TrackerSettings(
        listen=HostPort("0.0.0.0", 7000),
        state_dir=tmp_path / "state",
        statistics_interval_s=None,
    )
    assert config.daemon == config_module.DaemonSettings(
        listen=HostPort("::", 7001),
        advertise=HostPort("node1", 0),
        rack="r17",
        socket=Path("/run/d.sock"),
    )
    assert config.cache == config_module.CacheSettings(
        dirs=(Path("/scratch/a"), tmp_path / "b"),
        min_free=DiskLimit(5 * GIB),
        max_usage=DiskLimit(None, 80.0),
        min_age_s=1800.0,
        max_age_s=None,
        scrub_rate_bytes_per_s=20_000_000,
    )
    assert config.transfer == config_module.TransferSettings(
        uploads_max=2,
        peers_max=5,
        upload_rate_max_bytes_per_s=100_000_000,
        download_rate_max_bytes_per_s=1_000_000,
        chunk_size_bytes=MIB,
    )
    assert config.gossip == config_module.GossipSettings(rate_max_bytes_per_s=None)
    assert config.get.stall_s == 10
    assert config.file == tmp_path / "config.toml"


def test_a_file_server_without_slots_of_its_own_has_those_of_the_default(tmp_path: Path) -> None:
    config = load({}, {}, write(tmp_path / "config.toml", EVERY_SETTING))

    assert config.slots_max("nfs01:/export") == 20
    assert config.slots_max("home") == 3
    assert config.slots_max("never mentioned") == 3


@pytest.mark.parametrize(
    ("path", "file_server"),
    [
        (b"/lustre", "short"),
        (b"/lustre/x", "short"),
        (b"/lustres", None),
        (b"/lustre/big", "long"),
        (b"/lustre/big/\xff\n", "long"),
        (b"/lustre/bigger", "short"),
        (b"/", None),
    ],
)
def test_the_longest_prefix_of_whole_components_tells_the_file_server(
    path: bytes, file_server: str | None
) -> None:
    options = {"file_servers.short.paths": "/lustre", "file_servers.long.paths": ["/lustre/big/"]}
    reverse = dict(reversed(options.items()))

    assert load(options, {}, NO_FILE).file_server_for_path(path) == file_server
    assert load(reverse, {}, NO_FILE).file_server_for_path(path) == file_server


def test_the_root_directory_is_a_prefix_of_every_path() -> None:
    config = load({"file_servers.all.paths": "/", "file_servers.w.paths": "/lustre"}, {}, NO_FILE)

    assert config.file_server_for_path(b"/any") == "all"
    assert config.file_server_for_path(b"/lustre/x") == "w"


def test_the_first_file_that_is_there_is_read(tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.toml", "[get]\nstall = 1")
    variable = write(tmp_path / "variable.toml", "[get]\nstall = 2")
    home = write(tmp_path / ".config/swarmcache/config.toml", "[get]\nstall = 3")
    environ = {"SWARMCACHE_CONFIG": str(variable), "HOME": str(tmp_path)}

    assert load({}, environ, asked).file == asked
    assert load({}, environ).get.stall_s == 2
    assert load({}, {"HOME": str(tmp_path)}).file == home


def test_without_home_the_password_database_tells_where_the_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / ".config/swarmcache/config.toml", "[get]\nstall = 3")
    entry = pwd.struct_passwd(("u", "x", os.getuid(), 0, "", str(tmp_path), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)

    assert load({}, {}).get.stall_s == 3


def test_a_user_without_an_entry_in_the_password_database_has_settings_too() -> None:
    assert load({}, {}, NO_FILE, uid=4_000_000_000).get.stall_s == 5


def test_a_tilde_is_the_home_directory_of_the_user(tmp_path: Path) -> None:
    config = load({"cache.dir": "~/cache"}, {"HOME": str(tmp_path)}, NO_FILE)

    assert config.cache.dirs == (tmp_path / "cache",)


def test_a_relative_path_in_an_option_starts_at_the_current_directory() -> None:
    options = {"cache.dir": ["a", "b"], "tracker.state_dir": "."}
    config = load(options, {}, NO_FILE)

    assert config.cache.dirs == (Path.cwd() / "a", Path.cwd() / "b")
    assert config.tracker.state_dir == Path.cwd()


def test_settings_can_be_read_in_a_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    config = load({"cache.dir": "/a"}, {"SWARMCACHE_SOCKET": "/run/d.sock"}, NO_FILE)

    assert config.cache.dirs == (Path("/a"),)


# --- which place wins ----------------------------------------------------------------------------


@given(st.sets(st.sampled_from(["option", "variable", "file"])))
def test_options_win_over_the_environment_and_that_over_the_file(
    tmp_path_factory: pytest.TempPathFactory, places: set[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "precedence.toml"
    file.write_text('[cache]\nmin_free = "3%"' if "file" in places else "")
    environ = {"SWARMCACHE_CACHE__MIN_FREE": "2%"} if "variable" in places else {}
    options = {"cache.min_free": "1%" if "option" in places else None}

    config = load(options, environ, file)

    winner = next((p for p in ("option", "variable", "file") if p in places), "default")
    expected = {"option": "1%", "variable": "2%", "file": "3%", "default": "5%"}[winner]
    assert str(config.cache.min_free) == expected


def from_environment(**environ: str) -> Config:
    return load({}, {f"SWARMCACHE_{name}": text for name, text in environ.items()}, NO_FILE)


def test_variables_set_what_the_file_can_set() -> None:
    assert from_environment(TRANSFER__UPLOADS_MAX="7").transfer.uploads_max == 7
    assert from_environment(CACHE__DIR="/a:/b").cache.dirs == (Path("/a"), Path("/b"))
    assert from_environment(TRANSFER__CHUNK_SIZE="auto").transfer.chunk_size_bytes is None
    assert from_environment(FILE_SERVERS__DEFAULT__SLOTS_MAX="2").slots_max("any") == 2
    assert from_environment(FILE_SERVERS__nfs__SLOTS_MAX="2").slots_max("nfs") == 2
    assert from_environment(SOCKET="/tmp/d.sock").daemon.socket == Path("/tmp/d.sock")


def test_an_empty_variable_counts_as_none() -> None:
    assert from_environment(CACHE__MIN_FREE="", SOCKET="", CONFIG="", NONSENSE="") == load(
        {}, {}, NO_FILE
    )


def test_none_takes_an_optional_setting_back(tmp_path: Path) -> None:
    file = write(tmp_path / "config.toml", "[transfer]\nupload_rate_max = 5")

    config = load({"transfer.upload_rate_max": "none"}, {}, file)

    assert config.transfer.upload_rate_max_bytes_per_s is None


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[cache]\nmin_fre = 1", "cache.min_fre", "did you mean cache.min_free?"),
        ("[cahce]\nmin_free = 1", "cahce", "did you mean cache?"),
        ("[qqq]", "qqq", "expected one of cluster, tracker, daemon"),
        ("[get]\nqqq = 1", "get.qqq", "expected one of get.stall"),
        ("stall = 1", "stall", "there is no such setting"),
        ("get = 1", "get = 1", "expected a table [get]"),
        ("[cache.min_free]\na = 1", "cache.min_free = {'a': 1}", "a size such as"),
        ("[cache]\nmin_free = '101%'", 'cache.min_free = "101%"', '"0%" to "100%" of the disk'),
        ("[cache]\nmin_age = 'old'", 'cache.min_age = "old"', "a duration such as"),
        ("[cache]\ndir = []", "cache.dir = []", "a path or a list of different paths"),
        ("[cache]\ndir = ['/a', '/a']", "cache.dir = ['/a', '/a']", "different paths"),
        ("[cache]\ndir = ''", 'cache.dir = ""', "a path"),
        ("[get]\nstall = 0", "get.stall = 0", "more than 0"),
        ("[transfer]\npeers_max = 0", "transfer.peers_max = 0", "a whole number from 1"),
        ("[transfer]\nuploads_max = true", "transfer.uploads_max = True", "a whole number"),
        ("[transfer]\nchunk_size = '3MiB'", "transfer.chunk_size", "a power of two"),
        ("[transfer]\nchunk_size = '128KiB'", "transfer.chunk_size", "from 256KiB to 16MiB"),
        ("[transfer]\nchunk_size = '32MiB'", "transfer.chunk_size", "from 256KiB to 16MiB"),
        ("[file_servers]\na = 1", "file_servers.a = 1", "a table [file_servers.a]"),
        ("[file_servers.a]\nslots = 1", "file_servers.a.slots", "file_servers.a.slots_max?"),
        (
            "[file_servers.'n:/x']\nslots_max = 0",
            'file_servers."n:/x".slots_max = 0',
            "a whole number from 1",
        ),
        ("[file_servers.a]\npaths = ['x']", "file_servers.a.paths", "absolute paths"),
        ("[file_servers.a]\npaths = ['/x/..']", "file_servers.a.paths", "absolute paths"),
        ("[file_servers.default]\npaths = ['/x']", "file_servers.default.paths", "no paths"),
        (
            "[file_servers]\na.paths = '/x'\nb.paths = '/x/'",
            "file_servers.b.paths",
            "a path that file server a does not have already",
        ),
        ("[cluster]\ntracker = 'head'", 'cluster.tracker = "head"', "host:port"),
        ("[cluster]\ntracker = '127.0.0.1:0'", "cluster.tracker", "the port of the tracker"),
        ("[daemon]\nlisten = '127.0.0.1:65535'", "daemon.listen", "up to 65534"),
        (f"[daemon]\nsocket = '/{'x' * 107}'", "daemon.socket", "at most 107 bytes"),
        ("[cache", "", "expected TOML"),
    ],
)
def test_an_error_names_the_file_the_key_and_what_was_expected(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    file = write(tmp_path / "config.toml", text)

    message = error_of(file=file)

    assert message.startswith(f"{file}: {key}")
    assert expected in message


def test_an_error_names_the_variable() -> None:
    message = error_of(environ={"SWARMCACHE_CACHE__MIN_FREE": "lots"})

    assert message.startswith(
        'environment variable SWARMCACHE_CACHE__MIN_FREE: cache.min_free = "l'
    )


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("SWARMCACHE_CACHE__MINFREE", "did you mean cache.min_free?"),
        ("SWARMCACHE_CACHE_MIN_FREE", "expected one of cluster"),
        ("SWARMCACHE_DEBUG", "expected one of cluster"),
        ("SWARMCACHE_CACHE__MIN_FREE__X", "did you mean cache.min_free?"),
        ("SWARMCACHE_FILE_SERVERS__SLOTS_MAX", "did you mean file_servers.default.slots_max?"),
        ("SWARMCACHE_", "expected one of cluster"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_it(variable: str, hint: str) -> None:
    message = error_of(environ={variable: "1"})

    assert message.startswith(f"environment variable {variable}: ")
    assert hint in message


def test_an_error_names_the_option() -> None:
    assert error_of({"cluster.tracker": "x"}).startswith('option --tracker: cluster.tracker = "x"')
    assert error_of({"cache.min_free": "x"}).startswith("option cache.min_free: cache.min_free")
    assert error_of({"cache.nonsense": 1}).startswith(
        "option cache.nonsense: cache.nonsense: there"
    )


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"

    assert (
        error_of(file=missing) == f"{missing}: cannot read the settings: No such file or directory"
    )
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load({}, {"SWARMCACHE_CONFIG": str(missing)})


def test_a_file_that_is_not_utf8_or_far_too_long_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xff")
    assert "expected TOML" in error_of(file=file)

    file.write_bytes(b"#" * (MIB + 1))
    assert error_of(file=file) == f"{file}: longer than 1MiB"


# --- the secret ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "cluster.tracker",
        "tracker.listen",
        "tracker.metrics",
        "daemon.listen",
        "daemon.advertise",
        "daemon.metrics",
    ],
)
def test_without_a_secret_every_address_must_be_loopback(key: str, secret: Path) -> None:
    message = error_of({key: "10.0.0.1:7380"})

    assert f'{key} = "10.0.0.1:7380": expected a loopback address' in message
    assert "cluster.secret_file is not set" in message
    load({key: "10.0.0.1:7380", "cluster.secret_file": secret}, {}, NO_FILE)


def test_the_secret_comes_without_the_white_space_around_it(secret: Path) -> None:
    assert load_secrets(secret) == [b"sixteen bytes ok"]


def test_several_secrets_are_lines_in_their_order(secret: Path) -> None:
    secret.write_bytes(b"the new secret, 1\r\n\n  the old secret, 1")

    assert load_secrets(secret) == [b"the new secret, 1", b"the old secret, 1"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601])
def test_a_secret_that_others_may_open_is_refused(secret: Path, mode: int) -> None:
    secret.chmod(mode)

    with pytest.raises(ConfigError, match=f"mode {mode:o}.*run: chmod 600 {secret}"):
        load_secrets(secret)


def test_a_secret_of_another_user_is_refused_and_one_of_roots_is_not(secret: Path) -> None:
    other = os.getuid() + 1
    if os.getuid() == 0:
        assert load_secrets(secret, uid=other) == [b"sixteen bytes ok"]
        os.chown(secret, 12345, -1)

    with pytest.raises(ConfigError, match=f"run: chown {other} {secret}"):
        load_secrets(secret, uid=other)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"fifteen bytes..",
        b" " * 64,
        b"x" * 4097,
        b"sixteen bytes ok\nfifteen bytes..",
        b"sixteen bytes ok\n" * 5,
    ],
)
def test_secrets_that_are_too_short_too_long_or_too_many_are_refused(
    secret: Path, content: bytes
) -> None:
    secret.write_bytes(content)

    with pytest.raises(ConfigError, match=str(secret)):
        load_secrets(secret)


def test_a_secret_must_be_a_regular_file_that_is_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)

    with pytest.raises(ConfigError, match="a regular file"):
        load_secrets(tmp_path / "fifo")  # must not wait for a writer
    with pytest.raises(ConfigError, match="a regular file"):
        load_secrets(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        load_secrets(tmp_path / "missing")
