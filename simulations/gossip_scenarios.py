"""What happens to nodes that gossip, and the figures that come out.

Scenarios can follow each other in one cluster, which saves the time until it has settled. In all
of them the tracker names three live nodes to every daemon each 30 s, as far as it can be reached:
it is on the first side of a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias

from simulations.engine import SimulationFailed
from simulations.gossip_cluster import GossipCluster, GossipNode, GossipSettings
from swarmcache.gossip_events import Leaving, MembersChanged, StatusMeasured
from swarmcache.gossip_records import DiskHealth, NodeStatus

# SWIM's unit, in which others count: what memberlist calls a gossip interval.
ROUND_S = 0.2
SEEDS_EVERY_S = 30.0
SEEDS = 3
FIRST_SEEDS = 16
SETTLE_S = 30.0
WINDOW_S = 10
LOOK_EVERY_S = 0.02
APART_S = 600.0
HEAL_MAX_S = 240.0
RESTART_S = 10.0
STALLED_S = 5.0
STALLED_EVERY_S = 30.0
SICK_MUTE = 0.9
CRASH_MAX_S = 60.0
RESTART = "restart"
# So many ages are looked at at once, of 100 nodes at most.
AGES_MAX = 100_000
AGES_OF_MAX = 100
# Of so many machines the invariants are asserted at the end: each takes as long as it knows others.
CHECKED_MAX = 1000

# By name; None for what did not happen in time.
Figures: TypeAlias = dict[str, float | None]


@dataclass(slots=True)
class GossipResult:
    """``figures``: what ``simulations/README.md`` says. For plots: ``sent``, bytes per node and
    second: mean, p99 over the nodes and most, for each second; ``ages_s``: some, sorted; ``known``:
    for each thing that was to be known, after how long each node knew it, sorted."""

    scenario: str
    settings: GossipSettings
    figures: Figures
    trace_digest: str
    sent: list[tuple[float, float, float]] = field(default_factory=list)
    ages_s: list[float] = field(default_factory=list)
    known: list[list[float]] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        settings = self.settings
        return {
            **{"scenario": self.scenario, "nodes": settings.nodes, "seed": settings.seed},
            **{"loss": settings.loss, "period_s": settings.period_s},
            **{key: _rounded(value) for key, value in self.figures.items()},
            "trace_digest": self.trace_digest,
        }


class Run:
    """A cluster under observation. ``known`` and ``ages_s``: see ``GossipResult``.
    ``sent_from_s``: since when bytes count."""

    def __init__(self, settings: GossipSettings, *, acquainted: bool = True) -> None:
        self.cluster = GossipCluster(settings)
        self.rng = Random(f"{settings.seed} scenario")
        self.seeds_wanted = True
        self.convictions: dict[tuple[str, int], float] = {}  # of nodes that were alive, and when
        self.deaths: dict[str, dict[str, float]] = {}  # of a node: who knew it when
        self.known: list[list[float]] = []
        self.ages_s: list[float] = []
        self.sent_from_s = 0.0
        self.cluster.on_change = self._changed
        if acquainted:
            self.cluster.start_acquainted()
        for node in self.cluster.nodes:
            at_s = self.rng.random() * SEEDS_EVERY_S
            self.cluster.engine.at(at_s, self._name_seeds, node)

    def _changed(self, node: GossipNode, change: MembersChanged) -> None:
        now_s = self.cluster.now_s
        for name in change.dead:
            dead = self.cluster.by_name[name]
            self.deaths.setdefault(name, {})[node.name] = now_s
            if dead.alive and dead.side == node.side:
                self.convictions.setdefault((name, dead.life), now_s)

    def _name_seeds(self, node: GossipNode) -> None:
        cluster = self.cluster
        if node.alive and not node.stalled and node.side == 0:
            self.name_seeds(node, SEEDS)
        cluster.engine.at(cluster.now_s + SEEDS_EVERY_S, self._name_seeds, node)

    def name_seeds(self, node: GossipNode, count: int) -> None:
        """The tracker names some nodes that are connected to it."""
        live = [each for each in self.cluster.nodes if each.alive and each.side == 0]
        self.cluster.meet(node, self.rng.sample(live, min(count, len(live))))

    def run(self, duration_s: float) -> None:
        """Let time pass."""
        self.cluster.run(self.cluster.now_s + duration_s)

    def settle(self, duration_s: float = SETTLE_S) -> None:
        """Let so much time pass from the beginning, but ``SETTLE_S`` at most, unless it has."""
        wanted_s = min(duration_s, SETTLE_S)
        if self.cluster.now_s < wanted_s:
            self.cluster.run(wanted_s)
            self.sent_from_s = wanted_s

    def wait_for(
        self, nodes: Sequence[GossipNode], knows: Callable[[GossipNode], bool], max_s: float
    ) -> list[float]:
        """After how long each node knew it, sorted; those that did not within ``max_s`` are
        missing."""
        since_s = self.cluster.now_s
        waiting = list(nodes)
        times_s: list[float] = []
        while waiting and self.cluster.now_s < since_s + max_s:
            self.run(LOOK_EVERY_S)
            left = [node for node in waiting if not knows(node)]
            times_s += [self.cluster.now_s - since_s] * (len(waiting) - len(left))
            waiting = left
        return times_s

    # --- figures ----------------------------------------------------------------------------------

    def sent(self, from_s: float = 0.0) -> Figures:
        """Bytes per node and second, over windows of ten seconds."""
        first, end = int(from_s), int(self.cluster.now_s)
        windows = [
            sum(node.sent[at : at + WINDOW_S]) / WINDOW_S
            for node in self.cluster.nodes
            for at in range(first, end - WINDOW_S + 1, WINDOW_S)
        ]
        if not windows:
            return {}
        windows.sort()
        return {
            "sent_mean_bytes_per_s": sum(windows) / len(windows),
            "sent_p99_bytes_per_s": _part(windows, 0.99),
            "sent_max_bytes_per_s": windows[-1],
        }

    def sent_by_second(self) -> list[tuple[float, float, float]]:
        """Mean, p99 and most of all nodes in each second."""
        result = []
        for second in range(int(self.cluster.now_s)):
            sent = sorted(
                float(node.sent[second]) if second < len(node.sent) else 0.0
                for node in self.cluster.nodes
            )
            result.append((sum(sent) / len(sent), _part(sent, 0.99), sent[-1]))
        return result

    def ages_now_s(self) -> list[float]:
        """How old what some nodes know of all others is now."""
        now_s = self.cluster.now_s
        live = self.cluster.live()
        some = live[:: max(len(live) // (AGES_MAX // len(live)), len(live) // AGES_OF_MAX, 1)]
        return [member.age_s(now_s) for node in some for member in node.machine.live()]

    def result(self, scenario: str, figures: Figures) -> GossipResult:
        """All that every scenario says. Raises SimulationFailed, AssertionError."""
        cluster = self.cluster
        live = cluster.live()
        for node in live[:: max(len(live) // CHECKED_MAX, 1)]:
            node.machine.check()
        if cluster.datagram_bytes_max > 1232 + 28:
            raise SimulationFailed(f"a datagram of {cluster.datagram_bytes_max} bytes")
        seconds = max(cluster.now_s, 1.0)
        figures = {
            **figures,
            **self.sent(self.sent_from_s),
            "false_convictions": float(len(self.convictions)),
            "datagrams_per_node_and_s": cluster.datagrams / len(cluster.nodes) / seconds,
        }
        ages_s = sorted(self.ages_s)
        return GossipResult(
            scenario,
            cluster.settings,
            figures,
            cluster.trace_digest,
            self.sent_by_second(),
            ages_s[:: max(len(ages_s) // 2000, 1)],
            self.known,
        )


def run_scenarios(
    names: Sequence[str], settings: GossipSettings, duration_s: float | None = None
) -> GossipResult:
    """One after the other; ``restart`` can only be the first one. ``duration_s``: None for what is
    usual. Raises SimulationFailed, AssertionError."""
    assert RESTART not in names[1:], "a restart begins with nobody"
    run = Run(settings, acquainted=RESTART not in names)
    figures: Figures = {}
    for name in names:
        scenario, usual_s = GOSSIP_SCENARIOS[name]
        figures |= scenario(run, usual_s if duration_s is None else duration_s)
    return run.result(" ".join(names), figures)


def steady(run: Run, duration_s: float) -> Figures:
    """Nothing happens: bytes, and how old what everybody knows of everybody is."""
    run.settle()
    end_s = run.cluster.now_s + duration_s
    while run.cluster.now_s < end_s:
        run.run(min(3.7, end_s - run.cluster.now_s))
        run.ages_s += run.ages_now_s()
    ages_s = sorted(run.ages_s)
    return {
        "age_mean_s": sum(ages_s) / len(ages_s),
        "age_p99_s": _part(ages_s, 0.99),
        "age_max_s": ages_s[-1],
    }


def change(run: Run, duration_s: float) -> Figures:
    """Disks turn sick, one after the other: how long until all know."""
    run.settle(duration_s)
    known = []
    for node in run.rng.sample(run.cluster.live(), run.cluster.settings.tries):
        status = NodeStatus(disk=DiskHealth.SICK)
        run.run(run.rng.random() + 1.0)
        run.cluster.tell(node, StatusMeasured(status))
        wait_s = (node.machine.wake_at_s() or 0.0) - run.cluster.now_s
        run.run(max(wait_s, 0.0))
        knows = _thinks(node, lambda status: status.disk is DiskHealth.SICK)
        others = [each for each in run.cluster.live() if each is not node]
        known.append(run.wait_for(others, knows, CRASH_MAX_S))
    run.known += known
    return _spread("change", known, len(run.cluster.live()) - 1)


def leave(run: Run, duration_s: float) -> Figures:
    """Nodes leave: how long until all know, and whether one comes back."""
    return _end_some("leave", run, duration_s, announced=True)


def crash(run: Run, duration_s: float) -> Figures:
    """Daemons are killed: how long until all know."""
    return _end_some("crash", run, duration_s, announced=False)


def _end_some(scenario: str, run: Run, duration_s: float, *, announced: bool) -> Figures:
    """Some daemons end, within seconds of each other."""
    run.settle(duration_s)
    cluster = run.cluster
    ended_s: dict[str, float] = {}
    gone = run.rng.sample(cluster.live(), cluster.settings.tries)
    for node in gone:
        run.run(run.rng.random())
        if announced:
            cluster.tell(node, Leaving())
        cluster.kill(node)
        ended_s[node.name] = cluster.now_s
    live = {node.name for node in cluster.live()}
    known: list[list[float]] = []
    end_s = cluster.now_s + CRASH_MAX_S
    while cluster.now_s < end_s:
        known = [
            sorted(at_s - since_s for who, at_s in run.deaths.get(name, {}).items() if who in live)
            for name, since_s in ended_s.items()
        ]
        if all(len(times_s) == len(live) for times_s in known):
            break
        run.run(1.0)
    run.known += known
    figures = _spread(scenario, known, len(live))
    return {**figures, f"{scenario}_came_back": _watch_for(run, gone, duration_s)}


def stalls(run: Run, duration_s: float) -> Figures:
    """A node in 20 does nothing for 5 s in every 30: is anybody declared dead?"""
    engine = run.cluster.engine

    def stall(node: GossipNode) -> None:
        run.cluster.stall(node, STALLED_S)
        engine.at(engine.now_s + STALLED_EVERY_S, stall, node)

    for node in run.rng.sample(run.cluster.nodes, max(len(run.cluster.nodes) // 20, 1)):
        engine.at(run.rng.random() * STALLED_EVERY_S, stall, node)
    return quiet(run, duration_s)


def quiet(run: Run, duration_s: float) -> Figures:
    """Nothing happens for a long time: is anybody declared dead?"""
    run.run(duration_s)
    run.sent_from_s = max(run.sent_from_s, SETTLE_S)
    return {"hours": duration_s / 3600}


def sick_node(run: Run, duration_s: float) -> Figures:
    """A node loses nine tenths of what it sends: does it take others with it?"""
    run.settle()
    before = run.sent(run.cluster.now_s - WINDOW_S)["sent_mean_bytes_per_s"]
    since_s = run.cluster.now_s
    sick = run.rng.choice(run.cluster.live())
    sick.mute = SICK_MUTE
    run.run(duration_s)
    others = [name for name, _ in run.convictions if name != sick.name]
    after = run.sent(since_s)["sent_mean_bytes_per_s"]
    assert before is not None and after is not None
    return {"others_convicted": float(len(others)), "traffic_factor": after / before}


def partition(run: Run, duration_s: float) -> Figures:
    """Two halves are cut off from each other for ``duration_s``: how long until all is well?"""
    run.settle()
    nodes = run.cluster.live()
    for node in run.rng.sample(nodes, len(nodes) // 2):
        node.side = 1
    run.run(duration_s)
    apart = sum(len(node.machine.live()) for node in nodes) / len(nodes)
    run.sent_from_s = run.cluster.now_s
    for node in nodes:
        node.side = 0
    return {"known_apart_mean": apart, **_until_all_known(run, HEAL_MAX_S)}


def restart(run: Run, duration_s: float) -> Figures:
    """All daemons start within 10 s, and know nobody but whom the tracker names to them."""

    def start(node: GossipNode) -> None:
        run.cluster.start(node)
        run.name_seeds(node, FIRST_SEEDS)

    for node in run.cluster.nodes:
        run.cluster.engine.at(run.rng.random() * RESTART_S, start, node)
    run.run(RESTART_S)
    return _until_all_known(run, duration_s)


# What happens, and for how long usually.
GOSSIP_SCENARIOS: dict[str, tuple[Callable[[Run, float], Figures], float]] = {
    "steady": (steady, 60.0),
    "change": (change, SETTLE_S),
    "leave": (leave, SETTLE_S),
    "crash": (crash, SETTLE_S),
    "quiet": (quiet, 600.0),
    "stalls": (stalls, 600.0),
    "sick_node": (sick_node, 120.0),
    "partition": (partition, APART_S),
    RESTART: (restart, 240.0),
}


def _thinks(
    subject: GossipNode, true: Callable[[NodeStatus], bool]
) -> Callable[[GossipNode], bool]:
    def knows(node: GossipNode) -> bool:
        member = node.machine.member(subject.name)
        return member is not None and member.status is not None and true(member.status)

    return knows


def _watch_for(run: Run, gone: Sequence[GossipNode], duration_s: float) -> float:
    """How often one of these was thought alive by somebody, looking every second."""
    returned = 0
    end_s = run.cluster.now_s + duration_s
    while run.cluster.now_s < end_s:
        run.run(1.0)
        for node in run.cluster.live():
            returned += sum(node.machine.is_live(each.name) for each in gone)
    return float(returned)


def _until_all_known(run: Run, max_s: float) -> Figures:
    """Until 99 of 100 pairs of nodes know each other, until all do."""
    nodes = run.cluster.live()
    since_s = run.cluster.now_s
    pairs = len(nodes) * (len(nodes) - 1)
    most_s: float | None = None
    full: dict[str, float] = {}
    while len(full) < len(nodes) and run.cluster.now_s < since_s + max_s:
        run.run(0.5)
        now_s = run.cluster.now_s - since_s
        counts = [node.machine.live_count() for node in nodes]
        if most_s is None and sum(counts) >= 0.99 * pairs:
            most_s = now_s
        for node, count in zip(nodes, counts, strict=True):
            if count == len(nodes) - 1:
                full.setdefault(node.name, now_s)
    all_s = max(full.values()) if len(full) == len(nodes) else None
    run.known.append(sorted(full.values()))
    return {"known_99_s": most_s, "known_all_s": all_s}


def _spread(what: str, known: list[list[float]], count: int) -> Figures:
    """How long until 99 in 100 and all nodes knew, at best and at worst of some times. ``count``:
    how many there are to know."""
    if any(len(times_s) < count for times_s in known):
        return {f"{what}_99_max_s": None, f"{what}_all_max_s": None}
    most_s = [_part(times_s, 0.99) for times_s in known]
    all_s = [times_s[-1] for times_s in known]
    return {
        f"{what}_99_mean_s": sum(most_s) / len(most_s),
        f"{what}_99_max_s": max(most_s),
        f"{what}_all_max_s": max(all_s),
        f"{what}_99_max_rounds": max(most_s) / ROUND_S,
        f"{what}_all_max_rounds": max(all_s) / ROUND_S,
    }


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
