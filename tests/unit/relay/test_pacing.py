# SPDX-License-Identifier: Apache-2.0
"""Rates: how long a token bucket makes wait, and what a meter tells."""

import threading
import time
from unittest import mock

from nova_dmigrate.relay.pacing import RateMeter, TokenBucket
from tests.base import TestCase


class TokenBucketTest(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.now = 1000.0
        self.waits: list[float] = []
        clock = mock.patch("nova_dmigrate.relay.pacing.time.monotonic", lambda: self.now)
        clock.start()
        self.addCleanup(clock.stop)

    def make(self, rate: float, burst: float = 0.0) -> TokenBucket:
        """A bucket in whose world no time passes but by waiting for it."""
        bucket = TokenBucket(rate, burst)

        def wait(seconds: float) -> None:
            self.waits[-1] += seconds
            self.now += seconds

        bucket._changed.wait = wait  # type: ignore[method-assign,assignment]
        return bucket

    def take(self, bucket: TokenBucket, *sizes: int) -> list[float]:
        """How long each take waits."""
        self.waits = []
        for size in sizes:
            self.waits.append(0.0)
            bucket.take(size)
        return [round(wait, 6) for wait in self.waits]

    def test_without_a_rate_nobody_waits(self) -> None:
        self.assertEqual([0.0, 0.0], self.take(self.make(0), 1 << 40, 1 << 40))

    def test_bytes_wait_for_those_before_them(self) -> None:
        self.assertEqual([0.0, 1.0, 0.5], self.take(self.make(100.0), 100, 50, 10))

    def test_idle_time_is_worth_no_more_than_the_burst(self) -> None:
        bucket = self.make(100.0, burst=1.0)
        self.now += 1000
        self.assertEqual([0.0, 0.0, 0.0, 1.0], self.take(bucket, 50, 50, 100, 100))

    def test_a_new_rate_is_in_effect_at_once(self) -> None:
        bucket = self.make(100.0)
        self.assertEqual([0.0, 1.0], self.take(bucket, 100, 100))
        bucket.limit(50.0)
        self.assertEqual([2.0, 2.0], self.take(bucket, 100, 100))
        bucket.limit(0)
        self.assertEqual([0.0, 0.0], self.take(bucket, 1000, 1000))
        bucket.limit(10.0)
        self.assertEqual([0.0, 1.0], self.take(bucket, 10, 10))


class ThreadsTest(TestCase):
    def test_who_waits_goes_on_at_a_new_rate(self) -> None:
        for rate in (1e9, 0.0):
            bucket = TokenBucket(1e-6)
            bucket.take(1)
            thread = threading.Thread(target=bucket.take, args=(1,), daemon=True)
            thread.start()
            bucket.limit(rate)
            thread.join(60)
            self.assertFalse(thread.is_alive())

    def test_a_release_wakes_who_waits_and_ends_the_limit(self) -> None:
        bucket = TokenBucket(1e-6)
        bucket.take(1)
        thread = threading.Thread(target=bucket.take, args=(1,), daemon=True)
        thread.start()
        bucket.release()
        thread.join(60)
        self.assertFalse(thread.is_alive())
        bucket.take(1)

    def test_a_wait_for_what_was_booked_can_be_interrupted(self) -> None:
        bucket = TokenBucket(1e-6, burst=0.0)
        bucket.reserve(1)
        due = bucket.reserve(1)
        self.assertFalse(bucket.wait(due, 0.001))
        bucket.release()
        self.assertTrue(bucket.wait(due, 0.001))

    def test_threads_share_one_rate(self) -> None:
        bucket = TokenBucket(1e6)
        begin = time.monotonic()
        threads = [
            threading.Thread(target=lambda: [bucket.take(1000) for _ in range(10)])
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        # 50 kB at 1 MB/s, less the burst of 10 ms and the last bytes' own time.
        self.assertGreaterEqual(time.monotonic() - begin, 0.038)


class RateMeterTest(TestCase):
    def test_a_steady_rate_is_found(self) -> None:
        meter = RateMeter()
        for step in range(100):
            meter.sample(step * 50.0, step * 0.1)
        self.assertAlmostEqual(500.0, meter.rate, delta=1)

    def test_the_first_sample_tells_nothing(self) -> None:
        self.assertEqual(0.0, RateMeter().sample(1e9, 5.0))

    def test_time_that_does_not_pass_changes_nothing(self) -> None:
        meter = RateMeter()
        meter.sample(0, 0)
        meter.sample(100, 1)
        self.assertEqual(100.0, meter.sample(500, 1))

    def test_a_rate_that_ends_fades(self) -> None:
        meter = RateMeter(horizon=1.0)
        meter.sample(0, 0)
        meter.sample(1000, 1)
        for step in range(50):
            meter.sample(1000, 1.1 + step * 0.1)
        self.assertLess(meter.rate, 10)
        self.assertGreater(meter.rate, 0)
