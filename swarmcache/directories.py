"""``get`` for directories: all files below one are cached, and the copy is a directory as well.

The daemon knows files only. Since every copy lies at the real path of its source below the cache
directory, the copies of a tree form the same tree; what is no regular file (empty directories,
symbolic links) is added here, in the name of the caller. A link to a file leads to the cached copy
of that file. What cannot be shown as it is at the source makes the answer the original directory.

Invariant: a directory printed as cached has the regular files and the links of the source, by name,
and no other files; each file is a verified copy.
"""

from __future__ import annotations

import errno
import os
import stat
from _thread import get_native_id  # the import of ``threading`` takes longer
from contextlib import suppress

from swarmcache.errors import SourceUnreadable, SwarmcacheError
from swarmcache.exchanges import Answer, real_path_of
from swarmcache.local_socket import reason_of

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Protocol

    from swarmcache.exchanges import Progress

    class Client(Protocol):
        """What is asked for the files: ``client.Client``."""

        def get_all(
            self,
            paths: Iterable[bytes],
            timeout_s: float | None = None,
            on_progress: Callable[[Progress], None] | None = None,
            trees: Mapping[bytes, bytes] | None = None,
        ) -> Iterator[Answer]: ...


LINK_PREFIX = b".swarmcache-link-"  # of links that are about to be renamed into place
LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class NotMirrored(SwarmcacheError):
    """The cached copy cannot be the same as the source directory; the message says why."""


class DirectoryAnswer(Answer):
    """What became of a directory. ``files``: the answers for the files in it. ``made``: links and
    directories of the copy that were not there before, in the order in which they were made."""

    __slots__ = ("files", "made")

    files: list[Answer]
    made: list[bytes]


class Listing:
    """What is below a directory. Names are relative to ``root``, a real path.

    ``files`` are to be cached: those of the tree and, last, those that only links lead to.
    ``links`` has what each link shall say; None for the copy of the file in ``link_targets``.
    ``unseen``: what could not be looked at, and why; files may be missing for that. ``fault``: the
    first reason why the directory cannot be mirrored.
    """

    def __init__(self, asked: bytes, root: bytes) -> None:
        self.asked = asked
        self.root = root
        self.names: list[bytes] = []
        self.directories: list[bytes] = []
        self.links: dict[bytes, bytes | None] = {}
        self.link_targets: dict[bytes, bytes] = {}
        self.unseen: dict[bytes, str] = {}
        self.fault = ""

    def note_unseen(self, name: bytes, error: OSError) -> None:
        self.unseen[name] = reason_of(error)
        self.note_fault(f"{os.fsdecode(name)!r} in it: {reason_of(error)}")

    def note_fault(self, fault: str) -> None:
        self.fault = self.fault or fault

    @property
    def files(self) -> list[bytes]:
        """Real paths to cache; none where the directory cannot be mirrored anyway."""
        if self.fault:
            return []
        return [*(self.root + b"/" + name for name in self.names), *self.link_targets.values()]


def get_everything(
    client: Client,
    paths: Iterable[bytes],
    timeout_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Answer]:
    """As ``Client.get_all``, for files and directories alike."""
    requests = [_list_if_directory(path) for path in paths]
    files = [file for request in requests for file in _files_of(request)]
    trees = {
        file: request.root
        for request in requests
        if isinstance(request, Listing)
        for file in request.files
    }
    answers = client.get_all(files, timeout_s, on_progress, trees)
    for request in requests:
        found = [next(answers) for _ in _files_of(request)]
        if isinstance(request, Listing):
            if _remove_former_links(request, found):
                pairs = zip(request.files, found, strict=True)
                missed = [path for path, answer in pairs if not answer.cached]
                later = client.get_all(missed, timeout_s, on_progress, trees)
                found = [answer if answer.cached else next(later) for answer in found]
            yield _answer_directory(request, found)
        elif isinstance(request, Answer):
            yield request
        else:
            yield found[0]


def _files_of(request: bytes | Listing | Answer) -> list[bytes]:
    if isinstance(request, Listing):
        return request.files
    return [request] if isinstance(request, bytes) else []


def _list_if_directory(asked: bytes) -> bytes | Listing | Answer:
    """A file stays what it is; a directory that cannot be listed has its answer."""
    if not os.path.isdir(asked):
        return asked
    try:
        return list_directory(asked)
    except SourceUnreadable as error:
        return Answer(asked, real_path_of(asked), usable=False, reason=str(error))


def _answer_directory(listing: Listing, files: list[Answer]) -> DirectoryAnswer:
    made: list[bytes] = []
    try:
        path = mirror(listing, files, made)
    except NotMirrored as error:
        answer = DirectoryAnswer(listing.asked, listing.root, reason=str(error))
    else:
        answer = DirectoryAnswer(
            listing.asked,
            path,
            cached=True,
            hit=all(file.hit for file in files),
            size_bytes=sum(file.size_bytes for file in files),
            from_peers_bytes=sum(file.from_peers_bytes for file in files),
            from_file_server_bytes=sum(file.from_file_server_bytes for file in files),
        )
    answer.files = files
    answer.made = made
    return answer


# --- the source ----------------------------------------------------------------------------------


def list_directory(asked: bytes) -> Listing:
    """Walk the source without following links. Raises SourceUnreadable for ``asked`` itself."""
    try:
        listing = Listing(asked, os.path.realpath(asked))
        waiting = _list_one(listing, b"")
    except OSError as error:
        raise SourceUnreadable(reason_of(error)) from error
    while waiting:
        name = waiting.pop()
        try:
            waiting += _list_one(listing, name)
        except OSError as error:
            listing.note_unseen(name, error)
    if not listing.names and not listing.link_targets:
        listing.note_fault("it has no files")
    return listing


