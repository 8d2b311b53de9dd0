"""Copying files to a file server: under its slots, all or nothing, and cached here at once.

The client copies, with its user's own rights; the daemon has a part in it twice. It says until when
the client may write (``write_slot.py``), and it makes a replica of what was written from the bytes
that are here anyway. Where it can do neither, the file is copied all the same.

A file is written beside its destination and renamed over it when it is complete, on the server's
disk (fsync), and has been looked at again. That is: its size; and its first and last bytes, fetched
from the server anew, which shows a file that was cut short or lost what was written last (a quota,
a full disk). To fetch all of it would be a second transfer, and tell no more of the server's disk,
which has it in memory still.

What is written is brought to the server every quarter of a second. It would else be sent all at
once by the fsync at the end, when the slot may be another's.

Invariant: a destination is what it was, or all of the source; a copy of the source under the same
size and modification time never has other bytes than what somebody may have cached under these.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from blake3 import blake3

from swarmcache.bundles import NoBundle, read_if_bundle
from swarmcache.client import Client, Source, open_source
from swarmcache.disk_calls import unlink_if_there, write_all
from swarmcache.errors import (
    BadMessage,
    CopyFailed,
    DaemonRefused,
    DaemonUnavailable,
    SourceUnreadable,
    UsageError,
)
from swarmcache.local_protocol import End, Failed, OfferReplica, decode_cache_answer, encode_request
from swarmcache.local_socket import SILENCE_S_MAX, reason_of
from swarmcache.write_beside import LISTED_MAX, make_beside, remove_left_over
from swarmcache.write_slot import WriteSlot

# As in ``source_reader.py``.
PIECE_BYTES = 512 * 1024
# What is on its way to the server at once: what takes this time at the rate so far. Half of the
# margin of a lease, for a server may become slower.
SYNC_S = 0.25
SYNC_BYTES_MAX = 64 << 20
# File systems keep times in steps, of which FAT's is the longest.
TIME_STEP_NS_MAX = 2 * 10**9
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(slots=True)
class CopyOutcome:
    """What became of one source. ``error``: why it was not copied; then ``destination`` is as it
    was. ``unsupervised``: why it was copied without a slot, ``not_registered``: why it is no
    replica; ``notes``: what else there is to know. All are for people, and mostly empty."""

    source: bytes
    destination: bytes
    size_bytes: int = 0
    error: str = ""
    unsupervised: str = ""
    not_registered: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class CopyProgress:
    """How far one file is. ``index``: its place among the sources. ``waiting_for``: a file server
    of which all slots are taken."""

    index: int
    source: bytes
    size_bytes: int
    done_bytes: int
    waiting_for: str = ""


def copy_files(
    client: Client,
    sources: Iterable[bytes],
    destination: bytes,
    *,
    bundle: bool | None = None,
    register: bool = True,
    on_progress: Callable[[CopyProgress], None] | None = None,
) -> Iterator[CopyOutcome]:
    """Copy files one after another, and tell what became of each as soon as that is known.

    ``destination`` is a file, or a directory that gets the sources under their own names. Of a
    bundle the files that it lists are copied, into a directory; ``bundle``: whether the sources are
    bundles, or else (None) their names tell. ``register``: whether what was copied becomes a
    replica. Raises UsageError where that makes no sense; for anything else there is an outcome.
    """
    into_directory = os.path.isdir(destination)
    sources = list(_expand(sources, bundle, into_directory=into_directory))
    if not into_directory and len(sources) > 1:
        raise UsageError(f"{os.fsdecode(destination)!r} must be a directory, for several sources")
    outcomes: dict[bytes, CopyOutcome] = {}
    tidy = True
    fault = ""
    for index, source in enumerate(sources):
        target = destination
        if into_directory:
            target = os.path.join(destination, os.path.basename(source.rstrip(b"/")))
        former = outcomes.get(target)
        if former is not None and former.source == source:  # bundles may repeat a line
            yield former
            continue
        copy = _Copy(client, index, source, target, on_progress or _show_nothing)
        if former is not None and not former.error:
            copy.outcome.error = "another source of the same name was copied there just now"
        else:
            copy.run(register=register, tidy=tidy, fault=fault)
            fault = copy.fault
            tidy = tidy and not copy.tidied
            outcomes[target] = copy.outcome
        yield copy.outcome


def _expand(
    sources: Iterable[bytes], bundle: bool | None, *, into_directory: bool
) -> Iterator[bytes]:
    """The files themselves, and those that bundles list. Raises UsageError."""
    for source in sources:
        try:
            members = read_if_bundle(source, bundle)
        except SourceUnreadable:
            members = None  # to copy it will fail as well, and tell why
        except NoBundle as error:
            raise NoBundle(f"{os.fsdecode(source)!r}: {error}") from error
        if members is None:
            yield source
        elif into_directory:
            yield from filter(None, members)
        else:
            name = os.fsdecode(source)
            raise UsageError(f"DST must be a directory, for the files that {name!r} lists")


@contextmanager
def signals_end_it() -> Iterator[None]:
    """A job system that ends the job shall not leave a temporary file behind."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _show_nothing(_: CopyProgress) -> None:
    pass


