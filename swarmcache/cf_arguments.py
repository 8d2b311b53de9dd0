"""The command line of CacheManager's client, as its callers write it.

    cf [OPTIONS] FILE                   print the path of a local copy
    cf [OPTIONS] -cp SOURCE DESTINATION copy back to a file server
    cf [OPTIONS] -l FILE...             print where copies are
    cf [OPTIONS] -d FILE                print where a local file may be written

Options may stand anywhere. One that is not known is named and otherwise ignored, since callers rely
on that; after ``--`` everything is a name. Imported on every cache hit.
"""

from __future__ import annotations

from swarmcache.errors import UsageError

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE = """\
usage: cf [OPTIONS] FILE                     print the path of a local copy of FILE
       cf [OPTIONS] -cp SOURCE DESTINATION   copy SOURCE to a file server
       cf [OPTIONS] -l FILE...               print HOST:PATH:SIZE of every copy
       cf [OPTIONS] -d FILE                  print a path to write a local FILE to

  -cp, --copy             copy SOURCE to DESTINATION, within the slots of its file server
  -n,  --noregister       with -cp: SOURCE does not become a copy of DESTINATION
  -l,  --locate           tell where copies of FILEs are
  -ll, --locate-limit N   the same, at most N copies of each FILE; 0: all
  -d,  --destination      make the directories for a local FILE that -cp will copy back
       --bundle           FILE lists other files, whatever it is called
       --nobundle         FILE is an ordinary file, even if it is called *.bundle
       --conjunct         all files of a bundle, or none
       --config FILE      the old client's settings, instead of ~/.cmclient
       --debug            tell more
       --ping             exit with 0 where a daemon answers on this machine, else with 1
  -h,  --help             tell this
  -V,  --version          tell the version
  -m,  --maxloc N         accepted; has no meaning any more"""

GET, COPY, LOCATE, DESTINATION, PING, HELP, VERSION = range(7)

_MODES = {
    "-cp": COPY,
    "--copy": COPY,
    "-l": LOCATE,
    "--locate": LOCATE,
    "-d": DESTINATION,
    "--destination": DESTINATION,
    "--ping": PING,
    "-h": HELP,
    "--help": HELP,
    "-V": VERSION,
    "--version": VERSION,
}


class Arguments:
    """What a command line asks for.

    ``bundle``: True or False where the caller said so, else None. ``limit``: the most copies that
    are told of a file, None for all. ``remarks``: lines for stderr about the command line itself.
    """

    __slots__ = (
        "bundle",
        "config_file",
        "conjunct",
        "debug",
        "limit",
        "mode",
        "names",
        "register",
        "remarks",
    )

    def __init__(self) -> None:
        self.mode = GET
        self.names: list[str] = []
        self.register = True
        self.limit: int | None = None
        self.bundle: bool | None = None
        self.conjunct = False
        self.config_file: str | None = None
        self.debug = False
        self.remarks: list[str] = []


def parse(words: list[str]) -> Arguments:
    """Read the words after ``cf``. Raises UsageError."""
    found = Arguments()
    rest = iter(words)
    for word in rest:
        if word == "--":
            found.names += rest
        elif not word.startswith("-") or word == "-":
            found.names.append(word)
        elif word in _MODES:
            found.mode = _MODES[word]
        else:
            _read_option(found, word, rest)
    _check(found)
    return found


def _read_option(found: Arguments, word: str, rest: Iterator[str]) -> None:
    match word:
        case "-ll" | "--locate-limit":
            found.mode = LOCATE
            found.limit = _number(word, rest) or None
        case "-m" | "--maxloc":
            _number(word, rest)
            found.remarks.append(f"WARN: {word} has no meaning any more: all copies are used")
        case "-n" | "--noregister":
            found.register = False
        case "--bundle":
            found.bundle = True
        case "--nobundle":
            found.bundle = False
        case "--conjunct":
            found.conjunct = True
        case "--config":
            found.config_file = _value(word, rest)
        case "--debug":
            found.debug = True
        case _:
            found.remarks.append(f"WARN: unknown option: '{word}'")


def _value(word: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{word} needs a value")
    return value


def _number(word: str, rest: Iterator[str]) -> int:
    value = _value(word, rest)
    if not value.isascii() or not value.isdigit():
        raise UsageError(f"{word} {value!r}: expected a number, such as 2")
    return int(value)


def _check(found: Arguments) -> None:
    """Raise UsageError where names are missing; remark on those that are ignored."""
    if found.mode in (PING, HELP, VERSION):
        return
    needed = 2 if found.mode == COPY else 1
    if len(found.names) < needed:
        raise UsageError("-cp needs SOURCE and DESTINATION" if needed == 2 else "FILE is missing")
    ignored = [] if found.mode == LOCATE else found.names[needed:]
    if ignored:
        found.remarks.append(f"WARN: ignored: {' '.join(map(repr, ignored))}")
