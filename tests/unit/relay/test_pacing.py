# SPDX-License-Identifier: Apache-2.0
"""Rates: how long a token bucket makes wait, and what a meter tells."""

import threading
import time
from unittest import mock

from nova_dmigrate.relay.pacing import RateMeter, TokenBucket
from tests.base import TestCase


class TokenBucketTest(TestCase):
    def waits(self, bucket: TokenBucket, *sizes: int, clock: float = 1000.0) -> list[float]:
        """How long each take waits if no other time passes."""
        now = [clock]
        waits: list[float] = []

        def wait(seconds: float) -> bool:
            waits.append(seconds)
            now[0] += seconds
            return False

        with (
            mock.patch("nova_dmigrate.relay.pacing.time.monotonic", lambda: now[0]),
            mock.patch.object(bucket, "_open", mock.Mock(wait=wait, is_set=lambda: False)),
        ):
            for size in sizes:
                before = len(waits)
                bucket.take(size)
                if len(waits) == before:
                    waits.append(0.0)
        return waits

    def test_without_a_rate_nobody_waits(self) -> None:
        begin = time.monotonic()
        bucket = TokenBucket(0)
        for _ in range(1000):
            bucket.take(1 << 40)
        self.assertLess(time.monotonic() - begin, 60)

    def test_bytes_wait_for_those_before_them(self) -> None:
        bucket = TokenBucket(100.0, burst=0.0)
        bucket._next = 0.0
        self.assertEqual([0.0, 1.0, 0.5], [round(w, 6) for w in self.waits(bucket, 100, 50, 10)])

    def test_idle_time_is_worth_no_more_than_the_burst(self) -> None:
        bucket = TokenBucket(100.0, burst=1.0)
        bucket._next = 0.0
        waits = self.waits(bucket, 50, 50, 100, 100)
        self.assertEqual([0.0, 0.0, 0.0, 1.0], [round(wait, 6) for wait in waits])

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
