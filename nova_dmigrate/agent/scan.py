# SPDX-License-Identifier: Apache-2.0
"""The search through a server's memory for frames that hold pages of known tablespaces.

Most of its time is the kernel's, which fetches 46 bytes of each frame from memory that no cache
has. So a few threads read ahead while one chooses.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.agent import (
    cancellation,
    descriptors,
    frames,
    location,
    memory,
    options,
    pacing,
    pages,
)

# More would take the guest's processors from its database
_READERS = 2

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]
# What a stretch of frames says, which of them the server takes for dirty, their guest pages
_Stretch = tuple[pages.Headers, Bools, NDArray[np.int64]]


class _Progress:
    """How much of all mappings has been searched, and with that how fast to go on."""

    def __init__(self, pace: pacing.Pace, size: int) -> None:
        self._pace = pace
        self._size = size
        self._done = 0

    def goes_on(self, size: int) -> None:
        """So many bytes come next."""
        self._pace.wait(self._done / self._size)
        self._done += size


class Scan:
    """One search through the server's memory. What it counts is read when it has run."""

    def __init__(
        self,
        table: location.PlaceTable,
        page_size: int,
        settings: options.MapOptions,
        pace: pacing.Pace,
        cancelled: cancellation.Cancellation,
    ) -> None:
        self._table = table
        self._page_size = page_size
        self._per_frame = page_size // memory.PAGE_SIZE
        self._settings = settings
        self._pace = pace
        self._cancelled = cancelled
        self._descriptors: descriptors.Descriptors | None = None
        self.pool_frames = 0
        self.candidate_frames = 0
        self.dirty_frames = 0
        self.excluded: collections.Counter[str] = collections.Counter()

    def run(self, process: memory.ProcessMemory) -> frames.FrameTable:
        """The frames that can be mapped.

        :raises ServerNotFound: if the process ends meanwhile.
        :raises PrivilegeError: if the kernel does not let us look.
        :raises AgentError: if it is cancelled.
        """
        found = frames.FrameTable(self._per_frame)
        readers = min(_READERS, os.cpu_count() or 1)
        mappings = process.mappings(self._settings.min_mapping_bytes)
        progress = _Progress(self._pace, sum(mapping.size for mapping in mappings))
        self._descriptors = descriptors.find(process, mappings, self._page_size, self._cancelled)
        with concurrent.futures.ThreadPoolExecutor(readers, "scan") as pool:
            for mapping in mappings:
                before = self.candidate_frames
                present_frames = unknown = 0
                for headers, marked, guest in self._read_ahead(
                    pool, readers, process, mapping, progress
                ):
                    present_frames += len(guest)
                    unknown += self._choose(headers, marked, guest, found)
                # Elsewhere what looks like a page is something else.
                if self.candidate_frames > before:
                    self.pool_frames += present_frames
                    self.excluded["unknown-tablespace"] += unknown * self._per_frame
        return found

    def _read_ahead(
        self,
        pool: concurrent.futures.Executor,
        readers: int,
        process: memory.ProcessMemory,
        mapping: memory.Mapping,
        progress: _Progress,
    ) -> Iterator[_Stretch]:
        """What `_read` returns for the chunks of a mapping, in their order."""
        pending: collections.deque[concurrent.futures.Future[_Stretch]] = collections.deque()
        try:
            for address, count in self._chunks(mapping):
                self._cancelled.check()
                progress.goes_on(count * self._page_size)
                pending.append(pool.submit(self._read, process, address, count))
                if len(pending) > readers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for each in pending:
                each.cancel()

    def _read(self, process: memory.ProcessMemory, address: int, count: int) -> _Stretch:
        """Of the frames that are in memory in full."""
        present, guest = self._present(process, address, count)
        if self._descriptors is None:
            marked = np.zeros(present.size, np.bool_)
        else:
            marked = self._descriptors.dirty(process, present)
        return pages.read_headers(process, present, self._page_size), marked, guest

    def _chunks(self, mapping: memory.Mapping) -> Iterator[tuple[int, int]]:
        """(address, frames) of the chunks of a mapping; frames are aligned to their size."""
        size = self._page_size
        first, last = -(-mapping.start // size), mapping.end // size
        for frame in range(first, last, self._settings.chunk_frames):
            yield frame * size, min(self._settings.chunk_frames, last - frame)

    def _present(
        self, process: memory.ProcessMemory, address: int, count: int
    ) -> tuple[U64, NDArray[np.int64]]:
        """Addresses of the frames that are in memory in full, and their guest pages."""
        guest = process.guest_pages(address, count * self._per_frame)
        guest = guest.reshape(count, self._per_frame)
        present = np.flatnonzero((guest >= 0).all(axis=1))
        addresses = present.astype(np.uint64) * np.uint64(self._page_size) + np.uint64(address)
        return addresses, guest[present]

    def _choose(
        self,
        headers: pages.Headers,
        marked: Bools,
        guest: NDArray[np.int64],
        found: frames.FrameTable,
    ) -> int:
        """Add to ``found`` what can be mapped; the number of pages of unknown tablespaces."""
        known, place, full_crc32, reason = self._table.find(headers.space, headers.page)
        written = headers.written(full_crc32)
        mappable = known & (reason < 0)
        clean = mappable & written & headers.has_lsn & ~marked
        dirty = mappable & (marked | ~written & headers.plausible)
        excluded = known & (reason >= 0) & headers.is_page
        self.dirty_frames += int(np.count_nonzero(dirty))
        self.candidate_frames += int(np.count_nonzero(clean | dirty | excluded))
        for number, count in enumerate(
            np.bincount(reason[excluded], minlength=len(self._table.reasons)).tolist()
        ):
            self.excluded[self._table.reasons[number]] += count * self._per_frame
        if self._settings.include_dirty:
            clean |= dirty
        else:
            self.excluded["dirty"] += int(np.count_nonzero(dirty)) * self._per_frame
        found.add(place[clean], headers.lsn_low[clean], guest[clean])
        return _count_unknown(headers, known)


def _count_unknown(headers: pages.Headers, known: NDArray[np.bool_]) -> int:
    """Pages of tablespaces without a file: dropped ones, or files that were not found."""
    no = np.zeros(known.size, np.bool_)
    whole = headers.written(no) | headers.written(~no)
    # MariaDB marks free frames with the highest numbers.
    used = headers.space != np.uint32(0xFFFFFFFF)
    return int(np.count_nonzero(~known & used & headers.plausible & whole))
