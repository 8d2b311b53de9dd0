"""``swarmcache cf``: what CacheManager's client did, for its callers.

stdout has results only: for a FILE exactly one line, the path of a verified copy or else the real
path of FILE. All talk goes to stderr, in the words that scripts and people search for (``LOG:``,
``WARN:``, ``ERROR:``). Exit code 0: the printed path can be used. 1: FILE does not exist or cannot
be read (its path is printed all the same), or something else that was asked for is not done. 3:
with the setting ``cf.strict``, a path that is usable but not a cached one.

Imported on every cache hit: see ``local_socket.py`` for what that means.
"""

from __future__ import annotations

import os

from swarmcache.cf_arguments import (
    COPY,
    GET,
    HELP,
    LOCATE,
    PING,
    USAGE,
    VERSION,
    Arguments,
    parse,
)
from swarmcache.cf_config import CfConfig, read_config
from swarmcache.cf_talk import Story, say, say_not_connected, show
from swarmcache.client import Client, real_path_of
from swarmcache.errors import DaemonUnavailable, UsageError
from swarmcache.get import EXIT_NOT_CACHED, EXIT_UNUSABLE, abandon_stdout
from swarmcache.local_socket import connect

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from swarmcache.client import Answer

EXIT_FAILED = 1
BUNDLE_SUFFIX = b".bundle"  # bundles.py has it, and other imports


def run_cf(words: list[str]) -> int:
    """Run the words after ``cf`` and return the exit code."""
    try:
        arguments = parse(words)
    except UsageError as error:
        say(f"ERROR: {error}\n{USAGE}")
        return EXIT_FAILED
    for remark in arguments.remarks:
        say(remark)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130  # as a shell does: 128 + SIGINT
    except BrokenPipeError:
        abandon_stdout()
        return EXIT_FAILED
    except OSError as error:
        say(f"ERROR: cannot write the result: {error.strerror}")
        abandon_stdout()
        return EXIT_FAILED


def _run(arguments: Arguments) -> int:
    if arguments.mode in (HELP, VERSION):
        say(USAGE if arguments.mode == HELP else _version())
        return EXIT_FAILED
    if arguments.mode == PING:
        return _ping()
    config = read_config(arguments.config_file)
    for remark in config.remarks:
        say(remark)
    names = [os.fsencode(name) for name in arguments.names]
    with Client() as client:
        if arguments.mode == GET:
            return get_file(client, names[0], arguments, config)
        from swarmcache import cf_actions

        bundle = _bundle_choice(arguments, config)
        if arguments.mode == LOCATE:
            return cf_actions.show_locations(client, names, arguments.limit, bundle)
        if arguments.mode == COPY:
            source, destination = names[:2]
            return cf_actions.copy(
                client, source, destination, register=arguments.register, bundle=bundle
            )
        return cf_actions.show_destination(client, names[0], config)


def _ping() -> int:
    try:
        connect(None, None).close()
    except DaemonUnavailable as error:
        say_not_connected(str(error))
        return EXIT_FAILED
    return 0


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"swarmcache {version('swarmcache')}"
    except PackageNotFoundError:  # run from a directory of sources
        return "swarmcache (not installed)"


def _bundle_choice(arguments: Arguments, config: CfConfig) -> bool | None:
    """Whether files are bundles; None to go by their names."""
    return False if arguments.bundle is None and config.ignore_bundle else arguments.bundle


def get_file(client: Client, asked: bytes, arguments: Arguments, config: CfConfig) -> int:
    """Print where the copy of one file is, or the file itself. Raises OSError."""
    real_path = real_path_of(asked)
    shown = os.fsdecode(real_path)
    say(f"LOG: request: {shown}")
    if not os.path.isfile(real_path):
        say(f"ERROR: file not found '{shown}'")
        show(real_path)
        return EXIT_UNUSABLE
    answer = _get(client, real_path, _bundle_choice(arguments, config), arguments.conjunct)
    if arguments.debug:
        say(f"DEBUG: {answer!r}")
    show(os.fsencode(answer.path))
    if not answer.usable:
        return EXIT_UNUSABLE
    return 0 if answer.cached else not_cached_code()


def _get(client: Client, real_path: bytes, bundle: bool | None, conjunct: bool) -> Answer:
    if bundle or (bundle is None and real_path.endswith(BUNDLE_SUFFIX)):
        from swarmcache.cf_actions import get_bundle

        return get_bundle(client, real_path, bundle=bundle, conjunct=conjunct)
    story = Story(os.fsdecode(real_path))
    (answer,) = client.get_all([real_path], on_progress=story.tell)
    story.end(answer)
    return answer


def not_cached_code() -> int:
    """The exit code for a usable path that is not a cached one."""
    from swarmcache.config import load  # takes a while, as did the vain request
    from swarmcache.errors import ConfigError

    try:
        strict = load({}, os.environ).cf.strict
    except ConfigError as error:
        say(f"WARN: {error}")
        return 0
    return EXIT_NOT_CACHED if strict else 0
