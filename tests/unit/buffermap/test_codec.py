# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import tracemalloc
import zlib

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import buffermap, exception
from tests import base
from tests.unit.buffermap import maps

SIZE = maps.BLOCKS * maps.PAGE


class RoundTripTest(base.TestCase):
    @maps.PROPERTY
    @hypothesis.given(maps.disjoint_volumes())
    def test_a_map_survives_its_chunks(self, volumes):
        built = maps.build(*volumes)
        chunks = list(built.to_chunks())
        self.assertEqual(built, buffermap.BufferMap.from_chunks(chunks, maps.LIMITS))

    def test_a_large_map_survives_small_chunks_none_of_which_is_too_large(self):
        random = np.random.default_rng(3)
        pages = random.permutation(200_000)[:50_000].astype(np.uint64)
        # Random blocks do not compress: the worst case for a chunk's size.
        blocks = random.integers(0, 2**32 - 1, pages.size).astype(np.uint64)
        sizes = np.full(pages.shape, maps.PAGE, np.uint64)
        for length in (sizes, sizes * np.uint64(3)):
            gap = int(length[0]) // maps.PAGE
            unit = np.uint64(maps.PAGE)
            built = buffermap.BufferMap.build(
                [
                    buffermap.VolumeExtents(
                        "vol",
                        maps.PAGE << 32,
                        pages * np.uint64(gap) * unit,
                        np.minimum(blocks, np.uint64(2**32 - 9)) * unit,
                        length,
                    )
                ]
            )
            for limit in (4096, 5000, 1 << 20):
                chunks = list(built.to_chunks(limit))
                self.assertLessEqual(max(map(len, chunks)), limit)
                limits = buffermap.MapLimits(max_chunk_bytes=limit)
                self.assertEqual(built, buffermap.BufferMap.from_chunks(chunks, limits))

    def test_chunks_that_cannot_hold_the_list_of_volumes_are_refused(self):
        built = maps.build(*((f"{n:0100}", 9, []) for n in range(40)))
        for limit in (0, 4095, 4096):
            self.assertRaises(exception.BufferMapError, list, built.to_chunks(limit))
        self.assertEqual(1, len(list(built.to_chunks(8192))))

    def test_the_format_is_the_documented_one(self):
        by_hand = maps.reseal(
            [
                (
                    maps.VOLUMES,
                    maps.volume_table((b"a", SIZE, 2, 2, 0), (b"b", SIZE, 1, 9, 1)),
                ),
                # guest page 5 is block 7; guest page 5 + 1 + 3 is block 7 + 1 - 4
                (maps.ENTRIES, maps.entries(0, [5, 3], [14, 7])),
                (maps.ENTRIES, maps.entries(1, [20], [200], [8])),
            ]
        )
        built = buffermap.BufferMap.from_chunks(by_hand, maps.LIMITS)
        expected = maps.build(
            ("a", maps.BLOCKS, [(5, 7, 1), (9, 4, 1)]), ("b", maps.BLOCKS, [(20, 100, 9)])
        )
        self.assertEqual(expected, built)
        self.assertEqual(
            [maps.unpack(chunk) for chunk in by_hand],
            [maps.unpack(chunk) for chunk in built.to_chunks()],
        )

    def test_runs_that_save_nothing_are_stored_as_pages(self):
        chunks = maps.reseal(
            [
                (maps.VOLUMES, maps.volume_table((b"a", SIZE, 2, 2, 1))),
                (maps.ENTRIES, maps.entries(0, [1, 1], [0, 8], [0, 0])),
            ]
        )
        built = buffermap.BufferMap.from_chunks(chunks, maps.LIMITS)
        self.assertEqual(16, built.nbytes)

    def test_scattered_frames_of_a_buffer_pool_compress_to_half(self):
        frames = np.random.default_rng(5).permutation(1 << 18)[: 1 << 16].astype(np.uint64)
        four = np.arange(4, dtype=np.uint64)
        guest = np.random.default_rng(6).permutation(1 << 20)[: 1 << 18].astype(np.uint64)
        blocks = (frames[:, None] * np.uint64(4) + four).ravel()
        built = maps.build(
            ("vol", 1 << 20, np.stack([guest, blocks, np.ones_like(guest)], axis=1).tolist())
        )
        total = sum(map(len, built.to_chunks()))
        self.assertLess(total, built.page_count * 4)


