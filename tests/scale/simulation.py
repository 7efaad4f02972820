# SPDX-License-Identifier: Apache-2.0
"""An evacuation of many hosts at once, simulated: what it takes, and what it costs those who share
the broker and the storage.

Memory is a fluid: between two events each migration sends and reads at a rate, and rates change
whenever one begins, gets its map, or ends. Queues, limits and shares of a host's bandwidth are the
product's own (``nova_dmigrate.host``); how often something is asked is what the code says, what a
request costs is measured (`messages`).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

from tests.scale.cluster import Cluster
from tests.scale.flows import Flow, flows
from tests.scale.movers import MapPhase, Migration, Phase, migrations_of
from tests.scale.relays import Hosts
from tests.scale.requests import Requests
from tests.scale.series import Series

#: Of QEMU's stop and the rest of the switchover.
_SWITCHOVER_S = 0.3

_Flows = Sequence[tuple[Migration, Flow]]


class Simulation:
    """One evacuation. Call :meth:`run` once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.now = 0.0
        self.series = Series(10.0)
        self.peak_fetches = 0
        self.migrations = migrations_of(cluster)
        self._requests = Requests(cluster, self.series)
        self._hosts = Hosts(cluster)
        self._waiting = [
            collections.deque(self.migrations[host :: cluster.hosts])
            for host in range(cluster.hosts)
        ]
        self._under_way: list[Migration] = []

    def run(self) -> Simulation:
        """Until all guests have moved."""
        for host in range(self._cluster.hosts):
            for _ in range(self._cluster.concurrency):
                self._next_of(host)
        while self._under_way:
            while self._change():
                pass
            rates = list(flows(self._cluster, self._hosts, self._under_way))
            self._advance(rates, self._pause(rates))
        return self

    # What changes at a moment

    def _next_of(self, host: int) -> None:
        if not self._waiting[host]:
            return
        migration = self._waiting[host].popleft()
        migration.began = self.now
        migration.relayed = self._cluster.relayed
        self._under_way.append(migration)
        if migration.relayed:
            migration.phase, migration.wake = Phase.CHECKING, self.now + self._cluster.start_s
            self._ask("hello", 2)
            self._ask("ping")
        else:
            self._send(migration)

    def _change(self) -> bool:
        """Whether something had to change."""
        changed = False
        for migration in list(self._under_way):
            changed |= self._look_at_map(migration)
            changed |= self._look_at(migration)
        return changed

    def _look_at_map(self, migration: Migration) -> bool:
        if migration.map is MapPhase.BUILDING and self.now >= migration.map_wake:
            built = migration.map_wake - migration.map_began
            if built > self._cluster.settings.map_time:
                self._fall_back(migration, "map not built in time")
                return True
            migration.map, migration.map_began = MapPhase.FETCHING, self.now
            migration.map_left = self._cluster.map_bytes(migration.guest)
            return True
        if migration.map is MapPhase.FETCHING:
            if migration.map_left <= 0:
                migration.map = MapPhase.THERE
                self._ask("map_end")
                self._ask("use_map")
                return True
            if self.now > migration.map_began + self._cluster.settings.map_time:
                self._fall_back(migration, "map not fetched in time")
                return True
        return False

    def _look_at(self, migration: Migration) -> bool:
        phase = migration.phase
        if phase is Phase.CHECKING and self.now >= migration.wake:
            migration.wake = math.inf
            self._order(migration, "destination")
            migration.phase = Phase.DESTINATION
            return True
        if phase is Phase.DESTINATION:
            return self._look_at_relay(migration, "destination", Phase.SOURCE)
        if phase is Phase.SOURCE:
            return self._look_at_relay(migration, "source", Phase.SENDING)
        if phase is Phase.SENDING and self.now >= migration.wake:
            self._end(migration)
            return True
        return False

    def _look_at_relay(self, migration: Migration, role: str, following: Phase) -> bool:
        relay = migration.relays[role]
        if relay.queued:
            if self.now < migration.queue_end:
                return False
            self._fall_back(migration, "no room in time")
            return True
        if migration.wake == math.inf:
            migration.wake = self.now + self._cluster.start_s
            if role == "source":
                # The map is asked for when there is a place on both hosts
                self._begin_map(migration)
            return True
        if self.now < migration.wake:
            return False
        migration.wake = math.inf
        migration.phase = following
        if following is Phase.SENDING:
            self._send(migration)
        else:
            self._order(migration, "source")
        return True

    def _begin_map(self, migration: Migration) -> None:
        migration.map, migration.map_began = MapPhase.BUILDING, self.now
        migration.map_wake = self.now + self._cluster.build_seconds(migration.guest)
        self._ask("map_begin")

    def _send(self, migration: Migration) -> None:
        migration.phase = Phase.SENDING
        migration.wake = math.inf
        migration.sending_since = self.now

    def _fall_back(self, migration: Migration, why: str) -> None:
        """What has been sent through the relays by now stays sent; a migration that has not begun
        is the ordinary one."""
        migration.fallback = why
        migration.map = MapPhase.NONE
        if migration.phase is not Phase.SENDING:
            migration.relayed = False
            self._close(migration)
            self._send(migration)

    def _end(self, migration: Migration) -> None:
        migration.phase, migration.ended = Phase.ENDED, self.now
        migration.map = MapPhase.NONE
        self._close(migration)
        self._under_way.remove(migration)
        self._next_of(migration.source)

    def _order(self, migration: Migration, role: str) -> None:
        self._hosts.order(migration, role, self.now)
        migration.queue_end = self.now + self._cluster.settings.queue_time
        self._ask(f"open_{role}")

    def _close(self, migration: Migration) -> None:
        for _ in migration.relays:
            self._ask("close")
            self._ask("summary")
        self._hosts.close(migration)

    def _ask(self, request: str, count: float = 1.0, seconds: float = 0.0) -> None:
        self._requests.ask(request, self.now, count, seconds)

    # What flows until something changes

    def _pause(self, rates: _Flows) -> float:
        """Seconds until something changes."""
        ends = []
        for each, flow in rates:
            for wake in (each.wake, each.map_wake, each.queue_end):
                if wake > self.now:
                    ends.append(wake - self.now)
            if flow.map:
                ends.append(each.map_left / flow.map)
                ends.append(each.map_began + self._cluster.settings.map_time - self.now)
            if flow.network or flow.volume:
                ends.append(self._sent_in(each, flow))
                if flow.volume:
                    ends.append(each.mapped / flow.volume)
        soonest = min((end for end in ends if end > 0), default=self._cluster.step or 1.0)
        return max(soonest, self._cluster.step, 1e-6)

    def _sent_in(self, each: Migration, flow: Flow) -> float:
        """Seconds until so little is left that the guest may be stopped."""
        pace = flow.network + flow.volume - each.guest.dirty
        left = max(0.0, each.left - flow.network * self._cluster.downtime)
        # One whose guest is faster than the network converges only with what Nova does about it
        return left / pace if pace > 0 else math.inf

    def _advance(self, rates: _Flows, seconds: float) -> None:
        fetches = 0
        for each, flow in rates:
            if flow.map:
                fetches += 1
                if not self._fetch(each, flow.map, seconds):
                    continue
            if flow.network or flow.volume:
                self._move(each, flow, seconds)
            self._requests.ask_meanwhile(each, self.now, seconds)
        self._requests.ask_of_all_hosts(self.now, seconds)
        self.peak_fetches = max(self.peak_fetches, fetches)
        self.now += seconds

    def _fetch(self, each: Migration, rate: float, seconds: float) -> bool:
        """More of its map, unless that comes too slowly."""
        if self._cluster.chunk / rate > self._cluster.settings.agent_timeout:
            self._fall_back(each, "a chunk of the map not in time")
            return False
        fetched = min(each.map_left, rate * seconds)
        each.map_left -= fetched
        if each.map_left < 1:
            each.map_left = 0.0
        request, brings = self._cluster.fetch_request
        self._ask(request, fetched / brings, seconds)
        return True

    def _move(self, each: Migration, flow: Flow, seconds: float) -> None:
        cluster = self._cluster
        read = min(each.mapped, flow.volume * seconds)
        each.mapped -= read
        sent = min(each.left, flow.network * seconds)
        if each.map is MapPhase.THERE:
            # The volume brings what it can; the network brings the rest of it last
            raw = min(each.raw, sent)
            each.raw -= raw
            each.mapped -= sent - raw
        elif each.left:
            share = each.raw / each.left
            each.raw -= sent * share
            each.mapped -= sent * (1 - share)
        each.raw += each.guest.dirty * seconds
        each.from_volume += read
        each.from_network += sent
        self.series.spread("volume", self.now, read * cluster.reads, seconds)
        self.series.spread("network", self.now, sent, seconds)
        if each.left <= max(flow.network * cluster.downtime, each.guest.dirty * seconds) + 1:
            each.raw = each.mapped = 0.0
            each.wake = self.now + seconds + _SWITCHOVER_S
