# SPDX-License-Identifier: Apache-2.0

import collections
from unittest import mock

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import buffermap, exception
from nova_dmigrate.agent import assembly, bands, frames, location, storage
from nova_dmigrate.buffermap import volume
from tests import base
from tests.unit.buffermap import maps

SIZE = 1 << 32
PER_FRAME = 2
# Few in each of few stretches of guest memory, which bands are made of
GUEST = st.builds(
    lambda stretch, page: (stretch << 16) + page,
    st.sampled_from([0, 1, 2, 700, 65535]),
    st.integers(0, 3),
)


def collect(pages, size=SIZE, pieces=1):
    collector = assembly.PageCollector("v", size, len({guest for guest, _ in pages}))
    for part in np.array_split(np.array(pages, np.uint64).reshape(-1, 2), pieces):
        collector.add(part[:, 0].astype(np.uint32), part[:, 1])
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
        taken = collector.add(np.arange(4, dtype=np.uint32), np.array([8, 9, 10, 11], np.uint64))
        self.assertEqual(2, taken)
        self.assertEqual([0, 1], collector.finish().pages()[0].tolist())

    def test_pages_that_come_over_and_over_again_take_no_more_room(self):
        collector = assembly.PageCollector("v", SIZE, 1000)
        guest = np.arange(1000, dtype=np.uint32)
        block = np.random.default_rng(1).permutation(1000).astype(np.uint64)
        for _ in range(300):
            collector.add(guest, block)
        made = collector.finish().pages()
        self.assertTrue(all(map(np.array_equal, (guest, block), made)))

    def test_nothing_collected_is_an_empty_map(self):
        made = collect([])
        self.assertEqual(0, made.page_count)
        self.assertEqual(0, made.nbytes)

    def test_a_name_that_no_volume_has_is_refused(self):
        self.assertRaises(exception.BufferMapError, assembly.PageCollector, "no name", SIZE, 1)


class AssembleTest(base.TestCase):
    @hypothesis.settings(max_examples=150)
    @hypothesis.given(st.data())
    def test_parts_together_say_what_was_found_and_none_is_too_large(self, data):
        """Against a dictionary: a file whose frames lie on two volumes, in part, or nowhere."""
        pieces = data.draw(st.lists(st.sampled_from(["one", "two", ""]), min_size=2, max_size=20))
        places = data.draw(st.permutations(range(len(pieces) // PER_FRAME)))
        guest = data.draw(
            st.lists(GUEST, min_size=PER_FRAME * len(places), max_size=20, unique=True)
        )
        guest = np.array(guest[: PER_FRAME * len(places)]).reshape(-1, PER_FRAME)
        most = data.draw(st.integers(4, 9))

        expected, counts = {}, collections.Counter()
        for place, pages in zip(places, guest.tolist()):
            names = pieces[PER_FRAME * place :][:PER_FRAME]
            if all(names):
                for number, (page, name) in enumerate(zip(pages, names)):
                    expected[page] = (name, 1000 + PER_FRAME * place + number)
            else:
                counts["page-compressed" if any(names) else "not-written"] += PER_FRAME

        found = frames.FrameTable(PER_FRAME)
        found.add(np.array(places, np.uint64), np.ones(len(places), np.uint32), guest)
        excluded = collections.Counter()
        with (
            mock.patch.object(bands, "MAX_PAGES", most),
            mock.patch.object(frames, "_STEP", data.draw(st.integers(1, 9))),
        ):
            parts = list(assembly.assemble(found, self.blocks(pieces), excluded))
        self.assertLessEqual(max((part.page_count for part in parts), default=0), most)
        joined = buffermap.BufferMap.join(parts)
        self.assertEqual(expected, maps.as_dict(joined))
        self.assertEqual(len(expected), sum(part.page_count for part in parts))
        self.assertEqual(counts, +excluded)

    def blocks(self, pieces):
        """A file of which each block lies on the volume of that name, from block 1000 on."""
        unit = volume.PAGE_SIZE
        placed = tuple(
            storage.Placed(
                name, SIZE, *(np.array([n * unit], np.uint64) for n in (at, 1000 + at, 1))
            )
            for at, name in enumerate(pieces)
            if name
        )
        file = location.File(0, 0, len(pieces) // PER_FRAME, False, None, placed)
        return location.BlockTable(location.PlaceTable([file]), PER_FRAME * unit)
