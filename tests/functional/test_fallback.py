# SPDX-License-Identifier: Apache-2.0
"""Each reason for which a preferred migration is the ordinary one, or reads no volume, with the
stable code of it.
"""

import inspect
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fixtures
import testtools
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt.driver import CONF

from nova_dmigrate.migration.fallback import Reason
from nova_dmigrate.rpc import host_messages
from tests.functional import base, services
from tests.functional.changes import (
    Change,
    agent_refuses,
    broken,
    changed,
    configured,
    device_passed_through,
    monitor_fails,
    nothing,
    refused,
    relay,
    state_directory_is_a_file,
    unreadable,
)

#: Reasons that there are not in Nova's way, and why.
NOT_HERE = {
    "asked": "who does not want relays has another policy",
    "no-agent-port": "where there is no port the agent is asked over the broker, or there is none",
}
Test = Callable[[Any], None]


def brings_about(code: str) -> Callable[[Test], Test]:
    """For a test that has a migration with the reason of this code."""

    def note(test: Test) -> Test:
        vars(test)["code"] = code
        return test

    return note


#: What is different, and the code that it has to give.
ROWS: dict[str, tuple[Change, str]] = {
    "source_draining": (changed("src", draining=True), "host-draining"),
    "destination_draining": (changed("dest", draining=True), "host-draining"),
    "draining_by_then": (refused("dest", "open", host_messages.DRAINING), "host-draining"),
    "draining_in_the_queue": (relay("dest", "failed", host_messages.STOPPING), "host-draining"),
    "refused": (refused("src", "open", "volume"), "host-refused"),
    "confined": (changed("dest", obstacle="SELinux"), "confined"),
    "old_libvirt": (changed("dest", libvirt_version=6_007_001), "old-libvirt"),
    "tls_differs": (changed("dest", tls=True), "tls-differs"),
    "wire_differs": (changed("dest", wire_versions=(2,)), "wire-differs"),
    "sockets_differ": (changed("dest", socket_directory="/elsewhere"), "sockets-differ"),
    "no_driver": (changed("dest", drivers=("rbd",)), "no-volumes"),
    "no_volume_can_be_opened": (unreadable("no key"), "volumes-unreadable"),
    "no_room": (relay("dest", "queued"), "no-room"),
    "no_room_says_the_host": (relay("dest", "failed", host_messages.NO_ROOM), "no-room"),
    "destination_relay_fails": (relay("dest", "failed", "no port"), "relay-failed"),
    "source_relay_fails": (relay("src", "failed", "no port"), "relay-failed"),
    "device_passed_through": (device_passed_through, "host-devices"),
    "no_way_to_an_agent": (configured("migration", agent_url=""), "no-agent"),
    "agent_refuses": (agent_refuses, "agent-refused"),
    "monitor_fails": (monitor_fails, "memory-layout"),
    "no_place_for_the_map": (state_directory_is_a_file, "no-state"),
    "no_such_broker": (configured("migration", agent_url="pigeon://"), "configuration"),
    "error_that_nobody_expected": (broken, "unexpected"),
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
            self.assertLessEqual({order.session_id for order in host.orders}, set(host.closed))


class FallbackTest(OrdinaryTest):
    """One test for each row."""


def _test(change: Change, code: str) -> Test:
    @brings_about(code)
    def test(self: OrdinaryTest) -> None:
        server = self.make_server()
        change(self)
        self.assert_ordinary(server, code)

    return test


for _name, _row in ROWS.items():
    setattr(FallbackTest, f"test_{_name}", _test(*_row))


class NoServiceTest(OrdinaryTest):
    SERVICES = ("src",)
    PATIENCE = 3

    @brings_about("host-unreachable")
    def test_a_destination_without_us(self):
        self.assert_ordinary(self.make_server(), "host-unreachable")


class NoAgentTest(OrdinaryTest):
    AGENT = False
    PATIENCE = 3

    @brings_about("agent-unreachable")
    def test_a_guest_without_an_agent(self):
        self.assert_ordinary(self.make_server(), "agent-unreachable")

    def test_a_port_whose_agent_does_not_answer(self):
        self.devices.append(base.PORT)
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


class EncryptedTest(OrdinaryTest):
    def setUp(self):
        # Read when a compute starts
        self.flags(live_migration_with_native_tls=True, group="libvirt")
        super().setUp()

    @brings_about("native-tls")
    def test_it_is_never_less_than_without_us(self):
        self.assert_ordinary(self.make_server(), "native-tls")
        self.assertNotEqual(0, self.calls[0]["flags"] & fakelibvirt.VIR_MIGRATE_TLS)
        self.assertEqual([], self.orders)


class TunnelledTest(OrdinaryTest):
    def setUp(self):
        self.flags(live_migration_tunnelled=True, group="libvirt")
        super().setUp()

    @brings_about("tunnelled")
    def test_what_libvirt_tunnels_no_relay_would_see(self):
        self.assert_ordinary(self.make_server(), "tunnelled")
        self.assertNotEqual(0, self.calls[0]["flags"] & fakelibvirt.VIR_MIGRATE_TUNNELLED)
        self.assertEqual([], self.orders)


class BlockMigrationTest(OrdinaryTest):
    def setUp(self):
        super().setUp()
        # In one process both computes have one directory
        for name, result in (
            ("driver.LibvirtDriver._check_shared_storage_test_file", False),
            ("driver.LibvirtDriver._assert_dest_node_has_enough_disk", None),
            ("driver.LibvirtDriver._create_images_and_backing", None),
            ("utils.get_instance_path_at_destination", str(self.directory / "there")),
        ):
            self.useFixture(fixtures.MockPatch(f"nova.virt.libvirt.{name}", return_value=result))

    @brings_about("block-migration")
    def test_local_disks_are_copied_along(self):
        server = self.make_server()
        directory = Path(CONF.instances_path) / server["id"]
        directory.mkdir(exist_ok=True)
        for name in ("disk", "disk.eph0"):
            (directory / name).touch()
        self.assert_ordinary(server, "block-migration")
        self.assertEqual(["vda", "vdb"], self.calls[0]["migrate_disks"])
        self.assertEqual([], self.orders)


# The map, for which a preferred migration does not wait


def agent_has_none(test: base.MigrationTest) -> None:
    test.agent.outcome = "failed"


def all_is_sent(test: base.MigrationTest) -> None:
    test.agent.outcome = "building"
    test.hosts["src"].progress["passes"] = 2


#: What is different before; what becomes of the map while libvirt migrates; the code; what the log
#: tells of it.
MAP_ROWS: dict[str, tuple[Change, Change, str, str]] = {
    "agent_has_none": (nothing, agent_has_none, "agent-refused", "no database server runs"),
    "it_is_too_large": (
        configured("buffer_map", max_pages=1),
        nothing,
        "bad-map",
        "the agent's buffer map is refused",
    ),
    "it_has_little": (
        configured("migration", min_mapped_share=1),
        nothing,
        "small-map",
        "could be read from volumes",
    ),
    "it_comes_late": (nothing, all_is_sent, "late-map", "its map is not wanted any more"),
    "the_relay_refuses_it": (
        refused("src", "use_map", host_messages.LARGE_MAP),
        nothing,
        "map-refused",
        "it does not want to",
    ),
}


class MapTest(base.MigrationTest):
    """Through the relays, and all of memory by the network. One test for each row."""


def _map_test(before: Change, meanwhile: Change, code: str, told: str) -> Test:
    @brings_about(code)
    def test(self: base.MigrationTest) -> None:
        def during() -> None:
            self.agent.outcome = "ready"
            meanwhile(self)
            self.wait_for(lambda: told in self.stdlog.logger.output)

        server = self.make_server()
        self.agent.outcome = "building"
        self.hosts["src"].progress = dict(services.PROGRESS, map="none", mapped_pages=0)
        before(self)
        self.during = during
        self.move(server)
        self.event(server)
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        (summary,) = self.summaries()
        self.assertEqual(
            ("dmigrate", "completed", code), (summary.mode, summary.state, summary.fallback_reason)
        )

    return test


for _name, _map_row in MAP_ROWS.items():
    setattr(MapTest, f"test_{_name}", _map_test(*_map_row))


class EachReasonTest(testtools.TestCase):
    def test_each_reason_is_brought_about(self):
        classes = inspect.getmembers(
            sys.modules[__name__],
            lambda each: inspect.isclass(each) and issubclass(each, unittest.TestCase),
        )
        found = {
            test.code
            for _, cls in classes
            for test in vars(cls).values()
            if inspect.isfunction(test) and hasattr(test, "code")
        }
        self.assertEqual({reason.code for reason in Reason}, found | set(NOT_HERE))
        self.assertEqual(set(), found & set(NOT_HERE))
