# SPDX-License-Identifier: Apache-2.0
"""The part of a buffer map that concerns one volume, as arrays of runs or of single pages.

Guest pages and volume blocks are both 4 KiB and are numbered by unsigned 32-bit integers. That
limits guest-physical addresses and volume offsets to just below 16 TiB, and makes a map entry
8 bytes (guest page, block). Where neighbours continue each other a run takes 12 bytes (guest
page, block, length) however long it is; a volume map uses runs only when that is smaller.

All work is done on whole arrays: a buffer pool of 64 GiB has 16 million guest pages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate import exception

PAGE_SIZE = 4096
_PAGE_SHIFT = 12

# Page numbers stay below this, so that the page behind the last one, and the length of any run,
# still fit into 32 bits: no sum in this package can wrap unless it is meant to.
MAX_PAGES = 2**32 - 1

FLAT_ENTRY_BYTES = 8
RUN_ENTRY_BYTES = 12

# Entries that are compared at a time: what that takes must not count beside the map
_STRETCH = 1 << 18

# The name comes from the guest and ends up in log lines and file names.
_VOLUME_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, eq=False)
class VolumeExtents:
    """Where guest memory holds copies of one volume's bytes, as found: in bytes, unsorted.

    ``guest``, ``volume_offset`` and ``length`` are integer arrays of one shape (n,), in bytes:
    guest-physical address, offset on the volume, number of equal bytes. ``size`` is the size of
    the volume in bytes. Nothing is checked here; ``BufferMap.build`` does.
    """

    volume_id: str
    size: int
    guest: NDArray[Any]
    volume_offset: NDArray[Any]
    length: NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class VolumeMap:
    """The mapped pages of one volume, sorted by guest page, without overlaps. Immutable.

    ``guest_pages`` and ``volume_blocks`` are u32 (n,): the first page and block of each entry.
    ``lengths`` is u32 (n,), the entry's number of pages, or None when all entries are one page.
    Make it with ``from_extents`` or ``from_runs``, which validate; the constructor does not.
    """

    volume_id: str
    size: int
    guest_pages: U32
    volume_blocks: U32
    lengths: U32 | None

    def __post_init__(self) -> None:
        for array in (self.guest_pages, self.volume_blocks, self.lengths):
            if array is not None:
                array.flags.writeable = False

    @classmethod
    def from_extents(cls, extents: VolumeExtents) -> VolumeMap:
        """Validate and sort extents in bytes.

        :raises BufferMapError: if an extent is empty, not aligned to 4 KiB, outside the volume
            or beyond 16 TiB, or if two extents share a guest page.
        """
        check_volume(extents.volume_id, extents.size)
        guest = _to_pages(extents, "guest")
        block = _to_pages(extents, "volume_offset")
        length = _to_pages(extents, "length")
        if not guest.shape == block.shape == length.shape:
            raise _error(extents.volume_id, "the arrays of its extents differ in length")
        if not guest.size:
            empty = np.empty(0, np.uint32)
            return cls(extents.volume_id, extents.size, empty, empty.copy(), None)
        if not length.all():
            raise _error(extents.volume_id, "an extent is empty")
        # No sum wraps: each number is below 2**52.
        if int((guest + length).max()) > MAX_PAGES:
            raise _error(extents.volume_id, "an extent reaches beyond 16 TiB of guest memory")
        if int((block + length).max()) > block_count(extents.size):
            raise _error(extents.volume_id, f"an extent ends beyond its {extents.size} bytes")
        return cls.from_runs(extents.volume_id, extents.size, *_sort(guest, block, length))

    @classmethod
    def from_runs(
        cls, volume_id: str, size: int, guest: U32, block: U32, lengths: U32 | None
    ) -> VolumeMap:
        """Take sorted entries, whose bounds were checked, in the smallest form.

        Adjacent entries that continue each other on both sides become one. The arrays belong to
        the map afterwards.

        :raises BufferMapError: if two entries share a guest page, or they are not sorted.
        """
        first = _begins(volume_id, guest, block, lengths)
        runs = int(np.count_nonzero(first))
        pages = guest.size if lengths is None else int(lengths.sum(dtype=np.uint64))
        if runs * RUN_ENTRY_BYTES < pages * FLAT_ENTRY_BYTES:
            if lengths is not None and runs == guest.size:
                return cls(volume_id, size, guest, block, lengths)
            lengths = _run_lengths(first, lengths)
            return cls(volume_id, size, guest[first], block[first], lengths)
        # At most one and a half pages an entry: expanding is cheap even for hostile input.
        return cls(volume_id, size, *_expand(guest, block, lengths), None)

    @property
    def page_count(self) -> int:
        """Number of mapped guest pages."""
        if self.lengths is None:
            return self.guest_pages.size
        return int(self.lengths.sum(dtype=np.uint64))

    @property
    def behind(self) -> U32:
        """The guest page behind each entry: u32 (n,)."""
        step: Any = 1 if self.lengths is None else self.lengths
        behind: U32 = self.guest_pages + step
        return behind

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take in memory."""
        lengths = 0 if self.lengths is None else self.lengths.nbytes
        return self.guest_pages.nbytes + self.volume_blocks.nbytes + lengths

    def pages(self) -> tuple[U32, U32]:
        """Every mapped page: (guest page u32 (pages,), volume block u32 (pages,)), sorted by
        guest page. Where the map is flat these are the map's own arrays, which are read-only."""
        return _expand(self.guest_pages, self.volume_blocks, self.lengths)

    def lookup(self, guest: U32) -> NDArray[np.int64]:
        """The volume block of each guest page of ``guest`` (u32, (n,)), or -1: int64 (n,).

        Fastest when ``guest`` is sorted.

        :raises TypeError: for an array that does not fit into u32; casting it could alias pages.
        """
        wanted = np.asarray(guest).astype(np.uint32, casting="safe", copy=False)
        if not self.guest_pages.size:
            return np.full(wanted.shape, -1, np.int64)
        # Pages before the first entry get the last one (-1), and modulo 2**32 a distance from it
        # that no entry is long enough for.
        entry = np.searchsorted(self.guest_pages, wanted, side="right") - 1
        distance = wanted - self.guest_pages[entry]
        mapped = distance < (1 if self.lengths is None else self.lengths[entry])
        found = (self.volume_blocks[entry] + distance).astype(np.int64)
        found[~mapped] = -1
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VolumeMap):
            return NotImplemented
        if (self.volume_id, self.size) != (other.volume_id, other.size):
            return False
        if (self.lengths is None) != (other.lengths is None):
            return False
        return (
            np.array_equal(self.guest_pages, other.guest_pages)
            and np.array_equal(self.volume_blocks, other.volume_blocks)
            and (
                self.lengths is None
                or other.lengths is None
                or np.array_equal(self.lengths, other.lengths)
            )
        )


