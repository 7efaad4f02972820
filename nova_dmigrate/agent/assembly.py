# SPDX-License-Identifier: Apache-2.0
"""Making the buffer map of frames, in parts, of which only one is in memory at a time.

64 GiB of buffer pool whose pages are scattered in guest memory are 134 MB of map. So it is made
in bands of guest memory, one part for each of them and for each volume.

A page is one u64: guest page in the upper half, volume block in the lower. The pages of a part
are collected in one array, sorted there, and the map's arrays are views of its halves.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import buffermap
from nova_dmigrate.agent import arrays, bands, frames, location
from nova_dmigrate.buffermap import volume as volumes

_HALF = np.uint64(32)
# One page on in guest memory and one block on: both halves grow by one.
_FOLLOWING = np.uint64((1 << 32) + 1)
_STEP = 1 << 16  # entries that are worked on at a time

U64 = NDArray[np.uint64]


def assemble(
    found: frames.FrameTable,
    blocks: location.BlockTable,
    excluded: collections.Counter[str],
) -> Iterator[buffermap.BufferMap]:
    """The parts of the map of the frames in ``found``, in ascending order of guest pages.

    The guest pages that are left out are counted in ``excluded``.
    """
    excluded["duplicate"] += found.keep_newest() * found.per_frame
    for band in bands.choose(guest for _, guest in found.kept()):
        collectors = [
            PageCollector(volume.volume_id, volume.size, band.pages) for volume in blocks.volumes
        ]
        _collect(found, blocks, band, collectors, excluded)
        while collectors:
            part = collectors.pop(0).finish()
            if part.page_count:
                yield buffermap.BufferMap((part,))
            del part  # before the next one is made


def _collect(
    found: frames.FrameTable,
    blocks: location.BlockTable,
    band: bands.Band,
    collectors: list[PageCollector],
    excluded: collections.Counter[str],
) -> None:
    """Give the pages of one band to the collectors of their volumes."""
    for place, guest in found.kept():
        inside = band.holds(guest)
        if not inside.any():
            continue
        if not inside.all():
            rows = np.flatnonzero(inside.any(axis=1))
            place, guest, inside = place[rows], guest[rows], inside[rows]
        volume, block = blocks.find(place.astype(np.uint64))
        there = np.count_nonzero(volume >= 0, axis=1)
        whole = there == found.per_frame
        if not whole.all():
            # A hole inside of a page is how both servers give back what compression saved.
            compressed = inside[(there > 0) & ~whole]
            excluded["page-compressed"] += int(np.count_nonzero(compressed))
            excluded["not-written"] += int(np.count_nonzero(inside[there == 0]))
            inside &= whole[:, np.newaxis]
        for number, collector in enumerate(collectors):
            mine = (volume == number) & inside
            collector.add(guest[mine], block[mine])


class PageCollector:
    """Takes pages of one volume in any order.

    ``capacity``: most different guest pages that can come; memory is used as they come.
    """

    def __init__(self, volume_id: str, size: int, capacity: int) -> None:
        volumes.check_volume(volume_id, size)
        self._volume_id = volume_id
        self._size = size
        self._pairs = arrays.zeros(capacity + _STEP, np.uint64)
        self._count = 0

    def add(self, guest: NDArray[np.uint32], block: U64) -> int:
        """Add pages, (n,) both; returns how many are within the volume."""
        inside = block < np.uint64(volumes.block_count(self._size))
        pairs = (guest[inside].astype(np.uint64) << _HALF) | block[inside]
        added = 0
        while added < pairs.size:
            if self._count == self._pairs.size:
                self._sort()
            number = min(pairs.size - added, self._pairs.size - self._count)
            self._pairs[self._count : self._count + number] = pairs[added : added + number]
            self._count += number
            added += number
        return int(pairs.size)

    def finish(self) -> buffermap.VolumeMap:
        """The volume's map. The collector is empty afterwards.

        A guest page that was added twice (memory merged by the kernel) is in it once.
        """
        self._sort()
        count, self._count = self._count, 0
        pairs, self._pairs = self._pairs, np.empty(0, np.uint64)
        runs = _count_runs(pairs[:count])
        lengths = None
        # A third less is worth the work; less would cost memory to save memory.
        if 3 * volumes.RUN_ENTRY_BYTES * runs <= 2 * volumes.FLAT_ENTRY_BYTES * count:
            lengths = _make_runs(pairs[:count], runs)
            count = runs
        halves = pairs[:count].view(np.uint32).reshape(-1, 2)
        low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
        return buffermap.VolumeMap(
            self._volume_id, self._size, halves[:, high], halves[:, low], lengths
        )

    def _sort(self) -> None:
        """Sort the pages, and drop those that are there twice."""
        self._pairs[: self._count].sort()
        self._count = _drop_repeated(self._pairs[: self._count])


def _drop_repeated(pairs: U64) -> int:
    """Move sorted pairs together so that each guest page is there once; how many are left."""
    kept = 0
    last = -1
    for start in range(0, pairs.size, _STEP):
        piece = pairs[start : start + _STEP]
        guest = piece >> _HALF
        new = np.empty(piece.size, np.bool_)
        new[0] = int(guest[0]) != last
        new[1:] = guest[1:] != guest[:-1]
        last = int(guest[-1])
        remaining = piece if bool(new.all()) else piece[new]
        if kept != start or remaining is not piece:
            pairs[kept : kept + remaining.size] = remaining
        kept += remaining.size
    return kept


def _count_runs(pairs: U64) -> int:
    return sum(int(np.count_nonzero(begins)) for _, begins in _run_begins(pairs))


def _make_runs(pairs: U64, runs: int) -> NDArray[np.uint32]:
    """Move the first pair of each run to the front of ``pairs``; the lengths of the runs."""
    lengths = np.empty(runs, np.uint32)
    done = 0
    last = 0  # where the run that has no length yet begins
    for start, begins in _run_begins(pairs):
        at = np.flatnonzero(begins) + start
        if not at.size:
            continue
        if done:
            lengths[done - 1] = at[0] - last
        lengths[done : done + at.size - 1] = np.diff(at)
        pairs[done : done + at.size] = pairs[at]
        done += at.size
        last = int(at[-1])
    if done:
        lengths[done - 1] = pairs.size - last
    return lengths


def _run_begins(pairs: U64) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Piece by piece (start, whether a run begins at each pair).

    What lies before a piece that was returned may be overwritten.
    """
    before = None
    for start in range(0, pairs.size, _STEP):
        piece = pairs[start : start + _STEP]
        begins = np.ones(piece.size, np.bool_)
        begins[1:] = piece[1:] != piece[:-1] + _FOLLOWING
        if before is not None:
            begins[0] = bool(piece[0] != before + _FOLLOWING)
        before = piece[-1]  # a copy, not a view
        yield start, begins
