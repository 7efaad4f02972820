# SPDX-License-Identifier: Apache-2.0
"""The made-up server: the agent finds in it what there is, and all sides agree on its map."""

import numpy as np

from nova_dmigrate.agent import location, memory
from nova_dmigrate.buffermap import BufferMap
from tests import base
from tests.scale import sides, synthetic
from tests.scale.synthetic import FRAME, PER_FRAME, Permutation, Shape

GIB = 0.25


class PermutationTest(base.TestCase):
    def test_each_number_goes_to_another_one(self) -> None:
        for size in (1, 2, 3, 255, 256, 1000, 1 << 13):
            found = Permutation(size, seed=1).of(np.arange(size, dtype=np.uint64))
            self.assertEqual(list(range(size)), np.sort(found).tolist())

    def test_it_is_a_disorder(self) -> None:
        found = Permutation(10000, seed=1).of(np.arange(10000, dtype=np.uint64))
        steps = np.diff(found.astype(np.int64))
        self.assertGreater(np.unique(steps).size, 7000)


class SyntheticTest(base.TestCase):
    def test_the_largest_guest_is_one_of_3904_gib(self) -> None:
        shape = Shape.of_gib(3072)
        self.assertEqual((3072 << 30, 3904 << 30), (shape.bytes, shape.guest_bytes))
        self.assertEqual(3072 << 16, shape.frames)
        self.assertRaises(ValueError, Shape.of_gib, 1, "unknown")

    def test_each_page_of_the_pool_is_another_page_of_the_guest(self) -> None:
        for layout in synthetic.LAYOUTS:
            shape = Shape.of_gib(GIB, layout)
            table = location.PlaceTable(synthetic.files(shape))
            process = synthetic.Memory(shape, table)
            guest = process.guest_pages(synthetic.BASE, shape.frames * PER_FRAME)
            self.assertEqual(guest.size, np.unique(guest).size)
            self.assertLess(int(guest.max()), shape.guest_bytes // memory.PAGE_SIZE)

    def test_the_agent_maps_what_is_clean(self) -> None:
        for layout in synthetic.LAYOUTS:
            shape = Shape.of_gib(GIB, layout)
            made = BufferMap.join(list(sides.ServerMap(shape)))
            share = made.page_count / (shape.frames * PER_FRAME)
            self.assertAlmostEqual(1 - shape.dirty - shape.free, share, 2)
            (volume,) = made.volumes
            self.assertEqual(synthetic.VOLUME, volume.volume_id)
            _, blocks = volume.pages()
            self.assertEqual(blocks.size, np.unique(blocks).size)
            self.assertLess(int(blocks.max()), shape.volume_bytes // memory.PAGE_SIZE)

    def test_the_frames_of_one_extent_lie_where_the_file_system_has_it(self) -> None:
        shape = Shape.of_gib(GIB)
        files = synthetic.files(shape)
        self.assertEqual(shape.table_pages, sum(file.pages for file in files))
        offsets = np.concatenate([part.offset for file in files for part in file.placed])
        self.assertEqual(offsets.size, np.unique(offsets).size)
        self.assertLessEqual(int(offsets.max()) + FRAME * 8192, shape.volume_bytes)
