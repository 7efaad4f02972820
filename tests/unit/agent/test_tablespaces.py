# SPDX-License-Identifier: Apache-2.0

import dataclasses
import errno
import os

from nova_dmigrate import exception
from nova_dmigrate.agent import processes, tablespaces
from tests import base
from tests.unit.agent import innodb

# Flags of full_crc32: marker, page size 16 KiB
CRC = 0x15


class FirstPageTest(base.TestCase):
    def parse(self, flags, size=16384, **others):
        found = tablespaces.parse_first_page(innodb.first_page(7, flags, size, **others))
        return found and (found.space_id, found.page_size, found.full_crc32, found.excluded)

    def test_ordinary_tablespaces_of_every_generation_are_mappable(self):
        for flags, size, full_crc32 in [
            (0, 16384, False),  # COMPACT of all versions, the system tablespace
            (0x21, 16384, False),  # DYNAMIC: MySQL 5.6, 5.7, MariaDB 10.0 to 10.3
            (0x4021, 16384, False),  # MySQL 8 and 9, with SDI
            (0x4800 | 0x21, 16384, False),  # a general tablespace of MySQL 8
            (0x421, 16384, False),  # DATA DIRECTORY of MySQL
            (3 << 6, 4096, False),
            (4 << 6, 8192, False),
            (6 << 6 | 0x21, 32768, False),
            (7 << 6 | 0x21, 65536, False),
            (CRC, 16384, True),
            (0x13, 4096, True),
            (0x17, 65536, True),
        ]:
            self.assertEqual((7, size, full_crc32, None), self.parse(flags, size), hex(flags))

    def test_what_is_not_the_same_on_disk_is_excluded_with_its_reason(self):
        for flags, reason in [
            (0x29, "compressed"),  # KEY_BLOCK_SIZE=8
            (0x4027, "compressed"),
            (0x10021, "page-compressed"),  # MariaDB up to 10.3
            (CRC | 2 << 5, "page-compressed"),  # MariaDB, lz4
            (0x6021, "encrypted"),  # MySQL 8
            (0x2021, "encrypted"),  # MySQL 5.7
            (0x1021, "temporary"),  # MySQL 5.7
        ]:
            self.assertEqual(reason, self.parse(flags)[3], hex(flags))

    def test_the_mark_of_mariadb_says_whether_it_encrypts(self):
        for flags in (0x21, CRC):
            self.assertEqual("encrypted", self.parse(flags, mark=b"\1\20")[3])
            self.assertIsNone(self.parse(flags, mark=b"\0\20")[3])

    def test_other_pages_are_none(self):
        first = innodb.first_page(7, CRC)
        for page in (
            b"",
            first[:4000],
            bytes(16384),
            b"\xff" * 16384,
            innodb.page(7, 0),
            innodb.page(7, 1, kind=8),
            first[:34] + b"\0\0\0\x09" + first[38:],
            innodb.first_page(7, 0x12),
            innodb.first_page(7, 1 << 6),
            innodb.first_page(7, 9 << 6),
        ):
            self.assertIsNone(tablespaces.parse_first_page(page))


