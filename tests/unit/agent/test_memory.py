# SPDX-License-Identifier: Apache-2.0

import mmap
import os
import subprocess
import sys

import numpy as np
import testtools

from nova_dmigrate import exception
from nova_dmigrate.agent import memory
from tests import base

PAGE = memory.PAGE_SIZE
ROOT = os.geteuid() == 0

MAPS = """\
55d0c0000000-55d0c1000000 r-xp 00000000 fd:00 1234   /usr/sbin/mysqld
55d0c2000000-55d0c2100000 rw-p 01000000 fd:00 1234   /usr/sbin/mysqld
55d0c3000000-55d0c3400000 rw-p 00000000 00:00 0      [heap]
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
7f0008000000-7f0010000000 rw-p 00000000 00:00 0      [anon: pool]
7f0010000000-7f0018000000 ---p 00000000 00:00 0
7f0020000000-7f0028000000 rw-p 00000000 00:0f 77     /anon_hugepage (deleted)
7f0030000000-7f0038000000 rw-s 00000000 00:0f 32768  /SYSV00000000 (deleted)
7f0040000000-7f0040001000 rw-p 00000000 00:00 0
7f0050000000-7f0058000000 rw-s 00000000 00:05 1      /dev/shm/other
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0      [stack]
not a line of that file
"""


class MapsTest(base.TestCase):
    def test_pools_are_found_under_every_name_that_the_kernel_gives_them(self):
        found = memory.parse_maps(MAPS, min_bytes=1 << 20)
        self.assertEqual(
            [
                memory.Mapping(0x7F0000000000, 0x7F0010000000),
                memory.Mapping(0x7F0020000000, 0x7F0028000000),
                memory.Mapping(0x7F0030000000, 0x7F0038000000),
            ],
            found,
        )

    def test_neighbours_are_one_mapping_before_small_ones_are_left_out(self):
        text = "".join(
            f"{start:x}-{start + PAGE:x} rw-p 00000000 00:00 0\n"
            for start in range(0x10000, 0x20000, PAGE)
        )
        self.assertEqual(
            [memory.Mapping(0x10000, 0x20000)], memory.parse_maps(text, min_bytes=0x10000)
        )
        self.assertEqual([], memory.parse_maps(text, min_bytes=0x10001))


@testtools.skipUnless(ROOT, "page frame numbers are for root only")
class ProcessMemoryTest(base.TestCase):
    """On the memory of this very process."""

    def setUp(self):
        super().setUp()
        self.pages = 64
        self.map = mmap.mmap(-1, self.pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.content = np.frombuffer(self.map, np.uint8)
        self.address = self.content.ctypes.data
        self.process = memory.ProcessMemory(os.getpid())
        self.addCleanup(self.process.close)

    def read(self, *pieces):
        starts, lengths = zip(*pieces)
        return self.process.read_pieces(
            np.array(starts, np.uint64) + np.uint64(self.address), np.array(lengths, np.uint64)
        )

    def test_only_pages_in_memory_have_a_number_and_asking_does_not_change_that(self):
        self.content[3 * PAGE] = 1
        self.content[9 * PAGE] = 1
        for _ in range(2):
            numbers = self.process.guest_pages(self.address, self.pages)
            self.assertEqual([3, 9], np.flatnonzero(numbers >= 0).tolist())
            self.assertNotEqual(numbers[3], numbers[9])
            self.assertEqual(self.pages - 2, np.count_nonzero(numbers == -1))

    def test_a_mapping_can_be_found_in_the_process_itself(self):
        self.assertTrue(
            any(
                found.start <= self.address and self.address + len(self.map) <= found.end
                for found in self.process.mappings(len(self.map))
            )
        )

    def test_pieces_come_one_after_the_other(self):
        self.content[:] = np.arange(self.content.size) % 251
        content, whole = self.read((0, 5), (PAGE - 3, 6), (7 * PAGE + 1, 1))
        self.assertTrue(whole)
        expected = [
            *self.content[:5],
            *self.content[PAGE - 3 : PAGE + 3],
            self.content[7 * PAGE + 1],
        ]
        self.assertEqual(expected, content.tolist())

    def test_more_pieces_than_one_call_takes_are_read(self):
        random = np.random.default_rng(3)
        self.content[:] = random.integers(0, 256, self.content.size, np.uint8)
        starts = random.integers(0, self.content.size - 8, 5000)
        content, whole = self.read(*((start, 8) for start in starts.tolist()))
        self.assertTrue(whole)
        expected = np.concatenate([self.content[start : start + 8] for start in starts])
        self.assertTrue(np.array_equal(expected, content))

    def test_what_has_gone_is_zeros_and_what_follows_is_read_all_the_same(self):
        # Not one that was just unmapped: the next allocation may get that very place.
        hole = PAGE - self.address
        self.content[:] = 7
        for bad in ([0], [1, 2], [1200, 1500, 1501, 2999], range(3000)):
            pieces = [(PAGE * (n % self.pages), 5) for n in range(3000)]
            for index in bad:
                pieces[index] = (hole % 2**64, 5)
            starts = np.array([start for start, _ in pieces], np.uint64)
            content, whole = self.process.read_pieces(
                starts + np.uint64(self.address), np.full(3000, 5, np.uint64)
            )
            self.assertFalse(whole)
            expected = np.full((3000, 5), 7, np.uint8)
            expected[list(bad)] = 0
            self.assertTrue(np.array_equal(expected, content.reshape(3000, 5)), str(bad))

    def test_no_pieces_are_no_bytes(self):
        empty = np.empty(0, np.uint64)
        content, whole = self.process.read_pieces(empty, empty)
        self.assertEqual((0, True), (content.size, whole))

    def test_a_process_that_has_ended_is_said_to_have_ended(self):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.addCleanup(child.stdin.close)
        with memory.ProcessMemory(child.pid) as process:
            child.kill()
            child.wait()
            one = np.array([4096], np.uint64)
            self.assertRaises(exception.ServerNotFound, process.read_pieces, one, one)
            self.assertRaises(exception.ServerNotFound, process.mappings)
            self.assertEqual([-1], process.guest_pages(1 << 40, 1).tolist())
        self.assertRaises(exception.ServerNotFound, memory.ProcessMemory, child.pid)

    def test_numbers_that_the_kernel_hides_are_a_missing_privilege(self):
        script = (
            "import os, numpy as np\n"
            "from nova_dmigrate import exception\n"
            "from nova_dmigrate.agent import memory\n"
            "here = np.ones(4096, np.uint8)\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"
            "try: memory.ProcessMemory(os.getpid()).guest_pages(here.ctypes.data, 1)\n"
            "except exception.PrivilegeError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        self.assertIn("CAP_SYS_ADMIN", done.stdout)

    def test_memory_of_another_user_is_a_missing_privilege(self):
        script = (
            "import os, numpy as np\n"
            "from nova_dmigrate import exception\n"
            "from nova_dmigrate.agent import memory\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "try: memory.ProcessMemory(1)\n"
            "except exception.PrivilegeError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        self.assertIn("CAP_SYS_PTRACE", done.stdout)
