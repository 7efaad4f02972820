# SPDX-License-Identifier: Apache-2.0
"""Buffers that are filled from a socket and lent out until what was made of them has been used."""

import mmap
import threading
from collections.abc import Callable


class PooledBuffer:
    """Memory of a pool; goes back to it when the last of its holders has released it."""

    def __init__(self, size: int, give_back: Callable[["PooledBuffer"], None]) -> None:
        self.view = memoryview(mmap.mmap(-1, size))
        self._give_back = give_back
        self._lock = threading.Lock()
        self._holders = 0

    def hold(self) -> None:
        """One more holder."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """One holder less."""
        with self._lock:
            self._holders -= 1
            free = self._holders == 0
        if free:
            self._give_back(self)


class BufferPool:
    """A bounded number of buffers of one size; thread safe. Memory is taken when first used.

    A mapping of its own for each, so that they are aligned to pages as O_DIRECT wants it.
    """

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self._count = count
        self._made = 0
        self._free: list[PooledBuffer] = []
        self._changed = threading.Condition()
        self._closed = False

    def take(self) -> PooledBuffer | None:
        """A buffer with one holder, as soon as there is one; None once the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._made < self._count or self._closed)
            if self._closed:
                return None
            # The one used last is the one that the processor's caches may still hold.
            if self._free:
                buffer = self._free.pop()
            else:
                buffer = PooledBuffer(self.size, self._put)
                self._made += 1
        buffer.hold()
        return buffer

    def close(self) -> None:
        """Wake whoever waits for a buffer; there is none any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, buffer: PooledBuffer) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()
