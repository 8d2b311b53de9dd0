"""What ``swarmcache cf`` tells, in the words of CacheManager's client, for which scripts search.

Imported on every cache hit: see ``local_socket.py`` for what that means.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from swarmcache.client import Answer, Progress


def say(line: str) -> None:
    """One line on stderr, whatever stderr is: whoever does not read it still gets the path."""
    if sys.stderr is None:
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # a pipe that nobody reads any more, a full disk
        sys.stderr = None


def say_not_connected(reason: str) -> None:
    """No daemon answers, as the old client said of its server."""
    say(f"ERROR: {reason}")
    say("ERROR: cannot connect to server")


def show(line: bytes) -> None:
    """One line on stdout, at once. Raises OSError."""
    if sys.stdout is None:
        raise OSError(0, "stdout is closed")
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


class Story:
    """What becomes of one file, told while it happens."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._begun = False
        self._joined = False
        self._waited = False

    def tell(self, progress: Progress) -> None:
        if not self._begun:
            self._begun, self._joined = True, progress.joined
            if progress.joined:
                say("LOG: file transfer in progress. wait")
            else:
                say(f"LOG: start copying {self._shown}")
        if progress.waiting_for.startswith("a slot") and not self._waited:
            self._waited = True
            say("LOG: no copy slot available. waiting")

    def end(self, answer: Answer) -> None:
        if answer.cached and (answer.hit or self._joined):
            say("LOG: using existing file")
        elif answer.cached:
            # Peers are many at once; the old text had the name of the one there was in this place.
            peers = "" if answer.from_file_server_bytes else "peers:"
            copied_bytes = answer.from_peers_bytes + answer.from_file_server_bytes
            say(f"LOG: copied {peers if copied_bytes else ''}{self._shown}")
        elif not answer.usable:
            say(f"ERROR: cannot read '{self._shown}': {answer.reason}")
        elif answer.reason.startswith("no daemon answers"):
            say_not_connected(answer.reason)
        else:
            say(f"LOG: {answer.reason}")
            say("LOG: no local cache available")
