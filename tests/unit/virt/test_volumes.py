# SPDX-License-Identifier: Apache-2.0

from nova_dmigrate.virt.volumes import connected
from tests import base

VOLUME = "5e4b1f2a-8c1d-4c2e-9f6b-0a1b2c3d4e5f"
PATH = "/dev/disk/by-id/there"
#: Kind of connection, its data; where the volume is, or what of a sentence says why it is not read.
TABLE = (
    ("iscsi", {"device_path": PATH}, PATH, ""),
    ("iser", {"device_path": PATH}, PATH, ""),
    ("fibre_channel", {"device_path": PATH}, PATH, ""),
    ("nvmeof", {"device_path": PATH}, PATH, ""),
    ("nfs", {"device_path": "/mnt/volume-1", "format": "raw"}, "/mnt/volume-1", ""),
    ("nfs", {"device_path": "/mnt/volume-1"}, "/mnt/volume-1", ""),
    ("nfs", {"device_path": "/mnt/volume-1", "format": "qcow2"}, "", "has format qcow2"),
    ("iscsi", {"device_path": PATH, "encrypted": True}, "", "is encrypted"),
    ("rbd", {"name": "volumes/volume-1"}, "volumes/volume-1", ""),
    (
        "rbd",
        {
            "name": "volumes/volume-1",
            "hosts": ["10.0.0.1", "fd00::1"],
            "ports": ["6789", 3300],
            "cluster_name": "ceph",
            "auth_enabled": True,
            "auth_username": "cinder",
            "secret_type": "ceph",
            "secret_uuid": "c0ffee",
            "discard": True,
        },
        "volumes/volume-1?id=cinder&cluster=ceph&mon_host=10.0.0.1:6789,[fd00::1]:3300",
        "",
    ),
    (
        "rbd",
        {"name": "volumes/volume-1", "auth_enabled": False, "auth_username": "cinder"},
        "volumes/volume-1",
        "",
    ),
    ("rbd", {"name": "volumes/volume-1", "encrypted": True}, "", "is encrypted"),
    ("rbd", {"name": "volume-1"}, "", "is an RBD image, but 'volume-1' is not POOL/IMAGE"),
    ("rbd", {}, "", "is an RBD image, but"),
    ("iscsi", {}, "", "no path"),
    ("iscsi", None, "", "no path"),
    ("quobyte", {"device_path": PATH}, "", "by quobyte"),
    (None, {"device_path": PATH}, "", "by None"),
)


class ConnectedTest(base.TestCase):
    def test_each_kind_of_volume_has_its_place_or_its_obstacle(self):
        for kind, data, location, obstacle in TABLE:
            place = connected([{"serial": VOLUME, "driver_volume_type": kind, "data": data}])[
                VOLUME
            ]
            self.assertEqual(location, place.location, kind)
            self.assertIn(obstacle, place.obstacle)
            self.assertEqual(bool(obstacle), bool(place.obstacle), place)

    def test_a_volume_is_found_by_what_the_guest_sees_of_its_serial(self):
        found = connected(
            [{"serial": VOLUME, "driver_volume_type": "iscsi", "data": {"device_path": PATH}}]
        )
        self.assertEqual({VOLUME, VOLUME[:20]}, set(found))

    def test_what_has_no_serial_is_none(self):
        self.assertEqual({}, connected([{"driver_volume_type": "iscsi", "data": {}}]))
