# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: sessions wait in a queue for each role, in the order in which they have come.

A queue is what the sessions' states say; there is no other list of it. The lock of `Sessions` is
held.
"""

from collections.abc import Collection

from nova_dmigrate.host.capacity import Limits, shortage
from nova_dmigrate.host.session import Session


def queue(sessions: Collection[Session]) -> list[Session]:
    """Those that wait, of both roles, the first first."""
    return sorted((each for each in sessions if each.queued), key=lambda each: each.record.created)


def position(session: Session, sessions: Collection[Session]) -> int:
    """In the queue of its role: 1 for the next one, 0 for one that does not wait."""
    waiting = [each for each in queue(sessions) if each.record.role == session.record.role]
    return waiting.index(session) + 1 if session in waiting else 0


def serve(sessions: Collection[Session], limits: Limits) -> None:
    """Start what there is room for, each role in the order of its queue."""
    blocked = set()
    for session in queue(sessions):
        record = session.record
        running = [each.load for each in sessions if each.active]
        lack = shortage(limits, running, session.load)
        if lack is None and record.role not in blocked:
            session.start()
        else:
            record.message = lack or "others wait in front of it"
            blocked.add(record.role)
