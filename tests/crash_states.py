"""The states that a power cut can leave on a disk, found in the manner of ALICE.

A recorder notes what a run does to the file system, as a list of *changes* to *nodes* (files and
directories). What changes separately:

* an entry of a directory: made or exchanged, or taken away. A rename is both;
* bytes of a file, of which only the first half may have arrived;
* what ``stat`` says of a node (its size, times and mode), as a whole. Bytes that were lost below
  the size are what was there before, or zeros.

A power cut keeps all changes that an fsync of their node has made durable. What it keeps of the
others is for the file system to decide, and there are two models of it:

* ``in_order``, as file systems with a journal do it (ext4, XFS, Btrfs): entries and attributes are
  kept up to some moment, an fsync of anything makes all of them durable, a rename is never half
  done. Bytes come in any order;
* ``loose``, all that POSIX promises: any subset, and a rename may end half.

SQLite's files are files like the others. (T. S. Pillai et al., All File Systems Are Not Created
Equal, OSDI 2014.)
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from blake3 import blake3

from tests.watched_disk import Arguments, Do, Keywords

FALLOCATE_KEEP_SIZE = 1
# All subsets of so many of the last changes that are not durable yet.
WINDOW = 4
RANDOM_SUBSETS = 8
LAST_MOMENTS = 4


@dataclass(frozen=True)
class Inode:
    """What ``stat`` says of a node."""

    size_bytes: int
    mode: int
    mtime_ns: int
    ctime_ns: int


@dataclass(eq=False)
class Node:
    """A file or directory. ``handle`` keeps its inode number from being used again."""

    number: int
    handle: int
    first: Inode
    data: bytes = b""
    entries: dict[str, Node] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.first.mode)


@dataclass(frozen=True, eq=False)
class Entry:
    """A name in a directory that leads to a node from now on, or (None) to nothing."""

    node: Node
    name: str
    target: Node | None


@dataclass(frozen=True, eq=False)
class Bytes:
    node: Node
    offset: int
    data: bytes


@dataclass(frozen=True, eq=False)
class Attributes:
    node: Node
    inode: Inode


@dataclass(frozen=True, eq=False)
class Sync:
    """Everything so far that was done to the node is durable.

    ``whole``: a journal has written what was done to all others as well, which an fdatasync of a
    file need not do.
    """

    node: Node
    whole: bool = True


@dataclass(frozen=True, eq=False)
class Mark:
    """Something that the run itself wants to remember: what was promised by then."""

    what: object


Change = Entry | Bytes | Attributes
Record = Change | Sync | Mark


class Recorder:
    """A watcher that notes every change below a directory. What is there before is durable."""

    def __init__(self, top: Path) -> None:
        self.records: list[Record] = []
        self.ends = [0]  # numbers of records after each call
        self._nodes: dict[int, Node] = {}
        self._fds: dict[int, Node] = {}
        self._synced: set[Node] = set()
        self._top = top
        self.top = self._take_in(top)

    def close(self) -> None:
        for node in self._nodes.values():
            os.close(node.handle)

    def begin(self, *marks: object) -> None:
        """What is true from the beginning."""
        self.records = [Mark(what) for what in marks]
        self.ends = [len(self.records)]

    def mark(self, what: object) -> None:
        self.records.append(Mark(what))
        self.ends.append(len(self.records))

    def call(self, name: str, arguments: Arguments, keywords: Keywords, do: Do) -> Any:
        note = getattr(self, "_" + name, None)
        if note is None:
            return do(*arguments, **keywords)
        result = note(do, *arguments, **keywords)
        self.ends.append(len(self.records))
        return result

    # --- nodes --------------------------------------------------------------------------------

    def _take_in(self, path: Path) -> Node:
        node = self._node_at(path)
        if node.is_directory:
            node.entries = {each.name: self._take_in(each) for each in path.iterdir()}
        else:
            node.data = path.read_bytes()
        return node

    def _node_at(self, path: str | bytes | Path, dir_fd: int | None = None) -> Node:
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        number = os.fstat(handle).st_ino
        if number in self._nodes:
            os.close(handle)
        else:
            self._nodes[number] = Node(number, handle, _inode(handle))
        return self._nodes[number]

    def _place(self, path: str | bytes | Path, dir_fd: int | None) -> tuple[Node, str]:
        """The directory and the name that a path means."""
        above, name = os.path.split(os.fsdecode(path))
        if dir_fd is not None and not above:
            return self._fds[dir_fd], name
        return self._node_at(above or ".", dir_fd), name

    def _there(self, path: str | bytes, dir_fd: int | None) -> Node | None:
        try:
            return self._node_at(path, dir_fd)
        except FileNotFoundError:
            return None

    def _enter(self, path: str | bytes, dir_fd: int | None, node: Node | None) -> None:
        directory, name = self._place(path, dir_fd)
        self.records.append(Entry(directory, name, node))

    def _changed(self, node: Node) -> None:
        self.records.append(Attributes(node, _inode(node.handle)))

    # --- calls of module os -------------------------------------------------------------------

    def _open(
        self, do: Do, path: str | bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        before = self._there(path, dir_fd)
        fd: int = do(path, flags, mode, dir_fd=dir_fd)
        node = self._fds[fd] = before or self._node_at(path, dir_fd)
        if before is None:
            self._enter(path, dir_fd, node)
        elif flags & os.O_TRUNC:
            self._changed(node)
        return fd

    def _mkdir(
        self, do: Do, path: str | bytes, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> None:
        do(path, mode, dir_fd=dir_fd)
        self._enter(path, dir_fd, self._node_at(path, dir_fd))

    def _unlink(self, do: Do, path: str | bytes, *, dir_fd: int | None = None) -> None:
        node = self._there(path, dir_fd)
        do(path, dir_fd=dir_fd)
        assert node is not None
        self._enter(path, dir_fd, None)
        self._changed(node)

    def _rmdir(self, do: Do, path: str | bytes, *, dir_fd: int | None = None) -> None:
        do(path, dir_fd=dir_fd)
        self._enter(path, dir_fd, None)

    def _link(
        self,
        do: Do,
        source: str | bytes,
        target: str | bytes,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        directories = {"src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd}
        do(source, target, **directories, follow_symlinks=follow_symlinks)
        node = self._node_at(target, dst_dir_fd)
        self._enter(target, dst_dir_fd, node)
        self._changed(node)

    def _rename(
        self,
        do: Do,
        source: str | bytes,
        target: str | bytes,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        displaced = self._there(target, dst_dir_fd)
        do(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        node = self._node_at(target, dst_dir_fd)
        self._enter(target, dst_dir_fd, node)
        self._enter(source, src_dir_fd, None)
        self._changed(node)
        if displaced is not None:
            self._changed(displaced)

    def _pwrite(self, do: Do, fd: int, data: bytes, offset: int) -> int:
        count: int = do(fd, data, offset)
        node = self._fds[fd]
        self.records.append(Bytes(node, offset, bytes(data[:count])))
        self._changed(node)
        return count

    def _on_descriptor(self, do: Do, fd: int, *arguments: Any, **keywords: Any) -> None:
        do(fd, *arguments, **keywords)
        self._changed(self._fds[fd])

    _ftruncate = _fchmod = _fallocate = _on_descriptor

    def _utime(self, do: Do, path: int | str | bytes, *arguments: Any, **keywords: Any) -> None:
        do(path, *arguments, **keywords)
        self._changed(self._fds[path] if isinstance(path, int) else self._node_at(path))

    def _chmod(self, do: Do, path: str | bytes, mode: int, *, dir_fd: int | None = None) -> None:
        do(path, mode, dir_fd=dir_fd)
        self._changed(self._node_at(path, dir_fd))

    def _fsync(self, do: Do, fd: int) -> None:
        do(fd)
        self.records.append(Sync(self._fds[fd]))

    def _syncfs(self, do: Do, fd: int) -> None:
        do(fd)
        self.records += [Sync(node) for node in self._nodes.values()]

    # --- calls of SQLite ----------------------------------------------------------------------

    def _sqlite_open(self, do: Do, path: str, _flags: int) -> int:
        before = self._there(path, None)
        code: int = do()
        node = self._there(path, None)
        if before is None and node is not None:
            self._enter(path, None, node)
        return code

    def _sqlite_write(self, do: Do, path: str, offset: int, data: bytes) -> int:
        code: int = do()
        node = self._node_at(path)
        self.records.append(Bytes(node, offset, data))
        self._changed(node)
        return code

    def _sqlite_truncate(self, do: Do, path: str, _size_bytes: int) -> int:
        code: int = do()
        self._changed(self._node_at(path))
        return code

    def _sqlite_sync(self, do: Do, path: str) -> int:
        code: int = do()
        node = self._node_at(path)
        # As strace shows: all are fdatasync, and the first one of a new log syncs its directory.
        self.records.append(Sync(node, whole=False))
        if path.endswith(("-wal", "-journal")) and node not in self._synced:
            self._synced.add(node)
            self.records.append(Sync(self._node_at(os.path.dirname(path)), whole=False))
        return code

    def _sqlite_delete(self, do: Do, path: str, sync_directory: int) -> int:
        code: int = do()
        self._enter(path, None, None)
        if sync_directory:
            self.records.append(Sync(self._node_at(os.path.dirname(path)), whole=False))
        return code


def _inode(fd: int) -> Inode:
    status = os.fstat(fd)
    return Inode(status.st_size, status.st_mode, status.st_mtime_ns, status.st_ctime_ns)


# --- states ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is on the disk: of the first ``length`` records all but ``lost``; of ``torn`` half."""

    length: int
    lost: frozenset[int]
    torn: frozenset[int] = frozenset()


