# SPDX-License-Identifier: Apache-2.0
"""The relays of a migration as its caller sees them."""

import json
from pathlib import Path

from nova_dmigrate import exception
from nova_dmigrate.migration.sessions import RelaySessions, Terms
from nova_dmigrate.rpc import host_messages
from nova_dmigrate.volumes import VolumeSpec
from tests import base
from tests.unit.migration.scripted import Host

LOST = exception.HostUnreachable(host="one", reason="no answer in time")


class RelaySessionsTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.source, self.destination = Host("one", "source"), Host("two", "destination")
        self.sessions = RelaySessions(
            "m",
            "i",
            self.source.client(),
            self.destination.client(),
            Path("/run/q"),
            guest_memory=0,
            lease=60.0,
            terms=Terms(None, None, None, 0, 0, patience=60.0),
        )
        self.addCleanup(self.sessions.close)

    def open(self) -> None:
        self.sessions.order_destination((), waiting=lambda: None)
        self.sessions.order_source(None, connected=False, waiting=lambda: None)
        self.sessions.open(waiting=lambda: None)

    def test_a_failure_is_known_though_there_is_no_summary_of_it(self) -> None:
        self.open()
        self.source.changes.update(state="failed", message="the relay was killed")
        self.source.answers["summary"] = LOST
        self.assertEqual({"destination"}, set(self.sessions.close()))
        self.assertEqual("source relay: the relay was killed", self.sessions.failure)

    def in_vain(self, message: str) -> exception.FallBack:
        """A relay that is queued, and then not to be had."""
        state = self.destination.answers["renew"]
        self.destination.changes.update(state="queued", queue_position=1)

        def fail(**arguments: object) -> object:
            self.destination.changes.update(state="failed", queue_position=0, message=message)
            return state(**arguments)

        self.destination.answers["renew"] = fail
        return self.assertRaises(exception.FallBack, self.open)

    def test_a_destination_that_can_read_no_volume_is_not_migrated_to_through_relays(self) -> None:
        volumes = [VolumeSpec(name, "block", f"/dev/{name}") for name in ("v", "w")]
        why = {each.volume_id: f"Volume {each.volume_id}: no access" for each in volumes}
        for troubles, told in ((why, True), ({"v": why["v"]}, False), ({}, False), (None, False)):
            self.destination.changes["progress"] = json.dumps({"volume_troubles": troubles})
            self.sessions.order_destination(volumes, waiting=lambda: None)
            try:
                self.sessions.order_source(None, connected=False, waiting=lambda: None)
            except exception.FallBack as reason:
                self.assertTrue(told, troubles)
                self.assertEqual("volumes-unreadable", reason.kwargs["code"])
                self.assertIn("host two can read none of the volumes: Volume v: no", str(reason))
                self.assertIn("Volume w: no access", str(reason))
            else:
                self.assertFalse(told, troubles)

    def test_who_waited_for_all_the_time_had_no_room(self) -> None:
        reason = self.in_vain(f"{host_messages.NO_ROOM}: 4 destination relays run")
        self.assertEqual("no-room", reason.kwargs["code"])
        self.assertIn("4 destination relays run", str(reason))

    def test_who_waited_when_the_host_was_stopped_is_told_so(self) -> None:
        reason = self.in_vain(host_messages.STOPPING)
        self.assertEqual("host-draining", reason.kwargs["code"])
        self.assertIn("host two", str(reason))

    def test_who_comes_when_the_host_is_being_stopped_is_told_so(self) -> None:
        refusal = {"code": host_messages.DRAINING, "message": host_messages.STOPPING}
        self.source.answers["open_source"] = {"error": refusal}
        reason = self.assertRaises(exception.FallBack, self.open)
        self.assertEqual("host-draining", reason.kwargs["code"])
        self.assertIn("host one", str(reason))

    def test_a_relay_that_cannot_be_started_has_failed_though_it_was_queued(self) -> None:
        reason = self.in_vain("the relay cannot be started: no such file")
        self.assertEqual("relay-failed", reason.kwargs["code"])
        self.assertIn("relay of host two: failed the relay cannot be started", str(reason))
