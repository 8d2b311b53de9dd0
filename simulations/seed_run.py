"""One seed of the campaign: a small cluster that must keep its promises whatever goes wrong.

Every seed goes through the same acts. Jobs ask for files while things go wrong, until
``Plan.faults_until_s``. Then everything works again: all jobs must get cached copies
within ``SETTLE_MAX_S``, and the cluster must come to rest, with nothing left over. In the end
everybody wants one more file, which must be read once, and somebody wants anew what others have,
which must not be read at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from simulations.checkers import Watch
from simulations.clients import Client, Clients
from simulations.cluster import Cluster
from simulations.faults import Fault, Faults
from simulations.nodes import Node
from simulations.plans import CHUNK_BYTES, Plan, draw
from simulations.writers import Writer
from swarmcache.chunks import FileVersion
from swarmcache.fetching import ABANDON_S
from swarmcache.peer_events import AnswerHolders, HoldersWanted
from swarmcache.peer_neighbours import LINGER_S

# When everything works again, for how long things may go on being wrong: the longest pause of a
# node that dials in vain and of a peer that failed are 30 s each.
SETTLE_MAX_S = 100.0
# Downloads that nobody waits for are given up after 60 s, and their connections 30 s later.
REST_S = ABANDON_S + LINGER_S + 5.0
PROBE_MAX_S = 30.0
# Half of ``get.stall``. Where a link needs longer for all that is wanted at once, somebody may get
# none of it for so long that the original is the right answer.
BUSY_MAX_S = 2.5
EVENTS_MAX = 300_000


@dataclass(slots=True)
class Outcome:
    """What one seed came to. ``failure``: None if it went well."""

    seed: int
    theme: str
    failure: str | None
    node_s: float
    trace_digest: str
    injected: Counter[str] = field(default_factory=Counter)
    evaluated: Counter[str] = field(default_factory=Counter)


def run_seed(seed: int) -> Outcome:
    """Run what this seed stands for."""
    return run_plan(draw(seed))


def run_plan(plan: Plan, faults: Sequence[Fault] | None = None) -> Outcome:
    """Run a plan, or what is left of it with these faults only."""
    run = _Run(plan, plan.faults if faults is None else faults)
    failure = None
    try:
        run.act()
    except Exception as error:  # whatever a machine raises would have ended a real one
        failure = f"{type(error).__name__}: {error}"
    cluster = run.cluster
    evaluated = run.watch.evaluated + Counter(
        {
            "machines checked": 2 * cluster.machine_events,
            "readers of the file server": cluster.file_server.checked,
            "right bytes and answered once": run.clients.answers,
        }
    )
    node_s = cluster.engine.now_s * plan.settings.nodes
    digest = cluster.trace.digest
    return Outcome(plan.seed, plan.theme, failure, node_s, digest, run.faults.injected, evaluated)


class _Run:
    """One cluster from its first job until it is at rest."""

    def __init__(self, plan: Plan, faults: Sequence[Fault]) -> None:
        self.plan = plan
        self.cluster = Cluster(plan.settings)
        self.cluster.engine.events_max = EVENTS_MAX
        self.clients = Clients(self.cluster)
        self.clients.on_content = self._content
        self.cluster.writers.on_done = self._content
        self.cluster.on_holders = self._told_holders
        self.faults = Faults(self.cluster, faults)
        self.watch = Watch(self.cluster, self.clients)
        self._holders: AnswerHolders | None = None

    def act(self) -> None:
        """All acts. Raises SimulationFailed, AssertionError."""
        plan, cluster = self.plan, self.cluster
        # A replica may be evicted while it is being sent: here they are never too young for that.
        enough = plan.settings.disk_bytes == math.inf and not plan.mixed_cuts
        if plan.theme in ("calm", "ends of nodes") and enough:
            self.watch.no_needless_reading()
        denied = {"chunk absent", "chunk corrupted", "peer lies"}
        lies = any(fault.kind in denied for fault in plan.faults)
        self.watch.all_is_told = not plan.mixed_cuts and not lies
        cluster.connect_all()
        paths = [b"/export/file%d" % number for number in range(len(plan.sizes_bytes))]
        for path, size_bytes in zip(paths, plan.sizes_bytes, strict=True):
            cluster.file_server.current[path] = FileVersion(path, size_bytes, 0)
        for job in plan.jobs:
            node = cluster.node_list[job.node]
            client = Client(node, paths[job.file], job.user, job.can_read, job.chunk_size_bytes)
            self.clients.want_at(job.at_s, client)
        for copy in plan.copies:
            writer = Writer(cluster.node_list[copy.node], copy.size_bytes, copy.user)
            cluster.writers.write_at(copy.at_s, writer)
        for together in plan.together:
            node = cluster.node_list[together.node]
            self.clients.want_together_at(together.at_s, node, paths[-plan.small_files :])
        self._run_until(plan.faults_until_s)
        if enough and not self.faults.injected:
            self._read_once()
        self.faults.end_all()
        self._all_content(SETTLE_MAX_S)
        self._rest()
        self._probe_new_file()
        self._probe_latecomer(paths)
        self._rest()

    def _run_until(self, at_s: float) -> None:
        engine = self.cluster.engine
        engine.at(at_s, self._stop, None)
        while engine.now_s < at_s:
            engine.run(math.inf)

    def _stop(self, _: object) -> None:
        self.cluster.engine.stop()

    def _content(self, _: object) -> None:
        if not self.clients.waiting and not self.cluster.writers.pending:
            self.cluster.engine.stop()

    def _all_content(self, within_s: float) -> None:
        """Run until every job has a cached copy. Raises SimulationFailed when that takes long."""
        engine = self.cluster.engine
        end_s = engine.now_s + within_s
        engine.at(end_s, self._stop, None)
        writing = self.cluster.writers.pending
        while (self.clients.waiting or writing) and engine.now_s < end_s:
            engine.run(math.inf)
        copies = f"{len(writing)} copies are not through, {within_s:g} s after the last fault,"
        self.watch.require("every copy is through", not writing, copies)
        left = list(self.clients.pending.values())
        why = max(self.clients.reasons, key=lambda key: self.clients.reasons[key], default="")
        self.watch.require(
            "everybody gets a cached copy",
            not left,
            f"{len(left)} jobs still wait or get the original ({why}), "
            f"{within_s:g} s after the last fault,",
        )

    def _rest(self) -> None:
        self._run_until(self.cluster.engine.now_s + REST_S)
        self.watch.at_rest(all_replicas_known=not self.plan.mixed_cuts)

    def _read_once(self) -> None:
        total_bytes = sum(self.plan.sizes_bytes)
        if not self.clients.waiting:
            read_bytes = self.cluster.file_server.up.carried_bytes
            wanted = {job.file for job in self.plan.jobs}
            total_bytes = sum(self.plan.sizes_bytes[file] for file in wanted)
            once = read_bytes == total_bytes
            self.watch.require("each byte read once", once, f"{read_bytes} of {total_bytes} read")
            settings = self.plan.settings
            slowest = min(settings.file_server_rate, settings.node_rate, settings.rack_rate)
            if sum(self.plan.sizes_bytes) <= slowest * BUSY_MAX_S:
                originals = self.cluster.originals
                self.watch.require("no original", not originals, f"{originals} originals")

    # --- probes ----------------------------------------------------------------------------------

    def _alive(self) -> list[Node]:
        return [node for node in self.cluster.node_list if node.alive]

    def _trusting(self) -> bool:
        return not any(node.distrusted for node in self._alive())

    def _probe_new_file(self) -> None:
        """Everybody wants a file that nobody has, and nothing is wrong: it is read once."""
        cluster = self.cluster
        path = b"/export/probe"
        room_bytes = min(cluster.settings.disk_bytes, 5 * CHUNK_BYTES)
        size_bytes = int(room_bytes) - 1
        if size_bytes < 1:
            return
        cluster.file_server.current[path] = FileVersion(path, size_bytes, 0)
        before_bytes = cluster.file_server.up.carried_bytes
        originals = cluster.originals
        for node in self._alive():
            self.clients.want(Client(node, path))
        self._all_content(PROBE_MAX_S)
        read_bytes = cluster.file_server.up.carried_bytes - before_bytes
        if self._trusting():
            once = read_bytes == size_bytes
            self.watch.require(
                "a new file is read once", once, f"{read_bytes} of {size_bytes} bytes were read"
            )
            given = cluster.originals - originals
            self.watch.require("no original without faults", not given, f"{given} originals")

    def _probe_latecomer(self, paths: Sequence[bytes]) -> None:
        """A node that has lost its copy gets it from those who have one."""
        cluster = self.cluster
        for path in [b"/export/probe"] if self.plan.mixed_cuts else [*paths, b"/export/probe"]:
            version = cluster.file_server.current.get(path)
            if version is None or not version.size_bytes:
                continue
            holders = [node for node in self._alive() if self._holds(node, version)]
            if len(holders) < 2 or not self._trusting():
                continue
            node = holders[-1]
            self._check_holders(node, version, len(holders) - 1)
            cluster.disks.lose(node, version.version_id)
            before_bytes = cluster.file_server.up.carried_bytes
            self.clients.want(Client(node, path, can_read=False))
            self._all_content(PROBE_MAX_S)
            read_bytes = cluster.file_server.up.carried_bytes - before_bytes
            self.watch.require(
                "a latecomer reads nothing", not read_bytes, f"{read_bytes} bytes were read again"
            )

    @staticmethod
    def _holds(node: Node, version: FileVersion) -> bool:
        replica = node.disk.replicas.get(version.version_id)
        return replica is not None and replica.settled

    def _check_holders(self, node: Node, version: FileVersion, count: int) -> None:
        """The tracker names as many other holders as there are."""
        cluster = self.cluster
        self._holders = None
        cluster.hand(node, HoldersWanted(0, [version.version_id], nodes_max=count))
        self._run_until(cluster.engine.now_s + 1.0)
        answer: AnswerHolders | None = self._holders
        told = answer is not None and answer.holders is not None
        self.watch.require("holders are told", told, "nobody was told who holds a file")
        if answer is not None and answer.holders is not None:
            known = answer.holders[0].count
            right = known == count and len(answer.holders[0].nodes) == count
            self.watch.require("holders are known", right, f"{known} of {count} holders are known")

    def _told_holders(self, _: Node, answer: AnswerHolders) -> None:
        self._holders = answer
