# SPDX-License-Identifier: Apache-2.0

from nova_dmigrate import exception
from nova_dmigrate.migration.domain import Disk, Domain
from nova_dmigrate.migration.preflight import Elsewhere, volumes_of
from nova_dmigrate.volumes import VolumeSpec
from tests import base


def disk(**fields: object) -> Disk:
    usual: dict[str, object] = {
        "target": "vdb",
        "serial": "one",
        "kind": "block",
        "protocol": "",
        "format": "raw",
        "location": "/dev/here",
        "direct": True,
        "read_only": False,
    }
    return Disk(**{**usual, **fields})  # type: ignore[arg-type]


def domain(*disks: Disk) -> Domain:
    return Domain("4f1c", "db", 1 << 30, "q35", disks, None, ())


class ElsewhereTest(base.TestCase):
    def test_the_destination_has_them_where_it_says(self):
        there = {"one": Elsewhere("/dev/there")}
        self.assertEqual(
            (VolumeSpec("one", "block", "/dev/there"),),
            volumes_of(domain(disk()), ["block"], there),
        )

    def test_the_sources_path_is_never_taken_for_one_of_the_destination(self):
        two = domain(disk(), disk(serial="two", target="vdc"))
        self.assertEqual(
            ["two"], [v.volume_id for v in volumes_of(two, ["block"], {"two": Elsewhere("/x")})]
        )
        error = self.assertRaises(exception.FallBack, volumes_of, two, ["block"], {})
        self.assertEqual("no-volumes", error.kwargs["code"])
        self.assertIn("vdc is no volume that the destination has connected", str(error))

    def test_of_a_format_that_the_destination_does_not_tell_nothing_is_read(self):
        image = domain(disk(format="qcow2"))
        there = {"one": Elsewhere("/dev/there")}
        error = self.assertRaises(exception.FallBack, volumes_of, image, ["block", "nbd"], there)
        self.assertIn("vdb is a block disk of format qcow2", str(error))

    def test_an_encrypted_disk_that_others_have_connected_is_not_read(self):
        found = domain(disk(encrypted=True, key="one"))
        there = {"one": Elsewhere("/dev/there")}
        error = self.assertRaises(exception.FallBack, volumes_of, found, ["block", "luks"], there)
        self.assertIn("vdb is encrypted by QEMU, with a key that relays are not given", str(error))

    def test_what_stands_in_the_way_there_is_told(self):
        error = self.assertRaises(
            exception.FallBack,
            volumes_of,
            domain(disk()),
            ["block"],
            {"one": Elsewhere(obstacle="is encrypted by Nova")},
        )
        self.assertIn("vdb is encrypted by Nova", str(error))
