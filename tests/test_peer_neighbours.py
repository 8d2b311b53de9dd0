"""Who is dialled, when, and which connections are given up: for every order of what may happen.

What a node does with its neighbours is tested in ``test_peer_state.py``.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.messages import NodeAddress
from swarmcache.peer_events import DialPeer, HangUp, PeerEffect
from swarmcache.peer_neighbours import LINGER_S, REDIAL_MAX_S, PeerNeighbours

ME = "m:1"
LOWER = NodeAddress("a:1", 2)
HIGHER = NodeAddress("z:1", 2)
FILES = [b"a" * 32, b"b" * 32]
ACTIONS = ("meet", "part", "arrive", "break", "died", "came back", "wait")


class World:
    """The neighbours of one node, and what there is really: dials under way and connections."""

    def __init__(self) -> None:
        self.neighbours = PeerNeighbours(ME)
        self.now_s = 100.0
        self.dialled: set[str] = set()
        self.connected: set[str] = set()
        self.wanted: set[bytes] = set()

    def carry_out(self, effects: list[PeerEffect]) -> None:
        for effect in effects:
            if isinstance(effect, DialPeer):
                node = effect.address.node
                assert node not in self.dialled | self.connected, "dialled twice"
                assert node > ME, "dialled by the wrong one of two"
                self.dialled.add(node)
            else:
                assert isinstance(effect, HangUp)
                self.connected.remove(effect.node)
        self.neighbours.check()

    def do(self, action: str, address: NodeAddress, version_id: bytes, wait_s: float) -> None:
        node = address.node
        effects: list[PeerEffect] = []
        match action:
            case "meet":
                self.neighbours.meet(address, version_id, 0, effects)
            case "part":
                self.neighbours.part(node, version_id, self.now_s)
            case "arrive":
                self.dialled.discard(node)
                self.connected.add(node)
                self.neighbours.connected(address, self.now_s)
            case "break":
                self.dialled.discard(node)
                self.connected.discard(node)
                self.neighbours.lost(node, self.wanted, self.now_s)
            case "died":
                if self.neighbours.died(node, effects):
                    self.neighbours.lost(node, self.wanted, self.now_s)
            case "came back":
                self.neighbours.came_back(node, effects)
            case "wait":
                self.pass_time(wait_s)
        self.carry_out(effects)

    def pass_time(self, wait_s: float) -> None:
        until_s = self.now_s + wait_s
        while (at_s := self.neighbours.wake_at_s()) is not None and at_s <= until_s:
            self.now_s = max(self.now_s, at_s)
            effects: list[PeerEffect] = []
            self.neighbours.look_after(self.now_s, effects)
            self.carry_out(effects)
        self.now_s = until_s


STEPS = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.sampled_from([LOWER, HIGHER]),
        st.sampled_from(FILES),
        st.floats(0.1, 40.0),
    ),
    max_size=25,
)


@given(STEPS, st.sets(st.sampled_from(FILES)))
def test_who_shares_a_swarm_is_dialled_and_who_shares_none_is_let_go(
    steps: list[tuple[str, NodeAddress, bytes, float]], wanted: set[bytes]
) -> None:
    world = World()
    world.wanted = wanted
    for step in steps:
        world.do(*step)

    world.pass_time(LINGER_S + REDIAL_MAX_S)

    for node in (LOWER.node, HIGHER.node):
        neighbour = world.neighbours.get(node)
        if neighbour is None or not neighbour.versions:
            assert node not in world.connected
        elif node > ME:
            assert node in world.dialled | world.connected


def test_where_this_node_has_the_whole_file_a_lost_neighbour_is_not_dialled_again() -> None:
    world = World()
    seeded, fetched = FILES
    world.wanted = {fetched}
    for version_id in FILES:
        world.do("meet", HIGHER, version_id, 0.0)
    world.do("arrive", HIGHER, seeded, 0.0)

    assert world.neighbours.lost(HIGHER.node, world.wanted, world.now_s) == FILES
    assert [each.address for each in world.neighbours.of(fetched)] == [HIGHER]
    assert world.neighbours.of(seeded) == []

    assert world.neighbours.lost(HIGHER.node, set(), world.now_s) == [fetched]
    assert world.neighbours.get(HIGHER.node) is None
    assert world.neighbours.wake_at_s() is None
