"""The index of a cache directory: which replicas there are, since when, and for whom.

An SQLite file that opens in the same time whether it lists ten replicas or a million: totals are
kept by triggers, nothing is scanned. It can always be made again from the objects and their
manifests (``index_rebuild``), except for the pins. So in the place of an index that cannot be read
there is an empty one, which says of itself that it is not ``complete``.

Trust in a replica has three grades. DOUBTFUL: the daemon was changing it (its links, its name)
and was perhaps killed while doing so. WRITTEN: complete and verified, but perhaps still in the
page cache only; good as long as the machine has not been rebooted. DURABLE: fsync has succeeded.

Invariant: a row is DOUBTFUL from before the first change of its object until after the last, so
no moment of a kill leaves a row that tells more than what is true.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

from blake3 import blake3

from swarmcache.disk_calls import Stamp, disk_errors
from swarmcache.errors import DiskFailed, LocalError, NoSpace
from swarmcache.steady_clock import ClockReading
from swarmcache.user_tree import User

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_DAMAGE_MARK = ".damaged"
PAGE_ROWS = 1000  # rows per query when listing everything, so that no reader holds back the log
# Rows per page of a listing with links and pins, 6 us each: look-ups wait for one page, 2 ms.
LISTED_ROWS = 256
USERS_MAX = 16  # users named with one file of a listing, whose paths have up to 4 kB each
# SQLite's own default for its automatic checkpoint: 1000 pages of 4 KiB.
LOG_SIZE_MAX_BYTES = 4 << 20
# Of a big index the log may be longer, by this part of it: pages that change often are brought into
# the index once. It is within what every file counts for its row, see partial_store.OVERHEAD_BYTES.
LOG_SHARE = 8
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DISK_FAILED = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_NO_INDEX = (*_DAMAGED, sqlite3.SQLITE_ERROR)  # the last one: its tables are not ours

_SCHEMA = """
BEGIN;
CREATE TABLE replica (
    version_id BLOB PRIMARY KEY,
    path BLOB NOT NULL,
    directory INTEGER NOT NULL, -- a digest of the directory of path, see _directory_key
    chunk_size_bytes INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    trust INTEGER NOT NULL,
    boot_id BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    created_s REAL NOT NULL,
    last_used_s REAL NOT NULL,
    verified_s REAL NOT NULL
);
CREATE INDEX replica_by_path ON replica (path);
CREATE INDEX replica_by_directory ON replica (directory);
CREATE INDEX replica_by_use ON replica (last_used_s, version_id, stored_bytes);
CREATE INDEX replica_by_check ON replica (verified_s, version_id);
CREATE TABLE link (
    version_id BLOB NOT NULL,
    uid INTEGER NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (version_id, uid, name)
) WITHOUT ROWID;
CREATE TABLE pin (
    version_id BLOB NOT NULL,
    uid INTEGER NOT NULL,
    PRIMARY KEY (version_id, uid)
) WITHOUT ROWID;
CREATE TABLE total (
    file_count INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    complete INTEGER NOT NULL -- whether every object on the disk is listed
);
INSERT INTO total VALUES (0, 0, 0);
CREATE TRIGGER replica_added AFTER INSERT ON replica BEGIN
    UPDATE total SET file_count = file_count + 1, stored_bytes = stored_bytes + NEW.stored_bytes;
END;
CREATE TRIGGER replica_removed AFTER DELETE ON replica BEGIN
    UPDATE total SET file_count = file_count - 1, stored_bytes = stored_bytes - OLD.stored_bytes;
    DELETE FROM link WHERE version_id = OLD.version_id;
