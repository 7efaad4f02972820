# SPDX-License-Identifier: Apache-2.0
"""What is simulated: guests, hosts, and what there is of networks, storage and broker.

What a request costs the broker and a byte the relays' processors is measured; the rest is assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from nova_dmigrate.host.capacity import Limits
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.rpc.client import ClientSettings
from nova_dmigrate.rpc.host_messages import SAVING_SECONDS

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one request with its answer. ``bytes``: into the broker, and as many come out of it."""

    bytes: float
    ms: float
    messages: int = 2


#: Measured, see doc/source/contributor/scale.rst: bytes into the broker, milliseconds.
COSTS: Mapping[str, Cost] = {
    "hello": Cost(1365, 4),
    "open_destination": Cost(3119, 4),
    "open_source": Cost(3252, 4),
    "renew": Cost(2539, 4),
    "close": Cost(2514, 5),
    "ping": Cost(1340, 5),
    "health": Cost(1595, 5),
    "map_begin": Cost(1461, 4),
    "map_state": Cost(1486, 5),
    "map_chunk": Cost(350874, 16),
    "save_chunks": Cost(1304, 6),
    "map_end": Cost(1270, 5),
    "use_map": Cost(2705, 5),
    "summary": Cost(28824, 7),
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
        return "save_chunks", self.fetch_rate * SAVING_SECONDS
