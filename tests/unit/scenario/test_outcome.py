# SPDX-License-Identifier: Apache-2.0
"""The scenario tests understand what the driver tells."""

import dataclasses
from typing import Any

from nova_dmigrate.migration import summary
from nova_dmigrate.migration.fallback import Reason
from nova_dmigrate.migration.summary import MigrationSummary
from tests import base
from tests.scenario import outcome

DONE = MigrationSummary(
    id=summary.new_id(),
    instance="5f3c9f6e-6d0c-4a39-9c66-0f1a2b3c4d5e",
    domain="instance-0000002a",
    source="compute1",
    destination="compute-2.example.org",
    mode=summary.DMIGRATE,
    state=summary.COMPLETED,
    started="2030-01-01T00:00:00+00:00",
    total_s=12.34,
)


def event(details: str, result: str | None = "Success", name: str = outcome.EVENT) -> Any:
    return {"event": name, "result": result, "details": details}


class SentenceTest(base.TestCase):
    def parse(self, **changes: Any) -> outcome.Outcome:
        return outcome.parse(dataclasses.replace(DONE, **changes).sentence())

    def test_a_migration_through_the_relays(self) -> None:
        found = self.parse(downtime_ms=300.0)
        self.assertEqual(("compute1", "compute-2.example.org"), (found.source, found.destination))
        self.assertEqual(("completed", True, None), (found.state, found.by_dmigrate, found.reason))

    def test_how_many_references_came_to_nothing(self) -> None:
        found = self.parse(pages_referenced=900, misses=17)
        self.assertEqual((900, 17), (found.references, found.misses))
        sentence = found.sentence.replace("900 pages by reference, 17 misses", "900 pages by refe")
        found = outcome.parse(sentence)
        self.assertEqual((900, 0), (found.references, found.misses))
        self.assertEqual(0, self.parse(mode=summary.ORDINARY).references)

    def test_relays_that_did_without_the_volumes_are_not_the_real_thing(self) -> None:
        found = self.parse(
            fallback_reason="late-map",
            fallback_message="the buffer map came when the memory had been sent",
        )
        self.assertTrue(found.relayed)
        self.assertFalse(found.by_dmigrate)
        self.assertEqual("the buffer map came when the memory had been sent", found.reason)

    def test_an_ordinary_migration_says_why_whatever_the_reason(self) -> None:
        for reason in Reason:
            found = self.parse(
                mode=summary.ORDINARY,
                fallback_reason=reason.code,
                fallback_message=reason.sentence,
            )
            self.assertFalse(found.by_dmigrate)
            self.assertTrue(found.reason)
            self.assertTrue(reason.sentence.startswith(found.reason or "?"))

    def test_how_it_ended(self) -> None:
        for state in (summary.COMPLETED, summary.FAILED, summary.CANCELLED):
            self.assertEqual(state, self.parse(state=state, error="it was so").state)

    def test_a_sentence_that_novas_database_has_cut_is_understood(self) -> None:
        long = dataclasses.replace(
            DONE, mode=summary.ORDINARY, fallback_reason="no-volumes", fallback_message="d" * 500
        )
        self.assertEqual("d", (outcome.parse(long.sentence()[:255]).reason or "")[-1])

    def test_something_else_is_an_error(self) -> None:
        for text in ("", "Migration of instance-1 went well"):
            self.assertRaises(ValueError, outcome.parse, text)


class EventsTest(base.TestCase):
    def test_the_drivers_event_is_found_among_novas(self) -> None:
        events = [
            event("", name="compute_live_migration"),
            event(DONE.sentence()),
            event("", name="conductor_live_migrate_instance"),
        ]
        found = outcome.of(events)
        assert found is not None
        self.assertTrue(found.by_dmigrate)

    def test_without_it_nothing_is_said(self) -> None:
        self.assertIsNone(outcome.of([event("", name="compute_live_migration")]))

    def test_an_event_that_is_not_over_says_nothing_yet(self) -> None:
        self.assertIsNone(outcome.of([event("", result=None)]))

    def test_a_refusal_is_found_in_novas_event_and_in_the_drivers(self) -> None:
        early = "Migration pre-check error: nova-dmigrate is required, but the guest has no agent"
        late = dataclasses.replace(
            DONE, state=summary.FAILED, error="required, but no relay is free"
        ).sentence()
        name = "compute_check_can_live_migrate_destination"
        self.assertEqual(early, outcome.refusal([event(early, "Error", name)]))
        self.assertEqual(late, outcome.refusal([event(early, "Error", name), event(late, "Error")]))

    def test_another_failure_is_no_refusal(self) -> None:
        failed = dataclasses.replace(DONE, state=summary.FAILED, error="the network").sentence()
        self.assertIsNone(outcome.refusal([event(failed, "Error")]))
        self.assertIsNone(outcome.refusal([event(DONE.sentence())]))


class NewestTest(base.TestCase):
    def test_what_was_known_is_not_new(self) -> None:
        entries = [{"id": 3}, {"id": 2}]
        self.assertEqual({"id": 3}, outcome.newest(entries, "id", frozenset({2})))
        self.assertIsNone(outcome.newest(entries, "id", frozenset({2, 3})))

    def test_two_new_ones_are_an_error(self) -> None:
        entries = [{"id": 3}, {"id": 2}]
        self.assertRaises(ValueError, outcome.newest, entries, "id", frozenset())
