"""``swarmcache doctor``: what it finds, what it says to do, and that it harms nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from swarmcache.doctor import LISTED_MAX, Report, examine
from swarmcache.local_protocol import Failed, NodeStatus
from tests.box import wait_until
from tests.disk_helpers import (
    ME,
    a_file,
    change_index,
    needs_root,
    object_of,
    open_cache,
    publish,
)
from tests.local_daemons import COMMAND_AS, LocalDaemons
from tests.loop_disks import missing
from tests.scripted_daemon import ScriptedDaemon

needs_disk = pytest.mark.skipif(bool(missing()), reason="mounting is not possible here")


@pytest.fixture
def settings(root: Path) -> Path:
    """A settings file with this cache directory. No daemon and no tracker run."""
    file = root.parent / "config.toml"
    file.write_text(
        f'[cluster]\ntracker = "127.0.0.1:1"\n[cache]\ndir = "{root}"\nmin_free = 0\n'
        f'[daemon]\nsocket = "{root.parent}/run/daemon.sock"\n'
    )
    return file


@pytest.fixture
def filled(root: Path) -> Iterator[Path]:
    """A cache directory with three files, whose daemon has ended."""
    cache = open_cache(root)
    for number in range(3):
        publish(cache, *a_file(9000, b"/nfs/corpus/%d" % number, number))
    cache.close()
    yield root


def about(report: Report, where: Path) -> list[str]:
    """What is wrong somewhere below a directory, with the mends."""
    return [
        f"{each.what}: {each.do}" for each in report.findings if each.where.startswith(str(where))
    ]


def notes(report: Report) -> str:
    return "\n".join(f"{note.what} in {note.where}" for note in report.notes)


def test_a_sound_cache_directory_has_nothing_wrong(settings: Path, filled: Path) -> None:
    before = sorted(filled.rglob("*"))
    report = examine(None, settings)

    assert about(report, filled) == []
    assert str(settings) in notes(report)
    assert "the cache takes 48.0 KiB" in notes(report)
    assert sorted(filled.rglob("*")) == before


def test_without_a_daemon_the_tracker_is_tried(settings: Path) -> None:
    report = examine(None, settings)

    told = [(each.what, each.do) for each in report.findings]
    assert "no daemon answers" in told[0][0]
    assert told[0][1] == "start it: swarmcache daemon"
    assert "the tracker does not answer" in told[1][0]
    assert len(told) == 2
    assert "will be made when the daemon is started" in notes(report)


def test_wrong_settings_are_named(settings: Path) -> None:
    settings.write_text("[cache]\nmin_fre = 1\n")
    [finding] = examine(None, settings).findings
    assert "did you mean cache.min_free?" in finding.what


@pytest.mark.parametrize(
    ("spoil", "what", "mend"),
    [
        (lambda secret: secret.chmod(0o644), "open to others (mode 644)", "chmod 600"),
        (lambda secret: secret.write_text("short"), "a secret of 5 bytes", "head -c 32"),
        (lambda secret: secret.unlink(), "cannot be found", "correct cluster.secret_file"),
    ],
)
def test_a_secret_that_is_none_is_found(
    settings: Path, tmp_path: Path, spoil: Callable[[Path], None], what: str, mend: str
) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("0123456789abcdef")
    settings.write_text(settings.read_text() + f'[cluster]\nsecret_file = "{secret}"\n')
    text = settings.read_text().replace('[cluster]\ntracker = "127.0.0.1:1"\n', "")
    settings.write_text(text)
    assert about(examine(None, settings), secret) == []

    spoil(secret)

    [told] = about(examine(None, settings), secret)
    assert what in told
    assert mend in told


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        (lambda root: root.chmod(0o777), "run chmod 0755 on it"),
        (lambda root: (root / ".swarmcache").chmod(0o755), "run chmod 0700 on it"),
        (lambda root: shutil.move(root, f"{root}2") and root.symlink_to(f"{root}2"), "remove it"),
        (lambda root: root.parent.chmod(0o777), "run chmod o-w on it"),
    ],
)
def test_a_cache_directory_that_the_daemon_would_refuse_is_found(
    settings: Path, filled: Path, spoil: Callable[[Path], None], mend: str
) -> None:
    spoil(filled)
    [told] = about(examine(None, settings), filled)
    assert mend in told


@needs_root
def test_a_cache_directory_of_another_user_is_found(settings: Path, filled: Path) -> None:
    os.chown(filled, 6001, 6001)
    [told] = about(examine(None, settings), filled)
    assert "belongs to uid 6001, not to uid 0" in told


def test_one_of_several_disks_that_is_not_mounted_is_found(settings: Path, filled: Path) -> None:
    away = filled.parent / "mount point" / "cache"
    settings.write_text(settings.read_text().replace(f'"{filled}"', f'["{filled}", "{away}"]'))
    report = examine(None, settings)
    [told] = about(report, away)
    assert "is its disk mounted?" in told
    assert about(report, filled) == []
    assert not away.exists()


def test_files_of_users_are_counted_some_are_named_and_none_is_touched(
    settings: Path, filled: Path
) -> None:
    place = filled / "me" / "nfs" / "corpus"
    for number in range(LISTED_MAX + 5):
        (place / f"note\n\x1b[2J{number}").write_text("mine")
    (place / "link").symlink_to("/etc/passwd")
    (filled / "me" / "elsewhere").symlink_to("/")
    report = examine(None, settings)

    assert about(report, filled) == []
    assert "15 files that users put there (60.0 KiB); they are left alone" in notes(report)
    assert "and 5 more" in notes(report)
    assert "\x1b" not in "\n".join(report.lines())
    assert "passwd" not in notes(report)
    assert len(list(place.iterdir())) == 3 + LISTED_MAX + 5 + 1


def test_what_is_left_over_is_found(settings: Path, filled: Path) -> None:
    versions = [a_file(9000, b"/nfs/corpus/%d" % number, number)[0] for number in range(3)]
    objects = [object_of(filled, version) for version in versions]
    objects[0].unlink()  # its link and its row stay
    change_index(
        filled, f"DELETE FROM replica WHERE version_id = x'{versions[1].version_id.hex()}'"
    )
    partial = filled / ".swarmcache" / "partial"
    (partial / ("ab" * 32)).write_bytes(bytes(5000))
    for suffix in ("", ".chunks"):
        (partial / ("cd" * 32 + suffix)).write_bytes(bytes(5000))  # somebody may resume it

    told = "\n".join(about(examine(None, settings), filled))

    assert "1 partial files (8.0 KiB) that nobody can resume: restart the daemon" in told
    assert "1 copies that the index does not list: restart the daemon" in told
    assert "1 rows of the index without their copies: restart the daemon" in told
    assert "1 read-only files of the daemon's user that are no copies of anything" in told
    assert told.count("\n") == 3
    report = examine(None, settings)
    places = " ".join(each.where for each in report.findings)
    for place in (objects[0], objects[1], partial / ("ab" * 32), filled / "me/nfs/corpus/0"):
        assert str(place) in places

    cache = open_cache(filled)  # and what it says to do helps
    for _ in cache.list_objects():
        pass
    cache.close()
    assert about(examine(None, settings), filled / ".swarmcache") == []


@pytest.mark.parametrize("part", ["partial", "objects"])
def test_what_goes_while_it_looks_is_nothing_wrong(
    settings: Path, filled: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Every listing of these directories begins with a file that has gone since."""
    scandir, gone = os.scandir, list[Path]()

    def list_late(where: str | int) -> Any:
        if isinstance(where, int) or f"/{part}" not in where or not os.path.isdir(where):
            return scandir(where)
        gone.append(Path(where, "gone"))
        gone[-1].touch()
        with scandir(where) as found:
            entries = sorted(found, key=lambda entry: entry.name != "gone")
        gone[-1].unlink()
        return nullcontext(entries)

    monkeypatch.setattr(os, "scandir", list_late)
    report = examine(None, settings)

    assert about(report, filled) == []
    assert gone


