# SPDX-License-Identifier: Apache-2.0
"""Properties over splits, truncations and mutations of whole streams."""

import random
import unittest
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from nova_dmigrate import exception
from nova_dmigrate.stream import elements as el
from nova_dmigrate.stream import format as fmt
from tests.unit.stream.builder import PAGE, StreamBuilder, synthetic_stream, varied_stream
from tests.unit.stream.pieces import Parsed, joined, parse, record_list, skeleton, written
from tests.unit.stream.walk import walk

VARIED = varied_stream()
OLD = varied_stream(footers=False, machine=None)
MIXED = synthetic_stream("mixed", 200, section_pages=70)
STREAMS = (VARIED, OLD, MIXED)
# Short sizes find the boundaries within headers, long ones those within pages.
SIZES = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 20000)), max_size=60)


@st.composite
def built_streams(draw: st.DrawFn) -> bytes:
    """Streams that QEMU might have sent, from a random description."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    blocks = [(f"block{number}", length * PAGE) for number, length in enumerate(lengths)]
    builder = StreamBuilder(blocks, footers=draw(st.booleans()), section_id=draw(st.integers(0, 9)))
    builder.begin(draw(st.sampled_from([None, "pc-q35-10.0"])))
    for _ in range(draw(st.integers(0, 4))):
        builder.part()
        for _ in range(draw(st.integers(0, 5))):
            block = draw(st.integers(0, len(blocks) - 1))
            numbers = st.integers(0, lengths[block] - 1)
            offsets = [number * PAGE for number in draw(st.lists(numbers, min_size=1, max_size=9))]
            named = draw(st.booleans())
            kind = draw(st.sampled_from("pzd"))
            if kind == "p":
                builder.pages(block, offsets, named=named)
            elif kind == "z":
                builder.zeros(block, offsets, fill=draw(st.integers(0, 255)), named=named)
            else:
                builder.delta(block, offsets[0], draw(st.binary(max_size=50)), named=named)
        builder.finish()
        if draw(st.booleans()):
            builder.command(2, draw(st.binary(min_size=4, max_size=4)))
    return builder.end().finish().raw(draw(st.binary(max_size=50))).data()


class SplitTest(unittest.TestCase):
    def check_same(self, pieces: Parsed, whole: Parsed, raw: bytes) -> None:
        self.assertEqual(skeleton(pieces.elements), skeleton(whole.elements))
        self.assertEqual(record_list(pieces), record_list(whole))
        self.assertEqual(pieces.rest, whole.rest)
        self.assertEqual(written(pieces) + pieces.rest, raw)
        for name in ("opaque_reason", "opaque_position", "in_ram_section", "last_block", "blocks"):
            self.assertEqual(getattr(pieces.parser, name), getattr(whole.parser, name), name)

    def test_every_split_position_gives_the_same(self) -> None:
        for raw in (VARIED, OLD):
            whole = parse(raw)
            expected = (skeleton(whole.elements), record_list(whole))
            for cut in range(len(raw) + 1):
                pieces = parse(raw, [cut])
                self.assertEqual((skeleton(pieces.elements), record_list(pieces)), expected, cut)
                self.assertEqual(written(pieces), raw, cut)

    def test_byte_by_byte_gives_the_same(self) -> None:
        for raw in (VARIED, OLD):
            self.check_same(parse(raw, [1] * len(raw)), parse(raw), raw)

    @given(raw=built_streams(), sizes=SIZES)
    def test_random_streams_in_random_pieces_give_the_same_as_a_walk(
        self, raw: bytes, sizes: list[int]
    ) -> None:
        whole = parse(raw)
        walked = walk(raw)
        self.assertTrue(walked.complete)
        self.assertEqual(record_list(whole), walked.records)
        self.assertEqual(whole.parser.opaque_reason, fmt.RAM_COMPLETE)
        self.assertEqual(whole.parser.opaque_position, walked.position)
        self.check_same(parse(raw, sizes), whole, raw)

    @given(raw=st.sampled_from(STREAMS), sizes=SIZES, share=st.floats(0, 1))
    def test_truncated_streams_give_all_that_was_whole(
        self, raw: bytes, sizes: list[int], share: float
    ) -> None:
        cut = raw[: int(len(raw) * share)]
        pieces = parse(cut, sizes)
        self.check_same(pieces, parse(cut), cut)
        self.assertEqual(record_list(pieces), walk(cut).records)
        if pieces.parser.opaque_reason is None:
            self.assertRaises(exception.StreamError, pieces.parser.finish)


def flip(raw: bytearray, dice: random.Random) -> None:
    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)


def replace(raw: bytearray, dice: random.Random) -> None:
    raw[dice.randrange(len(raw))] = dice.choice([0, 1, 2, 3, 4, 5, 7, 8, 0x10, 0x7E, 0x7F, 0xFF])


def insert(raw: bytearray, dice: random.Random) -> None:
    where = dice.randrange(len(raw) + 1)
    raw[where:where] = dice.randbytes(dice.randint(1, 30))


def delete(raw: bytearray, dice: random.Random) -> None:
    where = dice.randrange(len(raw))
    del raw[where : where + dice.choice([1, 2, 8, 9, 4096, 4104])]


def repeat(raw: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(raw))
    piece = raw[start : start + dice.choice([5, 8, 9, 13, 4104])]
    where = dice.randrange(len(raw) + 1)
    raw[where:where] = piece


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip,
    replace,
    insert,
    delete,
    repeat,
)


def structure(raw: bytes) -> list[int]:
    """Positions of everything but the pages' own bytes, where mutations matter."""
    positions: list[int] = []
    start = 0
    for element in parse(raw).elements:
        size = len(element.data)
        if isinstance(element, el.PageRun):
            for begin in range(element.head - 8, size, 4104):
                positions += range(
                    start + (begin if begin > element.head else 0), start + begin + 8
                )
        else:
            positions += range(start, start + size)
        start += size
    return positions


