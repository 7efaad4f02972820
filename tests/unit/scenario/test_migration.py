# SPDX-License-Identifier: Apache-2.0
"""One migration as the scenario tests see it, in a cloud that does what is written for it."""

from collections.abc import Callable
from typing import Any

from tests import base
from tests.scenario import migration, outcome, waiting
from tests.unit.scenario.test_outcome import DONE, event

SERVER = "5f3c9f6e-6d0c-4a39-9c66-0f1a2b3c4d5e"


class WrittenCloud:
    """Each status of the migration lasts for one question."""

    def __init__(self, statuses: list[str], events: list[list[Any]]) -> None:
        self.statuses, self.written = statuses, events
        self.begun = False
        self.aborts: list[int] = []
        self.takes_aborts = True

    def live_migrate(self, server: str) -> None:
        self.begun = True

    def abort(self, server: str, migration: int) -> bool:
        self.aborts.append(migration)
        if self.takes_aborts:
            self.statuses = ["running", "cancelled"]
        return self.takes_aborts

    def migrations(self, server: str) -> list[dict[str, Any]]:
        old = [{"id": 6, "status": "completed"}]
        if not self.begun:
            return old
        status = self.statuses[0]
        self.statuses = self.statuses[1:] or self.statuses
        return [*old, {"id": 7, "status": status}] if status else old

    def actions(self, server: str) -> list[dict[str, Any]]:
        old = [{"request_id": "req-old"}]
        return [{"request_id": "req-new"}, *old] if self.begun else old

    def events(self, server: str, request_id: str) -> list[dict[str, Any]]:
        assert request_id == "req-new"
        events = self.written[0]
        self.written = self.written[1:] or self.written
        return events

    def host_of(self, server: str) -> str:
        return "compute2" if self.statuses == ["completed"] and self.begun else "compute1"

    def wait_for(self, what: str, condition: Callable[[], Any]) -> Any:
        return waiting.wait_for(what, condition, seconds=0.2, pause=0.001)


NOVAS = event("", name="compute_live_migration")
DRIVERS = event(DONE.sentence())


class MoveTest(base.TestCase):
    def test_a_server_that_moves(self) -> None:
        cloud = WrittenCloud(["", "preparing", "running", "completed"], [[NOVAS, DRIVERS]])
        moved = migration.move(cloud, SERVER, told=True)
        self.assertEqual(("compute1", "compute2", "completed"), (*_ways(moved), moved.status))
        assert moved.outcome is not None
        self.assertTrue(moved.outcome.by_dmigrate)
        self.assertIn("through the relays", str(moved))

    def test_events_that_come_later_are_waited_for(self) -> None:
        open_ones = [event("", result=None, name="compute_live_migration"), DRIVERS]
        cloud = WrittenCloud(["completed"], [[], [NOVAS], open_ones, [NOVAS, DRIVERS]])
        self.assertEqual((NOVAS, DRIVERS), migration.move(cloud, SERVER, told=True).events)

    def test_of_novas_own_migration_nothing_more_is_expected(self) -> None:
        cloud = WrittenCloud(["completed"], [[NOVAS]])
        moved = migration.move(cloud, SERVER, told=False)
        self.assertIsNone(moved.outcome)
        self.assertIn("the driver says nothing", str(moved))

    def test_a_driver_that_says_nothing_is_an_error_with_the_name_of_its_event(self) -> None:
        cloud = WrittenCloud(["completed"], [[NOVAS]])
        error = self.assertRaises(AssertionError, migration.move, cloud, SERVER, told=True)
        self.assertIn(outcome.EVENT, str(error))

    def test_a_migration_that_never_ends_is_an_error(self) -> None:
        cloud = WrittenCloud(["running"], [[NOVAS]])
        error = self.assertRaises(AssertionError, migration.move, cloud, SERVER, told=True)
        self.assertIn(f"the migration of server {SERVER}", str(error))

    def test_a_refusal_is_told_enough(self) -> None:
        name = "compute_check_can_live_migrate_destination"
        said = event("nova-dmigrate is required, but there is no agent", "Error", name)
        moved = migration.move(WrittenCloud(["error"], [[said]]), SERVER, told=True)
        self.assertEqual(("compute1", "compute1", "error"), (*_ways(moved), moved.status))
        self.assertEqual(said["details"], moved.refusal)

    def test_what_fails_before_the_driver_has_a_say_is_not_waited_for(self) -> None:
        failed = event("no such volume", "Error", "compute_pre_live_migration")
        moved = migration.move(WrittenCloud(["error"], [[NOVAS, failed]]), SERVER, told=True)
        self.assertEqual((None, None), (moved.outcome, moved.refusal))
        self.assertIn("compute_pre_live_migration: no such volume", str(moved))

    def test_an_abort_is_ordered_once_and_when_it_runs(self) -> None:
        cloud = WrittenCloud(["accepted", "preparing", "running"], [[NOVAS, DRIVERS]])
        moved = migration.move(cloud, SERVER, told=True, abort=True)
        self.assertEqual([7], cloud.aborts)
        self.assertEqual((True, "cancelled"), (moved.aborted, moved.status))

    def test_an_abort_that_nova_does_not_take_is_told(self) -> None:
        cloud = WrittenCloud(["running", "running", "completed"], [[NOVAS, DRIVERS]])
        cloud.takes_aborts = False
        moved = migration.move(cloud, SERVER, told=True, abort=True)
        self.assertEqual([7, 7], cloud.aborts)
        self.assertEqual((False, "completed"), (moved.aborted, moved.status))


class WaitingTest(base.TestCase):
    def test_what_comes_is_returned(self) -> None:
        answers = iter([None, "", "there"])
        found = waiting.wait_for("it", lambda: next(answers), seconds=60, pause=0)
        self.assertEqual("there", found)

    def test_what_does_not_come_is_named(self) -> None:
        error = self.assertRaises(AssertionError, waiting.wait_for, "it", lambda: False, 0)
        self.assertIn("for it in vain", str(error))


def _ways(moved: migration.Move) -> tuple[str, str]:
    return moved.source, moved.host
