# SPDX-License-Identifier: Apache-2.0
"""What scenarios and guests are chosen, what is said of runs, what becomes of them after an error.

All of it without any guest.
"""

import contextlib
import io
import itertools
import signal
import subprocess
import threading
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fixtures
import libvirt

from nova_dmigrate.rpc import channel
from nova_dmigrate.rpc.client import AgentClient, ClientSettings
from tests import base
from tests.lab.database_image import MYSQL
from tests.lab.demo import __main__ as demo
from tests.lab.demo import compare, measure, scenarios
from tests.lab.demo.ledger import LedgerCheck
from tests.lab.demo.settings import WrongSetting, shape_from
from tests.lab.demo.stage import Content, Shape, mapped_bytes
from tests.lab.guest import GuestError

USUAL = Shape(MYSQL, network=25, volume=25, ram_mb=2560)


class ScenariosTest(base.TestCase):
    def chosen(self, **environment: str) -> list[compare.Scenario]:
        return scenarios._chosen(USUAL, environment)

    def test_an_evicted_host_should_be_empty_when_the_network_could_have_carried_all(self) -> None:
        (scenario,) = self.chosen(ONLY="eviction")
        self.assertEqual(2 * 1280 * 2**20 / 25e6, scenario.deadline)
        (scenario,) = self.chosen(ONLY="eviction", DEADLINE="90")
        self.assertEqual(90, scenario.deadline)
        self.assertRaises(WrongSetting, self.chosen, DEADLINE="soon")

    def test_storage_does_not_fail_where_the_guest_runs(self) -> None:
        (scenario,) = self.chosen(ONLY="fails")
        self.assertEqual({measure.POST_COPY}, set(measure.MODES) - set(scenario.modes))

    def test_what_the_same_guests_can_play_comes_together(self) -> None:
        kinds = [(each.guests, each.shape.guest) for each in self.chosen()]
        changes = sum(one != other for one, other in itertools.pairwise(kinds))
        self.assertEqual(len(set(kinds)) - 1, changes)

    def test_a_whole_name_chooses_only_that_scenario_though_it_has_a_comma(self) -> None:
        for only, wanted in (
            ("tpcc", {"tpcc"}),
            ("tpcc, storage twice as fast", {"tpcc, storage twice as fast"}),
            (
                "tpcc, storage twice as fast; oltp_write_only;slow",
                {"tpcc, storage twice as fast", "oltp_write_only", "slow storage"},
            ),
            ("tpcc,slow", {"tpcc", "slow storage"}),
            (
                "twice",
                {"tpcc, storage twice as fast", "oltp_read_write, storage twice as fast"},
            ),
        ):
            with self.subTest(only):
                self.assertEqual(wanted, {each.name for each in self.chosen(ONLY=only)})
        error = self.assertRaises(WrongSetting, self.chosen, ONLY="tpcc;fast storage, slow")
        self.assertIn("'fast storage' is in none of oltp_read_only; ", str(error))

    def test_a_usual_load_has_all_pools_and_others_the_last(self) -> None:
        pools = {
            load: [each.shape.pool for each in self.chosen() if each.name == load]
            for load in ("oltp_read_write", "oltp_write_only", "tpcc")
        }
        wanted = {"oltp_read_write": [0.75, 0.25, 0.5], "oltp_write_only": [0.75], "tpcc": [0.75]}
        self.assertEqual(wanted, pools)


class SettingsTest(base.TestCase):
    def refusal(self, memory_mb: int, **environment: str) -> str:
        self.useFixture(
            fixtures.MonkeyPatch("tests.lab.demo.settings.os_memory_mb", lambda: memory_mb)
        )
        return str(self.assertRaises(WrongSetting, shape_from, environment))

    def test_a_machine_that_is_too_small_for_the_default_is_told_what_works(self) -> None:
        told = self.refusal(4096)
        self.assertIn("RAM=2048 is not between 960 and 1365: ", told)
        self.assertIn("this machine, which has 4096 MiB", told)
        for works in ("960", "1365"):
            self.assertEqual(int(works), shape_from({"RAM": works}).ram_mb)
        for fails in ("959", "1366", "nan", "inf"):
            self.assertIn("960", self.refusal(4096, RAM=fails))

    def test_a_machine_that_is_too_small_for_any_guest_is_told_so(self) -> None:
        told = self.refusal(4096, POOL="0.75")
        self.assertIn("POOL=0.75 needs RAM=1920 at least", told)
        self.assertIn("this one has 4096 MiB", told)
        self.assertEqual(1100, shape_from({"POOL": "0.75", "RAM": "1100", "DB": "mariadb"}).ram_mb)


