# SPDX-License-Identifier: Apache-2.0
"""RAM records as NumPy arrays: how to build them, and how to find where a run of them ends.

Records that continue their block have a fixed size, so a run of them is an array of records.
Only headers are looked at; the pages' bytes are never touched.
"""

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nova_dmigrate.stream import format as fmt
from nova_dmigrate.stream.elements import Bytes, Offsets

PAGE_RECORD: Final = np.dtype([("header", ">u8"), ("page", "u1", (fmt.PAGE_SIZE,))])
ZERO_RECORD: Final = np.dtype([("header", ">u8"), ("fill", "u1")])

PAGE_CONTINUE: Final = fmt.PAGE | fmt.CONTINUE
ZERO_CONTINUE: Final = fmt.ZERO | fmt.CONTINUE

# The first FEW headers are looked at one by one, then FIRST_STEP at once, then STEP_GROWTH times
# as many at each further step: a stream that alternates between short runs must not pay for a look
# at the whole buffer at each of them.
FEW: Final = 6
FIRST_STEP: Final = 32
STEP_GROWTH: Final = 16

Mask: TypeAlias = NDArray[np.bool_]

_BIG_ENDIAN: Final = np.dtype(">u8")
_UINT64: Final = np.dtype(np.uint64)
_HEADER_AT: Final = fmt.U64.unpack_from
_FLAGS: Final = np.uint64(fmt.FLAGS)


def page_records(
    offsets: ArrayLike, pages: ArrayLike, into: NDArray[np.void] | None = None
) -> Bytes:
    """Build CONTINUE records of full pages.

    :param offsets: (n,) bytes from the block's start, multiples of 4 KiB
    :param pages: (n, 4096) uint8
    :param into: (n,) or more PAGE_RECORD, memory that is used in place of new
    :returns: (n * 4104,) uint8, contiguous
    """
    headers = np.asarray(offsets, dtype=np.uint64)
    count = len(headers)
    records = np.empty(count, dtype=PAGE_RECORD) if into is None else into[:count]
    records["header"] = headers | np.uint64(PAGE_CONTINUE)
    records["page"] = pages
    return records.view(np.uint8)


def zero_records(offsets: ArrayLike, fill: ArrayLike = 0) -> Bytes:
    """Build CONTINUE records of pages that hold one byte value.

    :param offsets: (n,) bytes from the block's start, multiples of 4 KiB
    :param fill: the byte, or (n,) of them
    :returns: (n * 9,) uint8, contiguous
    """
    headers = np.asarray(offsets, dtype=np.uint64)
    records = np.empty(len(headers), dtype=ZERO_RECORD)
    records["header"] = headers | np.uint64(ZERO_CONTINUE)
    records["fill"] = fill
    return records.view(np.uint8)


def run_offsets(
    data: memoryview, start: int, limit: int, stride: int, flags: int, first: int, used_length: int
) -> Offsets:
    """Find the run of records that begins at ``start``; return their offsets.

    The caller has checked the first record, whose block header may be longer than ours: only
    its ``first`` offset is taken. Every later record belongs to the run if its flags are exactly
    ``flags`` and its offset lies in the block.

    :param data: the bytes being parsed
    :param start: position of the first record's 8 bytes in front of its payload
    :param limit: how many whole records there are in the buffer, at least 1
    :param stride: bytes from a record to the next one
    :param flags: low 12 bits of each header, CONTINUE included
    :param first: the first record's offset in its block, bytes
    :param used_length: of the block, bytes, a multiple of 4 KiB
    :returns: (n,) uint64 offsets, n >= 1, an array of its own
    """
    # Short runs are common, and calls into NumPy are what they would cost.
    few = [first]
    for position in range(start + stride, start + min(limit, FEW) * stride, stride):
        offset = _HEADER_AT(data, position)[0] ^ flags
        if offset & fmt.FLAGS or offset >= used_length:
            limit = 0
            break
        few.append(offset)
    count = len(few)
    found: list[Offsets] = [np.array(few, _UINT64)]
    step = FIRST_STEP
    wanted = np.uint64(flags)
    while count < limit:
        headers = np.ndarray(
            min(step, limit - count), _BIG_ENDIAN, data, start + count * stride, (stride,)
        )
        # With the wanted flags out of the header a good one is a multiple of 4 KiB below
        # used_length; any other flags leave some of the low bits set.
        offsets: Offsets = headers.astype(_UINT64)
        offsets ^= wanted
        good: Mask = offsets < used_length
        good &= (offsets & _FLAGS) == 0
        length = int(good.argmin())
        if not good[length]:
            found.append(offsets[:length])
            break
        found.append(offsets)
        count += len(offsets)
        step *= STEP_GROWTH
    return found[0] if len(found) == 1 else np.concatenate(found)
