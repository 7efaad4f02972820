# SPDX-License-Identifier: Apache-2.0
"""What one evacuation has come to."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from tests.scale.cluster import Cluster
from tests.scale.fluid import jain
from tests.scale.simulation import Simulation


def summary(done: Simulation, cluster: Cluster) -> dict[str, Any]:
    """Bytes and bytes a second, seconds, shares of 1."""
    moved, series = done.migrations, done.series
    ends = np.zeros(cluster.hosts)
    for each in moved:
        ends[each.source] = max(ends[each.source], each.ended)
    rates: list[list[float]] = [[] for _ in range(cluster.hosts)]
    for each in moved:
        size = each.guest.raw_bytes + each.guest.mapped_bytes
        rates[each.source].append(size / (each.ended - each.sending_since))
    fair = np.array([jain(np.array(each)) for each in rates])
    network = sum(each.from_network for each in moved)
    volume = sum(each.from_volume for each in moved)
    times = np.array([each.ended - each.began for each in moved])
    return {
        "seconds": float(ends.max()),
        "guest_s": float(np.median(times)),
        "slowest_guest_s": float(times.max()),
        "volume_share": volume / (network + volume),
        "network_peak": series.peak("network"),
        "storage_peak": series.peak("volume"),
        "storage_bytes": series.total("volume"),
        "broker_peak": series.peak("broker"),
        "broker_bytes": series.total("broker"),
        "broker_map_share": series.total("maps") / max(1.0, series.total("broker")),
        "messages_peak": series.peak("messages"),
        "messages": series.total("messages"),
        "fetches_peak": done.peak_fetches,
        "fallbacks": dict(collections.Counter(each.fallback for each in moved if each.fallback)),
        "jain_in_host": float(fair.min()),
        "jain_of_hosts": jain(ends),
        "hosts_max_min": float(ends.max() / ends.min()),
    }