class WithRuns(base.TestCase):
    def run_of(self, **more: object) -> measure.Run:
        run = {"scenario": "eviction", "mode": "pre-copy", "completed": True, "total_s": 80.0}
        return {**run, "fallback_reason": None, "downtime_ms": 5.0, "lost_commits": 0, **more}


class ComparisonTest(WithRuns):
    def test_a_database_that_was_not_looked_at_is_not_whole(self) -> None:
        sound = self.run_of(check_ok=True)
        self.assertTrue(compare.Comparison([sound]).whole)
        # A scenario that fails midway leaves such runs
        self.assertFalse(compare.Comparison([sound, self.run_of()]).whole)
        self.assertFalse(compare.Comparison([self.run_of(check_ok=True, lost_commits=1)]).whole)

    def test_what_was_written_is_read_and_replaced_by_what_is_measured_anew(self) -> None:
        directory = Path(self.useFixture(fixtures.TempDir()).path)
        self.assertEqual(compare.Comparison(), compare.Comparison.read(directory))
        first = compare.Comparison(machine={"cpus": 2})
        for mode in ("pre-copy", "dmigrate"):
            series = {"network": [[0.0, 0.0], [1.0, 5.0]]}
            first.add(self.run_of(mode=mode, check_ok=True, series=series), {"mode": mode})
        first.write(directory)
        again = compare.Comparison.read(directory)
        self.assertEqual(first, again)
        again.add(self.run_of(total_s=70.0, check_ok=True), {"mode": "pre-copy", "new": True})
        self.assertEqual([80.0, 70.0], [run["total_s"] for run in again.runs])
        self.assertEqual([{"mode": "dmigrate"}, {"mode": "pre-copy", "new": True}], again.details)

    def test_the_table_is_followed_by_what_dmigrate_gains_and_where_it_does_not_win(self) -> None:
        directory = Path(self.useFixture(fixtures.TempDir()).path)
        runs = [
            self.run_of(check_ok=True),
            self.run_of(mode="multifd-zstd", check_ok=True, total_s=40.0),
            self.run_of(mode="dmigrate", check_ok=True, total_s=50.0),
        ]
        with contextlib.redirect_stdout(io.StringIO()) as told:
            compare.Comparison(runs).write(directory)
        table, _, said = told.getvalue().partition("\n\n")
        self.assertIn("speed-up", table)
        self.assertEqual(
            [
                "What DMigrate gains:",
                "  eviction: 50.0 s, 1.60 times as quick as pre-copy",
                "Where DMigrate does not win:",
                "  eviction: takes 1.25 times as long as multifd-zstd",
            ],
            said.splitlines(),
        )

    def test_what_went_without_volumes_is_not_called_ordinary(self) -> None:
        for run, words in (
            (self.run_of(), "Completed in 80.0 s; 5 ms"),
            (
                self.run_of(fallback_reason="late-map"),
                "Completed in 80.0 s without volumes: late-map; 5 ms",
            ),
            (
                self.run_of(fallback_reason="no-room", pages_referenced=7),
                "Completed in 80.0 s partly without volumes: no-room; 5 ms",
            ),
        ):
            with self.subTest(words):
                self.assertIn(words, compare._sentence(run, {}))

    def test_it_is_told_whether_a_host_was_empty_in_time(self) -> None:
        for run, in_time, words in (
            (self.run_of(), True, "empty after 80.0 s, in time: 90 s were allowed"),
            (self.run_of(total_s=91.0), False, "empty after 91.0 s, too late: 90 s were allowed"),
            (self.run_of(completed=False), False, "not empty after 90 s, nor later"),
        ):
            with self.subTest(words):
                more = {"scenario": "eviction", "mode": "pre-copy", "guests": []}
                more |= compare._emptied(run, 90)
                self.assertEqual(in_time, more["in_time"])
                self.assertIn(words, compare._sentence(run, more))