class _Copy:
    """One file on its way. ``fault``: why the daemon is not asked any more, or nothing."""

    def __init__(
        self,
        client: Client,
        index: int,
        source: bytes,
        target: bytes,
        on_progress: Callable[[CopyProgress], None],
    ) -> None:
        self.outcome = CopyOutcome(source, target)
        self.tidied = False
        self.fault = ""
        self._client = client
        self._progress = CopyProgress(index, source, 0, 0)
        self._on_progress = on_progress
        self._digest = blake3()
        self._ends: dict[int, bytes] = {}  # the first and the last bytes, by offset

    def run(self, *, register: bool, tidy: bool, fault: str) -> None:
        """Copy it. ``tidy``: remove from the directory what killed copies have left there.
        ``fault``: as it was after the file before, or else each of many would wait for a daemon
        that hangs."""
        outcome = self.outcome
        self.fault = fault
        with ExitStack() as stack:
            try:
                source = open_source(outcome.source)
                stack.callback(source.close)
                self._progress.size_bytes = outcome.size_bytes = source.size_bytes
                place = _Place(outcome.destination, source)
                stack.callback(place.close)
                file_fd = self._bring(stack, source, place, tidy=tidy)
            except SourceUnreadable as error:
                outcome.error = str(error)
            except CopyFailed as error:
                outcome.error = str(error)
            else:
                if register:
                    self._register(file_fd, source.fd)

    def _bring(self, stack: ExitStack, source: Source, place: _Place, *, tidy: bool) -> int:
        """Have the bytes at the destination; returns a descriptor of it. Raises CopyFailed."""
        with ExitStack() as slot_stack:
            slot = WriteSlot(self._client, place.directory_fd, self.fault)
            slot_stack.callback(slot.close)
            self._wait(slot)  # for hours, maybe, in which somebody else writes there
            place.look_again(source)
            same_fd = self._same(stack, slot, source, place)
            if same_fd is not None:
                self.outcome.notes.append("it was the same already")
                return same_fd
            fd = self._write(stack, slot, source, place, tidy=tidy)
            self.outcome.unsupervised = slot.reason
            return fd

    def _wait(self, slot: WriteSlot) -> None:
        def show() -> None:
            self._progress.waiting_for = slot.file_server or "the file server"
            self._on_progress(self._progress)

        slot.wait(show)
        if slot.silent:
            self.fault = slot.reason
        self._progress.waiting_for = ""

    def _show(self, done_bytes: int) -> None:
        self._progress.done_bytes = done_bytes
        self._on_progress(self._progress)

    # --- writing --------------------------------------------------------------------------------

    def _write(
        self, stack: ExitStack, slot: WriteSlot, source: Source, place: _Place, *, tidy: bool
    ) -> int:
        with _errors("write beside the destination"):
            fd, name = make_beside(place.directory_fd)
        stack.callback(os.close, fd)
        try:
            if tidy and place.listable:
                self._tidy(place, fd)
            self._copy_bytes(slot, source, fd)
            self._finish(slot, source, place, fd)
            with _errors("put the copy in place"):
                os.rename(
                    name, place.name, src_dir_fd=place.directory_fd, dst_dir_fd=place.directory_fd
                )
        except BaseException:
            self._remove(name, place)
            raise
        try:
            os.fsync(place.directory_fd)
        except OSError as error:
            if error.errno not in _NO_SYNC:  # not all file systems can, or need to
                self.outcome.notes.append(f"the directory could not be synced: {error.strerror}")
        return fd

    def _remove(self, name: str, place: _Place) -> None:
        try:
            unlink_if_there(name, place.directory_fd)
        except OSError as error:
            self.outcome.notes.append(f"{name} is left there: {error.strerror}")

    def _copy_bytes(self, slot: WriteSlot, source: Source, fd: int) -> None:
        """Copy and digest, a piece at a time. Raises CopyFailed."""
        found = os.fstat(source.fd)
        buffer = memoryview(bytearray(PIECE_BYTES))
        offset = last_bytes = unsynced_bytes = 0
        sync_bytes = PIECE_BYTES
        began_s = time.monotonic()
        while True:
            with _errors("read the source"):
                piece = buffer[: os.preadv(source.fd, [buffer], offset)]
            self._wait(slot)  # now: to read may have taken longer than the slot lasts
            if unsynced_bytes == 0:
                began_s = time.monotonic()
            if not piece:
                break
            self._digest.update(piece)
            with _errors("write the copy"):
                write_all(fd, piece, offset)
            if offset == 0:
                self._ends[0] = bytes(piece)
            offset += len(piece)
            last_bytes = len(piece)
            unsynced_bytes += len(piece)
            if unsynced_bytes >= sync_bytes:
                with _errors("write the copy"):
                    os.fdatasync(fd)
                sync_bytes = _sync_bytes(unsynced_bytes, time.monotonic() - began_s)
                unsynced_bytes = 0
                self._show(offset)
        with _errors("write the copy"):
            os.fdatasync(fd)
        self._show(offset)
        self._ends[offset - last_bytes] = bytes(buffer[:last_bytes])
        if offset != source.size_bytes or _times(os.fstat(source.fd)) != _times(found):
            raise CopyFailed("the source was changed while it was copied")

    def _finish(self, slot: WriteSlot, source: Source, place: _Place, fd: int) -> None:
        """Give it mode and time of the source, bring it to the server's disk, look at it again."""
        status = os.fstat(source.fd)
        mtime_ns = status.st_mtime_ns
        place.look_again(source)
        if place.clashes:
            note = "the time of the source was not kept: what was there before may have had it"
            self.outcome.notes.append(note)
            mtime_ns = max(time.time_ns(), TIME_STEP_NS_MAX + max(mtime_ns, place.latest_ns))
        try:
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o777)
            os.utime(fd, ns=(status.st_atime_ns, mtime_ns))
        except OSError as error:
            self.outcome.notes.append(f"mode and time could not be kept: {error.strerror}")
        self._wait(slot)
        with _errors("write the copy"):
            os.fsync(fd)
            size_bytes = os.fstat(fd).st_size
        if size_bytes != source.size_bytes:
            raise CopyFailed(f"the copy has {size_bytes} bytes instead of {source.size_bytes}")
        for offset, written in self._ends.items():
            self._wait(slot)
            with _errors("read the copy back"):
                os.posix_fadvise(fd, offset, len(written), os.POSIX_FADV_DONTNEED)
                if os.pread(fd, len(written), offset) != written:
                    raise CopyFailed("what the file server has is not what was written")

    def _tidy(self, place: _Place, fd: int) -> None:
        """Remove what killed copies of this user have left in the directory."""
        self.tidied = True
        ours = os.fstat(fd)  # also says what time it is for the file server
        left = remove_left_over(
            place.directory_fd, ours.st_uid, ours.st_mtime, self._note_left, LISTED_MAX
        )
        try:
            self.outcome.notes += [f"removed {each.name}, left by a killed copy" for each in left]
        except OSError as error:
            self.outcome.notes.append(f"cannot look for left-over files: {error.strerror}")

    def _note_left(self, error: OSError) -> None:
        if not isinstance(error, PermissionError):  # one that is just getting its mode
            self.outcome.notes.append(f"{error.filename} is left there: {error.strerror}")

    def _same(self, stack: ExitStack, slot: WriteSlot, source: Source, place: _Place) -> int | None:
        """A descriptor of the destination where it is the same as the source already.

        Looked at only where size and time clash: then the copy would be taken for what was
        there before, by everybody who has cached that.
        """
        if not place.clashes:
            return None
        with _errors("open the destination"):
            try:
                fd = place.open()
            except FileNotFoundError:  # removed meanwhile
                return None
        stack.callback(os.close, fd)
        offset = 0
        while True:
            with _errors("read the source"):
                piece = os.pread(source.fd, PIECE_BYTES, offset)
            self._wait(slot)
            with _errors("compare with the destination"):
                if os.pread(fd, PIECE_BYTES, offset) != piece:
                    break
            self._digest.update(piece)
            offset += len(piece)
            self._show(offset)
            if not piece:
                return fd
        self._digest.reset()
        return None

    # --- the replica ----------------------------------------------------------------------------

    def _register(self, file_fd: int, source_fd: int) -> None:
        if self.fault:
            self.outcome.not_registered = self.fault
            return
        try:
            _offer_replica(self._client, self._digest.digest(), file_fd, source_fd)
        except (DaemonUnavailable, DaemonRefused, BadMessage) as error:
            self.outcome.not_registered = str(error)


