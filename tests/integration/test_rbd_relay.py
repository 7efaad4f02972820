# SPDX-License-Identifier: Apache-2.0
"""Real guests, migrated through two relays, of which the destination's reads an RBD image."""

from typing import Any, ClassVar

import numpy as np

from nova_dmigrate.volumes import VolumeSpec
from tests import base
from tests.lab import ceph, migrations, relays
from tests.lab.ceph import Ceph
from tests.lab.relays import VOLUME

POOL, IMAGE = "volumes", "volume-1"
#: So that all mapped pages become references, however fast Ceph is.
ALL_REFERENCES: dict[str, Any] = {"relay__hold_pages": 0, "relay__hurry_threshold": 60000}


class RbdTest(migrations.MigrationTestCase):
    """The image has the content of the guest's disk."""

    ceph: ClassVar[Ceph]

    @classmethod
    def setUpClass(cls) -> None:
        base.require(ceph.missing())
        super().setUpClass()
        try:
            cls.ceph = cls._class.enter_context(Ceph())
            cls.ceph.create_pool(POOL)
            cls.ceph.add_client("reader", osd=f"profile rbd-read-only pool={POOL}")
            cls.ceph.rbd("import", "--no-progress", str(cls.spec.disk), f"{POOL}/{IMAGE}")
        except BaseException:
            cls.tearDownClass()
            raise

    def setUp(self) -> None:
        super().setUp()
        location = f"{POOL}/{IMAGE}?id=reader&conf={self.ceph.configuration}"
        self.volume = VolumeSpec(VOLUME, "rbd", location)
        self.extents = relays.extents(self.source)
        self.right = np.count_nonzero(migrations.copies(self.source, self.extents))
        # The guest is new, so its map is: what follows is not about nothing.
        self.assertGreater(self.right, 0.8 * 96 * 256)

    def test_pages_on_an_image_come_from_there(self) -> None:
        saved = self.map_of([self.extents])
        with self.migration(saved=saved, volume=self.volume, **ALL_REFERENCES) as migration:
            summary = self.assert_delivered(migration, migration.run())
        self.assert_from_the_volume(summary, self.right)

    def test_with_a_ceph_that_hangs_they_come_from_the_source_and_both_relays_end(self) -> None:
        saved = self.map_of([self.extents])
        # So that the volume is given up in seconds
        patience = {"volume__timeout": 1, "volume__error_limit": 4, "volume__queue_depth": 4}
        with self.migration(saved=saved, volume=self.volume, **patience) as migration:
            with self.ceph.frozen("osd", "mon"):
                summary = self.assert_delivered(migration, migration.run())
            destination = migration.pair.destination.summary()
        self.assertGreater(destination["volume_errors"], 0)
        self.assertEqual(0, destination["volume_bytes"])
        self.assertEqual(0, destination["hits"])
        self.assertLessEqual(set(summary["misses"]), {"read_error"})
