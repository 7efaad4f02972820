# SPDX-License-Identifier: Apache-2.0
"""The evacuations that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tests.scale.cluster import Cluster
from tests.scale.options import product_limits, product_settings
from tests.scale.outcome import summary
from tests.scale.simulation import Simulation

GB = 1e9


def product(cluster: Cluster, **options: object) -> Cluster:
    """With the limits and patience of hosts that are configured so.

    :param options: "group__name"; the others have their defaults.
    """
    return dataclasses.replace(
        cluster, limits=product_limits(**options), settings=product_settings(**options)
    )


def evacuations(base: Cluster) -> dict[str, Cluster]:
    """By the name in the table; each differs from the second in what its name says."""
    default = product(base)
    few = max(1, base.targets // 4)
    # Half of what the storage has, and what each host may take of that
    share = base.storage / 2 / base.targets / (1 << 20)
    return {
        "stock": dataclasses.replace(default, relayed=False),
        "relays, defaults": default,
        "storage capped to a half": product(base, host__volume_bandwidth=share),
        "storage 10 GB/s": dataclasses.replace(default, storage=10 * GB),
        "storage 160 GB/s": dataclasses.replace(default, storage=160 * GB),
        "broker 10 MB/s": dataclasses.replace(default, broker=10e6),
        "agents at the broker": dataclasses.replace(default, by_broker=True),
        "the same, broker 50 MB/s": dataclasses.replace(default, by_broker=True, broker=50e6),
        "the same, broker 10 MB/s": dataclasses.replace(default, by_broker=True, broker=10e6),
        "4 at once, stock": dataclasses.replace(default, concurrency=4, relayed=False),
        "4 at once": dataclasses.replace(default, concurrency=4),
        "4 at once, 1 target of 4, stock": dataclasses.replace(
            default, concurrency=4, targets=few, relayed=False
        ),
        "4 at once, 1 target of 4": dataclasses.replace(default, concurrency=4, targets=few),
        "1 target of 4, queue_time 3600": dataclasses.replace(
            product(base, migration__queue_time=3600, host__queue_timeout=3600),
            concurrency=4,
            targets=few,
        ),
        "25 Gbit/s, stock": dataclasses.replace(
            default, network=2.5 * base.network, storage_link=2.5 * base.network, relayed=False
        ),
        "25 Gbit/s": dataclasses.replace(
            default, network=2.5 * base.network, storage_link=2.5 * base.network
        ),
    }


def simulate(base: Cluster) -> list[dict[str, Any]]:
    """A row for each."""
    return [
        {"evacuation": name, **summary(Simulation(cluster).run(), cluster)}
        for name, cluster in evacuations(base).items()
    ]


def with_costs(base: Cluster, measured: Mapping[str, Mapping[str, float]]) -> Cluster:
    """With what requests were measured to cost."""
    costs = {
        name: dataclasses.replace(base.costs[name], bytes=row["bytes_in"], ms=row["ms"])
        for name, row in measured.items()
    }
    return dataclasses.replace(base, costs=costs)
