# SPDX-License-Identifier: Apache-2.0
"""A guest at work on one of two hosts, that is migrated again and again: what must hold each time.

with small_scene(directory) as scene:
    moved = scene.migrate()
    trouble = scene.trouble(moved)          # sentences; none if all is well
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt

from nova_dmigrate import exception
from nova_dmigrate.migration.summary import COMPLETED, MigrationSummary
from tests.lab.attached import AttachedDatabase
from tests.lab.database_guest import DatabaseSpec, create_volume
from tests.lab.database_image import MARIADB, Release
from tests.lab.demo.clients import ClientError, Server
from tests.lab.demo.ledger import Ledger
from tests.lab.demo.services import MigrationServices
from tests.lab.demo.stage import Stage, admit
from tests.lab.domains import Domain
from tests.lab.guest import GuestError
from tests.lab.guest_network import GuestNetwork, guest_address
from tests.lab.libvirt_host import LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import inmates

#: Options with which what is left of an interrupted migration is gone in seconds, not in a minute.
HASTY: dict[str, Any] = {"lease": 15, "prepare_time": 2}
#: Seconds for leases to end, and for libvirt to clean up.
_PATIENCE = 60.0
#: Of a switchover, at most, if nothing else is asked for.
DOWNTIME_MS = 1000
_SETTINGS = (
    "SELECT @@innodb_max_dirty_pages_pct, @@innodb_max_dirty_pages_pct_lwm,"
    " @@innodb_io_capacity, @@innodb_io_capacity_max"
)
#: One row changes in a second, beside those of the ledger.
_WORK = "UPDATE lab.pace SET changes = 1; SET GLOBAL event_scheduler = ON"


@dataclasses.dataclass
class Scene:
    """``server``: the guest's, as its clients reach it. ``work``: what else the server is told when
    it has been started anew, in SQL. ``patience``: seconds after which a migration is cancelled.
    """

    hosts: LibvirtHosts
    services: MigrationServices
    domain: Domain
    server: Server
    ledger: Ledger
    work: str = "DO 0"
    patience: float = 400.0

    def __post_init__(self) -> None:
        # Not before each migration: a request that was late may have prepared the server by then
        self._before = self._settings()

    @classmethod
    def of(cls, stage: Stage) -> "Scene":
        """That of the first guest of a stage."""
        guest = stage.guests[0]
        return cls(stage.hosts, stage.services, guest.domain, guest.server, guest.ledger)

    @property
    def guest(self) -> AttachedDatabase:
        """The guest, by its QEMU of this moment."""
        guest = self.domain.guest
        assert isinstance(guest, AttachedDatabase)
        return guest

    @property
    def revival(self) -> str:
        """The command in the guest that starts its server as it was."""
        return f'start_server && {admit(self.server)} && client -e "{self.work}"'

    def migrate(
        self,
        cancelled: threading.Event | None = None,
        max_downtime_ms: int = DOWNTIME_MS,
        **options: Any,
    ) -> MigrationSummary:
        """Have the guest migrated to the other host, as `MigrationServices.migrate` does."""
        source = self.domain.host
        cancelled = cancelled or threading.Event()
        giving_up = threading.Timer(self.patience, cancelled.set)
        giving_up.start()
        try:
            return self.services.migrate(
                *(self.domain.name, source, self.hosts.other(source)),
                max_downtime_ms=max_downtime_ms,
                cancelled=cancelled,
                **options,
            )
        finally:
            giving_up.cancel()

    def trouble(self, summary: MigrationSummary) -> list[str]:
        """What is wrong after a migration: the guest is not on one side alone, its database lacks
        something, or something is left behind. The domain is where it is, then.
        """
        if summary.state == COMPLETED:
            expected = self.hosts.other(self.domain.host)
        else:
            expected = self.domain.host
        wanted = [f"QEMU on {expected.name}", f"domain on {expected.name}"]
        found = _until(wanted, self._whereabouts)
        if found != wanted:
            return [f"the guest should be on {expected.name}: there is {', '.join(found)}"]
        try:
            self.domain.arrived(expected)
            return [
                *self._not_answering(),
                *self._changed(),
                *_differing("ledger", "whole", self._ledger()),
                *_differing("left behind", [], _until([], self._left_behind)),
            ]
        except (GuestError, ClientError) as error:
            return [str(error)]

    def _whereabouts(self) -> list[str]:
        """Where a QEMU of the guest is, or libvirt knows the domain, running or not."""
        found = []
        for host in (self.hosts.a, self.hosts.b):
            try:
                with contextlib.closing(host.connect()) as connection:
                    names = [each.name() for each in connection.listAllDomains()]
            except libvirt.libvirtError as error:
                return [str(error)]
            found += [f"domain on {host.name}" for name in names if name == self.domain.name]
            found += [f"QEMU on {host.name}" for _ in self._processes(host, "guest=")]
        return sorted(found)

    def _not_answering(self) -> list[str]:
        """That the database commits, and the agent answers, once more."""
        before = self.ledger.acknowledged()
        more = _until(True, lambda: self.ledger.acknowledged() > before)
        try:
            with self.guest.agent() as agent:
                agent.ping()
        except exception.DMigrateError as error:
            return [str(error)]
        return [] if more is True else ["the database commits nothing any more"]

    def _changed(self) -> list[str]:
        """That the server's settings are not restored."""
        return _differing("settings", self._before, _until(self._before, self._settings_or_none))

    def _settings(self) -> str:
        """What a preparation changes, as the server has it."""
        return self.guest.sql(_SETTINGS)

    def _settings_or_none(self) -> str | None:
        try:
            return self._settings()
        except GuestError:
            return None

    def _ledger(self) -> str:
        found = self.ledger.check()
        return "whole" if found.ok else str(found)

    def _left_behind(self) -> list[str]:
        left = [str(path) for path in self.services.left_behind()]
        for host in (self.hosts.a, self.hosts.b):
            for pid in self.relays(host):
                left.append(f"relay {pid} of {host.name}")
        return left

    def relays(self, host: LibvirtHost) -> list[int]:
        """The processes of relays on a host."""
        return self._processes(host, "nova_dmigrate.cmd.relay")

    def _processes(self, host: LibvirtHost, argument: str) -> list[int]:
        return [
            pid
            for pid, arguments in inmates(host.namespace).items()
            if any(each.startswith(argument) for each in arguments)
        ]


