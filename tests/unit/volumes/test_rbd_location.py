# SPDX-License-Identifier: Apache-2.0

from nova_dmigrate.volumes import RbdLocation
from tests import base


class RbdLocationTest(base.TestCase):
    def test_a_location_is_the_same_after_it_has_been_written(self):
        for place in (
            RbdLocation("volumes", "volume-1"),
            RbdLocation("volumes", "volume-1", namespace="tenant", snapshot="before"),
            RbdLocation("a?b", "c@d e%2f&=+#", namespace="ü", snapshot="x/y@z?"),
            RbdLocation(
                "volumes",
                "volume-1",
                user="nova",
                cluster="other",
                monitors="[v2:10.0.0.1:3300,v1:10.0.0.1:6789],[fd00::1]:6789",
                configuration="/etc/ceph/o?f=1&.conf",
                keyring="/etc/ceph/a b",
            ),
        ):
            self.assertEqual(place, RbdLocation.parse(str(place)))

    def test_names_alone_are_written_as_ceph_does(self):
        for text in ("volumes/volume-1", "volumes/tenant/volume-1", "volumes/volume-1@before"):
            place = RbdLocation.parse(text)
            self.assertEqual(text, str(place))
            self.assertEqual(text, place.name)

    def test_what_is_no_location_is_refused(self):
        for text in (
            "",
            "volume-1",
            "/volume-1",
            "volumes/",
            "volumes//volume-1",
            "a/b/c/d",
            "volumes/volume-1?user=nova",
            "volumes/volume-1?id",
            "volumes/volume-1?cluster=../../tmp/other",
            "/dev/vdb",
        ):
            self.assertRaises(ValueError, RbdLocation.parse, text)

    def test_a_volume_is_named_unencoded_with_its_monitors(self):
        monitors = [("10.0.0.1", "6789"), ("[fd00::1]", "6789"), ("fd00::2", "3300"), ("mon", "")]
        self.assertEqual(
            RbdLocation(
                "volumes",
                "a@b?c",
                user="cinder",
                cluster="ceph",
                monitors="10.0.0.1:6789,[fd00::1]:6789,[fd00::2]:3300,mon",
            ),
            RbdLocation.of_volume("volumes/a@b?c", monitors, "cinder", "ceph"),
        )
        for name in ("", "volume-1", "a/b/c/d"):
            self.assertRaises(ValueError, RbdLocation.of_volume, name, [], "")
