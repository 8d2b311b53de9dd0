"""Files whose chunks are served to peers, and the replicas that are kept open for that.

A replica is opened when a peer first asks for it, and stays open while it is among the
``REPLICAS_MAX`` that were asked for last: a peer in full swing asks for hundreds of chunks.

Invariant: who is serving from a file has it open until he lets go of it, whatever becomes of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from swarmcache.chunks import ChunkLayout
from swarmcache.disk_calls import SharedFile

REPLICAS_MAX = 64  # a daemon may have 1024 descriptors by default


class ChunkSource:
    """The chunks of a complete or partial file, open for reading until ``close``.

    ``fd`` stays valid until then, whatever becomes of the file. ``has`` is asked before every
    read, for a partial file gets more chunks, and loses them all when it is discarded.
    """

    def __init__(self, file: SharedFile, layout: ChunkLayout, has: Callable[[int], bool]) -> None:
        """Takes over one use of ``file``."""
        self._file: SharedFile | None = file
        self.fd = file.fd
        self.layout = layout
        self.has = has

    def close(self) -> None:
        """A second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.release()


@dataclass(slots=True)
class _Kept:
    """A replica that is open for peers. Not ``good``: it was found to be wrong meanwhile."""

    file: SharedFile
    layout: ChunkLayout
    good: bool = True

    def has(self, chunk: int) -> bool:
        return self.good and 0 <= chunk < self.layout.chunk_count


class OpenReplicas:
    """The replicas of one cache directory that are open for peers. Thread-safe."""

    def __init__(self, open_object: Callable[[bytes], int]) -> None:
        """``open_object`` returns a descriptor of a replica, or raises OSError."""
        self._open_object = open_object
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def open(self, version_id: bytes, layout: ChunkLayout) -> ChunkSource:
        """The chunks of a replica; the caller closes it. Raises OSError."""
        with self._lock:
            kept = self._kept.get(version_id)
            if kept is None:
                file = SharedFile(self._open_object(version_id))
                kept = self._kept[version_id] = _Kept(file, layout)
                if len(self._kept) > REPLICAS_MAX:
                    self._kept.popitem(last=False)[1].file.release()
            self._kept.move_to_end(version_id)
            kept.file.retain()
            return ChunkSource(kept.file, kept.layout, kept.has)

    def withhold(self, version_id: bytes) -> None:
        """The replica was found to be wrong: no more of it is served, by whomever."""
        with self._lock:
            kept = self._kept.get(version_id)
            if kept is not None:
                kept.good = False

    def let_go(self, version_id: bytes) -> None:
        """Keep it open no longer. Who serves it now may go on."""
        with self._lock:
            kept = self._kept.pop(version_id, None)
        if kept is not None:
            kept.file.release()

    def let_go_of_all(self) -> None:
        """Keep none open any longer."""
        with self._lock:
            for kept in self._kept.values():
                kept.file.release()
            self._kept.clear()
