# SPDX-License-Identifier: Apache-2.0
"""The writer alone: sections of its own, and a CONTINUE state of its own."""

import unittest

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.stream import elements as el
from nova_dmigrate.stream import records
from nova_dmigrate.stream.writer import StreamWriter
from tests.unit.stream.builder import PAGE, StreamBuilder, page_contents, varied_stream
from tests.unit.stream.pieces import parse, record_list, written
from tests.unit.stream.walk import walk


def joined(*buffers: list[el.Buffer]) -> bytes:
    return b"".join(bytes(buffer) for group in buffers for buffer in group)


class WriterTest(unittest.TestCase):
    def setUp(self) -> None:
        self.builder = StreamBuilder()
        self.begin = self.builder.begin().take()
        self.writer = self.new_writer(True)

    def new_writer(self, has_footers: bool) -> StreamWriter:
        found = parse(StreamBuilder(footers=has_footers).begin().part().data()).elements
        [setup] = [element for element in found if isinstance(element, el.RamSetup)]
        return StreamWriter(setup, has_footers)

    def test_what_was_parsed_is_written_byte_by_byte(self) -> None:
        for raw in (varied_stream(), varied_stream(footers=False, machine=None)):
            self.assertEqual(written(parse(raw)), raw)

    def test_records_open_a_part_and_name_their_block_once(self) -> None:
        offsets = np.arange(3) * PAGE
        pages = records.page_records(offsets, page_contents([0, 1, 2]))
        zeros = records.zero_records(offsets)
        out = joined(
            self.writer.page_records(0, pages),
            self.writer.zero_records(0, zeros),
            self.writer.zero_records(1, zeros),
            self.writer.close(),
            self.writer.page_records(1, memoryview(pages)),
            self.writer.close(),
        )
        self.builder.part().pages(0, offsets).zeros(0, offsets).zeros(1, offsets).finish()
        self.assertEqual(out, self.builder.part().pages(1, offsets).finish().take())

    def test_page_data_is_never_copied(self) -> None:
        pages = records.page_records([0, PAGE], page_contents([0, 1]))
        for block in (0, 0, 1):
            last = np.frombuffer(self.writer.page_records(block, pages)[-1], np.uint8)
            self.assertTrue(np.shares_memory(last, pages))

    def test_what_it_is_given_is_never_changed(self) -> None:
        pages = records.page_records([0, PAGE], page_contents([0, 1]))
        before = pages.copy()
        self.writer.page_records(1, pages)
        np.testing.assert_array_equal(pages, before)

    def test_verbatim_bytes_come_between_sections(self) -> None:
        zeros = records.zero_records([0])
        ping = b"\x08\0\x02\0\x04\0\0\0\x01"
        out = joined(
            self.writer.verbatim(ping),
            self.writer.zero_records(0, zeros),
            self.writer.verbatim(ping),
            self.writer.open_end(),
            self.writer.close(),
        )
        expected = self.builder.raw(ping).part().zeros(0, [0]).finish().raw(ping).end().finish()
        self.assertEqual(out, expected.take())

    def test_the_end_comes_behind_an_open_part(self) -> None:
        out = joined(
            self.writer.open_part(),
            self.writer.open_part(),
            self.writer.open_end(),
            self.writer.open_end(),
            self.writer.zero_records(0, records.zero_records([0])),
            self.writer.close(),
            self.writer.close(),
        )
        self.assertEqual(out, self.builder.part().finish().end().zeros(0, [0]).finish().take())
        self.assertFalse(self.writer.section_open)

    def test_old_machine_types_get_no_footers(self) -> None:
        writer = self.new_writer(False)
        out = joined(writer.open_part(), writer.close())
        self.assertEqual(out, StreamBuilder(footers=False).part().finish().data())

    def test_elements_out_of_their_context_name_their_block(self) -> None:
        """A run that continued its block where it was read must name it where that is lost."""
        raw = (
            self.begin
            + self.builder.part()
            .zeros(0, [0])
            .pages(0, [PAGE])
            .delta(0, PAGE, b"xyz")
            .zeros(1, [0])
            .pages(0, [0])
            .finish()
            .take()
        )
        parsed = parse(raw)
        taken = [e for e in parsed.elements if isinstance(e, (el.PageRun, el.ZeroRun, el.Delta))]
        for skipped in range(len(taken)):
            writer = self.new_writer(True)
            rest = taken[skipped:] + taken[:skipped]
            out = joined(*[writer.write(element) for element in rest], writer.close())
            found = record_list(parsed)
            self.assertEqual(walk(self.begin + out).records, found[skipped:] + found[:skipped])

    def test_a_delta_continues_or_names_its_block(self) -> None:
        raw = StreamBuilder().begin().part().delta(1, 0, b"ab").delta(1, PAGE, b"cd").data()
        first, second = (e for e in parse(raw).elements if isinstance(e, el.Delta))
        out = joined(
            self.writer.delta(1, second.data, second.head),
            self.writer.delta(1, first.data, first.head),
            self.writer.delta(1, second.data, second.head),
            self.writer.close(),
        )
        self.builder.part().delta(1, PAGE, b"cd").delta(1, 0, b"ab", named=True)
        self.assertEqual(out, self.builder.delta(1, PAGE, b"cd").finish().take())

    def test_sections_that_do_not_fit_are_refused(self) -> None:
        found = parse(varied_stream()).elements
        start = next(e for e in found if isinstance(e, el.SectionStart))
        finish = next(e for e in found if isinstance(e, el.SectionFinish))
        with self.assertRaises(exception.StreamError):
            self.writer.write(finish)
        self.writer.write(start)
        with self.assertRaises(exception.StreamError):
            self.writer.write(start)

    def test_records_of_an_impossible_size_are_refused(self) -> None:
        for size in (0, 9, 4103, 4105):
            with self.assertRaises(exception.StreamError):
                self.writer.page_records(0, memoryview(bytes(size)))
        for size in (0, 8, 10):
            with self.assertRaises(exception.StreamError):
                self.writer.zero_records(0, memoryview(bytes(size)))


if __name__ == "__main__":
    unittest.main()
