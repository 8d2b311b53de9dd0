"""The journal of leases, in real files."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from swarmcache import lease_journal
from swarmcache.errors import DirectoryUnusable, LocalError, NoSpace
from swarmcache.lease_journal import UNKNOWN_LEASE_ID, UNKNOWN_NODE, LeaseJournal
from tests.disk_helpers import needs_root

GRANT_AND_WAIT = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from swarmcache.lease_journal import LeaseJournal
journal = LeaseJournal(Path(sys.argv[1]))
journal.grant(5, "node1:7381")
journal.grant(6, "node2:7381")
journal.end(5)
print("granted", flush=True)
sys.stdin.read()
"""


def reopened(directory: Path) -> dict[int, str]:
    journal = LeaseJournal(directory)
    earlier = dict(journal.earlier)
    journal.close()
    return earlier


def after_a_kill(directory: Path) -> Path:
    """A directory like this one, whose journal is open, as if its tracker had just been killed."""
    return Path(shutil.copytree(directory, directory.with_name(f"{directory.name} after a kill")))


@contextmanager
def no_room(left_bytes: int) -> Iterator[None]:
    """Files of this process take so many bytes and no more; what is written across that end is cut
    there, as on a disk that is full."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_new_journal_knows_of_no_lease(tmp_path: Path) -> None:
    assert reopened(tmp_path / "state" / "deep") == {}


@pytest.mark.slow
def test_what_was_out_when_the_tracker_was_killed_may_be_out_still(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GRANT_AND_WAIT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as tracker:
        assert tracker.stdout is not None
        assert tracker.stdout.readline() == b"granted\n"
        tracker.send_signal(signal.SIGKILL)

    assert reopened(tmp_path) == {6: "node2:7381"}
    assert reopened(tmp_path) == {6: "node2:7381"}, "also after another restart"


def test_a_second_tracker_is_told_and_takes_no_lease_out_of_the_journal(tmp_path: Path) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(5, "node1:7381")
    descriptors = len(os.listdir("/proc/self/fd"))

    with pytest.raises(DirectoryUnusable, match=r"another tracker uses .*tracker\.state_dir"):
        LeaseJournal(tmp_path)

    assert len(os.listdir("/proc/self/fd")) == descriptors
    journal.grant(6, "node2:7381")
    assert reopened(after_a_kill(tmp_path)) == {5: "node1:7381", 6: "node2:7381"}
    journal.close()


@pytest.mark.parametrize(
    "node", ["no address", "\nend 1\n", "x\u2028end 1", "", "100%:1", "[fd00::1]:7381", "\0"]
)
def test_whatever_a_node_calls_itself_no_lease_is_forgotten(tmp_path: Path, node: str) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(1, "node1:7381")
    journal.grant(2, node)

    assert reopened(after_a_kill(tmp_path)) == {1: "node1:7381", 2: node}
    journal.close()
    assert reopened(tmp_path) == {1: "node1:7381", 2: node}


def test_leases_end(tmp_path: Path) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(5, "node1:7381")
    journal.end(5)
    journal.end(99)
    journal.close()

    assert reopened(tmp_path) == {}


def test_lease_ids_grow_from_one_life_to_the_next(tmp_path: Path) -> None:
    first = LeaseJournal(tmp_path)
    later = first.first_lease_id + 10**15
    first.grant(later, "node1:7381")
    first.close()

    second = LeaseJournal(tmp_path)

    assert second.first_lease_id == later + 1
    second.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"boot 00000000-0000-0000-0000-000000000000\n",
        b"garbage\n",
        b"\0" * 100,
        b"\xff\xfe\n",
        b"boot BOOT",
        b"boot BOOT\ngrant 5\n",
        b"boot BOOT\ngrant x node\n",
        b"boot BOOT\ngrant -5 node\n",
        b"boot BOOT\nend 5 6\n",
        b"boot BOOT\n\n",
        b"boot BOOT\ngrant 5 node1:7381\nend",
        b"boot BOOT\ngrant 17 node1:7381\ngrant 1 node2:7381\nend 1",
    ],
)
def test_a_damaged_journal_or_one_of_another_boot_means_that_some_lease_may_be_out(
    tmp_path: Path, content: bytes
) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    (tmp_path / "leases").write_bytes(content.replace(b"BOOT", boot_id))

    earlier = reopened(tmp_path)

    assert earlier[UNKNOWN_LEASE_ID] == UNKNOWN_NODE


def test_for_how_long_there_was_no_tracker_is_known_unless_the_journal_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = 5000.0
    monkeypatch.setattr(lease_journal, "now_s", lambda: clock_s)
    first = LeaseJournal(tmp_path)
    assert first.away_s is None
    clock_s = 5100.0
    first.present()
    first.grant(7, "node1:7381")
    first.close()
    clock_s = 5130.25

    second = LeaseJournal(tmp_path)
    assert second.away_s == 30.25
    second.close()
    third = LeaseJournal(tmp_path)
    assert third.away_s == 30.25, "the second one has not said that it was there"
    third.close()
    with (tmp_path / "leases").open("ab") as file:
        file.write(b"present")

    damaged = LeaseJournal(tmp_path)
    assert damaged.away_s == math.inf
    damaged.close()


def test_a_half_written_line_ends_no_other_lease(tmp_path: Path) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(1, "node1:7381")
    journal.grant(17, "node2:7381")
    journal.close()
    with (tmp_path / "leases").open("ab") as file:
        file.write(b"end 1")

    earlier = reopened(tmp_path)

    assert earlier[1] == "node1:7381"
    assert earlier[17] == "node2:7381"


# At once; in the first line of a new file; at the end of that line; in the line of the lease.
@pytest.mark.parametrize("left_bytes", [0, 10, 42, 90])
def test_leases_that_find_no_room_are_granted_and_make_the_next_tracker_wait(
    tmp_path: Path, left_bytes: int
) -> None:
    journal = LeaseJournal(tmp_path)
    journal.present()
    journal.grant(5, "node1:7381")
    with no_room(left_bytes):
        journal.grant(6, "node2:7381")
        journal.end(5)
        journal.present()

    killed = LeaseJournal(after_a_kill(tmp_path))

    assert killed.earlier[UNKNOWN_LEASE_ID] == UNKNOWN_NODE
    assert killed.away_s == math.inf
    killed.close()
    journal.close()


def test_the_journal_is_complete_again_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(5, "node1:7381")
    descriptors = len(os.listdir("/proc/self/fd"))
    with no_room(0):
        for lease_id in range(6, 10):
            journal.grant(lease_id, "node2:7381")
        journal.end(5)
        journal.end(6)
    assert [record.levelname for record in caplog.records] == ["ERROR"], "said once"
    assert "cannot write" in caplog.text

    journal.end(7)

    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert reopened(after_a_kill(tmp_path)) == {8: "node2:7381", 9: "node2:7381"}
    journal.close()
    assert sorted(os.listdir(tmp_path)) == ["leases", "lock"]


def test_a_journal_that_is_closed_on_a_full_disk_makes_the_next_tracker_wait(
    tmp_path: Path,
) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(5, "node1:7381")
    with no_room(0):
        journal.close()

    assert UNKNOWN_LEASE_ID in reopened(tmp_path)


def test_the_file_stays_short_however_many_leases_were_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_journal, "COMPACT_BYTES", 2000)
    journal = LeaseJournal(tmp_path)
    journal.grant(1, "patient:7381")
    for lease_id in range(2, 500):
        journal.grant(lease_id, "node:7381")
        journal.end(lease_id)
        assert (tmp_path / "leases").stat().st_size < 2100

    assert reopened(after_a_kill(tmp_path)) == {1: "patient:7381"}
    journal.close()
    assert sorted(os.listdir(tmp_path)) == ["leases", "lock"]


def test_only_its_owner_may_read_or_write_the_journal(tmp_path: Path) -> None:
    LeaseJournal(tmp_path).close()

    assert (tmp_path / "leases").stat().st_mode & 0o777 == 0o600


def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(DirectoryUnusable, match=r"file as a directory.*tracker\.state_dir"):
        LeaseJournal(tmp_path / "file")


@pytest.mark.parametrize("name", ["leases", "leases.new"])
def test_what_a_planted_link_leads_to_stays_as_it_is(tmp_path: Path, name: str) -> None:
    thesis = tmp_path / "thesis"
    thesis.write_text("years of work\n")
    state_dir = tmp_path / "state"
    state_dir.mkdir(0o700)
    (state_dir / name).symlink_to(thesis)

    with suppress(LocalError):
        LeaseJournal(state_dir).close()

    assert thesis.read_text() == "years of work\n"


def test_a_link_in_the_place_of_the_journal_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "of somebody else").write_bytes(b"")
    (tmp_path / "leases").symlink_to(tmp_path / "of somebody else")

    with pytest.raises(LocalError, match="leases"):
        LeaseJournal(tmp_path)


def test_a_journal_that_cannot_be_written_at_first_is_an_error_and_stays_as_it_is(
    tmp_path: Path,
) -> None:
    journal = LeaseJournal(tmp_path)
    journal.grant(5, "node1:7381")
    journal.close()
    descriptors = len(os.listdir("/proc/self/fd"))

    with no_room(10), pytest.raises(NoSpace, match="leases"):
        LeaseJournal(tmp_path)

    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert reopened(tmp_path) == {5: "node1:7381"}


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    LeaseJournal(tmp_path / "state").close()

    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    state_dir.chmod(mode)

    with pytest.raises(DirectoryUnusable, match=r"state has mode .*chmod"):
        LeaseJournal(state_dir)

    assert os.listdir(state_dir) == []


@needs_root
def test_a_directory_that_somebody_else_has_prepared_is_refused(root: Path) -> None:
    root.parent.chmod(0o1777)  # as /var/tmp, where they may do that
    state_dir = root / "tracker"
    state_dir.mkdir(parents=True)
    os.chown(state_dir, 6001, 6001)
    with pytest.raises(
        DirectoryUnusable, match=r"tracker belongs to uid 6001, .*in tracker\.state_dir"
    ):
        LeaseJournal(state_dir)
    os.chown(root, 6001, 6001)
    with pytest.raises(
        DirectoryUnusable, match=r"uid 6001, who could exchange .*in tracker\.state_dir"
    ):
        LeaseJournal(state_dir)
    assert os.listdir(state_dir) == []


def test_a_directory_whose_place_anybody_could_take_is_refused(tmp_path: Path) -> None:
    (tmp_path / "everybody").mkdir()
    (tmp_path / "everybody").chmod(0o777)

    with pytest.raises(DirectoryUnusable, match=r"anybody may write into .*everybody"):
        LeaseJournal(tmp_path / "everybody" / "state")
