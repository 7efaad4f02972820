# SPDX-License-Identifier: Apache-2.0
"""What is kept of the migrations that have been."""

import os
import time
from pathlib import Path

from nova_dmigrate.retention import Retention
from tests import base

DAY = 86400


class RetentionTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        # From the newest to the oldest, by their age in days
        self.files = [self.file(str(age), age) for age in (0, 1, 2, 3, 10)]

    def file(self, name: str, age: float) -> Path:
        path = self.directory / name
        path.touch()
        os.utime(path, (time.time() - age * DAY,) * 2)
        return path

    def kept(self, retention: Retention, newest: Path | None = None) -> list[str]:
        retention.prune(self.directory.iterdir(), newest)
        return sorted(os.listdir(self.directory), key=int)

    def test_without_bounds_all_is_kept(self) -> None:
        self.assertEqual(["0", "1", "2", "3", "10"], self.kept(Retention()))

    def test_what_is_too_old_goes(self) -> None:
        self.assertEqual(["0", "1", "2"], self.kept(Retention(days=2.5)))

    def test_of_too_many_the_oldest_go(self) -> None:
        self.assertEqual(["0", "1"], self.kept(Retention(count=2)))
        self.assertEqual(["0", "1"], self.kept(Retention(count=2)))

    def test_either_bound_holds(self) -> None:
        self.assertEqual(["0", "1", "2"], self.kept(Retention(count=3, days=5)))
        self.assertEqual(["0", "1"], self.kept(Retention(count=3, days=1.5)))

    def test_what_was_just_written_stays_whatever_the_clock_says(self) -> None:
        self.assertEqual(["0", "10"], self.kept(Retention(count=2, days=5), self.files[-1]))
        self.assertEqual(["10"], self.kept(Retention(count=1), self.files[-1]))

    def test_what_is_gone_or_cannot_be_removed_is_no_error(self) -> None:
        (self.directory / "20").mkdir()
        os.utime(self.directory / "20", (0, 0))
        Retention(days=2.5).prune([self.directory / "gone", *self.directory.iterdir()])
        self.assertEqual({"0", "1", "2", "20"}, set(os.listdir(self.directory)))
