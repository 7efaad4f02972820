# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's test hypervisor, which has no QEMU, and what hangs put in its place."""

import threading
import time
from typing import Any

import fixtures
import libvirt

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


class Dead:
    """A connection whose libvirt is gone."""

    def __init__(self) -> None:
        self.closed = False

    def isAlive(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


class GuestTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        # The test hypervisor has none
        self.useFixture(
            fixtures.MonkeyPatch("libvirt.virConnect.setKeepAlive", lambda *arguments: None)
        )
        self.guest = LibvirtGuest("test:///default", "test")
        self.addCleanup(self.guest.close)


class ConnectionTest(GuestTest):
    """It is connected anew by two threads at the same time."""

    def setUp(self) -> None:
        super().setUp()
        self.guest._connection.close()
        self.guest._connection = self.dead = Dead()
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.let = threading.Event()
        usual = libvirt_guest.open_libvirt

        def open_libvirt(uri: str) -> Any:
            connection = usual(uri)
            self.opened.append(connection)
            self.assertTrue(self.let.wait(PATIENCE))
            return connection

        def close(connection: Any) -> None:
            self.closed.append(connection)
            connection.close()

        module = libvirt_guest.__name__
        self.useFixture(fixtures.MonkeyPatch(f"{module}.open_libvirt", open_libvirt))
        self.useFixture(fixtures.MonkeyPatch(f"{module}._close", close))
        self.found: list[Any] = []
        self.threads = [threading.Thread(target=self.ask) for _ in range(2)]
        for each in self.threads:
            each.start()
        end = time.monotonic() + PATIENCE
        while len(self.opened) < 2:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)

    def ask(self) -> None:
        try:
            self.found.append(self.guest._domain.name())
        except libvirt.libvirtError as error:
            self.found.append(str(error))

    def go_on(self) -> None:
        self.let.set()
        for each in self.threads:
            each.join(PATIENCE)

    def test_both_use_that_of_the_quicker_one(self) -> None:
        self.go_on()
        self.assertEqual(["test", "test"], self.found)
        self.assertTrue(self.dead.closed)
        kept = [each for each in self.opened if each not in self.closed]
        self.assertEqual([self.guest._connection], kept)

    def test_none_is_kept_when_it_was_closed_meanwhile(self) -> None:
        self.guest.close()
        self.go_on()
        self.assertEqual(["the connection was given back"] * 2, self.found)
        self.assertLessEqual(set(self.opened), set(self.closed))
        self.assertTrue(self.guest.runs_here)  # it is not known


class DowntimeLimitTest(GuestTest):
    def setUp(self) -> None:
        super().setUp()
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
