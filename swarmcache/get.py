"""What ``swarmcache get`` does once its options are known.

Imported on every cache hit: see ``local_socket.py`` for what that means.
"""

from __future__ import annotations

import os
import sys

from swarmcache.client import Client

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swarmcache.client import Answer, Progress
    from swarmcache.display import ProgressDisplay

EXIT_UNUSABLE = 1
EXIT_NOT_CACHED = 3


def say(text: str) -> None:
    """One line on stderr, whatever stderr is: who does not read it still gets the paths."""
    if sys.stderr is None:
        return
    try:
        print(f"swarmcache: {text}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it any more, or its disk is full
        sys.stderr = None


def run_get(
    names: list[str],
    *,
    client: Client,
    strict: bool = False,
    timeout_s: float | None = None,
    progress: bool = True,
    end: bytes = b"\n",
    bundle: bool | None = None,
    all_or_nothing: bool = False,
) -> int:
    """Print one path per FILE and return the exit code. Nothing but paths goes to stdout.

    ``bundle``: whether files are bundles; None to go by their names.
    """
    bar = _Bar(progress and sys.stderr is not None and sys.stderr.isatty())
    unusable = not_cached = False
    try:
        paths = [os.fsencode(name) for name in names]
        for answer in _answers(client, paths, timeout_s, bar.tell, bundle, all_or_nothing):
            bar.clear()
            unusable |= not answer.usable
            not_cached |= not answer.cached
            _tell(answer, end)
    except KeyboardInterrupt:
        return 130  # as a shell does: 128 + SIGINT
    except BrokenPipeError:
        abandon_stdout()
        return EXIT_UNUSABLE
    except OSError as error:
        say(f"cannot write the paths: {error.strerror}")
        abandon_stdout()
        return EXIT_UNUSABLE
    finally:
        bar.clear()
    if unusable:
        return EXIT_UNUSABLE
    return EXIT_NOT_CACHED if strict and not_cached else 0


def _answers(
    client: Client,
    paths: list[bytes],
    timeout_s: float | None,
    on_progress: Callable[[Progress], None] | None,
    bundle: bool | None,
    all_or_nothing: bool,
) -> Iterator[Answer]:
    named = any(path.endswith(b".bundle") for path in paths)
    if bundle or (named and bundle is None):
        from swarmcache.bundle_get import get_with_bundles

        return get_with_bundles(
            client, paths, timeout_s, on_progress, bundle=bundle, all_or_nothing=all_or_nothing
        )
    if not any(map(os.path.isdir, paths)):
        return client.get_all(paths, timeout_s, on_progress)
    from swarmcache.directories import get_everything

    return get_everything(client, paths, timeout_s, on_progress)


def _tell(answer: Answer, end: bytes) -> None:
    for complaint in answer.complaints():
        say(complaint)
    if not answer.usable:
        return
    if sys.stdout is None:
        raise OSError(0, "stdout is closed")
    sys.stdout.buffer.write(os.fsencode(answer.path) + end)
    sys.stdout.buffer.flush()


def abandon_stdout() -> None:
    """Nobody reads it any more: keep Python from complaining about that when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


class _Bar:
    """The progress bar, which is not even imported before there is something to show.

    ``tell``: what to call with news; None where nobody looks, so that none need be read.
    """

    def __init__(self, wanted: bool) -> None:
        self.tell = self._show if wanted else None
        self._display: ProgressDisplay | None = None

    def _show(self, progress: Progress) -> None:
        if self._display is None:
            from swarmcache.display import ProgressDisplay

            self._display = ProgressDisplay()
        self._display.show(progress)

    def clear(self) -> None:
        """Leave the terminal as it was, for other lines. The next news bring it back."""
        if self._display is not None:
            self._display.clear()
