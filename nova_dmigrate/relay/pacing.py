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
        if not self.rate or self._open.is_set():
            return
        with self._lock:
            now = time.monotonic()
            # Time that was not used is forgotten, but for the burst.
            start = max(self._next, now - self._burst)
            self._next = start + size / self.rate
        # The bytes may pass when those before them have; their own time is what the next one waits
        # for.
        if start > now:
            self._open.wait(start - now)

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
