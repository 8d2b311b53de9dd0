"""The old client's settings file: read for what still means something, never evaluated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarmcache import cf_config
from swarmcache.cf_config import read_config

USER = "ann"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cf_config, "_host_name", lambda: "node7")
    monkeypatch.setattr(cf_config, "_user_name", lambda: USER)


def test_what_means_something_is_read_and_the_rest_named_once(tmp_path: Path) -> None:
    file = tmp_path / "client.conf"
    file.write_text(
        '# cache manager\n\nMASTER_HOST = "cluster-cn-1"\nMASTER_PORT=10321\n'
        'CACHE_DIR = "/var/tmp/$(USER)/$(HOST)"  # local\nMIN_FREE = 100 * 1024 * 1024\n'
        "IGNORE_BUNDLE = True\nMASTER_PORT = 10322\n"
    )

    config = read_config(str(file))

    assert config.cache_dir == "/var/tmp/ann/node7"
    assert config.ignore_bundle
    assert config.remarks == [
        f"WARN: {file}: no meaning any more, see the daemon's settings:"
        " MASTER_HOST, MASTER_PORT, MIN_FREE"
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("CACHE_DIR", "expected KEY = value"),
        ("FROBNICATE = 1", "there is no FROBNICATE"),
        ("IGNORE_BUNDLE = maybe", "expected True or False, not maybe"),
        ('CACHE_DIR = "relative"', 'expected an absolute path such as "/var/tmp/$(USER)", not "re'),
        ('CACHE_DIR = "/a" + "/b"', 'expected one text in quotes, not "/a" + "/b"'),
        ("CACHE_DIR = __import__('os').system('touch /tmp/evil')", "expected an absolute path"),
    ],
)
def test_a_line_that_makes_no_sense_is_named_and_the_others_count(
    tmp_path: Path, line: str, complaint: str
) -> None:
    file = tmp_path / "client.conf"
    file.write_text(f"{line}\nIGNORE_BUNDLE = 1\n")

    config = read_config(str(file))

    assert config.cache_dir is None
    (remark,) = config.remarks
    assert remark.startswith(f"ERROR: {file}, line 1: {complaint}")


def test_a_second_equals_sign_belongs_to_the_value(tmp_path: Path) -> None:
    file = tmp_path / "client.conf"
    file.write_text("CACHE_DIR = /var/tmp/a=b\n")

    assert read_config(str(file)).cache_dir == "/var/tmp/a=b"


@pytest.mark.parametrize(
    ("host", "chosen"), [("cn-04", "/cluster"), ("cluster-cn-3", "/cluster"), ("desk", "/i6")]
)
def test_hosts_of_the_cluster_have_a_directory_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, chosen: str
) -> None:
    file = tmp_path / "client.conf"
    file.write_text("CACHE_DIR = /all\nCACHE_DIR_I6 = /i6\nCACHE_DIR_CLUSTER = /cluster\n")
    monkeypatch.setattr(cf_config, "_host_name", lambda: host)

    assert read_config(str(file)).cache_dir == chosen


def test_the_users_own_file_is_the_default_and_nobody_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_config(None).remarks == []

    (tmp_path / ".cmclient").write_text("IGNORE_BUNDLE = True")
    assert read_config(None).ignore_bundle


@pytest.mark.parametrize("kind", ["missing", "fifo", "directory", "long"])
def test_a_file_that_cannot_be_read_is_named_and_no_obstacle(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "client.conf"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "long":
        file.write_bytes(b"#" * 100_000)

    (remark,) = read_config(str(file)).remarks

    assert remark.startswith(f"ERROR: cannot read config file {file}")
    assert remark.endswith(". using build-in defaults")
