# SPDX-License-Identifier: Apache-2.0
"""What is told of a broker that is away."""

import logging

from nova_dmigrate.rpc import calm
from tests import base


class CalmTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0
        self.logger = logging.getLogger("tests.calm")
        self.filter = calm.OnceAWhile(60, lambda: self.now)
        self.logger.addFilter(self.filter)
        self.addCleanup(self.logger.removeFilter, self.filter)

    def told(self) -> list[str]:
        """What has been logged, without what is before the message."""
        return [line.rpartition("tests.calm: ")[2] for line in self.log.output.splitlines()]

    def test_one_kind_is_told_once_a_minute_whatever_its_arguments(self) -> None:
        for number in range(130):
            self.now = float(number)
            self.logger.error("[%s] unreachable, again in %d s", number, 2)
        self.assertEqual(
            [f"[{number}] unreachable, again in 2 s" for number in (0, 60, 120)], self.told()
        )

    def test_other_kinds_and_what_is_no_trouble_are_told(self) -> None:
        for text in ("refused", "blocked", "refused"):
            self.logger.warning(text)
        for _ in range(2):
            self.logger.info("connected again")
        self.assertEqual(["refused", "blocked", *["connected again"] * 2], self.told())

    def test_a_flood_of_kinds_is_not_kept(self) -> None:
        for number in range(1000):
            self.logger.error(f"trouble {number}")
        self.assertEqual(1000, len(self.told()))
        self.assertLess(len(self.filter._told), 100)
