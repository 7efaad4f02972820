# SPDX-License-Identifier: Apache-2.0
"""Reads the mapped blocks at the destination: in volume order, in large reads, several at a time.

Nothing waits for the stream: what is read before the source has spoken of it is emitted
speculatively. Only when many references wait for their blocks are those blocks read first (again
sorted), because the window of kept pages at the source would overflow otherwise and mapped pages
would have to go over the network.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE
from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.relay.digest import DIGEST_SIZE, digest_pages
from nova_dmigrate.relay.entries import EntryTable
from nova_dmigrate.relay.pacing import TokenBucket
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.volumes.base import VolumeReader

LOG = log.getLogger(__name__)

#: Entries looked at when the next read is planned; a read of 1 MiB serves 256 if nothing lies
#: between.
_LOOK = 4096

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class ReadPlan:
    """One read: consecutive blocks of one volume, and the entries served, sorted by block."""

    volume: int
    first: int
    count: int
    entries: NDArray[np.int64]


@dataclass(frozen=True)
class BlockBatch:
    """What one read brought.

    :ivar entries: int64 (n,), whose pages are ``pages``, uint8 (n, 4096), with ``digests``, uint8
        (n, 16).
    :ivar failed: entries whose blocks cannot be read.
    :ivar buffer: to be released when the pages have been used.
    """

    entries: NDArray[np.int64]
    pages: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    failed: NDArray[np.int64]
    buffer: PooledBuffer


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
        self._gap = merge_gap
        self._size = read_size
        self._ends = np.array(
            [volume.first + volume.blocks for volume in page_map.volumes], np.int64
        )
        self._order = np.argsort(page_map.volume_position, kind="stable").astype(np.uint32)
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
        """The first of these entries (sorted by block, not empty) that one read can serve."""
        blocks = self._map.volume_position[entries].astype(np.int64)
        first = int(blocks[0])
        volume = int(np.searchsorted(self._ends, first, side="right"))
        end = min(first + self._size, int(self._ends[volume]))
        stop = blocks >= end
        stop[1:] |= blocks[1:] - blocks[:-1] > self._gap + 1
        count = int(stop.argmax()) if stop.any() else len(blocks)
        # A map may send many pages to one block: what a read brings is bounded by its size as well.
        count = min(count, self._size)
        entries = entries[:count]
        self._claimed[entries] = True
        begin = first - self._map.volumes[volume].first
        return ReadPlan(volume, begin, int(blocks[count - 1]) - first + 1, entries)


class Prefetch:
    """The threads that read. Each takes a buffer, plans a read into it, reads, digests, and
    delivers.

    The buffers bound what is read ahead of QEMU; they come back when their pages have been emitted.
    """

    def __init__(
        self,
        page_map: PageMap,
        table: EntryTable,
        readers: Sequence[VolumeReader | None],
        settings: RelaySettings,
        deliver: Callable[[BlockBatch], None],
    ) -> None:
        self._map = page_map
        self._table = table
        self._readers = readers
        self._deliver = deliver
        size = settings.volume_read_size
        self.depth = settings.volume_queue_depth
        self.planner = ReadPlanner(
            page_map,
            table,
            merge_gap=settings.volume_merge_gap // PAGE_SIZE,
            read_size=size // PAGE_SIZE,
        )
        self._pool = BufferPool(size, max(settings.read_ahead // size, self.depth + 2))
        self._bucket = TokenBucket(settings.volume_bandwidth)
        self._error_limit = settings.volume_error_limit
        self._errors = [0] * len(readers)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._busy = 0
        self._busy_since = 0.0
        self._busy_seconds = 0.0
        #: Bytes read from volumes, gaps included.
        self.bytes = 0
        self.reads = 0
        self.errors = 0

    def work(self) -> None:
        """Read until nothing is left or :meth:`stop` is called; one thread of ``depth``."""
        while not self._stopped.is_set():
            buffer = self._pool.take()
            if buffer is None:
                return
            plan = self.planner.next()
            if plan is None:
                buffer.release()
                return
            self._deliver(self._read(plan, buffer))

    def stop(self) -> None:
        """Read no more; reads under way are finished."""
        self._stopped.set()
        self._bucket.release()
        self._pool.close()

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one read was under way (or waited for the cap)."""
        with self._lock:
            running = time.monotonic() - self._busy_since if self._busy else 0.0
            return self._busy_seconds + running

    def _read(self, plan: ReadPlan, buffer: PooledBuffer) -> BlockBatch:
        size = plan.count * PAGE_SIZE
        view = buffer.view[:size]
        done = 0
        self._begin()
        try:
            self._bucket.take(size)
            failed = self._read_into(plan, view)
            done = size if len(failed) < len(plan.entries) else 0
        finally:
            self._finish(done)
        entries = plan.entries
        if len(failed):
            entries = entries[~np.isin(entries, failed)]
        # What the source has sent in the meantime needs no digest.
        entries = entries[self._table.wanted(entries)]
        if not len(entries):
            empty = np.empty((0, PAGE_SIZE), np.uint8)
            return BlockBatch(entries, empty, np.empty((0, DIGEST_SIZE), np.uint8), failed, buffer)
        first = self._map.volumes[plan.volume].first + plan.first
        index = self._map.volume_position[entries].astype(np.int64) - first
        blocks = np.frombuffer(view, np.uint8).reshape(plan.count, PAGE_SIZE)
        whole = len(index) == plan.count and bool((index[1:] > index[:-1]).all())
        pages = blocks if whole else blocks[index]
        return BlockBatch(entries, pages, digest_pages(pages), failed, buffer)

    def _read_into(self, plan: ReadPlan, view: memoryview) -> NDArray[np.int64]:
        """Read what the plan says; returns the entries whose blocks cannot be read."""
        reader = self._readers[plan.volume]
        if reader is None or self._errors[plan.volume] >= self._error_limit:
            return plan.entries
        try:
            reader.read_into(plan.first * PAGE_SIZE, view)
            return _NONE
        except exception.VolumeError as error:
            self._count_error(plan.volume, error)
        # One bad block must not cost its neighbours: block by block, for this read only.
        first = self._map.volumes[plan.volume].first + plan.first
        index = self._map.volume_position[plan.entries].astype(np.int64) - first
        needed = np.unique(index)
        ranges = [
            ((plan.first + number) * PAGE_SIZE, view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
            for number in needed.tolist()
        ]
        bad = [error is not None for error in reader.read_ranges(ranges)]
        return plan.entries[np.isin(index, needed[bad])]

    def _count_error(self, volume: int, error: exception.VolumeError) -> None:
        with self._lock:
            self.errors += 1
            self._errors[volume] += 1
            count = self._errors[volume]
        LOG.warning("Blocks will travel over the network instead: %s", error)
        if count == self._error_limit:
            LOG.error(
                "Volume %s is not read any more after %d errors",
                self._map.volumes[volume].volume_id,
                count,
            )

    def _begin(self) -> None:
        with self._lock:
            if not self._busy:
                self._busy_since = time.monotonic()
            self._busy += 1

    def _finish(self, size: int) -> None:
        with self._lock:
            self._busy -= 1
            if not self._busy:
                self._busy_seconds += time.monotonic() - self._busy_since
            self.bytes += size
            self.reads += 1