def guest(*errors: Exception, table: str = "OK") -> Any:
    """What is looked at of one whose tables are as told, or of which that cannot be found out."""
    told = iter(["sbtest.t1", f"sbtest.t1\tcheck\tstatus\t{table}\n"])

    def sql(statement: str, timeout: float = 0) -> str:
        for error in errors:
            raise error
        return next(told)

    return types.SimpleNamespace(
        content=lambda: Content(5 << 20, 3 << 20),
        stop_clients=lambda: None,
        ledger=types.SimpleNamespace(check=lambda: LedgerCheck(5, 0, 0)),
        guest=types.SimpleNamespace(sql=sql),
    )


class AfterAnErrorTest(WithRuns):
    """What is finished by then counts."""

    def setUp(self) -> None:
        super().setUp()
        self.directory = self.make_directory()
        self.told = io.StringIO()
        self.useFixture(fixtures.MonkeyPatch("sys.stderr", self.told))
        self.useFixture(fixtures.MonkeyPatch("sys.stdout", io.StringIO()))

    def compared(self, error: BaseException, *guests: Any) -> compare.Comparison:
        """After one mode that went well and one in which an error comes."""

        @contextlib.contextmanager
        def stage(shape: Shape, *_: object) -> Iterator[Any]:
            yield types.SimpleNamespace(shape=shape, guests=guests)

        def measured(stage: Any, mode: str, *_: object) -> tuple[measure.Run, dict[str, Any]]:
            if mode == measure.DMIGRATE:
                raise error
            return self.run_of(mode=mode), {"mode": mode}

        for name, value in (("Stage", stage), ("machine", lambda _: {}), ("measure", measured)):
            self.useFixture(fixtures.MonkeyPatch(f"tests.lab.demo.compare.{name}", value))
        result = compare.Comparison()
        played = compare.Scenario("eviction", USUAL, (measure.PRE_COPY, measure.DMIGRATE))
        raised = self.assertRaises(type(error), compare.compare, [played], self.directory, result)
        self.assertIs(error, raised)
        self.assertEqual([measure.PRE_COPY], [run["mode"] for run in result.runs])
        return result

    def test_databases_are_looked_at_for_the_runs_that_are_finished(self) -> None:
        error = RuntimeError("qemu-storage-daemon has ended")
        self.assertTrue(self.compared(error, guest(), guest()).whole)
        damaged = self.compared(error, guest(), guest(table="Corrupt"))
        self.assertIs(False, damaged.runs[0]["check_ok"])
        self.assertIn("CHECK TABLE: sbtest.t1\tcheck\tstatus\tCorrupt", self.told.getvalue())

    def test_a_guest_that_does_not_run_any_more_keeps_no_other_from_being_looked_at(self) -> None:
        error, gone = TimeoutError("it hangs"), GuestError("guest0 does not run on a")
        unknown = self.compared(error, guest(gone), guest())
        self.assertIsNone(unknown.runs[0]["check_ok"])
        self.assertFalse(unknown.whole)
        self.assertIn("guest0 does not run on a", self.told.getvalue())
        damaged = self.compared(error, guest(gone), guest(table="Corrupt"))
        self.assertIs(False, damaged.runs[0]["check_ok"])

    def test_an_interrupt_waits_for_no_database(self) -> None:
        result = self.compared(KeyboardInterrupt(), guest())
        self.assertNotIn("check_ok", result.runs[0])
        self.assertNotIn("Checking", self.told.getvalue())

    def failing(self, module: str, *errors: BaseException) -> None:
        """One guest after the other has a run, and then an error if there is still one."""
        left = iter(errors)

        def play(
            together: Sequence[compare.Scenario], directory: Path, result: compare.Comparison
        ) -> None:
            name = together[0].name
            result.add(self.run_of(scenario=name, check_ok=True), {"scenario": name})
            for error in left:
                raise error

        self.useFixture(fixtures.MonkeyPatch(f"tests.lab.demo.{module}.compare", play))

    def test_the_next_guests_play_and_the_report_has_what_is_finished(self) -> None:
        errors = (
            RuntimeError("a host's service has ended"),
            subprocess.TimeoutExpired(["tc", "qdisc"], 5),
            self.libvirt_error(),
        )
        self.failing("scenarios", *errors)
        chosen = scenarios._chosen(USUAL, {"ONLY": "oltp_read_only;oltp_write_only;tpcc;eviction"})
        result = compare.Comparison()
        self.assertFalse(scenarios._play(chosen, result, self.directory))
        told = self.told.getvalue()
        for error in errors:
            self.assertIn(f"{type(error).__name__}: {error}", told)
        written = compare.Comparison.read(self.directory)
        self.assertEqual(4, len(written.runs))
        self.assertEqual(result, written)
        # Now that none fails any more
        self.assertTrue(scenarios._play(chosen, result, self.directory))

    def test_an_interrupt_ends_all(self) -> None:
        self.failing("scenarios", KeyboardInterrupt())
        result = compare.Comparison()
        chosen = scenarios._chosen(USUAL, {"ONLY": "oltp_read_only;oltp_write_only"})
        self.assertRaises(KeyboardInterrupt, scenarios._play, chosen, result, self.directory)
        self.assertEqual(["oltp_read_only"], [run["scenario"] for run in result.runs])

    def test_a_report_that_cannot_be_written_is_told(self) -> None:
        self.failing("scenarios")
        place = self.directory / "file"
        place.touch()
        chosen = scenarios._chosen(USUAL, {"ONLY": "oltp_read_only"})
        self.assertFalse(scenarios._play(chosen, compare.Comparison(), place))
        self.assertIn("ReportError", self.told.getvalue())

    def test_the_demo_writes_what_is_finished(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        for name, value in (
            ("__main__.REPORT", self.directory),
            ("__main__.available_release", lambda release, say: release),
            ("__main__.database_image.unavailable", lambda: None),
            ("settings.os_memory_mb", lambda: 24576),
        ):
            self.useFixture(fixtures.MonkeyPatch(f"tests.lab.demo.{name}", value))
        self.failing("__main__", RuntimeError("a host's service has ended"), KeyboardInterrupt())
        self.assertRaises(RuntimeError, demo.main)
        self.assertEqual(1, len(compare.Comparison.read(self.directory).runs))
        self.assertEqual(1, demo.main())
        self.assertEqual(0, demo.main())

    def libvirt_error(self) -> libvirt.libvirtError:
        """What libvirt raises where there is no such domain."""
        with contextlib.closing(libvirt.open("test:///default")) as connection:
            return self.assertRaises(libvirt.libvirtError, connection.lookupByName, "nowhere")

    def test_a_migration_that_libvirt_does_not_begin_is_a_run_with_an_error(self) -> None:
        error = self.libvirt_error()

        def begin_migration(**_: object) -> None:
            raise error

        domain = types.SimpleNamespace(begin_migration=begin_migration)
        outcome = measure._Outcome(begin=0.0)
        measure._by_libvirt(
            types.SimpleNamespace(domain=domain),  # type: ignore[arg-type]
            *(measure.PRE_COPY, outcome, threading.Event()),
        )
        self.assertEqual((False, str(error)), (outcome.completed, outcome.error))

    def test_an_agent_that_does_not_answer_has_mapped_nothing(self) -> None:
        transport = channel.ChannelTransport(
            "db1", lambda: channel.open_port(str(self.directory / "agent.sock"))
        )
        settings = ClientSettings(timeout=0.5, attempts=1)
        with AgentClient("db1", transport, settings) as agent:
            self.assertEqual(0, mapped_bytes(agent, 1 << 30))
