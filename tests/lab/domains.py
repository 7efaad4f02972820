# SPDX-License-Identifier: Apache-2.0
"""Guests of the lab as libvirt domains, and their migrations from host to host.

with LibvirtHosts(directory) as hosts, Domain(hosts, GuestSpec(disk=disk)) as domain:
    domain.start(hosts.a)
    domain.migrate()                                # to the other host, pre-copy over TCP
    migration = domain.begin_migration(uri="unix:/run/guests/migration")
    domain.set_max_downtime(500)
    statistics = migration.wait()
    domain.guest.command("sum")                     # the same program, by its new QEMU
"""

import contextlib
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import libvirt

from nova_dmigrate.rpc import channel
from tests.lab.attached import AttachedDatabase, AttachedGuest
from tests.lab.database_guest import BOOT_PATIENCE, SERIAL, DatabaseSpec
from tests.lab.database_image import database_image, make_initramfs
from tests.lab.domain_xml import Disk, Hardware, domain_xml
from tests.lab.guest import GuestSpec
from tests.lab.guest_network import guest_mac
from tests.lab.image import guest_image
from tests.lab.libvirt_host import GUESTS, LibvirtHost
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.loop_device import LoopDevice
from tests.lab.processes import drop_workspace, make_workspace

#: As Nova migrates.
FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
)
#: Seconds for a migration that nobody has limited otherwise.
PATIENCE = 180.0

Statistics = dict[str, Any]