class RefusalTest(base.TestCase):
    """Chunks with right checksums that say wrong things."""

    def assert_refused(
        self, what: str, *chunks: bytes, limits: buffermap.MapLimits = maps.LIMITS
    ) -> None:
        error = self.assertRaises(
            exception.BufferMapError, buffermap.BufferMap.from_chunks, chunks, limits
        )
        self.assertIn(what, str(error))

    def assert_bodies_refused(
        self, what: str, *bodies: bytes, limits: buffermap.MapLimits = maps.LIMITS
    ) -> None:
        kinds = [maps.VOLUMES] + [maps.ENTRIES] * (len(bodies) - 1)
        chunks = maps.reseal(list(zip(kinds, bodies)))
        self.assert_refused(what, *chunks, limits=limits)

    def setUp(self) -> None:
        super().setUp()
        self.table = maps.volume_table((b"a", SIZE, 2, 2, 0))
        self.entries = maps.entries(0, [5, 3], [14, 7])
        self.good = maps.reseal([(maps.VOLUMES, self.table), (maps.ENTRIES, self.entries)])
        buffermap.BufferMap.from_chunks(self.good, maps.LIMITS)

    def test_missing_repeated_swapped_and_surplus_chunks_are_refused(self):
        first, second = self.good
        self.assert_refused("breaks off")
        self.assert_refused("breaks off", first)
        self.assert_refused("expected", second)
        self.assert_refused("expected", first, first)
        self.assert_refused("expected", second, first)
        self.assert_refused("follow", first, second, second)

    def test_wrong_headers_are_refused(self):
        table, second = self.table, self.good[1]
        self.assert_refused("not a chunk", maps.chunk(1, table, index=0, magic=b"NDBX"), second)
        self.assert_refused("version 2", maps.chunk(1, table, index=0, version=2), second)
        self.assert_refused("kind 3", maps.chunk(3, table, index=0), second)
        self.assert_refused("flags 0x2", maps.chunk(1, table, index=0, flags=2), second)
        self.assert_refused("list", maps.chunk(2, table, index=0), second)

    def parts(self, *tables: bytes) -> list[bytes]:
        """Chunks of parts with these lists of volumes, each with the same two entries."""
        kinds = [(maps.VOLUMES, maps.ENTRIES)] * len(tables)
        bodies = [(table, self.entries) for table in tables]
        return maps.reseal([each for pair in zip(kinds, bodies) for each in zip(*pair)])

    def test_a_part_that_begins_before_the_last_is_complete_is_refused(self):
        self.assert_refused(
            "missing", self.good[0], maps.chunk(maps.VOLUMES, self.table, index=1, last=True)
        )

    def test_parts_beyond_the_limit_are_refused(self):
        limits = buffermap.MapLimits(max_parts=2)
        buffermap.BufferMap.from_chunks(self.parts(*[self.table] * 2), limits)
        self.assert_refused("2 parts", *self.parts(*[self.table] * 3), limits=limits)

    def test_pages_and_volumes_beyond_the_limit_in_all_parts_are_refused(self):
        other = maps.volume_table((b"b", SIZE, 2, 2, 0))
        chunks = self.parts(self.table, other, self.table)
        limits = buffermap.MapLimits(max_pages=6, max_volumes=2)
        buffermap.BufferMap.from_chunks(chunks, limits)
        self.assert_refused("5 pages", *chunks, limits=buffermap.MapLimits(max_pages=5))
        self.assert_refused("2 volumes", *chunks, limits=buffermap.MapLimits(max_volumes=1))

    def test_two_sizes_of_a_volume_are_refused(self):
        larger = maps.volume_table((b"a", SIZE + 4096, 2, 2, 0))
        self.assert_refused("cannot have", *self.parts(self.table, larger))
        empty = (maps.VOLUMES, maps.volume_table((b"a", SIZE + 4096, 0, 0, 0)))
        first = [(maps.VOLUMES, self.table), (maps.ENTRIES, self.entries)]
        self.assert_refused("cannot have", *maps.reseal([*first, empty]))

    def test_parts_without_pages_cost_nothing(self):
        table = maps.volume_table(*((b"v%d" % n, SIZE, 0, 0, 0) for n in range(256)))
        chunks = maps.reseal([(maps.VOLUMES, table)] * 200)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        received = buffermap.BufferMap.from_chunks(chunks, maps.LIMITS)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 << 20)
        self.assertEqual(256, len(received.volumes))

    def test_a_body_of_another_length_than_announced_is_refused(self):
        for length in (0, len(self.table) - 1, len(self.table) + 1):
            chunk = maps.chunk(1, self.table, index=0, length=length)
            self.assert_refused("announces", chunk, self.good[1])
        surplus = zlib.compress(self.table) + b"x"
        self.assert_refused("announces", maps.chunk(1, self.table, index=0, packed=surplus))
        cut = zlib.compress(self.table)[:-1]
        self.assert_refused("announces", maps.chunk(1, self.table, index=0, packed=cut))
        self.assert_refused("decompress", maps.chunk(1, self.table, index=0, packed=b"xyz"))

    def test_chunks_beyond_the_limit_are_refused(self):
        limits = buffermap.MapLimits(max_chunk_bytes=len(self.good[0]) - 1)
        self.assert_refused("bytes", *self.good, limits=limits)
        self.assert_refused("bytes", b"")
        limits = buffermap.MapLimits(max_chunk_bytes=4096)
        self.assert_refused("announces 4097", maps.chunk(1, bytes(4097), index=0), limits=limits)

    def test_a_decompression_bomb_is_refused_without_unpacking_it(self):
        bomb = zlib.compress(bytes(256 << 20), 9)
        for length in (4096, 2**32 - 1):
            chunk = maps.chunk(1, b"", index=0, last=True, length=length, packed=bomb)
            tracemalloc.start()
            self.addCleanup(tracemalloc.stop)
            self.assert_refused("announces", chunk)
            self.assertLess(tracemalloc.get_traced_memory()[1], 4 << 20)

    def test_a_map_that_announces_the_world_costs_nothing(self):
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        huge = maps.volume_table((b"a", 2**62, 2**32 - 1, 2**32 - 1, 0))
        limits = buffermap.MapLimits(max_pages=2**40)
        self.assert_bodies_refused("missing", huge, maps.entries(0, [5], [14]), limits=limits)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 << 20)

    def test_one_run_that_would_expand_to_the_world_is_refused(self):
        table = maps.volume_table((b"a", 2**44, 1, 2**32 - 1, 1))
        self.assert_bodies_refused("65536 pages", table, maps.entries(0, [0], [0], [2**32 - 2]))
        table = maps.volume_table((b"a", 2**44, 1, 1, 1))
        self.assert_bodies_refused("more pages", table, maps.entries(0, [0], [0], [2**32 - 2]))
        self.assert_bodies_refused("more pages", table, maps.entries(0, [0], [0], [2**32 - 1]))

    def test_the_list_of_volumes_must_be_whole_and_nothing_more(self):
        for cut in range(len(self.table)):
            self.assert_bodies_refused("", self.table[:cut] or b"\1", self.entries)
        self.assert_bodies_refused("malformed", self.table + b"x", self.entries)

    def test_a_volume_listed_twice_is_refused(self):
        entry = (b"a", SIZE, 0, 0, 0)
        self.assert_bodies_refused("twice", maps.volume_table(entry, entry))

    def test_volumes_beyond_the_limit_are_refused(self):
        limits = buffermap.MapLimits(max_volumes=1)
        table = maps.volume_table((b"a", SIZE, 0, 0, 0), (b"b", SIZE, 0, 0, 0))
        self.assert_bodies_refused("2 volumes", table, limits=limits)

    def test_impossible_names_sizes_and_counts_are_refused(self):
        for entry in (
            (b"a\n", SIZE, 2, 2, 0),
            (b"\xff", SIZE, 2, 2, 0),
            (b"", SIZE, 2, 2, 0),
            (b"a", 2**63, 2, 2, 0),
            (b"a", SIZE, 2, 3, 0),
            (b"a", SIZE, 3, 2, 1),
            (b"a", SIZE, 2, 2, 2),
        ):
            self.assert_bodies_refused("", maps.volume_table(entry), self.entries)

    def test_pages_beyond_the_limit_are_refused_before_they_come(self):
        limits = buffermap.MapLimits(max_pages=3)
        one = (SIZE, 2, 2, 0)
        table = maps.volume_table((b"a", *one), (b"b", *one))
        self.assert_bodies_refused("3 pages", table, limits=limits)

    def test_a_guest_page_beyond_the_limit_is_refused(self):
        limits = buffermap.MapLimits(max_guest_page=9)
        buffermap.BufferMap.from_chunks(self.good, limits)
        limits = buffermap.MapLimits(max_guest_page=8)
        self.assert_refused("guest page is beyond", *self.good, limits=limits)

    def test_gaps_that_wrap_around_are_refused(self):
        for gaps in ([2**32 - 1, 0], [5, 2**32 - 1], [2**32 - 2, 1]):
            self.assert_bodies_refused("beyond", self.table, maps.entries(0, gaps, [0, 0]))

    def test_blocks_outside_the_volume_are_refused(self):
        for distances in ([1, 0], [2 * maps.BLOCKS, 0], [2**32 - 1, 0], [2**32 - 2, 0], [0, 3]):
            self.assert_bodies_refused(
                "ends beyond", self.table, maps.entries(0, [0, 0], distances)
            )
        table = maps.volume_table((b"a", 2**63 - 1, 2, 2, 0))
        self.assert_bodies_refused("ends beyond", table, maps.entries(0, [0, 0], [1, 0]))

    def test_entries_of_another_volume_or_number_are_refused(self):
        self.assert_bodies_refused("belong", self.table, maps.entries(1, [5, 3], [14, 7]))
        self.assert_bodies_refused("belong", self.table, maps.entries(0, [5] * 3, [14] * 3))
        self.assert_bodies_refused("belong", self.table, maps.entries(0, [], []))
        self.assert_bodies_refused("missing", self.table, maps.entries(0, [5], [14]))
        self.assert_bodies_refused("missing", self.table)
        self.assert_bodies_refused("more than", self.table, self.entries, self.entries)
        self.assert_bodies_refused("short", self.table, b"1234567")
        for wrong in (1, 3):
            body = maps.entries(0, [5] * wrong, [14] * wrong, count=2)
            self.assert_bodies_refused("does not hold", self.table, body)

    def test_a_guest_page_mapped_to_two_volumes_is_refused(self):
        table = maps.volume_table((b"a", SIZE, 1, 1, 0), (b"b", SIZE, 1, 3, 1))
        second = maps.entries(0, [5], [14])
        maps_to = maps.entries(1, [3], [14], [2])
        self.assert_bodies_refused("two volumes", table, second, maps_to)


