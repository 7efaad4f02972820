# SPDX-License-Identifier: Apache-2.0
"""What is a run, and what report.json has of it."""

from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.report import runs
from tests import base
from tests.unit.report.examples import make_run, make_series

KEYS = (
    "scenario mode database network_mb_s volume_mb_s pool_share completed fallback_reason total_s"
    " ideal_s efficiency speedup_vs_precopy downtime_ms guest_bytes wire_bytes volume_bytes"
    " pages_referenced misses tps_before tps_during tps_after recover_90_s lost_commits check_ok"
)
#: Those whose values are no numbers, and those that a run has to have.
TEXTS = ("scenario", "mode", "database", "fallback_reason")
FLAGS = ("completed", "check_ok")
REQUIRED = ("scenario", "mode", "completed")


class CheckedTest(base.TestCase):
    def refusal(self, **changes: Any) -> str:
        run = make_run(**changes)
        return str(self.assertRaises(exception.ReportError, runs.checked, [make_run(), run]))

    def test_report_json_has_its_keys_in_their_order_and_no_series(self) -> None:
        (run,) = runs.checked([make_run(series=make_series())])
        self.assertEqual(KEYS, " ".join(runs.without_series(run)))

    def test_what_was_not_measured_is_none(self) -> None:
        (run,) = runs.checked([{"scenario": "x", "mode": "dmigrate", "completed": False}])
        self.assertEqual(KEYS, " ".join(runs.without_series(run)))
        self.assertIsNone(run["tps_before"])

    def test_efficiency_and_speed_up_are_reckoned(self) -> None:
        stock, run = runs.checked([make_run("pre-copy"), make_run()])
        self.assertEqual((0.9, 2.0), (run["efficiency"], run["speedup_vs_precopy"]))
        self.assertEqual((None, 1.0), (stock["efficiency"], stock["speedup_vs_precopy"]))
        (given,) = runs.checked([make_run(efficiency=0.5, speedup_vs_precopy=3)])
        self.assertEqual((0.5, 3), (given["efficiency"], given["speedup_vs_precopy"]))

    def test_nothing_is_reckoned_from_another_shape_or_from_what_did_not_complete(self) -> None:
        for stock in (make_run("pre-copy", volume_mb_s=100), make_run("pre-copy", completed=False)):
            self.assertIsNone(runs.checked([stock, make_run()])[1]["speedup_vs_precopy"])
        (failed,) = runs.checked([make_run(completed=False)])
        self.assertIsNone(failed["efficiency"])

    def test_each_key_has_a_value_of_its_kind_or_none(self) -> None:
        values = {"a text": "x", "true or false": True, "a number": 1.5}
        for name in KEYS.split():
            kind = "a text" if name in TEXTS else "true or false" if name in FLAGS else "a number"
            for other, value in values.items():
                with self.subTest(f"{name}: {other}"):
                    if other != kind:
                        self.assertIn(
                            f"{name} is {value!r}, not {kind}", self.refusal(**{name: value})
                        )
                    elif name != "mode":
                        (run,) = runs.checked([make_run(**{name: value})])
                        self.assertEqual(value, run[name])
            with self.subTest(f"{name}: None"):
                if name in REQUIRED:
                    self.assertIn(f"{name} is missing", self.refusal(**{name: None}))
                else:
                    runs.checked([make_run(**{name: None})])

    def test_what_is_wrong_is_told_by_number_and_name(self) -> None:
        self.assertIn("run 2: thruput: no such key", self.refusal(thruput=1))
        self.assertIn("run 2: scenario is missing", self.refusal(scenario=None))
        self.assertIn("not one of pre-copy", self.refusal(mode="magic"))
        for name, value in (
            ("total_s", float("nan")),
            ("misses", float("inf")),
            ("check_ok", 1),
        ):
            self.assertIn(f"run 2: {name} is", self.refusal(**{name: value}))

    def test_series_that_are_none_are_refused(self) -> None:
        for series in (
            {"disk": []},
            {"tps": [[1]]},
            {"tps": [1, 2]},
            {"tps": 5},
            {"network": [[0, None]]},
            {"network": [[0, float("inf")]]},
            {"downtime": [1]},
            {"downtime": 5},
        ):
            self.assertIn("run 2: series", self.refusal(series=series))
        self.assertIn("series is no object", self.refusal(series=[1]))


class GroupTest(base.TestCase):
    def test_runs_of_one_shape_come_together_in_the_order_of_modes(self) -> None:
        one, other = {"scenario": "a"}, {"scenario": "a", "network_mb_s": 100}
        groups = runs.grouped(
            runs.checked(
                [
                    make_run("dmigrate", **one),
                    make_run("pre-copy", **other),
                    make_run("post-copy", **one),
                    make_run("pre-copy", **one),
                ]
            )
        )
        self.assertEqual(
            [["pre-copy", "post-copy", "dmigrate"], ["pre-copy"]],
            [group.names() for group in groups],
        )
        self.assertEqual(
            "a, mysql 9.7, network 100 MB/s, volume 50 MB/s, pool 75 % of RAM", groups[1].title
        )

    def test_runs_of_one_mode_are_numbered(self) -> None:
        (group,) = runs.grouped(runs.checked([make_run(), make_run("pre-copy"), make_run()]))
        self.assertEqual(["pre-copy", "dmigrate (1)", "dmigrate (2)"], group.names())
