# SPDX-License-Identifier: Apache-2.0

import contextlib
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.memory_layout import MemoryLayout, MemoryRange
from tests import base
from tests.unit.buffermap import maps

DATA = Path(__file__).parent / "data" / "mtree"
MIB = 1 << 20
GIB = 1 << 30
VRAM = MemoryRange(0xFD000000, 16 * MIB, "vga.vram", 0)


def low(block: str, end: int) -> MemoryRange:
    """RAM from the first MiB up to ``end``, the block's own beginning."""
    return MemoryRange(MIB, end - MIB, block, MIB)


LAYOUTS = {
    "pc-64m": (low("pc.ram", 64 * MIB), VRAM),
    "q35-64m": (low("pc.ram", 64 * MIB),),
    "pc-6g": (low("pc.ram", 3 * GIB), VRAM, MemoryRange(4 * GIB, 3 * GIB, "pc.ram", 3 * GIB)),
    "q35-6g": (low("pc.ram", 2 * GIB), MemoryRange(4 * GIB, 4 * GIB, "pc.ram", 2 * GIB)),
    "q35-numa": (low("ram-node0", 2 * GIB), MemoryRange(4 * GIB, 2 * GIB, "ram-node1", 0)),
    "pc-hotplug": (
        low("pc.ram", GIB),
        MemoryRange(4 * GIB, GIB, "cold", 0),
        MemoryRange(5 * GIB, GIB, "hot", 0),
    ),
    "q35-old": (low("/objects/mb", 256 * MIB),),
    "q35-libvirt": (low("pc.ram", 256 * MIB),),
}


def mtree(name: str) -> str:
    return (DATA / f"{name}.mtree").read_text()


def view(*lines: str, name: str = "memory") -> str:
    head = f'FlatView #0\n AS "{name}", root: system\n Root memory region: system\n'
    return head + "".join(f"  {line}\n" for line in lines) + "\n"


class MtreeTest(base.TestCase):
    def test_the_layouts_of_real_guests_are_read(self):
        self.assertEqual({path.stem for path in DATA.glob("*.mtree")}, set(LAYOUTS))
        for name, ranges in LAYOUTS.items():
            self.assertEqual(ranges, MemoryLayout.from_mtree(mtree(name)).ranges, name)

    def test_block_names_are_those_of_the_stream_except_for_device_memory(self):
        for name in LAYOUTS:
            lines = (DATA / f"{name}.ramblock").read_text().splitlines()[1:]
            used = {line.split()[0]: int(line.split()[4], 16) for line in lines}
            for each in MemoryLayout.from_mtree(mtree(name)).ranges:
                if each != VRAM:
                    self.assertLessEqual(each.offset + each.length, used[each.block])

    def test_windows_line_ends_and_names_of_accelerators_do_not_matter(self):
        for name, ranges in LAYOUTS.items():
            text = mtree(name).replace("\n", "\r\n")
            self.assertEqual(ranges, MemoryLayout.from_mtree(text).ranges)
            lines = (line + " KVM" * (", ram): " in line) for line in mtree(name).splitlines())
            self.assertEqual(ranges, MemoryLayout.from_mtree("\n".join(lines)).ranges)

    def test_only_plain_ram_is_taken(self):
        text = view(
            "0000000000200000-00000000002fffff (prio 0, ram): a @0000000000000000",
            "0000000000300000-00000000003fffff (prio 0, rom): a @0000000000100000",
            "0000000000400000-00000000004fffff (prio 0, romd): b",
            "0000000000500000-00000000005fffff (prio -1, ramd): c",
            "0000000000600000-00000000006fffff (prio 0, i/o): d",
            "0000000000700000-00000000007fffff (prio 0, nv-ram): e",
        )
        self.assertEqual((MemoryRange(2 * MIB, MIB, "a", 0),), MemoryLayout.from_mtree(text).ranges)

    def test_ranges_are_cut_to_whole_pages_and_left_out_where_pages_do_not_match(self):
        text = view(
            "00000000000ff000-0000000000101fff (prio 0, ram): low @0000000000007000",
            "0000000000200800-00000000002027ff (prio 0, ram): cut @0000000000000800",
            "0000000000300000-0000000000300fff (prio 0, ram): odd @0000000000000800",
            "0000000000400010-0000000000400ff0 (prio 0, ram): tiny @0000000000000010",
        )
        self.assertEqual(
            (
                MemoryRange(MIB, 0x2000, "low", 0x8000),
                MemoryRange(0x201000, 0x1000, "cut", 0x1000),
            ),
            MemoryLayout.from_mtree(text).ranges,
        )

    def test_memory_that_is_shown_twice_counts_where_it_is_shown_first(self):
        text = view(
            "0000000000200000-00000000002fffff (prio 0, ram): a",
            "0000000000300000-00000000003fffff (prio 0, ram): a @0000000000080000",
            "0000000000400000-00000000004fffff (prio 0, ram): a @0000000000100000",
        )
        self.assertEqual(
            [0x200000, 0x400000], [each.gpa for each in MemoryLayout.from_mtree(text).ranges]
        )

    def test_text_without_exactly_one_view_of_memory_with_ram_is_refused(self):
        ram = "0000000000200000-00000000002fffff (prio 0, ram): a"
        for text in (
            "",
            "unknown command: 'info mtree'",
            view(ram, name="cpu-memory-0"),
            view(ram) + view(ram),
            view(),
            view("0000000000000000-00000000000fffff (prio 0, ram): a"),
            view("0000000000300000-00000000002fffff (prio 0, ram): a"),
            mtree("pc-6g").split(' AS "memory"')[0],
        ):
            self.assertRaises(exception.MemoryLayoutError, MemoryLayout.from_mtree, text)

    @maps.PROPERTY
    @hypothesis.given(st.data())
    def test_a_damaged_text_is_refused_or_gives_a_valid_layout(self, data):
        text = mtree(data.draw(st.sampled_from(sorted(LAYOUTS))))
        # Most of the text is about other address spaces.
        text = text[text.index(' AS "memory"') - 20 :]
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 30, len(text))))
        filling = data.draw(st.text("0f-@:), \nram", max_size=8))
        with contextlib.suppress(exception.MemoryLayoutError):
            MemoryLayout.from_mtree(text[:start] + filling + text[end:])


