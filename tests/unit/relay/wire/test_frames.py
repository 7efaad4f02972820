# SPDX-License-Identifier: Apache-2.0
import hypothesis
from hypothesis import strategies

from nova_dmigrate import exception
from nova_dmigrate.relay.wire import frames
from nova_dmigrate.relay.wire.frames import FrameType, Role
from tests import base

FORWARD = frames.RULES[Role.DATA]
BACKWARD = frames.RULES[Role.ACKS]


def _parse(rules: dict[int, frames.Rule], **fields: int) -> frames.Header:
    values = {"type": 1, "flags": 0, "block": 0, "length": 0, "seq": 0, **fields}
    return frames.parse_header(frames.HEADER.pack(*values.values()), rules, "peer")


class FramesTest(base.TestCase):
    def test_every_type_has_one_direction_and_keepalive_both(self) -> None:
        for frame_type in FrameType:
            directions = [rules for rules in (FORWARD, BACKWARD) if frame_type in rules]
            self.assertEqual(2 if frame_type is FrameType.KEEPALIVE else 1, len(directions))
            forward = frame_type < 32
            self.assertIn(frame_type, FORWARD if forward else BACKWARD)

    def test_sizes_are_those_of_the_protocol(self) -> None:
        self.assertEqual(16, frames.HEADER_SIZE)
        self.assertEqual(24, frames.REFERENCE.itemsize)
        self.assertEqual(4104, frames.COPY.itemsize)
        self.assertEqual(5, frames.MISS.itemsize)

    def test_header_is_little_endian_in_the_documented_order(self) -> None:
        data = bytes([4, 1, 2, 0, 0x10, 0x20, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0x80])
        header = frames.parse_header(data, FORWARD, "peer")
        self.assertEqual((FrameType.PAGES, 1, 2, 0x2010, 9 | 1 << 63), header)

    def test_a_type_of_the_other_direction_is_refused(self) -> None:
        for rules, number in ((FORWARD, FrameType.DONE), (BACKWARD, FrameType.PAGES)):
            error = self.assertRaises(exception.FrameError, _parse, rules, type=number)
            self.assertIn("not for this direction", str(error))

    def test_a_payload_beyond_the_limit_is_refused(self) -> None:
        length = frames.MAX_PAYLOAD + 1
        error = self.assertRaises(exception.FrameError, _parse, FORWARD, length=length)
        self.assertIn("MAP frame of 8388609 bytes, allowed are 0 to 8388608", str(error))

    def test_a_torn_record_is_refused(self) -> None:
        error = self.assertRaises(exception.FrameError, _parse, FORWARD, type=4, length=4103)
        self.assertIn("multiples of 4104", str(error))

    def test_records_frames_are_never_empty(self) -> None:
        for number in (FrameType.PAGES, FrameType.ZEROS, FrameType.REFERENCES, FrameType.COPIES):
            self.assertRaises(exception.FrameError, _parse, FORWARD, type=number, length=0)

    @hypothesis.given(data=strategies.binary(min_size=16, max_size=16))
    @hypothesis.settings(deadline=None, derandomize=True, max_examples=500)
    def test_any_16_bytes_are_a_header_within_limits_or_a_frame_error(self, data: bytes) -> None:
        for rules in (FORWARD, BACKWARD):
            try:
                header = frames.parse_header(data, rules, "peer")
            except exception.FrameError:
                continue
            self.assertLessEqual(header.length, frames.MAX_PAYLOAD)
            self.assertEqual(data, frames.HEADER.pack(*header))
