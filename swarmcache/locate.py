"""Where files are: on which nodes, and where on this one. The caller's end of these questions.

    with Client() as client:
        for file in locate(client, [b"/nfs/corpus/train.hdf"]):
            print(file.path, file.replicas)

Directories and bundles stand for the files in them. The daemon is shown that the caller may read
what it is asked about, by open descriptors, as for ``get``.
"""

from __future__ import annotations

import os
import pwd
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from swarmcache import answer_stream
from swarmcache.bundles import NoBundle, read_if_bundle
from swarmcache.client import Client, Source, open_source, real_path_of
from swarmcache.directories import list_directory
from swarmcache.errors import (
    BadMessage,
    DaemonRefused,
    DaemonUnavailable,
    DirectoryUnusable,
    SourceUnreadable,
)
from swarmcache.local_protocol import (
    LOCATIONS_FILES_MAX,
    AboutPlaces,
    CopyPath,
    CopyPathOf,
    End,
    Failed,
    Locations,
    LocationsOf,
    Notice,
    OfPlaces,
    Room,
    RoomFor,
    decode_place_answer,
    encode_request,
)
from swarmcache.local_socket import Connection
from swarmcache.locations import default_cache_dir

# Of one answer: the places of one file on as many nodes as the tracker names at once.
ANSWER_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Replica:
    """A verified copy. ``node``: its host name, ``path``: of the caller's copy there.

    ``linked``: that path is there. Or else a ``get`` of the same user on that node puts it there at
    once, without a transfer.
    """

    node: str
    path: bytes
    size_bytes: int
    linked: bool


@dataclass(frozen=True, slots=True)
class FileLocations:
    """Where one file is. ``path``: its real path.

    ``more``: so many more nodes are said to hold it, and were not asked. ``reason``: why there may
    be replicas that nobody knows of, or, where the file is not ``readable``, why not.
    """

    path: bytes
    size_bytes: int = 0
    replicas: tuple[Replica, ...] = ()
    more: int = 0
    reason: str = ""
    readable: bool = True


@dataclass(frozen=True, slots=True)
class NodeBytes:
    """How many bytes of the files in question a node holds."""

    node: str
    size_bytes: int


def ignore(text: str) -> None:
    """For callers who do not want to know."""


def locate(
    client: Client,
    paths: Iterable[bytes],
    limit: int | None = None,
    on_notice: Callable[[str], None] = ignore,
    bundle: bool | None = None,
) -> Iterator[FileLocations]:
    """Where each of the files is that ``paths`` stand for, in order, as the answers come.

    ``limit``: no more nodes per file. ``bundle``: whether files are bundles; None to go by their
    names. ``on_notice`` hears of nodes that do not answer, whose replicas are not listed.
    Raises DaemonUnavailable, DaemonRefused, BadMessage.
    """
    files = (file for path in paths for file in _files_and_faults(path, bundle))
    while batch := list(islice(files, LOCATIONS_FILES_MAX)):
        yield from _locate_some(client, batch, limit, on_notice)


def hosts(
    client: Client,
    paths: Iterable[bytes],
    on_notice: Callable[[str], None] = ignore,
    bundle: bool | None = None,
) -> list[NodeBytes]:
    """The nodes that hold some of these files, those first that hold most bytes. As ``locate``."""
    return rank_hosts(locate(client, paths, None, on_notice, bundle))


def rank_hosts(files: Iterable[FileLocations]) -> list[NodeBytes]:
    """Nodes by how many bytes they hold of all these files together, the most first.

    A file that is named twice counts once, and so do several daemons of one node.
    """
    held: Counter[str] = Counter()
    sizes = {file.path: file for file in files}
    for file in sizes.values():
        for node in {replica.node for replica in file.replicas}:
            held[node] += file.size_bytes
    ranked = [NodeBytes(node, size_bytes) for node, size_bytes in held.items()]
    return sorted(ranked, key=lambda each: (-each.size_bytes, each.node))


def local_path(client: Client, path: bytes, config_file: Path | None = None) -> bytes:
    """Where the copy of a file is on this node, or would be; nothing is copied.

    For a directory: where its copy is or would be, by the first file in it. Without a daemon it is
    as the settings say. Raises SourceUnreadable, DaemonRefused, BadMessage, ConfigError,
    DirectoryUnusable.
    """
    if os.path.isdir(path):
        listing = list_directory(path)
        first = next(iter(listing.names), None)
        if first is None:
            return path_by_settings(listing.root, config_file)
        of_first = local_path(client, os.path.join(listing.root, first), config_file)
        return of_first.removesuffix(b"/" + first)
    source = open_source(path)
    try:
        return _copy_path(client, CopyPathOf(source.real_path), source.fd)
    except DaemonUnavailable:
        return path_by_settings(source.real_path, config_file)
    finally:
        source.close()


def own_path(client: Client, path: bytes) -> bytes:
    """Where a file of the caller's own belongs, to be copied to ``path`` later, which need not
    exist. The directories on the way are there afterwards.

    Raises DaemonUnavailable, DaemonRefused, BadMessage.
    """
    return _copy_path(client, CopyPathOf(real_path_of(path), opened=False))


def room_for(client: Client, fds: Sequence[int]) -> Room:
    """Whether there can be room for open files, at most ``LOCATIONS_FILES_MAX`` of them.

    Raises DaemonUnavailable, DaemonRefused, BadMessage.
    """
    answer = _ask(client, RoomFor(len(fds)), fds)[-1]
    if not isinstance(answer, Room):
        raise BadMessage("the daemon's answer says nothing of room")
    return answer


