# SPDX-License-Identifier: Apache-2.0
"""The files of a report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from nova_dmigrate import exception
from nova_dmigrate.report import Section, write_report
from tests import base
from tests.unit.report.examples import make_run, three_runs

# Makes reports as if matplotlib were not installed: None in sys.modules is what an import meets
_WITHOUT = """
import sys
sys.modules["matplotlib"] = None
from pathlib import Path
from nova_dmigrate import exception, report
from tests.unit.report.examples import three_runs
print(report.format_table(three_runs()).splitlines()[-1].split()[0])
try:
    report.write_report(three_runs(), {}, Path(sys.argv[1]))
except exception.ReportError as error:
    print(error)
"""


class WriteTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory() / "made" / "anew"

    def test_a_report_is_json_html_and_plots(self) -> None:
        files = write_report(three_runs(), {"cpus": 2}, self.directory)
        expected = {files.json, files.html, *files.pngs}
        self.assertEqual(expected, set(self.directory.iterdir()))
        self.assertEqual(["report.json", "report.html"], [files.json.name, files.html.name])
        self.assertEqual(2, len(files.pngs))
        for path in files.pngs:
            self.assertTrue(path.read_bytes().startswith(b"\x89PNG"))
        root = ElementTree.fromstring(files.html.read_text())
        self.assertEqual(2, len(list(root.iter("img"))))

    def test_what_there_is_to_say_besides_is_in_the_page(self) -> None:
        sections = [Section("Rows", ("aborted: ok",))]
        files = write_report([], {}, self.directory, sections=sections)
        root = ElementTree.fromstring(files.html.read_text())
        self.assertIn("Rows", [each.text for each in root.iter("h2")])
        self.assertIn("aborted: ok", [each.text for each in root.iter("li")])

    def test_report_json_is_what_others_rely_on(self) -> None:
        runs = three_runs()
        files = write_report(runs, {"cpus": 2}, self.directory)
        kept = json.loads(files.json.read_text())
        self.assertEqual({"cpus": 2}, kept["machine"])
        self.assertEqual(["machine", "runs"], list(kept))
        self.assertEqual(3, len(kept["runs"]))
        for told, run in zip(kept["runs"], runs, strict=True):
            self.assertNotIn("series", told)
            given = {key: value for key, value in run.items() if key != "series"}
            self.assertEqual({**told, **given}, told)

    def test_an_earlier_report_is_replaced(self) -> None:
        write_report(three_runs(), {}, self.directory)
        files = write_report([make_run(scenario="other")], {}, self.directory)
        kept = json.loads(files.json.read_text())
        self.assertEqual(["other"], [run["scenario"] for run in kept["runs"]])

    def test_nothing_is_written_of_what_is_no_run_or_machine(self) -> None:
        for runs, machine in (([{"mode": "x"}], {}), ([make_run()], {"cpus": object()})):
            self.assertRaises(exception.ReportError, write_report, runs, machine, self.directory)
            self.assertFalse(self.directory.exists())

    def test_a_directory_that_cannot_be_is_told(self) -> None:
        file = self.make_directory() / "file"
        file.touch()
        error = self.assertRaises(
            exception.ReportError, write_report, [make_run()], {}, file / "below"
        )
        self.assertIn("cannot be written", str(error))

    def test_without_matplotlib_there_are_tables_and_a_clear_word(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT, str(self.directory)],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        )
        self.assertEqual(0, done.returncode, done.stderr)
        table, told = done.stdout.splitlines()
        self.assertEqual("dmigrate", table)
        self.assertIn("plots need matplotlib, the extra 'report'", told)
        self.assertFalse(self.directory.exists())
