# SPDX-License-Identifier: Apache-2.0
"""What is asked over the broker, and how often: as the code of the product asks."""

from __future__ import annotations

from tests.scale.cluster import Cluster
from tests.scale.movers import MapPhase, Migration, Phase
from tests.scale.series import Series

#: Seconds between requests of one migration: Nova's follower, what is waited for (a place in a
#: queue, a relay that is being started, a map in the making), the database. Each comes on top of
#: the answer to the one before.
_FOLLOW_S, _WAIT_S, _HEALTH_S = 0.25, 0.2, 1.0
#: And of each host, which asks itself.
_PRESENCE_S = 2.0
#: A lease is renewed so often while it lasts.
_RENEWALS = 4


class Requests:
    """Notes what all of them bring the broker."""

    def __init__(self, cluster: Cluster, series: Series) -> None:
        self._cluster = cluster
        self._series = series

    def ask(self, request: str, at: float, count: float = 1.0, seconds: float = 0.0) -> None:
        """From that moment on, in so many seconds."""
        cost = self._cluster.costs[request]
        self._series.spread("messages", at, count * cost.messages, seconds)
        self._series.spread("broker", at, count * cost.bytes, seconds)
        if request == self._cluster.fetch_request[0]:
            self._series.spread("maps", at, count * cost.bytes, seconds)

    def ask_of_all_hosts(self, at: float, seconds: float) -> None:
        """What they ask whether they move anything or not."""
        hosts = self._cluster.hosts + self._cluster.targets
        self.ask("hello", at, hosts / _PRESENCE_S * seconds, seconds)

    def ask_meanwhile(self, each: Migration, at: float, seconds: float) -> None:
        """What is asked for again and again while a migration is where it is."""
        if not each.relayed:
            return
        if each.map is MapPhase.BUILDING:
            self._repeat("map_state", _WAIT_S, at, seconds)
        if each.phase in (Phase.DESTINATION, Phase.SOURCE):
            self._repeat("renew", _WAIT_S, at, seconds)
        if each.phase is Phase.SENDING:
            self._repeat("renew", _FOLLOW_S, at, seconds)
        leases = len(each.relays) * _RENEWALS / self._cluster.settings.lease
        self.ask("renew", at, leases * seconds, seconds)
        if each.phase is not Phase.CHECKING:
            self.ask("health", at, seconds / _HEALTH_S, seconds)

    def _repeat(self, request: str, pause: float, at: float, seconds: float) -> None:
        answer = self._cluster.costs[request].ms / 1000
        self.ask(request, at, seconds / (pause + answer), seconds)
