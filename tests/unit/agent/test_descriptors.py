# SPDX-License-Identifier: Apache-2.0
"""Descriptors of frames as MySQL lays them out, and things that look like them."""

import numpy as np

from nova_dmigrate.agent import descriptors
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


class DescriptorsTest(base.TestCase):
    def find(self, *chunks, before=()):
        content = [page for chunk in chunks for page in chunk.content()]
        start = START - len(before) * SIZE
        self.memory = innodb.FakeMemory([*before, *content], start=start)
        return descriptors.find(self.memory, self.memory.mappings(), SIZE)

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

    def test_frames_without_a_descriptor_are_not_dirty(self):
        chunk = Chunk(frames=1000)
        chunk.change(*range(100))
        found = self.find(chunk, before=[None] * 2)
        others = np.array([START - SIZE, chunk.end], np.uint64)
        self.assertEqual([False, False], found.dirty(self.memory, others).tolist())
        self.assertEqual(0, found.dirty(self.memory, others[:0]).size)

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
