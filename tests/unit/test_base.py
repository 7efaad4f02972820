# SPDX-License-Identifier: Apache-2.0
"""The base class of the tests and the count of their results: what CI relies on."""

import subprocess
import sys
import textwrap
from pathlib import Path

from tests import base

ROOT = Path(__file__).parents[2]
HEAD = """
import logging, os, sys, threading
from tests import base
base.GRACE = 1
"""


class SuiteTest(base.TestCase):
    """Runs small suites in processes of their own, as stestr's workers do."""

    def run_suite(self, body: str, timeout: str = "0", ci: str = "") -> tuple[Path, str]:
        """Run a module's tests; return the file of subunit results, and what stderr said."""
        directory = self.make_directory()
        (directory / "test_sample.py").write_text(HEAD + textwrap.dedent(body))
        results = directory / "results.subunit"
        with results.open("wb") as output:
            process = subprocess.run(
                [sys.executable, "-m", "subunit.run", "discover", str(directory)],
                stdout=output,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env={
                    "PYTHONPATH": str(ROOT),
                    "OS_TEST_TIMEOUT": timeout,
                    "PATH": "/usr/bin",
                    "CI": ci,
                },
                text=True,
                check=False,
            )
        return results, process.stderr

    def count(self, *results: Path) -> tuple[int, list[str]]:
        """Return the exit status and the lines of the count."""
        process = subprocess.run(
            [sys.executable, ROOT / "tools" / "count_results.py", *results],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        return process.returncode, process.stdout.splitlines()


class CountTest(SuiteTest):
    def test_passes_failures_errors_and_skips_are_told_apart(self) -> None:
        results, _ = self.run_suite(
            """
            class Sample(base.TestCase):
                def test_passes(self): pass
                def test_passes_too(self): pass
                def test_fails(self): self.fail("so")
                def test_breaks(self): raise RuntimeError("so")
                def test_skips(self): self.skipTest("so")
            """
        )
        status, lines = self.count(results)
        self.assertEqual("2 passed, 2 failed, 1 skipped", lines[-1])
        self.assertEqual(1, status)
        self.assertEqual(3, len(lines), "The failed tests are named")
        self.assertIn("FAIL: test_sample.Sample.test_fails: AssertionError: so", lines)
        self.assertIn("FAIL: test_sample.Sample.test_breaks: RuntimeError: so", lines)

    def test_the_results_of_suites_are_added_up(self) -> None:
        results, _ = self.run_suite(
            """
            class Sample(base.TestCase):
                def test_passes(self): pass
            """
        )
        twin = results.with_name("twin.subunit")
        twin.write_bytes(results.read_bytes())
        self.assertEqual((0, ["2 passed, 0 failed, 0 skipped"]), self.count(results, twin))

    def test_no_test_at_all_is_a_failure(self) -> None:
        results, _ = self.run_suite("")
        self.assertEqual((1, ["0 passed, 0 failed, 0 skipped"]), self.count(results))

    def test_missing_results_are_a_failure(self) -> None:
        nowhere = self.make_directory() / "nothing.subunit"
        self.assertEqual((1, ["0 passed, 0 failed, 0 skipped"]), self.count(nowhere))

    def test_a_module_that_cannot_be_imported_is_a_failure(self) -> None:
        results, _ = self.run_suite("import no_such_module")
        status, lines = self.count(results)
        self.assertEqual("0 passed, 1 failed, 0 skipped", lines[-1])
        self.assertEqual(1, status)

    def test_a_test_whose_process_died_is_a_failure(self) -> None:
        results, _ = self.run_suite(
            """
            class Sample(base.TestCase):
                def test_a_passes(self): pass
                def test_b_dies(self): os._exit(0)
            """
        )
        status, lines = self.count(results)
        self.assertEqual("1 passed, 1 failed, 0 skipped", lines[-1])
        self.assertEqual(1, status)


class TimeoutTest(SuiteTest):
    def test_a_hanging_test_ends_with_its_cleanups_and_the_next_one_runs(self) -> None:
        results, stderr = self.run_suite(
            """
            class Sample(base.TestCase):
                def test_a_hangs(self):
                    self.addCleanup(print, "cleaned up", file=sys.stderr)
                    threading.Event().wait()
                def test_b_passes(self): pass
            """,
            timeout="1",
        )
        self.assertIn("cleaned up", stderr)
        self.assertEqual("1 passed, 1 failed, 0 skipped", self.count(results)[1][-1])

    def test_a_test_deaf_to_signals_ends_with_the_stacks_of_its_threads(self) -> None:
        results, stderr = self.run_suite(
            """
            import signal
            class Sample(base.TestCase):
                def test_hangs(self):
                    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
                    threading.Event().wait()
            """,
            timeout="1",
        )
        self.assertIn("in test_hangs", stderr)
        self.assertEqual("0 passed, 1 failed, 0 skipped", self.count(results)[1][-1])


class RequireTest(SuiteTest):
    SUITE = """
        class Sample(base.TestCase):
            def test_there(self): base.require(None)
            def test_missing(self): base.require("so")
        class Whole(base.TestCase):
            @classmethod
            def setUpClass(cls):
                super().setUpClass()
                base.require("so")
            def test_missing(self): pass
    """

    def test_what_is_missing_skips_a_test_or_a_class(self) -> None:
        status, lines = self.count(self.run_suite(self.SUITE)[0])
        self.assertEqual((0, "1 passed, 0 failed, 2 skipped"), (status, lines[-1]))

    def test_in_ci_what_is_missing_is_a_failure(self) -> None:
        status, lines = self.count(self.run_suite(self.SUITE, ci="true")[0])
        self.assertEqual((1, "1 passed, 2 failed, 0 skipped"), (status, lines[-1]))


class LogTest(SuiteTest):
    def test_the_log_of_a_failed_test_is_among_its_results(self) -> None:
        results, _ = self.run_suite(
            """
            class Sample(base.TestCase):
                def test_fails(self):
                    logging.getLogger("deep.inside").debug("what went on")
                    self.fail("so")
            """
        )
        self.assertIn(b"deep.inside: what went on", results.read_bytes())
