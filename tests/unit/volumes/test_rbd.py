# SPDX-License-Identifier: Apache-2.0
"""What can be said of the reader without a cluster; the rest is in the integration suite."""

import time
from unittest import mock

from nova_dmigrate import exception, volumes
from tests import base
from tests.lab import ceph
from tests.lab.broker import free_ports


def open_rbd(location: str, **access: object) -> volumes.VolumeReader:
    return volumes.open_volume(
        volumes.VolumeSpec("vol", "rbd", location), volumes.VolumeAccess(**access)
    )


class WithoutModulesTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.dict("sys.modules", rados=None)
        patch.start()
        self.addCleanup(patch.stop)

    def test_the_volume_and_what_to_install_are_named(self):
        error = self.assertRaises(exception.VolumeOpenError, open_rbd, "volumes/volume-1")
        self.assertIn("Volume vol: reading RBD needs", str(error))
        self.assertIn("install the packages python3-rados and python3-rbd", str(error))

    def test_the_driver_is_not_offered(self):
        self.assertNotIn("rbd", volumes.usable_drivers())


class ErrorsTest(base.TestCase):
    """Of modules that are not the real ones."""

    def setUp(self) -> None:
        super().setUp()
        self.rados, self.rbd = mock.Mock(Error=OSError), mock.Mock(Error=OSError)
        patch = mock.patch.dict("sys.modules", rados=self.rados, rbd=self.rbd)
        patch.start()
        self.addCleanup(patch.stop)

    def test_whatever_keeps_an_image_from_being_opened_costs_the_gain_alone(self):
        self.rbd.Image.return_value.size.side_effect = OSError(110, "timed out")
        error = self.assertRaises(exception.VolumeOpenError, open_rbd, "volumes/volume-1")
        self.assertIn("volumes/volume-1 cannot be used: Connection timed out", str(error))
        for opened in (self.rbd.Image, self.rados.Rados.return_value.open_ioctx):
            opened.return_value.close.assert_called_once_with()
        self.rados.Rados.return_value.shutdown.assert_called_once_with()

        self.rados.Rados.side_effect = TypeError("conf must be a string")
        error = self.assertRaises(exception.VolumeOpenError, open_rbd, "volumes/volume-1")
        self.assertIn("conf must be a string", str(error))


class OpenTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(ceph.missing_modules())

    def test_the_driver_is_offered(self):
        self.assertIn("rbd", volumes.usable_drivers())

    def test_a_location_that_makes_no_sense_is_refused(self):
        error = self.assertRaises(exception.VolumeOpenError, open_rbd, "/dev/vdb?x=y")
        self.assertIn("Volume vol: its location is not understood", str(error))

    def test_a_configuration_that_is_not_there_is_named(self):
        error = self.assertRaises(
            exception.VolumeOpenError, open_rbd, "a/b", rbd_configuration="/does/not/exist"
        )
        self.assertIn("configuration /does/not/exist cannot be used: No such file", str(error))

    def test_monitors_that_are_not_there_are_an_error_in_time(self):
        (port,) = free_ports(1)
        begun = time.monotonic()
        error = self.assertRaises(
            exception.VolumeOpenError,
            open_rbd,
            f"a/b?id=nova&cluster=none&mon_host=v2:127.0.0.1:{port}",
            timeout=1.0,
        )
        self.assertLess(time.monotonic() - begun, 60)
        self.assertIn(f"v2:127.0.0.1:{port} do not answer client.nova in time", str(error))
