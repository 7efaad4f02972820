# SPDX-License-Identifier: Apache-2.0
"""Reports of migrations that have been."""

import dataclasses
from xml.etree import ElementTree

from nova_dmigrate.migration.summary import MigrationSummary
from nova_dmigrate.report import format_table, history, runs
from tests import base
from tests.unit.migration.summaries import MIB, ORDINARY, RELAYED, series

FULL = dataclasses.replace(
    RELAYED,
    phases={"checking": 0.5, "starting relays": 2.0, "mapping": 2.0, "migrating": 10.02},
    series={"source": tuple(series(10)), "destination": tuple(series(11))},
)


def with_database(commits: list[int]) -> MigrationSummary:
    """Three points, the last of them two seconds after the one before."""
    rows = tuple(
        {"t": moment, "commits": count, "queries": 20 * done, "latency_ms": latency}
        for moment, count, done, latency in zip(
            (0.0, 1.0, 3.0), commits, (0, 30, 40), (1.5, 20.0, 1.5), strict=True
        )
    )
    return dataclasses.replace(FULL, series={**FULL.series, "database": rows})


class HistoryReportTest(base.TestCase):
    def test_a_run_has_what_the_summary_has(self) -> None:
        (run,) = runs.checked([history.run_of(FULL)])
        self.assertEqual(
            ("db1", "dmigrate", True), (run["scenario"], run["mode"], run["completed"])
        )
        self.assertEqual(
            (14.52, 87, 620 * MIB), (run["total_s"], run["downtime_ms"], run["wire_bytes"])
        )
        (other,) = runs.checked([history.run_of(ORDINARY)])
        self.assertEqual("ordinary", other["mode"])
        self.assertIsNone(other["misses"])
        self.assertEqual({"network": [], "volume": []}, other["series"])

    def test_relays_without_volumes_are_not_the_ordinary_migration(self) -> None:
        late = dataclasses.replace(
            FULL, fallback_reason="late-map", volume_bytes=0, pages_referenced=0
        )
        told = format_table([history.run_of(late), history.run_of(ORDINARY)]).splitlines()
        self.assertTrue(told[-2].startswith("ordinary "))
        self.assertTrue(told[-2].endswith("without volumes: agent-unreachable"))
        self.assertTrue(told[-1].startswith("dmigrate "))
        self.assertTrue(told[-1].endswith("without volumes: late-map"))

    def test_series_begin_when_the_relays_do_and_the_downtime_ends_with_the_bytes(self) -> None:
        made = history.run_of(FULL)["series"]
        self.assertEqual([2.6, round(5 * MIB)], made["network"][0])
        self.assertEqual(100, len(made["volume"]))
        begin, end = made["downtime"]
        self.assertAlmostEqual(12.5, end)
        self.assertAlmostEqual(0.087, end - begin)

    def test_what_the_agent_has_counted_becomes_rates(self) -> None:
        made = history.run_of(with_database(commits=[0, 30, 40]))["series"]
        self.assertEqual([[0.5, 30], [2.0, 5]], made["tps"])
        self.assertEqual([[0.5, 600], [2.0, 100]], made["qps"])
        self.assertEqual([[0.0, 1.5], [1.0, 20.0], [3.0, 1.5]], made["latency_ms"])
        (run,) = runs.checked([history.run_of(with_database(commits=[0, 30, 40]))])
        self.assertTrue(run["series"]["downtime"])

    def test_where_nobody_says_commit_there_is_no_rate_of_it(self) -> None:
        made = history.run_of(with_database(commits=[0, 0, 0]))["series"]
        self.assertNotIn("tps", made)
        self.assertEqual(2, len(made["qps"]))

    def test_figures_of_the_database_that_make_no_sense_are_left_out(self) -> None:
        rows = ({"t": 1, "queries": 5}, {"t": 1, "queries": 9}, {"t": 2, "queries": 3}, {"t": "x"})
        torn = dataclasses.replace(FULL, series={"database": rows})
        self.assertEqual({"network": [], "volume": []}, history.run_of(torn)["series"])

    def test_the_relays_last_bytes_come_before_libvirt_is_done(self) -> None:
        quick = dataclasses.replace(FULL, total_s=12.2)
        _, end = history.run_of(quick)["series"]["downtime"]
        self.assertAlmostEqual(12.2, end)

    def test_there_is_no_downtime_of_what_did_not_complete(self) -> None:
        failed = dataclasses.replace(FULL, state="failed", error="x")
        self.assertNotIn("downtime", history.run_of(failed)["series"])

    def test_rows_that_make_no_sense_are_left_out(self) -> None:
        torn = dataclasses.replace(FULL, series={"source": ({"t": "x"}, {"t": 1}, {})})
        self.assertEqual({"network": [], "volume": []}, history.run_of(torn)["series"])

    def test_the_file_has_the_sentences_and_a_timeline(self) -> None:
        path = self.make_directory() / "report.html"
        history.write_history_report([with_database([0, 30, 40]), ORDINARY], path)
        root = ElementTree.fromstring(path.read_text())
        text = "".join(root.itertext())
        self.assertIn(FULL.sentence(), text)
        self.assertIn(ORDINARY.sentence(), text)
        self.assertIn("without volumes: agent-unreachable", text)
        self.assertIn("mapping 2.0 s", text)
        for panel in ("throughput by path", "database throughput", "queries", "latency"):
            self.assertIn(panel, text)
        self.assertIn("vdb is cached by the host [cached-disk]", text)
        self.assertEqual(2, len(list(root.iter("img"))))
        self.assertEqual([path], list(path.parent.iterdir()))
