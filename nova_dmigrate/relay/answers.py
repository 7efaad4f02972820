# SPDX-License-Identifier: Apache-2.0
"""What the destination tells the source: which references are resolved, which are not, and QEMU's
return path.
"""

import threading
import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.relay.entries import Slots, Verdict
from nova_dmigrate.relay.protocol import KEEPALIVE_SECONDS, MissReason, Progress
from nova_dmigrate.relay.wire.connection import Connection
from nova_dmigrate.relay.wire.frames import MISS, FrameType

#: A window of 4 GiB; at most 5 bytes each.
_RECORDS_PER_FRAME = 1 << 20


class Answers:
    """A queue that never makes the core wait; what waits is bounded by the source's window.

    Whoever sends takes all that has gathered: many small answers become one frame.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._settled: list[Slots] = []
        self._missed: list[tuple[MissReason, Slots]] = []
        self._frames: deque[tuple[FrameType, bytes]] = deque()
        self._progress: Progress | None = None
        self._ended = False

    def put_verdict(self, verdict: Verdict) -> None:
        """Answers to references."""
        with self._changed:
            if len(verdict.settled):
                self._settled.append(verdict.settled)
            if len(verdict.changed):
                self._missed.append((MissReason.CHANGED, verdict.changed))
            if len(verdict.unreadable):
                self._missed.append((MissReason.READ_ERROR, verdict.unreadable))
            if self._settled or self._missed:
                self._changed.notify()

    def put_progress(self, progress: Progress) -> None:
        """How far the volumes are; a newer word replaces one that has not been sent."""
        with self._changed:
            self._progress = progress
            self._changed.notify()

    def put(self, kind: FrameType, payload: bytes = b"") -> None:
        """Any other frame; these keep their order."""
        with self._changed:
            self._frames.append((kind, payload))
            self._changed.notify()

    def end(self, kind: FrameType, payload: bytes) -> None:
        """The last frame."""
        with self._changed:
            self._frames.append((kind, payload))
            self._ended = True
            self._changed.notify()

    def send(self, connection: Connection) -> None:
        """Send until the last frame has gone.

        :raises PeerLost: the source relay went away.
        """
        while True:
            settled, missed, progress, others, ended = self._take()
            if settled:
                _send_records(connection, FrameType.SETTLED, np.concatenate(settled).astype("<u4"))
            if missed:
                misses = np.empty(sum(len(slots) for _, slots in missed), MISS)
                misses["slot"] = np.concatenate([slots for _, slots in missed])
                misses["reason"] = np.concatenate(
                    [np.full(len(slots), reason, np.uint8) for reason, slots in missed]
                )
                _send_records(connection, FrameType.MISSED, misses)
            if progress is not None:
                connection.send(FrameType.PROGRESS, payload=[progress.pack()])
            for kind, data in others:
                connection.send(kind, payload=[data])
            if ended:
                return
            if not (settled or missed or progress or others):
                connection.send(FrameType.KEEPALIVE)

    def _take(
        self,
    ) -> tuple[
        list[Slots],
        list[tuple[MissReason, Slots]],
        Progress | None,
        list[tuple[FrameType, bytes]],
        bool,
    ]:
        with self._changed:
            deadline = time.monotonic() + KEEPALIVE_SECONDS
            while not (self._settled or self._missed or self._progress or self._frames):
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    break
                self._changed.wait(left)
            taken = (self._settled, self._missed, self._progress, list(self._frames), self._ended)
            self._settled, self._missed, self._progress = [], [], None
            self._frames.clear()
            return taken


def _send_records(connection: Connection, kind: FrameType, records: NDArray[Any]) -> None:
    """Send records in as many frames as they need."""
    for begin in range(0, len(records), _RECORDS_PER_FRAME):
        part = records[begin : begin + _RECORDS_PER_FRAME]
        connection.send(kind, payload=[memoryview(part.view(np.uint8))])
