# SPDX-License-Identifier: Apache-2.0
"""Descriptors of frames as MySQL lays them out, and things that look like them."""

import numpy as np

from nova_dmigrate import exception
from nova_dmigrate.agent import cancellation, descriptors, memory
from tests import base
from tests.unit.agent import innodb

SIZE = 16384
START = 0x7F0000000000
STRIDE = 368
FRAME, NEWEST, OLDEST = 208, 0, 8  # bytes in a descriptor
LATCH = 77018104  # where the heap is when the program is not relocated: beyond most LSNs


class Chunk:
    """A chunk of a pool: descriptors, then as many frames. All clean, each with LSN 1000 + n."""

    def __init__(self, address=START, frames=200, stride=STRIDE):
        self.stride = stride
        self.lsn = 1000 + np.arange(frames)
        self.frames = address + -(-frames * stride // SIZE) * SIZE
        self.end = self.frames + frames * SIZE
        self.bytes = np.zeros(self.frames - address, np.uint8)
        self.addresses = np.arange(self.frames, self.end, SIZE, np.uint64)
        self.word(FRAME)[:] = self.addresses
        self.word(NEWEST)[:] = self.lsn

    def word(self, offset):
        """One word of all descriptors."""
        whole = self.bytes[: self.lsn.size * self.stride].view(np.uint64)
        return whole.reshape(self.lsn.size, -1)[:, offset // 8]

    def change(self, *numbers):
        """Change pages that are not written then."""
        for number in numbers:
            self.word(NEWEST)[number] = 500000 + number
            self.word(OLDEST)[number] = 400000 + number

    def content(self):
        pages = [innodb.page(7, number, lsn) for number, lsn in enumerate(self.lsn.tolist())]
        raw = self.bytes.tobytes()
        return [raw[at : at + SIZE] for at in range(0, len(raw), SIZE)] + pages


class SparseMemory:
    """One mapping with few pages in memory, ``pages`` (number -> words). Counts as ``work`` the
    pages that are asked for and the words that are read; cancels when ``limit`` is reached."""

    def __init__(self, size, pages, limit=None):
        self.mapping = memory.Mapping(START, START + size)
        self.pages = pages
        self.numbers = np.array(sorted(pages), np.int64)
        self.cancelled = cancellation.Cancellation()
        self.limit = limit
        self.work = 0

    def count(self, work):
        self.work += work
        if self.limit is not None and self.work > self.limit:
            self.cancelled.cancel()

    def guest_pages(self, address, count):
        self.count(count)
        first = (address - START) // memory.PAGE_SIZE
        there = self.numbers[(self.numbers >= first) & (self.numbers < first + count)]
        guest = np.full(count, -1, np.int64)
        guest[there - first] = there
        return guest

    def read_pieces(self, addresses, lengths):
        self.count(int(lengths.sum()) // 8)
        words = [
            self.pages[(address - START) // memory.PAGE_SIZE][address % memory.PAGE_SIZE // 8 :][
                : length // 8
            ]
            for address, length in zip(addresses.tolist(), lengths.tolist())
        ]
        return np.concatenate([np.zeros(0, np.uint64), *words]).view(np.uint8), True

    def find(self):
        return descriptors.find(self, [self.mapping], SIZE, self.cancelled)


class SearchTest(base.TestCase):
    """What looks like arrays, and is none, in a mapping of 1 GiB."""

    MAPPING = 1 << 30
    PAGES = MAPPING // memory.PAGE_SIZE
    # Once where there is nothing at all, and what is allowed
    MOST = PAGES + 4 * (PAGES + (1 << 20)) + 10000

    def page(self, every):
        """A page full of chains: an address of a frame, so often each."""
        frames = START + self.MAPPING // 16 // SIZE * SIZE
        return (frames + np.arange(512) // every * SIZE).astype(np.uint64)

    def test_a_mapping_with_nothing_in_it_is_looked_at_once(self):
        sparse = SparseMemory(self.MAPPING, {})
        self.assertIsNone(sparse.find())
        self.assertLessEqual(sparse.work, self.PAGES)

    def test_the_work_for_a_page_full_of_chains_is_bounded(self):
        for every in (16, 112):
            sparse = SparseMemory(self.MAPPING, {0: self.page(every)})
            self.assertIsNone(sparse.find())
            self.assertLess(sparse.work, self.MOST)

    def test_the_work_for_many_such_pages_is_bounded(self):
        pages = {number: self.page(112) for number in range(0, self.PAGES, 64)}
        sparse = SparseMemory(self.MAPPING, pages)
        self.assertIsNone(sparse.find())
        self.assertLess(sparse.work, self.MOST)
        self.assertIn("given up", self.log.output)

    def test_many_short_chains_do_not_use_up_what_the_search_is_allowed(self):
        words = np.zeros(512, np.uint64)
        words[:64:16] = self.page(1)[:4]
        pages = dict.fromkeys(range(0, 200 * 64, 64), words)
        sparse = SparseMemory(self.MAPPING, pages)
        self.assertIsNone(sparse.find())
        self.assertLess(sparse.work, self.PAGES + 200 * 1000)
        self.assertNotIn("given up", self.log.output)

    def test_the_search_can_be_cancelled(self):
        sparse = SparseMemory(self.MAPPING, {0: self.page(112)}, limit=50000)
        error = self.assertRaises(exception.AgentError, sparse.find)
        self.assertEqual("cancelled", error.kwargs["code"])
        self.assertLess(sparse.work, 100000)
        sparse = SparseMemory(self.MAPPING, {}, limit=50000)
        self.assertRaises(exception.AgentError, sparse.find)
        self.assertLess(sparse.work, 100000)


class DescriptorsTest(base.TestCase):
    def find(self, *chunks, before=()):
        content = [page for chunk in chunks for page in chunk.content()]
        start = START - len(before) * SIZE
        self.memory = innodb.FakeMemory([*before, *content], start=start)
        return descriptors.find(
            self.memory, self.memory.mappings(), SIZE, cancellation.Cancellation()
        )

    def dirty(self, found, chunk):
        return np.flatnonzero(found.dirty(self.memory, chunk.addresses)).tolist()

    def test_frames_that_the_server_takes_for_dirty_are_told(self):
        for stride in (STRIDE, 392, 408):
            chunk = Chunk(stride=stride)
            chunk.change(0, 3, 77, 199)
            self.assertEqual([0, 3, 77, 199], self.dirty(self.find(chunk), chunk))

    def test_all_chunks_count_wherever_they_lie_in_a_mapping(self):
        first = Chunk()
        second = Chunk(first.end, frames=300)
        first.change(5)
        second.change(0, 299)
        found = self.find(first, second, before=[None] * 80)
        self.assertEqual([5], self.dirty(found, first))
        self.assertEqual([0, 299], self.dirty(found, second))

    def test_pages_without_a_descriptor_are_copies_that_wait_to_be_written(self):
        chunk = Chunk(frames=1000)
        chunk.change(3)
        copies = [innodb.page(7, 1, 1001), innodb.page(7, 2, 1002, dirty=True), bytes(SIZE)]
        found = self.find(chunk, before=copies)
        first = START - len(copies) * SIZE
        addresses = np.arange(first, chunk.end, SIZE, np.uint64)
        self.assertEqual(
            [first, chunk.frames + 3 * SIZE],
            addresses[found.dirty(self.memory, addresses)].tolist(),
        )
        self.assertEqual(0, found.dirty(self.memory, addresses[:0]).size)

    def test_pages_that_were_read_and_never_written_have_no_lsn_in_their_descriptors(self):
        chunk = Chunk()
        chunk.word(NEWEST)[:] = 0
        chunk.change(*range(20))
        self.assertEqual(list(range(20)), self.dirty(self.find(chunk), chunk))

    def test_addresses_beyond_the_lsn_are_not_taken_for_changes(self):
        chunk = Chunk()
        chunk.word(NEWEST + 32)[:] = LATCH + 8
        chunk.word(OLDEST + 32)[:] = LATCH
        chunk.change(8)
        self.assertEqual([8], self.dirty(self.find(chunk), chunk))
        chunk.word(NEWEST)[:] = chunk.word(OLDEST)[:] = 0
        self.assertIsNone(self.find(chunk))

    def test_nothing_is_known_where_descriptors_have_no_lsn(self):
        chunk = Chunk()
        chunk.word(NEWEST)[:] = 0
        self.assertIsNone(self.find(chunk))

    def test_nothing_is_known_where_there_are_no_descriptors(self):
        self.assertIsNone(self.find(before=[innodb.page(7, number) for number in range(40)]))
        self.assertIsNone(self.find(before=[None] * 40))

    def test_a_few_addresses_of_frames_are_no_array(self):
        chunk = Chunk()
        chunk.word(FRAME)[9:] = 0
        self.assertIsNone(self.find(chunk))

    def test_what_only_looks_like_an_array_hides_no_real_one(self):
        chunk = Chunk()
        chunk.change(3)
        fake = bytearray(SIZE)
        for number in range(8):
            address = chunk.frames + (50 + number) * SIZE
            fake[160 * number : 160 * number + 8] = address.to_bytes(8, "little")
        found = self.find(chunk, before=[bytes(fake), *[None] * 15])
        self.assertEqual([3], self.dirty(found, chunk))

    def test_frames_that_change_between_two_looks_do_no_harm(self):
        chunk = Chunk()
        chunk.word(NEWEST)[17] = 12345  # got another page
        chunk.word(OLDEST)[50:90] = 900  # were written
        chunk.change(20)
        self.assertEqual([20, *range(50, 90)], self.dirty(self.find(chunk), chunk))

    def test_a_word_that_is_never_0_does_not_tell_what_is_dirty(self):
        chunk = Chunk()
        chunk.word(OLDEST)[:] = chunk.word(OLDEST + 8)[:] = LATCH
        self.assertIsNone(self.find(chunk))
