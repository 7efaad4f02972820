# SPDX-License-Identifier: Apache-2.0
"""What frames say: what one relay packs the other unpacks, and refuses what it cannot be."""

import json
from struct import pack

import numpy as np

from nova_dmigrate.buffermap import BufferMap, MapLimits
from nova_dmigrate.memory_layout import MemoryLayout, MemoryRange
from nova_dmigrate.relay import protocol
from nova_dmigrate.relay.outbox import Parcel
from nova_dmigrate.relay.wire.frames import FrameType
from nova_dmigrate.stream.elements import RamBlock, RamSetup
from tests.base import TestCase
from tests.unit.relay.pair import extents_of

LIMITS = MapLimits(max_pages=1 << 20, max_volumes=4, max_chunk_bytes=1 << 20)


def payload(parcel: Parcel) -> memoryview:
    data = b"".join(parcel.payload)
    assert len(data) == parcel.size
    return memoryview(data)


class MapTest(TestCase):
    def test_a_map_and_its_layout_arrive(self) -> None:
        layout = MemoryLayout((MemoryRange(1 << 20, 1 << 20, "pc.ram", 4096),))
        extents = extents_of("volume", 1 << 20, np.arange(256, 300), np.arange(44))
        buffer_map = BufferMap.build([extents])
        first, *chunks, last = protocol.map_parcels(list(buffer_map.to_chunks()), layout, 77)
        self.assertEqual(protocol.MAP_LAYOUT, first.flags)
        self.assertEqual(layout, protocol.parse_layout(payload(first)))
        self.assertEqual({protocol.MAP_CHUNK}, {chunk.flags for chunk in chunks})
        received = BufferMap.from_chunks([bytes(payload(chunk)) for chunk in chunks], LIMITS)
        self.assertEqual(44, received.page_count)
        self.assertEqual(protocol.MAP_COMPLETE, last.flags)
        self.assertEqual(77, protocol.parse_first(payload(last)))
        self.assertRaises(ValueError, protocol.parse_first, memoryview(b""))

    def test_a_layout_that_makes_no_sense_is_refused(self) -> None:
        for rows in (
            "x", "7", "[7]", "[[1, 2]]", '[["a", 1, "b", 2]]', "[[null, 1, 2, 3]]",
            '[[4096, 4096, "a", 0], [4096, 4096, "a", 4096]]', '[[1, 4096, "a", 0]]',
        ):  # fmt: skip
            with self.subTest(rows=rows):
                self.assertRaises(ValueError, protocol.parse_layout, memoryview(rows.encode()))


class SetupTest(TestCase):
    def test_a_setup_arrives(self) -> None:
        blocks = (RamBlock("pc.ram", 1 << 30), RamBlock("hüge", 1 << 20, 2 << 20))
        setup = RamSetup(memoryview(b"what QEMU sent"), 7, (1 << 30) + (1 << 20), blocks)
        received = protocol.parse_setup(payload(protocol.setup_parcel(setup, post_copy=False)))
        self.assertEqual(
            (7, setup.total, blocks), (received.section_id, received.total, received.blocks)
        )
        self.assertEqual(b"what QEMU sent", bytes(received.data))

    def test_a_setup_that_makes_no_sense_is_refused(self) -> None:
        for description in (
            "x", "[]", "{}", '{"section_id": 1}', '{"section_id": 1, "blocks": [[1]]}',
            '{"section_id": null, "blocks": []}', '{"section_id": 1, "blocks": [["a", "b", 1]]}',
        ):  # fmt: skip
            with self.subTest(description=description):
                data = pack("<I", len(description)) + description.encode()
                self.assertRaises(ValueError, protocol.parse_setup, memoryview(data))
        for data in (b"", b"abc", pack("<I", 100) + b"{}"):
            self.assertRaises(ValueError, protocol.parse_setup, memoryview(data))


class LatchTest(TestCase):
    def test_a_latch_arrives_with_and_without_its_record(self) -> None:
        for record in (None, (FrameType.ZEROS, 3, b"123456789"), (FrameType.PAGES, 1, b"p" * 4104)):
            for inside in (False, True):
                parcel = protocol.latch_parcel("because", inside, record)
                data = payload(parcel)
                reason, kind, got = protocol.parse_latch(data, parcel.flags)
                self.assertEqual("because", reason)
                self.assertEqual(inside, bool(parcel.flags & protocol.LATCH_INSIDE))
                if record is None:
                    self.assertEqual((None, b"", 0), (kind, bytes(got), parcel.block))
                else:
                    self.assertEqual(record, (kind, parcel.block, bytes(got)))

    def test_a_long_reason_is_cut(self) -> None:
        parcel = protocol.latch_parcel("x" * 5000, False, None)
        reason, _, _ = protocol.parse_latch(payload(parcel), parcel.flags)
        self.assertEqual("x" * 1024, reason)

    def test_a_latch_that_makes_no_sense_is_refused(self) -> None:
        whole = payload(
            protocol.latch_parcel("why", False, (FrameType.ZEROS, 0, b"123456789"))
        ).tobytes()
        unknown = bytearray(whole)
        unknown[7] = 99
        for data in (b"", b"ab", whole[:-1], pack("<I", 1 << 30) + b"x", bytes(unknown)):
            with self.subTest(data=data):
                flags = protocol.LATCH_RECORD
                self.assertRaises(ValueError, protocol.parse_latch, memoryview(data), flags)


class SmallFramesTest(TestCase):
    def test_progress_arrives(self) -> None:
        progress = protocol.Progress(1 << 40, 1.5e9, 7)
        self.assertEqual(progress, protocol.Progress.parse(memoryview(progress.pack())))
        for data in (b"", progress.pack()[:-1], progress.pack() + b"x"):
            self.assertRaises(ValueError, protocol.Progress.parse, memoryview(data))

    def test_the_time_left_is_known_once_the_rate_is(self) -> None:
        self.assertEqual(0, protocol.Progress(0, 0.0, 100).volume_seconds_left())
        self.assertEqual(4, protocol.Progress(0, 25.0, 100).volume_seconds_left())

    def test_an_abort_says_why(self) -> None:
        parcel = protocol.abort_parcel("äbcd" * 1000)
        self.assertEqual(protocol.END_ABORTED, parcel.flags)
        self.assertTrue(protocol.parse_text(payload(parcel)).startswith("äbcd"))
        self.assertEqual(1024, parcel.size)

    def test_a_text_of_the_peer_cannot_forge_log_lines(self) -> None:
        text = protocol.parse_text(memoryview(b"a\nb\x1b[2J\xff c"))
        self.assertTrue(text.isprintable())
        self.assertTrue(text.startswith("a?b?[2J"))

    def test_misses_are_counted_by_reason(self) -> None:
        reasons = np.array([0, 1, 1, 0, 0, 2], np.uint8)
        self.assertEqual(
            {"changed": 3, "read_error": 2, "no_volume": 1}, protocol.count_misses(reasons)
        )
        self.assertRaises(ValueError, protocol.count_misses, np.array([77], np.uint8))

    def test_a_report_that_cannot_be_read_is_none(self) -> None:
        report = {"hits": 5}
        self.assertEqual(report, protocol.parse_report(memoryview(json.dumps(report).encode())))
        for data in (b"", b"[1]", b"\xff", b"{"):
            self.assertIsNone(protocol.parse_report(memoryview(data)))
