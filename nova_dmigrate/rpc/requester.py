# SPDX-License-Identifier: Apache-2.0
"""What oslo.messaging has for who asks one server: connections, and a queue for the answers."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

#: Seconds for which nothing has to be answered: on a busy machine connecting may take longer than
#: some requests wait.
_YOUNG = 10.0
_STOP_PATIENCE = 5.0


class Requester:
    """It is closed once it is given up and nobody waits for an answer any more.

    ``client``: oslo.messaging's, which asks. ``reached``: whether there has been an answer.
    """

    def __init__(self, transport: Any, client: Any) -> None:
        self.client = client
        self.reached = False
        self._transport = transport
        self._made = time.monotonic()
        self._lock = threading.Lock()
        self._waiting = 0
        self._given_up = False

    @property
    def young(self) -> bool:
        """Whether it may be just about to connect."""
        return time.monotonic() < self._made + _YOUNG

    def begin(self) -> None:
        """Somebody waits for an answer from now on, until `end`."""
        with self._lock:
            self._waiting += 1

    def end(self) -> None:
        """The answer has come, or none."""
        with self._lock:
            self._waiting -= 1
            last = self._given_up and not self._waiting
        if last:
            self._close()

    def give_up(self) -> None:
        """Close it as soon as nobody waits for an answer. Returns at once."""
        with self._lock:
            self._given_up = True
            unused = not self._waiting
        if unused:
            self._close()

    def close(self) -> None:
        """Close it now, whoever waits."""
        if not sys.is_finalizing():
            # Otherwise no thread begins any more; the connection ends with the process
            self._close().join(_STOP_PATIENCE)

    def _close(self) -> threading.Thread:
        """In a thread: where nobody listens, it takes its time."""
        closer = threading.Thread(target=self._transport.cleanup, name="rpc-close", daemon=True)
        closer.start()
        return closer
