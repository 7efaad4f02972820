# SPDX-License-Identifier: Apache-2.0
"""Gives each relay its share of the host's bandwidth, and a new one when others come or go."""

import math
import threading
from collections.abc import Collection

from nova_dmigrate.host.capacity import Limits, Rates, shares
from nova_dmigrate.host.session import Session


class Bandwidth:
    """What there is to share.

    :param lock: that of `Sessions`.
    """

    def __init__(self, limits: Limits, lock: threading.RLock) -> None:
        self._limits = limits
        self._lock = lock
        # The caps of running relays are changed by one thread at a time
        self._sharing = threading.Lock()

    def share(self, sessions: Collection[Session]) -> None:
        """Give each relay that is ready its share, and declare those running that have it. Called
        without the lock.
        """
        with self._sharing:
            changes = self._changes(sessions)
            # Less for some first: together they must not have more than there is
            for session, wanted in sorted(changes, key=lambda pair: _is_more(*pair)):
                # One that does not take its share is asked again the next time
                if session.limit(wanted):
                    with self._lock:
                        session.limited(wanted)

    def _changes(self, sessions: Collection[Session]) -> list[tuple[Session, Rates]]:
        """The sessions that have not what they should have, and what that is."""
        with self._lock:
            ready = [each for each in sessions if each.ready]
            wanted = shares(self._limits, [each.claim for each in ready])
            pairs = [(each, wanted[each.record.session_id]) for each in ready]
            return [(each, rates) for each, rates in pairs if each.rates != rates]


def _is_more(session: Session, wanted: Rates) -> bool:
    """Whether a relay gets more than it has."""
    if session.rates is None:
        return True
    pairs = (
        (session.rates.network, wanted.network),
        (session.rates.volume, wanted.volume),
    )
    return any((new or math.inf) > (old or math.inf) for old, new in pairs)