class Domain:
    """One guest, on one host at a time. A context manager; its end removes it from all hosts.

    ``host``: where it is. ``guest``: its QEMU there. ``volume``: its data disk, the same on both
    hosts (a block device, or a file of which libvirt knows that nobody writes to it).
    """

    host: LibvirtHost
    guest: AttachedGuest
    volume: Path

    def __init__(self, hosts: LibvirtHosts, spec: GuestSpec, name: str = "guest") -> None:
        """:param name: on both hosts; another domain's must be another."""
        self.hosts = hosts
        self.spec = spec
        self.name = name
        self.uuid = str(uuid.uuid4())
        self._ends = contextlib.ExitStack()
        self._connections: dict[LibvirtHost, libvirt.virConnect] = {}
        try:
            self._directory = make_workspace(hosts.directory)
            self._ends.callback(drop_workspace, self._directory)
            self.xml = domain_xml(name, self.uuid, spec, self._hardware())
            for host in (hosts.a, hosts.b):
                self._place(host)
        except BaseException:
            self._ends.close()
            raise

    def __enter__(self) -> "Domain":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Destroy and undefine it wherever it is."""
        if hasattr(self, "guest"):
            self.guest.detach()
        for host in (self.hosts.a, self.hosts.b):
            with contextlib.suppress(libvirt.libvirtError):
                domain = self.on(host)
                if domain.isActive():
                    domain.destroy()
                with contextlib.suppress(libvirt.libvirtError):
                    domain.undefine()
        for connection in self._connections.values():
            _close(connection)
        self._ends.close()

    def start(self, host: LibvirtHost, timeout: float = 120) -> "Domain":
        """Define and boot it, and wait until its program is ready. Returns the domain.

        :raises GuestError: it did not become ready in time.
        :raises libvirt.libvirtError: libvirt did not start it.
        """
        self._connection(host).defineXML(self.xml).create()
        self.arrived(host)
        database = isinstance(self.spec, DatabaseSpec)
        self.guest.wait_ready(max(timeout, BOOT_PATIENCE) if database else timeout)
        return self

    def on(self, host: LibvirtHost) -> libvirt.virDomain:
        """libvirt's handle of it on a host.

        :raises libvirt.libvirtError: it is not there.
        """
        return self._connection(host).lookupByName(self.name)

    def arrived(self, host: LibvirtHost) -> None:
        """Note that it is on another host now, and connect to its QEMU there.

        :raises GuestError: it does not run there.
        """
        if hasattr(self, "guest"):
            self.guest.detach()
        self.host = host
        kind = AttachedDatabase if isinstance(self.spec, DatabaseSpec) else AttachedGuest
        self.guest = kind(self.spec, host, self.name, lambda: self.on(host))

    # -- migration

    def begin_migration(
        self,
        *,
        flags: int = FLAGS,
        uri: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> "DomainMigration":
        """Let libvirt migrate it to the other host.

        :param uri: libvirt's migration URI, ``unix:PATH`` or ``tcp://ADDRESS:PORT``; libvirt's own
            choice, TCP over the migration network, if None.
        :param parameters: more of VIR_MIGRATE_PARAM_*.
        """
        values = dict(parameters or {})
        if uri is not None:
            values[libvirt.VIR_MIGRATE_PARAM_URI] = uri
        return DomainMigration(self, self.hosts.other(self.host), values, flags)

    def migrate(self, timeout: float = PATIENCE, **options: Any) -> Statistics:
        """`begin_migration` with its options, and wait; libvirt's statistics of it.

        :raises libvirt.libvirtError: it failed; the guest is where it was.
        """
        return self.begin_migration(**options).wait(timeout)

    def set_max_downtime(self, milliseconds: int) -> None:
        """QEMU switches over when it believes that the rest takes no longer."""
        self.on(self.host).migrateSetMaxDowntime(milliseconds, 0)

    # -- parts

    def _connection(self, host: LibvirtHost) -> libvirt.virConnect:
        """One that works, also after libvirtd was started again."""
        known = self._connections.get(host)
        if known is not None:
            try:
                known.getLibVersion()
                return known
            except libvirt.libvirtError:
                _close(known)
        self._connections[host] = connection = host.connect()
        return connection

    def _place(self, host: LibvirtHost) -> None:
        """Make the directory of its sockets on a host, and what tests look for in it."""
        directory = host.outside(GUESTS / self.name)
        directory.mkdir()
        self._ends.callback(shutil.rmtree, directory, ignore_errors=True)
        mailbox = self._directory / "mailbox.raw"
        if mailbox.exists():
            (directory / mailbox.name).symlink_to(mailbox)

    def _hardware(self) -> Hardware:
        if isinstance(self.spec, DatabaseSpec):
            release = self.spec.release
            made = database_image(release)
            self.volume = self._device(self.spec.disk)
            return Hardware(
                made.kernel,
                make_initramfs(release, made, self._directory / "initramfs.cpio"),
                (
                    Disk(made.root, read_only=True),
                    Disk(self.volume, serial=SERIAL, limits=dict(self.spec.limits)),
                ),
                channels={channel.PORT_NAME: "agent", "lab.command": "command"},
                mac=None if self.spec.address is None else guest_mac(self.spec.address),
            )
        image = guest_image()
        self.volume = self.spec.disk
        mailbox = self._directory / "mailbox.raw"
        with open(mailbox, "wb") as file:
            file.truncate(self.spec.mailbox_bytes)
        return Hardware(
            image.kernel,
            image.initramfs,
            (Disk(self.volume, read_only=True), Disk(self._device(mailbox))),
            serials=("command", "beat"),
        )

    def _device(self, file: Path) -> Path:
        return self._ends.enter_context(LoopDevice(file)).path


class DomainMigration:
    """A migration on its way. libvirt's call blocks, so it has a thread.

    And a connection: without an event loop, other calls of one that a thread waits on may be sent
    only when that thread has its answer, which for `abort` is too late.
    """

    def __init__(
        self, domain: Domain, destination: LibvirtHost, parameters: dict[str, Any], flags: int
    ) -> None:
        self.domain = domain
        self.destination = destination
        self._source = domain.on(domain.host)
        self._connection = domain.host.connect()
        self._error: libvirt.libvirtError | None = None
        self._thread = threading.Thread(
            target=self._run, args=(parameters, flags), name="migration", daemon=True
        )
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def statistics(self) -> Statistics:
        """libvirt's of the job on the source now; empty before and after."""
        try:
            return dict(self._source.jobStats())
        except libvirt.libvirtError:
            return {}

    def start_post_copy(self, timeout: float = PATIENCE) -> None:
        """Switch over as soon as QEMU can; the migration's flags must have VIR_MIGRATE_POSTCOPY.

        :raises libvirt.libvirtError: QEMU cannot, or the migration has ended.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._source.migrateStartPostCopy()
                return
            except libvirt.libvirtError:
                # Not before the stream has begun
                if not self.running or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def abort(self) -> None:
        """Let libvirt give it up; `wait` raises then."""
        self._source.abortJob()

    def wait(self, timeout: float = PATIENCE) -> Statistics:
        """Wait for its end; libvirt's statistics, with times in ms.

        :raises libvirt.libvirtError: it failed; the guest is where it was.
        :raises TimeoutError: it has not ended.
        """
        self._thread.join(timeout)
        if self.running:
            raise TimeoutError(f"the migration is not over: {self.statistics()}")
        if self._error is not None:
            raise self._error
        self.domain.arrived(self.destination)
        completed = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
        return dict(self.domain.on(self.destination).jobStats(completed))

    def _run(self, parameters: dict[str, Any], flags: int) -> None:
        try:
            source = self._connection.lookupByName(self.domain.name)
            source.migrateToURI3(self.destination.peer_uri, parameters, flags)
        except libvirt.libvirtError as error:
            self._error = error
        finally:
            _close(self._connection)


def _close(connection: libvirt.virConnect) -> None:
    # The libvirtd may have been killed.
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()
