# SPDX-License-Identifier: Apache-2.0
"""Relays as the product's hosts have them: their queues, and the share of bandwidth of each."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

from nova_dmigrate.host import turns
from nova_dmigrate.host.capacity import shares
from tests.scale.cluster import Cluster
from tests.scale.movers import Migration, Relay


class Hosts:
    """All hosts of a cluster. Those that are evacuated receive nothing, so the sessions of one role
    are all that a host has."""

    def __init__(self, cluster: Cluster) -> None:
        self._limits = cluster.limits
        self._sessions: dict[tuple[str, int], list[Relay]] = collections.defaultdict(list)
        self._caps: dict[str, float] = {}

    def order(self, migration: Migration, role: str, now: float) -> None:
        """Have one of its relays started, or queued."""
        relay = Relay(role, migration.number, migration.guest.memory, now)
        migration.relays[role] = relay
        host = migration.host_of(role)
        self._sessions[role, host].append(relay)
        self._serve(role, host)

    def close(self, migration: Migration) -> None:
        """Take its relays away."""
        for role, relay in migration.relays.items():
            host = migration.host_of(role)
            self._sessions[role, host].remove(relay)
            self._serve(role, host)
        migration.relays = {}

    def cap(self, migration: Migration, role: str) -> float:
        """Bytes a second that its relay may take of what it reads or sends."""
        relay = migration.relays.get(role)
        return math.inf if relay is None else self._caps[relay.record.session_id]

    def _serve(self, role: str, host: int) -> None:
        """Whose turn it is, and what share each has, by the product's own rules."""
        sessions: Sequence[Any] = self._sessions[role, host]
        turns.serve(sessions, self._limits)
        running = [each.claim for each in sessions if each.active]
        for name, rates in shares(self._limits, running).items():
            self._caps[name] = (rates.network if role == "source" else rates.volume) or math.inf
