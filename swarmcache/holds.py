"""The copies that local clients keep from being evicted, each until it is released.

Invariant: the cache holds a file version once for each hold of a connection, and a connection that
has closed has none.
"""

from __future__ import annotations

from swarmcache.disk import Cache
from swarmcache.local_server import LocalConnection

# Copies that one connection may hold. Some 100 bytes each; few jobs use as many files at a time,
# and those that do open one more connection.
HOLDS_MAX = 4096


class Holds:
    """What is held, by connection and by the number that its client gave the hold."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._held: dict[LocalConnection, dict[int, bytes]] = {}

    def add(self, connection: LocalConnection, number: int, version_id: bytes) -> bool:
        """False where the client has gone, holds too many already, or has used the number."""
        held = self._held.get(connection, {})
        if held.get(number) == version_id:
            return True
        if not connection.is_open or len(held) >= HOLDS_MAX or number in held:
            return False
        if connection not in self._held:
            self._held[connection] = held
            connection.on_closed[self] = lambda: self._release_all(connection)
        self._cache.hold(version_id)
        held[number] = version_id
        return True

    def release(self, connection: LocalConnection, number: int) -> None:
        """End one hold; nothing happens where there is none."""
        version_id = self._held.get(connection, {}).pop(number, None)
        if version_id is not None:
            self._cache.release(version_id)

    def _release_all(self, connection: LocalConnection) -> None:
        for version_id in self._held.pop(connection).values():
            self._cache.release(version_id)
