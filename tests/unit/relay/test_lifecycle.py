# SPDX-License-Identifier: Apache-2.0
"""Threads of a relay: they end together, and the first failure is what counts."""

import threading
from unittest import mock

from nova_dmigrate import exception
from nova_dmigrate.relay import lifecycle
from nova_dmigrate.relay.lifecycle import Lifecycle
from tests.base import TestCase

LONG = 60.0


def error(reason: str) -> exception.RelayError:
    return exception.RelayError(instance="instance", reason=reason)


class LifecycleTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.life = Lifecycle("instance")

    def raising(self, reason: str) -> None:
        raise error(reason)

    def test_without_a_failure_joining_is_all(self) -> None:
        done = []
        self.life.start("a", lambda: done.append(1))
        self.life.join()
        self.assertEqual([1], done)
        self.assertFalse(self.life.failed)

    def test_threads_that_threads_have_started_are_waited_for(self) -> None:
        done = []
        self.life.start("a", lambda: self.life.start("b", lambda: done.append(1)) and None)
        self.life.join()
        self.assertEqual([1], done)

    def test_a_failure_calls_all_closers_once_and_wakes_the_others(self) -> None:
        called = []
        stop = threading.Event()
        self.life.on_failure(stop.set)
        self.life.on_failure(lambda: called.append(1))
        self.life.start("waits", lambda: stop.wait(LONG) and None)
        self.life.start("fails", lambda: self.raising("first"))
        found = self.assertRaises(exception.RelayError, self.life.join)
        self.assertIn("first", str(found))
        self.life.fail(error("second"))
        self.assertEqual([1], called)

    def test_later_failures_are_consequences(self) -> None:
        self.life.fail(error("first"))
        self.life.fail(error("second"))
        self.assertIn("first", str(self.life.failure))
        self.assertIn("After the failure of the relay of instance:", self.log.output)

    def test_a_closer_that_comes_too_late_is_called_at_once(self) -> None:
        self.life.fail(error("first"))
        called = []
        self.life.on_failure(lambda: called.append(1))
        self.assertEqual([1], called)

    def test_a_closer_that_fails_does_not_keep_the_others_from_being_called(self) -> None:
        called = []
        self.life.on_failure(lambda: [][1])
        self.life.on_failure(lambda: called.append(1))
        self.life.fail(error("first"))
        self.assertEqual([1], called)
        self.assertRaises(exception.RelayError, self.life.join)

    def test_an_unexpected_error_is_a_failure_with_its_trace(self) -> None:
        self.life.start("a", lambda: {}["no such key"])
        found = self.assertRaises(exception.RelayError, self.life.join)
        self.assertIn("unexpected KeyError", str(found))
        self.assertIn("Traceback", self.log.output)

    def test_the_end_waits_for_the_closers(self) -> None:
        begun, go = threading.Event(), threading.Event()
        done = []

        def closer() -> None:
            begun.set()
            go.wait(LONG)
            done.append(1)

        self.life.on_failure(closer)
        thread = threading.Thread(target=self.life.fail, args=(error("first"),), daemon=True)
        thread.start()
        begun.wait(LONG)
        joined = threading.Thread(
            target=lambda: self.assertRaises(exception.RelayError, self.life.join), daemon=True
        )
        joined.start()
        joined.join(0.01)
        self.assertTrue(joined.is_alive())
        go.set()
        joined.join(LONG)
        self.assertEqual([1], done)

    def test_a_thread_that_may_hang_is_not_waited_for_for_ever(self) -> None:
        go = threading.Event()
        thread = self.life.start("stuck", lambda: go.wait(LONG) and None, may_hang=True)
        with mock.patch.object(lifecycle, "_HANG_SECONDS", 0.01):
            self.life.join()
        self.assertIn("thread stuck is left behind", self.log.output)
        go.set()
        thread.join(LONG)
