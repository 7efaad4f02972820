# SPDX-License-Identifier: Apache-2.0
"""What Nova's operation and its monitor find in a guest that migrates, and what is asked of it in a
thread that nobody may hold.
"""

import threading
import time
import types
from typing import Any

import fixtures
import testtools
from nova.tests.fixtures import libvirt
from nova.virt.libvirt.guest import Guest, JobInfo

from nova_dmigrate.virt.guest import NovaGuest
from nova_dmigrate.virt.steering import Steering
from tests.functional.test_conditions import WithNovasFake

_XML = "<domain><name>db</name><memory>1024</memory><os><type machine='q35'/></os></domain>"
UNBOUNDED, COMPLETED = libvirt.VIR_DOMAIN_JOB_UNBOUNDED, libvirt.VIR_DOMAIN_JOB_COMPLETED
FAILED, CANCELLED = libvirt.VIR_DOMAIN_JOB_FAILED, libvirt.VIR_DOMAIN_JOB_CANCELLED
NONE = libvirt.VIR_DOMAIN_JOB_NONE


class Domain:
    """libvirt answers while ``goes_on`` is set."""

    def __init__(self) -> None:
        self.job, self.limits, self.aborted, self.switched = UNBOUNDED, [], 0, 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.post_copy_works = True

    def XMLDesc(self, flags: int) -> str:
        return _XML

    def jobStats(self) -> dict[str, int]:
        self.goes_on.wait(60)
        return {"type": self.job}

    def abortJob(self) -> None:
        self.goes_on.wait(60)
        self.aborted += 1

    def migrateSetMaxDowntime(self, milliseconds: int, flags: int = 0) -> None:
        self.goes_on.wait(60)
        self.limits.append(milliseconds)

    def migrateStartPostCopy(self, flags: int = 0) -> None:
        if not self.post_copy_works:
            raise libvirt.make_libvirtError(
                libvirt.libvirtError, "not now", error_code=libvirt.VIR_ERR_OPERATION_INVALID
            )
        self.switched += 1


class GuestTest(WithNovasFake):
    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch("nova.virt.libvirt.guest.libvirt", libvirt))
        self.domain = Domain()
        self.guest = Guest(self.domain)
        self.cancelled = threading.Event()
        self.steering = Steering(self.guest, lambda: None, self.cancelled)


class MonitorTest(GuestTest):
    def seen(self, job: int) -> int:
        """What Nova's monitor sees of it."""
        self.domain.job = job
        kind: int = self.guest.get_job_info().type
        return kind

    def test_a_job_that_has_failed_is_not_the_end(self):
        with self.steering.through(None):
            self.assertEqual((NONE, NONE), (self.seen(FAILED), self.seen(CANCELLED)))
            self.assertEqual(UNBOUNDED, self.seen(UNBOUNDED))
            self.assertEqual(COMPLETED, self.seen(COMPLETED))
        self.assertEqual((FAILED, CANCELLED), (self.seen(FAILED), self.seen(CANCELLED)))

    def test_one_that_somebody_has_cancelled_is(self):
        with self.steering.through(None):
            self.cancelled.set()
            self.assertEqual((FAILED, CANCELLED), (self.seen(FAILED), self.seen(CANCELLED)))

    def test_the_monitors_abort_is_a_cancellation_and_ours_is_not(self):
        ours = NovaGuest(self.guest)
        with self.steering.through(None):
            ours.abort()
            self.assertFalse(self.cancelled.is_set())
            self.guest.abort_job()
        self.assertTrue(self.cancelled.is_set())
        self.assertEqual(2, self.domain.aborted)

    def test_post_copy_counts_from_the_moment_at_which_it_is_asked_for(self):
        with self.steering.through(None):
            self.domain.post_copy_works = False
            with testtools.ExpectedException(libvirt.libvirtError):
                self.guest.migrate_start_postcopy()
            self.assertFalse(self.steering.post_copy)
            self.domain.post_copy_works = True
            self.guest.migrate_start_postcopy()
        self.assertTrue(self.steering.post_copy)

    def test_there_is_no_post_copy_through_relays_that_have_failed(self):
        relayed: Any = types.SimpleNamespace(uri="unix:/r", downtime_limit=1)
        doubts: list[str | None] = ["it is gone", None]
        with self.steering.through(relayed, lambda: doubts[0]):
            with testtools.ExpectedException(libvirt.libvirtError, ".*it is gone"):
                self.guest.migrate_start_postcopy()
            self.assertEqual((False, 0), (self.steering.post_copy, self.domain.switched))
            del doubts[0]
            self.guest.migrate_start_postcopy()
        self.assertEqual((True, 1), (self.steering.post_copy, self.domain.switched))

    def test_a_job_that_never_was_can_be_pretended(self):
        self.steering.pretend("VIR_DOMAIN_JOB_CANCELLED")
        self.assertIsInstance(self.guest.get_job_info(), JobInfo)
        self.assertEqual(CANCELLED, self.seen(UNBOUNDED))


class HungLibvirtTest(GuestTest):
    def test_nobody_waits_for_it(self):
        ours: Any = NovaGuest(self.guest)
        self.assertIsNotNone(ours.job())
        self.domain.goes_on.clear()
        self.addCleanup(self.domain.goes_on.set)
        began = time.monotonic()
        self.assertIsNone(ours.job())
        self.assertFalse(ours.set_max_downtime(1))
        self.assertFalse(ours.set_max_downtime(300))
        ours.abort()
        self.assertFalse(ours.abort_is_over(0.1))
        self.assertLess(time.monotonic() - began, 10)
        self.domain.goes_on.set()
        self.assertTrue(ours.abort_is_over(20))
        while not ours.set_max_downtime(300):
            pass
        self.assertEqual([1, 300], self.domain.limits)
        self.assertEqual(1, self.domain.aborted)
