# SPDX-License-Identifier: Apache-2.0
"""The pace of the search through memory."""

import os
import threading
import time

from nova_dmigrate import exception
from nova_dmigrate.agent import cancellation, pacing
from tests import base

PROCESSORS = os.cpu_count()


def work(seconds):
    """Use a processor for so many seconds of its time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def all_idle():
    return time.monotonic() * PROCESSORS


def none_idle():
    return 0.0


class PaceTest(base.TestCase):
    def setUp(self):
        super().setUp()
        self.cancelled = cancellation.Cancellation()
        self.pauses = []

    def dream(self):
        """Pauses are noted, and take no time."""
        self.cancelled.wait = self.pauses.append

    def pace(self, idle, share=0.5, limit=60.0):
        made = pacing.Pace(share, limit, self.cancelled, idle)
        time.sleep(0.15)  # a window, after which it knows
        made.wait(0)
        return made

    def test_idle_processors_are_used_without_a_pause(self):
        self.dream()
        pace = self.pace(all_idle)
        for part in range(4):
            work(0.05)
            pace.wait(part / 4)
        self.assertEqual([], self.pauses)

    def test_a_kernel_that_tells_nothing_holds_nothing_back(self):
        self.dream()
        pace = self.pace(lambda: None)
        work(0.02)
        pace.wait(0.5)
        self.assertEqual([], self.pauses)

    def test_the_share_is_kept_while_no_processor_is_idle(self):
        pace = self.pace(none_idle, share=0.1 / PROCESSORS)
        began = time.monotonic()
        for part in range(1, 4):
            work(0.02)
            pace.wait(part / 4)
        self.assertGreaterEqual(time.monotonic() - began, 3 * 0.02 / 0.1)

    def test_of_what_others_leave_it_takes_most(self):
        spare = True

        def half_idle():
            return time.monotonic() * PROCESSORS / 2 if spare else 0.0

        def wait(seconds):
            self.pauses.append(seconds)
            time.sleep(min(seconds, 0.2))

        self.cancelled.wait = wait
        pace = self.pace(none_idle, share=0.0001)
        pace._idle = half_idle  # while it pauses, and not while it works
        pace._judge = lambda now: None
        for part in range(1, 7):
            work(0.02)
            pace.wait(part / 7)
        # The first is that of a guest that leaves nothing
        self.assertGreater(self.pauses[0], 5)
        self.assertLess(self.pauses[-1], 0.5)
        spare = False
        for _ in range(20):
            work(0.02)
            pace.wait(0.9)
        # One of them may be short, when this machine has let the work wait
        self.assertGreater(max(self.pauses[-5:]), 0.5)

    def test_what_others_leave_is_looked_at_again_and_again(self):
        self.dream()
        pace = self.pace(lambda: 0.0, share=0.0001)
        pace._left = 1.0  # much, at first, so that there is no need for a pause
        for _ in range(40):
            time.sleep(0.06)
            pace.wait(0.9)
        self.assertNotEqual([], self.pauses)

    def test_it_is_free_again_when_processors_are_idle(self):
        self.dream()
        busy = True
        pace = self.pace(lambda: 0.0 if busy else all_idle(), share=0.001)
        work(0.02)
        pace.wait(0.5)
        self.assertEqual(1, len(self.pauses))
        busy = False
        time.sleep(0.15)
        pace.wait(0.6)
        work(0.02)
        pace.wait(0.7)
        self.assertEqual(1, len(self.pauses))

    def test_it_does_not_pause_beyond_its_limit(self):
        self.dream()
        pace = self.pace(none_idle, share=0.001, limit=0.1)
        work(0.02)
        time.sleep(0.15)
        pace.wait(0.99)
        self.assertEqual([], self.pauses)

    def test_what_is_done_may_have_taken_its_part_of_the_limit(self):
        self.dream()
        pace = self.pace(none_idle, share=0.000001, limit=600.0)
        work(0.02)
        pace.wait(0.5)
        (pause,) = self.pauses
        self.assertGreater(pause, 100)
        self.assertLessEqual(pause, 300)

    def test_a_pause_ends_when_the_map_is_not_wanted_any_more(self):
        pace = self.pace(none_idle, share=0.0001)
        work(0.02)
        threading.Timer(0.1, self.cancelled.cancel).start()
        error = self.assertRaises(exception.AgentError, pace.wait, 0.9)
        self.assertEqual("cancelled", error.kwargs["code"])

    def test_the_kernel_tells_of_idle_processors(self):
        before, began = pacing.idle_seconds(), time.monotonic()
        time.sleep(0.2)
        idle = pacing.idle_seconds() - before
        # Counted in hundredths on each processor
        self.assertGreaterEqual(idle, 0)
        self.assertLessEqual(idle, PROCESSORS * (time.monotonic() - began + 0.02))
