# SPDX-License-Identifier: Apache-2.0
"""The window: copies, kept at the source, of the pages whose references are not resolved yet.

A slot holds one 4 KiB page. Its number travels with the reference and comes back when the reference
is settled or missed, so it names the reference without ambiguity: a slot is not used again before
that.
"""

import threading

import numpy as np
from numpy.typing import NDArray

PAGE = 4096

_FREE, _RESERVED, _PENDING, _WAITING, _MISSED, _COPIED = range(6)


class Window:
    """A bounded arena of page copies; thread safe.

    A slot goes FREE -> RESERVED -> PENDING (its reference is queued) -> WAITING (the answer did not
    come at once) and from any of these back to FREE when it is settled; or to MISSED and, once its
    copy was taken for the network, to FREE; or from WAITING to COPIED when the source sends the
    copy unasked, and to FREE with the answer that then still comes. RESERVED keeps a copy from
    being sent before the reference that it belongs to, PENDING from being sent when the
    destination has the block already.
    """

    def __init__(self, size: int) -> None:
        """:param size: bytes of page copies that may be kept."""
        self.slots = max(size // PAGE, 1)
        # Anonymous memory: pages of the arena that are never used are never allocated.
        self._arena = np.empty((self.slots, PAGE), np.uint8)
        self._entry = np.zeros(self.slots, np.int64)
        self._state = np.zeros(self.slots, np.uint8)
        # A stack, so that a small working set stays in the processor's caches and in few host
        # pages.
        self._free = np.arange(self.slots - 1, -1, -1, dtype=np.uint32)
        self._free_count = self.slots
        self._missed: list[NDArray[np.uint32]] = []
        self._missed_count = 0
        self._changed = threading.Condition()
        self._closed = False
        self.peak = 0

    @property
    def unresolved(self) -> int:
        """Pages kept at this moment."""
        return self.slots - self._free_count

    @property
    def missed(self) -> int:
        """Pages that the destination has asked for and that are not taken yet."""
        return self._missed_count

    def reserve(self, entries: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Take slots for as many of ``entries`` as there is room for; uint32 (m,), m <= n."""
        with self._changed:
            count = min(len(entries), self._free_count)
            slots = self._free[self._free_count - count : self._free_count][::-1].copy()
            self._free_count -= count
            self._state[slots] = _RESERVED
            self._entry[slots] = entries[:count]
            self.peak = max(self.peak, self.slots - self._free_count)
            return slots

    def keep(self, slots: NDArray[np.uint32], pages: NDArray[np.uint8]) -> None:
        """Copy pages, uint8 (n, 4096), into reserved slots."""
        self._arena[slots] = pages

    def publish(self, slots: NDArray[np.uint32]) -> None:
        """The references of these slots are queued: from now on copies may be sent unasked."""
        with self._changed:
            self._state[slots[self._state[slots] == _RESERVED]] = _PENDING

    def ripen(self) -> None:
        """Some time has passed: what is pending now counts as waiting."""
        with self._changed:
            self._state[self._state == _PENDING] = _WAITING

    def settle(self, slots: NDArray[np.uint32]) -> None:
        """The references are resolved, or something newer replaced them: the copies may go.

        :raises ValueError: a slot is out of range, not waiting for an answer, or named twice.
        """
        with self._changed:
            self._check(slots)
            self._release(slots)

    def miss(self, slots: NDArray[np.uint32]) -> None:
        """The destination asks for the copies of these slots.

        :raises ValueError: a slot is out of range, not waiting for an answer, or named twice.
        """
        with self._changed:
            self._check(slots)
            copied = self._state[slots] == _COPIED
            if copied.any():
                self._release(slots[copied])
                slots = slots[~copied]
            if len(slots):
                self._state[slots] = _MISSED
                self._missed.append(slots)
                self._missed_count += len(slots)

    def take_missed(
        self, limit: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]] | None:
        """Copies that were asked for, at most ``limit``: (entries, slots, pages); their slots
        become free.
        """
        with self._changed:
            if not self._missed:
                return None
            slots = self._missed.pop(0)
            if len(slots) > limit:
                self._missed.insert(0, slots[limit:])
                slots = slots[:limit]
            self._missed_count -= len(slots)
            taken = self._entry[slots].copy(), slots, self._arena[slots]
            self._release(slots)
            return taken

    def take_last(
        self, limit: int, rank: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]] | None:
        """Copies of waiting pages that the destination would read last: (entries, slots, pages).

        :param rank: uint32 per entry, ascending in the order in which the destination reads.
        """
        with self._changed:
            pending = np.flatnonzero(self._state == _WAITING)
            if not len(pending):
                return None
            if len(pending) > limit:
                ranks = rank[self._entry[pending]]
                pending = pending[np.argpartition(ranks, len(pending) - limit)[-limit:]]
            slots = pending.astype(np.uint32)
            self._state[slots] = _COPIED
            return self._entry[slots].copy(), slots, self._arena[slots]

    def wait_empty(self, timeout: float) -> bool:
        """Wait until nothing is unresolved; False when ``timeout`` seconds passed or the window was
        closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free_count == self.slots or self._closed, timeout)
            return self._free_count == self.slots

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check(self, slots: NDArray[np.uint32]) -> None:
        if len(slots) and int(slots.max()) >= self.slots:
            raise ValueError(f"slot {int(slots.max())} of {self.slots}")
        states = self._state[slots]
        if bool(((states == _FREE) | (states == _MISSED)).any()):
            raise ValueError("an answer for a page that was not asked about")
        if len(np.unique(slots)) != len(slots):
            raise ValueError("two answers for one page")

    def _release(self, slots: NDArray[np.uint32]) -> None:
        count = len(slots)
        self._state[slots] = _FREE
        self._free[self._free_count : self._free_count + count] = slots
        self._free_count += count
        if self._free_count == self.slots:
            self._changed.notify_all()
