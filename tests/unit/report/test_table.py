# SPDX-License-Identifier: Apache-2.0
"""The table of text."""

from nova_dmigrate import exception
from nova_dmigrate.report import format_table
from tests import base
from tests.unit.report.examples import make_run, three_runs


class TableTest(base.TestCase):
    def row(self, text: str, name: str) -> str:
        (row,) = [line for line in text.splitlines() if line.startswith(name)]
        return " ".join(row.split())

    def test_each_run_has_a_row_with_its_numbers(self) -> None:
        text = format_table(three_runs())
        self.assertEqual(
            "dmigrate 14.0 180 700 650 321 100 70 101 0.4 0.90 2.00 0 ok",
            self.row(text, "dmigrate"),
        )
        self.assertEqual(
            "post-copy 25.0 180 1400 0 0 100 25 101 0.4 - 1.12 0 ok",
            self.row(text, "post-copy"),
        )

    def test_numbers_stand_below_the_ends_of_their_heads(self) -> None:
        lines = format_table(three_runs()).splitlines()
        rule = next(number for number, line in enumerate(lines) if line.startswith("---"))
        head, rows = lines[rule - 1], [line for line in lines if line.startswith(("pre", "dmi"))]
        end = head.index(" s ") + 2
        self.assertEqual(["28.0", "14.0"], [row[:end].split()[-1] for row in rows])
        self.assertEqual(1, len({len(row) for row in rows}))

    def test_scenarios_have_blocks_with_titles(self) -> None:
        text = format_table([make_run(), make_run(scenario="tpc-c")])
        titles = [line for line in text.splitlines() if "pool 75 %" in line]
        self.assertEqual(["oltp_read_write,", "tpc-c,"], [line.split()[0] for line in titles])

    def test_what_no_run_has_gets_no_column(self) -> None:
        text = format_table([{"scenario": "x", "mode": "ordinary", "completed": True}])
        self.assertEqual(["mode", "--------", "x", "ordinary"], text.splitlines())

    def test_what_went_wrong_is_told(self) -> None:
        text = format_table(
            [
                make_run("pre-copy", completed=False),
                make_run(
                    fallback_reason="agent-unreachable",
                    pages_referenced=0,
                    check_ok=False,
                    lost_commits=7,
                ),
            ]
        )
        self.assertIn("not completed", text)
        self.assertTrue(
            self.row(text, "dmigrate").endswith("7 FAILED without volumes: agent-unreachable"), text
        )

    def test_why_volumes_were_not_used_is_told_of_any_mode(self) -> None:
        for mode, pages, completed, wanted in (
            ("dmigrate", 0, True, "without volumes: no-room"),
            ("dmigrate", 7, True, "partly without volumes: no-room"),
            ("dmigrate", None, False, "not completed, without volumes: no-room"),
            ("ordinary", None, True, "without volumes: no-room"),
        ):
            with self.subTest(f"{mode}, {pages}, {completed}"):
                run = {"scenario": "x", "mode": mode, "completed": completed}
                text = format_table(
                    [{**run, "fallback_reason": "no-room", "pages_referenced": pages}]
                )
                self.assertEqual(f"{mode} {wanted}", self.row(text, mode))

    def test_no_runs_make_an_empty_table(self) -> None:
        self.assertEqual("mode", format_table([]).strip())

    def test_what_is_no_run_is_refused(self) -> None:
        self.assertRaises(exception.ReportError, format_table, [{"mode": "dmigrate"}])
