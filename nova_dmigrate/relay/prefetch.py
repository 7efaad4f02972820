# SPDX-License-Identifier: Apache-2.0
"""Reads the mapped blocks at the destination: in volume order, in large reads, several at a time.

Nothing waits for the stream: what is read before the source has spoken of it is emitted
speculatively. Only when many references wait for their blocks are those blocks read first (again
sorted), because the window of kept pages at the source would overflow otherwise and mapped pages
would have to go over the network.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE
from nova_dmigrate.relay.buffers import BufferPool, PooledBuffer
from nova_dmigrate.relay.digest import digest_pages
from nova_dmigrate.relay.entries import EntryTable
from nova_dmigrate.relay.pacing import RateMeter, TokenBucket
from nova_dmigrate.relay.pagemap import PageMap
from nova_dmigrate.relay.readplan import ReadPlan, ReadPlanner
from nova_dmigrate.relay.session import RelaySettings
from nova_dmigrate.volumes.base import VolumeReader

LOG = log.getLogger(__name__)

#: What one more read costs, beside the bytes: work in the interpreter and in the storage.
_READ_SECONDS = 150e-6


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


class Prefetch:
    """The threads that read. Each takes a buffer, plans a read into it, reads, digests, and
    delivers.

    The buffers bound what is read ahead of QEMU; they come back when their pages have been emitted.

    :param bucket: what the reads are paced by; :meth:`stop` releases it.
    """

    def __init__(
        self,
        page_map: PageMap,
        table: EntryTable,
        readers: Sequence[VolumeReader | None],
        settings: RelaySettings,
        bucket: TokenBucket,
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
        self._merge_gap = settings.volume_merge_gap // PAGE_SIZE
        self._meter = RateMeter()
        self._bucket = bucket
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
            batch = self._read(plan, buffer)
            if batch is None:
                buffer.release()
                return
            self._deliver(batch)

    def stop(self) -> None:
        """Read no more, nor what waits for the cap; reads under way are finished."""
        self._stopped.set()
        self._bucket.release()
        self._pool.close()

    def measure(self) -> float:
        """Bytes a second that the volumes deliver while something is read; call it regularly.

        What it finds also decides which gaps are read through: those that cost less time than a
        read of its own costs.
        """
        rate = self._meter.sample(self.bytes, self.busy_seconds)
        worth = int(rate * _READ_SECONDS) // PAGE_SIZE
        self.planner.gap = min(worth, self._merge_gap)
        return rate

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one read was under way (or waited for the cap)."""
        with self._lock:
            running = time.monotonic() - self._busy_since if self._busy else 0.0
            return self._busy_seconds + running

    def _read(self, plan: ReadPlan, buffer: PooledBuffer) -> BlockBatch | None:
        """None if it was stopped before it could read."""
        count = plan.count
        view = buffer.view[: count * PAGE_SIZE]
        self._begin()
        try:
            self._bucket.take(len(view))
            if self._stopped.is_set():
                return None
            good = self._read_into(plan, view)
            with self._lock:
                self.bytes += int(np.count_nonzero(good)) * PAGE_SIZE
                self.reads += 1
        finally:
            self._finish()
        readable = good[plan.index]
        # What the source has sent in the meantime needs no digest.
        chosen = readable & self._table.wanted(plan.entries)
        entries, index = plan.entries[chosen], plan.index[chosen]
        blocks = np.frombuffer(view, np.uint8).reshape(count, PAGE_SIZE)
        whole = len(index) == count and bool((index[1:] > index[:-1]).all())
        pages = blocks if whole else blocks[index]
        return BlockBatch(entries, pages, digest_pages(pages), plan.entries[~readable], buffer)

    def _read_into(self, plan: ReadPlan, view: memoryview) -> NDArray[np.bool_]:
        """Read what the plan says; returns which of the buffer's blocks have been read."""
        good = np.zeros(plan.count, np.bool_)
        reader = self._readers[plan.volume]
        if reader is None or self._errors[plan.volume] >= self._error_limit:
            return good
        places = np.cumsum(plan.lengths) - plan.lengths
        ranges = _ranges(plan.starts, plan.lengths, places, view)
        told = False
        for number, one in enumerate(ranges):
            if self._errors[plan.volume] >= self._error_limit:
                break
            begin, length = int(places[number]), int(plan.lengths[number])
            (error,) = reader.read_ranges([one])
            if error is None:
                good[begin : begin + length] = True
                continue
            self._count_error(plan.volume, error, quiet=told)
            told = True
            if isinstance(error, exception.VolumeTimeoutError):
                break  # the others of the plan would be waited for as long, one after the other
            if length > 1:
                # One bad block must not cost its neighbours: once more, block by block.
                offsets = np.arange(length)
                singles = _ranges(
                    plan.starts[number] + offsets, np.ones_like(offsets), begin + offsets, view
                )
                good[begin : begin + length] = [
                    single is None for single in reader.read_ranges(singles)
                ]
        return good

    def _count_error(self, volume: int, error: exception.VolumeError, quiet: bool) -> None:
        """:param quiet: another error of the same plan has been logged."""
        with self._lock:
            self.errors += 1
            self._errors[volume] += 1
            count = self._errors[volume]
        if not quiet:
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

    def _finish(self) -> None:
        with self._lock:
            self._busy -= 1
            if not self._busy:
                self._busy_seconds += time.monotonic() - self._busy_since


def _ranges(
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    places: NDArray[np.int64],
    view: memoryview,
) -> list[tuple[int, memoryview]]:
    """Byte offsets in the volume with the parts of ``view`` to be filled; all arrays in blocks."""
    return [
        (start, view[place : place + length])
        for start, length, place in zip(
            (starts * PAGE_SIZE).tolist(),
            (lengths * PAGE_SIZE).tolist(),
            (places * PAGE_SIZE).tolist(),
            strict=True,
        )
    ]
