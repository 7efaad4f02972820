# SPDX-License-Identifier: Apache-2.0
"""A guest's clients keep their connections to it when it moves."""

import contextlib
import time

import libvirt

from tests import base
from tests.lab import database_guest, database_image
from tests.lab.database_guest import DatabaseSpec
from tests.lab.demo.clients import Server
from tests.lab.demo.ledger import Ledger
from tests.lab.demo.probe import Probe
from tests.lab.domains import FLAGS, Domain
from tests.lab.guest_network import GuestNetwork, guest_address
from tests.lab.libvirt_hosts import LibvirtHosts
from tests.lab.processes import workspace
from tests.lab.relays import wait_until


class TestGuestNetwork(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(database_image.unavailable())
        self._ends = contextlib.ExitStack()
        self.addCleanup(self._ends.close)
        self.directory = self._ends.enter_context(workspace())

    def test_a_connection_lives_on_when_its_server_moves_there_and_back(self) -> None:
        enter = self._ends.enter_context
        address = guest_address(7)
        disk = database_guest.create_volume(self.directory / "volume.raw")
        hosts = enter(LibvirtHosts(self.directory))
        network = enter(GuestNetwork(hosts))
        spec = DatabaseSpec(disk=disk, address=address)
        domain = enter(Domain(hosts, spec)).start(hosts.a)
        domain.guest.sql(
            "CREATE USER 'load'@'%' IDENTIFIED BY 'load'; GRANT ALL ON *.* TO 'load'@'%'"
        )
        server = Server(host=address, clients=network.clients)
        probe = enter(Probe(server, self.directory))
        ledger = enter(Ledger(server, self.directory))
        connections = self.connections(domain)
        self.assertEqual(2, len(connections))
        for flags in (FLAGS, FLAGS | libvirt.VIR_MIGRATE_POSTCOPY):
            begin = time.monotonic()
            migration = domain.begin_migration(flags=flags)
            if flags & libvirt.VIR_MIGRATE_POSTCOPY:
                migration.start_post_copy()
            migration.wait()
            moved = time.monotonic()
            count = len(probe.answers())
            wait_until(lambda count=count: len(probe.answers()) > count, "it answers there")
            self.assertGreater(probe.silence(begin, moved).downtime, 0)
        # The same connections, by the server's own count
        self.assertEqual(connections, self.connections(domain))
        probe.check_alive()
        ledger.stop()
        self.assertTrue(ledger.check().ok)

    def connections(self, domain: Domain) -> list[str]:
        """The server's numbers of its connections with clients in the network."""
        listed = domain.guest.sql(
            "SELECT id FROM information_schema.processlist WHERE user = 'load' ORDER BY id"
        )
        return listed.split()

    def test_nothing_is_left_of_it(self) -> None:
        with LibvirtHosts(self.directory) as hosts:
            with GuestNetwork(hosts) as network:
                clients = network.clients
                clients.popen(["sleep", "600"])
                reached = clients.run(["ip", "-br", "link"]).stdout
                self.assertIn("guests", reached)
            self.assertNotIn("guests", hosts.a.run(["ip", "-br", "link"]).stdout)
            self.assertNotIn("uplink", hosts.b.run(["ip", "-br", "link"]).stdout)
            with self.assertRaises(Exception):  # noqa: B017 - whatever: there is no such namespace
                clients.run(["true"])
            # Again, with the same names on the hosts
            GuestNetwork(hosts).close()
