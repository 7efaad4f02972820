# SPDX-License-Identifier: Apache-2.0
"""The agent in a real guest, asked by the host over a virtio-serial port.

What the guest's map claims is checked from outside: QEMU is stopped, and each mapped page of the
guest's memory is compared with its block of the volume, of which the guest alone knows the
partition table, the logical volumes and the file system.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

from nova_dmigrate.rpc import messages
from tests.guests import guests
from tests.guests.guests import HEAVIER, LIGHT
from tests.lab import database_image
from tests.lab.guest import GuestError
from tests.lab.relays import wait_until

ROOT = Path(__file__).parents[2]


class LayoutTests(guests.DatabaseGuestTestCase):
    """What holds on every layout."""

    def test_the_agent_describes_its_guest_over_the_port(self) -> None:
        client = self.agent()
        self.assertEqual(messages.VERSION, client.ping().version)
        description = client.describe()
        (server,) = description.servers
        self.assertEqual(self.guest.spec.release.flavour, server.flavour)
        self.assertGreater(server.filled_share, 0.4)
        self.assertNotIn("problem", [finding.severity for finding in description.findings])
        self.assertTrue(client.health().servers[0].healthy)

    def test_the_port_has_the_driver_that_the_unit_allows(self) -> None:
        unit = (ROOT / "etc/systemd/nova-dmigrate-agent.service").read_text()
        (allowed,) = re.findall(r"(?m)^DeviceAllow=char-(\S+) rw$", unit)
        majors = self.guest.run(
            f"sed -n 's/^ *\\([0-9]*\\) {allowed}$/\\1/p' /proc/devices"
        ).split()
        port = self.guest.run("stat -L -c %t /dev/virtio-ports/org.openstack.dmigrate.0")
        self.assertIn(int(port, 16), [int(each) for each in majors])

    def test_mapped_pages_equal_the_volume_without_a_flush(self) -> None:
        with self.work(HEAVIER):
            self.assertGreaterEqual(self.map_and_compare(self.agent()), 0.95)

    def test_after_a_preparation_they_do_nearly_all_and_settings_are_restored(self) -> None:
        client = self.agent()
        before = self.settings()
        with self.work(LIGHT):
            state = self.prepare(client)
            self.assertTrue(state.reached, state)
            self.assertNotEqual(before, self.settings())
            self.assertGreaterEqual(self.map_and_compare(client, least=0.7), 0.99)
            self.assertEqual("idle", client.restore(state.lease_id).state)
        self.assertEqual(before, self.settings())

    def test_the_guest_migrates_by_its_map_and_its_tables_are_sound(self) -> None:
        client = self.agent()
        incarnation = client.ping().incarnation
        with self.work(LIGHT):
            state = self.prepare(client)
            built = self.fetch_map(client)
            self.migrate(built)
            self.assertEqual(self.checks(), ["OK", "OK"])
        # It is the same agent, which now answers from the other host.
        client = self.agent()
        self.assertEqual(incarnation, client.ping().incarnation)
        self.assertEqual("idle", client.restore(state.lease_id).state)
        self.assertGreaterEqual(self.map_and_compare(client), 0.95)


class TestPartition(LayoutTests):
    """ext4 on a partition, the pool in ordinary pages."""

    LAYOUT: ClassVar[dict[str, Any]] = {"layout": "partition"}

    def test_an_answer_that_comes_late_is_not_taken_for_the_next_one(self) -> None:
        self.assertRaises(GuestError, self.guest.run, "sleep 2; echo late", 0.5)
        self.assertEqual("next\n", self.guest.run("echo next"))

    def test_memory_as_the_monitor_saves_it_equals_the_volume_too(self) -> None:
        built = self.fetch_map(self.agent())
        self.guest.stop()
        saved = self.guest.pmemsave(self.directory / "memory")
        equal = self.guest.equal_pages(built, guests.read_pages(saved))
        self.guest.cont()
        self.assertGreaterEqual(equal.mean(), 0.95)


class TestLogicalVolume(LayoutTests):
    """XFS on a logical volume of two pieces in wrong order, the pool in huge pages."""

    LAYOUT: ClassVar[dict[str, Any]] = {"layout": "lvm", "hugepages": 40}

    def test_the_pool_is_in_huge_pages(self) -> None:
        self.assertEqual("1", self.guest.sql("SELECT @@large_pages").strip())
        free = self.guest.run("sed -n 's/HugePages_Free: *//p' /proc/meminfo")
        self.assertLess(int(free), 20)

    def test_the_logical_volume_has_two_pieces(self) -> None:
        table = self.guest.run("dmsetup table lab-data")
        self.assertEqual(2, table.count(" linear "), table)


class TestMySQL(LayoutTests):
    """Oracle's server in Debian's newest release, whose Python runs the agent."""

    LAYOUT: ClassVar[dict[str, Any]] = {
        "release": database_image.MYSQL,
        "ram_mb": 1024,
        "options": ("innodb-buffer-pool-load-at-startup=OFF",),
    }

    def test_it_is_genuine(self) -> None:
        version = self.guest.sql("SELECT @@version, @@version_comment")
        self.assertTrue(version.startswith("9."), version)
        self.assertNotIn("mariadb", version.lower())

    def test_a_server_that_does_not_fill_its_pool_has_a_list_and_is_filled_by_it(self) -> None:
        def ended() -> dict[str, Any] | None:
            state = client.warm_up_progress()
            return state if state["state"] not in messages.WARM_UP_UNFINISHED else None

        client = self.agent()
        wait_until(
            lambda: "ib_buffer_pool" in self.guest.run("ls /mnt/data/mysql"), "there is a list"
        )
        client.warm_up()
        state = wait_until(ended, "the warm-up has ended")
        self.assertEqual(("done", None), (state["state"], state["code"]), state)
        # What it is filled with may be in it already
        self.assertGreater(state["total"], 1000)


# Tests are those of the layouts
del LayoutTests