def _list_one(listing: Listing, name: bytes) -> list[bytes]:
    """Note what is in one directory of the tree; the directories among it, still to be listed."""
    directories = []
    prefix = name + b"/" if name else b""
    with os.scandir(os.path.join(listing.root, name)) as entries:
        for entry in entries:
            below = prefix + entry.name
            if entry.is_symlink():
                _note_link(listing, below)
            elif entry.is_dir():
                directories.append(below)
            elif entry.is_file():
                listing.names.append(below)
    listing.directories += directories
    return directories


def _note_link(listing: Listing, name: bytes) -> None:
    path = os.path.join(listing.root, name)
    target = os.path.realpath(path)
    try:
        mode = os.stat(target).st_mode
    except OSError as error:
        if error.errno not in LEADS_NOWHERE:  # here as there
            listing.note_unseen(name, error)
        return
    inside = target == listing.root or target.startswith(listing.root + b"/")
    if stat.S_ISREG(mode) and not inside:
        listing.links[name] = None
        listing.link_targets[name] = target
    elif stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and inside):
        listing.links[name] = os.path.relpath(target, os.path.dirname(path))
    elif stat.S_ISDIR(mode):
        listing.note_fault(f"{os.fsdecode(name)!r} in it leads to a directory elsewhere")


# --- the copy ------------------------------------------------------------------------------------


def mirror(listing: Listing, answers: list[Answer], made: list[bytes]) -> bytes:
    """Complete the cached directory and tell where it is. Raises NotMirrored.

    ``answers``: those for ``listing.files``. ``made`` gets what was not there before, also where it
    was made in vain.
    """
    if listing.fault:
        raise NotMirrored(listing.fault)
    for answer in answers:
        if not answer.cached:
            raise NotMirrored(f"{answer.asked!r}: {answer.reason}")
    copies = [os.fsencode(answer.path) for answer in answers]
    root = _root_of_copies(listing, copies)
    targets = dict(zip(listing.link_targets, copies[len(listing.names) :], strict=True))
    links = {name: text or targets[name] for name, text in listing.links.items()}
    try:
        for name in [b"", *listing.directories]:
            _make_directory(os.path.join(root, name).rstrip(b"/"), made)
        for name, text in links.items():
            _put_link(os.path.join(root, name), text, made)
        _compare(root, {*listing.names, *links})
    except OSError as error:
        raise NotMirrored(f"its copy cannot be completed: {reason_of(error)}") from error
    return root


def _root_of_copies(listing: Listing, copies: list[bytes]) -> bytes:
    prefixes = set()
    for real_path, copy in zip(listing.files, copies, strict=True):
        if not copy.endswith(real_path):
            raise NotMirrored(f"the copy of {os.fsdecode(real_path)!r} has another path")
        prefixes.add(copy[: -len(real_path)])
    if len(prefixes) != 1:
        raise NotMirrored("the copies are on several disks")
    return prefixes.pop() + listing.root


def _make_directory(path: bytes, made: list[bytes]) -> None:
    """Make a directory and those above it, where they are not there yet. Raises OSError."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        os.makedirs(each, exist_ok=True)
        made.append(each)


def _remove_former_links(listing: Listing, answers: list[Answer]) -> bool:
    """Remove the links of an earlier copy that are in the place of what are files and directories
    now; whether there were any. They are in the daemon's way, who does not know them for ours."""
    roots = [
        os.fsencode(answer.path).removesuffix(real_path) + listing.root
        for real_path, answer in zip(listing.files, answers, strict=True)
        if answer.cached and os.fsencode(answer.path).endswith(real_path)
    ]
    if not roots or all(answer.cached for answer in answers):
        return False
    removed = False
    for name in (*listing.directories, *listing.names):
        path = os.path.join(roots[0], name)
        if os.path.islink(path):
            with suppress(OSError):  # then it stays, and what is in its place is not cached
                os.unlink(path)
                removed = True
    return removed


def _put_link(path: bytes, text: bytes, made: list[bytes]) -> None:
    """Make a symbolic link, in place of another one if need be. Raises OSError."""
    new = False
    try:
        if os.readlink(path) == text:
            return
    except FileNotFoundError:
        new = True
    beside = os.path.join(os.path.dirname(path), LINK_PREFIX + b"%d" % get_native_id())
    with suppress(FileNotFoundError):
        os.unlink(beside)
    os.symlink(text, beside)
    os.replace(beside, path)
    if new:
        made.append(path)


def _compare(root: bytes, names: set[bytes]) -> None:
    """Check that the copy has what the source has. Raises NotMirrored, OSError.

    Links that the source has no longer are removed, being ours. Its files that are gone may still
    be cached; a job that reads whatever is in the directory must not see them.
    """
    missing, waiting = set(names), [b""]
    while waiting:
        within = waiting.pop()
        prefix = within + b"/" if within else b""
        with os.scandir(os.path.join(root, within)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if name in names:
                    missing.discard(name)
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(name)  # one that the source has not may at least be empty
                elif not entry.is_symlink():
                    raise NotMirrored(f"{os.fsdecode(name)!r} is cached but no longer in it")
                elif not entry.name.startswith(LINK_PREFIX):
                    os.unlink(entry.path)
    if missing:
        raise NotMirrored(f"the copy of {os.fsdecode(min(missing))!r} has gone")
