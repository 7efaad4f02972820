# SPDX-License-Identifier: Apache-2.0
"""What is said of DMigrate: neither more nor less than the runs show."""

from nova_dmigrate.report import format_comparison
from nova_dmigrate.report.comparison import Comparison, compare
from nova_dmigrate.report.runs import checked
from tests import base
from tests.unit.report.examples import Run, make_run, three_runs


def compared(*runs: Run) -> Comparison:
    return compare(checked(runs))


class ComparisonTest(base.TestCase):
    def test_a_quicker_migration_is_a_gain_over_each_mode(self) -> None:
        said = compared(*three_runs())
        self.assertEqual((), said.losses)
        (gain,) = said.gains
        self.assertIn("14.0 s, 2.00 times as quick as pre-copy, 1.79 times", gain)
        self.assertTrue(gain.startswith("oltp_read_write, mysql 9.7, network 50 MB/s"))

    def test_completing_where_others_do_not_is_a_gain(self) -> None:
        said = compared(make_run("pre-copy", completed=False), make_run())
        self.assertIn("completed, where pre-copy did not", said.gains[0])

    def test_a_slower_or_equal_migration_is_told(self) -> None:
        said = compared(make_run("pre-copy", total_s=10.0), make_run())
        self.assertEqual((), said.gains)
        self.assertIn("takes 1.40 times as long as pre-copy", said.losses[0])
        said = compared(make_run("multifd-zstd", total_s=14.1), make_run())
        self.assertEqual((), said.gains)
        self.assertIn("no quicker than multifd-zstd", said.losses[0])

    def test_a_downtime_longer_than_pre_copys_is_told_and_a_bit_more_is_not(self) -> None:
        said = compared(make_run("pre-copy", downtime_ms=100), make_run(downtime_ms=161))
        self.assertIn("downtime of 161 ms, pre-copy 100 ms", said.losses[0])
        said = compared(make_run("pre-copy", downtime_ms=100), make_run(downtime_ms=159))
        self.assertEqual((), said.losses)

    def test_less_throughput_is_told(self) -> None:
        said = compared(make_run("post-copy"), make_run(tps_during=50.0, tps_after=80.0))
        self.assertIn("50 transactions a second during the migration, post-copy 70", said.losses[0])
        self.assertIn("80 transactions a second after", said.losses[1])

    def test_lost_commits_a_failed_check_and_no_completion_come_first(self) -> None:
        bad = make_run(lost_commits=3, check_ok=False, completed=False)
        said = compared(make_run("pre-copy"), bad)
        self.assertEqual((), said.gains)
        self.assertIn("3 acknowledged commits were lost", said.losses[0])
        self.assertIn("check failed", said.losses[1])
        self.assertIn("not completed, where pre-copy did", said.losses[2])

    def test_a_fallback_is_no_gain(self) -> None:
        run = make_run(fallback_reason="late-map", pages_referenced=0)
        said = compared(make_run("pre-copy"), run)
        self.assertEqual((), said.gains)
        self.assertTrue(
            said.losses[0].endswith("RAM: it went without volumes: late-map"), said.losses
        )

    def test_nothing_is_said_without_something_to_compare(self) -> None:
        for runs in ([make_run()], [make_run("pre-copy")], []):
            self.assertEqual(Comparison((), ()), compared(*runs))
        bare = {"scenario": "x", "completed": True}
        said = compared({**bare, "mode": "pre-copy"}, {**bare, "mode": "dmigrate"})
        self.assertEqual(Comparison((), ()), said)

    def test_text_has_a_heading_where_there_is_something_to_say(self) -> None:
        runs = [make_run("pre-copy"), make_run("multifd-zstd", total_s=10.0), make_run()]
        lines = format_comparison(runs).splitlines()
        self.assertEqual("What DMigrate gains:", lines[0])
        self.assertIn("  oltp_read_write, mysql 9.7", lines[1])
        self.assertEqual("Where DMigrate does not win:", lines[2])
        self.assertIn("takes 1.40 times as long as multifd-zstd", lines[3])
        self.assertEqual("", format_comparison([]))
