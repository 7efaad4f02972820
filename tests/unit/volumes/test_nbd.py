# SPDX-License-Identifier: Apache-2.0
"""What can be said of the reader without a daemon; the rest is in the integration suite."""

import os
import shutil
import threading
from unittest import mock

from nova_dmigrate import exception, volumes
from tests import base

KEY = "6f1d2c3b-4a59-4687-9b1c-0123456789ab"


class WithoutDaemonTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.programs = self.make_directory()
        patch = mock.patch.dict(os.environ, PATH=str(self.programs))
        patch.start()
        self.addCleanup(patch.stop)
        self.image = self.make_directory() / "image"
        self.image.write_bytes(bytes(8192))

    def refusal(self, location, keys=None):
        access = volumes.VolumeAccess(20, keys=keys, runtime_directory=self.make_directory())
        spec = volumes.VolumeSpec("vol", "nbd", location)
        error = self.assertRaises(exception.VolumeOpenError, volumes.open_volume, spec, access)
        self.assertNotIn("storage-daemon", [each.name for each in threading.enumerate()])
        self.assertEqual([], os.listdir(access.runtime_directory))
        return str(error)

    def test_the_driver_is_offered_only_where_its_program_is(self):
        self.assertFalse({"iscsi", "luks", "nbd"} & set(volumes.usable_drivers()))
        program = self.programs / "qemu-storage-daemon"
        program.touch(0o755)
        self.assertLessEqual({"iscsi", "luks", "nbd"}, set(volumes.usable_drivers()))

    def test_a_program_that_is_missing_is_named(self):
        self.assertIn(
            f"Volume vol: raw:{self.image} cannot be opened: setpriv: No such file",
            self.refusal(f"raw:{self.image}"),
        )
        (self.programs / "setpriv").symlink_to(shutil.which("setpriv", path="/usr/bin:/bin"))
        self.assertIn("failed to execute qemu-storage-daemon", self.refusal(f"raw:{self.image}"))

    def test_a_location_that_makes_no_sense_is_refused(self):
        for location, sentence in (
            ("/dev/vdb", "does not begin with a format"),
            ("qcow2:image", "no absolute path"),
            (f"qcow2:{self.image}", f"{self.image} is no qcow2 image"),
            (f"raw:{self.image}-2", f"{self.image}-2: No such file or directory"),
        ):
            self.assertIn(sentence, self.refusal(location))

    def test_a_key_that_the_host_does_not_give_is_named(self):
        location = f"luks,key={KEY}:{self.image}"
        self.assertIn("given no keys ([host]volume_keys)", self.refusal(location))

        def none(name):
            raise exception.HypervisorError(peer="test:///default", reason=f"no secret {name}")

        self.assertIn(
            f"cannot be opened: libvirt at test:///default: no secret {KEY}",
            self.refusal(location, none),
        )