def check_volume(volume_id: str, size: int) -> None:
    """Check a volume's name and its size in bytes.

    :raises BufferMapError: if one of them cannot be meant.
    """
    if not _VOLUME_ID.fullmatch(volume_id):
        raise exception.BufferMapError(reason=f"{volume_id[:40]!r} is not a volume's name")
    if not 0 <= size < 2**63:
        raise _error(volume_id, f"{size} bytes is not a volume's size")


def note_size(sizes: dict[str, int], volume_id: str, size: int) -> None:
    """Remember the size of a volume, in bytes.

    :raises BufferMapError: if another one is known.
    """
    if sizes.setdefault(volume_id, size) != size:
        raise _error(volume_id, f"it cannot have {sizes[volume_id]} and {size} bytes")


def check_overlaps(volumes: tuple[VolumeMap, ...]) -> None:
    """Check that no guest page is mapped to more than one volume.

    :raises BufferMapError: if one is.
    """
    if overlapping(volumes):
        raise exception.BufferMapError(reason="a guest page is mapped to two volumes")


def overlapping(volumes: tuple[VolumeMap, ...]) -> bool:
    """Whether a guest page is mapped to more than one volume."""
    if len(volumes) < 2:
        return False
    # Start and end of each entry in one u64, so that one sort does. It finds the volumes sorted
    # already, and the stable sort merges such stretches in linear time.
    spans = np.empty(sum(volume.guest_pages.size for volume in volumes), np.uint64)
    behind = 0
    for volume in volumes:
        begin, behind = behind, behind + volume.guest_pages.size
        spans[begin:behind] = volume.guest_pages
        spans[begin:behind] <<= np.uint64(32)
        spans[begin:behind] |= volume.behind
    spans.sort(kind="stable")
    return any(
        bool(((after >> np.uint64(32)) < (one & np.uint64(MAX_PAGES))).any())
        for one, after in _neighbours(spans)
    )