@contextlib.contextmanager
def small_scene(directory: Path, release: Release = MARIADB) -> Iterator[Scene]:
    """One with a guest as small as can be, whose server changes a row now and then by itself.

    :param directory: for all files; not beneath /run.
    """
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        hosts = enter(LibvirtHosts(directory))
        network = enter(GuestNetwork(hosts))
        services = enter(MigrationServices(hosts, directory, **HASTY))
        server = Server(host=guest_address(0), clients=network.clients)
        disk = create_volume(directory / "volume.raw")
        spec = DatabaseSpec(disk=disk, release=release, address=server.host)
        domain = enter(Domain(hosts, spec)).start(hosts.a)
        guest = domain.guest
        assert isinstance(guest, AttachedDatabase)
        user = f"'{server.user}'@'%'"
        guest.sql(
            f"CREATE USER {user} IDENTIFIED BY '{server.password}'; GRANT ALL ON *.* TO {user};"
            + _WORK
        )
        guest.run(admit(server))
        ledger = enter(Ledger(server, directory))
        yield Scene(hosts, services, domain, server, ledger, _WORK, 150)


def _until(wanted: Any, look: Any) -> Any:
    """What there is once that is as it should be, or after a time that should have been enough."""
    end = time.monotonic() + _PATIENCE
    while (found := look()) != wanted and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _differing(what: str, wanted: Any, found: Any) -> list[str]:
    return [] if wanted == found else [f"{what}: {found}"]
