# SPDX-License-Identifier: Apache-2.0

import tracemalloc
from unittest import mock

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import buffermap, exception
from nova_dmigrate.buffermap import join
from tests import base
from tests.unit.buffermap import maps


def single_pages(volumes):
    """(volume, blocks, guest page, block) of each page."""
    return [
        (name, blocks, guest + number, block + number)
        for name, blocks, triples in volumes
        for guest, block, length in triples
        for number in range(length)
    ]


@st.composite
def parts(draw):
    """Parts that are disjoint, repeat each other, or contradict each other."""
    drawn = draw(st.lists(maps.disjoint_volumes(), max_size=3))
    for number in range(len(drawn)):
        if draw(st.booleans()):
            again = [
                (name, blocks, [triple for triple in triples if draw(st.booleans())])
                for name, blocks, triples in drawn[number]
            ]
            drawn.append(again)
        if draw(st.booleans()):
            away = draw(st.sampled_from([1, 300, 10**8]))
            drawn[number] = [
                (name, blocks, [(guest + away, block, length) for guest, block, length in triples])
                for name, blocks, triples in drawn[number]
            ]
    return draw(st.permutations(drawn))


class JoinTest(base.TestCase):
    @maps.PROPERTY
    @hypothesis.given(parts(), st.sampled_from([1, 2, 7, 1 << 20]))
    def test_pages_mapped_alike_are_in_it_once_and_others_mapped_twice_are_not(self, drawn, most):
        pages = [page for volumes in drawn for page in single_pages(volumes)]
        meanings = {}
        for page in pages:
            meanings.setdefault(page[2], set()).add(page)
        expected = [page for page in sorted(set(pages)) if len(meanings[page[2]]) == 1]
        listed = {name: blocks for volumes in drawn for name, blocks, _ in volumes}
        best = maps.build(
            *((name, blocks, []) for name, blocks in listed.items()),
            *((name, blocks, [(guest, block, 1)]) for name, blocks, guest, block in expected),
        )
        built = [maps.build(*volumes) for volumes in drawn]
        with mock.patch.object(join, "_MOST_RUNS", most):
            joined = buffermap.BufferMap.join(built)
        self.assertEqual(best, joined)
        chunks = buffermap.parts_to_chunks(built, 4096)
        self.assertEqual(joined, buffermap.BufferMap.from_chunks(chunks, maps.LIMITS))

    def test_no_parts_are_an_empty_map(self):
        self.assertEqual(buffermap.BufferMap(), buffermap.BufferMap.join([]))
        (chunk,) = buffermap.parts_to_chunks([])
        self.assertEqual(
            buffermap.BufferMap(), buffermap.BufferMap.from_chunks([chunk], maps.LIMITS)
        )

    def test_runs_that_continue_in_the_next_part_are_one(self):
        parts = [maps.build(("vol", 99, [(10 * n, 10 * n, 10)])) for n in (2, 0, 1, 5)]
        joined = buffermap.BufferMap.join(parts)
        self.assertEqual([30, 10], joined.volumes[0].lengths.tolist())

    def test_parts_in_any_mixture_of_forms_give_the_smallest(self):
        single = maps.build(("vol", 99, [(2 * page, 98 - page, 1) for page in range(99)]))
        run = maps.build(("vol", 99, [(1000, 0, 3)]))
        self.assertEqual(8 * 102, buffermap.BufferMap.join([single, run]).nbytes)
        runs = maps.build(("vol", 99, [(1000 + 20 * n, n, 9) for n in range(90)]))
        self.assertEqual(12 * 189, buffermap.BufferMap.join([single, runs]).nbytes)

    def test_a_volume_cannot_have_two_sizes(self):
        parts = [maps.build(("vol", 9, [(1, 1, 1)])), maps.build(("vol", 8, [(2, 1, 1)]))]
        error = self.assertRaises(exception.BufferMapError, buffermap.BufferMap.join, parts)
        self.assertIn("vol: it cannot have 36864 and 32768 bytes", str(error))
        self.assertRaises(
            exception.BufferMapError,
            buffermap.BufferMap.from_chunks,
            buffermap.parts_to_chunks(parts),
            maps.LIMITS,
        )

    def test_millions_of_pages_that_contradict_each_other_need_little_more_than_themselves(self):
        random = np.random.default_rng(1)
        size = buffermap.PAGE_SIZE << 22
        parts = []
        for step in (2, 3):
            guest = np.arange(0, 6 << 20, step, dtype=np.uint32)
            block = random.integers(0, 1 << 22, guest.size, dtype=np.uint32)
            mapped = buffermap.VolumeMap("vol", size, guest, block, None)
            parts.append(buffermap.BufferMap((mapped,)))
        given = sum(part.nbytes for part in parts)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        joined = buffermap.BufferMap.join(parts)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 * given)
        # Multiples of 2 or 3, but not of 6 (unless both drew the same block)
        self.assertAlmostEqual(joined.page_count, 3 << 20, delta=10)

    def test_enormous_runs_that_contradict_each_other_cost_nothing(self):
        everything = buffermap.MAX_PAGES
        parts = [
            maps.build(("vol", everything, [(3 * n, n, everything - 5000)])) for n in range(1000)
        ]
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        joined = buffermap.BufferMap.join(parts)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 << 20)
        # What only the first and only the last of them map
        (volume,) = joined.volumes
        self.assertEqual([0, everything - 2006], volume.guest_pages.tolist())
        self.assertEqual([3, 3], volume.lengths.tolist())
