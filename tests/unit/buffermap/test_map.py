# SPDX-License-Identifier: Apache-2.0

import stat
from unittest import mock

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import buffermap, exception
from nova_dmigrate.buffermap import volume as volume_maps
from tests import base
from tests.unit.buffermap import maps

PAGE = maps.PAGE


class BuildTest(base.TestCase):
    @maps.PROPERTY
    @hypothesis.given(maps.disjoint_volumes())
    def test_a_map_says_what_its_extents_said(self, volumes):
        built = maps.build(*volumes)
        self.assertEqual(maps.model(volumes), maps.as_dict(built))
        self.assertEqual(len(maps.as_dict(built)), built.page_count)

    @maps.PROPERTY
    @hypothesis.given(maps.ANY_VOLUMES)
    def test_a_guest_page_named_twice_is_refused_whatever_the_extents(self, volumes):
        expected = maps.model(volumes)
        try:
            built = maps.build(*volumes)
        except exception.BufferMapError:
            self.assertIsNone(expected)
        else:
            self.assertEqual(expected, maps.as_dict(built))

    @maps.PROPERTY
    @hypothesis.given(maps.ANY_VOLUMES, st.integers(1, 4))
    def test_how_much_is_compared_at_a_time_does_not_matter(self, volumes, stretch):
        expected = maps.model(volumes)
        with mock.patch.object(volume_maps, "_STRETCH", stretch):
            try:
                built = maps.build(*volumes)
            except exception.BufferMapError:
                self.assertIsNone(expected)
            else:
                self.assertEqual(expected, maps.as_dict(built))

    @maps.PROPERTY
    @hypothesis.given(maps.disjoint_volumes())
    def test_a_lookup_finds_each_mapped_page_and_no_other(self, volumes):
        expected = maps.model(volumes)
        wanted = np.array(
            sorted({page + step for page in expected for step in (-1, 0, 1) if page + step >= 0}),
            np.uint32,
        )
        for volume in maps.build(*volumes).volumes:
            found = volume.lookup(wanted)
            self.assertEqual(np.int64, found.dtype)
            for page, block in zip(wanted.tolist(), found.tolist()):
                name, number = expected.get(page, (None, -1))
                self.assertEqual(number if name == volume.volume_id else -1, block)

    @maps.PROPERTY
    @hypothesis.given(maps.disjoint_volumes(), st.data())
    def test_the_order_and_cut_of_the_extents_do_not_matter(self, volumes, data):
        single = [
            (name, blocks, [(guest + n, block + n, 1) for guest, block, pages in triples
                            for n in range(pages)])
            for name, blocks, triples in volumes
        ]  # fmt: skip
        pieces = [
            (name, blocks, [page])
            for name, blocks, triples in single
            for page in data.draw(st.permutations(triples))
        ]
        self.assertEqual(
            [volume for volume in maps.build(*volumes).volumes if volume.page_count],
            list(maps.build(*pieces).volumes),
        )

    def test_an_empty_map_maps_nothing(self):
        built = maps.build(("vol", 8, []))
        self.assertEqual((0, 0), (built.page_count, built.nbytes))
        self.assertEqual([-1], built.volumes[0].lookup(np.zeros(1, np.uint32)).tolist())
        self.assertEqual(0, buffermap.BufferMap.build([]).page_count)

    def test_the_highest_page_and_block_can_be_mapped(self):
        last = buffermap.MAX_PAGES - 1
        built = maps.build(("vol", 2**32, [(last, last, 1), (0, last - 1, 1)]))
        wanted = np.array([0, 1, last - 1, last, last + 1], np.uint32)
        self.assertEqual([last - 1, -1, -1, last, -1], built.volumes[0].lookup(wanted).tolist())

    def test_one_run_can_cover_everything(self):
        built = maps.build(("vol", 2**32, [(0, 0, 5), (5, 5, buffermap.MAX_PAGES - 5)]))
        self.assertEqual((buffermap.MAX_PAGES, 12), (built.page_count, built.nbytes))
        wanted = np.array([0, 4, 5, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
        self.assertEqual([*wanted.tolist()[:-1], -1], built.volumes[0].lookup(wanted).tolist())

    def test_single_pages_take_eight_bytes_each_and_runs_less(self):
        scattered = maps.build(("vol", 99, [(2 * page, 98 - page, 1) for page in range(99)]))
        self.assertEqual(8 * 99, scattered.nbytes)
        pairs = maps.build(("vol", 99, [(3 * page, 97 - page, 2) for page in range(90)]))
        self.assertEqual(12 * 90, pairs.nbytes)
        mixed = maps.build(("vol", 99, [(0, 9, 2), *((4 + 2 * n, 50 - n, 1) for n in range(50))]))
        self.assertEqual(8 * 52, mixed.nbytes)

    def test_a_million_pages_take_no_more_than_eight_bytes_each(self):
        order = np.random.default_rng(7).permutation(1 << 20).astype(np.uint64) * np.uint64(PAGE)
        built = buffermap.BufferMap.build(
            [
                buffermap.VolumeExtents(
                    "vol", PAGE << 20, order, order[::-1], np.full(order.shape, PAGE, np.uint64)
                )
            ]
        )
        self.assertEqual(1 << 20, built.page_count)
        self.assertLessEqual(built.nbytes, 8 << 20)
        block = built.volumes[0].lookup((order >> np.uint64(12)).astype(np.uint32))
        self.assertTrue(np.array_equal(block, order[::-1] >> np.uint64(12)))

    def test_a_map_cannot_be_changed(self):
        runs = maps.build(("vol", 9, [(0, 0, 1), (4, 3, 3)])).volumes[0]
        single = maps.build(("vol", 9, [(0, 0, 1), (4, 3, 1)])).volumes[0]
        for array in (runs.guest_pages, runs.volume_blocks, runs.lengths, *single.pages()):
            self.assertRaises(ValueError, array.fill, 0)

    def test_several_guest_pages_may_be_copies_of_one_block(self):
        built = maps.build(("vol", 9, [(1, 5, 1), (7, 5, 1)]))
        self.assertEqual({1: ("vol", 5), 7: ("vol", 5)}, maps.as_dict(built))

    def test_a_lookup_of_numbers_that_do_not_fit_is_an_error_and_no_alias(self):
        volume = maps.build(("vol", 9, [(1, 5, 1)])).volumes[0]
        self.assertRaises(TypeError, volume.lookup, np.array([2**32 + 1], np.uint64))


class RefusalTest(base.TestCase):
    def assert_refused(self, what: str, *pieces: buffermap.VolumeExtents) -> None:
        error = self.assertRaises(exception.BufferMapError, buffermap.BufferMap.build, pieces)
        self.assertIn(what, str(error))

    def test_unaligned_numbers_are_refused(self):
        for column in range(3):
            numbers = [[0], [PAGE], [2 * PAGE]]
            numbers[column][0] += 512
            arrays = [np.array(each, np.uint64) for each in numbers]
            self.assert_refused("aligned", buffermap.VolumeExtents("vol", 9 * PAGE, *arrays))

    def test_an_extent_beyond_the_end_of_the_volume_is_refused(self):
        maps.build(("vol", 9, [(0, 7, 2)]))
        self.assert_refused("ends beyond", maps.extents("vol", 9, [(0, 0, 1), (5, 8, 2)]))
        self.assert_refused("ends beyond", maps.extents("vol", 9, [(0, 2**52 - 1, 1)]))
        self.assert_refused("ends beyond", maps.extents("vol", 9, [(0, 1, 2**30)]))

    def test_a_block_that_the_volume_has_in_part_only_is_refused(self):
        piece = maps.extents("vol", 9, [(0, 8, 1)])
        short = buffermap.VolumeExtents("vol", 9 * PAGE - 1, piece.guest, piece.volume_offset,
                                        piece.length)  # fmt: skip
        self.assert_refused("ends beyond", short)

    def test_guest_memory_beyond_16_tib_is_refused(self):
        self.assert_refused("16 TiB", maps.extents("vol", 9, [(buffermap.MAX_PAGES, 0, 1)]))
        self.assert_refused("16 TiB", maps.extents("vol", 2**40, [(2**31, 0, 2**31)]))
        self.assert_refused("16 TiB", maps.extents("vol", 2**40, [(2**52 - 1, 0, 2**52 - 1)]))

    def test_an_empty_extent_is_refused(self):
        self.assert_refused("empty", maps.extents("vol", 9, [(0, 0, 1), (5, 5, 0)]))

    def test_negative_fractional_or_misshapen_numbers_are_refused(self):
        one = np.array([PAGE], np.uint64)
        for wrong in (np.array([-PAGE]), np.array([4096.0]), one.reshape(1, 1), np.uint64(PAGE),
                      np.array([PAGE, PAGE], np.uint64), np.empty(0, np.uint64)):  # fmt: skip
            for arrays in ((wrong, one, one), (one, wrong, one), (one, one, wrong)):
                self.assert_refused("vol", buffermap.VolumeExtents("vol", 9 * PAGE, *arrays))

    def test_a_name_that_could_forge_a_log_line_or_a_path_is_refused(self):
        for name in ("", "a\nb", "../x", "é", "a b", "x" * 129, ".hidden"):
            self.assert_refused("name", maps.extents(name, 9, []))

    def test_a_size_that_is_none_is_refused(self):
        self.assert_refused("size", maps.extents("vol", -1, []))
        self.assert_refused("size", maps.extents("vol", 2**60, []))

    def test_two_sizes_for_one_volume_are_refused(self):
        self.assert_refused("cannot have", maps.extents("vol", 9, []), maps.extents("vol", 8, []))


class FileTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "map"

    @maps.PROPERTY
    @hypothesis.given(maps.disjoint_volumes())
    def test_a_saved_map_is_loaded_unchanged(self, volumes):
        built = maps.build(*volumes)
        built.save(self.path)
        self.assertEqual(built, buffermap.BufferMap.load(self.path, maps.LIMITS))

    def test_saving_replaces_a_map_and_leaves_nothing_else(self):
        for block in (1, 2):
            built = maps.build(("vol", 9, [(1, block, 1)]))
            built.save(self.path)
        self.assertEqual(built, buffermap.BufferMap.load(self.path, maps.LIMITS))
        self.assertEqual([self.path], list(self.path.parent.iterdir()))
        self.assertEqual(0o600, stat.S_IMODE(self.path.stat().st_mode))

    def test_a_map_that_cannot_be_saved_leaves_nothing_behind(self):
        self.path.mkdir()
        self.assertRaises(OSError, maps.build().save, self.path)
        self.assertEqual([self.path], list(self.path.parent.iterdir()))

    def test_a_file_cut_anywhere_is_refused(self):
        parts = [maps.build(("vol", 9, [(at, 1, 1), (at + 2, 2, 1)])) for at in (1, 5)]
        buffermap.save_parts(parts, self.path)
        self.assertEqual(
            buffermap.BufferMap.join(parts), buffermap.BufferMap.load(self.path, maps.LIMITS)
        )
        whole = self.path.read_bytes()
        for length in range(len(whole)):
            self.path.write_bytes(whole[:length])
            self.assertRaises(
                exception.BufferMapError, buffermap.BufferMap.load, self.path, maps.LIMITS
            )

    def test_a_file_that_announces_a_huge_chunk_is_refused_unread(self):
        self.path.write_bytes(b"\xff\xff\xff\xff")
        error = self.assertRaises(
            exception.BufferMapError, buffermap.BufferMap.load, self.path, maps.LIMITS
        )
        self.assertIn("between two chunks", str(error))

    def test_a_missing_file_is_refused_by_name(self):
        error = self.assertRaises(
            exception.BufferMapError, buffermap.BufferMap.load, self.path, maps.LIMITS
        )
        self.assertIn(f"{self.path} cannot be read: No such file", str(error))
