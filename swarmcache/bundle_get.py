"""``get`` for bundles: their members are cached, and the result is a list of the copies.

The list has a line for each line of the bundle, in the same order: the copy, or the original path
of what cannot be cached. Where nothing can be, it is the bundle itself.

With all or nothing there is a list of copies, or the bundle itself and nothing new in the cache:
whether there can be room for all is asked before the first file is copied, and what was copied
until one fails is taken out again.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from itertools import islice

from swarmcache.bundles import NoBundle, read_if_bundle, write_result
from swarmcache.client import Answer, open_source, real_path_of
from swarmcache.directories import DirectoryAnswer, get_everything
from swarmcache.errors import SourceUnreadable, SwarmcacheError
from swarmcache.local_socket import reason_of

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from swarmcache.client import Client, Progress

TOLD_MAX = 10  # members of one bundle that people are told about by name


class BundleAnswer(Answer):
    """What became of one bundle. ``cached``: all of its members are.

    ``path``: the list of the copies, of some at least; else the bundle itself. ``members``: their
    answers, in order, each file once.
    """

    __slots__ = ("members",)

    members: list[Answer]

    def complaints(self) -> list[str]:
        missing = [member for member in self.members if not member.cached]
        told = [f"cannot cache bundle content: {each.path!r}: {each.reason}" for each in missing]
        if len(told) > TOLD_MAX:
            told[TOLD_MAX:] = [f"and {len(told) - TOLD_MAX} more files of {self.asked!r}"]
        return [*told, f"{self.asked!r}: {self.reason}"] if self.reason else told


class Bundle:
    """One bundle of a call. ``lines``: absolute paths, some of them empty.

    ``fault``: why none of it is to be cached.
    """

    def __init__(self, asked: bytes, lines: list[bytes]) -> None:
        self.asked = asked
        self.lines = lines
        self.fault = ""

    @property
    def members(self) -> list[bytes]:
        """What is to be cached, each once."""
        return [] if self.fault else list(dict.fromkeys(filter(None, self.lines)))


def get_with_bundles(
    client: Client,
    paths: Iterable[bytes],
    timeout_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    bundle: bool | None = None,
    all_or_nothing: bool = False,
) -> Iterator[Answer]:
    """As ``Client.get_all``, for files, directories and bundles; those give a ``BundleAnswer``.

    ``bundle``: whether files are bundles; None to go by their names.
    """
    requests = [_read(path, bundle) for path in paths]
    for request in requests:
        if all_or_nothing and isinstance(request, Bundle):
            request.fault = _why_not_all(client, request)
    wanted = [path for request in requests for path in _paths_of(request)]
    answers = get_everything(client, wanted, timeout_s, on_progress)
    for request in requests:
        found = [next(answers) for _ in _paths_of(request)]
        if not isinstance(request, Bundle):
            yield request if isinstance(request, Answer) else found[0]
            continue
        usable = [_fit_for_a_line(_if_still_there(answer)) for answer in found]
        if all_or_nothing and not all(answer.cached for answer in usable):
            request.fault = "not all of its files can be cached"
            _take_down(found)
            _take_out(client, _new_copies(found))
        yield _answer(request, usable)


def _paths_of(request: bytes | Bundle | Answer) -> list[bytes]:
    if isinstance(request, Bundle):
        return request.members
    return [request] if isinstance(request, bytes) else []


def _read(path: bytes, bundle: bool | None) -> bytes | Bundle | Answer:
    """A file or directory stays what it is; what cannot be read as it should has its answer."""
    try:
        lines = read_if_bundle(path, bundle)
    except SourceUnreadable as error:
        return Answer(path, real_path_of(path), usable=False, reason=str(error))
    except NoBundle as error:
        return Answer(path, real_path_of(path), reason=str(error))
    return path if lines is None else Bundle(path, lines)


def _if_still_there(answer: Answer) -> Answer:
    """The same, unless the copy has made room for a later member of a bundle as big as the cache.

    That takes longer than ``cache.min_age``: what was answered within that time stays.
    """
    if not answer.cached or os.path.lexists(answer.path):
        return answer
    asked = os.fsencode(answer.asked)
    return Answer(asked, real_path_of(asked), reason="its copy has made room for others since")


def _fit_for_a_line(answer: Answer) -> Answer:
    """The same, unless its path has a newline: the line was that of a link to such a name."""
    if "\n" not in answer.path:
        return answer
    asked = os.fsencode(answer.asked)
    return Answer(asked, asked, usable=answer.usable, reason="it leads to a name with a newline")


def _answer(bundle: Bundle, answers: list[Answer]) -> BundleAnswer:
    """Write the list, unless there is a reason to answer with the bundle."""
    original = real_path_of(bundle.asked)
    cached = [answer for answer in answers if answer.cached]
    path, fault = original, bundle.fault
    if not fault and not cached:
        fault = "none of its files is cached" if answers else "it lists no files"
    if not fault:
        found = dict(zip(bundle.members, answers, strict=True))
        lines = [os.fsencode(found[line].path) if line else b"" for line in bundle.lines]
        try:
            path = write_result(_directory_of(cached), os.path.basename(original), lines)
        except OSError as error:
            fault = f"the list of its copies cannot be written: {reason_of(error)}"
    answer = BundleAnswer(
        bundle.asked,
        path,
        cached=not fault and len(cached) == len(answers),
        hit=all(answer.hit for answer in answers),
        reason=f"{fault}; using the original list" if fault else "",
        size_bytes=sum(answer.size_bytes for answer in answers),
        from_peers_bytes=sum(answer.from_peers_bytes for answer in answers),
        from_file_server_bytes=sum(answer.from_file_server_bytes for answer in answers),
    )
    answer.members = answers
    return answer


def _directory_of(cached: Sequence[Answer]) -> bytes:
    """The user's own directory in the cache, as the first copy shows. Raises OSError."""
    for answer in cached:
        copy, real_path = os.fsencode(answer.path), real_path_of(os.fsencode(answer.asked))
        if copy.endswith(real_path):
            return copy.removesuffix(real_path)
    raise OSError(0, "no copy lies where it should")


