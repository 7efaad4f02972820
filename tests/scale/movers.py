# SPDX-License-Identifier: Apache-2.0
"""The guests that move, in the order in which their hosts move them, and how far each is."""

from __future__ import annotations

import dataclasses
import enum
import heapq
import math
from collections.abc import Sequence

import numpy as np

from nova_dmigrate.host.capacity import Claim, Load, Rates
from tests.scale.cluster import Cluster, Guest


class Phase(enum.Enum):
    """Where a migration is."""

    WAITING = "waiting"  # for Nova
    CHECKING = "checking"
    DESTINATION = "destination relay"  # queued, or being started
    SOURCE = "source relay"
    SENDING = "sending"
    ENDED = "ended"


class MapPhase(enum.Enum):
    """Where its map is."""

    NONE = "none"
    BUILDING = "building"
    FETCHING = "fetching"
    THERE = "there"


class Relay:
    """A relay as the product's queue sees a session (`nova_dmigrate.host.turns`)."""

    def __init__(self, role: str, number: int, memory: int, now: float) -> None:
        self.record = _Record(role, f"{number}-{role}", now)
        self.load = Load(role, memory)
        self.queued = True
        self.active = False

    def start(self) -> None:
        self.queued, self.active = False, True

    @property
    def claim(self) -> Claim:
        return Claim(self.record.session_id, self.record.role, Rates())


@dataclasses.dataclass
class _Record:
    role: str
    session_id: str
    created: float
    message: str = ""


@dataclasses.dataclass
class Migration:
    """One guest on its way. ``raw``: bytes that only the network can bring, ``mapped``: that the
    volume could bring as well; both what is left."""

    number: int
    guest: Guest
    source: int
    target: int
    raw: float
    mapped: float
    phase: Phase = Phase.WAITING
    map: MapPhase = MapPhase.NONE
    relayed: bool = True
    wake: float = math.inf
    map_wake: float = math.inf
    map_left: float = 0.0
    map_began: float = 0.0
    queue_end: float = math.inf
    began: float = 0.0
    sending_since: float = 0.0
    ended: float = 0.0
    from_volume: float = 0.0
    from_network: float = 0.0
    fallback: str = ""
    relays: dict[str, Relay] = dataclasses.field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.raw + self.mapped

    def host_of(self, role: str) -> int:
        return self.source if role == "source" else self.target


def migrations_of(cluster: Cluster) -> list[Migration]:
    """All that an evacuation is made of, in the order in which their hosts move them."""
    guests = _guests(cluster)
    return [
        Migration(
            number,
            guest,
            number % cluster.hosts,
            target,
            guest.raw_bytes,
            guest.mapped_bytes,
        )
        for number, (guest, target) in enumerate(zip(guests, _placed(guests, cluster), strict=True))
    ]


def _guests(cluster: Cluster) -> list[Guest]:
    """In the order in which their hosts move them."""
    count = cluster.hosts * cluster.guests
    sizes = np.random.default_rng(cluster.seed).integers(len(cluster.sizes), size=count)
    return [cluster.guest.times(cluster.sizes[size]) for size in sizes.tolist()]


def _placed(guests: Sequence[Guest], cluster: Cluster) -> list[int]:
    """Where each goes: to where most memory is free, as Nova's scheduler weighs; among equals to
    any of them."""
    random = np.random.default_rng(cluster.seed + 1)
    free = [(0, luck, target) for target, luck in enumerate(random.random(cluster.targets))]
    heapq.heapify(free)
    placed = []
    for guest in guests:
        taken, _, target = free[0]
        heapq.heapreplace(free, (taken + guest.memory, float(random.random()), target))
        placed.append(target)
    return placed
