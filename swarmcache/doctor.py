"""What is wrong with this installation, and the mend: ``swarmcache doctor``.

Looks at what the daemon would look at, with the daemon's own code where there is any, and works
when the daemon is down. Changes nothing, but for a scratch directory that it removes again. To be
run by root or the daemon's user; anybody else is told what could not be looked into.

Nothing on its way through the users' directories is opened but directories, by descriptor, and no
link is followed.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sqlite3
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from swarmcache.auth import ClusterKey
from swarmcache.cache_index import Trust
from swarmcache.client import Client
from swarmcache.config import Config, load, load_secrets
from swarmcache.disk import check_places
from swarmcache.disk_calls import reserve
from swarmcache.display import size_text
from swarmcache.errors import (
    BadMessage,
    CacheDirUnusable,
    ConfigError,
    DaemonRefused,
    DaemonUnavailable,
    LocalError,
)
from swarmcache.in_use import UseCheck
from swarmcache.listing import shown_path
from swarmcache.locations import RESULTS_DIRECTORY
from swarmcache.own_directory import check_ours
from swarmcache.partial_store import PARTIAL_AGE_MAX_S
from swarmcache.tree_walk import walk
from swarmcache.user_tree import ACL_NAME, acl_for, open_cache_root

LISTED_MAX = 10  # names of one finding; the others are counted
TRACKER_S_MAX = 2.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PARTIAL = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong. ``do``: what would mend it."""

    what: str
    where: str
    do: str


@dataclass(frozen=True)
class Note:
    """Something worth knowing that needs no mend."""

    what: str
    where: str


Found = Iterator[Finding | Note]


