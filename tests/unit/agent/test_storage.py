# SPDX-License-Identifier: Apache-2.0

import os
import struct

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.agent import filesystem, storage
from tests import base

BLOCK = 4096
SERIAL = "0e1f2a3b-4c5d-6e7f-8"


class Sysfs:
    """A /sys made of directories."""

    def __init__(self, root):
        self.root = root
        self.tables = {}
        (root / "dev" / "block").mkdir(parents=True)

    def device(self, name, number, sectors, below="devices", **files):
        directory = self.root / below / name
        directory.mkdir(parents=True)
        major, minor = number
        (directory / "dev").write_text(f"{major}:{minor}\n")
        (directory / "size").write_text(f"{sectors}\n")
        for path, content in files.items():
            file = directory / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
        (self.root / "dev" / "block" / f"{major}:{minor}").symlink_to(directory)
        return directory

    def disk(self, name, number, sectors, **files):
        directory = self.device(name, number, sectors, **files)
        (directory / "device").mkdir(exist_ok=True)
        return directory

    def mapped(self, number, sectors, *targets):
        name = f"dm-{number[1]}"
        self.device(name, number, sectors, dm__name="vg-lv")
        self.tables[os.makedev(*number)] = [storage.DmTarget(*target) for target in targets]

    def stack(self, **names):
        return storage.DeviceStack(names, self.root, lambda device: self.tables[device])


