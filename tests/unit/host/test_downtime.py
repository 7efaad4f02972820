# SPDX-License-Identifier: Apache-2.0
"""How long a guest stood still, as this host's libvirt tells, if it does."""

import threading

from nova_dmigrate import exception
from nova_dmigrate.host import downtime
from tests import base


class DowntimeTest(base.TestCase):
    def test_it_is_what_libvirt_tells_of_that_domain(self) -> None:
        known = {"a": 87.0, "b": None}
        self.assertEqual(87.0, downtime.of_domain("a", known.__getitem__))
        self.assertIsNone(downtime.of_domain("b", known.__getitem__))

    def test_a_domain_that_there_is_not_has_none(self) -> None:
        def fail(name: str) -> float:
            raise exception.MigrationError(instance=name, reason="there is no such domain")

        self.assertIsNone(downtime.of_domain("a", fail))

    def test_nobody_waits_for_a_libvirt_that_hangs(self) -> None:
        told = threading.Event()
        self.addCleanup(told.set)

        def hang(name: str) -> float:
            told.wait(60)
            return 1.0

        self.assertIsNone(downtime.of_domain("a", hang, patience=0.05))
