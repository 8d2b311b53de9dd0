"""All scenarios, by name."""

from __future__ import annotations

from collections.abc import Callable

from simulations import disturbed_scenarios, scenarios, workload_scenarios
from simulations.scenarios import Result, Watch
from simulations.settings import ClusterSettings

Scenario = Callable[[ClusterSettings, int, Watch | None], Result]

SCENARIOS: dict[str, Scenario] = {
    "flash_crowd": scenarios.flash_crowd,
    "array_job": workload_scenarios.array_job,
    "small_files": workload_scenarios.small_files,
    "working_set": workload_scenarios.working_set,
    "copy_storm": workload_scenarios.copy_storm,
    "racks": workload_scenarios.racks,
    "churn": scenarios.churn,
    "tracker_restart": disturbed_scenarios.tracker_restart,
    "tracker_lost": disturbed_scenarios.tracker_lost,
    "holder_stopped": disturbed_scenarios.holder_stopped,
    "gray_nodes": scenarios.gray_nodes,
    "partition": disturbed_scenarios.partition,
    "corrupting_peer": disturbed_scenarios.corrupting_peer,
    "source_changed": disturbed_scenarios.source_changed,
    "rolling_upgrade": disturbed_scenarios.rolling_upgrade,
}