class LayoutTest(base.TestCase):
    def test_overlapping_aliasing_empty_and_unaligned_ranges_are_refused(self):
        first = MemoryRange(0, 0x2000, "a", 0)
        for other in (
            MemoryRange(0x1000, 0x1000, "b", 0),
            MemoryRange(0x2000, 0x1000, "a", 0x1000),
            MemoryRange(0x2000, 0, "b", 0),
            MemoryRange(0x2000, -0x1000, "b", 0),
            MemoryRange(0x2800, 0x1000, "b", 0),
            MemoryRange(0x3000, 0x800, "b", 0),
            MemoryRange(0x3000, 0x1000, "b", 0x800),
        ):
            self.assertRaises(exception.MemoryLayoutError, MemoryLayout, (first, other))
        MemoryLayout((first, MemoryRange(0x2000, 0x1000, "a", 0x2000)))


class ToBlocksTest(base.TestCase):
    def test_pages_above_the_hole_of_a_real_guest_are_found(self):
        layout = MemoryLayout.from_mtree(mtree("q35-6g"))
        first_mib, hole, high = 256, 2 * GIB // 4096, 4 * GIB // 4096
        built = maps.build(("v", 99, [(first_mib - 1, 1, 2), (hole - 1, 10, 2), (high - 1, 20, 3)]))
        (result,) = layout.to_blocks(built)
        self.assertEqual(("pc.ram", "v"), (result.block, result.volume_id))
        self.assertEqual([first_mib, hole - 1, hole, hole + 1], result.page.tolist())
        self.assertEqual([2, 10, 21, 22], result.block_number.tolist())
        self.assertIn("3 of 7 mapped pages", self.log.output)

    def test_numa_nodes_and_dimms_are_blocks_of_their_own(self):
        four, five = 4 * GIB // 4096, 5 * GIB // 4096
        built = maps.build(("v", 99, [(300, 1, 1), (four, 2, 1), (five + 7, 3, 1)]))
        for name, blocks in (
            ("q35-numa", [("ram-node0", [300]), ("ram-node1", [0, GIB // 4096 + 7])]),
            ("pc-hotplug", [("pc.ram", [300]), ("cold", [0]), ("hot", [7])]),
        ):
            results = MemoryLayout.from_mtree(mtree(name)).to_blocks(built)
            found = {result.block: result.page.tolist() for result in results}
            self.assertEqual(dict(blocks), found)

    def test_addresses_beyond_what_maps_can_hold_are_no_trouble(self):
        layout = MemoryLayout((MemoryRange(1 << 50, MIB, "far", 0), MemoryRange(0, MIB, "near", 0)))
        built = maps.build(("v", 9, [(255, 1, 1), (2**32 - 2, 2, 1)]))
        self.assertEqual(["near"], [result.block for result in layout.to_blocks(built)])

    def test_pages_are_in_the_order_of_the_block_not_of_the_addresses(self):
        layout = MemoryLayout((MemoryRange(MIB, MIB, "a", MIB), MemoryRange(2 * MIB, MIB, "a", 0)))
        (result,) = layout.to_blocks(maps.build(("v", 9, [(256, 1, 1), (515, 2, 1)])))
        self.assertEqual([3, 256], result.page.tolist())
        self.assertEqual([2, 1], result.block_number.tolist())

    @maps.PROPERTY
    @hypothesis.given(maps.disjoint_volumes(), st.data())
    def test_each_page_in_a_range_comes_out_once_at_its_place(self, volumes, data):
        ranges = []
        gpa = 0
        used = {"a": 0, "b": 9000}
        for _ in range(data.draw(st.integers(0, 5))):
            gpa += data.draw(st.sampled_from([0, 3, 40]))
            length = data.draw(st.integers(1, 90))
            block = data.draw(st.sampled_from(["a", "b"]))
            ranges.append(MemoryRange(gpa * 4096, length * 4096, block, used[block] * 4096))
            used[block] += length
            gpa += length
        expected = {}
        for page, place in maps.model(volumes).items():
            for each in ranges:
                if 0 <= page * 4096 - each.gpa < each.length:
                    offset = page - each.gpa // 4096 + each.offset // 4096
                    expected[each.block, offset] = place
        results = MemoryLayout(tuple(ranges)).to_blocks(maps.build(*volumes))
        found = []
        for result in results:
            self.assertEqual((np.uint32, np.uint32), (result.page.dtype, result.block_number.dtype))
            self.assertTrue(bool((np.diff(result.page.astype(np.int64)) > 0).all()))
            found += [
                ((result.block, page), (result.volume_id, number))
                for page, number in zip(
                    result.page.tolist(), result.block_number.tolist(), strict=True
                )
            ]
        self.assertEqual(len(found), len(dict(found)))
        self.assertEqual(expected, dict(found))
