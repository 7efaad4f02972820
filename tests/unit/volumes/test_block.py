# SPDX-License-Identifier: Apache-2.0

import errno
import os
import random
import threading
from pathlib import Path
from unittest import mock

import hypothesis
import testtools
from hypothesis import strategies as st

from nova_dmigrate import exception, volumes
from tests import base
from tests.unit.volumes import loop

BLOCK = 4096
CONTENT = random.Random(11).randbytes(64 * BLOCK)


def open_block(path: object) -> volumes.BlockReader:
    return volumes.BlockReader(volumes.VolumeSpec("vol", "block", str(path)))


def refuse_direct_open(path, flags, *args, real=os.open):
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return real(path, flags, *args)


class BlockTestCase(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "volume"
        self.path.write_bytes(CONTENT)

    def open(self, path: object = None) -> volumes.BlockReader:
        reader = open_block(path or self.path)
        self.addCleanup(reader.close)
        return reader

    def assert_all_read(self, reader: volumes.BlockReader) -> None:
        self.assertEqual(len(CONTENT), reader.size)
        buffer = volumes.aligned_buffer(reader.size)
        reader.read_into(0, buffer)
        self.assertEqual(CONTENT, bytes(buffer))


class ReadTest(BlockTestCase):
    def test_a_file_is_read_past_the_page_cache(self):
        reader = self.open()
        self.assertTrue(reader.direct)
        self.assert_all_read(reader)

    def test_buffers_of_any_alignment_and_form_are_filled(self):
        reader = self.open()
        space = volumes.aligned_buffer(len(CONTENT) + BLOCK)
        for shift in (0, 1, 511, 512, 2048):
            part = space[shift : shift + 3 * BLOCK]
            reader.read_into(5 * BLOCK, part)
            self.assertEqual(CONTENT[5 * BLOCK : 8 * BLOCK], bytes(part))
        pages = memoryview(bytearray(2 * BLOCK)).cast("B", (2, BLOCK))
        reader.read_into(BLOCK, pages)
        self.assertEqual(CONTENT[BLOCK : 3 * BLOCK], pages.tobytes())

    def test_an_unaligned_buffer_larger_than_the_bounce_buffer_is_filled(self):
        self.path.write_bytes(CONTENT * 10)
        buffer = memoryview(bytearray(len(CONTENT) * 10 + 1))[1:]
        self.open().read_into(0, buffer)
        self.assertEqual(CONTENT * 10, bytes(buffer))

    @hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=200)
    @hypothesis.given(st.integers(-1, 66), st.integers(0, 5), st.sampled_from([0, 0, 0, 8, 512]))
    def test_a_range_is_read_or_refused(self, number, blocks, shift):
        offset, length = number * BLOCK, blocks * BLOCK
        buffer = volumes.aligned_buffer(length + BLOCK)[shift:][:length]
        for reader in (self.reader_direct(), self.reader_buffered()):
            with reader:
                if offset >= 0 and 0 < length <= len(CONTENT) - offset:
                    reader.read_into(offset, buffer)
                    self.assertEqual(CONTENT[offset : offset + length], bytes(buffer))
                else:
                    self.assertRaises(exception.VolumeBoundsError, reader.read_into, offset, buffer)

    def reader_direct(self) -> volumes.BlockReader:
        return open_block(self.path)

    def reader_buffered(self) -> volumes.BlockReader:
        with mock.patch("os.open", refuse_direct_open):
            return open_block(self.path)

    def test_reads_that_return_less_than_asked_are_continued(self):
        reader = self.open()
        real = os.preadv
        with mock.patch("os.preadv", lambda fd, buffers, at: real(fd, [buffers[0][:BLOCK]], at)):
            self.assert_all_read(reader)

    def test_many_threads_can_read_at_once(self):
        reader = self.open()
        wrong = []

        def read(seed: int) -> None:
            chosen = random.Random(seed)
            buffer = volumes.aligned_buffer(4 * BLOCK)[seed % 2 * 8 :][: 3 * BLOCK]
            for _ in range(50):
                offset = chosen.randrange(61) * BLOCK
                reader.read_into(offset, buffer)
                if bytes(buffer) != CONTENT[offset : offset + len(buffer)]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], wrong)

    def test_what_another_host_wrote_meanwhile_is_seen(self):
        reader = self.open()
        buffer = volumes.aligned_buffer(BLOCK)
        reader.read_into(0, buffer)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
        self.addCleanup(os.close, descriptor)
        changed = volumes.aligned_buffer(BLOCK)
        changed[:] = b"y" * BLOCK
        os.pwritev(descriptor, [changed], 0)
        reader.read_into(0, buffer)
        self.assertEqual(b"y" * BLOCK, bytes(buffer))


class BoundsTest(BlockTestCase):
    def test_reads_outside_the_volume_and_unaligned_ones_are_refused(self):
        reader = self.open()
        buffer = volumes.aligned_buffer(2 * BLOCK)
        for offset, part in (
            (-BLOCK, buffer),
            (len(CONTENT) - BLOCK, buffer),
            (len(CONTENT), buffer),
            (2**63, buffer),
            (512, buffer),
            (0, buffer[:512]),
            (0, buffer[:0]),
        ):
            self.assertRaises(exception.VolumeBoundsError, reader.read_into, offset, part)

    def test_the_last_block_is_not_read_if_it_is_not_whole(self):
        self.path.write_bytes(CONTENT[:-100])
        reader = self.open()
        self.assertEqual(len(CONTENT) - 100, reader.size)
        buffer = volumes.aligned_buffer(BLOCK)
        error = self.assertRaises(
            exception.VolumeBoundsError, reader.read_into, len(CONTENT) - BLOCK, buffer
        )
        self.assertIn("Volume vol: 4096 bytes at 258048 are outside its 262044 bytes", str(error))


