# SPDX-License-Identifier: Apache-2.0
"""What the parser does not understand: it stops there, says why, and passes all on."""

import unittest
from collections.abc import Callable
from operator import methodcaller
from struct import pack

import numpy as np

from nova_dmigrate.stream import elements as el
from nova_dmigrate.stream import format as fmt
from tests.unit.stream.builder import DEVICES, PAGE, StreamBuilder
from tests.unit.stream.pieces import parse, record_list, skeleton, written

EOS = pack(">Q", 0x10)
Build = Callable[[StreamBuilder], object]


class LatchTest(unittest.TestCase):
    def check(self, before: bytes, unknown: bytes, reason: str) -> None:
        """``before`` is understood; ``unknown`` and all behind it is opaque, however split."""
        raw = before + unknown + DEVICES
        whole = parse(raw)
        self.assertEqual(whole.parser.opaque_reason, reason)
        self.assertEqual(whole.parser.opaque_position, len(before))
        opaque = [e for e in whole.elements if isinstance(e, el.Opaque)]
        self.assertEqual(b"".join(e.data for e in opaque), unknown + DEVICES)
        self.assertEqual({e.reason for e in opaque}, {reason})
        self.assertEqual(written(whole), raw)
        whole.parser.finish()
        bytewise = parse(raw, [1] * len(raw))
        self.assertEqual(skeleton(bytewise.elements), skeleton(whole.elements))

    def early(self, build: Build, reason: str) -> None:
        before = StreamBuilder().header()
        unknown = StreamBuilder()
        build(unknown)
        self.check(before.data(), unknown.data(), reason)

    def between(self, build: Build, reason: str) -> None:
        """Between two sections of RAM."""
        builder = StreamBuilder().begin().part().zeros(0, [0]).finish()
        before = builder.take()
        build(builder)
        self.check(before, builder.take(), reason)

    def within(self, build: Build, reason: str) -> None:
        """Within a section of RAM, behind good records."""
        builder = StreamBuilder().begin().part().zeros(0, np.arange(40) * PAGE)
        before = builder.take()
        build(builder)
        self.check(before, builder.take(), reason)

    def test_bytes_that_are_no_stream(self) -> None:
        self.check(b"", b"\x16\x03\x01\x02\x00\x01", fmt.NOT_A_STREAM)

    def test_another_version_of_the_stream(self) -> None:
        self.check(b"", b"QEVM" + pack(">I", 4), fmt.NOT_A_STREAM)

    def test_capabilities_that_alter_the_stream(self) -> None:
        names = pack(">IB", 1, 15) + b"x-ignore-shared"
        subsection = StreamBuilder.subsection("configuration/capabilities", names)
        self.early(lambda b: b.configuration("pc", subsection), fmt.UNKNOWN_CAPABILITY)

    def test_other_subsections_of_the_configuration(self) -> None:
        for subsection in (
            StreamBuilder.subsection("configuration/new", b""),
            StreamBuilder.subsection("configuration/uuid", bytes(16), version=2),
            StreamBuilder.subsection("configuration/target-page-bits", pack(">I", 14)),
        ):
            self.early(methodcaller("configuration", "pc", subsection), fmt.UNKNOWN_CONFIGURATION)

    def test_a_machine_name_that_is_none(self) -> None:
        self.early(lambda b: b.configuration(""), fmt.UNKNOWN_CONFIGURATION)
        self.early(lambda b: b.configuration("pc\0q"), fmt.UNKNOWN_CONFIGURATION)

    def test_a_second_or_late_configuration(self) -> None:
        self.between(lambda b: b.configuration(), fmt.UNKNOWN_SECTION)
        before = StreamBuilder().header().configuration().data()
        self.check(before, StreamBuilder().configuration("q35").data(), fmt.UNKNOWN_SECTION)

    def test_lengths_beyond_any_element(self) -> None:
        self.early(lambda b: b.raw(b"\x07" + pack(">I", 0xFFFFFFFF)), fmt.ELEMENT_TOO_LONG)

    def test_a_list_of_blocks_that_never_ends(self) -> None:
        blocks = [(f"block{number:05}" * 20, PAGE) for number in range(6000)]
        raw = StreamBuilder(blocks).begin().end().finish().data()
        for sizes in ([], [70000] * 20):
            parsed = parse(raw, sizes)
            self.assertEqual(parsed.parser.opaque_reason, fmt.ELEMENT_TOO_LONG)

    def test_commands_that_are_not_understood(self) -> None:
        for number, payload, reason in (
            (0, b"", fmt.UNKNOWN_COMMAND),
            (1, b"x", fmt.UNKNOWN_COMMAND),
            (2, b"", fmt.UNKNOWN_COMMAND),
            (3, bytes(8), fmt.UNKNOWN_COMMAND),
            (3, pack(">QQ", 0x201000, PAGE), fmt.POSTCOPY_PAGE_SIZES),
            (3, pack(">QQ", PAGE, 0x10000), fmt.POSTCOPY_PAGE_SIZES),
            (4, b"", fmt.POSTCOPY_STARTED),
            (5, b"", fmt.POSTCOPY_STARTED),
            (6, b"\0\x06pc.ram\0" + bytes(16), fmt.POSTCOPY_STARTED),
            (7, pack(">I", 99), fmt.POSTCOPY_STARTED),
            (8, b"", fmt.UNKNOWN_COMMAND),
            (9, b"", fmt.UNKNOWN_COMMAND),
            (10, b"\x01x", fmt.UNKNOWN_COMMAND),
            (11, b"x", fmt.UNKNOWN_COMMAND),
            (12, b"", fmt.UNKNOWN_COMMAND),
        ):
            with self.subTest(number=number, payload=payload):
                build = methodcaller("command", number, payload)
                self.early(build, reason)
                self.between(build, reason)

    def test_advice_behind_the_setup(self) -> None:
        self.between(lambda b: b.command(3, pack(">QQ", PAGE, PAGE)), fmt.UNKNOWN_COMMAND)

    def test_other_iterable_sections(self) -> None:
        self.early(lambda b: b.setup(idstr=b"dirty-bitmap"), fmt.UNKNOWN_ITERABLE)
        self.early(lambda b: b.setup(instance=1), fmt.UNKNOWN_ITERABLE)
        self.between(lambda b: b.setup(idstr=b"vfio"), fmt.UNKNOWN_ITERABLE)
        self.between(lambda b: b.setup(), fmt.UNKNOWN_ITERABLE)

    def test_another_version_of_ram(self) -> None:
        self.early(lambda b: b.setup(version=5), fmt.UNKNOWN_RAM_VERSION)

    def test_multifd_as_announced_in_the_setup(self) -> None:
        self.early(lambda b: b.setup(pack(">Q", 0x200) + EOS), fmt.MULTIFD_SEEN)

    def test_transports_of_their_own_in_the_setup(self) -> None:
        self.early(lambda b: b.setup(pack(">Q", 0x80) + EOS), fmt.HOOK_SEEN)

    def test_blocks_that_do_not_fit_to_their_list(self) -> None:
        for blocks, total in (
            ([("a", PAGE), ("a", PAGE)], 2 * PAGE),
            ([("a", PAGE + 1)], 2 * PAGE),
            ([("a", 2 * PAGE)], PAGE),
            ([("", PAGE)], PAGE),
            ([("b\0", PAGE)], PAGE),
            ([("ä", PAGE)], PAGE),
        ):
            with self.subTest(blocks=blocks):
                unknown = StreamBuilder(blocks).setup(total=total).data()
                before = StreamBuilder().header().data()
                self.check(before, unknown, fmt.UNKNOWN_RAM_SETUP)

    def test_page_sizes_that_were_not_announced(self) -> None:
        self.early(lambda b: b.setup(pack(">Q", 2 << 20) + EOS), fmt.UNKNOWN_RAM_SETUP)

    def test_a_footer_of_another_section(self) -> None:
        builder = StreamBuilder(footers=False).begin()
        self.check(builder.data(), b"\x7e" + pack(">I", 3), fmt.UNKNOWN_FOOTER)
        self.within(lambda b: b.raw(EOS + b"\x7e" + pack(">I", 3)), fmt.UNKNOWN_FOOTER)
        self.within(lambda b: b.raw(EOS + b"\x02" + pack(">I", 2)), fmt.UNKNOWN_FOOTER)

    def test_a_footer_where_the_machine_type_has_none(self) -> None:
        builder = StreamBuilder(footers=False).begin().part().finish()
        self.check(builder.data(), b"\x7e" + pack(">I", 2), fmt.UNKNOWN_SECTION)

    def test_devices_before_ram_is_complete(self) -> None:
        self.early(lambda b: b.raw(DEVICES), fmt.FULL_BEFORE_RAM)
        self.between(lambda b: b.raw(DEVICES), fmt.FULL_BEFORE_RAM)

    def test_section_types_that_are_unknown_or_misplaced(self) -> None:
        for kind in (0x00, 0x05, 0x06, 0x09, 0x7E, 0xFF):
            build = methodcaller("raw", bytes([kind]))
            self.early(build, fmt.UNKNOWN_SECTION)
            self.between(build, fmt.UNKNOWN_SECTION)

    def test_parts_of_other_sections(self) -> None:
        self.early(lambda b: b.part(), fmt.UNKNOWN_SECTION)
        self.between(lambda b: b.raw(b"\x02" + pack(">I", 3)), fmt.UNKNOWN_SECTION)

    def test_offsets_beyond_the_block(self) -> None:
        for offset in (64 << 20, 1 << 40, (1 << 64) - PAGE):
            self.within(methodcaller("zeros", 0, [offset]), fmt.OFFSET_BEYOND_BLOCK)
            self.within(methodcaller("pages", 0, [offset]), fmt.OFFSET_BEYOND_BLOCK)
            self.within(methodcaller("delta", 0, offset, b"x"), fmt.OFFSET_BEYOND_BLOCK)
        self.within(lambda b: b.zeros(1, [128 << 10]), fmt.OFFSET_BEYOND_BLOCK)

    def test_good_records_before_a_bad_one_in_the_same_run_are_delivered(self) -> None:
        for good in (1, 3, 5, 6, 7, 30, 300, 700):
            builder = StreamBuilder().begin().part()
            builder.zeros(0, [*range(0, good * PAGE, PAGE), 64 << 20, 0])
            parsed = parse(builder.finish().data())
            self.assertEqual(len(record_list(parsed)), good)
            self.assertEqual(parsed.parser.opaque_reason, fmt.OFFSET_BEYOND_BLOCK)
            self.assertTrue(parsed.parser.in_ram_section)
            self.assertEqual(parsed.parser.last_block, 0)

    def test_blocks_that_are_unknown(self) -> None:
        name = pack(">QB", 0x02, 4) + b"none" + b"\0"
        self.within(lambda b: b.raw(name), fmt.UNKNOWN_BLOCK)
        self.within(lambda b: b.raw(pack(">QB", 0x02, 0)), fmt.UNKNOWN_BLOCK)

    def test_continuing_before_any_block_was_named(self) -> None:
        before = StreamBuilder().begin().part().data()
        self.check(before, pack(">QB", 0x22, 0), fmt.UNKNOWN_BLOCK)

    def test_flags_that_are_unknown_or_refused(self) -> None:
        for flags, reason in (
            (0x00, fmt.UNKNOWN_RECORD),
            (0x01, fmt.UNKNOWN_RECORD),
            (0x04, fmt.UNKNOWN_RECORD),
            (0x0A, fmt.UNKNOWN_RECORD),
            (0x18, fmt.UNKNOWN_RECORD),
            (0x30, fmt.UNKNOWN_RECORD),
            (0x400, fmt.UNKNOWN_RECORD),
            (0x80, fmt.HOOK_SEEN),
            (0x100, fmt.COMPRESSION_SEEN),
            (0x120, fmt.COMPRESSION_SEEN),
            (0x200, fmt.MULTIFD_SEEN),
            (0x1010, fmt.UNKNOWN_RECORD),
        ):
            with self.subTest(flags=hex(flags)):
                build = methodcaller("raw", pack(">Q", flags) + bytes(20))
                self.within(build, reason)

    def test_deltas_that_are_malformed(self) -> None:
        self.within(lambda b: b.record(0, 0, 0x40, b"\x02\0\0"), fmt.DELTA_MALFORMED)
        self.within(lambda b: b.record(0, 0, 0x40, b"\x01\x10\x01"), fmt.DELTA_MALFORMED)


if __name__ == "__main__":
    unittest.main()