def block_count(size: int) -> int:
    """Number of volume blocks that can be mapped in a volume of ``size`` bytes."""
    return min(size >> _PAGE_SHIFT, MAX_PAGES)


def _error(volume_id: str, what: str) -> exception.BufferMapError:
    return exception.BufferMapError(reason=f"volume {volume_id}: {what}")


def _to_pages(extents: VolumeExtents, field: str) -> U64:
    """One array of the extents in units of pages, as a new u64 (n,)."""
    values = np.asarray(getattr(extents, field))
    if values.ndim != 1:
        raise _error(extents.volume_id, f"{field} is not a one-dimensional array")
    if not values.size:
        return np.empty(0, np.uint64)
    if values.dtype.kind not in "iu" or int(values.min()) < 0:
        raise _error(extents.volume_id, f"{field} must be unsigned integers")
    pages = values.astype(np.uint64)
    if bool((pages & np.uint64(PAGE_SIZE - 1)).any()):
        raise _error(extents.volume_id, f"{field} is not aligned to {PAGE_SIZE} bytes")
    pages >>= np.uint64(_PAGE_SHIFT)
    return pages


def _sort(guest: U64, block: U64, length: U64) -> tuple[U32, U32, U32 | None]:
    """Sort by guest page; lengths are None when all of them are 1."""
    if int(length.max()) == 1:
        # Sorting one array of (guest, block) is several times as fast as sorting indices.
        pairs = guest << np.uint64(32)
        pairs |= block
        pairs.sort()
        return (pairs >> np.uint64(32)).astype(np.uint32), pairs.astype(np.uint32), None
    order = np.argsort(guest)
    return (
        guest[order].astype(np.uint32),
        block[order].astype(np.uint32),
        length[order].astype(np.uint32),
    )


def _run_lengths(first: NDArray[np.bool_], lengths: U32 | None) -> U32:
    """Lengths of the runs that begin where ``first`` is set."""
    starts = np.flatnonzero(first)
    if lengths is None:
        return np.diff(starts, append=first.size).astype(np.uint32)
    return np.add.reduceat(lengths, starts, dtype=np.uint32)


def _expand(guest: U32, block: U32, lengths: U32 | None) -> tuple[U32, U32]:
    """Entries as single pages. Without lengths they are that already."""
    if lengths is None:
        return guest, block
    before = np.cumsum(lengths, dtype=np.uint32) - lengths
    position = np.arange(int(lengths.sum(dtype=np.uint64)), dtype=np.uint32)
    # (entry's start - pages before the entry) + position; modulo 2**32 throughout
    return (
        np.repeat(guest - before, lengths) + position,
        np.repeat(block - before, lengths) + position,
    )


def _begins(volume_id: str, guest: U32, block: U32, lengths: U32 | None) -> NDArray[np.bool_]:
    """Which entries do not continue the one before them on both sides.

    :raises BufferMapError: if two entries share a guest page, or they are not sorted.
    """
    first = np.ones(guest.size, np.bool_)
    for start in range(0, guest.size - 1, _STRETCH):
        one = slice(start, min(start + _STRETCH, guest.size - 1))
        after = slice(one.start + 1, one.stop + 1)
        step: Any = 1 if lengths is None else lengths[one]
        follows = guest[one] + step  # the guest page behind each entry; fits, see MAX_PAGES
        if bool((guest[after] < follows).any()):
            raise _error(volume_id, "two extents share a guest page")
        first[after] = (guest[after] != follows) | (block[after] != block[one] + step)
    return first


def _neighbours(values: U64) -> Iterator[tuple[U64, U64]]:
    """Each value but the last, and the one behind it, in stretches."""
    for start in range(0, values.size - 1, _STRETCH):
        behind = min(start + _STRETCH, values.size - 1)
        yield values[start:behind], values[start + 1 : behind + 1]
