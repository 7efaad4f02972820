# SPDX-License-Identifier: Apache-2.0
"""Real guests, migrated through two relays, of which the destination's reads a qcow2 image."""

import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nova_dmigrate.volumes import VolumeSpec
from tests import base
from tests.integration import test_nbd
from tests.lab import migrations, relays
from tests.lab.relays import VOLUME

#: So that all mapped pages become references, however fast the image is.
ALL_REFERENCES: dict[str, Any] = {"relay__hold_pages": 0, "relay__hurry_threshold": 60000}


class NbdTest(migrations.MigrationTestCase):
    """The image has the content of the guest's disk."""

    image: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        base.require(test_nbd.missing())
        super().setUpClass()
        try:
            cls.image = cls.spec.disk.with_suffix(".qcow2")
            test_nbd.run(
                "qemu-img", "convert", "-f", "raw", "-O", "qcow2", cls.spec.disk, cls.image
            )
        except BaseException:
            cls.tearDownClass()
            raise

    def setUp(self) -> None:
        super().setUp()
        self.volume = VolumeSpec(VOLUME, "nbd", f"qcow2:{self.image}")
        self.extents = relays.extents(self.source)
        self.right = np.count_nonzero(migrations.copies(self.source, self.extents))
        # The guest is new, so its map is: what follows is not about nothing.
        self.assertGreater(self.right, 0.8 * 96 * 256)

    def test_pages_on_an_image_come_from_there(self) -> None:
        saved = self.map_of([self.extents])
        with self.migration(saved=saved, volume=self.volume, **ALL_REFERENCES) as migration:
            relay = migration.pair.destination.pid
            (daemon,) = test_nbd.processes_of("qemu-storage-daemon", relay)
            summary = self.assert_delivered(migration, migration.run())
        self.assert_from_the_volume(summary, self.right)
        self.assertFalse(test_nbd.is_running(daemon))

    def test_with_a_daemon_that_is_killed_they_come_from_the_source(self) -> None:
        saved = self.map_of([self.extents])
        with self.migration(saved=saved, volume=self.volume) as migration:
            relay = migration.pair.destination.pid
            (daemon,) = test_nbd.processes_of("qemu-storage-daemon", relay)
            os.kill(daemon, signal.SIGKILL)
            self.assert_delivered(migration, migration.run())
            destination = migration.pair.destination.summary()
        self.assertGreater(destination["volume_errors"], 0)
        self.assertEqual((0, 0), (destination["volume_bytes"], destination["hits"]))
