# SPDX-License-Identifier: Apache-2.0
"""The signals that end a program, so that none is lost."""

import os
import select
import signal


class Signals:
    """SIGTERM and SIGINT, as bytes in a pipe.

    What Python calls for a signal it calls in the main thread, once that comes back to Python. A
    signal that another thread of the process takes, or that comes just before the main thread waits
    for a lock, would never be heard of. The pipe is written when the signal arrives (see
    ``signal.set_wakeup_fd``). To be made in the main thread.
    """

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)

    def wait(self) -> int:
        """The number of the next one, as soon as there is one. For any thread."""
        return os.read(self._reader, 1)[0]

    def pending(self) -> bool:
        """Whether `wait` would return at once."""
        return bool(select.select([self._reader], [], [], 0)[0])
