# SPDX-License-Identifier: Apache-2.0
"""The memory of a database server that is too large for any machine at hand.

What the agent reads of a server (guest pages, 46 bytes of each frame) is computed when it is asked
for, as a function of the frame's number, so that nothing of it is kept: what a process takes is
what the agent itself takes. Permutations make the disorder.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.agent import location, memory, pages, storage

FRAME = 16384
PER_FRAME = FRAME // memory.PAGE_SIZE
#: Where the pool begins in the server's address space.
BASE = 1 << 40
VOLUME = "6f1d2c3b-4a59-4687-9a0b-1c2d3e4f5a6b"

HUGE = "huge"
SCATTERED = "scattered"
LAYOUTS = (HUGE, SCATTERED)

_HUGE_FRAMES = 128  # of a huge page of 2 MiB
_HUGE_RUN = 64  # huge pages that the kernel gave one after the other
_READ_AHEAD = 64  # frames that a scan has read one after the other (an InnoDB extent)
_EXTENT_PAGES = 8192  # of a file on the volume: 128 MiB, ext4's longest
_TABLE_PAGES = 1 << 16  # of a table at least: 1 GiB
_LSN = 1 << 40
_TREE_PAGE = 17855

_PIECE = np.dtype(
    {
        "names": ["page", "lsn", "type", "space", "trailer_crc", "trailer"],
        "formats": [">u4", ">u8", ">u2", ">u4", ">u4", ">u4"],
        "offsets": [4, 16, 24, 34, pages.HEADER_BYTES, pages.HEADER_BYTES + 4],
        "itemsize": pages.HEADER_BYTES + pages.TRAILER_BYTES,
    }
)

U64 = NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A server's memory.

    :ivar frames: of the pool, 16 KiB each.
    :ivar layout: how they lie in guest memory: ``huge`` (pages of 2 MiB, 128 MiB of them in a row)
        or ``scattered`` (each 4 KiB page anywhere).
    :ivar scanned: share of the frames that were read in file order, 1 MiB at a time; the others
        were read one by one.
    :ivar dirty: share that was changed and not written. :ivar free: share that holds no page.
    :ivar tables: size of all tables, in pools.
    """

    frames: int
    layout: str = HUGE
    scanned: float = 0.5
    dirty: float = 0.03
    free: float = 0.01
    tables: float = 1.25

    @classmethod
    def of_gib(cls, gib: float, layout: str = HUGE) -> Shape:
        """A pool of that size, in whole runs of huge pages.

        :raises ValueError: there is no such layout.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"{layout}: not one of {', '.join(LAYOUTS)}")
        run = _HUGE_FRAMES * _HUGE_RUN
        return cls(max(1, round(gib * (1 << 30) / FRAME / run)) * run, layout)

    @property
    def bytes(self) -> int:
        return self.frames * FRAME

    @property
    def guest_bytes(self) -> int:
        """The guest's memory, with a quarter beside the pool, as 3904 GiB have 3 TiB."""
        return self.bytes * 61 // 48 // (1 << 21) * (1 << 21)

    @property
    def table_pages(self) -> int:
        """Pages of all tables, in whole extents of the file system."""
        return -(-int(self.frames * self.tables) // _EXTENT_PAGES) * _EXTENT_PAGES

    @property
    def volume_bytes(self) -> int:
        """The volume, a third of which is free."""
        return self.table_pages * FRAME * 3 // 2


def files(shape: Shape) -> list[location.File]:
    """The tables, each in extents that lie anywhere on the volume; some are 64 times as large as
    others."""
    extents = shape.table_pages // _EXTENT_PAGES
    places = Permutation(extents * 3 // 2, seed=3).of(np.arange(extents, dtype=np.uint64))
    found, begin, number = [], 0, 0
    while begin < shape.table_pages:
        size = min(_TABLE_PAGES << (number % 7), shape.table_pages - begin)
        mine = places[begin // _EXTENT_PAGES : (begin + size) // _EXTENT_PAGES]
        length = np.full(mine.size, _EXTENT_PAGES * FRAME, np.uint64)
        placed = storage.Placed(
            VOLUME,
            shape.volume_bytes,
            np.arange(mine.size, dtype=np.uint64) * np.uint64(_EXTENT_PAGES * FRAME),
            mine * np.uint64(_EXTENT_PAGES * FRAME),
            length,
        )
        found.append(location.File(number + 1, 0, size, False, None, (placed,)))
        begin += size
        number += 1
    return found


class Permutation:
    """A fixed disorder of 0..size-1: rounds of multiplying and folding, each of which can be
    undone; what falls beyond the end goes round again."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = np.uint64(size)
        bits = max(2, (size - 1).bit_length())
        self._mask = np.uint64((1 << bits) - 1)
        self._shift = np.uint64(-(-bits // 2))
        random = np.random.default_rng(seed)
        self._rounds = [
            (np.uint64(int(odd) | 1), np.uint64(int(more)))
            for odd, more in random.integers(1 << 20, 1 << 62, (3, 2))
        ]

    def of(self, numbers: U64) -> U64:
        """Where each of these numbers goes."""
        result = self._once(numbers)
        outside = np.flatnonzero(result >= self._size)
        while outside.size:
            result[outside] = self._once(result[outside])
            outside = outside[result[outside] >= self._size]
        return result

    def _once(self, numbers: U64) -> U64:
        mixed = numbers.astype(np.uint64)
        for factor, summand in self._rounds:
            mixed *= factor
            mixed += summand
            mixed &= self._mask
            mixed ^= mixed >> self._shift
        return mixed


class Memory(memory.ProcessMemory):
    """What the agent sees of the server.

    :ivar seconds: of a processor that it took to make this up, in all threads.
    """

    def __init__(self, shape: Shape, table: location.PlaceTable) -> None:
        # Not the base class's: there is no such process
        self._shape = shape
        self._table = table
        self._lock = threading.Lock()
        self.seconds = 0.0
        frames, groups = shape.frames, shape.frames // _READ_AHEAD
        self._groups = Permutation(groups, seed=4)
        self._scanned = int(groups * shape.scanned) * _READ_AHEAD
        extents = int(shape.table_pages // _READ_AHEAD * shape.scanned)
        self._scan_pages = Permutation(extents, seed=5)
        self._first_single = extents * _READ_AHEAD
        self._single_pages = Permutation(shape.table_pages - self._first_single, seed=6)
        self._runs = Permutation(frames // _HUGE_FRAMES // _HUGE_RUN, seed=7)
        self._pages = Permutation(frames * PER_FRAME, seed=8)
        self._luck = Permutation(frames, seed=9)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """There is nothing to close."""

    def mappings(self, min_bytes: int = 0) -> list[memory.Mapping]:
        return [memory.Mapping(BASE, BASE + self._shape.bytes)]

    def guest_pages(self, address: int, count: int) -> NDArray[np.int64]:
        began = time.thread_time()
        first = (address - BASE) // memory.PAGE_SIZE
        page = np.arange(first, first + count, dtype=np.uint64)
        if self._shape.layout == SCATTERED:
            guest = self._pages.of(page)
        else:
            run = np.uint64(_HUGE_RUN * _HUGE_FRAMES * PER_FRAME)
            guest = self._runs.of(page // run) * run + page % run
        # What is not the pool's lies below
        guest += np.uint64((self._shape.guest_bytes - self._shape.bytes) // memory.PAGE_SIZE)
        result = guest.astype(np.int64)
        self._note(began)
        return result

    def read_pieces(self, addresses: U64, lengths: U64) -> tuple[NDArray[np.uint8], bool]:
        began = time.thread_time()
        headers = lengths >= pages.HEADER_BYTES
        if int(headers.sum()) * _PIECE.itemsize != int(lengths.sum()):
            # Whoever looks for something else than frames finds nothing
            return np.zeros(int(lengths.sum()), np.uint8), True
        starts = addresses[headers]
        starts = np.where(lengths[headers] == _PIECE.itemsize, starts + np.uint64(8), starts)
        result = self._pieces((starts - np.uint64(BASE)) // np.uint64(FRAME)).view(np.uint8)
        self._note(began)
        return result, True

    def _pieces(self, frames: U64) -> NDArray[np.void]:
        """Header and trailer of these frames."""
        key = self._table.pages(self._places(frames))
        lsn = np.uint64(_LSN) + self._luck.of(frames)
        low = lsn & np.uint64(0xFFFFFFFF)
        luck = self._luck.of(frames) / self._shape.frames
        pieces = np.zeros(frames.size, _PIECE)
        pieces["space"] = key >> np.uint64(32)
        pieces["page"] = key & np.uint64(0xFFFFFFFF)
        pieces["lsn"] = lsn
        pieces["type"] = _TREE_PAGE
        pieces["trailer"] = np.where(luck < self._shape.dirty, low - np.uint64(1), low)
        pieces[luck >= 1 - self._shape.free] = np.zeros(1, _PIECE)[0]
        return pieces

    def _places(self, frames: U64) -> U64:
        """Which page of all tables each frame holds; no two hold the same."""
        within = frames % np.uint64(_READ_AHEAD)
        group = self._groups.of(frames // np.uint64(_READ_AHEAD))
        order = group * np.uint64(_READ_AHEAD) + within
        places = np.empty(frames.size, np.uint64)
        scanned = order < self._scanned
        places[scanned] = (
            self._scan_pages.of(group[scanned]) * np.uint64(_READ_AHEAD) + within[scanned]
        )
        single = order[~scanned] - np.uint64(self._scanned)
        places[~scanned] = self._single_pages.of(single) + np.uint64(self._first_single)
        return places

    def _note(self, began: float) -> None:
        with self._lock:
            self.seconds += time.thread_time() - began


def mtree(shape: Shape) -> str:
    """What QEMU would say of the guest's memory: one RAMBlock from address 0 on."""
    return (
        'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'
        f"  {0:016x}-{shape.guest_bytes - 1:016x} (prio 0, ram): pc.ram\n"
    )
