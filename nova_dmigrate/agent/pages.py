# SPDX-License-Identifier: Apache-2.0
"""InnoDB pages: what the first and the last bytes of a frame say about it.

All supported servers agree on them (MySQL 5.6 to 9, MariaDB 10 to 11): page number, LSN, type and
space id are in the first 38 bytes. When InnoDB writes a page, it repeats the low half of the LSN
in the trailer, in the last four bytes, or, in the format that MariaDB calls full_crc32, in the
four before those. MariaDB sets the LSN in the header as soon as it changes the page, so a frame
whose header and trailer differ has not been written since. MySQL sets both when it writes: there
a changed frame looks like a clean one, except that a page that was never written has no LSN; see
``descriptors``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from nova_dmigrate.agent import memory

HEADER_BYTES = 38
TRAILER_BYTES = 8
_PIECE_BYTES = HEADER_BYTES + TRAILER_BYTES

_RECORD = np.dtype(
    {
        "names": ["page", "lsn", "lsn_low", "type", "space", "trailer_crc", "trailer"],
        "formats": [">u4", ">u8", ">u4", ">u2", ">u4", ">u4", ">u4"],
        "offsets": [4, 16, 20, 24, 34, HEADER_BYTES, HEADER_BYTES + 4],
        "itemsize": _PIECE_BYTES,
    }
)

# Plain numbers up to the newest that MySQL 9 knows, with some room; the B-tree's are larger.
_MAX_PLAIN_TYPE = 64
_TREE_TYPES = (17853, 17855)

Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Headers:
    """What the frames of one stretch say, each array (frames,), in native byte order.

    ``space``, ``page``: u32. ``lsn``: u64. ``lsn_low``: its low half, u32. ``type``: u16.
    ``trailer`` and ``trailer_crc``: u32, the LSN's low half as the trailer has it, without and
    with full_crc32.
    """

    space: NDArray[np.uint32]
    page: NDArray[np.uint32]
    lsn: NDArray[np.uint64]
    lsn_low: NDArray[np.uint32]
    type: NDArray[np.uint16]
    trailer: NDArray[np.uint32]
    trailer_crc: NDArray[np.uint32]

    def written(self, full_crc32: Bools) -> Bools:
        """Whether header and trailer agree on the LSN, as they do in every page on disk."""
        written: Bools = self.lsn_low == np.where(full_crc32, self.trailer_crc, self.trailer)
        return written

    @property
    def plausible(self) -> Bools:
        """Whether LSN and type are ones that a page in use may have.

        For frames that nothing else vouches for: the heap is full of small numbers and pointers.
        """
        plausible: Bools = self._has_type & self.has_lsn & (self.type != 0)
        return plausible

    @property
    def is_page(self) -> Bools:
        """Whether the type is one that a page in use may have.

        For pages whose LSN means nothing: temporary tablespaces are not logged.
        """
        page: Bools = self._has_type & ((self.type != 0) | self.has_lsn)
        return page

    @property
    def _has_type(self) -> Bools:
        tree: Bools = (self.type >= _TREE_TYPES[0]) & (self.type <= _TREE_TYPES[1])
        known: Bools = (self.type <= _MAX_PLAIN_TYPE) | tree
        return known

    @property
    def has_lsn(self) -> Bools:
        """Whether there is an LSN; without one the page was never written.

        It counts the bytes of the log: none has come to 72 PB.
        """
        sane: Bools = (self.lsn != 0) & (self.lsn < np.uint64(1 << 56))
        return sane


def read_headers(
    process: memory.ProcessMemory, addresses: NDArray[np.uint64], page_size: int
) -> Headers:
    """Read header and trailer of the frames at ``addresses`` (u64 (frames,), ascending).

    Frames that vanish meanwhile are all zeros, which is no page.
    """
    starts, lengths = _pieces(addresses, page_size)
    content, _ = process.read_pieces(starts, lengths)
    return decode(content)


def decode(content: NDArray[np.uint8]) -> Headers:
    """Decode headers and trailers: u8 (frames * 46,), one frame after the other."""
    records = content.view(_RECORD)

    def native(name: str) -> NDArray[np.generic]:
        column = records[name]
        return column.astype(column.dtype.newbyteorder("="))

    return Headers(
        **{field.name: native(field.name) for field in dataclasses.fields(Headers)}  # type: ignore[arg-type]
    )


def _pieces(
    addresses: NDArray[np.uint64], page_size: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Where the 46 bytes of each frame lie: (address u64 (n,), length u64 (n,)).

    The trailer of a frame and the header of its neighbour adjoin, so in a run of frames there is
    one piece more than frames instead of twice as many; read one after the other they are header,
    trailer, header, trailer all the same.
    """
    size = np.uint64(page_size)
    count = addresses.size
    follows = np.zeros(count + 1, np.bool_)  # whether frame i begins where frame i - 1 ends
    if count > 1:
        follows[1:-1] = addresses[1:] == addresses[:-1] + size
    # Pieces: before each frame its header, with the trailer of the neighbour before it if there
    # is one; behind the last frame of a run the trailer alone.
    starts = addresses.copy()
    starts[follows[:-1]] -= np.uint64(TRAILER_BYTES)
    lengths = np.where(follows[:-1], np.uint64(_PIECE_BYTES), np.uint64(HEADER_BYTES))
    last = np.flatnonzero(~follows[1:])
    if not last.size:
        return starts, lengths
    trailers = addresses[last] + np.uint64(page_size - TRAILER_BYTES)
    return (
        np.insert(starts, last + 1, trailers),
        np.insert(lengths, last + 1, np.uint64(TRAILER_BYTES)),
    )
