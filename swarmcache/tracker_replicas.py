"""Which nodes have complete copies of which file versions, as they have told the tracker.

Pure logic, and a part of ``TrackerState``: it names holders to those who ask, and says nothing to
anybody by itself. Swarms are not its business: a holder may be a member of one, or of none.

A node that tells anew of all its replicas keeps, until it is through, those that it has told of
before; what it has then not told of again is gone.

Invariants: a node holds what its list says, and is in the lists of holders of just these file
versions; no file version has an empty list.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from random import Random

from swarmcache.chunks import mask_of, mask_to_bytes
from swarmcache.messages import (
    BATCH_HOLDERS_MAX,
    LOCATED_NODES_MAX,
    BatchHolder,
    HeldBy,
    Holders,
    Locate,
    Located,
    WhoHas,
)
from swarmcache.tracker_nodes import TrackerNodes
from swarmcache.tracker_statistics import TrackerStatistics

# Of so many holders of a small file that one is named which has most of the others as well.
BATCH_DRAWN = 3


class TrackerReplicas:
    """All replicas of connected nodes. ``nodes``: where they are reached, which the caller owns."""

    def __init__(self, rng: Random, nodes: TrackerNodes, statistics: TrackerStatistics) -> None:
        self._rng = rng
        self._nodes = nodes
        self._statistics = statistics
        # Holders in the order in which they told, so that naming some needs no sorting of all.
        self._holders: dict[bytes, dict[str, None]] = {}
        self._of_node: dict[str, set[bytes]] = {}
        self._unconfirmed: dict[str, set[bytes]] = {}

    def holders(self, version_id: bytes) -> Collection[str]:
        """Who holds it, in the order in which they told."""
        return self._holders.get(version_id, {})

    def count(self, node: str) -> int:
        """How many file versions a node holds."""
        return len(self._of_node.get(node, ()))

    # --- what nodes tell ------------------------------------------------------------------------

    def tells_anew(self, node: str) -> None:
        """The node has begun to tell of all that it holds, or goes on with it."""
        if node not in self._unconfirmed:
            self._unconfirmed[node] = set(self._of_node.get(node, ()))

    def has_told(self, node: str) -> list[bytes]:
        """The node is through; returns what it has not told of again, which is to be dropped."""
        return sorted(self._unconfirmed.pop(node, set()) & self._of_node.get(node, set()))

    def add(self, node: str, version_id: bytes) -> None:
        """The node says that it holds this file version."""
        self._of_node.setdefault(node, set()).add(version_id)
        if node in self._unconfirmed:
            self._unconfirmed[node].discard(version_id)
        holders = self._holders.setdefault(version_id, {})
        if node not in holders:
            holders[node] = None
            self._statistics.holders_changed(len(holders) - 1, len(holders))

    def drop(self, node: str, version_id: bytes) -> None:
        """The node does not hold it, or no longer."""
        held = self._of_node.get(node, set())
        if version_id in held:
            held.discard(version_id)
            self._drop_holder(node, version_id)

    def lose_node(self, node: str) -> None:
        """The node is gone, and what it holds with it."""
        self._unconfirmed.pop(node, None)
        for version_id in self._of_node.pop(node, set()):
            self._drop_holder(node, version_id)

    def _drop_holder(self, node: str, version_id: bytes) -> None:
        holders = self._holders[version_id]
        del holders[node]
        self._statistics.holders_changed(len(holders) + 1, len(holders))
        if not holders:
            del self._holders[version_id]

    # --- what nodes ask -------------------------------------------------------------------------

    def located(self, own: str, message: Locate) -> Located:
        """Who besides the node ``own``, which asks, has replicas of these file versions."""
        share = LOCATED_NODES_MAX // max(len(message.version_ids), 1)
        nodes_max = min(message.nodes_max, share)
        found = []
        for version_id in message.version_ids:
            holders = self._holders.get(version_id, {})
            others = (name for name in holders if name != own)
            nodes = [self._nodes[name].address for name in islice(others, nodes_max)]
            found.append(Holders(len(holders) - (own in holders), nodes))
        return Located(message.request_id, found)

    def held_by(self, own: str, message: WhoHas) -> HeldBy:
        """A few nodes besides ``own``, which asks, that have most of these file versions.

        Drawn, so that a crowd that asks for the same ones is spread over all who have them, of
        which there soon are many.
        """
        left = {version_id: place for place, version_id in enumerate(message.version_ids)}
        holders: list[BatchHolder] = []
        for version_id in message.version_ids:
            known = self._holders.get(version_id)
            if not known or version_id not in left:
                continue
            first = int(self._rng.random() * max(len(known) - BATCH_DRAWN + 1, 1))
            drawn = islice(known, first, first + BATCH_DRAWN)
            candidates = [name for name in drawn if name != own and not self._nodes[name].silent]
            held = [[each for each in left if each in self._of_node[it]] for it in candidates]
            if not held:
                continue
            most = max(held, key=len)
            mask = mask_of(left.pop(each) for each in most)
            address = self._nodes[candidates[held.index(most)]].address
            holders.append(BatchHolder(address, mask_to_bytes(mask)))
            if len(holders) == BATCH_HOLDERS_MAX:
                break
        return HeldBy(message.request_id, holders)

    def check(self) -> None:
        """Assert the invariants."""
        self._statistics.check(self._holders)
        for version_id, holders in self._holders.items():
            assert holders, "a file version with a list of no holders"
            for name in holders:
                assert name in self._nodes, "a holder that is not connected"
                assert version_id in self._of_node[name], "a holder that has no replica"
        listed = sum(len(holders) for holders in self._holders.values())
        assert listed == sum(map(len, self._of_node.values())), "a replica that nobody finds"
