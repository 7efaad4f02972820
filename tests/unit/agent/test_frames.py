# SPDX-License-Identifier: Apache-2.0

from unittest import mock

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate.agent import frames
from tests import base

PER_FRAME = 2


def fill(table, rows, pieces=1):
    """Rows (place, lsn); the guest pages of row n are 2n and 2n + 1."""
    columns = np.array(rows, np.uint64).reshape(-1, 2)
    guest = np.arange(len(rows) * PER_FRAME).reshape(-1, PER_FRAME)
    for part in np.array_split(np.arange(len(rows)), pieces):
        table.add(columns[part, 0], columns[part, 1].astype(np.uint32), guest[part])


def kept(table):
    return {
        int(pages[0]) // PER_FRAME: int(place)
        for places, guests in table.kept()
        for place, pages in zip(places, guests)
    }


class FrameTableTest(base.TestCase):
    @hypothesis.settings(max_examples=150)
    @hypothesis.given(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), max_size=40),
        st.integers(1, 7),
        st.integers(1, 7),
        st.integers(1, 40),
        st.sampled_from([1, 4, 32]),
        st.integers(1, 4),
    )
    def test_of_frames_with_the_same_page_the_newest_stay(
        self, rows, slab, step, group, most, pieces
    ):
        table = frames.FrameTable(PER_FRAME)
        with (
            mock.patch.object(frames, "_SLAB_FRAMES", slab),
            mock.patch.object(frames, "_STEP", step),
            mock.patch.object(frames, "_GROUP_FRAMES", group),
            mock.patch.object(frames, "_MOST_GROUPS", most),
        ):
            fill(table, rows, pieces)
            self.assertEqual(len(rows), len(table))
            left_out = table.keep_newest()
            found = kept(table)
            self.assertEqual(found, kept(table))
        newest = {}
        for place, lsn in rows:
            newest[place] = max(lsn, newest.get(place, 0))
        expected = {n: place for n, (place, lsn) in enumerate(rows) if lsn == newest[place]}
        self.assertEqual(expected, found)
        self.assertEqual(len(rows) - len(expected), left_out)

    def test_places_and_guest_pages_up_to_32_bits_come_back(self):
        table = frames.FrameTable(PER_FRAME)
        top = 2**32 - 2
        table.add(np.array([top], np.uint64), np.array([1], np.uint32), np.array([[top, top - 1]]))
        self.assertEqual(0, table.keep_newest())
        ((place, guest),) = table.kept()
        self.assertEqual([top], place.tolist())
        self.assertEqual([[top, top - 1]], guest.tolist())
