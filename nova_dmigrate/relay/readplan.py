# SPDX-License-Identifier: Apache-2.0
"""Which blocks of the volumes are read next at the destination."""

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.relay.entries import EntryTable
from nova_dmigrate.relay.pagemap import PageMap

#: Entries looked at when the next read is planned; a read of 1 MiB serves 256 if nothing lies
#: between.
_LOOK = 4096

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class ReadPlan:
    """Ranges of one volume that are read into one buffer, one behind the other.

    :ivar starts, lengths: blocks, int64 (r,); ascending and apart from each other.
    :ivar entries: int64 (n,), whom the blocks serve, sorted by block.
    :ivar index: int64 (n,), where each of them finds its block in the buffer, in blocks.
    """

    volume: int
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    entries: NDArray[np.int64]
    index: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Blocks of all ranges together."""
        return int(self.lengths.sum())


class ReadPlanner:
    """Decides what is read next. Thread safe.

    :param merge_gap: blocks that are read through between wanted ones.
    :param read_size: blocks of one read.
    """

    def __init__(
        self, page_map: PageMap, table: EntryTable, *, merge_gap: int, read_size: int
    ) -> None:
        self._map = page_map
        self._table = table
        #: Blocks that are read through between wanted ones; may be changed at any time.
        self.gap = merge_gap
        self._size = read_size
        self._ends = np.array(
            [volume.first + volume.blocks for volume in page_map.volumes], np.int64
        )
        self._order = _order(page_map.volume_position)
        self._claimed = np.zeros(len(page_map), np.bool_)
        self._cursor = 0
        self._lock = threading.Lock()
        self._waiting: deque[NDArray[np.int64]] = deque()
        self._waiting_count = 0
        self._sorted = _NONE
        #: Whether what references wait for is read first.
        self.references_first = False

    def prefer(self, entries: NDArray[np.int64]) -> None:
        """References wait for the blocks of these entries."""
        with self._lock:
            self._waiting.append(entries)
            self._waiting_count += len(entries)
            if self._waiting_count > 2 * self._table.referenced + _LOOK:
                self._gather(self._waiting_count)
                self._waiting.append(self._sorted)
                self._waiting_count = len(self._sorted)
                self._sorted = _NONE

    def next(self) -> ReadPlan | None:
        """The next read; None when there is nothing left to read."""
        with self._lock:
            if self.references_first:
                if not len(self._sorted):
                    self._gather(_LOOK)
                plan = self._plan_sorted()
                if plan is not None:
                    return plan
            return self._plan_sweep()

    def _gather(self, limit: int) -> None:
        """Sort up to about ``limit`` waiting entries that still want a read."""
        parts = [self._sorted]
        count = len(self._sorted)
        while self._waiting and count < limit:
            part = self._waiting.popleft()
            self._waiting_count -= len(part)
            part = part[self._unread(part)]
            parts.append(part)
            count += len(part)
        entries = np.concatenate(parts)
        self._sorted = entries[np.argsort(self._map.volume_position[entries], kind="stable")]

    def _plan_sorted(self) -> ReadPlan | None:
        while len(self._sorted):
            look = self._sorted[:_LOOK]
            wanted = look[self._unread(look)]
            if not len(wanted):
                self._sorted = self._sorted[len(look) :]
                continue
            plan = self._cut(wanted)
            last = np.flatnonzero(look == plan.entries[-1])[-1]
            self._sorted = self._sorted[last + 1 :]
            return plan
        return None

    def _plan_sweep(self) -> ReadPlan | None:
        while self._cursor < len(self._order):
            look = self._order[self._cursor : self._cursor + _LOOK].astype(np.int64)
            indices = np.flatnonzero(self._unread(look))
            if not len(indices):
                self._cursor += len(look)
                continue
            plan = self._cut(look[indices])
            self._cursor += int(indices[len(plan.entries) - 1]) + 1
            return plan
        return None

    def _unread(self, entries: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._table.wanted(entries) & ~self._claimed[entries]

    def _cut(self, entries: NDArray[np.int64]) -> ReadPlan:
        """As many of these entries (sorted by block, not empty) as one plan can serve."""
        blocks = self._map.volume_position[entries].astype(np.int64)
        volume = int(np.searchsorted(self._ends, blocks[0], side="right"))
        # Where each block comes to lie in the buffer: in its range, and behind the range before.
        steps = np.diff(blocks, prepend=blocks[0])
        apart = steps > self.gap + 1
        steps[apart] = 1
        index = np.cumsum(steps)
        apart[0] = True
        # A map may send many pages to one block: what a plan brings is bounded as well.
        count = min(
            int(np.searchsorted(index, self._size)),
            int(np.searchsorted(blocks, self._ends[volume])),
            self._size,
        )
        begins = np.flatnonzero(apart[:count])
        starts = blocks[begins] - self._map.volumes[volume].first
        lengths = np.diff(index[begins], append=index[count - 1] + 1)
        entries = entries[:count]
        self._claimed[entries] = True
        return ReadPlan(volume, starts, lengths, entries, index[:count])


def _order(volume_position: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The entries, uint32 (n,), in the order of their blocks, those of one block in their own."""
    # Sorting one array of pairs is several times as fast as sorting indices
    pairs = volume_position.astype(np.uint64)
    pairs <<= np.uint64(32)
    pairs |= np.arange(len(pairs), dtype=np.uint32)
    pairs.sort()
    return pairs.astype(np.uint32)
