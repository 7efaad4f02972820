# SPDX-License-Identifier: Apache-2.0
"""The frames that one search has found, in as little memory as will do.

64 GiB of buffer pool are 4.2 million frames, of which 24 bytes each are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.agent import arrays

_SLAB_FRAMES = 1 << 18
_STEP = 1 << 14  # frames that are worked on at a time
# Repeated places are looked for in one group of places after the other, each of about that many
# frames: it bounds memory. All frames are gone through for each group, so there are not many of
# them either: of a pool of terabytes a group then takes 0.5 bytes a frame
_GROUP_FRAMES = 1 << 18
_MOST_GROUPS = 32
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
        self.per_frame = per_frame
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
                self._slabs.append(_Slab(self.per_frame))
            number = min(place.size - done, _SLAB_FRAMES - at)
            self._slabs[-1].put(at, place, lsn, guest, slice(done, done + number))
            done += number
            self._count += number

    def keep_newest(self) -> int:
        """Leave out frames that cannot be what is on the volume; how many they are.

        A frame on the free list may still hold the page that it had. When that page was read
        again, or changed meanwhile, there are two: only the newest can be what is on the volume.
        Equal ones both are.

        No frames can be added afterwards, because their LSNs are given up.
        """
        repeated = self._repeated()
        rows = (repeated & np.uint64(0xFFFFFFFF)).astype(np.int64)
        lsn = self._lsn(rows)
        first = np.ones(rows.size, np.bool_)
        first[1:] = _differ(repeated)
        group = np.cumsum(first) - 1
        newest = np.zeros(np.count_nonzero(first), np.uint32)
        np.maximum.at(newest, group, lsn)
        older = rows[lsn != newest[group]]
        for number, slab in enumerate(self._slabs):
            slab.finish(older[older // _SLAB_FRAMES == number] % _SLAB_FRAMES)
        return int(older.size)

    def kept(self) -> Iterator[tuple[U32, U32]]:
        """Place (n,) and guest pages (n, per frame) of the frames that were kept, in pieces."""
        for number, slab in enumerate(self._slabs):
            size = min(self._count - number * _SLAB_FRAMES, _SLAB_FRAMES)
            for start in range(0, size, _STEP):
                yield slab.kept(slice(start, min(start + _STEP, size)))

    def _repeated(self) -> U64:
        """(place << 32 | number of the frame) of all frames whose place is there twice, sorted
        within each group of places."""
        found = [np.empty(0, np.uint64)]
        groups = min(1 << (self._count // _GROUP_FRAMES).bit_length(), _MOST_GROUPS)
        for group in range(groups):
            keys = self._keys(group, groups)
            keys.sort()
            same = np.zeros(keys.size, np.bool_)
            same[1:] = ~_differ(keys)
            same[:-1] |= same[1:]
            found.append(keys[same])
        return np.concatenate(found)

    def _keys(self, group: int, groups: int) -> U64:
        """place << 32 | number of the frame, of the frames whose place is of that group, of
        ``groups`` (a power of 2)."""
        found = [np.empty(0, np.uint64)]
        for index, slab in enumerate(self._slabs):
            begin = index * _SLAB_FRAMES
            place = slab.place[: self._count - begin]
            rows = np.flatnonzero(place & np.uint32(groups - 1) == group)
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
    """Room for ``_SLAB_FRAMES`` frames."""

    def __init__(self, per_frame: int) -> None:
        self.place: U32 = arrays.zeros(_SLAB_FRAMES, np.uint32)
        self.lsn: U32 = arrays.zeros(_SLAB_FRAMES, np.uint32)
        guest: U32 = arrays.zeros(_SLAB_FRAMES * per_frame, np.uint32)
        self._guest = guest.reshape(_SLAB_FRAMES, per_frame)
        self._left_out: Bools | None = None

    def put(self, at: int, place: U64, lsn: U32, guest: NDArray[np.int64], part: slice) -> None:
        here = slice(at, at + part.stop - part.start)
        self.place[here] = place[part]
        self.lsn[here] = lsn[part]
        self._guest[here] = guest[part]

    def finish(self, left_out: NDArray[np.int64]) -> None:
        """Give up the LSNs; the frames at ``left_out`` are never returned."""
        self.lsn = np.empty(0, np.uint32)
        if left_out.size:
            self._left_out = np.zeros(_SLAB_FRAMES, np.bool_)
            self._left_out[left_out] = True

    def kept(self, part: slice) -> tuple[U32, U32]:
        place, guest = self.place[part], self._guest[part]
        if self._left_out is None:
            return place, guest
        keep = ~self._left_out[part]
        return place[keep], guest[keep]


def _differ(keys: U64) -> Bools:
    """Whether each key but the first is of another place than the one before it."""
    differ: Bools = (keys[1:] ^ keys[:-1]) >= _ONE_PLACE
    return differ
