# SPDX-License-Identifier: Apache-2.0
"""Joining pages of tablespaces with places on volumes, on whole arrays.

All mapped files are laid one behind the other into one long row of frames, so that a page is one
number (its *place*) however many tablespaces there are, and the extents of all files are one
sorted table. Excluded files have no places: their pages are known, that is all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.agent import filesystem, storage

_SPACE_SHIFT = np.uint64(32)
MAX_PLACES = 2**32 - 1  # frames are kept with 32 bits of place

U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a tablespace: which pages it has, and why it is excluded or where it lies.

    ``placed`` is empty for an excluded file.
    """

    space_id: int
    first_page: int
    pages: int
    full_crc32: bool
    excluded: str | None
    placed: Sequence[storage.Placed] = ()


@dataclasses.dataclass(frozen=True)
class Volume:
    """A volume on which extents lie. ``size`` in bytes."""

    volume_id: str
    size: int


class PlaceTable:
    """Finds the place of a page, by space id and page number.

    ``files`` must not overlap; their order is that of the places. ``reasons`` are the reasons
    for exclusion, and ``reason`` in an answer is an index into them.

    :raises ValueError: if there are more than ``MAX_PLACES`` places.
    """

    def __init__(self, files: Sequence[File]) -> None:
        order = sorted(files, key=lambda file: (file.space_id, file.first_page))
        self.files = tuple(order)
        self.reasons = tuple(sorted({file.excluded for file in order if file.excluded}))
        number = {reason: index for index, reason in enumerate(self.reasons)}
        self._starts = np.array(
            [(file.space_id << 32) + file.first_page for file in order], np.uint64
        )
        pages = np.array([file.pages for file in order], np.uint64)
        self._ends = self._starts + pages
        # Not an array's sum: it could wrap
        if sum(file.pages for file in order if file.excluded is None) > MAX_PLACES:
            raise ValueError(f"more than {MAX_PLACES} pages have places")
        placed = np.array([0 if file.excluded else file.pages for file in order], np.uint64)
        self.bases = np.cumsum(placed) - placed
        self._full_crc32 = np.array([file.full_crc32 for file in order], np.bool_)
        self._reason = np.array(
            [number[file.excluded] if file.excluded else -1 for file in order], np.int64
        )

    def find(
        self, space: NDArray[np.uint32], page: NDArray[np.uint32]
    ) -> tuple[Bools, U64, Bools, NDArray[np.int64]]:
        """(known, place u64, full_crc32, reason or -1) of each page; the latter three of no
        meaning where it is not known, nor the place where there is a reason. ``space``,
        ``page``: u32 (n,)."""
        if not self._starts.size:
            nothing = np.zeros(space.shape, np.bool_)
            none = np.full(space.shape, -1, np.int64)
            return nothing, np.zeros(space.shape, np.uint64), nothing.copy(), none
        key = (space.astype(np.uint64) << _SPACE_SHIFT) + page
        entry = np.searchsorted(self._starts, key, side="right") - 1
        entry[entry < 0] = 0
        start = self._starts[entry]
        known = (key >= start) & (key < self._ends[entry])
        place = self.bases[entry] + (key - start)
        return known, place, self._full_crc32[entry], self._reason[entry]

    def pages(self, place: U64) -> U64:
        """The pages at places, u64 (n,), that `find` has told: space << 32 | page."""
        # Of files that begin at one place only the last has any
        entry = np.searchsorted(self.bases, place, side="right") - 1
        found: U64 = self._starts[entry] + (place - self.bases[entry])
        return found


class BlockTable:
    """Finds the volume blocks of places.

    ``table``: where the files are. ``page_size``: bytes of a frame.
    """

    def __init__(self, table: PlaceTable, page_size: int) -> None:
        self._per_frame = page_size // filesystem.BLOCK
        volumes: dict[str, Volume] = {}
        starts, ends, blocks, numbers = [], [], [], []
        for index, file in enumerate(table.files):
            base = int(table.bases[index])
            limit = file.pages * page_size
            for placed in file.placed:
                volumes.setdefault(placed.volume_id, Volume(placed.volume_id, placed.volume_size))
                inside = placed.logical < np.uint64(limit)
                logical = placed.logical[inside]
                length = np.minimum(placed.length[inside], np.uint64(limit) - logical)
                begin = logical // np.uint64(filesystem.BLOCK) + np.uint64(base * self._per_frame)
                starts.append(begin)
                ends.append(begin + length // np.uint64(filesystem.BLOCK))
                blocks.append(placed.offset[inside] // np.uint64(filesystem.BLOCK))
                number = list(volumes).index(placed.volume_id)
                numbers.append(np.full(begin.size, number, np.int64))
        self.volumes = tuple(volumes.values())
        start = np.concatenate(starts) if starts else np.empty(0, np.uint64)
        order = np.argsort(start, kind="stable")
        self._starts: U64 = start[order]
        self._ends: U64 = _in_order(ends, order, np.uint64)
        self._blocks: U64 = _in_order(blocks, order, np.uint64)
        self._volumes: NDArray[np.int64] = _in_order(numbers, order, np.int64)

    def find(self, place: U64) -> tuple[NDArray[np.int64], U64]:
        """The blocks of the frames at ``place`` (u64 (n,)).

        Returns volume int64 (n, blocks per frame), an index into ``volumes`` or -1 where that
        part of the frame is not on a volume; and block u64 (n, blocks per frame).
        """
        first = place * np.uint64(self._per_frame)
        offsets = np.arange(self._per_frame, dtype=np.uint64)
        if not self._starts.size:
            shape = (place.size, self._per_frame)
            return np.full(shape, -1, np.int64), np.zeros(shape, np.uint64)
        volume, block, left = self._find(first)
        # A frame nearly always lies in one extent: then one search does for all of it.
        volumes = np.repeat(volume[:, np.newaxis], self._per_frame, axis=1)
        blocks = block[:, np.newaxis] + offsets
        split = np.flatnonzero(left < self._per_frame)
        if split.size:
            every = (first[split][:, np.newaxis] + offsets).ravel()
            volume, block, _ = self._find(every)
            volumes[split] = volume.reshape(-1, self._per_frame)
            blocks[split] = block.reshape(-1, self._per_frame)
        return volumes, blocks

    def _find(self, first: U64) -> tuple[NDArray[np.int64], U64, NDArray[np.int64]]:
        """(volume or -1, block, blocks from here to the end of the extent) of single blocks."""
        entry = np.searchsorted(self._starts, first, side="right") - 1
        entry[entry < 0] = 0
        start, end = self._starts[entry], self._ends[entry]
        hit = (first >= start) & (first < end)
        volume = np.where(hit, self._volumes[entry], -1)
        left = np.where(hit, (end - first).astype(np.int64), 0)
        return volume, self._blocks[entry] + (first - start), left


def _in_order(arrays: Sequence[NDArray[Any]], order: NDArray[np.int64], kind: Any) -> NDArray[Any]:
    """All arrays as one, rearranged."""
    joined: NDArray[Any] = np.concatenate(arrays) if arrays else np.empty(0, kind)
    return joined[order]
