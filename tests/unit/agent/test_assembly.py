# SPDX-License-Identifier: Apache-2.0

from unittest import mock

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import buffermap, exception
from nova_dmigrate.agent import assembly
from tests import base

SIZE = 1 << 32


def collect(pages, size=SIZE, pieces=1):
    collector = assembly.PageCollector("v", size, len(pages))
    for part in np.array_split(np.array(pages, np.uint64).reshape(-1, 2), pieces):
        collector.add(part[:, 0], part[:, 1])
    return collector.finish()


class CollectorTest(base.TestCase):
    @hypothesis.settings(max_examples=150)
    @hypothesis.given(st.data())
    def test_a_map_says_what_was_collected(self, data):
        """Against a dictionary, with runs, gaps, repetition, and steps of a few entries."""
        runs = data.draw(
            st.lists(
                st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 7)), max_size=12
            )
        )
        pages = [(guest + n, block + n) for guest, block, length in runs for n in range(length)]
        shuffled = data.draw(st.permutations(pages))
        expected = {}
        for guest, block in shuffled:
            expected[guest] = min(block, expected.get(guest, block))
        with mock.patch.object(assembly, "_STEP", data.draw(st.integers(1, 9))):
            made = collect(shuffled, pieces=data.draw(st.integers(1, 4)))
        guest, block = made.pages()
        self.assertEqual(sorted(expected.items()), list(zip(guest.tolist(), block.tolist())))
        self.assertEqual(len(expected), made.page_count)
        again = buffermap.BufferMap.from_chunks(
            buffermap.BufferMap((made,)).to_chunks(), buffermap.MapLimits()
        )
        self.assertTrue(all(map(np.array_equal, (guest, block), again.volumes[0].pages())))

    def test_pages_in_a_row_become_runs(self):
        made = collect([(n, n + 5) for n in range(1000)] + [(n + 5000, n) for n in range(1000)])
        self.assertEqual([1000, 1000], made.lengths.tolist())
        self.assertLessEqual(made.nbytes, 24)

    def test_scattered_pages_take_eight_bytes_each(self):
        random = np.random.default_rng(1)
        pages = np.stack([random.permutation(5000), random.permutation(5000)], axis=1)
        made = collect(pages.tolist())
        self.assertIsNone(made.lengths)
        self.assertEqual(5000 * 8, made.nbytes)

    def test_blocks_behind_the_end_of_the_volume_are_left_out(self):
        collector = assembly.PageCollector("v", 10 * 4096 + 100, 4)
        taken = collector.add(np.arange(4, dtype=np.uint64), np.array([8, 9, 10, 11], np.uint64))
        self.assertEqual(2, taken)
        self.assertEqual([0, 1], collector.finish().pages()[0].tolist())

    def test_nothing_collected_is_an_empty_map(self):
        made = collect([])
        self.assertEqual(0, made.page_count)
        self.assertEqual(0, made.nbytes)

    def test_a_name_that_no_volume_has_is_refused(self):
        self.assertRaises(exception.BufferMapError, assembly.PageCollector, "no name", SIZE, 1)
