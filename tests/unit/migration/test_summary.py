# SPDX-License-Identifier: Apache-2.0
"""The record of a migration: as JSON and back, and the sentence."""

import dataclasses
import datetime
import json
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.migration import summary
from nova_dmigrate.migration.request import MigrationRequest
from nova_dmigrate.migration.summary import MigrationSummary
from tests import base
from tests.unit.migration.summaries import ORDINARY, RELAYED, series


class IdTest(base.TestCase):
    def test_ids_of_later_seconds_sort_behind_and_none_comes_twice(self) -> None:
        begin = datetime.datetime(2026, 12, 31, 23, 59, 58, tzinfo=datetime.timezone.utc)
        moments = [begin + datetime.timedelta(seconds=second) for second in range(100)]
        ids = [summary.new_id(moment) for moment in moments]
        self.assertEqual(sorted(ids), ids)
        # With 24 bits of chance a few hundred in one second would meet now and then
        self.assertEqual(20, len({summary.new_id(begin) for _ in range(20)}))
        self.assertTrue(all(map(summary.is_id, ids)))

    def test_an_id_is_in_utc(self) -> None:
        zone = datetime.timezone(datetime.timedelta(hours=9))
        moment = datetime.datetime(2026, 11, 25, 2, 3, 4, tzinfo=zone)
        self.assertEqual("20261124-170304", summary.new_id(moment)[:15])

    def test_what_could_leave_a_directory_is_no_id(self) -> None:
        for text in ("", "..", "../20261125-170301-abcdef", "20261125-170301-abcdef\n", "x"):
            self.assertFalse(summary.is_id(text), text)


class RecordTest(base.TestCase):
    def test_a_summary_survives_json(self) -> None:
        full = dataclasses.replace(RELAYED, series={"source": tuple(series()), "destination": ()})
        for one in (full, ORDINARY):
            text = json.dumps(one.to_dict())
            self.assertEqual(one, MigrationSummary.from_dict(json.loads(text)))

    def test_the_keys_are_stable(self) -> None:
        self.assertEqual(
            "id instance domain source destination mode state started total_s downtime_ms"
            " fallback_reason fallback_message error guest_bytes wire_bytes saved_bytes"
            " volume_bytes pages_referenced misses mapped_pages mapping_s phases findings series"
            " libvirt",
            " ".join(RELAYED.to_dict()),
        )

    def test_what_a_later_version_added_is_left_out(self) -> None:
        record = {**RELAYED.to_dict(), "new": 1}
        self.assertEqual(RELAYED, MigrationSummary.from_dict(record))

    def test_what_is_missing_or_of_another_kind_is_refused_by_name(self) -> None:
        def refusal(record: object) -> str:
            error = self.assertRaises(exception.SummaryError, MigrationSummary.from_dict, record)
            return str(error)

        self.assertIn("no JSON object", refusal([1]))
        whole = RELAYED.to_dict()
        self.assertIn("no instance", refusal({k: v for k, v in whole.items() if k != "instance"}))
        wrong: dict[str, Any] = {
            "id": "../../etc/passwd",
            "state": "well",
            "mode": ["dmigrate"],
            "domain": None,
            "total_s": "14",
            "downtime_ms": True,
            "wire_bytes": 1.5,
            "error": 5,
            "phases": {"bulk": "long"},
            "findings": [{"code": "x", "severity": "loud", "message": "y"}],
            "series": {"source": [1]},
            "libvirt": [],
        }
        for name, value in wrong.items():
            stem = name.removesuffix("s")
            self.assertIn(stem, refusal({**whole, name: value}), name)


class SentenceTest(base.TestCase):
    def test_a_migration_through_the_relays_tells_its_figures(self) -> None:
        self.assertEqual(
            "Migration of db1 (5b1a4e0e-6c53-4d7c-9f3e-3c1f4f0d9a11) from compute1 to compute2"
            " completed in 14.5 s through the relays: downtime 87 ms, 620 MiB over the network,"
            " 310 MiB saved by compression,"
            " 930 MiB from volumes, 238080 pages by reference, 1204 misses",
            RELAYED.sentence(),
        )

    def test_an_ordinary_migration_tells_why(self) -> None:
        sentence = ORDINARY.sentence()
        self.assertIn("in the ordinary way, because the agent of db1 does not answer", sentence)
        self.assertNotIn("volumes", sentence)

    def test_a_failure_tells_why(self) -> None:
        failed = dataclasses.replace(RELAYED, state="failed", error="the disk burns")
        self.assertIn("failed after 14.5 s through the relays: the disk burns", failed.sentence())
        cancelled = dataclasses.replace(ORDINARY, state="cancelled", error="interrupted")
        self.assertIn("was cancelled after", cancelled.sentence())
        self.assertIn("because the agent of db1 does not answer: interr", cancelled.sentence())

    def test_a_downtime_that_is_not_known_is_not_made_up(self) -> None:
        self.assertIn("downtime unknown", dataclasses.replace(RELAYED, downtime_ms=None).sentence())

    def test_a_sentence_is_one_line_without_control_characters(self) -> None:
        torn = dataclasses.replace(ORDINARY, state="failed", error="one\ntwo \x1b[31m\n")
        self.assertTrue(torn.sentence().endswith(": one two [31m"), torn.sentence())


class RequestTest(base.TestCase):
    def test_a_negative_number_is_refused_by_name(self) -> None:
        for name in ("max_downtime_ms", "network_bandwidth", "volume_bandwidth", "wait_seconds"):
            error = self.assertRaises(exception.ConfigurationError, MigrationRequest, **{name: -1})
            self.assertIn(name, str(error))

    def test_no_downtime_at_all_cannot_be_asked_for(self) -> None:
        error = self.assertRaises(exception.ConfigurationError, MigrationRequest, max_downtime_ms=0)
        self.assertIn("max_downtime_ms is 0, less than 1", str(error))
