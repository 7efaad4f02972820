# SPDX-License-Identifier: Apache-2.0
"""Compression of frames: when it is done, that nothing is lost, and what is refused."""

import itertools

import numpy as np
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate.relay.compression import COMPRESSIBLE, Compressor, Packed, plain_header
from nova_dmigrate.relay.compression import decompress as unpack
from nova_dmigrate.relay.outbox import Parcel
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.relay.wire.frames import (
    MAX_PAYLOAD,
    PAGE_RECORD_SIZE,
    ZERO_RECORD_SIZE,
    Frame,
    FrameType,
    Header,
)
from tests.base import TestCase
from tests.unit.relay.guest import FakeGuest
from tests.unit.relay.support import PairTestCase

#: Seconds that a network of 1 MB/s needs for a MB, and one of 100 GB/s.
SLOW, FAST = 1.0, 1e-5
MB = 1_000_000
PAGES = 64


def parcel(data: bytes, kind: FrameType = FrameType.PAGES) -> Parcel:
    """A frame of these bytes, in two pieces."""
    half = len(data) // 2
    return Parcel(kind, [memoryview(data)[:half], memoryview(data)[half:]], len(data), block=3)


def text(pages: int = PAGES) -> bytes:
    """Page records that compress."""
    return (b"0123456789-" * PAGE_RECORD_SIZE)[:PAGE_RECORD_SIZE] * pages


def noise(pages: int = PAGES) -> bytes:
    """Page records that do not."""
    return np.random.default_rng(1).bytes(PAGE_RECORD_SIZE * pages)


def unpacked(packed: Packed, block: int = 3) -> Frame:
    """What the destination makes of a frame."""
    payload = memoryview(b"".join(packed.payload))
    header = Header(packed.type, 0, block, len(payload), 7)
    if packed.type is not FrameType.COMPRESSED:
        return Frame(header, payload)
    plain = plain_header(header, payload)
    return unpack(plain, payload, memoryview(bytearray(plain.length + 100)))


