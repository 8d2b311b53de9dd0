"""``python -m simulations.compiled flash_crowd --nodes 10000 --size 1GiB``: the same, compiled.

Takes the arguments of ``python -m simulations`` (not ``planted_bugs``, which changes the sources).
Compiled with mypyc, a run has the same trace for little more than half the processor time. The
packages are copied into ``build/`` of the checkout, and the modules there compiled in which the
time goes. That takes a minute or two, once for as long as no source changes.

Needs the development dependencies, a C compiler and Python's header files.

Invariant: what runs is what the sources say; each copy is named after their digest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

ROOT = Path(__file__).parent.parent
PACKAGES = ("swarmcache", "simulations")
MODULES = (
    "swarmcache/chunk_picker.py",
    "swarmcache/chunks.py",
    "swarmcache/download.py",
    "swarmcache/fetching.py",
    "swarmcache/gossip.py",
    "swarmcache/gossip_claims.py",
    "swarmcache/gossip_probes.py",
    "swarmcache/gossip_records.py",
    "swarmcache/gossip_spread.py",
    "swarmcache/gossip_view.py",
    "swarmcache/peer_neighbours.py",
    "swarmcache/peer_state.py",
    "swarmcache/rack_view.py",
    "swarmcache/timers.py",
    "swarmcache/upload_slots.py",
    "simulations/clocks.py",
    "simulations/cluster.py",
    "simulations/control_plane.py",
    "simulations/engine.py",
    "simulations/file_server.py",
    "simulations/gossip_cluster.py",
    "simulations/network.py",
    "simulations/readings.py",
    "simulations/transfers.py",
    "simulations/wires.py",
    "simulations/writers.py",
)


def main(arguments: Sequence[str]) -> int:
    """Compile what is not compiled yet, and run. Exit status: as without compiling; 2 if it cannot
    be compiled."""
    if problem := missing():
        print(f"simulations: cannot compile: {problem}", file=sys.stderr)
        return 2
    copy = compiled_copy(ROOT / "build")
    # Without -P the packages in the working directory would be found first.
    command = [sys.executable, "-P", "-m", "simulations", *arguments]
    return subprocess.run(command, env=environment(copy), check=False).returncode


def missing() -> str | None:
    """What is missing to compile anything, or None."""
    if shutil.which("cc") is None:
        return "no C compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no header files of Python (on Debian: python3-dev)"
    return None


def compiled_copy(
    below: Path, modules: Sequence[str] = MODULES, *, optimization: str = "2"
) -> Path:
    """The directory with the compiled copy of both packages.

    Raises CalledProcessError, having printed why.
    """
    copy = below / f"simulations-{_digest(modules, optimization)}"
    if not copy.exists():
        beside = copy.with_suffix(".unfinished")
        shutil.rmtree(beside, ignore_errors=True)
        for package in PACKAGES:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, beside / package, ignore=ignore)
        compiling = subprocess.run(
            [sys.executable, "-P", "-m", "mypyc", *modules],
            cwd=beside,
            env=environment(beside) | {"MYPYC_OPT_LEVEL": optimization},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if compiling.returncode:
            print(compiling.stdout, file=sys.stderr)
            compiling.check_returncode()
        beside.rename(copy)
    return copy


def environment(copy: Path) -> dict[str, str]:
    """In which Python finds the packages in this directory before all others."""
    return os.environ | {"PYTHONPATH": str(copy)}


def _digest(modules: Sequence[str], optimization: str) -> str:
    """Of all that the compiled copy depends on."""
    hasher = blake3(repr((sys.version, modules, optimization)).encode())
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            hasher.update(repr((str(path.relative_to(ROOT)), path.read_bytes())).encode())
    return hasher.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
