# SPDX-License-Identifier: Apache-2.0

from unittest import mock

import numpy as np

from nova_dmigrate.agent import bands
from tests import base

HIGHEST = 2**32 - 2


class BandsTest(base.TestCase):
    def choose(self, *guests):
        return list(bands.choose(np.array(guest, np.uint32) for guest in guests))

    def check(self, guest):
        """Each of these different pages is in one band, and none has more than it may."""
        chosen = self.choose(guest)
        counts = [int(np.count_nonzero(band.holds(guest))) for band in chosen]
        self.assertEqual(counts, [band.pages for band in chosen])
        self.assertEqual(guest.size, sum(counts))
        self.assertLessEqual(max(counts), bands.MAX_PAGES)
        edges = [edge for band in chosen for edge in (band.first, band.behind)]
        self.assertEqual(sorted(edges), edges)
        return chosen

    def test_few_pages_are_one_band_wherever_they_lie(self):
        (band,) = self.check(np.array([[5, HIGHEST], [70000, 1 << 31]], np.uint32))
        self.assertEqual(4, band.pages)
        self.assertEqual([], self.choose())
        self.assertEqual([], self.choose([]))

    def test_many_pages_are_a_few_bands(self):
        random = np.random.default_rng(1)
        for step in (3, 800):
            guest = np.arange(5 << 20, dtype=np.uint32) * np.uint32(step)
            random.shuffle(guest)
            self.assertLessEqual(len(self.check(guest)), 2 * guest.size // bands.MAX_PAGES + 1)

    def test_pages_that_crowd_are_cut_apart(self):
        crowd = np.arange(5 << 20, dtype=np.uint32) + np.uint32(12345)
        self.assertLessEqual(len(self.check(np.append(crowd, np.uint32(HIGHEST)))), 4)

    def test_the_pages_of_terabytes_are_not_more_bands(self):
        page = np.arange(0, 1 << 32, 1 << 10, dtype=np.uint64).astype(np.uint32)
        with mock.patch.object(bands, "MAX_PAGES", 1 << 12):
            chosen = self.choose(page)
        self.assertEqual(page.size, sum(band.pages for band in chosen))
        self.assertLessEqual(len(chosen), 34)

    def test_a_page_that_is_found_over_and_over_again_counts_little(self):
        (band,) = self.choose(np.full(3 << 20, 77, np.uint32))
        self.assertEqual(1 << 16, band.pages)