def loose(recorder: Recorder, random: Random) -> Iterator[State]:
    """What a power cut at any moment may leave where nothing orders what is not synced."""
    for length in range(recorder.ends[0], len(recorder.records) + 1):
        for lost, torn in _subsets(_not_durable(recorder.records[:length]), random):
            yield State(length, lost, torn)


def in_order(recorder: Recorder, random: Random) -> Iterator[State]:
    """What a power cut at any moment may leave where a journal keeps entries and attributes."""
    records = recorder.records
    for length in recorder.ends:
        changes = _not_durable(records[:length])
        pending = [change for change in changes if isinstance(records[change], Bytes)]
        synced = max((at for at in range(length) if _is_whole_sync(records[at])), default=0)
        moments = [at for at in recorder.ends if synced <= at <= length]
        chosen = {*moments[:1], *moments[-LAST_MOMENTS:], random.choice(moments)}
        for moment in sorted(chosen):
            late = [change for change in changes if change >= moment and change not in pending]
            for lost, torn in _subsets(pending, random):
                yield State(length, lost.union(late), torn)


def _is_whole_sync(record: Record) -> bool:
    return isinstance(record, Sync) and record.whole


def _subsets(pending: list[int], random: Random) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """What of these may be lost, and what torn: exhaustive where it matters, random beyond.

    Nothing, everything, each one alone, all but one, all from one on, every subset of the last few
    with all or nothing of the others; and random subsets with torn writes.
    """
    nothing: frozenset[int] = frozenset()
    everything = frozenset(pending)
    yield nothing, nothing
    for position, change in enumerate(pending):
        yield frozenset({change}), nothing
        yield everything - {change}, nothing
        yield frozenset(pending[position:]), nothing
    window, others = pending[-WINDOW:], frozenset(pending[:-WINDOW])
    for size in range(len(window) + 1):
        for lost in itertools.combinations(window, size):
            yield frozenset(lost), nothing
            yield others.union(lost), nothing
    for _ in range(RANDOM_SUBSETS if pending else 0):
        share = random.random()
        subset = frozenset(change for change in pending if random.random() < share)
        yield subset, frozenset(c for c in pending if random.random() < share / 2) - subset


