# SPDX-License-Identifier: Apache-2.0
"""The page map: both relays number its entries alike, and it knows where each of them lies."""

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.buffermap import BufferMap
from nova_dmigrate.memory_layout import MemoryLayout, MemoryRange
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.stream.elements import RamBlock
from tests.base import TestCase
from tests.unit.relay.pair import extents_of

PAGE = 4096
MIB = 1 << 20
TIB = 1 << 40
BLOCKS = (RamBlock("node0", 4 * MIB), RamBlock("vga", 40 * PAGE), RamBlock("node1", 2 * MIB))
#: node1 lies below node0, as it may.
LAYOUT = MemoryLayout(
    (MemoryRange(MIB, 2 * MIB, "node1", 0), MemoryRange(8 * MIB, 4 * MIB, "node0", 0))
)


def build(*volumes: tuple[str, int, list[int], list[int]]) -> PageMap:
    extents = [
        extents_of(name, size, np.array(pages, np.int64), np.array(blocks, np.int64))
        for name, size, pages, blocks in volumes
    ]
    return PageMap.build(BLOCKS, BufferMap.build(extents), LAYOUT)


class PageMapTest(TestCase):
    def test_entries_ascend_in_the_order_of_the_streams_ramblocks(self) -> None:
        page_map = build(("a", MIB, [256, 300, 2048, 2049], [7, 8, 9, 10]))
        first = 1024 + 40
        self.assertEqual([0, 1, first, first + 44], page_map.position.tolist())
        self.assertEqual([9, 10, 7, 8], page_map.volume_position.tolist())
        self.assertEqual(1024 + 40 + 512, page_map.total_pages)
        self.assertEqual(0, page_map.dropped)

    def test_volumes_lie_one_behind_the_other(self) -> None:
        page_map = build(("a", 10 * PAGE, [256], [3]), ("b", 20 * PAGE, [257], [3]))
        self.assertEqual([3, 13], sorted(page_map.volume_position.tolist()))
        self.assertEqual([(0, 10), (10, 20)], [(v.first, v.blocks) for v in page_map.volumes])

    def test_volumes_whose_pages_alternate_are_put_in_order(self) -> None:
        pages = np.arange(256, 656)
        random = np.random.default_rng(1)
        owner, blocks = random.integers(0, 2, pages.size), random.permutation(pages.size)
        page_map = build(
            *(
                (name, 400 * PAGE, pages[owner == number], blocks[owner == number])
                for number, name in enumerate("ab")
            )
        )
        self.assertEqual((1064 + np.arange(400)).tolist(), page_map.position.tolist())
        self.assertEqual((blocks + 400 * owner).tolist(), page_map.volume_position.tolist())

    def test_entries_before_a_position_are_counted(self) -> None:
        page_map = build(("a", MIB, [256, 300], [7, 8]))
        first = 1024 + 40
        before = [page_map.entries_before(n) for n in (0, first, first + 1, 1 << 32, 1 << 63)]
        self.assertEqual([0, 0, 1, 2, 2], before)

    def test_pages_outside_of_ram_are_dropped_and_counted(self) -> None:
        page_map = build(("a", MIB, [5, 256, 1000, 1 << 20], [0, 1, 2, 3]))
        self.assertEqual((1, 3), (len(page_map), page_map.dropped))

    def test_pages_beyond_the_ramblocks_used_length_are_dropped(self) -> None:
        layout = MemoryLayout((MemoryRange(MIB, 64 * MIB, "node1", 0),))
        extents = extents_of("a", MIB, np.array([256, 256 + 511, 256 + 512]), np.arange(3))
        page_map = PageMap.build(BLOCKS, BufferMap.build([extents]), layout)
        self.assertEqual((2, 1), (len(page_map), page_map.dropped))

    def test_a_layout_of_other_ramblocks_maps_nothing(self) -> None:
        layout = MemoryLayout((MemoryRange(MIB, MIB, "pc.ram", 0),))
        extents = extents_of("a", MIB, np.array([256]), np.array([0]))
        page_map = PageMap.build(BLOCKS, BufferMap.build([extents]), layout)
        self.assertEqual((0, 1), (len(page_map), page_map.dropped))

    def test_positions_are_found_again(self) -> None:
        page_map = build(("a", MIB, list(range(256, 300)), list(range(44))))
        positions = page_map.positions(2, np.array([0, 43 * PAGE, 44 * PAGE], np.uint64))
        self.assertEqual([0, 43, -1], page_map.entries(positions).tolist())
        self.assertEqual([-1, -1], page_map.entries(np.array([0, 1 << 40])).tolist())
        # A position beyond 32 bits is not taken for the one that it is modulo 2^32.
        self.assertEqual([-1], page_map.entries(np.array([1064 + (1 << 32)])).tolist())

    def test_entries_are_placed_in_their_ramblocks(self) -> None:
        page_map = build(("a", MIB, [256, 300, 2048, 2049], [7, 8, 9, 10]))
        for entries, expected in (
            ([3, 0, 2], [(0, [0]), (2, [3, 2])]),
            ([0, 1], [(0, [0, 1])]),
        ):
            chosen = np.array(entries)
            placed = page_map.place(chosen)
            self.assertEqual(expected, [(block, chosen[index].tolist()) for block, index in placed])
        offsets = page_map.offsets(2, np.array([3, 2]))
        self.assertEqual([44 * PAGE, 0], offsets.tolist())

    def test_volumes_of_more_than_16_tib_together_cannot_be_numbered(self) -> None:
        volumes = (("a", 9 * TIB, [256], [0]), ("b", 9 * TIB, [257], [0]))
        self.assertRaises(exception.BufferMapError, build, *volumes)

    def test_a_map_that_cannot_be_placed_is_as_good_as_none(self) -> None:
        extents = [
            extents_of(name, 9 * TIB, np.array([page]), np.array([0]))
            for name, page in (("a", 256), ("b", 257))
        ]
        page_map = PageMap.place_map(BLOCKS, BufferMap.build(extents), LAYOUT)
        self.assertEqual(0, len(page_map))
        self.assertEqual(1024 + 40 + 512, page_map.total_pages)

    def test_an_empty_map_finds_nothing(self) -> None:
        page_map = PageMap.empty(BLOCKS)
        self.assertEqual([-1, -1], page_map.entries(np.array([0, 5])).tolist())
