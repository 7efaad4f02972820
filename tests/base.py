# SPDX-License-Identifier: Apache-2.0
"""What every test of this package starts from."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import unittest
from pathlib import Path

import fixtures
import testtools

# Seconds that the hard end comes after the gentle one
GRACE = 30


def require(missing: str | None) -> None:
    """Skip the test, or the class, that cannot run on this machine because of ``missing``.

    With ``CI=true`` in the environment nothing may be missing: there it fails.
    """
    if missing is None:
        return
    if os.environ.get("CI", "").lower() in ("1", "true"):
        raise AssertionError(f"this must not be skipped in CI: {missing}")
    raise unittest.SkipTest(missing)


def guard(test: unittest.TestCase, seconds: float) -> None:
    """End the process, with all stacks, ``GRACE`` seconds after the gentle end of a test.

    :param seconds: from now, for the test and for the cleanups that are added after this; 0 for no
        limit.
    """
    if seconds <= 0:
        return
    # Cleanups run in reverse order: this guards those of the test as well
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    test.addCleanup(faulthandler.cancel_dump_traceback_later)


class TestCase(testtools.TestCase):
    """A test that ends in time and shows its log when it fails.

    ``OS_TEST_TIMEOUT`` (seconds, 0 for none) bounds each test. At its end a TimeoutException is
    raised in the main thread, so that the test's cleanups run and its processes are ended. Where
    the main thread does not come back to Python, all threads' stacks are printed ``GRACE``
    seconds later and the worker exits: its test counts as failed, and the run goes on to its end.

    :ivar log: the fixture that captures logging at DEBUG; ``self.log.output`` is its text.
    """

    log: fixtures.FakeLogger

    def setUp(self) -> None:
        super().setUp()
        self._limit_time(float(os.environ.get("OS_TEST_TIMEOUT") or 0))
        self.log = self.useFixture(
            fixtures.FakeLogger(
                level=logging.DEBUG,
                format="%(asctime)s.%(msecs)03d %(threadName)s %(levelname)s %(name)s: %(message)s",
                datefmt="%H:%M:%S",
            )
        )

    def _limit_time(self, seconds: float) -> None:
        if seconds <= 0:
            return
        guard(self, seconds)
        self.useFixture(fixtures.Timeout(max(1, round(seconds)), gentle=True))

    def make_directory(self) -> Path:
        """Return a new directory that goes away with the test."""
        return Path(self.useFixture(fixtures.TempDir()).path)
