"""The replicas of this node that neighbours want chunks of, and what they were told of them.

Pure logic, and a part of ``PeerState``. A replica costs nothing here until a neighbour that wants
the file connects. Then its digests are loaded, once, and every neighbour is told of all chunks.

A swarm may cut the file differently, since the setting was another one when the replica came. Then
no chunk of it would be taken for right, nor this node for honest: it leaves that swarm.

Invariant: a seed has at least one neighbour; each of them has been told of all chunks as soon as
the digests are here, and cuts the file as the replica does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarmcache.chunks import full_mask
from swarmcache.messages import HAVE_CHUNKS_MAX, Gone, Have
from swarmcache.peer_events import LoadManifest, PeerEffect, TellPeer


@dataclass(slots=True)
class Seed:
    """A complete file version. ``digests``: None until they are loaded. ``nodes``: the neighbours
    that may want chunks of it, and how their swarm cuts it (0: not told)."""

    digests: Sequence[bytes] | None = None
    chunk_size_bytes: int = 0
    nodes: dict[str, int] = field(default_factory=dict)

    def is_cut_like(self, wanted_bytes: int) -> bool:
        """Whether chunks of this size are what this replica has."""
        return wanted_bytes in (0, self.chunk_size_bytes)


class PeerSeeds:
    """All such replicas of one node. Neighbours are the connected ones throughout."""

    def __init__(self) -> None:
        self._seeds: dict[bytes, Seed] = {}

    def version_ids(self) -> list[bytes]:
        """The file versions of all seeds."""
        return list(self._seeds)

    def nodes(self, version_id: bytes) -> list[str]:
        """The neighbours of one seed; none where it is none."""
        seed = self._seeds.get(version_id)
        return sorted(seed.nodes) if seed is not None else []

    def held(self, version_id: bytes) -> int:
        """Mask of the chunks that it can be said to have: all, once the digests are loaded."""
        seed = self._seeds.get(version_id)
        return full_mask(len(seed.digests)) if seed is not None and seed.digests else 0

    # --- how they come --------------------------------------------------------------------------

    def serve(
        self,
        version_id: bytes,
        node: str,
        digests: Sequence[bytes],
        chunk_size_bytes: int,
        effects: list[PeerEffect],
    ) -> None:
        """This node has fetched all of a file of which a neighbour, told so far, lacks some."""
        seed = self._seeds.setdefault(version_id, Seed(digests, chunk_size_bytes))
        seed.nodes[node] = chunk_size_bytes
        effects.append(TellPeer(node, Have(version_id, [], b"", complete=True)))

    def greet(
        self, version_id: bytes, node: str, wanted_bytes: int, effects: list[PeerEffect]
    ) -> bool:
        """A neighbour wants this file. False: the seed must end, being cut differently."""
        seed = self._seeds.get(version_id)
        if seed is None:
            self._seeds[version_id] = Seed(nodes={node: wanted_bytes})
            effects.append(LoadManifest(version_id))
            return True
        seed.nodes[node] = wanted_bytes
        return seed.digests is None or self._offer(node, version_id, seed, effects)

    def loaded(
        self,
        version_id: bytes,
        digests: Sequence[bytes],
        chunk_size_bytes: int,
        effects: list[PeerEffect],
    ) -> bool:
        """The digests are here. False: there is no replica (any more), or it is cut differently,
        and the seed must end."""
        seed = self._seeds.get(version_id)
        if seed is None:
            return True
        if not digests:
            return False
        seed.digests = digests
        seed.chunk_size_bytes = chunk_size_bytes
        return all(self._offer(node, version_id, seed, effects) for node in sorted(seed.nodes))

    # --- how they end ---------------------------------------------------------------------------

    def part(self, version_id: bytes, node: str) -> None:
        """This neighbour wants nothing of it any more."""
        seed = self._seeds.get(version_id)
        if seed is not None:
            seed.nodes.pop(node, None)
            if not seed.nodes:
                del self._seeds[version_id]

    def say_gone(self, version_id: bytes, effects: list[PeerEffect]) -> None:
        """Its neighbours hear that this node has it no more; or else they would go on thinking that
        it has all, and tell it nothing."""
        effects.extend(TellPeer(node, Gone(version_id)) for node in self.nodes(version_id))

    def check(self) -> None:
        """Assert the invariant."""
        for seed in self._seeds.values():
            assert seed.nodes, "a seed that nobody wants"
            for wanted_bytes in seed.nodes.values():
                right = seed.digests is None or seed.is_cut_like(wanted_bytes)
                assert right, "offered to a swarm that cuts it differently"

    # --- inside ---------------------------------------------------------------------------------

    def _offer(self, node: str, version_id: bytes, seed: Seed, effects: list[PeerEffect]) -> bool:
        """Tell a neighbour of all chunks, if its swarm cuts the file like this replica."""
        if not seed.is_cut_like(seed.nodes[node]):
            self.say_gone(version_id, effects)
            return False
        digests, cut = seed.digests, seed.chunk_size_bytes
        assert digests is not None, "offered before it was loaded"
        for start in range(0, len(digests), HAVE_CHUNKS_MAX):
            part = digests[start : start + HAVE_CHUNKS_MAX]
            chunks = list(range(start, start + len(part)))
            last = start + len(part) == len(digests)
            have = Have(version_id, chunks, b"".join(part), complete=last, chunk_size_bytes=cut)
            effects.append(TellPeer(node, have))
        return True