class StackTest(base.TestCase):
    def setUp(self):
        super().setUp()
        self.sysfs = Sysfs(self.make_directory())

    def segments(self, major, minor, **names):
        found = self.sysfs.stack(**names).segments(os.makedev(major, minor))
        return [
            (each.start, each.length, each.volume_id, each.offset, each.volume_size)
            for each in found
        ]

    def refused(self, major, minor, **names):
        error = self.assertRaises(exception.StorageError, self.segments, major, minor, **names)
        return error.kwargs["code"]

    def test_a_whole_disk_is_named_by_its_serial(self):
        self.sysfs.disk("vdb", (253, 16), 2048, serial=SERIAL)
        size = 2048 * 512
        self.assertEqual([(0, size, SERIAL, 0, size)], self.segments(253, 16))

    def test_serials_of_scsi_and_nvme_disks_are_found(self):
        page = b"\0\x80" + struct.pack(">H", 36) + b"0e1f2a3b-4c5d-6e7f-8091-a2b3c4d5e6f7"
        self.sysfs.disk("sda", (8, 0), 8, device__vpd_pg80=page)
        self.sysfs.disk("nvme0n1", (259, 0), 8, device__serial=f"{SERIAL}  \n")
        self.assertEqual("0e1f2a3b-4c5d-6e7f-8091-a2b3c4d5e6f7", self.segments(8, 0)[0][2])
        self.assertEqual(SERIAL, self.segments(259, 0)[0][2])

    def test_a_disk_without_a_serial_needs_a_name(self):
        self.sysfs.disk("vdb", (253, 16), 8)
        self.assertEqual("no-serial", self.refused(253, 16))
        self.assertEqual("named", self.segments(253, 16, vdb="named")[0][2])

    def test_a_serial_that_cannot_be_a_name_is_none(self):
        self.sysfs.disk("vdb", (253, 16), 8, serial="../etc")
        self.assertEqual("no-serial", self.refused(253, 16))

    def test_a_partition_is_a_part_of_its_disk(self):
        disk = self.sysfs.disk("vda", (252, 0), 100000, serial=SERIAL)
        self.sysfs.device(
            "vda1", (252, 1), 4096, disk.relative_to(self.sysfs.root), start=2048, partition=1
        )
        self.assertEqual([(0, 4096 * 512, SERIAL, 2048 * 512, 100000 * 512)], self.segments(252, 1))

    def test_a_logical_volume_is_made_of_pieces_of_several_disks(self):
        disk = self.sysfs.disk("vda", (252, 0), 100000, serial="one")
        self.sysfs.device(
            "vda2", (252, 2), 50000, disk.relative_to(self.sysfs.root), start=2048, partition=2
        )
        self.sysfs.disk("vdb", (252, 16), 70000, serial="two")
        self.sysfs.mapped(
            (254, 0),
            3000,
            (1000, 2000, "linear", "252:16 384"),
            (0, 1000, "linear", "252:2 2048"),
        )
        self.assertEqual(
            [
                (0, 1000 * 512, "one", (2048 + 2048) * 512, 100000 * 512),
                (1000 * 512, 2000 * 512, "two", 384 * 512, 70000 * 512),
            ],
            self.segments(254, 0),
        )

    def test_volumes_on_volumes_are_followed_and_pieces_behind_the_end_are_cut(self):
        self.sysfs.disk("vdb", (252, 16), 1000, serial="two")
        self.sysfs.mapped((254, 1), 900, (0, 900, "linear", "252:16 100"))
        self.sysfs.mapped((254, 0), 900, (0, 900, "linear", "254:1 400"))
        self.assertEqual([(0, 500 * 512, "two", 500 * 512, 1000 * 512)], self.segments(254, 0))

    def test_what_is_not_linear_is_refused_by_name(self):
        self.sysfs.disk("vdb", (252, 16), 1000, serial="two")
        for minor, (kind, code) in enumerate(
            [
                ("crypt", "dm-crypt"),
                ("raid", "raid"),
                ("striped", "raid"),
                ("thin", "unsupported-device"),
                ("snapshot", "unsupported-device"),
            ]
        ):
            self.sysfs.mapped((254, minor), 900, (0, 900, kind, "whatever 252:16 0"))
            self.assertEqual(code, self.refused(254, minor))

    def test_a_linear_target_with_odd_arguments_is_refused(self):
        self.sysfs.mapped((254, 0), 900, (0, 900, "linear", "252:16"))
        self.assertEqual("unsupported-device", self.refused(254, 0))

    def test_a_raid_is_refused_even_below_a_logical_volume(self):
        self.sysfs.device("md0", (9, 0), 1000, md__level="raid1")
        self.sysfs.mapped((254, 0), 900, (0, 900, "linear", "9:0 0"))
        self.assertEqual("raid", self.refused(9, 0))
        self.assertEqual("raid", self.refused(254, 0))

    def test_a_device_that_is_no_disk_is_one_only_by_name(self):
        self.sysfs.device("loop3", (7, 3), 1000)
        self.assertEqual("unsupported-device", self.refused(7, 3))
        self.assertEqual("lab", self.segments(7, 3, loop3="lab")[0][2])

    def test_a_file_system_without_a_device_is_refused(self):
        self.assertEqual("unsupported-device", self.refused(0, 40))

    def test_devices_that_stand_on_each_other_in_a_circle_are_refused(self):
        self.sysfs.mapped((254, 0), 900, (0, 900, "linear", "254:1 0"))
        self.sysfs.mapped((254, 1), 900, (0, 900, "linear", "254:0 0"))
        self.assertEqual("unsupported-device", self.refused(254, 0))


