# SPDX-License-Identifier: Apache-2.0
"""Relays that tell nothing any more while libvirt's job does not go on either."""

import threading
import time
from typing import Any

import fixtures
from nova.tests.fixtures import libvirt as fakelibvirt

from nova_dmigrate.migration.fallback import because
from tests.functional import base

#: Seconds in which Nova's monitor looks more than once.
_A_WHILE = 2


class HungTest(base.MigrationTest):
    """The stand-in of the source relay always says the same: it tells nothing new."""

    STALL_TIMEOUT = 2

    def setUp(self):
        super().setUp()
        stall = "nova_dmigrate.migration.stall."
        self.useFixture(fixtures.MonkeyPatch(stall + "_MARGIN", 0))
        self.useFixture(fixtures.MonkeyPatch(stall + "HUNG_PATIENCE", 1))
        self.during = self.hang

    def hang(self) -> None:
        """Nothing moves in the first job, until that is aborted."""
        if len(self.calls) == 1:
            self.assertTrue(self.aborted.wait(30))
            self.end()

    def end(self) -> None:
        """libvirt has the destination clean up, and tells how the job has ended before its call
        returns."""
        self.domain(self.server)._job_type = fakelibvirt.VIR_DOMAIN_JOB_CANCELLED
        time.sleep(_A_WHILE)
        self.libvirt_fails("operation aborted: migration out job: canceled by client")

    def assert_ordinary(self, server: Any) -> None:
        """It has become the ordinary migration, for which Nova has put nothing back."""
        self.move(server)
        first, second = self.calls
        self.assertTrue(first["migrate_uri"].startswith("unix:"))
        self.assertNotIn("migrate_uri", second)
        event = self.event(server)
        self.assertEqual("Success", event["result"])
        (summary,) = self.summaries()
        self.assertEqual(("ordinary", "completed"), (summary.mode, summary.state))
        self.assertEqual("relay-failed", summary.fallback_reason)
        self.assertIn("source relay: it tells nothing", summary.fallback_message)
        for word in ("has aborted", "was cancelled"):
            self.assertNotIn(f"Migration operation {word}", self.stdlog.logger.output)
        self.assert_closed()


class PreferredTest(HungTest):
    def test_they_are_given_up_and_the_ordinary_migration_follows(self):
        self.assert_ordinary(self.make_server())

    def test_they_are_ended_where_libvirt_cannot_end_its_job_for_them(self):
        def abort(domain: Any) -> None:
            self.aborted.set()
            self.assertTrue(closed.wait(30))

        def hang() -> None:
            if len(self.calls) == 1:
                self.wait_for(lambda: self.hosts["src"].closed)
                self.assertTrue(self.aborted.is_set())
                closed.set()
                self.end()

        closed = threading.Event()
        self.useFixture(fixtures.MonkeyPatch("nova.tests.fixtures.libvirt.Domain.abortJob", abort))
        self.during = hang
        self.assert_ordinary(self.make_server())

    def test_an_operator_who_aborts_it_meanwhile_has_it_cancelled(self):
        server = self.make_server()
        aborted_twice = threading.Event()

        def hang() -> None:
            self.assertTrue(self.aborted.wait(30))  # by us
            self.assertTrue(aborted_twice.wait(30))
            self.end()

        self.during = hang
        self.migrate(server)
        migration = self._wait_for_migration_status(server, ["running"])
        self.wait_for(self.aborted.is_set)
        self.api.api_delete(f"/servers/{server['id']}/migrations/{migration['id']}")
        aborted_twice.set()
        event = self.event(server)
        self.settled(server)
        self.assertEqual("Error", event["result"])
        (summary,) = self.summaries()
        self.assertEqual("cancelled", summary.state)
        self.assertEqual(1, len(self.calls))
        self.assertEqual("src", self.host_of(server))
        self.assert_closed()

    def test_one_who_aborts_it_when_the_ordinary_one_is_about_to_follow_as_well(self):
        def abort_first(*arguments: Any, **details: Any) -> Any:
            self.api.api_delete(f"/servers/{server['id']}/migrations/{migration['id']}")
            return because(*arguments, **details)

        self.useFixture(fixtures.MonkeyPatch("nova_dmigrate.virt.relaying.because", abort_first))
        server = self.make_server()
        self.migrate(server)
        migration = self._wait_for_migration_status(server, ["running"])
        self.assertEqual("cancelled", self.settled(server))
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])
        self.assertEqual("src", self.host_of(server))
        self.event(server)
        self.assertEqual("cancelled", self.summaries()[0].state)
        self.assertEqual(1, len(self.calls))


class PostCopyTest(HungTest):
    def setUp(self):
        self.flags(live_migration_permit_post_copy=True, group="libvirt")
        super().setUp()

    def test_a_guest_that_may_run_at_the_destination_is_left_alone(self):
        def hang() -> None:
            self.assertTrue(self.paused.wait(20))
            time.sleep(self.STALL_TIMEOUT + 2 * _A_WHILE)
            self.assertFalse(self.aborted.is_set())
            self.assertEqual([], self.hosts["src"].closed)

        self.during = hang
        server = self.make_server()
        self.migrate(server)
        migration = self._wait_for_migration_status(server, ["running"])
        self.wait_for(lambda: self.calls)
        path = f"/servers/{server['id']}/migrations/{migration['id']}/action"
        self.api.api_post(path, {"force_complete": None})
        self._wait_for_migration_status(server, ["completed"])
        self.assertEqual("dest", self.host_of(server))
        self.event(server)
        self.assertEqual("dmigrate", self.summaries()[0].mode)


class RequiredTest(HungTest):
    EXTRA_SPECS = {"dmigrate:policy": "required"}

    def test_it_fails_for_that_reason_and_the_server_is_not_broken(self):
        self.hosts["src"].progress["map"] = "offered"
        server = self.make_server()
        self.migrate(server)
        self.assertEqual("failed", self.settled(server))
        self.assertEqual("ACTIVE", self.api.get_server(server["id"])["status"])
        self.assertEqual("src", self.host_of(server))
        (call,) = self.calls
        self.assertTrue(call["migrate_uri"].startswith("unix:"))
        event = self.event(server)
        self.assertEqual("Error", event["result"])
        self.assertIn("source relay: it tells nothing", event["details"])
        (summary,) = self.summaries()
        self.assertEqual(("dmigrate", "failed"), (summary.mode, summary.state))
        self.assertIn("canceled by client", summary.error)
        self.assert_closed()
