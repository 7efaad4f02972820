# SPDX-License-Identifier: Apache-2.0
"""The file that holds the ledger: its copy, and what becomes of one that cannot be read."""

import os

from nova_dmigrate.agent import ledger
from tests import base

CHANGE = ledger.Change("innodb_max_dirty_pages_pct", "90.000000", "0.000000")
ENTRY = ledger.Entry("/run/one.sock", ledger.Identity(pid=1, start_time=2), True, (CHANGE,))


def make(lease: str) -> ledger.Ledger:
    return ledger.make(
        boot_id="a-boot",
        lease_id=lease,
        deadline=10.0,
        ends=20.0,
        flush_until=5.0,
        dirty_share=0.0,
        entries=(ENTRY,),
    )


class LedgerFileTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.make_directory() / "state" / "preparation.json"
        self.file = ledger.LedgerFile(self.path)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.iterdir())

    def test_what_is_saved_last_is_loaded_and_removed_as_a_whole(self) -> None:
        self.assertIsNone(self.file.load())
        for lease in ("one", "two"):
            self.file.save(make(lease))
            self.assertEqual(make(lease), self.file.load())
        self.file.remove()
        self.file.remove()
        self.assertIsNone(self.file.load())
        self.assertEqual([], self.names())

    def test_either_copy_is_enough(self) -> None:
        for name in ("preparation.json", "preparation.copy"):
            self.file.save(make("one"))
            os.truncate(self.path.with_name(name), 40)
            self.assertEqual(make("one"), self.file.load())
            self.path.with_name(name).unlink()
            self.assertEqual(make("one"), self.file.load())
        self.assertEqual([], self.file.lost())

    def test_of_two_copies_the_one_that_is_written_first_counts(self) -> None:
        self.file.save(make("one"))
        (self.path.parent / "preparation.copy.new").mkdir()
        self.assertRaises(OSError, self.file.save, make("two"))
        self.assertEqual(make("two"), self.file.load())

    def test_what_cannot_be_read_is_put_aside_over_nothing_else(self) -> None:
        self.path.parent.mkdir()
        contents = ["{", "[]", '{"format": 2}', "x" * (1 << 19), "[" * 100000]
        for content in contents:
            self.path.write_text(content)
            self.assertIsNone(self.file.load())
        self.assertEqual(contents, [path.read_text() for path in self.file.lost()])
        self.assertEqual(
            [f"preparation.unreadable-{number}" for number in range(1, 6)], self.names()
        )
