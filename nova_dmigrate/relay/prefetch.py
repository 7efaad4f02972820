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
        #: Why blocks stayed unread, the last error of each volume of which some did.
        self.troubles: dict[str, str] = {}

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
        """None if it was stopped before all was read: then nobody waits for it."""
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
        if self._stopped.is_set() and not good.all():
            return None
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
        told = False
        for place, start, length in zip(
            places.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True
        ):
            if self._stopped.is_set() or self._errors[plan.volume] >= self._error_limit:
                break
            error = _try(reader, start, view, place, length)
            if error is None:
                good[place : place + length] = True
                continue
            self._count_error(plan.volume, error, quiet=told)
            told = True
            if length > 1 and not isinstance(error, exception.VolumeTimeoutError):
                error = self._read_singly(reader, start, view, place, good[place : place + length])
            self._note_trouble(plan.volume, error)
            if isinstance(error, exception.VolumeTimeoutError):
                break  # the others of the plan would be waited for as long, one after the other
        return good

    def _read_singly(
        self,
        reader: VolumeReader,
        start: int,
        view: memoryview,
        place: int,
        good: NDArray[np.bool_],
    ) -> exception.VolumeError | None:
        """Read once more, block by block: one that is bad must not cost its neighbours.

        :param good: is told which have been read. :returns: the last error.
        """
        error = None
        for number in range(good.size):
            self._bucket.take(PAGE_SIZE)
            if self._stopped.is_set():
                break
            failed = _try(reader, start + number, view, place + number, 1)
            good[number] = failed is None
            error = failed or error
            if isinstance(failed, exception.VolumeTimeoutError):
                break
        return error

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

    def _note_trouble(self, volume: int, error: exception.VolumeError | None) -> None:
        """:param error: why blocks stay unread; None if none do.

        What a map says of blocks that there are not is no trouble of the volume's.
        """
        if error is not None and not isinstance(error, exception.VolumeBoundsError):
            with self._lock:
                self.troubles[self._map.volumes[volume].volume_id] = str(error)

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


def _try(
    reader: VolumeReader, start: int, view: memoryview, place: int, length: int
) -> exception.VolumeError | None:
    """Read into a part of ``view``, all in blocks; why that has failed."""
    try:
        reader.read_into(start * PAGE_SIZE, view[place * PAGE_SIZE : (place + length) * PAGE_SIZE])
    except exception.VolumeError as error:
        return error
    return None
