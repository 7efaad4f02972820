# SPDX-License-Identifier: Apache-2.0
"""Migrations in which a relay, or QEMU itself, hangs: nobody waits for it without end."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fixtures
import libvirt

from nova_dmigrate.migration import orchestrator, stall
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.request import Mode
from nova_dmigrate.migration.summary import COMPLETED, DMIGRATE, FAILED, ORDINARY, MigrationSummary
from tests import base
from tests.lab import database_image, processes
from tests.lab.demo.drills import CHANGES
from tests.lab.demo.scene import Scene, small_scene
from tests.lab.relays import wait_until

#: MB/s, so that there is time in the middle, and bytes of the guest before it.
_SLOW, _MIDDLE = 30, 48 << 20
#: Seconds, in place of those for which whoever migrates waits as a rule.
_PATIENCE = 4.0


class HangsTest(base.TestCase):
    """The tests share a guest, which each of them leaves on one host or the other."""

    _class: ClassVar[contextlib.ExitStack]
    directory: ClassVar[Path]
    scene: ClassVar[Scene]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        base.require(database_image.unavailable())
        cls._class = contextlib.ExitStack()
        try:
            cls.directory = cls._class.enter_context(processes.workspace())
            cls.scene = cls._class.enter_context(small_scene(cls.directory))
            # Where QEMU is stopped nobody answers in the guest
            cls._class.enter_context(
                cls.scene.services.operating(migration__prepare_time=0, migration__agent_timeout=8)
            )
        except BaseException:
            cls._class.close()
            raise

    @classmethod
    def tearDownClass(cls) -> None:
        cls._class.close()
        super().tearDownClass()

    def setUp(self) -> None:
        super().setUp()
        self.source = self.scene.domain.host
        self.destination = self.scene.hosts.other(self.source)
        self.stopped: list[int] = []
        self.addCleanup(self.go_on)
        self.addCleanup(self.scene.hosts.shape, None)
        self.addOnException(lambda _: print(self.scene.services.last_words()))

    def stop(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self.stopped.append(pid)

    def go_on(self) -> None:
        while self.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.stopped.pop(), signal.SIGCONT)

    def migrate(
        self,
        in_the_middle: Callable[[], None],
        cancelled: threading.Event | None = None,
        **options: Any,
    ) -> MigrationSummary:
        """Have the guest migrated over a slow network, and something happen once meanwhile."""
        happened = threading.Event()

        def on_progress(progress: Progress) -> None:
            if progress.phase == "migrating" and progress.guest_bytes > _MIDDLE:
                if not happened.is_set():
                    happened.set()
                    in_the_middle()

        self.scene.hosts.shape(_SLOW)
        summary = self.scene.migrate(cancelled=cancelled, on_progress=on_progress, **options)
        self.scene.hosts.shape(None)
        self.assertTrue(happened.is_set(), summary)
        return summary

    def patience(self, module: Any, **seconds: float) -> None:
        for name, value in seconds.items():
            self.useFixture(fixtures.MonkeyPatch(f"{module.__name__}.{name}", value))

    # Relays

    def stop_the_relay(self) -> None:
        self.scene.hosts.shape(None)  # what is tried next need not be slow
        relays = self.scene.relays(self.source)
        self.assertEqual(1, len(relays))
        self.stop(*relays)

    def assert_ordinary(self, summary: MigrationSummary, why: str) -> None:
        found = (summary.state, summary.mode, summary.fallback_reason)
        self.assertEqual((COMPLETED, ORDINARY, "relay-failed"), found, summary)
        self.assertIn(why, str(summary.fallback_message))
        self.assertEqual([], self.scene.trouble(summary))

    def test_a_relay_that_hangs_is_given_up_when_the_other_one_has(self) -> None:
        with self.scene.services.changed(self.destination, relay__stall_timeout=2):
            summary = self.migrate(self.stop_the_relay)
            self.assert_ordinary(summary, "destination relay: ")

    def test_a_relay_that_hangs_is_given_up_when_nothing_is_told_nor_moves(self) -> None:
        self.patience(stall, _MARGIN=_PATIENCE)
        with self.scene.services.operating(relay__stall_timeout=2):
            summary = self.migrate(self.stop_the_relay)
        self.assert_ordinary(summary, "source relay: it tells nothing")

    def test_one_that_hangs_at_the_switchover_does_not_hold_the_guest(self) -> None:
        self.patience(stall, _GRACE=1.0, HUNG_PATIENCE=_PATIENCE)
        self.scene.guest.run(CHANGES.format(16))  # much to send while it is paused
        paused = threading.Event()

        def stop_when_paused() -> None:
            domain = self.scene.domain.on(self.source)
            while domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                time.sleep(0.01)
            self.stop_the_relay()
            paused.set()

        thread = threading.Thread(target=stop_when_paused, daemon=True)
        with self.scene.services.changed(self.destination, relay__stall_timeout=2):
            summary = self.migrate(thread.start, max_downtime_ms=20000)
            self.assertTrue(paused.is_set(), summary)
            self.assert_ordinary(summary, "destination relay: ")
        self.scene.guest.run("rm /tmp/changes")

    def test_a_service_that_is_away_ends_nothing(self) -> None:
        self.patience(stall, _MARGIN=_PATIENCE - 2)
        services, hosts = self.scene.services, self.scene.hosts
        is_back = threading.Event()

        def come_back() -> None:
            is_back.set()
            services.start(self.source)
            hosts.shape(None)

        away = threading.Timer(3 * _PATIENCE, come_back)

        def strike() -> None:
            hosts.shape(_SLOW / 15)  # so that memory moves until it is back
            services.kill(self.source)
            away.start()

        with services.operating(relay__stall_timeout=2, migration__host_timeout=1):
            summary = self.migrate(strike)
        self.assertTrue(is_back.is_set(), summary)
        away.join()
        self.assertEqual((COMPLETED, DMIGRATE), (summary.state, summary.mode), summary)
        self.assertEqual([], self.scene.trouble(summary))

    # QEMU

    def cancel_while_qemu_hangs(self, **options: Any) -> MigrationSummary:
        self.patience(orchestrator, _CANCEL_PATIENCE=_PATIENCE, _LAST_PATIENCE=1.0)
        cancelled = threading.Event()
        moment: list[float] = []

        def hang() -> None:
            self.stop(self.scene.guest.pid)
            moment.append(time.monotonic())
            cancelled.set()

        summary = self.migrate(hang, cancelled, **options)
        self.assertGreater(time.monotonic(), moment[0] + _PATIENCE)
        self.assertEqual(FAILED, summary.state, summary)
        self.assertIn("libvirt does not end it", str(summary.error))
        self.assertTrue((self.directory / "history" / f"{summary.id}.json").exists())
        self.go_on()
        return summary

    def test_a_cancelled_one_is_not_waited_for_though_qemu_hangs(self) -> None:
        summary = self.cancel_while_qemu_hangs()
        # Its relays are gone
        self.assertEqual([], self.scene.trouble(summary))

    def test_nor_is_an_ordinary_one(self) -> None:
        summary = self.cancel_while_qemu_hangs(mode=Mode.ORDINARY)
        # libvirt may have heard of it, or not
        wait_until(lambda: len(self.running()) == 1 and not self.has_job(), "it has an end")
        if self.running() == [self.destination.name]:
            summary = dataclasses.replace(summary, state=COMPLETED)
        self.assertEqual([], self.scene.trouble(summary))

    def running(self) -> list[str]:
        """The hosts that have the domain, running or not."""
        found = []
        for host in (self.source, self.destination):
            with contextlib.closing(host.connect()) as connection:
                found += [host.name for _ in connection.listAllDomains()]
        return found

    def has_job(self) -> bool:
        """Whether the domain is still migrated, as its source says."""
        try:
            domain = self.scene.domain.on(self.source)
            return bool(domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
        except libvirt.libvirtError:
            return False
