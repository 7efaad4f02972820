# SPDX-License-Identifier: Apache-2.0
"""What the parser finds in streams that it understands to the end."""

import unittest
from struct import pack

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.stream import elements as el
from nova_dmigrate.stream import format as fmt
from nova_dmigrate.stream.reader import StreamParser
from tests.unit.stream.builder import (
    BLOCKS,
    DEVICES,
    PAGE,
    StreamBuilder,
    page_contents,
    synthetic_stream,
    varied_stream,
)
from tests.unit.stream.pieces import parse, record_list, skeleton
from tests.unit.stream.walk import walk


def runs(elements: list[el.Element]) -> list[tuple[str, int, list[int], int]]:
    return [
        (type(element).__name__, element.block, element.offsets.tolist(), element.head)
        for element in elements
        if isinstance(element, (el.PageRun, el.ZeroRun))
    ]


class SetupTest(unittest.TestCase):
    def test_setup_tells_blocks_total_and_section(self) -> None:
        parsed = parse(varied_stream())
        [setup] = [e for e in parsed.elements if isinstance(e, el.RamSetup)]
        self.assertEqual([(block.idstr, block.used_length) for block in setup.blocks], list(BLOCKS))
        self.assertEqual(setup.total, sum(length for _, length in BLOCKS))
        self.assertEqual(setup.section_id, 2)
        self.assertEqual(setup.data[0], 1)
        self.assertEqual(bytes(setup.data[-8:]), pack(">Q", 0x10))
        self.assertEqual(parsed.parser.blocks, setup.blocks)
        self.assertEqual(parsed.parser.total_ram, setup.total)
        self.assertEqual(parsed.parser.section_id, 2)

    def test_machine_commands_and_footers_are_known_after_the_setup(self) -> None:
        parser = parse(varied_stream()).parser
        self.assertEqual(parser.machine, "pc-i440fx-7.2")
        self.assertTrue(parser.return_path)
        self.assertTrue(parser.post_copy_advised)
        self.assertTrue(parser.has_footers)

    def test_old_machine_types_have_neither_configuration_nor_footers(self) -> None:
        parsed = parse(varied_stream(footers=False, machine=None))
        self.assertIsNone(parsed.parser.machine)
        self.assertIs(parsed.parser.has_footers, False)
        self.assertEqual(parsed.parser.opaque_reason, fmt.RAM_COMPLETE)
        finishes = [e for e in parsed.elements if isinstance(e, el.SectionFinish)]
        self.assertEqual({len(finish.data) for finish in finishes}, {8})
        self.assertFalse(any(finish.has_footer for finish in finishes))

    def test_whoever_gets_the_setup_knows_about_footers(self) -> None:
        raw = StreamBuilder(footers=False).begin().data()
        parser = StreamParser()
        found, consumed = parser.parse(memoryview(raw))
        self.assertNotIn(el.RamSetup, [type(element) for element in found])
        found, _ = parser.parse(memoryview(raw[consumed:] + b"\x02"))
        self.assertEqual([type(element) for element in found], [el.RamSetup])
        self.assertIs(parser.has_footers, False)

    def test_advice_without_payload_is_understood(self) -> None:
        builder = StreamBuilder().header().configuration().command(3).setup()
        parser = parse(builder.end().finish().data()).parser
        self.assertTrue(parser.post_copy_advised)
        self.assertEqual(parser.opaque_reason, fmt.RAM_COMPLETE)

    def test_target_page_bits_of_4_kib_pages_are_understood(self) -> None:
        builder = StreamBuilder().header()
        bits = builder.subsection("configuration/target-page-bits", pack(">I", 12))
        none = builder.subsection("configuration/capabilities", pack(">I", 0))
        builder.configuration("q35", bits + none).setup().end().finish()
        self.assertEqual(parse(builder.data()).parser.opaque_reason, fmt.RAM_COMPLETE)

    def test_all_elements_of_the_varied_stream_are_named(self) -> None:
        shape = [entry[:2] for entry in skeleton(parse(varied_stream()).elements)]
        part = [("SectionStart", 2), ("SectionFinish", 2)]
        self.assertEqual(
            [entry if entry[0] != "setup" else ("setup",) for entry in shape],
            [
                ("verbatim", "header"),
                ("verbatim", "configuration"),
                ("verbatim", "command:open-return-path"),
                ("verbatim", "command:ping"),
                ("verbatim", "command:postcopy-advise"),
                ("setup",),
                ("verbatim", "footer"),
                *part,
                ("verbatim", "command:ping"),
                *part,
                *part,
                ("verbatim", "command:switchover-start"),
                *part,
                ("opaque", fmt.RAM_COMPLETE),
            ],
        )


