# SPDX-License-Identifier: Apache-2.0
"""Streams beside the usual one: whatever the relays make of them, the guest arrives and goes on.

Each is one that QEMU really writes. What no QEMU writes yet is in the unit tests of the relays.
"""

import dataclasses
from typing import Any

from nova_dmigrate.stream import format as fmt
from tests.lab import hypervisors, migrations
from tests.lab.guest import Guest
from tests.lab.migrations import Migration
from tests.lab.relays import PATIENCE
from tools.corpus import emulators


class ArrivalTestCase(migrations.MigrationTestCase):
    """The guest is stopped: it must be the same at both ends."""

    def deliver(self, migration: Migration) -> dict[str, Any]:
        """Migrate, and have the guest go on at both ends; the source relay's summary."""
        before = self.source.command("sum")
        self.source.stop()
        state = migration.run()
        pair, destination = migration.pair, migration.destination
        self.assertEqual("completed", state["status"], f"{state}\n{pair.last_words()}")
        self.assertEqual((0, 0), pair.wait(), pair.last_words())
        destination.wait_incoming(PATIENCE)
        self.assert_same_memory(migration)
        pair.check_clean()
        destination.cont()
        self.assertEqual(before, destination.command("sum"))
        destination.kill()
        self.source.cont()
        self.assert_guest_goes_on()
        summary = pair.source.summary()
        self.assertEqual("delivered", summary["state"])
        self.assertEqual(pair.destination.summary()["pass_through"], summary["pass_through"])
        return summary


class TestBitmaps(ArrivalTestCase):
    guest = {"ram_mb": 128, "fill_mb": 32}

    def test_bitmaps_of_a_disk_travel_as_a_section_that_is_not_ram(self) -> None:
        name = "dirty-bitmaps"
        self.source.qmp("block-dirty-bitmap-add", node="mailbox", name="backup")
        self.source.set_capabilities(name)
        with self.migration(saved=self.map_of(), tap=False, capabilities=[name]) as migration:
            summary = self.deliver(migration)
        self.assertEqual(fmt.UNKNOWN_ITERABLE, summary["pass_through"])
        self.assertEqual(0, summary["referenced_pages"])


class TestVirtioMem(ArrivalTestCase):
    guest = {
        "ram_mb": 256,
        "fill_mb": 32,
        "extra": (
            *("-m", "maxmem=1G", "-object", "memory-backend-ram,id=hot,size=128M"),
            *("-device", "virtio-mem-pci,memdev=hot,requested-size=0"),
        ),
    }

    def test_memory_devices_may_send_their_state_before_ram(self) -> None:
        with self.migration(saved=self.map_of(), tap=False) as migration:
            summary = self.deliver(migration)
        # Since 8.0
        early = hypervisors.emulator().series != "7.2"
        self.assertEqual(fmt.FULL_BEFORE_RAM if early else None, summary["pass_through"])
        self.assertEqual(early, summary["referenced_pages"] == 0)


class TestNewerDestination(ArrivalTestCase):
    """As hosts are upgraded: the source has this machine's QEMU."""

    guest = {"ram_mb": 128, "fill_mb": 32, "machine": "pc-i440fx-7.2"}

    @classmethod
    def boot(cls) -> Guest:
        if cls._source is None:
            older = dataclasses.replace(cls.spec, qemu=emulators.installed().command)
            cls._source = Guest.start_source(older)
        return cls._source

    def test_a_guest_moves_by_its_map_to_the_qemu_of_the_lab(self) -> None:
        with self.migration(saved=self.map_of(), tap=False) as migration:
            summary = self.deliver(migration)
        self.assertIsNone(summary["pass_through"])
        self.assertGreater(summary["referenced_pages"], 0)
