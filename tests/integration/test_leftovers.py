# SPDX-License-Identifier: Apache-2.0
"""What an earlier migration has left at the destination's libvirt is waited for, not for ever."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import libvirt
from oslo_config import cfg

from nova_dmigrate import conf
from nova_dmigrate.migration import leftovers, service
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import MigrationRequest, Mode
from nova_dmigrate.migration.summary import MigrationSummary
from nova_dmigrate.rpc import broker
from tests import base
from tests.lab import GuestSpec, create_disk, processes
from tests.lab.domains import Domain
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.relays import wait_until

#: Of the guest's name and UUID, so that libvirt takes it for the guest.
LEFTOVER = """
<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory>
  <os><type>hvm</type></os></domain>
"""


class LeftoversTest(base.TestCase):
    """One guest serves all of these; it stays where a test has left it."""

    lab: ClassVar[contextlib.ExitStack]
    directory: ClassVar[Path]
    hosts: ClassVar[LibvirtHosts]
    domain: ClassVar[Domain]

    @classmethod
    def setUpClass(cls) -> None:
        if os.geteuid():
            base.require("only root can make the lab's hosts")
        super().setUpClass()
        cls.lab = contextlib.ExitStack()
        try:
            cls.directory = cls.lab.enter_context(processes.workspace())
            cls.hosts = cls.lab.enter_context(LibvirtHosts(cls.directory))
            spec = GuestSpec(create_disk(cls.directory / "disk.raw", 112), ram_mb=192, fill_mb=96)
            cls.domain = cls.lab.enter_context(Domain(cls.hosts, spec)).start(cls.hosts.a)
        except BaseException:
            cls.lab.close()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls.lab.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.hosts.shape, None)
        self.source = self.domain.host
        self.destination = self.hosts.other(self.source)

    def migrate(
        self,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> MigrationSummary:
        """Have the guest migrated in the ordinary way; how that went.

        :param options: of the request.
        """
        config = cfg.ConfigOpts()
        conf.register_opts(config)
        config([], project="nova-dmigrate", default_config_files=[])
        broker.set_defaults(config)
        # Nobody is asked there: the relays are not wanted
        config.set_override("transport_url", "rabbit://127.0.0.1:1")
        config.set_override("history_directory", str(self.directory / "history"), "migration")
        request = MigrationRequest(
            self.domain.name,
            self.destination.peer_uri,
            self.source.uri,
            mode=Mode.ORDINARY,
            source_host=self.source.name,
            destination_host=self.destination.name,
            **options,
        )
        return service.migrate(request, config, on_progress, cancelled)

    def occupy(self) -> libvirt.virDomain:
        """The destination has the domain; it goes with the test."""
        connection = self.destination.connect()
        self.addCleanup(connection.close)
        xml = LEFTOVER.format(name=self.domain.name, uuid=self.domain.uuid)
        leftover = connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
        self.addCleanup(self.remove, leftover)
        return leftover

    def remove(self, leftover: libvirt.virDomain) -> None:
        if self.domain.host is not self.destination:  # else it is the guest by now
            with contextlib.suppress(libvirt.libvirtError):
                leftover.destroy()

    def assert_stays(self, summary: MigrationSummary, state: str) -> None:
        self.assertEqual(state, summary.state, summary)
        self.assertEqual("pong", self.domain.guest.command("ping"))

    def test_a_migration_waits_until_the_destination_has_cleaned_up(self) -> None:
        leftover = self.occupy()
        waited: list[str] = []

        def on_progress(progress: Progress) -> None:
            if progress.phase == "waiting":
                waited.append(progress.phase)
                if len(waited) == 2:
                    leftover.destroy()

        summary = self.migrate(on_progress)
        self.assertEqual("completed", summary.state, summary)
        self.assertGreaterEqual(len(waited), 2)
        self.domain.arrived(self.destination)
        self.assertEqual("pong", self.domain.guest.command("ping"))

    def test_and_says_so_when_it_has_not_in_time(self) -> None:
        self.occupy()
        with mock.patch.object(leftovers, "PATIENCE", 2):
            summary = self.migrate()
        self.assert_stays(summary, "failed")
        self.assertIn("what an earlier migration has left", str(summary.error))

    def test_a_cancel_is_heard_meanwhile(self) -> None:
        self.occupy()
        cancelled = threading.Event()

        def on_progress(progress: Progress) -> None:
            if progress.phase == "waiting":
                cancelled.set()

        self.assert_stays(self.migrate(on_progress, cancelled), "cancelled")

    def test_one_that_libvirt_cannot_be_asked_for_has_failed(self) -> None:
        summary = self.migrate(network_bandwidth=1 << 90)
        self.assert_stays(summary, "failed")
        self.assertIn("OverflowError", str(summary.error))

    def test_a_migration_completes_after_one_whose_destination_lost_its_libvirtd(self) -> None:
        self.hosts.shape(4)
        first = self.domain.begin_migration()
        wait_until(lambda: first.statistics().get("memory_processed", 0) > 1 << 20, "it has begun")
        self.destination.kill_libvirtd()
        self.assertRaises(libvirt.libvirtError, first.wait)
        self.hosts.shape(None)
        self.destination.start_libvirtd()
        summary = self.migrate()
        self.assertEqual("completed", summary.state, f"{summary}\n{self.destination.last_words()}")
        self.domain.arrived(self.destination)
        self.assertEqual("pong", self.domain.guest.command("ping"))
