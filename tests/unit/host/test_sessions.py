# SPDX-License-Identifier: Apache-2.0
"""The sessions of a host, whose relays are processes that do nothing."""

import sys
import time
from collections.abc import Sequence

from nova_dmigrate import exception
from nova_dmigrate.host.capacity import Limits
from nova_dmigrate.host.session import SessionSettings
from nova_dmigrate.host.sessions import Sessions
from nova_dmigrate.host.store import Record, Store
from nova_dmigrate.rpc import host_messages
from tests import base

IDLE = (sys.executable, "-c", "import signal; signal.pause()")


class SessionsTest(base.TestCase):
    def make(self, command: Sequence[str] = IDLE) -> Sessions:
        self.directory = self.make_directory()
        store = Store(self.directory / "state", self.directory / "run")
        self.addCleanup(store.close)
        made = Sessions(SessionSettings(command, Limits(max_relays=1), "192.0.2.1"), store)
        self.addCleanup(self.end_all, made)
        return made

    def end_all(self, sessions: Sessions) -> None:
        while sessions._sessions:
            sessions.close(next(iter(sessions._sessions)))

    def record(self, name: str, wait: float = 60.0) -> Record:
        socket = str(self.directory / name)
        now = time.time()
        return Record(name, "m", "i", "destination", {}, socket, None, 0, 0, 60, wait, now)

    def test_one_whose_turn_comes_while_it_is_closed_is_not_started(self) -> None:
        sessions = self.make()
        self.assertEqual("starting", sessions.open(self.record("first")).state)
        self.assertEqual("queued", sessions.open(self.record("second")).state)
        second = sessions._sessions["second"]
        end = second.end

        def end_as_its_turn_comes() -> None:
            end()
            sessions.close("first")
            sessions._tick()

        second.end = end_as_its_turn_comes  # type: ignore[method-assign]
        self.assertEqual("cancelled", sessions.close("second").state)
        self.assertEqual(0, sessions.running)
        self.assertRaises(exception.RequestRefused, sessions.session, "second")

    def test_one_that_waits_in_vain_says_so(self) -> None:
        sessions = self.make()
        sessions.open(self.record("first"))
        sessions.open(self.record("second", wait=0.0))
        sessions._tick()
        state = sessions.session("second")
        self.assertEqual("failed", state.state)
        self.assertEqual(f"{host_messages.NO_ROOM}: 1 destination relays run", state.message)

    def test_one_that_cannot_be_started_does_not(self) -> None:
        sessions = self.make(command=["/nonexistent/relay"])
        state = sessions.open(self.record("first"))
        self.assertEqual("failed", state.state)
        self.assertIn("cannot be started", state.message)
