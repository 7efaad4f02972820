# SPDX-License-Identifier: Apache-2.0
"""What counts as a leak, without any guest."""

import os
from pathlib import Path

from tests import base
from tests.lab.demo import footprint
from tests.lab.demo.footprint import Footprint

SERVICE = "service of A"


def after(count: int, **numbers: float) -> Footprint:
    """What a host's service takes after so many migrations."""
    usual = {"threads": 20.0, "descriptors": 10.0, footprint._RSS: 60.0}
    return Footprint(count, {SERVICE: {**usual, **numbers}})


class FootprintTest(base.TestCase):
    def test_what_the_source_of_each_migration_leaks_is_seen_after_few(self) -> None:
        # Of four migrations the host was the source of two
        (told,) = after(6, descriptors=12).leaks(after(2))
        self.assertIn("descriptors of service of A: 10 after 2 migrations, 12 after 6", told)
        self.assertIn("1 more are allowed", told)

    def test_a_pool_may_grow_by_one_in_few_and_by_more_in_many(self) -> None:
        self.assertEqual([], after(6, descriptors=11, threads=21).leaks(after(2)))
        self.assertEqual([], after(50, descriptors=13).leaks(after(26)))
        self.assertEqual(1, len(after(50, descriptors=14).leaks(after(26))))

    def test_memory_may_grow_as_much_in_few_as_in_many(self) -> None:
        self.assertEqual([], after(6, **{footprint._RSS: 65.0}).leaks(after(2)))
        self.assertEqual(1, len(after(6, **{footprint._RSS: 65.5}).leaks(after(2))))

    def test_what_a_process_has_open_is_counted(self) -> None:
        before = footprint._process(os.getpid())["descriptors"]
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        self.assertEqual(before + 2, footprint._process(os.getpid())["descriptors"])

    def test_files_are_counted_without_the_summaries_that_are_kept(self) -> None:
        place = self.make_directory()
        for name in ("a", "sessions/b", "summaries/c"):
            path = Path(place, name)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        self.assertEqual(3, footprint._files(place))
        self.assertEqual(0, footprint._files(place / "nowhere"))
