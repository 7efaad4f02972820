# SPDX-License-Identifier: Apache-2.0
"""Measure what the environment asks for.

``BENCH_ONLY``: a part, ``relay``, ``efficiency``, ``ordinary``, ``agent`` or ``evacuation``;
``quick`` for a short run of the first; all parts without it. ``BENCH_SHAPES``: network:volume in
MB/s, separated by commas. ``BENCH_ROUNDS``: runs of which the median is taken. ``BENCH_OUTPUT``:
the file, bench.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.bench import (
    agent,
    efficiency,
    evacuation,
    machine,
    ordinary,
    source_path,
    table,
    throughput,
)
from tests.lab.processes import workspace

PARTS = ("relay", "efficiency", "ordinary", "agent", "evacuation")
DEFAULT_SHAPES = "50:50,50:100,100:50"


def relay(rounds: int, raw_pages: int) -> dict[str, Any]:
    """Synthetic streams through a pair of relays, and the source's data path alone."""
    with workspace() as directory:
        bench = throughput.Bench(directory, raw_pages=raw_pages, zero_pages=64 * raw_pages)
        results = throughput.measure(bench, rounds)
        results["source"] = source_path.measure(bench.raw, directory, rounds)
    referenced = next(row for row in results["relay"] if row["kind"] == "referenced")
    results["source"]["process_cpu_s_per_gb"] = referenced["source_cpu_s_per_gb"]
    return results


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """:raises ValueError: it is not NETWORK:VOLUME,..."""
    try:
        shapes = [tuple(int(number) for number in part.split(":")) for part in text.split(",")]
        return [(network, volume) for network, volume in shapes]
    except ValueError:
        raise ValueError(f"BENCH_SHAPES={text}: not NETWORK:VOLUME,... in MB/s") from None


def main() -> int:
    only = os.environ.get("BENCH_ONLY") or ""
    if only not in ("", "quick", *PARTS):
        print(f"BENCH_ONLY={only}: not one of {', '.join(PARTS)}, quick", file=sys.stderr)
        return 2
    try:
        shapes = parse_shapes(os.environ.get("BENCH_SHAPES") or DEFAULT_SHAPES)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rounds = int(os.environ.get("BENCH_ROUNDS") or 0)
    results: dict[str, Any] = {"machine": machine.describe(), "relay": [], "efficiency": []}
    if only in ("", "relay"):
        results |= relay(rounds or 3, 1 << 18)
    elif only == "quick":
        results |= relay(rounds or 1, 1 << 16)
    if only in ("", "efficiency"):
        with workspace() as directory:
            results["efficiency"] = efficiency.measure(directory, shapes)
    if only in ("", "ordinary"):
        with workspace() as directory:
            results["ordinary"] = ordinary.measure(directory, rounds or 5)
    if only in ("", "agent"):
        with workspace() as directory:
            results["agent"] = agent.measure(directory)
    if only in ("", "evacuation"):
        results["evacuation"] = evacuation.measure()
    path = Path(os.environ.get("BENCH_OUTPUT") or "bench.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(table.render(results))
    print(f"\n{path}: {len(results['relay'])} relay rows, {len(results['efficiency'])} shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
