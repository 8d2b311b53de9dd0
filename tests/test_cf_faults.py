"""Faults of CacheManager, and for each the tests that show that swarmcache does not have it.

The table below names them in one place. Most are tests of the part that might have the fault; those
that fit nowhere else are in this file.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_daemons import COMMAND, LocalDaemons, LocalNode

# The tests by name; rows of the table of scenarios among them.
FAULTS = {
    "the first record that expires stops the whole server": [
        "test_nothing_that_nodes_say_raises_or_breaks_an_invariant",
        "test_who_leaves_is_nobodys_neighbour_and_reads_nothing",
    ],
    "a transfer whose record expires is cut off": [
        "test_a_heartbeat_renews_every_lease_of_the_node",
        "wait_active_slow_copy",
    ],
    "a slot is freed twice when a copy takes too long": [
        "test_the_slot_of_a_dead_holder_is_free_after_its_lease_and_not_before",
        "test_a_holder_that_was_stopped_for_longer_than_its_lease_does_not_read_on",
        "test_slots_are_never_exceeded_and_nobody_waits_for_ever_whatever_breaks",
    ],
    "two copies that begin in one second share a token": [
        "test_a_lease_id_is_used_once",
        "test_lease_ids_grow_from_one_life_to_the_next",
    ],
    "an outdated copy that is open is written over under its reader": [
        "test_who_has_an_outdated_copy_open_reads_on_in_it",
    ],
    "a killed client leaves a short file under the final name": [
        "test_no_kill_at_any_moment_loses_or_spoils_a_file",
        "test_a_kill_before_the_file_is_in_place_leaves_the_partial_file",
        "test_what_a_killed_copy_leaves_is_removed_by_the_next_one_but_nothing_that_is_alive",
    ],
    "a second copier of the same file gets the original": [
        "test_twenty_gets_of_one_file_on_one_node_are_one_download",
        "wait_active_parallel",
    ],
    "a path with spaces is split, one with shell characters executed": [
        "test_any_name_will_do_and_no_variable_is_needed",
        "test_it_is_called_by_its_path_or_found_in_path",
        "test_names_are_never_cut_or_lost",
    ],
    "with the server gone the original is printed although there is a copy": [
        "test_without_a_tracker_a_copy_that_is_here_is_printed",
        "test_a_tracker_that_was_killed_in_mid_swarm_and_comes_back_costs_nothing_but_time",
    ],
    "each call for a bundle leaves a list behind": [
        "bundle_archive",
        "test_equal_lists_are_one_file_and_others_are_not",
        "test_what_nobody_has_asked_for_in_a_while_is_removed",
    ],
    "parts do not run on a new Python": [
        "test_the_package_needs_nothing_that_python_3_8_does_not_have",
        "test_a_client_tells_whether_the_path_is_a_cached_one",
        "test_the_line_for_the_log_names_every_figure",
        "test_every_file_is_listed_once_with_its_nodes_and_with_its_path_where_that_is_known",
        "test_a_dataset_goes_from_all_nodes_and_its_neighbours_stay",
    ],
    "the size of the whole cache is measured anew for each file, or taken for nothing": [
        "test_publishing_and_dropping_keep_the_account_right",
        "test_the_limits_hold_for_concurrent_reservations",
        "test_jobs_that_together_want_more_than_the_disk_all_get_a_path_and_the_limits_hold",
    ],
    "a path in /work2 is taken for one of the mount /work": [
        "test_the_mount_table_finds_the_mount_of_a_path",
        "test_the_longest_prefix_of_whole_components_tells_the_file_server",
    ],
    "settings are evaluated": [
        "test_a_line_that_makes_no_sense_is_named_and_the_others_count",
    ],
    "the state of the server is a program in disguise": [
        "test_a_damaged_journal_or_one_of_another_boot_means_that_some_lease_may_be_out",
    ],
    "whoever reaches the port is believed": [
        "test_a_stranger_with_another_secret_gets_nothing_and_is_not_listed",
        "test_a_stranger_never_gets_more_bytes_than_it_sent",
    ],
    "-l has the exit code of its last file": [
        "test_l_exits_with_1_where_any_file_is_missing",
    ],
    "the number of copies that may be asked is forgotten after a wait": [
        "location",
        "test_no_more_are_listed_than_wanted_and_the_others_are_counted",
    ],
    "without USER or HOME, or with a name that is not ASCII, nothing is printed or cached": [
        "test_it_works_with_an_empty_environment",
        "test_any_name_will_do_and_no_variable_is_needed",
    ],
}


def test_the_tests_of_each_fault_are_there() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    there = {
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, functions)
    }

    assert {name for names in FAULTS.values() for name in names} - there == set()


# --- those that are nowhere else -----------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalDaemons]:
    with LocalDaemons(tmp_path) as local:
        local.start_tracker()
        yield local


def cf(node: LocalNode, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"SWARMCACHE_SOCKET": str(node.socket), "HOME": "/nowhere"}
    return subprocess.run(
        [*COMMAND, "cf", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=60,
    )


@pytest.mark.slow
def test_who_has_an_outdated_copy_open_reads_on_in_it(local: LocalDaemons, tmp_path: Path) -> None:
    node = local.start_daemon()
    file = tmp_path / "file"
    file.write_text("what it was")
    former = Path(cf(node, file).stdout.removesuffix("\n"))
    with open(former) as reader:
        beside = tmp_path / "beside"
        beside.write_text("what it is now, and longer")
        os.replace(beside, file)

        done = cf(node, file)

        newer = Path(done.stdout.removesuffix("\n"))
        assert newer != file, done.stderr
        assert newer.read_text() == "what it is now, and longer"
        assert reader.read() == "what it was"


@pytest.mark.slow
def test_without_a_tracker_a_copy_that_is_here_is_printed(
    local: LocalDaemons, tmp_path: Path
) -> None:
    node = local.start_daemon()
    file = tmp_path / "file"
    file.write_text("1")
    first = cf(node, file)
    assert local.tracker is not None
    local.tracker.kill()

    done = cf(node, file)

    assert (done.returncode, done.stdout) == (0, first.stdout)
    assert done.stderr.endswith("LOG: using existing file\n")


@pytest.mark.slow
def test_l_exits_with_1_where_any_file_is_missing(local: LocalDaemons, tmp_path: Path) -> None:
    node = local.start_daemon()
    file = tmp_path / "file"
    file.write_text("1")
    copy = cf(node, file).stdout.removesuffix("\n")

    good = cf(node, "-l", file)
    done = cf(node, "-l", tmp_path / "missing", file)

    assert good.returncode == 0
    assert re.fullmatch(rf"[^:]+:{re.escape(copy)}:1\n", good.stdout)
    assert (done.returncode, done.stdout) == (1, good.stdout)
    assert f"ERROR: file not found '{tmp_path}/missing'\n" in done.stderr
    assert done.stderr.endswith("LOG: 1 locations found\n")