class _Place:
    """Where a copy goes: a name in a directory that is open.

    A symbolic link stays, and what it leads to is replaced, as ``cp`` would write it.
    ``clashes``: what is there now, or was when it was last looked at, has the size and the time
    that the copy is to have, or a later time: it may have got that because of an earlier clash.
    ``latest_ns``: the latest time of what was seen there.
    """

    def __init__(self, destination: bytes, source: Source) -> None:
        """Raises CopyFailed where a file cannot be put there."""
        self.clashes = False
        self.latest_ns = 0
        with _errors("use the destination"):
            try:
                there = os.stat(destination)
            except FileNotFoundError:
                if destination.endswith(b"/"):
                    raise CopyFailed("there is no such directory") from None
            else:
                self._look_at(there, os.fstat(source.fd))
            directory, name = os.path.split(os.path.realpath(destination))
            self.name = os.fsdecode(name)
            self.listable = True
            try:
                self.directory_fd = os.open(directory, _DIRECTORY)
            except PermissionError:  # it may be entered and written to, but not listed
                self.listable = False
                self.directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _look_at(self, there: os.stat_result, source: os.stat_result) -> None:
        if os.path.samestat(there, source):
            raise CopyFailed("source and destination are the same file")
        if not stat.S_ISREG(there.st_mode):
            kind = "a directory" if stat.S_ISDIR(there.st_mode) else "neither file nor directory"
            raise CopyFailed(f"the destination is {kind}")
        self._compare(there, source)

    def _compare(self, there: os.stat_result, source: os.stat_result) -> None:
        kept_ns = source.st_mtime_ns // TIME_STEP_NS_MAX * TIME_STEP_NS_MAX
        self.clashes |= there.st_size == source.st_size and there.st_mtime_ns >= kept_ns
        self.latest_ns = max(self.latest_ns, there.st_mtime_ns)

    def look_again(self, source: Source) -> None:
        """See what others have put there meanwhile. Raises CopyFailed."""
        with _errors("use the destination"), suppress(FileNotFoundError):
            there = os.stat(self.name, dir_fd=self.directory_fd, follow_symlinks=False)
            self._compare(there, os.fstat(source.fd))

    def open(self) -> int:
        """What is there now, for writing where its mode allows that. Raises OSError."""
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.name, os.O_RDWR | flags, dir_fd=self.directory_fd)
        except PermissionError:
            return os.open(self.name, os.O_RDONLY | flags, dir_fd=self.directory_fd)

    def close(self) -> None:
        os.close(self.directory_fd)


def _offer_replica(client: Client, digest: bytes, file_fd: int, source_fd: int) -> None:
    """Have the daemon make a replica. Raises DaemonUnavailable, DaemonRefused, BadMessage."""
    connection, _ = client.send(encode_request(OfferReplica(digest)), file_fd, source_fd)
    arrival = select.poll()
    arrival.register(connection.fileno(), select.POLLIN)
    try:
        while arrival.poll(SILENCE_S_MAX * 1000):
            for line in connection.receive():
                match decode_cache_answer(line):
                    case End():
                        client.give_back(connection)
                        return
                    case Failed() as failed:
                        raise DaemonRefused(failed.reason)
        raise DaemonUnavailable(f"the daemon said nothing for {SILENCE_S_MAX:.0f} s")
    except BaseException:
        connection.close()
        raise


def _sync_bytes(size_bytes: int, elapsed_s: float) -> int:
    """How much to write before it is brought to the server, after ``size_bytes`` took so long."""
    if elapsed_s <= 0:
        return SYNC_BYTES_MAX
    return int(min(max(size_bytes / elapsed_s * SYNC_S, PIECE_BYTES), SYNC_BYTES_MAX))


def _times(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise CopyFailed(f"cannot {doing}: {reason_of(error)}") from error