class FaultTest(BlockTestCase):
    def test_a_file_that_shrank_fails_where_it_ends_and_not_before(self):
        reader = self.open()
        os.truncate(self.path, 7 * BLOCK + 100)
        buffer = volumes.aligned_buffer(8 * BLOCK)
        reader.read_into(0, buffer[: 7 * BLOCK])
        self.assertEqual(CONTENT[: 7 * BLOCK], bytes(buffer[: 7 * BLOCK]))
        for offset in (0, 7, 8):
            error = self.assertRaises(
                exception.VolumeReadError, reader.read_into, offset * BLOCK, buffer
            )
            self.assertIn("the volume ends there", str(error))

    def test_a_closed_reader_fails_and_can_be_closed_again(self):
        reader = self.open()
        reader.close()
        reader.close()
        error = self.assertRaises(
            exception.VolumeReadError, reader.read_into, 0, volumes.aligned_buffer(BLOCK)
        )
        self.assertIn("closed", str(error))

    def test_a_read_under_way_keeps_its_descriptor_when_the_reader_is_closed(self):
        reader = self.open()
        real = os.preadv
        descriptors = []

        def close_and_read(fd, buffers, offset):
            reader.close()
            descriptors.append(fd)
            return real(fd, buffers, offset)

        buffer = volumes.aligned_buffer(BLOCK)
        with mock.patch("os.preadv", close_and_read):
            reader.read_into(BLOCK, buffer)
        self.assertEqual(CONTENT[BLOCK : 2 * BLOCK], bytes(buffer))
        self.assertRaises(OSError, os.fstat, descriptors[0])


class OpenTest(BlockTestCase):
    def assert_not_opened(self, what: str, path: object) -> None:
        before = len(os.listdir("/proc/self/fd"))
        error = self.assertRaises(exception.VolumeOpenError, open_block, path)
        self.assertIn(what, str(error))
        self.assertEqual(before, len(os.listdir("/proc/self/fd")))

    def test_what_is_not_there_or_not_a_volume_is_refused(self):
        self.assert_not_opened("No such file", self.path.with_name("missing"))
        self.assert_not_opened("neither a block device nor", self.path.parent)
        self.assert_not_opened("neither a block device nor", "/dev/zero")
        self.assert_not_opened("cannot be opened", "a\0b")
        # A regular file that has no size to ask for
        self.assert_not_opened("cannot be opened", "/proc/self/mem")

    def test_a_fifo_is_refused_without_waiting_for_its_writer(self):
        fifo = self.path.with_name("fifo")
        os.mkfifo(fifo)
        self.assert_not_opened("neither a block device nor", fifo)

    def test_where_direct_io_is_refused_the_page_cache_is_used_and_the_reason_logged(self):
        with mock.patch("os.open", refuse_direct_open):
            reader = self.open()
        self.assertFalse(reader.direct)
        self.assert_all_read(reader)
        self.assertIn("does not support direct I/O (Invalid argument)", self.log.output)

    def test_where_only_direct_reads_are_refused_the_page_cache_is_used_too(self):
        refused = OSError(errno.EINVAL, "Invalid argument")
        with mock.patch("os.preadv", side_effect=[refused, BLOCK]):
            reader = self.open()
        self.assertFalse(reader.direct)
        self.assert_all_read(reader)

    def test_a_file_system_without_direct_io_is_read(self):
        # The kernel's own files never support it.
        path = next((p for p in map(Path, ("/sys/kernel/btf/vmlinux",)) if p.exists()), None)
        if path is None:
            self.skipTest("this kernel has no large file without direct I/O")
        reader = self.open(path)
        self.assertFalse(reader.direct)
        buffer = volumes.aligned_buffer(2 * BLOCK)
        reader.read_into(BLOCK, buffer)
        self.assertEqual(path.read_bytes()[BLOCK : 3 * BLOCK], bytes(buffer))

    def test_a_first_block_that_cannot_be_read_does_not_cost_the_volume(self):
        with mock.patch("os.preadv", side_effect=OSError(errno.EIO, "Input/output error")):
            reader = self.open()
        self.assertTrue(reader.direct)
        self.assert_all_read(reader)


@testtools.skipUnless(loop.available(), "needs root and loop devices")
class DeviceTest(BlockTestCase):
    def test_a_block_device_is_read_with_direct_io(self):
        for sector_size in (512, 4096):
            device = self.useFixture(loop.LoopDevice(self.path, sector_size))
            reader = self.open(device.path)
            self.assertTrue(reader.direct)
            self.assert_all_read(reader)
            part = memoryview(bytearray(2 * BLOCK + 8))[8:]
            reader.read_into(3 * BLOCK, part)
            self.assertEqual(CONTENT[3 * BLOCK : 5 * BLOCK], bytes(part))
            reader.close()

    def test_a_media_error_fails_the_ranges_that_it_hits_and_no_other(self):
        device = self.useFixture(loop.LoopDevice(self.path))
        reader = self.open(device.path)
        # The device keeps its size: what lies beyond the file's new end is unreadable media.
        os.truncate(self.path, 6 * BLOCK)
        parts = [volumes.aligned_buffer(2 * BLOCK) for _ in range(5)]
        for number, part in enumerate(parts[:3]):
            reader.read_into(number * 2 * BLOCK, part)
        self.assertEqual(CONTENT[: 6 * BLOCK], b"".join(parts[:3]))
        for number, part in enumerate(parts[3:], start=3):
            error = self.assertRaises(
                exception.VolumeReadError, reader.read_into, number * 2 * BLOCK, part
            )
            self.assertIn("Input/output error", str(error))
