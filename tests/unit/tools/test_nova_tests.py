# SPDX-License-Identifier: Apache-2.0
"""The comparison of Nova's own tests finds what it is there for.

The worker runs as a process, on a miniature of Nova: packages by Nova's names, whose driver and
tests fit on a screen.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from tests import base
from tools import count_results
from tools.nova_tests import plan, process
from tools.nova_tests.comparison import Comparison, write
from tools.nova_tests.execution import told
from tools.nova_tests.worker import NEVER_MADE, OURS, STOCK

ROOT = Path(__file__).resolve().parents[3]
MODULE = "nova.tests.unit.test_driver"
NOVA = {
    "nova/__init__.py": "",
    "nova/test.py": "",
    "nova/tests/__init__.py": "",
    "nova/tests/unit/__init__.py": "",
    "nova/tests/unit/test_driver.py": """
        import sys
        import unittest

        from nova.virt import libvirt
        from nova.virt.libvirt import driver

        class DriverTestCase(unittest.TestCase):
            def test_moves(self):
                self.assertEqual("moved", driver.LibvirtDriver().move())

            def test_moves_by_the_other_name(self):
                self.assertEqual("moved", libvirt.LibvirtDriver().move())

            def test_is_stock(self):
                self.assertEqual("stock", driver.LibvirtDriver().name)

            @unittest.skip("for no reason")
            def test_skipped(self):
                pass

            def test_makes_no_driver(self):
                pass
        """,
    "nova/virt/__init__.py": "",
    "nova/virt/libvirt/__init__.py": """
        from nova.virt.libvirt import driver
        LibvirtDriver = driver.LibvirtDriver
        """,
    "nova/virt/libvirt/driver.py": """
        class LibvirtDriver:
            name = "stock"

            def __init__(self):
                super(LibvirtDriver, self).__init__()

            def move(self):
                return "moved"
        """,
}
DRIVER = """
    from nova.virt.libvirt import driver

    class DMigrateDriver(driver.LibvirtDriver):
        name = "dmigrate"
    """


class WorkerTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        for name, text in NOVA.items():
            self.write(f"installed/{name}", text)
        self.write("shim/dmigrate/__init__.py", DRIVER)

    def write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.directory / "installed")}

    def argv(self, driver: str, *options: str) -> list[str]:
        argv = [sys.executable, "-m", "tools.nova_tests.worker", "--driver", driver]
        argv += ["--shim", str(self.directory / "shim"), "--output", str(self.directory / driver)]
        argv += ["--names", str(self.directory / "names")]
        return [*argv, "--verdict", str(self.directory / "verdict"), *options, MODULE]

    def work(self, driver: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(driver, *options),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def results(self, driver: str, *options: str) -> dict[str, str]:
        """Return what became of each test, by the last part of its name."""
        ended = self.work(driver, *options)
        self.assertEqual(0, ended.returncode, ended.stderr)
        found = count_results.outcomes(self.directory / driver)
        return {name.rpartition(".")[2]: status for name, status in found.items()}

    def test_the_tests_make_the_stock_driver(self) -> None:
        self.assertEqual(
            {
                "test_moves": "success",
                "test_moves_by_the_other_name": "success",
                "test_is_stock": "success",
                "test_skipped": "skip",
                "test_makes_no_driver": "success",
            },
            self.results(STOCK),
        )

    def test_the_tests_make_our_driver_by_every_name_of_the_stock_one(self) -> None:
        self.write(
            "shim/dmigrate/__init__.py", DRIVER + "    def move(self):\n            return 'lost'\n"
        )
        results = self.results(OURS)
        failed = {"test_moves", "test_moves_by_the_other_name", "test_is_stock"}
        self.assertEqual(failed, {name for name, status in results.items() if status == "fail"})

    def test_tests_that_never_make_the_driver_are_told(self) -> None:
        self.assertEqual(NEVER_MADE, self.work(OURS, "--select", "makes_no").returncode)
        self.assertEqual(0, self.work(OURS, "--select", "makes_no|moves").returncode)

    def test_tests_run_again_by_their_names(self) -> None:
        only = self.directory / "only"
        only.write_text(f"{MODULE}.DriverTestCase.test_makes_no_driver\n")
        self.assertEqual(
            {"test_makes_no_driver": "success"}, self.results(OURS, "--only", str(only))
        )

    def test_tests_that_a_process_did_not_come_to_are_known(self) -> None:
        self.write(
            f"installed/{MODULE.replace('.', '/')}.py",
            """
            import os
            import unittest

            class DriverTestCase(unittest.TestCase):
                def test_a(self):
                    pass

                def test_b(self):
                    os._exit(1)

                def test_c(self):
                    pass
            """,
        )
        self.assertEqual(1, self.work(STOCK).returncode)
        names = (self.directory / "names").read_text().split()
        found = count_results.outcomes(self.directory / STOCK)
        self.assertEqual(["success", "inprogress", None], [found.get(name) for name in names])

    def test_a_driver_that_is_not_the_stock_one_extended_is_refused(self) -> None:
        self.write("shim/dmigrate/__init__.py", "class DMigrateDriver:\n    pass\n")
        ended = self.work(OURS)
        self.assertNotEqual(0, ended.returncode)
        self.assertIn("does not extend", ended.stderr)

    def test_a_module_that_cannot_be_imported_ends_the_run(self) -> None:
        self.write("installed/nova/tests/unit/test_driver.py", "import no_such_module\n")
        self.assertNotEqual(0, self.work(STOCK).returncode)

    def test_a_thread_that_a_test_leaves_behind_costs_no_results(self) -> None:
        self.write(
            f"installed/{MODULE.replace('.', '/')}.py",
            """
            import threading
            import unittest

            from nova.virt.libvirt import driver

            def wait_for_ever():
                threading.Event().wait()

            class DriverTestCase(unittest.TestCase):
                def test_a(self):
                    driver.LibvirtDriver()
                    threading.Thread(target=wait_for_ever).start()

                def test_b(self):
                    pass
            """,
        )
        log, verdict = self.directory / "log", self.directory / "verdict"
        verdict.touch()
        ending = process.run(
            self.argv(STOCK), self.environment, ROOT, log, verdict, process.Limits(exit=1)
        )
        self.assertEqual(process.Ending(verdict=0, killed_after=1), ending)
        self.assertIn("in wait_for_ever", log.read_text())
        self.assertIn("the results are complete", told(ending, log))
        found = count_results.outcomes(self.directory / STOCK)
        self.assertEqual(["success", "success"], list(found.values()))


class ProcessTest(base.TestCase):
    def run_python(self, code: str, limits: process.Limits) -> process.Ending:
        directory = self.make_directory()
        self.log, verdict = directory / "log", directory / "verdict"
        verdict.touch()
        argv = [sys.executable, "-c", textwrap.dedent(code), str(verdict)]
        return process.run(argv, os.environ, directory, self.log, verdict, limits)

    def test_one_that_is_never_done_is_killed(self) -> None:
        ending = self.run_python("import time; time.sleep(1000)", process.Limits(run=1))
        self.assertEqual(process.Ending(verdict=None, killed_after=1), ending)
        self.assertIn("had to be killed after 1 s", told(ending, self.log))

    def test_one_that_ends_before_it_is_done_is_told(self) -> None:
        ending = self.run_python("raise SystemExit(0)", process.Limits())
        self.assertEqual(process.Ending(verdict=None, killed_after=None), ending)
        self.assertIn("ended early", told(ending, self.log))

    def test_one_that_ends_well_has_nothing_to_be_told(self) -> None:
        code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('3')"
        ending = self.run_python(code, process.Limits())
        self.assertEqual(process.Ending(verdict=3, killed_after=None), ending)
        self.assertEqual("", told(ending, self.log))


class ComparisonTest(base.TestCase):
    def compare(self, stock: dict[str, str], ours: dict[str, str]) -> Comparison:
        comparison = Comparison()
        comparison.add(stock, ours)
        return comparison

    def test_the_same_results_are_as_stock(self) -> None:
        comparison = self.compare({"a": "success", "b": "skip"}, {"a": "success", "b": "skip"})
        self.assertTrue(comparison.good)
        self.assertEqual(
            [
                "skipped with both: Nova 34: b",
                "Nova 34: 2 of 2 as stock (1 passed, 1 skipped with both)",
            ],
            comparison.lines("Nova 34"),
        )

    def test_a_test_that_ends_otherwise_is_named(self) -> None:
        for status in ("fail", "skip", "inprogress"):
            comparison = self.compare(
                {"a": "success", "b": "success"}, {"a": "success", "b": status}
            )
            self.assertFalse(comparison.good)
            named, count = comparison.lines("Nova 34")
            self.assertIn(f"b: success with the stock driver, {status}", named)
            self.assertIn("1 of 2 as stock", count)

    def test_a_test_that_ran_with_one_driver_only_differs(self) -> None:
        self.assertEqual(
            {"a": ("success", "missing")}, self.compare({"a": "success"}, {}).different
        )
        self.assertEqual(
            {"a": ("missing", "success")}, self.compare({}, {"a": "success"}).different
        )

    def test_a_test_that_fails_with_both_proves_nothing(self) -> None:
        comparison = self.compare({"a": "fail", "b": "success"}, {"a": "fail", "b": "success"})
        self.assertFalse(comparison.good)
        named, count = comparison.lines("Nova 34")
        self.assertEqual("FAILS WITH BOTH: Nova 34: a", named)
        self.assertIn("1 passed, 1 failed", count)

    def test_what_passes_with_ours_needs_no_stock_driver_unless_all_run_with_both(self) -> None:
        comparison = Comparison(whole=False)
        ours = {"a": "success", "b": "skip", "c": "fail"}
        comparison.add({}, ours)
        self.assertEqual(["b", "c"], comparison.unsettled)
        settled = Comparison(whole=False)
        settled.add({"b": "skip", "c": "success"}, ours)
        self.assertFalse(settled.good)
        self.assertEqual(
            [
                "DIFFERS: Nova 34: c: success with the stock driver, fail with DMigrate's",
                "skipped with both: Nova 34: b",
                "Nova 34: 2 of 3 pass or are as stock (1 passed, 1 skipped with both)",
            ],
            settled.lines("Nova 34"),
        )

    def test_a_test_that_passes_with_ours_alone_differs(self) -> None:
        self.assertFalse(self.compare({"a": "fail"}, {"a": "success"}).good)

    def test_no_test_at_all_is_not_as_stock(self) -> None:
        self.assertFalse(self.compare({}, {}).good)

    def test_results_can_be_counted(self) -> None:
        comparison = self.compare(
            {"a": "success", "b": "success", "c": "skip"},
            {"a": "success", "b": "fail", "c": "skip"},
        )
        path = self.make_directory() / "nova.subunit"
        with path.open("wb") as stream:
            write({"Nova 34 threading": comparison}, stream)
        counted = count_results.count([path])
        self.assertEqual((1, 1), (counted.passed, counted.skipped))
        self.assertEqual(["FAIL: Nova-34-threading.b"], counted.failed)


class PlanTest(base.TestCase):
    """Which tests run with which release."""

    def test_what_a_release_does_not_support_in_a_backend_is_left_out(self) -> None:
        jobs = {job.name: job.group for job in plan.jobs_of([34, 33], short=False)}
        self.assertEqual(
            {"34-threading", "34-eventlet", "33-eventlet", "33-threading"},
            {name.rpartition("-")[0] for name in jobs},
        )
        self.assertIn("33-eventlet-functional", jobs)
        self.assertNotIn("33-threading-functional", jobs)
        for name, is_there in (("33-threading-unit", False), ("33-eventlet-unit", True)):
            self.assertEqual((plan.DRIVER, plan.MANAGER), jobs[name].modules)
            found = re.search(jobs[name].select, f"{plan.DRIVER}.CacheConcurrencyTestCase.test_one")
            self.assertEqual(is_there, bool(found))
            for test in (
                f"{plan.DRIVER}.AnyTest.test_one",
                f"{plan.MANAGER}.A.test_live_migration",
            ):
                self.assertTrue(re.search(jobs[name].select, test), test)
            self.assertFalse(re.search(jobs[name].select, f"{plan.MANAGER}.A.test_reboot"))

    def test_short_runs_have_the_default_backend(self) -> None:
        jobs = plan.jobs_of([34, 33], short=True)
        self.assertEqual(
            [(34, "threading"), (34, "threading"), (33, "eventlet"), (33, "eventlet")],
            [(job.release, job.backend) for job in jobs],
        )
