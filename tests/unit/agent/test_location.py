# SPDX-License-Identifier: Apache-2.0

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate.agent import location, storage
from tests import base

BLOCK = 4096
PER_FRAME = 4
PAGE = BLOCK * PER_FRAME
SIZE = 1 << 40


def placed(volume, *stretches):
    """Stretches (block in the file, block on the volume, blocks) of a file."""
    columns = np.array(stretches, np.uint64).reshape(-1, 3).T * np.uint64(BLOCK)
    return storage.Placed(volume, SIZE, *columns)


def file(space, first, pages, *parts, excluded=None, full_crc32=False):
    return location.File(space, first, pages, full_crc32, excluded, parts)


def u32(*values):
    return np.array(values, np.uint32)


class PlaceTableTest(base.TestCase):
    def test_pages_of_known_files_have_places_that_differ(self):
        table = location.PlaceTable(
            [
                file(0xFFFFFFFE, 0, 3),
                file(0, 0, 2, full_crc32=True),
                file(0, 2, 4),
                file(7, 0, 5, excluded="encrypted"),
                file(8, 0, 1, excluded="compressed"),
            ]
        )
        known, place, full_crc32, reason = table.find(
            u32(0, 0, 0, 0, 7, 7, 8, 0xFFFFFFFE, 0xFFFFFFFE, 1, 0xFFFFFFFF),
            u32(0, 1, 2, 6, 4, 5, 0, 2, 3, 0, 0xFFFFFFFF),
        )
        self.assertEqual([1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0], known.astype(int).tolist())
        places = place[known & (reason < 0)].tolist()
        self.assertEqual(len(places), len(set(places)))
        self.assertLess(max(places), 9)
        self.assertEqual([1, 1, 0], full_crc32[:3].astype(int).tolist())
        names = [table.reasons[n] if n >= 0 else None for n in reason[known].tolist()]
        self.assertEqual([None, None, None, "encrypted", "compressed", None], names)

    def test_excluded_files_need_no_places_and_there_are_not_too_many(self):
        most = location.MAX_PLACES
        location.PlaceTable([file(0, 0, most + 7, excluded="raid"), file(1, 0, most)])
        for pages in (1, 2**64 - most):  # also where 64 bits wrap
            files = [file(0, 0, most), file(1, 0, pages)]
            self.assertRaises(ValueError, location.PlaceTable, files)

    def test_without_files_nothing_is_known(self):
        known, *_ = location.PlaceTable([]).find(u32(0, 1), u32(0, 1))
        self.assertEqual([False, False], known.tolist())

    def test_an_empty_file_has_no_pages(self):
        known, *_ = location.PlaceTable([file(5, 0, 0)]).find(u32(5), u32(0))
        self.assertEqual([False], known.tolist())


class BlockTableTest(base.TestCase):
    @hypothesis.settings(max_examples=100)
    @hypothesis.given(st.data())
    def test_every_block_of_every_page_is_found_where_its_file_has_it(self, data):
        """Against a model that goes block by block; extents end anywhere within pages."""
        files, model = [], {}
        for space in range(data.draw(st.integers(1, 3))):
            pages = data.draw(st.integers(1, 5))
            stretches, at = {"one": [], "two": []}, 0
            while at < pages * PER_FRAME + 3:
                at += data.draw(st.integers(0, 3))
                blocks = data.draw(st.integers(1, 9))
                volume = data.draw(st.sampled_from(["one", "two"]))
                target = data.draw(st.integers(0, 1000))
                stretches[volume].append((at, target, blocks))
                for n in range(blocks):
                    model[space, at + n] = (volume, target + n)
                at += blocks
            parts = [placed(name, *stretches[name]) for name in ("one", "two")]
            files.append(file(space, 0, pages, *parts))
        table = location.PlaceTable(files)
        blocks = location.BlockTable(table, PAGE)
        for space, each in enumerate(files):
            numbers = np.arange(each.pages, dtype=np.uint32)
            known, place, _, _ = table.find(np.full(each.pages, space, np.uint32), numbers)
            self.assertTrue(known.all())
            volume, block = blocks.find(place)
            for page in range(each.pages):
                for part in range(PER_FRAME):
                    expected = model.get((space, page * PER_FRAME + part))
                    index = volume[page, part]
                    found = None
                    if index >= 0:
                        found = (blocks.volumes[index].volume_id, int(block[page, part]))
                    self.assertEqual(expected, found)

    def test_without_extents_nothing_is_on_a_volume(self):
        table = location.PlaceTable([file(0, 0, 2, excluded="raid")])
        volume, block = location.BlockTable(table, PAGE).find(np.arange(2, dtype=np.uint64))
        self.assertEqual([[-1] * 4] * 2, volume.tolist())
        self.assertEqual(volume.shape, block.shape)
