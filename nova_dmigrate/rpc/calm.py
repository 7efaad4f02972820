# SPDX-License-Identifier: Apache-2.0
"""Has oslo.messaging tell once a minute that the broker is away, instead of at every attempt."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_LOGGER = "oslo.messaging._drivers.impl_rabbit"
_INTERVAL = 60.0
#: Kinds of messages that are remembered.
_MANY = 64


def calm() -> None:
    """For a program of ours. Within another one, the log is that one's."""
    logging.getLogger(_LOGGER).addFilter(OnceAWhile())


class OnceAWhile(logging.Filter):
    """Lets warnings and errors of one kind through once in ``interval`` seconds.

    Their kind is the text before its arguments are filled in: by those connections differ, and the
    time to the next attempt.
    """

    def __init__(
        self, interval: float = _INTERVAL, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._interval = interval
        self._clock = clock
        self._told: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind, now = str(record.msg), self._clock()
        if now < self._told.get(kind, float("-inf")) + self._interval:
            return False
        if len(self._told) >= _MANY:
            self._told.clear()
        self._told[kind] = now
        return True
