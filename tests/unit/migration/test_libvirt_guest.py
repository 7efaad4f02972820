# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's test hypervisor, which has no QEMU, and what hangs put in its place."""

import threading

import fixtures

from nova_dmigrate import exception
from nova_dmigrate.migration import libvirt_guest
from nova_dmigrate.migration.libvirt_guest import LibvirtGuest
from tests import base

PATIENCE = 60.0


class Hung:
    """A domain whose QEMU does not answer until it is let."""

    def __init__(self) -> None:
        self.asked, self.let = threading.Event(), threading.Event()

    def migrateGetMaxDowntime(self) -> int:
        self.asked.set()
        self.let.wait(PATIENCE)
        return 5


class DowntimeLimitTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        # The test hypervisor has none
        self.useFixture(
            fixtures.MonkeyPatch("libvirt.virConnect.setKeepAlive", lambda *arguments: None)
        )
        self.guest = LibvirtGuest("test:///default", "test")
        self.addCleanup(self.guest.close)
        self.hung = Hung()
        self.guest._handle = self.hung
        self.addCleanup(self.hung.let.set)

    def test_the_usual_one_is_taken_where_qemu_does_not_answer(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(f"{libvirt_guest.__name__}._LIMIT_PATIENCE", 0.3))
        self.assertEqual(300, self.guest.max_downtime(lambda: None))
        self.hung.let.set()
        self.assertEqual(5, self.guest.max_downtime(lambda: None))

    def test_whoever_waits_for_it_can_give_up(self) -> None:
        def waiting() -> None:
            if self.hung.asked.is_set():
                raise exception.MigrationCancelled(instance="i", reason="so it is")

        self.assertRaises(exception.MigrationCancelled, self.guest.max_downtime, waiting)
