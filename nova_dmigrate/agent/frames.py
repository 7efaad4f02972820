# SPDX-License-Identifier: Apache-2.0
"""The frames that one search has found, in as little memory as will do.

64 GiB of buffer pool are 4.2 million frames, of which 24 bytes each are kept. They are kept in
slabs that go back to the system as the map is made of them, because the map takes more again.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_SLAB_FRAMES = 1 << 18
_STEP = 1 << 14  # frames that are worked on at a time
# Repeated places are looked for in one group of places after the other: it bounds memory
_GROUPS = 8
_HALF = np.uint64(32)
_ONE_PLACE = np.uint64(1 << 32)

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]


class FrameTable:
    """Frames in the order in which they were added.

    ``per_frame``: guest pages of a frame.
    """

    def __init__(self, per_frame: int) -> None:
        self._per_frame = per_frame
        self._slabs: list[_Slab] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, place: NDArray[np.uint64], lsn: U32, guest: NDArray[np.int64]) -> None:
        """Add frames: place (n,), low half of the LSN (n,), guest pages (n, per frame)."""
        done = 0
        while done < place.size:
            at = self._count % _SLAB_FRAMES
            if not at:
                self._slabs.append(_Slab(self._per_frame))
            number = min(place.size - done, _SLAB_FRAMES - at)
            self._slabs[-1].put(at, place, lsn, guest, slice(done, done + number))
            done += number
            self._count += number

    def newest(self) -> Bools:
        """Which frames to keep: bool (frames,).

        A frame on the free list may still hold the page that it had. When that page was read
        again, or changed meanwhile, there are two: only the newest can be what is on the volume.
        Equal ones both are.
        """
        keep = np.ones(self._count, np.bool_)
        repeated = self._repeated()
        if not repeated.size:
            return keep
        rows = (repeated & np.uint64(0xFFFFFFFF)).astype(np.int64)
        lsn = self._lsn(rows)
        first = np.ones(rows.size, np.bool_)
        first[1:] = _differ(repeated)
        group = np.cumsum(first) - 1
        newest = np.zeros(int(group[-1]) + 1, np.uint32)
        np.maximum.at(newest, group, lsn)
        keep[rows[lsn != newest[group]]] = False
        return keep

    def drain(self, keep: Bools) -> Iterator[tuple[U64, U64]]:
        """Take out the frames that ``keep`` (bool (frames,)) says: place u64 (n,), guest pages
        u64 (n, per frame), in pieces, the last first."""
        while self._slabs:
            begin = (len(self._slabs) - 1) * _SLAB_FRAMES
            size = self._count - begin
            slab = self._slabs.pop()
            self._count = begin
            for start in range(0, size, _STEP):
                part = slice(start, min(start + _STEP, size))
                kept = keep[begin + part.start : begin + part.stop]
                yield (
                    slab.place[part][kept].astype(np.uint64),
                    slab.guest[part][kept].astype(np.uint64),
                )

    def _repeated(self) -> U64:
        """(place << 32 | number of the frame) of all frames whose place is there twice, sorted
        within each group of places."""
        found = [np.empty(0, np.uint64)]
        for group in range(_GROUPS):
            keys = self._keys(group)
            keys.sort()
            same = np.zeros(keys.size, np.bool_)
            same[1:] = ~_differ(keys)
            same[:-1] |= same[1:]
            found.append(keys[same])
        return np.concatenate(found)

    def _keys(self, group: int) -> U64:
        """place << 32 | number of the frame, of the frames whose place is of that group."""
        found = [np.empty(0, np.uint64)]
        for index, slab in enumerate(self._slabs):
            begin = index * _SLAB_FRAMES
            place = slab.place[: self._count - begin]
            rows = np.flatnonzero(place % np.uint32(_GROUPS) == group)
            keys = place[rows].astype(np.uint64) << _HALF
            keys |= (rows + begin).astype(np.uint64)
            found.append(keys)
        return np.concatenate(found)

    def _lsn(self, rows: NDArray[np.int64]) -> U32:
        """The LSN's low half of the frames numbered ``rows``."""
        lsn = np.empty(rows.size, np.uint32)
        owner = rows // _SLAB_FRAMES
        for number in np.unique(owner).tolist():
            mine = owner == number
            lsn[mine] = self._slabs[number].lsn[rows[mine] % _SLAB_FRAMES]
        return lsn


class _Slab:
    """Room for ``_SLAB_FRAMES`` frames. Memory of its own mapping, not of the heap: it is given
    back at once when the slab is dropped."""

    def __init__(self, per_frame: int) -> None:
        room = mmap.mmap(-1, _SLAB_FRAMES * 4 * (2 + per_frame))
        cells = np.frombuffer(room, np.uint32)
        self.place = cells[:_SLAB_FRAMES]
        self.lsn = cells[_SLAB_FRAMES : 2 * _SLAB_FRAMES]
        self.guest = cells[2 * _SLAB_FRAMES :].reshape(_SLAB_FRAMES, per_frame)

    def put(self, at: int, place: U64, lsn: U32, guest: NDArray[np.int64], part: slice) -> None:
        here = slice(at, at + part.stop - part.start)
        self.place[here] = place[part]
        self.lsn[here] = lsn[part]
        self.guest[here] = guest[part]


def _differ(keys: U64) -> Bools:
    """Whether each key but the first is of another place than the one before it."""
    differ: Bools = (keys[1:] ^ keys[:-1]) >= _ONE_PLACE
    return differ
