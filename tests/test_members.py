"""What is said of the members of a cluster, and which of them may be asked to take replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarmcache.gossip import Member
from swarmcache.gossip_records import DiskHealth, MemberState, NodeProfile, NodeStatus
from swarmcache.members import known_nodes, member_fields
from swarmcache.messages import NodeAddress
from swarmcache.placement import KnownNode

PROFILE = NodeProfile(NodeAddress("b:7381", 7382, "b"), "rack 1", "1.2", 900)
STATUS = NodeStatus(500, 300, 20, 3, 1)
MEMBER = Member(PROFILE, STATUS, MemberState.ALIVE, 40.0)


def test_members_are_told_with_their_age_and_by_address() -> None:
    other = replace(MEMBER, profile=replace(PROFILE, address=NodeAddress("a:7381", 1)))

    first, second = member_fields([MEMBER, other], 42.34)

    assert first["node"] == "a:7381"
    assert second == {
        "node": "b:7381",
        "name": "b",
        "state": "alive",
        "age_s": 2.3,
        "rack": "rack 1",
        "version": "1.2",
        "capacity_bytes": 900,
        "disk": "ok",
        "free_bytes": 500,
        "used_bytes": 300,
        "pinned_bytes": 20,
        "uploads": 3,
        "downloads": 1,
        "standing_in": False,
    }


def test_who_has_said_nothing_yet_is_told_without_figures_and_without_an_address_not_at_all() -> (
    None
):
    silent, nameless = replace(MEMBER, status=None), replace(MEMBER, profile=None)

    (told,) = member_fields([silent, nameless], 50.0)

    assert (told["disk"], told["free_bytes"], told["uploads"]) == (None, None, None)
    assert known_nodes([silent, nameless]) == [KnownNode("b:7381", "b")]


@pytest.mark.parametrize("standing_in", [False, True])
def test_of_a_disk_that_was_not_measured_yet_nothing_is_known(standing_in: bool) -> None:
    """It has room, for all that is known: no disk without any is one in order."""
    fresh = replace(MEMBER, status=NodeStatus(uploads=1, standing_in=standing_in))

    (told,) = member_fields([fresh], 50.0)
    assert (told["disk"], told["free_bytes"], told["used_bytes"]) == (None, None, None)
    assert (told["uploads"], told["standing_in"]) == (1, standing_in)
    (known,) = known_nodes([fresh])

    assert known == KnownNode("b:7381", "b")
    assert known.lacking_room(1000).trouble == ""


@pytest.mark.parametrize(
    ("state", "disk", "trouble"),
    [
        (MemberState.ALIVE, DiskHealth.OK, ""),
        (MemberState.ALIVE, DiskHealth.FULL, "its disk is full"),
        (MemberState.ALIVE, DiskHealth.SICK, "its disk fails"),
        (MemberState.SUSPECT, DiskHealth.OK, "it does not answer"),
        (MemberState.DEAD, DiskHealth.SICK, "it is dead"),
        (MemberState.LEFT, DiskHealth.OK, "it was shut down"),
    ],
)
def test_who_is_in_trouble_is_not_asked(state: MemberState, disk: DiskHealth, trouble: str) -> None:
    member = replace(MEMBER, state=state, status=replace(STATUS, disk=disk))

    assert known_nodes([member]) == [KnownNode("b:7381", "b", 500, 300, trouble)]
