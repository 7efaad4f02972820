# SPDX-License-Identifier: Apache-2.0
"""Whether this service can be asked over the broker: it asks itself, again and again.

Leases are renewed over the broker. While that is away nobody can renew one, however much it is
wanted.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from nova_dmigrate import exception
from nova_dmigrate.rpc.host_client import HostClient

LOG = logging.getLogger(__name__)

#: Seconds between two questions, and at most between two that got no answer.
_INTERVAL = 2.0
_MAX_INTERVAL = 10.0


class Presence:
    """Asks until it is stopped.

    :param connect: makes a client of this service.
    """

    def __init__(self, connect: Callable[[], HostClient]) -> None:
        self._connect = connect
        self._seen = float("-inf")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def seen(self) -> float:
        """When the last question was asked that got an answer, in monotonic seconds."""
        return self._seen

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            client: HostClient | None = None
            delay = _INTERVAL
            while not self._stopped.wait(delay):
                asked, away = time.monotonic(), delay > _INTERVAL
                try:
                    client = client or stack.enter_context(self._connect())
                    client.hello()
                except Exception as error:  # noqa: BLE001 - whatever it is, nobody is better off
                    if not away:
                        LOG.warning("Leases do not count, nobody can ask this service: %s", error)
                    if not isinstance(error, exception.HostError):
                        LOG.debug("An unexpected error", exc_info=True)
                    delay = min(delay * 2, _MAX_INTERVAL)
                    continue
                if away:
                    LOG.warning("This service can be asked again")
                self._seen, delay = asked, _INTERVAL