class PlaceTest(base.TestCase):
    @hypothesis.settings(max_examples=80)
    @hypothesis.given(st.data())
    def test_every_block_is_placed_where_its_sectors_lie(self, data):
        """Against a model that goes sector by sector."""
        aligned = data.draw(st.booleans())
        step = 8 if aligned else 1
        sectors = st.integers(1, 6).map(lambda n: n * step)
        extents, logical, physical = [], 0, 0
        for _ in range(data.draw(st.integers(0, 4))):
            logical += data.draw(st.integers(0, 3)) * step
            physical += data.draw(st.integers(0, 3)) * step
            length = data.draw(sectors)
            extents.append((logical, physical, length))
            logical, physical = logical + length, physical + length
        segments, start = [], 0
        for index in range(data.draw(st.integers(0, 3))):
            length = data.draw(sectors)
            offset = data.draw(st.integers(0, 40)) * step
            segments.append(
                storage.Segment(start * 512, length * 512, f"v{index}", 2**30, offset * 512)
            )
            start += length
        columns = np.array(extents, np.uint64).reshape(-1, 3).T * np.uint64(512)
        placed = storage.place(filesystem.Extents(*columns), segments)

        found = {}
        for part in placed:
            for begin, offset, length in zip(
                part.logical.tolist(), part.offset.tolist(), part.length.tolist()
            ):
                self.assertEqual((0, 0, 0), (begin % BLOCK, offset % BLOCK, length % BLOCK))
                for at in range(0, length, BLOCK):
                    found[begin + at] = (part.volume_id, offset + at)
        for begin in range(0, logical * 512, BLOCK):
            where = {self.sector(extents, segments, begin // 512 + n, n) for n in range(8)}
            whole = len(where) == 1 and None not in where
            if whole and where.copy().pop()[1] % BLOCK == 0:
                # One block of the volume; found, unless two extents or segments share it.
                if begin in found:
                    self.assertEqual(where.pop(), found[begin])
                else:
                    self.assertTrue(self.split(extents, segments, begin // 512))
            else:
                self.assertNotIn(begin, found)

    def sector(self, extents, segments, sector, back):
        """(volume, offset of the block that begins ``back`` sectors before) of a sector."""
        for logical, physical, length in extents:
            if logical <= sector < logical + length:
                at = (physical + sector - logical) * 512
                for segment in segments:
                    if segment.start <= at < segment.start + segment.length:
                        return segment.volume_id, segment.offset + at - segment.start - back * 512
        return None

    def split(self, extents, segments, sector):
        owner = {
            (index, number)
            for n in range(8)
            for index, (logical, physical, length) in enumerate(extents)
            if logical <= sector + n < logical + length
            for number, segment in enumerate(segments)
            if segment.start
            <= (physical + sector + n - logical) * 512
            < segment.start + segment.length
        }
        return len(owner) > 1

    def test_a_partition_that_does_not_begin_at_a_block_shares_none_with_the_file(self):
        extents = filesystem.Extents(*(np.array([n], np.uint64) for n in (0, 8192, 65536)))
        (placed,) = storage.place(extents, [storage.Segment(0, 2**20, "v", 2**20, 63 * 512)])
        self.assertEqual(0, placed.logical.size)


class DmStatusTest(base.TestCase):
    """The kernel's answer, as Linux lays it out."""

    def reply(self, *targets, flags=16, cut=None):
        body = b""
        for start, length, kind, arguments in targets:
            text = arguments.encode() + b"\0"
            text += bytes(-(40 + len(text)) % 8)
            following = len(body) + 40 + len(text)
            body += struct.pack("<QQiI16s", start, length, 0, following, kind.encode()) + text
        header = struct.pack("<3I", 4, 48, 0)
        header += struct.pack("<IIIiIIIQ", 16384, 312, len(targets), 1, flags, 0, 0, 0xFE00)
        return (header + bytes(312 - len(header)) + body)[:cut]

    def test_each_target_is_read(self):
        reply = self.reply((0, 1000, "linear", "252:2 2048"), (1000, 8, "linear", "252:16 0"))
        self.assertEqual(
            [
                storage.DmTarget(0, 1000, "linear", "252:2 2048"),
                storage.DmTarget(1000, 8, "linear", "252:16 0"),
            ],
            storage.parse_dm_status(reply, "dm-0"),
        )

    def test_an_answer_that_was_cut_or_makes_no_sense_is_refused(self):
        whole = self.reply((0, 1000, "linear", "252:2 2048"))
        for reply in (
            self.reply((0, 1000, "linear", "252:2 2048"), flags=16 | 256),
            whole[:330],
            whole[:354],
        ):
            self.assertRaises(exception.StorageError, storage.parse_dm_status, reply, "dm-0")
