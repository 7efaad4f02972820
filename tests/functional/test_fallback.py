# SPDX-License-Identifier: Apache-2.0
"""Each reason for which a preferred migration is the ordinary one, with the stable code of it."""

from collections.abc import Callable
from typing import Any

import fixtures

from tests.functional import base


def changed(host: str, **fields: Any) -> Callable[[base.MigrationTest], None]:
    """A host service says something else of its host."""

    def change(test: base.MigrationTest) -> None:
        test.hosts[host].hello_changes = fields

    return change


def relay(host: str, state: str, message: str = "") -> Callable[[base.MigrationTest], None]:
    """The relay of a host is so."""

    def change(test: base.MigrationTest) -> None:
        test.hosts[host].state, test.hosts[host].message = state, message

    return change


#: What is different, and the code that it has to give.
ROWS: dict[str, tuple[Callable[[base.MigrationTest], None], str]] = {
    "source_draining": (changed("src", draining=True), "host-draining"),
    "destination_draining": (changed("dest", draining=True), "host-draining"),
    "confined": (changed("dest", obstacle="SELinux"), "confined"),
    "old_libvirt": (changed("dest", libvirt_version=6_007_001), "old-libvirt"),
    "tls_differs": (changed("dest", tls=True), "tls-differs"),
    "wire_differs": (changed("dest", wire_versions=(2,)), "wire-differs"),
    "sockets_differ": (changed("dest", socket_directory="/elsewhere"), "sockets-differ"),
    "no_driver": (changed("dest", drivers=("rbd",)), "no-volumes"),
    "no_room": (relay("dest", "queued"), "no-room"),
    "destination_relay_fails": (relay("dest", "failed", "no port"), "relay-failed"),
    "source_relay_fails": (relay("src", "failed", "no port"), "relay-failed"),
}


class OrdinaryTest(base.MigrationTest):
    """Migrations that are ordinary ones in spite of the policy."""

    def assert_ordinary(self, server: Any, code: str) -> None:
        self.migrate(server)
        event = self.event(server)
        self._wait_for_migration_status(server, ["completed"])
        self.assertEqual("dest", self.host_of(server))
        (call,) = self.calls
        self.assertNotIn("migrate_uri", call)
        self.assertIn("in the ordinary way, because", event["details"])
        (summary,) = self.summaries()
        self.assertEqual(
            ("ordinary", "completed", code), (summary.mode, summary.state, summary.fallback_reason)
        )
        for host in self.hosts.values():
            self.assertEqual({order.session_id for order in host.orders}, set(host.closed))


class FallbackTest(OrdinaryTest):
    """One test for each row."""


def _test(change: Callable[[base.MigrationTest], None], code: str) -> Callable[[Any], None]:
    def test(self: OrdinaryTest) -> None:
        change(self)
        self.assert_ordinary(self.make_server(), code)

    return test


for _name, _row in ROWS.items():
    setattr(FallbackTest, f"test_{_name}", _test(*_row))


class NoServiceTest(OrdinaryTest):
    SERVICES = ("src",)
    PATIENCE = 3

    def test_a_destination_without_us(self):
        self.assert_ordinary(self.make_server(), "host-unreachable")


class NoAgentTest(OrdinaryTest):
    AGENT = False
    PATIENCE = 3

    def test_a_guest_without_an_agent(self):
        self.assert_ordinary(self.make_server(), "agent-unreachable")

    def test_a_port_whose_agent_does_not_answer(self):
        self.with_port = True
        self.assert_ordinary(self.make_server(), "agent-unreachable")


class ConfigurationTest(OrdinaryTest):
    def test_a_configuration_that_cannot_be_read(self):
        self.flags(config_file=["/nowhere.conf"], group="dmigrate")
        server = self.make_server()
        self.migrate(server)
        event = self.event(server)
        self.assertIn("in the ordinary way, because", event["details"])
        self.assertIn("/nowhere.conf", event["details"])
        self._wait_for_migration_status(server, ["completed"])
        self.assertNotIn("migrate_uri", self.calls[0])

    def test_an_error_that_nobody_expected(self):
        server = self.make_server()
        self.useFixture(
            fixtures.MockPatch(
                "nova_dmigrate.virt.volumes.of_destination", side_effect=ZeroDivisionError("oops")
            )
        )
        self.assert_ordinary(server, "unexpected")
