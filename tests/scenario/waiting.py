# SPDX-License-Identifier: Apache-2.0
"""Waiting for what a cloud does in its own time."""

import time
from collections.abc import Callable
from typing import Any

#: Seconds between questions.
_PAUSE = 1.0


def wait_for(what: str, condition: Callable[[], Any], seconds: float, pause: float = _PAUSE) -> Any:
    """What ``condition`` returns, once that is true. It is asked once more at the very end.

    :raises AssertionError: it is not in time; ``what`` says what was waited for.
    """
    end = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= end
        found = condition()
        if found:
            return found
        if late:
            raise AssertionError(f"waited {seconds:g} s for {what} in vain")
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
