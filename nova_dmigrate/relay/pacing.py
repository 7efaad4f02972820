# SPDX-License-Identifier: Apache-2.0
"""Rates: a token bucket that enforces one and a meter that tells one."""

import threading
import time


class TokenBucket:
    """Lets through at most ``rate`` bytes a second; shared by threads, first come first served.

    :param rate: bytes per second; 0 means no limit.
    :param burst: seconds' worth of bytes that may pass at once after idling.
    """

    def __init__(self, rate: float, burst: float = 0.01) -> None:
        self.rate = rate
        self._burst = burst
        self._lock = threading.Lock()
        self._next = time.monotonic()
        self._open = threading.Event()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may pass. Returns at once after :meth:`release`."""
        self.wait(self.reserve(size))

    def reserve(self, size: int) -> float:
        """Book ``size`` bytes; returns when (monotonic seconds) they may pass."""
        if not self.rate:
            return 0.0
        with self._lock:
            # Time that was not used is forgotten, but for the burst.
            start = max(self._next, time.monotonic() - self._burst)
            # These may pass when those before them have; the next ones wait for these.
            self._next = start + size / self.rate
        return start

    def wait(self, until: float, timeout: float | None = None) -> bool:
        """Wait for a time that was booked; false when ``timeout`` seconds passed before it."""
        left = until - time.monotonic()
        if left <= 0 or self._open.is_set():
            return True
        self._open.wait(left if timeout is None else min(left, timeout))
        return self._open.is_set() or timeout is None or left <= timeout

    def release(self) -> None:
        """Stop limiting: whoever waits goes on."""
        self._open.set()


class RateMeter:
    """Bytes a second over the last moments, from timed samples of a growing counter.

    :param horizon: seconds after which what was seen has lost most of its weight.
    """

    def __init__(self, horizon: float = 1.0) -> None:
        self._horizon = horizon
        self._last: tuple[float, float] | None = None
        self.rate = 0.0

    def sample(self, total: float, now: float) -> float:
        """Take the counter's value at time ``now`` (seconds, monotonic); returns the rate."""
        if self._last is not None and now > self._last[0]:
            elapsed = now - self._last[0]
            weight = min(elapsed / self._horizon, 1.0)
            self.rate += weight * ((total - self._last[1]) / elapsed - self.rate)
        self._last = (now, total)
        return self.rate
