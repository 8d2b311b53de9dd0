"""``swarmcache install-cf``: puts ``cf`` where CacheManager's callers look for it.

    PREFIX/cache-manager/cf             the program; some callers start it by this path
    PREFIX/cache-manager/__init__.py    the Python package ``cache-manager``, and its module
    PREFIX/cache-manager/client.py      ``client``, whose names are the same
    PREFIX/cache-manager/cqsub          ``swarmcache submit`` for Grid Engine, as it was called
    PREFIX/cache-manager/cftools.sh     what its job scripts source
    PREFIX/bin/cf                       a link to the program

The program is started with environments of all kinds, so it names this Python by its path and
lets no variable tell that what to import. Without this Python, or without the package, as while
another version of it is installed, it still prints the original path.

Nothing is replaced that was not put there by ``install-cf``. Files are replaced in one step, so it
can be run again while jobs are running.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import swarmcache
from swarmcache import cf_package
from swarmcache.errors import LocalError, UsageError

MARK = "installed by swarmcache install-cf"

PROGRAM = """\
#!/bin/sh
# {mark}
python={python}
if [ -x "$python" ]; then
    exec "$python" -I -c {script} "$@"
fi
echo "ERROR: $python is not there any more; run swarmcache install-cf again" >&2
for name in "$@"; do
    case $name in -*) exit 1 ;; esac
    [ -f "$name" ] || exit 1
    exec readlink -f -- "$name"
done
exit 1
"""
SCRIPT = """\
import sys
sys.path.append({packages!r})
try:
    from swarmcache.cf import run_cf
except ImportError as error:
    import os
    if sys.stderr:
        print("ERROR:", error, file=sys.stderr)
    name = (*sys.argv[1:], "-")[0]
    if name.startswith("-") or not os.path.isfile(name):
        sys.exit(1)
    sys.stdout.buffer.write(os.fsencode(os.path.realpath(name)) + b"\\n")
    sys.exit()
sys.exit(run_cf(sys.argv[1:]))"""
CQSUB = """\
#!/bin/sh
# {mark}
# --try-hard was: one node after the other, then any. A list of nodes to prefer is just that.
[ "$1" != --try-hard ] || shift
python={python}
[ -x "$python" ] || exec qsub "$@"
exec "$python" -I -c {script} submit -- qsub "$@"
"""
CQSUB_SCRIPT = """\
import sys
sys.path.append({packages!r})
from swarmcache.cli import main
sys.exit(main())"""
CFTOOLS = """\
# {mark}
# Job scripts mark with cf_exec what is not to be done when they are submitted. None of it is.
cf() {{ {program} "$@"; }}
cf_exec() {{ "$@"; }}
"""
CLIENT_MODULE = '''\
"""The names of the package again, for programs that import its module ``client``."""

# {mark}
import importlib
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_package = importlib.import_module(os.path.basename(os.path.dirname(os.path.abspath(__file__))))
globals().update({{name: getattr(_package, name) for name in _package.__all__}})
'''


def install(prefix: Path) -> list[Path]:
    """Put everything in place and return what is there now. Raises UsageError, LocalError."""
    prefix = Path(os.path.abspath(prefix))
    directory = prefix / "cache-manager"
    files = {
        directory / "cf": (_filled_in(PROGRAM, SCRIPT), 0o755),
        directory / "__init__.py": (_package(), 0o644),
        directory / "client.py": (CLIENT_MODULE.format(mark=MARK), 0o644),
        directory / "cqsub": (_filled_in(CQSUB, CQSUB_SCRIPT), 0o755),
        directory / "cftools.sh": (
            CFTOOLS.format(mark=MARK, program=shlex.quote(str(directory / "cf"))),
            0o644,
        ),
    }
    link = prefix / "bin" / "cf"
    try:
        for file in files:
            _check_replaceable(file)
        _check_link(link)
        for file, (text, mode) in files.items():
            _put(file, text, mode)
        _put_link(link)
    except OSError as error:
        raise LocalError(f"cannot install cf below {prefix}: {error}") from error
    return [*files, link]


def _filled_in(program: str, script: str) -> str:
    """A shell script that runs a script of this Python."""
    script = script.format(packages=str(Path(swarmcache.__file__).resolve().parent.parent))
    return program.format(mark=MARK, python=shlex.quote(sys.executable), script=shlex.quote(script))


def _package() -> str:
    return Path(cf_package.__file__).read_text("utf-8") + f"\n# {MARK}\n"


def _check_replaceable(file: Path) -> None:
    """Raises UsageError where somebody else's file is in the place; OSError."""
    try:
        ours = MARK.encode() in file.read_bytes()
    except FileNotFoundError:
        return
    if not ours:
        raise UsageError(f"{file} is not from swarmcache: move {file.parent} away, then try again")


def _check_link(link: Path) -> None:
    if os.path.lexists(link) and not (
        link.is_symlink() and os.readlink(link) == "../cache-manager/cf"
    ):
        raise UsageError(f"{link} is not from swarmcache: move it away, then try again")


def _make_directory(directory: Path) -> None:
    """With those above it; all users can go through those that are new, whatever the umask."""
    for each in reversed([directory, *directory.parents]):
        if not each.exists():
            each.mkdir()
            each.chmod(0o755)


def _put(file: Path, text: str, mode: int) -> None:
    _make_directory(file.parent)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text, "utf-8")
        beside.chmod(mode)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _put_link(link: Path) -> None:
    _make_directory(link.parent)
    if not link.is_symlink():
        link.symlink_to("../cache-manager/cf")
