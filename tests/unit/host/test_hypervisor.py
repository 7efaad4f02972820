# SPDX-License-Identifier: Apache-2.0

import threading

from nova_dmigrate import exception
from nova_dmigrate.host import hypervisor
from nova_dmigrate.host.hypervisor import HypervisorVersions, Versions
from tests import base


class HypervisorVersionsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.asked = threading.Semaphore(0)
        self.answer = threading.Semaphore(0)
        self.answers: list[Versions | Exception] = []

    def ask(self) -> Versions:
        self.asked.release()
        self.answer.acquire()
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def told(self) -> None:
        """Let libvirt answer, and wait until that is known."""
        self.asked.acquire()
        (thread,) = (each for each in threading.enumerate() if each.name == "hypervisor")
        self.answer.release()
        thread.join()

    def test_nobody_waits_for_a_libvirt_that_hangs_and_it_is_asked_once(self) -> None:
        versions = HypervisorVersions(self.ask)
        self.answers.append((9_000_000, 7_002_000))
        for _ in range(3):
            self.assertEqual(hypervisor.UNKNOWN, versions.known())
        self.told()
        self.assertEqual((9_000_000, 7_002_000), versions.known())
        # It is not asked again that soon
        self.assertFalse(self.asked.acquire(blocking=False))

    def test_what_is_old_is_asked_for_again(self) -> None:
        versions = HypervisorVersions(self.ask)
        self.answers += [(9_000_000, 7_002_000), (10_000_000, None)]
        versions.known()
        self.told()
        versions._due = float("-inf")
        self.assertEqual((9_000_000, 7_002_000), versions.known())
        self.told()
        self.assertEqual((10_000_000, None), versions.known())

    def test_a_libvirt_that_does_not_tell_is_asked_again_later(self) -> None:
        versions = HypervisorVersions(self.ask)
        self.answers.append(exception.HypervisorError(peer="qemu:///system", reason="it is away"))
        versions.known()
        self.told()
        self.assertEqual(hypervisor.UNKNOWN, versions.known())
        self.assertIn("it is away", self.log.output)
        self.assertFalse(self.asked.acquire(blocking=False))
