"""``python -m swarmcache`` is the same as ``swarmcache``."""

from __future__ import annotations

from swarmcache.cli import run

if __name__ == "__main__":
    run()