class TestDecision(TestCase):
    """A frame is compressed where that is faster."""

    def setUp(self) -> None:
        super().setUp()
        self.compressor = Compressor()

    def kinds(self, data: bytes, count: int) -> list[bool]:
        """Which of so many frames of these bytes were compressed."""
        packed = [self.compressor.pack(parcel(data)) for _ in range(count)]
        return [each.type is FrameType.COMPRESSED for each in packed]

    def test_frames_go_as_they_are_until_something_is_known_of_the_network(self) -> None:
        self.assertEqual([False] * 3, self.kinds(text(), 3))

    def test_on_a_slow_network_what_compresses_is_compressed(self) -> None:
        self.compressor.note_sent(MB, SLOW)
        self.assertEqual([True] * 50, self.kinds(text(), 50))
        self.assertGreater(self.compressor.saved_bytes, 50 * len(text()) * 0.9)

    def test_on_a_fast_network_nothing_is_once_it_is_known_what_it_takes(self) -> None:
        self.compressor.note_sent(MB, FAST)
        self.assertEqual([True] + [False] * 99, self.kinds(text(), 100))

    def test_what_does_not_compress_is_tried_again_now_and_then(self) -> None:
        self.compressor.note_sent(MB, SLOW)
        self.assertEqual([False] * 20, self.kinds(noise(), 20))
        self.assertEqual(0, self.compressor.saved_bytes)
        found = self.kinds(text(), 400)
        self.assertFalse(any(found[:10]))
        self.assertTrue(all(found[-10:]))

    def test_a_moment_without_a_processor_is_forgotten(self) -> None:
        self.compressor.note_sent(MB, SLOW)
        # It took a minute: as if it had to wait for its turn all the time
        self.compressor._seconds_to_compress.note(60.0, PAGE_RECORD_SIZE)
        self.compressor._compressed_size.note(PAGE_RECORD_SIZE // 2, PAGE_RECORD_SIZE)
        found = self.kinds(text(), 60_000)
        self.assertFalse(found[0])
        self.assertTrue(found[-1])

    def test_a_network_that_gets_slow_is_noticed(self) -> None:
        self.compressor.note_sent(MB, FAST)
        self.kinds(text(), 10)
        for _ in range(3):
            self.compressor.note_sent(MB, SLOW)
        self.assertEqual([True] * 10, self.kinds(text(), 10))

    def test_small_frames_and_those_of_the_protocol_are_left_alone(self) -> None:
        self.compressor.note_sent(MB, SLOW)
        small = parcel(b"0" * 1000, FrameType.VERBATIM)
        self.assertEqual(FrameType.VERBATIM, self.compressor.pack(small).type)
        for kind in set(FrameType) - COMPRESSIBLE:
            self.assertEqual(kind, self.compressor.pack(parcel(text(), kind)).type)

    def test_it_can_be_switched_off(self) -> None:
        self.compressor = Compressor(enabled=False)
        self.compressor.note_sent(MB, SLOW)
        self.assertEqual([False] * 5, self.kinds(text(), 5))


class TestContents(TestCase):
    """What comes out is what went in."""

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(sorted(COMPRESSIBLE)), st.binary(min_size=1, max_size=64), st.booleans())
    def test_every_frame_comes_out_as_it_went_in(
        self, kind: FrameType, pattern: bytes, noisy: bool
    ) -> None:
        # A length that is allowed for each type
        length = PAGE_RECORD_SIZE * ZERO_RECORD_SIZE
        data = (pattern * length)[:length]
        if noisy:
            data = data[: length // 2] + np.random.default_rng(2).bytes(length - length // 2)
        compressor = Compressor()
        compressor.note_sent(MB, SLOW)
        packed = compressor.pack(parcel(data, kind))
        self.assertEqual(packed.size, sum(len(memoryview(each)) for each in packed.payload))
        frame = unpacked(packed)
        self.assertEqual(
            (kind, 3, len(data), 7),
            (frame.header.type, frame.header.block, frame.header.length, frame.header.seq),
        )
        self.assertEqual(data, bytes(frame.payload))


class TestRefusals(TestCase):
    """A peer's frame is never believed."""

    def header(self, payload: bytes) -> Header:
        header = Header(FrameType.COMPRESSED, 0, 0, len(payload), 1)
        return plain_header(header, memoryview(payload))

    def assert_refused(self, kind: int, data: bytes, why: str) -> None:
        error = self.assertRaises(ValueError, self.header, bytes([kind]) + data)
        self.assertIn(why, str(error))

    def test_types_that_are_never_compressed(self) -> None:
        data = zstandard.compress(text())
        for kind in (FrameType.COMPRESSED, FrameType.END, FrameType.SETTLED, 0, 255):
            self.assert_refused(int(kind), data, f"carries type {int(kind)}")

    def test_what_is_no_zstd_frame_or_hides_its_size(self) -> None:
        self.assert_refused(FrameType.PAGES, b"\0" * 100, "is not compressed")
        self.assert_refused(FrameType.PAGES, b"", "is not compressed")
        hidden = zstandard.ZstdCompressor(write_content_size=False).compress(text())
        self.assert_refused(FrameType.PAGES, hidden, "allowed are")

    def test_lengths_that_are_not_allowed(self) -> None:
        for length in (0, 1, PAGE_RECORD_SIZE + 1, 2 * MAX_PAYLOAD):
            data = zstandard.compress(bytes(length))
            self.assert_refused(FrameType.PAGES, data, "allowed are")

    def test_content_that_is_cut_off_or_damaged(self) -> None:
        good = bytes([FrameType.PAGES]) + zstandard.compress(text() + noise())
        header = self.header(good)
        for cut in (good[: len(good) // 2], good[:-1], good[:20]):
            memory = memoryview(bytearray(header.length))
            self.assertRaises(ValueError, unpack, header, memoryview(cut), memory)

    def test_any_damage_is_an_error_or_leaves_the_length_right(self) -> None:
        good = bytes([FrameType.PAGES]) + zstandard.compress(text(4))
        for position, bit in itertools.product(range(len(good)), range(8)):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            try:
                header = self.header(bytes(bad))
                frame = unpack(header, memoryview(bad), memoryview(bytearray(header.length)))
            except ValueError:
                continue
            self.assertEqual(header.length, len(frame.payload))


class TestMigration(PairTestCase):
    """Through both relays."""

    def guest(self) -> FakeGuest:
        guest = FakeGuest(31, ram_pages=8192, mapped=0.3, zero=0.1)
        # Half of each page is the same all over
        guest.memory[:, 1024:3072] = 0x30
        guest.volume[guest.blocks] = guest.memory[guest.pages]
        return guest

    def test_on_a_slow_network_less_is_sent_and_all_arrives(self) -> None:
        rate = 16 << 20
        sent = {}
        for enabled in (True, False):
            guest = self.guest()
            limits = RelaySettings(network_bandwidth=rate, compression=enabled)
            summary = self.migrate(guest, source_settings=limits).source_summary
            sent[enabled] = summary["wire_bytes"]
            self.assertEqual(enabled, summary["saved_bytes"] > 0)
        self.assertLess(sent[True], sent[False] * 0.8)
