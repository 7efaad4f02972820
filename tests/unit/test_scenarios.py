# SPDX-License-Identifier: Apache-2.0
"""What scenarios and guests are chosen, and what is said of runs, without any guest."""

import contextlib
import io
import itertools
from pathlib import Path

import fixtures

from tests import base
from tests.lab.database_image import MYSQL
from tests.lab.demo import compare, measure, scenarios
from tests.lab.demo.settings import WrongSetting, shape_from
from tests.lab.demo.stage import Shape

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


class ComparisonTest(base.TestCase):
    def run_of(self, **more: object) -> measure.Run:
        run = {"scenario": "eviction", "mode": "pre-copy", "completed": True, "total_s": 80.0}
        return {**run, "fallback_reason": None, "downtime_ms": 5.0, "lost_commits": 0, **more}

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
