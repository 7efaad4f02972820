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
import dataclasses
import enum
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nova_dmigrate.host import turns
from nova_dmigrate.host.capacity import Claim, Limits, Load, Rates, shares
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.rpc.client import ClientSettings
from tests.scale.fluid import Floats, jain, max_min

GIB = 1 << 30

#: Requests of one migration a second, as the code asks: Nova's follower (0.25 s and the answer), a
#: place in a queue and a map in the making (0.2 s), the database and chunks put into a file (1 s),
#: each lease (a quarter).
_FOLLOW_S, _QUEUE_S, _BUILD_S, _HEALTH_S, _SAVE_S = 0.25, 0.2, 0.2, 1.0, 1.0
#: And of each host, which asks itself.
_PRESENCE_S = 2.0
#: Of QEMU's stop and the rest of the switchover.
_SWITCHOVER_S = 0.3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one request with its answer. ``bytes``: into the broker, and as many come out of it."""

    bytes: float
    ms: float
    messages: int = 2


#: Measured, see doc/source/contributor/scale.rst: bytes into the broker, milliseconds.
COSTS: Mapping[str, Cost] = {
    "hello": Cost(1316, 5),
    "open_destination": Cost(3119, 4),
    "open_source": Cost(3252, 4),
    "renew": Cost(2539, 4),
    "close": Cost(2514, 4),
    "ping": Cost(1340, 4),
    "health": Cost(1633, 4),
    "map_state": Cost(1486, 4),
    "map_chunk": Cost(350874, 13),
    "save_chunks": Cost(1277, 4),
}


@dataclasses.dataclass(frozen=True)
class Guest:
    """A database server. Bytes, and bytes a second.

    :ivar pool: of the database. :ivar mapped: share of it that the volume holds as well.
    :ivar other: bytes beside the pool that are not zero.
    """

    memory: int = 64 * GIB
    pool: int = 48 * GIB
    mapped: float = 0.95
    other: int = 8 * GIB
    dirty: float = 20e6

    def times(self, factor: float) -> Guest:
        """One of another size."""
        return dataclasses.replace(
            self,
            memory=int(self.memory * factor),
            pool=int(self.pool * factor),
            other=int(self.other * factor),
            dirty=self.dirty * factor,
        )

    @property
    def mapped_bytes(self) -> float:
        return self.pool * self.mapped

    @property
    def raw_bytes(self) -> float:
        """What only the network can bring."""
        return self.pool - self.mapped_bytes + self.other


@dataclasses.dataclass(frozen=True)
class Work:
    """Seconds of a processor that a byte of the guest takes of the source relay and of the
    destination relay, by the way that it goes. Measured with TLS, see performance.rst."""

    raw: tuple[float, float] = (0.91e-9, 1.04e-9)
    referenced: tuple[float, float] = (1.17e-9, 2.01e-9)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What is simulated. Rates in bytes a second, times in seconds.

    :ivar hosts: that are evacuated, with ``guests`` each, to ``targets`` others.
    :ivar sizes: of the guests, each as likely, in the size of ``guest``.
    :ivar concurrency: Nova's ``max_concurrent_live_migrations``.
    :ivar network: of each host for migrations, in each direction. :ivar storage_link: of each host
        to the storage. :ivar storage: of the whole cluster, for these reads.
    :ivar broker: bytes a second that it takes in.
    :ivar relayed: with relays, or as stock Nova does.
    :ivar limits, settings: of all hosts.
    :ivar chunk: bytes that the orchestration asks the agent for at once.
    :ivar build_s, build_s_per_gib: for making a map. :ivar page_bytes: of a map on the wire before
        base64, for a page. :ivar port_ms: for a chunk on the guest's port.
    :ivar by_broker: agents are asked over the broker, and not over their guests' ports.
    :ivar work: seconds of a processor that a byte takes of each relay, see `Work`; ``cores``: how
        many one relay uses at most.
    :ivar reads: bytes read for a byte that is used.
    :ivar step: least time between two moments; 0 is exact.
    """

    hosts: int = 200
    targets: int = 200
    guests: int = 10
    guest: Guest = Guest()
    sizes: Sequence[float] = (0.25, 0.5, 1.0, 2.0)
    concurrency: int = 1
    network: float = 1.18e9
    storage_link: float = 1.18e9
    storage: float = 40e9
    broker: float = 500e6
    relayed: bool = True
    limits: Limits = Limits()
    settings: OrchestrationSettings = dataclasses.field(
        default_factory=lambda: OrchestrationSettings(state_directory=None)  # type: ignore[arg-type]
    )
    chunk: int = ClientSettings().chunk_bytes
    costs: Mapping[str, Cost] = dataclasses.field(default_factory=lambda: COSTS)
    start_s: float = 1.0
    build_s: float = 0.07
    build_s_per_gib: float = 0.11
    page_bytes: float = 1.3
    port_ms: float = 5.0
    by_broker: bool = False
    work: Work = Work()
    cores: float = 2.0
    reads: float = 1.05
    downtime: float = 0.3
    step: float = 0.5
    seed: int = 1

    def map_bytes(self, guest: Guest) -> float:
        """Of a guest's map, as chunks."""
        return guest.mapped_bytes / 4096 * self.page_bytes

    def build_seconds(self, guest: Guest) -> float:
        """What its agent takes to make it."""
        return self.build_s + self.build_s_per_gib * guest.pool / GIB

    @property
    def fetch_rate(self) -> float:
        """Bytes of chunks a second that one fetch takes at most: one chunk after the other."""
        return 1000 * self.chunk / (self.costs["map_chunk"].ms if self.by_broker else self.port_ms)

    @property
    def fetch_request(self) -> tuple[str, float]:
        """What is asked for to fetch a map, and how many bytes of it one such request brings."""
        if self.by_broker:
            return "map_chunk", self.chunk
        return "save_chunks", self.fetch_rate * _SAVE_S


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


