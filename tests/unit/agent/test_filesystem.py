# SPDX-License-Identifier: Apache-2.0

import errno
import os
import struct
from unittest import mock

from nova_dmigrate import exception
from nova_dmigrate.agent import filesystem
from tests import base

MOUNTINFO = """\
22 1 252:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
25 22 0:22 / /proc rw,nosuid - proc proc rw
31 22 253:16 / /var/lib/mysql rw,noatime shared:5 master:2 - xfs /dev/vdb rw,attr2,inode64
32 22 253:32 / /srv rw - ext4 /dev/vdc rw,data=journal
33 22 0:40 / /btr rw - btrfs /dev/vdd rw,space_cache
34 22 253:48 /sub /odd\\040name rw - ext3 /dev/vde
not a mount
"""


class MountsTest(base.TestCase):
    def setUp(self):
        super().setUp()
        self.mounts = filesystem.parse_mounts(MOUNTINFO)

    def check(self, major, minor):
        filesystem.check_mount("/x", self.mounts.get(os.makedev(major, minor)))

    def test_file_systems_whose_extents_mean_the_device_are_accepted(self):
        for device in ((252, 1), (253, 16), (253, 48)):
            self.check(*device)

    def test_others_are_refused_by_name(self):
        error = self.assertRaises(exception.StorageError, self.check, 0, 40)
        self.assertIn("btrfs", str(error))
        self.assertEqual("unsupported-filesystem", error.kwargs["code"])
        self.assertRaises(exception.StorageError, self.check, 9, 9)

    def test_a_journal_of_data_is_refused(self):
        error = self.assertRaises(exception.StorageError, self.check, 253, 32)
        self.assertEqual("journalled-data", error.kwargs["code"])

    def test_the_mounts_of_a_process_that_has_ended_are_those_of_no_server(self):
        self.assertRaises(exception.ServerNotFound, filesystem.read_mounts, 2**22 + 1)
        self.assertTrue(filesystem.read_mounts(os.getpid()))


class FakeFile:
    """Answers the ioctls for a file with these extents: (logical, physical, length, flags)."""

    def __init__(self, extents, per_call=512, xflags=0, error=None):
        self.extents = extents
        self.per_call = per_call
        self.xflags = xflags
        self.error = error

    def ioctl(self, descriptor, request, buffer, mutate):
        if request == filesystem._FS_IOC_FSGETXATTR:
            struct.pack_into("<I", buffer, 0, self.xflags)
            return 0
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        start, _, _, _, room, _ = struct.unpack_from("<QQIIII", buffer)
        behind = [extent for extent in self.extents if extent[0] + extent[2] > start]
        told = behind[: min(room, self.per_call)]
        struct.pack_into("<I", buffer, 20, len(told))
        for index, (logical, physical, length, flags) in enumerate(told):
            struct.pack_into(
                "<QQQ16xI12x", buffer, 32 + 56 * index, logical, physical, length, flags
            )
        return 0


class ExtentsTest(base.TestCase):
    def extents(self, *args, **kwargs):
        file = FakeFile(*args, **kwargs)
        with mock.patch.object(filesystem.fcntl, "ioctl", file.ioctl):
            found = filesystem.file_extents(0, "/x")
        return list(zip(found.logical.tolist(), found.physical.tolist(), found.length.tolist()))

    def test_all_extents_come_however_many_a_call_returns(self):
        extents = [(n * 8192, n * 65536, 4096, 0) for n in range(1300)]
        extents[-1] = (*extents[-1][:3], 1)
        for per_call in (1, 7, 512):
            found = self.extents(extents, per_call)
            self.assertEqual([extent[:3] for extent in extents], found)

    def test_a_file_whose_last_extent_is_not_marked_ends_all_the_same(self):
        self.assertEqual([(0, 4096, 4096)], self.extents([(0, 4096, 4096, 0)]))
        self.assertEqual([], self.extents([]))

    def test_extents_that_are_not_what_the_file_has_are_left_out(self):
        for flag in (0x2, 0x4, 0x8, 0x80, 0x100, 0x200, 0x400, 0x800):
            found = self.extents([(0, 4096, 4096, flag), (4096, 81920, 4096, 1)])
            self.assertEqual([(4096, 81920, 4096)], found, hex(flag))

    def test_merged_and_shared_extents_are_good(self):
        self.assertEqual([(0, 4096, 4096)], self.extents([(0, 4096, 4096, 0x3001)]))

    def test_a_file_system_that_does_not_tell_is_an_error_of_the_file(self):
        error = self.assertRaises(exception.StorageError, self.extents, [], error=errno.EOPNOTSUPP)
        self.assertIn("/x", str(error))

    def test_a_file_on_the_real_time_device_is_refused(self):
        error = self.assertRaises(exception.StorageError, self.extents, [], xflags=1)
        self.assertIn("real-time", str(error))
