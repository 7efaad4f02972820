# SPDX-License-Identifier: Apache-2.0
"""Arrays of RAM records."""

import unittest
from struct import pack

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nova_dmigrate.stream import records
from tests.unit.stream.builder import PAGE, page_contents

MANY = 4 * records.FIRST_STEP * records.STEP_GROWTH


class RecordsTest(unittest.TestCase):
    def test_page_records_are_as_on_the_wire(self) -> None:
        pages = page_contents([7, 9])
        built = records.page_records([7 * PAGE, 9 * PAGE], pages)
        expected = [pack(">Q", 7 * PAGE | 0x28), pages[0], pack(">Q", 9 * PAGE | 0x28), pages[1]]
        self.assertEqual(built.tobytes(), b"".join(map(bytes, expected)))

    def test_zero_records_are_as_on_the_wire(self) -> None:
        built = records.zero_records([0, 9 * PAGE], [0, 3])
        self.assertEqual(built.tobytes(), pack(">QBQB", 0x22, 0, 9 * PAGE | 0x22, 3))

    def test_no_records_take_no_bytes(self) -> None:
        self.assertEqual(len(records.page_records([], np.empty((0, PAGE), np.uint8))), 0)
        self.assertEqual(len(records.zero_records([])), 0)

    @given(
        count=st.integers(1, MANY),
        bad=st.one_of(st.none(), st.integers(1, MANY)),
        header=st.sampled_from(
            [0x02, 0x28, 0x62, 0x10, 0x222, 1 << 40 | 0x22, (1 << 64) - 1, 100 * PAGE | 0x22]
        ),
    )
    def test_a_run_ends_before_the_first_header_that_does_not_fit(
        self, count: int, bad: int | None, header: int
    ) -> None:
        offsets = np.arange(count, dtype=np.uint64) % 100 * PAGE
        built = records.zero_records(offsets).view(records.ZERO_RECORD)
        length = count
        if bad is not None and bad < count:
            built["header"][bad] = header
            length = bad
        found = records.run_offsets(
            memoryview(built.view(np.uint8)), 0, count, 9, 0x22, 0, 100 * PAGE
        )
        np.testing.assert_array_equal(found, offsets[:length])
        self.assertEqual(found.dtype, np.uint64)


if __name__ == "__main__":
    unittest.main()
