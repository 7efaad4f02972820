# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import hypothesis
import testtools
from hypothesis import strategies as st

from nova_dmigrate.volumes import ImageLocation, image_layers
from tests import base
from tests.unit.volumes.loop import LoopDevice, available
from tests.unit.volumes.qcow2 import header

KEY = "6f1d2c3b-4a59-4687-9b1c-0123456789ab"


class LocationTest(base.TestCase):
    def test_text_and_location_are_the_same(self):
        for text, kind, path in (
            ("qcow2:/var/lib/libvirt/images/db.qcow2", "qcow2", "/var/lib/libvirt/images/db.qcow2"),
            ("luks:/dev/disk/by-path/ip-10.0.0.1:3260-lun-1", "luks",
             "/dev/disk/by-path/ip-10.0.0.1:3260-lun-1"),
            ("raw:/a b?c", "raw", "/a b?c"),
            ("raw:iscsi://10.0.0.1:3260/iqn.2010-10.org.openstack:volume-1/1", "raw",
             "iscsi://10.0.0.1:3260/iqn.2010-10.org.openstack:volume-1/1"),
        ):  # fmt: skip
            location = ImageLocation.parse(text)
            self.assertEqual((kind, path, text), (location.format, location.place, str(location)))
            self.assertEqual("", location.key)

    def test_a_key_is_named_and_never_told(self):
        for text, place in (
            (f"luks,key={KEY}:/dev/vdb", "/dev/vdb"),
            (f"qcow2,key={KEY}:/a,key=b:c", "/a,key=b:c"),
            (f"luks,key={KEY}:iscsi://[fe80::1]:3261/iqn.x/0", "iscsi://[fe80::1]:3261/iqn.x/0"),
        ):
            location = ImageLocation.parse(text)
            self.assertEqual((KEY, place, text), (location.key, location.place, str(location)))

    def test_a_portal_has_the_usual_port_where_none_is_named(self):
        location = ImageLocation.parse("raw:iscsi://host.example/iqn.x:y/7")
        self.assertEqual("raw:iscsi://host.example:3260/iqn.x:y/7", str(location))
        self.assertTrue(location.remote)
        self.assertFalse(ImageLocation.parse("raw:/dev/vdb").remote)

    def test_what_is_none_is_refused(self):
        for text, sentence in (
            ("/dev/vdb", "begin with a format (raw, qcow2, luks)"),
            ("", "begin with a format"),
            ("vmdk:/image", "begin with a format"),
            ("json:{}", "begin with a format"),
            ("raw:image", "no absolute path"),
            ("raw:nbd://10.0.0.1/", "no absolute path"),
            ("raw:/a\0b", "no absolute path"),
            ("luks,key=:/dev/vdb", "no name of a key"),
            ("luks,key=a,b:/dev/vdb", "no name of a key"),
            ("luks,iter=1:/dev/vdb", "begin with a format"),
            ("raw:iscsi://host/iqn.x", "is not iscsi://HOST[:PORT]/TARGET/UNIT"),
            ("raw:iscsi://me%secret@host/iqn.x/1", "is not iscsi://"),
            ("raw:iscsi://host/iqn.x/1?password=x", "is not iscsi://"),
            ("raw:iscsi://host:port/iqn.x/1", "is not iscsi://"),
            ("qcow2:iscsi://host/iqn.x/1", "from files and devices only"),
        ):
            error = self.assertRaises(ValueError, ImageLocation.parse, text)
            self.assertIn(sentence, str(error))


class LayersTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.here = self.make_directory().resolve()

    def write(self, name: str, data: bytes) -> Path:
        path = self.here / name
        path.write_bytes(data)
        return path

    def layers(self, name, kind="qcow2"):
        return [
            (each.format, each.place)
            for each in image_layers.layers(ImageLocation(kind, str(self.here / name)))
        ]

    def refusal(self, data):
        self.write("image", data)
        return str(self.assertRaises(ValueError, self.layers, "image"))

    def test_an_image_has_its_backing_files_below_it(self):
        (self.here / "bases").mkdir()
        base_image = self.write("bases/raw", bytes(4096))
        middle = self.write("bases/middle", header("raw", "raw", cluster_bits=9))
        for version in (2, 3):
            top = self.write("top", header("bases/middle", "qcow2", version=version))
            self.assertEqual(
                [
                    ("qcow2", str(top)),
                    ("qcow2", str(middle)),
                    ("raw", str(base_image)),
                ],
                self.layers("top"),
            )

    def test_a_backing_file_may_lie_anywhere_and_is_raw_if_nothing_else_is_told(self):
        elsewhere = self.make_directory().resolve() / "image"
        elsewhere.write_bytes(header("never looked at"))
        self.write("top", header(str(elsewhere)))
        self.assertEqual(("raw", str(elsewhere)), self.layers("top")[1])

    def test_other_formats_have_one_file(self):
        path = self.write("image", header("other"))
        for kind in ("raw", "luks"):
            self.assertEqual([(kind, str(path))], self.layers("image", kind))

    def test_what_is_not_understood_or_not_followed_is_named(self):
        for data, sentence in (
            (b"", "is no qcow2 image"),
            (bytes(4096), "is no qcow2 image"),
            (header(magic=b"QED\0"), "is no qcow2 image"),
            (header(version=4), "of an unknown kind"),
            (header(cluster_bits=22), "of an unknown kind"),
            (header(features=1 << 2), "has its data in another file"),
            (header()[:80], "has a header that is cut off"),
            (header("x" * 1024), "has a header that is not understood"),
            (header("base")[:-1], "has a header that is not understood"),
            (header("nbd://10.0.0.1/export"), "'nbd://10.0.0.1/export', which is no path"),
            (header("json:{}"), "which is no path"),
            (header("base", "vmdk"), "has a backing file of format vmdk"),
        ):
            message = self.refusal(data)
            self.assertIn(f"{self.here}/image ", message)
            self.assertIn(sentence, message)

    def test_a_chain_that_never_ends_is_refused(self):
        self.assertIn("more than 32 layers", self.refusal(header("image", "qcow2")))

    def test_a_file_that_is_not_there_is_an_error_and_a_fifo_is_not_waited_for(self):
        self.write("image", header("gone", "qcow2"))
        self.assertRaises(FileNotFoundError, self.layers, "image")
        os.mkfifo(self.here / "fifo")
        self.assertRaises(ValueError, self.layers, "fifo")

    @hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=300)
    @hypothesis.given(
        st.lists(st.tuples(st.integers(4, 160), st.integers(0, 255)), max_size=6),
        st.integers(0, 200),
    )
    def test_a_header_that_is_damaged_is_read_or_refused(self, changes, length):
        data = bytearray(header("base", "raw").ljust(200, b"\0"))
        for place, value in changes:
            data[place] = value
        self.write("image", bytes(data[:length]))
        self.write("base", bytes(512))
        try:
            self.layers("image")
        except ValueError:
            pass
        except OSError as error:
            self.assertNotEqual(str(self.here / "image"), error.filename)


class BlockdevTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.here = self.make_directory().resolve()

    def nodes(self, options):
        """All nodes of a tree, the uppermost first."""
        found = [options]
        for child in ("file", "backing"):
            if options.get(child) is not None:
                found += self.nodes(options[child])
        return found

    def test_no_file_is_locked_or_cached_or_written(self):
        (self.here / "base").write_bytes(header("raw", "raw"))
        (self.here / "raw").write_bytes(bytes(4096))
        (self.here / "top").write_bytes(header("base", "qcow2"))
        tree = image_layers.blockdev(ImageLocation("qcow2", f"{self.here}/top"), False)
        nodes = self.nodes(tree)
        files = [node for node in nodes if node["driver"] == "file"]
        self.assertEqual(
            [f"{self.here}/{name}" for name in ("top", "base", "raw")],
            [node["filename"] for node in files],
        )
        for node in files:
            self.assertEqual(("off", {"direct": True}), (node["locking"], node["cache"]))
        self.assertEqual({True}, {node["read-only"] for node in nodes})

    def test_an_image_without_a_backing_file_gets_none(self):
        (self.here / "image").write_bytes(header(cluster_bits=9))
        tree = image_layers.blockdev(ImageLocation("qcow2", f"{self.here}/image"), False)
        self.assertIsNone(tree["backing"])

    def test_a_key_is_for_the_uppermost_layer_alone(self):
        (self.here / "base").write_bytes(header())
        (self.here / "top").write_bytes(header("base", "qcow2"))
        tree = image_layers.blockdev(ImageLocation("qcow2", f"{self.here}/top"), True)
        self.assertEqual({"format": "luks", "key-secret": "key"}, tree["encrypt"])
        self.assertNotIn("encrypt", tree["backing"])
        tree = image_layers.blockdev(ImageLocation("luks", f"{self.here}/base"), True)
        self.assertEqual(("luks", "key"), (tree["driver"], tree["key-secret"]))

    @testtools.skipUnless(available(), "needs root and loop devices")
    def test_devices_are_opened_as_such(self):
        (self.here / "file").write_bytes(bytes(1 << 20))
        device = self.useFixture(LoopDevice(self.here / "file"))
        tree = image_layers.blockdev(ImageLocation("raw", device.path), False)
        self.assertEqual("host_device", tree["file"]["driver"])
