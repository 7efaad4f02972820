# SPDX-License-Identifier: Apache-2.0

from nova_dmigrate.volumes import RbdLocation
from tests import base

#: What Cinder's driver of RBD tells of a volume.
CONNECTION = {
    "name": "volumes/volume-5e4b1f2a",
    "hosts": ["10.0.0.1", "[fd00::1]", "fd00::2"],
    "ports": ["6789", "6789", 3300],
    "cluster_name": "ceph",
    "auth_enabled": True,
    "auth_username": "cinder",
    "secret_type": "ceph",
    "secret_uuid": "c0ffee",
    "volume_id": "5e4b1f2a",
    "discard": True,
}


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

    def test_a_connection_of_cinder_tells_where_and_as_whom(self):
        place = RbdLocation.of_connection(CONNECTION)
        self.assertEqual(
            RbdLocation(
                "volumes",
                "volume-5e4b1f2a",
                user="cinder",
                cluster="ceph",
                monitors="10.0.0.1:6789,[fd00::1]:6789,[fd00::2]:3300",
            ),
            place,
        )

    def test_without_authentication_there_is_no_user(self):
        place = RbdLocation.of_connection({**CONNECTION, "auth_enabled": False})
        self.assertEqual("", place.user)

    def test_a_connection_may_tell_the_name_alone(self):
        self.assertEqual(
            RbdLocation("volumes", "a@b"), RbdLocation.of_connection({"name": "volumes/a@b"})
        )
        for data in ({}, {"name": None}, {"name": "volume-1"}):
            self.assertRaises(ValueError, RbdLocation.of_connection, data)
