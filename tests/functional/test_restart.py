# SPDX-License-Identifier: Apache-2.0
"""A nova-compute that is started again while libvirt migrates.

That of the source is killed before. In one process with all the others these are its threads, each
of which ends where it next asks libvirt or a host service for something.
"""

import os
import sys
import threading
import time
import traceback
import unittest
from pathlib import Path
from typing import Any

import fixtures
from futurist._thread import ThreadWorker
from nova.tests.fixtures import libvirt as fakelibvirt
from nova.virt.libvirt.guest import Guest

from nova_dmigrate.rpc.broker import BrokerTransport
from tests.functional import base
from tests.functional.base import Killed

_TWO_DAYS = 2 * 24 * 3600
_EVENTLET = sys.modules.get("eventlet")


def told_unless_killed(details: Any) -> None:
    if details.exc_type is not Killed:
        threading.__excepthook__(details)


@unittest.skipIf(_EVENTLET and _EVENTLET.patcher.is_monkey_patched("thread"), "no native threads")
class SourceTest(base.MigrationTest):
    def setUp(self):
        super().setUp()
        self.killed: set[threading.Thread] = set()
        # Whatever has gone wrong, none of them may go on for ever
        self.addCleanup(lambda: self.killed.update(threading.enumerate()))
        for owner, name in ((Guest, "get_job_info"), (BrokerTransport, "call")):
            self.useFixture(fixtures.MonkeyPatch(*self.ending(owner, name)))
        self.useFixture(fixtures.MonkeyPatch("threading.excepthook", told_unless_killed))

    def ending(self, owner: type, name: str) -> tuple[str, Any]:
        """What a killed thread comes to no more."""
        original = getattr(owner, name)

        def ask(*arguments: Any, **options: Any) -> Any:
            self.end_if_killed()
            return original(*arguments, **options)

        return f"{owner.__module__}.{owner.__name__}.{name}", ask

    def end_if_killed(self) -> None:
        if threading.current_thread() in self.killed:
            raise Killed

    def kill(self) -> None:
        """Nothing that the source's compute has begun goes on."""
        self.killed.update(set(threading.enumerate()) - {threading.main_thread()})
        self.wait_for(lambda: not self.migrating())
        # The pools, which all computes of this process share, go on with their threads
        self.killed.difference_update(
            [each for each in self.killed if isinstance(each, ThreadWorker)]
        )

    def migrating(self) -> bool:
        """Whether Nova's monitor or its operation still run in one of those that are killed."""
        frames = sys._current_frames()
        return any(
            frame.f_code.co_name.startswith("_live_migration")
            for thread in self.killed
            if thread.ident in frames
            for frame, _ in traceback.walk_stack(frames[thread.ident])
        )

    def libvirt_goes_on(self) -> None:
        while True:
            self.end_if_killed()
            time.sleep(0.05)

    def left_behind(self) -> list[Path]:
        return sorted((self.directory / "state/maps").iterdir())

    def test_the_sources_aborts_it_and_the_server_stays_and_can_be_migrated(self):
        self.during = self.libvirt_goes_on
        server = self.make_server()
        self.migrate(server)
        self._wait_for_migration_status(server, ["running"])
        self.wait_for(lambda: self.hosts["src"].maps)
        self.kill()
        self.assertFalse(self.aborted.is_set())
        self.src = self.restart_compute_service("src")

        self._wait_for_migration_status(server, ["error"])
        self.assertTrue(self.aborted.is_set())
        self.domain(server)._job_type = fakelibvirt.VIR_DOMAIN_JOB_NONE
        server = self._wait_for_state_change(server, "ACTIVE")
        self.assertEqual("src", self.host_of(server))
        self.assertEqual({}, self.src.driver._relaying)
        # Nobody is left who could close them: the host services do so when the lease is over
        for host in self.hosts.values():
            self.assertEqual([], host.closed)
            self.assertLessEqual(host.orders[0].lease_seconds, 60)

        # Of the files nobody knows any more; a day later they are not somebody's at work
        for path in self.left_behind():
            then = time.time() - _TWO_DAYS
            os.utime(path, (then, then))
        self.during = lambda: None
        self.move(server)
        self.event(server)
        self.assertEqual("dest", self.host_of(server))
        self.assertTrue(self.calls[1]["migrate_uri"].startswith("unix:"))
        self.assertNotEqual(self.calls[0]["migrate_uri"], self.calls[1]["migrate_uri"])
        self.wait_for(lambda: not self.left_behind())


class DestinationTest(base.MigrationTest):
    def test_a_restart_of_the_destinations_does_not_disturb_it(self):
        def during() -> None:
            self.dest = self.restart_compute_service("dest")

        self.during = during
        server = self.make_server()
        self.move(server)
        self.assertEqual("dest", self.host_of(server))
        self.assertTrue(self.calls[0]["migrate_uri"].startswith("unix:"))
        self.event(server)
        for host in self.hosts.values():
            self.assertEqual([host.orders[0].session_id], host.closed)
