"""Bugs planted into the production machines, to see that the campaign can find any.

``python -m simulations planted_bugs`` plants one after the other and runs seeds until one fails. A
bug is a change to the source of one function, applied while it runs; one that no longer applies is
an error, not a bug that was found.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any

from simulations.seed_run import run_seed


@dataclass(frozen=True, slots=True)
class PlantedBug:
    """``function`` (module:Class.function) with ``before`` replaced by ``after``."""

    name: str
    function: str
    before: str
    after: str


@contextmanager
def planted(bug: PlantedBug) -> Iterator[None]:
    """Inside the block the machines have this bug. Raises ValueError when it does not apply.

    The function stays the same object with other code, so that it has the bug also where it was
    imported by its name.
    """
    module_name, path = bug.function.split(":")
    module = import_module(f"swarmcache.{module_name}")
    owner: object = module
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    function = found.fget if isinstance(found, property) else found
    assert isinstance(function, FunctionType), f"{bug.function} is no function"
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.before) != 1:
        raise ValueError(f"{bug.name}: {bug.before!r} is not once in {bug.function}")
    source = source.replace(bug.before, bug.after)
    namespace: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{source}", f"<{bug.name}>", "exec")
    exec(code, vars(module), namespace)
    changed: Any = namespace[name]
    if isinstance(changed, property):
        changed = changed.fget
    former = function.__code__
    function.__code__ = changed.__code__
    try:
        yield
    finally:
        function.__code__ = former


def find(bug: PlantedBug, seeds: range) -> tuple[int, str] | None:
    """The first seed that fails with this bug, and how; None when all go well."""
    with planted(bug):
        for seed in seeds:
            failure = run_seed(seed).failure
            if failure is not None:
                return seed, failure
    return None


def main(arguments: list[str]) -> int:
    """Print the table. Exit status: 0 when at least 95 % are found, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations planted_bugs",
        description="Plants bugs into the machines, one at a time, and looks for them with seeds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many to try for each")
    parser.add_argument("--first-seed", type=int, default=0, help="where they begin")
    parser.add_argument("--only", default="", help="bugs whose name has these words in it")
    asked = parser.parse_args(arguments)
    bugs = [bug for bug in BUGS if asked.only in bug.name]
    missed = 0
    for bug in bugs:
        found = find(bug, range(asked.first_seed, asked.first_seed + asked.seeds))
        missed += found is None
        what = f"seed {found[0]:4}: {found[1][:90]}" if found is not None else "not found"
        print(f"{bug.name:60} {what}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} found")
    return int(missed > 0.05 * len(bugs))


