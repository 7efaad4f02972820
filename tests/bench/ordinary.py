# SPDX-License-Identifier: Apache-2.0
"""Part ``ordinary``: what relays cost a guest of which nothing is mapped, at 1 Gbit/s."""

import statistics
from pathlib import Path
from typing import Any

from tests.bench.guests import Lab, Outcome

_GIGABIT = 125e6


def measure(directory: Path, rounds: int) -> dict[str, Any]:
    """Row ``ordinary``: medians of direct migrations and of those through relays, in turn."""
    direct: list[Outcome] = []
    relayed: list[Outcome] = []
    with Lab(directory, ram_mb=768, fill_mb=512, mapped=50, disk_mb=320) as lab:
        lab.shape(_GIGABIT)
        for _ in range(rounds):
            direct.append(lab.direct())
            relayed.append(lab.relayed(use_map=False))
    results: dict[str, Any] = {"network_mb_s": _GIGABIT / 1e6, "rounds": rounds}
    for name, outcomes in (("direct", direct), ("relayed", relayed)):
        results[f"{name}_s"] = round(_median(outcomes, "seconds"), 3)
        results[f"{name}_link_mb"] = round(_median(outcomes, "link_bytes") / 1e6, 1)
        results[f"{name}_downtime_ms"] = round(_median(outcomes, "downtime_ms"), 1)
    results["time_ratio"] = round(results["relayed_s"] / results["direct_s"], 4)
    results["bytes_ratio"] = round(results["relayed_link_mb"] / results["direct_link_mb"], 4)
    return results


def _median(outcomes: list[Outcome], name: str) -> float:
    return statistics.median(getattr(outcome, name) for outcome in outcomes)
