# SPDX-License-Identifier: Apache-2.0
"""Maps of large pools, what requests cost the broker, an evacuation of a cluster.

``SCALE_ONLY``: ``map``, ``messages`` or ``evacuation``; all three without it. ``SCALE_POOL_GIB``:
pools, separated by commas. ``SCALE_LAYOUT``: ``huge`` or ``scattered``, of their memory, or both.
``SCALE_HOSTS``: that are evacuated. ``SCALE_OUTPUT``: the file, scale.json.

Exit status: 0; 1 a map has taken more memory than is reckoned with; 2 wrong settings.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.bench import machine
from tests.lab.processes import workspace
from tests.scale import evacuations, mapping, messages, synthetic, tables
from tests.scale.cluster import Cluster

PARTS = ("map", "messages", "evacuation")
DEFAULT_POOLS = "64,256,1024,3072"
_CALLS, _CHUNKS = 200, 50


def maps(pools: str, layouts: str) -> list[dict[str, Any]]:
    """One row for each pool and layout."""
    rows = []
    for layout in layouts.split(","):
        for gib in pools.split(","):
            with workspace() as directory:
                shape = synthetic.Shape.of_gib(float(gib), layout)
                rows.append(mapping.measure(directory, shape))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    only = os.environ.get("SCALE_ONLY") or ""
    if only not in ("", *PARTS):
        print(f"SCALE_ONLY={only}: not one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    hosts = int(os.environ.get("SCALE_HOSTS") or 200)
    cluster = Cluster(hosts=hosts, targets=hosts)
    results: dict[str, Any] = {"machine": machine.describe()}
    if only in ("", "map"):
        results["maps"] = maps(
            os.environ.get("SCALE_POOL_GIB") or DEFAULT_POOLS,
            os.environ.get("SCALE_LAYOUT") or ",".join(synthetic.LAYOUTS),
        )
    if only in ("", "messages"):
        results["messages"] = messages.measure(_CALLS, _CHUNKS)
        cluster = evacuations.with_costs(cluster, results["messages"])
    if only in ("", "evacuation"):
        results["evacuations"] = evacuations.simulate(cluster)
    path = Path(os.environ.get("SCALE_OUTPUT") or "scale.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(tables.render(results))
    print(f"\n{path}")
    wrong = [each for row in results.get("maps", ()) for each in mapping.excesses(row)]
    for each in wrong:
        print(f"More memory than is reckoned with: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
