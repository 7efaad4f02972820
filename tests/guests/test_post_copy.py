# SPDX-License-Identifier: Apache-2.0
"""A migration that is in post-copy when whoever carries it out dies: the guest must not be lost."""

import contextlib
import dataclasses
import threading

import libvirt

from nova_dmigrate.migration.libvirt_guest import LibvirtGuest
from nova_dmigrate.migration.progress import Progress
from nova_dmigrate.migration.summary import COMPLETED, DMIGRATE, FAILED
from tests import base
from tests.lab import database_image, processes
from tests.lab.demo.scene import small_scene
from tests.lab.relays import wait_until

#: MB/s while it happens, so that post-copy lasts, and bytes of the guest before it.
_SLOW, _MIDDLE = 20, 48 << 20


class PostCopyTest(base.TestCase):
    def setUp(self) -> None:
        super().setUp()
        base.require(database_image.unavailable())
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.scene = stack.enter_context(small_scene(stack.enter_context(processes.workspace())))
        self.addOnException(lambda _: print(self.scene.services.last_words()))
        self.source = self.scene.domain.host
        self.destination = self.scene.hosts.other(self.source)

    def test_the_guest_survives_that_the_sources_libvirtd_is_killed(self) -> None:
        scene = self.scene
        struck = threading.Event()
        trouble: list[Exception] = []

        def strike() -> None:
            try:
                self.begin_post_copy()
                self.assertEqual([1, 1], self.relays())
                with LibvirtGuest(self.source.uri, scene.domain.name) as guest:
                    self.assertFalse(guest.runs_here)
                self.source.kill_libvirtd()
                self.source.start_libvirtd()
            except Exception as error:  # noqa: BLE001 - raised again below
                trouble.append(error)

        thread = threading.Thread(target=strike, name="strike", daemon=True)

        def on_progress(progress: Progress) -> None:
            if progress.phase == "migrating" and progress.guest_bytes > _MIDDLE:
                if not struck.is_set():
                    struck.set()
                    thread.start()

        scene.hosts.shape(_SLOW)
        summary = scene.migrate(post_copy=True, on_progress=on_progress)
        self.assertTrue(struck.is_set(), summary)
        thread.join()
        scene.hosts.shape(None)
        self.assertEqual([], trouble)
        self.assertEqual(DMIGRATE, summary.mode, summary)
        # Whoever carried it out has given up; the relays have gone on
        self.assertEqual(FAILED, summary.state, summary)
        self.forget_at_the_source()
        arrived = dataclasses.replace(summary, state=COMPLETED)
        self.assertEqual([], scene.trouble(arrived), summary)

    def begin_post_copy(self) -> None:
        with contextlib.closing(self.source.connect()) as connection:
            domain = connection.lookupByName(self.scene.domain.name)
            domain.migrateStartPostCopy()
        with contextlib.closing(self.destination.connect()) as connection:
            domain = connection.lookupByName(self.scene.domain.name)
            state = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY)
            wait_until(lambda: tuple(domain.state()) == state, "the guest runs in post-copy")

    def forget_at_the_source(self) -> None:
        """The libvirtd that was killed would have done it."""
        with contextlib.closing(self.source.connect()) as connection:
            domain = connection.lookupByName(self.scene.domain.name)
            wait_until(lambda: not domain.isActive(), "the guest has left the source")
            domain.undefine()

    def relays(self) -> list[int]:
        """How many each host has."""
        return [len(self.scene.relays(host)) for host in (self.source, self.destination)]