class DiscoverTest(base.TestCase):
    """In a directory of files; this very process plays the server that has some of them open."""

    def setUp(self):
        super().setUp()
        self.datadir = self.make_directory() / "data"
        (self.datadir / "db").mkdir(parents=True)
        self.server = processes.ServerProcess(
            pid=os.getpid(),
            start_time=processes.read_start_time(os.getpid()),
            executable="/usr/sbin/mysqld",
            datadir=str(self.datadir),
            root=f"/proc/{os.getpid()}/root",
            socket=None,
            uid=0,
        )

    def write(self, name, *pages):
        path = self.datadir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(pages))
        return path

    def discover(self):
        below = str(self.datadir.parent)
        self.unreadable = {}
        found = tablespaces.discover(self.server, self.unreadable.__setitem__)
        return [space for space in found if space.path.startswith(below)]

    def found(self):
        return {
            os.path.relpath(space.path, self.datadir): (
                space.space_id,
                space.first_page,
                space.pages,
                space.excluded,
            )
            for space in self.discover()
        }

    def test_what_is_there_and_cannot_be_read_is_told(self):
        self.write("db/t.ibd", innodb.first_page(5, CRC))
        (self.datadir / "db" / "circle.ibd").symlink_to("circle.ibd")
        (self.datadir / "db" / "gone.ibd").symlink_to("nothing.ibd")
        self.assertEqual(1, len(self.discover()))
        below = {
            os.path.relpath(path, self.datadir): error.errno
            for path, error in self.unreadable.items()
            if path.startswith(str(self.datadir))
        }
        self.assertEqual({"db/circle.ibd": errno.ELOOP}, below)

    def test_tablespaces_of_all_kinds_are_found(self):
        blank = bytes(16384)
        self.write("ibdata1", innodb.first_page(0, 0), blank, blank)
        self.write("mysql.ibd", innodb.first_page(0xFFFFFFFE, 0x4021))
        self.write("undo_001", innodb.first_page(0xFFFFFFEF, 0))
        self.write("undo001", innodb.first_page(1, CRC))
        self.write("db/t.ibd", innodb.first_page(5, CRC), blank)
        self.write("db/t#P#p0.ibd", innodb.first_page(6, CRC), blank[:5000])
        self.write("#innodb_temp/temp_1.ibt", innodb.first_page(0xF3FFFFFF, 0))
        self.write("ib_logfile0", b"\xff" * 16384)
        self.write("db/t.frm", innodb.first_page(9, CRC))
        self.assertEqual(
            {
                "ibdata1": (0, 0, 3, None),
                "mysql.ibd": (0xFFFFFFFE, 0, 1, None),
                "undo_001": (0xFFFFFFEF, 0, 1, None),
                "undo001": (1, 0, 1, None),
                "db/t.ibd": (5, 0, 2, None),
                "db/t#P#p0.ibd": (6, 0, 1, None),
                "#innodb_temp/temp_1.ibt": (0xF3FFFFFF, 0, 1, "temporary"),
            },
            self.found(),
        )

    def test_a_temporary_tablespace_is_known_before_its_first_page_is_written(self):
        self.write("ibdata1", innodb.first_page(0, CRC))
        self.write("ibtmp1", bytes(16384 * 5))
        self.assertEqual((0xFFFFFFFE, 0, 5, "temporary"), self.found()["ibtmp1"])
        # MySQL 8, where that number is the dictionary's
        self.write("mysql.ibd", innodb.first_page(0xFFFFFFFE, 0x4021))
        self.assertEqual((0xFFFFFFFD, 0, 5, "temporary"), self.found()["ibtmp1"])

    def test_the_files_of_a_system_tablespace_continue_each_other(self):
        blank = bytes(16384)
        self.write("ibdata1", innodb.first_page(0, 0), blank)
        for number in range(2, 11):
            begin = 2 * (number - 1)
            self.write(f"ibdata{number}", blank, innodb.page(0, begin + 1))
        found = self.found()
        self.assertEqual(10, len(found))
        for number in range(1, 11):
            self.assertEqual((0, 2 * (number - 1), 2, None), found[f"ibdata{number}"])

    def test_a_file_whose_pages_do_not_agree_continues_nothing(self):
        self.write("ibdata1", innodb.first_page(0, 0), bytes(16384))
        self.write("ibdata2", innodb.page(0, 2), innodb.page(0, 7))
        self.write("ibdata3", innodb.page(0, 9))
        self.write("ibdata4", innodb.page(3, 2))
        self.write("ibdata5", bytes(32768))
        self.assertEqual(["ibdata1"], list(self.found()))

    def test_a_page_size_other_than_16_kib_is_seen(self):
        self.write("ibdata1", innodb.first_page(0, 7 << 6, 65536), bytes(65536))
        (space,) = self.discover()
        self.assertEqual((65536, 2), (space.page_size, space.pages))

    def test_links_lead_to_tablespaces_elsewhere(self):
        far = self.datadir.parent / "far"
        self.write("../far/db/a.ibd", innodb.first_page(5, CRC))
        self.write("../far/b.ibd", innodb.first_page(6, CRC))
        self.write("../far/c/c.ibd", innodb.first_page(7, CRC))
        (self.datadir / "linked").symlink_to(far / "db")
        (self.datadir / "db" / "b.ibd").symlink_to("../../far/b.ibd")
        (self.datadir / "db" / "c.isl").write_text(f"{far}/c/c.ibd\n")
        (self.datadir / "db" / "circle").symlink_to("../db")
        (self.datadir / "db" / "nowhere.ibd").symlink_to("/nowhere")
        self.assertEqual({5, 6, 7}, {space[0] for space in self.found().values()})

    def test_a_file_is_one_however_many_ways_lead_to_it(self):
        path = self.write("db/t.ibd", innodb.first_page(5, CRC))
        os.link(path, self.datadir / "db" / "again.ibd")
        with open(path, "rb"), open(path, "rb"):
            self.assertEqual(1, len(self.discover()))

    def test_open_files_tell_whether_they_are_opened_with_o_direct(self):
        path = self.write("db/t.ibd", innodb.first_page(5, CRC))
        other = self.write("../far/x.ibd", innodb.first_page(6, CRC))
        self.write("db/closed.ibd", innodb.first_page(7, CRC))
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            self.skipTest(f"no O_DIRECT where temporary files are: {error.strerror}")
        for flags, direct in ((os.O_DIRECT, True), (0, False)):
            descriptors = [os.open(each, os.O_RDONLY | flags) for each in (path, other)]
            try:
                found = {space.space_id: space.direct for space in self.discover()}
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            self.assertEqual({5: direct, 6: direct, 7: None}, found)

    def test_a_server_that_has_ended_is_said_to_have_ended(self):
        gone = dataclasses.replace(self.server, pid=2**22 + 1)
        self.assertRaises(exception.ServerNotFound, tablespaces.discover, gone, self.fail)
