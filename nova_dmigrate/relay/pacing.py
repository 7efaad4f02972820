# SPDX-License-Identifier: Apache-2.0
"""Rates: a token bucket that enforces one and a meter that tells one."""

import threading
import time


class TokenBucket:
    """Lets through at most ``rate`` bytes a second; shared by threads, first come first served.

    Bytes have places in one line, and the place up to which they may pass moves on with time: a
    new rate is in effect at once, also for those who wait.

    :param rate: bytes per second; 0 means no limit.
    :param burst: seconds' worth of bytes that may pass at once after idling.
    """

    def __init__(self, rate: float, burst: float = 0.01) -> None:
        self._rate = rate
        self._burst = burst
        self._changed = threading.Condition()
        self._released = False
        # Bytes up to `_passed` might pass at the time `_since`; those up to `_booked` have places
        self._passed = self._booked = 0.0
        self._since = time.monotonic()

    @property
    def rate(self) -> float:
        """Bytes per second; 0 means no limit."""
        return self._rate

    def limit(self, rate: float) -> None:
        """Let ``rate`` bytes a second pass from now on; 0 means no limit."""
        with self._changed:
            # Without a limit nobody has waited, and what has passed was not counted
            self._passed = self._allowed() if self._rate else self._booked
            self._since = time.monotonic()
            self._rate = rate
            self._changed.notify_all()

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may pass. Returns at once after :meth:`release`."""
        self.wait(self.reserve(size))

    def reserve(self, size: int) -> float:
        """Book ``size`` bytes; returns their place, for :meth:`wait`."""
        with self._changed:
            if not self._rate:
                return self._booked
            # Time that was not used is forgotten, but for the burst.
            place = max(self._booked, self._allowed() - self._burst * self._rate)
            # These may pass when those before them have; the next ones wait for these.
            self._booked = place + size
            return place

    def wait(self, place: float, timeout: float | None = None) -> bool:
        """Wait until bytes with that place may pass; false when ``timeout`` seconds passed
        before.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._released and self._rate:
                left = (place - self._allowed()) / self._rate
                if left <= 0:
                    break
                if end is not None:
                    patience = end - time.monotonic()
                    if patience <= 0:
                        return False
                    left = min(left, patience)
                self._changed.wait(left)
        return True

    def release(self) -> None:
        """Stop limiting: whoever waits goes on."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def _allowed(self) -> float:
        return self._passed + (time.monotonic() - self._since) * self._rate


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
