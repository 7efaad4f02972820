# SPDX-License-Identifier: Apache-2.0
"""What flows at a moment: memory over networks, blocks from the storage, maps over the broker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tests.scale.cluster import Cluster
from tests.scale.fluid import Floats, max_min
from tests.scale.movers import MapPhase, Migration, Phase
from tests.scale.relays import Hosts


@dataclasses.dataclass(frozen=True)
class Flow:
    """Bytes a second of one migration."""

    network: float
    volume: float
    map: float


def flows(
    cluster: Cluster, hosts: Hosts, under_way: Sequence[Migration]
) -> Iterator[tuple[Migration, Flow]]:
    """Of each migration that is under way."""
    network, volume, maps = _shared(cluster, hosts, under_way)
    network, volume = _carried(cluster, under_way, network, volume)
    for each, *rates in zip(
        list(under_way), network.tolist(), volume.tolist(), maps.tolist(), strict=True
    ):
        yield each, Flow(*rates)


def _shared(
    cluster: Cluster, hosts: Hosts, under_way: Sequence[Migration]
) -> tuple[Floats, Floats, Floats]:
    """What networks, storage and broker give to each, in this order."""
    sources, targets = cluster.hosts, cluster.targets
    storage, broker = sources + 2 * targets, sources + 2 * targets + 1
    capacities = np.concatenate(
        [
            np.full(sources + targets, cluster.network),
            np.full(targets, cluster.storage_link / cluster.reads),
            [cluster.storage / cluster.reads, cluster.broker / _map_overhead(cluster)],
        ]
    )
    through, caps = [], []
    for each in under_way:
        sending = each.phase is Phase.SENDING and each.left > 0
        through.append((each.source, sources + each.target))
        caps.append(hosts.cap(each, "source") if sending else 0.0)
        reading = sending and each.map is MapPhase.THERE and each.mapped > 0
        through.append((sources + targets + each.target, storage))
        caps.append(hosts.cap(each, "destination") if reading else 0.0)
        through.append((broker, -1))
        caps.append(cluster.fetch_rate if each.map is MapPhase.FETCHING else 0.0)
    network, volume, maps = (
        max_min(np.array(through, np.int64), np.array(caps), capacities).reshape(-1, 3).T
    )
    return network, volume, maps


def _carried(
    cluster: Cluster, under_way: Sequence[Migration], network: Floats, volume: Floats
) -> tuple[Floats, Floats]:
    """What the relays can do of that: all that passes them costs their processors time."""
    relayed = np.array([each.relayed for each in under_way])
    busy = np.max(
        [
            (network * raw + volume * referenced) / cluster.cores
            for raw, referenced in zip(cluster.work.raw, cluster.work.referenced, strict=True)
        ],
        axis=0,
    )
    slower = np.where(relayed, np.maximum(busy, 1.0), 1.0)
    return network / slower, volume / slower


def _map_overhead(cluster: Cluster) -> float:
    """Bytes into the broker for a byte of chunks."""
    request, brings = cluster.fetch_request
    return cluster.costs[request].bytes / brings
