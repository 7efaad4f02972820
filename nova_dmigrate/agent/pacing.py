# SPDX-License-Identifier: Apache-2.0
"""How fast the search through memory may go, so that the database does not feel it.

As fast as it can while processors are idle: nobody is kept waiting then. When none are, the search
pauses between its pieces. What is idle while it pauses is what others leave: of that it takes most,
and of a guest that leaves nothing a small share of all processors; but it does not draw that out
beyond a limit, because a map that comes too late is of no use either.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from nova_dmigrate.agent import cancellation

# Processors are in use when less than this share of them was idle ...
_IDLE_SHARE = 0.1
# ... in so many seconds: the kernel counts in hundredths
_WINDOW = 0.05
# Of what others leave so much is taken
_MOST = 0.8
_STAT = Path("/proc/stat")


class Pace:
    """Between two pieces of work call :meth:`wait`. The first of them begins now.

    :param share: of all processors, that the work takes while others use all the rest.
    :param limit: seconds that all of the work may take before it does not pause any more.
    :param idle: seconds in which the guest's processors were idle since it was booted, all
        together; None if nobody knows.
    """

    def __init__(
        self,
        share: float,
        limit: float,
        cancelled: cancellation.Cancellation,
        idle: Callable[[], float | None] | None = None,
    ) -> None:
        self._processors = os.cpu_count() or 1
        self._share = share
        self._limit = limit
        self._cancelled = cancelled
        self._idle = idle or idle_seconds
        self._since = self._judged = time.monotonic()
        self._began: float | None = None
        self._cpu = time.process_time()
        self._idle_then = self._idle()
        self._contended = False
        self._left = 0.0  # share of all processors that others leave
        self._rested = False  # whether there was a pause since others were looked at
        # Of pauses since that was found out last: seconds, and seconds of idle processors
        self._paused = self._unused = 0.0

    def wait(self, done: float) -> None:
        """Pause if the processors are in use.

        :param done: how much of the work is done, from 0 to 1.
        :raises AgentError: if the work is cancelled.
        """
        now, cpu = time.monotonic(), time.process_time()
        # What comes before the first piece is nothing that could be held back
        self._began = now if self._began is None else self._began
        self._judge(now)
        if self._contended:
            share = max(self._share, _MOST * self._left)
            until = self._since + (cpu - self._cpu) / (share * self._processors)
            # Whoever has done half of the work may have taken half of the time
            pause = min(until, self._began + done * self._limit) - now
            if pause > 0:
                self._pause(pause)
        self._since, self._cpu = time.monotonic(), cpu

    def _pause(self, seconds: float) -> None:
        self._rested = True
        before, began = self._idle(), time.monotonic()
        self._cancelled.wait(seconds)
        after, took = self._idle(), time.monotonic() - began
        if before is None or after is None:
            return
        self._paused += took
        self._unused += after - before
        if self._paused >= _WINDOW:
            left = self._unused / (self._paused * self._processors)
            self._left = (self._left + min(left, 1.0)) / 2
            self._paused = self._unused = 0.0

    def _judge(self, now: float) -> None:
        """Find out whether the processors are in use, if that was not asked a moment ago."""
        seconds = now - self._judged
        if seconds < _WINDOW:
            return
        idle = self._idle()
        if idle is None or self._idle_then is None:
            return
        self._contended = idle - self._idle_then < _IDLE_SHARE * self._processors * seconds
        if self._contended and not self._rested:
            # Without a pause nothing is learnt of what others leave: there has to be one
            self._left /= 2
        self._rested = False
        self._judged, self._idle_then = now, idle


def idle_seconds() -> float | None:
    """Of all processors together, waiting for disks included; None if the kernel does not tell.

    Source of the format: proc(5), /proc/stat.
    """
    try:
        fields = _STAT.read_text().split("\n", 1)[0].split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
