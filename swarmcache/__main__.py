"""``python -m swarmcache`` is the same as ``swarmcache``."""

from __future__ import annotations

import sys

from swarmcache.cli import main

if __name__ == "__main__":
    sys.exit(main())
