# SPDX-License-Identifier: Apache-2.0
"""Database guests at work on one of two hosts, and their clients: what is migrated and measured."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MapLimits
from nova_dmigrate.rpc.client import AgentClient
from tests.fetched_map import fetch_map
from tests.lab.attached import AttachedDatabase
from tests.lab.database_guest import DatabaseGuest, DatabaseSpec
from tests.lab.database_image import LEAN, Release
from tests.lab.demo.clients import Server
from tests.lab.demo.ledger import Ledger
from tests.lab.demo.load import Load
from tests.lab.demo.probe import Probe
from tests.lab.demo.services import MigrationServices
from tests.lab.demo.volume import create_volume
from tests.lab.demo.workloads import command
from tests.lab.domains import Domain
from tests.lab.guest import PAGE_SIZE
from tests.lab.guest_network import GuestNetwork, guest_address
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.relays import wait_until

#: libvirt 9.0 cannot choose how parallel connections compress
_COMPRESSION = ("-global", "migration.multifd-compression=zstd")
#: Seconds in which the server fills its pool by the volume's list, at most.
_FILL_PATIENCE = 600.0
#: Bytes of RAM that are looked at in one go.
_STRIDE = 64 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is migrated, and over what.

    ``network``, ``volume``: MB/s. ``pool``: share of ``ram_mb``. ``load``: one of
    `workloads.LOADS`. ``rate``: transactions a second that sysbench asks for, 0 for as many as
    there can be. ``compression``: whether relays may compress.
    """

    release: Release
    network: float = 50
    volume: float = 100
    pool: float = 0.5
    load: str = "oltp_read_write"
    rate: float = 10
    ram_mb: int = 2048
    compression: bool = True

    @property
    def pool_mb(self) -> int:
        return int(self.ram_mb * self.pool)

    @property
    def guest(self) -> "Shape":
        """What there is to know to start a guest: the same for shapes that differ in the volume's
        bandwidth alone.
        """
        return dataclasses.replace(self, volume=0)


@dataclasses.dataclass(frozen=True)
class Content:
    """Bytes of a guest's memory: that are not zero, and that are in its agent's buffer map."""

    used: int
    mapped: int

    @classmethod
    def of(cls, parts: Sequence["Content"]) -> "Content":
        """That of several guests together."""
        return cls(sum(part.used for part in parts), sum(part.mapped for part in parts))

    def ideal(self, shape: Shape) -> float:
        """T*: the least time in seconds in which both ways can bring its bytes, as they are in the
        guest, to the other host. Relays that compress may take less.
        """
        network, volume = shape.network * 1e6, shape.volume * 1e6
        rest = max(self.used - self.mapped, 0)
        return max(rest / network, self.used / (network + volume))


def admit(server: Server) -> str:
    """The command in the guest after which its server lets clients in that have no TLS."""
    # With TLS and once: it then knows the password
    login = f"client --host=127.0.0.1 --user={server.user} --password={server.password}"
    return f"{login} -e 'SELECT 1' >/dev/null"


def mapped_bytes(agent: AgentClient, ram_bytes: int) -> int:
    """Bytes of a guest's memory that its agent's buffer map has; 0 if there is none."""
    limits = MapLimits(max_guest_page=ram_bytes // PAGE_SIZE - 1)
    try:
        return fetch_map(agent, limits).page_count * PAGE_SIZE
    except (exception.RpcError, exception.BufferMapError):
        return 0


def wait_until_filled(guest: DatabaseGuest) -> None:
    """Wait until its server has filled its pool by the volume's list.

    :raises TimeoutError: it has not in time.
    """

    def full() -> bool:
        status = guest.sql("SHOW STATUS LIKE 'Innodb_buffer_pool_load_status'")
        time.sleep(2)
        return "completed" in status

    wait_until(full, "the buffer pool is filled", _FILL_PATIENCE)


class WorkingGuest:
    """A database guest on the stage's first host, its load, ledger and probe at work."""

    def __init__(
        self, stage: "Stage", number: int, directory: Path, ends: contextlib.ExitStack
    ) -> None:
        """:param directory: for its files.
        :param ends: ends all of it.
        """
        shape, enter = stage.shape, ends.enter_context
        disk = create_volume(shape.release, shape.load, shape.pool_mb, directory / "volume.raw")
        address = guest_address(number)
        spec = DatabaseSpec(
            disk=disk,
            release=shape.release,
            ram_mb=shape.ram_mb,
            pool_mb=shape.pool_mb,
            layout="kept",
            options=LEAN[shape.release.flavour],
            address=address,
            extra=_COMPRESSION,
        )
        self.domain = enter(Domain(stage.hosts, spec, f"guest{number}"))
        self.domain.start(stage.hosts.a)
        wait_until_filled(self.guest)
        self.server = server = Server(host=address, clients=stage.network.clients)
        self.guest.run(admit(server))
        self.probe = enter(Probe(server, directory))
        self.ledger = enter(Ledger(server, directory))
        self.load = enter(
            Load(server, command(shape.load, server, shape.pool_mb, shape.rate), directory)
        )

    @property
    def guest(self) -> AttachedDatabase:
        """The guest, by its QEMU of this moment."""
        guest = self.domain.guest
        assert isinstance(guest, AttachedDatabase)
        return guest

    def content(self) -> Content:
        """What its memory has at this moment."""
        with self.guest.agent() as agent:
            mapped = mapped_bytes(agent, self.guest.spec.ram_bytes)
        return Content(self.used_bytes(), mapped)

    def used_bytes(self) -> int:
        """Bytes of the guest's pages that are not zero."""
        used = 0
        step = _STRIDE // PAGE_SIZE
        for pages in self.guest.ram_blocks.values():
            words = pages.view(np.uint64)
            for first in range(0, len(words), step):
                used += int(words[first : first + step].any(axis=1).sum())
        return used * PAGE_SIZE

    def stop_clients(self) -> None:
        """Let the clients finish; what they have noted stays."""
        for client in (self.load, self.ledger, self.probe):
            client.stop()


class Stage:
    """Two hosts with all that belongs to them, and guests at work. A context manager."""

    def __init__(
        self,
        shape: Shape,
        directory: Path,
        say: Callable[[str], None] = lambda text: None,
        guests: int = 1,
        **options: object,
    ) -> None:
        """:param directory: an empty one, for all files; not beneath /run.
        :param say: is told what goes on.
        :param options: of `MigrationServices`.
        """
        self.shape = shape
        self._ends = contextlib.ExitStack()
        enter = self._ends.enter_context
        try:
            say("Starting two hosts, their libvirt, the services of both, and a broker")
            #: What guests' volumes need: it ends after all guests.
            self.storage = enter(contextlib.ExitStack())
            self.hosts = enter(LibvirtHosts(directory))
            self.network = enter(GuestNetwork(self.hosts))
            self.services = enter(
                MigrationServices(self.hosts, directory, shape.compression, **options)
            )
            self.hosts.shape(shape.network)
            self.guests = []
            for number in range(guests):
                say(
                    f"Booting a guest of {shape.ram_mb} MiB; {shape.load} on a database that fills"
                    f" a pool of {shape.pool_mb} MiB"
                )
                own = directory / f"guest{number}"
                own.mkdir()
                self.guests.append(WorkingGuest(self, number, own, self._ends))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End all of it."""
        self._ends.close()