@dataclasses.dataclass
class Series:
    """What happens in each stretch of time: ``length`` seconds, or less at the end."""

    length: float
    values: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )

    def add(self, name: str, at: float, amount: float) -> None:
        slots, index = self.values[name], int(at / self.length)
        slots.extend([0.0] * (index + 1 - len(slots)))
        slots[index] += amount

    def peak(self, name: str) -> float:
        """The most a second."""
        return max(self.values.get(name) or [0.0]) / self.length

    def total(self, name: str) -> float:
        return sum(self.values.get(name) or [0.0])


class Simulation:
    """One evacuation. Call :meth:`run` once."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.now = 0.0
        self.series = Series(10.0)
        self.peak_fetches = 0
        guests = _guests(cluster)
        self.migrations = [
            Migration(
                number,
                guest,
                number % cluster.hosts,
                target,
                guest.raw_bytes,
                guest.mapped_bytes,
            )
            for number, (guest, target) in enumerate(
                zip(guests, _placed(guests, cluster), strict=True)
            )
        ]
        self._waiting = [
            collections.deque(self.migrations[host :: cluster.hosts])
            for host in range(cluster.hosts)
        ]
        self._under_way: list[Migration] = []
        self._sessions: dict[tuple[str, int], list[Relay]] = collections.defaultdict(list)
        self._caps: dict[str, float] = {}

    def run(self) -> Simulation:
        """Until all guests have moved."""
        for host in range(self._cluster.hosts):
            for _ in range(self._cluster.concurrency):
                self._next_of(host)
        while self._under_way:
            while self._change():
                pass
            rates = self._rates()
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
                return True
            if self.now > migration.map_began + self._cluster.settings.map_time:
                self._fall_back(migration, "map not fetched in time")
                return True
        return False

    def _look_at(self, migration: Migration) -> bool:
        phase = migration.phase
        if phase is Phase.CHECKING and self.now >= migration.wake:
            migration.wake = math.inf
            self._order(migration, "destination", migration.target)
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
            if role == "destination":
                # The map is asked for when there is a place
                migration.map, migration.map_began = MapPhase.BUILDING, self.now
                migration.map_wake = self.now + self._cluster.build_seconds(migration.guest)
            return True
        if self.now < migration.wake:
            return False
        migration.wake = math.inf
        migration.phase = following
        if following is Phase.SENDING:
            self._send(migration)
        else:
            self._order(migration, "source", migration.source)
        return True

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

    # Relays, as the product's hosts have them

    def _order(self, migration: Migration, role: str, host: int) -> None:
        relay = Relay(role, migration.number, migration.guest.memory, self.now)
        migration.relays[role] = relay
        migration.queue_end = self.now + self._cluster.settings.queue_time
        self._sessions[role, host].append(relay)
        self._ask(f"open_{role}")
        self._serve(role, host)

    def _close(self, migration: Migration) -> None:
        for role, relay in migration.relays.items():
            host = migration.source if role == "source" else migration.target
            self._sessions[role, host].remove(relay)
            self._ask("close")
            self._serve(role, host)
        migration.relays = {}

    def _serve(self, role: str, host: int) -> None:
        """Whose turn it is, and what share each has, by the product's own rules.

        Hosts that are evacuated receive nothing, so the sessions of one role are all that it has.
        """
        sessions: Sequence[Any] = self._sessions[role, host]
        turns.serve(sessions, self._cluster.limits)
        running = [each.claim for each in sessions if each.active]
        for name, rates in shares(self._cluster.limits, running).items():
            self._caps[name] = (rates.network if role == "source" else rates.volume) or math.inf

    # What flows

    def _rates(self) -> _Flows:
        """Rates of all flows from now on."""
        cluster = self._cluster
        hosts, targets = cluster.hosts, cluster.targets
        storage, broker = hosts + 2 * targets, hosts + 2 * targets + 1
        capacities = np.concatenate(
            [
                np.full(hosts + targets, cluster.network),
                np.full(targets, cluster.storage_link / cluster.reads),
                [cluster.storage / cluster.reads, cluster.broker / self._map_overhead()],
            ]
        )
        through, caps = [], []
        for each in self._under_way:
            sending = each.phase is Phase.SENDING and each.left > 0
            through.append((each.source, hosts + each.target))
            caps.append(self._cap(each, "source") if sending else 0.0)
            reading = sending and each.map is MapPhase.THERE and each.mapped > 0
            through.append((hosts + targets + each.target, storage))
            caps.append(self._cap(each, "destination") if reading else 0.0)
            through.append((broker, -1))
            caps.append(cluster.fetch_rate if each.map is MapPhase.FETCHING else 0.0)
        found = max_min(np.array(through, np.int64), np.array(caps), capacities)
        network, volume, maps = found.reshape(-1, 3).T
        return _Flows(*self._carried(network, volume), maps)

    def _cap(self, migration: Migration, role: str) -> float:
        relay = migration.relays.get(role)
        return math.inf if relay is None else self._caps[relay.record.session_id]

    def _carried(self, network: Floats, volume: Floats) -> tuple[Floats, Floats]:
        """What the relays can do of that: all that passes them costs their processors time."""
        cluster = self._cluster
        relayed = np.array([each.relayed for each in self._under_way])
        busy = np.max(
            [
                (network * raw + volume * referenced) / cluster.cores
                for raw, referenced in zip(cluster.work.raw, cluster.work.referenced, strict=True)
            ],
            axis=0,
        )
        slower = np.where(relayed, np.maximum(busy, 1.0), 1.0)
        return network / slower, volume / slower

    def _map_overhead(self) -> float:
        """Bytes into the broker for a byte of chunks."""
        request, brings = self._cluster.fetch_request
        return self._cluster.costs[request].bytes / brings

    def _pause(self, flows: _Flows) -> float:
        """Seconds until something changes."""
        ends = []
        for each, network, volume, maps in flows.each(self._under_way):
            for wake in (each.wake, each.map_wake, each.queue_end):
                if wake > self.now:
                    ends.append(wake - self.now)
            if maps:
                ends.append(each.map_left / maps)
                ends.append(each.map_began + self._cluster.settings.map_time - self.now)
            if network or volume:
                ends.append(self._sent_in(each, network, volume))
                if volume:
                    ends.append(each.mapped / volume)
        soonest = min((end for end in ends if end > 0), default=self._cluster.step or 1.0)
        return max(soonest, self._cluster.step, 1e-6)

    def _sent_in(self, each: Migration, network: float, volume: float) -> float:
        """Seconds until so little is left that the guest may be stopped."""
        pace = network + volume - each.guest.dirty
        left = max(0.0, each.left - network * self._cluster.downtime)
        # One whose guest is faster than the network converges only with what Nova does about it
        return left / pace if pace > 0 else math.inf

    def _advance(self, flows: _Flows, seconds: float) -> None:
        cluster = self._cluster
        fetches = 0
        for each, network, volume, maps in flows.each(self._under_way):
            if maps:
                fetches += 1
                if cluster.chunk / maps > cluster.settings.agent_timeout:
                    self._fall_back(each, "a chunk of the map not in time")
                    continue
                fetched = min(each.map_left, maps * seconds)
                each.map_left -= fetched
                if each.map_left < 1:
                    each.map_left = 0.0
                request, brings = cluster.fetch_request
                self._ask(request, fetched / brings, seconds)
            if network or volume:
                self._move(each, network, volume, seconds)
            self._ask_meanwhile(each, seconds)
        self._ask("hello", (cluster.hosts + cluster.targets) / _PRESENCE_S * seconds, seconds)
        self.peak_fetches = max(self.peak_fetches, fetches)
        self.now += seconds

    def _move(self, each: Migration, network: float, volume: float, seconds: float) -> None:
        cluster = self._cluster
        read = min(each.mapped, volume * seconds)
        each.mapped -= read
        sent = min(each.left, network * seconds)
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
        self._spread("volume", read * cluster.reads, seconds)
        self._spread("network", sent, seconds)
        if each.left <= max(network * cluster.downtime, each.guest.dirty * seconds) + 1:
            each.raw = each.mapped = 0.0
            each.wake = self.now + seconds + _SWITCHOVER_S

    # What is asked

    def _ask_meanwhile(self, each: Migration, seconds: float) -> None:
        if not each.relayed:
            return
        settings, wait = self._cluster.settings, self._cluster.costs["renew"].ms / 1000
        if each.map is MapPhase.BUILDING:
            self._ask("map_state", seconds / (_BUILD_S + wait), seconds)
        if any(relay.queued for relay in each.relays.values()):
            self._ask("renew", seconds / (_QUEUE_S + wait), seconds)
        if each.phase is Phase.SENDING:
            self._ask("renew", seconds / (_FOLLOW_S + wait), seconds)
        self._ask("renew", len(each.relays) * 4 / settings.lease * seconds, seconds)
        if each.phase is not Phase.CHECKING:
            self._ask("health", seconds / _HEALTH_S, seconds)

    def _ask(self, request: str, count: float = 1.0, seconds: float = 0.0) -> None:
        cost = self._cluster.costs[request]
        self._spread("messages", count * cost.messages, seconds)
        self._spread("broker", count * cost.bytes, seconds)
        if request == self._cluster.fetch_request[0]:
            self._spread("maps", count * cost.bytes, seconds)

    def _spread(self, name: str, amount: float, seconds: float) -> None:
        """Note what happens from now on for so many seconds."""
        length, end = self.series.length, self.now + seconds
        if seconds <= 0 or int(self.now / length) == int(end / length):
            self.series.add(name, self.now, amount)
            return
        at = self.now
        while at < end:
            behind = min(end, (int(at / length) + 1) * length)
            self.series.add(name, at, amount * (behind - at) / seconds)
            at = behind if behind > at else end


@dataclasses.dataclass(frozen=True)
class _Flows:
    """Bytes a second of each migration under way, three arrays of one length."""

    network: Floats
    volume: Floats
    maps: Floats

    def each(self, migrations: Sequence[Migration]) -> Any:
        return zip(
            list(migrations),
            self.network.tolist(),
            self.volume.tolist(),
            self.maps.tolist(),
            strict=True,
        )


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


def summary(done: Simulation, cluster: Cluster) -> dict[str, Any]:
    """What one evacuation has come to. Bytes and bytes a second, seconds, shares of 1."""
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
