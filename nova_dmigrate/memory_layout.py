# SPDX-License-Identifier: Apache-2.0
"""Where guest-physical memory lies in QEMU's RAMBlocks.

The guest speaks of guest-physical addresses, the migration stream of RAMBlocks and offsets. How
they correspond depends on machine type, memory size, NUMA nodes and hot-plugged memory (pc puts
the hole below 4 GiB at 3 GiB, q35 at 2 GiB), so nothing is assumed: QEMU is asked with the
monitor command ``info mtree -f``. The names there are the stream's RAMBlock names for all memory
of machine, NUMA nodes and DIMMs; device memory (``vga.vram``) carries its device's path in the
stream only, so a page mapped there names a block that the stream does not have.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from oslo_log import log as logging

from nova_dmigrate import exception
from nova_dmigrate.buffermap import MAX_PAGES, PAGE_SIZE, BufferMap, VolumeMap

LOG = logging.getLogger(__name__)

# The chipset maps the first MiB piece by piece to RAM, ROM, VGA or SMRAM, and firmware changes
# that at run time (PAM, SMRAM registers). No database keeps its pages there.
_LOWEST_GPA = 1 << 20

_FLAT_VIEW = re.compile(r"^FlatView #\d+\s*$", re.MULTILINE)
_SYSTEM_MEMORY = re.compile(r'^ AS "memory", root: ', re.MULTILINE)
_RANGE = re.compile(
    r"^  (?P<start>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, ram\): (?P<block>.+?)"
    r"(?: @(?P<offset>[0-9a-f]{16}))?"
    # With hardware acceleration each range ends with the accelerator that backs it.
    r"(?: (?:KVM|HVF|WHPX|NVMM|MSHV))*\s*$",
    re.MULTILINE,
)

U32 = NDArray[np.uint32]


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryRange:
    """``length`` bytes of RAM at guest-physical address ``gpa``, at ``offset`` of a RAMBlock.

    All three are multiples of 4 KiB.
    """

    gpa: int
    length: int
    block: str
    offset: int


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMap:
    """The mapped pages of one RAMBlock that lie on one volume.

    ``page`` is u32 (n,), the page's number in the RAMBlock (offset / 4 KiB), strictly ascending;
    ``block_number`` is u32 (n,), its volume block. ``block`` is the RAMBlock's name.
    """

    block: str
    volume_id: str
    page: U32
    block_number: U32


@dataclasses.dataclass(frozen=True)
class MemoryLayout:
    """The guest's RAM as ranges of RAMBlocks, sorted by guest-physical address. Immutable.

    :raises MemoryLayoutError: if ranges are unaligned or empty, or two of them share
        guest-physical addresses or bytes of a RAMBlock.
    """

    ranges: tuple[MemoryRange, ...]

    def __post_init__(self) -> None:
        ranges = tuple(sorted(self.ranges, key=lambda each: each.gpa))
        object.__setattr__(self, "ranges", ranges)
        for each in ranges:
            if each.length <= 0 or (each.gpa | each.length | each.offset) % PAGE_SIZE:
                raise _error(f"{each} is empty or not aligned to {PAGE_SIZE} bytes")
        for before, after in itertools.pairwise(ranges):
            if before.gpa + before.length > after.gpa:
                raise _error(f"{before} and {after} overlap in guest memory")
        if len(_without_aliases(ranges)) < len(ranges):
            raise _error("two ranges show the same bytes of a RAMBlock")

    @classmethod
    def from_mtree(cls, text: str) -> "MemoryLayout":
        """Read the answer of the monitor command ``info mtree -f``.

        Takes what is plain RAM in the address space that the guest's CPUs see, above the first
        MiB. Memory shown at several addresses counts at the lowest one.

        :raises MemoryLayoutError: if that address space or any RAM in it cannot be found.
        """
        views = [view for view in _FLAT_VIEW.split(text) if _SYSTEM_MEMORY.search(view)]
        if len(views) != 1:
            raise _error(f'{len(views)} flat views of the address space "memory" instead of one')
        found = (_parse_range(match) for match in _RANGE.finditer(views[0]))
        ranges = _without_aliases(tuple(each for each in found if each is not None))
        if not ranges:
            raise _error("the guest has no RAM above the first MiB")
        return cls(ranges)

    def to_blocks(self, buffer_map: BufferMap) -> list[BlockMap]:
        """The buffer map by RAMBlock and volume, in both orders of first appearance.

        No two of the results share a page of a RAMBlock. Pages outside any range are dropped;
        their number is logged, and is ``buffer_map.page_count`` less the pages returned.
        """
        results = [
            result for volume in buffer_map.volumes for result in self._volume_blocks(volume)
        ]
        outside = buffer_map.page_count - sum(result.page.size for result in results)
        if outside:
            LOG.info(
                "%d of %d mapped pages do not lie in the guest's RAM and are left out",
                outside,
                buffer_map.page_count,
            )
        return results

    def _volume_blocks(self, volume: VolumeMap) -> list[BlockMap]:
        guest, block_number = volume.pages()
        pieces: dict[str, list[tuple[slice, int]]] = {}
        for each in sorted(self.ranges, key=lambda each: each.offset):
            first = each.gpa // PAGE_SIZE
            behind = first + each.length // PAGE_SIZE
            # In u32, or NumPy would convert all of the map to compare.
            bounds = np.array([min(first, MAX_PAGES), min(behind, MAX_PAGES)], np.uint32)
            start, end = np.searchsorted(guest, bounds).tolist()
            if start == end:
                continue
            # Modulo 2**32: an offset may well be below its guest-physical address.
            shift = (each.offset // PAGE_SIZE - first) % 2**32
            pieces.setdefault(each.block, []).append((slice(start, end), shift))
        return [
            BlockMap(
                block,
                volume.volume_id,
                _gathered(guest, there),
                _gathered(block_number, [(piece, 0) for piece, _ in there]),
            )
            for block, there in pieces.items()
        ]


def _gathered(values: U32, pieces: Sequence[tuple[slice, int]]) -> U32:
    """These pieces one behind the other, each with a number added modulo 2**32. No more is copied
    than has to be: a map is large."""
    if len(pieces) == 1 and not pieces[0][1]:
        return values[pieces[0][0]]
    gathered = np.empty(sum(piece.stop - piece.start for piece, _ in pieces), np.uint32)
    behind = 0
    for piece, shift in pieces:
        begin, behind = behind, behind + piece.stop - piece.start
        np.add(values[piece], np.uint32(shift), out=gathered[begin:behind])
    return gathered


def _parse_range(match: re.Match[str]) -> MemoryRange | None:
    """The whole pages of one printed range above the first MiB, or None if it has none."""
    start, end = int(match["start"], 16), int(match["end"], 16) + 1
    offset = int(match["offset"] or "0", 16)
    if start >= end:
        raise _error(f"range {start:#x} ends before it begins")
    if (start - offset) % PAGE_SIZE:
        return None  # its pages are not pages of the RAMBlock
    first = max(-(-start // PAGE_SIZE) * PAGE_SIZE, _LOWEST_GPA)
    length = end // PAGE_SIZE * PAGE_SIZE - first
    if length <= 0:
        return None
    return MemoryRange(first, length, match["block"], offset + first - start)


def _without_aliases(ranges: tuple[MemoryRange, ...]) -> tuple[MemoryRange, ...]:
    """Leave out ranges that show bytes of a RAMBlock which a range at a lower address shows."""
    kept: list[MemoryRange] = []
    for each in sorted(ranges, key=lambda each: each.gpa):
        if not any(
            each.block == other.block
            and each.offset < other.offset + other.length
            and other.offset < each.offset + each.length
            for other in kept
        ):
            kept.append(each)
    return tuple(kept)


def _error(reason: str) -> exception.MemoryLayoutError:
    return exception.MemoryLayoutError(reason=reason)
