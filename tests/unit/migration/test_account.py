# SPDX-License-Identifier: Apache-2.0
"""What is noted of a migration."""

from typing import Any

from nova_dmigrate.migration import job
from nova_dmigrate.migration.account import Account
from nova_dmigrate.migration.fallback import Reason, because
from nova_dmigrate.migration.job import Job
from nova_dmigrate.report import history
from tests import base

MIB = 1 << 20


class OrdinaryTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.account = Account("20261125-170301-abcdef", "i", "db1", "one", "two")

    def note(self, *transferred: int) -> None:
        for each in transferred:
            self.account.note_job(Job(transferred=each))

    def summary(self) -> Any:
        self.account.phases.enter("ended")
        reason = because(Reason.ASKED, "i")
        return self.account.summary("completed", None, reason, Job(downtime_ms=5))

    def test_what_libvirt_says_is_drawn_from_the_request_on(self) -> None:
        self.account.phases.began -= 10
        self.note(MIB, 3 * MIB)
        series = history.run_of(self.summary())["series"]
        self.assertEqual([MIB, 3 * MIB], [sent for _, sent in series["network"]])
        self.assertTrue(all(10 <= moment < 60 for moment, _ in series["network"]))
        self.assertEqual([], series["volume"])
        # The last byte came at some moment after that
        self.assertNotIn("downtime", series)

    def test_one_that_was_begun_anew_has_no_more_than_its_last_attempt(self) -> None:
        self.note(MIB, 3 * MIB, 2 * MIB, 4 * MIB)
        rows = self.summary().series["libvirt"]
        self.assertEqual([2 * MIB, 4 * MIB], [row["wire_bytes"] for row in rows])

    def test_the_destination_knows_how_long_the_guest_stood_still(self) -> None:
        self.account._relays = {"source": {}, "destination": {"downtime_ms": 87.0}}
        relayed = self.account.summary("completed", None, None, Job())
        self.assertEqual(87.0, relayed.downtime_ms)
        self.account._relays = {"source": {}, "destination": {}}
        relayed = self.account.summary("completed", None, None, Job())
        self.assertIsNone(relayed.downtime_ms)

    def test_a_long_one_has_fewer_rows_a_second(self) -> None:
        self.note(*range(3 * job._LIMIT))
        rows = self.summary().series["libvirt"]
        self.assertTrue(job._LIMIT / 2 <= len(rows) <= job._LIMIT, len(rows))
        self.assertGreater(rows[-1]["wire_bytes"], 3 * job._LIMIT - 10)