class MutationTest(unittest.TestCase):
    """Whatever arrives: no error, no hang, no growth, and the output is the input."""

    def check(self, raw: bytes, sizes: list[int]) -> None:
        pieces = parse(raw, sizes)  # it checks the rest's size, and that elements are the input
        try:
            self.assertEqual(written(pieces) + pieces.rest, raw)
        except exception.StreamError:
            self.fail("what the reader let pass must be writable")
        # What was parsed is what it claims to be: the walk believes more, never less.
        found = record_list(pieces)
        self.assertEqual(found, walk(raw).records[: len(found)])
        for element in pieces.elements:
            if isinstance(element, (el.PageRun, el.ZeroRun)):
                used_length = pieces.parser.blocks[element.block].used_length
                self.assertLess(int(element.offsets.max()), used_length)
                self.assertFalse((element.offsets % PAGE).any())
        whole = parse(raw)
        self.assertEqual(skeleton(pieces.elements), skeleton(whole.elements))
        self.assertEqual(found, record_list(whole))

    @settings(max_examples=400)
    @given(raw=st.sampled_from(STREAMS), seed=st.integers(0, 1 << 32), sizes=SIZES)
    def test_mutated_streams_are_copied_exactly(
        self, raw: bytes, seed: int, sizes: list[int]
    ) -> None:
        dice = random.Random(seed)
        mutated = bytearray(raw)
        for _ in range(dice.randint(1, 4)):
            dice.choice(MUTATIONS)(mutated, dice)
        self.check(bytes(mutated), sizes)

    def test_every_byte_that_is_not_a_page_may_be_wrong(self) -> None:
        dice = random.Random(7)
        for raw in (VARIED, OLD):
            for position in structure(raw):
                mutated = bytearray(raw)
                mutated[position] ^= 1 << dice.randrange(8)
                self.check(bytes(mutated), [dice.randrange(len(raw))])

    @given(raw=st.binary(max_size=300), begun=st.booleans())
    def test_garbage_is_copied_exactly(self, raw: bytes, begun: bool) -> None:
        prefix = StreamBuilder().begin().part().zeros(0, [0]).data() if begun else b""
        self.check(prefix + raw, [len(prefix)])

    def test_a_stream_without_end_is_never_buffered(self) -> None:
        """Zero bytes without end in any state: nothing of them may pile up."""
        states = StreamBuilder().header()
        prefixes = [states.data(), states.configuration().data(), states.setup().data()]
        prefixes += [states.part().data(), states.pages(0, [0]).data()]
        for prefix in (b"", *prefixes):
            for cut in range(0, 30):
                raw = prefix[: len(prefix) - cut] + bytes(3 << 20)
                parsed = parse(raw, [len(prefix)] + [1 << 18] * 12)
                self.assertEqual(joined(parsed.elements) + parsed.rest, raw)


if __name__ == "__main__":
    unittest.main()
