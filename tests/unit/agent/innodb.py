# SPDX-License-Identifier: Apache-2.0
"""InnoDB pages for the tests, as the servers write them."""

import struct

import numpy as np

from nova_dmigrate.agent import memory

CRYPT_MARK = b"s\x0e\x0cREt"


def page(
    space, number, lsn=1000, kind=17855, size=16384, full_crc32=False, dirty=False, fill=b"\xaa"
):
    """One page. ``dirty``: changed since it was written, so that the trailer has another LSN."""
    body = bytearray(fill * size)
    struct.pack_into(">IIIIQH8xI", body, 0, 0xC0FFEE, number, 0, 0, lsn, kind, space)
    low = (lsn - dirty) & 0xFFFFFFFF
    trailer = (low, 0xBADC0DE) if full_crc32 else (0xBADC0DE, low)
    struct.pack_into(">II", body, size - 8, *trailer)
    return bytes(body)


def first_page(space, flags, size=16384, mark=None, **others):
    """The first page of a tablespace. ``mark``: what follows MariaDB's mark of encryption."""
    body = bytearray(page(space, 0, kind=8, size=size, fill=b"\0", **others))
    struct.pack_into(">IIIII", body, 38, space, 0, 64, 64, flags)
    if mark is not None:
        body[size // 2 : size // 2 + len(CRYPT_MARK) + len(mark)] = CRYPT_MARK + mark
    return bytes(body)


class FakeMemory:
    """Stands in for ``memory.ProcessMemory``: one mapping, given as its frames.

    ``frames``: page content, or None for one that is not in memory. ``guest``: guest page of
    each 4 KiB, by default counted from 1000.
    """

    def __init__(self, frames, size=16384, start=0x7F0000000000, guest=None):
        self.start = start
        self.content = b"".join(frame or bytes(size) for frame in frames)
        pages = len(self.content) // memory.PAGE_SIZE
        self.guest = np.arange(1000, 1000 + pages) if guest is None else np.array(guest)
        self.guest = self.guest.astype(np.int64)
        for index, frame in enumerate(frames):
            if frame is None:
                per_frame = size // memory.PAGE_SIZE
                self.guest[index * per_frame : (index + 1) * per_frame] = -1

    def mappings(self, min_bytes=0):
        return [memory.Mapping(self.start, self.start + len(self.content))]

    def guest_pages(self, address, count):
        first = (address - self.start) // memory.PAGE_SIZE
        return self.guest[first : first + count].copy()

    def read_pieces(self, addresses, lengths):
        pieces = []
        for address, length in zip(addresses.tolist(), lengths.tolist()):
            begin = address - self.start
            first, last = begin // memory.PAGE_SIZE, (begin + length - 1) // memory.PAGE_SIZE
            assert (self.guest[first : last + 1] >= 0).all(), "touches what is not in memory"
            pieces.append(self.content[begin : begin + length])
        return np.frombuffer(b"".join(pieces), np.uint8).copy(), True