BUGS = (
    # --- download ----
    PlantedBug(
        "wrong bytes are taken for right ones",
        "download:Download.chunk_corrupt",
        "self._land(chunk, node, now_s)\n    self.distrust(node)",
        "self.chunk_arrived(chunk, node, now_s)",
    ),
    PlantedBug(
        "a peer that has lied is asked again",
        "download:Download.distrust",
        "peer.source = False",
        "peer.failures = 0",
    ),
    PlantedBug(
        "a chunk whose request failed is forgotten",
        "download:Download._land",
        "self._missing |= 1 << chunk",
        "pass",
    ),
    PlantedBug(
        "a request that has ended still counts",
        "download:Download._land",
        "self._flight_count -= 1",
        "pass",
    ),
    PlantedBug(
        "rare chunks are not announced",
        "download:Download._hold",
        "self._fresh |= bit",
        "pass",
    ),
    PlantedBug(
        "a busy peer is not asked again",
        "download:Download.peer_busy",
        "now_s + BUSY_BACKOFF_S",
        "now_s + 1e6",
    ),
    PlantedBug(
        "slow chunks are asked for again without a limit",
        "download:Download._next_hedge",
        "self.hedges >= self._hedges_max",
        "False",
    ),
    PlantedBug(
        "what was lost of a lease is not missing again",
        "download:Download.read_ends",
        "self._missing |= mask",
        "pass",
    ),
    PlantedBug(
        "the last chunk is not waited for",
        "download:Download.complete",
        "self.held == self._full",
        "(self._full & ~self.held).bit_count() <= 1",
    ),
    PlantedBug(
        "chunks of a peer that is gone still count",
        "download:Download.remove_peer",
        "self._forget_chunks(peer, peer.mask)",
        "pass",
    ),
    PlantedBug(
        "what is held is not told to a new neighbour",
        "download:Download.add_peer",
        "self._haves(self.held & ~self._fresh)",
        "self._haves(0)",
    ),
    # --- peer_state ----
    PlantedBug(
        "all but one of those who wait are forgotten",
        "peer_state:PeerState._handle_published",
        "for request in fetching.requests:",
        "for request in list(fetching.requests)[:1]:",
    ),
    PlantedBug(
        "replicas are not announced to a new tracker",
        "peer_state:PeerState._handle_tracker_connection",
        "effects.append(AnnounceReplicas())",
        "pass",
    ),
    PlantedBug(
        "downloads do not join again after a new connection",
        "peer_state:PeerState._handle_tracker_connection",
        "if fetching.on_disk and fetching.version.size_bytes:",
        "if False:",
    ),
    PlantedBug(
        "leases are not told to a new tracker",
        "peer_state:PeerState._handle_tracker_connection",
        "self._leases.held()[:LOADS_MAX]",
        "[]",
    ),
    PlantedBug(
        "a holder reads on when its lease is over",
        "peer_leases:PeerLeases.may_read",
        "now_s < self.until_s",
        "now_s < self.until_s + 60",
    ),
    PlantedBug(
        "what is under way is dropped",
        "peer_state:PeerState._drop",
        "if version_id in self._busy:",
        "if False:",
    ),
    PlantedBug(
        "who waits in vain gets no answer",
        "fetching:Fetching.take_impatient",
        "if now_s >= max(self.progress_at_s, since_s) + patience_s",
        "if now_s >= max(self.progress_at_s, since_s) + 1000 * patience_s",
    ),
    PlantedBug(
        "the end of a lease is not told",
        "peer_state:PeerState._handle_reader_end",
        "self._tell(done, effects)",
        "pass",
    ),
    PlantedBug(
        "a lease that was cancelled is not given back",
        "peer_state:PeerState._handle_reader_end",
        'self._tell(RangeFailed(lease_id, version_id, b"", lease.cancelled), effects)',
        "pass",
    ),
    PlantedBug(
        "connections without a use are kept",
        "peer_neighbours:PeerNeighbours._look_after",
        "effects.append(HangUp(neighbour.address.node))",
        "pass",
    ),
    PlantedBug(
        "an old replica is not offered",
        "peer_seeds:PeerSeeds.greet",
        "effects.append(LoadManifest(version_id))",
        "pass",
    ),
    PlantedBug(
        "the tracker is not told that a replica is gone",
        "peer_state:PeerState._end_seed",
        "self._tell(Leave(version_id), effects)",
        "pass",
    ),
    PlantedBug(
        "a broken connection is not made again",
        "peer_neighbours:PeerNeighbours._look_after",
        "self._dial(neighbour, effects)",
        "pass",
    ),
    PlantedBug(
        "after a failure of the disk nobody begins again",
        "peer_state:PeerState._begin_again",
        "self._reserve(fetching, effects)",
        "pass",
    ),
    PlantedBug(
        "replicas that are cut differently are offered",
        "peer_seeds:Seed.is_cut_like",
        "wanted_bytes in (0, self.chunk_size_bytes)",
        "True",
    ),
    PlantedBug(
        "who is complete does not say so",
        "peer_seeds:PeerSeeds.serve",
        'effects.append(TellPeer(node, Have(version_id, [], b"", complete=True)))',
        "pass",
    ),
    # --- tracker_state ----
    PlantedBug(
        "deadlines are named on the wrong clock",
        "tracker_state:TrackerState._until_s",
        "node.clock_s + (now_s - node.clock_at_s)",
        "now_s",
    ),
    PlantedBug(
        "a lost node's slots are free at once",
        "tracker_state:TrackerState._lose_node",
        "leased = self._ranges[lease_id]",
        "leased = self._ranges[lease_id]\n"
        "        self._servers[leased.file_server].ledger.leases[lease_id].until_s = now_s",
    ),
    PlantedBug(
        "a restarted tracker knows nothing of leases",
        "tracker_state:TrackerState.__init__",
        "dict(earlier_leases or {})",
        "{}",
    ),
    PlantedBug(
        "a restarted tracker does not wait for long enough",
        "tracker_state:TrackerState.__init__",
        "now_s + LEASE_S if self._earlier else now_s",
        "now_s",
    ),
    PlantedBug(
        "a stand-in grants at once",
        "stand_in:StandIn._begin",
        "max(self._lost_s + STAND_IN_GRANTS_S, now_s + LEASE_S + WATCH_S)",
        "now_s",
    ),
    PlantedBug(
        "a tracker that was away grants at once",
        "handover:Handover._hold",
        "self.until_s = now_s + HANDOVER_S",
        "pass",
    ),
    PlantedBug(
        "the neighbours of a lost guardian are not asked",
        "tracker_swarms:TrackerSwarms._take_over",
        "not likely or not chunks",
        "True",
    ),
    PlantedBug(
        "a search that nobody answers never ends",
        "tracker_swarms:TrackerSwarms._search",
        "self._timers.set(query_id, now_s + QUERY_S)",
        "pass",
    ),
    PlantedBug(
        "only one of two neighbours is told",
        "neighbourhood:Neighbourhood.link",
        "two.neighbours.add(name)",
        "pass",
    ),
    PlantedBug(
        "chunks of a lease that ran out are lost",
        "tracker_swarms:TrackerSwarms.reading_ran_out",
        "self._take_over(swarm, chunks, likely, now_s, effects)",
        "pass",
    ),
    PlantedBug(
        "a lost node is not taken off its searches",
        "tracker_swarms:TrackerSwarms.lose_node",
        "if name in search.waiting:",
        "if False:",
    ),
    PlantedBug(
        "a lost node is still a holder",
        "tracker_replicas:TrackerReplicas.lose_node",
        "self._drop_holder(node, version_id)",
        "pass",
    ),
    PlantedBug(
        "a lost node is looked for among the readers of its other swarms",
        "tracker_state:TrackerState._lose_node",
        "self._swarms.lose_node(name, reading, now_s, effects)",
        "self._grant_all(now_s, effects)\n"
        "    self._swarms.lose_node(name, reading, now_s, effects)",
    ),
    PlantedBug(
        "who failed to read is never asked again",
        "tracker_state:TrackerState._may_read",
        "member.failed_s + READ_AGAIN_S <= now_s",
        "False",
    ),
    PlantedBug(
        "heartbeats renew nothing",
        "tracker_state:TrackerState._heartbeat",
        "self._renew(node, now_s)",
        "pass",
    ),
    # --- racks ----
    PlantedBug(
        "what a neighbour says that it fetches is left to it for ever",
        "rack_view:RackView.brings",
        "self._timers.set(chunk, now_s + COMING_S)",
        "pass",
    ),
    PlantedBug(
        "a request in another rack that has failed still counts as one",
        "download:Download._land",
        "self._bringing &= ~(1 << chunk)",
        "pass",
    ),
    PlantedBug(
        "whoever leaves its rack is still one of those in other racks",
        "neighbourhood:Neighbourhood.remove",
        "position.far -= self._are_far(gone, position)",
        "pass",
    ),
    # --- writes ----
    PlantedBug(
        "a promise that has run out is renewed",
        "peer_writes:PeerWrites._go_on",
        "elif now_s < write.told_until_s:",
        "else:",
    ),
    PlantedBug(
        "who does not answer is promised more time",
        "peer_writes:PeerWrites._go_on",
        "if write.unanswered or write.turn_over:",
        "if write.turn_over:",
    ),
    PlantedBug(
        "the slot of a client that is gone is not given back",
        "peer_writes:PeerWrites.gone",
        "self._unclaim(write, effects)",
        "pass",
    ),
    PlantedBug(
        "a client asks for a slot once only",
        "peer_writes:PeerWrites.tracker_lost",
        "write.claimed = False",
        "pass",
    ),
    PlantedBug(
        "the slots of a lost node's writers are free at once",
        "tracker_writes:TrackerWrites.lose_node",
        "self._remove(write)",
        "self._drop(write)",
    ),
    PlantedBug(
        "heartbeats do not renew what is written",
        "tracker_writes:TrackerWrites.renew",
        "self._ledger(write.file_server).renew(write.lease_id, until_s)",
        "pass",
    ),
    # --- small files that are fetched together ----
    PlantedBug(
        "what came in a batch is not announced",
        "peer_state:PeerState._handle_batch",
        "self._tell(Replicas(event.version_ids), effects)",
        "pass",
    ),
    PlantedBug(
        "what a holder has not stays in its batch",
        "peer_batches:PeerBatches.told_holders",
        "self._leave(batch, asked)",
        "pass",
    ),
    PlantedBug(
        "a liar is asked for small files",
        "peer_batches:PeerBatches.told_holders",
        "node in distrusted or node in batch.avoided",
        "False",
    ),
    PlantedBug(
        "a busy holder is not asked again",
        "peer_batches:PeerBatches._go_on",
        "batch.question is None and now_s >= batch.ask_at_s",
        "False",
    ),
    # --- slots, timers, eviction ----
    PlantedBug(
        "one slot too many",
        "slot_ledger:SlotLedger.free",
        "self.slots_max - len(self.leases)",
        "self.slots_max + 1 - len(self.leases)",
    ),
    PlantedBug(
        "slots are free before their leases have run out",
        "slot_ledger:SlotLedger.expired",
        "lease.until_s <= now_s",
        "lease.until_s - 1.5 <= now_s",
    ),
    PlantedBug(
        "an upload slot is never free again",
        "upload_slots:UploadSlots.leave",
        "self._uploads.pop(upload, None)",
        "pass",
    ),
    PlantedBug(
        "everybody is served at once",
        "upload_slots:UploadSlots.admit",
        "taken < self._uploads_max or (",
        "True or (",
    ),
    PlantedBug(
        "only moves of deadlines to later count",
        "timers:Timers.set_by",
        "at_s < former_s",
        "at_s > former_s",
    ),
    PlantedBug(
        "more is evicted than must be",
        "eviction:choose_victims",
        "return _without_needless(victims, freed_bytes - wanted_bytes)",
        "return victims",
    ),
    PlantedBug(
        "less is evicted than must be",
        "eviction:choose_victims",
        "if freed_bytes >= wanted_bytes:",
        "if victims:",
    ),
    PlantedBug(
        "a chunk that is held is still looked for",
        "chunk_picker:ChunkPicker.forget",
        "self._counts[chunk] = 0",
        "pass",
    ),
)
