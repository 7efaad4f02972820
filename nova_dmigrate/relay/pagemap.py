# SPDX-License-Identifier: Apache-2.0
"""The page map: the buffer map as two relays see it, in the terms of one migration stream.

Both relays derive it from the same inputs (buffer map, memory layout, RAMBlocks of the stream), so
that they number its entries alike and an entry's number can stand on the wire for guest page and
volume block.

*Position*: number of a 4 KiB guest page when all RAMBlocks are laid one after another in stream
order. *Volume position*: number of a 4 KiB block when all volumes of the map are laid one after
another.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from oslo_log import log

from nova_dmigrate import exception
from nova_dmigrate.buffermap import PAGE_SIZE, BufferMap
from nova_dmigrate.memory_layout import BlockMap, MemoryLayout
from nova_dmigrate.stream.elements import RamBlock

LOG = log.getLogger(__name__)

_U32_LIMIT = 1 << 32

U32 = NDArray[np.uint32]


@dataclass(frozen=True)
class MappedVolume:
    """One volume of the map: its identity and where its blocks begin among the volume positions."""

    volume_id: str
    first: int
    blocks: int


class PageMap:
    """Mapped guest pages of one stream, numbered as entries 0..n-1 in ascending position.

    :ivar position: uint32 (n,), sorted, unique.
    :ivar volume_position: uint32 (n,).
    :ivar bases: first position of each RAMBlock, int64 (len(blocks) + 1,); the last is the total.
    :ivar dropped: mapped pages of the buffer map that no RAMBlock of the stream holds.
    """

    def __init__(
        self,
        bases: NDArray[np.int64],
        position: NDArray[np.uint32],
        volume_position: NDArray[np.uint32],
        volumes: tuple[MappedVolume, ...],
        dropped: int = 0,
    ) -> None:
        self.bases = bases
        self.position = position
        self.volume_position = volume_position
        self.volumes = volumes
        self.dropped = dropped

    def __len__(self) -> int:
        return len(self.position)

    @property
    def total_pages(self) -> int:
        """Guest pages of all RAMBlocks together."""
        return int(self.bases[-1])

    @classmethod
    def build(
        cls, blocks: Sequence[RamBlock], buffer_map: BufferMap, layout: MemoryLayout
    ) -> "PageMap":
        """Place a buffer map over the RAMBlocks of a stream.

        Pages that fall outside of every RAMBlock are dropped and counted: the map comes from the
        guest.

        :raises BufferMapError: RAM or volumes exceed 2^32 pages of 4 KiB (16 TiB).
        """
        lengths = [-(-block.used_length // PAGE_SIZE) for block in blocks]
        bases = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)
        volumes = []
        first = 0
        for volume in buffer_map.volumes:
            volumes.append(MappedVolume(volume.volume_id, first, volume.size // PAGE_SIZE))
            first += volume.size // PAGE_SIZE
        if bases[-1] > _U32_LIMIT or first > _U32_LIMIT:
            raise exception.BufferMapError(reason="RAM or volumes are larger than 16 TiB")
        index = {block.idstr: number for number, block in enumerate(blocks)}
        first_of = {volume.volume_id: volume.first for volume in volumes}
        parts: list[tuple[BlockMap, int, int]] = []
        for part in layout.to_blocks(buffer_map):
            number = index.get(part.block)
            if number is None:
                continue
            # In u32, or NumPy would convert all of the map to compare
            limit = np.array(min(lengths[number], _U32_LIMIT - 1), np.uint32)
            inside = int(np.searchsorted(part.page, limit))
            if inside:
                parts.append((part, inside, int(bases[number])))
        # Nothing is copied but into these: maps are large
        position = np.empty(sum(inside for _, inside, _ in parts), np.uint32)
        volume_position = np.empty_like(position)
        behind = 0
        while parts:
            part, inside, base = parts.pop(0)
            begin, behind = behind, behind + inside
            np.add(part.page[:inside], np.uint32(base), out=position[begin:behind])
            first = first_of[part.volume_id]
            np.add(part.block_number[:inside], np.uint32(first), out=volume_position[begin:behind])
            del part
        if not _ascending(position):
            _sort(position, volume_position)
        if not _ascending(position):
            # Two guest-physical ranges may alias one RAMBlock page; the first block serves.
            keep = np.concatenate(([True], position[1:] != position[:-1]))
            position, volume_position = position[keep], volume_position[keep]
        mapped = sum(volume.page_count for volume in buffer_map.volumes)
        return cls(bases, position, volume_position, tuple(volumes), mapped - len(position))

    @classmethod
    def place_map(
        cls, blocks: Sequence[RamBlock], buffer_map: BufferMap, layout: MemoryLayout
    ) -> "PageMap":
        """As :meth:`build`, but a map that cannot be placed is as good as none, at both ends."""
        try:
            return cls.build(blocks, buffer_map, layout)
        except exception.BufferMapError as error:
            LOG.warning("The buffer map is not used: %s", error)
            return cls.empty(blocks)

    @classmethod
    def empty(cls, blocks: Sequence[RamBlock]) -> "PageMap":
        """The map of a guest of which nothing is known."""
        lengths = [-(-block.used_length // PAGE_SIZE) for block in blocks]
        bases = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)
        none = np.empty(0, np.uint32)
        return cls(bases, none, none, ())

    def positions(self, block: int, offsets: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Positions of the pages at ``offsets`` (bytes, uint64 (n,)) in RAMBlock ``block``."""
        positions: NDArray[np.int64] = (offsets >> np.uint64(12)).astype(np.int64)
        positions += self.bases[block]
        return positions

    def entries(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entry numbers, int64 (n,), of positions; -1 where a page is not mapped."""
        if not len(self.position):
            return np.full(len(positions), -1, np.int64)
        found = np.searchsorted(self.position, positions.astype(np.uint32))
        found[found == len(self.position)] = 0
        return np.where(self.position[found] == positions, found, -1)

    def entries_before(self, position: int) -> int:
        """How many entries lie before a position."""
        if position >= _U32_LIMIT:
            return len(self.position)
        # In u32, or NumPy would convert all of the map to compare
        return int(np.searchsorted(self.position, np.array(position, np.uint32)))

    def place(self, entries: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64] | slice]]:
        """Split entries by RAMBlock: ``(block, indices into entries)``, one pair per block that
        occurs.
        """
        blocks = np.searchsorted(self.bases, self.position[entries], side="right") - 1
        first = int(blocks[0])
        if bool((blocks == first).all()):
            # Not an array: indexing with a slice copies nothing.
            return [(first, slice(None))]
        return [(int(block), np.flatnonzero(blocks == block)) for block in np.unique(blocks)]

    def offsets(self, block: int, entries: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Byte offsets, uint64 (n,), in RAMBlock ``block`` of entries that lie in it."""
        offsets: NDArray[np.uint64] = self.position[entries].astype(np.uint64)
        offsets -= np.uint64(self.bases[block])
        offsets *= np.uint64(PAGE_SIZE)
        return offsets


def _sort(position: U32, volume_position: U32) -> None:
    """Put both in the order of positions, in place."""
    # Sorting one array of pairs takes a third of the memory of sorting indices, and less time
    pairs = position.astype(np.uint64)
    pairs <<= np.uint64(32)
    pairs |= volume_position
    pairs.sort()
    halves = pairs.view(np.uint32).reshape(-1, 2)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    position[:] = halves[:, high]
    volume_position[:] = halves[:, low]


def _ascending(values: U32) -> bool:
    """Whether each is larger than the one before it."""
    return bool((values[1:] > values[:-1]).all())
