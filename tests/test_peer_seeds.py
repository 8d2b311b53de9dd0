"""What neighbours are told of a replica, and when a node leaves a swarm that it is of no use to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmcache.messages import HAVE_CHUNKS_MAX, Gone, Have
from swarmcache.peer_events import LoadManifest, PeerEffect, TellPeer
from swarmcache.peer_seeds import PeerSeeds

FILE = b"a" * 32
CUT = 1000
NODES = ["a:1", "b:1", "c:1"]


def told(effects: list[PeerEffect]) -> list[tuple[str, int, bool]]:
    """Who was told of how many chunks, and whether these are all that there are."""
    return [
        (effect.node, len(effect.message.chunks), effect.message.complete)
        for effect in effects
        if isinstance(effect, TellPeer) and isinstance(effect.message, Have)
    ]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("greet", "load", "gone", "part", "drop")),
        st.sampled_from(NODES),
        st.sampled_from((0, CUT, CUT, 2 * CUT)),
    ),
    max_size=20,
)


@given(STEPS)
def test_every_neighbour_is_told_all_as_soon_as_the_digests_are_here(
    steps: list[tuple[str, str, int]],
) -> None:
    seeds = PeerSeeds()
    digests = [bytes([chunk]) * 32 for chunk in range(3)]
    loading = loaded = False
    told_of: set[str] = set()
    for action, node, cut in steps:
        effects: list[PeerEffect] = []
        stays = True
        match action:
            case "greet":
                stays = seeds.greet(FILE, node, cut, effects)
                loading = loading or LoadManifest(FILE) in effects
            case "load" if loading:
                loaded = True
                stays = seeds.loaded(FILE, digests, CUT, effects)
            case "gone" if loading:
                stays = seeds.loaded(FILE, [], 0, effects)
            case "part":
                seeds.part(FILE, node)
            case "drop":
                stays = False
        told_of |= {each for each, _, complete in told(effects) if complete}
        if not stays:
            for each in seeds.nodes(FILE):
                seeds.part(FILE, each)
        told_of &= set(seeds.nodes(FILE))
        if not seeds.nodes(FILE):
            loading = loaded = False
        seeds.check()
        assert not loaded or told_of == set(seeds.nodes(FILE))
        assert seeds.held(FILE) == (0b111 if loaded else 0)


def test_a_replica_of_many_chunks_is_told_in_several_messages_the_last_of_which_says_so() -> None:
    seeds = PeerSeeds()
    effects: list[PeerEffect] = []
    seeds.greet(FILE, NODES[0], CUT, effects)
    assert effects == [LoadManifest(FILE)]

    effects.clear()
    assert seeds.loaded(FILE, [b"d" * 32] * (HAVE_CHUNKS_MAX + 1), CUT, effects)
    assert told(effects) == [(NODES[0], HAVE_CHUNKS_MAX, False), (NODES[0], 1, True)]


def test_where_one_swarm_cuts_the_file_differently_all_neighbours_hear_that_the_node_leaves() -> (
    None
):
    seeds = PeerSeeds()
    effects: list[PeerEffect] = []
    for node in NODES[:2]:
        assert seeds.greet(FILE, node, CUT, effects)
    assert seeds.loaded(FILE, [b"d" * 32], CUT, effects)

    effects.clear()
    assert not seeds.greet(FILE, NODES[2], 2 * CUT, effects)
    assert effects == [TellPeer(node, Gone(FILE)) for node in NODES]


def test_who_has_fetched_a_file_goes_on_serving_those_who_lack_some_of_it() -> None:
    seeds = PeerSeeds()
    effects: list[PeerEffect] = []
    for node in NODES[:2]:
        seeds.serve(FILE, node, [b"d" * 32], CUT, effects)

    assert told(effects) == [(node, 0, True) for node in NODES[:2]]
    assert seeds.nodes(FILE) == NODES[:2]
    assert seeds.held(FILE) == 1
