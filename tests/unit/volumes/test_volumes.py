# SPDX-License-Identifier: Apache-2.0

from nova_dmigrate import exception, volumes
from tests import base


class OpenVolumeTest(base.TestCase):
    def test_a_volume_is_opened_with_the_driver_of_its_specification(self):
        path = self.make_directory() / "volume"
        path.write_bytes(bytes(8192))
        spec = volumes.VolumeSpec("vol", "block", str(path))
        with volumes.open_volume(spec, volumes.VolumeAccess()) as reader:
            self.assertIsInstance(reader, volumes.BlockReader)
            self.assertEqual(("vol", 8192), (reader.volume_id, reader.size))

    def test_an_unknown_driver_is_refused_with_the_known_ones_named(self):
        error = self.assertRaises(
            exception.VolumeOpenError,
            volumes.open_volume,
            volumes.VolumeSpec("vol", "tape", "x"),
            volumes.VolumeAccess(),
        )
        self.assertIn(
            "Volume vol: there is no driver 'tape'; known: block, iscsi, luks, nbd, rbd", str(error)
        )

    def test_a_secret_is_not_told(self):
        self.assertNotIn("key", repr(volumes.VolumeSpec("vol", "rbd", "x/y", secret="key")))


class Store(volumes.VolumeReader):
    """A volume in memory, one block of which cannot be read."""

    volume_id = "vol"
    size = 8 * 4096

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.check_range(offset, buffer.nbytes)
        if offset == 4096:
            raise exception.VolumeReadError(volume=self.volume_id, reason="scratched")
        buffer[:] = bytes([offset // 4096]) * buffer.nbytes

    def close(self) -> None:
        self.size = 0


class ReaderTest(base.TestCase):
    def test_a_reader_is_closed_at_the_end_of_its_block(self):
        with Store() as reader:
            self.assertEqual(8 * 4096, reader.size)
        self.assertEqual(0, reader.size)

    def test_ranges_outside_the_volume_or_its_blocks_are_refused(self):
        store = Store()
        store.check_range(0, store.size)
        store.check_range(store.size - 4096, 4096)
        for offset, length in (
            (0, 0),
            (0, -4096),
            (0, 4095),
            (512, 4096),
            (-4096, 4096),
            (store.size, 4096),
            (store.size - 4096, 8192),
            (2**64, 4096),
        ):
            self.assertRaises(exception.VolumeBoundsError, store.check_range, offset, length)

    def test_an_aligned_buffer_has_the_size_asked_for_and_is_zero(self):
        for size in (1, 4096, 5000):
            self.assertEqual(bytes(size), bytes(volumes.aligned_buffer(size)))
