# SPDX-License-Identifier: Apache-2.0
"""Where everything that the destination has to handle comes together: frames in their order, and
blocks.
"""

import threading
from collections import deque
from collections.abc import Callable

from nova_dmigrate.relay.prefetch import BlockBatch
from nova_dmigrate.relay.wire.frames import Frame

#: Frames of one connection that may wait here: one being handled must not make the network wait.
DEPTH = 3


class ReceivedFrame:
    """A frame and what to call when its payload has been used."""

    __slots__ = ("done", "frame")

    def __init__(self, frame: Frame, done: Callable[[], None] | None) -> None:
        self.frame = frame
        self.done = done


class Feed:
    """Two sources for one consumer: frames, put in order of their numbers, and block batches.

    When both have something, the one that has had less of the consumer's time, counted in bytes,
    comes first: when QEMU is what everybody waits for, neither may starve the other.
    """

    def __init__(self) -> None:
        lock = threading.Lock()
        self._something = threading.Condition(lock)
        self._room = threading.Condition(lock)
        self._frames: list[deque[ReceivedFrame]] = []
        self._blocks: deque[BlockBatch] = deque()
        self._expected = 0
        self._balance = 0
        self._closed = False

    def add_connection(self) -> int:
        """One more connection brings frames; returns its number."""
        with self._room:
            self._frames.append(deque())
            return len(self._frames) - 1

    def put_frame(self, connection: int, received: ReceivedFrame) -> None:
        """A frame of this connection; waits for room."""
        with self._room:
            queue = self._frames[connection]
            self._room.wait_for(lambda: len(queue) < DEPTH or self._closed)
            if not self._closed:
                queue.append(received)
                if queue[0].frame.header.seq == self._expected:
                    self._something.notify()

    def put_blocks(self, batch: BlockBatch) -> None:
        """Blocks that were read; their buffers bound how many there are."""
        with self._something:
            self._blocks.append(batch)
            self._something.notify()

    def next(self) -> ReceivedFrame | BlockBatch | None:
        """What to handle next; None when the feed was closed."""
        with self._something:
            while True:
                if self._closed:
                    return None
                queue = self._next_queue()
                if queue is not None and (not self._blocks or self._balance <= 0):
                    received = queue.popleft()
                    self._expected += 1
                    self._account(len(received.frame.payload) if self._blocks else 0)
                    self._room.notify_all()
                    return received
                if self._blocks:
                    batch = self._blocks.popleft()
                    self._account(-batch.pages.nbytes if queue is not None else 0)
                    return batch
                self._something.wait()

    def close(self) -> None:
        """Wake everybody; nothing is handed out any more."""
        with self._something:
            self._closed = True
            self._something.notify_all()
            self._room.notify_all()

    def _next_queue(self) -> deque[ReceivedFrame] | None:
        for queue in self._frames:
            if queue and queue[0].frame.header.seq == self._expected:
                return queue
        return None

    def _account(self, size: int) -> None:
        """Positive: frames had their turn; negative: blocks had. Zero: there was no competition."""
        self._balance = self._balance + size if size else 0