def _not_durable(records: list[Record]) -> list[int]:
    """Positions of the changes that no sync of their node has followed."""
    loose: list[int] = []
    synced: set[Node] = set()
    for position in range(len(records) - 1, -1, -1):
        record = records[position]
        if isinstance(record, Sync):
            synced.add(record.node)
        elif not isinstance(record, Mark) and record.node not in synced:
            loose.append(position)
    return loose[::-1]


@dataclass
class Disk:
    """A state as it would be found on the disk."""

    top: Node
    inodes: dict[Node, Inode]
    data: dict[Node, bytearray]
    entries: dict[Node, dict[str, Node]]

    @staticmethod
    def after(top: Node, records: list[Record], state: State) -> Disk:
        disk = Disk(top, {}, {}, {})
        for position, record in enumerate(records[: state.length]):
            if position in state.lost:
                continue
            match record:
                case Entry(node, name, target):
                    entries = disk._entries(node)
                    entries.pop(name, None)
                    if target is not None:
                        entries[name] = target
                case Bytes(node, offset, data):
                    kept = data[: len(data) // 2] if position in state.torn else data
                    content = disk._data(node)
                    content.extend(bytes(max(0, offset + len(kept) - len(content))))
                    content[offset : offset + len(kept)] = kept
                case Attributes(node, inode):
                    disk.inodes[node] = inode
                    if not node.is_directory:  # what is cut off is gone, even if it grows again
                        del disk._data(node)[inode.size_bytes :]
        return disk

    def _entries(self, node: Node) -> dict[str, Node]:
        return self.entries.setdefault(node, dict(node.entries))

    def _data(self, node: Node) -> bytearray:
        return self.data.setdefault(node, bytearray(node.data))

    def inode(self, node: Node) -> Inode:
        return self.inodes.get(node, node.first)

    def content(self, node: Node) -> bytes:
        size_bytes = self.inode(node).size_bytes
        return bytes(self._data(node)[:size_bytes]).ljust(size_bytes, b"\0")

    def digest(self) -> bytes:
        """Equal for states that nobody could tell apart."""
        hasher = blake3()
        seen: set[Node] = set()

        def add(node: Node) -> None:
            hasher.update(f"{node.number} {self.inode(node)}".encode())
            if node in seen:
                return
            seen.add(node)
            if not node.is_directory:
                hasher.update(self.content(node))
                return
            for name, target in sorted(self._entries(node).items()):
                hasher.update(f"/{name}\0".encode())
                add(target)
            hasher.update(b"/")

        add(self.top)
        return hasher.digest()

    def build(self, top: Path) -> Rebuilt:
        """Make the state real below an empty directory."""
        made: dict[Node, Path] = {}

        def build(node: Node, path: Path) -> None:
            if node in made:
                os.link(made[node], path)
                return
            made[node] = path
            if not node.is_directory:
                path.write_bytes(self.content(node))
                return
            path.mkdir(exist_ok=True)
            for name, target in self._entries(node).items():
                build(target, path / name)

        build(self.top, top)
        for node, path in reversed(made.items()):
            inode = self.inode(node)
            os.chmod(path, stat.S_IMODE(inode.mode))
            os.utime(path, ns=(inode.mtime_ns, inode.mtime_ns))
        return Rebuilt(
            {
                os.stat(path).st_ino: (node.number, self.inode(node).ctime_ns, os.stat(path))
                for node, path in made.items()
            }
        )


class Rebuilt:
    """A watcher for code that runs on a rebuilt state: inode numbers and ctimes are the former.

    Nobody can set these two. As soon as a node is changed, its new ctime is told.
    """

    def __init__(self, nodes: dict[int, tuple[int, int, os.stat_result]]) -> None:
        self._nodes = nodes

    def call(self, name: str, arguments: Arguments, keywords: Keywords, do: Do) -> Any:
        result = do(*arguments, **keywords)
        if name not in ("stat", "lstat", "fstat") or result.st_ino not in self._nodes:
            return result
        number, ctime_ns, before = self._nodes[result.st_ino]
        fields = list(result)
        fields[1] = number
        exact = {
            each: getattr(result, each)
            for each in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_blksize")
        }
        if result.st_ctime_ns == before.st_ctime_ns:
            exact["st_ctime_ns"] = ctime_ns
        return os.stat_result(fields, exact)