def path_by_settings(real_path: bytes, config_file: Path | None = None) -> bytes:
    """Where a daemon with these settings has or would have the caller's copy.

    Of several cache directories, and root's, the first where it is; else the first. Not in one that
    is somebody else's: by default it is below /var/tmp, where anybody could have made it, and what
    is in it. Raises ConfigError, DirectoryUnusable.
    """
    from swarmcache.config import load

    uid = os.geteuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    settings = load({}, os.environ, config_file, uid)
    directories = [*map(os.fsencode, settings.cache.dirs), os.fsencode(default_cache_dir(0))]
    below = b"/" + os.fsencode(user) + real_path
    owners = {directory: _owner_of(directory) for directory in directories}
    places = [each + below for each, owner in owners.items() if owner in (None, 0, uid)]
    if there := next(filter(os.path.lexists, places), None):
        return there
    first, owner = next(iter(owners.items()))
    if owner not in (None, 0, uid):
        whose = f"belongs to uid {owner}, who is neither you nor root"
        raise DirectoryUnusable(f"{os.fsdecode(first)} {whose}")
    return first + below


def _owner_of(directory: bytes) -> int | None:
    """None where it is not there, or cannot be looked at."""
    try:
        return os.lstat(directory).st_uid
    except OSError:
        return None


def files_of(
    path: bytes, bundle: bool | None, on_fault: Callable[[bytes, str], None]
) -> Iterator[bytes]:
    """The files that a path stands for: those of a bundle, those below a directory, or itself.

    ``on_fault`` hears of what stands for files that nobody can tell, and why: what is no bundle,
    contrary to ``bundle``, and directories that cannot be listed.
    """
    try:
        lines = read_if_bundle(path, bundle)
    except SourceUnreadable:
        lines = None  # whoever opens it next is told the same
    except NoBundle as error:
        on_fault(real_path_of(path), str(error))
        return
    for member in [path] if lines is None else filter(None, lines):
        if not os.path.isdir(member):
            yield member
            continue
        try:
            listing = list_directory(member)
        except SourceUnreadable as error:
            on_fault(real_path_of(member), str(error))
            continue
        for name, reason in listing.unseen.items():
            on_fault(os.path.join(listing.root, name), reason)
        yield from (os.path.join(listing.root, name) for name in listing.names)
        yield from listing.link_targets.values()


# --- the daemon ----------------------------------------------------------------------------------


def _files_and_faults(path: bytes, bundle: bool | None) -> Iterator[bytes | FileLocations]:
    """``files_of``, and what is to be said of what cannot be listed."""
    faults: list[FileLocations] = []
    yield from files_of(path, bundle, lambda *fault: faults.append(_unreadable(*fault)))
    yield from faults


def _locate_some(
    client: Client,
    paths: Sequence[bytes | FileLocations],
    limit: int | None,
    on_notice: Callable[[str], None],
) -> Iterator[FileLocations]:
    """As many files as one request may be about; of some all is known already."""
    found: dict[int, FileLocations] = {}
    asked: dict[int, Source] = {}
    with ExitStack() as stack:
        for number, path in enumerate(paths):
            if isinstance(path, FileLocations):
                found[number] = path
                continue
            try:
                asked[number] = open_source(path)
            except SourceUnreadable as error:
                found[number] = _unreadable(real_path_of(path), str(error))
            else:
                stack.callback(asked[number].close)
        fds = [source.fd for source in asked.values()]
        answers = _ask(client, LocationsOf(len(fds), limit), fds) if fds else []
    for answer in answers:
        if isinstance(answer, Notice):
            on_notice(answer.text)
    locations = [each for each in answers if isinstance(each, Locations)]
    if len(locations) != len(asked):
        raise BadMessage("the daemon's answer is not about the files that were asked about")
    for (number, source), each in zip(asked.items(), locations, strict=True):
        known = bool(each.path)
        found[number] = (
            _file_locations(each) if known else _unreadable(source.real_path, each.reason)
        )
    yield from (found[number] for number in range(len(paths)))


def _unreadable(real_path: bytes, reason: str) -> FileLocations:
    """A file that the caller cannot open, or that is not what it is taken for."""
    return FileLocations(real_path, reason=reason, readable=False)


def _file_locations(answer: Locations) -> FileLocations:
    replicas = tuple(
        Replica(each.node, each.path, answer.size_bytes, each.linked) for each in answer.locations
    )
    return FileLocations(answer.path, answer.size_bytes, replicas, answer.more, answer.reason)


def _copy_path(client: Client, request: CopyPathOf, *fds: int) -> bytes:
    answer = _ask(client, request, fds)[-1]
    if not isinstance(answer, CopyPath) or not answer.path.startswith(b"/"):
        raise BadMessage("the daemon's answer names no path")
    return answer.path


def _ask(client: Client, request: AboutPlaces, fds: Sequence[int]) -> list[OfPlaces]:
    """All that the daemon answers, the final line included.

    Raises DaemonUnavailable, DaemonRefused, BadMessage.
    """
    line = encode_request(request)
    connection, reused = client.send(line, *fds)
    try:
        try:
            answers = _receive(connection)
        except DaemonUnavailable:
            if not reused:
                raise
            connection.close()  # that daemon had ended, perhaps before it saw the request
            connection, _ = client.send(line, *fds)
            answers = _receive(connection)
    except BaseException:
        connection.close()
        raise
    client.give_back(connection)
    if isinstance(answers[-1], Failed):
        raise DaemonRefused(answers[-1].reason)
    return answers


def _receive(connection: Connection) -> list[OfPlaces]:
    answers: list[OfPlaces] = []
    for line in answer_stream.lines(connection, ANSWER_BYTES_MAX):
        answers.append(decode_place_answer(line))
        if isinstance(answers[-1], End | Failed | CopyPath | Room):
            break
    return answers
