# SPDX-License-Identifier: Apache-2.0
"""What oslo.messaging has for who asks one server: connections, and a queue for the answers.

When a broker comes back, a request may arrive before the queue for its answer is there again. Who
answers takes that queue for gone then, and drops all that belongs there for 60 seconds
(oslo.messaging's ObsoleteReplyQueuesCache). So whoever got no answer goes on with a new one.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LOG = logging.getLogger(__name__)

#: Seconds from the first request on for which there need not be an answer: on a busy machine
#: connecting may take longer than some requests wait.
_YOUNG = 10.0
#: And for which one may be connecting: another one could do no better.
_CONNECTING = 60.0
#: Requests that wait until one has connected.
_CROWD = 8
_STOP_PATIENCE = 5.0


class Requester:
    """It is closed once it is given up and nobody waits for an answer any more.

    ``client``: oslo.messaging's, which asks. ``reached``: whether there has been an answer.
    """

    def __init__(self, transport: Any, client: Any) -> None:
        self.client = client
        self.reached = False
        self._transport = transport
        self._begun: float | None = None
        self._lock = threading.Lock()
        self._waiting = 0
        self._given_up = False

    @property
    def crowded(self) -> bool:
        """Whether so many wait for a connection that one more must not."""
        return not self.reached and self._waiting >= _CROWD

    def hopeless(self, stuck: bool) -> bool:
        """Whether a new one may do better, now that there was no answer.

        :param stuck: whether the request is still under way, maybe for want of a connection.
        """
        patience = _CONNECTING if stuck and not self.reached else _YOUNG
        return self._begun is not None and time.monotonic() > self._begun + patience

    def begin(self) -> None:
        """Somebody waits for an answer from now on, until `end`."""
        with self._lock:
            self._begun = self._begun or time.monotonic()
            self._waiting += 1

    def end(self) -> None:
        """The answer has come, or none."""
        with self._lock:
            self._waiting -= 1
            last = self._given_up and not self._waiting
        if last:
            self._close()

    def give_up(self) -> threading.Thread | None:
        """Close it as soon as nobody waits for an answer. Returns at once; what closes it now."""
        with self._lock:
            self._given_up = True
            if self._waiting:
                return None
        return self._close()

    def _close(self) -> threading.Thread:
        """In a thread: where nobody listens, it takes its time."""
        closer = threading.Thread(target=self._clean, name="rpc-close", daemon=True)
        closer.start()
        return closer

    def _clean(self) -> None:
        for _ in range(2):
            try:
                self._transport.cleanup()
            except Exception:  # noqa: BLE001 - a connection that breaks must not keep the others
                LOG.debug("A connection to the broker was not closed in order", exc_info=True)
            else:
                return


class Requesters:
    """Has one at a time, and replaces it.

    :param make: makes one, which does not connect yet.
    """

    def __init__(self, make: Callable[[], Requester]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._current = make()
        self._closed = False

    def take(self, check: Callable[[], None]) -> Requester | None:
        """The one to ask with, which is given back by `Requester.end`. None if none can be asked
        with: it is closed, or too many wait for a connection.

        :param check: called if there has been no answer yet; raises if there can be none.
        """
        with self._lock:
            reached = self._current.reached
        if not reached:
            check()
        with self._lock:
            if self._closed or self._current.crowded:
                return None
            self._current.begin()
            return self._current

    def doubt(self, requester: Requester, stuck: bool) -> None:
        """It gave no answer: ask by a new one from now on, unless it needs time.

        :param stuck: as in `Requester.hopeless`.
        """
        with self._lock:
            if self._closed or self._current is not requester or not requester.hopeless(stuck):
                return
            self._current = self._make()
        requester.give_up()

    def close(self) -> None:
        """Close it for good; that takes a few seconds at most, whoever waits."""
        with self._lock:
            self._closed = True
        if sys.is_finalizing():
            # No thread begins any more; the connection ends with the process
            return
        closer = self._current.give_up()
        if closer is not None:
            closer.join(_STOP_PATIENCE)