END;
PRAGMA user_version = 2;
COMMIT;
"""


# Not in the schema of the first versions, which can do without.
_CLOCK_TABLE = """
CREATE TABLE IF NOT EXISTS clock (
    wall_s REAL NOT NULL,
    up_s REAL NOT NULL,
    boot_id BLOB NOT NULL,
    steady_since_s REAL NOT NULL
)
"""


class Trust(IntEnum):
    """How far a replica can be trusted; see the head of this file."""

    DOUBTFUL = 0
    WRITTEN = 1
    DURABLE = 2


@dataclass(frozen=True, slots=True)
class Replica:
    """One row: a complete copy of a file version.

    ``path``: real path of the source. ``stored_bytes``: what the copy takes of the disk.
    ``boot_id``: the boot of the machine (16 bytes) in which the row was last true.
    ``stamp``: what stat says of the object, unless the row is DOUBTFUL. Times since the epoch;
    ``verified_s``: when every chunk was last found to have its digest; 0 for never.
    """

    version_id: bytes
    path: bytes
    chunk_size_bytes: int
    stored_bytes: int
    trust: Trust
    boot_id: bytes
    stamp: Stamp
    created_s: float
    last_used_s: float
    verified_s: float

    def trusted(self, boot_id: bytes) -> bool:
        """Whether the copy may be handed out without digesting it again."""
        return self.trust == Trust.DURABLE or (
            self.trust == Trust.WRITTEN and self.boot_id == boot_id
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One replica in a listing: who has a link to it, and which users (uids) have pinned it.

    Of both at most ``USERS_MAX`` are named. ``CacheDir`` adds ``root``, its path, and ``trusted``:
    whether the replica is handed out, or in doubt after a crash.
    """

    replica: Replica
    links: tuple[User, ...]
    pinned_by: tuple[int, ...]
    root: bytes = b""
    trusted: bool = False

    @property
    def copies(self) -> list[bytes]:
        """The paths of the copies, one per user."""
        users = (os.fsencode(user.name) for user in self.links)
        return [b"/".join((self.root, user)) + self.replica.path for user in users]


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One replica in a survey of all. ``path``: real path of the source."""

    version_id: bytes
    path: bytes
    size_bytes: int
    last_used_s: float
    pinned: bool


_COLUMNS = (
    "r.version_id, r.path, r.chunk_size_bytes, r.stored_bytes, r.trust, r.boot_id,"
    " r.size_bytes, r.mtime_ns, r.ctime_ns, r.inode, r.created_s, r.last_used_s,"
    " r.verified_s"
)

# The names of users have no "/", since directories are called so, and uids no ":".
_ENTRIES = (
    f"SELECT r.rowid, {_COLUMNS},"  # noqa: S608 (constants)
    " (SELECT group_concat(uid || ':' || name, '/') FROM (SELECT uid, name FROM link l"
    " WHERE l.version_id = r.version_id AND (? IS NULL OR l.uid = ?)"
    f" AND (? IS NULL OR l.name = ?) LIMIT {USERS_MAX})),"
    " (SELECT group_concat(uid) FROM (SELECT uid FROM pin p"
    f" WHERE p.version_id = r.version_id LIMIT {USERS_MAX}))"
    " FROM replica r WHERE (r.path, r.rowid) > (?, ?) AND r.path < ?"
    " ORDER BY r.path, r.rowid LIMIT ?"
)


_INSERT = "INSERT INTO replica VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_IF_NEW = _INSERT.replace("INSERT", "INSERT OR IGNORE", 1)


class CacheIndex:
    """The index file. Thread-safe. Every method raises LocalError when the file fails.

    Readers and writers have a connection each: a look-up never waits for a write, not even for
    the fsync in one.
    """

    def __init__(self, path: str) -> None:
        """Open the index. ``lost`` says why it had to be begun anew; empty if it had not."""
        self._path = path
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self.lost = ""
        try:
            self._writer = self._open()
        except _Unusable as reason:
            self.lost = str(reason)
            _remove(path)
            self._writer = self._open()
        with ExitStack() as stack, _sqlite_errors(path):
            stack.callback(self._writer.close)
            self._reader = stack.enter_context(closing(_connect(path)))
            self._reader.execute("PRAGMA query_only = ON")
            stack.pop_all()

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    def find(self, version_id: bytes) -> Replica | None:
        query = f"SELECT {_COLUMNS} FROM replica r WHERE version_id = ?"  # noqa: S608 (constants)
        rows = self._rows(query, version_id)
        return _replica(rows[0]) if rows else None

    def find_all(self, version_ids: Sequence[bytes]) -> dict[bytes, Replica]:
        """Those of a few replicas that there are."""
        marks = ", ".join("?" * len(version_ids))
        query = f"SELECT {_COLUMNS} FROM replica r WHERE version_id IN ({marks})"  # noqa: S608
        return {row[0]: _replica(row) for row in self._rows(query, *version_ids)}

    def listed_among(self, version_ids: Sequence[bytes]) -> set[bytes]:
        """Those of a few version ids that have a row, trusted or not."""
        marks = ", ".join("?" * len(version_ids))
        query = f"SELECT version_id FROM replica WHERE version_id IN ({marks})"  # noqa: S608
        return {version_id for (version_id,) in self._rows(query, *version_ids)}

    def known_paths(self, paths: Sequence[bytes]) -> set[bytes]:
        """Those of a few sources of which there is a replica, of whatever version."""
        marks = ", ".join("?" * len(paths))
        query = f"SELECT path FROM replica WHERE path IN ({marks})"  # noqa: S608 (marks)
        return {path for (path,) in self._rows(query, *paths)}

    def find_for(self, version_id: bytes, user: User) -> tuple[Replica, bool] | None:
        """The replica, and whether the user has a link to it."""
        query = (
            f"SELECT {_COLUMNS}, EXISTS (SELECT 1 FROM link l"  # noqa: S608 (constants)
            " WHERE l.version_id = r.version_id AND l.uid = ? AND l.name = ?)"
            " FROM replica r WHERE version_id = ?"
        )
        rows = self._rows(query, user.uid, user.name, version_id)
        return (_replica(rows[0][:-1]), bool(rows[0][-1])) if rows else None

    def find_ready(
        self, version_ids: Sequence[bytes], user: User, boot_id: bytes
    ) -> dict[bytes, Stamp]:
        """The stamps of those that are trusted, and that the user has a link to.

        One query for many, since each has its price (8 us), whatever it finds.
        """
        query = (
            "SELECT r.version_id, r.size_bytes, r.mtime_ns, r.ctime_ns, r.inode"  # noqa: S608
            " FROM replica r JOIN link l ON l.version_id = r.version_id"
            f" WHERE r.version_id IN ({','.join('?' * len(version_ids))})"
            " AND l.uid = ? AND l.name = ? AND (r.trust = 2 OR r.trust = 1 AND r.boot_id = ?)"
        )
        rows = self._rows(query, *version_ids, user.uid, user.name, boot_id)
        return {version_id: Stamp(*stamp) for version_id, *stamp in rows}

    def links(self, version_id: bytes) -> list[User]:
        """The users who have a link to the replica."""
        rows = self._rows("SELECT uid, name FROM link WHERE version_id = ?", version_id)
        return [User(uid, name) for uid, name in rows]

    def versions_of(self, path: bytes) -> dict[bytes, int]:
        """The versions of one source: inode per version id.

        A user's link may lead to any of them, also to one that is not listed as linked: a power
        cut may have taken the row of the link, and left the link.
        """
        return dict(self._rows("SELECT version_id, inode FROM replica WHERE path = ?", path))

    def count_beside(self, path: bytes) -> int:
        """How many replicas there are of sources in the directory of ``path``; counts to 1000."""
        query = "SELECT count(*) FROM (SELECT 1 FROM replica WHERE directory = ? LIMIT ?)"
        [(count,)] = self._rows(query, _directory_key(os.path.dirname(path)), PAGE_ROWS)
        return int(count)

    def entries(
        self, below: bytes = b"/", *, name: str | None = None, uid: int | None = None
    ) -> Iterator[list[Entry]]:
        """A page at a time: the replicas of sources at ``below`` or in that directory.

        Those only that a user with this name (and uid) has a link to; then no others are named.
        Every page is as quick as the next, so that look-ups do not wait for a user who has little.
        """
        directory = below.rstrip(b"/") + b"/"
        ranges = [(directory, directory[:-1] + b"0")]  # "0" comes after "/"
        if below != directory:
            ranges.insert(0, (below, below + b"\0"))
        for first, end in ranges:
            after: tuple[bytes, int] = (first, -1)
            while True:
                rows = self._rows(_ENTRIES, uid, uid, name, name, *after, end, LISTED_ROWS)
                found = [_entry(row) for row in rows]
                yield [entry for entry in found if entry.links or name is None]
                if len(rows) < LISTED_ROWS:
                    break
                after = (found[-1].replica.path, rows[-1][0])

    def survey(self) -> Iterator[list[Surveyed]]:
        """All replicas, a page at a time, in the order of their version ids."""
        query = (
            "SELECT version_id, path, size_bytes, last_used_s,"
            " EXISTS (SELECT 1 FROM pin p WHERE p.version_id = r.version_id)"
            " FROM replica r WHERE version_id > ? ORDER BY version_id LIMIT ?"
        )
        after = b""
        while rows := self._rows(query, after, LISTED_ROWS):
            yield [
                Surveyed(version_id, path, size_bytes, last_used_s, bool(pinned))
                for version_id, path, size_bytes, last_used_s, pinned in rows
            ]
            after = rows[-1][0]

    def unlink(self, version_id: bytes, user: User) -> None:
        """The user has no link to the replica any more."""
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM link WHERE version_id = ? AND uid = ? AND name = ?",
                (version_id, user.uid, user.name),
            )

    def count_below(self, directory: bytes) -> int:
        """How many replicas there are of sources anywhere below a directory; counts to 1000."""
        query = "SELECT count(*) FROM (SELECT 1 FROM replica WHERE path > ? AND path < ? LIMIT ?)"
        # "0" is the character after "/".
        [(count,)] = self._rows(query, directory + b"/", directory + b"0", PAGE_ROWS)
        return int(count)

    def totals(self) -> tuple[int, int]:
        """Number of replicas, and bytes of the disk that they take."""
        [(file_count, stored_bytes)] = self._rows("SELECT file_count, stored_bytes FROM total")
        return file_count, stored_bytes

    def kept(self, newest_s: float) -> tuple[int, int, int, int]:
        """Bytes of replicas used after ``newest_s``, of pinned ones, of all others; how many those.

        Slow; on a connection of its own: with a million replicas look-ups would wait for 0.1 s.
        """
        with _sqlite_errors(self._path), closing(_connect(self._path)) as connection:
            [sums] = connection.execute(
                "SELECT (SELECT total(stored_bytes) FROM replica"
                " WHERE last_used_s > ? AND version_id NOT IN (SELECT version_id FROM pin)),"
                " (SELECT total(stored_bytes) FROM replica"
                " WHERE version_id IN (SELECT version_id FROM pin)),"
                " total(stored_bytes), count(*) FROM replica"
                " WHERE last_used_s <= ? AND version_id NOT IN (SELECT version_id FROM pin)",
                (newest_s, newest_s),
            ).fetchall()
        young_bytes, pinned_bytes, others_bytes, others_count = map(int, sums)
        return young_bytes, pinned_bytes, others_bytes, others_count

    def eviction_pages(self, newest_s: float) -> Iterator[list[tuple[float, bytes, int]]]:
        """Replicas that are not pinned and were last used by ``newest_s``, the oldest ones first.

        Each as time of last use, version id and bytes of the disk; a page at a time, none empty.
        """
        query = (
            "SELECT last_used_s, version_id, stored_bytes FROM replica"
            " WHERE (last_used_s, version_id) > (?, ?) AND last_used_s <= ?"
            " AND version_id NOT IN (SELECT version_id FROM pin)"
            " ORDER BY last_used_s, version_id LIMIT ?"
        )
        after: tuple[float, bytes] = (-1.0, b"")
        while page := self._rows(query, *after, newest_s, PAGE_ROWS):
            yield [(last_used_s, version_id, size) for last_used_s, version_id, size in page]
            after = page[-1][:2]

    def wanted(self, version_ids: Sequence[bytes], newest_s: float) -> set[bytes]:
        """Those of a few replicas that are pinned, or were used after ``newest_s``."""
        marks = ", ".join("?" * len(version_ids))
        rows = self._rows(
            f"SELECT version_id FROM replica WHERE version_id IN ({marks})"  # noqa: S608 (marks)
            " AND (last_used_s > ? OR version_id IN (SELECT version_id FROM pin))",
            *version_ids,
            newest_s,
        )
        return {version_id for (version_id,) in rows}

    def trusted_ids(self, boot_id: bytes) -> Iterator[bytes]:
        """Version ids of all replicas that may be handed out, read a page at a time."""
        return self._ids(boot_id, trusted=True)

    def untrusted_ids(self, boot_id: bytes) -> Iterator[bytes]:
        """Version ids of all replicas that must be digested before they are handed out."""
        return self._ids(boot_id, trusted=False)

    def listed(self, first_byte: int) -> set[bytes]:
        """The version ids of all rows, trusted or not, that begin with this byte."""
        begin, end = bytes([first_byte]), bytes([first_byte]) + bytes([255]) * 32
        query = "SELECT version_id FROM replica WHERE version_id BETWEEN ? AND ?"
        return {version_id for (version_id,) in self._rows(query, begin, end)}

    def stalest(self, boot_id: bytes, before_s: float) -> tuple[float, bytes] | None:
        """Of the trusted replicas the one that was verified longest ago: when, and its version id.

        None when all have been verified since ``before_s``.
        """
        rows = self._rows(
            "SELECT verified_s, version_id FROM replica WHERE verified_s < ?"
            " AND (trust = 2 OR trust = 1 AND boot_id = ?) ORDER BY verified_s LIMIT 1",
            before_s,
            boot_id,
        )
        return rows[0] if rows else None

    def insert(self, replica: Replica) -> None:
        """Add a row; it must not be there yet."""
        with self._transaction() as connection:
            connection.execute(_INSERT, _new_row(replica))

    def insert_linked(self, replicas: Sequence[Replica], users: Sequence[User]) -> None:
        """Add rows, which must not be there yet, and the links that are about to be made."""
        with self._transaction() as connection:
            connection.executemany(_INSERT, map(_new_row, replicas))
            connection.executemany(
                "INSERT OR IGNORE INTO link VALUES (?, ?, ?)",
                [(each.version_id, user.uid, user.name) for each in replicas for user in users],
            )

    def insert_found(self, found: Iterable[tuple[Replica, Iterable[User]]]) -> None:
        """Add rows of objects that were found on the disk, and whose links lead to them.

        A row that is there already stays as it is.
        """
        with self._transaction() as connection:
            for replica, users in found:
                added = connection.execute(_INSERT_IF_NEW, _new_row(replica)).rowcount
                if added:
                    connection.executemany(
                        "INSERT OR IGNORE INTO link VALUES (?, ?, ?)",
                        [(replica.version_id, user.uid, user.name) for user in users],
                    )

    @property
    def complete(self) -> bool:
        """Whether every object on the disk has a row."""
        [(complete,)] = self._rows("SELECT complete FROM total")
        return bool(complete)

    def mark_complete(self) -> None:
        """Every object on the disk has a row now."""
        with self._transaction() as connection:
            connection.execute("UPDATE total SET complete = 1")

    def doubt(self, version_id: bytes, users: Iterable[User] = ()) -> None:
        """The object is about to be changed: these users get a link to it, or some lose theirs.

        The links are listed already now, so that none can be there without being known.
        """
        with self._transaction() as connection:
            connection.execute("UPDATE replica SET trust = 0 WHERE version_id = ?", (version_id,))
            connection.executemany(
                "INSERT OR IGNORE INTO link VALUES (?, ?, ?)",
                [(version_id, user.uid, user.name) for user in users],
            )

    def settle(
        self,
        version_id: bytes,
        stamp: Stamp,
        trust: Trust,
        boot_id: bytes,
        linked: Iterable[User] = (),
        *,
        verified_s: float | None = None,
    ) -> None:
        """The change is done: what stat says now, and which users have got a link by it.

        ``verified_s``: when every chunk was found to have its digest, if that was done as well.
        The links of these users no longer lead to other versions of the same source. A listed
        link that could not be made stays listed; the next look-up tries again.
        """
        with self._transaction() as connection:
            connection.execute(
                "UPDATE replica SET trust = ?, boot_id = ?, size_bytes = ?, mtime_ns = ?,"
                " ctime_ns = ?, inode = ?, verified_s = coalesce(?, verified_s)"
                " WHERE version_id = ?",
                (
                    trust,
                    boot_id,
                    stamp.size_bytes,
                    stamp.mtime_ns,
                    stamp.ctime_ns,
                    stamp.inode,
                    verified_s,
                    version_id,
                ),
            )
            for user in linked:
                connection.execute(
                    "DELETE FROM link WHERE uid = ? AND name = ? AND version_id IN (SELECT"
                    " o.version_id FROM replica o JOIN replica r USING (path)"
                    " WHERE r.version_id = ? AND o.version_id != r.version_id)",
                    (user.uid, user.name, version_id),
                )

    def settle_all(self, stamps: Iterable[tuple[bytes, Stamp]], boot_id: bytes) -> None:
        """New objects are in place, complete and verified: what stat says of each, by version id.

        There is no other version of any of their sources.
        """
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE replica SET trust = 1, boot_id = ?, size_bytes = ?, mtime_ns = ?,"
                " ctime_ns = ?, inode = ? WHERE version_id = ?",
                [
                    (boot_id, each.size_bytes, each.mtime_ns, each.ctime_ns, each.inode, version_id)
                    for version_id, each in stamps
                ],
            )

    def mark_durable(self, inodes: Mapping[bytes, int]) -> None:
        """These objects are on the disk: inode by version id. A doubtful row stays doubtful."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE replica SET trust = 2 WHERE version_id = ? AND inode = ? AND trust = 1",
                inodes.items(),
            )

    def touch(self, last_used_s: Mapping[bytes, float]) -> None:
        """Note when replicas were last used; seconds since the epoch."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE replica SET last_used_s = ? WHERE version_id = ?",
                [(at_s, version_id) for version_id, at_s in last_used_s.items()],
            )

    def limit_uses(self, now_s: float) -> None:
        """No replica was used later than now, whatever a clock may have said that was wrong."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE replica SET last_used_s = ? WHERE last_used_s > ?", (now_s, now_s)
            )

    def clock(self) -> ClockReading | None:
        """The last look at the clocks that was noted; None if there was none."""
        rows = self._rows("SELECT wall_s, up_s, boot_id, steady_since_s FROM clock")
        return ClockReading(*rows[0]) if rows else None

    def note_clock(self, reading: ClockReading) -> None:
        """Note a look at the clocks, for the next life."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM clock")
            connection.execute(
                "INSERT INTO clock VALUES (?, ?, ?, ?)",
                (reading.wall_s, reading.up_s, reading.boot_id, reading.steady_since_s),
            )

    def mark_verified(self, version_id: bytes, at_s: float) -> None:
        """Every chunk of the replica was found to have its digest."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE replica SET verified_s = ? WHERE version_id = ?", (at_s, version_id)
            )

    def pin(self, version_id: bytes, uid: int) -> None:
        """Note that this user wants the file version kept, whether it is here just now or not."""
        with self._transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO pin VALUES (?, ?)", (version_id, uid))

    def unpin(self, version_id: bytes, uid: int | None) -> None:
        """The user, or nobody any more, wants the file version kept."""
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM pin WHERE version_id = ? AND (? IS NULL OR uid = ?)",
                (version_id, uid, uid),
            )

    def pinned_by(self, version_id: bytes) -> list[int]:
        """The uids of those who want the file version kept."""
        rows = self._rows("SELECT uid FROM pin WHERE version_id = ? ORDER BY uid", version_id)
        return [uid for (uid,) in rows]

    def delete(self, version_id: bytes) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM replica WHERE version_id = ?", (version_id,))

    def delete_all(self, replicas: Iterable[Replica]) -> None:
        """Delete the rows of a few replicas, unless others have taken their places."""
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM replica WHERE version_id = ? AND inode = ? AND created_s = ?",
                [(each.version_id, each.stamp.inode, each.created_s) for each in replicas],
            )

    def sync(self) -> None:
        """Bring all rows onto the disk. Slow: it fsyncs."""
        log_path = self._path + "-wal"
        with disk_errors(f"sync {log_path}"), _vanished(self._path):
            # No lock of SQLite's is on this file, so closing the descriptor releases none.
            fd = os.open(log_path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        self.shorten_log()

    def shorten_log(self) -> None:
        """Let the write-ahead log start over if it has grown long. Slow then: it fsyncs.

        To be called after every few changes by whoever makes many. The log starts over only if
        nobody adds to it while the last of it is brought into the index, so it would grow for ever
        if writers were never kept waiting. Most of it is brought there before.
        """
        with disk_errors("look at the log of the cache index"), _vanished(self._path):
            log_bytes = os.stat(self._path + "-wal").st_size
            index_bytes = os.stat(self._path).st_size
        if log_bytes <= max(LOG_SIZE_MAX_BYTES, index_bytes // LOG_SHARE):
            return
        with _sqlite_errors(self._path), closing(_connect(self._path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            with self._write_lock:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self._read_lock, _sqlite_errors(self._path):
            # fetchall, for a statement that is not read to its end keeps its snapshot open.
            return self._reader.execute(query, parameters).fetchall()

    def _ids(self, boot_id: bytes, *, trusted: bool) -> Iterator[bytes]:
        """All rows are looked at, so that every page is as quick as the next. To find them by their
        trust would take an index that changes three times with every file that comes."""
        query = (
            "SELECT rowid, version_id, trust = 2 OR trust = 1 AND boot_id = ?"
            " FROM replica WHERE rowid > ? ORDER BY rowid LIMIT ?"
        )
        after = 0
        while rows := self._rows(query, boot_id, after, PAGE_ROWS):
            yield from (version_id for _, version_id, found in rows if found == trusted)
            after = rows[-1][0]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, _sqlite_errors(self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # After some failures (a full disk) SQLite has rolled back by itself.
                with suppress(sqlite3.OperationalError):
                    self._writer.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        """The writing connection to an index of our schema. Raises _Unusable."""
        if os.path.lexists(self._path + _DAMAGE_MARK):
            raise _Unusable("damaged")
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(closing(_connect(self._path)))
                self._prepare(connection)
            except sqlite3.DatabaseError as error:
                if _code(error) in _NO_INDEX:
                    raise _Unusable(f"not readable ({error})") from error
                raise _local_error(error, self._path) from error
            stack.pop_all()
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        [(version,)] = connection.execute("PRAGMA user_version").fetchall()
        if version == 0:
            self.lost = self.lost or "missing"
            connection.executescript(_SCHEMA)
        elif version != SCHEMA_VERSION:
            raise _Unusable(f"of schema {version}, and this is a version for {SCHEMA_VERSION}")
        connection.execute("SELECT file_count FROM total").fetchall()
        connection.execute(_CLOCK_TABLE)
        # In the schema of the first versions; nothing asks for it any more.
        connection.execute("DROP INDEX IF EXISTS replica_by_trust")
        # A commit must outlive a kill, not a power cut: NORMAL does not fsync it, only the points
        # where the log starts over, which keeps the file whole after a power cut too. What a
        # power cut takes away is not lost either, see ``sync``.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # its fsyncs belong into ``sync``


@contextmanager
def _vanished(path: str) -> Iterator[None]:
    """As long as the index is open its log is there, unless the disk was unmounted meanwhile."""
    try:
        yield
    except FileNotFoundError as error:
        raise DiskFailed(f"the cache index {path} is no longer there") from error


class _Unusable(Exception):
    """The index file cannot be used; the text completes "the index is ..."."""


def _connect(path: str) -> sqlite3.Connection:
    # One process only uses the file (the daemon holds a lock), so waiting is for checkpoints.
    return sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)


def _entry(row: tuple[Any, ...]) -> Entry:
    links = [link.partition(":") for link in (row[-2] or "").split("/") if link]
    return Entry(
        _replica(row[1:-2]),
        tuple(User(int(uid), name) for uid, _, name in links),
        tuple(int(uid) for uid in (row[-1] or "").split(",") if uid),
    )


@lru_cache(maxsize=64)  # files come from few directories at a time
def _directory_key(directory: bytes) -> int:
    """63 bits that stand for a directory of sources, so that a million rows stay small.

    Two directories with the same key would be kept together on one disk, which harms nobody.
    """
    return int.from_bytes(blake3(directory).digest(8), "little") >> 1


def _new_row(replica: Replica) -> tuple[Any, ...]:
    assert replica.trust == Trust.DOUBTFUL, "a new row is doubtful until it is settled"
    stamp = replica.stamp
    return (
        replica.version_id,
        replica.path,
        _directory_key(os.path.dirname(replica.path)),
        replica.chunk_size_bytes,
        replica.stored_bytes,
        replica.trust,
        replica.boot_id,
        stamp.size_bytes,
        stamp.mtime_ns,
        stamp.ctime_ns,
        stamp.inode,
        replica.created_s,
        replica.last_used_s,
        replica.verified_s,
    )


def _replica(row: tuple[Any, ...]) -> Replica:
    version_id, path, chunk_size_bytes, stored_bytes, trust, boot_id, *rest = row
    return Replica(
        version_id,
        path,
        chunk_size_bytes,
        stored_bytes,
        Trust(trust),
        boot_id,
        Stamp(*rest[:4]),
        *rest[4:],
    )


@contextmanager
def _sqlite_errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _local_error(error, path) from error


def _local_error(error: sqlite3.DatabaseError, path: str) -> LocalError:
    code = _code(error)
    if code == sqlite3.SQLITE_FULL:
        return NoSpace(f"no space for the cache index {path}")
    if code in _DAMAGED:
        # The next start must not stumble over it again: nothing short of reading all of the file
        # would find such damage then.
        with disk_errors(f"mark {path} as damaged"):
            os.close(os.open(path + _DAMAGE_MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return LocalError(f"the cache index {path} is damaged; a restart makes it again")
    kind = DiskFailed if code in _DISK_FAILED else LocalError
    return kind(f"the cache index {path} failed: {error}")


def _code(error: sqlite3.DatabaseError) -> int:
    """SQLite's primary result code; 0 for an error that the Python module raised by itself."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _remove(path: str) -> None:
    """Remove an unusable index. All but the pins can be made again from the files."""
    with disk_errors(f"remove {path}"):
        for suffix in ("-wal", "-shm", "", _DAMAGE_MARK):
            with suppress(FileNotFoundError):
                os.unlink(path + suffix)