def test_an_index_that_cannot_be_read_is_found(settings: Path, filled: Path) -> None:
    (filled / ".swarmcache" / "index.sqlite").write_bytes(b"garbage " * 1000)
    [told] = about(examine(None, settings), filled)
    assert "the cache index cannot be read" in told
    assert "makes the index again from the files" in told


def test_a_disk_that_is_too_full_for_any_copy_is_found(settings: Path, filled: Path) -> None:
    settings.write_text(settings.read_text().replace("min_free = 0", 'min_free = "100%"'))
    [told] = about(examine(None, settings), filled)
    assert "other files leave the cache no room" in told
    assert "lower cache.min_free" in told


@pytest.mark.box
@needs_disk
def test_a_file_system_without_acls_is_found(settings: Path, root: Path) -> None:
    root.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", root], check=True)
    try:
        root.chmod(0o711)
        [told] = about(examine(None, settings), root)
    finally:
        subprocess.run(["umount", root], check=True)
    assert "has no POSIX ACLs, so only root can be served: mount it with ACLs" in told


# --- with a daemon --------------------------------------------------------------------------------


def test_nodes_with_sick_disks_or_other_versions_are_named(settings: Path, root: Path) -> None:
    def member(node: str, version: str, disk: str = "ok", state: str = "alive") -> dict[str, str]:
        return {"node": node, "version": version, "disk": disk, "state": state}

    members = [
        member("a", "1.1"),
        member("b", "1.0", "sick"),
        member("c", "1.1", "full"),
        member("d", "0.9", "sick", "dead"),
        member("e", "0.8", state="left"),
    ]
    status = NodeStatus({"tracker_connected": True, "directories": []}, {}, members=members)
    with ScriptedDaemon(root.parent, lambda _: [status]) as daemon:
        report = examine(daemon.path, settings)

    assert [(each.what, each.where) for each in report.findings] == [
        ("the disks of these nodes fail, so they cache nothing", "b"),
        ("these nodes run another version than 1.1, which 2 nodes run", "b (1.0)"),
    ]
    assert "these nodes are dead in d" in notes(report)
    assert "have no room for more in c" in notes(report)


