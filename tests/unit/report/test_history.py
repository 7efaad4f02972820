# SPDX-License-Identifier: Apache-2.0
"""Reports of migrations that have been."""

import dataclasses
from xml.etree import ElementTree

from nova_dmigrate.report import history, runs
from tests import base
from tests.unit.migration.summaries import MIB, ORDINARY, RELAYED, series

FULL = dataclasses.replace(
    RELAYED,
    phases={"checking": 0.5, "mapping": 2.0, "migrating": 10.0, "converging": 0.3},
    series={"source": tuple(series(10)), "destination": tuple(series(11))},
)


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

    def test_series_begin_when_the_relays_do_and_the_downtime_ends_with_the_bytes(self) -> None:
        made = history.run_of(FULL)["series"]
        self.assertEqual([2.6, round(5 * MIB)], made["network"][0])
        self.assertEqual(100, len(made["volume"]))
        begin, end = made["downtime"]
        self.assertAlmostEqual(12.5, end)
        self.assertAlmostEqual(0.087, end - begin)

    def test_there_is_no_downtime_of_what_did_not_complete(self) -> None:
        failed = dataclasses.replace(FULL, state="failed", error="x")
        self.assertNotIn("downtime", history.run_of(failed)["series"])

    def test_rows_that_make_no_sense_are_left_out(self) -> None:
        torn = dataclasses.replace(FULL, series={"source": ({"t": "x"}, {"t": 1}, {})})
        self.assertEqual({"network": [], "volume": []}, history.run_of(torn)["series"])

    def test_the_file_has_the_sentences_and_a_timeline(self) -> None:
        path = self.make_directory() / "report.html"
        history.write_history_report([FULL, ORDINARY], path)
        root = ElementTree.fromstring(path.read_text())
        text = "".join(root.itertext())
        self.assertIn(FULL.sentence(), text)
        self.assertIn(ORDINARY.sentence(), text)
        self.assertIn("mapping 2.0 s", text)
        self.assertIn("vdb is cached by the host [cached-disk]", text)
        self.assertEqual(2, len(list(root.iter("img"))))
        self.assertEqual([path], list(path.parent.iterdir()))
