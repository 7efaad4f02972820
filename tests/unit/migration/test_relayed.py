# SPDX-License-Identifier: Apache-2.0
"""What is around libvirt's part of a migration, with hosts that answer or not."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import fixtures

from nova_dmigrate import exception
from nova_dmigrate.migration.account import Account
from nova_dmigrate.migration.job import Job
from nova_dmigrate.migration.relayed import Guest, Peers, RelayedMigration
from nova_dmigrate.migration.sessions import Terms
from nova_dmigrate.migration.settings import OrchestrationSettings
from nova_dmigrate.rpc import host_messages
from nova_dmigrate.rpc.client import AgentClient
from nova_dmigrate.volumes import VolumeSpec
from tests import base
from tests.unit.migration.scripted import MIB, Host, agent

LOST = exception.HostUnreachable(host="one", reason="no answer in time")
GONE = exception.AgentUnreachable(instance="i", reason="no answer in time")
PATIENCE = 60.0
#: What a relay says of itself when it has used its map.
USED = {"map": "taken", "mapped_pages": 256, "referenced_pages": 200, "guest_bytes": 9 * MIB}


class RelayedMigrationTest(base.TestCase):
    def make(
        self,
        layout: Callable[[], str] = lambda: "mtree",
        enter: Callable[[str], None] = lambda phase: None,
        summary: dict[str, Any] | None = None,
        agent: Callable[[], AgentClient] = agent,
        arrived: dict[str, Any] | None = None,
    ) -> RelayedMigration:
        self.source = Host("one", "source", summary)
        self.destination = Host("two", "destination", arrived)
        return RelayedMigration(
            "20261125-170301-abcdef",
            "i",
            Guest(2 * MIB, [VolumeSpec("v", "block", "/dev/v")], layout, runs_here=lambda: True),
            Peers(self.source.client(), self.destination.client(), lambda host: agent()),
            OrchestrationSettings(self.make_directory() / "maps"),
            Terms(None, None, None, 0, 0, patience=PATIENCE),
            "/run/nova-dmigrate",
            downtime_limit=300,
            enter=enter,
        )

    def hung(self) -> Callable[[], str]:
        """The question to a QEMU that does not answer until the test's end."""
        over = threading.Event()
        self.addCleanup(over.set)
        self.asked, self.answered = threading.Event(), threading.Event()

        def ask() -> str:
            self.asked.set()
            over.wait(PATIENCE)
            self.answered.set()
            return "mtree"

        return ask

    def test_a_qemu_that_does_not_answer_is_not_waited_for(self) -> None:
        self.useFixture(
            fixtures.MonkeyPatch("nova_dmigrate.migration.relayed._MONITOR_PATIENCE", 0.3)
        )
        relayed = self.make(layout=self.hung())
        reason = self.assertRaises(exception.FallBack, relayed.__enter__)
        self.assertEqual("memory-layout", reason.kwargs["code"])
        self.assertIn("there is no answer within 0.3 s", str(reason))

    def test_a_migration_is_cancelled_though_qemu_does_not_answer(self) -> None:
        def enter(phase: str) -> None:
            if self.asked.is_set():
                raise exception.MigrationCancelled(instance="i", reason="so it is")

        relayed = self.make(layout=self.hung(), enter=enter)
        self.assertRaises(exception.MigrationCancelled, relayed.__enter__)
        self.assertFalse(self.answered.is_set())

    def account(self) -> Account:
        return Account("20261125-170301-abcdef", "i", "i", "one", "two")

    def summary_of(
        self,
        last: dict[str, Any],
        summary: dict[str, Any],
        arrived: dict[str, Any] | None = None,
    ) -> Any:
        """Of a migration whose source's service cannot be asked after it has told ``last``.

        :param arrived: the destination relay's summary.
        """
        account = self.account()
        with self.make(summary=summary, arrived=arrived) as relayed:
            self.source.changes["progress"] = json.dumps(last)
            end = time.monotonic() + PATIENCE
            while relayed.follow(None) != last:
                self.assertLess(time.monotonic(), end)
            # One that is still being fetched when it is left has come too late
            assert relayed._mapping is not None
            self.assertTrue(relayed._mapping.wait(PATIENCE))
            self.source.answers["renew"] = LOST
            account.note_map(relayed, completed=True)
        account.note_relays(relayed)
        return account.summary("completed", None, None, Job())

    def test_what_a_relay_says_at_its_end_counts(self) -> None:
        told = self.summary_of({"map": "offered"}, USED)
        self.assertEqual((None, 200), (told.fallback_reason, told.pages_referenced))
        told = self.summary_of({"map": "offered"}, {"map": "refused", "guest_bytes": 9 * MIB})
        self.assertEqual("map-refused", told.fallback_reason)

    def test_what_it_has_told_counts_where_it_says_nothing_at_its_end(self) -> None:
        self.assertIsNone(self.summary_of(USED, {}).fallback_reason)
        self.assertEqual("late-map", self.summary_of({"map": "offered"}, {}).fallback_reason)

    def test_volumes_that_could_not_be_read_are_told_of(self) -> None:
        why = {"v": "Volume v: at 4096: Input/output error"}
        told = self.summary_of(USED, USED, {"volume_bytes": 0, "volume_troubles": why})
        self.assertEqual("volumes-unreadable", told.fallback_reason)
        self.assertIn("host two can read none of the volumes: Volume v", told.fallback_message)
        told = self.summary_of(USED, USED, {"volume_bytes": 4096, "volume_troubles": why})
        self.assertIsNone(told.fallback_reason)
        (finding,) = told.findings
        self.assertEqual(("volume-unreadable", "note"), (finding.code, finding.severity.value))
        self.assertEqual(f"{why['v']} (at the destination)", finding.message)
        # Of another volume nothing is known that would be wrong
        other = {"volume_bytes": 0, "volume_troubles": {"w": "Volume w: no access"}}
        self.assertIsNone(self.summary_of(USED, USED, other).fallback_reason)
        for nothing in ({}, {"volume_bytes": 0, "volume_troubles": {}}):
            told = self.summary_of(USED, USED, nothing)
            self.assertEqual((None, ()), (told.fallback_reason, told.findings))

    def undelivered(self, answer: Any, **last: Any) -> Any:
        """Of a migration whose map is there, while the source's service gives that answer when it
        is handed over.
        """
        account = self.account()
        with self.make() as relayed:
            self.source.answers["use_map"] = answer
            relayed._given = None  # whether or not it was there by then
            self.source.changes["progress"] = json.dumps(last)
            assert relayed._mapping is not None
            self.assertTrue(relayed._mapping.wait(PATIENCE))
            end = time.monotonic() + PATIENCE
            while relayed.follow(None) != last or relayed._sessions.map_pending is None:
                self.assertLess(time.monotonic(), end)
            account.note_map(relayed, completed=True)
        account.note_relays(relayed)
        return account.summary("completed", None, None, Job())

    def test_a_map_that_does_not_get_through_to_the_relay_has_not_come_late(self) -> None:
        busy = {"error": {"code": host_messages.RELAY_BUSY, "message": "it does not answer"}}
        for answer, code in ((LOST, "host-unreachable"), (busy, "host-refused")):
            self.assertEqual(code, self.undelivered(answer, map="none").fallback_reason)
        # It has got through: the answer was lost
        self.assertEqual("late-map", self.undelivered(LOST, map="offered").fallback_reason)

    def test_an_agent_that_goes_with_its_guest_makes_a_map_too_late(self) -> None:
        gone = threading.Event()

        def map_state(map_id: str) -> Any:
            return GONE if gone.is_set() else building

        building = {
            "result": {"map_id": "map", "state": "building", "chunks": 0, "pages": 0, "size": 0}
            | {"seconds": 0.0, "message": ""}
        }
        answers = {"map_begin": building, "map_state": map_state}
        account = self.account()
        with self.make(agent=lambda: agent(**answers)) as relayed:
            close = self.destination.answers["close"]

            def close_late(**arguments: str) -> Any:
                gone.set()
                assert relayed._mapping is not None
                self.assertTrue(relayed._mapping.wait(PATIENCE))
                return close(**arguments)

            self.destination.answers["close"] = close_late
            account.note_map(relayed, completed=True)
        account.note_relays(relayed)
        told = account.summary("completed", None, None, Job())
        self.assertEqual("late-map", told.fallback_reason)
