# SPDX-License-Identifier: Apache-2.0

import hypothesis
import numpy as np
from hypothesis import strategies as st

from nova_dmigrate.agent import pages
from tests import base
from tests.unit.agent import innodb

SIZES = st.sampled_from([4096, 8192, 16384, 32768, 65536])
START = 0x7F0000000000


def read(fake, indices, size):
    addresses = np.array(indices, np.uint64) * np.uint64(size) + np.uint64(fake.start)
    return pages.read_headers(fake, addresses, size)


class HeadersTest(base.TestCase):
    @hypothesis.settings(max_examples=60)
    @hypothesis.given(SIZES, st.lists(st.booleans(), min_size=1, max_size=12), st.data())
    def test_each_frame_says_its_own_whichever_of_its_neighbours_are_in_memory(
        self, size, present, data
    ):
        u32 = st.integers(0, 2**32 - 1)
        facts = [
            (data.draw(u32), data.draw(u32), data.draw(st.integers(0, 2**64 - 1)), data.draw(u32))
            for _ in present
        ]
        frames = [
            innodb.page(space, number, lsn, kind & 0xFFFF, size) if there else None
            for there, (space, number, lsn, kind) in zip(present, facts)
        ]
        found = read(innodb.FakeMemory(frames, size), np.flatnonzero(present), size)
        expected = [fact for there, fact in zip(present, facts) if there]
        self.assertEqual([fact[0] for fact in expected], found.space.tolist())
        self.assertEqual([fact[1] for fact in expected], found.page.tolist())
        self.assertEqual([fact[2] for fact in expected], found.lsn.tolist())
        self.assertEqual([fact[2] & 0xFFFFFFFF for fact in expected], found.lsn_low.tolist())
        self.assertEqual([fact[3] & 0xFFFF for fact in expected], found.type.tolist())
        self.assertEqual(found.lsn_low.tolist(), found.trailer.tolist())

    def test_the_arrays_are_in_native_byte_order(self):
        found = read(innodb.FakeMemory([innodb.page(1, 2)]), [0], 16384)
        self.assertEqual(np.dtype(np.uint64), found.lsn.dtype)
        self.assertEqual(np.dtype(np.uint32), found.space.dtype)

    def test_a_page_is_written_when_header_and_trailer_agree_in_its_format(self):
        frames = [
            innodb.page(1, 1),
            innodb.page(1, 2, dirty=True),
            innodb.page(2, 1, full_crc32=True),
            innodb.page(2, 2, full_crc32=True, dirty=True),
            innodb.page(3, 1),
            innodb.page(3, 1, full_crc32=True),
        ]
        found = read(innodb.FakeMemory(frames), range(6), 16384)
        full_crc32 = np.array([False, False, True, True, True, False])
        self.assertEqual(
            [True, False, True, False, False, False], found.written(full_crc32).tolist()
        )

    def test_no_lsn_and_no_known_type_make_no_page(self):
        frames = [
            innodb.page(1, 1, lsn=0),
            innodb.page(1, 1, lsn=2**56),
            innodb.page(1, 1, kind=9999),
            innodb.page(1, 1, kind=0),
            innodb.page(1, 1, kind=17853),
            innodb.page(1, 1, kind=2),
            bytes(16384),
        ]
        found = read(innodb.FakeMemory(frames), range(7), 16384)
        self.assertEqual([False, False, False, False, True, True, False], found.plausible.tolist())
        # What is not logged has no LSN, and is a page by its type alone.
        self.assertEqual([True, True, False, True, True, True, False], found.is_page.tolist())