class RecordsTest(unittest.TestCase):
    def test_records_equal_those_of_an_independent_walk(self) -> None:
        for raw in (
            varied_stream(),
            varied_stream(footers=False, machine=None),
            synthetic_stream("mixed", 500, section_pages=170),
        ):
            walked = walk(raw)
            self.assertTrue(walked.complete)
            parsed = parse(raw)
            self.assertEqual(record_list(parsed), walked.records)
            self.assertEqual(parsed.parser.opaque_position, walked.position)

    def test_a_run_spans_all_records_of_its_kind_and_block(self) -> None:
        offsets = np.arange(700) * PAGE
        builder = StreamBuilder().begin().part()
        raw = builder.pages(0, offsets).zeros(0, offsets).finish().end().finish().data()
        parsed = parse(raw)
        self.assertEqual(
            runs(parsed.elements),
            [
                ("PageRun", 0, offsets.tolist(), 8 + 1 + len("pc.ram")),
                ("ZeroRun", 0, offsets.tolist(), 8),
            ],
        )
        [run] = [e for e in parsed.elements if isinstance(e, el.PageRun)]
        self.assertEqual(run.pages.strides, (4104, 1))
        np.testing.assert_array_equal(run.pages, page_contents(np.arange(700)))

    def test_runs_of_every_short_length_end_where_the_kind_changes(self) -> None:
        builder = StreamBuilder().begin().part()
        expected = []
        for length in [*range(1, 50), 544, 545, 546]:
            where = np.arange(length) * PAGE
            builder.zeros(0, where)
            builder.pages(0, [PAGE])
            expected += [("ZeroRun", where.tolist()), ("PageRun", [PAGE])]
        parsed = parse(builder.finish().end().finish().data())
        self.assertEqual([(run[0], run[2]) for run in runs(parsed.elements)], expected)

    def test_a_run_ends_at_the_end_of_the_buffer_and_goes_on_in_the_next(self) -> None:
        raw = StreamBuilder().begin().part().pages(0, np.arange(10) * PAGE).finish().data()
        first_page = raw.index(page_contents([0]).tobytes())
        cut = first_page + 4096 + 4104 * 2 + 100
        found = runs(parse(raw, [cut]).elements)
        self.assertEqual([len(run[2]) for run in found], [3, 7])
        self.assertEqual([run[3] for run in found], [15, 8])

    def test_a_named_record_begins_a_run_of_its_own(self) -> None:
        builder = StreamBuilder().begin().part().zeros(0, [0, PAGE])
        builder.zeros(0, [2 * PAGE, 3 * PAGE], named=True)
        found = runs(parse(builder.finish().data()).elements)
        self.assertEqual([len(run[2]) for run in found], [2, 2])
        self.assertEqual([run[3] for run in found], [15, 15])

    def test_continue_refers_to_the_last_block_across_sections(self) -> None:
        builder = StreamBuilder().begin().part().zeros(2, [0]).finish()
        raw = builder.part().zeros(2, [PAGE]).finish().data()
        parsed = parse(raw)
        self.assertEqual([(r[1], r[3]) for r in runs(parsed.elements)], [(2, 8 + 8), (2, 8)])
        self.assertEqual(parsed.parser.last_block, 2)

    def test_fill_bytes_other_than_zero_are_kept(self) -> None:
        raw = StreamBuilder().begin().part().zeros(0, [0, PAGE], fill=0xA5).finish().data()
        [run] = [e for e in parse(raw).elements if isinstance(e, el.ZeroRun)]
        self.assertEqual(run.fill.tolist(), [0xA5, 0xA5])

    def test_offsets_are_an_array_of_their_own(self) -> None:
        """Whoever reuses the buffer must be able to keep the offsets."""
        raw = bytearray(StreamBuilder().begin().part().zeros(0, np.arange(90) * PAGE).data())
        found, _ = StreamParser().parse(memoryview(raw))
        [run] = [e for e in found if isinstance(e, el.ZeroRun)]
        before = run.offsets.copy()
        raw[:] = bytes(len(raw))
        np.testing.assert_array_equal(run.offsets, before)

    def test_the_last_page_of_a_block_is_within_it(self) -> None:
        raw = StreamBuilder().begin().part().zeros(1, [(128 << 10) - PAGE]).finish().data()
        self.assertIsNone(parse(raw).parser.opaque_reason)

    def test_state_says_whether_a_section_is_open(self) -> None:
        builder = StreamBuilder().begin().part().zeros(1, [0])
        self.assertTrue(parse(builder.data()).parser.in_ram_section)
        self.assertFalse(parse(builder.finish().data()).parser.in_ram_section)


class EndTest(unittest.TestCase):
    def test_everything_behind_ram_is_opaque_and_ordinary(self) -> None:
        parsed = parse(varied_stream(), [100] * 1000)
        tail = [e for e in parsed.elements if isinstance(e, el.Opaque)]
        self.assertEqual(b"".join(e.data for e in tail), DEVICES)
        self.assertEqual({e.reason for e in tail}, {fmt.RAM_COMPLETE})
        parsed.parser.finish()

    def test_opaque_elements_have_no_limit(self) -> None:
        raw = StreamBuilder().begin().end().finish().raw(bytes(3 << 20)).data()
        self.assertEqual(len(parse(raw).elements[-1].data), 3 << 20)

    def test_a_stream_that_ends_within_an_element_is_an_error(self) -> None:
        parsed = parse(StreamBuilder().begin().part().pages(0, [0]).data()[:-1])
        with self.assertRaisesRegex(exception.StreamError, "within an element"):
            parsed.parser.finish()

    def test_a_stream_that_ends_before_ram_is_complete_is_an_error(self) -> None:
        for raw in (b"", StreamBuilder().begin().part().finish().data()):
            with self.assertRaisesRegex(exception.StreamError, "before RAM was complete"):
                parse(raw).parser.finish()

    def test_nothing_is_consumed_of_an_empty_buffer(self) -> None:
        self.assertEqual(StreamParser().parse(memoryview(b"")), ([], 0))


if __name__ == "__main__":
    unittest.main()