# --- all or nothing ------------------------------------------------------------------------------


def _why_not_all(client: Client, bundle: Bundle) -> str:
    """Why the members cannot all be cached, as far as that is known before; or nothing."""
    from swarmcache.local_protocol import LOCATIONS_FILES_MAX
    from swarmcache.locate import files_of, room_for

    faults: list[str] = []

    def note(path: bytes, reason: str) -> None:
        faults.append(f"{os.fsdecode(path)!r} in it: {reason}")

    files = [file for member in bundle.members for file in files_of(member, False, note)]
    if faults:
        return faults[0]
    rest = iter(dict.fromkeys(files))
    needed_bytes = room_bytes = 0
    while some := list(islice(rest, LOCATIONS_FILES_MAX)):
        with ExitStack() as stack:
            sources = []
            for path in some:
                try:
                    sources.append(open_source(path))
                except SourceUnreadable as error:
                    return f"{os.fsdecode(path)!r} in it: {error}"
                stack.callback(sources[-1].close)
            try:
                room = room_for(client, [source.fd for source in sources])
            except SwarmcacheError as error:
                return str(error)
        needed_bytes += room.needed_bytes
        room_bytes = room.room_bytes
    if needed_bytes > room_bytes:
        return f"its files need {needed_bytes} bytes, and there can be room for {room_bytes}"
    return ""


def _new_copies(answers: Iterable[Answer]) -> list[bytes]:
    """The copies that were not there before; those of directories file by file, since some may
    have been, and other jobs use them."""
    files: list[Answer] = []
    for answer in answers:
        files += answer.files if isinstance(answer, DirectoryAnswer) else [answer]
    return [os.fsencode(file.path) for file in files if file.cached and not file.hit]


def _take_down(answers: Iterable[Answer]) -> None:
    """Remove the links and directories that were made for these. Before the copies are taken out:
    with the last of those the daemon removes the directories that it has made itself."""
    made: list[bytes] = []
    for answer in answers:
        made += answer.made if isinstance(answer, DirectoryAnswer) else []
    for path in reversed(made):
        with suppress(OSError):  # somebody else has removed it, or uses the directory
            if os.path.islink(path):
                os.unlink(path)
            else:
                os.rmdir(path)


def _take_out(client: Client, copies: list[bytes]) -> None:
    """Take these copies of the user's out of the cache again."""
    from swarmcache.cache_client import ask
    from swarmcache.local_protocol import Rm

    with suppress(SwarmcacheError):  # a daemon that has gone: its next start knows no more of it
        for _ in ask(client, Rm(copies)) if copies else ():
            pass