@pytest.mark.slow
def test_beside_a_daemon_that_works_nothing_is_wrong(root: Path) -> None:
    root.mkdir()
    with LocalDaemons(root) as local:
        tracker = local.start_tracker()
        node = local.start_daemon()
        file = root / "file"
        file.write_bytes(bytes(100_000))
        node.get(file)
        being_written = node.cache_dir / ".swarmcache/partial" / ("ab" * 32)
        being_written.touch()
        os.utime(being_written, (0, 0))  # as its source has them

        done = node.run("doctor", "--config=/dev/null", "--json")
        report: dict[str, Any] = json.loads(done.stdout)
        assert (report["wrong"], done.returncode) == ([], 0)
        assert any(note["where"] == str(node.cache_dir) for note in report["notes"])
        assert b"nothing is wrong" in node.run("doctor", "--config=/dev/null").stdout
        assert node.get(file)

        tracker.end()
        done = node.run("doctor", "--config=/dev/null")
        assert done.returncode == 1
        assert b"the daemon has no tracker" in done.stdout
        node.kill()
        done = node.run("doctor", "--config=/dev/null")
        assert b"no daemon answers" in done.stdout
        assert b"wrong: 2 in all" in done.stdout


def test_a_daemon_that_cannot_tell_its_status_is_one_of_the_things_that_are_wrong(
    settings: Path, filled: Path
) -> None:
    """As where its disk fails: then somebody wants to know of all the others."""
    run_dir = settings.parent / "run"
    run_dir.mkdir(mode=0o700)
    with ScriptedDaemon(run_dir, lambda _: [Failed("cannot look at the disk")]):
        report = examine(None, settings)

    assert about(report, run_dir) == [
        "the daemon refused: cannot look at the disk: look into its log"
    ]
    assert "the tracker does not answer" in str(report.findings)


@pytest.mark.slow
@needs_root
def test_a_user_without_rights_is_told_what_could_not_be_looked_into(root: Path) -> None:
    root.mkdir()
    with LocalDaemons(root) as local:
        node = local.start_daemon()
        done = node.run("doctor", "--config=/dev/null", "--json", uid=6001)
        report = json.loads(done.stdout)
        assert "run this as root" in str(report["notes"])
        assert [each["where"] for each in report["wrong"]] == ["127.0.0.1:7380"]  # only the tracker


@pytest.mark.slow
@needs_root
def test_a_user_of_the_machines_own_daemon_is_told_the_same(root: Path) -> None:
    """That daemon is found in a place where the user's own would not be."""
    root.mkdir()
    with LocalDaemons(root) as local:
        local.start_tracker()
        node = local.start_daemon()
        place = (
            'mount -t tmpfs tmpfs /run; mkdir /run/swarmcache; mount --bind "$0" /run/swarmcache'
        )
        words = ["sh", "-c", f'{place}; exec "$@"', str(node.socket.parent), *COMMAND_AS, "6001"]
        done = subprocess.run(
            ["unshare", "--mount", *words, "doctor", "--config=/dev/null", "--json"],
            capture_output=True,
            check=False,
        )
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert "run this as root" in str(report["notes"])


def test_reading_the_index_beside_its_daemon_changes_nothing(settings: Path, root: Path) -> None:
    cache = open_cache(root)
    publish(cache, *a_file(9000))
    connection = sqlite3.connect(root / ".swarmcache" / "index.sqlite")
    [(before,)] = connection.execute("PRAGMA data_version")

    assert about(examine(None, settings), root) == []

    [(after,)] = connection.execute("PRAGMA data_version")
    connection.close()
    assert before == after
    assert cache.lookup(a_file(9000)[0], ME) is not None
    cache.close()


@pytest.mark.slow
def test_while_the_secret_is_changed_it_tells_who_lags_behind(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    old, new = "0" * 32, "1" * 32
    secret.write_text(old)
    settings = f'[cluster]\nsecret_file = "{secret}"\n'
    with LocalDaemons(tmp_path) as local:
        tracker = local.start_tracker(settings)
        here, there = local.start_daemon("a", settings), local.start_daemon("b", settings)

        def told(*, until: str) -> str:
            """What doctor says here, as soon as it says this."""

            def said() -> str:
                text = "\n".join(examine(here.socket, tmp_path / "config-a.toml").lines())
                return text if until in text else ""

            return wait_until(said, 30.0, until)

        secret.write_text(f"{old}\n{new}\n")
        assert "send it SIGHUP" in told(until="the daemon uses the secrets")

        for server in (here, tracker):
            server.process.send_signal(signal.SIGHUP)
        lagging = told(until="do not accept the secret").partition("do not accept the secret")[2]
        assert there.address in lagging
        there.process.send_signal(signal.SIGHUP)
        assert "wrong:" not in told(until="all accept the secret")

        secret.write_text(new)
        here.process.send_signal(signal.SIGHUP)
        assert there.address in told(until="that this node's file does not have")