PARTS = st.lists(maps.disjoint_volumes(), min_size=1, max_size=3)


class FuzzTest(base.TestCase):
    def assert_refused_or_valid(self, chunks: list[bytes]) -> buffermap.BufferMap | None:
        try:
            received = buffermap.BufferMap.from_chunks(chunks, maps.LIMITS)
        except exception.BufferMapError:
            return None
        pages = [page for volume in received.volumes for page in volume.pages()[0].tolist()]
        self.assertEqual(len(pages), len(set(pages)))
        self.assertEqual(len(pages), received.page_count)
        self.assertLessEqual(len(pages), maps.LIMITS.max_pages)
        self.assertLessEqual(received.nbytes, 8 * len(pages))
        for volume in received.volumes:
            guest, block = volume.pages()
            self.assertTrue(bool((np.diff(guest.astype(np.int64)) > 0).all()))
            self.assertTrue(bool((block < volume.size // maps.PAGE).all()))
        again = buffermap.BufferMap.from_chunks(received.to_chunks(), maps.LIMITS)
        self.assertEqual(received, again)
        return received

    @maps.PROPERTY
    @hypothesis.given(PARTS, st.data())
    def test_damaged_chunks_are_refused_or_the_same_map(self, parts, data):
        built = [maps.build(*volumes) for volumes in parts]
        chunks = list(buffermap.parts_to_chunks(built, 4096))
        for _ in range(data.draw(st.integers(1, 3))):
            mutate_list(data, chunks)
        received = self.assert_refused_or_valid(chunks)
        self.assertIn(received, (None, buffermap.BufferMap.join(built)))

    @maps.PROPERTY
    @hypothesis.given(PARTS, st.data())
    def test_hostile_bodies_are_refused_or_a_valid_map(self, parts, data):
        built = [maps.build(*volumes) for volumes in parts]
        bodies = [maps.unpack(chunk) for chunk in buffermap.parts_to_chunks(built, 4096)]
        for _ in range(data.draw(st.integers(1, 3))):
            number = data.draw(st.integers(0, len(bodies) - 1))
            kind, body = bodies[number]
            bodies[number] = (kind, mutate(data, body))
        self.assert_refused_or_valid(maps.reseal(bodies))

    @maps.PROPERTY
    @hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=60)), max_size=4))
    def test_bodies_of_anything_are_refused_or_a_valid_map(self, bodies):
        self.assert_refused_or_valid(maps.reseal(bodies))

    @maps.PROPERTY
    @hypothesis.given(st.lists(st.binary(max_size=80), max_size=4))
    def test_chunks_of_anything_are_refused(self, chunks):
        self.assertIsNone(self.assert_refused_or_valid(chunks))


def mutate(data: st.DataObject, body: bytes) -> bytes:
    """Change, cut or lengthen bytes somewhere."""
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 8)))
    return body[:start] + data.draw(st.binary(max_size=8)) + body[end:]


def mutate_list(data: st.DataObject, chunks: list[bytes]) -> None:
    """Change one chunk, or drop, repeat or move it."""
    if not chunks:
        return
    number = data.draw(st.integers(0, len(chunks) - 1))
    chunk = chunks.pop(number)
    action = data.draw(st.sampled_from(["change", "change", "drop", "repeat", "move"]))
    if action == "change":
        chunks.insert(number, mutate(data, chunk))
    elif action == "repeat":
        chunks[number:number] = [chunk, chunk]
    elif action == "move":
        chunks.insert(data.draw(st.integers(0, len(chunks))), chunk)
