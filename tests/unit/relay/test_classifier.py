# SPDX-License-Identifier: Apache-2.0
"""What becomes of pages at the source: references once and in the bulk only, all else as it is."""

from collections.abc import Sequence

import numpy as np

from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.relay.classifier import Classifier
from nova_dmigrate.relay.digest import digest_pages
from nova_dmigrate.relay.outbox import Outbox, Parcel
from nova_dmigrate.relay.pagemap import MappedVolume, PageMap
from nova_dmigrate.relay.window import Window
from nova_dmigrate.relay.wire.frames import REFERENCE, FrameType
from nova_dmigrate.stream.elements import Delta, PageRun, ZeroRun
from nova_dmigrate.stream.reader import StreamParser
from nova_dmigrate.stream.records import PAGE_RECORD, ZERO_RECORD
from tests.base import TestCase
from tests.unit.stream.builder import StreamBuilder, page_contents

PAGE = 4096
BLOCKS = [("ram", 64 * PAGE), ("other", 64 * PAGE)]


class ClassifierTest(TestCase):
    """Pages 0 to 15 of the first RAMBlock and 0 to 3 of the second are mapped."""

    def setUp(self) -> None:
        super().setUp()
        self.begin()

    def begin(self) -> None:
        self.window = Window(64 * PAGE)
        self.outbox = Outbox(self.window, delay=1, floor=1 << 30, fill=lambda idle: None)
        mapped = np.array([*range(16), *range(64, 68)], np.uint32)
        volumes = (MappedVolume("volume", 0, 100),)
        bases = np.array([0, 64, 128])
        self.map = PageMap(bases, mapped, np.arange(20, dtype=np.uint32), volumes)
        self.classifier = Classifier(self.map, self.window, self.outbox)
        self.builder = StreamBuilder(BLOCKS).begin().part()
        self.parser = StreamParser()
        self.pool = BufferPool(1 << 20, 64)

    def flow(self) -> list[tuple[str, int, list[int]]]:
        """Handle what was built; returns kind, RAMBlock and pages (or entries) of each frame."""
        data = self.builder.take()
        buffer = self.pool.take()
        assert buffer is not None
        buffer.view[: len(data)] = data
        elements, _ = self.parser.parse(buffer.view[: len(data)])
        runs = [element for element in elements if isinstance(element, PageRun | ZeroRun)]
        self.classifier.handle(runs, buffer)
        self.buffer: PooledBuffer = buffer
        frames = []
        while (parcel := self.outbox.take(0)) is not None:
            frames.append(self.describe(parcel))
            self.outbox.sent(parcel, parcel.size)
        return frames

    def describe(self, parcel: Parcel) -> tuple[str, int, list[int]]:
        payload = b"".join(parcel.payload)
        self.assertEqual(len(payload), parcel.size)
        if parcel.type is FrameType.REFERENCES:
            references = np.frombuffer(payload, REFERENCE)
            numbers = references["entry"].tolist()
            positions = self.map.position[numbers] % 64
            expected = digest_pages(page_contents(positions))
            self.assertTrue((expected == references["digest"]).all())
            return "references", 0, numbers
        dtype = PAGE_RECORD if parcel.type is FrameType.PAGES else ZERO_RECORD
        records = np.frombuffer(payload, dtype)
        flags = records["header"] & 4095
        self.assertEqual({0x28 if dtype is PAGE_RECORD else 0x22}, set(flags.tolist()))
        pages = (records["header"] >> 12).tolist()
        if dtype is PAGE_RECORD:
            self.assertTrue((page_contents(pages) == records["page"]).all())
        return parcel.type.name.lower(), parcel.block, pages

    def pages(self, block: int, numbers: Sequence[int]) -> None:
        self.builder.pages(block, np.array(numbers) * PAGE)

    def zeros(self, block: int, numbers: Sequence[int]) -> None:
        self.builder.zeros(block, np.array(numbers) * PAGE)

    def test_mapped_pages_go_as_references_and_others_raw(self) -> None:
        self.pages(0, [13, 14, 15, 16, 17])
        self.assertEqual([("references", 0, [13, 14, 15]), ("pages", 0, [16, 17])], self.flow())
        self.assertEqual(3, self.window.unresolved)
        counts = self.classifier.counts
        self.assertEqual((2, 0, 3, 0, 0), (
            counts.raw, counts.zero, counts.referenced, counts.window_full, counts.resent
        ))  # fmt: skip

    def test_pages_of_another_ramblock_are_told_apart(self) -> None:
        self.pages(0, [20, 21])
        self.pages(1, [3, 4])
        self.assertEqual(
            [("pages", 0, [20, 21]), ("references", 0, [19]), ("pages", 1, [4])], self.flow()
        )

    def test_runs_of_one_ramblock_go_together_and_zeros_by_themselves(self) -> None:
        self.pages(0, [20, 21])
        self.zeros(0, [22, 23])
        self.pages(0, [30])
        self.assertEqual([("pages", 0, [20, 21, 30]), ("zeros", 0, [22, 23])], self.flow())

    def test_a_mapped_page_is_referenced_once(self) -> None:
        self.pages(0, [5])
        self.assertEqual([("references", 0, [5])], self.flow())
        self.pages(0, [5])
        self.assertEqual([("pages", 0, [5])], self.flow())
        self.assertEqual(1, self.classifier.counts.resent)

    def test_a_page_that_was_zero_is_not_referenced_later(self) -> None:
        self.zeros(0, [5])
        self.pages(0, [6])
        self.flow()
        self.pages(0, [5])
        self.assertEqual([("pages", 0, [5])], self.flow())

    def test_a_page_that_a_delta_has_changed_is_not_referenced_later(self) -> None:
        self.classifier.note_delta(Delta(memoryview(b""), 0, 5 * PAGE, 8))
        self.classifier.note_delta(Delta(memoryview(b""), 0, 50 * PAGE, 8))
        self.pages(0, [5, 6])
        self.assertEqual([("references", 0, [6]), ("pages", 0, [5])], self.flow())

    def test_a_page_twice_in_one_batch_goes_twice_in_this_order(self) -> None:
        self.pages(0, [5, 6, 5])
        self.assertEqual([("references", 0, [5, 6]), ("pages", 0, [5])], self.flow())
        self.zeros(0, [7])
        self.pages(0, [7])
        self.assertEqual([("zeros", 0, [7]), ("pages", 0, [7])], self.flow())

    def test_the_same_page_twice_in_a_row_goes_twice(self) -> None:
        self.pages(0, [20, 20, 20])
        self.assertEqual([("pages", 0, [20])] * 3, self.flow())

    def test_pages_of_a_later_pass_go_raw(self) -> None:
        self.pages(0, [10, 40])
        self.flow()
        self.assertEqual(1, self.classifier.passes)
        self.pages(0, [3, 11])
        self.assertEqual([("pages", 0, [3, 11])], self.flow())
        self.assertEqual(2, self.classifier.passes)

    def test_a_pass_may_begin_within_a_run(self) -> None:
        self.pages(0, [10, 40, 3, 11])
        self.assertEqual(
            [("references", 0, [10]), ("pages", 0, [40]), ("pages", 0, [3, 11])], self.flow()
        )
        self.assertEqual(2, self.classifier.passes)

    def test_nothing_is_referenced_while_that_is_not_wanted(self) -> None:
        self.classifier.referring = False
        self.pages(0, [1, 2])
        self.assertEqual([("pages", 0, [1, 2])], self.flow())
        self.classifier.referring = True
        self.pages(0, [3])
        self.assertEqual([("references", 0, [3])], self.flow())

    def test_what_finds_no_room_in_the_window_goes_raw(self) -> None:
        self.window.reserve(np.arange(61))
        self.pages(0, range(6))
        self.assertEqual([("references", 0, [0, 1, 2]), ("pages", 0, [3, 4, 5])], self.flow())
        self.assertEqual(3, self.classifier.counts.window_full)
        self.pages(0, range(6, 9))
        self.assertEqual([("pages", 0, [6, 7, 8])], self.flow())

    def test_the_window_keeps_what_qemu_sent(self) -> None:
        self.pages(0, [4, 5, 30])
        self.flow()
        self.window.miss(np.array([0, 1], np.uint32))
        copies = self.window.take_missed(9)
        assert copies is not None
        self.assertTrue((page_contents(copies[0]) == copies[2]).all())

    def test_a_buffer_comes_back_when_what_views_it_was_sent(self) -> None:
        self.pages(0, [20, 21])
        self.zeros(1, [30])
        self.flow()
        self.buffer.release()
        self.assertIs(self.buffer, self.pool.take())

    def test_without_a_map_everything_goes_as_it_came(self) -> None:
        self.classifier = Classifier(
            PageMap(np.array([0, 64, 128]), *(np.empty(0, np.uint32),) * 2, ()),
            self.window,
            self.outbox,
        )
        self.pages(0, [1, 2, 3])
        self.zeros(0, [4])
        self.pages(0, [1])
        self.assertEqual(
            [("pages", 0, [1, 2, 3]), ("zeros", 0, [4]), ("pages", 0, [1])], self.flow()
        )

    def test_random_runs_keep_the_order_of_each_page(self) -> None:
        for seed in range(20):
            random = np.random.default_rng(seed)
            said: list[tuple[int, int, str]] = []
            self.begin()
            for _ in range(30):
                block = int(random.integers(0, 2))
                numbers = random.integers(0, 64, random.integers(1, 8)).tolist()
                if random.random() < 0.3:
                    self.zeros(block, numbers)
                    said += [(block, number, "zeros") for number in numbers]
                else:
                    self.pages(block, numbers)
                    said += [(block, number, "pages") for number in numbers]
            got: list[tuple[int, int, str]] = []
            for kind, block, numbers in self.flow():
                for number in numbers:
                    if kind == "references":
                        position = int(self.map.position[number])
                        got.append((position // 64, position % 64, "pages"))
                    else:
                        got.append((block, number, kind))
            # Of different pages the order may change, of one page it may not.
            self.assertEqual(sorted(said), sorted(got))
            for block in range(2):
                for number in range(64):
                    kinds = [kind for b, n, kind in said if (b, n) == (block, number)]
                    self.assertEqual(
                        kinds, [kind for b, n, kind in got if (b, n) == (block, number)]
                    )
