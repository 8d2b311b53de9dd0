"""What ``swarmcache cf`` does besides getting one file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from swarmcache.bundle_get import BundleAnswer, get_with_bundles
from swarmcache.bundles import NoBundle
from swarmcache.cf_config import CfConfig
from swarmcache.cf_talk import Story, say, say_not_connected, show
from swarmcache.client import Answer, Client, Progress, real_path_of
from swarmcache.cp import CopyOutcome, CopyProgress, copy_files, signals_end_it
from swarmcache.errors import (
    BadMessage,
    DaemonRefused,
    DaemonUnavailable,
    SwarmcacheError,
    UsageError,
)
from swarmcache.local_socket import reason_of
from swarmcache.locate import FileLocations, locate, own_path, path_by_settings
from swarmcache.locations import OUTPUTS_DIRECTORY, default_output_dir

EXIT_FAILED = 1


# --- -l ------------------------------------------------------------------------------------------


def show_locations(
    client: Client, asked: Sequence[bytes], limit: int | None, bundle: bool | None
) -> int:
    """Print ``HOST:PATH:SIZE`` of every verified copy. 1 where one FILE cannot be told about.

    Raises OSError for stdout.
    """
    found = 0
    complete = True
    for name in asked:
        real_path = real_path_of(name)
        say(f"LOG: request: {os.fsdecode(real_path)}")
        if not os.path.isfile(real_path):
            say(f"ERROR: file not found '{os.fsdecode(real_path)}'")
            complete = False
            continue
        try:
            for file in locate(
                client, [real_path], limit, lambda text: say(f"WARN: {text}"), bundle
            ):
                complete &= _show_replicas(file)
                found += len(file.replicas)
        except DaemonUnavailable as error:
            say_not_connected(str(error))
            complete = False
            break
        except (BadMessage, DaemonRefused, NoBundle) as error:
            say(f"ERROR: {error}")
            complete = False
    say(f"LOG: {found} locations found")
    return 0 if complete else EXIT_FAILED


def _show_replicas(file: FileLocations) -> bool:
    """Print the copies of one file. Whether that is all there is to know."""
    for replica in file.replicas:
        show(b"%s:%s:%d" % (os.fsencode(replica.node), replica.path, replica.size_bytes))
    if not file.readable:
        say(f"ERROR: cannot read '{os.fsdecode(file.path)}': {file.reason}")
    elif file.reason:
        say(f"ERROR: {file.reason}")
    return not file.reason


# --- -cp -----------------------------------------------------------------------------------------


def copy(
    client: Client,
    source: bytes,
    destination: bytes,
    *,
    register: bool = True,
    bundle: bool | None = None,
) -> int:
    """Copy a file, or all that a bundle lists, to a file server. 1 where one was not copied."""
    if not os.path.isfile(source):
        say(f"ERROR: file not found '{os.fsdecode(source)}'")
        return EXIT_FAILED
    if _is_same(source, destination):  # as where -d has found no other place for it
        say(f"LOG: {os.fsdecode(source)} and {os.fsdecode(destination)} are the same file")
        return 0
    try:
        with signals_end_it():
            outcomes = copy_files(
                client,
                [source],
                destination,
                bundle=bundle,
                register=register,
                on_progress=_Waiting().tell,
            )
            copied = [_tell_copied(outcome) for outcome in outcomes]
    except UsageError as error:
        say(f"ERROR: cannot copy {os.fsdecode(source)} to {os.fsdecode(destination)}: {error}")
        return EXIT_FAILED
    return 0 if all(copied) else EXIT_FAILED


def _is_same(source: bytes, destination: bytes) -> bool:
    try:
        return os.path.samefile(source, destination)
    except OSError:  # there is no destination yet
        return False


def _tell_copied(outcome: CopyOutcome) -> bool:
    names = f"{os.fsdecode(outcome.source)} to {os.fsdecode(outcome.destination)}"
    for note in outcome.notes:
        say(f"LOG: {note}")
    if outcome.error:
        say(f"ERROR: cannot copy {names}: {outcome.error}")
        return False
    say(f"LOG: copied {names}{' (unsupervised)' if outcome.unsupervised else ''}")
    if outcome.unsupervised:
        say(f"WARN: {outcome.unsupervised}")
    if outcome.not_registered:
        say(f"WARN: not cached on this node: {outcome.not_registered}")
    return True


class _Waiting:
    """Tells once of each file that it has to wait."""

    def __init__(self) -> None:
        self._told: set[int] = set()

    def tell(self, progress: CopyProgress) -> None:
        if progress.waiting_for and progress.index not in self._told:
            self._told.add(progress.index)
            say("LOG: no copy slot available. waiting")


# --- bundles -------------------------------------------------------------------------------------


def get_bundle(client: Client, real_path: bytes, *, bundle: bool | None, conjunct: bool) -> Answer:
    """Cache what a bundle lists, or the file where it is no bundle in spite of its name; and tell
    what becomes of it."""
    stories: dict[str, Story] = {}

    def tell(progress: Progress) -> None:
        stories.setdefault(progress.asked, Story(progress.asked)).tell(progress)

    (answer,) = get_with_bundles(
        client, [real_path], on_progress=tell, bundle=bundle, all_or_nothing=conjunct
    )
    if not isinstance(answer, BundleAnswer):
        stories.setdefault(answer.asked, Story(answer.asked)).end(answer)
        return answer
    for member in answer.members:
        if member.cached:
            stories.setdefault(member.asked, Story(member.asked)).end(member)
        else:
            say(f"WARN: cannot cache bundle content: {member.asked}: {member.reason}")
    if answer.reason:
        say(f"WARN: {answer.reason}")
        say("ERROR: caching of bundle archive failed")
        say("LOG: result is not cached")
    return answer


# --- -d ------------------------------------------------------------------------------------------


def show_destination(client: Client, asked: bytes, config: CfConfig) -> int:
    """Print a path on this node's disk for a file that a job writes and ``-cp`` brings back.

    It is the real path that the file will have, below a directory for such files. Among the copies
    it would be in the way of the copy that it becomes, and could not be written a second time.
    Raises OSError for stdout.
    """
    real_path = real_path_of(asked)
    try:
        path = _output_path(client, real_path, config)
    except (OSError, ValueError, SwarmcacheError) as error:
        reason = str(error) if isinstance(error, SwarmcacheError) else reason_of(error)
        say(f"ERROR: no directory for it on this node: {reason}")
        say("LOG: no local cache available")
        path = real_path
    show(path)
    return 0


def _output_path(client: Client, real_path: bytes, config: CfConfig) -> bytes:
    """Make the directories for an output. Raises OSError, ValueError, SwarmcacheError."""
    if not real_path.startswith(b"/"):
        raise ValueError("there is no current directory")
    base, mode = config.cache_dir, 0o700
    if base is None:
        outputs = b"/" + os.fsencode(OUTPUTS_DIRECTORY)
        try:
            return own_path(client, outputs + real_path)
        except DaemonUnavailable:
            # The next daemon shall find them as if it had made them itself.
            base, mode = os.fsdecode(path_by_settings(outputs)), 0o711
        except DaemonRefused:
            base = default_output_dir(os.geteuid())
    path = os.fsencode(_make_base(base, mode)).rstrip(b"/") + real_path
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    return path


def _make_base(base: str, mode: int) -> Path:
    """Make the directory, and those above it, or see that nobody else has, in a place like
    /var/tmp.

    Returns its real path, which is what was looked at: a link on the way to it may be somebody
    else's. Raises OSError, and ValueError for a directory in which others could put links in our
    way.
    """
    path = Path(base)
    for directory in reversed([path, *path.parents]):
        if not directory.is_dir():
            directory.mkdir(mode=mode, exist_ok=True)
    path = path.resolve(strict=True)
    for directory in (path, *path.parents):
        found = directory.stat()
        if found.st_uid not in (os.geteuid(), 0):
            raise ValueError(f"{directory} belongs to user {found.st_uid}")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
            raise ValueError(f"{directory} may be written by others")
    return path
