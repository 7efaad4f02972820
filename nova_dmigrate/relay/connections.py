# SPDX-License-Identifier: Apache-2.0
"""The connections that one relay has to the other one, and how they end."""

import threading

from nova_dmigrate import exception
from nova_dmigrate.relay.wire.connection import Connection

#: Seconds that the other relay gets to hear why the migration ended.
_LAST_WORD_SECONDS = 2.0


class Connections:
    """``data`` connections from the source to the destination, and ``acks``, the one back."""

    def __init__(self) -> None:
        self.data: list[Connection] = []
        self.acks: Connection | None = None
        self._timer: threading.Timer | None = None

    @property
    def peer(self) -> str:
        """Whom to name in an error."""
        return self._all[0].peer if self._all else "?"

    def break_off(self, failure: exception.DMigrateError | None) -> None:
        """Make all threads return that wait in a connection, after a failure.

        Not at once if the other relay is still there: its reason to end should be ours, not a
        connection that breaks. It is broken all the same if that takes too long.
        """
        if isinstance(failure, exception.PeerLost):
            self._shutdown()
            return
        self._timer = threading.Timer(_LAST_WORD_SECONDS, self._shutdown)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Give the sockets back; no thread may be in them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        for connection in self._all:
            connection.close()

    @property
    def _all(self) -> list[Connection]:
        return [*self.data, *([self.acks] if self.acks is not None else [])]

    def _shutdown(self) -> None:
        for connection in self._all:
            connection.shutdown()
