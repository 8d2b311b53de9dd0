"""What a node has to say of the other members of its cluster, as the gossip has it.

Pure logic: values in, plain data out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from swarmcache.gossip import Member
from swarmcache.gossip_records import DiskHealth, MemberState, NodeStatus
from swarmcache.placement import KnownNode

_TROUBLES = {DiskHealth.FULL: "its disk is full", DiskHealth.SICK: "its disk fails"}
_STATE_TROUBLES = {
    MemberState.SUSPECT: "it does not answer",
    MemberState.DEAD: "it is dead",
    MemberState.LEFT: "it was shut down",
}


def member_fields(members: Iterable[Member], now_s: float) -> list[dict[str, Any]]:
    """All members whose address is known, for ``status``; by address.

    ``age_s``: since the member has said so. Of one that has said nothing of itself yet sizes and
    counts are None, and of a disk that was not measured yet, as soon after the start of its node,
    so is what is there.
    """
    found = []
    for member in members:
        profile, status = member.profile, member.status
        if profile is None:
            continue
        found.append(
            {
                "node": profile.address.node,
                "name": profile.address.name,
                "state": member.state.name.lower(),
                "age_s": round(member.age_s(now_s), 1),
                "rack": profile.rack,
                "version": profile.version,
                "capacity_bytes": profile.capacity_bytes,
                **_status_fields(status),
            }
        )
    return sorted(found, key=lambda each: str(each["node"]))


def _status_fields(status: NodeStatus | None) -> dict[str, Any]:
    disk = status if status is not None and status.measured else None
    return {
        "disk": disk and disk.disk.name.lower(),
        "free_bytes": disk and disk.free_bytes,
        "used_bytes": disk and disk.used_bytes,
        "pinned_bytes": disk and disk.pinned_bytes,
        "uploads": status and status.uploads,
        "downloads": status and status.downloads,
        "standing_in": status is not None and status.standing_in,
    }


def known_nodes(members: Iterable[Member]) -> list[KnownNode]:
    """The members as such that may be asked to take replicas, or may not.

    Of a disk that was not measured yet nothing is known, as soon after the start of its node.
    """
    found = []
    for member in members:
        if member.profile is None:
            continue
        address, status = member.profile.address, member.status
        trouble = _STATE_TROUBLES.get(member.state, "")
        if status is None or not status.measured:
            found.append(KnownNode(address.node, address.name or address.node, trouble=trouble))
            continue
        found.append(
            KnownNode(
                address.node,
                address.name or address.node,
                status.free_bytes,
                status.used_bytes,
                trouble or _TROUBLES.get(status.disk, ""),
            )
        )
    return found
