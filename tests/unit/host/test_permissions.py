# SPDX-License-Identifier: Apache-2.0
"""What a requester may have opened on this host."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.conf import host
from nova_dmigrate.host import permissions
from tests import base
from tests.unit.volumes import qcow2
from tests.unit.volumes.loop import LoopDevice


class PermissionsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.here = self.make_directory().resolve()
        self.allowed = self.here / "allowed"
        self.allowed.mkdir()

    def assert_refused(self, code: str, ask: Callable[..., Any], *arguments: Any) -> None:
        error = self.assertRaises(exception.RequestRefused, ask, *arguments)
        self.assertEqual(code, error.kwargs["code"])

    def test_without_a_list_every_volume_may_be_read(self) -> None:
        (self.here / "link").symlink_to(self.here / "file")
        found = permissions.volume_location(str(self.here / "link"), ())
        self.assertEqual(str(self.here / "file"), found)

    def test_volumes_lie_where_they_really_are(self) -> None:
        entries = (str(self.allowed), "/dev/vg-*")
        inside = self.allowed / "a" / "volume"
        self.assertEqual(str(inside), permissions.volume_location(str(inside), entries))
        (self.allowed / "link").symlink_to(self.here / "outside")
        for path in (
            self.here / "outside",
            self.allowed / "link",
            self.allowed / ".." / "outside",
            Path(f"{self.allowed}-2"),
            # No block device, though it has the name of one
            Path("/dev/vg-none"),
            Path("/dev/null"),
        ):
            self.assert_refused(
                "volume-not-allowed", permissions.volume_location, str(path), entries
            )

    def test_an_image_lies_where_it_may_with_all_its_backing_files(self) -> None:
        inside, below = self.allowed / "image", self.allowed / "below"
        entries = (str(self.allowed),)
        below.write_bytes(qcow2.header())
        inside.write_bytes(qcow2.header("below", "qcow2"))
        (self.here / "link").symlink_to(inside)
        for path in (inside, self.here / "link"):
            self.assertEqual(f"qcow2:{inside}", permissions.image(f"qcow2:{path}", entries))
        keyed = f"luks,key=a-b:{inside}"
        self.assertEqual(keyed, permissions.image(keyed, entries))
        # What is no image is found out by who opens it
        for found in (f"luks:{self.allowed}/none", f"qcow2:{self.allowed}/none"):
            self.assertEqual(found, permissions.image(found, entries))
        (self.here / "secret").write_bytes(bytes(4096))
        below.write_bytes(qcow2.header("../secret"))
        for location in (f"qcow2:{inside}", f"raw:{self.here}/secret", "qcow2:image", "/dev/vdb"):
            self.assert_refused("volume-not-allowed", permissions.image, location, entries)

    def test_units_of_iscsi_targets_are_allowed_by_their_urls(self) -> None:
        (entries,) = (each.default for each in host.PERMISSIONS if each.name == "iscsi_units")
        unit = "raw:iscsi://10.0.0.5:3260/iqn.2010-10.org.openstack:volume-1/1"
        own = ("iscsi://10.0.0.5:3260/iqn.2010-10.org.openstack:*/1",)
        self.assertEqual(unit, permissions.image(unit, (), own))
        for location, allowed in (
            (unit, entries),
            (unit.replace("10.0.0.5", "10.0.0.6"), own),
            (unit.replace("-1/1", "-1/2"), own),
            (unit.replace("org", "com"), own),
        ):
            self.assert_refused("volume-not-allowed", permissions.image, location, (), allowed)

    def test_rbd_images_are_allowed_by_their_names(self) -> None:
        (entries,) = (each.default for each in host.PERMISSIONS if each.name == "rbd_images")
        own = ("volumes/volume-*", "volumes/tenant/*")
        for location, allowed in (
            ("volumes/volume-1", entries),
            ("volumes/volume-1?id=cinder&cluster=ceph&mon_host=10.0.0.1:6789", entries),
            ("volumes/volume-1", own),
            ("volumes/volume-1@before", own),
            ("volumes/tenant/image", own),
            ("backups/image", ()),
        ):
            permissions.rbd_image(location, allowed)
        for location, allowed in (
            ("volumes/image-1", entries),
            ("volumes/tenant/volume-1", entries),
            ("backups/volume-1", own),
            ("volumes/volume-%2f1", ("volumes/volume-?1",)),
            ("volumes/volume-1?conf=/tmp/ceph.conf", ()),
            ("volumes/volume-1?keyring=/tmp/keyring", ()),
            ("volumes/volume-1?cluster=../../tmp/ceph", ()),
            ("/dev/vdb", ()),
        ):
            self.assert_refused("volume-not-allowed", permissions.rbd_image, location, allowed)

    def test_an_allowed_directory_may_be_a_link(self) -> None:
        (self.here / "other").symlink_to(self.allowed)
        found = permissions.volume_location(
            str(self.here / "other" / "v"), (str(self.here / "other"),)
        )
        self.assertEqual(str(self.allowed / "v"), found)

    def test_a_star_does_not_stand_for_directories(self) -> None:
        os.symlink("/dev/null", self.here / "x")
        self.assert_refused(
            "volume-not-allowed", permissions.volume_location, str(self.here / "x"), ("/*",)
        )

    def test_by_default_volumes_are_devices_and_files_of_nova_and_libvirt(self) -> None:
        (entries,) = (
            each.default for each in host.PERMISSIONS if each.name == "volume_directories"
        )
        device = self.useFixture(LoopDevice(self._file(self.here / "disk"))).path
        (self.here / "link").symlink_to(device)
        files = ("/var/lib/nova/instances/i/disk", "/var/lib/nova/mnt/h/volume-1")
        for path in (device, *files):
            self.assertEqual(path, permissions.volume_location(path, entries))
        for path in (
            self.here / "disk",
            self.here / "link",
            "/etc/shadow",
            "/dev/zero",
            "/dev/shm",
        ):
            self.assert_refused(
                "volume-not-allowed", permissions.volume_location, str(path), entries
            )

    def test_maps_lie_in_their_directories(self) -> None:
        entries = (str(self.allowed),)
        self.assertEqual(
            f"{self.allowed}/m.map", permissions.map_file(f"{self.allowed}/m.map", entries)
        )
        (self.allowed / "link").symlink_to(self.here / "outside")
        for path in (self.here / "outside", self.allowed / "link", f"{self.allowed}-2/m.map"):
            self.assert_refused("map-not-allowed", permissions.map_file, str(path), entries)
            self.assert_refused("map-not-allowed", permissions.map_file, str(path), ())

    def write(self, path: Path | str, *allowed: Path) -> None:
        with permissions.map_to_write(str(path), [str(each) for each in allowed]) as descriptor:
            os.write(descriptor, b"a map")

    def assert_not_written(self, code: str, path: Path | str, *allowed: Path) -> None:
        error = self.assertRaises(exception.RequestRefused, self.write, path, *allowed)
        self.assertEqual(code, error.kwargs["code"])

    def test_maps_are_written_to_files_in_the_directories_themselves(self) -> None:
        file = self._file(self.allowed / "m.map")
        self.write(file, self.here / "nowhere", self.allowed)
        self.assertEqual(b"a map", file.read_bytes()[:5])
        deep = self.allowed / "deep"
        deep.mkdir()
        for path in (self._file(deep / "m.map"), self._file(self.here / "m.map"), "/"):
            self.assert_not_written("map-not-allowed", path, self.allowed)
        self.assert_not_written("map-not-allowed", file)

    def test_what_is_no_file_of_its_own_is_not_written(self) -> None:
        other = self._file(self.here / "other")
        before = other.read_bytes()
        (self.allowed / "link").symlink_to(other)
        (self.allowed / "hard").hardlink_to(other)
        (self.allowed / "directory").mkdir()
        os.mkfifo(self.allowed / "pipe")
        reader = os.open(self.allowed / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        os.mknod(self.allowed / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        for name, code in (
            *(("link", "map-file"), ("directory", "map-file"), ("missing", "map-file")),
            *(("hard", "map-not-allowed"), ("pipe", "map-not-allowed")),
            ("null", "map-not-allowed"),
        ):
            self.assert_not_written(code, self.allowed / name, self.allowed)
        self.assertEqual(before, other.read_bytes())
        self.assertFalse((self.allowed / "missing").exists())

    def test_a_directory_that_is_swapped_for_a_link_leads_nowhere(self) -> None:
        outside = self.here / "outside"
        outside.mkdir()
        others = [self._file(outside / "m.map"), self._file(self.allowed / "m.map")]
        before = [each.read_bytes() for each in others]
        self.allowed.rename(self.here / "moved")
        self.allowed.symlink_to(outside)
        self.assert_not_written("map-file", self.allowed / "m.map", self.allowed)
        self.assert_not_written("map-file", outside / "m.map", self.allowed)
        moved = self.here / "moved" / "m.map"
        self.assertEqual(before, [others[0].read_bytes(), moved.read_bytes()])

    def test_a_map_is_written_where_it_was_opened_whatever_becomes_of_its_directory(self) -> None:
        outside = self.here / "outside"
        outside.mkdir()
        self._file(self.allowed / "m.map")
        other = self._file(outside / "m.map")
        before = other.read_bytes()
        with permissions.map_to_write(
            str(self.allowed / "m.map"), [str(self.allowed)]
        ) as descriptor:
            self.allowed.rename(self.here / "moved")
            self.allowed.symlink_to(outside)
            os.write(descriptor, b"a map")
        self.assertEqual(before, other.read_bytes())
        self.assertEqual(b"a map", (self.here / "moved" / "m.map").read_bytes()[:5])

    def test_sockets_are_in_the_hosts_directory_or_one_of_their_own(self) -> None:
        self.assertIsNone(permissions.socket_directory(f"{self.here}/q", self.here))
        found = permissions.socket_directory(f"{self.here}/new/q", self.here)
        self.assertEqual(f"{self.here}/new", found)

    def test_ports_are_sockets_in_their_directories(self) -> None:
        port = self.allowed / "port"
        self.addCleanup(self._listen(port).close)
        self.addCleanup(self._listen(self.here / "port").close)
        (self.allowed / "link").symlink_to(self.here / "port")
        (self.allowed / "file").touch()
        entries = ("/var/empty", str(self.allowed))
        self.assertEqual(str(port), permissions.channel(str(port), entries))
        for name in ("link", "file"):
            self.assert_refused(
                "channel-not-allowed", permissions.channel, str(self.allowed / name), entries
            )
        self.assert_refused(
            "agent-unreachable", permissions.channel, str(self.allowed / "gone"), entries
        )

    def _file(self, path: Path) -> Path:
        path.write_bytes(bytes(1 << 20))
        return path

    def _listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        return listener