@dataclass
class Report:
    """All that was found."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(self, found: Iterable[Finding | Note]) -> None:
        for each in found:
            if isinstance(each, Finding):
                self.findings.append(each)
            else:
                self.notes.append(each)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "wrong": [asdict(each) for each in self.findings],
            "notes": [asdict(each) for each in self.notes],
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for finding in self.findings:
            yield f"wrong: {finding.what}"
            yield f"   in: {finding.where}"
            yield f"   do: {finding.do}"
        for note in self.notes:
            yield f"note: {note.what}"
            yield f"   in: {note.where}"
        count = len(self.findings)
        yield f"wrong: {count} in all" if count else "nothing is wrong"


def examine(socket_path: Path | None, config_file: Path | None) -> Report:
    """Look at everything. Raises nothing for what it finds."""
    report = Report()
    client = Client(
        os.fsencode(socket_path) if socket_path else None,
        os.fsencode(config_file) if config_file else None,
    )
    try:
        config = load({"daemon.socket": socket_path}, os.environ, config_file)
    except ConfigError as error:
        report.add([Finding(str(error), str(config_file or "the settings"), "correct it")])
        return report
    where = str(config.file) if config.file else "no file: all settings have their defaults"
    report.add([Note("where the settings come from", where)])
    status: dict[str, Any] | None = None
    daemon_uid: int | None = None
    try:
        status, daemon_uid = client.status(), _daemon_uid(client)
    except (DaemonUnavailable, BadMessage, DaemonRefused) as error:
        refused = isinstance(error, DaemonRefused)
        mend = "look into its log" if refused else "start it: swarmcache daemon"
        report.add([Finding(str(error), str(config.daemon.socket), mend)])
        report.add(_tracker(config))
    else:
        report.add(_daemon(config, status))
        report.add(_members(status))
    report.add(_secret(config, status))
    report.add(_directories(config, status, daemon_uid))
    return report


def _daemon_uid(client: Client) -> int:
    """As whom the daemon runs that answers. Raises DaemonUnavailable."""
    with closing(client.connections.connect()) as connection:
        return connection.daemon_uid


# --- settings, daemon, tracker -------------------------------------------------------------------


def _secret(config: Config, status: dict[str, Any] | None) -> Found:
    file = config.cluster.secret_file
    if file is None:
        stay = "without a secret the servers stay on the loopback, where they serve any user"
        yield Note(stay, "cluster.secret_file")
        return
    try:
        owner_uid = os.stat(file).st_uid
    except OSError as error:
        yield Finding(
            f"the secret cannot be found: {error.strerror}",
            str(file),
            "put the cluster's secret there, or correct cluster.secret_file",
        )
        return
    if os.geteuid() not in (0, owner_uid):
        yield Note("only its owner can look at the secret; run this as root", str(file))
        return
    try:
        secrets = load_secrets(file, owner_uid)
    except ConfigError as error:
        what, _, mend = str(error).partition("; run: ")
        yield Finding(what, str(file), f"run: {mend}" if mend else "write it anew")
        return
    if status is not None:
        keys = [ClusterKey.from_secret(secret, config.cluster.label) for secret in secrets]
        yield from _secrets_in_use([key.tag for key in keys], status, str(file))


def _secrets_in_use(tags: list[str], status: dict[str, Any], file: str) -> Found:
    """Whether the daemon uses what the file says, and all others understand it."""
    used = status["node"]["key_tags"]
    if used != tags:
        yield Finding(
            f"the daemon uses the secrets {' '.join(used)}, the file has {' '.join(tags)}",
            file,
            "send it SIGHUP",
        )
    cluster = status.get("cluster")
    if not cluster:
        return
    accepted = {"the tracker": cluster["key_tags"]}
    accepted |= {node["node"]: node["key_tags"] for node in cluster["nodes"]}

    def without(tag: str) -> list[str]:
        return [who for who, known in accepted.items() if tag not in known]

    if lacking := without(tags[0]):
        yield Finding(
            f"these do not accept the secret {tags[0]}, which is spoken here",
            _some(lacking),
            "bring the file there and send SIGHUP to daemon and tracker",
        )
    for tag in tags[1:]:
        if lacking := without(tag):
            yield Note(f"these do not accept the secret {tag} yet", _some(lacking))
        else:
            yield Note(f"all accept the secret {tag} as well as {tags[0]}", file)
    if others := [who for who, known in accepted.items() if set(known) - set(tags)]:
        yield Note("these accept a secret that this node's file does not have", _some(others))


def _daemon(config: Config, status: dict[str, Any]) -> Found:
    node = status["node"]
    if not node["tracker_connected"]:
        why = f"the daemon has no tracker: {status.get('reason') or 'no reason given'}"
        if node.get("stand_in") is not None:
            why = f"the tracker is away, and {node['stand_in']} stands in for it"
        yield Finding(
            why,
            str(config.cluster.tracker),
            "start it there (swarmcache tracker), open the port, or correct cluster.tracker",
        )
    for directory in node.get("directories", []):
        if directory["lost"]:
            yield Finding(
                f"a disk is lost: {directory['lost']}",
                directory["path"],
                "mend or mount the disk, then restart the daemon",
            )
    distrusted = [peer["node"] for peer in node.get("peers", []) if peer["distrusted"]]
    if distrusted:
        yield Finding(
            "these peers delivered wrong bytes and are not asked again",
            _some(distrusted),
            "look for bad memory or disks there; a restart of this daemon trusts them again",
        )


def _members(status: dict[str, Any]) -> Found:
    """What the nodes of the cluster say of themselves, and what this one sees of them."""
    members = status.get("members") or []
    alive = [each for each in members if each["state"] in ("alive", "suspect")]
    sick = [each["node"] for each in alive if each["disk"] == "sick"]
    if sick:
        yield Finding(
            "the disks of these nodes fail, so they cache nothing",
            _some(sick),
            "run doctor there, mend or mount the disk, then restart the daemon",
        )
    versions = Counter(each["version"] for each in alive)
    if len(versions) > 1:
        (usual, count), *_ = sorted(versions.items(), key=lambda item: (-item[1], item[0]))
        others = [f"{each['node']} ({each['version']})" for each in alive
                  if each["version"] != usual]  # fmt: skip
        yield Finding(
            f"these nodes run another version than {usual}, which {count} nodes run",
            _some(others),
            "install the same version everywhere; neighbouring ones work together meanwhile",
        )
    dead = [each["node"] for each in members if each["state"] == "dead"]
    if dead:
        yield Note("these nodes are dead", _some(dead))
    full = [each["node"] for each in alive if each["disk"] == "full"]
    if full:
        yield Note("the caches of these nodes have no room for more", _some(full))


def _tracker(config: Config) -> Found:
    address = config.cluster.tracker
    try:
        socket.create_connection((address.host, address.port), TRACKER_S_MAX).close()
    except OSError as error:
        yield Finding(
            f"the tracker does not answer: {error.strerror or error}",
            str(address),
            "start it there (swarmcache tracker), open the port, or correct cluster.tracker",
        )


# --- cache directories ---------------------------------------------------------------------------


def _directories(config: Config, status: dict[str, Any] | None, daemon_uid: int | None) -> Found:
    """``daemon_uid``: of the daemon that told its ``status``; None where none runs."""
    roots = [os.fspath(root) for root in config.cache.dirs]
    if status is not None:
        roots = [each["path"] for each in status["node"]["directories"] if not each["lost"]]
    elif len(roots) > 1:
        try:
            check_places(config.cache.dirs)
        except LocalError as error:
            yield _finding(error, ", ".join(roots))
    for root in roots:
        directory = _Directory(config, root, daemon_uid)
        try:
            yield from directory.examine(single=len(config.cache.dirs) == 1)
        except LocalError as error:
            yield _finding(error, root)
        except OSError as error:
            yield Finding(f"the disk fails: {error.strerror}", root, "look into the kernel's log")


def _finding(error: LocalError, where: str) -> Finding:
    """What the daemon says, whose messages end with the mend."""
    what, _, mend = str(error).partition(": ")
    return Finding(what, where, mend or "look into it as root")


class _Directory:
    """One cache directory."""

    def __init__(self, config: Config, root: str, daemon_uid: int | None) -> None:
        self._config = config
        self._root = root
        self._own = root + "/.swarmcache"
        self._daemon_uid = daemon_uid
        self._running = daemon_uid is not None
        self._began_s = time.time()
        self._used_bytes = 0
        self._inodes: set[int] = set()  # of all objects

    def examine(self, *, single: bool) -> Found:
        """Raises LocalError with the mend, OSError."""
        if single and not os.path.lexists(self._root):
            yield Note("the cache directory will be made when the daemon is started", self._root)
            return
        daemon_uid = self._daemon_uid
        if daemon_uid is None:
            daemon_uid = _owner_of(self._config.daemon.socket)
        if os.geteuid() not in (0, daemon_uid):
            yield Note("run this as root to have the cache directory looked through", self._root)
            return
        _, root_fd = open_cache_root(self._root, make=False, daemon_uid=daemon_uid)
        try:
            own_fd = self._open_own(root_fd, daemon_uid)
            try:
                yield from self._features(own_fd)
            finally:
                os.close(own_fd)
            if os.path.exists(self._own + "/objects"):
                yield from self._partials()
                yield from self._objects()
                yield from self._foreign(root_fd)
            yield from self._space(root_fd)
        finally:
            os.close(root_fd)

    def _open_own(self, root_fd: int, daemon_uid: int) -> int:
        """The daemon's own directory, or the one that it will make it in. Raises LocalError."""
        try:
            fd = os.open(".swarmcache", _DIRECTORY, dir_fd=root_fd)
        except FileNotFoundError:
            return os.dup(root_fd)
        except NotADirectoryError as error:
            raise CacheDirUnusable(f"{self._own} is no directory: remove it") from error
        try:
            check_ours(fd, self._own, "cache.dir", forbidden=0o077, uid=daemon_uid)
        except LocalError:
            os.close(fd)
            raise
        return fd

    # What the file system offers

    def _features(self, own_fd: int) -> Found:
        """Try it in a scratch directory."""
        name = f"doctor-{os.getpid()}"
        os.mkdir(name, 0o700, dir_fd=own_fd)
        scratch_fd = os.open(name, _DIRECTORY, dir_fd=own_fd)
        try:
            yield from self._try_out(scratch_fd)
        finally:
            for each in os.listdir(scratch_fd):
                os.unlink(each, dir_fd=scratch_fd)
            os.close(scratch_fd)
            os.rmdir(name, dir_fd=own_fd)

    def _try_out(self, scratch_fd: int) -> Found:
        fd = os.open("file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=scratch_fd)
        try:
            try:
                os.link("file", "link", src_dir_fd=scratch_fd, dst_dir_fd=scratch_fd)
            except OSError as error:
                yield Finding(
                    f"the file system has no hard links: {error.strerror}",
                    self._root,
                    "choose another cache.dir: copies are handed out as hard links",
                )
            if not reserve(fd, 1):
                yield Note("no fallocate: space is accounted for, not set aside", self._root)
        finally:
            os.close(fd)
        if not UseCheck(scratch_fd).offers_leases():
            yield Note("no write leases: files in use are looked for in /proc", self._root)
        try:
            os.setxattr(scratch_fd, ACL_NAME, acl_for(os.geteuid() + 1))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            if os.geteuid() == 0:
                yield Finding(
                    "the file system has no POSIX ACLs, so only root can be served",
                    self._root,
                    "mount it with ACLs, choose another cache.dir, or run a daemon per user",
                )

    def _space(self, root_fd: int) -> Found:
        disk = os.fstatvfs(root_fd)
        capacity_bytes = disk.f_blocks * disk.f_frsize
        free_bytes = disk.f_bavail * disk.f_frsize
        min_free_bytes = self._config.cache.min_free.resolve_bytes(capacity_bytes)
        shown = (
            f"{size_text(free_bytes)} free of {size_text(capacity_bytes)}, the cache takes"
            f" {size_text(self._used_bytes)}, cache.min_free is {size_text(min_free_bytes)}"
        )
        if free_bytes + self._used_bytes < min_free_bytes:
            yield Finding(
                f"other files leave the cache no room: {shown}",
                self._root,
                "free space on that disk, or lower cache.min_free",
            )
        else:
            yield Note(shown, self._root)

    # What is left over

    def _partials(self) -> Found:
        oldest_s = self._began_s - PARTIAL_AGE_MAX_S
        names = dict(_there(f"{self._own}/partial"))
        kept: set[str] = set()
        for name, status in names.items():
            journal = names.get(name + ".chunks") if _PARTIAL.fullmatch(name) else None
            if journal is not None and max(status.st_mtime, journal.st_mtime) >= oldest_s:
                kept |= {name, name + ".chunks"}
        # Of a daemon that runs, what does not look complete may be what it is just about to do. Its
        # mtime may be that of its source already.
        useless = [
            name
            for name, status in names.items()
            if name not in kept and (not self._running or status.st_ctime < oldest_s)
        ]
        self._used_bytes += sum(512 * status.st_blocks for status in names.values())
        if useless:
            taken_bytes = sum(512 * names[name].st_blocks for name in useless)
            yield Finding(
                f"{len(useless)} partial files ({size_text(taken_bytes)}) that nobody can resume",
                _some(f"{self._own}/partial/{name}" for name in useless),
                "restart the daemon: it removes them",
            )

    def _objects(self) -> Found:
        """Compare objects and index, one directory of objects at a time."""
        unlisted: list[str] = []
        absent: list[str] = []
        with closing(_open_index(f"{self._own}/index.sqlite")) as index:
            readable = True
            for first_byte in range(256):
                # First the objects: a row is there before its object, and goes after it.
                there = self._list_objects(first_byte)
                if not readable:
                    continue
                try:
                    trusts = _listed(index, first_byte)
                except sqlite3.Error as error:
                    readable = False
                    yield Finding(
                        f"the cache index cannot be read: {error}",
                        f"{self._own}/index.sqlite",
                        "restart the daemon: it makes the index again from the files",
                    )
                else:
                    unlisted += there - trusts.keys()
                    absent += [n for n in trusts.keys() - there if trusts[n] != Trust.DOUBTFUL]
        objects = f"{self._own}/objects"
        places = {name: f"{objects}/{name[:2]}/{name}" for name in (*unlisted, *absent)}
        for what, names, there_now in (
            ("copies that the index does not list", unlisted, True),
            ("rows of the index without their copies", absent, False),
        ):
            still = [each for each in names if os.path.exists(places[each]) == there_now]
            if still:
                yield Finding(
                    f"{len(still)} {what}",
                    _some(places[each] for each in still),
                    "restart the daemon: it compares the index with the disk",
                )

    def _list_objects(self, first_byte: int) -> set[str]:
        names: set[str] = set()
        try:
            for name, status in _there(f"{self._own}/objects/{first_byte:02x}"):
                self._used_bytes += 512 * status.st_blocks
                if _PARTIAL.fullmatch(name):
                    names.add(name)
                    self._inodes.add(status.st_ino)
        except FileNotFoundError:
            pass  # no object begins like this
        return names

    def _foreign(self, root_fd: int) -> Found:
        """Files beside the cached ones: those of users, and links whose copy is gone."""
        owner_uid = os.fstat(root_fd).st_uid
        foreign: list[str] = []
        gone: list[str] = []
        unseen: list[str] = []
        foreign_bytes = 0

        def note(error: OSError) -> None:
            if error.errno != errno.ENOENT:  # gone meanwhile
                unseen.append(os.path.normpath(os.path.join(self._root, str(error.filename))))

        for path, directories, names, fd in walk(".", note, root_fd):
            below = path[2:]
            above, *within = below.split("/")
            if above == ".swarmcache" or within[:1] == [RESULTS_DIRECTORY]:
                directories.clear()
                continue
            for name in names:
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # gone meanwhile
                # Symbolic links are what the copy of a directory has from its source.
                if status.st_ino in self._inodes or stat.S_ISLNK(status.st_mode):
                    continue
                place = os.path.join(self._root, below, name)
                ours = status.st_uid == owner_uid and stat.S_ISREG(status.st_mode)
                if ours and status.st_mode & 0o222 == 0:
                    # One that is younger may have come while we were looking.
                    if status.st_ctime < self._began_s:
                        gone.append(place)
                else:
                    foreign.append(place)
                    foreign_bytes += 512 * status.st_blocks
        if unseen:
            yield Note("directories that could not be looked through", _some(unseen))
        if foreign:
            what = f"{len(foreign)} files that users put there ({size_text(foreign_bytes)})"
            yield Note(f"{what}; they are left alone, and are not counted", _some(foreign))
        if gone:
            yield Finding(
                f"{len(gone)} read-only files of the daemon's user that are no copies of anything",
                _some(gone),
                "remove them if they are not files of your own",
            )


def _there(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """What is in a directory; of what goes while we look, as beside a busy daemon, nothing.

    Raises OSError, FileNotFoundError for the directory alone.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.name, status


def _owner_of(socket_path: Path) -> int:
    """Whose daemon it is: who made the socket, or else who would."""
    try:
        return os.lstat(socket_path).st_uid
    except FileNotFoundError:
        return os.geteuid()


def _open_index(path: str) -> sqlite3.Connection:
    """The index, to be read only: also while the daemon uses it. Raises sqlite3.Error."""
    # Without a log nobody has it open, and SQLite could not make the log's index to read it.
    how = "mode=ro" if os.path.exists(path + "-wal") else "immutable=1"
    return sqlite3.connect(f"file:{quote(path)}?{how}", uri=True, timeout=10.0)


def _listed(index: sqlite3.Connection, first_byte: int) -> dict[str, int]:
    """The trust of every replica whose version id begins with this byte."""
    above = bytes([first_byte + 1]) if first_byte < 255 else b"\xff" * 33
    rows = index.execute(
        "SELECT version_id, trust FROM replica WHERE version_id >= ? AND version_id < ?",
        (bytes([first_byte]), above),
    )
    return {version_id.hex(): trust for version_id, trust in rows}


def _some(names: Iterable[str]) -> str:
    """The first names, fit for a terminal, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(shown_path(os.fsencode(name)) for name in ordered[:LISTED_MAX])
    return f"{shown} and {len(ordered) - LISTED_MAX} more" if len(ordered) > LISTED_MAX else shown
